"""The throughput benchmarks run at toy size, so that they never rot."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from editrl.benchmarks.throughput.plot import bars, draw


@pytest.fixture
def eager():
    """Compiling is what takes longest, and is tested where its result matters."""
    with torch.compiler.set_stance("force_eager"):
        yield


TINY = ["--size", "tiny", "--device", "cpu", "--dtype", "float32"]


@pytest.mark.slow
def test_an_edit_is_measured_part_by_part(tmp_path):
    command = [sys.executable, "-m", "editrl.benchmarks.throughput.edit", *TINY, "--steps", "2"]
    command += ["--folder", tmp_path / "editor", "--out", tmp_path / "edit.json"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "edit.json").read_text())
    assert result["clip"] == {"frames": 5, "height": 64, "width": 96}
    assert result["tokens"]["video"] == 2 * 4 * 6
    for part in ("load", "instructor", "encode source", "first denoising step", "denoising", "decode"):
        assert result["parts"][part]["seconds"] > 0
        assert result["parts"][part]["host_anonymous_gib"] > 0
    for name in ("transformer", "vlm", "vae", "text_encoder_2"):
        assert (tmp_path / "editor" / name / "config.json").exists()


@pytest.mark.slow
def test_whole_grpo_steps_are_measured_by_phase(tmp_path, benchmark, eager):
    words = ["--members", 2, "--inference_steps", 10, "--steps", 1]
    words += ["--folder", tmp_path / "editor", "--out", tmp_path / "grpo.json"]
    names = ["baseline", "ours", "ours, FP8 base"]
    for variant in names:
        benchmark("throughput", "grpo", *TINY[:4], *words, "--variant", variant)
    variants = json.loads((tmp_path / "grpo.json").read_text())["variants"]
    assert list(variants) == names
    for figure in variants.values():
        assert figure["phases"].keys() == {f"seconds/{phase}" for phase in ("rollout", "decode", "reward", "train")}
        assert figure["seconds"] == pytest.approx(sum(figure["phases"].values()), abs=0.01)
        assert figure["seconds_per_clip"] == pytest.approx(figure["seconds"] / 2, abs=0.01)
        assert figure["ratio_deviation"] == [0]
        per_clip = variants["baseline"]["seconds_per_clip"]
        assert figure["ratio"] == pytest.approx(figure["seconds_per_clip"] / per_clip, abs=0.01)


@pytest.mark.slow
def test_the_kernels_of_a_step_add_up(tmp_path, benchmark, eager):
    benchmark("throughput", "kernels", *TINY[:4], "--out", tmp_path / "kernels.json")
    steps = json.loads((tmp_path / "kernels.json").read_text())["steps"]
    assert len(steps) == 3
    for found in steps.values():
        assert sum(found["by_kind"].values()) == pytest.approx(found["milliseconds"], abs=1)
        assert found["by_kind"]["attention, forward"] > 0


def test_the_kept_results_are_drawn(tmp_path):
    results = Path(__file__).parents[2] / "benchmarks" / "results" / "throughput"
    panels = bars(results)
    assert panels.keys() == {
        "rollout step",
        "training step",
        "whole GRPO step, a clip",
        "where the time of a step goes",
    }
    assert next(iter(panels["whole GRPO step, a clip"])) == "baseline", "the longest first"
    draw(panels, tmp_path / "figures.png")
    assert (tmp_path / "figures.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_both_ways_of_scoring_give_the_same_scores(tmp_path, benchmark):
    benchmark("throughput", "rewards", *TINY[:4], "--samples", 3, "--out", tmp_path / "rewards.json")
    result = json.loads((tmp_path / "rewards.json").read_text())
    assert result["figures"]["ours"]["seconds"] > 0
    assert all(difference < 2e-3 for difference in result["largest_difference"].values()), "grey levels are 4e-3"


@pytest.mark.slow
def test_steps_are_measured_beside_their_baseline(tmp_path, benchmark, eager):
    benchmark("throughput", "steps", *TINY[:4], "--repeats", 1, "--fp8", "--out", tmp_path / "steps.json")
    figures = json.loads((tmp_path / "steps.json").read_text())["figures"]
    for kind, count in (("rollout", 5), ("training", 4)):
        ratios = [figure["ratio"] for figure in figures.values() if figure["kind"] == kind]
        assert len(ratios) == count
        assert ratios[0] == 1
        assert all(ratio > 0 for ratio in ratios)
    assert 0 < figures["rollout: FP8 base, compiled"]["velocity_error"] < 0.1
