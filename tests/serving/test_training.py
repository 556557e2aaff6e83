"""Training on a remote reward: a server that comes back costs time, one that stays away costs no update."""

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from editrl.cli import main
from editrl.recipes.shapes.dataset import write_dataset
from editrl.recipes.shapes.world import sample_scenes

REWARD = '''
import os

requests = 0

def brightness(videos, **kwargs):
    """Mean value; with DIE_AT=n, the n-th call takes the process with it."""
    global requests
    requests += 1
    if requests == int(os.environ.get("DIE_AT", 0)):
        os._exit(1)
    return [video.mean().item() for video in videos]

def away(videos, **kwargs):
    """As `brightness`, but the third rollout of process 1 meets an outage."""
    from editrl.errors import OutageError
    if os.environ.get("RANK") == "1" and requests == 2:
        raise OutageError("no answer for 600 s")
    return brightness(videos)
'''


@pytest.fixture(scope="module")
def reward(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("training") / "reward.py"
    path.write_text(REWARD)
    return path


@pytest.fixture(scope="module")
def grpo(tmp_path_factory):
    """(output_dir, reward, words...) -> the command line of four updates, none of which is saved but the last."""
    manifest = write_dataset(tmp_path_factory.mktemp("shapes"), sample_scenes(4, seed=3))

    def words(output_dir, reward, *further) -> list[str]:
        return [
            *("grpo", "--config", "shapes/grpo", "--output_dir", str(output_dir), "--train_manifest", str(manifest)),
            *("--reward_funcs", str(reward), "--reward_weights", "1", "--metric_funcs"),
            *("--eval_strategy", "no", "--eval_on_start", "false", "--save_strategy", "no", "--max_steps", "4"),
            *("--num_generations", "4", "--generation_batch_size", "8", "--per_device_train_batch_size", "4"),
            *("--gradient_accumulation_steps", "2", "--num_inference_steps", "2", "--sde_window_size", "1"),
            *("--sde_window_range", "0", "1", "--video_steps", "0", *map(str, further)),
        ]

    return words


def remote(url: str, limit: float) -> list[str]:
    return ["--reward_kwargs", f'{{"remote": {{"url": "{url}", "outage_limit": {limit}, "samples_per_request": 8}}}}']


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: value
        for file in (folder / "transformer").glob("*.safetensors")
        for name, value in load_file(file).items()
    }


def same_weights(one: Path, other: Path) -> bool:
    one, other = weights(one), weights(other)
    return bool(one) and one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def uninterrupted(grpo, reward, tmp_path_factory) -> Path:
    """The output of the run whose reward is here, and always there."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert main(grpo(folder / "run", f"{reward}:brightness")) == 0
    return folder / "run"


@pytest.mark.slow
def test_a_server_that_comes_back_changes_nothing(grpo, reward, serve, uninterrupted, tmp_path):
    """It dies with the first half of the second rollout, which is asked for while the second half is sampled."""
    dying = serve(f"{reward}:brightness", environment={"DIE_AT": "3"})

    def replace():
        dying.process.wait()
        serve(f"{reward}:brightness", "--port", dying.port)

    threading.Thread(target=replace).start()
    assert main(grpo(tmp_path / "run", "remote", *remote(dying.url, 60))) == 0
    assert same_weights(tmp_path / "run", uninterrupted)


@pytest.mark.slow
def test_a_server_that_stays_away_costs_no_update(grpo, reward, serve, uninterrupted, tmp_path, capsys):
    dying = serve(f"{reward}:brightness", environment={"DIE_AT": "5"})  # two requests a rollout
    assert main(grpo(tmp_path / "run", "remote", *remote(dying.url, 1))) == 2
    error = capsys.readouterr().err
    last = tmp_path / "run" / "checkpoint-2"
    assert f"from {dying.url} (" in error and f"the run stops with {last}; go on with --resume_from" in error
    assert (last / "complete").is_file()
    assert not same_weights(last, uninterrupted)
    back = serve(f"{reward}:brightness")
    assert main(grpo(tmp_path / "run", "remote", *remote(back.url, 1), "--resume_from_checkpoint", "true")) == 0
    assert same_weights(tmp_path / "run", uninterrupted)


@pytest.mark.slow
def test_an_interrupted_run_does_not_wait_for_its_server(grpo, reward, serve, tmp_path):
    dying = serve(f"{reward}:brightness", environment={"DIE_AT": "1"})
    words = grpo(tmp_path / "run", "remote", *remote(dying.url, 600))
    run = subprocess.Popen(
        [sys.executable, "-P", "-m", "editrl", *words],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in a shell's background ignores it
    )
    assert any("it is asked again and again" in line for line in run.stderr)
    run.send_signal(signal.SIGINT)
    run.communicate(timeout=60)  # not `outage_limit`
    assert run.returncode != 0


@pytest.mark.slow
@pytest.mark.parametrize("background", ["false", "true"])
def test_an_outage_of_one_process_stops_them_all_with_a_checkpoint(grpo, reward, tmp_path, monkeypatch, background):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    words = grpo(tmp_path / "run", f"{reward}:away", "--num_processes", 2, "--use_cpu", "true")
    words += ["--reward_options", f'{{"away": {{"background": {background}}}}}']
    words[words.index("--gradient_accumulation_steps") + 1] = "1"
    command = [sys.executable, "-P", "-m", "editrl", *words]
    stopped = subprocess.run(command, capture_output=True, text=True, check=False)
    assert stopped.returncode == 2, stopped.stderr
    last = tmp_path / "run" / "checkpoint-2"
    assert f"the run stops with {last}" in stopped.stderr
    assert (last / "complete").is_file() and len(list(last.glob("rng_state_*.pth"))) == 2
