"""One HTML file that shows what a run did: a table, curves, and edits side by side.

The page needs no network and runs no script; its content security policy forbids both. Everything that comes from data
(instructions, notes, settings) is escaped by the template.
"""

import base64
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from torch import Tensor

from editrl.data.video import atomic_path, fit, to_uint8

# Readable on white and on near-black alike.
COLOURS = ("#4a8bd4", "#df8638", "#43a274", "#d05c63", "#9479cf", "#35a1b0", "#d074ae", "#9a8a76")
INK = "#010203"  # drawn by matplotlib, then replaced by the colour of the page's text
SMALLEST_SIDE = 128  # pixels; below, a clip is enlarged in whole steps, so that single pixels can be seen
LARGEST_SIDE = 640  # pixels; above, a clip is shrunk, so that the page opens in a browser


@dataclass
class Curve:
    """One panel: named series of `(x, y)` points. A series keeps its colour through all panels of a report."""

    title: str
    x_label: str
    series: dict[str, list[tuple[float, float]]]
    log_x: bool = False


@dataclass
class ReportCase:
    """One edit: clips `[F, 3, H, W]` (float in [0, 1] or uint8) by column label, in the order shown, and some notes."""

    instruction: str
    videos: dict[str, Tensor]
    notes: dict[str, Any] = field(default_factory=dict)
    fps: float = 8.0


def write_report(
    path: str | Path,
    *,
    title: str,
    intro: str,
    summary: list[dict[str, Any]],
    curves: list[Curve],
    cases: list[ReportCase],
    settings: dict[str, Any],
    timings: dict[str, Any],
    tables: Mapping[str, list[dict[str, Any]]] | None = None,
) -> Path:
    """Write the report to `path` (whole or not at all; folders are made) and return the path.

    Args:
        intro: plain text; a blank line starts a paragraph.
        summary: the rows of one table; its columns are the keys in order of appearance.
        tables: further tables, by their headings.
        curves, cases: panels and edits, in the order given.
        settings: shown as a table, nested dicts with dotted keys.
        timings: seconds (or ready text) by name.

    Empty parts are left out. Clips are animated WebP that loops: enlarged without smoothing until the shorter side has
    128 pixels, shrunk until the longer side has 640; a clip of one frame is a still picture.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(text=format_value, seconds=format_seconds, webp=webp_data_uri)
    environment.tests.update(tiny=_is_tiny)
    colours = series_colours(curves)
    page = environment.get_template("report.html.j2").render(
        title=title,
        paragraphs=[paragraph for paragraph in intro.split("\n\n") if paragraph.strip()],
        tables={
            heading: {
                "columns": list(dict.fromkeys(key for row in rows for key in row)),
                "number_columns": {key for row in rows for key, value in row.items() if _is_number(value)},
                "rows": rows,
            }
            for heading, rows in {"Summary": summary, **(tables or {})}.items()
            if rows
        },
        panels=[(curve, plot_svg(curve, colours)) for curve in curves],
        colours=colours,
        cases=cases,
        settings=flatten(settings),
        widest_case=max((len(case.videos) for case in cases), default=0),
        timings=timings,
    )
    with atomic_path(path) as unfinished:
        unfinished.write_text(page, encoding="utf-8")
    return Path(path)


def webp_data_uri(clip: Tensor, fps: float) -> str:
    """A clip `[F, 3, H, W]` as the `data:` URI of a looping WebP; lossless where single pixels matter."""
    from PIL import Image

    video = to_uint8(clip)
    height, width = video.shape[-2:]
    if _is_tiny(clip):
        steps = math.ceil(SMALLEST_SIDE / min(height, width))
        video = video.repeat_interleave(steps, dim=2).repeat_interleave(steps, dim=3)
    elif max(height, width) > LARGEST_SIDE:
        scale = LARGEST_SIDE / max(height, width)
        video = to_uint8(fit(video.float() / 255, max(1, round(height * scale)), max(1, round(width * scale))))
    first, *others = [Image.fromarray(frame) for frame in video.permute(0, 2, 3, 1).numpy()]
    contents = io.BytesIO()
    animation = {"save_all": True, "append_images": others, "duration": round(1000 / fps), "loop": 0} if others else {}
    first.save(contents, "WEBP", lossless=_is_tiny(clip), quality=80, **animation)
    return "data:image/webp;base64," + base64.b64encode(contents.getvalue()).decode()


def series_colours(curves: list[Curve]) -> dict[str, str]:
    """A colour for each series name, the same in every panel."""
    names = dict.fromkeys(name for curve in curves for name in curve.series)
    return {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}


def plot_svg(curve: Curve, colours: dict[str, str]):
    """The panel's axes and lines as safe inline SVG; title and legend are the page's own."""
    import matplotlib
    from markupsafe import Markup
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": curve.title, "font.size": 9}):
        figure = Figure(figsize=(4.6, 2.7), layout="constrained")
        axes = figure.subplots()
        for name, points in curve.series.items():
            x, y = zip(*points, strict=True) if points else ((), ())
            marker = "o" if len(points) <= 24 else None
            axes.plot(x, y, color=colours[name], linewidth=1.8, marker=marker, markersize=3.5, solid_capstyle="round")
        axes.set_xlabel(curve.x_label, color=INK, parse_math=False)
        axes.tick_params(colors=INK, length=0)
        axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.8)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set(color=INK, alpha=0.4)
        if curve.log_x:
            axes.set_xscale("log")
        else:
            axes.locator_params(axis="x", nbins=6)
        axes.locator_params(axis="y", nbins=6)
        contents = io.StringIO()
        figure.savefig(
            contents, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    svg = contents.getvalue()
    return Markup(svg[svg.index("<svg") :].replace(INK, "currentColor"))


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat.update(
            flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
        )
    return flat


def format_value(value: Any) -> str:
    """A table cell: fractions with four significant digits, thousands with commas, a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Real) and not isinstance(value, Integral):
        value = float(value)
        return f"{value:,.0f}" if 1e3 <= abs(value) < 1e7 else f"{value:.4g}"
    return str(value)


def format_seconds(value: Any) -> str:
    """`0.42 s`, `3 min 05 s`, `1 h 02 min`; what is no number stays as it is."""
    if not _is_number(value):
        return str(value)
    if value < 59.95:
        return f"{value:.3g} s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes} min {seconds:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_tiny(video: Tensor) -> bool:
    return min(video.shape[-2:]) < SMALLEST_SIDE
