"""A judge in this process: any image-text-to-text model of transformers."""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from editrl.errors import EditrlError
from editrl.rewards.backbone import DTYPES, fetch, unsharded


@dataclass(eq=False)
class _Loaded:
    """The weights on one device, and what makes their inputs."""

    network: torch.nn.Module
    processor: Any


_loaded: WeakValueDictionary[tuple[str, ...], _Loaded] = WeakValueDictionary()  # by model, processor, dtype, device


def _load(model: str, processor: str, dtype: str, device: torch.device | str) -> _Loaded:
    """Loaded once for equal arguments while somebody holds it; what is held on another device is copied from there."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    key = (model, processor, dtype, str(torch.device(device)))
    loaded = _loaded.get(key)
    elsewhere = next((other for known, other in list(_loaded.items()) if known[:3] == key[:3]), None)
    if loaded is None and elsewhere is not None:
        loaded = _loaded[key] = _Loaded(_copied(elsewhere.network, device), elsewhere.processor)
    if loaded is None:
        with unsharded():
            network = fetch(AutoModelForImageTextToText, model, dtype=DTYPES[dtype])
        network.eval().requires_grad_(False).to(device)
        loaded = _loaded[key] = _Loaded(network, fetch(AutoProcessor, processor))
    return loaded


def _copied(network: torch.nn.Module, device: torch.device | str) -> torch.nn.Module:
    """Each weight goes straight to the device, so that none holds it twice."""
    there = {id(weight): torch.nn.Parameter(weight.to(device), requires_grad=False) for weight in network.parameters()}
    there |= {id(buffer): buffer.to(device) for buffer in network.buffers()}
    return copy.deepcopy(network, there)


class LocalVLM:
    """A vision-language model from a folder or the Hub. Those of equal model, processor, dtype and device share it.

    Args:
        model: folder or Hub id in transformers' format.
        processor: where its processor is, if not beside the weights.
        dtype: "float32", "bfloat16" or "float16".
        max_new_tokens: the length of an answer.
        words: answer -> the words that mean it, for `weigh`; those of which the tokenizer makes one token count.
    """

    concurrency = 1

    def __init__(
        self,
        model: str,
        *,
        processor: str | None = None,
        dtype: str = "bfloat16",
        max_new_tokens: int = 512,
        words: Mapping[str, Sequence[str]] | None = None,
    ):
        if dtype not in DTYPES:
            raise EditrlError(f"dtype of a judge is {dtype!r}: choose one of {', '.join(DTYPES)}.")
        self.model, self.processor_path, self.dtype = model, processor or model, dtype
        self.max_new_tokens, self.words = max_new_tokens, dict(words or {})
        self._loaded: _Loaded | None = None

    @property
    def key(self) -> tuple[str, ...]:
        """What of it an answer depends on."""
        words = json.dumps(self.words, sort_keys=True, default=repr)
        return (self.model, self.processor_path, self.dtype, str(self.max_new_tokens), words)

    def to(self, device: torch.device | str) -> "LocalVLM":
        """Load it there, or move it. Other judges that hold the same model keep it where it is."""
        self._loaded = _load(self.model, self.processor_path, self.dtype, device)
        return self

    def ask(self, parts: Sequence[str | Tensor]) -> str:
        """The answer to texts and images [3,H,W] in [0,1], the likeliest token each time."""
        inputs = self._inputs(parts)
        with torch.no_grad():
            tokens = self._loaded.network.generate(**inputs, do_sample=False, max_new_tokens=self.max_new_tokens)
        return self._loaded.processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def weigh(self, parts: Sequence[str | Tensor], answers: Mapping[str, float]) -> float:
        """The mean of `answers` (answer -> value), weighted by how likely the model is to begin with each.

        {"yes": 1, "no": 0} gives p(yes) / (p(yes) + p(no)); {"1": 1, ..., "9": 9} the expected mark (G-Eval, arXiv
        2303.16634). EditrlError for an answer that is not one token of this model.
        """
        inputs = self._inputs(parts)
        with torch.no_grad():
            likely = self._loaded.network(**inputs).logits[0, -1].float().softmax(-1)
        shares = {answer: likely[self._tokens(answer)].sum().item() for answer in answers}
        total = sum(shares.values())
        if not total > 0:
            raise EditrlError(f"'{self.model}' gives {', '.join(answers)} no probability at all.")
        return sum(value * shares[answer] for answer, value in answers.items()) / total

    def _tokens(self, answer: str) -> list[int]:
        tokenizer = self._loaded.processor.tokenizer
        words = self.words.get(answer) or dict.fromkeys((answer, answer.capitalize(), answer.upper()))
        spelled = [
            tokenizer.encode(f"{space}{word}", add_special_tokens=False) for word in words for space in ("", " ")
        ]
        single = {tokens[0] for tokens in spelled if len(tokens) == 1} - {tokenizer.unk_token_id}
        if not single:
            raise EditrlError(f"'{self.model}' has no token for '{answer}': pass `words`, or let it write its answer.")
        return sorted(single)

    def _inputs(self, parts: Sequence[str | Tensor]):
        if self._loaded is None:
            self.to("cpu")
        content = [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image", "image": to_pil_image(part.float().clamp(0, 1).cpu())}
            for part in parts
        ]
        inputs = self._loaded.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        return inputs.to(self._loaded.network.device, DTYPES[self.dtype])
