"""A scoring request as bytes and back, without losing a bit.

A request is one safetensors file: its tensors are the clips, masks and images, its header carries everything else as
JSON. Nothing is ever unpickled. A float32 tensor that is 8-bit values divided by 255, as every decoded file is, travels
as uint8, a quarter of the size; whether it is, is tried bit by bit, so that any other tensor (a clip that a model made)
travels as the float32 that it is. A lossy video codec would change scores, and zip gains little on float noise. The
order of dimensions in memory goes along: sums over the same numbers in another order differ in the last bits. A tensor
that several samples share (the source of a group) travels once.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from editrl.errors import EditrlError

VERSION = 2
HEADER = "editrl"  # the key of our JSON in the safetensors header


def pack(columns: dict[str, Sequence], request_id: str) -> bytes:
    """The request to score N samples.

    Args:
        columns: name -> N values; `videos` among them. A column is tensors and None (any shape and dtype), or values
            that JSON has.
        request_id: what the server's log calls the request.

    Raises: EditrlError for a column that is neither, naming it.
    """
    tensors: dict[str, Tensor] = {}
    scaled: list[str] = []  # those that are 8-bit values / 255
    orders: dict[str, list[int]] = {}  # of those whose dimensions lie in memory in another order: which comes first
    known: dict[int, str] = {}  # id of a tensor -> its name in the file
    references: dict[str, list[str | None]] = {}
    values: dict[str, list] = {}

    def name_of(tensor: Tensor) -> str:
        if id(tensor) not in known:
            name = known[id(tensor)] = str(len(known))
            order = sorted(range(tensor.dim()), key=lambda dim: -tensor.stride(dim))
            if order != sorted(order):
                orders[name] = order
            tensors[name], is_scaled = _smallest(tensor.detach().cpu().permute(order).contiguous())
            if is_scaled:
                scaled.append(name)
        return known[id(tensor)]

    for column, entries in columns.items():
        if any(isinstance(entry, Tensor) for entry in entries):
            for i, entry in enumerate(entries):
                if not isinstance(entry, Tensor | None):
                    raise EditrlError(
                        f"column '{column}' has tensors and, for sample {i}, a {type(entry).__name__}; a column that "
                        "is sent to a reward server holds one kind"
                    )
            references[column] = [None if entry is None else name_of(entry) for entry in entries]
        else:
            values[column] = list(entries)
    message = {"version": VERSION, "request_id": request_id, "tensors": references, "values": values}
    message |= {"scaled": scaled, "orders": orders}
    try:
        header = json.dumps(message, allow_nan=False)
    except (TypeError, ValueError) as error:
        column = next(column for column, entries in values.items() if not _is_json(entries))
        raise EditrlError(
            f"column '{column}' cannot be sent to a reward server ({error}); it takes tensors, text and finite numbers"
        ) from error
    # safetensors refuses tensors that share memory, such as two views of one video.
    return save({name: _own_memory(tensor) for name, tensor in tensors.items()}, {HEADER: header})


def unpack(body: bytes) -> tuple[dict[str, list], str]:
    """`(columns, request_id)` of a request; what was one tensor is one tensor again. EditrlError says what is wrong."""
    message = _message(body)
    try:
        tensors = load(body)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise EditrlError(f"the body is no safetensors file: {error}") from error
    if message.get("version") != VERSION:
        raise EditrlError(f"the request is of version {message.get('version')!r}, this server reads {VERSION}")
    references, values, scaled, orders = (_typed(message, key, kind) for key, kind in _PARTS.items())
    for name in scaled:
        if not isinstance(name, str) or name not in tensors or tensors[name].dtype != torch.uint8:
            raise EditrlError(f"'scaled' names {name!r}, which is no uint8 tensor of the body")
        tensors[name] = _scale(tensors[name])
    for name, order in orders.items():
        if name not in tensors or not _is_order(order, tensors[name].dim()):
            raise EditrlError(f"'orders' says {order!r} of {name!r}, which is no order of its dimensions")
        tensors[name] = tensors[name].permute([order.index(dim) for dim in range(len(order))])
    columns: dict[str, list] = {}
    for column, names in references.items():
        for name in _typed(references, column, list):
            if name is not None and (not isinstance(name, str) or name not in tensors):
                raise EditrlError(f"column '{column}' refers to the tensor {name!r}, which the body does not have")
        columns[column] = [None if name is None else tensors[name] for name in names]
    columns |= {column: _typed(values, column, list) for column in values}
    _check(columns)
    return columns, str(message.get("request_id", ""))


def check_token(token: str, where: str) -> str:
    """The token without the white space around it; EditrlError if there is none, or if no HTTP header can hold it."""
    token = token.strip()
    if not token:
        raise EditrlError(f"{where} is empty or not set; put the token there")
    if not (token.isascii() and token.isprintable()):
        raise EditrlError(f"{where} holds what no HTTP header can; a token is ASCII text of one line")
    return token


_PARTS = {"tensors": dict, "values": dict, "scaled": list, "orders": dict}


def _message(body: bytes) -> dict[str, Any]:
    """Our JSON, read from the header: 8 bytes of length, then JSON with `__metadata__`."""
    length = int.from_bytes(body[:8], "little")
    if not 2 <= length <= len(body) - 8:
        raise EditrlError(f"the body ({len(body)} bytes) is no safetensors file: its header does not fit in it")
    try:
        message = json.loads(json.loads(body[8 : 8 + length])["__metadata__"][HEADER])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise EditrlError(
            f"the safetensors header has no readable '{HEADER}' metadata ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(message, dict):
        raise EditrlError(f"the '{HEADER}' metadata is a {type(message).__name__}; it is an object")
    return message


def _typed(message: dict, key: str, kind: type) -> Any:
    value = message.get(key)
    if not isinstance(value, kind):
        raise EditrlError(f"'{key}' is a {type(value).__name__}; it must be a {kind.__name__}")
    return value


def _check(columns: dict[str, list]) -> None:
    """N values a column, and N clips."""
    videos = columns.get("videos")
    if not videos:
        raise EditrlError("there are no 'videos' to score")
    for column, entries in columns.items():
        if len(entries) != len(videos):
            raise EditrlError(f"column '{column}' has {len(entries)} values for {len(videos)} videos")
    for i, video in enumerate(videos):
        if not isinstance(video, Tensor) or video.dim() != 4 or video.shape[1] != 3 or video.dtype != torch.float32:
            what = f"{video.dtype} {list(video.shape)}" if isinstance(video, Tensor) else type(video).__name__
            raise EditrlError(f"video {i} is {what}; a clip is float32 [F,3,H,W] in [0,1]")


def _smallest(tensor: Tensor) -> tuple[Tensor, bool]:
    """The tensor as uint8 if `_scale` makes the same bits of that, else as it is; and which of the two."""
    if tensor.dtype == torch.float32 and tensor.numel() and tensor.min() >= 0 and tensor.max() <= 1:
        bytes_ = (tensor * 255).round().to(torch.uint8)
        # As integers: 0.0 and -0.0 are equal, and not the same.
        if torch.equal(_scale(bytes_).view(torch.int32), tensor.view(torch.int32)):
            return bytes_, True
    return tensor, False


def _scale(tensor: Tensor) -> Tensor:
    return tensor.float() / 255


def _is_order(order: Any, dimensions: int) -> bool:
    """Whether `order` has each of the dimensions once."""
    return isinstance(order, list) and all(type(dim) is int for dim in order) and sorted(order) == [*range(dimensions)]


def _own_memory(tensor: Tensor) -> Tensor:
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True
