"""From a recipe (YAML) and a command line to the dataclasses of a command.

The command line wins over the recipe, the recipe over the dataclasses' defaults. Every mistake is an EditrlError that
names the file and line, or the flag.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError
from trl import TrlParser

from editrl.cli.parser import CommandParser, OneLineErrors
from editrl.cli.recipes import recipe_path
from editrl.cli.yaml_file import load_yaml
from editrl.errors import EditrlError, did_you_mean


def parse_config(
    dataclass_types: type | Iterable[type], argv: list[str], command: str, ignored: Iterable[type] = ()
) -> tuple:
    """Instances of `dataclass_types`, in their order, from `--config RECIPE` and flags.

    Args:
        dataclass_types: one dataclass or several, whose field names differ; each field becomes a flag.
        argv: the words after the command. `--config` takes the name of a packaged recipe ("viva/grpo") or the path of
            a .yaml file, read by `load_yaml`. A field that is a dict takes JSON on the command line.
        command: the command's name, "grpo", for help and errors. `--help` prints every field with the default that
            it has after `--config`.
        ignored: dataclasses whose fields a recipe may hold as well, because it was written for another command.

    Raises:
        EditrlError: unknown or repeated key, unknown flag, value of a wrong type, required field without a value,
            or a ValueError of a dataclass' own `__post_init__`.
    """
    types = (dataclass_types,) if isinstance(dataclass_types, type) else tuple(dataclass_types)
    parser = _ConfigParser(types, command)
    path = _config_path(argv, parser.prog)
    if path:
        parser.set_defaults_with_config(**_checked_values(path, types, parser, tuple(ignored)))
    parser.refuse_unknown_flags(argv)
    values, stray = parser.parse_known_args(argv)
    if stray:
        parser.error(f"{stray[0]!r} belongs to no --field")
    del values.config
    given = {name: None if value == [None] else value for name, value in vars(values).items()}
    try:
        return parser.parse_dict(given)
    except EditrlError:
        raise
    except ValueError as error:
        raise EditrlError(f"`{parser.prog}`{f' with {path}' if path else ''}: {error}") from error


class _ConfigParser(OneLineErrors, TrlParser):
    """TrlParser that raises EditrlError, takes no abbreviations, and reads JSON where a field is a dict."""

    def __init__(self, types: tuple[type, ...], command: str):
        super().__init__(
            types,
            prog=f"editrl {command}",
            usage=f"editrl {command} [--config RECIPE] [--FIELD VALUE ...]",
            description="A field can stand in the recipe (YAML) or on the command line, which wins. --num_processes N "
            "(or auto, as many as GPUs) runs the command in N processes.",
            allow_abbrev=False,
        )
        hints = _field_hints(types)
        for action in self._actions:
            hint = hints.get(action.dest)
            # --num-frames works as well as --num_frames; help and errors need only one of them
            action.option_strings = [flag for flag in action.option_strings if "-" not in flag[2:]]
            if action.nargs == "+":
                action.nargs = "*"  # `--metric_funcs` without a value is the empty list
                if action.type is Any:
                    action.type = _read_json
                if type(None) in _members(hint):
                    action.type = _none_or(action.type)
            if {bool, type(None)} <= {*_members(hint)}:
                action.type = _none_or(action.type)
            if action.nargs in (None, "?") and not action.choices:
                action.metavar = _name(hint)
            if any((get_origin(member) or member) is dict for member in _members(hint)):
                action.type = _json_reader(hint)
        _add_config(self)


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", metavar="RECIPE", help="a packaged recipe (`editrl recipes` lists them) or the path of a .yaml file"
    )


def _json_reader(hint: Any) -> Callable[[str], Any]:
    """Reads a field that may be a dict: JSON, or plain text where the field may be a string too."""

    def read(text: str) -> Any:
        if str in _members(hint) and not text.lstrip().startswith("{"):
            return text
        try:
            return TypeAdapter(hint).validate_json("null" if text.lower() == "none" else text)
        except ValidationError as error:
            raise argparse.ArgumentTypeError(f"must be {_name(hint)} as JSON, not {text!r}") from error

    return read


def _read_json(text: str) -> Any:
    """Reads an item of a list that holds anything: JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"must be a number or JSON, not {text!r}") from error


def _none_or(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """Reads an item of a list that may be None as a whole; `--reward_weights none` then is a list of one None."""

    def read(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    read.__name__ = kind.__name__  # argparse says "invalid float value"
    return read


def _members(hint: Any) -> tuple:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _field_hints(types: Iterable[type]) -> dict[str, Any]:
    return {field.name: get_type_hints(t)[field.name] for t in types for field in dataclasses.fields(t) if field.init}


def _config_path(argv: list[str], prog: str) -> Path | None:
    """What `--config` means, found before the other flags because it sets their defaults."""
    parser = CommandParser(prog, add_help=False)
    _add_config(parser)
    config = parser.parse_known_args(argv)[0].config
    if config is None or Path(config).suffix not in (".yaml", ".yml"):
        return config and recipe_path(config)
    if not Path(config).expanduser().is_file():
        raise EditrlError(f"--config {config}: no such file; a packaged recipe has no .yaml, see `editrl recipes`")
    return Path(config).expanduser()


def _checked_values(
    path: Path, types: tuple[type, ...], parser: argparse.ArgumentParser, ignored: tuple[type, ...]
) -> dict[str, Any]:
    """A recipe's values, each converted to its field's type, which argparse does for strings only.

    EditrlError for an unknown key, a wrong type, or a value that is none of its field's choices.
    """
    hints = _field_hints(types)
    choices = {action.dest: action.choices for action in parser._actions if action.choices}
    values, lines = load_yaml(path)
    others = {field.name for t in ignored for field in dataclasses.fields(t)} - hints.keys()
    values = {key: value for key, value in values.items() if key not in others}
    for key, value in values.items():
        where = f"{path}, line {lines[key]}"
        if key not in hints:
            near = did_you_mean(str(key), hints)
            raise EditrlError(f"{where}: `{parser.prog}` has no field '{key}'.{near} `{parser.prog} --help` lists them")
        if key in choices and value is not None and value not in choices[key]:
            options = ", ".join(map(str, choices[key]))
            raise EditrlError(f"{where}: {key} must be one of {options}, not {value!r}")
        try:
            values[key] = TypeAdapter(hints[key]).validate_python(value)
        except ValidationError as error:
            raise EditrlError(f"{where}: {key} must be {_name(hints[key])}, not {value!r}") from error
    return values


def _name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and get_origin(hint) is None else str(hint).replace("typing.", "")
