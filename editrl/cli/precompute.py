"""`editrl precompute`: what frozen models say of every example, computed once and stored for training."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

LINE_EVERY = 30
"""Seconds between two lines of progress where there is no terminal."""


@dataclass
class CacheArguments:
    """Where the conditions go, and in what portions."""

    conditions_cache: str = field(metadata={"help": "Folder of the cache; runs that train read it under this name."})
    batch_size: int = field(default=8, metadata={"help": "Examples encoded together. Lower it when memory runs out."})
    shard_size: int = field(default=64, metadata={"help": "Examples a file: what a run loses that is killed."})

    def __post_init__(self):
        for name in ("batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def main(argv: list[str]) -> None:
    """Encode the examples of a recipe once, so that training needs no VLM."""
    import torch

    from editrl.cache import ConditionsCache, fill, size_text
    from editrl.cli.launch import adopt_geometry, make_folder, quiet_libraries
    from editrl.errors import EditrlError

    quiet_libraries()
    # The processes of torchrun share the work by their numbers alone, so that none waits for another.
    process, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    policy_args, data_args, cache_args = read_options(argv)
    datasets = data_args.load(policy_args.find())
    make_folder(cache_args.conditions_cache)
    policy = policy_args.load()
    adopt_geometry(datasets, policy)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else "cpu"
    for module in policy.frozen_modules():
        module.to(device)  # the transformer has no part in this, and stays where it is

    cache = ConditionsCache(cache_args.conditions_cache, policy.fingerprint())
    try:
        with progress(shown=process == 0) as report:
            filled = fill(
                cache,
                policy,
                datasets,
                batch_size=cache_args.batch_size,
                shard_size=cache_args.shard_size,
                process=process,
                processes=processes,
                report=report,
            )
    except torch.OutOfMemoryError as error:
        raise EditrlError(
            f"{device} has too little memory for --batch_size {cache_args.batch_size}; lower it and run the same "
            f"command again: it goes on from here ({str(error).splitlines()[0]})"
        ) from error
    print(
        f"process {process} of {processes}: " if processes > 1 else "",
        f"{filled.encoded} examples encoded, {filled.kept} there already; {size_text(filled.bytes)} written to "
        f"{cache.folder} in {filled.seconds:.1f} s",
        sep="",
    )


@contextlib.contextmanager
def progress(shown: bool) -> Iterator[Callable]:
    """A function that shows what `fill` reports: a bar in a terminal, elsewhere a line every half minute."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from editrl.cache import size_text

    console = Console(stderr=True)
    columns = TextColumn("encoding"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}")
    bar = Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console)
    task, printed = bar.add_task("", total=None), time.monotonic()

    def report(filled) -> None:
        nonlocal printed
        if console.is_terminal:
            bar.update(task, completed=filled.done, total=filled.total, description=size_text(filled.bytes))
        elif shown and time.monotonic() - printed > LINE_EVERY:
            printed = time.monotonic()
            text = f"{filled.done} of {filled.total} examples after {filled.seconds:.0f} s, {size_text(filled.bytes)}"
            console.print(text, soft_wrap=True)

    with bar if shown and console.is_terminal else contextlib.nullcontext():
        yield report


def read_options(argv: list[str]) -> tuple:
    """Policy, data and cache arguments; a recipe may hold those of `editrl sft` and `editrl grpo` besides."""
    from editrl.cli.arguments import DataArguments, PolicyArguments, RewardArguments
    from editrl.cli.config import parse_config
    from editrl.trainers import FlowGRPOConfig, FlowSFTConfig

    options = parse_config(
        (PolicyArguments, DataArguments, CacheArguments),
        argv,
        "precompute",
        ignored=(RewardArguments, FlowSFTConfig, FlowGRPOConfig),
    )
    # A recipe that trains from the cache leaves the encoders out; here they are what is wanted.
    options[0].policy_kwargs.pop("encoders", None)
    return options
