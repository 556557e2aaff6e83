"""The report: everything is on the page, nothing is taken from elsewhere, and nothing in the data can break it."""

import base64
import io
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from editrl.errors import EditrlError
from editrl.report import Curve, ReportCase, write_report
from editrl.report.html import format_seconds, format_value

HOSTILE = '<script>alert("1")</script> & \'quoted\' "as well"'


def clip(frames=5, height=32, width=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (frames, 3, height, width), generator=generator, dtype=torch.uint8)


def report(folder, **parts):
    nothing = {"title": "A run", "intro": "", "summary": [], "curves": [], "cases": [], "settings": {}, "timings": {}}
    return write_report(folder / "report.html", **{**nothing, **parts}).read_text(encoding="utf-8")


class Page(HTMLParser):
    """The tags, the attributes and the text of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, text):
        if text.strip():
            self.texts.append(text.strip())

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def pictures(page):
    """The images on a page, opened."""
    sources = [attributes["src"] for attributes in Page(page).all("img")]
    assert all(source.startswith("data:image/webp;base64,") for source in sources)
    return [Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) for source in sources]


def test_every_part_is_on_the_page_in_order(tmp_path):
    page = report(
        tmp_path,
        title="Shapes",
        intro="First paragraph.\n\nSecond paragraph.",
        summary=[{"policy": "before", "success": 0.61234}, {"policy": "after", "success": None, "scenes": 256}],
        curves=[Curve("Reward", "optimiser step", {"held out": [(0, 0.1), (10, 0.5)]})],
        cases=[ReportCase("make it blue", {"source": clip(), "before": clip(), "after": clip()}, {"margin": 0.25})],
        settings={"model": {"layers": 6}, "learning_rate": 1.23456e-5},
        timings={"training": 185, "scoring": "under a second"},
    )
    texts = Page(page).texts
    expected = ["Shapes", "First paragraph.", "Second paragraph.", "Summary", "policy", "success", "scenes"]
    expected += ["before", "0.6123", "–", "after", "–", "256", "Curves", "Reward", "held out", "optimiser step"]
    expected += ["Edits", "make it blue", "source", "before", "after", "margin", "0.25"]
    expected += ["Settings", "model.layers", "6", "learning_rate", "1.23456e-05"]
    expected += ["Timings", "training", "3 min 05 s", "scoring", "under a second"]
    remaining = iter(texts)
    assert [text for text in expected if text not in remaining] == []  # each after the one before it
    assert [image["alt"] for image in Page(page).all("img")] == [
        f"{label}: make it blue" for label in ("source", "before", "after")
    ]


def test_empty_parts_are_left_out(tmp_path):
    assert Page(report(tmp_path)).texts[2:] == ["A run"]  # after the title and the style sheet: the heading


def test_further_tables_have_headings_and_columns_of_their_own(tmp_path):
    tables = {"Signal": [{"algorithm": "nft", "cosine": 0.34}], "Empty": []}
    page = report(tmp_path, summary=[{"policy": "after", "reward": 0.8}], tables=tables)
    assert re.findall(r"<h2>([^<]*)</h2>", page) == ["Summary", "Signal"]
    assert re.findall(r"<th[^>]*>([^<]*)</th>", page) == ["policy", "reward", "algorithm", "cosine"]


def test_settings_and_timings_are_folded_away(tmp_path):
    details = Page(report(tmp_path, settings={"seed": 0}, timings={"training": 1.0})).all("details")
    assert len(details) == 2 and not any("open" in attributes for attributes in details)


def test_nothing_comes_from_the_network_and_nothing_runs(tmp_path):
    page = report(
        tmp_path,
        curves=[Curve("Reward", "step", {"train": [(0, 0), (1, 1)]})],
        cases=[ReportCase("make it blue", {"source": clip()})],
    )
    parsed = Page(page)
    assert not parsed.all("script") and not parsed.all("link") and not parsed.all("iframe")
    (policy,) = [meta["content"] for meta in parsed.all("meta") if "http-equiv" in meta]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    references = re.findall(r'(?:href|src|url)\s*[=(]\s*["\']?([^"\')\s]{1,60})', page)
    assert references and all(reference.startswith(("#", "data:")) for reference in references)
    assert "@import" not in page


def test_text_from_data_is_escaped_wherever_it_appears(tmp_path):
    page = report(
        tmp_path,
        title=HOSTILE,
        intro=HOSTILE,
        summary=[{HOSTILE: HOSTILE}],
        curves=[Curve(HOSTILE, HOSTILE, {HOSTILE: [(0, 0), (1, 1)]}), Curve("$\\broken{$", "$\\broken{$", {})],
        cases=[ReportCase(HOSTILE, {HOSTILE: clip()}, {HOSTILE: HOSTILE})],
        settings={HOSTILE: {HOSTILE: HOSTILE}},
        timings={HOSTILE: HOSTILE},
    )
    parsed = Page(page)
    assert not parsed.all("script")
    assert parsed.texts.count(HOSTILE) == 15
    assert parsed.all("img")[0]["alt"] == f"{HOSTILE}: {HOSTILE}"
    assert "$\\broken{$" in parsed.texts


def test_a_tiny_clip_is_enlarged_pixel_by_pixel_and_loops_forever(tmp_path):
    video = clip(height=32, width=48)
    (picture,) = pictures(report(tmp_path, cases=[ReportCase("x", {"source": video}, fps=12.5)]))
    assert picture.size == (48 * 4, 32 * 4) and picture.n_frames == 5
    assert picture.info["loop"] == 0
    for index in range(5):
        picture.seek(index)
        picture.load()
        assert picture.info["duration"] == 80
        shown = torch.tensor(list(picture.convert("RGB").tobytes())).view(128, 192, 3).permute(2, 0, 1)
        assert torch.equal(shown[:, 1::4, 2::4], video[index].long())  # lossless


def test_a_large_clip_is_shrunk_and_a_middling_one_is_not(tmp_path):
    videos = {"large": clip(2, 480, 832), "middling": clip(2, 240, 320)}
    large, middling = pictures(report(tmp_path, cases=[ReportCase("x", videos)]))
    assert large.size == (640, 369) and middling.size == (320, 240)
    assert large.n_frames == middling.n_frames == 2


def test_one_frame_is_a_still_picture(tmp_path):
    (picture,) = pictures(report(tmp_path, cases=[ReportCase("x", {"source": clip(1)})]))
    assert not picture.is_animated and picture.size == (128, 128)


def test_floats_are_clamped_and_nan_is_an_error(tmp_path):
    (picture,) = pictures(report(tmp_path, cases=[ReportCase("x", {"after": torch.full((1, 3, 32, 32), 1.2)})]))
    assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(EditrlError, match="NaN"):
        report(tmp_path, cases=[ReportCase("x", {"after": torch.full((1, 3, 32, 32), float("nan"))})])


def test_a_series_keeps_its_colour_through_all_panels(tmp_path):
    points = [(step, step / 40) for step in range(40)]
    curves = [Curve("a", "step", {"train": points, "held out": points}), Curve("b", "step", {"held out": points})]
    page = report(tmp_path, curves=curves)
    keys = [attributes["style"] for attributes in Page(page).all("span") if attributes.get("class") == "key"]
    assert keys[1] == keys[2] != keys[0]
    first, second = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    train, held_out = (key.removeprefix("--series: ") for key in keys[:2])
    assert train in first and held_out in first
    assert train not in second and held_out in second


def test_plots_take_the_colour_of_the_page_text(tmp_path):
    page = report(tmp_path, curves=[Curve("a", "step", {"train": [(0, 1), (1, 2)]})])
    assert "currentColor" in page and "#010203" not in page and "#000000" not in page


@pytest.mark.parametrize("points", [[], [(0, 1.0)], [(0, 1.0), (1, float("nan")), (2, 3.0)]])
def test_short_and_gappy_series_are_drawn(tmp_path, points):
    assert "<svg" in report(tmp_path, curves=[Curve("a", "step", {"train": points})])


def test_the_same_run_gives_the_same_file(tmp_path):
    parts = {
        "curves": [Curve("a", "step", {"train": [(0, 1), (1, 2)]})],
        "cases": [ReportCase("x", {"source": clip()})],
    }
    assert report(tmp_path / "one", **parts) == report(tmp_path / "two", **parts)


def test_a_report_that_fails_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch):
    before = report(tmp_path, title="old")

    def disk_full(*paths):
        raise OSError("no space left")

    monkeypatch.setattr("editrl.data.video.os.replace", disk_full)
    with pytest.raises(OSError, match="no space"):
        report(tmp_path, title="new")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == before


@pytest.mark.parametrize(
    "value, text",
    [
        (0.123456, "0.1235"),
        (12345.6, "12,346"),
        (1.5e-7, "1.5e-07"),
        (float("nan"), "nan"),
        (256, "256"),
        (True, "yes"),
        (None, "–"),
        ("as it is", "as it is"),
    ],
)
def test_table_cells_are_short(value, text):
    assert format_value(value) == text


@pytest.mark.parametrize(
    "value, text",
    [
        (0.4231, "0.423 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.7, "1 h 00 min"),
        (3725, "1 h 02 min"),
    ],
)
def test_times_are_readable(value, text):
    assert format_seconds(value) == text


def test_importing_the_report_loads_no_plotting_library():
    code = "import sys, editrl.report; print([m for m in ('matplotlib', 'jinja2', 'PIL', 'av') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
