"""What rewards/README.md shows works: the reward in a file, and the package that shares it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from editrl.cli import main

README = (Path(__file__).parents[2] / "rewards" / "README.md").read_text(encoding="utf-8")


def shown(language: str, first_line: str) -> str:
    """The code block of the README that begins with this line."""
    return next(
        block for block in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if block.startswith(first_line)
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder into which the README's package was built and installed."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    (source / "pyproject.toml").write_text(shown("toml", "# pyproject.toml"))
    (source / "sharp_rewards.py").write_text(shown("python", "# mine.py"))
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    run([*pip, "wheel", *offline, "--no-build-isolation", "-w", str(source / "dist"), str(source)])
    [wheel] = (source / "dist").glob("sharp_rewards-0.1.0-*.whl")
    run([*pip, "install", *offline, "--target", str(target), str(wheel)])
    return target


def run(command: list[str], **environment: str) -> str:
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=os.environ | environment
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_shown_reward_passes_the_shown_check(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(shown("python", "# mine.py"))
    assert main(["rewards", "check", f"{tmp_path / 'mine.py'}:sharpness"]) == 0
    assert " 0 fail, 0 warn" in capsys.readouterr().out


def test_a_package_of_rewards_is_found_by_name_once_it_is_installed(installed):
    code = (
        "import json, sys, torch, editrl\n"
        "listed = {entry.name: [entry.summary, entry.origin] for entry in editrl.list_rewards()}\n"
        "stripes = torch.tensor([0.0, 1.0]).repeat(8).expand(1, 3, 16, 16)\n"
        "score = editrl.RewardSet(['sharpness'])([stripes], {}).item()\n"
        "print(json.dumps([listed['sharpness'], score]))"
    )
    path = os.pathsep.join([str(installed), *filter(None, sys.path)])
    summary, score = json.loads(run([sys.executable, "-c", code], PYTHONPATH=path))
    assert summary == ["Mean absolute horizontal gradient.", "sharp_rewards (sharp-rewards 0.1.0)"]
    assert score == 1


def test_the_shown_expression_is_one():
    import yaml

    from editrl.rewards.expression import parse

    settings = yaml.safe_load(shown("yaml", "reward_funcs: [expression]"))
    _, names = parse(settings["reward_kwargs"]["expression"]["expression"])
    assert names == ["clip_instruction", "preservation"]


def test_every_built_in_reward_stands_in_the_table():
    import tomllib

    declared = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    names = declared["project"]["entry-points"]["editrl.rewards"]
    assert all(f"`{name}`" in README for name in names)
