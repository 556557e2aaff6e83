"""Every mistake is one line on stderr and exit code 2, found before any training and, if possible, any weights."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from editrl.cli import main
from editrl.data import write_video
from editrl.policies.hunyuan_video.policy import HunyuanVideoPolicy
from editrl.recipes.shapes import WEIGHTS
from editrl.trainers import FlowGRPOTrainer


@pytest.fixture
def folder(tmp_path, shapes_manifest) -> Path:
    """A copy of the small data set, to spoil."""
    shutil.copytree(shapes_manifest.parent, tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def error_of(capsys, monkeypatch, tmp_path):
    """Words -> the error line of a command that is refused before it reads the weights of the editor."""

    def no_weights(path, **kwargs):
        pytest.fail(f"the weights of {path} were read")

    monkeypatch.setattr(HunyuanVideoPolicy, "from_pretrained", no_weights)
    return lambda words: one_line(words, capsys, tmp_path)


@pytest.fixture
def late_error_of(capsys, monkeypatch, tmp_path):
    """Words -> the error line of a command that is refused before its first update."""

    def no_update(*args, **kwargs):
        pytest.fail("an update was made")

    monkeypatch.setattr(FlowGRPOTrainer, "compute_loss", no_update)
    return lambda words: one_line(words, capsys, tmp_path)


def one_line(words: list[str], capsys, tmp_path) -> str:
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    written = capsys.readouterr()
    assert written.err.startswith("editrl: ")
    assert written.err.count("\n") == 1
    assert written.err.endswith("\n")
    assert "Traceback" not in written.out + written.err
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file()], "the run left files"
    return written.err


def change_row(folder: Path, number: int, **changes) -> None:
    """Change (None: remove) columns of one manifest row, counted from 0."""
    lines = (folder / "manifest.jsonl").read_text().splitlines()
    row = json.loads(lines[number]) | changes
    lines[number] = json.dumps({key: value for key, value in row.items() if value is not None})
    (folder / "manifest.jsonl").write_text("\n".join(lines))


# Data


def remove_clip(folder):
    (folder / "source" / "00002.mp4").unlink()


def spoil_clip(folder):
    (folder / "source" / "00002.mp4").write_bytes(b"these are no frames" * 100)


def cut_clip(folder):
    clip = folder / "source" / "00002.mp4"
    clip.write_bytes(clip.read_bytes()[:600])


def empty_clip(folder):
    (folder / "source" / "00002.mp4").write_bytes(b"")


def drop_a_frame(folder):
    write_video(folder / "source" / "00002.mp4", torch.rand(4, 3, 32, 32))


def odd_size(folder):
    write_video(folder / "source" / "00002.mp4", torch.rand(5, 3, 40, 32))


def another_size_of_target(folder):
    write_video(folder / "target" / "00002.mp4", torch.rand(5, 3, 32, 48))


BAD_DATA = {
    "missing clip": (remove_clip, ["manifest.jsonl:3", "source: no file", "00002.mp4"]),
    "undecodable clip": (spoil_clip, ["manifest.jsonl:3", "source: ", "00002.mp4: cannot be decoded"]),
    "truncated clip": (cut_clip, ["manifest.jsonl:3", "source: ", "00002.mp4"]),
    "empty clip": (empty_clip, ["manifest.jsonl:3", "00002.mp4: is empty"]),
    "not 4k+1 frames": (drop_a_frame, ["manifest.jsonl:3", "source: 4 frames are not 4k+1", "num_frames"]),
    "indivisible size": (odd_size, ["manifest.jsonl:3", "source: 40x32 is not divisible by 16"]),
    "target unlike source": (another_size_of_target, ["manifest.jsonl:3", "target: is 32x48", "source is 32x32"]),
    "missing manifest": (lambda folder: (folder / "manifest.jsonl").unlink(), ["manifest.jsonl", "cannot be read"]),
    "empty manifest": (lambda folder: (folder / "manifest.jsonl").write_text("\n"), ["manifest.jsonl", "no rows"]),
    "no JSON": (lambda folder: (folder / "manifest.jsonl").write_text("{"), ["manifest.jsonl:1: is no JSON"]),
    "misspelt column": (
        lambda folder: change_row(folder, 1, instruction=None, instructions="make it blue"),
        ["manifest.jsonl:2", "has no 'instruction'", "Did you mean 'instructions'?"],
    ),
    "id used twice": (
        lambda folder: [change_row(folder, number, id="twin") for number in (0, 1)],
        ["manifest.jsonl:2 (id 'twin')", "manifest.jsonl:1 has the same id"],
    ),
}


@pytest.mark.parametrize("case", BAD_DATA)
@pytest.mark.parametrize("command", ["grpo", "sft"])
def test_a_bad_data_set_is_named_with_line_and_column(case, command, request, folder, error_of, tmp_path):
    spoil, phrases = BAD_DATA[case]
    spoil(folder)
    words = request.getfixturevalue(f"small_{command}")
    error = error_of(words(tmp_path / "run", "--train_manifest", folder / "manifest.jsonl"))
    assert all(phrase in error for phrase in phrases), error


def test_the_evaluation_set_is_looked_at_as_well(folder, error_of, small_grpo, tmp_path):
    remove_clip(folder)
    error = error_of(small_grpo(tmp_path / "run", "--eval_manifest", folder / "manifest.jsonl"))
    assert "manifest.jsonl:3" in error


def test_a_row_without_target_is_refused_by_sft(folder, error_of, small_sft, tmp_path):
    change_row(folder, 1, target=None)
    error = error_of(small_sft(tmp_path / "run", "--train_manifest", folder / "manifest.jsonl"))
    assert "row 1" in error
    assert "has no 'target' clip" in error


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        (["--num_frames", "4"], "num_frames: 4 frames are not 4k+1; set num_frames, for example 1"),
        (["--num_frames", "-3"], "num_frames: -3 frames are not 4k+1"),
        (["--num_frames", "9"], "source: has 5 frames, num_frames is 9"),
        (["--height", "40", "--width", "32"], "height x width: 40x32 is not divisible by 16"),
        (["--height", "-32", "--width", "32"], "height x width: -32x32 is not divisible by 16"),
        (["--height", "32"], "height is 32 and width is None"),
    ],
)
def test_a_bad_geometry_is_refused(options, phrase, error_of, small_grpo, tmp_path):
    assert phrase in error_of(small_grpo(tmp_path / "run", *options))


def test_a_loaded_policy_may_be_stricter_than_its_class(capsys, small_grpo, tmp_path):
    file = tmp_path / "policy.py"
    file.write_text(
        "from editrl import FlowPolicy\n"
        "class Policy(FlowPolicy):\n"
        "    @classmethod\n"
        "    def from_pretrained(cls, path, **kwargs):\n"
        "        policy = cls()\n"
        "        policy.size_multiple = 64\n"
        "        return policy\n"
    )
    error = one_line(small_grpo(tmp_path / "run", "--policy", f"{file}:Policy"), capsys, tmp_path)
    assert "source: 32x32 is not divisible by 64" in error


def test_clips_of_unlike_sizes_are_refused_by_grpo(folder, late_error_of, small_grpo, tmp_path):
    for number in range(4):
        change_row(folder, number, mask=None, target=None)
    write_video(folder / "source" / "00002.mp4", torch.rand(9, 3, 32, 32))
    error = late_error_of(
        small_grpo(tmp_path / "run", "--train_manifest", folder / "manifest.jsonl", "--num_generations", 2)
    )
    assert "num_frames" in error


# Rewards


@pytest.fixture
def mine(tmp_path) -> str:
    """A file of rewards that go wrong."""
    file = tmp_path / "mine.py"
    file.write_text(
        "def nan_of_third(videos, **kwargs):\n    return [0.5, 0.5, float('nan')] + [0.5] * (len(videos) - 3)\n"
        "def infinite(videos, **kwargs):\n    return [float('inf')] * len(videos)\n"
        "def too_few(videos, **kwargs):\n    return [0.5] * (len(videos) - 1)\n"
        "def words(videos, **kwargs):\n    return ['good'] * len(videos)\n"
        "def a_number(videos, **kwargs):\n    return 0.5\n"
        "def raises(videos, **kwargs):\n    raise KeyError('no such thing')\n"
        "def wants_depth(videos, depth_maps):\n    return [0.5] * len(videos)\n"
        "not_a_reward = 3\n"
    )
    return str(file)


@pytest.mark.parametrize("column", ["source_caption", "target_caption"])
def test_a_missing_caption_is_named_with_the_reward_that_needs_it(column, folder, error_of, small_grpo, tmp_path):
    change_row(folder, 1, **{column: None})
    error = error_of(small_grpo(tmp_path / "run", "--train_manifest", folder / "manifest.jsonl"))
    assert f"reward 'clip_instruction' needs '{column}s', but row 1 (id " in error
    assert f"has no '{column}': add it to that row, or leave the reward out." in error


def test_a_metric_needs_its_columns_too(folder, error_of, small_grpo, tmp_path):
    change_row(folder, 1, scene=None)
    error = error_of(small_grpo(tmp_path / "run", "--train_manifest", folder / "manifest.jsonl"))
    assert "reward 'oracle_success' needs 'scene', but row 1" in error


@pytest.mark.parametrize(
    ("spec", "phrase"),
    [
        ("clip_instructon", "no reward is called 'clip_instructon'. Did you mean 'clip_instruction'?"),
        ("{mine}:nan_of_thrid", "has no 'nan_of_thrid'. Did you mean 'nan_of_third'?"),
        ("{mine}", "mine.py:Name"),
        ("{mine}:not_a_reward", "cannot be called"),
        ("nowhere.py:glow", "there is no file "),
        ("no.such.module:glow", "cannot import no.such.module"),
        ("{mine}:wants_depth", "needs 'depth_maps', but row 0"),
    ],
)
def test_a_reward_that_does_not_exist_or_cannot_be_fed_is_refused(spec, phrase, mine, error_of, small_grpo, tmp_path):
    assert phrase in error_of(small_grpo(tmp_path / "run", reward=spec.format(mine=mine)))


@pytest.mark.parametrize(
    ("kwargs", "phrase"),
    [
        ({"clip_instruction": {"modl": "x"}}, "unexpected keyword argument 'modl'. Did you mean 'model'?"),
        ({"clip_instructon": {}}, "kwargs for 'clip_instructon'"),
        ({"clip_instruction": {"model": "/nowhere/clip"}}, "cannot load CLIPModel from '/nowhere/clip'"),
    ],
)
def test_bad_arguments_of_a_reward_are_refused(kwargs, phrase, error_of, small_grpo, tmp_path):
    words = small_grpo(tmp_path / "run", "--reward_kwargs", json.dumps(kwargs), reward="clip_instruction")
    assert phrase in error_of(words)


@pytest.mark.parametrize(
    ("name", "phrases"),
    [
        ("nan_of_third", ["reward 'nan_of_third' returned nan for sample 2 (id ", "a score is finite"]),
        ("infinite", ["reward 'infinite' returned inf for sample 0"]),
        ("too_few", ["reward 'too_few' returned 7 values for 8 videos"]),
        ("words", ["reward 'words' returned str for sample 0"]),
        ("a_number", ["reward 'a_number' returned float", "return a list of floats"]),
        ("raises", ["reward 'raises' failed on sample 0", "KeyError: 'no such thing'"]),
    ],
)
def test_a_reward_that_fails_stops_the_run_before_its_first_update(
    name, phrases, mine, late_error_of, small_grpo, tmp_path
):
    error = late_error_of(small_grpo(tmp_path / "run", reward=f"{mine}:{name}"))
    assert all(phrase in error for phrase in phrases), error


# Options


def recipe(tmp_path, text: str) -> list[str]:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return ["grpo", "--config", str(path)]


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        (
            "num_generation: 8\n",
            "mine.yaml, line 1: `editrl grpo` has no field 'num_generation'. Did you mean 'num_gen",
        ),
        ("- a\n- b\n", "mine.yaml: a recipe is a YAML mapping"),
        ("just words\n", "mine.yaml: a recipe is a YAML mapping"),
        ("a: [1\n", "mine.yaml, line 2: not YAML"),
        ("beta: much\n", "mine.yaml, line 1: beta must be float, not 'much'"),
        ("loss_type: gppo\n", "loss_type must be one of grpo, grpo_guard"),
        ("beta: 1\nbeta: 2\n", "mine.yaml, line 2: 'beta' is on line 1 already"),
        ("beta: 0.1\n", "the following arguments are required: --model_name_or_path, --train_manifest, --reward_funcs"),
    ],
)
def test_a_bad_recipe_is_named_with_its_line(text, phrase, error_of, tmp_path):
    assert phrase in error_of(recipe(tmp_path, text))


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        (["--config", "shapes/gppo"], "no packaged recipe is called 'shapes/gppo'. Did you mean 'shapes/grpo'?"),
        (["--num_generation", "8"], "has no option --num_generation. Did you mean '--num_generations'?"),
        (["--beta", "much"], "--beta: invalid float value: 'much'"),
        (["--policy", "hunyuan_vide"], "no policy is called 'hunyuan_vide'. Did you mean 'hunyuan_video'?"),
        (["--model_name_or_path", "/nowhere/editor"], "there is no folder '/nowhere/editor', and a Hub id is"),
        (["--reward_weights", "1"], "1 reward weights for 3 rewards"),
        (["--reward_funcs"], "give a list with at least one reward"),
        (["--num_generations", "3"], "generation_batch_size 8 must be a multiple of num_generations 3"),
        (["--num_generations", "-4"], "num_generations must be at least 1, got -4"),
        (["--per_device_train_batch_size", "3"], "must be a multiple of per_device_train_batch_size"),
        (["--gradient_accumulation_steps", "3"], "must be a multiple of gradient_accumulation_steps 3"),
        (["--steps_per_generation", "2"], "set generation_batch_size or steps_per_generation, not both"),
        (["--num_inference_steps", "0"], "num_inference_steps must be at least 1, got 0"),
        (["--sde_window_range", "2", "9"], "sde_window_range [2, 9] must lie within [0, 3]"),
        (["--eval_strategy", "steps"], "there is no eval_manifest"),
        (["--eval_on_start", "true"], "there is no eval_manifest"),
        (["--resume_from_checkpoint", "true"], "no complete checkpoint in"),
        (["--resume_from_checkpoint", "/nowhere/checkpoint-3"], "'/nowhere/checkpoint-3' is no complete checkpoint"),
        (["--output_dir", "/dev/null/run"], "/dev/null/run: this folder cannot be made (Not a directory)"),
    ],
)
def test_a_bad_option_is_named(options, phrase, error_of, small_grpo, tmp_path):
    assert phrase in error_of(small_grpo(tmp_path / "run", *options))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("per_device_train_batch_size", "-8"),
        ("per_device_train_batch_size", "0"),
        ("gradient_accumulation_steps", "0"),
        ("generation_batch_size", "-8"),
        ("max_steps", "-5"),
        ("save_steps", "-1"),
        ("learning_rate", "-0.1"),
        ("seed", "-1"),
        ("shift", "0"),
        ("noise_level", "-1"),
        ("epsilon", "-1"),
        ("beta", "-1"),
        ("ema_decay", "7"),
        ("eval_num_inference_steps", "0"),
        ("video_steps", "-1"),
    ],
)
def test_a_number_out_of_range_is_refused(option, value, error_of, small_grpo, tmp_path):
    error = error_of(small_grpo(tmp_path / "run", f"--{option}", value))
    assert f"{option} must be" in error


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        (["--use_peft", "true", "--lora_target_modules", "nothing"], "Target modules {'nothing'} not found"),
        (["--use_peft", "true", "--lora_r", "-3"], "`r` should be a positive integer"),
    ],
)
def test_a_bad_adapter_is_refused_before_the_first_update(options, phrase, late_error_of, small_grpo, tmp_path):
    assert phrase in late_error_of(small_grpo(tmp_path / "run", *options))


@pytest.mark.parametrize(
    ("kwargs", "phrase"),
    [
        ({"transformer": "/nowhere/transformer"}, "cannot load the transformer from '/nowhere/transformer'"),
        pytest.param({"transfomer": "x"}, "transfomer"),
        pytest.param({"dtype": "float33"}, "float33"),
    ],
)
def test_bad_arguments_of_a_policy_are_refused(kwargs, phrase, late_error_of, small_grpo, tmp_path):
    assert phrase in late_error_of(small_grpo(tmp_path / "run", "--policy_kwargs", json.dumps(kwargs)))


# editrl edit


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        (["--shift", "0"], "--shift: must be above 0, not 0"),
        (["--num_inference_steps", "0"], "--num_inference_steps: must be at least 1, not 0"),
        (["--seed", "-1"], "--seed: must be at least 0, not -1"),
        (["--seed", "one"], "--seed: invalid int value: 'one'"),
        (["--device", "gpu"], "--device gpu: torch has no such device here"),
        (["--adapter", "/nowhere/adapter"], "--adapter /nowhere/adapter: there is no adapter_config.json"),
        (["--model_name_or_path", "/nowhere/editor"], "there is no folder '/nowhere/editor'"),
        (["--reference", "/nowhere/image.png"], "reference_image: /nowhere/image.png: cannot be read"),
        (["--num_frames", "4", "--frames", "refuse"], "the clip has 4 frames, which is not 4k+1; cut it to 1"),
        (["--num_frames", "9"], "source: has 5 frames, num_frames is 9"),
        (["--height", "40", "--width", "32"], "height x width: 40x32 is not divisible by 16"),
        (["--height", "32"], "height is 32 and width is None; give both or neither"),
        (["--resolution", "32", "--height", "32", "--width", "32"], "--resolution is one way to give a size"),
        (["--max_frames", "4"], "windows of at most 4 frames that share 0 do not advance; give max_frames of at least"),
        (["--max_frames", "9", "--overlap", "9"], "windows of at most 9 frames that share 9 do not advance"),
        (["--frames", "drop"], "invalid choice: 'drop'"),
        (["--manifest", "rows.jsonl"], "the rows of --manifest say source, instruction and reference_image"),
        (["--overwrite"], "--overwrite is for a --manifest"),
        (["--output", "edited.mov"], "--output edited.mov: what is written ends in .mp4, or for an image in .png"),
        (["--output", "edited.png"], "--output edited.png: the source has 5 frames"),
        (["--output", "/dev/null/edited.mp4"], "/dev/null: this folder cannot be made"),
        (["--guidance", "6"], "has no option --guidance. Did you mean '--guidance_scale'?"),
    ],
)
def test_edit_refuses_before_it_reads_the_model(options, phrase, error_of, small_edit, tmp_path):
    assert phrase in error_of(small_edit(tmp_path / "edited.mp4", *options))


@pytest.mark.parametrize(
    ("source", "phrase"),
    [
        ("missing.mp4", "missing.mp4: cannot be read (No such file or directory)"),
        ("noise.mp4", "noise.mp4: cannot be decoded"),
    ],
)
def test_edit_refuses_a_bad_source(source, phrase, error_of, small_edit, tmp_path):
    (tmp_path / "noise.mp4").write_bytes(b"these are no frames" * 100)
    assert phrase in error_of(small_edit(tmp_path / "edited.mp4", source=tmp_path / source))


# In a process of its own, where warnings and bars of the libraries would show


@pytest.mark.slow
@pytest.mark.parametrize("case", ["NaN reward", "missing transformer"])
def test_a_process_prints_one_line_and_exits_with_2(case, mine, small_grpo, small_edit, tmp_path):
    if case == "NaN reward":
        words = small_grpo(tmp_path / "run", reward=f"{mine}:nan_of_third")
    else:
        words = small_edit(tmp_path / "edited.mp4", "--transformer", str(WEIGHTS / "nowhere"))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "editrl", *words]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("editrl: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert not list((tmp_path / "run").glob("checkpoint-*"))
