"""How a benchmark leaves its result: JSON, written whole, that says on what it was measured."""

import json
import os
import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

PACKAGES = ("diffusers", "transformers", "peft", "deepspeed", "editrl")


def machine(device: str) -> dict[str, str]:
    """What the figures were measured on, and with."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or platform.machine()
    found = {"device": name, "cpus": str(os.cpu_count()), "torch": torch.__version__}
    return found | {package: version(package) for package in PACKAGES} | commit()


def commit() -> dict[str, str]:
    """Of the checkout that this file is part of; elsewhere `EDITRL_COMMIT`, where that is set."""
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    tracked = (
        shutil.which("git")
        and not subprocess.run(
            [*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=False
        ).returncode
    )
    if not tracked:
        return {"commit": os.environ["EDITRL_COMMIT"]} if "EDITRL_COMMIT" in os.environ else {}
    described = subprocess.run([*git, "describe", "--always", "--dirty"], capture_output=True, text=True, check=True)
    return {"commit": described.stdout.strip()}


def write_json(path: Path, value) -> None:
    """Atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)
