"""One lookup for rewards and policies (and, inside the CLI, for commands).

A *spec* says which plugin is meant. The first of these that fits its form decides:

1. anything that is not a string is the plugin itself;
2. `path/to/file.py:Name`: the file is run once and `Name` taken from it;
3. `package.module:Name`: imported;
4. a name that `@register_reward("name")` / `@register_policy("name")` gave in this process;
5. the name of an entry point in the group `editrl.rewards` / `editrl.policies` of an installed package.

The spec of a reward may have a name before it, `quality=remote`, by which a recipe, errors and logs then call it.
(`./a=b/file.py:Name`, with a slash before the sign, is a path.)

A name can mean only one thing: registering it twice is an error, unless the same file defines it again under the same
qualified name (a reload, or a notebook cell that was run twice).
"""

import ast
import functools
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from editrl.errors import EditrlError, did_you_mean
from editrl.reward_options import OPTIONS, check_names


@dataclass(frozen=True)
class Entry:
    """One line of a list of plugins: `origin` is a module, `module (package 1.2)` or `path/file.py:12`."""

    name: str
    summary: str
    origin: str


class Registry:
    """The plugins of one kind: those that this process registered and those that installed packages declare."""

    def __init__(self, kind: str, group: str, remedy: str):
        self.kind = kind
        self.group = group
        self.remedy = remedy  # what an unknown name's error advises
        self._registered: dict[str, Any] = {}

    def register(self, name: str, **attributes) -> Callable:
        """Decorator that makes `name` mean the decorated function or class, and gives it `attributes`.

        EditrlError if the name means something else.
        """
        if not isinstance(name, str) or not name or set(name) & {":", "="} or name.endswith(".py"):
            raise EditrlError(
                f'register_{self.kind} wants a plain name, as in @register_{self.kind}("my_{self.kind}"), not {name!r}'
            )

        def add(plugin):
            places = [_place(old) for old in [self._registered.get(name)] if old is not None and not _same(old, plugin)]
            places += [_origin(point) for point in self._entry_points(name) if not _declares(point, plugin)]
            if places:
                raise EditrlError(
                    f"the {self.kind} name '{name}' is taken: {_place(plugin)} registers it and so does {places[0]};"
                    " rename one of them"
                )
            for attribute, value in attributes.items():
                setattr(plugin, attribute, value)
            self._registered[name] = plugin
            return plugin

        return add

    def find(self, spec: Any) -> Any:
        """The plugin that `spec` means (see the module's docstring). EditrlError if there is none."""
        if not isinstance(spec, str):
            return spec
        source, _, attribute = spec.rpartition(":")
        if not source:
            return self.find_name(spec)
        what = f"{self.kind} '{spec}'"
        return _attribute(
            _import_file(source, what) if source.endswith(".py") else _import(source, what), attribute, what
        )

    def find_name(self, name: str) -> Any:
        """The plugin called `name`, registered here or declared by an installed package."""
        if name in self._registered:
            return self._registered[name]
        points = self._entry_points(name)
        if len(points) > 1:
            raise EditrlError(
                f"the {self.kind} name '{name}' is taken twice: by {_origin(points[0])} and by {_origin(points[1])};"
                " uninstall one or use its package.module:Name"
            )
        if points:
            what = f"{self.kind} '{name}'"
            return _attribute(_import(points[0].module, what), points[0].attr, what)
        if name.endswith(".py"):
            raise EditrlError(f"{self.kind} '{name}': say which one of the file's names is meant, as in {name}:Name")
        raise EditrlError(f"no {self.kind} is called '{name}'.{did_you_mean(name, self.names())} {self.remedy}")

    def names(self) -> set[str]:
        return {*self._registered, *(point.name for point in entry_points(group=self.group))}

    def entries(self) -> list[Entry]:
        """All plugins that have a name, by name. Reads the source of declared ones, imports none."""
        declared = [describe(point) for point in entry_points(group=self.group)]
        declared_names = {entry.name for entry in declared}
        registered = [
            Entry(name, _first_line(inspect.getdoc(plugin)), _place(plugin))
            for name, plugin in self._registered.items()
            if name not in declared_names
        ]
        return sorted(declared + registered, key=lambda entry: entry.name)

    def _entry_points(self, name: str) -> list[EntryPoint]:
        return list(entry_points(group=self.group, name=name))


_OR_A_PATH = "lists them; your own is path/to/file.py:Name or package.module:Name"
rewards = Registry("reward", "editrl.rewards", f"`editrl rewards` {_OR_A_PATH}")
policies = Registry("policy", "editrl.policies", f"`editrl policies` {_OR_A_PATH}")


def register_reward(name: str, **options) -> Callable:
    """Decorator: `name` means this reward function or class from now on, in `rewards:` lists and `load_reward`.

    `options` say how it wants to be asked, as attributes of its own would: `groupwise`, `batch_size`, `frames`,
    `keep_on`, `background` (see `editrl.reward_options.RewardOptions`).

    ```python
    @editrl.register_reward("sharpness")
    def sharpness(videos, **kwargs):
        return [video.diff(dim=-1).abs().mean().item() for video in videos]
    ```
    """
    check_names(options, f"register_reward('{name}')")
    return rewards.register(name, **options)


def split_alias(spec: Any) -> tuple[str | None, Any]:
    """`"quality=remote"` -> `("quality", "remote")`; `(None, spec)` where there is no such name.

    EditrlError for a name that is no plain word, or has nothing behind it.
    """
    alias, equals, rest = spec.partition("=") if isinstance(spec, str) else ("", "", "")
    if not equals or "/" in alias:  # the name of a folder may hold one
        return None, spec
    if not re.fullmatch("[A-Za-z_][A-Za-z0-9_-]*", alias):
        raise EditrlError(
            f"reward '{spec}': '{alias}' before the = is no name; it has letters, digits, _ and -, and no digit or - "
            "at its start"
        )
    if not rest:
        raise EditrlError(f"reward '{spec}': nothing follows the =; write {alias}=remote, or another reward's name")
    return alias, rest


def reward_name(reward: Any) -> str:
    """The name before the `=`, the registered one, the one behind the colon, or what the object calls itself."""
    if isinstance(reward, str):
        alias, spec = split_alias(reward)
        return alias or spec.rpartition(":")[2]
    return getattr(reward, "name", None) or getattr(reward, "__name__", None) or type(reward).__name__


def load_reward(spec: Any, **kwargs) -> Callable:
    """The reward that `spec` means (a name, file.py:Name, package.module:Name or the object itself), ready to call.

    A class is instantiated with `kwargs`; a function gets them bound, and keeps its `__name__`. An object that has a
    `name`, as of an argument of its constructor, gets that before the `=`.
    EditrlError if the spec leads nowhere, if it cannot be called, or if it does not take one of `kwargs`.
    """
    alias, spec = split_alias(spec)
    plugin = rewards.find(spec)
    what = f"reward {_label(spec)}"
    if inspect.isclass(plugin):
        _check_call(plugin, (), kwargs, what)
        plugin, kwargs = plugin(**kwargs), {}
        if alias is not None and "name" in getattr(plugin, "__dict__", ()):
            plugin.name = alias
    if not callable(plugin):
        raise EditrlError(f"{what} is a {type(plugin).__name__} that cannot be called; see 'A reward' in the README")
    if not kwargs:
        return plugin
    _check_call(plugin, (), kwargs, what, partial=True)
    bound = functools.partial(plugin, **kwargs)
    # Not functools.update_wrapper: its __wrapped__ would make the bound arguments look required again.
    bound.__name__, bound.__doc__ = getattr(plugin, "__name__", type(plugin).__name__), plugin.__doc__
    for attribute in (*OPTIONS, "requires", "to", "cancel"):
        if hasattr(plugin, attribute):
            setattr(bound, attribute, getattr(plugin, attribute))
    return bound


def list_rewards() -> list[Entry]:
    """Name, summary and origin of every reward that has a name, without importing any of them."""
    return rewards.entries()


def register_policy(name: str) -> Callable:
    """Decorator: `name` means this `FlowPolicy` class from now on, in `policy:` fields and `load_policy`."""
    return policies.register(name)


def load_policy(spec: Any, model_name_or_path: str, **kwargs) -> Any:
    """`from_pretrained(model_name_or_path, **kwargs)` of the policy class that `spec` means.

    EditrlError if the spec leads nowhere, or if its `from_pretrained` is missing or does not take `kwargs`.
    """
    plugin = policies.find(spec)
    what = f"policy {_label(spec)}"
    if not callable(getattr(plugin, "from_pretrained", None)):
        raise EditrlError(f"{what} has no from_pretrained; a policy is a subclass of editrl.FlowPolicy")
    _check_call(plugin.from_pretrained, (model_name_or_path,), kwargs, what)
    return plugin.from_pretrained(model_name_or_path, **kwargs)


def list_policies() -> list[Entry]:
    """Name, summary and origin of every policy that has a name, without importing any of them."""
    return policies.entries()


def describe(point: EntryPoint) -> Entry:
    """What a list says of an entry point. The summary is the first docstring line, read from source by `ast`."""
    return Entry(point.name, _summary(point), _origin(point))


def _summary(point: EntryPoint) -> str:
    spec = _find_module(point.module)
    if spec is None:
        return f"(no module {point.module})"
    source = spec.loader.get_source(point.module) if hasattr(spec.loader, "get_source") else None
    if source is None:
        return ""
    try:
        node = ast.parse(source)
    except SyntaxError as error:
        return f"({spec.origin} does not parse: line {error.lineno})"
    for name in point.attr.split("."):
        node = next((n for n in node.body if isinstance(n, _DEFINITION) and n.name == name), None)
        if node is None:
            return ""
    return _first_line(ast.get_docstring(node))


_DEFINITION = (ast.FunctionDef, ast.ClassDef)


def _first_line(docstring: str | None) -> str:
    return (docstring or "").strip().partition("\n")[0].strip()


def _find_module(name: str) -> ModuleSpec | None:
    """`importlib.util.find_spec`, which imports the parent packages, without importing them."""
    path, spec = None, None
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        found = (f.find_spec(".".join(parts[:depth]), path) for f in sys.meta_path if hasattr(f, "find_spec"))
        spec = next((s for s in found if s is not None), None)
        if spec is None:
            return None
        path = spec.submodule_search_locations
    return spec


def _import(module: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except (ImportError, SyntaxError) as error:
        raise EditrlError(f"{what}: cannot import {module}: {type(error).__name__}: {error}") from error


def _import_file(file: str, what: str) -> ModuleType:
    """The module that `file` defines. One file is run once in a process, however many names are taken from it."""
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise EditrlError(f"{what}: there is no file {path}")
    name = f"editrl_file_{path.stem}_{hashlib.sha1(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, ImportError | SyntaxError):
            raise EditrlError(f"{what}: cannot run {path}: {type(error).__name__}: {error}") from error
        raise
    return module


def _attribute(module: ModuleType, attribute: str, what: str) -> Any:
    value = module
    for name in attribute.split("."):
        if not hasattr(value, name):
            options = [option for option in vars(value) if not option.startswith("_")]
            raise EditrlError(f"{what}: {module.__spec__.origin} has no '{attribute}'.{did_you_mean(name, options)}")
        value = getattr(value, name)
    return value


def _check_call(function: Callable, args: tuple, kwargs: dict, what: str, *, partial: bool = False) -> None:
    """Says which argument is wrong before the call, so that a TypeError from inside it is not mistaken for this."""
    signature = inspect.signature(function)
    try:
        (signature.bind_partial if partial else signature.bind)(*args, **kwargs)
    except TypeError as error:
        unknown = next((name for name in kwargs if name not in signature.parameters), "")
        raise EditrlError(f"{what}: {error}.{did_you_mean(unknown, signature.parameters)}") from error


def _label(spec: Any) -> str:
    return f"'{spec}'" if isinstance(spec, str) else getattr(spec, "__name__", type(spec).__name__)


def _definition(plugin: Any) -> Any:
    return plugin if inspect.isclass(plugin) or inspect.isroutine(plugin) else type(plugin)


def _file(plugin: Any) -> Path | None:
    module = sys.modules.get(_definition(plugin).__module__)
    return Path(module.__file__).resolve() if getattr(module, "__file__", None) else None


def _same(one: Any, other: Any) -> bool:
    one_def, other_def = _definition(one), _definition(other)
    same_home = one_def.__module__ == other_def.__module__ or (_file(one) and _file(one) == _file(other))
    return bool(same_home) and one_def.__qualname__ == other_def.__qualname__


def _declares(point: EntryPoint, plugin: Any) -> bool:
    spec = _find_module(point.module)
    same_home = spec is not None and spec.origin is not None and Path(spec.origin).resolve() == _file(plugin)
    return same_home and point.attr == _definition(plugin).__qualname__


def _origin(point: EntryPoint) -> str:
    distribution = point.dist
    if distribution is None or distribution.name == "editrl":
        return point.module
    return f"{point.module} ({distribution.name} {distribution.version})"


def _place(plugin: Any) -> str:
    """`path/file.py:12`, relative to the working directory when the file lies in it; else the qualified name."""
    definition, file = _definition(plugin), _file(plugin)
    if file is None:
        return f"{definition.__module__}:{definition.__qualname__}"
    if file.is_relative_to(Path.cwd()):
        file = file.relative_to(Path.cwd())
    try:
        return f"{file}:{inspect.getsourcelines(definition)[1]}"
    except OSError:  # made by exec: there is a module, but no line of it
        return str(file)
