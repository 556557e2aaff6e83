"""How much of a gradient is signal? `python -m editrl.benchmarks.algorithms.signal --out FILE`.

Draws many independent blocks of groups from the starting checkpoint, without any update, and takes the gradient of
each block under every algorithm. From their inner products follow, without bias:

- signal S = |E g|², the mean inner product of two different blocks;
- noise N = E|g - E g|² of a block, the mean square of a block minus S;
- the cosine of two independent batches of n clips, S / (S + N·block/n) in expectation, and as it is met when the blocks
  are split into two batches at random;
- the batch at which that cosine is one half, N/S·block: the "simple noise scale" of arXiv 1812.06162 as clips. Smaller
  batches mostly follow noise; far larger ones pay for what they hardly need.
"""

import argparse
import json
import math
import random
from statistics import mean, stdev

import torch
from torch import Tensor

from editrl.benchmarks.algorithms.learning import build, described, parser
from editrl.benchmarks.record import machine, write_json

# What is compared; everything else is as in `learning`.
ALGORITHMS = {
    "grpo": {},
    "grpo, same_init_noise": {"same_init_noise": True},
    "grpo, dance_sde": {"sde_kernel": "dance_sde", "noise_level": 0.5},
    "grpo, cps": {"sde_kernel": "cps", "noise_level": 0.7},
    "grpo_guard": {"loss_type": "grpo_guard"},
    "dppo": {"loss_type": "dppo"},
    "nft": {"loss_type": "nft"},
    "awm": {"loss_type": "awm"},
    "rwr": {"loss_type": "rwr"},
}


def block_gradients(options: argparse.Namespace, blocks: int) -> tuple[Tensor, int]:
    """Gradients of independent blocks of clips, float32 [blocks, P], and the clips of a block."""
    trainer = build(options)
    trainer.create_optimizer()
    parameters = trainer.trained_parameters()
    gradients = []
    for block in range(blocks):
        groups = range(block * options.groups, (block + 1) * options.groups)
        numbers = [[group, group % options.scenes] for group in groups for _ in range(options.members)]
        micro_batches = trainer.generate(numbers)
        trainer.model_wrapped.train()
        total = None
        for micro_batch in micro_batches:
            loss = trainer.compute_loss(trainer.model_wrapped, micro_batch) / len(micro_batches)
            part = torch.autograd.grad(loss, parameters, allow_unused=True)
            part = torch.cat(
                [
                    torch.zeros(p.numel(), device=p.device) if g is None else g.flatten()
                    for p, g in zip(parameters, part, strict=True)
                ]
            )
            total = part if total is None else total + part
        gradients.append(total)
    return torch.stack(gradients), options.groups * options.members


def analyse(gradients: Tensor, clips: int, seed: int = 0) -> dict:
    """Signal, noise and cosines from the blocks' inner products."""
    gram = (gradients.double() @ gradients.double().T).cpu()
    number = len(gram)
    diagonal = gram.diagonal()

    def moments(chosen: Tensor) -> tuple[float, float]:
        part = gram[chosen][:, chosen]
        different = chosen[:, None] != chosen  # a block drawn twice is no pair of independent ones
        signal = part[different].mean().item()
        return signal, diagonal[chosen].mean().item() - signal

    generator = torch.Generator().manual_seed(seed)
    everything = torch.arange(number)
    signal, noise = moments(everything)
    resampled = [moments(torch.randint(number, (number,), generator=generator)) for _ in range(200)]
    scales = sorted(n / s * clips if s > 0 else math.inf for s, n in resampled)
    shuffle, cosines = random.Random(seed), []
    size = 1
    while 2 * size <= number:
        values = []
        for _ in range(200):
            order = shuffle.sample(range(number), 2 * size)
            one, other = torch.tensor(order[:size]), torch.tensor(order[size:])
            inner = gram[one][:, other].sum()
            values.append((inner / (gram[one][:, one].sum() * gram[other][:, other].sum()).sqrt()).item())
        cosines.append({"clips": size * clips, "cosine": mean(values), "std": stdev(values)})
        size *= 2
    return {
        "signal": signal,
        "noise": noise,
        "half_cosine_batch": noise / signal * clips if signal > 0 else None,
        "half_cosine_batch_90": [scale if math.isfinite(scale) else None for scale in (scales[10], scales[-11])],
        "cosines": cosines,
    }


def main() -> None:
    arguments = parser(__doc__)
    arguments.set_defaults(groups=8, members=24)
    arguments.add_argument("--blocks", type=int, default=64, help="independent blocks of groups * members clips")
    arguments.add_argument("--algorithms", nargs="+", choices=list(ALGORITHMS), default=list(ALGORITHMS))
    options = arguments.parse_args()
    chosen = options.set
    result = {"settings": described(options), "machine": machine(options.device), "algorithms": {}}
    for name in options.algorithms:
        options.set = [*chosen, *ALGORITHMS[name].items()]
        gradients, clips = block_gradients(options, options.blocks)
        found = analyse(gradients, clips, options.seed)
        result["algorithms"][name] = found
        print(json.dumps({"algorithm": name, **found}), flush=True)
        write_json(options.out, result)
        del gradients


if __name__ == "__main__":
    main()
