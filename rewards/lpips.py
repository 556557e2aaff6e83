"""LPIPS (Zhang et al. 2018, arXiv 1801.03924, version 0.1) on AlexNet, from the authors' own weights."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import conv2d, interpolate, max_pool2d

from editrl.errors import UNREADABLE, EditrlError

HOW_TO_GET = (
    "where there is a network, `pip install lpips`, save `lpips.LPIPS(net='alex').state_dict()` with torch.save, and "
    "pass that file as `weights`"
)
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of values in [-1, 1]
# AlexNet's convolutions under their names in the state dict: (name, stride, padding, max-pooled before).
LAYERS = (
    ("net.slice1.0", 4, 2, False),
    ("net.slice2.3", 1, 2, True),
    ("net.slice3.6", 1, 1, True),
    ("net.slice4.8", 1, 1, False),
    ("net.slice5.10", 1, 1, False),
)


def read_weights(path: str | None) -> dict[str, Tensor]:
    """The state dict of `lpips.LPIPS(net="alex")`, float32. EditrlError that says how to get it for anything else."""
    if path is None or not Path(path).expanduser().is_file():
        missing = "has no weights" if path is None else f"finds no file '{path}'"
        raise EditrlError(f"LPIPS {missing}: {HOW_TO_GET}.")
    wanted = [f"{name}.{part}" for name, *_ in LAYERS for part in ("weight", "bias")]
    wanted += [f"lin{k}.model.1.weight" for k in range(len(LAYERS))]
    try:
        state = torch.load(Path(path).expanduser(), "cpu", weights_only=True)
        return {name: state[name].float() for name in wanted}
    except (*UNREADABLE, KeyError, TypeError, AttributeError, ValueError) as error:
        raise EditrlError(
            f"'{path}' holds no LPIPS weights ({type(error).__name__}: {error}): {HOW_TO_GET}."
        ) from error


def lpips(one: Tensor, other: Tensor, weights: dict[str, Tensor], counted: Tensor) -> Tensor:
    """Distances of frames, [F]. EditrlError for frames that AlexNet cannot look at.

    Args:
        one, other: [F,3,H,W] in [0,1], at least 31 pixels high and wide.
        weights: of `read_weights`, on the same device.
        counted: [F,1,H,W] in [0,1], which pixels count; in each layer its mean over the area of a position.
    """
    if min(one.shape[-2:]) < 31:
        raise EditrlError(f"LPIPS needs frames of 31 pixels or more, these are {list(one.shape[-2:])}.")
    total = one.new_zeros(len(one))
    shift, scale = (one.new_tensor(values).view(1, 3, 1, 1) for values in (SHIFT, SCALE))
    features = (torch.cat([one, other]) * 2 - 1 - shift) / scale
    for k, (name, stride, padding, pooled) in enumerate(LAYERS):
        if pooled:
            features = max_pool2d(features, 3, 2)
        features = conv2d(features, weights[f"{name}.weight"], weights[f"{name}.bias"], stride, padding).relu()
        unit = features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10)
        first, second = unit.chunk(2)
        distance = conv2d((first - second).square(), weights[f"lin{k}.model.1.weight"])
        share = interpolate(counted, distance.shape[-2:], mode="area")
        total += (distance * share).sum((1, 2, 3)) / share.sum((1, 2, 3)).clamp(min=1e-12)
    return total
