"""`editrl plan`: predictions beside what was measured, and what a person sees."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from editrl.benchmarks.throughput.steps import LAYERS
from editrl.cli import main
from editrl.policies.hunyuan_video.policy import HunyuanVideoPolicy
from editrl.policy import FlowPolicy
from editrl.recipes.shapes import WEIGHTS
from editrl.speed import H200, Work, activation_gib, forward_seconds, repeated_blocks, training_seconds

MEASURED = Path(__file__).parents[2] / "benchmarks" / "results" / "throughput" / "steps-full-h200.json"


@pytest.fixture(scope="module")
def figures() -> dict:
    return json.loads(MEASURED.read_text())["figures"]


@pytest.fixture(scope="module")
def works() -> tuple[Work, Work]:
    """Of the 13B at 33 frames of 480x832: the base alone, and with the benchmark's LoRA."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        model, inputs, source = HunyuanVideoPolicy.sketch("nowhere", 33, 480, 832)
        assert "HunyuanVideo-13B" in source
        model.requires_grad_(False)
        base = Work.of(repeated_blocks(model), inputs(torch.bfloat16))
        model = get_peft_model(model, LoraConfig(r=64, target_modules=LAYERS), autocast_adapter_dtype=False)
        return base, Work.of(repeated_blocks(model), inputs(torch.bfloat16))
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_counted_operations_are_those_of_the_formula(works):
    """Products 2 * 12 D^2 a token and block, attention 4 S^2 D a block (facts of the architecture)."""
    tokens, width = 9 * 30 * 52 + 600, 3072
    assert works[0].products == pytest.approx(60 * 24 * width**2 * tokens, rel=0.01)
    assert works[0].attention == 60 * 4 * tokens**2 * width


def test_predicted_seconds_are_within_15_percent_of_those_measured(works, figures):
    base, lora = works
    predicted = {
        "rollout: no mask": forward_seconds(lora, H200, compiled=False),
        "rollout: compiled": forward_seconds(lora, H200, compiled=True),
        "rollout: compiled, merged adapter": forward_seconds(base, H200, compiled=True),
        "training: no mask, checkpointed": training_seconds(lora, H200, compiled=False, level="none"),
        "training: compiled, at most 44 GiB": training_seconds(lora, H200, compiled=True, level="attention"),
        "training: compiled, activation_memory auto": training_seconds(lora, H200, compiled=True, level="all"),
    }
    for name, seconds in predicted.items():
        assert seconds == pytest.approx(figures[name]["seconds"], rel=0.15), name


def test_predicted_memory_is_within_15_percent_of_that_measured(works, figures):
    """Beside the activations: bfloat16 weights of the base (23.9 GiB), float32 adapters and their gradients (1.3)."""
    for name, level in (
        ("training: no mask, checkpointed", "none"),
        ("training: compiled, at most 44 GiB", "attention"),
        ("training: compiled, activation_memory auto", "all"),
    ):
        assert 23.9 + 1.3 + activation_gib(works[1], level) == pytest.approx(figures[name]["peak_gib"], rel=0.15), name


def planned(capsys, *options, code=0):
    argv = ["plan", "--config", "viva/grpo", "--model_name_or_path", "nowhere/nothing", "--json", "true", *options]
    assert main(argv) == code
    return json.loads(capsys.readouterr().out)


def test_a_recipe_is_planned_without_weights(capsys):
    plan = planned(capsys, "--gpus", "8", "--gpu_memory", "80")
    rows = {(row["deepspeed"], row["activations"]): row for row in plan["rows"]}
    assert len(rows) == 3 * 4 + 1
    for stage in ("none", "zero1", "zero2"):
        kept = [rows[stage, level] for level in ("none", "attention", "hidden", "all")]
        assert [row["training_gib"] for row in kept] == sorted(row["training_gib"] for row in kept)
        assert [row["training_step_seconds"] for row in kept] == sorted(
            (row["training_step_seconds"] for row in kept), reverse=True
        )
    weights = 24
    assert rows["zero2", "none"]["training_gib"] - rows["zero3", "none"]["training_gib"] == pytest.approx(
        weights * 7 / 8, abs=0.5
    )
    best = min((row for row in plan["rows"] if row["fits"]), key=lambda row: row["update_seconds"])
    stage = {"none": "null"}.get(best["deepspeed"], best["deepspeed"])
    assert f"--deepspeed {stage}, activations '{best['activations']}'" in plan["notes"][-1]


def test_switches_change_the_prediction(capsys):
    def update(*options) -> float:
        plan = planned(capsys, "--gpu_memory", "140", *options)
        return next(row["update_seconds"] for row in plan["rows"] if row["deepspeed"] == "none")

    compiled = update()
    plain = update("--compile_blocks", "false")
    assert compiled < 0.8 * plain
    assert update("--tflops", str(719 / 2)) == pytest.approx(2 * compiled, rel=0.01)
    assert update("--compile_vae", "false") > compiled


def test_nothing_fits_on_a_small_gpu(capsys):
    plan = planned(capsys, "--gpu_memory", "16", code=1)
    assert not any(row["fits"] for row in plan["rows"])
    assert plan["notes"][-1].startswith("nothing fits: smaller clips")


def test_the_shapes_of_an_editor_s_folder_are_used(capsys):
    plan = planned(capsys, "--model_name_or_path", str(WEIGHTS / "sft"), "--gpus", "1")
    assert plan["notes"][0].startswith(f"shapes: {WEIGHTS / 'sft'}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_frames", "32"], "give 4k+1 frames"),
        (["--width", "830"], "multiples of 16"),
        (["--gpus", "0"], "gpus must be above 0"),
        (["--use_peft", "false"], "knows what LoRA takes"),
        (["--fp8_base", "true"], "has no rates for fp8_base"),
        (["--deepspeed", "zero3_offload"], "has no rates for offloading"),
    ],
)
def test_what_cannot_be_planned_says_why(capsys, options, message):
    assert main(["plan", "--config", "viva/grpo", "--model_name_or_path", "nowhere/nothing", *options]) == 2
    assert message in capsys.readouterr().err


def test_clips_of_any_size_cannot_be_planned(capsys):
    assert main(["plan", "--config", "shapes/grpo"]) == 2
    assert "give num_frames, height and width" in capsys.readouterr().err


def test_a_policy_without_shapes_says_what_to_write():
    with pytest.raises(ValueError, match="has no sketch"):
        FlowPolicy.sketch("path", 1, 16, 16)


@pytest.mark.parametrize(
    ("variant", "stage", "level", "one_pass"),
    [
        ("ours", "none", "all", True),
        ("ours, zero2 on 2", "zero2", "all", True),
        ("ours, replayed, zero2 on 2", "zero2", "all", False),
        ("ours, replayed, zero3 on 2", "zero3", "none", False),
    ],
)
def test_predicted_updates_are_within_15_percent_of_those_measured(capsys, variant, stage, level, one_pass):
    """Whole steps of `benchmarks/throughput/grpo.py` on one GPU and on two: seconds, and the peak of memory."""
    measured = json.loads(MEASURED.with_name("grpo-full-h200.json").read_text())["variants"][variant]
    options = {
        "gpus": measured["processes"],
        "gpu_memory": 140,
        "num_generations": measured["clips"],
        "sde_window_size": 4,
        "num_inference_steps": measured["inference_steps"],
        "gradient_accumulation_steps": 4 * measured["clips"],
        "steps_per_generation": 4 * measured["clips"],
        "beta": 0,
        "video_steps": 0,
        "save_strategy": "no",
        "one_pass": one_pass,
        "merge_adapter": True,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    words += ["--lora_target_modules", "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"]
    words += ["to_add_out", "proj_mlp", "proj_out", "net.0.proj", "net.2"]
    rows = {(row["deepspeed"], row["activations"]): row for row in planned(capsys, *words)["rows"]}
    row = rows[stage, level]
    assert row["fits"]
    assert row["update_seconds"] == pytest.approx(measured["seconds"], rel=0.15)
    assert max(row["rollout_gib"], row["training_gib"]) == pytest.approx(measured["peak_gib"], rel=0.15)
