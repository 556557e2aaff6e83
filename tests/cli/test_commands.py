"""The real commands on the tiny weights that come with the package: train, continue, edit."""

import contextlib
import io
import json
import shutil
import subprocess
import sys

import av
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from editrl.cli import main
from editrl.data import read_video, write_image, write_video
from editrl.policies.hunyuan_video.transformer import HunyuanVideoEditTransformer3DModel
from editrl.recipes.shapes import WEIGHTS


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small_grpo, shapes_manifest):
    """The folder and the printed text of one GRPO run with evaluation and video files."""
    folder = tmp_path_factory.mktemp("grpo") / "run"
    watched = ["--eval_manifest", shapes_manifest, "--eval_on_start", "true", "--video_steps", "1", "--num_videos", "2"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(small_grpo(folder, *watched)) == 0
    return folder, printed.getvalue()


@pytest.fixture(scope="module")
def trained_adapter(tmp_path_factory, small_grpo):
    """The folder of a GRPO run with LoRA."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    assert main(small_grpo(folder, "--use_peft", "true", "--lora_r", "4", "--learning_rate", "0.1")) == 0
    return folder


def weights_in(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def history(folder) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


# editrl grpo


def test_grpo_writes_checkpoints_the_weights_and_clips(trained):
    folder, _ = trained
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
    assert (folder / "checkpoint-2" / "complete").exists()
    assert (
        set(weights_in(folder)) == set(weights_in(folder / "checkpoint-1")) == set(weights_in(folder / "checkpoint-2"))
    )
    clips = sorted((folder / "videos" / "step-000000").glob("*.mp4"))
    assert [read_video(clip)[0].shape for clip in clips] == [(5, 3, 32, 32)] * 3  # a source and two edits


def test_grpo_has_learned_something(trained):
    start = load_file(WEIGHTS / "sft-underediting" / "diffusion_pytorch_model.safetensors")
    now = weights_in(trained[0])
    assert set(start) == set(now)
    assert any((start[name].float() - now[name]).abs().max() > 1e-6 for name in start)


def test_grpo_logs_rewards_metrics_and_seconds(trained):
    logs = history(trained[0] / "checkpoint-2")
    assert [log["step"] for log in logs if "loss" in log] == [1, 2]
    for name in ("rewards/clip_instruction/mean", "metrics/oracle_success/mean", "seconds/rollout", "grad_norm"):
        assert all(name in log for log in logs if "loss" in log), name
    assert any("eval_rewards/pickscore/mean" in log for log in logs)


def test_grpo_prints_one_line_an_evaluation_and_how_to_use_the_result(trained):
    folder, printed = trained
    assert "update 0/2 after" in printed
    assert printed.rstrip().endswith(f"editrl edit --transformer {folder / 'transformer'} ...")


def test_the_saved_weights_are_the_moving_average_that_was_evaluated(trained):
    folder, _ = trained
    average = torch.load(folder / "checkpoint-2" / "ema.pt")["shadow_params"]
    saved = HunyuanVideoEditTransformer3DModel.from_pretrained(folder / "transformer")
    last = HunyuanVideoEditTransformer3DModel.from_pretrained(folder / "checkpoint-2" / "transformer")
    assert all(map(torch.equal, saved.parameters(), average))
    assert not all(map(torch.equal, saved.parameters(), last.parameters()))


def test_a_used_output_dir_is_refused_and_left_as_it_is(trained, small_grpo, capsys):
    folder, _ = trained
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert main(small_grpo(folder)) == 2
    error = capsys.readouterr().err
    assert f"'{folder}' holds an earlier run; continue it with --resume_from_checkpoint true" in error
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == files


def test_a_finished_run_without_checkpoints_is_not_overwritten_either(trained, trained_adapter, small_grpo, tmp_path):
    for number, result in enumerate((trained[0] / "transformer", trained_adapter / "adapter_config.json")):
        folder = tmp_path / str(number)
        folder.mkdir()
        shutil.copytree(result, folder / result.name) if result.is_dir() else shutil.copy(result, folder)
        assert main(small_grpo(folder)) == 2


def test_resuming_continues_at_the_newest_checkpoint(trained, small_grpo, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder)
    shutil.rmtree(folder / "checkpoint-2")
    assert main(small_grpo(folder, "--resume_from_checkpoint", "true")) == 0
    losses = [log["loss"] for log in history(folder / "checkpoint-2") if "loss" in log]
    assert losses == [log["loss"] for log in history(trained[0] / "checkpoint-2") if "loss" in log]
    for name, weight in weights_in(trained[0]).items():
        torch.testing.assert_close(weights_in(folder)[name], weight, rtol=0, atol=0)


def test_a_checkpoint_can_be_named(trained, small_grpo, tmp_path):
    words = ["--resume_from_checkpoint", trained[0] / "checkpoint-1", "--max_steps", 2]
    assert main(small_grpo(tmp_path / "branch", *words)) == 0
    assert [log["step"] for log in history(tmp_path / "branch" / "checkpoint-2") if "loss" in log] == [1, 2]


def test_a_lora_run_leaves_an_adapter_and_not_the_model(trained_adapter):
    for folder in (trained_adapter, trained_adapter / "checkpoint-2"):
        assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4
        assert all("lora" in name for name in load_file(folder / "adapter_model.safetensors"))
        assert not (folder / "transformer").exists()


def test_a_reward_of_ones_own_takes_the_place_of_the_recipes(small_grpo, tmp_path):
    """The recipe's arguments of the rewards that were left out are no mistake; no --metric_funcs means none."""
    file = tmp_path / "mine.py"
    file.write_text("def brightness(videos, **kwargs):\n    return [video.mean().item() for video in videos]\n")
    assert main(small_grpo(tmp_path / "run", reward=f"{file}:brightness")) == 0
    names = {name for log in history(tmp_path / "run" / "checkpoint-2") for name in log if name.endswith("/mean")}
    assert names == {"rewards/brightness/mean", "ratio/mean"}


def test_the_terminal_is_released_when_a_reward_fails(small_grpo, tmp_path, monkeypatch, capsys):
    screen = io.StringIO()
    monkeypatch.setattr("editrl.trainers.display.Console", lambda: Console(force_terminal=True, file=screen))
    file = tmp_path / "mine.py"
    file.write_text("def broken(videos, **kwargs):\n    raise KeyError('no such thing')\n")
    assert main(small_grpo(tmp_path / "run", reward=f"{file}:broken")) == 2
    hide, show = "\x1b[?25l", "\x1b[?25h"
    assert screen.getvalue().rfind(show) > screen.getvalue().rfind(hide) >= 0


@pytest.mark.parametrize("lora", [False, True])
def test_gradient_checkpointing_changes_nothing_but_memory(small_grpo, tmp_path, lora):
    words = ["--use_peft", str(lora).lower(), "--metric_funcs", "--save_steps", "2"]
    for checkpointing in ("false", "true"):
        assert main(small_grpo(tmp_path / checkpointing, *words, "--gradient_checkpointing", checkpointing)) == 0
    losses = [[log.get("loss") for log in history(tmp_path / name / "checkpoint-2")] for name in ("false", "true")]
    assert losses[0] == pytest.approx(losses[1])


def test_zero3_does_not_shard_the_frozen_models(small_grpo, tmp_path):
    """transformers shards whatever is loaded while a ZeRO-3 configuration is alive. In a process of its own, which
    DeepSpeed joins to a group of processes, as a launcher would have."""
    file = tmp_path / "policy.py"
    file.write_text(
        "from transformers.integrations import is_deepspeed_zero3_enabled\n"
        "from editrl import EditrlError, FlowPolicy\n"
        "class Policy(FlowPolicy):\n"
        "    @classmethod\n"
        "    def from_pretrained(cls, path, **kwargs):\n"
        "        raise EditrlError(f'sharded while loading: {is_deepspeed_zero3_enabled()}')\n"
    )
    words = small_grpo(tmp_path / "run", "--policy", f"{file}:Policy", "--deepspeed", "zero3")
    program = (  # as `-m editrl`, without a C++ extension that nothing here calls and that takes a minute to build
        "import deepspeed, sys; deepspeed.ops.__compatible_ops__['deepspeed_shm_comm'] = False; "
        "from editrl.cli import main; sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "sharded while loading: False" in done.stderr


# editrl sft


def test_sft_writes_a_transformer_that_the_editor_takes(small_sft, first_frame, tmp_path, capsys):
    assert main(small_sft(tmp_path / "run", "--learning_rate", "1e-3")) == 0
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}
    losses = [log["loss"] for log in history(tmp_path / "run" / "checkpoint-3") if "loss" in log]
    assert len(losses) == 3
    assert all(loss > 0 for loss in losses)
    transformer = tmp_path / "run" / "transformer"
    assert capsys.readouterr().out.rstrip().endswith(f"editrl edit --transformer {transformer} ...")
    assert not torch.equal(first_frame(), first_frame("--transformer", transformer))


def test_sft_evaluates_on_its_own_manifest_and_resumes(small_sft, shapes_manifest, tmp_path):
    held_out = ["--eval_manifest", shapes_manifest, "--eval_strategy", "steps", "--eval_steps", 1]
    assert main(small_sft(tmp_path / "run", *held_out)) == 0
    assert main(small_sft(tmp_path / "run", *held_out)) == 2
    assert main(small_sft(tmp_path / "run", *held_out, "--resume_from_checkpoint", "true", "--max_steps", 4)) == 0
    logs = history(tmp_path / "run" / "checkpoint-4")
    assert [log["step"] for log in logs if "eval_loss" in log] == [1, 2, 3, 4]


# editrl edit


def stream_of(path) -> dict:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = sum(1 for _ in container.decode(stream))
        return {
            "codec": stream.codec_context.name,
            "format": stream.codec_context.pix_fmt,
            "size": (stream.height, stream.width),
            "fps": float(stream.average_rate),
            "frames": frames,
        }


@pytest.mark.parametrize(
    ("frames", "height", "width", "fps", "options", "expected"),
    [
        (5, 32, 32, 8.0, [], (5, 32, 32)),
        (9, 32, 48, 12.5, [], (9, 32, 48)),
        (9, 32, 32, 24.0, ["--num_frames", 5], (5, 32, 32)),
        (5, 50, 70, 8.0, ["--height", 32, "--width", 48], (5, 32, 48)),
    ],
)
def test_edit_writes_a_clip_of_the_size_length_and_rate_of_its_source(
    small_edit, tmp_path, capsys, frames, height, width, fps, options, expected
):
    source = write_video(tmp_path / "source.mp4", torch.rand(frames, 3, height, width), fps)
    output = tmp_path / "new folder" / "edited.mp4"
    assert main(small_edit(output, *options, source=source)) == 0
    found = stream_of(output)
    assert (found["frames"], *found["size"], found["fps"]) == (*expected, fps)
    assert (found["codec"], found["format"]) == ("h264", "yuv420p")  # what every player takes
    assert capsys.readouterr().out == f"{output}: {expected[0]} frames of {expected[2]}x{expected[1]} at {fps:g} fps\n"


@pytest.mark.parametrize("suffix", [".png", ".mp4"])
def test_edit_takes_an_image(small_edit, tmp_path, suffix):
    source = write_image(tmp_path / "source.png", torch.rand(3, 32, 48))
    assert main(small_edit(tmp_path / f"edited{suffix}", source=source)) == 0
    assert read_video(tmp_path / f"edited{suffix}")[0].shape == (1, 3, 32, 48)
    if suffix == ".png":
        assert Image.open(tmp_path / "edited.png").format == "PNG"


@pytest.fixture
def first_frame(small_edit, tmp_path):
    """words -> the edited first frame of the source, to the bit: a video file would blur small differences."""

    def edited(*words) -> torch.Tensor:
        assert main(small_edit(tmp_path / "frame.png", "--num_frames", 1, *words)) == 0
        return read_video(tmp_path / "frame.png")[0]

    return edited


def test_edit_looks_at_a_reference_image(first_frame, tmp_path):
    reference = write_image(tmp_path / "reference.png", torch.rand(3, 40, 24))
    assert not torch.equal(first_frame(), first_frame("--reference", reference))


def test_the_same_seed_gives_the_same_edit(first_frame):
    assert torch.equal(first_frame("--seed", 7), first_frame("--seed", 7))
    assert not torch.equal(first_frame("--seed", 7), first_frame("--seed", 8))


def test_steps_shift_and_guidance_matter(first_frame):
    plain = first_frame()
    for words in (["--num_inference_steps", 3], ["--shift", 2], ["--guidance_scale", 6]):
        assert not torch.equal(first_frame(*words), plain), words


def test_edit_applies_an_adapter_to_the_transformer_that_it_was_trained_on(first_frame, trained_adapter):
    base = ["--transformer", WEIGHTS / "sft-underediting"]
    assert not torch.equal(first_frame(*base), first_frame(*base, "--adapter", trained_adapter))
