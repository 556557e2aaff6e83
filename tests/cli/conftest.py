"""A small data set of the embedded world, and the smallest GRPO run on it."""

import pytest

from editrl.recipes.shapes import WEIGHTS
from editrl.recipes.shapes.dataset import write_dataset
from editrl.recipes.shapes.world import sample_scenes

EDITOR = str(WEIGHTS / "sft")


@pytest.fixture(scope="session")
def shapes_manifest(tmp_path_factory):
    """Manifest of four scenes; read only."""
    return write_dataset(tmp_path_factory.mktemp("shapes"), sample_scenes(4, seed=3))


@pytest.fixture(scope="session")
def small_grpo(shapes_manifest):
    """(output_dir, words...) -> the command line of a run of 2 updates with 8 clips each. `reward`: only this one."""

    def words(output_dir, *further, reward: str | None = None) -> list[str]:
        if reward is not None:
            further = ("--reward_funcs", reward, "--reward_weights", "1", "--metric_funcs", *further)
        return [
            *("grpo", "--config", "shapes/grpo", "--output_dir", str(output_dir)),
            *(
                "--train_manifest",
                str(shapes_manifest),
                "--eval_strategy",
                "no",
                "--eval_on_start",
                "false",
            ),
            *("--num_generations", "4", "--generation_batch_size", "8", "--per_device_train_batch_size", "8"),
            *("--gradient_accumulation_steps", "2", "--num_inference_steps", "4", "--sde_window_range", "0", "2"),
            *("--max_steps", "2", "--save_steps", "1"),
            *map(str, further),
        ]

    return words


@pytest.fixture(scope="session")
def small_sft(shapes_manifest):
    """(output_dir, words...) -> the command line of an SFT run of 3 steps."""

    def words(output_dir, *further) -> list[str]:
        return [
            *("sft", "--model_name_or_path", EDITOR, "--output_dir", str(output_dir)),
            *("--train_manifest", str(shapes_manifest), "--report_to", "none", "--logging_steps", "1"),
            *("--max_steps", "3", "--per_device_train_batch_size", "2", "--save_steps", "2"),
            *map(str, further),
        ]

    return words


@pytest.fixture(scope="session")
def small_edit(shapes_manifest):
    """(output, words..., source=...) -> the command line of an edit in two denoising steps."""

    def words(output, *further, source=None) -> list[str]:
        source = source or shapes_manifest.parent / "source" / "00000.mp4"
        return [
            *("edit", str(source), "make the red circle blue", "-o", str(output)),
            *("--model_name_or_path", EDITOR, "--num_inference_steps", "2", *map(str, further)),
        ]

    return words
