"""`editrl quickstart`: the whole job on two CPU cores, from video files to a report."""

from __future__ import annotations

import time
from pathlib import Path

HELD_OUT = 128
SHOWN_PER_TASK = 2
SOURCES = {
    "oracle success": "eval_metrics/oracle_success/mean",
    "preservation, dB": "eval_metrics/oracle_preservation/mean",
    "clip_instruction": "eval_rewards/clip_instruction/mean",
    "clip_source_fidelity": "eval_rewards/clip_source_fidelity/mean",
    "pickscore": "eval_rewards/pickscore/mean",
}
CHECKPOINT = (
    "It starts from the shipped checkpoint sft-underediting: an ordinary SFT checkpoint, trained on with half of its "
    "targets left unedited, the typical flaw of synthetic pairs, so it often returns the source. Much of what is "
    "learned here is to unlearn that."
)


def main(argv: list[str]) -> None:
    """Post-train a tiny video editor with GRPO in minutes on a CPU, and show what it learned."""
    from editrl.cli.parser import CommandParser

    parser = CommandParser("editrl quickstart", f"{main.__doc__} Further options are those of `editrl grpo`.")
    parser.add_argument("--output_dir", type=Path, help="default: runs/quickstart-<time>")
    parser.refuse_unknown_flags = lambda argv: None  # they belong to grpo, which checks them
    options, overrides = parser.parse_known_args(argv)
    run(options.output_dir or Path("runs") / time.strftime("quickstart-%Y%m%d-%H%M%S"), overrides)


def run(folder: Path, overrides: list[str]) -> Path:
    """Write the data, train, and report into `folder`; returns the path of the report."""
    from rich.console import Console
    from transformers.utils import logging

    from editrl.cli.grpo import build
    from editrl.recipes.shapes.dataset import write_dataset
    from editrl.recipes.shapes.world import sample_scenes

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console()
    started = time.perf_counter()
    console.print(f"[bold]editrl quickstart[/bold]: Edit-GRPO of a tiny HunyuanVideo editor. {CHECKPOINT}")
    data = {"train": sample_scenes(256, seed=11, split="train"), "heldout": sample_scenes(HELD_OUT, 12, "heldout")}
    for split, scenes in data.items():
        write_dataset(folder / "data" / split, scenes)
    manifests = {
        name: str(folder / "data" / split / "manifest.jsonl")
        for name, split in {"--train_manifest": "train", "--eval_manifest": "heldout"}.items()
    }
    options = [word for pair in manifests.items() for word in pair]
    trainer, _ = build(
        ["--config", "shapes/grpo", *options, "--output_dir", str(folder / "run"), *overrides], "quickstart"
    )
    shown = _shown(data["heldout"])
    before = trainer.sample(trainer.eval_dataset, shown)
    prepared = time.perf_counter()
    trainer.train()
    trained = time.perf_counter()
    after = trainer.sample(trainer.eval_dataset, shown)
    report = _report(
        folder / "report.html",
        trainer,
        shown,
        before,
        after,
        data["heldout"],
        {
            "data and models": prepared - started,
            "training and evaluation": trained - prepared,
            "in all": time.perf_counter() - started,
        },
    )
    console.print(_table(_summary(trainer.state.log_history)))
    console.print(f"{time.perf_counter() - started:.0f} s in all. Source, before and after side by side: {report}")
    return report


def _shown(scenes) -> list[int]:
    """The first scenes of every task: nothing is picked by its result."""
    by_task: dict[str, list[int]] = {}
    for index, scene in enumerate(scenes):
        by_task.setdefault(scene.task, []).append(index)
    return [index for indices in by_task.values() for index in indices[:SHOWN_PER_TASK]]


def _course(history: list[dict], key: str) -> list[tuple[float, float]]:
    return [(log["step"], log[key]) for log in history if key in log]


def _summary(history: list[dict]) -> list[dict]:
    rows = []
    for name, key in SOURCES.items():
        values = [value for _, value in _course(history, key)]
        change = values[-1] - values[0]
        rows.append({"held-out": name, "before": values[0], "after": values[-1], "change": change})
    return rows


def _table(rows: list[dict]):
    from rich.table import Table

    table = Table(title=f"{HELD_OUT} held-out scenes, same noise before and after")
    for heading in rows[0]:
        table.add_column(heading, justify="left" if heading == "held-out" else "right")
    for row in rows:
        signed = f"{row['change']:+.3f}"
        table.add_row(row["held-out"], f"{row['before']:.3f}", f"{row['after']:.3f}", signed)
    return table


def _report(path: Path, trainer, shown, before, after, scenes, timings: dict) -> Path:
    import torch

    from editrl.cli.recipes import recipe_path
    from editrl.cli.yaml_file import load_yaml
    from editrl.recipes.shapes.oracle import score
    from editrl.report import Curve, ReportCase, write_report

    history = trainer.state.log_history
    judged = {
        name: score(torch.stack(videos), [scenes[index] for index in shown])["success"].tolist()
        for name, videos in (("before", before), ("after", after))
    }
    cases = []
    for position, index in enumerate(shown):
        example = trainer.eval_dataset[index]
        verdicts = {name: "right" if right[position] else "wrong" for name, right in judged.items()}
        cases.append(
            ReportCase(
                instruction=example.instruction,
                videos={"source": example.source, "before": before[position], "after": after[position]},
                notes={"task": example.task, **{f"oracle, {name}": verdict for name, verdict in verdicts.items()}},
                fps=example.fps,
            )
        )
    seconds = {
        phase: sum(log.get(f"seconds/{phase}", 0.0) for log in history)
        for phase in ("rollout", "decode", "reward", "train")
    }
    rewards = list(SOURCES)[2:]
    curves = [
        Curve("oracle success, held-out", "update", {"success": _course(history, SOURCES["oracle success"])}),
        Curve("preservation, held-out (dB)", "update", {"PSNR": _course(history, SOURCES["preservation, dB"])}),
        *(
            Curve(
                name,
                "update",
                {
                    "held-out": _course(history, f"eval_rewards/{name}/mean"),
                    "training": _course(history, f"rewards/{name}/mean"),
                },
            )
            for name in rewards
        ),
    ]
    recipe, _ = load_yaml(recipe_path("shapes/grpo"))
    settings = {name: getattr(trainer.args, name, value) for name, value in recipe.items()}
    return write_report(
        path,
        title="Edit-GRPO on the shapes world",
        intro=f"A tiny HunyuanVideo editor, trained by GRPO with the three rewards of VIVA. {CHECKPOINT} The cases are "
        f"the first {SHOWN_PER_TASK} held-out scenes of every task; the oracle judges, and no reward sees it.",
        summary=_summary(history),
        curves=curves,
        cases=cases,
        settings=settings,
        timings={**timings, **seconds},
    )
