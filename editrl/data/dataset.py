"""EditDataset: rows (a JSONL manifest, a list of dicts, a `datasets.Dataset`) -> EditExample."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from editrl.data.examples import EditExample
from editrl.data.video import DEFAULT_FPS, fit, read_frames
from editrl.errors import EditrlError, did_you_mean

KEYS = tuple(field.name for field in fields(EditExample) if field.name != "extra")
REQUIRED = ("instruction", "source")
MEDIA = ("source", "target", "reference_image", "mask")
TEXT = ("instruction", "source_caption", "target_caption", "task")


class EditDataset(torch.utils.data.Dataset):
    """Editing examples, decoded when they are asked for.

    Args:
        rows: a sequence of dicts or a `datasets.Dataset`, with the columns of `EditExample`; only `instruction` and
            `source` are required, all other columns arrive in `EditExample.extra`. The media columns (`source`,
            `target`, `reference_image`, `mask`) hold a path, the bytes of a file, `{"bytes", "path"}` as `datasets`
            stores images, or a tensor `[F, C, H, W]` (one frame: `[C, H, W]`), uint8 or float in [0, 1].
            A mask may be one image for all frames; it is cut at 0.5 (in memory, uint8 0/1 is taken as it is).
            `id` is the row's index where absent, `fps` that of the clip.
        root: the folder that relative paths start from.
        num_frames: use the first `num_frames` frames. None: all of the clip. Either is `frame_multiple * k + 1`.
        height, width: resize and centre-crop to this size. None: the clip's own. Either divides by `size_multiple`.
        frame_multiple, size_multiple: what the policy's VAE and patches need.
        row_names: what an error calls each row, `manifest.jsonl:3` for a manifest; default `row 0`, `row 1`, ...

    Raises:
        EditrlError: at construction for a row without a required key, a wrong type or a second row of the same id; on
            reading for media that cannot be read or have the wrong geometry. It names the row, its id and the column.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        *,
        root: str | Path = ".",
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        frame_multiple: int = 4,
        size_multiple: int = 16,
        row_names: Sequence[str] | None = None,
    ):
        if (height is None) != (width is None):
            raise EditrlError(f"height is {height} and width is {width}; give both or neither")
        self.root = Path(root)
        self.num_frames = num_frames
        self.size = None if height is None else (height, width)
        self.frame_multiple = frame_multiple
        self.size_multiple = size_multiple
        if num_frames is not None:
            self._check_frames(num_frames, "num_frames")
        if self.size is not None:
            self._check_size(self.size, "height x width")

        if isinstance(rows, str | Path):
            raise EditrlError(f"rows is the path '{rows}'; read a manifest with EditDataset.from_manifest")
        if not len(rows):
            raise EditrlError("the data set has no rows; give at least one")
        self._rows = _undecoded(rows)
        self._row_names = row_names
        self.ids = self._validate()

    @classmethod
    def from_manifest(cls, path: str | Path, *, root: str | Path | None = None, **geometry) -> "EditDataset":
        """Read a JSONL manifest, one row a line. Relative paths start from `root`, by default the manifest's folder."""
        path = Path(path)
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise EditrlError(f"{path}: the manifest cannot be read ({error}); check the path") from error
        rows, names = [], []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            names.append(f"{path}:{number}")
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise EditrlError(f"{names[-1]}: is no JSON ({error}); write one object a line") from error
            rows.append(row)
        if not rows:
            raise EditrlError(f"{path}: the manifest has no rows; write one JSON object a line")
        return cls(rows, root=path.parent if root is None else root, row_names=names, **geometry)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> EditExample:
        row = self.row(index)
        try:
            return self._load(row)
        except EditrlError as error:
            raise EditrlError(f"{self.where(index)} (id {row['id']!r}): {error}") from error

    def row(self, index: int) -> dict[str, Any]:
        """The row as it is stored, nothing decoded: every canonical key (None where absent) and all further columns."""
        return {**dict.fromkeys(KEYS), **self._rows[index], "id": self.ids[index]}

    def check(self, limit: int | None = 64) -> None:
        """Raise before any training what would raise during it: a missing file anywhere, or a bad clip among the first
        `limit` rows, which are decoded (None: all rows)."""
        missing = []
        for index, row in enumerate(_without_blobs(self._rows)):
            for key in MEDIA:
                value = _unwrapped(row.get(key))
                if isinstance(value, str | Path) and not (self.root / value).is_file():
                    missing.append(f"{self.where(index)} (id {self.ids[index]!r}): {key}: no file {self.root / value}")
        if missing:
            others = f" (and {len(missing) - 1} more missing)" if len(missing) > 1 else ""
            raise EditrlError(f"{missing[0]}{others}; check the path and root")
        count = len(self) if limit is None else min(limit, len(self))
        for index in tqdm(range(count), desc="checking the data", delay=2, disable=None):
            self[index]

    @property
    def preprocessing(self) -> dict[str, int | None]:
        """What the pixels of every example depend on, beside the files themselves."""
        height, width = self.size or (None, None)
        return {"num_frames": self.num_frames, "height": height, "width": width}

    def media(self, index: int) -> dict[str, str | Path | bytes | Tensor]:
        """The media columns that a row has, nothing decoded: a path (from `root`, if relative), bytes or a tensor."""
        row = self.row(index)
        values = {key: _unwrapped(row[key]) for key in MEDIA}
        return {key: value for key, value in values.items() if value is not None}

    def where(self, index: int) -> str:
        """What errors call a row: `manifest.jsonl:3`, `row 2`."""
        index = range(len(self))[index]
        return self._row_names[index] if self._row_names is not None else f"row {index}"

    def _validate(self) -> list[str]:
        """Check everything that needs no decoding and return the ids."""
        cheap_rows = _without_blobs(self._rows)
        columns = getattr(self._rows, "column_names", ())
        blobs = set(columns) - set(getattr(cheap_rows, "column_names", ()))
        ids: dict[str, int] = {}
        for index, row in enumerate(cheap_rows):
            where = self.where(index)
            if not isinstance(row, Mapping):
                raise EditrlError(f"{where}: is a {type(row).__name__}; write an object with keys")
            id = str(index if row.get("id") is None else row["id"])
            where = f"{where} (id {id!r})"
            if id in ids:
                raise EditrlError(f"{where}: {self.where(ids[id])} has the same id; ids must differ")
            ids[id] = index
            for key in REQUIRED:
                if row.get(key) is None and key not in blobs:
                    hint = did_you_mean(key, columns or row)
                    raise EditrlError(f"{where}: has no '{key}', which every row needs.{hint}")
            for key in TEXT:
                if not isinstance(row.get(key), str | None):
                    raise EditrlError(f"{where}: {key} is a {type(row[key]).__name__}; it must be text")
            for key in ("fps", "weight"):
                _check_positive(row.get(key), key, where)
        return list(ids)

    def _load(self, row: dict[str, Any]) -> EditExample:
        source, fps = self._video(row, "source", self.num_frames, self.size)
        self._check_frames(len(source), "source")
        self._check_size(source.shape[-2:], "source")
        target = mask = reference = None
        if row["target"] is not None:
            target = self._like(source, self._video(row, "target", self.num_frames, self.size)[0], "target")
        if row["mask"] is not None:
            mask, _ = self._video(row, "mask", self.num_frames, self.size)
            mask = (mask.mean(dim=1, keepdim=True) >= 0.5).float()
            if len(mask) == 1:
                mask = mask.repeat(len(source), 1, 1, 1)
            mask = self._like(source, mask, "mask")
        if row["reference_image"] is not None:
            reference, _ = self._video(row, "reference_image", 1, None)
        return EditExample(
            id=row["id"],
            instruction=row["instruction"],
            source=source,
            target=target,
            reference_image=reference,
            mask=mask,
            source_caption=row["source_caption"],
            target_caption=row["target_caption"],
            task=row["task"],
            fps=fps if row["fps"] is None else float(row["fps"]),
            weight=1.0 if row["weight"] is None else float(row["weight"]),
            extra={key: value for key, value in row.items() if key not in KEYS},
        )

    def _video(self, row: dict, key: str, frames: int | None, size: tuple[int, int] | None) -> tuple[Tensor, float]:
        """`([F, C, H, W] float32, fps)` of one media column; C is 3 but for masks in memory."""
        value = _unwrapped(row[key])
        try:
            if isinstance(value, Tensor):
                video, fps = _from_memory(value, is_mask=key == "mask")[:frames], DEFAULT_FPS
                video = video if size is None else fit(video, *size)
            elif isinstance(value, bytes):
                video, fps = read_frames(value, limit=frames, size=size)
            elif isinstance(value, str | Path):
                video, fps = read_frames(self.root / value, limit=frames, size=size)
            else:
                raise EditrlError(f"is a {type(value).__name__}; give a path, bytes or a tensor")
        except EditrlError as error:
            raise EditrlError(f"{key}: {error}") from error
        # One image may stand for a mask of any length, and for nothing else.
        if frames is not None and len(video) < frames and not (key == "mask" and len(video) == 1):
            raise EditrlError(
                f"{key}: has {len(video)} frames, num_frames is {frames}; drop the row or lower num_frames"
            )
        return video, fps

    def _like(self, source: Tensor, video: Tensor, key: str) -> Tensor:
        if len(video) != len(source):
            raise EditrlError(
                f"{key}: has {len(video)} frames, source has {len(source)}; cut them alike or set num_frames"
            )
        if video.shape[-2:] != source.shape[-2:]:
            (height, width), (source_height, source_width) = video.shape[-2:], source.shape[-2:]
            raise EditrlError(
                f"{key}: is {height}x{width} (height x width), source is {source_height}x{source_width}; "
                "set height and width to resize both"
            )
        return video

    def _check_frames(self, count: int, what: str) -> None:
        if count < 1 or (count - 1) % self.frame_multiple:
            below = max(count - 1, 0) // self.frame_multiple * self.frame_multiple + 1
            raise EditrlError(
                f"{what}: {count} frames are not {self.frame_multiple}k+1; set num_frames, for example {below}"
            )

    def _check_size(self, size: Sequence[int], what: str) -> None:
        if size[0] < 1 or size[1] < 1 or size[0] % self.size_multiple or size[1] % self.size_multiple:
            raise EditrlError(
                f"{what}: {size[0]}x{size[1]} is not divisible by {self.size_multiple}; set height and width that are"
            )


def _from_memory(tensor: Tensor, is_mask: bool) -> Tensor:
    """A tensor of a row as `[F, C, H, W]` float32 in [0, 1]."""
    video = tensor if tensor.dim() == 4 else tensor[None]
    if video.dim() != 4 or video.shape[1] != (1 if is_mask else 3) or not video.numel():
        raise EditrlError(f"is a tensor {list(tensor.shape)}; give [frames, {1 if is_mask else 3}, height, width]")
    if video.dtype == torch.bool or (is_mask and video.dtype == torch.uint8 and video.max() <= 1):
        return video.float()
    if video.dtype == torch.uint8:
        return video.float() / 255
    if not video.is_floating_point():
        raise EditrlError(f"is a tensor of {video.dtype}; give uint8 or floating point")
    low, high = video.min().item(), video.max().item()
    if not (low >= 0 and high <= 1):  # NaN fails too
        raise EditrlError(f"has values from {low:g} to {high:g}; floating-point video lies in [0, 1]")
    return video.float()


def _check_positive(value: Any, key: str, where: str) -> None:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if value is not None and not (is_number and math.isfinite(value) and value > 0):
        raise EditrlError(f"{where}: {key} is {value!r}; it must be a number above 0")


def _unwrapped(value: Any) -> Any:
    """The bytes, or else the path, out of the struct in which `datasets` stores an image."""
    if isinstance(value, Mapping) and "bytes" in value:
        return value["bytes"] if value["bytes"] is not None else value.get("path")
    return value


def _undecoded(rows: Any) -> Any:
    """A `datasets.Dataset` whose image and video columns give bytes and path, undecoded; lists as they are."""
    for name, feature in getattr(rows, "features", {}).items():
        if getattr(feature, "decode", False):
            rows = rows.cast_column(name, type(feature)(decode=False))
    return rows


def _without_blobs(rows: Any) -> Any:
    """The canonical columns of a `datasets.Dataset` that hold text or numbers, cheap to walk; lists as they are."""
    if not hasattr(rows, "select_columns"):
        return rows
    light = [
        name
        for name, feature in rows.features.items()
        if name in KEYS and type(feature).__name__ == "Value" and "binary" not in feature.dtype
    ]
    return rows.select_columns(light).with_format(None)
