"""The tiny `AutoencoderKLHunyuanVideo`: 4x8x8, 16 channels, 1.8 M parameters."""

import math
from pathlib import Path

import torch
from diffusers import AutoencoderKLHunyuanVideo
from torch import Tensor
from torch.nn.functional import mse_loss

from editrl.recipes.shapes.pretrain.common import Options, optimise, save, scenes
from editrl.recipes.shapes.world import (
    BACKGROUNDS,
    COLOURS,
    FORMS,
    SIZES,
    VELOCITIES,
    render_scenes,
    render_states,
)

KL_WEIGHT = 1e-4


def build() -> AutoencoderKLHunyuanVideo:
    """The untrained model.

    Few normalisation groups: in a group of one channel a plain background has no variance, and gradients explode.
    The posterior starts narrow, or its noise would hide the signal.
    """
    vae = AutoencoderKLHunyuanVideo(
        block_out_channels=(8, 16, 40, 56), layers_per_block=1, norm_num_groups=2, scaling_factor=1.0
    )
    channels = vae.config.latent_channels
    with torch.no_grad():
        vae.quant_conv.weight[channels:] *= 0.1
        vae.quant_conv.bias[channels:] = -4.0
    return vae


def random_clips(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Random scenes drawn as index tensors on the device: float32 [count,3,F,H,W] in [-1,1]."""

    def draw(options: int, *shape: int) -> Tensor:
        return torch.randint(options, shape, generator=generator, device=device)

    present = torch.rand(count, 4, generator=generator, device=device) < 0.5
    form = (draw(len(FORMS), count, 4) + 1) * present
    looks = [draw(len(COLOURS), count, 4), draw(len(SIZES), count, 4)]
    motion = [draw(len(VELOCITIES), count, 4) for _ in "xy"]
    states = torch.stack([form, *looks, *motion], dim=-1)
    return as_input(render_states(states, draw(len(BACKGROUNDS), count)))


def as_input(clips: Tensor) -> Tensor:
    """uint8 [N,F,3,H,W] -> float32 [N,3,F,H,W] in [-1,1]."""
    return clips.float().permute(0, 2, 1, 3, 4) / 127.5 - 1


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKLHunyuanVideo, clips: Tensor) -> float:
    """PSNR in dB of decode(mode(encode)) over all pixels of clips [N,3,F,H,W]."""
    errors = []
    for part in clips.split(128):
        decoded = vae.decode(vae.encode(part).latent_dist.mode()).sample.clamp(-1, 1)
        errors.append(mse_loss(decoded, part, reduction="none").mean((1, 2, 3, 4)) / 4)
    return -10 * math.log10(torch.cat(errors).mean().item())


def train(options: Options, start: Path | None = None) -> dict[str, float]:
    """Reconstruction plus a light KL, then the scaling factor that gives the latents unit variance.

    With `start`, a folder of saved weights is trained on.
    """
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    generator = torch.Generator(device).manual_seed(options.seed)
    vae = build() if start is None else AutoencoderKLHunyuanVideo.from_pretrained(start, torch_dtype=torch.float32)
    vae.to(device).train()

    def loss_of_step(step: int) -> Tensor:
        clips = random_clips(options.batch_size, generator, device)
        posterior = vae.encode(clips).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        return mse_loss(decoded, clips) + KL_WEIGHT * kl

    seconds = optimise(vae, options, loss_of_step, "vae")
    clips = as_input(render_scenes(scenes(1024, seed=10**6, split="heldout"), device)["target"])
    vae.half().float()  # judged as it is saved
    latents = torch.cat([vae.encode(part).latent_dist.mode() for part in clips.split(128)]).detach()
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    quality = {"reconstruction_psnr_db": round(reconstruction_psnr(vae, clips), 2)}
    save(options.out, {"": vae}, options, seconds, quality)
    return quality
