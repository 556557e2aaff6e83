"""The tiny CLIP of the rewards, and the PickScore-type CLIP that is tuned from it on preferences."""

import math
import random

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, normalize
from torchvision.transforms.functional import gaussian_blur
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from editrl.recipes.shapes.pretrain.common import Options, optimise, save, scenes
from editrl.recipes.shapes.pretrain.tokenizers import TEXT_LENGTH, clip_tokenizer
from editrl.recipes.shapes.world import RESOLUTION, EditScene, hard_negatives, render_scenes

MEAN, STD = [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]
NEGATIVES = 6
POOL = 40_000  # scenes drawn before training


def build(tokenizer) -> CLIPModel:
    """The untrained model: two towers of width 96, patches of 4 pixels."""
    tower = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4}
    end, begin = tokenizer.eos_token_id, tokenizer.bos_token_id
    return CLIPModel(
        CLIPConfig(
            text_config=tower
            | {
                "vocab_size": len(tokenizer),
                "max_position_embeddings": TEXT_LENGTH,
                "eos_token_id": end,
                "bos_token_id": begin,
                "pad_token_id": end,
                "projection_dim": 64,
            },
            vision_config=tower | {"image_size": RESOLUTION, "patch_size": 4, "projection_dim": 64},
            projection_dim=64,
        )
    )


def processor() -> CLIPImageProcessor:
    """Takes frames as they are, scaled to [-1,1]."""
    return CLIPImageProcessor(
        size={"shortest_edge": RESOLUTION},
        crop_size={"height": RESOLUTION, "width": RESOLUTION},
        image_mean=MEAN,
        image_std=STD,
    )


class Pool:
    """Scenes with their pixels and tokens on the device: the caption of the target, and captions that are wrong."""

    def __init__(self, drawn: list[EditScene], tokenizer, device: torch.device, seed: int):
        rng = random.Random(seed)
        wrong = [(hard_negatives(scene, rng) * NEGATIVES)[:NEGATIVES] for scene in drawn]
        captions = [
            caption for scene, row in zip(drawn, wrong, strict=True) for caption in (scene.target_caption, *row)
        ]
        self.tokens = tokenise(tokenizer, captions, device).unflatten(0, (len(drawn), 1 + NEGATIVES))
        clips = render_scenes(drawn, device)
        self.source, self.target = clips["source"], clips["target"]

    def __len__(self) -> int:
        return len(self.tokens)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Source and target frame (the same random one) in [0,1], and captions [count, 1+NEGATIVES, L]."""
        device = self.tokens.device
        index = torch.randint(len(self), (count,), generator=generator, device=device)
        frame = torch.randint(self.target.shape[1], (count,), generator=generator, device=device)
        return self.source[index, frame] / 255, self.target[index, frame] / 255, self.tokens[index]


def tokenise(tokenizer, texts: list[str], device: torch.device) -> Tensor:
    """Token ids [N, TEXT_LENGTH]."""
    encoded = tokenizer(texts, padding="max_length", truncation=True, max_length=TEXT_LENGTH, return_tensors="pt")
    return encoded.input_ids.to(device)


def embed_frames(model: CLIPModel, frames: Tensor) -> Tensor:
    """Frames [N,3,H,W] in [0,1] -> unit vectors [N,D]."""
    pixels = (frames - MEAN[0]) / STD[0]
    return normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)


def embed_tokens(model: CLIPModel, tokens: Tensor) -> Tensor:
    """Token ids [..., L] -> unit vectors [..., D]."""
    flat = model.get_text_features(input_ids=tokens.flatten(0, -2)).pooler_output
    return normalize(flat, dim=-1).unflatten(0, tokens.shape[:-1])


def train_clip(options: Options) -> dict[str, float]:
    """Contrastive training against the other captions of the batch and against captions wrong in one attribute."""
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    tokenizer = clip_tokenizer()
    model = build(tokenizer).to(device)
    pool = Pool(scenes(POOL, options.seed), tokenizer, device, options.seed)
    generator = torch.Generator(device).manual_seed(options.seed)

    def loss_of_step(step: int) -> Tensor:
        _, frames, tokens = pool.draw(options.batch_size, generator)
        images = embed_frames(model, degrade(frames, 0.3 * torch.rand(len(frames), device=device, generator=generator)))
        texts = embed_tokens(model, tokens)
        scale = model.logit_scale.clamp(max=math.log(50)).exp()
        own = torch.arange(len(frames), device=device)
        to_text = scale * images @ torch.cat([texts[:, 0], texts[:, 1:].flatten(0, 1)]).T
        return cross_entropy(to_text, own) + 0.5 * cross_entropy(to_text[:, : len(frames)].T, own)

    seconds = optimise(model, options, loss_of_step, "clip")
    model.half().float()
    quality = {"retrieval_at_64": round(retrieval(model, tokenizer, device), 4)}
    save(options.out, {"": model, ".": tokenizer, "./": processor()}, options, seconds, quality)
    return quality


@torch.no_grad()
def retrieval(model: CLIPModel, tokenizer, device: torch.device, count: int = 2048) -> float:
    """How often the right caption is first among 64: itself, 6 hard negatives and 57 captions of other scenes."""
    pool = Pool(scenes(count, seed=10**6, split="heldout"), tokenizer, device, seed=1)
    images = torch.cat([embed_frames(model, part[:, 2] / 255) for part in pool.target.split(512)])
    texts = torch.cat([embed_tokens(model, part) for part in pool.tokens.split(256)])
    own = torch.einsum("nd,nkd->nk", images, texts)
    generator = torch.Generator().manual_seed(0)
    offsets = torch.stack([torch.randperm(count - 1, generator=generator)[:57] for _ in range(count)]) + 1
    others = (torch.arange(count).unsqueeze(1) + offsets) % count
    strangers = torch.einsum("nd,nkd->nk", images, texts[others.to(device), 0])
    best_wrong = torch.cat([own[:, 1:], strangers], 1).amax(1)
    return (own[:, 0] > best_wrong).float().mean().item()


# What people reject, each by a severity in [0,1]: noise, blur, a wrong tint, blocks, another picture shining through.


def degrade(frames: Tensor, severity: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Frames [N,3,H,W] in [0,1] with a random defect each, as strong as severity [N]; 0 leaves them as they are."""
    amount = severity.view(-1, 1, 1, 1)
    noise = torch.randn(frames.shape, device=frames.device, generator=generator)
    tint = torch.randn((len(frames), 3, 1, 1), device=frames.device, generator=generator)
    coarse = torch.nn.functional.avg_pool2d(frames, 4).repeat_interleave(4, -1).repeat_interleave(4, -2)
    options = torch.stack(
        [
            frames + 0.4 * amount * noise,
            torch.lerp(frames, gaussian_blur(frames, [9, 9], [2.5, 2.5]), amount.clamp(max=1)),
            frames + 0.3 * amount * tint,
            torch.lerp(frames, coarse, amount),
            torch.lerp(frames, frames.roll(1, 0), 0.5 * amount),
        ]
    )
    chosen = torch.randint(len(options), (len(frames),), device=frames.device, generator=generator)
    return options[chosen, torch.arange(len(frames), device=frames.device)].clamp(0, 1)


def preference_pairs(pool: Pool, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Preferred frame, rejected frame, caption tokens: a clean picture against a defect, a slight defect against a
    strong one, or the wanted picture against the unedited one."""
    source, target, tokens = pool.draw(count, generator)
    device = source.device
    strong = 0.3 + 0.7 * torch.rand(count, device=device, generator=generator)
    slight = strong * (torch.rand(count, device=device, generator=generator) - 0.5).clamp(min=0)
    rejected = degrade(target, strong, generator)
    unedited = torch.rand(count, device=device, generator=generator) < 1 / 3
    rejected[unedited] = degrade(source, slight, generator)[unedited]
    return degrade(target, slight, generator), rejected, tokens[:, 0]


def train_pickscore(options: Options, clip_folder) -> dict[str, float]:
    """PickScore's recipe: a CLIP, tuned so that softmax over two scores gives the preference."""
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    tokenizer = clip_tokenizer()
    model = CLIPModel.from_pretrained(clip_folder, dtype=torch.float32).to(device)
    pool = Pool(scenes(POOL, options.seed + 1), tokenizer, device, options.seed)
    generator = torch.Generator(device).manual_seed(options.seed)

    def loss_of_step(step: int) -> Tensor:
        preferred, rejected, tokens = preference_pairs(pool, options.batch_size, generator)
        return -logsigmoid(_score_difference(model, preferred, rejected, tokens)).mean()

    seconds = optimise(model, options, loss_of_step, "pickscore")
    model.half().float()
    held_out = Pool(scenes(4096, seed=10**6, split="heldout"), tokenizer, device, seed=1)
    with torch.no_grad():
        pairs = preference_pairs(held_out, 4096, torch.Generator(device).manual_seed(1))
        accuracy = (_score_difference(model, *pairs) > 0).float().mean().item()
    quality = {"preference_accuracy": round(accuracy, 4)}
    save(options.out, {"": model, ".": tokenizer, "./": processor()}, options, seconds, quality)
    return quality


def _score_difference(model: CLIPModel, preferred: Tensor, rejected: Tensor, tokens: Tensor) -> Tensor:
    texts = embed_tokens(model, tokens)
    cosines = [(embed_frames(model, frames) * texts).sum(-1) for frames in (preferred, rejected)]
    return model.logit_scale.clamp(max=math.log(50)).exp() * (cosines[0] - cosines[1])
