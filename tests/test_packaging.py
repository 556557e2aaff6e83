"""What pyproject.toml promises is there, and `import editrl` and `editrl --help` stay light."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path, PurePath

import pytest

import editrl

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
ENTRY_POINTS = {
    f"{group}: {name}": value
    for group, points in {
        **PYPROJECT["project"]["entry-points"],
        "scripts": PYPROJECT["project"]["scripts"],
    }.items()
    for name, value in points.items()
}
HEAVY = ("torch", "transformers", "trl", "diffusers", "numpy", "rich", "yaml", "pydantic")


def folder_of(package: str) -> Path:
    mapped = max((p for p in SETUPTOOLS["package-dir"] if package == p or package.startswith(p + ".")), key=len)
    return ROOT.joinpath(SETUPTOOLS["package-dir"][mapped], *package.removeprefix(mapped).strip(".").split("."))


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


def test_the_package_list_is_every_folder_with_code():
    folders = {path.parent for room in SETUPTOOLS["package-dir"].values() for path in (ROOT / room).rglob("*.py")}
    assert {folder_of(package) for package in SETUPTOOLS["packages"]} == folders


def test_every_file_beside_the_code_ships_as_package_data():
    folders = {folder_of(package): SETUPTOOLS["package-data"].get(package, []) for package in SETUPTOOLS["packages"]}
    for room in SETUPTOOLS["package-dir"].values():
        for path in (ROOT / room).rglob("*"):
            measured = path.is_relative_to(ROOT / "benchmarks" / "results")  # for readers of the repository
            if path.is_dir() or measured or path.suffix in (".py", ".pyc", ".md"):
                continue
            package = next(folder for folder in path.parents if folder in folders)
            patterns = [PurePath(package, pattern.replace("**/*", "**")) for pattern in folders[package]]
            covered = any(
                path.is_relative_to(pattern.parent) if pattern.name == "**" else path.match(str(pattern))
                for pattern in patterns
            )
            assert covered, f"{path} is not in [tool.setuptools.package-data]"


@pytest.mark.parametrize("point", sorted(ENTRY_POINTS))
def test_an_entry_point_leads_to_a_definition_with_a_docstring(point):
    module, _, attribute = ENTRY_POINTS[point].partition(":")
    base = folder_of(module)
    file = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    assert file.is_file(), f"{point}: there is no {file}"
    definitions = {n.name: n for n in ast.parse(file.read_text(encoding="utf-8")).body if hasattr(n, "name")}
    assert attribute in definitions, f"{point}: {file} has no {attribute}"
    assert ast.get_docstring(definitions[attribute]), f"{point}: {attribute} has no docstring for the list"


@pytest.mark.parametrize("use", ["import editrl", "import editrl; editrl.EditrlError; editrl.list_rewards()"])
def test_importing_editrl_imports_nothing_heavy(use):
    result = run_python(f"{use}\nimport sys\nprint([m for m in {HEAVY} if m in sys.modules])")
    assert result.stdout.strip() == "[]", result.stderr


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["rewards"], ["policies", "--json"], ["recipes"]])
def test_commands_that_only_look_import_nothing_heavy(argv):
    result = run_python(
        "import sys\nfrom editrl.cli import main\n"
        f"assert main({argv}) == 0\nprint([m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    )
    assert result.stderr.strip() == "[]"


def test_help_prints_every_command_with_its_summary():
    result = subprocess.run([sys.executable, "-m", "editrl", "--help"], capture_output=True, text=True, check=True)
    lines = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if line.startswith("  ")}
    assert set(lines) == set(PYPROJECT["project"]["entry-points"]["editrl.commands"])
    assert all(lines.values())


def test_every_public_name_has_a_home():
    """`editrl.X` is imported from the file that the type checker reads it from, and dir() shows it."""
    checked = ast.parse(Path(editrl.__file__).read_text(encoding="utf-8"))
    block = next(node for node in checked.body if isinstance(node, ast.If))
    homes = {a.name: n.module for n in block.body if isinstance(n, ast.ImportFrom) and n.module for a in n.names}
    assert homes == editrl._HOME
    assert set(editrl.__all__) == {*homes, "flow", "__version__"}
    assert set(editrl.__all__) <= set(dir(editrl))


def test_public_names_are_the_real_thing():
    from editrl.errors import EditrlError
    from editrl.registry import register_reward

    assert editrl.EditrlError is EditrlError
    assert editrl.register_reward is register_reward
    assert editrl.__version__ == PYPROJECT["project"]["version"]
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        editrl.Nonsense  # noqa: B018


def test_a_constraint_is_an_exact_version_and_no_address():
    lines = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line]
    pins = [line for line in lines if not line.startswith("#")]
    assert pins
    assert all(line.count("==") == 1 and "/" not in line and "@" not in line for line in pins)
    assert not any(line.startswith("editrl") for line in pins)
