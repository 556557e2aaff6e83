"""DeepSpeed ZeRO: configurations by name, a process without a launcher, leaf blocks, weights gathered for a rollout."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import Trainer
from transformers.utils import logging

from editrl.errors import EditrlError, did_you_mean
from editrl.speed import calling, compiled_calls, repeated_blocks

logger = logging.get_logger(__name__)

PACKAGED = Path(__file__).parent / "deepspeed"

SPARE = 0.1
"""Share of a GPU's memory that gathered weights leave free: a forward without gradients needs some too."""


def read_config(given: dict | str | None) -> dict | str | None:
    """What the field `deepspeed` means: the packaged configuration of a name; a dict, JSON or a file stays as it is.

    EditrlError for a name that there is not, and for ZeRO-3 that could not save what it trained.
    """
    names = sorted(path.stem for path in PACKAGED.glob("*.json"))
    config = given
    if isinstance(given, str):
        if given in names:
            return json.loads((PACKAGED / f"{given}.json").read_text())
        if not given.lstrip().startswith("{"):
            if not Path(given).is_file():
                raise EditrlError(
                    f"deepspeed is '{given}', which is no file; the packaged configurations are {', '.join(names)}."
                    + did_you_mean(given, names)
                )
            config = Path(given).read_text()
    if isinstance(config, str):
        try:
            config = json.loads(config)
        except json.JSONDecodeError as error:
            raise EditrlError(f"deepspeed: '{given}' is no JSON: {error}") from error
    zero = (config or {}).get("zero_optimization", {})
    gathers = ("stage3_gather_16bit_weights_on_model_save", "gather_16bit_weights_on_model_save")
    if zero.get("stage") == 3 and not any(zero.get(name) for name in gathers):
        raise EditrlError(
            f"deepspeed: ZeRO-3 without {gathers[0]} saves no weights that can be loaded; set it to true in "
            "zero_optimization"
        )
    return given


def stand_alone() -> None:
    """Set what a launcher would have set, if none did: DeepSpeed asks for it on one process as well."""
    if any(name in os.environ for name in ("RANK", "LOCAL_RANK", "OMPI_COMM_WORLD_RANK")):
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def require_one_group(world_size: int) -> None:
    """EditrlError where a launcher started several processes that do not know of each other."""
    started = int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1
    if started != world_size:
        raise EditrlError(
            f"{started} processes were started, but each would train by itself: without a GPU, accelerate joins them "
            "only with use_cpu, and DeepSpeed not at all; set use_cpu and drop deepspeed, or start one process"
        )


def require_whole(modules) -> None:
    """EditrlError if a frozen model was sharded while it was loaded."""
    if any(hasattr(parameter, "ds_id") for module in modules for parameter in module.parameters()):
        raise EditrlError(
            "a frozen model of the policy is sharded, because it was loaded while a ZeRO-3 configuration was alive; "
            "load the policy before FlowSFTConfig or FlowGRPOConfig is made"
        )


def mark_leaf_blocks(transformer: nn.Module) -> None:
    """Let ZeRO-3 fetch the transformer's blocks whole, not a linear layer at a time: half the hooks and gathers.

    The blocks are entries of the transformer's own module lists of a class that it names in `_no_split_modules`, as
    diffusers' models do: for HunyuanVideo those of two streams and of one. The first that is trained stays as it is:
    a leaf reduces its gradients once those of its inputs are there, and of a first block with LoRA no input has one.
    """
    from deepspeed.utils import set_z3_leaf_module

    model = transformer.get_base_model() if isinstance(transformer, PeftModel) else transformer
    names = getattr(model, "_no_split_modules", None) or ()
    lists = [child for child in model.children() if isinstance(child, nn.ModuleList)]
    blocks = [block for child in lists for block in child if type(block).__name__ in names]
    trained = [any(parameter.requires_grad for parameter in block.parameters()) for block in blocks]
    first = trained.index(True) if any(trained) else None
    for position, block in enumerate(blocks):
        set_z3_leaf_module(block, position != first)


class Sampler:
    """What a trainer samples with: its wrapped model, under ZeRO-3 perhaps with the weights gathered once a rollout.

    Under ZeRO-3 `compile_blocks` means the blocks within `gathered`. Training is eager, the compiled calls set aside:
    there DeepSpeed's hooks fetch and release the weights.

    Args:
        trainer: whose `model_wrapped`.
        gather: whether to gather; None decides it at the first rollout, by what memory the processes have left.
    """

    def __init__(self, trainer: Trainer, gather: bool | None = None):
        self.trainer, self.gather = trainer, gather
        self._decided = False
        self._module: nn.Module | None = None
        self._calls: dict[nn.Module, Callable] = {}

    @property
    def model(self) -> nn.Module:
        """The transformer to call: bare within `gathered`, else wrapped."""
        return self.trainer.model_wrapped if self._module is None else self._module

    @property
    def whole(self) -> bool:
        """Whether the weights are there, to be merged and the like: sharded, they are within `gathered` only."""
        return self._module is not None or not is_sharded(self.trainer.model_wrapped)

    @property
    def trained_compiled(self) -> bool:
        """Whether training runs through compiled blocks."""
        return self.trainer.args.compile_blocks and not is_sharded(self.trainer.model_wrapped)

    def as_trained(self) -> contextlib.AbstractContextManager:
        """The context of forwards that training repeats, and that have to be rounded as it rounds them.

        A compiled forward with gradient and one without are two graphs that round differently: these forwards take the
        one with gradient. Where training is not compiled they are not either.
        """
        return torch.enable_grad() if self.trained_compiled else calling(dict.fromkeys(self._calls))

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Hold all weights for the forwards of the block, where they are sharded and this sampler gathers."""
        engine = self.trainer.model_wrapped
        if self._module is not None or not is_sharded(engine) or not self._gathers(engine):
            yield
            return
        if self.trainer.args.compile_blocks and not self._calls:
            self._calls = compiled_calls(repeated_blocks(engine.module))
        with gathered(engine) as module, calling(self._calls):
            self._module = module
            try:
                yield
            finally:
                self._module = None

    def _gathers(self, engine: nn.Module) -> bool:
        if not self._decided:
            self._decided = True
            self._decide(engine)
        return self.gather

    def _decide(self, engine: nn.Module) -> None:
        args, told = self.trainer.args, []
        if self.gather is None:
            fits, figures = gathering_fits(engine, args.device, merged=args.merge_adapter)
            # All or none: gathering is a matter of all processes.
            self.gather = bool(self.trainer.accelerator.gather(torch.tensor([fits], device=args.device)).all())
            how = "once a rollout" if self.gather else "in every forward"
            told.append(f"ZeRO-3 gathers the weights {how} ({figures}); ds3_gather_for_rollout overrules that")
        idle = [name for name in ("compile_blocks", "merge_adapter") if getattr(args, name) and not self.gather]
        if idle:
            told.append(f"{' and '.join(idle)}: nothing to do, since the weights are not gathered for a rollout")
        if self.trainer.is_world_process_zero():
            for line in told:
                logger.warning(line)


def is_sharded(model: nn.Module) -> bool:
    """Whether `model` is a DeepSpeed engine under ZeRO-3."""
    return hasattr(model, "zero_optimization_partition_weights") and model.zero_optimization_partition_weights()


def gathering_fits(engine: nn.Module, device: torch.device, merged: bool = False) -> tuple[bool, str]:
    """Whether all weights of a ZeRO-3 engine fit on this device at once, and the figures.

    `merged`: beside second ones of all layers with LoRA, as `MergedAdapter` makes them.
    """
    if device.type != "cuda":
        return True, f"{device.type} has no memory of its own"
    weights = list(engine.module.parameters())
    if merged:
        layers = [layer for layer in engine.module.modules() if isinstance(layer, LoraLayer)]
        weights += [layer.get_base_layer().weight for layer in layers]
    needed = sum(weight.ds_numel * weight.element_size() for weight in weights)
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's cache
    figures = f"{needed / 2**30:.1f} GiB of weights, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    return needed + SPARE * total <= free, figures


@contextlib.contextmanager
def gathered(engine: nn.Module) -> Iterator[nn.Module]:
    """The module of a ZeRO-3 engine with all its weights, and without the hooks that fetch and release them.

    For forwards without gradients. Every process has to enter and leave; between, each may make as many forwards as
    it likes. Afterwards the weights are sharded and the hooks back in their places, whatever happened.
    """
    import deepspeed

    engine.optimizer.empty_partition_cache()  # small weights are kept whole, and prefetched ones may be on their way
    offload = engine.optimizer.parameter_offload
    handles = [*offload.forward_hooks, *offload.backward_hooks, offload.fwd_pre_hook]
    with deepspeed.zero.GatheredParameters(engine.module.parameters()):
        # Taken out of torch's dicts and put back, so that the order in which DeepSpeed saw the modules stays valid.
        places = [(handle.hooks_dict_ref(), handle.id) for handle in handles]
        hooks = [place.pop(key) for place, key in places]
        try:
            yield engine.module
        finally:
            for (place, key), hook in zip(places, hooks, strict=True):
                place[key] = hook
