"""`editrl doctor`: exit code 0, 1 or 2, a line a check, JSON if asked for, nothing left in the folder of the run."""

import json
import math

import pytest

from editrl.cli import main
from editrl.cli.doctor import print_findings, write_json
from editrl.doctor import Finding
from editrl.trainers import FlowGRPOTrainer


@pytest.fixture(scope="session")
def small_doctor(small_grpo):
    """(output_dir, words..., reward=...) -> the command line of the doctor for the smallest GRPO run."""
    return lambda *words, **options: ["doctor", *small_grpo(*words, **options)[1:]]


@pytest.fixture
def mine(tmp_path) -> str:
    """A file of rewards."""
    file = tmp_path / "mine.py"
    file.write_text(
        "def brightness(videos, **kwargs):\n    return [video.mean().item() for video in videos]\n"
        "def constant(videos, **kwargs):\n    return [0.5] * len(videos)\n"
        "def raises(videos, **kwargs):\n    raise KeyError('no such thing')\n"
    )
    return str(file)


def test_a_healthy_run_exits_with_0_and_prints_a_line_a_check(small_doctor, mine, tmp_path, capsys):
    run, file = tmp_path / "run", tmp_path / "new folder" / "findings.json"
    assert main(small_doctor(run, "--json", file, reward=f"{mine}:brightness")) == 0
    printed = capsys.readouterr()
    *lines, summary = printed.out.splitlines()
    written = json.loads(file.read_text())
    assert [line[:18].strip() for line in lines] == [finding["check"] for finding in written["findings"]]
    for line, finding in zip(lines, written["findings"], strict=True):
        assert line.split(finding["check"])[1].split()[0] == finding["verdict"]
        assert line.endswith(finding["text"])
    assert summary == written["summary"]
    assert " 0 fail" in summary
    checks = {finding["check"]: finding for finding in written["findings"]}
    assert checks["ratio"]["numbers"]["deviation"] == 0
    assert checks["reward brightness"]["verdict"] == "ok"
    assert "8 clips of 4 denoising steps" in printed.err
    assert not run.exists(), "the folder of the run is not the doctor's"
    assert [path.name for path in file.parent.iterdir()] == ["findings.json"]


def test_a_fault_exits_with_1(small_doctor, mine, tmp_path, capsys):
    assert main(small_doctor(tmp_path / "run", reward=f"{mine}:constant")) == 1
    assert "1 fail (reward constant)" in capsys.readouterr().out


def test_neither_an_evaluation_set_nor_a_free_folder_is_needed(small_doctor, mine, tmp_path, capsys):
    """A recipe evaluates; its folder may hold an earlier run, and it may say that a run is resumed."""
    checkpoint = tmp_path / "run" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    wanted = ["--eval_strategy", "steps", "--eval_steps", "1", "--eval_on_start", "true", "--video_steps", "1"]
    wanted += ["--eval_manifest", "/nowhere/manifest.jsonl", "--resume_from_checkpoint", "true"]
    assert main(small_doctor(tmp_path / "run", *wanted, reward=f"{mine}:brightness")) == 0
    assert list((tmp_path / "run").rglob("*")) == [checkpoint]


@pytest.mark.parametrize(
    ("words", "phrase"),
    [
        (
            ["--num_generation", "8"],
            "`editrl doctor` has no option --num_generation. Did you mean '--num_generations'?",
        ),
        (["--num_generations", "3"], "generation_batch_size 8 must be a multiple of num_generations 3"),
        (["--json", "/dev/null/findings.json"], "/dev/null: this folder cannot be made"),
        (["--train_manifest", "/nowhere/manifest.jsonl"], "manifest.jsonl"),
    ],
)
def test_a_mistake_in_the_configuration_exits_with_2(words, phrase, small_doctor, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(FlowGRPOTrainer, "generate", lambda *args: pytest.fail("there was a rollout"))
    assert main(small_doctor(tmp_path / "run", *words)) == 2
    written = capsys.readouterr()
    assert written.err.startswith("editrl: ")
    assert written.err.count("\n") == 1
    assert phrase in written.err
    assert not written.out


def test_a_reward_that_fails_exits_with_2(small_doctor, mine, tmp_path, capsys):
    assert main(small_doctor(tmp_path / "run", reward=f"{mine}:raises")) == 2
    assert "reward 'raises' failed on sample 0" in capsys.readouterr().err


FINDINGS = [
    Finding("ratio", "ok", "exactly 1", {"deviation": 0.0}),
    Finding("gradient", "fail", "norm nan [/bold]", {"norm": math.nan}),
]


def test_a_person_gets_a_table(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")
    print_findings(FINDINGS)
    printed = capsys.readouterr().out
    assert printed.startswith("┏")
    assert "norm nan [/bold]" in printed, "text is text, not markup"
    assert printed.endswith("2 checks: 1 fail (gradient), 0 warn\n")


def test_json_is_json_whatever_was_measured(tmp_path):
    file = tmp_path / "findings.json"
    write_json(file, FINDINGS)
    read = json.loads(file.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert [finding["numbers"] for finding in read["findings"]] == [{"deviation": 0.0}, {"norm": None}]
    assert read["findings"][1]["text"] == "norm nan [/bold]"
