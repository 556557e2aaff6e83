"""Table and plot of the learning runs: `python -m editrl.benchmarks.algorithms.summary RESULTS_FOLDER`.

Runs that differ in their seed alone are averaged; each experiment stands beside its random-reward control.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

IGNORED = ("seed", "weights", "device")


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


def rows(runs: dict[str, list[dict]]) -> list[dict[str, str]]:
    """One row an experiment: before, after the last evaluation that all seeds reached, and the changes."""
    table = []
    for name, group in runs.items():
        last = min(run["evaluations"][-1]["update"] for run in group)
        at_last = [next(e for e in run["evaluations"] if e["update"] == last) for run in group]
        first = [run["evaluations"][0] for run in group]
        change = [100 * (b["success"] - a["success"]) for a, b in zip(first, at_last, strict=True)]
        decibels = [b["preservation_db"] - a["preservation_db"] for a, b in zip(first, at_last, strict=True)]
        table.append(
            {
                "experiment": name,
                "seeds": str(len(group)),
                "updates": str(last),
                "success before": f"{mean(e['success'] for e in first):.3f}",
                "success after": spread([e["success"] for e in at_last], 3),
                "change, points": spread(change, 1),
                "preservation change, dB": spread(decibels, 2),
                "seconds": f"{mean(e['seconds'] for e in at_last):.0f}",
                "device": group[0]["machine"]["device"],
            }
        )
    return table


def markdown(table: list[dict[str, str]]) -> str:
    """As a Markdown table."""
    lines = [list(table[0]), ["---"] * len(table[0]), *(list(row.values()) for row in table)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(runs: dict[str, list[dict]], path: Path) -> None:
    """Success and preservation against updates; one line an experiment (mean), its seeds as a band."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, key, title in zip(
        axes, ("success", "preservation_db"), ("oracle success, held-out", "preservation, held-out (dB)"), strict=True
    ):
        for name, group in runs.items():
            points = defaultdict(list)
            for run in group:
                for evaluation in run["evaluations"]:
                    points[evaluation["update"]].append(evaluation[key])
            updates = [update for update, values in sorted(points.items()) if len(values) == len(group)]
            axis.plot(updates, [mean(points[u]) for u in updates], label=name)
            axis.fill_between(updates, [min(points[u]) for u in updates], [max(points[u]) for u in updates], alpha=0.2)
        axis.set(title=title, xlabel="update")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--plot", type=Path, help="also draw the courses to this file")
    options = parser.parse_args()
    runs = load(options.folder)
    if not runs:
        parser.error(f"no *-seed*.json in {options.folder}")
    print(markdown(rows(runs)))
    if options.plot:
        plot(runs, options.plot)


if __name__ == "__main__":
    main()
