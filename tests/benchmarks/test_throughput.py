"""The throughput benchmarks run at toy size, so that they never rot."""

import json
import subprocess
import sys

import pytest

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
def test_a_whole_grpo_step_is_measured_by_phase(tmp_path):
    command = [sys.executable, "-m", "editrl.benchmarks.throughput.grpo", *TINY[:4], "--variant", "baseline"]
    command += ["--members", "2", "--inference_steps", "10", "--steps", "1"]
    command += ["--folder", str(tmp_path / "editor"), "--out", str(tmp_path / "grpo.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [(name, figure)] = json.loads((tmp_path / "grpo.json").read_text())["variants"].items()
    assert name == "baseline"
    assert figure["phases"].keys() == {f"seconds/{phase}" for phase in ("rollout", "decode", "reward", "train")}
    assert figure["seconds"] == pytest.approx(sum(figure["phases"].values()), abs=0.01)
    assert figure["ratio_deviation"] == [0]


@pytest.mark.slow
def test_both_ways_of_scoring_give_the_same_scores(tmp_path):
    command = [sys.executable, "-m", "editrl.benchmarks.throughput.rewards", *TINY[:4], "--samples", "3"]
    done = subprocess.run([*command, "--out", str(tmp_path / "rewards.json")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "rewards.json").read_text())
    assert result["figures"]["ours"]["seconds"] > 0
    assert all(difference < 2e-3 for difference in result["largest_difference"].values()), "grey levels are 4e-3"


@pytest.mark.slow
def test_steps_are_measured_beside_their_baseline(tmp_path):
    command = [sys.executable, "-m", "editrl.benchmarks.throughput.steps", *TINY[:4], "--repeats", "1"]
    done = subprocess.run([*command, "--out", str(tmp_path / "steps.json")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "steps.json").read_text())["figures"]
    for kind, count in (("rollout", 4), ("training", 3)):
        ratios = [figure["ratio"] for figure in figures.values() if figure["kind"] == kind]
        assert len(ratios) == count
        assert ratios[0] == 1
        assert all(ratio > 0 for ratio in ratios)
