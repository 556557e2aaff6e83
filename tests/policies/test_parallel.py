"""Context parallelism of HunyuanVideo's transformer: processes that share the tokens of a clip compute what one does.

Under pytest this file starts itself once, as a program (`python test_parallel.py <folder>`). That starts 2 and then 4
processes, which do every case of `CASES` and save what they found; the tests compare it with one process.
"""

import copy
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from editrl.errors import EditrlError
from editrl.policies.hunyuan_video import parallel
from editrl.policies.hunyuan_video.parallel import check_tokens, enable_context_parallel, trim_text
from editrl.policies.hunyuan_video.transformer import HunyuanVideoEditTransformer3DModel

DEGREE = 2
CHANNELS = 16
# Two blocks of each kind: the first one splits the tokens, the second one gets them split.
SHAPE = {
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "text_embed_dim": 24,
    "pooled_projection_dim": 20,
    "rope_axes_dim": (4, 6, 6),
}
LATENTS = (2, 4, 6)  # 12 video tokens
HANG = 60  # seconds after which a collective fails
TIMEOUT = 240  # seconds after which the processes are killed

# name: (valid text lengths of the two samples, length of the padded text)
TEXTS = {
    "no padding": ([8, 8], 8),
    "padding within the last rank's share": ([8, 5], 8),
    "padding beyond the last rank's share": ([8, 2], 8),
    "padding beyond it in both samples": ([3, 2], 12),
}
BEYOND = [name for name in TEXTS if "beyond" in name]
VARIANTS = ["plain", "checkpointing", "lora", "lora and checkpointing"]


def transformer(variant: str = "plain", **shape) -> nn.Module:
    torch.manual_seed(0)
    model = HunyuanVideoEditTransformer3DModel(**{**SHAPE, **shape})
    with torch.no_grad():
        for parameter in model.parameters():  # far from the start, where the source is not seen and text hardly
            parameter.add_(0.1 * torch.randn_like(parameter))
    if "lora" in variant:
        targets = ["to_q", "to_v", "add_q_proj", "proj_mlp", "proj_out"]  # the last also hits the gathered layer
        model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    if "checkpointing" in variant:
        (model.get_base_model() if "lora" in variant else model).enable_gradient_checkpointing()
    return model.train()


def inputs(text: str, trimmed: bool = False) -> dict[str, Tensor]:
    """Two samples; the same in every process. Padding holds large values, so that attending to it shows."""
    lengths, padded = TEXTS[text]
    generator = torch.Generator().manual_seed(1)
    mask = (torch.arange(padded) < torch.tensor(lengths)[:, None]).long()
    tokens = torch.randn(2, padded, SHAPE["text_embed_dim"], generator=generator) + 5.0 * (1 - mask.unsqueeze(-1))
    if trimmed:
        tokens, mask = trim_text(tokens, mask, DEGREE)
    return {
        "hidden_states": torch.randn(2, 2 * CHANNELS, *LATENTS, generator=generator),
        "timestep": torch.tensor([900.0, 317.5]),
        "encoder_hidden_states": tokens,
        "encoder_attention_mask": mask,
        "pooled_projections": torch.randn(2, SHAPE["pooled_projection_dim"], generator=generator),
        "guidance": torch.tensor([6000.0, 1000.0]),
    }


def loss_of(velocity: Tensor) -> Tensor:
    """Other weights for each cell, so that a gradient of swapped tokens is another gradient."""
    weights = torch.randn(velocity.shape[1:], generator=torch.Generator().manual_seed(2))
    return (velocity * weights).square().mean()


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def step(model: nn.Module, given: dict[str, Tensor]) -> dict:
    """Velocity, and gradients of the parameters and of the latents."""
    latents = given["hidden_states"].requires_grad_()
    velocity = model(**given, return_dict=False)[0]
    loss_of(velocity).backward()
    return {"velocity": velocity.detach(), "gradients": gradients_of(model) | {"latents": latents.grad}}


def refusal(model: nn.Module, degree: int) -> str:
    return refusal_of(lambda: enable_context_parallel(model, degree))


def refusal_of(action: Callable) -> str:
    try:
        action()
    except EditrlError as error:
        return str(error)
    return "not refused"


# -- what the processes do ---------------------------------------------------------------------------------------------


def shared(variant: str, text: str, trimmed: bool) -> dict:
    model = transformer(variant)
    enable_context_parallel(model, DEGREE)
    return step(model, inputs(text, trimmed))


def with_mask_as_diffusers_leaves_it(text: str, trimmed: bool) -> dict:
    with mock.patch.object(parallel, "_mask_in_rank_order", lambda *_: None):
        return shared("plain", text, trimmed)


@torch.no_grad()
def sampled() -> dict:
    model = transformer().eval()
    enable_context_parallel(model, DEGREE)
    return {"velocity": model(**inputs("padding beyond the last rank's share"), return_dict=False)[0]}


def refused() -> dict:
    twice = transformer()
    enable_context_parallel(twice, DEGREE)
    of_one = transformer()
    enable_context_parallel(of_one, 1)
    with mock.patch("torch.accelerator.device_count", lambda: 0):
        without_gpus = refusal(transformer(), DEGREE)
    return {
        "processes": refusal(transformer(num_attention_heads=3), 3),
        "heads": refusal(transformer(num_attention_heads=3), DEGREE),
        "degree": refusal(transformer(), 0),
        "no GPUs": without_gpus,
        "first frame": refusal(transformer(image_condition_type="token_replace"), DEGREE),
        "twice": refusal(twice, DEGREE),
        "copy": refusal_of(lambda: copy.deepcopy(twice)),
        "parallel at degree 1": of_one._parallel_config is not None,
    }


def data_parallel() -> dict:
    """4 processes, 2 groups of 2: a sample for each group, gradients averaged by DDP."""
    model = transformer("lora")
    enable_context_parallel(model, DEGREE)
    sample = distributed.get_rank() // DEGREE
    given = {name: tensor[[sample]] for name, tensor in inputs("padding beyond the last rank's share").items()}
    wrapped = DistributedDataParallel(model)
    velocity = wrapped(**given, return_dict=False)[0]
    (loss_of(velocity) * DEGREE).backward()
    return {"velocity": velocity.detach(), "gradients": gradients_of(model)}


CASES = {
    2: {
        **{(v, t, trimmed): (shared, v, t, trimmed) for v in VARIANTS for t in TEXTS for trimmed in (False, True)},
        **{("stock", t, cut): (with_mask_as_diffusers_leaves_it, t, cut) for t in TEXTS for cut in (False, True)},
        "sampled": (sampled,),
        "refused": (refused,),
    },
    4: {"data parallel": (data_parallel,)},
}


def do_cases(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store{world}"
    distributed.init_process_group("gloo", store, timedelta(seconds=HANG), world_size=world, rank=rank)
    # diffusers divides the rank by the number of GPUs, to note a device that nothing here uses.
    with mock.patch("torch.accelerator.device_count", lambda: 1):
        found = {name: function(*arguments) for name, (function, *arguments) in CASES[world].items()}
    torch.save(found, folder / f"{rank} of {world}.pt")
    distributed.destroy_process_group()


def main(folder: Path) -> None:
    # Forked, the processes need not import everything again, which takes longer than all cases.
    method = "fork" if sys.platform == "linux" else "spawn"
    for world in CASES:
        multiprocessing.start_processes(do_cases, (world, folder), nprocs=world, start_method=method)


# -- the tests ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory, run_program) -> dict[int, list[dict]]:
    """What each rank of each world found."""
    folder = tmp_path_factory.mktemp("ranks")
    run_program(__file__, folder, TIMEOUT)
    return {world: [torch.load(folder / f"{rank} of {world}.pt") for rank in range(world)] for world in CASES}


@pytest.fixture
def two_ranks(found) -> list[dict]:
    return found[2]


@pytest.fixture
def four_ranks(found) -> list[dict]:
    return found[4]


def one_process(variant: str, text: str) -> dict:
    return step(transformer(variant), inputs(text))


def largest_difference(found: Tensor, expected: Tensor) -> float:
    return (found - expected).abs().max().item()


@pytest.mark.parametrize("trimmed", [False, True], ids=["as it is", "trimmed"])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_processes_that_share_a_clip_compute_what_one_does(variant, text, trimmed, two_ranks):
    expected = one_process(variant, text)
    found = [rank[variant, text, trimmed] for rank in two_ranks]
    for one in found:
        torch.testing.assert_close(one["velocity"], expected["velocity"], rtol=1e-5, atol=5e-6)
        assert one["gradients"].keys() == expected["gradients"].keys()
    names = expected["gradients"].keys()
    assert any("lora" in name for name in names) == ("lora" in variant)
    for name in names:
        total = sum(one["gradients"][name] for one in found)
        torch.testing.assert_close(total, expected["gradients"][name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_gradient_of_one_process_is_a_share_only(rank, two_ranks):
    expected = one_process("plain", "no padding")["gradients"]
    found = two_ranks[rank]["plain", "no padding", False]["gradients"]
    for name in expected:
        if expected[name].abs().max() > 1e-6:  # a bias of keys shifts all scores alike
            assert largest_difference(found[name], expected[name]) > 0.01 * expected[name].abs().max(), name


@pytest.mark.parametrize("trimmed", [False, True], ids=["as it is", "trimmed"])
@pytest.mark.parametrize("text", TEXTS)
def test_the_mask_that_diffusers_leaves_is_right_within_the_last_share_only(text, trimmed, two_ranks):
    """Why the mask is brought into order; trimming does not do when the instructions of a batch differ in length."""
    expected = one_process("plain", text)["velocity"]
    error = largest_difference(two_ranks[0]["stock", text, trimmed]["velocity"], expected)
    still_beyond = text in BEYOND and not (trimmed and text == "padding beyond it in both samples")
    assert (error > 1e-3) if still_beyond else (error < 1e-5)


def test_sampling_without_gradients(two_ranks):
    expected = one_process("plain", "padding beyond the last rank's share")["velocity"]
    for rank in two_ranks:
        torch.testing.assert_close(rank["sampled"]["velocity"], expected, rtol=1e-5, atol=5e-6)


def test_groups_of_processes_train_on_their_own_samples(four_ranks):
    """DDP takes the mean over all four; a loss times the degree makes that the mean over the two samples."""
    model = transformer("lora")
    velocity = model(**inputs("padding beyond the last rank's share"), return_dict=False)[0]
    torch.stack([loss_of(one) for one in velocity.split(1)]).mean().backward()
    expected = gradients_of(model)
    for rank, found in enumerate(four_ranks):
        found = found["data parallel"]
        torch.testing.assert_close(found["velocity"], velocity[[rank // DEGREE]].detach(), rtol=1e-5, atol=5e-6)
        assert found["gradients"].keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(found["gradients"][name], expected[name], rtol=1e-4, atol=1e-6, msg=name)


# -- text --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "padded", "multiple", "expected"),
    [([3, 2], 12, 2, 4), ([4, 1], 12, 2, 4), ([5, 5], 5, 4, 8), ([8, 8], 8, 1, 8), ([7], 7, 7, 7), ([0], 6, 2, 2)],
)
def test_text_is_cut_or_padded_to_a_multiple(lengths, padded, multiple, expected):
    tokens = torch.randn(len(lengths), padded, 3, dtype=torch.bfloat16)
    mask = (torch.arange(padded) < torch.tensor(lengths)[:, None]).long()
    cut, cut_mask = trim_text(tokens, mask, multiple)
    assert cut.shape == (len(lengths), expected, 3) and cut_mask.shape == (len(lengths), expected)
    assert cut.dtype == tokens.dtype and cut_mask.dtype == mask.dtype
    assert cut_mask.sum(1).tolist() == lengths
    kept = min(expected, padded)
    assert torch.equal(cut[:, :kept], tokens[:, :kept])
    assert torch.equal(cut_mask[:, :kept], mask[:, :kept])
    assert not cut[:, kept:].any() and not cut_mask[:, kept:].any()


def test_a_valid_token_is_never_cut_off():
    tokens, mask = torch.randn(1, 6, 3), torch.tensor([[True, False, False, True, False, False]])
    assert torch.equal(trim_text(tokens, mask, 2)[0], tokens[:, :4])


@torch.no_grad()
@pytest.mark.parametrize("text", TEXTS)
def test_trimming_does_not_change_the_velocity(text):
    model = transformer().eval()
    expected, found = (model(**inputs(text, trimmed)).sample for trimmed in (False, True))
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)


# -- errors ------------------------------------------------------------------------------------------------------------

PATCH = (1, 2, 2)


@pytest.mark.parametrize(
    ("shape", "degree"), [((21, 60, 104), 8), ((16, 21, 96, 144), 8), ((1, 6, 6), 3), ((2, 4, 6), 2)]
)
def test_clips_that_divide_are_taken(shape, degree):
    assert check_tokens(shape, PATCH, 3 * degree, degree) is None, "it would raise"


@pytest.mark.parametrize(
    ("shape", "degree", "parts"),
    [
        ((21, 60, 104), 16, ["21 x 30 x 52 = 32760", "16 ", "8 are", "77 or 85", "448 or 512", "768 or 896", "to 8"]),
        # 26 x 25 x 58 = 37,700: the size of the paper that 8 processes do not share
        ((26, 50, 116), 8, ["37700", "8 ", "4 are", "93 or 109", "384 or 416", "896 or 960", "to 4"]),
        ((1, 2, 2), 2, ["1 x 1 x 1 = 1", "1 are", "num_frames to 5", "height to 32", "width to 32", "degree to 1"]),
    ],
)
def test_a_clip_that_does_not_divide_is_refused_with_what_would_fit(shape, degree, parts):
    with pytest.raises(EditrlError) as caught:
        check_tokens(shape, PATCH, 16 * degree, degree)
    message = str(caught.value)
    assert not [part for part in parts if part not in message], message
    assert "\n" not in message


@pytest.mark.parametrize(("shape", "degree"), [((21, 60, 104), 16), ((26, 50, 116), 8), ((5, 6, 10), 6)])
def test_what_the_message_proposes_does_fit(shape, degree):
    with pytest.raises(EditrlError) as caught:
        check_tokens(shape, PATCH, degree, degree)
    frames, heights, widths, (fitting,) = (
        [int(number) for number in part.split() if number.isdigit()]
        for part in str(caught.value).split("; set ")[1].split(", or ")
    )
    for count in frames:
        check_tokens(((count - 1) // 4 + 1, *shape[1:]), PATCH, degree, degree)
    for height in heights:
        check_tokens((shape[0], height // 8, shape[2]), PATCH, degree, degree)
    for width in widths:
        check_tokens((*shape[:2], width // 8), PATCH, degree, degree)
    check_tokens(shape, PATCH, fitting, fitting)


def test_a_reference_frame_is_not_counted_among_the_frames_of_the_clip():
    with pytest.raises(EditrlError, match=r"6 x 1 x 1 = 6 video tokens.* num_frames to 9 or 25,"):
        check_tokens((6, 2, 2), PATCH, 4, 4, extra_frames=1)
    with pytest.raises(EditrlError, match=r"3 x 1 x 1 = 3 video tokens.* num_frames to 5,"):
        check_tokens((3, 2, 2), PATCH, 2, 2, extra_frames=2)  # two latent frames fit, but then none is the clip's


def test_text_that_does_not_divide_is_refused():
    with pytest.raises(EditrlError, match=r"37 text tokens cannot be shared by 4 .* 1 are left over.*trim_text"):
        check_tokens((1, 4, 4), PATCH, 37, 4)


def test_without_processes_it_is_refused():
    assert not distributed.is_initialized()
    message = refusal(transformer(), 2)
    assert "torch.distributed is not initialised" in message
    assert "--nproc-per-node 2" in message


@pytest.mark.parametrize(
    ("what", "parts"),
    [
        ("processes", ["2 processes", "degree 3", "1 or 2"]),
        ("heads", ["3 attention heads", "2 context-parallel processes", "1 or 3"]),
        ("degree", ["degree is 0"]),
        ("no GPUs", ["needs GPUs", "finds 0"]),
        ("first frame", ["token_replace"]),
        ("twice", ["once"]),
        ("copy", ["copy it first"]),
    ],
)
def test_what_cannot_be_parallel_is_refused(what, parts, two_ranks):
    for rank in two_ranks:
        message = rank["refused"][what]
        assert not [part for part in parts if part not in message], message
        assert "\n" not in message


def test_degree_1_changes_nothing(two_ranks):
    assert not two_ranks[0]["refused"]["parallel at degree 1"]
    enable_context_parallel(transformer(), 1)  # nor does it need processes


if __name__ == "__main__":
    main(Path(sys.argv[1]))
