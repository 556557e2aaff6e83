"""Who may import whom: the table of CONTRIBUTING.md, checked by reading every import statement of the tree."""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLUGIN_ROOMS = ("editrl.rewards", "editrl.policies", "editrl.recipes", "editrl.benchmarks")
ROOM_FOLDERS = {"editrl": ROOT / "editrl", **{room: ROOT / room.removeprefix("editrl.") for room in PLUGIN_ROOMS}}

# What a room must not import, anywhere in its files (inside functions too).
FORBIDDEN = {
    "editrl": PLUGIN_ROOMS,
    "editrl.rewards": ("editrl.policies", "editrl.recipes", "editrl.benchmarks"),
    "editrl.policies": ("editrl.rewards", "editrl.recipes", "editrl.benchmarks"),
    "editrl.recipes": ("editrl.rewards", "editrl.policies", "editrl.benchmarks"),
    "editrl.benchmarks": ("editrl.rewards", "editrl.policies"),
}
# Building an untrained model needs its classes; the registry only loads trained ones.
ALLOWED = {"editrl.recipes.shapes.pretrain": ("editrl.policies",)}


@dataclass(frozen=True)
class Import:
    target: str  # "editrl.flow.kernels" or "editrl.flow.kernels.get_kernel"
    line: int
    at_import_time: bool


def module_files() -> dict[str, Path]:
    files = {}
    for room, folder in ROOM_FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            files[".".join([room, *(parts[:-1] if parts[-1] == "__init__" else parts)])] = path
    return files


def imports_of(source: str, module: str, *, is_package: bool = False) -> list[Import]:
    package = module.split(".") if is_package else module.split(".")[:-1]

    def walk(node: ast.AST, at_import_time: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, at_import_time) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from (Import(f"{prefix}.{alias.name}", node.lineno, at_import_time) for alias in node.names)
        else:
            for child in ast.iter_child_nodes(node):
                later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                for_checkers_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
                yield from walk(child, at_import_time and not later and not for_checkers_only)

    return list(walk(ast.parse(source), True))


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def room_of(module: str) -> str:
    return next((room for room in PLUGIN_ROOMS if within(module, room)), "editrl")


FILES = module_files()
IMPORTS = {
    module: imports_of(path.read_text(encoding="utf-8"), module, is_package=path.name == "__init__.py")
    for module, path in FILES.items()
}


def test_the_reader_sees_imports_however_they_are_written():
    source = "import a.b\nfrom . import c\nfrom ..d import e\ndef f():\n    from editrl import rewards\n"
    found = imports_of(source, "editrl.flow.kernels")
    assert [(i.target, i.at_import_time) for i in found] == [
        ("a.b", True),
        ("editrl.flow.c", True),
        ("editrl.d.e", True),
        ("editrl.rewards", False),
    ]
    assert not imports_of("if TYPE_CHECKING:\n    import torch", "editrl.x")[0].at_import_time


@pytest.mark.parametrize("module", sorted(FILES))
def test_a_room_does_not_import_the_rooms_it_must_not_know(module):
    for found in IMPORTS[module]:
        allowed = [room for part, rooms in ALLOWED.items() if within(module, part) for room in rooms]
        forbidden = set(FORBIDDEN[room_of(module)]) - set(allowed)
        broken = [room for room in forbidden if within(found.target, room)]
        assert not broken, f"{FILES[module]}:{found.line} imports {found.target}; use the registry instead"


@pytest.mark.parametrize("module", sorted(m for m in FILES if within(m, "editrl.flow")))
def test_flow_is_tensor_maths_that_imports_torch_and_nothing_else(module):
    for found in IMPORTS[module]:
        top = found.target.split(".")[0]
        allowed = top == "torch" or top in sys.stdlib_module_names or within(found.target, "editrl.flow")
        assert allowed, f"{FILES[module]}:{found.line} imports {found.target}"


@pytest.mark.parametrize("module", sorted(m for m in FILES if room_of(m) in ("editrl.recipes", "editrl.benchmarks")))
def test_recipes_and_benchmarks_use_only_public_names(module):
    for found in IMPORTS[module]:
        if within(found.target, "editrl") and not within(found.target, room_of(module)):
            private = [part for part in found.target.split(".") if part.startswith("_")]
            assert not private, f"{FILES[module]}:{found.line} imports the private {found.target}"


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Every circle that a depth-first walk runs into, as the modules along it."""
    found, finished = [], set()

    def visit(module: str, trail: list[str]) -> None:
        if module in trail:
            found.append([*trail[trail.index(module) :], module])
        elif module not in finished:
            for target in sorted(graph.get(module, ())):
                visit(target, [*trail, module])
            finished.add(module)

    for module in sorted(graph):
        visit(module, [])
    return found


def test_the_circle_finder_finds_a_circle():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c", "a"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_module_imports_itself_through_others_at_import_time():
    graph = {
        module: {
            t if (t := found.target) in FILES else t.rpartition(".")[0] for found in found_all if found.at_import_time
        }
        for module, found_all in IMPORTS.items()
    }
    assert circles({module: {t for t in targets if t in FILES} for module, targets in graph.items()}) == []
