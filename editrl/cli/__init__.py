"""`editrl COMMAND ...`: finds the command, runs it, turns an EditrlError into one line.

A command is an entry point of the group `editrl.commands`, ours or any installed package's: a function
`main(argv: list[str]) -> int | None` whose first docstring line is what `editrl --help` prints (read, not imported).
"""

import sys
import traceback
from importlib.metadata import entry_points

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
    try:
        return _run([word for word in argv if word != "--debug"])
    except (EditrlError, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        interrupted = isinstance(error, KeyboardInterrupt)
        print("editrl:", "interrupted" if interrupted else " ".join(str(error).split()), file=sys.stderr)
        return 130 if interrupted else 2


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
