"""The watchdog against reward hacking: says when clips change in ways that no reward asked for."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from transformers import TrainerCallback

from editrl.errors import EditrlError, did_you_mean

logger = logging.getLogger(__name__)

PREFIX = "eval_watchdog/"
ACTIONS = ("warn", "stop")
SYMPTOMS = {
    "edge_density": ("wiped backgrounds or lost texture", "noise, grid patterns or smeared outlines"),
    "colour_entropy": ("plain colours, a cartoon look or wiped backgrounds", "noise or garish colours"),
    "exposure": ("under-exposed clips", "over-exposed clips"),
    "temporal_flicker": ("still pictures or nothing left that moves", "flickering or jerking clips"),
    "source_similarity": ("new clips in place of edited ones", "copies of the source in place of edits"),
}
"""What a measure below its band, and above it, often is."""


def band(mean: float, std: float, tolerance: float) -> tuple[float, float]:
    """The range that a measure may move in: mean ± max(tolerance * std, |mean| / 10, 1/255).

    With `std` over the clips of the first evaluation, `tolerance` is an effect size (Cohen's d of the mean's shift):
    0.5 says that the average clip looks like one half a standard deviation away did at first. That is one setting for
    every measure, whatever its unit and whatever the data set. A tenth of the mean keeps the band open where clips
    hardly differ, and one step of 8 bits where the mean is near 0 as well.
    """
    width = max(tolerance * std, abs(mean) / 10, 1 / 255)
    return mean - width, mean + width


def measures_outside(evaluations: Sequence[dict], tolerance: float) -> dict[str, tuple[float, float, float]]:
    """The measures that the last evaluation has outside their bands: name -> (value, low, high).

    `evaluations` are logs in their order; a measure's band comes from the first of them that has it.
    """
    outside = {}
    for name in SYMPTOMS:
        key = f"{PREFIX}{name}"
        known = [log for log in evaluations if math.isfinite(log.get(f"{key}/mean", math.nan))]
        if known and known[-1] is evaluations[-1]:
            value = known[-1][f"{key}/mean"]
            low, high = band(known[0][f"{key}/mean"], known[0][f"{key}/std"], tolerance)
            if not low <= value <= high:
                outside[name] = (value, low, high)
    return outside


class Watchdog(TrainerCallback):
    """Warns, or stops the run, when a measure of `editrl.watchdog` leaves the band around its first evaluation.

    The trainer logs `eval_watchdog/<name>/mean` and `/std` (population, over clips) before it calls `on_evaluate`; all
    else follows from `state.log_history`, which checkpoints hold. So a resumed run keeps the band of the evaluation
    that the whole run began with, and a measure warns again only if it was inside its band in between.

    Args:
        action: "warn", or "stop", which ends training with a checkpoint when a measure leaves its band. A run that is
            resumed nevertheless goes on until a measure leaves its band anew.
        tolerance: half the width of the bands in standard deviations, above 0; see `band`.

    Attributes: `outside`, the measures outside their bands at the last evaluation: name -> (value, low, high).
    """

    def __init__(self, action: str = "warn", tolerance: float = 0.5):
        if action not in ACTIONS:
            hint = did_you_mean(str(action), ACTIONS)
            raise EditrlError(f"watchdog action is {action!r}; use one of {', '.join(ACTIONS)}.{hint}")
        if not 0 < tolerance < math.inf:
            raise EditrlError(f"watchdog tolerance must be a finite number above 0, got {tolerance}")
        self.action, self.tolerance = action, tolerance
        self.outside: dict[str, tuple[float, float, float]] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.outside = measures_outside(watched(state.log_history), self.tolerance)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if not watched([metrics or {}]):
            return  # an evaluation under another prefix, or without the measures
        evaluations = watched(state.log_history)
        before = measures_outside(evaluations[:-1], self.tolerance)
        self.outside = measures_outside(evaluations, self.tolerance)
        left = [name for name in self.outside if name not in before]
        if state.is_world_process_zero:
            for name in left:
                logger.warning(self._warning(name, evaluations))
        if left and self.action == "stop":
            control.should_training_stop = control.should_save = True

    def _warning(self, name: str, evaluations: list[dict]) -> str:
        value, low, high = self.outside[name]
        key = f"{PREFIX}{name}/mean"
        first = next(log for log in evaluations if math.isfinite(log.get(key, math.nan)))
        side, symptom = ("below", SYMPTOMS[name][0]) if value < low else ("above", SYMPTOMS[name][1])
        return (
            f"watchdog: {name} is {value:.4g} at step {evaluations[-1]['step']}, {side} its band of {low:.4g} to "
            f"{high:.4g} around the first evaluation ({first[key]:.4g}, step {first['step']}): {symptom}? This may "
            "be reward hacking, whatever the rewards say. Look at the videos; if they are spoilt, lower learning_rate, "
            "raise beta, or raise the weight of a reward for fidelity to the source."
            + (" Stopping, with a checkpoint." if self.action == "stop" else "")
        )


def watched(logs: Sequence[dict]) -> list[dict]:
    """Those logs that hold measures of an evaluation."""
    return [log for log in logs if any(key.startswith(PREFIX) for key in log)]
