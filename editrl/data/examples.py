"""One editing example: what the policy sees, what a reward may ask for, and where the clip came from."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class EditExample:
    """A source clip and the instruction to edit it; an image is a clip of one frame.

    Videos are float32 in [0, 1], `[frames, channels, height, width]`. `target` and `mask` always have the frames and
    the size of `source`; `reference_image` keeps its own size.
    """

    id: str
    instruction: str
    source: Tensor  # [F, 3, H, W]
    target: Tensor | None = None  # [F, 3, H, W]
    reference_image: Tensor | None = None  # [1, 3, h, w]
    mask: Tensor | None = None  # [F, 1, H, W], 1 where the edit may change pixels, else 0
    source_caption: str | None = None
    target_caption: str | None = None
    task: str | None = None
    fps: float = 8.0
    weight: float = 1.0
    extra: dict[str, Any] = field(default_factory=dict)  # all further columns of the row, untouched
