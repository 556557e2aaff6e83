"""HunyuanVideo as an editor: the policy of VIVA."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKLHunyuanVideo
from torch import Tensor, nn
from torch.nn.functional import adaptive_max_pool2d
from transformers import CLIPTextModel

from editrl.cache import module_fingerprint, settings_fingerprint, tokenizer_fingerprint
from editrl.data import EditExample
from editrl.data.video import fit, to_uint8
from editrl.errors import EditrlError
from editrl.policies.hunyuan_video.instructor import Instructor
from editrl.policies.hunyuan_video.parallel import (
    check_tokens,
    context_parallel_degree,
    enable_context_parallel,
    trim_text,
)
from editrl.policies.hunyuan_video.transformer import HunyuanVideoEditTransformer3DModel
from editrl.policy import Conditions, FlowPolicy
from editrl.registry import register_policy

SETTINGS_FILE = "editor.json"
"""Beside the models' folders: what an editor must be used with as it was trained (instructor, reference)."""

REFERENCE_POSITIONS = ("last", "first", "none")
REFERENCE_NOISES = ("noise", "zeros")


@register_policy("hunyuan_video")
class HunyuanVideoPolicy(FlowPolicy):
    """HunyuanVideo DiT conditioned on a LLaVA instructor and on source latents (VIVA).

    Args:
        transformer: the editing transformer.
        vae: frozen video autoencoder (16 channels, 4x8x8).
        instructor: frozen VLM over instruction, source frames and reference image.
        text_encoder, tokenizer: frozen CLIP-L whose pooled embedding of the instruction modulates the blocks. These
            and the instructor may be None where conditions come from a cache; `encode` then is an error.
        guidance_scale: embedded guidance; the model is fed 1000 times this, as diffusers does. 1.0 in training, 6.0 is
            HunyuanVideo's usual value at inference.
        reference_position: where the latent of the reference image joins the source's latents in time: "last" or
            "first" slot, or "none" (it then reaches the model through the instructor only).
        flow_shift: timestep shift to sample with. None: by resolution, 5 up to 480p and 7 above, as HunyuanVideo.
        instructor_settings: those of the instructor that made the cached conditions, where `instructor` is None.
        reference_noise: what stands in the noise half of that slot: "noise" (fixed for each image, the same in rollout
            and update) or "zeros". The slot is no part of the result.
    """

    transformer_class = HunyuanVideoEditTransformer3DModel

    def __init__(
        self,
        transformer: HunyuanVideoEditTransformer3DModel,
        vae: AutoencoderKLHunyuanVideo,
        instructor: Instructor | None,
        text_encoder: CLIPTextModel | None,
        tokenizer,
        *,
        guidance_scale: float = 1.0,
        reference_position: str = "last",
        reference_noise: str = "noise",
        flow_shift: float | None = None,
        instructor_settings: dict | None = None,
    ):
        for name, value, known in (
            ("reference_position", reference_position, REFERENCE_POSITIONS),
            ("reference_noise", reference_noise, REFERENCE_NOISES),
        ):
            if value not in known:
                raise EditrlError(f"{name} is {value!r}; use one of {', '.join(known)}")
        self.transformer = transformer
        self.vae = vae.eval().requires_grad_(False)
        self.instructor = instructor
        self.text_encoder = text_encoder if text_encoder is None else text_encoder.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.guidance_scale = guidance_scale
        self.reference_position, self.reference_noise = reference_position, reference_noise
        self.flow_shift = flow_shift
        self.instructor_settings = instructor_settings or {}
        self.frame_multiple = vae.temporal_compression_ratio
        self.size_multiple = vae.spatial_compression_ratio * transformer.config.patch_size
        self._check_parts()

    def _check_parts(self) -> None:
        config = self.transformer.config
        widths = [("VAE's latents", self.vae.config.latent_channels, "in_channels", config.in_channels)]
        if self.instructor is not None:
            widths.append(("VLM's tokens", self.instructor.width, "text_embed_dim", config.text_embed_dim))
        if self.text_encoder is not None:
            pooled = self.text_encoder.config.hidden_size
            widths.append(("text encoder's embedding", pooled, "pooled_projection_dim", config.pooled_projection_dim))
        for what, found, field, expected in widths:
            if found != expected:
                raise EditrlError(
                    f"the {what} have {found} channels, the transformer's {field} is {expected}; use a matching pair"
                )

    def frozen_modules(self) -> list[nn.Module]:
        instructor = None if self.instructor is None else self.instructor.model
        return [module for module in (self.vae, instructor, self.text_encoder) if module is not None]

    def decoding_modules(self) -> list[nn.Module]:
        return [self.vae]

    def settings(self) -> dict:
        """What `editor.json` holds."""
        own = {name: getattr(self, name) for name in ("reference_position", "reference_noise", "flow_shift")}
        return (self.instructor_settings if self.instructor is None else self.instructor.settings()) | own

    def shift_for(self, height: int, width: int) -> float:
        if self.flow_shift is not None:
            return self.flow_shift
        return 5.0 if height * width <= 480 * 864 else 7.0

    # Conditions.

    @torch.no_grad()
    def encode(self, examples: Sequence[EditExample], unconditional: bool = False) -> Conditions:
        if self.instructor is None or self.text_encoder is None:
            raise EditrlError(
                "this editor was loaded without its encoders (encoders: false), so it edits cached conditions only; "
                "give conditions_cache, or load it with its encoders"
            )
        shapes = sorted({tuple(example.source.shape) for example in examples})
        if len(shapes) > 1:
            raise EditrlError(f"clips of one batch differ in size {shapes}; set num_frames, height and width")
        sources = torch.stack([example.source for example in examples])
        instructions = [None if unconditional else example.instruction for example in examples]
        tokens, mask = self.instructor(examples, instructions)
        tensors = {
            "source_latents": self.encode_videos(sources),
            "instructor_tokens": tokens,
            "instructor_mask": mask,
            "pooled_text": self._pooled_text([instruction or "" for instruction in instructions]),
        }
        if self.reference_position != "none":
            tensors |= self._reference(examples, tensors["source_latents"])
        return Conditions(tensors, sequences=frozenset({"instructor_tokens", "instructor_mask"}))

    def compact(self, conditions: Conditions) -> Conditions:
        tensors = dict(conditions.tensors)
        if "instructor_mask" in tensors:
            tokens, mask = trim_text(tensors["instructor_tokens"], tensors["instructor_mask"], self.context_parallel)
            tensors |= {"instructor_tokens": tokens, "instructor_mask": mask}
            if mask.all():
                del tensors["instructor_mask"]
        if "has_reference" in tensors:
            marked = tensors["has_reference"]
            if marked.all():
                del tensors["has_reference"]
            elif not marked.any():
                for name in ("has_reference", "reference_latents", "reference_noise"):
                    del tensors[name]
        return Conditions(tensors, conditions.sequences)

    def _reference(self, examples: Sequence[EditExample], sources: Tensor) -> dict[str, Tensor]:
        """Latents and noise [B,C,1,h,w] of the reference images, zeros where there is none, and who has one [B]."""
        latents, noise = torch.zeros_like(sources[:, :, :1]), torch.zeros_like(sources[:, :, :1])
        has = [example.reference_image is not None for example in examples]
        for row in (row for row, found in enumerate(has) if found):
            image = fit(examples[row].reference_image[:1].float(), *examples[row].source.shape[-2:])
            latents[row : row + 1] = self.encode_videos(image.unsqueeze(0))
            if self.reference_noise == "noise":
                noise[row] = _noise_of(image, noise[row])
        flags = torch.tensor(has, device=sources.device)
        return {"reference_latents": latents, "reference_noise": noise, "has_reference": flags}

    def _pooled_text(self, instructions: list[str]) -> Tensor:
        inputs = self.tokenizer(
            instructions, padding="max_length", truncation=True, max_length=self._max_text_length(), return_tensors="pt"
        )
        return self.text_encoder(inputs["input_ids"].to(self.text_encoder.device)).pooler_output

    def _max_text_length(self) -> int:
        return self.text_encoder.config.max_position_embeddings

    # Latents.

    @torch.no_grad()
    def encode_videos(self, videos: Tensor) -> Tensor:
        pixels = videos.to(self.vae.device, self.vae.dtype).permute(0, 2, 1, 3, 4) * 2 - 1
        # The mode, not a sample: the same clip must always be the same condition.
        latents = self.vae.encode(pixels).latent_dist.mode()
        return latents.float() * self.vae.config.scaling_factor

    def latent_shape(self, conditions: Conditions) -> tuple[int, ...]:
        return tuple(conditions.source_latents.shape[1:])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        latents = (latents / self.vae.config.scaling_factor).to(self.vae.device, self.vae.dtype)
        pixels = self.vae.decode(latents, return_dict=False)[0]
        return (pixels.float().permute(0, 2, 1, 3, 4) / 2 + 0.5).clamp(0, 1)

    def latent_mask(self, masks: Tensor) -> Tensor:
        # The causal VAE puts the first frame into a latent frame of its own, then `frame_multiple` frames into each.
        batch, frames, _, height, width = masks.shape
        ratio = self.vae.spatial_compression_ratio
        pooled = adaptive_max_pool2d(masks.flatten(0, 1), (height // ratio, width // ratio)).unflatten(
            0, (batch, frames)
        )
        first, rest = pooled[:, :1], pooled[:, 1:]
        rest = rest.unflatten(1, (-1, self.frame_multiple)).amax(2) if frames > 1 else rest
        return torch.cat([first, rest], dim=1).transpose(1, 2)

    # Velocity.

    def velocity(
        self, transformer: nn.Module, latents: Tensor, sigma: Tensor | float, conditions: Conditions
    ) -> Tensor:
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=latents.device).expand(len(latents))
        marked = conditions.tensors.get("has_reference")
        if marked is None:  # all or none, as `compact` leaves it
            method = self._velocity_with_reference if "reference_latents" in conditions.tensors else self._velocity
            return method(transformer, latents, sigma, conditions)
        if not marked.any():
            return self._velocity(transformer, latents, sigma, conditions)
        if marked.all():
            return self._velocity_with_reference(transformer, latents, sigma, conditions)
        # A reference is a frame more, so those with and those without are batches of their own.
        velocity = torch.zeros_like(latents)
        for rows, method in (
            (marked.nonzero()[:, 0], self._velocity_with_reference),
            ((~marked).nonzero()[:, 0], self._velocity),
        ):
            part = method(transformer, latents[rows], sigma[rows], conditions[rows])
            velocity = velocity.index_copy(0, rows, part)
        return velocity

    def _velocity_with_reference(
        self, transformer: nn.Module, latents: Tensor, sigma: Tensor, conditions: Conditions
    ) -> Tensor:
        def joined(video: Tensor, frame: Tensor) -> Tensor:
            return torch.cat([video, frame] if self.reference_position == "last" else [frame, video], dim=2)

        longer = Conditions(
            conditions.tensors | {"source_latents": joined(conditions.source_latents, conditions.reference_latents)},
            conditions.sequences,
        )
        velocity = self._velocity(transformer, joined(latents, conditions.reference_noise), sigma, longer, 1)
        return velocity[:, :, :-1] if self.reference_position == "last" else velocity[:, :, 1:]

    @property
    def context_parallel(self) -> int:
        return context_parallel_degree(self.transformer)

    def enable_context_parallel(self, degree: int) -> None:
        """Share the tokens of each clip among `degree` neighbouring processes (Ulysses): see `parallel`.

        After LoRA is attached and before DDP or DeepSpeed wrap the transformer. The trainers and `editrl edit` do it
        where `context_parallel` says so, and see to the two duties that come with it. All processes of a group must be
        given the same latents, sigma and conditions. Each then holds its tokens' share of every gradient: the sum over
        the group is the gradient, so where gradients are averaged, multiply the loss by `degree`.

        Raises:
            EditrlError: the processes or the attention heads do not divide by `degree`, there is no process group, or
                the transformer is parallel already. At the first velocity: the tokens of a clip do not divide.
        """
        enable_context_parallel(self.transformer, degree)

    def _velocity(
        self, transformer: nn.Module, latents: Tensor, sigma: Tensor, conditions: Conditions, extra_frames: int = 0
    ) -> Tensor:
        dtype = self.transformer.dtype
        tokens, mask = conditions.instructor_tokens, conditions.tensors.get("instructor_mask")
        if (degree := self.context_parallel) > 1:
            if mask is not None:
                tokens, mask = trim_text(tokens, mask, degree)
            config = self.transformer.config
            check_tokens(
                latents.shape,
                (config.patch_size_t, config.patch_size, config.patch_size),
                tokens.shape[1],
                degree,
                frame_multiple=self.frame_multiple,
                size_multiple=self.size_multiple,
                extra_frames=extra_frames,
            )
        guidance = None
        if self.transformer.config.guidance_embeds:
            guidance = torch.full_like(sigma, self.guidance_scale * 1000)
        output = transformer(
            hidden_states=torch.cat([latents, conditions.source_latents], dim=1).to(dtype),
            # Formed in float32: a bfloat16 sigma times 1000 is wrong by more than a whole timestep.
            timestep=sigma * 1000,
            encoder_hidden_states=tokens.to(dtype),
            encoder_attention_mask=mask,
            pooled_projections=conditions.pooled_text.to(dtype),
            guidance=guidance,
            return_dict=False,
        )
        return output[0].float()

    # Folders.

    def save_pretrained(self, path: str | Path) -> None:
        path = Path(path)
        if self.instructor is None or self.text_encoder is None:
            raise EditrlError("this editor was loaded without its encoders, so it is no whole editor to save")
        self.transformer.save_pretrained(path / "transformer")
        self.vae.save_pretrained(path / "vae")
        self.text_encoder.save_pretrained(path / "text_encoder_2")
        self.tokenizer.save_pretrained(path / "tokenizer_2")
        self.instructor.model.save_pretrained(path / "vlm")
        self.instructor.processor.save_pretrained(path / "processor")
        (path / SETTINGS_FILE).write_text(json.dumps(self.settings(), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, path: str, **options) -> HunyuanVideoPolicy:
        """Load an editor, or HunyuanVideo's text-to-video weights as one at its start: see `loading.load_parts`."""
        from editrl.policies.hunyuan_video.loading import load_parts

        return cls(**load_parts(path, **options))

    @classmethod
    def sketch(
        cls, path: str, frames: int, height: int, width: int, transformer: str | None = None, **options
    ) -> tuple[nn.Module, Callable[[torch.dtype], tuple], str]:
        from editrl.policies.hunyuan_video.sketch import block_inputs, sketch_transformer

        model, source = sketch_transformer(transformer, path)
        return model, lambda dtype: block_inputs(model, frames, height, width, dtype), source

    def fingerprint(self) -> str:
        reference = [self.reference_position != "none", self.reference_noise]
        parts = {"vae": module_fingerprint(self.vae), "reference": settings_fingerprint(reference)}
        seen_by_vlm = self.instructor_settings if self.instructor is None else self.instructor.settings()
        if seen_by_vlm:
            parts["instructor"] = settings_fingerprint(seen_by_vlm)
        if self.instructor is not None:
            processor = self.instructor.processor
            parts["vlm"] = module_fingerprint(self.instructor.model)
            vocabulary = tokenizer_fingerprint(processor.tokenizer)
            parts["processor"] = settings_fingerprint([processor.to_dict(), vocabulary])
        if self.text_encoder is not None:
            parts["text_encoder"] = module_fingerprint(self.text_encoder)
            parts["tokenizer"] = tokenizer_fingerprint(self.tokenizer)
        return " ".join(f"{part}:{digest}" for part, digest in parts.items())


def _noise_of(image: Tensor, like: Tensor) -> Tensor:
    """Standard normal in the shape of `like`, a function of the image [1,3,h,w] alone."""
    digest = hashlib.sha256(to_uint8(image).numpy().tobytes()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randn(like.shape, generator=generator).to(like)
