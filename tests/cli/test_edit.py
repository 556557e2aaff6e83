"""`editrl edit`: clips of any length and size with their sound, and manifests that survive whatever interrupts them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from editrl.cli import main
from editrl.data import read_video, write_image, write_video
from editrl.recipes.shapes import WEIGHTS

EDITOR = str(WEIGHTS / "sft")
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def moving(frames=5, height=32, width=32):
    """A smooth clip that lossy coding keeps well; brightness grows with the frame number."""
    across = torch.linspace(0.1, 0.7, width).expand(frames, 3, height, width)
    return across + torch.linspace(0, 0.2, frames).view(-1, 1, 1, 1)


def same_pixels(one: Path, other: Path) -> bool:
    """Nearly: x264 does not always write the same frames to the same file."""
    return bool((read_video(one)[0] - read_video(other)[0]).abs().mean() < 0.02)


# -- one clip ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "options", "expected", "rest"),
    [
        ((6, 34, 50), [], (5, 34, 50), "; the last 1 of the source are left out"),
        ((6, 34, 50), ["--frames", "repeat"], (6, 34, 50), ""),
        ((5, 66, 98), ["--resolution", 32], (5, 66, 98), ""),
        ((5, 66, 98), ["--height", 32, "--width", 64, "--fit", "pad"], (5, 66, 98), ""),
        ((5, 66, 98), ["--height", 32, "--width", 64], (5, 32, 64), ""),
        ((13, 32, 32), ["--max_frames", 9, "--overlap", 5], (13, 32, 32), ""),
        ((5, 32, 48), ["--side-by-side"], (5, 32, 96), ""),
        ((5, 32, 48), ["--side_by_side", "--height", 32, "--width", 32], (5, 32, 64), ""),
    ],
)
def test_any_length_and_size_is_edited(small_edit, tmp_path, capsys, shape, options, expected, rest):
    source = write_video(tmp_path / "source.mp4", moving(*shape), 12.5)
    output = tmp_path / "edited.mp4"
    assert main(small_edit(output, *options, source=source)) == 0
    edited, fps = read_video(output)
    assert (len(edited), *edited.shape[-2:]) == expected
    assert fps == 12.5
    line = f"{output}: {expected[0]} frames of {expected[2]}x{expected[1]} at 12.5 fps{rest}\n"
    assert capsys.readouterr().out == line


def test_side_by_side_shows_the_source_on_the_left(small_edit, tmp_path):
    source = write_image(tmp_path / "source.png", moving(1, 32, 48))
    assert main(small_edit(tmp_path / "both.png", "--side-by-side", source=source)) == 0
    assert main(small_edit(tmp_path / "edited.png", source=source)) == 0
    left, right = read_video(tmp_path / "both.png")[0].chunk(2, dim=-1)
    assert torch.equal(left, read_video(source)[0])
    assert torch.equal(right, read_video(tmp_path / "edited.png")[0])


def with_tone(path: Path, frames: int = 9, fps: int = 24) -> Path:
    """A clip of 32x32 with a tone of 440 Hz as AAC."""
    write_video(path.with_suffix(".silent.mp4"), moving(frames), fps)
    with av.open(str(path.with_suffix(".silent.mp4"))) as silent, av.open(str(path), "w") as container:
        video = container.add_stream_from_template(silent.streams.video[0])
        sound = container.add_stream("aac", rate=44100, layout="mono")
        for packet in silent.demux(video=0):
            if packet.dts is not None:
                packet.stream = video
                container.mux(packet)
        tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(44100 * frames // fps) / 44100)
        samples = av.AudioFrame.from_ndarray(tone.astype(np.float32)[None], format="fltp", layout="mono")
        samples.sample_rate, samples.pts = 44100, 0
        container.mux(sound.encode(samples))
        container.mux(sound.encode())
    return path


@pytest.mark.parametrize(("options", "frames"), [([], 9), (["--num_frames", 5, "--side-by-side"], 5)])
def test_the_sound_goes_along(small_edit, tmp_path, options, frames):
    source = with_tone(tmp_path / "source.mp4")
    assert main(small_edit(tmp_path / "edited.mp4", *options, source=source)) == 0
    with av.open(str(tmp_path / "edited.mp4")) as container:
        video, sound = container.streams.video[0], container.streams.audio[0]
        assert sound.codec_context.name == "aac"
        assert float(video.average_rate) == 24
        assert float(sound.duration * sound.time_base) == pytest.approx(frames / 24, abs=1e-3)
        samples = sum(frame.samples for frame in container.decode(sound))
        assert 44100 * frames / 24 <= samples <= 44100 * frames / 24 + 1024


def test_the_sound_can_be_left_out(small_edit, tmp_path):
    source = with_tone(tmp_path / "source.mp4")
    assert main(small_edit(tmp_path / "edited.mp4", "--mute", source=source)) == 0
    with av.open(str(tmp_path / "edited.mp4")) as container:
        assert not container.streams.audio


def test_true_guidance_matters(small_edit, tmp_path):
    source = write_image(tmp_path / "source.png", moving(1))
    for name, options in (("plain", []), ("one", ["--true_cfg_scale", 1]), ("four", ["--true_cfg_scale", 4])):
        assert main(small_edit(tmp_path / f"{name}.png", *options, source=source)) == 0
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "plain.png").read_bytes()
    assert (tmp_path / "four.png").read_bytes() != (tmp_path / "plain.png").read_bytes()


@pytest.mark.parametrize(
    ("words", "phrase"),
    [
        (["clip.mp4", "-o", "x.mp4"], "give a source and an instruction, or a --manifest of them"),
        (["clip.mp4", "edit", "--manifest", "rows.jsonl", "-o", "x"], "the rows of --manifest say source"),
        (["--manifest", "rows.jsonl", "-o", "x"], "rows.jsonl: the manifest cannot be read"),
        (["--manifest", "rows.jsonl", "-o", "x", "--side-by"], "Did you mean '--side_by_side'?"),
    ],
)
def test_a_wrong_command_line_is_one_line(words, phrase, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["edit", *words, "--model_name_or_path", EDITOR]) == 2
    error = capsys.readouterr().err
    assert error.startswith("editrl: ") and error.count("\n") == 1
    assert phrase in error


# -- a manifest --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    """A manifest of four rows: a clip, an odd clip with an awkward id, an image, and a clip with a reference image."""
    data = tmp_path / "data"
    write_video(data / "plain.mp4", moving(), 12.5)
    write_video(data / "odd.mp4", moving(7, 34, 50))
    write_image(data / "image.png", moving(1))
    rows = [
        {"id": "plain", "source": "plain.mp4"},
        {"id": "a/b: 50%", "source": "odd.mp4", "target": "ignored.mp4", "mask": "ignored.png"},
        {"id": "image", "source": "image.png"},
        {"id": "reference", "source": "plain.mp4", "reference_image": "image.png", "task": "add"},
    ]
    write_rows(data, [row | {"instruction": "make the red circle blue"} for row in rows])
    return data


def write_rows(data: Path, rows: list[dict]) -> None:
    (data / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(data: Path) -> list[dict]:
    return [json.loads(line) for line in (data / "manifest.jsonl").read_text().splitlines()]


def edit_all(data: Path, *options) -> list[str]:
    words = ["--manifest", data / "manifest.jsonl", "-o", data.parent / "out", "--model_name_or_path", EDITOR]
    return ["edit", *map(str, [*words, "--num_inference_steps", 2, *options])]


def test_every_row_becomes_a_clip_and_a_record(folder, capsys, small_edit, tmp_path):
    assert main(edit_all(folder)) == 0
    out = tmp_path / "out"
    names = {"plain.mp4", "a%2Fb%3A 50%25.mp4", "image.png", "reference.mp4"}
    assert {path.name for path in out.iterdir()} == names | {f"{Path(name).stem}.json" for name in names}
    assert read_video(out / "a%2Fb%3A 50%25.mp4")[0].shape == (5, 3, 34, 50)
    assert read_video(out / "plain.mp4")[1] == 12.5
    record = json.loads((out / "reference.json").read_text())
    assert record["id"] == "reference" and record["output"] == "reference.mp4"
    assert record["request"]["reference_image"] == "image.png"
    assert record["settings"]["num_inference_steps"] == 2 and record["settings"]["seed"] == 0
    assert main(small_edit(tmp_path / "alone.png", source=folder / "image.png")) == 0
    assert (tmp_path / "alone.png").read_bytes() == (out / "image.png").read_bytes()


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_what_is_done_is_not_done_again(folder, capsys, tmp_path, monkeypatch):
    assert main(edit_all(folder)) == 0
    before = times(tmp_path / "out")
    (tmp_path / "out" / "image.json").unlink()  # as if the process had died between clip and record
    (tmp_path / "out" / "reference.mp4").unlink()
    capsys.readouterr()
    assert main(edit_all(folder)) == 0
    assert "2 of 4 clips are done already" in capsys.readouterr().out
    after = times(tmp_path / "out")
    assert after.keys() == before.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"image.png", "image.json", "reference.mp4", "reference.json"}

    from editrl.policies.hunyuan_video.policy import HunyuanVideoPolicy

    monkeypatch.setattr(HunyuanVideoPolicy, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    assert main(edit_all(folder)) == 0
    assert "4 of 4 clips are done already" in capsys.readouterr().out


def test_clips_of_other_settings_are_not_mixed(folder, capsys, tmp_path):
    write_rows(folder, rows_of(folder)[2:3])
    assert main(edit_all(folder)) == 0
    before = times(tmp_path / "out")
    capsys.readouterr()
    assert main(edit_all(folder, "--shift", 3)) == 2
    assert "image.json: this clip was edited with shift None, now it is 3.0; give another" in capsys.readouterr().err
    write_rows(folder, [rows_of(folder)[0] | {"instruction": "remove the circle"}])
    assert main(edit_all(folder)) == 2
    assert "edited with instruction 'make the red circle blue', now it is 'remove" in capsys.readouterr().err
    assert times(tmp_path / "out") == before
    assert main(edit_all(folder, "--shift", 3, "--overwrite")) == 0
    assert times(tmp_path / "out")["image.png"] != before["image.png"]
    assert json.loads((tmp_path / "out" / "image.json").read_text())["settings"]["shift"] == 3
    before = times(tmp_path / "out")
    assert main(edit_all(folder, "--shift", 3, "--overwrite")) == 0  # goes on where it was, too
    assert times(tmp_path / "out") == before


def test_a_row_that_fails_is_told_at_the_end_and_tried_again(folder, capsys, tmp_path):
    (folder / "odd.mp4").rename(tmp_path / "elsewhere.mp4")
    write_video(folder / "plain.mp4", moving(4))
    assert main(edit_all(folder, "--frames", "refuse")) == 1
    written = capsys.readouterr()
    lines = written.err.splitlines()
    assert lines[-4] == "3 of 4 clips failed; run the same command again to retry:"
    assert "manifest.jsonl, row 0 (id 'plain'): the clip has 4 frames, which is not 4k+1" in lines[-3]
    assert "manifest.jsonl, row 1 (id 'a/b: 50%'): source: " in lines[-2] and "odd.mp4: cannot be read" in lines[-2]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"image.png", "image.json"}
    (tmp_path / "elsewhere.mp4").rename(folder / "odd.mp4")
    write_video(folder / "odd.mp4", moving(9))
    write_video(folder / "plain.mp4", moving(5))
    assert main(edit_all(folder, "--frames", "refuse")) == 0
    assert "1 of 4 clips are done already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        ({"source": ["plain.mp4"]}, "row 0 (id 'plain'): source is no path"),
        ({"instruction": None}, "manifest.jsonl:1 (id 'plain'): has no 'instruction'"),
        ({"id": "image"}, "has the same id"),
    ],
)
def test_a_bad_manifest_is_refused_as_a_whole(folder, capsys, tmp_path, change, phrase):
    first, *others = rows_of(folder)
    write_rows(folder, [first | change, *others])
    assert main(edit_all(folder)) == 2
    assert phrase in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))


def test_a_foreign_file_in_the_folder_is_no_record(folder, capsys, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "plain.json").write_text("[1]")
    assert main(edit_all(folder)) == 2
    assert "plain.json: is no record of an edit" in capsys.readouterr().err


# -- processes ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def many(tmp_path) -> Path:
    """A manifest of six clips."""
    data = tmp_path / "data"
    write_video(data / "clip.mp4", moving(9))
    row = {"source": "clip.mp4", "instruction": "make the red circle blue"}
    write_rows(data, [row | {"id": f"clip-{index}"} for index in range(6)])
    return data


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(many, tmp_path):
    out = tmp_path / "out"
    words = edit_all(many, "--num_inference_steps", 60)
    process = subprocess.Popen([sys.executable, "-m", "editrl", *words], env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 300
        while not (out / "clip-1.json").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    killed = times(out)
    records = [path for path in out.glob("*.json")]
    assert 2 <= len(records) < 6
    for path in out.glob("[!.]*.mp4"):
        assert read_video(path)[0].shape == (9, 3, 32, 32)  # no half of a clip under its name
    assert main(words) == 0
    assert {path.stem for path in out.glob("[!.]*.mp4")} == {f"clip-{index}" for index in range(6)}
    for record in records:
        assert times(out)[record.name] == killed[record.name]
        assert times(out)[f"{record.stem}.mp4"] == killed[f"{record.stem}.mp4"]
    first, *others = sorted(out.glob("[!.]*.mp4"))
    assert all(same_pixels(path, first) for path in others), "before and after, the same request is the same clip"


@pytest.mark.slow
def test_processes_share_the_rows_and_wait_for_each_other(many, tmp_path):
    """Rank 0 fails at once and has little to do: it must not take rank 1 down with it."""
    rows = rows_of(many)
    rows[0]["source"] = "nowhere.mp4"
    write_rows(many, rows[:4])
    words = edit_all(many, "--num_inference_steps", 20)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "editrl", *words]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "1 of 4 clips failed" in result.stderr
    assert "row 0 (id 'clip-0'): source: " in result.stderr
    assert {path.name for path in (tmp_path / "out").glob("*.mp4")} == {f"clip-{index}.mp4" for index in (1, 2, 3)}
    write_video(many / "nowhere.mp4", moving(5))
    again = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("3 of 4 clips are done already") == 1
    assert (tmp_path / "out" / "clip-0.mp4").exists()
