"""Why a GRPO run would not learn, found out from one rollout before it costs GPU hours: `diagnose(trainer)`."""

from .diagnosis import diagnose
from .finding import Finding

__all__ = ["Finding", "diagnose"]
