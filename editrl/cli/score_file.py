"""The file that `editrl score` writes: a line a row, added as it is scored, in the order of the manifest at the end.

Process 0 adds to the file itself, each other one to `FILE.<rank>.part` beside it, which goes when all is put together.
A line is `{"id", "scores": {name: number or null}, "fingerprint"}`; the last one of an id counts.
"""

import contextlib
import functools
import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from editrl import __version__
from editrl.data import atomic_path
from editrl.errors import EditrlError
from editrl.registry import split_alias

START = b'{"id": '


class ScoreFile:
    """The scores at `path`, of which this is process number `rank`."""

    def __init__(self, path: Path, rank: int = 0):
        self.path = path
        self.mine = path if rank == 0 else path.with_name(f"{path.name}.{rank}.part")
        if path.is_dir():
            raise EditrlError(f"--output {path}: is a folder; give the name of a file")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EditrlError(f"--output {path}: its folder cannot be made ({error.strerror})") from error

    def read(self, names: Sequence[str], ids: set[str], *, overwrite: bool) -> dict[str, dict[str, Any]]:
        """The lines of earlier runs by id, those of an interrupted one too.

        EditrlError for a file that holds anything else: other text, other rewards than `names`, rows that are not among
        `ids`. With `overwrite`, the last two are left out.
        """
        lines = {}
        for path in [self.path, *self._parts()]:
            for where, line in _lines(path):
                wrong = None
                if line["scores"].keys() != set(names):
                    wrong = f"scores of other rewards ({', '.join(line['scores'])})"
                elif line["id"] not in ids:
                    wrong = f"a score of {line['id']!r}, which is no row of the manifest"
                if wrong is None:
                    lines[line["id"]] = line
                elif not overwrite:
                    raise EditrlError(f"{where}: holds {wrong}; give another --output, or --overwrite")
        return lines

    @contextlib.contextmanager
    def appending(self) -> Iterator[Callable[[dict], None]]:
        """A function that adds a line, whole, to this process' file."""
        descriptor = os.open(self.mine, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            if self.mine.stat().st_size:
                os.truncate(descriptor, len(_whole(self.mine)))
            yield lambda line: os.write(descriptor, json.dumps(line).encode() + b"\n")
        finally:
            os.close(descriptor)

    def finish(self, lines: Iterable[dict]) -> None:
        """Put these lines in place of all that was written."""
        with atomic_path(self.path) as unfinished:
            unfinished.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        for part in self._parts():
            part.unlink()

    def _parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{glob.escape(self.path.name)}.*.part"))


def rewards_fingerprint(specs: Sequence[str], kwargs: dict[str, Any]) -> str:
    """What the scores depend on beside the clips: the rewards, their arguments and files, and this version."""
    files = [split_alias(spec)[1].rpartition(":")[0] for spec in specs]
    hashes = [_sha256(str(Path(file).expanduser().resolve())) if file.endswith(".py") else None for file in files]
    return json.dumps([__version__, list(specs), hashes, kwargs], sort_keys=True, default=str)


def row_fingerprint(prefix: str, row: dict[str, Any], root: Path, media: dict[str, Any], clip: Path) -> str:
    """Hash of the rewards (`prefix`), the row, and the contents of its files and its edited clip."""
    files = {name: _sha256(str(root / value)) for name, value in media.items() if isinstance(value, str)}
    text = json.dumps([prefix, row, files, _sha256(str(clip))], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _sha256(path: str) -> str:
    now = os.stat(path)
    return _sha256_of(path, now.st_mtime_ns, now.st_size)


@functools.lru_cache(maxsize=4096)  # many rows may edit one source
def _sha256_of(path: str, *version: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """`(path:number, line)` of each line but a half one at the end. EditrlError for what is no line of scores."""
    if not path.exists():
        return
    for number, text in enumerate(_whole(path).splitlines(), 1):
        try:
            line = json.loads(text)
            is_ours = isinstance(line["id"], str) and isinstance(line["scores"], dict) and "fingerprint" in line
        except (ValueError, KeyError, TypeError):
            is_ours = False
        if not is_ours:
            raise EditrlError(f"{path}:{number}: is no line of scores; give another --output")
        yield f"{path}:{number}", line


def _whole(path: Path) -> bytes:
    """The contents without a last line that was cut off. EditrlError if what is there was never a line of scores."""
    whole, newline, rest = path.read_bytes().rpartition(b"\n")
    if rest and not (rest.startswith(START) or START.startswith(rest)):
        raise EditrlError(f"{path}: its last line is no line of scores; give another --output")
    return whole + newline
