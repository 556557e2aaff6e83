"""The conditions cache: what goes in comes out, and neither damage nor a change of clip, text or model goes unseen."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from editrl.cache import ConditionsCache, fill, fingerprint, shards
from editrl.data import EditDataset, write_image, write_video
from editrl.errors import EditrlError
from editrl.policies.hunyuan_video.policy import HunyuanVideoPolicy
from editrl.policy import Conditions, FlowPolicy
from editrl.recipes.shapes import WEIGHTS
from editrl.recipes.shapes.dataset import rows, write_dataset
from editrl.recipes.shapes.world import TASKS, sample_scenes

EDITOR = str(WEIGHTS / "sft")
SCENES = sample_scenes(8, seed=4)


@pytest.fixture(scope="module")
def editor() -> HunyuanVideoPolicy:
    """Not to be changed."""
    return HunyuanVideoPolicy.from_pretrained(EDITOR)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The manifest of eight pairs; not to be changed."""
    return write_dataset(tmp_path_factory.mktemp("pairs"), SCENES)


@pytest.fixture
def manifest(written, tmp_path):
    """The manifest of eight pairs that a test may change; copied with their times."""
    shutil.copytree(written.parent, tmp_path / "pairs")
    return tmp_path / "pairs" / written.name


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


def filled(folder, policy, *datasets, batch_size=4, shard_size=4, **options):
    cache = ConditionsCache(folder, policy.fingerprint())
    return fill(cache, policy, datasets, batch_size=batch_size, shard_size=shard_size, **options)


def opened(folder, policy) -> ConditionsCache:
    return ConditionsCache(folder, policy.fingerprint())


def read(folder, policy, dataset) -> list:
    found = opened(folder, policy).rows(dataset)
    return [found[index] for index in range(len(found))]


def assert_equal(one: Conditions, other: Conditions):
    assert one.sequences == other.sequences
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        assert tensor.dtype == other.tensors[name].dtype, name
        assert torch.equal(tensor, other.tensors[name]), name


def assert_holds(folder, policy, dataset):
    """The cache gives for every row what the policy computes, but for the rounding of another batch."""
    for encoded, example in zip(read(folder, policy, dataset), dataset, strict=True):
        torch.testing.assert_close(encoded.conditions.tensors, policy.encode([example]).tensors, rtol=0, atol=1e-4)
        expected = policy.encode_videos(example.target[None])
        torch.testing.assert_close(encoded.target_latents, expected, rtol=0, atol=1e-4)


def change_row(manifest: Path, index: int, **changes):
    lines = manifest.read_text().splitlines()
    lines[index] = json.dumps(json.loads(lines[index]) | changes)
    manifest.write_text("\n".join(lines) + "\n")


def scene_with(reference: bool) -> int:
    """The number of a scene that has, or has not, a reference image."""
    return next(number for number, scene in enumerate(SCENES) if bool(scene.reference) == reference)


# -- what goes in comes out --------------------------------------------------------------------------------------------


def mixed_rows() -> list[dict]:
    """All kinds of edits, so long and short instructions and reference images; an image; a row without target, one
    without mask."""
    pairs = rows([sample_scenes(1, seed=6, tasks=[task])[0] for task in TASKS])
    for number, row in enumerate(pairs):
        row["id"] = f"row-{number}"
    image = pairs[0] | {key: pairs[0][key][:1] for key in ("source", "target", "mask")} | {"id": "image"}
    alone = pairs[1] | {"id": "alone", "target": None}
    unmasked = pairs[2] | {"id": "unmasked", "mask": None}
    return [*pairs, image, alone, unmasked]


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"reference_position": "last"}], ids=str)
def test_every_tensor_comes_back_exactly_and_in_its_own_dtype(folder, options):
    policy = HunyuanVideoPolicy.from_pretrained(EDITOR, **options)
    dataset = EditDataset(mixed_rows())
    filled(folder, policy, dataset, batch_size=1)
    lengths = set()
    for encoded, example in zip(read(folder, policy, dataset), dataset, strict=True):
        assert_equal(encoded.conditions, policy.encode([example]))
        lengths.add(encoded.conditions.instructor_tokens.shape[1])
        if example.target is None:
            assert encoded.target_latents is None and encoded.latent_mask is None
            continue
        mask = torch.zeros_like(example.source[:, :1]) if example.mask is None else example.mask
        assert torch.equal(encoded.target_latents, policy.encode_videos(example.target[None]))
        assert torch.equal(encoded.latent_mask, policy.latent_mask(mask[None]))
    assert encoded.conditions.instructor_tokens.dtype == policy.transformer.dtype
    assert encoded.conditions.source_latents.dtype == torch.float32
    assert ("has_reference" in encoded.conditions.tensors) == ("reference_position" in options)
    assert len(lengths) > 2, "the instructions must differ in length for this test to say anything"


def test_a_batch_from_the_cache_is_the_batch_that_was_encoded(folder, editor):
    """The padding that a batch gives is not stored, and joining gives it back."""
    dataset = EditDataset([row for row in mixed_rows() if row["id"].startswith("row")])
    filled(folder, editor, dataset, batch_size=len(dataset), shard_size=len(dataset))
    examples = list(dataset)
    expected = editor.encode(examples)
    assert_equal(opened(folder, editor).rows(dataset).encode(examples), expected)
    lengths = [one.conditions.instructor_tokens.shape[1] for one in read(folder, editor, dataset)]
    assert lengths == expected.instructor_mask.sum(1).tolist()


def test_examples_are_found_by_id_in_any_order(folder, editor, written):
    dataset = EditDataset.from_manifest(written)
    filled(folder, editor, dataset, batch_size=1)
    found = opened(folder, editor).rows(dataset)
    stored = found.encode([dataset[5], dataset[2]])
    for position, row in enumerate([5, 2]):
        assert torch.equal(stored[[position]].source_latents, found[row].conditions.source_latents)
        assert torch.equal(stored[[position]].pooled_text, found[row].conditions.pooled_text)


def test_unconditional_prompts_are_not_in_it(folder, editor, written):
    dataset = EditDataset.from_manifest(written)
    filled(folder, editor, dataset)
    with pytest.raises(EditrlError, match="no unconditional prompts"):
        opened(folder, editor).rows(dataset).encode([dataset[0]], unconditional=True)


def test_a_row_that_stands_there_twice_is_encoded_once(folder, editor, monkeypatch):
    pairs = rows(SCENES[:2])
    dataset = EditDataset([pairs[0], pairs[1], pairs[0] | {"id": "again"}])
    assert filled(folder, editor, dataset).encoded == 2
    assert_equal(*(read(folder, editor, dataset)[index].conditions for index in (0, 2)))


# -- what is kept ------------------------------------------------------------------------------------------------------


def test_a_second_run_encodes_nothing(folder, editor, written, monkeypatch):
    dataset = EditDataset.from_manifest(written)
    first = filled(folder, editor, dataset)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert (first.encoded, first.kept, first.bytes) == (8, 0, sum(path.stat().st_size for path in folder.iterdir()))
    monkeypatch.setattr(editor, "encode", None)
    second = filled(folder, editor, dataset)
    assert (second.encoded, second.kept, second.bytes) == (0, 8, 0)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize("how", ["touched", "copied", "shuffled and filtered", "other ids, captions and fps"])
def test_what_changes_no_condition_is_recognised(folder, editor, manifest, tmp_path, how):
    filled(folder, editor, EditDataset.from_manifest(manifest))
    lines = manifest.read_text().splitlines()
    if how == "touched":
        for clip in manifest.parent.rglob("*.mp4"):
            os.utime(clip)
    elif how == "copied":
        moved = shutil.copytree(manifest.parent, tmp_path / "elsewhere", copy_function=shutil.copyfile)
        manifest = moved / manifest.name
    elif how == "shuffled and filtered":
        manifest.write_text("\n".join(lines[:3:-1] + lines[1:3]))
    else:
        for index in range(len(lines)):
            change_row(manifest, index, id=f"new-{index}", target_caption="something else", task="style", fps=3.0)
    dataset = EditDataset.from_manifest(manifest)
    assert len(read(folder, editor, dataset)) == len(dataset)
    again = filled(folder, editor, dataset)
    assert again.encoded == 0


def test_a_data_set_that_was_touched_is_read_once_more_and_then_known(folder, editor, manifest, monkeypatch):
    filled(folder, editor, EditDataset.from_manifest(manifest))
    for clip in manifest.parent.rglob("*.mp4"):
        os.utime(clip)
    dataset = EditDataset.from_manifest(manifest)
    read, digest = [], fingerprint.hashlib.file_digest

    def counted(file, algorithm):
        read.append(file.name)
        return digest(file, algorithm)

    monkeypatch.setattr(fingerprint.hashlib, "file_digest", counted)
    opened(folder, editor).require([dataset])
    assert read, "its times say nothing any more"
    assert filled(folder, editor, dataset).encoded == 0
    read.clear()
    opened(folder, editor).require([dataset])
    assert not read


def test_the_trained_transformer_does_not_matter(folder, editor, written):
    dataset = EditDataset.from_manifest(written)
    filled(folder, editor, dataset)
    trained = HunyuanVideoPolicy.from_pretrained(EDITOR, transformer=str(WEIGHTS / "sft-underediting"))
    assert trained.fingerprint() == editor.fingerprint()
    assert len(read(folder, trained, dataset)) == 8


def test_the_fingerprint_does_not_depend_on_where_the_editor_lies_or_whether_it_was_used(editor, tmp_path, written):
    editor.save_pretrained(tmp_path / "copy")
    copy = HunyuanVideoPolicy.from_pretrained(str(tmp_path / "copy"))
    copy.encode([EditDataset.from_manifest(written)[0]])
    assert copy.fingerprint() == editor.fingerprint()


def test_settings_of_the_data_lie_side_by_side(folder, editor, written):
    images, clips = EditDataset.from_manifest(written, num_frames=1), EditDataset.from_manifest(written)
    assert filled(folder, editor, clips).encoded == 8
    assert filled(folder, editor, images).encoded == 8
    assert filled(folder, editor, clips).encoded == 0
    assert read(folder, editor, images)[0].conditions.source_latents.shape[2] == 1
    assert read(folder, editor, clips)[0].conditions.source_latents.shape[2] == 2


# -- stale -------------------------------------------------------------------------------------------------------------


def repaint(manifest: Path, column: str, row: int) -> None:
    """Another picture in a clip of the same size and frames."""
    path = manifest.parent / json.loads(manifest.read_text().splitlines()[row])[column]
    if path.suffix == ".png":
        write_image(path, torch.rand(1, 3, 32, 32))
    else:
        write_video(path, torch.rand(5, 3, 32, 32), lossless=True)


@pytest.mark.parametrize(
    ("column", "what"),
    [
        ("source", "the clip changed"),
        ("target", "the target clip changed"),
        ("mask", "the mask changed"),
        ("reference_image", "the reference image changed"),
    ],
)
def test_a_changed_file_is_told_and_only_its_row_is_encoded_again(folder, editor, manifest, column, what):
    dataset = EditDataset.from_manifest(manifest)
    filled(folder, editor, dataset)
    row = scene_with(reference=column == "reference_image")
    repaint(manifest, column, row)
    message = (
        rf"lacks 1 of 8 rows: .*manifest.jsonl:{row + 1} \(id '{SCENES[row].id}'\): {what}\. Fill it with `editrl "
    )
    with pytest.raises(EditrlError, match=message):
        opened(folder, editor).require([dataset])
    assert filled(folder, editor, dataset).encoded == 1
    assert_holds(folder, editor, dataset)


def test_a_changed_file_of_the_same_size_is_told(folder, editor, manifest):
    dataset = EditDataset.from_manifest(manifest)
    filled(folder, editor, dataset)
    clip = manifest.parent / "source" / "00003.mp4"
    contents = bytearray(clip.read_bytes())
    contents[-1] ^= 1
    clip.write_bytes(contents)
    with pytest.raises(EditrlError, match=r"manifest.jsonl:4 .*: the clip changed\."):
        opened(folder, editor).require([dataset])


def test_a_changed_instruction_is_told(folder, editor, manifest):
    filled(folder, editor, EditDataset.from_manifest(manifest))
    change_row(manifest, 2, instruction="make it night")
    dataset = EditDataset.from_manifest(manifest)
    with pytest.raises(EditrlError, match=r"lacks 1 of 8 rows: .*:3 .*: the instruction changed\."):
        opened(folder, editor).require([dataset])
    assert filled(folder, editor, dataset).encoded == 1
    assert_holds(folder, editor, dataset)


def test_changed_preprocessing_is_told(folder, editor, written):
    filled(folder, editor, EditDataset.from_manifest(written))
    with pytest.raises(EditrlError, match=r"lacks 8 of 8 rows: .* num_frames changed from None to 1;.* and 5 more"):
        opened(folder, editor).require([EditDataset.from_manifest(written, num_frames=1)])
    with pytest.raises(EditrlError, match="height changed from None to 16 and width changed from None to 48"):
        opened(folder, editor).require([EditDataset.from_manifest(written, height=16, width=48)])


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("vlm", lambda policy: policy.instructor.model.model.language_model.norm.weight.data.mul_(1.01)),
        ("instructor", lambda policy: setattr(policy.instructor, "hidden_layer", -2)),
        ("instructor", lambda policy: setattr(policy.instructor, "edit_prompt", "Edit.")),
        ("processor", lambda policy: setattr(policy.instructor.processor.image_processor, "image_std", (0.4,) * 3)),
        ("vae", lambda policy: policy.vae.encoder.conv_in.conv.weight.data.mul_(1.01)),
        ("vae", lambda policy: policy.vae.register_to_config(scaling_factor=2.0)),
        ("vae, vlm, text_encoder", lambda policy: [module.bfloat16() for module in policy.frozen_modules()]),
        ("text_encoder", lambda policy: policy.text_encoder.get_input_embeddings().weight.data.mul_(1.01)),
        ("reference", lambda policy: setattr(policy, "reference_noise", "zeros")),
    ],
)
def test_a_changed_model_is_told(folder, editor, written, part, change):
    dataset = EditDataset.from_manifest(written)
    filled(folder, editor, dataset)
    other = HunyuanVideoPolicy.from_pretrained(EDITOR)
    change(other)
    with pytest.raises(EditrlError, match=rf"lacks 8 of 8 rows: .*the model changed \({part}\);"):
        opened(folder, other).require([dataset])
    if part == "instructor":
        assert filled(folder, other, dataset, batch_size=1).encoded == 8
        assert_holds(folder, other, dataset)
        assert len(read(folder, editor, dataset)) == 8, "each model finds its own"


def test_look_alike_files_of_two_data_sets_are_not_confused(folder, editor, tmp_path):
    """The same relative path, size and time, as an archive unpacks them, and other contents."""
    datasets = []
    for name, shade in (("one", 10), ("two", 200)):
        picture = torch.full((1, 3, 32, 32), shade, dtype=torch.uint8)
        write_image(tmp_path / name / "clip.png", picture)
        contents = (tmp_path / name / "clip.png").read_bytes().ljust(200, b"\0")
        (tmp_path / name / "clip.png").write_bytes(contents)
        os.utime(tmp_path / name / "clip.png", (1e9, 1e9))
        manifest = tmp_path / name / "manifest.jsonl"
        manifest.write_text(json.dumps({"source": "clip.png", "instruction": name, "target": "clip.png"}))
        datasets.append(EditDataset.from_manifest(manifest))
        filled(folder, editor, datasets[-1])
    filled(folder, editor, *datasets)
    for dataset in datasets:
        assert_holds(folder, editor, dataset)


def test_a_file_that_is_gone_is_named(folder, editor, manifest):
    dataset = EditDataset.from_manifest(manifest)
    filled(folder, editor, dataset)
    (manifest.parent / "source" / "00001.mp4").unlink()
    with pytest.raises(EditrlError, match=r"source.00001.mp4: cannot be read \(No such file"):
        opened(folder, editor).require([dataset])


def test_rows_that_were_never_encoded_are_missing(folder, editor, written):
    first = EditDataset.from_manifest(written)
    filled(folder, editor, first)
    other = EditDataset(rows(sample_scenes(2, seed=99)))
    with pytest.raises(EditrlError, match=r"lacks 2 of 10 rows: row 0 \(id '.*'\): is not in the cache; row 1"):
        opened(folder, editor).require([first, other])
    with pytest.raises(EditrlError, match="lacks 8 of 8 rows"):
        opened(folder / "empty", editor).require([first])


# -- models that know less of themselves -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bare() -> HunyuanVideoPolicy:
    """The editor without its encoders; not to be changed."""
    return HunyuanVideoPolicy.from_pretrained(EDITOR, encoders=False)


def test_without_encoders_what_is_loaded_is_compared(folder, editor, bare, written):
    dataset = EditDataset.from_manifest(written)
    filled(folder, editor, dataset)
    assert len(read(folder, bare, dataset)) == 8
    other = HunyuanVideoPolicy.from_pretrained(EDITOR, encoders=False)
    other.vae.encoder.conv_in.conv.weight.data.mul_(1.01)
    with pytest.raises(EditrlError, match=r"the model changed \(vae\)"):
        opened(folder, other).require([dataset])


def test_without_encoders_two_models_in_a_folder_are_ambiguous(folder, editor, bare, written):
    dataset = EditDataset.from_manifest(written)
    filled(folder, editor, dataset)
    other = HunyuanVideoPolicy.from_pretrained(EDITOR)
    other.instructor.model.model.language_model.norm.weight.data.mul_(1.01)
    filled(folder, other, dataset)
    with pytest.raises(EditrlError, match=r"models that differ in their vlm, and the encoders .* not loaded"):
        opened(folder, bare).require([dataset])


def test_without_encoders_the_settings_of_the_instructor_are_known(folder, editor, bare, written):
    dataset = EditDataset.from_manifest(written)
    filled(folder, HunyuanVideoPolicy.from_pretrained(EDITOR, hidden_layer=-2), dataset)
    with pytest.raises(EditrlError, match=r"lacks 8 of 8 rows: .*the model changed \(instructor\)"):
        opened(folder, bare).require([dataset])
    filled(folder, editor, dataset)
    opened(folder, bare).require([dataset])


def test_a_policy_without_a_fingerprint_cannot_be_cached():
    class Mine(FlowPolicy):
        pass

    with pytest.raises(EditrlError, match=r"conditions of a Mine cannot be cached, since it has no fingerprint\(\)"):
        Mine().fingerprint()


# -- damage ------------------------------------------------------------------------------------------------------------


def truncate(path: Path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(where: float):
    def change(path: Path):
        contents = bytearray(path.read_bytes())
        contents[int(where * (len(contents) - 1))] ^= 16
        path.write_bytes(contents)

    return change


def first_file(folder: Path, suffix: str) -> Path:
    return sorted(folder.glob(f"shard-*{suffix}"))[0]


@pytest.mark.parametrize(
    ("suffix", "damage", "told", "rebuilt"),
    [
        (".safetensors", truncate, r"shard-\w+.safetensors has \d+ of \d+ bytes", 4),
        (".safetensors", Path.unlink, r"shard-\w+.safetensors has 0 of \d+ bytes", 4),
        (".json", truncate, r"shard-\w+.json is damaged", 4),
        (".json", flip(0.3), r"shard-\w+.json is damaged", 4),
        (".json", Path.unlink, "is not in the cache", 4),
    ],
)
def test_a_damaged_file_is_found_before_training_and_rebuilt(folder, editor, written, suffix, damage, told, rebuilt):
    dataset = EditDataset.from_manifest(written)
    filled(folder, editor, dataset)
    damage(first_file(folder, suffix))
    with pytest.raises(EditrlError, match=rf"{told}.*lacks 4 of 8 rows|lacks 4 of 8 rows: .*{told}"):
        opened(folder, editor).require([dataset])
    assert filled(folder, editor, dataset).encoded == rebuilt
    assert len(list(folder.iterdir())) == 4, "what was damaged is written over"
    assert_holds(folder, editor, dataset)


@pytest.mark.parametrize("where", [0.0, 0.02, 0.1, 0.5, 0.9, 1.0])
def test_a_flipped_bit_is_found_when_it_is_read_and_rebuilt(folder, editor, written, where):
    """In the header, which other rows may share, and in the values."""
    dataset = EditDataset.from_manifest(written)
    filled(folder, editor, dataset)
    flip(where)(first_file(folder, ".safetensors"))
    with pytest.raises(EditrlError, match=r"cache': shard-\w+.safetensors.*; `editrl precompute` rebuilds it"):
        read(folder, editor, dataset)
    assert 1 <= filled(folder, editor, dataset).encoded <= 4
    assert_holds(folder, editor, dataset)
    assert filled(folder, editor, dataset).encoded == 0


def test_another_format_is_told(folder, editor, written, monkeypatch):
    dataset = EditDataset.from_manifest(written)
    monkeypatch.setattr(shards, "FORMAT", 0)
    filled(folder, editor, dataset)
    monkeypatch.undo()
    with pytest.raises(EditrlError, match="has format 0, this version of editrl reads 1"):
        opened(folder, editor).require([dataset])
    assert filled(folder, editor, dataset).encoded == 8


# -- runs that are cut off ---------------------------------------------------------------------------------------------

KILLED = """
import sys, time
from pathlib import Path
from editrl.cache import ConditionsCache, fill, fingerprint, shards
from editrl.data import EditDataset
from editrl.policies.hunyuan_video.policy import HunyuanVideoPolicy

whole = shards.os.replace
def half(source, target):
    if len(list(Path(target).parent.glob("shard-*.json"))) == 2:
        Path(source).write_bytes(Path(source).read_bytes()[:1000])
        print("writing", flush=True)
        time.sleep(600)
    whole(source, target)
shards.os.replace = half
policy = HunyuanVideoPolicy.from_pretrained(sys.argv[1])
cache = ConditionsCache(sys.argv[3], policy.fingerprint())
fill(cache, policy, [EditDataset.from_manifest(sys.argv[2])], batch_size=2, shard_size=2)
"""


@pytest.mark.slow
def test_a_killed_run_loses_one_shard_and_leaves_nothing_half(folder, editor, written):
    words = [sys.executable, "-c", KILLED, EDITOR, str(written), str(folder)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
    [unfinished] = folder.glob(".*.tmp")
    assert len(list(folder.glob("shard-*.json"))) == 2
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*")}
    dataset = EditDataset.from_manifest(written)
    with pytest.raises(EditrlError, match="lacks 4 of 8 rows"):
        opened(folder, editor).require([dataset])

    os.utime(unfinished, (0, time.time() - 2 * shards.ABANDONED))
    again = filled(folder, editor, dataset, batch_size=2, shard_size=2)
    assert (again.encoded, again.kept) == (4, 4)
    assert not unfinished.exists()
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}.items()
    assert_holds(folder, editor, dataset)


def test_an_unfinished_file_that_may_still_grow_stays(folder, editor, written):
    folder.mkdir()
    for name, age in ((".shard-a.tmp", 0), (".shard-b.tmp", 2 * shards.ABANDONED)):
        (folder / name).touch()
        os.utime(folder / name, (0, time.time() - age))
    filled(folder, editor, EditDataset.from_manifest(written))
    assert [path.name for path in folder.glob(".*")] == [".shard-a.tmp"]


def test_an_unreadable_clip_is_named_and_earlier_shards_are_kept(folder, editor, manifest):
    dataset = EditDataset.from_manifest(manifest)
    (manifest.parent / "source" / "00006.mp4").write_bytes(b"no video")
    with pytest.raises(EditrlError, match=r"manifest.jsonl:7 .*source: .*cannot be decoded"):
        filled(folder, editor, dataset)
    shutil.copy(manifest.parent / "source" / "00005.mp4", manifest.parent / "source" / "00006.mp4")
    assert filled(folder, editor, dataset).kept == 4


# -- a full disk -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("room", "said"), [(0, r"0 bytes \(0 examples\)"), (1, r"[\d.]+ kB \(4 examples\)")])
def test_a_full_disk_says_how_much_is_written_and_needed(folder, editor, written, monkeypatch, room, said):
    dataset = EditDataset.from_manifest(written)
    write, shards_written = shards.write_atomically, []

    def full(path, contents):
        if path.suffix == ".safetensors":
            shards_written.append(path)
            if len(shards_written) > room:
                raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, contents)

    monkeypatch.setattr(shards, "write_atomically", full)
    left = 8 - 4 * room
    message = rf"cache: the disk is full after {said}; about [\d.]+ kB more are needed for up to {left} examples of "
    with pytest.raises(EditrlError, match=message) as error:
        filled(folder, editor, dataset)
    assert "\n" not in str(error.value) and "run the same command again" in str(error.value)
    monkeypatch.undo()
    again = filled(folder, editor, dataset)
    assert (again.encoded, again.kept) == (left, 8 - left)


def test_a_write_that_fails_half_way_leaves_no_file(tmp_path, monkeypatch):
    def fails(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards.os, "fsync", fails)
    with pytest.raises(OSError, match="No space left"):
        shards.write_atomically(tmp_path / "shard-a.json", b"{}")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_told(folder, editor, written, monkeypatch):
    def refused(path, contents):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(shards, "write_atomically", refused)
    with pytest.raises(EditrlError, match=r"cannot be written \(Read-only file system\); choose another folder"):
        filled(folder, editor, EditDataset.from_manifest(written))


# -- several processes -------------------------------------------------------------------------------------------------


def test_processes_share_the_shards_without_talking(folder, editor, written):
    dataset = EditDataset.from_manifest(written)
    shares = [filled(folder, editor, dataset, shard_size=3, process=rank, processes=2) for rank in (1, 0)]
    assert [share.encoded for share in shares] == [3, 5]
    assert_holds(folder, editor, dataset)
    assert filled(folder, editor, dataset, shard_size=3).kept == 8
