"""What else decides whether a run learns: marginals, memory, the rewards' spread, the gradient and its clip."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from torch import Tensor

from editrl.doctor.finding import Finding
from editrl.doctor.observation import MicroBatch, Seen, model_in, peak, reset_peak
from editrl.flow import timestep_weights, zero_std_groups
from editrl.reward import reward_columns
from editrl.rollout import rollout

if TYPE_CHECKING:
    from editrl.trainers.grpo import FlowGRPOTrainer

CLIPS = 8
"""How many clips at least are sampled again without noise, where there are as many."""

STD_CHANGE = 0.1
"""How much the noise of a rollout may change the std of its clean latents."""

NUMERICAL_NOISE = 1e-6
"""A spread of rewards below this share of their size is none."""

UNEVEN = 5.0
"""How many times as hard as another one step of a window may pull."""


def learning_findings(trainer: FlowGRPOTrainer, seen: Seen, wrong: Sequence[str]) -> list[Finding]:
    """Everything beside the ratio. `wrong`: the checks that have failed so far."""
    findings = []
    if trainer.args.on_window:
        findings.append(marginals_finding(trainer, seen, wrong))
    findings += reward_findings(trainer, seen)
    if trainer.args.on_window:
        findings.append(evenness_finding(trainer))
    reset_peak()
    findings.append(gradient_finding(trainer, seen))
    findings.append(memory_finding(trainer, seen, peak()))
    if isinstance(trainer.model, PeftModel):
        findings.append(lora_finding(trainer.model))
    if trainer.args.loss_type == "grpo":
        findings.append(clip_finding(trainer.args.epsilon, seen.batches[0].latents[0].numel()))
    return findings


# The clips of the rollout.


def marginals_finding(trainer: FlowGRPOTrainer, seen: Seen, wrong: Sequence[str]) -> Finding:
    """Clean latents of the rollout against those that the ODE alone reaches from the same states.

    Before its window a rollout is an ODE: run on from the first window state without noise, and from the last one as
    the rollout did, both begin with the same initial noise.
    """
    if "schedule" in wrong:
        return Finding("marginals", "info", "cannot be told before schedule is right")
    model = model_in(trainer, training=False)
    settings = {"sigmas": trainer.sigmas, "ode_solver": trainer.args.ode_solver}
    parts = {"ode": [], "rollout": []}
    for chunk in seen.chunks():
        first, last = chunk[0], chunk[-1]
        for name, state, start in (("ode", first.latents, first.step), ("rollout", last.next_latents, last.step + 1)):
            run = rollout(trainer.policy, model, first.conditions, initial_noise=state, start=start, **settings)
            parts[name].append(run.clean)
        if sum(map(len, parts["ode"])) >= CLIPS:
            break
    ode, noisy = (torch.cat(clean).double() for clean in parts.values())
    change = (noisy.std() / ode.std()).item() - 1
    numbers = {"std_change": change, "mean_change": (noisy.mean() - ode.mean()).item(), "clips": len(ode)}
    text = (
        f"over {len(ode)} clips the noise changes the std of the clean latents by {change:+.1%} "
        f"and their mean by {numbers['mean_change']:+.2g}"
    )
    if abs(change) <= STD_CHANGE:
        return Finding("marginals", "ok", text, numbers)
    if trainer.args.sde_kernel == "cps":
        return Finding("marginals", "info", f"{text}; cps is known not to keep them", numbers)
    fix = "the rewards judge clips that the model would not make: more num_inference_steps, or a lower noise_level"
    return Finding("marginals", "warn", f"{text}: {fix}", numbers)


def reward_findings(trainer: FlowGRPOTrainer, seen: Seen) -> list[Finding]:
    """Whether the members of a group score differently, for each reward."""
    device = trainer.args.device
    scores = trainer.rewards(seen.videos, reward_columns(seen.samples), seen.groups).to(device)
    rewards = trainer.gather_clips(scores).cpu()
    groups = trainer.gather_clips(torch.tensor(seen.groups, device=device)).cpu()
    flat = zero_std_groups(rewards, groups).tolist()
    columns = zip(trainer.rewards.names, trainer.rewards.weights.tolist(), rewards.unbind(1), flat, strict=True)
    return [reward_finding(name, weight, values, groups, share) for name, weight, values, share in columns]


def reward_finding(name: str, weight: float, values: Tensor, groups: Tensor, flat: float) -> Finding:
    """The spread of one reward [N]; `flat` is the share of its groups that have none."""
    check, known = f"reward {name}", values[~values.isnan()].double()
    if not len(known):
        return Finding(check, "warn", "applies to no clip of this rollout: it says None for all of them")
    members = [values[groups == group] for group in groups.unique()]
    spreads = [known.double().std(correction=0) for part in members if len(known := part[~part.isnan()])]
    spread, size = torch.stack(spreads).mean().item(), known.abs().max().item()
    numbers = {"group_std": spread, "mean": known.mean().item(), "flat_groups": flat, "groups": len(spreads)}
    text = f"std {spread:.2g} within a group, mean {numbers['mean']:.3g}"
    if flat == 1:
        verdict, text = "fail", f"every group scores the same (mean {numbers['mean']:.3g}): a constant cannot teach"
    elif spread <= NUMERICAL_NOISE * size:
        verdict, text = "warn", f"{text}: numerical noise, which normalised advantages blow up to full size"
    elif flat > 0.5:
        verdict, text = "warn", f"{text}, but {flat:.0%} of {len(spreads)} groups have none and teach nothing"
    else:
        verdict, text = "ok", f"{text}; {flat:.0%} of {len(spreads)} groups without spread"
    if weight == 0:
        verdict, text = "info", f"{text} (its weight is 0)"
    return Finding(check, verdict, text, numbers)


# The gradient.


def windows(trainer: FlowGRPOTrainer) -> list[range]:
    """The windows that a run may train."""
    args = trainer.args
    start, stop = args.sde_window_range
    starts = [start] if args.sde_window == "fixed" else range(start, stop - args.sde_window_size + 1)
    return [range(first, first + args.sde_window_size) for first in starts]


def pulls(trainer: FlowGRPOTrainer, steps: Sequence[int]) -> Tensor:
    """How hard the loss of each step pulls on the velocity, per unit of noise and advantage, without weights."""
    sigma, sigma_next = trainer.sigmas[list(steps)], trainer.sigmas[[step + 1 for step in steps]]
    scale = trainer.kernel.gradient_scale(sigma, sigma_next)
    if trainer.args.loss_type == "grpo_guard":  # its exponent is multiplied by the std, its loss divided by |dt|
        scale = scale * trainer.kernel.std(sigma, sigma_next) / (sigma - sigma_next)
    return scale


def spread_of(values: Tensor) -> float:
    """Largest over smallest."""
    return (values.max() / values.min()).item()


def evenness_finding(trainer: FlowGRPOTrainer) -> Finding:
    """The pull of the steps of a window, weighted as configured."""
    mode = trainer.args.timestep_weighting
    uneven = max(
        spread_of(pulls(trainer, steps) * timestep_weights(trainer.kernel, trainer.sigmas, steps, mode))
        for steps in windows(trainer)
    )
    trainable = [
        step
        for step in range(len(trainer.sigmas) - 1)
        if trainer.kernel.std(trainer.sigmas[step], trainer.sigmas[step + 1]) > 0
    ]
    whole = spread_of(pulls(trainer, trainable))
    numbers = {"window": uneven, "schedule": whole}
    text = (
        f"timestep_weighting {mode}: the steps of a window pull up to {uneven:.3g}x unevenly on the velocity; "
        f"unweighted, those of the schedule {whole:.3g}x"
    )
    if uneven <= UNEVEN:
        return Finding("gradient scale", "ok", text, numbers)
    fix = "the weak ones learn nothing: timestep_weighting: uniform_gradient, or a shorter window"
    return Finding("gradient scale", "warn", f"{text}; {fix}", numbers)


def gradient_finding(trainer: FlowGRPOTrainer, seen: Seen) -> Finding:
    """One real backward pass, of the micro-batch with the largest advantages."""
    if trainer.is_deepspeed_enabled:
        return Finding("gradient", "info", "not measured: DeepSpeed keeps the gradients to itself; watch grad_norm")
    if trainer.args.context_parallel > 1:
        return Finding("gradient", "info", "not measured: each process has a share of it only; watch grad_norm")
    batch: MicroBatch = max(seen.batches, key=lambda batch: batch.advantages.abs().mean().item())
    made_up = not batch.advantages.any()
    if made_up:  # a flat reward has its own line
        batch = replace(batch, advantages=torch.ones_like(batch.advantages))
    norm = gradient_norm(trainer, batch)
    numbers = {"norm": norm, "advantages_made_up": float(made_up)}
    text = f"norm {norm:.2g} over one micro-batch" + (" (with advantages of 1, since all are 0)" if made_up else "")
    if not math.isfinite(norm):
        cause = "look for 0 / 0, sqrt(0) or an overflow of float16 in the model or the policy's velocity"
        return Finding("gradient", "fail", f"{text}: {cause}", numbers)
    if norm == 0:
        cause = "nothing trained reaches the velocity: a detach, a frozen adapter, lora_target_modules without effect?"
        return Finding("gradient", "fail", f"{text}: {cause}", numbers)
    return Finding("gradient", "ok", f"{text}; max_grad_norm {trainer.args.max_grad_norm:g}", numbers)


def gradient_norm(trainer: FlowGRPOTrainer, batch: MicroBatch) -> float:
    """Norm of the gradient of one micro-batch; the gradients that the parameters hold are kept."""
    parameters = trainer.trained_parameters()
    kept = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        loss = trainer.compute_loss(model_in(trainer, training=True), batch)
        if not loss.requires_grad:
            return 0.0
        loss.backward()
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        return torch.nn.utils.get_total_norm(gradients).item()
    finally:
        for parameter, gradient in zip(parameters, kept, strict=True):
            parameter.grad = gradient


def lora_finding(model: PeftModel) -> Finding:
    """The scale of the adapter."""
    config = model.peft_config[model.active_adapter]
    scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    text = f"lora_alpha {config.lora_alpha:g}, r {config.r}: the adapter counts {scale:.3g} times"
    if scale > 1:
        return Finding("lora", "ok", text, {"scale": scale})
    fix = "at 1 HunyuanVideo had gradient norms near 0 (UniRL#215), at lora_alpha = 4 r it learned"
    return Finding("lora", "warn", f"{text}; {fix}", {"scale": scale})


def clip_finding(epsilon: float, elements: int) -> Finding:
    """Which side the plain clip limits.

    A step whose mean moved by d std an element has log ratio ~ N(-d²/2, d²/D), since a log-prob is a mean over D
    elements. At d = sqrt(2 epsilon) all ratios have sunk to the lower edge, on average.
    """
    drift = math.sqrt(2 * epsilon)
    width = drift / math.sqrt(elements)
    numbers = {"elements": elements, "epsilon": epsilon, "drift": drift, "width": width}
    text = (
        f"a log-prob is a mean over {elements:,} elements: once a step's mean has moved by {drift:.2g} std, the "
        f"log-ratio is -{epsilon:.0e} ± {width:.0e}"
    )
    if 2 * width < epsilon:
        text += "; the clip acts below 1 only (loss_type: grpo_guard centres it)"
    return Finding("clip", "info", text, numbers)


# Memory.


def memory_finding(trainer: FlowGRPOTrainer, seen: Seen, update_peak: int | None) -> Finding:
    """What a rollout keeps, what is trained, and what the GPU held at most."""
    kept = trajectory_bytes(seen.batches)
    # Under ZeRO-3 a parameter holds its share only, and knows its size.
    trained = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in trainer.trained_parameters())
    numbers = {"trajectory": kept, "trained_parameters": trained}
    state = state_bytes(trainer.args.optim)
    text = f"a rollout keeps {size(kept)}; {trained:,} trained parameters"
    if state is not None:
        numbers["optimizer"] = state * trained
        text += f", {size(state * trained)} of optimizer state over all processes"
    if seen.peak is None or update_peak is None:
        return Finding("memory", "info", f"{text}; no CUDA, so no peak was measured", numbers)
    numbers["rollout_peak"] = seen.peak
    text += f"; at most {size(seen.peak)} of GPU memory in the rollout"
    if not trainer.is_deepspeed_enabled:  # no backward pass was made there
        numbers["update_peak"] = update_peak
        text += f", {size(update_peak)} in a replay with its backward"
    return Finding("memory", "info", text, numbers)


def trajectory_bytes(batches: Sequence[MicroBatch]) -> int:
    """Bytes of the tensors that micro-batches hold, each counted once; conditions included."""
    tensors = [value for batch in batches for value in vars(batch).values() if isinstance(value, Tensor)]
    tensors += [tensor for batch in batches for tensor in batch.conditions.tensors.values()]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def state_bytes(optimizer: str) -> int | None:
    """Bytes of state a parameter: two float32 numbers of Adam, two bytes where it is quantized; None: not known."""
    if "8bit" in optimizer:
        return 2
    return 8 if "adamw" in optimizer else None


def size(count: int) -> str:
    """`1.5 GB`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"
