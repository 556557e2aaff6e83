"""Is the ratio 1 before the first update? And if not, is it the stored latents, the schedule, or the rollout's mean?"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from editrl.doctor.finding import Finding, failed
from editrl.doctor.forward import Forward
from editrl.doctor.observation import Seen, model_in
from editrl.flow import FlowSDE, gaussian_kl, sigma_schedule
from editrl.trainers.grpo_config import DEFAULT_EPSILON
from editrl.trainers.window import WindowBatch, policy_loss, replay

if TYPE_CHECKING:
    from editrl.trainers.grpo import FlowGRPOTrainer

HARMLESS = 0.1
"""Share of the clip range that a deviation may use up."""

SHIFTS = (0.1, 100.0)
"""The range in which the shift of a rollout is looked for."""


def ratio_findings(trainer: FlowGRPOTrainer, seen: Seen, forward: Forward, causes: Sequence[Finding]) -> list[Finding]:
    """The ratio, and those of its causes that a rollout shows. `causes`: those that its forward showed."""
    if not trainer.args.on_window:
        none = f"{trainer.args.loss_type} replays no step, so there is no ratio to check"
        return [Finding("ratio", "info", none), configured_schedule(trainer)]
    schedule, sigmas = schedule_finding(trainer, seen.batches)
    stored = stored_finding(trainer, seen, sigmas)
    mean = mean_finding(trainer, seen, forward, [schedule, stored])
    causes = [stored, schedule, mean, *causes]
    return [ratio_finding(trainer, seen.batches, failed(causes)), *causes[:3]]


# The ratio.


def harmless(trainer: FlowGRPOTrainer) -> float:
    """The |ratio - 1| that no clip range notices."""
    return HARMLESS * (trainer.args.epsilon or DEFAULT_EPSILON["grpo"])


def deviation(trainer: FlowGRPOTrainer, model, batch: WindowBatch) -> Tensor:
    """Largest |ratio - 1| of a micro-batch; its graph goes with the call, so that only one is ever held."""
    new = replay(trainer, model, batch)
    return (policy_loss(trainer, batch, new, batch.old_mean, batch.old_log_prob).ratio - 1).abs().max()


def ratio_finding(trainer: FlowGRPOTrainer, batches: Sequence[WindowBatch], causes: Sequence[str]) -> Finding:
    """|ratio - 1| of all micro-batches, each replayed as the first update would."""
    model, deviations = model_in(trainer, training=True), {}
    for batch in batches:
        deviations.setdefault(batch.step, []).append(deviation(trainer, model, batch))
    steps = {step: torch.stack(values).max().item() for step, values in deviations.items()}
    largest = torch.tensor(list(steps.values())).max().item()
    where = max(steps, key=steps.get)
    numbers = {"deviation": largest, "harmless": harmless(trainer)} | {f"step_{step}": steps[step] for step in steps}
    if largest == 0:
        return Finding("ratio", "ok", "exactly 1 for every clip and window step before the first update", numbers)
    text = f"before the first update it deviates from 1 by up to {largest:.1e} (step {where})"
    named = f"see {', '.join(causes)}" if causes else "rounding; old_log_prob: recompute makes it 1"
    if trainer.args.old_log_prob == "recompute":
        text += f" of the rollout; old_log_prob: recompute keeps that from the loss, but not its cause ({named})"
        return Finding("ratio", "info", text, numbers)
    if largest < harmless(trainer):
        return Finding("ratio", "warn", f"{text}, far below the clip range: {named}", numbers)
    if not causes:
        named = "none of the causes below was found; old_log_prob: recompute makes it 1"
    return Finding("ratio", "fail", f"{text}, harmless is below {harmless(trainer):.0e}: {named}", numbers)


# What was stored.


@dataclass(frozen=True)
class Around:
    """A kernel whose mean is the sample itself: it scores what lies around a stored mean, by the arithmetic of all."""

    deviation: Tensor

    name: ClassVar[str] = "around"
    stochastic: ClassVar[bool] = True

    def coefficients(self, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ones_like(sigma), torch.zeros_like(sigma), self.deviation

    step = FlowSDE.step


def scored_again(trainer: FlowGRPOTrainer, batch: WindowBatch, sigmas: Tensor) -> Tensor:
    """Log-prob [B] of the stored next latents under the stored old means; no model is asked."""
    levels = sigmas[batch.step], sigmas[batch.step + 1]
    around = Around(trainer.kernel.std(*levels))
    nowhere = torch.zeros_like(batch.old_mean)
    return around.step(batch.old_mean, nowhere, *levels, next_sample=batch.next_latents).log_prob


def score_error(trainer: FlowGRPOTrainer, batches: Sequence[WindowBatch], sigmas: Tensor) -> float:
    """Largest difference to the stored log-probs; 0 is bit for bit."""
    errors = [(scored_again(trainer, batch, sigmas) - batch.old_log_prob).abs().max() for batch in batches]
    return torch.stack(errors).max().item()


def stored_finding(trainer: FlowGRPOTrainer, seen: Seen, sigmas: Tensor | None) -> Finding:
    """What was stored must be what was scored, and where the next step began. `sigmas`: of the rollout, if known."""
    broken = [
        before.step
        for chunk in seen.chunks()
        for before, after in pairwise(chunk)
        if after.step == before.step + 1 and not torch.equal(before.next_latents, after.latents)
    ]
    numbers = {"broken_steps": len(set(broken))}
    error = math.nan if sigmas is None else score_error(trainer, seen.batches, sigmas)
    if sigmas is not None:
        numbers["log_prob_error"] = error
    if error != 0 and (low := low_precision(seen.batches)):
        off = f" (off by {error:.1e})" if error > 0 else ""
        text = f"what is stored is {low}, what was scored is not{off}: round a latent before it is scored"
        return Finding("stored latents", "fail", text, numbers)
    if error > 0 or (sigmas is not None and math.isnan(error)):
        text = f"the stored latents do not have the stored log-probs (off by {error:.1e}): something changed them since"
        return Finding("stored latents", "fail", text, numbers)
    if broken:
        text = f"the latents stored after step {broken[0]} are not those that step {broken[0] + 1} began with"
        return Finding("stored latents", "fail", f"{text}: store the state itself, without a change of dtype", numbers)
    if sigmas is None:
        return Finding("stored latents", "info", "cannot be scored again while the schedule is unknown", numbers)
    return Finding(
        "stored latents", "ok", "scored again under the stored means: the stored log-probs to the bit", numbers
    )


def low_precision(batches: Sequence[WindowBatch]) -> str | None:
    """The short float in which all stored next latents are exact."""
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(batch.next_latents, batch.next_latents.to(dtype).float()) for batch in batches):
            return str(dtype).removeprefix("torch.")
    return None


# The schedule.


def configured_schedule(trainer: FlowGRPOTrainer) -> Finding:
    """trainer.sigmas against the schedule of the arguments."""
    args = trainer.args
    if torch.equal(trainer.sigmas, sigma_schedule(args.num_inference_steps, args.shift)):
        return Finding("schedule", "ok", f"{args.num_inference_steps} steps, shift {args.shift:g}, as configured")
    text = f"trainer.sigmas has {shift_of(trainer.sigmas)}, the arguments say shift {args.shift:g}"
    return Finding("schedule", "warn", f"{text} with {args.num_inference_steps} steps: is that meant?")


def shift_of(sigmas: Tensor) -> str:
    """The name of a schedule: `shift 5`."""
    steps = len(sigmas) - 1
    level, uniform = sigmas[steps // 2].item(), 1 - steps // 2 / steps
    shift = level * (1 - uniform) / max(uniform * (1 - level), 1e-9)
    if shift > 0 and torch.allclose(sigma_schedule(steps, shift), sigmas.float().cpu(), atol=1e-4):
        return f"shift {shift:.4g}"
    return "a schedule of its own"


def schedule_finding(trainer: FlowGRPOTrainer, batches: Sequence[WindowBatch]) -> tuple[Finding, Tensor | None]:
    """The noise that the rollout drew against the noise that the replay expects; and the rollout's sigmas, if known."""
    noise = drawn_noise(batches)
    ratios = {
        step: deviation / trainer.kernel.std(*trainer.sigmas[step : step + 2]).item()
        for step, (deviation, _) in noise.items()
    }
    numbers = {f"std_ratio_step_{step}": ratio for step, ratio in ratios.items()}
    if misfit(trainer, noise, trainer.sigmas) <= 1:
        configured = configured_schedule(trainer)
        return Finding(configured.check, configured.verdict, configured.text, numbers), trainer.sigmas
    cause, sigmas = explanation(trainer, batches, noise, ratios)
    worst = max(ratios, key=lambda step: abs(math.log(ratios[step])))
    text = (
        f"the noise of the rollout has {ratios[worst]:.3g} times the std that the replay expects (step {worst}): "
        f"{cause}; hand both the same sigmas and kernel"
    )
    return Finding("schedule", "fail", text, numbers), sigmas


def drawn_noise(batches: Sequence[WindowBatch]) -> dict[int, tuple[float, int]]:
    """Window step -> std of the drawn noise (root mean square of next latents minus mean), number of elements."""
    squares, elements = defaultdict(float), defaultdict(int)
    for batch in batches:
        squares[batch.step] += (batch.next_latents - batch.old_mean).square().sum(dtype=torch.float64).item()
        elements[batch.step] += batch.old_mean.numel()
    return {step: (math.sqrt(squares[step] / elements[step]) or 1e-30, elements[step]) for step in squares}


def misfit(trainer: FlowGRPOTrainer, noise: dict[int, tuple[float, int]], sigmas: Tensor) -> float:
    """How far the drawn noise is from a schedule's: above 1 is beyond the sampling error (5 standard deviations of an
    std over N elements, 1/sqrt(2N), and a little for rounding)."""
    return max(
        abs(math.log(deviation / trainer.kernel.std(*sigmas[step : step + 2]).item()))
        / (5 / math.sqrt(2 * elements) + 1e-3)
        for step, (deviation, elements) in noise.items()
    )


def explanation(
    trainer: FlowGRPOTrainer,
    batches: Sequence[WindowBatch],
    noise: dict[int, tuple[float, int]],
    ratios: dict[int, float],
) -> tuple[str, Tensor | None]:
    """Which schedule or noise level drew this noise; and its sigmas, where they reproduce the stored log-probs."""
    steps, used = len(trainer.sigmas) - 1, f"the replay uses {shift_of(trainer.sigmas)}"
    shift, error = fitted_shift(trainer, noise)
    for candidate in round_numbers(shift):
        sigmas = sigma_schedule(steps, candidate)
        if score_error(trainer, batches, sigmas) == 0:
            return f"it is that of shift {candidate:g} to the bit, {used}", sigmas
    if len(ratios) > 1 and max(ratios.values()) / min(ratios.values()) < 1.05:
        return "the same at every step, so its noise_level was another", None
    return f"it fits shift {shift:.3g}, {used}" if error <= 1 else f"no shift explains it, {used}", None


def fitted_shift(trainer: FlowGRPOTrainer, noise: dict[int, tuple[float, int]]) -> tuple[float, float]:
    """The shift whose noise is nearest to the drawn noise, and its `misfit`: two scans, the second a finer one."""
    low, high = map(math.log, SHIFTS)
    steps = len(trainer.sigmas) - 1
    for _ in range(2):
        grid = [low + (high - low) * k / 150 for k in range(151)]
        fits = {place: misfit(trainer, noise, sigma_schedule(steps, math.exp(place))) for place in grid}
        best = min(fits, key=fits.get)
        low, high = best - (high - low) / 150, best + (high - low) / 150
    return math.exp(best), fits[best]


def round_numbers(value: float) -> Iterator[float]:
    """The numbers that a person would have written for `value`: 3.02 -> 3, 3, 3.02."""
    return (float(f"{value:.{digits}g}") for digits in (1, 2, 3))


# The mean of the rollout.


def mean_finding(trainer: FlowGRPOTrainer, seen: Seen, forward: Forward, earlier: Sequence[Finding]) -> Finding:
    """The steps replayed as the rollout made them (eval mode, no autograd) against the means that it stored."""
    if forward.random_in_sampling:
        return Finding("rollout", "info", "cannot be told while the forward is random (see dropout)")
    model, drifts = model_in(trainer, training=False), []
    for batch in seen.chunks()[0]:
        with torch.no_grad():
            new = replay(trainer, model, batch)
        drifts.append(gaussian_kl(new.mean, batch.old_mean, new.std).mul(2).sqrt().max().item())
    drift = max(drifts)
    numbers = {"drift": drift}
    if drift == 0:
        return Finding("rollout", "ok", "replayed in eval mode, its means come back to the bit", numbers)
    if failed(earlier):
        return Finding("rollout", "info", f"cannot be told before {failed(earlier)[0]} is right", numbers)
    text = f"replayed in eval mode, its means are up to {drift:.1e} std away"
    elements = seen.batches[0].latents[0].numel()
    if drift**2 / 2 + drift / math.sqrt(elements) < harmless(trainer):
        return Finding(
            "rollout", "warn", f"{text}, which is rounding: another batch size chooses other kernels", numbers
        )
    cause = "guidance, conditions, weights or precision are not those that it sampled with"
    return Finding("rollout", "fail", f"{text}: {cause}", numbers)
