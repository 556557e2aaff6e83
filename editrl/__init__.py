"""Online RL post-training of flow-matching video and image editors.

`import editrl` is light: each public name is imported when it is first used (PEP 562), so torch is too.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what editors and type checkers read; at run time __getattr__ does it
    from . import flow
    from .data import EditDataset, EditExample
    from .editing import edit_clip
    from .errors import EditrlError
    from .policy import Conditions, FlowPolicy
    from .registry import list_policies, list_rewards, load_policy, load_reward, register_policy, register_reward
    from .reward import RewardSet
    from .trainers import FlowGRPOConfig, FlowGRPOTrainer, FlowSFTConfig, FlowSFTTrainer

    __version__: str

__all__ = [
    "Conditions",
    "EditDataset",
    "EditExample",
    "EditrlError",
    "FlowGRPOConfig",
    "FlowGRPOTrainer",
    "FlowPolicy",
    "FlowSFTConfig",
    "FlowSFTTrainer",
    "RewardSet",
    "__version__",
    "edit_clip",
    "flow",
    "list_policies",
    "list_rewards",
    "load_policy",
    "load_reward",
    "register_policy",
    "register_reward",
]

_HOME = {
    "Conditions": "policy",
    "EditDataset": "data",
    "EditExample": "data",
    "EditrlError": "errors",
    "FlowGRPOConfig": "trainers",
    "FlowGRPOTrainer": "trainers",
    "FlowPolicy": "policy",
    "FlowSFTConfig": "trainers",
    "FlowSFTTrainer": "trainers",
    "RewardSet": "reward",
    "edit_clip": "editing",
    "list_policies": "registry",
    "list_rewards": "registry",
    "load_policy": "registry",
    "load_reward": "registry",
    "register_policy": "registry",
    "register_reward": "registry",
}


def __getattr__(name: str):
    if name == "__version__":
        from importlib.metadata import version

        value = version("editrl")
    elif name == "flow":
        value = importlib.import_module("editrl.flow")
    elif name in _HOME:
        value = getattr(importlib.import_module(f"editrl.{_HOME[name]}"), name)
    else:
        raise AttributeError(f"module 'editrl' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
