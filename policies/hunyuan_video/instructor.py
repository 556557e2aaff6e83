"""The VLM instructor: LLaVA's hidden states over instruction, source frames and optional reference image."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from importlib.resources import files

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from editrl.data import EditExample
from editrl.errors import EditrlError, did_you_mean

PROMPTS = files(__package__) / "prompts"
FRAMES = ("none", "first", "first_middle_last")
"""Named choices of the source frames that the instructor sees; a number N means N frames, evenly spaced."""


class Instructor:
    """A frozen LLaVA that turns an edit request into visually grounded tokens.

    The chat template of the processor's tokenizer lays out the conversation; what the system turn says is text that a
    recipe can replace. The system turn is cropped from the result, since it is the same for every request.

    Args:
        model, processor: the VLM and its processor (image size, chat template, image token).
        hidden_layer: which entry of `hidden_states` is taken. HunyuanVideo was trained on -3; the paper's wording
            ("last layer") is -1.
        frames: source frames that it sees: "first", "first_middle_last", a number of evenly spaced ones, or "none",
            for which it sees no picture at all, the reference included (the ablation without visual grounding). An
            object that appears later in a clip is not in its first frame.
        edit_prompt, reference_prompt, text_prompt: system turns without and with a reference image, and without
            pictures.
    """

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        processor: LlavaProcessor,
        *,
        hidden_layer: int = -3,
        frames: str | int = "first",
        edit_prompt: str | None = None,
        reference_prompt: str | None = None,
        text_prompt: str | None = None,
    ):
        self.model = model.eval().requires_grad_(False)
        self.processor = processor
        settings = instructor_settings(hidden_layer, frames, edit_prompt, reference_prompt, text_prompt)
        self.hidden_layer, self.frames = hidden_layer, frames
        self.edit_prompt, self.reference_prompt = settings["edit_prompt"], settings["reference_prompt"]
        self.text_prompt = settings["text_prompt"]
        layers = model.config.text_config.num_hidden_layers + 1
        if not -layers <= hidden_layer < layers:
            raise EditrlError(f"hidden_layer is {hidden_layer}, but the instructor has {layers} hidden states")
        if processor.tokenizer.chat_template is None and processor.chat_template is None:
            raise EditrlError("the instructor's tokenizer has no chat template; add chat_template.jinja to its folder")

    def settings(self) -> dict:
        """The keyword arguments that make an equal instructor of the same model."""
        return {name: getattr(self, name) for name in inspect.signature(instructor_settings).parameters}

    @property
    def width(self) -> int:
        """Size of a token."""
        return self.model.config.text_config.hidden_size

    def prompt(self, example: EditExample, instruction: str | None) -> str:
        """The conversation as text, one image placeholder a picture; without an instruction, of the pictures alone."""
        slots = [self.processor.image_token] * len(self._pictures(example))
        turns = [
            {"role": "system", "content": self._system(example)},
            {"role": "user", "content": "\n".join([*slots, instruction or ""])},
        ]
        return self._template(turns, add_generation_prompt=True)

    @torch.no_grad()
    def __call__(
        self, examples: Sequence[EditExample], instructions: Sequence[str | None] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Hidden states [B,L,D] and their mask [B,L] (1 token, 0 padding at the end) for B examples.

        `instructions` replace those of the examples; None among them stands for no instruction at all.
        """
        instructions = [example.instruction for example in examples] if instructions is None else instructions
        texts = [self.prompt(*pair) for pair in zip(examples, instructions, strict=True)]
        pictures = [picture for example in examples for picture in self._pictures(example)]  # in placeholder order
        slots = sum(text.count(self.processor.image_token) for text in texts)
        if slots != len(pictures):
            raise EditrlError(
                f"the instructor's prompts have {slots} slots '{self.processor.image_token}' for {len(pictures)} "
                "pictures: its chat template drops or adds them, or an instruction contains one; give "
                "chat_template.jinja of a LLaVA model"
            )
        inputs = self.processor(
            text=texts,
            images=pictures or None,
            padding=True,
            padding_side="right",
            add_special_tokens=False,
            return_tensors="pt",
            **({"do_rescale": False} if pictures else {}),
        ).to(self.model.device)
        if pictures:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        outputs = self.model.model(**inputs, output_hidden_states=True, use_cache=False)
        hidden, mask = outputs.hidden_states[self.hidden_layer], inputs["attention_mask"]
        return self._without_system_turn(hidden, mask, examples)

    def _without_system_turn(
        self, hidden: Tensor, mask: Tensor, examples: Sequence[EditExample]
    ) -> tuple[Tensor, Tensor]:
        lengths = mask.sum(1).tolist()
        starts = [self._system_length(self._system(example)) for example in examples]
        kept = [hidden[i, start:length] for i, (start, length) in enumerate(zip(starts, lengths, strict=True))]
        tokens = torch.nn.utils.rnn.pad_sequence(kept, batch_first=True)
        valid = torch.arange(tokens.shape[1], device=mask.device) < torch.tensor(
            [len(row) for row in kept], device=mask.device
        ).unsqueeze(1)
        return tokens, valid.to(mask.dtype)

    def _system(self, example: EditExample) -> str:
        if self.frames == "none":
            return self.text_prompt
        return self.edit_prompt if example.reference_image is None else self.reference_prompt

    def _system_length(self, system: str) -> int:
        text = self._template([{"role": "system", "content": system}], add_generation_prompt=False)
        return len(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _template(self, turns: list[dict], add_generation_prompt: bool) -> str:
        tokenizer = self.processor.tokenizer
        template = tokenizer.chat_template or self.processor.chat_template
        return tokenizer.apply_chat_template(
            turns, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def _pictures(self, example: EditExample) -> list[Tensor]:
        """Source frames, then the reference image: [3,H,W] each."""
        if self.frames == "none":
            return []
        pictures = [example.source[index] for index in shown_frames(len(example.source), self.frames)]
        if example.reference_image is not None:
            pictures.append(example.reference_image[0])
        return [picture.clamp(0, 1).cpu() for picture in pictures]


def instructor_settings(
    hidden_layer: int = -3,
    frames: str | int = "first",
    edit_prompt: str | None = None,
    reference_prompt: str | None = None,
    text_prompt: str | None = None,
) -> dict:
    """Every setting of an `Instructor`, defaults filled in; known without the VLM."""
    return {
        "hidden_layer": hidden_layer,
        "frames": _checked_frames(frames),
        "edit_prompt": edit_prompt or _prompt("edit"),
        "reference_prompt": reference_prompt or _prompt("reference"),
        "text_prompt": text_prompt or _prompt("text"),
    }


def shown_frames(length: int, frames: str | int) -> list[int]:
    """Which of `length` frames the instructor sees; none twice, so an image is shown once."""
    number = {"first": 1, "first_middle_last": 3}.get(frames, frames)
    if number == 1:
        return [0]
    return list(dict.fromkeys(round(k * (length - 1) / (number - 1)) for k in range(number)))


def _checked_frames(frames: str | int) -> str | int:
    if frames in FRAMES or (isinstance(frames, int) and not isinstance(frames, bool) and frames >= 1):
        return frames
    raise EditrlError(
        f"the instructor's frames are {frames!r}; use {', '.join(FRAMES)} or a number of at least 1."
        + did_you_mean(str(frames), FRAMES)
    )


def _prompt(name: str) -> str:
    return (PROMPTS / f"{name}.txt").read_text().strip()
