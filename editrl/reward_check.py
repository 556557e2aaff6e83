"""Does a reward keep the contract? It is asked to score synthetic clips in several ways, and the answers compared."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from editrl.data import EditExample
from editrl.doctor.finding import Finding
from editrl.errors import EditrlError
from editrl.registry import reward_name
from editrl.reward import COLUMNS, RewardSet, reward_columns

SIZES = ((9, 48, 64), (5, 32, 32), (17, 40, 72), (5, 48, 64), (1, 48, 48), (1, 32, 56))  # two of them images
GROUPS = (0, 0, 1, 1, 2, 2)
COLOURS = {"red": (1.0, 0.0, 0.0), "green": (0.0, 0.8, 0.0), "blue": (0.0, 0.0, 1.0), "yellow": (1.0, 1.0, 0.0)}
OPTIONAL = ("target", "reference_image", "mask", "source_caption", "target_caption", "task")
TOLERANCE = 1e-4
"""Of scores of size 1 or less, else relative: batches of other sizes run through other kernels."""


def check_reward(
    reward: Any,
    *,
    kwargs: Mapping[str, Any] | None = None,
    columns: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    slow: float = 1.0,
) -> list[Finding]:
    """What is wrong with a reward, one finding a check.

    Args:
        reward: a name, a spec or the callable itself, as for `RewardSet`.
        kwargs: its constructor arguments.
        columns: further columns of the data set that it needs: name -> the value that every sample gets.
        device: where its model goes.
        slow: seconds a clip from which on it is called slow.

    Returns: findings; when the first call fails, that one alone.

    Raises: EditrlError when the reward cannot be loaded, or needs a column that the samples do not have.
    """
    trial = _Trial(reward, dict(kwargs or {}), dict(columns or {}), device)
    clips = [i for i, (frames, *_) in enumerate(SIZES) if frames > 1]
    inputs = trial.inputs(clips)
    try:
        first = trial.score(inputs, clips)
    except EditrlError as error:
        return [Finding("runs" if error.__cause__ else "scores", "fail", str(error))]
    known = first[~first.isnan()]
    findings = [
        Finding("runs", "ok", f"{len(clips)} clips of different sizes and lengths"),
        Finding("scores", "ok", f"{len(known)} finite numbers, from {known.min():.4g} to {known.max():.4g}")
        if len(known)
        else Finding(
            "scores", "warn", "None for every clip: it applies to none of the samples, so no more can be said"
        ),
        trial.mutation(inputs, clips),
    ]
    seconds = trial.seconds(clips, slow)
    if len(known):
        findings += [
            _spread(known),
            trial.repeated(first, clips),
            trial.alone(first, clips),
            trial.reordered(first, clips),
            trial.last_frames(first, clips),
        ]
    images = [i for i in range(len(SIZES)) if i not in clips]
    findings += [
        trial.also(
            "images", images, "raises on clips of one frame: score them, or return None where it does not apply"
        ),
        trial.also("optional columns", clips, "cannot do without columns that it does not require", bare=True),
        seconds,
    ]
    return findings


class _Trial:
    """One reward, and the samples in whichever choice and order."""

    def __init__(self, reward: Any, kwargs: dict, columns: dict, device: torch.device | str):
        name = reward_name(reward)
        self.rewards = RewardSet([reward], kwargs={name: kwargs} if kwargs else None).to(device)
        self.columns = columns
        for column in sorted(self.rewards.requires - COLUMNS.keys() - columns.keys()):
            raise EditrlError(
                f"reward '{name}' needs the column '{column}', which the samples do not have: give a value with "
                f"`--columns '{{\"{column}\": ...}}'`."
            )

    def inputs(self, chosen: list[int], *, bare: bool = False) -> tuple[list[Tensor], dict[str, list]]:
        """Fresh clips and columns; `bare`: without those that the reward does not require."""
        videos, examples = [], []
        for i in chosen:
            edited, example = sample(i)
            if bare:
                needed = {COLUMNS.get(column) for column in self.rewards.requires}
                example = dataclasses.replace(example, **{name: None for name in OPTIONAL if name not in needed})
            videos.append(edited)
            examples.append(example)
        columns = reward_columns(examples)
        return videos, columns | {name: [value] * len(chosen) for name, value in self.columns.items()}

    def score(self, inputs: tuple[list[Tensor], dict[str, list]], chosen: list[int]) -> Tensor:
        """[n], NaN for None."""
        videos, columns = inputs
        return self.rewards(videos, columns, [GROUPS[i] for i in chosen])[:, 0]

    def mutation(self, inputs: tuple[list[Tensor], dict[str, list]], chosen: list[int]) -> Finding:
        """Whether the inputs of the first call are still what they were."""
        videos, columns = self.inputs(chosen)
        before, after = columns | {"videos": videos}, inputs[1] | {"videos": inputs[0]}
        changed = [name for name in before if not all(map(_equal, before[name], after[name]))]
        if changed:
            text = f"changes {', '.join(sorted(changed))}, which other rewards and the trainer use as well: copy first"
            return Finding("inputs", "fail", text)
        return Finding("inputs", "ok", "left as they were")

    def repeated(self, first: Tensor, chosen: list[int]) -> Finding:
        again = self.score(self.inputs(chosen), chosen)
        return _compared(
            "deterministic", first, again, "scores the same clips differently: noise that the policy is trained on"
        )

    def alone(self, first: Tensor, chosen: list[int]) -> Finding:
        parts = [[i] for i in chosen]
        if self.rewards.groupwise:
            parts = [[i for i in chosen if GROUPS[i] == group] for group in sorted({GROUPS[i] for i in chosen})]
        scores = torch.cat([self.score(self.inputs(part), part) for part in parts])
        return _compared("batch", first, scores, "scores a clip differently beside others than by itself")

    def reordered(self, first: Tensor, chosen: list[int]) -> Finding:
        scores = self.score(self.inputs(chosen[::-1]), chosen[::-1])
        return _compared("order", first, scores.flip(0), "scores depend on the order of the clips")

    def last_frames(self, first: Tensor, chosen: list[int]) -> Finding:
        videos, columns = self.inputs(chosen)
        for video in videos:
            video[len(video) // 2 :, ..., : video.shape[-1] // 2] = 0  # not the negative, which has the same edges
        changed = self.score((videos, columns), chosen)
        if torch.equal(changed.nan_to_num(), first.nan_to_num()):
            return Finding(
                "whole clip", "warn", "the second half of a clip makes no difference: does it see all frames?"
            )
        return Finding("whole clip", "ok", "the second half of a clip makes a difference")

    def also(self, check: str, chosen: list[int], problem: str, *, bare: bool = False) -> Finding:
        """Whether another kind of sample can be scored too."""
        try:
            scores = self.score(self.inputs(chosen, bare=bare), chosen)
        except EditrlError as error:
            return Finding(check, "fail", f"{problem} ({error})")
        if scores.isnan().all():
            return Finding(check, "info", "does not apply to them: None")
        return Finding(check, "ok", "scored")

    def seconds(self, chosen: list[int], slow: float) -> Finding:
        """Of a second call: what the first one loads or compiles is paid once."""
        self.score(self.inputs(chosen), chosen)
        each = sum(self.rewards.seconds.values()) / len(chosen)
        numbers = {"seconds_per_clip": each}
        if each > slow:
            return Finding(
                "speed", "warn", f"{each:.2g} s a clip (more than {slow:g}): a rollout waits for it", numbers
            )
        return Finding("speed", "ok", f"{each:.2g} s a clip", numbers)


def _spread(known: Tensor) -> Finding:
    if known.max() == known.min():
        return Finding("spread", "fail", f"{known[0]:.4g} for every clip: a constant cannot teach")
    return Finding("spread", "ok", f"standard deviation {known.std(correction=0):.2g}")


def _compared(check: str, one: Tensor, other: Tensor, problem: str) -> Finding:
    same_gaps = torch.equal(one.isnan(), other.isnan())
    difference = ((one - other).abs() / one.abs().clamp(min=1)).nan_to_num().max().item()
    if not same_gaps or difference > TOLERANCE:
        how = f"by up to {difference:.2g}" if same_gaps else "with None for other clips"
        return Finding(check, "fail", f"{problem}, {how}", {"difference": difference})
    return Finding(check, "ok", "equal scores" if difference == 0 else f"equal within {difference:.1g}")


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return bool(one == other)


def sample(number: int) -> tuple[Tensor, EditExample]:
    """Sample `number` of `SIZES`: a square moves over a soft ground, and the edit paints it. The same every time."""
    (frames, height, width), names = SIZES[number], list(COLOURS)
    before, after = names[number % len(names)], names[(number + 1 + number // 4) % len(names)]
    generator = torch.Generator().manual_seed(number)
    coarse = torch.rand(1, 3, 4, 5, generator=generator)
    ground = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0] * 0.6 + 0.2
    mask = torch.zeros(frames, 1, height, width)
    for i in range(frames):
        left = 4 + (width - 24) * i // max(frames - 1, 1)
        mask[i, :, 8:24, left : left + 16] = 1

    def painted(colour: str) -> Tensor:
        return torch.where(mask.bool(), torch.tensor(COLOURS[colour]).view(3, 1, 1), ground.expand(frames, -1, -1, -1))

    noise = torch.randn(frames, 3, height, width, generator=generator) * 0.01 * (number + 1)
    source = painted(before)
    return (painted(after) + noise).clamp(0, 1), EditExample(
        id=f"sample-{number}",
        instruction=f"make the square {after}",
        source=source,
        target=painted(after),
        reference_image=torch.tensor(COLOURS[after]).view(1, 3, 1, 1).expand(1, 3, 32, 32).clone(),
        mask=mask,
        source_caption=f"a {before} square",
        target_caption=f"a {after} square",
        task="color",
        fps=8.0,
    )
