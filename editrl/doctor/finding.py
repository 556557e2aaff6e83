"""What a check says."""

from collections.abc import Sequence
from dataclasses import dataclass, field

VERDICTS = ("fail", "warn", "info", "ok")
"""From worst to best. info: a measurement, or a check that could not be made."""


@dataclass(frozen=True)
class Finding:
    """One check: what was found, where, and what to do about it, in one line."""

    check: str
    verdict: str
    text: str
    numbers: dict[str, float] = field(default_factory=dict)


def failed(findings: Sequence[Finding]) -> list[str]:
    """The checks that say fail."""
    return [finding.check for finding in findings if finding.verdict == "fail"]


def summary(findings: Sequence[Finding]) -> str:
    """One line for all: `16 checks: 1 fail (dropout), 0 warn`."""
    counted = []
    for verdict in ("fail", "warn"):
        names = [finding.check for finding in findings if finding.verdict == verdict]
        counted.append(f"{len(names)} {verdict}" + (f" ({', '.join(names)})" if names else ""))
    return f"{len(findings)} checks: {', '.join(counted)}"
