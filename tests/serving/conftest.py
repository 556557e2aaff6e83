"""`editrl serve-reward` as a process of its own, and a reward whose behaviour the samples order."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REWARD = '''
import time
import torch

def steered(videos, source_videos=None, masks=None, orders=None):
    """Depends on every bit of the clips; does what `orders` say besides."""
    scores = []
    for i, video in enumerate(videos):
        order = (orders or [None] * len(videos))[i]
        if order == "raise":
            raise KeyError("no such face")
        if isinstance(order, float):
            time.sleep(order)
        score = video.double().pow(3).sum()
        if source_videos is not None and source_videos[i] is not None:
            score = score - source_videos[i].double().sum()
        if masks is not None and masks[i] is not None:
            score = score + masks[i].double().mean()
        scores.append({"nan": float("nan"), "none": None}.get(order, score.item()))
    return scores[1:] if "short" in (orders or []) else scores

class Captioned:
    """Wants a column that its signature hides."""
    requires = ("target_captions",)
    def __init__(self, factor=1):
        self.factor = factor
    def __call__(self, videos, **kwargs):
        assert "source_videos" not in kwargs, "nobody asked for these"
        return [self.factor * len(caption) for caption in kwargs["target_captions"]]
'''


class Server:
    """A running `editrl serve-reward`."""

    def __init__(self, spec: str, *words, environment: dict | None = None, log: Path | None = None):
        command = [sys.executable, "-P", "-m", "editrl", "serve-reward", spec, "--device", "cpu", "--port", "0"]
        self.log = open(log, "a") if log else subprocess.DEVNULL  # noqa: SIM115
        self.process = subprocess.Popen(
            [*command, *map(str, words)],
            env=os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        line = self.process.stdout.readline()
        assert "serving" in line, f"the server did not start: {line}"
        self.url = re.search(r"http://\S+", line)[0]
        self.port = int(self.url.rpartition(":")[2])

    def stop(self) -> int:
        """As a scheduler does: SIGTERM; the exit code."""
        self.process.terminate()
        return self.process.wait(60)

    def peak_memory(self) -> float:
        """MB that the process had at most."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1e3


@pytest.fixture(scope="session")
def reward_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("reward") / "reward.py"
    path.write_text(REWARD)
    return path


@pytest.fixture(scope="session")
def serve(tmp_path_factory):
    """(spec, words...) -> a Server, which ends with the tests."""
    started = []

    def start(spec, *words, **options) -> Server:
        started.append(Server(str(spec), *words, **options))
        return started[-1]

    yield start
    for server in started:
        server.process.kill()
        server.process.wait()
        server.process.stdout.close()


@pytest.fixture(scope="session")
def server(serve, reward_file, tmp_path_factory) -> Server:
    """Serves `steered`, to anybody of this machine."""
    log = tmp_path_factory.mktemp("server") / "log.txt"
    running = serve(f"{reward_file}:steered", "--columns", "orders", log=log)
    running.log_file = log
    return running


@pytest.fixture(scope="session")
def guarded(serve, reward_file) -> Server:
    """Serves `steered` for a token, bodies below 1 MB, with place for one that waits."""
    return serve(
        *(f"{reward_file}:steered", "--columns", "orders", "--token-env", "SECRET", "--max-body-mb", 1, "--queue", 1),
        environment={"SECRET": "sesame seven"},
    )


@pytest.fixture
def clips():
    """(n) -> n clips as a model makes them: float32 of any bits in [0,1], of two sizes."""

    def make(count: int, size: int = 16) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(5)
        shapes = [(5, 3, size, size), (1, 3, size, size + 8)]
        return [torch.rand(shapes[i % 2], generator=generator) for i in range(count)]

    return make
