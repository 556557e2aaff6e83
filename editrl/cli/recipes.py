"""`editrl recipes`: the YAML recipes that are installed with editrl."""

from importlib.resources import files
from pathlib import Path

from editrl.cli.parser import CommandParser
from editrl.cli.table import print_entries
from editrl.errors import EditrlError, did_you_mean
from editrl.registry import Entry


def main(argv: list[str]) -> int:
    """List the packaged recipes, or print one of them."""
    parser = CommandParser("editrl recipes", main.__doc__)
    parser.add_argument("name", nargs="?", help="print this recipe, for example viva/grpo")
    parser.add_argument("--path", action="store_true", help="print where NAME lies instead of what it says")
    parser.add_argument("--json", action="store_true", help="print the list as JSON")
    args = parser.parse_args(argv)
    if args.name is None:
        if args.path:
            parser.error("--path wants the NAME of a recipe")
        print_entries([Entry(n, summary(p), str(p)) for n, p in packaged_recipes().items()], as_json=args.json)
    elif args.path:
        print(recipe_path(args.name))
    else:
        print(recipe_path(args.name).read_text(encoding="utf-8"), end="")
    return 0


def packaged_recipes() -> dict[str, Path]:
    """Every YAML file of the package `editrl.recipes` by its name, `viva/grpo` for `viva/grpo.yaml`, in order."""
    root = Path(str(files("editrl.recipes")))
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.yaml"))}


def recipe_path(name: str) -> Path:
    """The file of the packaged recipe `name`. EditrlError, with the nearest name, if there is none."""
    recipes = packaged_recipes()
    if name not in recipes:
        near = did_you_mean(name.removesuffix(".yaml"), recipes)
        raise EditrlError(
            f"no packaged recipe is called '{name}'.{near} `editrl recipes` lists them; the name of a file of your own"
            " ends in .yaml"
        )
    return recipes[name]


def summary(path: Path) -> str:
    """The first comment line of a recipe."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return next((line.strip("# ") for line in lines if line.startswith("#")), "")
