"""The VLM instructor: LLaVA's hidden states over instruction, first source frame and optional reference image."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from editrl.data import EditExample
from editrl.errors import EditrlError

PROMPTS = files(__package__) / "prompts"


class Instructor:
    """A frozen LLaVA that turns an edit request into visually grounded tokens.

    The chat template of the processor's tokenizer lays out the conversation; what the system turn says is text that a
    recipe can replace. The system turn is cropped from the result, since it is the same for every request.

    Args:
        model, processor: the VLM and its processor (image size, chat template, image token).
        hidden_layer: which entry of `hidden_states` is taken. HunyuanVideo was trained on -3; the paper's wording
            ("last layer") is -1.
        edit_prompt, reference_prompt: system turns without and with a reference image.
    """

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        processor: LlavaProcessor,
        *,
        hidden_layer: int = -3,
        edit_prompt: str | None = None,
        reference_prompt: str | None = None,
    ):
        self.model = model.eval().requires_grad_(False)
        self.processor = processor
        self.hidden_layer = hidden_layer
        self.edit_prompt = edit_prompt or (PROMPTS / "edit.txt").read_text().strip()
        self.reference_prompt = reference_prompt or (PROMPTS / "reference.txt").read_text().strip()
        if processor.tokenizer.chat_template is None and processor.chat_template is None:
            raise EditrlError("the instructor's tokenizer has no chat template; add chat_template.jinja to its folder")

    def settings(self) -> dict:
        """The keyword arguments that make an equal instructor of the same model."""
        return {
            "hidden_layer": self.hidden_layer,
            "edit_prompt": self.edit_prompt,
            "reference_prompt": self.reference_prompt,
        }

    def prompt(self, example: EditExample) -> str:
        """The conversation as text, one image placeholder a picture."""
        system = self.edit_prompt if example.reference_image is None else self.reference_prompt
        placeholder = self.processor.image_token
        images = placeholder if example.reference_image is None else f"{placeholder}\n{placeholder}"
        turns = [
            {"role": "system", "content": system},
            {"role": "user", "content": f"{images}\n{example.instruction}"},
        ]
        return self._template(turns, add_generation_prompt=True)

    @torch.no_grad()
    def __call__(self, examples: Sequence[EditExample]) -> tuple[Tensor, Tensor]:
        """Hidden states [B,L,D] and their mask [B,L] (1 token, 0 padding at the end) for B examples."""
        texts = [self.prompt(example) for example in examples]
        pictures = [picture for example in examples for picture in self._pictures(example)]  # in placeholder order
        inputs = self.processor(
            text=texts,
            images=pictures,
            padding=True,
            padding_side="right",
            add_special_tokens=False,
            return_tensors="pt",
            do_rescale=False,
        ).to(self.model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        outputs = self.model.model(**inputs, output_hidden_states=True, use_cache=False)
        hidden, mask = outputs.hidden_states[self.hidden_layer], inputs["attention_mask"]
        return self._without_system_turn(hidden, mask, examples)

    def _without_system_turn(
        self, hidden: Tensor, mask: Tensor, examples: Sequence[EditExample]
    ) -> tuple[Tensor, Tensor]:
        lengths = mask.sum(1).tolist()
        starts = [self._system_length(example.reference_image is not None) for example in examples]
        kept = [hidden[i, start:length] for i, (start, length) in enumerate(zip(starts, lengths, strict=True))]
        tokens = torch.nn.utils.rnn.pad_sequence(kept, batch_first=True)
        valid = torch.arange(tokens.shape[1], device=mask.device) < torch.tensor(
            [len(row) for row in kept], device=mask.device
        ).unsqueeze(1)
        return tokens, valid.to(mask.dtype)

    def _system_length(self, with_reference: bool) -> int:
        system = self.reference_prompt if with_reference else self.edit_prompt
        text = self._template([{"role": "system", "content": system}], add_generation_prompt=False)
        return len(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _template(self, turns: list[dict], add_generation_prompt: bool) -> str:
        tokenizer = self.processor.tokenizer
        template = tokenizer.chat_template or self.processor.chat_template
        return tokenizer.apply_chat_template(
            turns, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def _pictures(self, example: EditExample) -> list[Tensor]:
        pictures = [example.source[0]]
        if example.reference_image is not None:
            pictures.append(example.reference_image[0])
        return [picture.clamp(0, 1).cpu() for picture in pictures]
