"""A frozen CLIP, from transformers or open_clip: frames and texts become unit vectors of one space.

Specs: a folder or Hub id in transformers' format ("openai/clip-vit-large-patch14"), or "open_clip:<architecture>/<tag>"
("open_clip:ViT-L-14/laion2b_s32b_b82k"), where the tag may also be the path of a checkpoint.
"""

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as image_ops

from editrl.errors import EditrlError, did_you_mean
from editrl.reward_options import frame_indices

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_OPEN_CLIP = "open_clip:"
_TEXTS_PER_FORWARD = 256


@dataclass(frozen=True)
class Preprocess:
    """Resize, centre crop and normalise as the model was trained, on float frames and on their device.

    The image processors do the same to uint8 images, which they round to whole grey levels in between; here nothing is
    rounded, so the two differ by up to about one grey level (1/255, divided by `std`).
    """

    size: int | tuple[int, int] | None  # shortest edge, or (height, width); None: as it is
    crop: tuple[int, int] | None  # (height, width)
    mean: Sequence[float]
    std: Sequence[float]
    mode: InterpolationMode
    # When an odd number of pixels is cut away: transformers rounds the offset down, torchvision to even.
    round_offset: Callable[[float], int] = math.floor

    def __call__(self, frames: Tensor) -> Tensor:
        """[N,3,H,W] in [0,1] -> float32 [N,3,h,w], normalised."""
        frames = frames.float()
        if self.size is not None:
            height, width = self._resized(*frames.shape[-2:])
            # One axis after the other and cut to [0,1] each time, as for uint8: bicubic overshoots at hard edges.
            for size in ([frames.shape[-2], width], [height, width]):
                frames = image_ops.resize(frames, size, interpolation=self.mode, antialias=True).clamp(0, 1)
        if self.crop is not None:
            (height, width), (rows, columns) = frames.shape[-2:], self.crop
            top, left = self.round_offset((height - rows) / 2), self.round_offset((width - columns) / 2)
            frames = image_ops.crop(frames, top, left, rows, columns)
        return image_ops.normalize(frames, list(self.mean), list(self.std))

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if not isinstance(self.size, int):
            return self.size
        short = min(height, width)
        return self.size * height // short, self.size * width // short


@dataclass(eq=False)
class Backbone:
    """A frozen image-text model. `logit_scale` is the trained parameter itself, a logarithm."""

    key: tuple[str, ...]  # two backbones with equal keys give equal embeddings
    model: torch.nn.Module
    image_features: Callable[[torch.nn.Module, Tensor], Tensor]  # model, pixels
    text_features: Callable[[torch.nn.Module, Tensor], Tensor]  # model, tokens
    tokenize: Callable[[list[str], int], Tensor]  # texts, length -> [M, length], cut or padded
    context_length: int
    preprocess: Preprocess
    device: torch.device
    dtype: torch.dtype
    logit_scale: float | None = None  # read off the model
    _warned: bool = field(init=False, default=False)

    def __post_init__(self):
        self.model.eval().requires_grad_(False)
        if self.logit_scale is None:
            self.logit_scale = float(self.model.logit_scale)

    @torch.no_grad()
    def embed_frames(self, frames: Tensor, *, frames_per_forward: int = 256) -> Tensor:
        """[N,3,H,W] in [0,1] -> [N,D] float32, unit length, on the backbone's device."""
        return self.embed_clips([frames], frames_per_forward=frames_per_forward)[0]

    @torch.no_grad()
    def embed_clips(self, clips: Sequence[Tensor], *, frames_per_forward: int = 256) -> list[Tensor]:
        """Clips [F_i,3,H_i,W_i] in [0,1] -> [F_i,D] float32 each; the frames of all clips share the forwards."""
        if not clips:
            return []
        for i, clip in enumerate(clips):
            if clip.ndim != 4 or clip.shape[1] != 3 or not len(clip) or not clip.is_floating_point():
                raise EditrlError(
                    f"clip {i} is {clip.dtype} {list(clip.shape)}: CLIP takes float [F,3,H,W] in [0,1], F at least 1."
                )
        clips = [clip.to(self.device) for clip in clips]
        one_size = len({clip.shape[1:] for clip in clips}) == 1
        parts = [torch.cat(clips)] if one_size else clips  # many small clips are far faster preprocessed at once
        pixels = torch.cat([self.preprocess(part).to(self.dtype) for part in parts])
        features = torch.cat([self.image_features(self.model, part) for part in pixels.split(frames_per_forward)])
        return list(normalize(features.float(), dim=-1).split([len(clip) for clip in clips]))

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """M texts -> [M,D] float32, unit length. Repeated texts are embedded once; long ones are cut (one warning)."""
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise EditrlError(f"text {i} is {text!r}: every sample needs a caption.")
        distinct = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        tokens = self._tokens(list(distinct)).to(self.device)
        features = torch.cat([self.text_features(self.model, part) for part in tokens.split(_TEXTS_PER_FORWARD)])
        return normalize(features.float(), dim=-1)[[distinct[text] for text in texts]]

    def _tokens(self, texts: list[str]) -> Tensor:
        tokens = self.tokenize(texts, self.context_length)
        # With room for one more token, a text that was cut no longer has the end token where the cut put it.
        longer = self.tokenize(texts, self.context_length + 1)[:, :-1]
        cut = (tokens != longer).any(dim=1).nonzero().flatten().tolist()
        if cut and not self._warned:
            self._warned = True
            warnings.warn(
                f"CLIP '{self.key[0]}' reads {self.context_length} tokens: the rest of {texts[cut[0]][:60]!r}... is "
                "cut off (said once; shorten such captions).",
                stacklevel=3,
            )
        return tokens


_loaded: WeakValueDictionary[tuple, Backbone] = WeakValueDictionary()


def load_backbone(
    model: str, device: torch.device | str = "cpu", dtype: str = "float32", processor: str | None = None
) -> Backbone:
    """The backbone of a spec (see the module's docstring); loaded once for equal arguments while somebody holds it.

    What somebody holds on another device is copied from there, not read from disk again.

    Args:
        dtype: "float32", "bfloat16" or "float16", of the towers; preprocessing and embeddings are float32.
        processor: folder or Hub id of tokenizer and image preprocessing when they are not beside the weights
            (transformers only).

    Raises: EditrlError when the model cannot be loaded, saying how to get it, or when its weights are incomplete.
    """
    if dtype not in DTYPES:
        raise EditrlError(f"dtype is {dtype!r}: choose one of {', '.join(DTYPES)}." + did_you_mean(str(dtype), DTYPES))
    key = (model, processor or model, str(torch.device(device)), dtype)
    backbone = _loaded.get(key)
    elsewhere = next((b for b in list(_loaded.values()) if (*b.key[:2], b.key[3]) == (*key[:2], key[3])), None)
    if backbone is None and elsewhere is not None:
        backbone = _loaded[key] = _copied(elsewhere, key)
    if backbone is None:
        parts = _open_clip_parts(key) if model.startswith(_OPEN_CLIP) else _transformers_parts(key)
        backbone = Backbone(key=key, device=torch.device(device), dtype=DTYPES[dtype], **parts)
        _loaded[key] = backbone
    return backbone


def _copied(backbone: Backbone, key: tuple[str, ...]) -> Backbone:
    """The same on the device of `key`. Each weight goes straight there, so that no device holds it twice."""
    model, device = backbone.model, torch.device(key[2])
    there = {id(weight): torch.nn.Parameter(weight.to(device), requires_grad=False) for weight in model.parameters()}
    there |= {id(buffer): buffer.to(device) for buffer in model.buffers()}
    return dataclasses.replace(backbone, key=key, device=device, model=copy.deepcopy(model, there))


def _transformers_parts(key: tuple[str, ...]) -> dict[str, Any]:
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    model_id, processor_id, device, dtype = key
    with unsharded():
        model, report = fetch(CLIPModel, model_id, dtype=DTYPES[dtype], output_loading_info=True)
    if report["missing_keys"]:
        raise EditrlError(
            f"'{model_id}' lacks {len(report['missing_keys'])} weights of a CLIP model (such as "
            f"'{sorted(report['missing_keys'])[0]}'): it is incomplete, or another kind of model."
        )
    model.to(device)
    tokenizer = fetch(AutoTokenizer, processor_id)
    if len(tokenizer) < model.config.text_config.vocab_size // 2:
        raise EditrlError(
            f"the tokenizer of '{processor_id}' knows {len(tokenizer)} tokens, the model "
            f"{model.config.text_config.vocab_size}: its tokenizer files are missing, or belong to another model."
        )

    def tokenize(texts: list[str], length: int) -> Tensor:
        return tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids

    # The text tower looks backwards only and is read at the end token, so padding needs no mask.
    return {
        "model": model,
        "image_features": lambda model, pixels: model.get_image_features(pixel_values=pixels).pooler_output,
        "text_features": lambda model, tokens: model.get_text_features(input_ids=tokens).pooler_output,
        "tokenize": tokenize,
        "context_length": model.config.text_config.max_position_embeddings,
        "preprocess": _processor_preprocess(fetch(CLIPImageProcessor, processor_id)),
    }


def fetch(kind: Any, name: str, **kwargs) -> Any:
    try:
        return kind.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise EditrlError(
            f"cannot load {kind.__name__} from '{name}': run `hf download {name}` where there is a network, or pass "
            f"the folder that holds it ({reason[:200]})."
        ) from error


@contextmanager
def unsharded() -> Iterator[None]:
    """While a ZeRO-3 configuration is alive, `from_pretrained` shards what it loads; a frozen scorer stays whole."""
    from transformers.integrations import deepspeed

    reference = deepspeed._hf_deepspeed_config_weak_ref
    config = reference() if reference is not None else None
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)


def _processor_preprocess(processor: Any) -> Preprocess:
    """The values of a transformers CLIPImageProcessor."""
    size, crop = processor.size, processor.crop_size
    wanted = size.shortest_edge or (size.height, size.width)
    return Preprocess(
        size=wanted if processor.do_resize else None,
        crop=(crop.height, crop.width) if processor.do_center_crop else None,
        mean=processor.image_mean if processor.do_normalize else (0.0, 0.0, 0.0),
        std=processor.image_std if processor.do_normalize else (1.0, 1.0, 1.0),
        mode=InterpolationMode.BILINEAR if processor.resample == 2 else InterpolationMode.BICUBIC,  # PIL's numbers
    )


def _open_clip_parts(key: tuple[str, ...]) -> dict[str, Any]:
    import open_clip

    spec, _, device, dtype = key
    name, pretrained = _parse_open_clip(spec)
    # open_clip only warns when a tag's weights were trained with another GELU than the architecture's, and goes on.
    tag = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else {}
    try:
        model = open_clip.create_model(
            name,
            pretrained=pretrained,
            precision={"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[dtype],
            device=device,
            force_quick_gelu=tag.get("quick_gelu", False),
            require_pretrained=True,
        )
        tokenizer = open_clip.get_tokenizer(name)
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        known = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise EditrlError(
            f"cannot load '{spec}': give {_OPEN_CLIP}<architecture>/<tag or path of a checkpoint> (tags of this "
            f"architecture: {known}); tags are downloaded at first use, so where there is no network pass a path "
            f"({reason[:200]})."
        ) from error
    return {
        "model": model,
        "image_features": lambda model, pixels: model.encode_image(pixels),
        "text_features": lambda model, tokens: model.encode_text(tokens),
        "tokenize": lambda texts, length: tokenizer(texts, context_length=length),
        "context_length": tokenizer.context_length,
        "preprocess": _open_clip_preprocess(spec, open_clip.get_model_preprocess_cfg(model)),
    }


def _parse_open_clip(spec: str) -> tuple[str, str | None]:
    rest = spec.removeprefix(_OPEN_CLIP)
    if rest.startswith(("hf-hub:", "local-dir:")):  # open_clip's own schemes, which name the weights too
        return rest, None
    name, _, pretrained = rest.partition("/")
    if not pretrained:
        raise EditrlError(
            f"'{spec}' names no weights: write {_OPEN_CLIP}{name or '<architecture>'}/<tag or path of a checkpoint>."
        )
    return name, pretrained


def _open_clip_preprocess(spec: str, config: dict[str, Any]) -> Preprocess:
    size = config["size"]
    height, width = (size, size) if isinstance(size, int) else size
    squash = config["resize_mode"] == "squash"
    if not squash and (config["resize_mode"] != "shortest" or height != width):
        raise EditrlError(
            f"'{spec}' wants images resized by '{config['resize_mode']}' to {height}x{width}: only 'squash', and "
            "'shortest' to a square, are supported."
        )
    return Preprocess(
        size=(height, width) if squash else height,
        crop=None if squash else (height, width),
        mean=config["mean"],
        std=config["std"],
        mode=InterpolationMode.BILINEAR if config["interpolation"] == "bilinear" else InterpolationMode.BICUBIC,
        round_offset=round,
    )


class BackboneReward:
    """What the CLIP rewards share: the weights, which frames are looked at, and one image pass a batch for all of them.

    Args:
        model: see `load_backbone`. The weights are loaded by `.to(device)`, or by the first call (on the CPU).
        num_frames: None looks at the whole clip; a number at that many frames, spread evenly over it.
        dtype: of the towers, "float32", "bfloat16" or "float16".
        frames_per_forward: bounds the memory of the image tower.
        processor: where tokenizer and image preprocessing are when not beside the weights.
    """

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        *,
        num_frames: int | None = None,
        dtype: str = "float32",
        frames_per_forward: int = 256,
        processor: str | None = None,
    ):
        for name, value in {"num_frames": num_frames, "frames_per_forward": frames_per_forward}.items():
            if value is not None and value < 1:
                raise EditrlError(f"{name} of {type(self).__name__} is {value}: give a positive number.")
        self.model = model
        self.num_frames = num_frames
        self.dtype = dtype
        self.frames_per_forward = frames_per_forward
        self.processor = processor
        self._backbone: Backbone | None = None

    def to(self, device: torch.device | str) -> "BackboneReward":
        """Load the weights there. Rewards with the same model, device and dtype hold the same weights."""
        self._backbone = load_backbone(self.model, device, self.dtype, self.processor)
        return self

    @property
    def backbone(self) -> Backbone:
        if self._backbone is None:
            self.to("cpu")
        return self._backbone

    def embed_clips(self, clips: Sequence[Tensor], cache: dict | None) -> list[Tensor]:
        """[f,D] a clip, the unit vectors of its f looked-at frames. Each distinct tensor goes through the tower once.

        `cache` remembers by the tensor's identity, so a source that is repeated for its group, and a clip that another
        reward with the same backbone has embedded, cost nothing. It also holds the tensors: an id cannot be reused.
        """
        memo = {} if cache is None else cache.setdefault((self.backbone.key, self.num_frames), {})
        new = {id(clip): clip for clip in clips if id(clip) not in memo}
        looked_at = list(new.values())
        if self.num_frames is not None:
            looked_at = [clip[frame_indices(len(clip), self.num_frames)] for clip in looked_at]
        embedded = self.backbone.embed_clips(looked_at, frames_per_forward=self.frames_per_forward)
        memo.update({key: (clip, vectors) for (key, clip), vectors in zip(new.items(), embedded, strict=True)})
        return [memo[id(clip)][1] for clip in clips]


def clip_means(frames: Sequence[Tensor], others: Sequence[Tensor]) -> list[float]:
    """Mean over the frames of each clip of the inner product with `others`: [f_i,D] and [f_i,D] or [1,D] a clip.

    All clips at once: a group of small clips would otherwise spend its time in launching kernels.
    """
    lengths = torch.tensor([len(part) for part in frames])
    flat = torch.cat(list(frames))
    paired = torch.cat([other.expand_as(part) for part, other in zip(frames, others, strict=True)])
    return torch.segment_reduce((flat * paired).sum(1), "mean", lengths=lengths.to(flat.device)).tolist()
