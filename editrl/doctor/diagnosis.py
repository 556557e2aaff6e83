"""All checks of a trainer, in the order in which a person should read them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from editrl.doctor.finding import Finding, failed
from editrl.doctor.forward import Forward, forward_findings
from editrl.doctor.learning import learning_findings
from editrl.doctor.observation import changed, observe, prepared, undisturbed
from editrl.doctor.ratio import ratio_findings

if TYPE_CHECKING:
    from editrl.trainers.grpo import FlowGRPOTrainer


def diagnose(trainer: FlowGRPOTrainer) -> list[Finding]:
    """Run the first rollout of a training run, replay it as an update would, and say what is wrong.

    Costs about as much as one update: nothing of the configuration is made smaller, the batch included. The trainer is
    left as it was found but for being wrapped for training (DDP, DeepSpeed, mixed precision), which `train` would do.
    A run in one pass is examined as if its steps were replayed, which makes the same update.
    With several processes each looks at its own share of the rollout; groups are compared over all of them.

    Returns:
        A line a check: the ratio before the first update and, each for itself, the causes it can differ from 1 by; then
        what else decides whether anything is learned.

    Raises:
        EditrlError: a reward fails, as in training.
    """
    with undisturbed(trainer), prepared(trainer), changed(trainer.args, one_pass=False):
        seen = observe(trainer)
        forward = Forward.of(trainer, seen.batches[0])
        causes = forward_findings(trainer, forward)
        findings = [*ratio_findings(trainer, seen, forward, causes), *causes]
        return [*findings, *learning_findings(trainer, seen, failed(findings))]
