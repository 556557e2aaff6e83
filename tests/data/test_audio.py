"""The sound of a clip goes along with its edit: copied where mp4 may hold it, cut to the frames, in time with them."""

import av
import numpy as np
import pytest
import torch

from editrl.data import read_video, write_image, write_video
from editrl.errors import EditrlError

RATE = 48000
CONTAINERS = {".mp4": ("mp4", "libx264"), ".mkv": ("matroska", "libx264"), ".avi": ("avi", "mpeg4")}


def sound_of_a_click(seconds: float, at: float) -> np.ndarray:
    """A tone of 440 Hz that starts at `at`, float32 [samples]."""
    time = np.arange(int(seconds * RATE)) / RATE
    return np.where(time >= at, 0.4 * np.sin(2 * np.pi * 440 * time), 0).astype(np.float32)


def make_clip(path, codec, *, seconds=2.0, fps=24, at=0.5, layout="stereo", video_delay=0.0):
    """A film of 64x64 with a tone that starts at `at` seconds of the sound; the video starts `video_delay` later."""
    container_format, video_codec = CONTAINERS[path.suffix]
    with av.open(str(path), "w", format=container_format) as container:
        video = container.add_stream(video_codec, rate=fps)
        video.width = video.height = 64
        video.pix_fmt = "yuv420p"
        sound = container.add_stream(codec, rate=RATE, layout=layout)
        for number in range(round(seconds * fps)):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 5 * number % 250, np.uint8), format="rgb24")
            frame.pts = number + round(video_delay * fps)
            container.mux(video.encode(frame))
        container.mux(video.encode())
        tone = sound_of_a_click(seconds, at)
        channels = 1 if layout == "mono" else 2
        samples = av.AudioFrame.from_ndarray(np.stack([tone] * channels), format="fltp", layout=layout)
        samples.sample_rate, samples.pts = RATE, 0
        container.mux(sound.encode(samples))
        container.mux(sound.encode())
    return path


def sound_of(path) -> tuple[str, np.ndarray, float]:
    """Codec, first channel in [-1,1], and the time of its first sample."""
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        resampler = av.AudioResampler(format="fltp", layout=stream.layout, rate=stream.rate)
        frames = [frame for decoded in container.decode(stream) for frame in resampler.resample(decoded)]
        samples = np.concatenate([frame.to_ndarray()[0] for frame in frames])
        return stream.codec_context.codec.canonical_name, samples, frames[0].time


def onset(path) -> float:
    """Seconds into the video at which the tone begins."""
    _, samples, start = sound_of(path)
    with av.open(str(path)) as container:
        video = container.streams.video[0]
        first = float((video.start_time or 0) * video.time_base)
    return start - first + np.flatnonzero(np.abs(samples) > 0.1)[0] / RATE


def durations(path) -> tuple[float, float]:
    """Of video and sound, as the file declares them."""
    with av.open(str(path)) as container:
        video, sound = container.streams.video[0], container.streams.audio[0]
        return float(video.duration * video.time_base), float(sound.duration * sound.time_base)


def packets_of(path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(audio=0) if packet.size]


@pytest.mark.parametrize(
    ("suffix", "encoder", "codec"),
    [(".mp4", "aac", "aac"), (".mkv", "aac", "aac"), (".mkv", "libopus", "opus"), (".mp4", "libmp3lame", "mp3")],
)
@pytest.mark.parametrize("frames", [48, 33])
def test_sound_is_copied_and_cut_to_the_frames(tmp_path, suffix, encoder, codec, frames):
    source = make_clip(tmp_path / f"source{suffix}", encoder)
    video, fps = read_video(source, num_frames=frames)
    edited = write_video(tmp_path / "edited.mp4", 1 - video, fps, audio=source)
    assert read_video(edited)[0].shape == (frames, 3, 64, 64)
    assert read_video(edited)[1] == fps == 24
    assert sound_of(edited)[0] == codec
    copied = packets_of(edited)
    assert copied == packets_of(source)[: len(copied)]  # to the byte: not decoded and encoded again
    assert durations(edited) == pytest.approx((frames / 24, frames / 24), abs=2e-3)
    # Whole packets are copied, of at most 1152 samples, and a decoder is given some to start with.
    assert frames / 24 * RATE <= len(sound_of(edited)[1]) <= frames / 24 * RATE + 2 * 1152
    assert onset(edited) == pytest.approx(onset(source), abs=2e-3)


@pytest.mark.parametrize(("frames", "layout"), [(48, "stereo"), (33, "stereo"), (13, "mono")])
def test_sound_that_an_mp4_does_not_hold_becomes_aac(tmp_path, frames, layout):
    source = make_clip(tmp_path / "source.avi", "pcm_s16le", layout=layout, at=0.25)
    video, fps = read_video(source, num_frames=frames)
    edited = write_video(tmp_path / "edited.mp4", video, fps, audio=source.read_bytes())
    codec, samples, _ = sound_of(edited)
    assert codec == "aac"
    assert durations(edited) == pytest.approx((frames / 24, frames / 24), abs=2e-3)
    assert frames / 24 * RATE <= len(samples) <= frames / 24 * RATE + 1024
    expected = sound_of_a_click(2, 0.25)[: len(samples)]
    loud = slice(RATE // 2, int(frames / 24 * RATE) - 1024)  # the last block ends in a cut
    assert np.abs(samples[: len(expected)] - expected)[loud].max(initial=0) < 0.05
    assert onset(edited) == pytest.approx(0.25, abs=5e-3)


@pytest.mark.parametrize(("suffix", "encoder"), [(".mkv", "aac"), (".mkv", "pcm_s16le")])
def test_sound_stays_in_time_with_a_video_that_starts_later(tmp_path, suffix, encoder):
    source = make_clip(tmp_path / f"source{suffix}", encoder, video_delay=0.25)
    assert onset(source) == pytest.approx(0.25, abs=5e-3)
    video, fps = read_video(source, num_frames=33)
    edited = write_video(tmp_path / "edited.mp4", video, fps, audio=source)
    assert onset(edited) == pytest.approx(0.25, abs=5e-3)


def test_sound_shorter_than_the_video_is_kept_as_it_is(tmp_path):
    source = make_clip(tmp_path / "source.mp4", "aac", seconds=1.0)
    edited = write_video(tmp_path / "edited.mp4", torch.rand(48, 3, 64, 64), 24, audio=source)
    assert packets_of(edited) == packets_of(source)
    assert durations(edited) == pytest.approx((2.0, 1.0), abs=0.03)


def test_pictures_and_sound_alternate_in_the_file(tmp_path):
    """A player that reads from the start needs both as it goes."""
    source = make_clip(tmp_path / "source.mp4", "aac")
    edited = write_video(tmp_path / "edited.mp4", read_video(source)[0], 24, audio=source)
    with av.open(str(edited)) as container:
        kinds = [p.stream.type for p in sorted(container.demux(), key=lambda p: p.pos or 0) if p.size]
    half = kinds[: len(kinds) // 2]
    assert {"audio", "video"} == set(half[len(half) // 2 :])
    assert half.count("audio") == pytest.approx(kinds.count("audio") / 2, rel=0.2)


def test_without_sound_there_is_none(tmp_path):
    silent = write_video(tmp_path / "silent.mp4", torch.rand(5, 3, 32, 32))
    image = write_image(tmp_path / "image.png", torch.rand(3, 32, 32))
    plain = write_video(tmp_path / "plain.mp4", torch.zeros(5, 3, 32, 32))
    for source in (silent, image, silent.read_bytes(), None):
        edited = write_video(tmp_path / "edited.mp4", torch.zeros(5, 3, 32, 32), audio=source)
        assert edited.read_bytes() == plain.read_bytes()


def test_sound_that_cannot_be_read_is_named_and_nothing_is_written(tmp_path):
    (tmp_path / "noise.mp4").write_bytes(b"this is no sound" * 100)
    for source, name in ((tmp_path / "noise.mp4", "noise.mp4"), (tmp_path / "missing.mp4", "missing.mp4")):
        with pytest.raises(EditrlError, match=name):
            write_video(tmp_path / "edited.mp4", torch.zeros(5, 3, 32, 32), audio=source)
    assert [path.name for path in tmp_path.iterdir()] == ["noise.mp4"]
