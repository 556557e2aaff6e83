"""argparse with the house's errors: one line, with a suggestion, instead of the usage and an exit."""

import argparse
from collections.abc import Callable

from editrl.errors import EditrlError, did_you_mean


class OneLineErrors:
    """Mixin for an ArgumentParser: whatever is wrong with the command line is an EditrlError."""

    def error(self, message: str):
        raise EditrlError(f"`{self.prog}`: {message}")

    def parse_args(self, args: list[str], namespace: argparse.Namespace | None = None) -> argparse.Namespace:
        self.refuse_unknown_flags(args)
        return super().parse_args(args, namespace)

    def refuse_unknown_flags(self, argv: list[str]) -> None:
        """EditrlError for the first `--flag` that the parser does not have, naming the nearest that it has."""
        known = self._option_string_actions
        for word in argv:
            flag = word.partition("=")[0]
            if flag.startswith("--") and len(flag) > 2 and " " not in flag and flag not in known:
                near = did_you_mean("--" + flag[2:].replace("-", "_"), known)
                raise EditrlError(f"`{self.prog}` has no option {flag}.{near} `{self.prog} --help` lists them")


class CommandParser(OneLineErrors, argparse.ArgumentParser):
    """The parser of a command: `CommandParser("editrl edit", description)`, then as any ArgumentParser."""

    def __init__(self, prog: str, description: str | None = None, **options):
        super().__init__(prog=prog, description=description, allow_abbrev=False, **options)


def number(kind: type, *, least: float | None = None, above: float | None = None) -> Callable[[str], float]:
    """The `type` of an argument that has a bound: `number(int, least=1)`, `number(float, above=0)`."""

    def read(text: str) -> float:
        value = kind(text)
        if least is not None and not value >= least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {text}")
        if above is not None and not value > above:
            raise argparse.ArgumentTypeError(f"must be above {above}, not {text}")
        return value

    read.__name__ = kind.__name__  # argparse says "invalid int value"
    return read
