"""The learning benchmarks: their arithmetic on known answers, and one tiny run of each command."""

import functools
import json

import pytest
import torch

from editrl.benchmarks.algorithms import signal, suite, summary

TINY = ["--device", "cpu", "--groups", "2", "--members", "4", "--scenes", "8"]


def test_signal_and_noise_of_known_gradients():
    """Blocks of 96 clips with |E g|² = 4 and E|noise|² = 400: half a cosine takes 100 blocks."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.zeros(4000)
    mean[0] = 2.0
    blocks = mean + torch.randn(128, 4000, generator=generator) * (400 / 4000) ** 0.5
    found = signal.analyse(blocks, clips=96)
    assert found["signal"] == pytest.approx(4, rel=0.25)
    assert found["noise"] == pytest.approx(400, rel=0.02)
    assert found["half_cosine_batch"] == pytest.approx(9600, rel=0.3)
    low, high = found["half_cosine_batch_90"]
    assert low < 9600 < high
    cosines = {point["clips"] // 96: point["cosine"] for point in found["cosines"]}
    assert sorted(cosines) == [1, 2, 4, 8, 16, 32, 64]
    for blocks_in_a_batch in (16, 32):
        assert cosines[blocks_in_a_batch] == pytest.approx(4 / (4 + 400 / blocks_in_a_batch), abs=0.04)


def test_pure_noise_suggests_no_batch():
    blocks = torch.eye(16)  # orthogonal, so without any signal
    found = signal.analyse(blocks, clips=10)
    assert found["half_cosine_batch"] is None
    assert all(point["cosine"] == pytest.approx(0, abs=1e-6) for point in found["cosines"])


def result(updates: list[int], successes: list[float], seed: int) -> dict:
    return {
        "settings": {"reward": "oracle", "seed": seed},
        "machine": {"device": "cpu"},
        "evaluations": [
            {"update": update, "clips": 10 * update, "seconds": 2.0 * update, "success": value, "preservation_db": 20.0}
            for update, value in zip(updates, successes, strict=True)
        ],
    }


def test_the_table_compares_seeds_where_all_have_arrived(tmp_path):
    (tmp_path / "a-seed0.json").write_text(json.dumps(result([0, 10, 20], [0.4, 0.5, 0.9], 0)))
    (tmp_path / "a-seed1.json").write_text(json.dumps(result([0, 10], [0.4, 0.7], 1)))
    [row] = summary.rows(summary.load(tmp_path))
    assert row["updates"] == "10"
    assert row["clips"] == "100"
    assert row["success after"] == "0.600 ± 0.141"
    assert row["change, points"] == "20.0 ± 14.1"


def test_runs_of_one_name_with_other_settings_are_refused(tmp_path):
    (tmp_path / "a-seed0.json").write_text(json.dumps(result([0], [0.4], 0)))
    other = result([0], [0.4], 1)
    other["settings"]["learning_rate"] = 1.0
    (tmp_path / "a-seed1.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="'a' differ in more than their seed"):
        summary.load(tmp_path)


def test_every_experiment_parses():
    from editrl.benchmarks.algorithms.learning import parser

    for experiments in suite.EXPERIMENTS.values():
        for name, arguments in experiments.items():
            options = parser().parse_args([*arguments.split(), "--out", f"{name}.json"])
            assert options.updates > 0


@pytest.mark.slow
def test_the_commands_run(tmp_path, benchmark, capsys):
    run = functools.partial(benchmark, "algorithms")
    once = ["--updates", 1, "--eval_every", 1, "--eval_scenes", 4, "--set", "loss_type=nft"]
    run("learning", "--out", tmp_path / "nft-seed0.json", *once, *TINY)
    run("signal", "--out", tmp_path / "signal.json", "--blocks", 2, "--algorithms", "grpo", "nft", *TINY)
    capsys.readouterr()
    plots = ["--plot", tmp_path / "learning.png", "--signal_plot", tmp_path / "signal.png"]
    run("summary", tmp_path, *plots, "--report", tmp_path / "report.html")
    shown = capsys.readouterr().out
    assert "| nft | 1 | 1 | 8 |" in shown
    assert "| grpo |" in shown
    for name in ("learning.png", "signal.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "half_cosine_batch" in (tmp_path / "report.html").read_text()
