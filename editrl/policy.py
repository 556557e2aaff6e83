"""What a model must offer to be trained: `FlowPolicy`, and the frozen inputs it is conditioned on: `Conditions`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from editrl.errors import EditrlError

if TYPE_CHECKING:
    from editrl.data import EditExample


@dataclass
class Conditions:
    """Everything frozen that a velocity depends on: named tensors whose first dimension is the sample.

    Tensors whose second dimension is a sequence (tokens and their mask) are named in `sequences`; joining conditions of
    different lengths pads them with zeros at the end, so a mask must hold 0 where a token is padding.
    """

    tensors: dict[str, Tensor]
    sequences: frozenset[str] = field(default_factory=frozenset)

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self.__dict__["tensors"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: Tensor | slice | Sequence[int]) -> Conditions:
        """Select samples; an index that repeats a sample repeats its rows."""
        return self._map(lambda tensor: tensor[index])

    def to(self, *args, **kwargs) -> Conditions:
        """As `Tensor.to`; a dtype is applied to floating-point tensors only."""

        def move(tensor: Tensor) -> Tensor:
            moved = tensor.to(*args, **kwargs)
            # Not there and back: bfloat16 does not hold the integer 257.
            return moved if tensor.is_floating_point() else tensor.to(moved.device)

        return self._map(move)

    @staticmethod
    def concatenate(parts: Iterable[Conditions]) -> Conditions:
        """Join along the sample dimension."""
        parts = list(parts)
        first = parts[0]

        def join(name: str) -> Tensor:
            tensors = [part.tensors[name] for part in parts]
            if name in first.sequences:
                longest = max(tensor.shape[1] for tensor in tensors)
                # `pad` counts dimensions from the last one backwards.
                tensors = [pad(t, (0, 0) * (t.ndim - 2) + (0, longest - t.shape[1])) for t in tensors]
            if len({tensor.shape[1:] for tensor in tensors}) > 1:
                shapes = sorted({tuple(tensor.shape[1:]) for tensor in tensors})
                raise EditrlError(
                    f"examples of one batch differ in the shape of '{name}' {shapes}; give the data set one size "
                    "(num_frames, height, width)"
                )
            return torch.cat(tensors)

        return Conditions({name: join(name) for name in first.tensors}, first.sequences)

    def _map(self, function) -> Conditions:
        return Conditions({name: function(tensor) for name, tensor in self.tensors.items()}, self.sequences)


class FlowPolicy:
    """A flow-matching editor: a trainable `transformer` and the frozen parts around it.

    Subclasses implement the methods below; trainers, rollout and the command line know nothing else of a model.
    """

    transformer: nn.Module
    """What is trained; may carry PEFT adapters."""

    frame_multiple: int = 4
    """Clips have `frame_multiple * k + 1` frames."""

    size_multiple: int = 16
    """Height and width are multiples of this."""

    context_parallel: int = 1
    """Processes that share each clip."""

    def shift_for(self, height: int, width: int) -> float:
        """Timestep shift to sample with at this size, where none is asked for."""
        return 5.0

    def encode(self, examples: Sequence[EditExample], unconditional: bool = False) -> Conditions:
        """The frozen conditions of B examples: instruction, source clip, reference image. Under `torch.no_grad`.

        `unconditional`: of the empty instruction, pictures kept; for classifier-free guidance and condition dropout.
        """
        raise NotImplementedError

    def compact(self, conditions: Conditions) -> Conditions:
        """The same conditions without what no sample of this batch needs, such as padding of all.

        Trainers call it once for a batch that is then run many times: it may read values, for which the device has to
        be waited for, so that `velocity` need not. The result is run, never joined with others.
        """
        return conditions

    def encode_videos(self, videos: Tensor) -> Tensor:
        """Clips [B,F,3,H,W] float32 in [0,1] -> latents [B,C,f,h,w] float32."""
        raise NotImplementedError

    def latent_shape(self, conditions: Conditions) -> tuple[int, ...]:
        """Shape (C,f,h,w) of one sample's latents under these conditions."""
        raise NotImplementedError

    def velocity(
        self, transformer: nn.Module, latents: Tensor, sigma: Tensor | float, conditions: Conditions
    ) -> Tensor:
        """Velocity (noise minus clean), float32 [B,C,f,h,w], at latents [B,C,f,h,w] and sigma (float, 0-d or [B]).

        `transformer` is passed in because the trainer may have wrapped it (DeepSpeed, DDP, compile).
        """
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B,C,f,h,w] -> clips [B,F,3,H,W] float32 in [0,1]."""
        raise NotImplementedError

    def latent_mask(self, masks: Tensor) -> Tensor:
        """Edit masks [B,F,1,H,W] in {0,1} -> [B,1,f,h,w] on the latent grid: 1 wherever any covered pixel is edited."""
        raise NotImplementedError

    def enable_context_parallel(self, degree: int) -> None:
        """Let groups of `degree` neighbouring processes share each clip, and set `context_parallel`. Optional.

        Called once, with `torch.distributed` initialised, after adapters are attached and before DDP or DeepSpeed wrap
        the transformer. From then on the processes of a group are given the same inputs, and each gets the whole
        velocity; their gradients sum to that of one process.
        """
        raise EditrlError(f"{type(self).__name__} has no context parallelism; set context_parallel to 1")

    def frozen_modules(self) -> Iterable[nn.Module]:
        """Modules that are never trained; trainers move them to the device once."""
        return ()

    def decoding_modules(self) -> Iterable[nn.Module]:
        """Of the frozen modules those that `encode_videos` and `decode` need."""
        return self.frozen_modules()

    def save_pretrained(self, path: str) -> None:
        """Write the whole editor as a folder that `from_pretrained` reads."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls, path: str, **kwargs) -> FlowPolicy:
        """Load an editor from a folder or a Hub id."""
        raise NotImplementedError

    @classmethod
    def sketch(
        cls, path: str, frames: int, height: int, width: int, **options
    ) -> tuple[nn.Module, Callable[[torch.dtype], tuple], str]:
        """Shapes without weights, for `editrl plan`: no weight is read.

        Args:
            path, options: as of `from_pretrained`.
            frames, height, width: of the clips.

        Returns:
            The transformer on the meta device, a function from a dtype to what one of its blocks is given for one clip,
            and where the shapes are from, for a person.
        """
        raise EditrlError(f"a {cls.__name__} cannot be planned, since it has no sketch(); write that method")

    @property
    def device(self) -> torch.device:
        """Where the transformer lives; inputs are moved there."""
        return next(self.transformer.parameters()).device

    def to(self, device: torch.device | str) -> FlowPolicy:
        """Move the transformer and the frozen modules."""
        self.transformer.to(device)
        for module in self.frozen_modules():
            module.to(device)
        return self

    def fingerprint(self) -> str:
        """What conditions depend on in this policy, as `part:hash` words, for a cache of conditions.

        Frozen weights and settings, the same from any folder and on any device; nothing of the trained transformer. A
        part that is not loaded is left out. `editrl.cache` has `module_fingerprint` and `settings_fingerprint`.
        """
        raise EditrlError(
            f"the conditions of a {type(self).__name__} cannot be cached, since it has no fingerprint(); "
            "drop conditions_cache, or write that method"
        )
