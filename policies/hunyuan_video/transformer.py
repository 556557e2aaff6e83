"""HunyuanVideo's transformer with the source clip's latents joined on channels."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from diffusers import HunyuanVideoTransformer3DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_hunyuan_video import (
    HunyuanVideoPatchEmbed,
    HunyuanVideoSingleTransformerBlock,
)
from torch import Tensor, nn

from editrl.errors import EditrlError


class SourcePatchEmbed(HunyuanVideoPatchEmbed):
    """`Projector(concat(P_noise(noisy latents), P_source(source latents)))`, the patch embedding of VIVA.

    `proj` is the stock embedding of the noisy latents under its stock name, so a text-to-video checkpoint fills it. The
    projector starts as the identity on the noise half and zero on the source half: at step 0 the model *is* the
    text-to-video model, while gradients do reach the source half.

    Input [B, noise channels + source channels, f, h, w]; output [B, tokens, embed_dim].
    """

    def __init__(self, patch_size: tuple[int, int, int], noise_channels: int, source_channels: int, embed_dim: int):
        super().__init__(patch_size, noise_channels, embed_dim)
        self.noise_channels = noise_channels
        self.source_proj = nn.Conv3d(source_channels, embed_dim, kernel_size=patch_size, stride=patch_size)
        self.projector = nn.Linear(2 * embed_dim, embed_dim, bias=False)
        with torch.no_grad():
            self.projector.weight.copy_(torch.eye(embed_dim, 2 * embed_dim))

    def forward(self, hidden_states: Tensor) -> Tensor:
        noise, source = hidden_states.tensor_split([self.noise_channels], dim=1)
        tokens = torch.cat([self.proj(noise), self.source_proj(source)], dim=1)
        return self.projector(tokens.flatten(2).transpose(1, 2))


class DenseGradient(torch.autograd.Function):
    """The identity, whose gradient lies in memory as a tensor of its own and not as a part of a wider one.

    For what comes out of attention. cuDNN's backward is planned for the strides of this gradient; with PyTorch 2.11 on
    an H200 it made an illegal memory access at 14,440 tokens where some blocks gave it such a part and others did not.
    """

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient.contiguous()


class JoinedSingleTransformerBlock(HunyuanVideoSingleTransformerBlock):
    """The stock block, also for video and text tokens as one sequence that stays joined from block to block.

    The stock one joins them at its start, parts them for attention, joins them there again, and parts them at its end.
    """

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        temb: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        *args,
    ) -> tuple[Tensor, Tensor | None]:
        """As the stock block; with `encoder_hidden_states` None, `hidden_states` are all tokens [B,S,D], and
        `image_rotary_emb` has S rows."""
        if encoder_hidden_states is not None:
            return super().forward(hidden_states, encoder_hidden_states, temb, attention_mask, image_rotary_emb)
        normed, gate = self.norm(hidden_states, emb=temb)
        wide = self.act_mlp(self.proj_mlp(normed))
        attended, _ = self.attn(normed, None, attention_mask, image_rotary_emb=image_rotary_emb)
        both = torch.cat([DenseGradient.apply(attended), wide], dim=2)
        return hidden_states + gate.unsqueeze(1) * self.proj_out(both), None


def rope_of_joined(rope: tuple[Tensor, Tensor], text_length: int) -> tuple[Tensor, Tensor]:
    """Rotations [S,d] of the video tokens, with rows for text behind them that turn nothing."""
    cos, sin = rope
    still = cos.new_ones(text_length, cos.shape[1])
    return torch.cat([cos, still]), torch.cat([sin, torch.zeros_like(still)])


def _any_length(*dimensions: tuple[Tensor | None, int]) -> None:
    """Tell the compiler that these (tensor, dimension) will have other sizes."""
    if torch.compiler.is_compiling():  # the whole model, whose graph is not ours to cut
        return
    for tensor, dimension in dimensions:
        if tensor is not None:
            torch._dynamo.maybe_mark_dynamic(tensor, dimension)


class HunyuanVideoEditTransformer3DModel(HunyuanVideoTransformer3DModel):
    """Stock `HunyuanVideoTransformer3DModel` whose input carries `source_channels` more channels: [noise | source].

    A registered subclass rather than a swapped attribute: `from_pretrained` builds the class from its config, and an
    embedding swapped onto an instance would be lost there with a warning only.
    """

    _no_split_modules: ClassVar = [*HunyuanVideoTransformer3DModel._no_split_modules, "JoinedSingleTransformerBlock"]
    _repeated_blocks: ClassVar = [*HunyuanVideoTransformer3DModel._repeated_blocks, "JoinedSingleTransformerBlock"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 16,
        out_channels: int = 16,
        num_attention_heads: int = 24,
        attention_head_dim: int = 128,
        num_layers: int = 20,
        num_single_layers: int = 40,
        num_refiner_layers: int = 2,
        mlp_ratio: float = 4.0,
        patch_size: int = 2,
        patch_size_t: int = 1,
        qk_norm: str = "rms_norm",
        guidance_embeds: bool = True,
        text_embed_dim: int = 4096,
        pooled_projection_dim: int = 768,
        rope_theta: float = 256.0,
        rope_axes_dim: tuple[int, ...] = (16, 56, 56),
        image_condition_type: str | None = None,
        source_channels: int = 16,
    ) -> None:
        token_replace = image_condition_type == "token_replace"
        super().__init__(
            in_channels=in_channels,
            out_channels=out_channels,
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            num_layers=num_layers,
            num_single_layers=num_single_layers if token_replace else 0,
            num_refiner_layers=num_refiner_layers,
            mlp_ratio=mlp_ratio,
            patch_size=patch_size,
            patch_size_t=patch_size_t,
            qk_norm=qk_norm,
            guidance_embeds=guidance_embeds,
            text_embed_dim=text_embed_dim,
            pooled_projection_dim=pooled_projection_dim,
            rope_theta=rope_theta,
            rope_axes_dim=rope_axes_dim,
            image_condition_type=image_condition_type,
        )
        if not token_replace:  # whose blocks modulate the first tokens otherwise
            self.single_transformer_blocks = nn.ModuleList(
                JoinedSingleTransformerBlock(num_attention_heads, attention_head_dim, mlp_ratio, qk_norm)
                for _ in range(num_single_layers)
            )
            self.register_to_config(num_single_layers=num_single_layers)
        embed_dim = num_attention_heads * attention_head_dim
        self.x_embedder = SourcePatchEmbed(
            (patch_size_t, patch_size, patch_size), in_channels, source_channels, embed_dim
        )

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None,
        pooled_projections: Tensor,
        guidance: Tensor | None = None,
        return_dict: bool = True,
    ) -> tuple[Tensor] | Transformer2DModelOutput:
        """The stock forward, but for `encoder_attention_mask` None: no token is padding.

        Then attention needs no mask, for which its fast kernels have no room: on an H200 this alone takes a seventh off
        a step (`benchmarks/throughput/`). The stock class builds a mask whatever it is given.

        Args:
            hidden_states: [B, in_channels + source_channels, f, h, w], [noisy latents | source latents].
            timestep: float [B], 1000 * sigma.
            encoder_hidden_states: instructor tokens [B,L,text_embed_dim].
            encoder_attention_mask: [B,L], nonzero where a token is valid; padding is at the end.
            pooled_projections: [B,pooled_projection_dim].
            guidance: float [B], 1000 * guidance scale; for a model with `guidance_embeds`.

        Returns:
            Velocity [B,out_channels,f,h,w].
        """
        config = self.config
        grid = [size // config.patch_size for size in hidden_states.shape[-2:]]
        grid = [hidden_states.shape[2] // config.patch_size_t, *grid]
        rope = self.rope(hidden_states)
        temb, replaced = self.time_text_embed(timestep, pooled_projections, guidance)
        video = self.x_embedder(hidden_states)
        text = self.context_embedder(encoder_hidden_states, timestep, encoder_attention_mask)
        mask = None
        if encoder_attention_mask is not None:
            every_video_token = torch.ones_like(video[:, :, 0], dtype=torch.bool)
            mask = torch.cat([every_video_token, encoder_attention_mask != 0], dim=1)[:, None, None]
        shared = (temb, mask, rope, replaced, grid[1] * grid[2])
        for block in self.transformer_blocks:
            video, text = self._run(block, video, text, *shared)
        # Processes that share a clip hold the tokens in another order.
        joined = self._parallel_config is None and self.config.image_condition_type != "token_replace"
        if joined:
            rope = rope_of_joined(rope, text.shape[1])
            length, video, text = video.shape[1], torch.cat([video, text], dim=1), None
            shared = (temb, mask, rope)
        for block in self.single_transformer_blocks:
            video, text = self._run(block, video, text, *shared)
        if joined:
            video = video[:, :length]
        patches = self.proj_out(self.norm_out(video, temb))
        patches = patches.unflatten(1, grid).unflatten(-1, (-1, config.patch_size_t, *[config.patch_size] * 2))
        # [B, f, h, w, C, in f, in h, in w] -> [B, C, f, in f, h, in h, w, in w]
        velocity = patches.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

    def _run(
        self, block: nn.Module, video: Tensor, text: Tensor | None, temb: Tensor, mask: Tensor | None, rope, *others
    ) -> tuple[Tensor, Tensor | None]:
        # Compiled, one graph for instructions of all lengths: two would round differently.
        if text is None:
            _any_length((video, 1), (mask, 3), (rope[0], 0), (rope[1], 0))
        else:
            _any_length((text, 1), (mask, 3))
        inputs = (video, text, temb, mask, rope, *others)
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)

    started_anew: tuple[str, ...] = ()
    """Weights that the loaded checkpoint did not hold: those of the source path, for a text-to-video model."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As in diffusers; a text-to-video checkpoint fills all but the source path, which then starts as at step 0.

        diffusers leaves weights that no file holds without storage, or with whatever the memory held.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        model.start_source_path(info["missing_keys"])
        lost, unknown = sorted(set(info["missing_keys"]) - set(model.started_anew)), sorted(info["unexpected_keys"])
        if lost or unknown:
            what = (
                f"lacks {len(lost)} weights, the first is {lost[0]}" if lost else f"has the unknown weight {unknown[0]}"
            )
            raise EditrlError(f"the transformer in '{pretrained_model_name_or_path}' {what}; is it a HunyuanVideo?")
        return (model, info) if wants_info else model

    def start_source_path(self, missing: Sequence[str]) -> None:
        """Fill those of the weights `missing` that belong to the source path as at step 0."""
        missing = sorted(name for name in missing if name.startswith("x_embedder."))
        if not missing:
            return
        embedder = self.x_embedder
        fresh = SourcePatchEmbed(
            embedder.proj.kernel_size, embedder.noise_channels, self.config.source_channels, embedder.proj.out_channels
        ).to(embedder.proj.weight)
        values = {f"x_embedder.{name}": value for name, value in fresh.state_dict().items()}
        self.load_state_dict({name: values[name] for name in missing}, strict=False, assign=True)
        self.started_anew = tuple(missing)
