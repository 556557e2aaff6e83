"""The sound of a clip, taken along to its edit: copied as it is where an mp4 file may hold it, else encoded as AAC."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from editrl.errors import EditrlError

if TYPE_CHECKING:
    import av
    from av.container import InputContainer, OutputContainer

COPIED = ("aac", "ac3", "alac", "eac3", "flac", "mp3", "opus")
"""FFmpeg would put more into an mp4 (PCM, Vorbis), which players do not expect there."""

AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)
PREROLL = 0.1
"""Seconds of packets before the first frame that a decoder may need to get going (80 ms for Opus)."""


@contextlib.contextmanager
def audio_track(
    source: str | Path | bytes | None, container: OutputContainer, seconds: float
) -> Iterator[Iterable[av.Packet]]:
    """Add to `container` a track for the sound of `source`; gives its packets in time order, up to `seconds`.

    Time counts from the first frame of the source's video. A source without sound gives no track and no packets.
    """
    import av

    if source is None:
        yield ()
        return
    try:
        with av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as given:
            if not given.streams.audio:
                yield ()
            elif given.streams.audio[0].codec_context.codec.canonical_name in COPIED:
                yield _copied(given, container, seconds)
            else:
                yield _encoded(given, container, seconds)
    except av.error.FFmpegError as error:
        name = f"<{len(source)} bytes in memory>" if isinstance(source, bytes) else source
        raise EditrlError(
            f"{name}: its sound cannot be read ({error.strerror or error}); write the clip without it"
        ) from error


def _copied(given: InputContainer, container: OutputContainer, seconds: float) -> Iterator[av.Packet]:
    stream = given.streams.audio[0]
    # Here, not in the iterator: a container takes no track once its first packet is written.
    track = container.add_stream_from_template(stream)
    start = _start(given)

    def packets() -> Iterator[av.Packet]:
        for packet in given.demux(stream):
            if packet.pts is None:  # the empty packet at the end
                continue
            unit = float(packet.time_base)
            packet.pts -= round(start / unit)
            packet.dts = packet.pts  # sound is never reordered
            if packet.pts * unit >= seconds:
                break
            if (packet.pts + (packet.duration or 0)) * unit > -PREROLL:
                packet.duration = min(packet.duration or 0, round(seconds / unit) - packet.pts)
                packet.stream = track
                yield packet

    return packets()


def _encoded(given: InputContainer, container: OutputContainer, seconds: float) -> Iterator[av.Packet]:
    import av

    stream = given.streams.audio[0]
    rate = stream.rate if stream.rate in AAC_RATES else 48000
    layout = "mono" if stream.channels == 1 else "stereo"
    track = container.add_stream("aac", rate=rate, layout=layout)
    start, end = _start(given), round(seconds * rate)

    def frames() -> Iterator[av.AudioFrame | None]:
        """The samples 0 to `end`, then None."""
        resampler, position = av.AudioResampler(format="fltp", layout=layout, rate=rate), None
        for decoded in given.decode(stream):
            if position is None:
                position = round((float(decoded.time or 0) - start) * rate)
            for frame in resampler.resample(decoded):
                samples = frame.to_ndarray()[:, max(-position, 0) : max(end - position, 0)]
                if samples.shape[1]:
                    kept = av.AudioFrame.from_ndarray(samples.copy(), format="fltp", layout=layout)
                    kept.sample_rate, kept.pts = rate, max(position, 0)
                    yield kept
                position += frame.samples
            if position >= end:
                break
        yield None

    return (packet for frame in frames() for packet in track.encode(frame))


def _start(given: InputContainer) -> float:
    """When the first frame of the video is shown, in seconds of the source."""
    video = given.streams.video[0] if given.streams.video else None
    return float(video.start_time * video.time_base) if video is not None and video.start_time else 0.0
