"""Why a GRPO run would not learn, found out from one rollout before it costs GPU hours: `diagnose(trainer)`."""

from typing import TYPE_CHECKING, Any

from .finding import Finding

if TYPE_CHECKING:
    from .diagnosis import diagnose

__all__ = ["Finding", "diagnose"]


def __getattr__(name: str) -> Any:
    """`diagnose` brings the trainers along, which take seconds; a `Finding` alone needs none."""
    if name == "diagnose":
        from .diagnosis import diagnose

        return diagnose
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
