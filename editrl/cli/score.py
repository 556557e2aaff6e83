"""`editrl score`: rewards of the clips of a manifest, resumable, by one or several processes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editrl.cli.parser import CommandParser, number
from editrl.errors import EditrlError, OutageError

if TYPE_CHECKING:
    from torch import Tensor

    from editrl.cli.process_groups import Processes
    from editrl.data import EditDataset, EditExample
    from editrl.reward import RewardSet

FAILURES = (EditrlError, OSError, RuntimeError)
"""What is a row's own fault, and no reason to stop the others. An outage is not: it would fail them all."""


def main(argv: list[str]) -> int:
    """Score the clips of a manifest with rewards."""
    parser = CommandParser("editrl score", main.__doc__)
    parser.add_argument("manifest", type=Path, help="JSONL file of examples, as for training")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSONL file of scores")
    parser.add_argument(
        "--rewards",
        required=True,
        help="a,b,path/to/file.py:Name; name=a to call it so; `editrl rewards` lists the names",
    )
    parser.add_argument("--reward_kwargs", "--reward-kwargs", help="YAML or JSON: {pickscore: {model: ...}}")
    parser.add_argument("--edits", type=Path, help="the clips are in this folder of `editrl edit --manifest`")
    parser.add_argument(
        "--video_column", "--video-column", help="or this column has their paths (default: edited), from the manifest"
    )
    parser.add_argument(
        "--batch_size", "--batch-size", type=number(int, least=1), default=1, help="clips at a time (1)"
    )
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--overwrite", action="store_true", help="drop what --output has of other rewards and rows")
    options = parser.parse_args(argv)
    if options.edits is not None and options.video_column is not None:
        parser.error("--edits and --video_column both say where the clips are; give one")
    return score(options)


@dataclass
class Result:
    """What became of the rows of one process."""

    lines: dict[str, dict[str, Any]] = field(default_factory=dict)  # by id; those of earlier runs too
    failures: list[str] = field(default_factory=list)
    kept: int = 0  # lines of earlier runs


def score(options: argparse.Namespace) -> int:
    """Score the rows that are not scored yet; of n processes, process p takes rows p, p + n, ... 1 if rows failed."""
    from torch import distributed

    from editrl.cli.edit import find_device
    from editrl.cli.process_groups import Processes
    from editrl.cli.score_file import ScoreFile, rewards_fingerprint
    from editrl.cli.yaml_file import parse_yaml
    from editrl.data import EditDataset
    from editrl.reward import RewardSet

    processes = Processes.of_torchrun(1)
    device = find_device(options.device)
    specs = [spec.strip() for spec in options.rewards.split(",") if spec.strip()]
    kwargs = parse_yaml(options.reward_kwargs, "--reward_kwargs", mapping=True) if options.reward_kwargs else {}
    rewards = RewardSet(specs, kwargs=kwargs)
    if rewards.groupwise:
        name = rewards.groupwise[0]
        raise EditrlError(
            f"--rewards: '{name}' compares the clips of a group, and a manifest has no groups; leave it out (it scores "
            "in training only)"
        )
    dataset = EditDataset.from_manifest(options.manifest, frame_multiple=1, size_multiple=1)
    file = ScoreFile(options.output, processes.rank)
    known = file.read(rewards.names, set(dataset.ids), overwrite=options.overwrite)
    processes.connect(device)
    if processes.world > 1:
        distributed.barrier()  # nobody writes before all have read
    result = _score_rows(dataset, rewards, rewards_fingerprint(specs, kwargs), known, file, device, processes, options)
    results = [result] * processes.world
    if processes.world > 1:
        distributed.all_gather_object(results, result)
        distributed.destroy_process_group()
        if processes.rank:
            return 0
    lines = {id: line for part in results for id, line in part.lines.items()}
    file.finish([lines[id] for id in dataset.ids if id in lines])
    return _report(results, list(lines.values()), rewards.names, len(dataset), options.output)


def _score_rows(
    dataset: EditDataset,
    rewards: RewardSet,
    prefix: str,
    known: dict[str, dict],
    file,
    device,
    processes: Processes,
    options: argparse.Namespace,
) -> Result:
    """Score this process' rows, but those that `known` has with the same fingerprint."""
    from tqdm import tqdm

    from editrl.cli.score_file import row_fingerprint

    result, todo = Result(), []
    for index in range(processes.rank, len(dataset), processes.world):
        id = dataset.ids[index]
        try:
            clip = _clip(dataset, index, options)
            fingerprint = row_fingerprint(prefix, dataset.row(index), dataset.root, dataset.media(index), clip)
        except FAILURES as error:
            _fail(result, dataset, index, error)
            continue
        if known.get(id, {}).get("fingerprint") == fingerprint:
            result.lines[id] = known[id]
        else:
            todo.append((index, clip, fingerprint))
    result.kept = len(result.lines)
    if not todo:
        return result
    rewards.to(device)
    hidden = True if processes.rank else None  # None: where there is no terminal
    with file.appending() as append, tqdm(total=len(todo), desc="scoring", unit="clip", disable=hidden) as bar:
        for start in range(0, len(todo), options.batch_size):
            batch = []
            for index, clip, fingerprint in todo[start : start + options.batch_size]:
                try:
                    batch.append((index, fingerprint, *_load(dataset, index, clip, options)))
                except FAILURES as error:
                    _fail(result, dataset, index, error)
            for index, fingerprint, values in _scored(rewards, batch):
                if isinstance(values, Exception):
                    _fail(result, dataset, index, values)
                else:
                    line = {"id": dataset.ids[index], "scores": values, "fingerprint": fingerprint}
                    append(line)
                    result.lines[line["id"]] = line
            bar.update(len(todo[start : start + options.batch_size]))
    return result


def _scored(rewards: RewardSet, batch: list[tuple]) -> Iterator[tuple[int, str, Any]]:
    """`(index, fingerprint, {name: score or None})` of each row; of one that fails, the error in place of scores."""
    from editrl.reward import reward_columns

    if not batch:
        return
    try:
        scores = rewards([video for *_, video in batch], reward_columns([example for _, _, example, _ in batch]))
    except OutageError:
        raise
    except FAILURES as error:
        if len(batch) == 1:
            yield (*batch[0][:2], error)
            return
        for row in batch:  # alone, to find out whose fault it is
            yield from _scored(rewards, [row])
        return
    for (index, fingerprint, *_), values in zip(batch, scores.tolist(), strict=True):
        values = [None if math.isnan(value) else value for value in values]
        yield index, fingerprint, dict(zip(rewards.names, values, strict=True))


def _clip(dataset: EditDataset, index: int, options: argparse.Namespace) -> Path:
    """The file of the edited clip of a row."""
    from editrl.cli.edit import REQUEST, file_name

    row = dataset.row(index)
    if options.edits is None:
        column = options.video_column or "edited"
        if not isinstance(row.get(column), str):
            raise EditrlError(
                f"column '{column}' has no path of an edited clip; say which has with --video_column, or give the "
                "folder of `editrl edit --manifest` with --edits"
            )
        return dataset.root / row[column]
    path = options.edits / f"{file_name(row['id'])}.json"
    if not path.is_file():
        raise EditrlError(f"there is no {path}; edit the row with `editrl edit --manifest` first")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        output, request, settings = record["output"], record["request"], record["settings"]
        changed = [name for name in REQUEST if request.get(name) != row[name]]
        beside = settings.get("side_by_side")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EditrlError(f"{path}: is no record of `editrl edit --manifest` ({error})") from error
    if changed:
        raise EditrlError(f"{path}: this clip was edited with another {changed[0]} than the row has; edit it again")
    if beside:
        raise EditrlError(
            f"{path}: this clip was written --side_by_side, source and edit in one; edit it again without"
        )
    return options.edits / output


def _load(dataset: EditDataset, index: int, clip: Path, options: argparse.Namespace) -> tuple[EditExample, Tensor]:
    """The example, and its edited clip [F,3,H,W] float32 in [0,1]."""
    from editrl.data import read_video

    example, (video, _) = dataset[index], read_video(clip)
    if options.edits is not None and len(video) < len(example.source):
        # `editrl edit` leaves the last frames of a clip out, where their number does not suit the model.
        cut = {name: getattr(example, name) for name in ("source", "target", "mask")}
        cut = {name: None if value is None else value[: len(video)] for name, value in cut.items()}
        example = dataclasses.replace(example, **cut)
    return example, video


def _fail(result: Result, dataset: EditDataset, index: int, error: Exception) -> None:
    where, reason = dataset.where(index), " ".join(str(error).split())
    result.failures.append(reason if reason.startswith(where) else f"{where} (id {dataset.ids[index]!r}): {reason}")


def _report(results: list[Result], lines: list[dict], names: list[str], rows: int, output: Path) -> int:
    """Print the means, and the failures of all processes; returns the exit code."""
    kept = sum(result.kept for result in results)
    failures = [failure for result in results for failure in result.failures]
    print(f"{output}: {len(lines)} of {rows} rows have scores, {kept} of them had them before")
    width = max(map(len, names))
    for name in names:
        values = [line["scores"][name] for line in lines if line["scores"][name] is not None]
        mean = f"mean {math.fsum(values) / len(values):.6g} of {len(values)} rows" if values else "no scores"
        not_applicable = len(lines) - len(values)
        print(f"  {name:<{width}}  {mean}" + (f", does not apply to {not_applicable}" if not_applicable else ""))
    if failures:
        print(f"{len(failures)} of {rows} rows failed; run the same command again to retry:", file=sys.stderr)
        for failure in failures:
            print(f"  {failure}", file=sys.stderr)
    return 1 if failures else 0
