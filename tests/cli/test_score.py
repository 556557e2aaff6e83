"""`editrl score`: every clip gets its numbers once, whatever interrupts, and one bad row costs no other."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from editrl.cli import main
from editrl.data import read_video, write_image, write_video
from editrl.recipes.shapes import WEIGHTS

REWARDS = '''
import os, time
import editrl.errors

def brightness(videos, **kwargs):
    """Mean value; `CALLS` notes who was scored."""
    if "CALLS" in os.environ:
        with open(os.environ["CALLS"], "a") as file:
            file.writelines(id + "\\n" for id in kwargs["ids"])
    time.sleep(float(os.environ.get("NAP", 0)))
    return [video.mean().item() for video in videos]

def away(videos, ids):
    """A service that stays away from the second clip on."""
    if "a/1" in ids and "BACK" not in os.environ:
        raise editrl.errors.OutageError("no answer for 600 s")
    return [0.5] * len(videos)

def change(videos, source_videos, instructions, factor=1):
    """Distance to the source; does not apply to removals."""
    if "explode" in instructions:
        raise RuntimeError("out of luck")
    scores = [factor * (v - s).abs().mean().item() for v, s in zip(videos, source_videos, strict=True)]
    return [None if text == "remove it" else score for text, score in zip(instructions, scores)]
'''


def clip(seed: int, frames: int = 5) -> torch.Tensor:
    across = torch.linspace(0.1, 0.4 + 0.05 * seed, 32).expand(frames, 3, 32, 32)
    return across + torch.linspace(0, 0.2, frames).view(-1, 1, 1, 1)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A manifest of six rows with their edits; the third is an image."""
    (tmp_path / "rewards.py").write_text(REWARDS)
    rows = []
    for i in range(6):
        name = f"{i}.png" if i == 2 else f"{i}.mp4"
        for kind, seed in (("source", i), ("edited", i + 3)):
            path = tmp_path / kind / name
            write_image(path, clip(seed, 1)) if i == 2 else write_video(path, clip(seed), lossless=True)
        row = {"id": f"a/{i}", "source": f"source/{name}", "edited": f"edited/{name}", "instruction": "brighten it"}
        rows.append(row)
    rows[4]["instruction"] = "remove it"
    write_rows(tmp_path, rows)
    return tmp_path


def write_rows(folder: Path, rows: list[dict]) -> None:
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(folder: Path, name: str = "manifest.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def words(folder: Path, *further, rewards=("brightness", "change")) -> list[str]:
    specs = ",".join(f"{folder / 'rewards.py'}:{name}" for name in rewards)
    given = ["score", folder / "manifest.jsonl", "-o", folder / "scores.jsonl", "--rewards", specs, "--device", "cpu"]
    return [str(word) for word in (*given, *further)]


def expected(folder: Path) -> list[dict]:
    scores = []
    for row in rows_of(folder):
        edited, source = (read_video(folder / row[key])[0] for key in ("edited", "source"))
        change = None if row["instruction"] == "remove it" else as_float32((edited - source).abs().mean())
        scores.append({"id": row["id"], "scores": {"brightness": as_float32(edited.mean()), "change": change}})
    return scores


def as_float32(value: torch.Tensor) -> float:
    return value.float().item()


def without_fingerprints(folder: Path) -> list[dict]:
    return [{key: line[key] for key in ("id", "scores")} for line in rows_of(folder, "scores.jsonl")]


@pytest.fixture
def scored(tmp_path, monkeypatch):
    """() -> the ids that were scored since the last call, sorted."""
    calls = tmp_path / "calls.txt"
    monkeypatch.setenv("CALLS", str(calls))

    def since() -> list[str]:
        ids = calls.read_text().split() if calls.exists() else []
        calls.unlink(missing_ok=True)
        return sorted(ids)

    return since


ALL = [f"a/{i}" for i in range(6)]


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 4])
def test_every_row_gets_the_numbers_of_its_rewards(folder, capsys, batch):
    assert main(words(folder, "--batch_size", batch)) == 0
    assert without_fingerprints(folder) == expected(folder)
    summary = capsys.readouterr().out.splitlines()
    values = [line["scores"]["brightness"] for line in expected(folder)]
    assert summary[0].endswith("scores.jsonl: 6 of 6 rows have scores, 0 of them had them before")
    assert summary[1] == f"  brightness  mean {sum(values) / 6:.6g} of 6 rows"
    assert summary[2].endswith("of 5 rows, does not apply to 1")


def test_arguments_and_another_column(folder, capsys):
    write_rows(folder, [row | {"mine": row["source"]} for row in rows_of(folder)])
    assert main(words(folder, "--video-column", "mine", "--reward_kwargs", "{change: {factor: 1e2}}")) == 0
    assert [line["scores"]["change"] for line in rows_of(folder, "scores.jsonl")] == [0, 0, 0, 0, None, 0]
    assert main(words(folder, "--overwrite", "--reward_kwargs", '{"change": {"factor": 100}}')) == 0
    ratio = rows_of(folder, "scores.jsonl")[0]["scores"]["change"] / expected(folder)[0]["scores"]["change"]
    assert ratio == pytest.approx(100)


def test_what_edit_wrote_is_read_directly(folder, capsys):
    """The edits of `--manifest`, beside their records; an edit that left the last frame out is compared without it."""
    write_video(folder / "source" / "0.mp4", clip(0, 6))
    rows = rows_of(folder)[:3]
    write_rows(folder, [{key: row[key] for key in ("id", "source", "instruction")} for row in rows])
    edit = ["edit", "--manifest", folder / "manifest.jsonl", "-o", folder / "edits", "--num_inference_steps", 1]
    assert main([*map(str, edit), "--model_name_or_path", str(WEIGHTS / "sft"), "--device", "cpu"]) == 0
    assert main(words(folder, "--edits", folder / "edits")) == 0
    first, second, third = rows_of(folder, "scores.jsonl")
    edited = read_video(folder / "edits" / "a%2F0.mp4")[0]
    assert len(edited) == 5
    assert first["scores"]["brightness"] == as_float32(edited.mean())
    source = read_video(folder / "source" / "0.mp4")[0][:5]
    assert first["scores"]["change"] == as_float32((edited - source).abs().mean())
    assert second["scores"] and third["scores"]

    capsys.readouterr()
    write_rows(folder, [row | {"instruction": "darken it"} for row in rows[:1]] + rows[1:] + [rows[0] | {"id": "new"}])
    record = folder / "edits" / "a%2F1.json"
    settings = json.loads(record.read_text())
    settings["settings"]["side_by_side"] = True
    record.write_text(json.dumps(settings))
    assert main(words(folder, "--edits", folder / "edits")) == 1
    error = capsys.readouterr().err
    assert "(id 'a/0'): " in error and "edited with another instruction than the row has" in error
    assert "(id 'a/1'): " in error and "was written --side_by_side" in error
    assert "(id 'new'): there is no " in error and "edit the row with `editrl edit --manifest` first" in error
    assert [line["id"] for line in rows_of(folder, "scores.jsonl")] == ["a/2"]


# -- again -------------------------------------------------------------------------------------------------------------


def test_what_is_scored_is_not_scored_again(folder, capsys, scored):
    assert main(words(folder)) == 0 and scored() == ALL
    before = (folder / "scores.jsonl").read_bytes()
    assert main(words(folder)) == 0 and scored() == []
    assert "6 of them had them before" in capsys.readouterr().out
    assert (folder / "scores.jsonl").read_bytes() == before

    write_video(folder / "edited" / "1.mp4", clip(9), lossless=True)
    write_video(folder / "source" / "3.mp4", clip(9), lossless=True)
    rows = rows_of(folder)
    rows[5]["instruction"] = "remove it"
    write_rows(folder, rows[::-1])
    assert main(words(folder)) == 0
    assert scored() == ["a/1", "a/3", "a/5"], "another clip, another source, another row"
    assert without_fingerprints(folder) == expected(folder), "in the order of the manifest"

    (folder / "rewards.py").write_text(REWARDS + "# changed\n")
    sys.modules.pop(next(name for name in sys.modules if name.startswith("editrl_file_rewards")))
    assert main(words(folder)) == 0 and scored() == ALL


def test_one_reward_under_two_names(folder, scored):
    spec = f"{folder / 'rewards.py'}:change"
    given = ["--rewards", f"once={spec},twice={spec}", "--reward_kwargs", "{twice: {factor: 2}}"]
    command = [*words(folder), *given]
    assert main(command) == 0
    scores = [line["scores"] for line in rows_of(folder, "scores.jsonl")]
    assert all(line.keys() == {"once", "twice"} for line in scores)
    applies = [line for line in scores if line["once"] is not None]
    assert len(applies) == 5
    assert [line["twice"] for line in applies] == [pytest.approx(2 * line["once"]) for line in applies]
    before = rows_of(folder, "scores.jsonl")
    (folder / "rewards.py").write_text(REWARDS + "# changed\n")
    assert main(command) == 0
    after = rows_of(folder, "scores.jsonl")
    assert all(one["fingerprint"] != other["fingerprint"] for one, other in zip(before, after, strict=True))


def test_a_half_written_line_is_repaired(folder, capsys, scored):
    assert main(words(folder)) == 0
    whole = (folder / "scores.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    scored()
    for cut in (1, 7, 30, len(lines[2]) - 1):
        (folder / "scores.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:cut])
        assert main(words(folder)) == 0
        assert scored() == ALL[2:]
        assert (folder / "scores.jsonl").read_bytes() == whole


def test_a_killed_run_goes_on_where_it_was(folder, scored, monkeypatch):
    monkeypatch.setenv("NAP", "0.3")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.Popen([sys.executable, "-P", "-m", "editrl", *words(folder)], env=environment)
    output, deadline = folder / "scores.jsonl", time.monotonic() + 60
    while not (output.exists() and output.read_bytes().count(b"\n") >= 2):
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    done = [line["id"] for line in rows_of(folder, "scores.jsonl")]
    scored()
    monkeypatch.setenv("NAP", "0")
    assert main(words(folder)) == 0
    assert scored() == [id for id in ALL if id not in done]
    assert without_fingerprints(folder) == expected(folder)


def test_other_rewards_and_other_rows_are_not_mixed(folder, capsys):
    assert main(words(folder)) == 0
    assert main(words(folder, rewards=["change"])) == 2
    assert "scores.jsonl:1: holds scores of other rewards (brightness, change); give" in capsys.readouterr().err
    write_rows(folder, rows_of(folder)[1:])
    assert main(words(folder)) == 2
    assert "holds a score of 'a/0', which is no row of the manifest" in capsys.readouterr().err
    assert main(words(folder, "--overwrite", rewards=["change"])) == 0
    assert [line["scores"].keys() for line in rows_of(folder, "scores.jsonl")] == [{"change": 0}.keys()] * 5


@pytest.mark.parametrize("content", ['{"id": "a/0"}\n', "[1]\n", "notes\n", "notes", '{"id": "a/0", "scores": 1}\n{'])
def test_a_foreign_file_is_left_alone(folder, capsys, content):
    (folder / "scores.jsonl").write_text(content)
    assert main(words(folder)) == 2
    assert "line of scores; give another --output" in capsys.readouterr().err
    assert (folder / "scores.jsonl").read_text() == content


# -- rows that fail ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 6])
def test_rows_that_fail_are_told_and_cost_no_other(folder, capsys, scored, batch):
    rows = rows_of(folder)
    whole = expected(folder)
    rows[0]["edited"] = "nowhere.mp4"
    del rows[1]["edited"]
    (folder / "edited" / "2.png").write_bytes(b"no image")
    rows[3]["instruction"] = "explode"
    write_rows(folder, rows)
    assert main(words(folder, "--batch_size", batch)) == 1
    written = capsys.readouterr()
    assert without_fingerprints(folder) == [whole[4], whole[5]]
    lines = written.err.splitlines()
    assert "4 of 6 rows failed; run the same command again to retry:" in lines
    told = {line.split(" (id ")[0].rpartition(":")[2]: line for line in lines if "manifest.jsonl:" in line}
    assert told.keys() == {"1", "2", "3", "4"}
    assert "nowhere.mp4" in told["1"]
    assert "column 'edited' has no path of an edited clip" in told["2"]
    assert "2.png: cannot be decoded" in told["3"]
    assert "reward 'change' failed" in told["4"] and "RuntimeError: out of luck" in told["4"]
    rows[3]["instruction"] = "brighten it"
    write_rows(folder, rows)
    scored()
    assert main(words(folder)) == 1 and scored() == ["a/3"]
    assert [line["id"] for line in rows_of(folder, "scores.jsonl")] == ["a/3", "a/4", "a/5"]


def test_an_outage_stops_the_run_and_keeps_what_there_is(folder, capsys, monkeypatch):
    """It is no row's fault: the others would only wait as long, and fail."""
    assert main(words(folder, rewards=["away"])) == 2
    assert "reward 'away' failed on sample 0 (id 'a/1'): OutageError: no answer for 600 s" in capsys.readouterr().err
    assert [line["id"] for line in rows_of(folder, "scores.jsonl")] == ["a/0"]
    monkeypatch.setenv("BACK", "1")
    assert main(words(folder, rewards=["away"])) == 0
    assert "6 of 6 rows have scores, 1 of them had them before" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("further", "phrase"),
    [
        (["--edits", "x", "--video_column", "y"], "both say where the clips are"),
        (["--reward_kwargs", "{changes: {}}"], "Did you mean 'change'?"),
        (["--reward_kwargs", "change"], "is no mapping"),
        (["--batch_size", "0"], "must be at least 1"),
        (["-o", "."], "is a folder; give the name of a file"),
    ],
)
def test_a_wrong_command_line_is_one_line(folder, capsys, further, phrase):
    assert main(words(folder, *further)) == 2
    error = capsys.readouterr().err
    assert phrase in error and error.count("\n") == 1


def test_a_reward_of_whole_groups_is_refused(folder, capsys):
    with open(folder / "rewards.py", "a") as file:
        file.write("def ranks(videos): return [0.0] * len(videos)\nranks.groupwise = True\n")
    assert main(words(folder, rewards=["ranks"])) == 2
    assert "'ranks' compares the clips of a group, and a manifest has no groups" in capsys.readouterr().err


# -- processes ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_write_what_one_does(folder, scored, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    rows = rows_of(folder)
    rows[1]["edited"] = "nowhere.mp4"
    write_rows(folder, rows)
    assert main(words(folder)) == 1 and len(scored()) == 5
    alone = (folder / "scores.jsonl").read_bytes()
    lines = alone.splitlines(keepends=True)
    (folder / "scores.jsonl").write_bytes(lines[0])
    (folder / "scores.jsonl.5.part").write_bytes(lines[3] + lines[4][:9])  # of a run with more processes, killed
    command = [sys.executable, "-P", "-m", "editrl", *words(folder, "--num_processes", 2)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stderr
    assert scored() == ["a/2", "a/3", "a/5"]
    assert (folder / "scores.jsonl").read_bytes() == alone
    assert not list(folder.glob("*.part"))
    assert result.stdout.count("5 of 6 rows have scores, 2 of them had them before") == 1
    assert result.stderr.count("nowhere.mp4") == 1 and "1 of 6 rows failed" in result.stderr
