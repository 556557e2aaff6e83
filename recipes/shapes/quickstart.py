"""`editrl quickstart`: the whole job on two CPU cores, from video files to a report."""

from __future__ import annotations

import time
from pathlib import Path

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
    """Post-train a tiny video editor by RL in minutes on a CPU, and show what it learned."""
    from editrl.cli.parser import CommandParser, number

    parser = CommandParser("editrl quickstart", f"{main.__doc__} Further options are those of `editrl grpo`.")
    parser.add_argument("--output_dir", type=Path, help="default: runs/quickstart-<time>")
    parser.add_argument("--config", default="shapes/grpo-nft", help="shapes/grpo-nft (default), or shapes/grpo")
    parser.add_argument("--held_out", type=number(int, least=1), default=128, help="scenes it is judged on (128)")
    parser.refuse_unknown_flags = lambda argv: None  # they belong to grpo, which checks them
    options, overrides = parser.parse_known_args(argv)
    folder = options.output_dir or Path("runs") / time.strftime("quickstart-%Y%m%d-%H%M%S")
    run(folder, options.held_out, overrides, options.config)


def run(folder: Path, held_out: int, overrides: list[str], config: str = "shapes/grpo-nft") -> Path:
    """Write the data, train, and report into `folder`; returns the path of the report."""
    from rich.console import Console
    from transformers.utils import logging

    from editrl.cli.grpo import build, read_options, train
    from editrl.cli.launch import save
    from editrl.recipes.shapes.dataset import write_dataset
    from editrl.recipes.shapes.world import sample_scenes

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console()
    started = time.perf_counter()
    manifests = {split: folder / "data" / split / "manifest.jsonl" for split in ("train", "heldout")}
    data_options = ["--train_manifest", str(manifests["train"]), "--eval_manifest", str(manifests["heldout"])]
    options = read_options(
        ["--config", config, *data_options, "--output_dir", str(folder / "run"), *overrides], "quickstart"
    )
    console.print(f"[bold]editrl quickstart[/bold]: RL ({config}) of a tiny HunyuanVideo editor. {CHECKPOINT}")
    data = {"train": sample_scenes(256, seed=11, split="train"), "heldout": sample_scenes(held_out, 12, "heldout")}
    for split, scenes in data.items():
        write_dataset(manifests[split].parent, scenes)
    trainer, resume = build(options, "quickstart")
    shown = _shown(data["heldout"])
    before = trainer.sample(trainer.eval_dataset, shown)
    prepared = time.perf_counter()
    train(trainer, resume)
    if _evaluated(trainer.state.log_history)[-1:] != [trainer.state.global_step]:
        trainer.evaluate()  # the last update need not be one of every eval_steps
    trained = time.perf_counter()
    save(trainer)
    after = trainer.sample(trainer.eval_dataset, shown)
    report = _report(
        folder / "report.html",
        trainer,
        shown,
        before,
        after,
        data["heldout"],
        config,
        {
            "data and models": prepared - started,
            "training and evaluation": trained - prepared,
            "in all": time.perf_counter() - started,
        },
    )
    console.print(_table(_summary(trainer.state.log_history), held_out))
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


def _evaluated(history: list[dict]) -> list[int]:
    """The updates after which it was judged."""
    return [log["step"] for log in history if any(name.startswith("eval_") for name in log)]


def _summary(history: list[dict]) -> list[dict]:
    rows = []
    for name, key in SOURCES.items():
        values = [value for _, value in _course(history, key)]
        if len(values) > 1:  # overrides may leave out a reward, or the evaluation at the start
            change = values[-1] - values[0]
            rows.append({"held-out": name, "before": values[0], "after": values[-1], "change": change})
    return rows


def _table(rows: list[dict], held_out: int):
    from rich.table import Table

    table = Table(title=f"{held_out} held-out scenes, same noise before and after")
    for heading in ("held-out", "before", "after", "change"):
        table.add_column(heading, justify="left" if heading == "held-out" else "right")
    for row in rows:
        signed = f"{row['change']:+.3f}"
        table.add_row(row["held-out"], f"{row['before']:.3f}", f"{row['after']:.3f}", signed)
    return table


def _report(path: Path, trainer, shown, before, after, scenes, config: str, timings: dict) -> Path:
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
        *(
            Curve(f"watchdog: {name}", "update", {"held-out": _course(history, f"eval_watchdog/{name}/mean")})
            for name in ("edge_density", "source_similarity")
        ),
    ]
    recipe, _ = load_yaml(recipe_path(config))
    settings = {name: getattr(trainer.args, name, value) for name, value in recipe.items()}
    return write_report(
        path,
        title="Reinforcement learning on the shapes world",
        intro=f"A tiny HunyuanVideo editor, trained by {trainer.args.loss_type.upper()} (recipe {config}) with the "
        f"three rewards of VIVA. {CHECKPOINT} The cases are the first {SHOWN_PER_TASK} held-out scenes of every task; "
        "the oracle judges, and no reward sees it.",
        summary=_summary(history),
        curves=curves,
        cases=cases,
        settings=settings,
        timings={**timings, **seconds},
    )
