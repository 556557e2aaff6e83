"""The editor as a diffusers pipeline. Sampling is that of `editrl.editing.edit_clip`."""

# No `from __future__ import annotations`: diffusers reads the types of `EditPipeline.__init__`.

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,  # noqa: F401  diffusers looks for it here, where model_index.json says the transformer's class is
)
from diffusers.loaders import HunyuanVideoLoraLoaderMixin
from diffusers.pipelines.hunyuan_video.pipeline_output import HunyuanVideoPipelineOutput
from diffusers.video_processor import VideoProcessor
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, LlavaForConditionalGeneration, LlavaProcessor

from editrl.data import EditExample, read_frames
from editrl.editing import edit_clip
from editrl.errors import EditrlError
from editrl.policies.hunyuan_video.instructor import Instructor
from editrl.policies.hunyuan_video.loading import EDITOR_SETTINGS
from editrl.policies.hunyuan_video.policy import SETTINGS_FILE, HunyuanVideoPolicy
from editrl.policies.hunyuan_video.transformer import HunyuanVideoEditTransformer3DModel
from editrl.policy import Conditions

DEFAULT_SHIFT = 7.0
OUTPUT_TYPES = ("pt", "np", "pil")

Video = Tensor | np.ndarray | Sequence[Image.Image] | Image.Image | str | Path
"""Tensor [F,3,H,W] or array [F,H,W,3], in [0,1] or uint8; an image of either without F; PIL images; a file."""


class EditPipeline(DiffusionPipeline, HunyuanVideoLoraLoaderMixin):
    """Edit videos and images by instruction.

        pipe = EditPipeline.from_pretrained("path/to/editor", dtype=torch.bfloat16).to("cuda")
        clip = pipe("clip.mp4", "make the car red").frames[0]  # [F,3,H,W] in [0,1]

    Args:
        transformer, vae, vlm, processor, text_encoder_2, tokenizer_2: the parts of `HunyuanVideoPolicy`.
        scheduler: only its shift is used, as the default of the flow's.
        editor_settings: what `HunyuanVideoPolicy.settings()` says, the instructor's prompts and so on.
    """

    model_cpu_offload_seq = "vlm->text_encoder_2->transformer->vae"
    _callback_tensor_inputs: Sequence[str] = ()

    def __init__(
        self,
        transformer: HunyuanVideoEditTransformer3DModel,
        vae: AutoencoderKLHunyuanVideo,
        vlm: LlavaForConditionalGeneration,
        processor: LlavaProcessor,
        text_encoder_2: CLIPTextModel,
        tokenizer_2: CLIPTokenizer,
        scheduler: FlowMatchEulerDiscreteScheduler,
        editor_settings: dict | None = None,
    ):
        super().__init__()
        self.register_modules(
            transformer=transformer,
            vae=vae,
            vlm=vlm,
            processor=processor,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            scheduler=scheduler,
        )
        self.register_to_config(editor_settings=dict(editor_settings or {}))

    # From and to folders.

    @classmethod
    def from_policy(
        cls, policy: HunyuanVideoPolicy, scheduler: FlowMatchEulerDiscreteScheduler | None = None
    ) -> "EditPipeline":
        """The pipeline of a loaded policy; they share their models. Without a scheduler, its shift is the policy's."""
        if policy.instructor is None or policy.text_encoder is None:
            raise EditrlError("this editor was loaded without its encoders; load it with them to make a pipeline")
        transformer = policy.transformer
        return cls(
            # The adapter's layers are in the base model itself.
            transformer=transformer.get_base_model() if isinstance(transformer, PeftModel) else transformer,
            vae=policy.vae,
            vlm=policy.instructor.model,
            processor=policy.instructor.processor,
            text_encoder_2=policy.text_encoder,
            tokenizer_2=policy.tokenizer,
            scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=policy.flow_shift or DEFAULT_SHIFT),
            editor_settings=policy.settings(),
        )

    @classmethod
    def from_pretrained(cls, path: str | Path, **kwargs) -> "EditPipeline":
        """Load a pipeline's folder, or an editor's, which has no model_index.json; or either from the Hub.

        Args:
            path: folder or Hub id.
            kwargs: for a pipeline those of `DiffusionPipeline.from_pretrained`, for an editor those of
                `HunyuanVideoPolicy.from_pretrained`; `dtype` for both, float32 where it is not given.
        """
        folder = _pipeline_folder(str(path))
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", torch.float32))
        if folder is not None:
            return super().from_pretrained(folder, dtype=dtype, **kwargs)
        policy, scheduler = HunyuanVideoPolicy.from_pretrained(str(path), dtype=dtype, **kwargs), None
        if policy.flow_shift is None:
            with contextlib.suppress(OSError):  # an editor's folder need not have one
                scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(path, subfolder="scheduler")
        return cls.from_policy(policy, scheduler)

    def save_pretrained(self, save_directory: str | Path, **kwargs) -> None:
        """Write a pipeline's folder as diffusers does. It is an editor's folder as well, for `--model_name_or_path`."""
        if any(isinstance(module, BaseTunerLayer) for module in self.transformer.modules()):
            raise EditrlError(
                "the transformer carries a LoRA, which would be written into its weights' names; fuse_lora() and "
                "unload_lora_weights() first, or unload_lora_weights() alone to save without it"
            )
        # Said here, because diffusers takes our package "hunyuan_video" for its own of that name.
        self.register_to_config(transformer=(__name__, HunyuanVideoEditTransformer3DModel.__name__))
        super().save_pretrained(str(save_directory), **kwargs)
        settings = json.dumps(self.policy.settings(), indent=2)
        (Path(save_directory) / SETTINGS_FILE).write_text(settings + "\n", encoding="utf-8")

    def load_lora_weights(self, pretrained_model_name_or_path_or_dict, adapter_name: str | None = None, **kwargs):
        """As in diffusers; the folder of a LoRA run of this library, which is PEFT's, is taken too."""
        folder = pretrained_model_name_or_path_or_dict
        if isinstance(folder, dict) or not (Path(folder) / "adapter_config.json").is_file():
            return super().load_lora_weights(folder, adapter_name=adapter_name, **kwargs)
        weights = load_file(Path(folder) / "adapter_model.safetensors")
        config = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
        return self.load_lora_into_transformer(
            {f"transformer.{name.removeprefix('base_model.model.')}": value for name, value in weights.items()},
            transformer=self.transformer,
            adapter_name=adapter_name,
            metadata={f"transformer.{name}": value for name, value in config.items()},
            _pipeline=self,
            **kwargs,
        )

    # Memory.

    def enable_vae_tiling(self) -> None:
        """Encode and decode in overlapping tiles: less memory, a little slower."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        self.vae.disable_tiling()

    def enable_vae_slicing(self) -> None:
        """Encode and decode one clip of a batch at a time."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        self.vae.disable_slicing()

    def enable_sequential_cpu_offload(self, *args, **kwargs) -> None:
        """Not offered: the VLM and the VAE are used by other methods than `forward`."""
        raise EditrlError(
            "EditPipeline has no sequential offload; use enable_model_cpu_offload(), or for less memory also "
            "pipe.transformer.enable_group_offload(...)"
        )

    def enable_context_parallel(self, degree: int) -> None:
        """Share each clip among `degree` neighbouring processes: see `HunyuanVideoPolicy.enable_context_parallel`.

        With `torch.distributed` initialised, on every process, after a LoRA is loaded. Then the processes of a group
        call the pipeline with the same arguments, generators of the same seed included, and get the same clip.
        """
        self.policy.enable_context_parallel(degree)

    # Editing.

    @property
    def policy(self) -> HunyuanVideoPolicy:
        """The policy of the present components."""
        settings = dict(self.config.editor_settings)
        own = {name: settings.pop(name) for name in EDITOR_SETTINGS if name in settings}
        return _PipelinePolicy(
            self.transformer,
            self.vae,
            Instructor(self.vlm, self.processor, **settings),
            self.text_encoder_2,
            self.tokenizer_2,
            run_on=self._execution_device,
            **own,
        )

    @torch.no_grad()
    def __call__(
        self,
        source_video: Video,
        instruction: str,
        reference_image: Video | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 6.0,
        true_cfg_scale: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        generator: torch.Generator | None = None,
        output_type: str = "pt",
        return_dict: bool = True,
        callback_on_step_end: Callable[["EditPipeline", int, float, dict], Any] | None = None,
        shift: float | None = None,
        ode_solver: str = "euler",
        **geometry,
    ) -> HunyuanVideoPipelineOutput | tuple:
        """Edit one clip, of any length and size, or an image.

        Args:
            source_video, reference_image: see `Video`; a reference is one image.
            num_inference_steps, ode_solver, true_cfg_scale: see `edit_clip`.
            guidance_scale: embedded guidance. 6 is HunyuanVideo's usual value; an editor that was trained with 1 and
                true classifier-free guidance wants 1 here.
            height, width: size at which to edit, instead of the source's; `fit` says how.
            num_frames: edit the first frames only.
            generator: decides the noise, and is advanced, so that a second call gives another edit.
            output_type: "pt" [1,F,3,H,W] in [0,1], "np" [1,F,H,W,3] in [0,1], or "pil", a list of lists.
            return_dict: False for a tuple.
            callback_on_step_end: called as (pipeline, step, sigma * 1000 of the step, {}) after each denoising step.
            shift: of the flow, instead of the scheduler's.
            geometry: `frames`, `fit`, `max_frames`, `overlap`, as in `edit_clip`.
        """
        if output_type not in OUTPUT_TYPES:
            raise EditrlError(f"output_type is {output_type!r}; use one of {', '.join(OUTPUT_TYPES)}")
        if (height is None) != (width is None):
            raise EditrlError(f"height is {height} and width is {width}; give both or neither")
        source = _video(source_video, num_frames)
        if num_frames is not None and not 1 <= num_frames <= len(source):
            raise EditrlError(f"num_frames is {num_frames}, the source has {len(source)} frames; ask for at most those")
        device = "cpu" if generator is None else generator.device
        seed = int(torch.randint(2**62, (), generator=generator, device=device))
        shift = self.scheduler.shift if shift is None else shift
        with self.progress_bar(total=num_inference_steps) as bar:

            def progress(done: int, forwards: int) -> None:
                step, rest = divmod(done, forwards // num_inference_steps)
                if rest:
                    return
                bar.update()
                if callback_on_step_end is not None:
                    uniform = 1 - (step - 1) / num_inference_steps
                    sigma = shift * uniform / (1 + (shift - 1) * uniform)
                    callback_on_step_end(self, step - 1, sigma * 1000, {})

            edited = edit_clip(
                self.policy,
                source[:num_frames],
                instruction,
                reference_image=None if reference_image is None else _video(reference_image)[:1],
                num_inference_steps=num_inference_steps,
                shift=shift,
                seed=seed,
                guidance_scale=guidance_scale,
                true_cfg_scale=true_cfg_scale,
                ode_solver=ode_solver,
                size=None if height is None else (height, width),
                progress=progress,
                **geometry,
            )
        self.maybe_free_model_hooks()
        video = VideoProcessor().postprocess_video(
            edited.transpose(0, 1)[None], output_type, do_denormalize=[False] * len(edited)
        )
        return HunyuanVideoPipelineOutput(frames=video) if return_dict else (video,)


class _PipelinePolicy(HunyuanVideoPolicy):
    """The policy of a pipeline whose models may wait in host memory. Their hooks wake them at `forward`, which is not
    how the VLM and the VAE are used, so they are woken here."""

    def __init__(self, *parts, run_on: torch.device, **settings):
        super().__init__(*parts, **settings)
        self.run_on = run_on

    @property
    def device(self) -> torch.device:
        return self.run_on

    def encode(self, examples: Sequence[EditExample], unconditional: bool = False) -> Conditions:
        _wake(self.instructor.model)
        return super().encode(examples, unconditional)

    def encode_videos(self, videos: Tensor) -> Tensor:
        _wake(self.vae)
        return super().encode_videos(videos)

    def decode(self, latents: Tensor) -> Tensor:
        _wake(self.vae)
        return super().decode(latents)


def _wake(module: torch.nn.Module) -> None:
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(module)


def _pipeline_folder(path: str) -> str | None:
    """The local folder of an EditPipeline, or None for what is none: an editor, or HunyuanVideo itself."""
    name = DiffusionPipeline.config_name
    if Path(path).is_dir():
        index, folder = Path(path) / name, path
    else:
        try:
            index, folder = Path(hf_hub_download(path, name)), None
        except (EntryNotFoundError, OSError, ValueError):  # no pipeline; the editor's loader says what else is wrong
            return None
    if not index.is_file() or json.loads(index.read_text())["_class_name"] != EditPipeline.__name__:
        return None
    # Not by `DiffusionPipeline.download`, which refuses a transformer that is no class of diffusers.
    return folder or snapshot_download(path)


def _video(given: Video, limit: int | None = None) -> Tensor:
    """Any of the forms of a `Video` as [F,3,H,W] float32 in [0,1]; of a file no more than `limit` frames are read."""
    if isinstance(given, str | Path):
        return read_frames(given, limit=limit)[0]
    if isinstance(given, Image.Image):
        given = [given]
    if isinstance(given, Sequence) and given and all(isinstance(image, Image.Image) for image in given):
        sizes = sorted({image.size for image in given})
        if len(sizes) > 1:
            raise EditrlError(f"the images of a video differ in size {sizes}; give them one")
        given = np.stack([np.asarray(image.convert("RGB")) for image in given])
    if isinstance(given, np.ndarray):
        given = torch.from_numpy(given).movedim(-1, -3)
    if not isinstance(given, Tensor):
        raise EditrlError(f"a video is a tensor, an array, PIL images or a file, this is a {type(given).__name__}")
    given = given[0] if given.dim() == 5 and len(given) == 1 else given
    given = given[None] if given.dim() == 3 else given
    return given.float() / 255 if given.dtype == torch.uint8 else given.float()
