"""Editing data: examples, video files in and out, data sets."""

from editrl.data.dataset import EditDataset
from editrl.data.examples import EditExample
from editrl.data.video import atomic_path, fit, read_frames, read_video, to_uint8, write_image, write_video

__all__ = [
    "EditDataset",
    "EditExample",
    "atomic_path",
    "fit",
    "read_frames",
    "read_video",
    "to_uint8",
    "write_image",
    "write_video",
]
