"""Is the forward of an update that of the rollout? Randomness, training mode, batch composition, compilation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from editrl.doctor.finding import Finding
from editrl.doctor.observation import MicroBatch, model_in, velocity

if TYPE_CHECKING:
    from editrl.trainers.grpo import FlowGRPOTrainer

ROWS = 4  # of a micro-batch that are compared with themselves alone


@dataclass
class Forward:
    """Velocities of one micro-batch: twice as an update computes them, twice as a rollout does, and in between.

    All are computed whatever they show: under ZeRO-3 every process has to make as many forwards.
    """

    batch: MicroBatch
    training: tuple[Tensor, Tensor]
    sampling: tuple[Tensor, Tensor]
    training_without_graph: Tensor

    @classmethod
    def of(cls, trainer: FlowGRPOTrainer, batch: MicroBatch) -> Forward:
        training, again, sampling, once_more = (
            velocity(trainer, batch, training=training) for training in (True, True, False, False)
        )
        without_graph = velocity(trainer, batch, training=True, graph=False)
        return cls(batch, (training, again), (sampling, once_more), without_graph)

    @property
    def steady(self) -> tuple[bool, Tensor] | None:
        """A mode (is it training?) in which the forward is not random, and its velocity. None: there is none."""
        for training, velocities in ((True, self.training), (False, self.sampling)):
            if same(*velocities):
                return training, velocities[0]
        return None

    @property
    def random_in_training(self) -> bool:
        return not same(*self.training)

    @property
    def random_in_sampling(self) -> bool:
        return not same(*self.sampling)


def same(one: Tensor, other: Tensor) -> bool:
    """Equal bit for bit, NaN at the same places included."""
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(), other.nan_to_num())


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Largest |value - reference| / |reference| of a sample, in Euclidean norms."""
    difference = (value.double() - reference.double()).flatten(1).norm(dim=1)
    return (difference / reference.double().flatten(1).norm(dim=1)).max().item()


def rounding(trainer: FlowGRPOTrainer) -> float:
    """The relative error up to which two ways of computing one velocity may differ by rounding.

    Another batch size chooses other kernels (DanceGRPO#57, flow_grpo#104), whose sums round differently: a thousand
    units in the last place of float32, a few of bfloat16 or TF32.
    """
    dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in trainer.model.parameters()}
    precisions = {trainer.accelerator.mixed_precision, *dtypes}
    if precisions & {"bf16", "bfloat16"}:
        return 3e-2
    # Not `torch.get_float32_matmul_precision`, which raises once transformers has set tf32 by the newer interface.
    tensor_floats = trainer.args.device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return 5e-3 if tensor_floats or precisions & {"fp16", "float16"} else 1e-4


def forward_findings(trainer: FlowGRPOTrainer, forward: Forward) -> list[Finding]:
    """Randomness, mode, batch dependence and compilation, each for itself."""
    checks = (dropout_finding, mode_finding, batch_finding, compile_finding)
    return [check(trainer, forward) for check in checks]


def dropout_finding(trainer: FlowGRPOTrainer, forward: Forward) -> Finding:
    """Two forwards of one micro-batch in one mode."""
    modes = {"training": forward.training, "eval": forward.sampling}
    errors = {name: relative_error(*velocities) for name, velocities in modes.items() if not same(*velocities)}
    if not errors:
        return Finding("dropout", "ok", "two forwards are equal bit for bit, in training mode and in eval mode")
    model_in(trainer, training=True)
    live = [name for name, module in trainer.model.named_modules() if is_live_dropout(module)]
    if live and "eval" not in errors:
        named = ", ".join(live[:3]) + (f" and {len(live) - 3} more" if len(live) > 3 else "")
        cause = f"dropout is on in {named}: set its p (lora_dropout, or the model's own dropout) to 0"
    else:
        cause = "not an nn.Dropout, so it is a functional dropout or another random operation of model or policy"
    where = " and ".join(errors)
    text = f"two forwards of one micro-batch in {where} mode differ by {max(errors.values()):.1e}: {cause}"
    return Finding("dropout", "fail", text, {"relative_error": max(errors.values()), "modules": len(live)})


def is_live_dropout(module: nn.Module) -> bool:
    """Whether a module drops something now."""
    return isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0


def mode_finding(trainer: FlowGRPOTrainer, forward: Forward) -> Finding:
    """The forward of an update against that of a rollout."""
    if forward.random_in_training:
        return Finding("mode", "info", "cannot be told while the forward is random (see dropout)")
    if same(forward.training[0], forward.sampling[0]):
        return Finding("mode", "ok", "training mode and eval mode give the same velocity to the bit")
    error, limit = relative_error(forward.training[0], forward.sampling[0]), rounding(trainer)
    if same(forward.training_without_graph, forward.sampling[0]):
        cause = "what autograd changes: gradient checkpointing, another kernel, or a compiled graph of its own"
    else:
        cause = "a branch on module.training: guidance, dropped conditions, normalisation, or a cache"
    return graded("mode", error, limit, "training mode and eval mode give velocities that differ", cause)


def batch_finding(trainer: FlowGRPOTrainer, forward: Forward) -> Finding:
    """The velocity of a row must not depend on the other rows, nor on their order.

    In training mode, where normalisation over the batch acts, unless that is random.
    """
    if forward.steady is None:
        return Finding("batch", "info", "cannot be told while the forward is random (see dropout)")
    training, whole = forward.steady
    size = len(whole)
    if size == 1:
        return Finding("batch", "ok", "micro-batches hold one clip: nothing in them to depend on")
    backwards = list(range(size))[::-1]
    permuted = velocity(trainer, forward.batch, training=training, rows=backwards)[backwards]
    alone = [velocity(trainer, forward.batch, training=training, rows=[row]) for row in range(min(size, ROWS))]
    error = relative_error(torch.cat([permuted, *alone]), torch.cat([whole, whole[: len(alone)]]))
    if error == 0:
        return Finding("batch", "ok", "a clip's velocity is the same alone, in its batch, and in another order")
    what = "a clip's velocity in its batch, alone and in another order differs"
    cause = "an operation mixes the clips of a batch (batch norm, attention across samples, a statistic): remove it"
    return graded("batch", error, rounding(trainer), what, cause)


def compile_finding(trainer: FlowGRPOTrainer, forward: Forward) -> Finding:
    """The compiled forward against the same modules run eagerly."""
    compiled = any(is_compiled(module) for module in trainer.model_wrapped.modules())
    if not compiled:
        return Finding("compile", "ok", "the model is not compiled")
    if forward.steady is None:
        return Finding("compile", "info", "cannot be told while the forward is random (see dropout)")
    training, whole = forward.steady
    with torch.compiler.set_stance("force_eager"):
        eager = velocity(trainer, forward.batch, training=training)
    error = relative_error(whole, eager)
    if error == 0:
        return Finding("compile", "ok", "the compiled velocity is the eager one to the bit")
    cause = "the compiler changed what is computed: drop torch_compile, or report the model to torch"
    return graded("compile", error, rounding(trainer), "the compiled velocity and the eager one differ", cause)


def is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile(module)` made it, or `module.compile()` changed it."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def graded(check: str, error: float, limit: float, what: str, cause: str) -> Finding:
    """info where rounding explains the difference, else fail (NaN too)."""
    numbers = {"relative_error": error, "rounding": limit}
    if error <= limit:
        return Finding(check, "info", f"{what} by {error:.1e}, which is rounding (limit {limit:.0e})", numbers)
    return Finding(check, "fail", f"{what} by {error:.1e}, more than rounding ({limit:.0e}): {cause}", numbers)
