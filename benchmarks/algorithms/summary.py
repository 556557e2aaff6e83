"""Table, plots and report of the learning runs: `python -m editrl.benchmarks.algorithms.summary RESULTS_FOLDER`.

Runs that differ in their seed alone are averaged. `signal*.json` beside them, from `signal.py`, joins the report.
"""

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

from editrl.report import Curve, write_report

IGNORED = ("seed", "weights", "device")
INTRO = """Every algorithm post-trains the same tiny video editor in the embedded world: with large batches from an \
ordinary checkpoint, or (small-) with small batches from the under-editing one. An oracle that knows the scene judges \
512 held-out scenes, with fixed noise: is the edit right, and how much of the rest changed. Each experiment is named \
after its reward: the oracle itself, the three rewards of VIVA, or nothing (random), the control that shows what \
the optimizer does by itself.

The gradient's signal is measured without any update: the cosine of the gradients of two independent batches, against \
their size. At half_cosine_batch that cosine is expected to be one half: far smaller batches mostly follow noise."""


def load(folder: Path) -> dict[str, list[dict]]:
    """Experiment name (file name without `-seed<k>`) -> its runs."""
    runs = defaultdict(list)
    for path in sorted(folder.glob("*-seed*.json")):
        runs[path.stem.rpartition("-seed")[0]].append(json.loads(path.read_text()))
    for name, group in runs.items():
        settings = [{k: v for k, v in run["settings"].items() if k not in IGNORED} for run in group]
        if any(other != settings[0] for other in settings):
            raise ValueError(f"the runs of '{name}' differ in more than their seed; give them other file names")
    return dict(runs)


def spread(values: list[float], digits: int) -> str:
    """Mean and sample standard deviation."""
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


def rows(runs: dict[str, list[dict]], clips: float = math.inf) -> list[dict[str, str]]:
    """One row an experiment: before, after the last evaluation (within `clips`) that all seeds reached, the changes."""
    table = []
    for name, group in runs.items():
        reached = [[e["update"] for e in run["evaluations"] if e["clips"] <= clips] for run in group]
        last = min(max(updates) for updates in reached)
        at_last = [next(e for e in run["evaluations"] if e["update"] == last) for run in group]
        first = [run["evaluations"][0] for run in group]
        change = [100 * (b["success"] - a["success"]) for a, b in zip(first, at_last, strict=True)]
        decibels = [b["preservation_db"] - a["preservation_db"] for a, b in zip(first, at_last, strict=True)]
        table.append(
            {
                "experiment": name,
                "seeds": str(len(group)),
                "updates": str(last),
                "clips": f"{at_last[0]['clips']:,}",
                "success before": f"{mean(e['success'] for e in first):.3f}",
                "success after": spread([e["success"] for e in at_last], 3),
                "change, points": spread(change, 1),
                "preservation change, dB": spread(decibels, 2),
                "seconds": f"{mean(e['seconds'] for e in at_last):.0f}",
                "device": group[0]["machine"]["device"],
            }
        )
    return table


def signal_rows(signal: dict) -> list[dict[str, str]]:
    """One row an algorithm: the batch that its gradient asks for."""
    table = []
    for name, found in signal["algorithms"].items():
        low, high = ("∞" if bound is None else f"{bound:,.0f}" for bound in found["half_cosine_batch_90"])
        batch = found["half_cosine_batch"]
        at = {point["clips"]: point["cosine"] for point in found["cosines"]}
        table.append(
            {
                "algorithm": name,
                "half_cosine_batch, clips": "∞" if batch is None else f"{batch:,.0f}",
                "90 % interval": f"{low} – {high}",
                **{f"cosine at {clips:,}": f"{cosine:.2f}" for clips, cosine in list(at.items())[::2]},
            }
        )
    return table


def markdown(table: list[dict[str, str]]) -> str:
    """As a Markdown table."""
    lines = [list(table[0]), ["---"] * len(table[0]), *(list(row.values()) for row in table)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def course(group: list[dict], x: str, y: str) -> list[tuple[float, float]]:
    """Means over the seeds at every evaluation that all of them reached."""
    points = defaultdict(list)
    for run in group:
        for evaluation in run["evaluations"]:
            points[evaluation["update"]].append(evaluation)
    whole = [evaluations for evaluations in points.values() if len(evaluations) == len(group)]
    scale = 1000 if x == "clips" else 1
    return [(mean(e[x] for e in evaluations) / scale, mean(e[y] for e in evaluations)) for evaluations in whole]


def curves(runs: dict[str, list[dict]]) -> list[Curve]:
    """For each reward and device, success and preservation against clips, and success against seconds."""
    compared = defaultdict(dict)
    for name, group in runs.items():
        settings = group[0]["settings"]
        reward = settings["reward"]
        compared[reward, settings["device"]][name.rpartition(f"{reward}-")[2]] = group
    panels = []
    for (reward, device), experiments in compared.items():
        for y, x, title in (
            ("success", "clips", "oracle success"),
            ("preservation_db", "clips", "preservation, dB"),
            ("success", "seconds", "oracle success"),
        ):
            series = {name: course(group, x, y) for name, group in experiments.items()}
            label = "sampled clips, thousands" if x == "clips" else "seconds; runs shared the machine"
            panels.append(Curve(f"{title}; rewarded: {reward} ({device})", label, series))
    return panels


def signal_curves(signal: dict) -> list[Curve]:
    """Cosine against batch size: as measured, and as signal and noise predict it."""
    measured, expected = {}, {}
    for name, found in signal["algorithms"].items():
        measured[name] = [(point["clips"], point["cosine"]) for point in found["cosines"]]
        if found["half_cosine_batch"]:
            sizes = [2**k for k in range(8, 19)]
            expected[name] = [(size, size / (size + found["half_cosine_batch"])) for size in sizes]
    return [
        Curve("cosine of two independent batches, measured", "clips a batch", measured, log_x=True),
        Curve("cosine expected from signal and noise", "clips a batch", expected, log_x=True),
    ]


def plot(panels: list[Curve], path: Path) -> None:
    """The panels as one PNG, three a row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    across = min(3, len(panels))
    down = math.ceil(len(panels) / across)
    figure, axes = pyplot.subplots(down, across, figsize=(5 * across, 3.6 * down), layout="constrained", squeeze=False)
    colours = {name: f"C{k % 10}" for k, name in enumerate(dict.fromkeys(n for panel in panels for n in panel.series))}
    for axis, panel in zip(axes.flat, panels, strict=False):
        for name, points in panel.series.items():
            axis.plot(*zip(*points, strict=True), label=name, color=colours[name])
        axis.set(title=panel.title, xlabel=panel.x_label, xscale="log" if panel.log_x else "linear")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="x-small")
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", metavar="EXPERIMENT", help="names of experiments; default all")
    parser.add_argument("--clips", type=float, default=math.inf, help="compare after at most this many sampled clips")
    parser.add_argument("--plot", type=Path, help="also draw the courses to this PNG")
    parser.add_argument("--signal_plot", type=Path, help="also draw the gradients' signal to this PNG")
    parser.add_argument("--report", type=Path, help="also write tables and plots to this HTML file")
    options = parser.parse_args()
    runs = load(options.folder)
    if options.only:
        runs = {name: runs[name] for name in options.only}
    if not runs:
        parser.error(f"no *-seed*.json in {options.folder}")
    table = rows(runs, options.clips)
    print(markdown(table))
    signals = [json.loads(path.read_text()) for path in sorted(options.folder.glob("signal*.json"))]
    for signal in signals:
        print("\n" + markdown(signal_rows(signal)))
    panels = curves(runs)
    if options.plot:
        plot(panels, options.plot)
    if options.signal_plot and signals:
        plot(signal_curves(signals[0]), options.signal_plot)
    if options.report:
        write_report(
            options.report,
            title="Which algorithm teaches an editor fastest?",
            intro=INTRO,
            summary=table,
            tables={"Signal of a gradient": [row for signal in signals for row in signal_rows(signal)]},
            curves=panels + [panel for signal in signals for panel in signal_curves(signal)],
            cases=[],
            settings={name: group[0]["settings"] for name, group in runs.items()},
            timings={},
        )


if __name__ == "__main__":
    main()
