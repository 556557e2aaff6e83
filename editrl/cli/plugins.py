"""`editrl rewards` and `editrl policies`: what is installed, read without importing it."""

from editrl.cli.parser import CommandParser
from editrl.cli.table import print_entries
from editrl.registry import list_policies, list_rewards


def rewards(argv: list[str]) -> int:
    """List the rewards that are installed."""
    parser = CommandParser("editrl rewards", rewards.__doc__)
    parser.add_argument("--json", action="store_true", help="print the list as JSON")
    print_entries(list_rewards(), as_json=parser.parse_args(argv).json)
    return 0


def policies(argv: list[str]) -> int:
    """List the policies (model families) that are installed."""
    parser = CommandParser("editrl policies", policies.__doc__)
    parser.add_argument("--json", action="store_true", help="print the list as JSON")
    print_entries(list_policies(), as_json=parser.parse_args(argv).json)
    return 0
