"""`editrl quickstart`: from nothing to a report, in its smallest form."""

import contextlib
import html
import io
import json
import re

import pytest

from editrl.cli import main
from editrl.recipes.shapes.quickstart import CHECKPOINT
from editrl.recipes.shapes.world import TASKS

pytestmark = pytest.mark.slow

SMALLEST = ["--num_generations", "4", "--generation_batch_size", "8", "--per_device_train_batch_size", "8"]
SMALLEST += ["--gradient_accumulation_steps", "2", "--num_inference_steps", "4"]
SMALLEST += ["--eval_num_inference_steps", "2", "--max_steps", "1", "--save_strategy", "no"]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The folder and the printed text of a quickstart with one update and one held-out scene of every task."""
    folder = tmp_path_factory.mktemp("quickstart") / "new"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["quickstart", "--output_dir", str(folder), "--held_out", str(len(TASKS)), *SMALLEST]) == 0
    return folder, printed.getvalue()


@pytest.fixture(scope="module")
def report(quickstart) -> str:
    return (quickstart[0] / "report.html").read_text(encoding="utf-8")


def test_the_report_has_every_section(report):
    assert re.findall(r"<h2>([^<]*)</h2>", report) == ["Summary", "Curves", "Edits", "Details"]
    assert re.findall(r"<summary>([^<]*)</summary>", report) == ["Settings", "Timings"]


def test_the_report_says_that_the_checkpoint_was_made_to_under_edit(report):
    assert CHECKPOINT in html.unescape(report)
    for words in ("sft-underediting", "half of its targets left unedited", "unlearn"):
        assert words in CHECKPOINT


def test_the_report_shows_oracle_and_rewards_before_and_after(report):
    cells = re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", report)
    for name in ("oracle success", "preservation, dB", "clip_instruction", "clip_source_fidelity", "pickscore"):
        row = cells[cells.index(name) : cells.index(name) + 4]
        before, after, change = (float(cell.replace("−", "-").replace(",", "")) for cell in row[1:])
        assert after - before == pytest.approx(change, abs=2e-2)
    titles = re.findall(r"<strong>([^<]*)</strong>", report)
    assert len(titles) == len(set(titles)) == 7
    assert report.count("<svg") == 7


def test_the_report_shows_an_edit_of_every_task(quickstart, report):
    rows = [json.loads(line) for line in (quickstart[0] / "data" / "heldout" / "manifest.jsonl").open()]
    instructions = re.findall(r"<h3>([^<]*)</h3>", report)
    assert [html.unescape(text) for text in instructions] == [row["instruction"] for row in rows]
    assert {row["task"] for row in rows} == set(TASKS)
    assert report.count("data:image/webp;base64,") == 3 * len(TASKS)  # source, before, after


def test_the_report_needs_no_network(report):
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", report)
    assert "<script" not in report


def test_what_was_set_and_how_long_it_took_stand_at_the_end(report):
    assert ">num_generations</th><td>4<" in report.replace(' scope="row"', "")
    for phase in ("data and models", "rollout", "reward", "train", "in all"):
        assert f">{phase}</th>" in report.replace(' scope="row"', "")


def test_the_terminal_gets_the_same_table_and_the_place_of_the_report(quickstart):
    words = " ".join(quickstart[1].split())
    assert "half of its targets left unedited" in words
    assert "7 held-out scenes, same noise before and after" in words
    assert words.replace(" ", "").endswith(f"sidebyside:{quickstart[0]}/report.html")


def test_the_last_update_is_judged_although_the_recipe_judges_every_tenth(quickstart):
    words = " ".join(quickstart[1].split())
    assert "update 0/1 after" in words
    assert "update 1/1 after" in words


def test_the_data_are_clips_that_the_other_commands_read(quickstart):
    folder, _ = quickstart
    for split, count in (("train", 256), ("heldout", len(TASKS))):
        assert len((folder / "data" / split / "manifest.jsonl").read_text().splitlines()) == count
        assert len(list((folder / "data" / split / "source").glob("*.mp4"))) == count


def test_a_misspelt_option_is_found_before_anything_is_written(tmp_path, capsys):
    assert main(["quickstart", "--output_dir", str(tmp_path / "new"), "--max_step", "1"]) == 2
    assert "has no option --max_step. Did you mean '--max_steps'?" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
