"""From folders in Hub layout to the parts of an editor."""

from __future__ import annotations

import inspect
import json
import logging
from pathlib import Path

import torch
from diffusers import AutoencoderKLHunyuanVideo
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import safe_open
from transformers import AutoTokenizer, CLIPTextModel, LlavaForConditionalGeneration, LlavaProcessor

from editrl.errors import EditrlError, did_you_mean
from editrl.policies.hunyuan_video.instructor import Instructor, instructor_settings
from editrl.policies.hunyuan_video.policy import SETTINGS_FILE
from editrl.policies.hunyuan_video.transformer import HunyuanVideoEditTransformer3DModel
from editrl.policies.hunyuan_video.weights import load_adapter

logger = logging.getLogger(__name__)

SUBFOLDERS = {
    "transformer": HunyuanVideoEditTransformer3DModel,
    "vae": AutoencoderKLHunyuanVideo,
    "text_encoder_2": CLIPTextModel,
    "tokenizer_2": AutoTokenizer,
    "vlm": LlavaForConditionalGeneration,
    "processor": LlavaProcessor,
}
"""The folder of an editor: HunyuanVideo's Hub layout, with the instructor in `vlm/` and `processor/`."""

DTYPES = ("float32", "bfloat16", "float16")
EDITOR_SETTINGS = ("reference_position", "reference_noise", "flow_shift")
INSTRUCTOR_SETTINGS = tuple(
    name for name in inspect.signature(Instructor).parameters if name not in ("model", "processor")
)


def load_parts(
    path: str,
    *,
    transformer: str | None = None,
    vlm: str | None = None,
    adapter: str | None = None,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    encoders: bool = True,
    guidance_scale: float = 1.0,
    **settings,
) -> dict:
    """The arguments of `HunyuanVideoPolicy`.

    Args:
        path: folder or Hub id with the subfolders `transformer vae text_encoder_2 tokenizer_2 vlm processor`.
        transformer: another folder that holds the transformer alone, such as a checkpoint of this library.
        vlm: another folder or Hub id of the whole VLM (model and processor together).
        adapter: a LoRA for the transformer: the folder of a checkpoint of this library, or a folder or file in
            diffusers' format. It stays an adapter, and can be trained on.
        dtype: of transformer, VLM and CLIP; the VAE stays in float32 unless dtype is float16 or bfloat16.
        device: the transformer's weights are streamed straight to this device, tensor by tensor, so that a process
            needs no copy of them in host memory; processes of one host share the file's pages. Default: host memory,
            also streamed, and never twice.
        encoders: False leaves out the VLM and CLIP, for training on cached conditions.
        guidance_scale: see `HunyuanVideoPolicy`.
        settings: `hidden_layer`, `frames`, `edit_prompt`, `reference_prompt`, `text_prompt` of `Instructor`, and
            `reference_position`, `reference_noise`, `flow_shift` of `HunyuanVideoPolicy`, over those of the folder's
            `editor.json`.
    """
    dtype = _dtype(dtype)
    known = [*INSTRUCTOR_SETTINGS, *EDITOR_SETTINGS]
    options = ["transformer", "vlm", "adapter", "dtype", "device", "encoders", "guidance_scale", *known]
    for name in settings.keys() - set(known):
        raise EditrlError(f"the hunyuan_video policy has no argument '{name}'." + did_you_mean(name, options))
    settings = _saved_settings(path) | settings

    whose, folder = (transformer, None) if transformer else (path, "transformer")
    _load("transformer", whose, folder, method="load_config")  # a wrong folder must not wait for the VLM
    seen_by_vlm = {name: value for name, value in settings.items() if name in INSTRUCTOR_SETTINGS}
    parts = dict.fromkeys(("instructor", "text_encoder", "tokenizer"))
    parts["instructor_settings"] = instructor_settings(**seen_by_vlm)
    if encoders:
        parts = {
            "instructor": _instructor(path, vlm, dtype, seen_by_vlm),
            "text_encoder": _load("text_encoder_2", path, "text_encoder_2", dtype=dtype),
            "tokenizer": _load("tokenizer_2", path, "tokenizer_2"),
        }
    if device is None:
        model = _load("transformer", whose, folder, torch_dtype=dtype)
    else:
        model = stream_transformer(whose, folder, dtype, device)
    if model.started_anew:
        logger.warning("'%s' is no editor yet; new, and to be trained: %s", whose, ", ".join(model.started_anew))
    return parts | {
        "transformer": model if adapter is None else load_adapter(model, adapter),
        "vae": _load("vae", path, "vae", torch_dtype=dtype),
        "guidance_scale": guidance_scale,
        **{name: settings[name] for name in EDITOR_SETTINGS if name in settings},
    }


def stream_transformer(
    location: str, subfolder: str | None, dtype: torch.dtype, device: str | torch.device
) -> HunyuanVideoEditTransformer3DModel:
    """A transformer whose weights go from the (memory-mapped) files to `device`, one tensor at a time.

    diffusers' own `device_map` does the same, but not for a checkpoint that lacks weights, as a text-to-video one does.
    """
    config = _load("transformer", location, subfolder, method="load_config")
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())  # safetensors takes "cuda" for the first GPU
    folder = Path(location)
    if not folder.is_dir():
        folder = Path(snapshot_download(location, allow_patterns=f"{subfolder or ''}*"))
    folder = folder / subfolder if subfolder else folder
    files = sorted(folder.glob("diffusion_pytorch_model*.safetensors"))
    if not files:
        raise EditrlError(
            f"cannot load the transformer from '{folder}': it holds no diffusion_pytorch_model*.safetensors"
        )
    with torch.device("meta"):
        model = HunyuanVideoEditTransformer3DModel.from_config(config)
    missing = set(model.state_dict())
    for file in files:
        with safe_open(file, "pt", device=str(device)) as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no dict
                if name not in missing:
                    raise EditrlError(
                        f"'{file}' has the weight '{name}', which a HunyuanVideo transformer does not have"
                    )
                model.load_state_dict({name: opened.get_tensor(name).to(dtype)}, strict=False, assign=True)
                missing.remove(name)
    model.start_source_path(sorted(missing))
    lost = sorted(missing - set(model.started_anew))
    if lost:
        raise EditrlError(f"the transformer in '{folder}' lacks {len(lost)} weights, the first is {lost[0]}")
    return model.eval()


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise EditrlError(f"policy dtype is '{dtype}'; choose one of {', '.join(DTYPES)}")
        dtype = getattr(torch, dtype)
    return dtype


def _instructor(path: str, vlm: str | None, dtype: torch.dtype, settings: dict) -> Instructor:
    model = _load("vlm", vlm or path, None if vlm else "vlm", dtype=dtype)
    processor = _load("processor", vlm or path, None if vlm else "processor")
    if processor.patch_size is None:
        # The LLaVA-LLaMA-3 checkpoint comes without a processor configuration; its vision tower is a CLIP, whose
        # class token is the one additional image token.
        processor.patch_size = model.config.vision_config.patch_size
        processor.vision_feature_select_strategy = model.config.vision_feature_select_strategy
        processor.num_additional_image_tokens = 1
    return Instructor(model, processor, **settings)


def _load(kind: str, location: str, subfolder: str | None, method: str = "from_pretrained", **kwargs):
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


def _saved_settings(path: str) -> dict:
    """The settings of an editor's folder or Hub repository; empty where it has none, as HunyuanVideo's."""
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
