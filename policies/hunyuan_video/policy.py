"""HunyuanVideo as an editor: the policy of VIVA."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKLHunyuanVideo
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from torch import Tensor, nn
from torch.nn.functional import adaptive_max_pool2d
from transformers import AutoTokenizer, CLIPTextModel, LlavaForConditionalGeneration, LlavaProcessor

from editrl.data import EditExample
from editrl.errors import EditrlError, did_you_mean
from editrl.policies.hunyuan_video.instructor import Instructor
from editrl.policies.hunyuan_video.transformer import HunyuanVideoEditTransformer3DModel
from editrl.policy import Conditions, FlowPolicy
from editrl.registry import register_policy

SUBFOLDERS = {
    "transformer": HunyuanVideoEditTransformer3DModel,
    "vae": AutoencoderKLHunyuanVideo,
    "text_encoder_2": CLIPTextModel,
    "tokenizer_2": AutoTokenizer,
    "vlm": LlavaForConditionalGeneration,
    "processor": LlavaProcessor,
}
"""The folder of an editor: HunyuanVideo's Hub layout, with the instructor in `vlm/` and `processor/`."""

SETTINGS_FILE = "editor.json"
"""Beside those folders: the instructor's layer and prompts, which an editor must be used with as it was trained."""

DTYPES = ("float32", "bfloat16", "float16")


@register_policy("hunyuan_video")
class HunyuanVideoPolicy(FlowPolicy):
    """HunyuanVideo DiT conditioned on a LLaVA instructor and on source latents (VIVA).

    Args:
        transformer: the editing transformer.
        vae: frozen video autoencoder (16 channels, 4x8x8).
        instructor: frozen VLM over instruction, first frame and reference image.
        text_encoder, tokenizer: frozen CLIP-L whose pooled embedding of the instruction modulates the blocks.
        guidance_scale: embedded guidance; the model is fed 1000 times this, as diffusers does. 1.0 in training, 6.0 is
            HunyuanVideo's usual value at inference.
    """

    def __init__(
        self,
        transformer: HunyuanVideoEditTransformer3DModel,
        vae: AutoencoderKLHunyuanVideo,
        instructor: Instructor,
        text_encoder: CLIPTextModel,
        tokenizer,
        *,
        guidance_scale: float = 1.0,
    ):
        self.transformer = transformer
        self.vae = vae.eval().requires_grad_(False)
        self.instructor = instructor
        self.text_encoder = text_encoder.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.guidance_scale = guidance_scale
        self.frame_multiple = vae.temporal_compression_ratio
        self.size_multiple = vae.spatial_compression_ratio * transformer.config.patch_size
        expected, found = vae.config.latent_channels, transformer.config.in_channels
        if expected != found:
            raise EditrlError(
                f"the VAE has {expected} latent channels, the transformer takes {found}; use a matching pair"
            )

    def frozen_modules(self) -> list[nn.Module]:
        return [self.vae, self.instructor.model, self.text_encoder]

    @torch.no_grad()
    def encode(self, examples: Sequence[EditExample]) -> Conditions:
        shapes = sorted({tuple(example.source.shape) for example in examples})
        if len(shapes) > 1:
            raise EditrlError(f"clips of one batch differ in size {shapes}; set num_frames, height and width")
        sources = torch.stack([example.source for example in examples])
        tokens, mask = self.instructor(examples)
        return Conditions(
            {
                "source_latents": self.encode_videos(sources),
                "instructor_tokens": tokens,
                "instructor_mask": mask,
                "pooled_text": self._pooled_text([example.instruction for example in examples]),
            },
            sequences=frozenset({"instructor_tokens", "instructor_mask"}),
        )

    def _pooled_text(self, instructions: list[str]) -> Tensor:
        inputs = self.tokenizer(
            instructions, padding="max_length", truncation=True, max_length=self._max_text_length(), return_tensors="pt"
        )
        return self.text_encoder(inputs["input_ids"].to(self.text_encoder.device)).pooler_output

    def _max_text_length(self) -> int:
        return self.text_encoder.config.max_position_embeddings

    @torch.no_grad()
    def encode_videos(self, videos: Tensor) -> Tensor:
        pixels = videos.to(self.vae.device, self.vae.dtype).permute(0, 2, 1, 3, 4) * 2 - 1
        # The mode, not a sample: the same clip must always be the same condition.
        latents = self.vae.encode(pixels).latent_dist.mode()
        return latents.float() * self.vae.config.scaling_factor

    def latent_shape(self, conditions: Conditions) -> tuple[int, ...]:
        return tuple(conditions.source_latents.shape[1:])

    def velocity(
        self, transformer: nn.Module, latents: Tensor, sigma: Tensor | float, conditions: Conditions
    ) -> Tensor:
        dtype, device = self.transformer.dtype, latents.device
        batch_size = len(latents)
        # Formed in float32: a bfloat16 sigma times 1000 is wrong by more than a whole timestep.
        timestep = torch.as_tensor(sigma, dtype=torch.float32, device=device).expand(batch_size) * 1000
        guidance = None
        if self.transformer.config.guidance_embeds:
            guidance = torch.full((batch_size,), self.guidance_scale * 1000, dtype=torch.float32, device=device)
        output = transformer(
            hidden_states=torch.cat([latents, conditions.source_latents], dim=1).to(dtype),
            timestep=timestep,
            encoder_hidden_states=conditions.instructor_tokens.to(dtype),
            encoder_attention_mask=conditions.instructor_mask,
            pooled_projections=conditions.pooled_text.to(dtype),
            guidance=guidance,
            return_dict=False,
        )
        return output[0].float()

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

    def save_pretrained(self, path: str | Path) -> None:
        path = Path(path)
        self.transformer.save_pretrained(path / "transformer")
        self.vae.save_pretrained(path / "vae")
        self.text_encoder.save_pretrained(path / "text_encoder_2")
        self.tokenizer.save_pretrained(path / "tokenizer_2")
        self.instructor.model.save_pretrained(path / "vlm")
        self.instructor.processor.save_pretrained(path / "processor")
        (path / SETTINGS_FILE).write_text(json.dumps(self.instructor.settings(), indent=2) + "\n")

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        *,
        transformer: str | None = None,
        vlm: str | None = None,
        dtype: str | torch.dtype = "float32",
        guidance_scale: float = 1.0,
        **instructor_settings,
    ) -> HunyuanVideoPolicy:
        """Load an editor.

        Args:
            path: folder or Hub id with the subfolders `transformer vae text_encoder_2 tokenizer_2 vlm processor`.
            transformer: another folder that holds the transformer alone, such as a checkpoint of this library.
            vlm: another folder or Hub id of the whole VLM (model and processor together).
            dtype: of transformer, VLM and CLIP; the VAE stays in float32 unless dtype is float16 or bfloat16.
            guidance_scale: see the class.
            instructor_settings: `hidden_layer`, `edit_prompt`, `reference_prompt` of `Instructor`, over those that the
                folder's `editor.json` has.
        """
        if isinstance(dtype, str):
            if dtype not in DTYPES:
                raise EditrlError(f"policy dtype is '{dtype}'; choose one of {', '.join(DTYPES)}")
            dtype = getattr(torch, dtype)
        known = [name for name in inspect.signature(Instructor).parameters if name not in ("model", "processor")]
        for name in instructor_settings.keys() - set(known):
            options = [*known, "transformer", "vlm", "dtype", "guidance_scale"]
            raise EditrlError(f"the hunyuan_video policy has no argument '{name}'." + did_you_mean(name, options))
        settings = _saved_settings(path) | instructor_settings

        def load(kind: str, location: str, subfolder: str | None, method: str = "from_pretrained", **kwargs):
            if subfolder is not None:
                kwargs["subfolder"] = subfolder
            try:
                return getattr(SUBFOLDERS[kind], method)(location, **kwargs)
            except (OSError, ValueError) as error:
                where = f"'{location}'" + (f", subfolder '{subfolder}'" if subfolder else "")
                reason = str(error).strip().splitlines()[0]
                raise EditrlError(
                    f"cannot load the {kind} from {where}: {reason} "
                    "Give a folder in Hub layout, or download it first with `hf download`."
                ) from error

        whose, folder = (transformer, None) if transformer else (path, "transformer")
        load("transformer", whose, folder, method="load_config")  # a wrong folder must not wait for the VLM
        model = load("vlm", vlm or path, None if vlm else "vlm", dtype=dtype)
        processor = load("processor", vlm or path, None if vlm else "processor")
        if processor.patch_size is None:
            # The LLaVA-LLaMA-3 checkpoint comes without a processor configuration; its vision tower is a CLIP, whose
            # class token is the one additional image token.
            processor.patch_size = model.config.vision_config.patch_size
            processor.vision_feature_select_strategy = model.config.vision_feature_select_strategy
            processor.num_additional_image_tokens = 1
        instructor = Instructor(model, processor, **settings)
        return cls(
            load("transformer", whose, folder, torch_dtype=dtype),
            load("vae", path, "vae", torch_dtype=dtype),
            instructor,
            load("text_encoder_2", path, "text_encoder_2", dtype=dtype),
            load("tokenizer_2", path, "tokenizer_2"),
            guidance_scale=guidance_scale,
        )


def _saved_settings(path: str) -> dict:
    """The instructor settings of an editor's folder or Hub repository; empty where it has none, as HunyuanVideo's."""
    file = Path(path) / SETTINGS_FILE
    if not Path(path).is_dir():
        try:
            file = Path(hf_hub_download(path, SETTINGS_FILE))
        except (LocalEntryNotFoundError, RepositoryNotFoundError, HFValidationError) as error:
            reason = str(error).strip().splitlines()[0]
            raise EditrlError(
                f"cannot read the editor '{path}': {reason} Give a folder, or run `hf download {path}` first."
            ) from error
        except EntryNotFoundError:
            return {}
    return json.loads(file.read_text()) if file.exists() else {}
