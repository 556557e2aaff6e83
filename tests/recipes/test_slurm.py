"""slurm.sh starts one editrl a node, for all GPUs together, and goes on where a job was cut off."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "recipes" / "viva" / "slurm.sh"


@pytest.fixture
def node(tmp_path):
    """(words) -> what editrl was called with on the second of two nodes of four GPUs; slurm is played."""
    for name, text in (
        ("scontrol", 'echo "first-node\nsecond-node"'),
        ("srun", 'shift; SLURM_NODEID=1 exec "$@"'),
        ("editrl", 'printf "%s\\n" "$@"'),
    ):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)

    def called(*words) -> list[str]:
        slurm = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"}
        path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        command = ["bash", SCRIPT, *map(str, words)]
        return subprocess.run(
            command, env=os.environ | slurm | path, text=True, check=True, capture_output=True, cwd=tmp_path
        ).stdout.splitlines()

    return called


def test_a_node_is_told_its_place_and_the_number_of_all_processes(node):
    words = node("grpo", "viva/grpo", "runs/a folder", "--beta", "0.01")
    assert words[:7] == ["grpo", "--config", "viva/grpo", "--output_dir", "runs/a folder", "--beta", "0.01"]
    expected = {"num_processes": "8", "num_machines": "2", "machine_rank": "1", "main_process_ip": "first-node"}
    assert dict(zip([word.lstrip("-") for word in words[7::2]], words[8::2], strict=True)) == expected


def test_a_job_that_starts_again_resumes_if_there_is_a_complete_checkpoint(node, tmp_path):
    checkpoint = tmp_path / "run" / "checkpoint-20"
    checkpoint.mkdir(parents=True)
    assert "--resume_from_checkpoint" not in node("sft", "viva/sft", "run")
    (checkpoint / "complete").touch()
    words = node("sft", "viva/sft", "run")
    assert words[words.index("--resume_from_checkpoint") + 1] == "true"


def test_it_names_the_licence_of_the_weights():
    for place in ("European Union", "United Kingdom", "South Korea"):
        assert place in SCRIPT.read_text()
