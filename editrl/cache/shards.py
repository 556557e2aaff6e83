"""The files of a cache: shards of encoded examples, each beside its index; each appears whole or not at all."""

from __future__ import annotations

import json
import os
import time
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from editrl.cache.encoding import Encoded
from editrl.cache.fingerprint import settings_fingerprint
from editrl.errors import EditrlError
from editrl.policy import Conditions

FORMAT = 1
ABANDONED = 3600
"""Seconds after which an unfinished file belongs to a run that was killed."""


@dataclass(frozen=True)
class Entry:
    """Where an encoded example lies, and what it was encoded from."""

    shard: Path  # the .safetensors file
    position: int
    id: str
    description: dict[str, Any]
    checksum: int
    policy: str  # fingerprint
    sequences: frozenset[str]
    created: float


@dataclass(frozen=True)
class Index:
    """What lies beside a shard: its examples, and the files (path, size, time, digest) that were looked at."""

    entries: list[Entry]
    files: list[tuple[str, int, int, str]]


class BrokenError(EditrlError):
    """A file of the cache is not what was written."""


def write_shard(
    folder: Path,
    encoded: Sequence[Encoded],
    rows: Sequence[tuple[str, dict[str, Any]]],
    policy: str,
    files: Sequence[tuple[str, int, int, str]],
) -> tuple[Index, int]:
    """Write examples and the (id, description) of their rows; returns the index and the bytes written.

    The name follows from the contents: what a killed run left half done is written over by the next. Without examples
    only what is known of `files` is written.
    """
    name = settings_fingerprint([policy, [description for _, description in rows], files if not rows else None])
    tensors = [_tensors(_trimmed(one)) for one in encoded]
    size = 0
    if rows:
        named = {f"{position}.{key}": value for position, one in enumerate(tensors) for key, value in one.items()}
        size = write_atomically(folder / f"shard-{name}.safetensors", save(named))
    body = {
        "format": FORMAT,
        "policy": policy,
        "created": time.time(),
        "bytes": size,
        "sequences": sorted(encoded[0].conditions.sequences) if encoded else [],
        "files": list(files),
        "examples": [
            {"id": id, "checksum": _checksum(one), "description": description}
            for (id, description), one in zip(rows, tensors, strict=True)
        ],
    }
    index = folder / f"shard-{name}.json"
    # Last: an index says that its shard is whole.
    size += write_atomically(index, json.dumps({"checksum": settings_fingerprint(body), "body": body}).encode())
    return _index(index, body), size


def read_index(path: Path) -> Index:
    """The index of a shard that has its size. BrokenError if either file is damaged, of another format or gone."""
    try:
        written = json.loads(path.read_bytes())
        whole = written["checksum"] == settings_fingerprint(written["body"])
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise BrokenError(f"{path.name} is damaged")
    body = written["body"]
    if body["format"] != FORMAT:
        raise BrokenError(f"{path.name} has format {body['format']}, this version of editrl reads {FORMAT}")
    shard = path.with_suffix(".safetensors")
    if body["examples"]:
        size = shard.stat().st_size if shard.exists() else 0
        if size != body["bytes"]:
            raise BrokenError(f"{shard.name} has {size} of {body['bytes']} bytes")
    return _index(path, body)


def read_example(entry: Entry) -> Encoded:
    """An example, each tensor in the dtype in which it was computed. BrokenError if it is not what was written."""
    prefix = f"{entry.position}."
    try:
        with safe_open(entry.shard, framework="pt") as shard:
            names = [name for name in shard.keys() if name.startswith(prefix)]  # noqa: SIM118 (it is no dict)
            tensors = {name.removeprefix(prefix): shard.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise BrokenError(f"{entry.shard.name} cannot be read ({error})") from error
    if _checksum(tensors) != entry.checksum:
        raise BrokenError(f"{entry.shard.name}: example {entry.id!r} is damaged (its checksum differs)")
    tensors = {name: tensor.unsqueeze(0) for name, tensor in tensors.items()}
    pair = tensors.pop("target_latents", None), tensors.pop("latent_mask", None)
    named = {name.removeprefix("conditions."): tensor for name, tensor in tensors.items()}
    return Encoded(Conditions(named, entry.sequences), *pair)


def write_atomically(path: Path, contents: bytes) -> int:
    """Write a file that is whole or absent, even if the machine stops; returns its bytes."""
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(unfinished, "wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return len(contents)


def sweep(folder: Path) -> None:
    """Remove what killed runs left unfinished. A file that may still be being written stays."""
    for unfinished in folder.glob(".*.tmp"):
        try:
            if time.time() - unfinished.stat().st_mtime > ABANDONED:
                unfinished.unlink()
        except FileNotFoundError:
            continue  # another process has finished or swept it


def _index(path: Path, body: dict[str, Any]) -> Index:
    shard, sequences = path.with_suffix(".safetensors"), frozenset(body["sequences"])
    entries = [
        Entry(
            shard, position, one["id"], one["description"], one["checksum"], body["policy"], sequences, body["created"]
        )
        for position, one in enumerate(body["examples"])
    ]
    return Index(entries, [tuple(file) for file in body["files"]])


def _tensors(encoded: Encoded) -> dict[str, Tensor]:
    """The tensors of an example by name, on the CPU, without the dimension of the sample."""
    tensors = {f"conditions.{name}": tensor for name, tensor in encoded.conditions.tensors.items()}
    if encoded.target_latents is not None:
        tensors |= {"target_latents": encoded.target_latents, "latent_mask": encoded.latent_mask}
    return {name: tensor[0].detach().cpu().contiguous() for name, tensor in tensors.items()}


def _trimmed(encoded: Encoded) -> Encoded:
    """Without the padding that a batch gave the sequences: positions at the end where all of them are zero.

    Joining pads with zeros again, so a batch from the cache is the batch that would have been encoded.
    """
    conditions = encoded.conditions
    lengths: dict[int, int] = {}  # sequences of one length share their padding
    for name in conditions.sequences:
        tensor = conditions.tensors[name]
        used = tensor.flatten(2).any(-1)[0] if tensor.ndim > 2 else tensor[0] != 0
        last = int(used.nonzero().max()) if used.any() else 0
        lengths[tensor.shape[1]] = max(last + 1, lengths.get(tensor.shape[1], 0))
    tensors = {
        name: tensor[:, : lengths[tensor.shape[1]]] if name in conditions.sequences else tensor
        for name, tensor in conditions.tensors.items()
    }
    return Encoded(Conditions(tensors, conditions.sequences), encoded.target_latents, encoded.latent_mask)


def _checksum(tensors: dict[str, Tensor]) -> int:
    """CRC-32 of names, shapes, dtypes and values: against damage, at the speed of a disk."""
    checksum = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        checksum = zlib.crc32(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode(), checksum)
        checksum = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), checksum)
    return checksum
