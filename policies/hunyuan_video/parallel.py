"""Ulysses context parallelism of HunyuanVideo's transformer: `degree` processes share the tokens of one clip.

Every process of a group must be given the same inputs (clips, noise, sigma), which nothing checks, and returns the
whole velocity. In the blocks it holds 1/degree of the video and of the text tokens; attention exchanges tokens for
heads. Weights are not split; patch embedding and text refiner run in full on every process.

    enable_context_parallel(transformer, degree)  # once: LoRA adapters before it, DDP or DeepSpeed after it
    tokens, mask = trim_text(tokens, mask, degree)  # at every call, from here on
    check_tokens(latents.shape[1:], patch_size, tokens.shape[1], degree)

**Gradients.** A process's gradient, that of every parameter and that of the inputs too, holds the share of its own
tokens: the sum over the group is the gradient of one process. DDP and DeepSpeed take the mean over all processes
instead, so the loss is multiplied by `degree` before `backward`.

**Padding.** Any, and another for each sample: the transformer's mask is brought into the order of the exchanged tokens
(`_mask_in_rank_order`). With diffusers' context parallelism alone, the mask is right only while a sample has no more
padding than one process has text tokens; beyond, video tokens are masked and padding is attended to, without an error.
Trimming does not cure that where the instructions of a batch differ in length.
"""

import math

import torch
from diffusers import ContextParallelConfig, HunyuanVideoTransformer3DModel
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from peft import PeftModel
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.functional import pad

from editrl.errors import EditrlError

# No `expected_dims`: where they do not match, diffusers warns and leaves the tensor whole.
PLAN = {
    "rope": {index: ContextParallelInput(split_dim=0, split_output=True) for index in (0, 1)},
    "transformer_blocks.0": {
        "hidden_states": ContextParallelInput(split_dim=1),
        "encoder_hidden_states": ContextParallelInput(split_dim=1),
    },
    "proj_out": ContextParallelOutput(gather_dim=1),
}
"""What diffusers splits and gathers; dimension 0 of the RoPE tensors and 1 of the states is the token."""


def enable_context_parallel(transformer: nn.Module, degree: int) -> None:
    """Share the tokens of a clip among groups of `degree` processes; 1 changes nothing.

    `torch.distributed` must be initialised. Consecutive ranks are a group: with 8 processes and degree 4, ranks 0-3
    work on one clip and ranks 4-7 on another. Every rank of the world must call this.

    Args:
        transformer: the transformer or a PEFT model around it. Gradient checkpointing may be on or off. An adapter of
            `proj_out` that is attached later fails at the first call, for the output is gathered before it.
        degree: divides the number of processes and the attention heads.
    """
    if degree == 1:
        return
    model = _base_model(transformer)
    _check_processes(degree)
    _check_model(model, degree)
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=degree, mesh=_mesh(degree)), cp_plan=PLAN)
    for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
        block.attn.register_forward_pre_hook(_mask_in_rank_order, with_kwargs=True)
    model.__deepcopy__ = _refuse_copy


def context_parallel_degree(transformer: nn.Module) -> int:
    """How many processes share a clip in this transformer, or in the one that a PEFT model wraps."""
    config = _base_model(transformer)._parallel_config
    return 1 if config is None else config.context_parallel_config.ulysses_degree


def trim_text(tokens: Tensor, mask: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    """Cut text to the longest of the batch, rounded up to a multiple; what is missing there becomes padding.

    Args:
        tokens: [B,L,D].
        mask: [B,L], nonzero where a token is valid; padding is at the end.
        multiple: the context-parallel degree.

    Returns:
        Tokens and mask of the new length.
    """
    # Not the sum: a hole in a mask must not cut off the token behind it.
    positions = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    longest = int((positions * (mask != 0)).max())
    length = max(math.ceil(longest / multiple), 1) * multiple
    missing = max(length - mask.shape[1], 0)
    return pad(tokens[:, :length], (0, 0, 0, missing)), pad(mask[:, :length], (0, missing))


def check_tokens(
    latent_shape: tuple[int, ...],
    patch_size: tuple[int, int, int],
    text_length: int,
    degree: int,
    *,
    frame_multiple: int = 4,
    size_multiple: int = 16,
    extra_frames: int = 0,
) -> None:
    """Refuse a clip or a text whose tokens `degree` processes cannot share equally, and say which clips they can.

    Args:
        latent_shape: (..., f, h, w) of what the transformer is given, extra frames included.
        patch_size: latent cells of one token along frames, height and width.
        text_length: text tokens, padding included.
        degree: processes that share a clip.
        frame_multiple, size_multiple: the policy's; the message counts frames and pixels of the clip with them.
        extra_frames: latent frames that are not the clip's, such as that of a reference image.
    """
    frames, height, width = (cells // patch for cells, patch in zip(latent_shape[-3:], patch_size, strict=True))
    tokens = frames * height * width
    if tokens % degree:
        clips = [patch_size[0] * count - extra_frames for count in _nearest(frames, height * width, degree)]
        counts = [frame_multiple * (clip - 1) + 1 for clip in clips if clip > 0]
        heights = [size_multiple * count for count in _nearest(height, frames * width, degree)]
        widths = [size_multiple * count for count in _nearest(width, frames * height, degree)]
        fitting = math.gcd(tokens, degree)
        raise EditrlError(
            f"a clip of {frames} x {height} x {width} = {tokens} video tokens cannot be shared by {degree} "
            f"context-parallel processes, {tokens % degree} are left over; set num_frames to {_either(counts)}, or "
            f"height to {_either(heights)}, or width to {_either(widths)}, or the degree to {fitting}"
        )
    if text_length % degree:
        raise EditrlError(
            f"{text_length} text tokens cannot be shared by {degree} context-parallel processes, "
            f"{text_length % degree} are left over; bring them to a multiple with trim_text(tokens, mask, {degree})"
        )


def _base_model(transformer: nn.Module) -> HunyuanVideoTransformer3DModel:
    return transformer.get_base_model() if isinstance(transformer, PeftModel) else transformer


def _mask_in_rank_order(attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook: the mask [..., all video | all text] in the order in which attention will hold the tokens.

    After the exchange those are [video of rank 0 | text of rank 0 | video of rank 1 | ...], because each rank joins its
    own shares first. diffusers leaves the mask as it is.
    """
    if kwargs["attention_mask"] is None:  # no token is padding
        return args, kwargs
    video, text = kwargs["hidden_states"].shape[1], kwargs["encoder_hidden_states"].shape[1]  # one rank's share
    mask = kwargs["attention_mask"]
    degree = mask.shape[-1] // (video + text)
    of_video, of_text = mask.split([degree * video, degree * text], dim=-1)
    shares = [of_video.unflatten(-1, (degree, video)), of_text.unflatten(-1, (degree, text))]
    return args, kwargs | {"attention_mask": torch.cat(shares, dim=-1).flatten(-2)}


def _refuse_copy(memo: dict) -> None:
    # diffusers' hooks call the module they were put on: a copy would run the original's first block and output layer.
    raise EditrlError(
        "a transformer cannot be copied once it is context-parallel; copy it first, then call enable_context_parallel "
        "on both"
    )


def _check_processes(degree: int) -> None:
    if degree < 1:
        raise EditrlError(f"the context-parallel degree is {degree}; set it to 1 or more")
    if not (distributed.is_available() and distributed.is_initialized()):
        raise EditrlError(
            f"context parallelism of degree {degree} needs {degree} processes, but torch.distributed is not "
            f"initialised; start with `torchrun --nproc-per-node {degree}`, or set the degree to 1"
        )
    world = distributed.get_world_size()
    if world % degree:
        fitting = [count for count in range(1, world + 1) if world % count == 0]
        raise EditrlError(
            f"{world} processes cannot form groups of the context-parallel degree {degree}; set the degree to "
            f"{_either(fitting)}, or start a multiple of {degree} processes"
        )
    if torch.accelerator.device_count() == 0:
        # Its `enable_parallelism` divides by the number of devices.
        raise EditrlError(
            f"context parallelism of degree {degree} needs GPUs, and diffusers finds 0; set the degree to 1 on a CPU"
        )


def _check_model(model: HunyuanVideoTransformer3DModel, degree: int) -> None:
    heads = model.config.num_attention_heads
    if heads % degree:
        fitting = [count for count in range(1, heads + 1) if heads % count == 0]
        raise EditrlError(
            f"the transformer's {heads} attention heads cannot be shared by {degree} context-parallel processes; set "
            f"the degree to {_either(fitting)}"
        )
    if model.config.image_condition_type == "token_replace":
        # Its blocks modulate the first tokens they see as the first frame; of later ranks those are other frames.
        raise EditrlError(
            "a transformer with image_condition_type 'token_replace' does not work with context parallelism; set the "
            "context-parallel degree to 1"
        )
    if model._parallel_config is not None:
        raise EditrlError(
            "this transformer is parallel already; call enable_context_parallel once, before the first forward pass"
        )


def _mesh(degree: int) -> DeviceMesh:
    """[data, ring, ulysses]. Left to itself, diffusers makes a mesh of the first `degree` ranks only."""
    on_cpu = distributed.get_backend() == "gloo"
    device = "cpu" if on_cpu else torch.accelerator.current_accelerator().type
    shape = (distributed.get_world_size() // degree, 1, degree)
    return init_device_mesh(device, shape, mesh_dim_names=("data", "ring", "ulysses"))


def _nearest(count: int, others: int, degree: int) -> list[int]:
    """The numbers next to `count`, below (if above 0) and above, that make `count * others` divide by `degree`."""
    step = degree // math.gcd(others, degree)
    below = count // step * step
    return [number for number in (below, below + step) if number > 0]


def _either(numbers: list[int]) -> str:
    return " or ".join(str(number) for number in numbers)
