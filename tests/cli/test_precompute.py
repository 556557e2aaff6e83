"""`editrl precompute`: takes the recipes of training as they are, and leaves a cache that they train from."""

import pytest
import torch
import yaml

from editrl.cli import main
from editrl.cli.precompute import read_options
from editrl.errors import EditrlError
from editrl.recipes.shapes import WEIGHTS

EDITOR = str(WEIGHTS / "sft")


def run(capsys, *words) -> tuple[int, str, str]:
    """Exit code, output and error output of a command."""
    code = main([str(word) for word in words])
    return code, *capsys.readouterr()


@pytest.fixture
def recipe(tmp_path, shapes_manifest):
    """(fields) -> a recipe of `editrl sft` with fields of all kinds."""

    def write(**fields) -> str:
        values = {
            "model_name_or_path": EDITOR,
            "train_manifest": str(shapes_manifest),
            "output_dir": str(tmp_path / "run"),
            "mask_weight": 0.5,
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "save_steps": 2,
            "bf16": True,
            "deepspeed": {"zero_optimization": {"stage": 3}},
            "report_to": "none",
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values | fields))
        return str(path)

    return write


def test_a_recipe_of_sft_is_encoded_and_then_there(capsys, recipe, tmp_path, shapes_manifest):
    """Its training fields change nothing: neither is a process group made nor a weight sharded."""
    words = ("precompute", "--config", recipe(), "--eval_manifest", shapes_manifest)
    code, printed, _ = run(capsys, *words, "--conditions_cache", tmp_path / "cache", "--shard_size", "2")
    assert code == 0
    sizes = sum(path.stat().st_size for path in (tmp_path / "cache").iterdir())
    assert f"4 examples encoded, 4 there already; {sizes / 1000:.1f} kB written to {tmp_path / 'cache'} in " in printed
    assert not (tmp_path / "run").exists()
    code, printed, _ = run(capsys, *words, "--conditions_cache", tmp_path / "cache")
    assert code == 0
    assert printed.startswith("0 examples encoded, 8 there already; 0 bytes written")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["sft", "grpo"])
def test_what_it_leaves_is_trained_from_without_encoders(
    capsys, command, request, shapes_manifest, tmp_path, monkeypatch
):
    """Recipe, then the same recipe with the cache in it, which precompute takes as well."""
    small = request.getfixturevalue(f"small_{command}")
    words = small(tmp_path / "run", "--policy_kwargs", '{"encoders": false}', "--conditions_cache", tmp_path / "cache")
    code, _, error = run(capsys, *words)
    assert code == 2 and "conditions_cache: there is no folder" in error and "editrl precompute --config" in error

    cached = {"policy_kwargs": {"encoders": False}, "conditions_cache": str(tmp_path / "cache")}
    fields = {"model_name_or_path": EDITOR, "train_manifest": str(shapes_manifest), "learning_rate": 1e-5}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(fields | cached))
    assert run(capsys, "precompute", "--config", tmp_path / "recipe.yaml")[0] == 0
    assert run(capsys, *words)[0] == 0
    assert list((tmp_path / "run").glob("checkpoint-*/complete"))


def test_a_recipe_of_grpo_is_taken_with_its_rewards(tmp_path, shapes_manifest):
    words = ["--config", "shapes/grpo", "--train_manifest", str(shapes_manifest), "--conditions_cache", str(tmp_path)]
    policy_args, data_args, cache_args = read_options(words)
    assert policy_args.policy_kwargs["transformer"].endswith("sft-underediting")
    assert data_args.train_manifest == str(shapes_manifest)
    assert (cache_args.batch_size, cache_args.shard_size) == (8, 64)


@pytest.mark.parametrize("name", ["sft", "sft-v", "sft-vm", "grpo"])
def test_the_recipes_of_viva_are_taken(name):
    policy_args, data_args, _ = read_options(["--config", f"viva/{name}", "--conditions_cache", "cache"])
    assert policy_args.policy_kwargs["dtype"] == "bfloat16"
    assert (data_args.height, data_args.width) == (480, 832)


def test_encoders_are_loaded_whatever_the_recipe_says(recipe):
    path = recipe(policy_kwargs={"encoders": False, "hidden_layer": -2}, conditions_cache="cache")
    policy_args, _, cache_args = read_options(["--config", path])
    assert policy_args.policy_kwargs == {"hidden_layer": -2}
    assert cache_args.conditions_cache == "cache"


@pytest.mark.parametrize(
    ("fields", "words", "error"),
    [
        (
            {"num_framse": 5},
            [],
            r"recipe.yaml, line \d+: `editrl precompute` has no field 'num_framse'. Did you mean 'num_fr",
        ),
        ({}, ["--max_steps", "3"], "`editrl precompute` has no option --max_steps"),
        ({}, ["--batch_size", "0"], "batch_size must be at least 1, got 0"),
        ({}, ["--shard_size", "none"], "shard_size: invalid int value"),
    ],
)
def test_mistakes_are_told(recipe, fields, words, error):
    with pytest.raises(EditrlError, match=error):
        read_options(["--config", recipe(**fields), "--conditions_cache", "cache", *words])


def test_a_cache_has_to_be_named(recipe):
    with pytest.raises(EditrlError, match="required: --conditions_cache"):
        read_options(["--config", recipe()])


def test_a_folder_that_cannot_be_made_is_told_before_the_weights_are_loaded(capsys, recipe, tmp_path):
    (tmp_path / "file").touch()
    words = (
        "--config",
        recipe(policy_kwargs={"dtype": "none such"}),
        "--conditions_cache",
        tmp_path / "file" / "cache",
    )
    code, _, error = run(capsys, "precompute", *words)
    assert code == 2 and "this folder cannot be made" in error


def test_the_processes_of_torchrun_share_the_shards(capsys, recipe, tmp_path, monkeypatch):
    words = ("precompute", "--config", recipe(), "--conditions_cache", tmp_path / "cache", "--shard_size", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        code, printed, _ = run(capsys, *words)
        assert code == 0
        assert printed.startswith(f"process {rank} of 2: 2 examples encoded, 0 there already")
    monkeypatch.undo()
    assert run(capsys, *words)[1].startswith("0 examples encoded, 4 there already")


def test_too_little_memory_is_told_in_one_line(capsys, recipe, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB")

    monkeypatch.setattr("editrl.cache.filling.encode_examples", full)
    code, _, error = run(capsys, "precompute", "--config", recipe(), "--conditions_cache", tmp_path / "cache")
    assert code == 2
    assert "has too little memory for --batch_size 8; lower it and run the same command again" in error


def test_progress_is_told_line_by_line_where_there_is_no_terminal(capsys, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("editrl.cli.precompute.LINE_EVERY", 0)
    words = ("--config", recipe(), "--conditions_cache", tmp_path / "cache", "--batch_size", "2", "--shard_size", "2")
    _, _, error = run(capsys, "precompute", *words)
    assert "2 of 4 examples after " in error and "4 of 4 examples after " in error


def test_help_lists_its_own_fields_only(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["precompute", "--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "--conditions_cache" in text and "--batch_size" in text and "--num_frames" in text
    assert "--learning_rate" not in text
