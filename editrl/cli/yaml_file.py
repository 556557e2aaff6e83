"""YAML as a recipe needs it: line numbers for errors, no key twice, 1e-5 is a number, `${recipe_dir}`."""

import re
from pathlib import Path
from typing import Any

import yaml

from editrl.errors import EditrlError


class _Loader(yaml.SafeLoader):
    pass


# YAML 1.1, which PyYAML reads, takes 1e-5 and 1.5e3 for strings.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_yaml(path: Path) -> tuple[dict, dict[Any, int]]:
    """The mapping that `path` holds, and the line (from 1) of each of its top-level keys.

    `${recipe_dir}` in any string value, nested ones too, becomes the absolute folder of the file.
    EditrlError if it is not YAML, not a mapping, repeats a key at any level, or has another `${...}`.
    """
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise EditrlError(f"{path}: a recipe is a YAML mapping of `field: value` lines")
        _refuse_repeated_keys(node, path)
        values = loader.construct_document(node)
        # Read after the values: by now `<<: *anchor` has been replaced by the lines that it stands for.
        lines = {loader.construct_object(key): key.start_mark.line + 1 for key, _ in node.value}
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise EditrlError(f"{path}, line {mark.line + 1}: not YAML: {error.problem}") from error
    except (UnicodeDecodeError, yaml.reader.ReaderError) as error:
        raise EditrlError(f"{path}: not a UTF-8 text file: {error.reason}") from error
    folder = path.resolve().parent
    return {key: _fill_in(value, folder, f"{path}, line {lines[key]}") for key, value in values.items()}, lines


def parse_yaml(text: str, what: str, *, mapping: bool = False) -> Any:
    """The value of a YAML (or JSON) text of the command line. EditrlError, naming the option `what`, if it is none."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None:
            _refuse_repeated_keys(node, what)
        value = None if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        raise EditrlError(f"{what}: '{text}' is not YAML: {' '.join(str(error).split())}") from error
    if mapping and not isinstance(value, dict):
        raise EditrlError(f"{what}: '{text}' is no mapping; write {{key: value}}")
    return value


def _refuse_repeated_keys(node: yaml.Node, path: Path | str) -> None:
    """PyYAML keeps the last of two equal keys without a word."""
    if isinstance(node, yaml.MappingNode):
        first_line: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode):
                if key.value in first_line:
                    raise EditrlError(f"{path}, line {line}: '{key.value}' is on line {first_line[key.value]} already")
                first_line[key.value] = line
            _refuse_repeated_keys(value, path)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_repeated_keys(item, path)


def _fill_in(value: Any, folder: Path, where: str) -> Any:
    if isinstance(value, dict):
        return {key: _fill_in(item, folder, where) for key, item in value.items()}
    if isinstance(value, list):
        return [_fill_in(item, folder, where) for item in value]
    if not isinstance(value, str):
        return value
    filled = value.replace("${recipe_dir}", str(folder))
    if unknown := re.search(r"\$\{.*?\}", filled):
        raise EditrlError(f"{where}: {unknown[0]} is not known; ${{recipe_dir}}, the recipe's folder, is the only one")
    return filled
