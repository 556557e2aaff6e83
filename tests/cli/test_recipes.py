"""Every packaged recipe becomes the arguments of its command, says what it is, and names the licence of its weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from editrl.cli.recipes import packaged_recipes, summary

pytestmark = pytest.mark.slow
RECIPES = packaged_recipes()
VIVA = [name for name in RECIPES if name.startswith("viva/")]

PARSE = """
import json, sys
from editrl.cli.arguments import DataArguments, PolicyArguments, RewardArguments
from editrl.cli.config import parse_config
from editrl.trainers import FlowGRPOConfig, FlowSFTConfig
types = {
    "grpo": (PolicyArguments, DataArguments, RewardArguments, FlowGRPOConfig),
    "sft": (PolicyArguments, DataArguments, FlowSFTConfig),
}
parsed = {}
for name in sys.argv[1:]:
    command = name.partition("/")[2].partition("-")[0]
    # Paths need not exist; --use_cpu because bf16 asks for a GPU where there is none.
    words = ["--config", name, "--output_dir", "nowhere", "--use_cpu", "true"]
    parts = parse_config(types[command], words, command)
    parsed[name] = {key: value for part in parts for key, value in vars(part).items()}
print(json.dumps(parsed, default=str))
"""


@pytest.fixture(scope="module")
def parsed() -> dict[str, dict]:
    """Recipe -> field -> value. In a process of its own: a DeepSpeed configuration is remembered by its process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", PARSE, *RECIPES]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_stands_in_the_readme(name):
    assert f"`{name}`" in (Path(__file__).parents[2] / "recipes" / "README.md").read_text()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_parses_and_says_what_it_is(name, parsed):
    assert parsed[name]["policy"] == "hunyuan_video"
    assert RECIPES[name].read_text().startswith("# ")
    assert 30 < len(summary(RECIPES[name])) <= 118


@pytest.mark.parametrize("name", VIVA)
def test_a_viva_recipe_names_the_licence_and_marks_its_values(name):
    text = RECIPES[name].read_text()
    for place in ("European Union", "United Kingdom", "South Korea"):
        assert place in text
    assert "[paper]" in text
    assert "[ours]" in text


@pytest.mark.parametrize("name", VIVA)
def test_a_viva_recipe_trains_the_13b_model_in_bfloat16_under_deepspeed(name, parsed):
    values = parsed[name]
    assert values["model_name_or_path"] == "hunyuanvideo-community/HunyuanVideo"
    assert values["policy_kwargs"]["hidden_layer"] == -3
    assert values["policy_kwargs"]["dtype"] == "bfloat16"
    assert values["bf16"]
    assert values["activation_memory"] == "auto" if name == "viva/grpo" else values["gradient_checkpointing"]
    assert values["deepspeed"]["zero_optimization"]["stage"] == (2 if name == "viva/grpo" else 3)
    assert values["use_peft"] == (name == "viva/grpo")


def test_viva_grpo_has_the_papers_rewards_and_steps(parsed):
    values = parsed["viva/grpo"]
    assert values["reward_funcs"] == ["clip_instruction", "clip_source_fidelity", "pickscore"]
    assert values["num_inference_steps"] == 20
    assert values["sde_kernel"] == "flow_sde"


def test_viva_grpo_makes_two_updates_a_rollout_whatever_the_number_of_gpus(parsed):
    values = parsed["viva/grpo"]
    assert values["steps_per_generation"] == 2 * values["gradient_accumulation_steps"]
    assert values["generation_batch_size"] == values["num_generations"] == 16  # of one process
    assert values["lora_alpha"] == 4 * values["lora_r"]


def test_viva_sft_has_the_papers_batch_rate_and_length(parsed):
    values = parsed["viva/sft"]
    assert (values["max_steps"], values["learning_rate"]) == (12000, 2e-5)
    assert 8 * values["per_device_train_batch_size"] * values["gradient_accumulation_steps"] == 128


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("viva/sft-vm", {"train_manifest", "output_dir"}),
        ("viva/sft-v", {"train_manifest", "output_dir", "mask_weight"}),
        ("viva/sft-vanilla", {"train_manifest", "output_dir", "mask_weight", "policy_kwargs"}),
    ],
)
def test_an_ablation_differs_from_the_whole_in_what_it_leaves_out(name, changed, parsed):
    one, other = parsed["viva/sft"], parsed[name]
    # Objects print their address; what they are made of is compared as "deepspeed".
    different = {key for key in one if one[key] != other[key] and " object at " not in str(one[key])}
    assert different | {"output_dir"} == changed  # output_dir is overridden above
    assert other["mask_weight"] == (1.0 if name == "viva/sft-vm" else 0.0)
