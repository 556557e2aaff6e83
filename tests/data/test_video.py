"""Video in and out: what comes back is what was written, and what cannot be read is named."""

import struct

import av
import numpy as np
import pytest
import torch
from PIL import Image

from editrl.data import atomic_path, fit, read_frames, read_video, write_image, write_video
from editrl.errors import EditrlError


def noise(frames=5, height=32, width=32, seed=0):
    """A clip of random 8-bit pixels: the hardest thing to keep."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (frames, 3, height, width), generator=generator, dtype=torch.uint8)


def gradient(frames=5, height=32, width=48):
    """A smooth clip that lossy coding keeps well; brightness grows with the frame number."""
    across = torch.linspace(0, 0.8, width).expand(frames, 3, height, width)
    return across + torch.linspace(0, 0.2, frames).view(-1, 1, 1, 1)


def test_lossless_comes_back_within_two_levels(tmp_path):
    video = noise()
    read, _ = read_video(write_video(tmp_path / "clip.mp4", video, lossless=True))
    assert read.dtype == torch.float32 and read.shape == video.shape
    assert (read * 255 - video.float()).abs().max() <= 2.001


def test_float_and_uint8_write_the_same_file(tmp_path):
    video = noise()
    from_bytes = write_video(tmp_path / "a.mp4", video)
    from_floats = write_video(tmp_path / "b.mp4", video.float() / 255)
    assert from_bytes.read_bytes() == from_floats.read_bytes()


def test_default_keeps_colours_and_plays_everywhere(tmp_path):
    video = (
        torch.tensor([0.9, 0.2, 0.1]).view(1, 3, 1, 1).repeat(5, 1, 32, 32)
    )  # one flat red: a wrong matrix shifts it
    path = write_video(tmp_path / "clip.mp4", video)
    assert (read_video(path)[0] - video).abs().max() < 0.02
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.codec_context.colorspace == 1  # BT.709


@pytest.mark.parametrize("fps", [1, 7.5, 8.0, 23.976, 24000 / 1001, 29.97])
@pytest.mark.parametrize("frames", [1, 5])
def test_fractional_fps_round_trip(tmp_path, fps, frames):
    assert read_video(write_video(tmp_path / "clip.mp4", gradient(frames), fps=fps))[1] == pytest.approx(fps, rel=1e-6)


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf")])
def test_impossible_fps_is_an_error(tmp_path, fps):
    with pytest.raises(EditrlError, match="fps is"):
        write_video(tmp_path / "clip.mp4", gradient(), fps=fps)
    assert not list(tmp_path.iterdir())


def test_odd_size_gains_a_repeated_edge(tmp_path):
    video = gradient(5, 31, 47)
    read, _ = read_video(write_video(tmp_path / "clip.mp4", video))
    assert read.shape == (5, 3, 32, 48)
    assert (read[..., :31, :47] - video).abs().mean() < 0.01
    assert (read[..., 47] - read[..., 46]).abs().max() < 0.05


def test_lossless_keeps_an_odd_size(tmp_path):
    video = noise(3, 31, 17)
    read, _ = read_video(write_video(tmp_path / "clip.mp4", video, lossless=True))
    assert (read * 255 - video.float()).abs().max() <= 2.001


def test_values_outside_the_range_are_clamped(tmp_path):
    read, _ = read_video(write_video(tmp_path / "clip.mp4", torch.full((1, 3, 16, 16), 1.7), lossless=True))
    assert read.min() > 0.99


@pytest.mark.parametrize(
    "video, complaint",
    [
        (torch.full((5, 3, 16, 16), float("nan")), "NaN"),
        (torch.rand(5, 16, 16, 3), "permute"),
        (torch.rand(3, 16, 16), "permute"),
        (torch.zeros(0, 3, 16, 16), "permute"),
        (torch.zeros(5, 3, 16, 16, dtype=torch.int64), "int64"),
    ],
)
def test_what_is_no_video_is_not_written(tmp_path, video, complaint):
    with pytest.raises(EditrlError, match=complaint):
        write_video(tmp_path / "clip.mp4", video)
    assert not list(tmp_path.iterdir())


def test_only_the_frames_asked_for_are_decoded(tmp_path):
    path = write_video(tmp_path / "clip.mp4", gradient(241, 64, 96), lossless=True)
    whole, _ = read_video(path)
    contents = bytearray(path.read_bytes())
    contents[-2000:] = bytes(2000)  # the end is unreadable, and nobody needs it
    first, _ = read_video(bytes(contents), num_frames=9)
    assert torch.equal(first, whole[:9])
    with pytest.raises(EditrlError, match="cannot be decoded"):
        read_video(bytes(contents))


def test_clip_shorter_than_num_frames_is_an_error_or_taken_as_it_is(tmp_path):
    path = write_video(tmp_path / "clip.mp4", gradient(5))
    with pytest.raises(EditrlError, match=r"clip\.mp4: 9 frames asked for, 5 there"):
        read_video(path, num_frames=9)
    assert len(read_frames(path, limit=9)[0]) == 5


def test_missing_parents_are_made_and_the_file_has_usual_permissions(tmp_path):
    path = write_video(tmp_path / "a" / "b" / "clip.mp4", gradient())
    (tmp_path / "plain").write_bytes(b"")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_crash_while_writing_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = write_video(tmp_path / "clip.mp4", gradient())
    before = path.read_bytes()
    contiguous, calls = np.ascontiguousarray, []

    def break_at_third_frame(array):
        calls.append(array)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return contiguous(array)

    monkeypatch.setattr("editrl.data.video.np.ascontiguousarray", break_at_third_frame)
    with pytest.raises(KeyboardInterrupt):
        write_video(path, noise())
    assert [file.name for file in tmp_path.iterdir()] == ["clip.mp4"]
    assert path.read_bytes() == before


def test_a_failed_rename_leaves_no_partial_file(tmp_path, monkeypatch):
    def no_space(*paths):
        raise OSError("no space left")

    monkeypatch.setattr("editrl.data.video.os.replace", no_space)
    with pytest.raises(OSError, match="no space"), atomic_path(tmp_path / "report.html") as unfinished:
        unfinished.write_text("half")
    assert not list(tmp_path.iterdir())


def test_missing_file_is_named(tmp_path):
    with pytest.raises(EditrlError, match=r"nowhere\.mp4: cannot be read \(No such file"):
        read_video(tmp_path / "nowhere.mp4")
    with pytest.raises(EditrlError, match="Is a directory"):
        read_video(tmp_path)


@pytest.mark.parametrize("contents, complaint", [(b"", "is empty"), (b"not a video at all" * 100, "cannot be decoded")])
def test_undecodable_file_is_named(tmp_path, contents, complaint):
    path = tmp_path / "broken.mp4"
    path.write_bytes(contents)
    with pytest.raises(EditrlError, match=rf"broken\.mp4: {complaint}"):
        read_video(path)
    with pytest.raises(EditrlError, match=rf"<{len(contents)} bytes in memory>: {complaint}"):
        read_video(contents)


def test_truncated_video_is_an_error(tmp_path):
    contents = write_video(tmp_path / "clip.mp4", noise(21)).read_bytes()
    with pytest.raises(EditrlError, match="cannot be decoded"):
        read_video(contents[: len(contents) * 3 // 4])


def test_sound_without_pictures_is_named(tmp_path):
    path = tmp_path / "voice.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(EditrlError, match=r"voice\.wav: holds no video stream"):
        read_video(path)


def test_a_clip_filmed_sideways_is_turned_upright(tmp_path):
    video = noise(1, 32, 48)
    contents = bytearray(write_video(tmp_path / "clip.mp4", video, lossless=True).read_bytes())
    matrix = contents.index(b"tkhd") + 44
    contents[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)  # 90 degrees
    read, _ = read_video(bytes(contents))
    assert (read * 255 - torch.rot90(video, -1, dims=(2, 3)).float()).abs().max() <= 2.001


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_an_image_is_a_video_of_one_frame(tmp_path, suffix):
    image = gradient(1)
    path = write_image(tmp_path / f"image{suffix}", image)
    for source in (path, path.read_bytes()):
        read, fps = read_video(source)
        assert read.shape == (1, 3, 32, 48) and fps == 8.0
        assert (read - image).abs().max() < 0.05
    with pytest.raises(EditrlError, match="5 frames asked for, 1 there"):
        read_video(path, num_frames=5)


def test_png_is_exact_and_the_name_does_not_decide(tmp_path):
    image = noise(1)
    path = write_image(tmp_path / "image.png", image[0]).rename(tmp_path / "image.mp4")
    assert torch.equal((read_video(path)[0] * 255).round(), image.float())


def test_greyscale_and_rotated_photos_are_read_upright_in_rgb(tmp_path):
    grey = Image.fromarray(np.arange(32 * 16, dtype=np.uint8).reshape(32, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held sideways
    grey.save(tmp_path / "photo.png", exif=exif)
    assert read_video(tmp_path / "photo.png")[0].shape == (1, 3, 16, 32)


def test_broken_image_is_named(tmp_path):
    path = write_image(tmp_path / "image.png", noise(1, 64, 64))
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(EditrlError, match=r"image\.png: cannot be decoded"):
        read_video(path)


def test_image_errors_say_what_to_use(tmp_path):
    with pytest.raises(EditrlError, match=r"'\.mp4' is no image format; use \.png"):
        write_image(tmp_path / "image.mp4", noise(1))
    with pytest.raises(EditrlError, match="has 5; use write_video"):
        write_image(tmp_path / "image.png", noise(5))


def test_fit_covers_and_cuts_out_the_centre():
    wide = torch.zeros(2, 3, 32, 96)
    wide[..., 32:64] = 1  # the middle third is exactly the 32 x 32 centre
    assert torch.equal(fit(wide, 32, 32), torch.ones(2, 3, 32, 32))
    assert fit(wide, 48, 16).shape == (2, 3, 48, 16)
    assert fit(wide, 32, 96) is wide


def test_fit_antialiases_and_stays_in_range():
    one_column_in_four = (torch.arange(64) % 4 == 0).float().expand(1, 3, 64, 64)
    assert (fit(one_column_in_four, 16, 16) - 0.25).abs().max() < 0.1  # the mean, not the columns that it steps on
    steps = (noise().float() / 255 > 0.5).float()
    assert fit(steps, 80, 80).min() >= 0 and fit(steps, 80, 80).max() <= 1


def test_size_while_decoding_equals_size_afterwards(tmp_path):
    path = write_video(tmp_path / "clip.mp4", noise(3, 48, 64), lossless=True)
    assert torch.allclose(read_video(path, size=(32, 32))[0], fit(read_video(path)[0], 32, 32), atol=1e-6)
