"""`editrl COMMAND ...`: finds the command, runs it, turns an EditrlError into one line.

A command is an entry point of the group `editrl.commands`, ours or any installed package's: a function
`main(argv: list[str]) -> int | None` whose first docstring line is what `editrl --help` prints (read, not imported).
"""

import os
import sys
import traceback
from importlib.metadata import entry_points

from editrl.cli import processes
from editrl.errors import EditrlError
from editrl.registry import Registry, describe

commands = Registry("command", "editrl.commands", "`editrl --help` lists them")


def main(argv: list[str] | None = None) -> int:
    """Runs one command line and returns its exit code: 2 after an EditrlError, 130 after Ctrl-C.

    `--debug`, wherever it stands, shows the traceback as well. (`--debug=VALUE` still reaches the field `debug` of
    the training arguments.)
    """
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    # The deepspeed launcher puts --local_rank=N first; it sets LOCAL_RANK as well, which is what counts.
    words = [word for word in argv if word != "--debug" and not word.startswith("--local_rank=")]
    started_here = processes.REPORTS in os.environ
    try:
        if words and not started_here and processes.wanted(words):
            return processes.launch(words, debug)
        code = _run(words)
        return processes.report(code) if started_here else code
    except (EditrlError, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        interrupted = isinstance(error, KeyboardInterrupt)
        code, message = (130, "interrupted") if interrupted else (2, " ".join(str(error).split()))
        if started_here:
            return processes.report(code, message)
        print("editrl:", message, file=sys.stderr)
        return code


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0
    if argv[0] == "--version":
        import editrl

        print(f"editrl {editrl.__version__}")
        return 0
    return commands.find_name(argv[0])(argv[1:]) or 0


def _help() -> str:
    listed = sorted((describe(point) for point in entry_points(group=commands.group)), key=lambda entry: entry.name)
    width = max((len(entry.name) for entry in listed), default=0)
    return "\n".join(
        [
            "usage: editrl COMMAND [OPTIONS]",
            "",
            "Online RL post-training of flow-matching video and image editors.",
            "",
            "commands:",
            *(f"  {entry.name:<{width}}  {entry.summary}" for entry in listed),
            "",
            "`editrl COMMAND --help` prints a command's options.",
            "--version prints the version; --debug, anywhere, shows the traceback of an error.",
        ]
    )
