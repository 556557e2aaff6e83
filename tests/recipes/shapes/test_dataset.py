"""The embedded world as training data, in memory and on disk."""

import json

import pytest
import torch

from editrl.data import EditDataset
from editrl.errors import EditrlError
from editrl.recipes.shapes.dataset import main, rows, write_dataset
from editrl.recipes.shapes.oracle import score
from editrl.recipes.shapes.world import render_scenes, sample_scenes
from editrl.reward import RewardSet, reward_columns


@pytest.fixture(scope="module")
def scenes():
    return sample_scenes(14, seed=31)


@pytest.fixture(scope="module")
def manifest(scenes, tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("world") / "new" / "folder", scenes)


def test_rows_in_memory_are_editing_examples(scenes):
    dataset = EditDataset(rows(scenes))
    dataset.check()
    pixels = render_scenes(scenes)
    for index, (scene, example) in enumerate(zip(scenes, dataset, strict=False)):
        assert (example.id, example.task, example.instruction) == (scene.id, scene.task, scene.instruction)
        assert (example.source_caption, example.target_caption) == (scene.source_caption, scene.target_caption)
        assert torch.equal(example.source, pixels["source"][index] / 255)
        assert torch.equal(example.target, pixels["target"][index] / 255)
        assert torch.equal(example.mask, pixels["mask"][index].float())
        assert (example.reference_image is None) == (scene.task != "reference")
        assert example.extra == {"scene": scene.to_dict(), "underedited": False}


def test_a_written_data_set_reads_back(scenes, manifest):
    dataset = EditDataset.from_manifest(manifest)
    dataset.check()
    examples, pixels = [dataset[index] for index in range(len(dataset))], render_scenes(scenes)
    for key in ("source", "target"):
        torch.testing.assert_close(
            torch.stack([getattr(example, key) for example in examples]), pixels[key] / 255, atol=2.5 / 255, rtol=0
        )
    assert torch.equal(torch.stack([example.mask for example in examples]), pixels["mask"].float())
    for index, example in enumerate(examples):
        if scenes[index].reference:
            assert torch.equal(example.reference_image[0], pixels["reference"][index] / 255)
        assert example.fps == 8
    result = score([example.target for example in examples], [example.extra["scene"] for example in examples])
    assert result["success"].all()
    assert result["preservation_psnr"].min() > 40


def test_the_oracle_is_a_reward_by_its_dotted_path(scenes):
    names = ["oracle_success", "oracle_margin", "oracle_preservation"]
    dataset = EditDataset(rows(scenes))
    reward_set = RewardSet([f"editrl.recipes.shapes.oracle:{name}" for name in names])
    reward_set.check(dataset)
    examples = [dataset[index] for index in range(len(dataset))]
    values = reward_set([example.source for example in examples], reward_columns(examples))
    assert values[:, 0].tolist() == [0.0] * len(scenes)
    assert values[:, 2].tolist() == pytest.approx([60.0] * len(scenes))


def test_underediting_copies_the_source_over_a_share_of_the_targets(scenes):
    flawed = rows(scenes, underediting=0.5, seed=1)
    copies = [torch.equal(row["source"], row["target"]) for row in flawed]
    assert sum(copies) == 7
    assert copies == [row["underedited"] for row in flawed]
    assert copies == [row["underedited"] for row in rows(scenes, underediting=0.5, seed=1)]
    assert copies != [row["underedited"] for row in rows(scenes, underediting=0.5, seed=2)]
    assert [row["target_caption"] for row in flawed] == [scene.target_caption for scene in scenes]
    with pytest.raises(EditrlError, match="share between 0 and 1"):
        rows(scenes, underediting=1.5)


def test_an_existing_data_set_is_not_overwritten(scenes, manifest):
    before = manifest.read_bytes()
    with pytest.raises(EditrlError, match=r"manifest\.jsonl: is already there"):
        write_dataset(manifest.parent, scenes)
    assert manifest.read_bytes() == before


def test_scenes_must_be_there_and_have_their_own_ids(scenes, tmp_path):
    with pytest.raises(EditrlError, match="each its own id"):
        write_dataset(tmp_path, [scenes[0], scenes[0]])
    with pytest.raises(EditrlError, match="0 scenes"):
        write_dataset(tmp_path, [])
    assert not list(tmp_path.iterdir())


def test_the_command_writes_a_data_set(tmp_path, capsys):
    options = ["--num", "4", "--seed", "5", "--split", "heldout", "--tasks", "add", "--underediting", "0.5"]
    assert main([str(tmp_path / "out"), *options]) == 0
    assert "wrote 4 scenes to" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert [line["scene"] for line in lines] == [scene.to_dict() for scene in sample_scenes(4, 5, "heldout", ["add"])]
    assert sum(line["underedited"] for line in lines) == 2
    assert not list((tmp_path / "out").rglob("*.tmp"))


@pytest.mark.parametrize(
    ("options", "words"), [(["--split", "trian"], "Did you mean 'train'"), (["--num", "0"], "0 scenes")]
)
def test_the_command_tells_an_error_in_one_line(tmp_path, capsys, options, words):
    assert main([str(tmp_path / "out"), *options]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and words in message
