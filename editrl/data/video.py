"""Video and images in and out: float32 tensors `[F, 3, H, W]` in [0, 1] on our side, files or bytes on the other.

PyAV and Pillow are imported where they are used: training from tensors in memory needs neither.
"""

import contextlib
import heapq
import io
import math
import os
import uuid
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from editrl.errors import EditrlError

DEFAULT_FPS = 8.0
BT709 = 1  # FFmpeg's number for the colour space, the primaries and the transfer curve alike
LIMITED_RANGE = 1


def read_video(
    source: str | Path | bytes, *, num_frames: int | None = None, size: tuple[int, int] | None = None
) -> tuple[Tensor, float]:
    """Decode a video or an image into `([F, 3, H, W] float32 in [0, 1], frames per second)`.

    Args:
        source: path or file contents. A PNG, JPEG or WebP image is a video of one frame at 8 fps.
        num_frames: keep the first `num_frames` frames and decode no more than those; None keeps all.
        size: `(height, width)` that every frame is resized and cropped to as it is decoded (see `fit`).

    Raises:
        EditrlError: names the file that is missing, cannot be decoded, holds no video, or is shorter than `num_frames`.
    """
    video, fps = read_frames(source, limit=num_frames, size=size)
    if num_frames is not None and len(video) < num_frames:
        raise EditrlError(
            f"{_name(source)}: {num_frames} frames asked for, {len(video)} there; use a longer clip or ask for fewer"
        )
    return video, fps


def read_frames(
    source: str | Path | bytes, *, limit: int | None = None, size: tuple[int, int] | None = None
) -> tuple[Tensor, float]:
    """`read_video` that takes a clip shorter than `limit` as it is."""
    if is_image(source):
        return _to_float(_decode_image(source), size)[None], DEFAULT_FPS

    import av

    try:
        with av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as container:
            if not container.streams.video:
                raise EditrlError(f"{_name(source)}: holds no video stream; give a video or an image")
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # the workers of a DataLoader already keep every core busy
            frames = []
            for frame in container.decode(stream):
                pixels = np.rot90(frame.to_ndarray(format="rgb24"), k=frame.rotation // 90)  # phones film sideways
                frames.append(_to_float(pixels, size))
                if len(frames) == limit:
                    break
            rate = stream.average_rate or stream.guessed_rate
    except av.error.FFmpegError as error:
        raise EditrlError(
            f"{_name(source)}: cannot be decoded ({error.strerror or error}); replace the file or drop its row"
        ) from error
    if not frames:
        raise EditrlError(f"{_name(source)}: holds no frames; replace the file or drop its row")
    if not rate:
        raise EditrlError(f"{_name(source)}: does not say its frame rate; write it again as mp4")
    return torch.stack(frames), float(rate)


def write_video(
    path: str | Path,
    video: Tensor,
    fps: float = DEFAULT_FPS,
    *,
    lossless: bool = False,
    audio: str | Path | bytes | None = None,
) -> Path:
    """Write `[F, 3, H, W]` (float in [0, 1], clamped; or uint8) as H.264 in an mp4 file and return its path.

    The default, yuv420p at crf 17, plays everywhere; that format needs even sizes, so an odd height or width gains one
    row or column that repeats the edge. `lossless=True` (yuv444p, qp 0) keeps the size, and 8-bit values come back
    within 2/255, the rounding of RGB to YUV; Chromium plays it, Firefox and Safari may not.
    `audio` is the clip (path or file contents) whose sound goes along, cut to the length of `video`: see `audio.py`.
    A clip without sound, or an image, adds none.
    The file appears whole or not at all. Missing folders are made. `fps` may be fractional (29.97, 7.5).
    """
    import av

    from editrl.data.audio import audio_track

    frames = to_uint8(video).permute(0, 2, 3, 1).numpy()
    if not (math.isfinite(fps) and fps > 0):
        raise EditrlError(f"{path}: fps is {fps}; give a number above 0")
    pixel_format, options = ("yuv444p", {"qp": "0"}) if lossless else ("yuv420p", {"crf": "17"})
    if not lossless:
        frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")

    with (
        atomic_path(path) as unfinished,
        av.open(str(unfinished), "w", format="mp4", options={"movflags": "+faststart"}) as container,
    ):
        rate = Fraction(fps).limit_denominator(1001)  # exact for 24000/1001 and for two decimals
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pixel_format
        context = stream.codec_context
        # Untagged colours are guessed, differently by every player.
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED_RANGE
        audio = None if audio is None or is_image(audio) else audio
        with audio_track(audio, container, len(frames) / rate) as sound:
            # In the order of time, so that a player need not jump about in the file.
            for packet in heapq.merge(
                _encoded(stream, frames), sound, key=lambda packet: packet.dts * packet.time_base
            ):
                container.mux(packet)
    return Path(path)


def _encoded(stream, frames: np.ndarray) -> Iterator:
    """Packets of the frames [F, H, W, 3] uint8."""
    import av

    for pixels in frames:
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        yield from stream.encode(
            frame.reformat(format=stream.pix_fmt, dst_colorspace=BT709, dst_color_range=LIMITED_RANGE)
        )
    yield from stream.encode()


def write_image(path: str | Path, image: Tensor) -> Path:
    """Write `[3, H, W]` or `[1, 3, H, W]` (float in [0, 1], clamped; or uint8) in the format of the path's suffix.

    The file appears whole or not at all. Missing folders are made. An unknown suffix is an `EditrlError`.
    """
    from PIL import Image

    path = Path(path)
    image_format = Image.registered_extensions().get(path.suffix.lower())
    if image_format is None:
        raise EditrlError(f"{path}: '{path.suffix}' is no image format; use .png, .jpg or .webp")
    pixels = to_uint8(image if image.dim() == 4 else image[None])
    if len(pixels) != 1:
        raise EditrlError(f"{path}: an image has one frame, this tensor has {len(pixels)}; use write_video")
    with atomic_path(path) as unfinished:
        Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).save(unfinished, format=image_format)
    return path


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a hidden path beside `path` to write to; it becomes `path` at the end, or goes if the body raises."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def fit(video: Tensor, height: int, width: int) -> Tensor:
    """Resize `[F, C, h, w]` with antialiasing until it covers `height` x `width`, then cut out the centre."""
    if video.shape[-2:] == (height, width):
        return video
    scale = max(height / video.shape[-2], width / video.shape[-1])
    covering = max(height, round(video.shape[-2] * scale)), max(width, round(video.shape[-1] * scale))
    video = functional.interpolate(video, size=covering, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (covering[0] - height) // 2, (covering[1] - width) // 2
    return video[..., top : top + height, left : left + width].contiguous()


def to_uint8(video: Tensor) -> Tensor:
    """`[F, 3, H, W]` float in [0, 1] (clamped) or uint8, as uint8 on the CPU. NaN or another shape is an error."""
    if video.dim() != 4 or video.shape[1] != 3 or not video.numel():
        raise EditrlError(f"a video is [frames, 3, height, width], this tensor is {list(video.shape)}; permute it")
    video = video.detach().cpu()
    if video.dtype == torch.uint8:
        return video
    if not video.is_floating_point():
        raise EditrlError(f"a video is uint8 or floating point, this tensor is {video.dtype}; convert it")
    if video.isnan().any():
        raise EditrlError("the video contains NaN; look at the model that made it")
    return (video.float().clamp(0, 1) * 255).round().to(torch.uint8)


def _to_float(pixels: np.ndarray, size: tuple[int, int] | None) -> Tensor:
    """`[H, W, 3]` uint8 -> `[3, H, W]` float32 in [0, 1], fitted to `size`."""
    frame = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).float() / 255
    return frame.contiguous() if size is None else fit(frame[None], *size)[0]


def is_image(source: str | Path | bytes) -> bool:
    """Whether the first bytes are those of a PNG, JPEG or WebP file. A name says less than the contents."""
    if isinstance(source, bytes):
        start = source[:12]
    else:
        try:
            with open(source, "rb") as file:
                start = file.read(12)
        except OSError as error:
            raise EditrlError(f"{source}: cannot be read ({error.strerror}); check the path") from error
    if not start:
        raise EditrlError(f"{_name(source)}: is empty; replace the file or drop its row")
    return start.startswith((b"\x89PNG", b"\xff\xd8\xff")) or (start[:4] == b"RIFF" and start[8:] == b"WEBP")


def _decode_image(source: str | Path | bytes) -> np.ndarray:
    """An image file as `[H, W, 3]` uint8, turned upright."""
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, SyntaxError) as error:  # Pillow calls a broken PNG chunk a SyntaxError
        raise EditrlError(f"{_name(source)}: cannot be decoded ({error}); replace the file or drop its row") from error


def _name(source: str | Path | bytes) -> str:
    return f"<{len(source)} bytes in memory>" if isinstance(source, bytes) else str(source)
