"""EditDataset: rows in, examples out, and every bad row is named by its line and id."""

import json
import subprocess
import sys

import datasets
import pytest
import torch
from torch.utils.data import DataLoader

from editrl.data import EditDataset, write_image, write_video
from editrl.errors import EditrlError


def clip(frames=5, height=32, width=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (frames, 3, height, width), generator=generator, dtype=torch.uint8)


def memory_row(**changes):
    return {"instruction": "make it blue", "source": clip(), **changes}


@pytest.fixture
def folder(tmp_path):
    """A folder with one of everything."""
    write_video(tmp_path / "source.mp4", clip(seed=1), fps=12.5, lossless=True)
    write_video(tmp_path / "target.mp4", clip(seed=2), lossless=True)
    write_video(tmp_path / "long.mp4", clip(frames=9, height=48, width=80), lossless=True)
    write_video(tmp_path / "four.mp4", clip(frames=4), lossless=True)
    write_video(tmp_path / "odd.mp4", clip(height=33, width=31), lossless=True)
    half = torch.zeros(1, 3, 32, 32)
    half[..., 16:] = 1
    write_image(tmp_path / "mask.png", half)
    write_image(tmp_path / "reference.png", clip(1, 20, 30))
    (tmp_path / "broken.mp4").write_bytes(b"no video" * 50)
    return tmp_path


def manifest(folder, *rows):
    path = folder / "manifest.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def file_row(**changes):
    return {"id": "cat", "instruction": "make it blue", "source": "source.mp4", **changes}


# -- what arrives ------------------------------------------------------------------------------------------------------


def test_a_full_row_arrives_with_every_column(folder):
    row = file_row(
        target="target.mp4",
        mask="mask.png",
        reference_image="reference.png",
        source_caption="a cat",
        target_caption="a blue cat",
        task="recolour",
        fps=7.5,
        weight=2,
        licence="CC BY",
        scene={"objects": [1, 2]},
    )
    example = EditDataset.from_manifest(manifest(folder, row))[0]
    assert (example.id, example.instruction, example.task) == ("cat", "make it blue", "recolour")
    assert (example.source_caption, example.target_caption) == ("a cat", "a blue cat")
    assert (example.fps, example.weight) == (7.5, 2.0)
    assert example.extra == {"licence": "CC BY", "scene": {"objects": [1, 2]}}
    assert example.source.shape == example.target.shape == (5, 3, 32, 32)
    assert (example.source * 255 - clip(seed=1).float()).abs().max() <= 2.001
    assert (example.target * 255 - clip(seed=2).float()).abs().max() <= 2.001
    assert example.reference_image.shape == (1, 3, 20, 30)
    assert example.mask.shape == (5, 1, 32, 32)
    assert torch.equal(example.mask.unique(), torch.tensor([0.0, 1.0]))
    assert example.mask[:, :, :, 16:].all() and not example.mask[:, :, :, :16].any()


def test_a_minimal_row_has_defaults(folder):
    example = EditDataset.from_manifest(manifest(folder, {"instruction": "x", "source": "source.mp4"}))[0]
    assert (example.id, example.fps, example.weight) == ("0", 12.5, 1.0)  # fps is the clip's
    assert example.target is example.mask is example.reference_image is example.source_caption is example.task is None
    assert example.extra == {}


def test_tensors_bytes_and_paths_are_the_same_clip(folder):
    path = folder / "source.mp4"
    rows = [memory_row(source=source) for source in (clip(seed=1), path.read_bytes(), path, "source.mp4")]
    rows.append(memory_row(source=clip(seed=1).float() / 255))
    in_memory, *read, floats = EditDataset(rows, root=folder)
    assert torch.equal(in_memory.source, floats.source)
    for example in read:
        assert torch.equal(example.source, read[0].source)
        assert (example.source - in_memory.source).abs().max() <= 2.001 / 255


def test_root_is_the_folder_of_the_manifest_unless_given(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    path = manifest(elsewhere, file_row())
    with pytest.raises(EditrlError, match="no file"):
        EditDataset.from_manifest(path).check()
    EditDataset.from_manifest(path, root=folder).check()


def test_an_image_is_a_clip_of_one_frame(folder):
    image = torch.rand(3, 32, 32)
    example = EditDataset([memory_row(source=image, mask=torch.ones(1, 32, 32))])[0]
    assert example.source.shape == (1, 3, 32, 32) and example.mask.shape == (1, 1, 32, 32)


def test_row_gives_metadata_without_decoding(folder):
    dataset = EditDataset.from_manifest(manifest(folder, file_row(source="broken.mp4", mood="calm")))
    row = dataset.row(0)
    assert (row["source"], row["mask"], row["mood"]) == ("broken.mp4", None, "calm")


def test_it_is_a_sequence(folder):
    dataset = EditDataset([memory_row(), memory_row()])
    assert len(dataset) == 2 and dataset[-1].id == "1"
    assert [example.id for example in dataset] == ["0", "1"]
    with pytest.raises(IndexError):
        dataset[2]


def test_it_works_in_the_workers_of_a_data_loader(folder):
    dataset = EditDataset.from_manifest(manifest(folder, file_row(), file_row(id="dog")))
    loader = DataLoader(dataset, batch_size=2, num_workers=1, collate_fn=list, multiprocessing_context="spawn")
    (batch,) = loader
    assert [example.id for example in batch] == ["cat", "dog"]


def test_tensors_in_memory_need_no_video_library():
    code = """if True:
        import sys, torch
        sys.modules["av"] = sys.modules["PIL"] = None  # importing either fails
        from editrl.data import EditDataset
        dataset = EditDataset([{"instruction": "x", "source": torch.rand(5, 3, 32, 32)}], height=16, width=16)
        dataset.check()
        print(dataset[0].source.shape)
    """
    assert "[5, 3, 16, 16]" in subprocess.check_output([sys.executable, "-c", code], text=True)


# -- datasets.Dataset --------------------------------------------------------------------------------------------------


def test_rows_may_be_a_hugging_face_dataset(folder):
    rows = datasets.Dataset.from_list([file_row(mood="calm"), file_row(id=None, mood="merry")])
    dataset = EditDataset(rows, root=folder)
    dataset.check()
    assert [example.id for example in dataset] == ["cat", "1"]
    assert dataset[0].extra == {"mood": "calm"}
    with pytest.raises(EditrlError, match=r"row 0 .*: source: no file .*\(and 1 more missing\)"):
        EditDataset(rows, root=folder / "nowhere").check()


def test_images_inside_a_hugging_face_dataset_are_read_by_us(folder):
    image = folder / "reference.png"
    rows = datasets.Dataset.from_dict(
        {"instruction": ["x", "y"], "source": [str(image), {"path": None, "bytes": image.read_bytes()}]},
        features=datasets.Features({"instruction": datasets.Value("string"), "source": datasets.Image()}),
    )
    dataset = EditDataset(rows, height=16, width=16)
    assert torch.equal(dataset[0].source, dataset[1].source)
    assert dataset[0].source.shape == (1, 3, 16, 16)


def test_hugging_face_dataset_without_a_required_column(folder):
    rows = datasets.Dataset.from_list([{"instruction": "x", "sources": "source.mp4"}])
    with pytest.raises(EditrlError, match=r"has no 'source', which every row needs\. Did you mean 'sources'\?"):
        EditDataset(rows)


# -- geometry ----------------------------------------------------------------------------------------------------------


def test_num_frames_height_and_width_apply_to_source_target_and_mask(folder):
    row = file_row(source="long.mp4", target="long.mp4", mask="long.mp4", reference_image="long.mp4")
    example = EditDataset.from_manifest(manifest(folder, row), num_frames=5, height=16, width=32)[0]
    assert example.source.shape == example.target.shape == (5, 3, 16, 32)
    assert example.mask.shape == (5, 1, 16, 32)
    assert example.reference_image.shape == (1, 3, 48, 80)  # keeps its own
    assert torch.equal(example.source, example.target)


def test_tensors_in_memory_get_the_same_geometry():
    row = memory_row(source=clip(9, 48, 80), mask=torch.ones(9, 1, 48, 80))
    example = EditDataset([row], num_frames=5, height=16, width=32)[0]
    assert example.source.shape == (5, 3, 16, 32) and example.mask.shape == (5, 1, 16, 32)


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(5, 1, 32, 32, dtype=torch.uint8),
        torch.full((5, 1, 32, 32), 255, dtype=torch.uint8),
        torch.ones(5, 1, 32, 32, dtype=torch.bool),
        torch.full((5, 1, 32, 32), 0.5),
        torch.ones(1, 1, 32, 32),
    ],
)
def test_a_mask_is_cut_at_one_half_however_it_is_stored(mask):
    assert torch.equal(EditDataset([memory_row(mask=mask)])[0].mask, torch.ones(5, 1, 32, 32))
    assert not EditDataset([memory_row(mask=torch.zeros_like(mask))])[0].mask.any()


@pytest.mark.parametrize(
    "row, complaint",
    [
        ({"source": "four.mp4"}, r"source: 4 frames are not 4k\+1; set num_frames, for example 1"),
        ({"source": "odd.mp4"}, r"source: 33x31 is not divisible by 16; set height and width"),
        ({"target": "long.mp4"}, "target: has 9 frames, source has 5"),
        ({"mask": "four.mp4"}, "mask: has 4 frames, source has 5"),
        ({"mask": "reference.png"}, r"mask: is 20x30 \(height x width\), source is 32x32"),
        ({"target": "mask.png"}, "target: has 1 frames, source has 5"),
    ],
)
def test_a_clip_that_does_not_fit_is_an_error_with_line_and_id(folder, row, complaint):
    dataset = EditDataset.from_manifest(manifest(folder, file_row(id="good"), file_row(**row)))
    with pytest.raises(EditrlError, match=rf"manifest\.jsonl:2 \(id 'cat'\): {complaint}"):
        dataset[1]
    with pytest.raises(EditrlError, match=complaint):
        dataset.check()
    dataset.check(limit=1)


@pytest.mark.parametrize("key", ["source", "target", "mask"])
def test_a_clip_shorter_than_num_frames_is_an_error(folder, key):
    row = file_row(**{"source": "long.mp4", key: "four.mp4"})
    dataset = EditDataset.from_manifest(manifest(folder, row), num_frames=5, height=32, width=32)
    with pytest.raises(EditrlError, match=f"{key}: has 4 frames, num_frames is 5"):
        dataset[0]


@pytest.mark.parametrize(
    "geometry, complaint",
    [
        ({"num_frames": 6}, r"num_frames: 6 frames are not 4k\+1; set num_frames, for example 5"),
        ({"num_frames": 0}, r"0 frames are not 4k\+1"),
        ({"height": 32}, "width is None; give both"),
        ({"height": 32, "width": 40}, "height x width: 32x40 is not divisible by 16"),
    ],
)
def test_impossible_settings_are_refused_at_construction(geometry, complaint):
    with pytest.raises(EditrlError, match=complaint):
        EditDataset([memory_row()], **geometry)


def test_another_policy_may_need_other_multiples():
    dataset = EditDataset([memory_row(source=clip(3, 12, 20))], frame_multiple=2, size_multiple=4)
    assert dataset[0].source.shape == (3, 3, 12, 20)


# -- bad rows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, complaint",
    [
        ('{"id": "dog", "instruction": ', r"is no JSON \(.*\); write one object a line"),
        ('["cat", "blue"]', "is a list; write an object with keys"),
        ('{"id": "dog", "source": "source.mp4"}', r"\(id 'dog'\): has no 'instruction'"),
        ('{"id": "dog", "instruction": "x", "source": null}', r"\(id 'dog'\): has no 'source'"),
        ('{"id": "dog", "instrution": "x", "source": "source.mp4"}', "Did you mean 'instrution'"),
        ('{"id": "cat", "instruction": "x", "source": "source.mp4"}', r"manifest\.jsonl:1 has the same id"),
        ('{"instruction": ["x"], "source": "source.mp4"}', "instruction is a list; it must be text"),
        ('{"instruction": "x", "source": "source.mp4", "task": 3}', "task is a int; it must be text"),
        ('{"instruction": "x", "source": "source.mp4", "fps": 0}', "fps is 0; it must be a number above 0"),
        ('{"instruction": "x", "source": "source.mp4", "fps": "8"}', "fps is '8'; it must be a number"),
        ('{"instruction": "x", "source": "source.mp4", "weight": NaN}', "weight is nan; it must be a number"),
    ],
)
def test_a_bad_line_is_refused_at_construction_with_its_number(folder, line, complaint):
    path = manifest(folder, file_row(), "", line)  # a blank line counts but is no row
    with pytest.raises(EditrlError, match=rf"manifest\.jsonl:3.*{complaint}") as caught:
        EditDataset.from_manifest(path)
    assert "\n" not in str(caught.value)


def test_a_default_id_may_not_meet_a_given_one():
    with pytest.raises(EditrlError, match=r"row 1 \(id '1'\): row 0 has the same id"):
        EditDataset([memory_row(id=1), memory_row()])


@pytest.mark.parametrize(
    "rows, complaint", [([], "has no rows"), ("manifest.jsonl", "EditDataset.from_manifest"), ([3], "row 0: is a int")]
)
def test_what_are_no_rows_is_refused(rows, complaint):
    with pytest.raises(EditrlError, match=complaint):
        EditDataset(rows)


def test_an_unreadable_or_empty_manifest_is_named(tmp_path):
    with pytest.raises(EditrlError, match=r"nowhere\.jsonl: the manifest cannot be read"):
        EditDataset.from_manifest(tmp_path / "nowhere.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"instruction": "caf\xe9"}')
    with pytest.raises(EditrlError, match=r"latin\.jsonl: the manifest cannot be read"):
        EditDataset.from_manifest(tmp_path / "latin.jsonl")
    with pytest.raises(EditrlError, match="has no rows"):
        EditDataset.from_manifest(manifest(tmp_path, "", ""))


@pytest.mark.parametrize(
    "source, complaint",
    [
        (torch.rand(5, 32, 32, 3), r"tensor \[5, 32, 32, 3\]; give \[frames, 3, height, width\]"),
        (torch.rand(5, 3, 32, 32) * 2 - 1, r"values from -.* to .*; floating-point video lies in \[0, 1\]"),
        (torch.full((5, 3, 32, 32), float("nan")), "values from nan"),
        (torch.zeros(5, 3, 32, 32, dtype=torch.int32), "int32"),
        ([[0.0]], "is a list; give a path, bytes or a tensor"),
        (b"no video" * 50, "cannot be decoded"),
    ],
)
def test_bad_media_in_memory_are_named(source, complaint):
    dataset = EditDataset([memory_row(id="dog", source=source)])
    with pytest.raises(EditrlError, match=rf"row 0 \(id 'dog'\): source: .*{complaint}"):
        dataset.check()


# -- check -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["source", "target", "mask", "reference_image"])
def test_check_finds_a_missing_file_in_any_column_beyond_the_limit(folder, key):
    rows = [file_row(id=f"good{i}") for i in range(3)] + [file_row(**{key: "nowhere.mp4"})]
    dataset = EditDataset.from_manifest(manifest(folder, *rows))
    with pytest.raises(EditrlError, match=rf"manifest\.jsonl:4 \(id 'cat'\): {key}: no file .*nowhere\.mp4"):
        dataset.check(limit=1)


def test_check_decodes_as_many_rows_as_it_is_told(folder):
    dataset = EditDataset.from_manifest(manifest(folder, file_row(), file_row(id="dog", source="broken.mp4")))
    dataset.check(limit=0)
    dataset.check(limit=1)
    for limit in (2, 64, None):
        with pytest.raises(
            EditrlError, match=r"manifest\.jsonl:2 \(id 'dog'\): source: .*broken\.mp4: cannot be decod"
        ):
            dataset.check(limit=limit)
