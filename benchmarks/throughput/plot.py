"""The figures of this folder in one picture: `python -m editrl.benchmarks.throughput.plot RESULTS --out FILE`.

RESULTS is a folder with what `steps.py`, `grpo.py` and `kernels.py` wrote, under names that begin with `steps`, `grpo`
and `kernels`; what is not there is not drawn.
"""

import argparse
import json
from pathlib import Path


def load(folder: Path, kind: str) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"{kind}*.json"))]


def bars(folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Title -> name of a bar -> seconds of its parts."""
    panels = {}
    for result in sorted(load(folder, "steps"), key=lambda result: -len(result["figures"])):
        for name, figure in result["figures"].items():
            kind, _, variant = name.partition(": ")
            if kind != "product":
                # A file of some variants alone does not replace what was measured beside the baseline.
                panels.setdefault(f"{kind} step", {}).setdefault(variant, {"seconds": figure["seconds"]})
    for result in load(folder, "grpo"):
        for name, figure in result["variants"].items():
            parts = {phase.removeprefix("seconds/"): took / figure["clips"] for phase, took in figure["phases"].items()}
            panels.setdefault("whole GRPO step, a clip", {})[name] = parts
    for result in load(folder, "kernels"):
        for name, found in result["steps"].items():
            parts = {kind: milliseconds / 1e3 for kind, milliseconds in found["by_kind"].items()}
            panels.setdefault("where the time of a step goes", {})[name] = parts
    longest_first = {
        title: dict(sorted(rows.items(), key=lambda row: -sum(row[1].values()))) for title, rows in panels.items()
    }
    return longest_first


def draw(panels: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """One panel below the other, horizontal bars, stacked by part."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    heights = [len(rows) + 1.5 for rows in panels.values()]
    figure, axes = pyplot.subplots(
        len(panels),
        1,
        figsize=(9, 0.36 * sum(heights)),
        layout="constrained",
        squeeze=False,
        gridspec_kw={"height_ratios": heights},
    )
    for axis, (title, rows) in zip(axes.flat, panels.items(), strict=True):
        parts = list(dict.fromkeys(part for row in rows.values() for part in row))
        begin = dict.fromkeys(rows, 0.0)
        for part in parts:
            widths = [row.get(part, 0.0) for row in rows.values()]
            axis.barh(list(rows), widths, left=list(begin.values()), label=part)
            begin = {name: start + width for (name, start), width in zip(begin.items(), widths, strict=True)}
        for name, total in begin.items():
            axis.text(total, name, f" {total:.3g}", va="center", fontsize="x-small")
        axis.invert_yaxis()
        axis.margins(x=0.08)
        axis.tick_params(labelsize="x-small")
        axis.set_title(title, fontsize="small", loc="left")
        axis.set_xlabel("seconds", fontsize="x-small")
        if len(parts) > 1:
            axis.legend(fontsize="xx-small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    panels = bars(options.folder)
    if not panels:
        parser.error(f"'{options.folder}' holds no steps*.json, grpo*.json or kernels*.json")
    draw(panels, options.out)


if __name__ == "__main__":
    main()
