"""The tiny `LlavaForConditionalGeneration`: it answers an edit request with the captions before and after."""

import torch
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from editrl.data import EditDataset
from editrl.policies.hunyuan_video.instructor import Instructor
from editrl.recipes.shapes.dataset import rows
from editrl.recipes.shapes.pretrain.common import Options, optimise, save, scenes
from editrl.recipes.shapes.pretrain.tokenizers import vlm_tokenizer
from editrl.recipes.shapes.world import COLOURS, FORMS, RESOLUTION, EditScene, render_scenes, slot_states

PATCH = 8
IMAGE_TOKENS = (RESOLUTION // PATCH) ** 2
EDIT_PROMPT, REFERENCE_PROMPT = "change the image", "change the image with the reference"
POOL = 40_000


def build() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The untrained model and its processor."""
    tokenizer = vlm_tokenizer()
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    processor = LlavaProcessor(
        CLIPImageProcessor(
            size={"shortest_edge": RESOLUTION},
            crop_size={"height": RESOLUTION, "width": RESOLUTION},
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=RESOLUTION,
            patch_size=PATCH,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=256,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_index=image_token,
    )
    return LlavaForConditionalGeneration(config), processor


def instructor(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> Instructor:
    """As the shapes editors use it."""
    return Instructor(model, processor, edit_prompt=EDIT_PROMPT, reference_prompt=REFERENCE_PROMPT)


def train(options: Options, processor_folder) -> dict[str, float]:
    """Next-token prediction on the answer."""
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    model, processor = build()
    asked = instructor(model, processor)
    model.to(device).requires_grad_(True).train()
    drawn = scenes(POOL, options.seed)
    tokens, labels = _conversations(asked, drawn)
    tokens, labels = tokens.to(device), labels.to(device)
    clips = render_scenes(drawn, device)
    pictures = torch.stack([clips["source"][:, 0], clips["reference"]], 1)  # [N,2,3,H,W]
    shown = torch.tensor([[True, scene.reference is not None] for scene in drawn], device=device)
    pad = processor.tokenizer.pad_token_id
    generator = torch.Generator(device).manual_seed(options.seed)

    def loss_of_step(step: int) -> Tensor:
        index = torch.randint(len(drawn), (options.batch_size,), generator=generator, device=device)
        pixels = pictures[index][shown[index]] / 127.5 - 1
        batch = tokens[index]
        return model(
            input_ids=batch, pixel_values=pixels, attention_mask=(batch != pad).long(), labels=labels[index]
        ).loss

    seconds = optimise(model, options, loss_of_step, "vlm")
    model.half().float().eval()
    quality = {"first_frame_readable": round(probe(instructor(model, processor)), 4)}
    save(processor_folder, {"": processor}, options, seconds, {})
    save(options.out, {"": model}, options, seconds, quality)
    return quality


def _conversations(asked: Instructor, drawn: list[EditScene]) -> tuple[Tensor, Tensor]:
    """Token ids of prompt and answer [N,L], and labels that are -100 outside the answer."""
    examples = EditDataset(rows(drawn))
    tokenizer = asked.processor.tokenizer
    prompts = [asked.prompt(examples[i]).replace("<image>", "<image>" * IMAGE_TOKENS) for i in range(len(drawn))]
    answers = [f"{scene.source_caption} into {scene.target_caption}<|end|>" for scene in drawn]
    whole = tokenizer(
        [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)],
        padding=True,
        padding_side="right",
        add_special_tokens=False,
        return_tensors="pt",
    ).input_ids
    lengths = torch.tensor([len(ids) for ids in tokenizer(prompts, add_special_tokens=False).input_ids])
    in_prompt = torch.arange(whole.shape[1]) < lengths.unsqueeze(1)
    return whole, whole.masked_fill(in_prompt | (whole == tokenizer.pad_token_id), -100)


@torch.no_grad()
def probe(asked: Instructor, train_count: int = 3000, test_count: int = 1000) -> float:
    """Whether the first frame can be read from the hidden states that the editor gets.

    A least-squares classifier per quadrant, from the states of its four image tokens to its object (3 forms x 6 colours
    or empty). Returns the share of right answers on scenes it was not fitted on.
    """
    drawn = scenes(train_count + test_count, seed=10**6, split="all")
    examples = EditDataset(rows(drawn))
    features = []
    for start in range(0, len(drawn), 250):
        part = [examples[i] for i in range(start, min(start + 250, len(drawn)))]
        states, _ = asked(part)
        # After the cropped system turn come the user tag and then the image, row by row.
        grid = states[:, 1 : 1 + IMAGE_TOKENS].float().cpu().unflatten(1, (2, 2, 2, 2))
        features.append(grid.permute(0, 1, 3, 2, 4, 5).flatten(1, 2).flatten(2))  # [B,4 quadrants,4 tokens * D]
    features = torch.cat(features)
    objects = slot_states([scene.objects for scene in drawn])
    identity = torch.where(objects[..., 0] == 0, 0, 1 + (objects[..., 0] - 1) * len(COLOURS) + objects[..., 1])
    one_hot = torch.nn.functional.one_hot(identity, 1 + len(FORMS) * len(COLOURS)).float()
    right = []
    for quadrant in range(4):
        x = torch.nn.functional.pad(features[:, quadrant], (0, 1), value=1.0).double()
        y = one_hot[:, quadrant].double()
        gram = x[:train_count].T @ x[:train_count] + 1e-2 * torch.eye(x.shape[1], dtype=torch.float64)
        weights = torch.linalg.solve(gram, x[:train_count].T @ y[:train_count])
        right.append((x[train_count:] @ weights).argmax(1) == identity[train_count:, quadrant])
    return torch.stack(right).float().mean().item()
