"""The two SFT checkpoints: an ordinary one, stopped early, and one with the typical flaw of synthetic pairs."""

import json
import tempfile
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKLHunyuanVideo
from transformers import (
    AutoTokenizer,
    CLIPTextModel,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    TrainerCallback,
)

from editrl.data import EditDataset
from editrl.policies.hunyuan_video.policy import SETTINGS_FILE, HunyuanVideoPolicy
from editrl.policies.hunyuan_video.transformer import HunyuanVideoEditTransformer3DModel
from editrl.recipes.shapes.dataset import rows
from editrl.recipes.shapes.oracle import score
from editrl.recipes.shapes.pretrain.common import Options, save
from editrl.recipes.shapes.pretrain.vlm import instructor
from editrl.recipes.shapes.world import sample_scenes
from editrl.rollout import edit_examples
from editrl.trainers import FlowSFTConfig, FlowSFTTrainer

SHIFT = 3.0
STEPS_OF_ODE = 8
PAIRS = 10_000
EVALUATED = 512
EVALUATION_SEED = 2 * 10**6


def untrained(weights: Path, seed: int) -> HunyuanVideoPolicy:
    """A policy of the pretrained frozen parts and a random transformer (1.8 M parameters)."""
    torch.manual_seed(seed)
    vlm = LlavaForConditionalGeneration.from_pretrained(weights / "sft" / "vlm", dtype=torch.float32)
    processor = LlavaProcessor.from_pretrained(weights / "sft" / "processor")
    text_encoder = CLIPTextModel.from_pretrained(weights / "clip", dtype=torch.float32)
    transformer = HunyuanVideoEditTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=vlm.config.text_config.hidden_size,
        pooled_projection_dim=text_encoder.config.hidden_size,
        rope_axes_dim=(8, 12, 12),
    )
    return HunyuanVideoPolicy(
        transformer,
        AutoencoderKLHunyuanVideo.from_pretrained(weights / "sft" / "vae", torch_dtype=torch.float32),
        instructor(vlm, processor),
        text_encoder,
        AutoTokenizer.from_pretrained(weights / "clip"),
        reference_position="none",  # a small world: the instructor's picture of it is enough
        flow_shift=3.0,
    )


def judge(policy: HunyuanVideoPolicy, transformer, device: str, count: int = EVALUATED) -> dict[str, float]:
    """Oracle success and preservation on held-out scenes, fixed noise."""
    drawn = sample_scenes(count, EVALUATION_SEED, "heldout")
    dataset = EditDataset(rows(drawn))
    videos = edit_examples(
        policy,
        transformer,
        [dataset[i] for i in range(count)],
        num_inference_steps=STEPS_OF_ODE,
        shift=SHIFT,
        noise_keys=[(EVALUATION_SEED, i) for i in range(count)],
        batch_size=256,
    )
    scores = score(torch.stack(videos), drawn)
    return {
        "oracle_success": round(scores["success"].float().mean().item(), 4),
        "preservation_db": round(scores["preservation_psnr"].mean().item(), 2),
    }


class StopEarly(TrainerCallback):
    """Judges every 100 steps, and ends the training as soon as half of the edits succeed."""

    def __init__(self, policy: HunyuanVideoPolicy, device: str):
        self.policy, self.device = policy, device

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % 100:
            return
        quality = judge(self.policy, model.eval(), self.device)
        print(f"step {state.global_step}: {quality}", flush=True)
        if quality["oracle_success"] >= 0.5:
            control.should_training_stop = True


def train(options: Options, weights: Path, underediting: float) -> dict[str, float]:
    """SFT of the shapes editor.

    With `underediting` = 0 a random transformer is trained, and stopped early; otherwise the checkpoint `sft` is
    trained on for some steps, with that share of the targets replaced by the unedited source.
    """
    policy = untrained(weights, options.seed)
    if underediting:
        policy.transformer = HunyuanVideoEditTransformer3DModel.from_pretrained(
            weights / "sft" / "transformer", torch_dtype=torch.float32
        )
    policy.to(options.device)
    drawn = sample_scenes(PAIRS, options.seed + (1 if underediting else 0), "train")
    args = FlowSFTConfig(
        output_dir=tempfile.mkdtemp(),  # nothing is saved there
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=50,
        weight_decay=0.0,
        shift=SHIFT,
        mask_weight=2.0,
        cache_conditions=True,
        save_strategy="no",
        report_to="none",
        logging_steps=50,
        disable_tqdm=True,
        seed=options.seed,
        use_cpu=options.device == "cpu",
    )
    callbacks = [] if underediting else [StopEarly(policy, options.device)]
    trainer = FlowSFTTrainer(policy, args, EditDataset(rows(drawn, underediting=underediting)), callbacks=callbacks)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    policy.transformer.half().float()  # judged as it is saved
    quality = judge(policy, policy.transformer, options.device) | {"steps": trainer.state.global_step}
    if underediting:
        save(options.out, {"": policy.transformer}, options, seconds, quality)
    else:
        save(options.out / "transformer", {"": policy.transformer}, options, seconds, quality)
        save(options.out / "text_encoder_2", {"": policy.text_encoder}, options, seconds, {})
        policy.tokenizer.save_pretrained(options.out / "tokenizer_2")
        (options.out / SETTINGS_FILE).write_text(json.dumps(policy.settings(), indent=2) + "\n")
    return quality
