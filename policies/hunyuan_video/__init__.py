"""HunyuanVideo with source latents on channels and a LLaVA instructor."""

import importlib

_HOME = {"EditPipeline": "pipeline", "HunyuanVideoPolicy": "policy"}


def __getattr__(name: str):
    """Public names, imported when first used: a pipeline is no part of training."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
