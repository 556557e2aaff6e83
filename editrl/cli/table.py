"""The lists that the CLI prints: a table for a person, aligned columns for a pipe, JSON for a program."""

import dataclasses
import json
import sys

from editrl.registry import Entry


def print_entries(entries: list[Entry], *, as_json: bool = False) -> None:
    """Prints name, summary and origin of each entry to stdout."""
    if as_json:
        print(json.dumps([dataclasses.asdict(entry) for entry in entries], indent=2))
        return
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table("name", "what it is", "origin")
        for entry in entries:
            table.add_row(entry.name, entry.summary, entry.origin)
        Console(markup=False, highlight=False).print(table)
        return
    rows = [dataclasses.astuple(entry) for entry in entries]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
