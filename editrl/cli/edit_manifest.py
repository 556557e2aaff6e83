"""`editrl edit --manifest`: every row to a clip in a folder, by one or several processes, resumable.

Rows are divided among the processes of a `torchrun`, or with --context_parallel among groups of them that share a clip.

Beside each clip `NAME.mp4` (or `.png` for an image) stands `NAME.json`: the request and the settings that it was made
with. It is written last, so a clip is finished where it is there.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from torch import distributed
from tqdm import tqdm

from editrl.cli.edit import (
    REQUEST,
    edit_example,
    file_name,
    find_device,
    find_policy,
    load_editor,
    load_row,
    write_edit,
)
from editrl.cli.launch import make_folder, quiet_libraries
from editrl.cli.process_groups import Processes
from editrl.data import EditDataset, atomic_path
from editrl.data.video import is_image
from editrl.errors import EditrlError

# What `editrl edit` is told beside the request and changes nothing in a clip.
NO_SETTING = ("source", "instruction", "output", "manifest", "overwrite", "reference", "device", "context_parallel")


def edit_manifest(options: argparse.Namespace) -> int:
    """Edit the rows that are not done yet; of n groups of processes, group g takes rows g, g + n, ...

    Returns 1 if rows failed: they are listed at the end, and the next call tries them again.
    """
    quiet_libraries()
    processes = Processes.of_torchrun(options.context_parallel)
    device = find_device(options.device)
    find_policy(options)
    dataset = EditDataset.from_manifest(options.manifest, frame_multiple=1, size_multiple=1)
    make_folder(options.output)
    rows = [_row(dataset, index, options) for index in range(len(dataset))]
    todo = [index for index, row in enumerate(rows) if not _is_done(row, options)]
    if processes.rank == 0 and len(todo) < len(rows):
        print(f"{options.output}: {len(rows) - len(todo)} of {len(rows)} clips are done already")
    if not todo:
        return 0
    processes.connect(device)
    mine = [index for index in todo if index % processes.groups == processes.group]
    failures = _edit_rows(rows, mine, dataset.root, options, device, processes)
    return _report(failures if processes.leads else [], len(todo), processes.world)


def _row(dataset: EditDataset, index: int, options: argparse.Namespace) -> dict[str, Any]:
    row = dataset.row(index)
    if not isinstance(row["source"], str):
        raise EditrlError(
            f"{options.manifest}, row {index} (id {row['id']!r}): source is no path; write the path of a clip"
        )
    return row


def _edit_rows(
    rows: list[dict], mine: list[int], root: Path, options: argparse.Namespace, device, processes: Processes
) -> list[str]:
    """Edit some of the rows; a line for each that failed."""
    failures: list[str] = []
    if not mine and processes.degree == 1:  # to make groups, all processes need the model
        return failures
    policy = load_editor(options, device)
    with tqdm(mine, desc="editing", unit="clip", disable=None if processes.rank == 0 else True) as bar:
        for index in bar:
            row, where = rows[index], f"{options.manifest}, row {index}"
            try:
                source = root / row["source"]
                with processes.together():
                    example = load_row(row, root, where, options)
                    video = edit_example(policy, example, source, options, _postfix(bar))
                if processes.leads:
                    name = file_name(row["id"]) + (".png" if is_image(source) else ".mp4")
                    line = write_edit(video, example, source, options.output / name, options)
                    _write_record(row, name, options)
                    bar.write(line)
            except (EditrlError, OSError, RuntimeError) as error:  # this row's, and no reason to stop the others
                reason = " ".join(str(error).split())
                failures.append(reason if reason.startswith(where) else f"{where} (id {row['id']!r}): {reason}")
                if processes.leads:
                    bar.write(f"failed: {failures[-1]}")
    return failures


def _report(failures: list[str], attempted: int, world: int) -> int:
    """Print the failures of all processes. All of them get here before one leaves: torchrun ends the others when a
    process exits with 1."""
    if world > 1:
        parts: list[list[str]] = [[]] * world
        distributed.all_gather_object(parts, failures)
        is_first = distributed.get_rank() == 0
        distributed.destroy_process_group()
        failures = [failure for part in parts for failure in part]
        if not is_first:
            return 0
    if failures:
        print(f"{len(failures)} of {attempted} clips failed; run the same command again to retry:", file=sys.stderr)
        for failure in failures:
            print(f"  {failure}", file=sys.stderr)
    return 1 if failures else 0


def _is_done(row: dict[str, Any], options: argparse.Namespace) -> bool:
    """Whether the folder has the row's clip. EditrlError if it is the clip of another request or of other settings."""
    record = options.output / f"{file_name(row['id'])}.json"
    if not record.is_file():
        return False
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
        before = found["request"] | found["settings"]
        is_there = (options.output / found["output"]).is_file()
    except (ValueError, KeyError, TypeError) as error:
        raise EditrlError(f"{record}: is no record of an edit ({error}); give another --output") from error
    now = _request(row) | _settings(options)
    changed = sorted(name for name in now.keys() | before.keys() if now.get(name) != before.get(name))
    if changed and not options.overwrite:
        name = changed[0]
        raise EditrlError(
            f"{record}: this clip was edited with {name} {before.get(name)!r}, now it is {now.get(name)!r}; give "
            "another --output, or --overwrite"
        )
    return is_there and not changed


def _write_record(row: dict[str, Any], output: str, options: argparse.Namespace) -> None:
    record = {"id": row["id"], "output": output, "request": _request(row), "settings": _settings(options)}
    with atomic_path(options.output / f"{file_name(row['id'])}.json") as unfinished:
        unfinished.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _request(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in REQUEST}


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    values = {name: value for name, value in vars(options).items() if name not in NO_SETTING}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def _postfix(bar: tqdm):
    return lambda done, forwards: bar.set_postfix_str(f"{done}/{forwards} forwards")
