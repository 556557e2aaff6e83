"""A judge in this process: any image-text-to-text model of transformers."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from editrl.errors import EditrlError
from editrl.rewards.backbone import DTYPES, fetch, unsharded


class LocalVLM:
    """A vision-language model from a folder or the Hub.

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
        self._network = self._processor = None

    def to(self, device: torch.device | str) -> "LocalVLM":
        """Load it there, or move it."""
        from transformers import AutoModelForImageTextToText, AutoProcessor

        if self._network is None:
            with unsharded():
                self._network = fetch(AutoModelForImageTextToText, self.model, dtype=DTYPES[self.dtype])
            self._network.eval().requires_grad_(False)
            self._processor = fetch(AutoProcessor, self.processor_path)
        self._network.to(device)
        return self

    def ask(self, parts: Sequence[str | Tensor]) -> str:
        """The answer to texts and images [3,H,W] in [0,1], the likeliest token each time."""
        inputs = self._inputs(parts)
        with torch.no_grad():
            tokens = self._network.generate(**inputs, do_sample=False, max_new_tokens=self.max_new_tokens)
        return self._processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def weigh(self, parts: Sequence[str | Tensor], answers: Mapping[str, float]) -> float:
        """The mean of `answers` (answer -> value), weighted by how likely the model is to begin with each.

        {"yes": 1, "no": 0} gives p(yes) / (p(yes) + p(no)); {"1": 1, ..., "9": 9} the expected mark (G-Eval, arXiv
        2303.16634). EditrlError for an answer that is not one token of this model.
        """
        inputs = self._inputs(parts)
        with torch.no_grad():
            likely = self._network(**inputs).logits[0, -1].float().softmax(-1)
        shares = {answer: likely[self._tokens(answer)].sum().item() for answer in answers}
        total = sum(shares.values())
        if not total > 0:
            raise EditrlError(f"'{self.model}' gives {', '.join(answers)} no probability at all.")
        return sum(value * shares[answer] for answer, value in answers.items()) / total

    def _tokens(self, answer: str) -> list[int]:
        tokenizer = self._processor.tokenizer
        words = self.words.get(answer) or dict.fromkeys((answer, answer.capitalize(), answer.upper()))
        spelled = [
            tokenizer.encode(f"{space}{word}", add_special_tokens=False) for word in words for space in ("", " ")
        ]
        single = {tokens[0] for tokens in spelled if len(tokens) == 1} - {tokenizer.unk_token_id}
        if not single:
            raise EditrlError(f"'{self.model}' has no token for '{answer}': pass `words`, or let it write its answer.")
        return sorted(single)

    def _inputs(self, parts: Sequence[str | Tensor]):
        if self._network is None:
            self.to("cpu")
        content = [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image", "image": to_pil_image(part.float().clamp(0, 1).cpu())}
            for part in parts
        ]
        inputs = self._processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        return inputs.to(self._network.device, DTYPES[self.dtype])
