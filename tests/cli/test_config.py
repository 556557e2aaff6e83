"""parse_config: recipe and flags become dataclasses, and every mistake is named in one line."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from editrl.cli.config import parse_config
from editrl.errors import EditrlError


@dataclass
class DataArguments:
    train_data: str = field(metadata={"help": "the manifest"})
    num_frames: int | None = None
    rewards: list[str] = field(default_factory=list)
    reward_weights: list[float] | None = None
    reward_kwargs: dict[str, dict[str, Any]] = field(default_factory=dict)
    kernel: Literal["flow_sde", "cps"] = "flow_sde"
    kernel_params: dict[str, float] | None = None
    device_map: dict[str, int] | str | None = None


@dataclass
class TrainArguments:
    learning_rate: float = 1e-4
    gradient_checkpointing: bool = True
    seed: int = 42
    gather: bool | None = None
    loss_type: str = field(default="grpo", metadata={"help": "the objective", "choices": ["grpo", "grpo_guard"]})

    def __post_init__(self):
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be positive, not {self.learning_rate}")


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        path = tmp_path / "grpo.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def parse(*argv):
    return parse_config((DataArguments, TrainArguments), [str(word) for word in argv], "grpo")


def error_of(*argv) -> str:
    with pytest.raises(EditrlError) as error:
        parse(*argv)
    assert "\n" not in str(error.value)
    return str(error.value)


# Values


def test_flags_alone_fill_the_dataclasses_in_their_order():
    data, train = parse("--train_data", "a.jsonl", "--learning-rate", "2e-5", "--rewards", "clip", "pickscore")
    assert data == DataArguments("a.jsonl", rewards=["clip", "pickscore"])
    assert train == TrainArguments(learning_rate=2e-5)


def test_one_dataclass_need_not_be_in_a_tuple():
    assert parse_config(TrainArguments, ["--seed", "1"], "grpo") == (TrainArguments(seed=1),)


def test_a_recipe_sets_values_and_the_command_line_wins(recipe):
    path = recipe("train_data: a.jsonl\nseed: 1\nlearning_rate: 0.5\n")
    data, train = parse("--config", path, "--seed", "2")
    assert (data.train_data, train.seed, train.learning_rate) == ("a.jsonl", 2, 0.5)


@pytest.mark.parametrize("argv", [["--config", "{}"], ["--config={}"]])
def test_config_may_stand_anywhere_and_be_written_with_an_equals_sign(recipe, argv):
    path = recipe("train_data: a.jsonl\n")
    data, train = parse("--seed", "2", *(word.format(path) for word in argv))
    assert (data.train_data, train.seed) == ("a.jsonl", 2)


def test_recipe_dir_is_the_folder_of_the_recipe_in_nested_values_too(recipe):
    path = recipe(
        "train_data: ${recipe_dir}/data/train.jsonl\n"
        "rewards: ['${recipe_dir}/mine.py:glow']\n"
        "reward_kwargs: {clip: {model: '${recipe_dir}/clip'}}\n"
    )
    [data, _] = parse("--config", path)
    folder = str(path.parent)
    assert data.train_data == f"{folder}/data/train.jsonl"
    assert data.rewards == [f"{folder}/mine.py:glow"]
    assert data.reward_kwargs == {"clip": {"model": f"{folder}/clip"}}


def test_numbers_in_scientific_notation_are_numbers_at_every_depth(recipe):
    path = recipe("train_data: a\nlearning_rate: 1e-5\nkernel_params: {eta: 3e-1}\nreward_kwargs: {clip: {t: 1.5e3}}\n")
    data, train = parse("--config", path)
    assert (train.learning_rate, data.kernel_params, data.reward_kwargs["clip"]["t"]) == (1e-5, {"eta": 0.3}, 1500.0)


def test_null_in_a_recipe_and_none_on_the_command_line_are_none(recipe):
    path = recipe("train_data: a\nreward_weights: null\nnum_frames: 33\nkernel_params: {eta: 1}\n")
    data, _ = parse("--config", path, "--num_frames", "none", "--kernel_params", "none")
    assert (data.reward_weights, data.num_frames, data.kernel_params) == (None, None, None)
    assert parse("--train_data", "a", "--reward_weights", "none")[0].reward_weights is None
    for word, value in (("none", None), ("true", True), ("no", False)):
        assert parse("--train_data", "a", "--gather", word)[1].gather is value
    assert "invalid float value: 'much'" in error_of("--train_data", "a", "--reward_weights", "1", "much")


def test_a_list_flag_without_values_is_the_empty_list(recipe):
    path = recipe("train_data: a\nrewards: [clip]\nreward_weights: [1]\n")
    assert parse("--config", path, "--rewards", "--seed", "2")[0].rewards == []
    assert parse("--config", path, "--reward_weights")[0].reward_weights == []


def test_rewards_may_have_names(recipe):
    path = recipe("train_data: a\nrewards: [quality=remote, alignment=remote]\n")
    named = ["quality=remote", "alignment=remote"]
    assert parse("--config", path)[0].rewards == named
    assert parse("--config", path, "--rewards=quality=remote")[0].rewards == named[:1]
    assert parse("--rewards", *named, "--train_data", "a")[0].rewards == named


def test_a_switch_can_be_turned_off_from_either_side(recipe):
    assert parse("--train_data", "a", "--no_gradient_checkpointing")[1].gradient_checkpointing is False
    assert parse("--train_data", "a", "--gradient_checkpointing", "false")[1].gradient_checkpointing is False
    assert parse("--config", recipe("train_data: a\ngradient_checkpointing: false"))[1].gradient_checkpointing is False


def test_a_dict_is_json_on_the_command_line():
    data, _ = parse("--train_data", "a", "--reward_kwargs", '{"clip": {"frames": 8}}', "--kernel_params", '{"eta": 1}')
    assert data.reward_kwargs == {"clip": {"frames": 8}}
    assert data.kernel_params == {"eta": 1.0}


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ('{"dit": 0}', {"dit": 0})])
def test_a_field_that_may_be_text_or_a_dict_is_either(text, value):
    assert parse("--train_data", "a", "--device_map", text)[0].device_map == value


def test_transformers_training_arguments_parse_too(recipe):
    from transformers import TrainingArguments

    path = recipe("output_dir: ${recipe_dir}/out\nlr_scheduler_kwargs: {min_lr: 1e-6}\nreport_to: none\n")
    [args] = parse_config(TrainingArguments, ["--config", str(path), "--logging_steps", "5"], "grpo")
    assert (args.output_dir, args.logging_steps) == (f"{path.parent}/out", 5)
    assert args.lr_scheduler_kwargs == {"min_lr": 1e-6}


def test_a_packaged_recipe_is_found_by_name(recipe, monkeypatch):
    path = recipe("train_data: ${recipe_dir}/x\n")
    monkeypatch.setattr("editrl.cli.recipes.files", lambda package: Path(path).parent)
    assert parse("--config", "grpo")[0].train_data == f"{path.parent}/x"


def test_help_prints_the_fields_and_the_recipes_values(recipe, capsys):
    path = recipe("train_data: from_the_recipe.jsonl\n")
    with pytest.raises(SystemExit) as stop:
        parse("--config", path, "--help")
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "--kernel_params dict[str, float] | None" in out
    assert "the manifest (default: from_the_recipe.jsonl)" in out


# Errors


def test_an_unknown_key_names_file_and_line_and_the_nearest(recipe):
    path = recipe("train_data: a\n\nnum_frame: 33\n")
    assert f"{path}, line 3: `editrl grpo` has no field 'num_frame'. Did you mean 'num_frames'?" in error_of(
        "--config", path
    )


@pytest.mark.parametrize("flag", ["--num_frame", "--num-frame"])
def test_an_unknown_flag_names_the_nearest(flag):
    error = error_of("--train_data", "a", flag, "33")
    assert f"`editrl grpo` has no option {flag}. Did you mean '--num_frames'?" in error


def test_a_flag_must_not_be_abbreviated():
    assert "has no option --train." in error_of("--train", "a")


def test_a_word_without_a_flag_is_an_error():
    assert "'stray' belongs to no --field" in error_of("--train_data", "a", "--seed", "1", "stray")


def test_missing_required_fields_are_named():
    assert error_of("--seed", "1").endswith("required: --train_data")


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("num_frames: many", "num_frames must be int | None, not 'many'"),
        ("num_frames: 3.5", "num_frames must be int | None, not 3.5"),
        ("rewards: clip", "rewards must be list[str], not 'clip'"),
        ("reward_weights: [1, x]", "reward_weights must be list[float] | None, not [1, 'x']"),
        ("kernel: ode", "kernel must be one of flow_sde, cps, not 'ode'"),
        ("loss_type: gppo", "loss_type must be one of grpo, grpo_guard, not 'gppo'"),
        ("seed: null", "seed must be int, not None"),
        ("kernel_params: {eta: x}", "kernel_params must be dict[str, float] | None, not {'eta': 'x'}"),
    ],
)
def test_a_value_of_the_wrong_type_names_file_line_and_type(recipe, line, error):
    path = recipe(f"train_data: a\n{line}\n")
    assert error_of("--config", path) == f"{path}, line 2: {error}"


@pytest.mark.parametrize(
    ("flag", "value", "error"),
    [
        ("--num_frames", "many", "--num_frames: invalid int value: 'many'"),
        ("--kernel", "ode", "--kernel: invalid choice: 'ode'"),
        ("--kernel_params", "{", "--kernel_params: must be dict[str, float] | None as JSON, not '{'"),
        ("--kernel_params", '{"eta": "x"}', "--kernel_params: must be dict[str, float] | None as JSON"),
        ("--gradient_checkpointing", "maybe", "--gradient_checkpointing: Truthy value expected"),
    ],
)
def test_a_wrong_value_on_the_command_line_names_the_flag(flag, value, error):
    assert error in error_of("--train_data", "a", flag, value)


def test_a_dataclass_own_complaint_names_command_and_recipe(recipe):
    path = recipe("train_data: a\nlearning_rate: -1\n")
    assert error_of("--config", path) == f"`editrl grpo` with {path}: learning_rate must be positive, not -1.0"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", ": a recipe is a YAML mapping"),
        ("- a\n- b\n", ": a recipe is a YAML mapping"),
        ("train_data: [a\nseed: 1\n", ", line 2: not YAML: "),
        ("train_data: a\nseed: 1\nseed: 2\n", ", line 3: 'seed' is on line 2 already"),
        ("train_data: a\nreward_kwargs: {clip: {t: 1, t: 2}}\n", ", line 2: 't' is on line 2 already"),
        ("train_data: a\nrewards: ['${home}/x.py:r']\n", ", line 2: ${home} is not known"),
        ("train_data: \x00", ": not a UTF-8 text file"),
    ],
)
def test_a_file_that_is_no_recipe_says_where(recipe, text, error):
    path = recipe(text)
    assert f"{path}{error}" in error_of("--config", path)


def test_a_merged_mapping_may_be_overridden(recipe):
    path = recipe("train_data: a\nreward_kwargs:\n  one: &one {a: 1, b: 2}\n  two: {<<: *one, b: 3}\n")
    assert parse("--config", path)[0].reward_kwargs["two"] == {"a": 1, "b": 3}


def test_a_missing_recipe_says_whether_a_file_or_a_name_was_looked_for(recipe, monkeypatch):
    path = recipe("seed: 1\n")
    monkeypatch.setattr("editrl.cli.recipes.files", lambda package: path.parent)
    assert "no packaged recipe is called 'grop'. Did you mean 'grpo'?" in error_of("--config", "grop")
    assert "--config nowhere/grpo.yaml: no such file" in error_of("--config", "nowhere/grpo.yaml")
    assert "expected one argument" in error_of("--config")


# --- weights of rewards, which may be schedules


def test_reward_weights_are_numbers_or_schedules_in_a_recipe_and_as_json(recipe):
    from editrl.trainers import FlowGRPOConfig

    schedule, points = {"start": 1.0, "end": 0.2, "steps": 200}, [[0, 1.0], [5, 2]]
    sizes = "output_dir: out\nnum_generations: 8\ngradient_accumulation_steps: 4\n"
    path = recipe(f"{sizes}reward_weights: [1, {{start: 1.0, end: 0.2, steps: 200}}, {points}]\n")

    def weights(*words):
        return parse_config(FlowGRPOConfig, ["--config", str(path), *words], "grpo")[0].reward_weights

    assert weights() == [1, schedule, points]
    assert weights("--reward_weights", "0.5", json.dumps(schedule)) == [0.5, schedule]
    with pytest.raises(EditrlError, match="must be a number or JSON, not 'much'"):
        weights("--reward_weights", "much")
