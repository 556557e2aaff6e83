"""What the conditions of a row depend on: its text and clips, the preprocessing, and the frozen models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from editrl.data import EditDataset
from editrl.errors import EditrlError

SAMPLED_VALUES = 64
"""Values of each frozen tensor that are looked at: enough to tell models apart, without reading 20 GB."""

NAMES = {
    "instruction": "the instruction",
    "source": "the clip",
    "target": "the target clip",
    "mask": "the mask",
    "reference_image": "the reference image",
}
"""What an error calls the parts of a description; the others have the name of an option."""

Stamp = tuple[str, int, int]
"""Path as the manifest writes it, size in bytes, time of the last change in ns."""


class Digests:
    """SHA-256 of media. A file of known path, size and time is taken for unchanged; any other is read.

    As git does it: the look costs microseconds, and a data set that was copied, moved or touched is recognised by its
    contents instead of being encoded again.
    """

    def __init__(self):
        self._known: dict[Stamp, str | None] = {}
        self._sizes: set[int] = set()
        self.forget()

    def forget(self) -> None:
        """Start anew to note the files that are asked for; what is known stays."""
        self.seen: dict[Stamp, str] = {}
        self.some_were_read = False

    def add(self, path: str, size: int, mtime: int, digest: str) -> None:
        """Remember the contents of a file."""
        stamp = (path, size, mtime)
        # Two data sets may have look-alikes (the same relative path, size and time): of those each is read.
        self._known[stamp] = digest if self._known.get(stamp, digest) == digest else None
        self._sizes.add(size)

    def of(self, media: str | Path | bytes | Tensor, root: Path, *, known_only: bool = False) -> str | None:
        """Digest of a media column's value. `known_only`: None for a file of a size that no known file has."""
        if isinstance(media, Tensor):
            return _digest(str(media.dtype), str(tuple(media.shape)), _bytes(media))
        if isinstance(media, bytes):
            return _digest(media)
        file = root / media
        try:
            status = file.stat()
            stamp = (str(media), status.st_size, status.st_mtime_ns)
            if self._known.get(stamp) is not None:
                self.seen[stamp] = self._known[stamp]
                return self.seen[stamp]
            if known_only and status.st_size not in self._sizes:
                return None
            with open(file, "rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
        except OSError as error:
            raise EditrlError(f"{file}: cannot be read ({error.strerror}); check the path") from error
        self.add(*stamp, digest)
        self.seen[stamp], self.some_were_read = digest, True
        return digest


def describe(dataset: EditDataset, index: int, digest: Callable[[Any, Path], str | None]) -> dict[str, Any]:
    """What the conditions of a row depend on beside the policy; `digest(media, root)` identifies a clip.

    By the contract of `FlowPolicy.encode` these are the instruction, the source and the reference image. The mask
    counts only where there is a target: it weighs the loss of a pair.
    """
    media = dataset.media(index)
    if "target" not in media:
        media.pop("mask", None)
    clips = dict.fromkeys(("source", "target", "mask", "reference_image"))
    clips |= {key: digest(value, dataset.root) for key, value in media.items()}
    return {"instruction": dataset.row(index)["instruction"], **dataset.preprocessing, **clips}


def key_of(description: Mapping[str, Any]) -> str:
    """One word for a description."""
    return _digest(json.dumps(description, sort_keys=True))


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two descriptions of a row, each in a few words."""
    found = []
    for name in now:
        if before.get(name) == now[name]:
            continue
        if name in NAMES:
            found.append(f"{NAMES[name]} changed")
        else:
            found.append(f"{name} changed from {before.get(name)} to {now[name]}")
    return found


def model_changes(before: str, now: str) -> list[str]:
    """The parts in which two fingerprints of a policy differ.

    Only parts that `now` has are compared: a policy whose encoders are not loaded knows less of itself.
    """
    earlier, current = (
        {name: digest for name, _, digest in (word.rpartition(":") for word in fingerprint.split())}
        for fingerprint in (before, now)
    )
    return [name or "model" for name, digest in current.items() if earlier.get(name) != digest]


def module_fingerprint(module: nn.Module) -> str:
    """Identifies a frozen module of diffusers or transformers, wherever it was loaded from and wherever it is.

    Its class, its configuration, and the name, shape, dtype and some values of every tensor.
    """
    config = getattr(module, "config", {})
    config = config.to_diff_dict() if hasattr(config, "to_diff_dict") else dict(config)
    digest = hashlib.sha256(f"{type(module).__name__} {settings_fingerprint(_lasting(config))}".encode())
    for name, tensor in module.state_dict().items():
        values = tensor.detach().flatten()
        sample = values[:: max(len(values) // SAMPLED_VALUES, 1)][:SAMPLED_VALUES]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_bytes(sample))
    return digest.hexdigest()[:16]


def settings_fingerprint(settings: Any) -> str:
    """Identifies settings: anything that JSON, or else `str`, can write."""
    return _digest(json.dumps(settings, sort_keys=True, default=str))[:16]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Identifies a tokenizer of transformers: vocabulary, special tokens, chat template."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return settings_fingerprint([sorted(tokenizer.get_vocab().items()), special, tokenizer.chat_template])


def _lasting(config: Any) -> Any:
    """A configuration without what says where and by which version it was loaded; tensors tell their own dtype."""
    if not isinstance(config, Mapping):
        return config
    passing = ("transformers_version", "dtype", "torch_dtype")
    return {
        name: _lasting(value) for name, value in config.items() if not (str(name).startswith("_") or name in passing)
    }


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _digest(*parts: str | bytes | memoryview) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()
