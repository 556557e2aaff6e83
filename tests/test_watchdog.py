"""The measures of the watchdog: against plain NumPy, on planted clips, and on lists of mixed sizes."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from editrl.errors import EditrlError
from editrl.recipes.shapes.world import render_scenes, sample_scenes
from editrl.watchdog import (
    CHUNK_VALUES,
    EDGE_SLOPE,
    WATCHDOG,
    colour_entropy,
    edge_density,
    exposure,
    measure,
    source_similarity,
    temporal_flicker,
)

RANGES = {
    "edge_density": 1.0,
    "colour_entropy": 9.0,
    "exposure": 1.0,
    "temporal_flicker": 2.0,
    "source_similarity": 1.0,
}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def plain(value: float, frames: int = 5, size: int = 16) -> torch.Tensor:
    return torch.full((frames, 3, size, size), float(value))


def measured(video: torch.Tensor, source: torch.Tensor | None = None) -> dict[str, float]:
    """The measures of one clip."""
    return {name: value.item() for name, value in measure([video], [video if source is None else source]).items()}


@pytest.fixture(scope="module")
def clips() -> dict[str, list[torch.Tensor]]:
    """Sources and targets of the embedded world, with a little noise, so that no value lies between two bins."""
    pixels = render_scenes(sample_scenes(12, seed=0))
    return {
        name: [(clip.float() / 255 + 0.02 * noise(*clip.shape)).clamp(0, 1) for clip in pixels[name]]
        for name in ("source", "target")
    }


# -- against NumPy -----------------------------------------------------------------------------------------------------


def grey(video: np.ndarray) -> np.ndarray:
    return np.einsum("fchw,c->fhw", video, [0.299, 0.587, 0.114])


def reference_edge_density(video: np.ndarray, source: np.ndarray) -> float:
    """Pixel by pixel."""
    kernel, edges = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 8, []
    for frame in np.pad(grey(video), ((0, 0), (1, 1), (1, 1)), mode="edge"):
        for row in range(frame.shape[0] - 2):
            for column in range(frame.shape[1] - 2):
                patch = frame[row : row + 3, column : column + 3]
                edges.append(math.hypot((patch * kernel).sum(), (patch * kernel.T).sum()) > EDGE_SLOPE)
    return float(np.mean(edges))


def reference_colour_entropy(video: np.ndarray, source: np.ndarray) -> float:
    counts, _ = np.histogramdd(video.transpose(0, 2, 3, 1).reshape(-1, 3), bins=8, range=[(0, 1)] * 3)
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum())


def reference_temporal_flicker(video: np.ndarray, source: np.ndarray) -> float:
    y = grey(video)
    return float(np.mean([np.abs(y[t - 1] - 2 * y[t] + y[t + 1]) for t in range(1, len(y) - 1)]))


REFERENCES = {
    "edge_density": reference_edge_density,
    "colour_entropy": reference_colour_entropy,
    "exposure": lambda video, source: float(grey(video).mean()),
    "temporal_flicker": reference_temporal_flicker,
    "source_similarity": lambda video, source: float(1 - np.abs(video - source).mean()),
}


@pytest.mark.parametrize("name", WATCHDOG)
def test_a_measure_is_that_of_its_formula(clips, name):
    videos, sources = [*clips["target"], noise(4, 3, 9, 14)], [*clips["source"], noise(4, 3, 9, 14, seed=1)]
    values = measure(videos, sources)[name]
    expected = [
        REFERENCES[name](video.double().numpy(), source.double().numpy())
        for video, source in zip(videos, sources, strict=True)
    ]
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, torch.tensor(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", WATCHDOG)
def test_a_measure_keeps_its_range_whatever_the_clip(name):
    stripes = plain(0).clone()
    stripes[..., ::2] = 1
    blinking = plain(0).clone()
    blinking[::2] = 1
    for video in (plain(0), plain(1), stripes, blinking, noise(5, 3, 16, 16), noise(5, 3, 16, 16).round()):
        for source in (video, 1 - video):
            assert 0 <= measured(video, source)[name] <= RANGES[name] + 1e-6


# -- planted clips -----------------------------------------------------------------------------------------------------


def test_a_blank_clip_has_no_edges_no_colours_and_no_flicker():
    values = measured(plain(0.3))
    assert values["edge_density"] == values["colour_entropy"] == values["temporal_flicker"] == 0
    assert values["exposure"] == pytest.approx(0.3)
    assert values["source_similarity"] == 1


def test_noise_is_all_edges_and_nearly_all_colours():
    values = measured(noise(5, 3, 64, 64))
    assert values["edge_density"] > 0.8
    assert values["colour_entropy"] > 8.9
    assert values["temporal_flicker"] > 0.2


def test_evenly_filled_bins_have_nine_bits():
    levels = (torch.arange(8) + 0.5) / 8
    video = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, 16, 32)
    assert measured(video)["colour_entropy"] == pytest.approx(9)


def test_two_colours_have_the_entropy_of_their_shares():
    video = plain(0.1, frames=4)
    video[0] = 0.9
    assert measured(video)["colour_entropy"] == pytest.approx(0.25 * 2 + 0.75 * math.log2(4 / 3))


def blurred(video: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(F.pad(video, (2, 2, 2, 2), mode="replicate"), 5, stride=1)


def test_blur_takes_texture_away_but_widens_a_strong_edge():
    texture = 0.5 + 0.3 * (noise(3, 3, 32, 32) - 0.5)
    assert measured(blurred(texture))["edge_density"] < 0.1 * measured(texture)["edge_density"]
    step = plain(0)
    step[..., 8:] = 1
    assert [measured(step)["edge_density"], measured(blurred(step))["edge_density"]] == [2 / 16, 6 / 16]


@pytest.mark.parametrize(("height", "edges"), [(0.09, 0), (0.11, 2)])
def test_an_edge_is_a_step_of_more_than_a_tenth_of_the_range(height, edges):
    video = plain(0.4)
    video[..., 8:] += height
    assert measured(video)["edge_density"] == pytest.approx(edges / 16), "one pixel wide on both sides"


def test_grain_is_no_edge():
    grain = 0.02 * torch.randn(5, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    assert measured((0.5 + grain).expand(-1, 3, -1, -1))["edge_density"] < 0.01


def test_over_exposure_is_seen_whatever_its_colour(clips):
    for clip in clips["target"]:
        assert measured((2 * clip + 0.1).clamp(0, 1))["exposure"] > measured(clip)["exposure"]
    weights = [measured(torch.eye(3)[channel].view(1, 3, 1, 1).expand(3, -1, 8, 8))["exposure"] for channel in range(3)]
    assert weights == pytest.approx([0.299, 0.587, 0.114])


def test_flicker_is_seen_and_a_steady_fade_is_not():
    fade = torch.linspace(0.2, 0.6, 9).view(-1, 1, 1, 1).expand(-1, 3, 16, 16)
    assert measured(fade)["temporal_flicker"] == pytest.approx(0, abs=1e-6)
    flicker = fade.clone()
    flicker[::2] += 0.1
    assert measured(flicker)["temporal_flicker"] == pytest.approx(0.2, abs=1e-6)


def test_steady_motion_of_a_smooth_picture_hardly_flickers():
    place = torch.arange(32) - torch.arange(8)[:, None]  # one pixel a frame
    waves = 0.5 + 0.4 * torch.sin(place * 2 * math.pi / 32)
    moving = waves.view(8, 1, 1, 32).expand(-1, 3, 32, -1)
    change = moving.diff(dim=0).abs().mean().item()
    shaken = moving.clone()
    shaken[::2] = moving[::2].roll(1, -1)  # as fast, but to and fro
    assert measured(moving)["temporal_flicker"] < 0.25 * change
    assert measured(shaken)["temporal_flicker"] > 4 * measured(moving)["temporal_flicker"]


def test_similarity_is_the_distance_to_the_source():
    assert measured(plain(0.5), plain(0.3))["source_similarity"] == pytest.approx(0.8)
    assert measured(plain(1), plain(0))["source_similarity"] == 0


# -- which clips it takes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 2])
def test_an_image_has_everything_but_flicker(frames):
    values = measured(noise(frames, 3, 16, 16))
    assert math.isnan(values.pop("temporal_flicker"))
    assert all(math.isfinite(value) for value in values.values())


def test_clips_of_another_shape_than_their_source_have_no_similarity():
    values = measured(noise(5, 3, 16, 16), noise(5, 3, 16, 32))
    assert math.isnan(values.pop("source_similarity"))
    assert all(math.isfinite(value) for value in values.values())


def test_a_list_of_mixed_sizes_is_measured_clip_by_clip_and_in_order():
    shapes = [(5, 3, 16, 16), (1, 3, 8, 8), (5, 3, 16, 16), (9, 3, 12, 20), (1, 3, 8, 8), (5, 3, 16, 16)]
    videos = [noise(*shape, seed=seed) * (seed + 1) / 6 for seed, shape in enumerate(shapes)]
    sources = [noise(*shape, seed=9) for shape in shapes]
    sources[2] = noise(5, 3, 32, 32)
    together = measure(videos, sources)
    assert list(together) == list(WATCHDOG)
    for index, (video, source) in enumerate(zip(videos, sources, strict=True)):
        for name, value in measured(video, source).items():
            assert together[name][index].item() == pytest.approx(value, rel=1e-5, nan_ok=True)


def test_many_clips_are_measured_in_parts():
    videos = [noise(5, 3, 32, 32, seed=seed) for seed in range(CHUNK_VALUES // (5 * 3 * 32 * 32) + 3)]
    values = measure(videos, videos)
    assert values["exposure"].tolist() == pytest.approx([measured(video)["exposure"] for video in videos])


def test_the_measures_take_batches_too(clips):
    videos, sources = torch.stack(clips["target"]), torch.stack(clips["source"])
    values = measure(clips["target"], clips["source"])
    for function in (edge_density, colour_entropy, exposure, temporal_flicker):
        torch.testing.assert_close(function(videos), values[function.__name__])
    torch.testing.assert_close(source_similarity(videos, sources), values["source_similarity"])


def test_values_beyond_the_range_fall_into_the_outermost_bins():
    assert measured(noise(5, 3, 16, 16) + 1)["colour_entropy"] == 0
    assert measured(noise(5, 3, 16, 16) - 1)["colour_entropy"] == 0


def test_half_precision_clips_are_measured_in_float32(clips):
    video, source = clips["target"][0].bfloat16(), clips["source"][0]
    assert measured(video, source) == measured(video.float(), source)


def test_no_clips_have_no_values():
    assert {name: value.shape for name, value in measure([], []).items()} == dict.fromkeys(WATCHDOG, (0,))


def test_clips_and_sources_come_in_pairs():
    with pytest.raises(EditrlError, match="2 videos but 1 source videos"):
        measure([plain(0), plain(1)], [plain(0)])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_clip_that_is_not_finite_is_named(value):
    with pytest.raises(EditrlError, match="video 1 has NaN or infinite values"):
        measure([plain(0), plain(value)], [plain(0), plain(0)])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_device_makes_no_difference(clips):
    here = measure(clips["target"], clips["source"])
    there = measure([clip.cuda() for clip in clips["target"]], clips["source"])
    for name, values in here.items():
        torch.testing.assert_close(there[name], values)
