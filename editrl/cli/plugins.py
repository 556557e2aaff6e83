"""`editrl rewards` and `editrl policies`: what is installed, read without importing it; `editrl rewards check`."""

import json
from typing import Any

from editrl.cli.parser import CommandParser, number
from editrl.cli.table import print_entries
from editrl.registry import list_policies, list_rewards


def rewards(argv: list[str]) -> int:
    """List the rewards that are installed, or check one."""
    if argv[:1] == ["check"]:
        return check(argv[1:])
    parser = CommandParser(
        "editrl rewards", rewards.__doc__, epilog="`editrl rewards check --help`: find out what is wrong with one."
    )
    parser.add_argument("--json", action="store_true", help="print the list as JSON")
    print_entries(list_rewards(), as_json=parser.parse_args(argv).json)
    return 0


def check(argv: list[str]) -> int:
    """Find out from synthetic clips what is wrong with a reward."""
    parser = CommandParser("editrl rewards check", check.__doc__)
    parser.add_argument("reward", help="a name, path/to/file.py:Name or package.module:Name")
    parser.add_argument("--kwargs", type=_mapping, default={}, help="constructor arguments, as JSON")
    parser.add_argument(
        "--columns", type=_mapping, default={}, help="further columns that it needs, as JSON: a value each"
    )
    parser.add_argument("--device", default="cpu", help="where its model goes (default: cpu)")
    parser.add_argument(
        "--slow", type=number(float, above=0), default=1.0, help="seconds a clip that are too many (default: 1)"
    )
    options = parser.parse_args(argv)

    from editrl.cli.doctor import print_findings
    from editrl.reward_check import check_reward

    findings = check_reward(
        options.reward, kwargs=options.kwargs, columns=options.columns, device=options.device, slow=options.slow
    )
    print_findings(findings)
    return int(any(finding.verdict == "fail" for finding in findings))


def _mapping(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError
    return value


_mapping.__name__ = "JSON object"  # argparse says "invalid JSON object value"


def policies(argv: list[str]) -> int:
    """List the policies (model families) that are installed."""
    parser = CommandParser("editrl policies", policies.__doc__)
    parser.add_argument("--json", action="store_true", help="print the list as JSON")
    print_entries(list_policies(), as_json=parser.parse_args(argv).json)
    return 0
