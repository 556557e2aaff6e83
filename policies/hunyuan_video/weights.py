"""Weights between this library and stock diffusers: the fused transformer, and LoRA adapters in both formats."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import HunyuanVideoPipeline, HunyuanVideoTransformer3DModel
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from editrl.errors import EditrlError
from editrl.policies.hunyuan_video.transformer import HunyuanVideoEditTransformer3DModel

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
DIFFUSERS_PREFIX = "transformer."
PEFT_PREFIX = "base_model.model."


@torch.no_grad()
def fuse(transformer: HunyuanVideoEditTransformer3DModel) -> HunyuanVideoTransformer3DModel:
    """The same function as a stock `HunyuanVideoTransformer3DModel` of twice the input channels: [noise | source].

    Patch embeddings and projector are linear, so they are one patch embedding: P [Wn n + bn; Ws s + bs] =
    [Pn Wn, Ps Ws] [n; s] + Pn bn + Ps bs, computed in float32. All other weights are shared with `transformer`, not
    copied: change neither of the two afterwards.
    """
    config = {name: value for name, value in transformer.config.items() if not name.startswith("_")}
    config["in_channels"] += config.pop("source_channels")
    embedder = transformer.x_embedder
    with torch.device("meta"):
        stock = HunyuanVideoTransformer3DModel.from_config(config)
    of_noise, of_source = embedder.projector.weight.float().chunk(2, dim=1)
    halves = ((of_noise, embedder.proj), (of_source, embedder.source_proj))
    kernels = [torch.einsum("de,ecfhw->dcfhw", matrix, conv.weight.float()) for matrix, conv in halves]
    bias = sum(matrix @ conv.bias.float() for matrix, conv in halves)
    dtype = embedder.proj.weight.dtype
    state = {name: value for name, value in transformer.state_dict().items() if not name.startswith("x_embedder.")}
    state["x_embedder.proj.weight"] = torch.cat(kernels, dim=1).to(dtype)
    state["x_embedder.proj.bias"] = bias.to(dtype)
    stock.load_state_dict(state, assign=True)
    return stock.train(transformer.training)


def load_adapter(transformer: HunyuanVideoEditTransformer3DModel, path: str | Path) -> PeftModel:
    """The transformer with the LoRA of `path` on it, trainable: a PEFT folder, or diffusers' folder or file.

    Raises:
        EditrlError: there is no adapter, or it was made for another base model.
    """
    path = Path(path)
    try:
        if (path / "adapter_config.json").is_file():
            model = PeftModel.from_pretrained(transformer, path, is_trainable=True)
            saved = load_file(path / "adapter_model.safetensors").keys()
        else:
            model, saved = _load_diffusers_adapter(transformer, path)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise EditrlError(f"cannot load the adapter '{path}': {reason}. Was it made for this base model?") from error
    missing = set(get_peft_model_state_dict(model)) ^ set(saved)
    if missing:
        raise EditrlError(
            f"the adapter '{path}' is for another base model: {len(missing)} of its weights do not fit, the first is "
            f"{min(missing)}"
        )
    return model


def _load_diffusers_adapter(transformer, path: Path) -> tuple[PeftModel, list[str]]:
    file = path / DIFFUSERS_FILE if path.is_dir() else path
    if not file.is_file():
        raise EditrlError(
            f"'{path}' is no adapter: it has neither adapter_config.json (PEFT) nor {DIFFUSERS_FILE} (diffusers)"
        )
    with safe_open(file, "pt") as opened:
        metadata = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
    options = {
        name.removeprefix(DIFFUSERS_PREFIX): value
        for name, value in metadata.items()
        if name.startswith(DIFFUSERS_PREFIX)
    }
    state = {PEFT_PREFIX + name.removeprefix(DIFFUSERS_PREFIX): value for name, value in load_file(file).items()}
    if not options:  # older files say nothing; alpha is the rank there
        down = {name: value for name, value in state.items() if name.endswith("lora_A.weight")}
        modules = [name.removeprefix(PEFT_PREFIX).removesuffix(".lora_A.weight") for name in down]
        rank = next(iter(down.values())).shape[0]
        options = {"r": rank, "lora_alpha": rank, "target_modules": modules}
    known = LoraConfig.__dataclass_fields__
    model = get_peft_model(transformer, LoraConfig(**{k: v for k, v in options.items() if k in known}))
    set_peft_model_state_dict(model, state)
    return model, list(state)


def save_diffusers_adapter(model: PeftModel, folder: str | Path) -> None:
    """Write the LoRA of a transformer as stock diffusers loads it: `pipe.load_lora_weights(folder)`.

    The base there is the `fuse`d transformer (or HunyuanVideo itself, for a LoRA that was not trained for editing).

    Raises:
        EditrlError: the LoRA is on the patch embedding, which stock HunyuanVideo does not have in this form.
    """
    state = {name.removeprefix(PEFT_PREFIX): value for name, value in get_peft_model_state_dict(model).items()}
    own = sorted(name for name in state if name.startswith("x_embedder."))
    if own:
        raise EditrlError(
            f"the LoRA has weights on the source path ({own[0]}), which a stock transformer does not have; "
            "merge_and_unload() it and export the whole transformer"
        )
    HunyuanVideoPipeline.save_lora_weights(
        str(folder),
        transformer_lora_layers={name: _contiguous(value) for name, value in state.items()},
        transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )


def _contiguous(value: Tensor) -> Tensor:
    return value.detach().cpu().contiguous()
