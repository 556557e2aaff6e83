"""`editrl edit --context_parallel 2`: processes that share a clip make the clip that one process makes.

Under pytest this file starts itself once, as a program (`python test_edit_parallel.py <folder>`). That does the
`PHASES`, each in processes of its own, and saves what they found; the tests compare it with the plain command.
"""

import contextlib
import io
import json
import os
import socket
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import distributed, multiprocessing

from editrl.cli import edit_manifest, main
from editrl.data import read_video, write_image, write_video
from editrl.policies.hunyuan_video.pipeline import EditPipeline
from editrl.recipes.shapes import WEIGHTS

TIMEOUT = 300  # seconds after which the processes are killed
EDITOR = str(WEIGHTS / "sft")
INSTRUCTION = "make the red circle blue"


def moving(frames: int = 5) -> torch.Tensor:
    across = torch.linspace(0.1, 0.7, 32).expand(frames, 3, 32, 32)
    return across + torch.linspace(0, 0.2, frames).view(-1, 1, 1, 1)


def words(folder: Path, output: str, degree: int = 1, *, source: str | None = None) -> list[str]:
    """The command line for the manifest, or for the clip `source`."""
    what = ["--manifest", folder / "rows.jsonl"] if source is None else [folder / source, INSTRUCTION]
    options = ["--model_name_or_path", EDITOR, "--num_inference_steps", 2]
    options += ["--context_parallel", degree] if degree > 1 else []
    return ["edit", *map(str, [*what, "-o", folder / output, *options])]


# -- what the processes do ---------------------------------------------------------------------------------------------


def edited(given: list[str], failing: str | None = None) -> dict:
    """The command, and which rows this process wrote. The edit of the row `failing` fails in process 1 alone."""
    written, sample, write = [], edit_manifest.edit_example, edit_manifest.write_edit

    def noted(video, example, *rest):
        written.append(example.id)
        return write(video, example, *rest)

    def fallible(policy, example, *rest):
        video = sample(policy, example, *rest)
        if example.id == failing and os.environ["RANK"] == "1":
            raise RuntimeError("this GPU fell off the bus")
        return video

    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
        mock.patch.object(edit_manifest, "write_edit", noted),
        mock.patch.object(edit_manifest, "edit_example", fallible),
    ):
        code = main(given)
    return {"code": code, "out": out.getvalue(), "err": err.getvalue(), "written": written}


def two(folder: Path, connect) -> dict:
    connect()
    clip = edited(words(folder, "clip.mp4", 2, source="a.mp4"))
    connect()
    failing = edited(words(folder, "two", 2), failing="c")
    connect()
    again = edited(words(folder, "two", 2))
    connect()
    distributed.init_process_group("gloo")
    return {"clip": clip, "failing": failing, "again": again, "pipeline": by_pipeline(2)}


def four(folder: Path, connect) -> dict:
    clip = edited(words(folder, "clip.mp4", 2, source="a.mp4"))
    three = edited(words(folder, "four", 3))
    connect()
    return {"clip": clip, "three": three, "rows": edited(words(folder, "four", 2))}


def idle(folder: Path, connect) -> dict:
    connect()
    return edited(words(folder, "four", 2))


def by_pipeline(degree: int) -> torch.Tensor:
    pipe = EditPipeline.from_pretrained(EDITOR)
    pipe.set_progress_bar_config(disable=True)
    if degree > 1:
        pipe.enable_context_parallel(degree)
    generator = torch.Generator().manual_seed(0)
    return pipe(moving(), INSTRUCTION, num_inference_steps=2, generator=generator).frames[0]


PHASES = {"two": (2, two), "four": (4, four), "idle": (4, idle)}


def do_phase(rank: int, world: int, name: str, folder: Path, ports: list[int]) -> None:
    torch.set_num_threads(1)
    ports = iter(ports)

    def connect() -> None:
        """The next process group meets at a port of its own."""
        os.environ["MASTER_PORT"] = str(next(ports))

    process = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {name: str(value) for name, value in process.items()}
    # diffusers divides the rank by the number of GPUs, to note a device that nothing here uses.
    with mock.patch("torch.accelerator.device_count", lambda: 1):
        torch.save(PHASES[name][1](folder, connect), folder / f"{name} {rank}.pt")


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def run_phases(folder: Path) -> None:
    # Forked, the processes need not import everything again.
    method = "fork" if sys.platform == "linux" else "spawn"
    for name, (world, _) in PHASES.items():
        if name == "idle":
            (folder / "four" / "a.json").unlink()
        arguments = (world, name, folder, free_ports(4))
        multiprocessing.start_processes(do_phase, arguments, nprocs=world, start_method=method)


# -- the tests ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory, run_program) -> Path:
    """Three rows, a clip, an image and a clip; what the plain command makes of them, and what each process found."""
    folder = tmp_path_factory.mktemp("edits")
    write_video(folder / "a.mp4", moving())
    write_image(folder / "b.png", moving(1))
    write_video(folder / "c.mp4", moving(9))
    rows = [{"id": name[0], "source": name, "instruction": INSTRUCTION} for name in ("a.mp4", "b.png", "c.mp4")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(words(folder, "plain")) == 0
    run_program(__file__, folder, TIMEOUT)
    return folder


def found(folder: Path, phase: str) -> list[dict]:
    """By each rank."""
    return [torch.load(folder / f"{phase} {rank}.pt") for rank in range(PHASES[phase][0])]


def same(one: Path, other: Path) -> bool:
    """But for rounding; x264 does not always write the same frames to the same file."""
    difference = (read_video(one)[0] - read_video(other)[0]).abs()
    return bool(difference.mean() < 0.02 if one.suffix == ".mp4" else difference.max() < 1.01 / 255)


@pytest.mark.slow
def test_a_clip_is_that_of_one_process(folder):
    first, second = (rank["clip"] for rank in found(folder, "two"))
    assert first["code"] == second["code"] == 0, first["err"]
    assert first["out"].startswith(f"{folder / 'clip.mp4'}: 5 frames of 32x32") and not second["out"]
    assert same(folder / "clip.mp4", folder / "plain" / "a.mp4")


@pytest.mark.slow
@pytest.mark.parametrize("output", ["two", "four"])
def test_the_clips_of_a_manifest_are_those_of_one_process(folder, output):
    names = {"a.mp4", "b.png", "c.mp4"}
    assert {path.name for path in (folder / output).iterdir()} == names | {"a.json", "b.json", "c.json"}
    assert all(same(folder / output / name, folder / "plain" / name) for name in names)
    record = json.loads((folder / output / "b.json").read_text())
    assert record == json.loads((folder / "plain" / "b.json").read_text()), "the number of processes is no setting"


@pytest.mark.slow
def test_an_edit_that_fails_in_one_process_fails_in_all_that_share_it_and_the_next_call_tries_again(folder):
    first, second = (rank["failing"] for rank in found(folder, "two"))
    assert (first["code"], second["code"]) == (1, 0)
    assert (first["written"], second["written"]) == (["a", "b"], [])
    lines = first["err"].splitlines()
    assert "1 of 3 clips failed; run the same command again to retry:" in lines
    assert lines[-1].endswith("row 2 (id 'c'): this GPU fell off the bus")
    first, second = (rank["again"] for rank in found(folder, "two"))
    assert (first["code"], second["code"]) == (0, 0)
    assert (first["written"], second["written"]) == (["c"], [])
    assert "2 of 3 clips are done already" in first["out"] and not second["out"]


@pytest.mark.slow
def test_rows_are_divided_among_groups_and_the_first_of_each_writes(folder):
    assert [rank["rows"]["written"] for rank in found(folder, "four")] == [["a", "c"], [], ["b"], []]


@pytest.mark.slow
def test_a_group_without_rows_keeps_no_other_waiting(folder):
    ranks = found(folder, "idle")
    assert [rank["written"] for rank in ranks] == [["a"], [], [], []]
    assert [rank["code"] for rank in ranks] == [0] * 4


@pytest.mark.slow
def test_what_cannot_be_shared_is_refused(folder):
    for rank in found(folder, "four"):
        assert rank["clip"]["code"] == rank["three"]["code"] == 2
        assert "--context_parallel 2 processes, here are 4; start 2, or set it to 4" in rank["clip"]["err"]
        assert "--context_parallel 3 needs a multiple of 3 processes, here are 4" in rank["three"]["err"]


def test_one_process_shares_nothing(small_edit, tmp_path, capsys):
    assert main(small_edit(tmp_path / "edited.mp4", "--context_parallel", 2)) == 2
    error = capsys.readouterr().err
    assert "needs a multiple of 2 processes, here are 1; start with `editrl edit --num_processes 2" in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_the_pipeline_makes_the_clip_of_one_process(folder):
    expected = by_pipeline(1)
    for rank in found(folder, "two"):
        torch.testing.assert_close(rank["pipeline"], expected, rtol=0, atol=1e-4)


if __name__ == "__main__":
    run_phases(Path(sys.argv[1]))
