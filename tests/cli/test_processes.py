"""`--num_processes N` is the launcher: as many processes, one error, one exit code; other launchers work as well."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from editrl.cli import main

EDITRL = [sys.executable, "-P", "-m", "editrl"]
TWO = ["--num_processes", "2"]


def environment() -> dict[str, str]:
    """Without what a launcher leaves: deepspeed may have been tried in this process."""
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in launched} | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


# -- found before any process starts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_processes", "none"], "invalid number of processes value: 'none'"),
        (["--num_processes", "0"], "must be at least 1, not 0"),
        (["--num_machines", "2", "--main_process_ip", "h"], "give --num_processes as well"),
        (["--num_processes", "8", "--num_machines", "2"], "several machines need --main_process_ip"),
        (
            ["--num_processes=3", "--num_machines=2", "--main_process_ip=h"],
            "--num_processes 3, the processes of all machines together, must be a multiple of --num_machines 2",
        ),
        (
            ["--num-processes", "4", "--num_machines", "2", "--machine_rank", "2", "--main_process_ip", "h"],
            "--machine_rank 2 must be below --num_machines 2",
        ),
    ],
)
def test_a_wrong_number_is_an_error_before_anything_starts(words, message, capsys):
    assert main(["grpo", *words, "--config", "shapes/grpo"]) == 2
    assert message in capsys.readouterr().err


def test_auto_wants_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert main(["sft", "--num_processes", "auto"]) == 2
    assert (
        "--num_processes auto is the number of GPUs, and there is none here; give a number" in capsys.readouterr().err
    )


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK"])
def test_a_launcher_within_a_launcher_is_refused(name, capsys, monkeypatch):
    monkeypatch.setenv(name, "0")
    assert main(["doctor", *TWO]) == 2
    assert "`editrl doctor` runs under a launcher" in capsys.readouterr().err
    assert main(["recipes", "shapes/grpo"]) == 0  # which needs none


def test_the_local_rank_that_the_deepspeed_launcher_puts_first_is_no_command(capsys):
    assert main(["--local_rank=1", "recipes", "--path", "shapes/grpo"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("grpo.yaml")


def test_other_commands_keep_their_options(capsys):
    assert main(["recipes", *TWO]) == 2
    assert "`editrl recipes` has no option --num_processes" in capsys.readouterr().err


# -- processes ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def spy(tmp_path):
    """A reward that leaves a file for each process, and does what the file `then` says to the second one."""
    file = tmp_path / "spy.py"
    file.write_text(
        "import os, pathlib, signal, time\n"
        "from editrl.errors import OutageError\n"
        f"FOLDER = pathlib.Path({str(tmp_path)!r})\n"
        "def seen(videos, **kwargs):\n"
        "    rank, of = os.environ.get('RANK', '0'), os.environ.get('WORLD_SIZE', '1')\n"
        "    (FOLDER / f'rank-{rank}-of-{of}').write_text(str(os.getpid()))\n"
        "    then = FOLDER / 'then'\n"
        "    if then.exists() and rank == '1':\n"
        "        exec(then.read_text())\n"
        "    return [video.mean().item() for video in videos]\n"
    )
    return f"{file}:seen"


@pytest.fixture
def words(small_grpo, spy, tmp_path):
    batch = ["--per_device_train_batch_size", "4", "--max_steps", "1", "--use_cpu", "true"]
    return small_grpo(tmp_path / "run", *batch, reward=spy)


@pytest.fixture
def scoring(shapes_manifest, spy, tmp_path):
    """A command that starts sooner than a training."""
    words = ["--rewards", spy, "--video_column", "target", "--device", "cpu"]
    return ["score", shapes_manifest, "-o", tmp_path / "scores.jsonl", *words]


def run(command) -> subprocess.CompletedProcess:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment(), check=False)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["own", "torchrun"])
def test_processes_train_together(launcher, words, tmp_path):
    torchrun = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = run([*EDITRL, *words, *TWO] if launcher == "own" else [*torchrun, "-m", "editrl", *words])
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.glob("rank-*")} == {"rank-0-of-2", "rank-1-of-2"}
    assert {path.name for path in (tmp_path / "run/checkpoint-1").glob("rng_state*")} == {
        "rng_state_0.pth",
        "rng_state_1.pth",
    }
    assert done.stdout.count("saved. To use it:") == 1


@pytest.mark.slow
def test_machines_train_together(words, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = ["--main_process_ip", "127.0.0.1", "--main_process_port", free.getsockname()[1]]
    command = [*EDITRL, *words, *TWO, "--num_machines", "2", *where, "--machine_rank"]
    first = subprocess.Popen(list(map(str, [*command, 0])), env=environment(), stderr=subprocess.PIPE, text=True)
    second = run([*command, 1])
    assert second.returncode == 0, second.stderr
    assert first.wait(timeout=60) == 0, first.stderr.read()
    assert {path.name for path in tmp_path.glob("rank-*")} == {"rank-0-of-2", "rank-1-of-2"}


@pytest.mark.slow
def test_accelerate_launch_works_too(words, tmp_path):
    """On a CPU it starts one process, unless MPI starts more."""
    launcher = [sys.executable, "-P", "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    done = run([*launcher, "-m", "editrl", *words, "--per_device_train_batch_size", "8"])
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.glob("rank-*")} == {"rank-0-of-1"}


@pytest.mark.slow
def test_an_error_of_all_processes_is_printed_once_with_its_exit_code(scoring):
    done = run([*EDITRL, *scoring, *TWO, "--reward_kwargs", "{unseen: {}}"])
    assert done.returncode == 2
    assert done.stderr.count("unseen") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("then", "code", "message"),
    [
        ("raise OutageError('of the second process')", 2, "of the second process"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 128 + signal.SIGKILL, "process 1 ended by signal 9"),
    ],
    ids=["error", "killed"],
)
def test_a_failure_of_one_process_ends_all_and_is_told(then, code, message, scoring, tmp_path):
    (tmp_path / "then").write_text(then)
    done = run([*EDITRL, *scoring, *TWO])
    assert time.time() - (tmp_path / "rank-1-of-2").stat().st_mtime < 60
    assert done.returncode == code, done.stderr
    assert done.stderr.count(f"{message}") == 1
    first = int((tmp_path / "rank-0-of-2").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_all_processes(sent, code, scoring, tmp_path):
    (tmp_path / "then").write_text("time.sleep(600)")
    process = subprocess.Popen(
        list(map(str, [*EDITRL, *scoring, *TWO])), env=environment(), stderr=subprocess.PIPE, text=True
    )
    second = tmp_path / "rank-1-of-2"
    while not (second.exists() and second.read_text()):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(sent)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == code, printed
    assert printed.count("editrl: interrupted") == (sent == signal.SIGINT)
    for path in tmp_path.glob("rank-*"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)
