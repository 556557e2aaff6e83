"""The judge as a reward, and as what a benchmark asks for scores with reasons."""

import inspect
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from editrl.errors import EditrlError, did_you_mean
from editrl.registry import register_reward
from editrl.reward_options import check_frames
from editrl.rewards.vlm_judge.answer import Answer, UnreadableAnswer, read_mark, read_scores, read_yes_no
from editrl.rewards.vlm_judge.endpoint import Endpoint
from editrl.rewards.vlm_judge.local import LocalVLM
from editrl.rewards.vlm_judge.prompt import Prompt, load_prompt, parts


@dataclass(frozen=True)
class _Question:
    """One sample, as it is put to the judge."""

    label: str
    prompt: Prompt
    parts: list[str | Tensor]
    key: tuple  # equal keys, equal answers
    held: tuple  # objects whose id is in the key: while it is remembered, no others can get these


@register_reward("vlm_judge")
class VLMJudge:
    """Score of a vision-language model that compares edited and source clip, 1 to 10 (yes/no prompts: 0 to 1).

    Asked for instruction following, quality and preservation, and with a reference image for similarity to it; the
    score is the mean of these, or the one `dimension`. An answer that cannot be read is asked for again, and then an
    error: it never becomes a number. Judges that differ in their `dimension` only, in one `RewardSet`, ask once for all
    of them.

    Args:
        model: its name at the endpoint, or folder or Hub id of a local model.
        base_url: of an OpenAI-compatible endpoint, up to and with "/v1"; None for a local model.
        prompt: a text file, or "edit", "reference", "yes_no"; "auto" takes "reference" for samples that have one, else
            "edit". A local model answers yes/no by p(yes) / (p(yes) + p(no)), one mark by its
            expected value.
        dimension: the reward is this one alone; None: the mean of all.
        num_frames: frames of each clip that are shown, a number, "all" or "keyframes".
        attempts: how often one sample is asked until its answer can be read.
        options: further arguments of `Endpoint` or `LocalVLM`.
        transport: in their place, any object with `ask(parts) -> str` and `concurrency`.
    """

    name = "vlm_judge"

    def __init__(
        self,
        model: str | None = None,
        *,
        base_url: str | None = None,
        prompt: str = "auto",
        dimension: str | None = None,
        num_frames: int | str = 8,
        attempts: int = 3,
        options: Mapping[str, Any] | None = None,
        transport: Any = None,
    ):
        if (model is None) == (transport is None):
            raise EditrlError("vlm_judge: give `model`, and `base_url` if it is behind an endpoint; or a `transport`.")
        check_frames(num_frames, "vlm_judge: num_frames")
        if attempts < 1:
            raise EditrlError(f"vlm_judge: attempts is {attempts}: give a positive number.")
        self.prompts = [load_prompt(name) for name in (("edit", "reference") if prompt == "auto" else (prompt,))]
        known = self.prompts[0].dimensions
        if dimension is not None and dimension not in known:
            raise EditrlError(f"vlm_judge: dimension is {dimension!r}: the prompt has {', '.join(known) or 'yes/no'}.")
        self.dimension, self.num_frames, self.attempts = dimension, num_frames, attempts
        if transport is None:
            transport = _transport(model, base_url, options or {})
        self.transport = transport
        self.background = isinstance(transport, Endpoint)  # a `RewardOptions`: a local model computes here
        self._pool: ThreadPoolExecutor | None = None  # of the last call
        self._stop = threading.Event()  # and its end
        self.model = model or type(transport).__name__
        self.requires = {"source_videos", "instructions"}

    @property
    def columns(self) -> tuple[str, ...]:
        """Further columns that it reads where they are there: a server has to ask its clients for them."""
        named = {f"{name}s" for prompt in self.prompts for name in prompt.placeholders}
        return ("reference_images", *sorted(named - self.requires))

    @property
    def identity(self) -> dict[str, Any]:
        """What a stored score must carry: scores of different judges do not compare."""
        versions = {prompt.name: prompt.version for prompt in self.prompts}
        return {"judge": self.model, "prompts": versions, "num_frames": self.num_frames}

    def to(self, device: torch.device | str) -> "VLMJudge":
        """A local model is loaded there."""
        if hasattr(self.transport, "to"):
            self.transport.to(device)
        return self

    def __call__(self, videos: Sequence[Tensor], cache: dict | None = None, **columns) -> list[float]:
        """N clips [F,3,H,W] in [0,1], `source_videos`, `instructions`, optional others -> N floats."""
        answers = self.judge(videos, cache, **columns)
        chosen = [[a.scores[self.dimension]] if self.dimension else list(a.scores.values()) for a in answers]
        return [sum(scores) / len(scores) for scores in chosen]

    def judge(self, videos: Sequence[Tensor], cache: dict | None = None, **columns) -> list[Answer]:
        """The scores by dimension, with reasons; columns as a reward gets them.

        `cache` remembers the answers, by the identity of the clips and all else that an answer depends on: what another
        judge has asked there is not asked again.

        Raises: EditrlError when a sample's answer could not be read `attempts` times; OutageError when the judge cannot
            be reached.
        """
        questions = [
            self._question(i, video, {name: values[i] for name, values in columns.items() if isinstance(values, list)})
            for i, video in enumerate(videos)
        ]
        memo = {} if cache is None else cache.setdefault("vlm_judge", {})
        new = {question.key: question for question in questions if question.key not in memo}
        stop = self._stop = threading.Event()
        pool = self._pool = ThreadPoolExecutor(self.transport.concurrency)
        try:
            answers = list(pool.map(lambda question: self._answer(question, stop), new.values()))
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)  # after a failure the rest need not be asked
        memo.update({key: (new[key].held, answer) for key, answer in zip(new, answers, strict=True)})
        return [memo[question.key][1] for question in questions]

    def cancel(self) -> None:
        """Of a call that another thread waits for, the questions that have not been asked are dropped."""
        self._stop.set()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _question(self, i: int, video: Tensor, sample: dict[str, Any]) -> _Question:
        reference = sample.get("reference_images")
        prompt = self.prompts[-1 if reference is not None else 0]
        texts = {
            name: sample.get(f"{name}s") for name in ("instruction", "source_caption", "target_caption")
        }  # the columns are plural
        shown = parts(prompt, video, sample["source_videos"], texts, reference, self.num_frames)
        held = (video, sample["source_videos"], reference, self.transport)
        own = isinstance(self.transport, Endpoint | LocalVLM)
        whom = (type(self.transport), self.transport.key if own else id(self.transport))
        key = (whom, prompt.version, self.num_frames, *map(id, held[:3]), shown[-1])
        label = f"sample {i}" + (f" (id {sample['ids']!r})" if "ids" in sample else "")
        return _Question(label, prompt, shown, key, held)

    def _answer(self, question: _Question, stop: threading.Event) -> Answer:
        prompt, asked = question.prompt, question.parts
        if not prompt.dimensions and hasattr(self.transport, "weigh"):
            values = {str(mark): float(mark) for mark in prompt.marks} or {"yes": 1.0, "no": 0.0}
            return Answer({"mark" if prompt.marks else "yes": self.transport.weigh(asked, values)}, "", "")
        waiting = (stop,) if isinstance(self.transport, Endpoint) else ()
        for _ in range(self.attempts):
            text = self.transport.ask(asked, *waiting)
            try:
                return _read(text, prompt)
            except UnreadableAnswer as error:
                problem = str(error)
                asked = [*question.parts, f"Your last answer could not be used: {problem}. Answer as told, no more."]
        raise EditrlError(
            f"{question.label}: the judge '{self.model}' gave {self.attempts} answers that cannot be read, the last of "
            f"which because {problem}: {text[:200]!r}"
        )


def _transport(model: str, base_url: str | None, options: Mapping[str, Any]) -> LocalVLM | Endpoint:
    """EditrlError for an option that it does not take."""
    kind, place = (LocalVLM, (model,)) if base_url is None else (Endpoint, (model, base_url))
    known = [p.name for p in inspect.signature(kind).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            why = "a local model, as there is no base_url" if base_url is None else "as there is a base_url"
            raise EditrlError(
                f"vlm_judge: options has '{name}', but {kind.__name__} ({why}) takes {', '.join(known)}."
                + did_you_mean(str(name), known)
            )
    return kind(*place, **options)


def _read(text: str, prompt: Prompt) -> Answer:
    if prompt.dimensions:
        return read_scores(text, prompt.dimensions)
    return read_mark(text, prompt.marks) if prompt.marks else read_yes_no(text)
