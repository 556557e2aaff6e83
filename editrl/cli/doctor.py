"""`editrl doctor`: the trainer that `editrl grpo` would train, looked at for one rollout."""

import dataclasses
import json
import math
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

STYLES = {"ok": "green", "info": "dim", "warn": "yellow", "fail": "bold red"}


@dataclass
class DoctorArguments:
    """What the doctor does with its findings."""

    json: str | None = field(default=None, metadata={"help": "Write the findings to this file as well."})


def main(argv: list[str]) -> int:
    """Find out from one rollout why a GRPO run would not learn."""
    from editrl.cli.launch import make_folder

    *options, doctor_args = read_options(argv)
    if doctor_args.json is not None:
        make_folder(Path(doctor_args.json).absolute().parent)
    with tempfile.TemporaryDirectory(prefix="editrl-doctor-") as folder:
        trainer = build(options, folder)
        findings = examine(trainer)
    if trainer.is_world_process_zero():
        print_findings(findings)
        if doctor_args.json is not None:
            write_json(doctor_args.json, findings)
    return int(any(finding.verdict == "fail" for finding in findings))


def read_options(argv: list[str]) -> tuple:
    """Policy, data, reward and training arguments as for `editrl grpo`, and the doctor's own."""
    from editrl.cli.arguments import DataArguments, PolicyArguments, RewardArguments
    from editrl.cli.config import parse_config
    from editrl.trainers import FlowGRPOConfig

    return parse_config(
        (PolicyArguments, DataArguments, RewardArguments, FlowGRPOConfig, DoctorArguments), argv, "doctor"
    )


def build(options: list, folder: str):
    """The trainer of `editrl grpo`, but for a new run that writes to `folder` and evaluates nothing."""
    from transformers.trainer_utils import IntervalStrategy

    from editrl.cli.grpo import build as build_grpo

    _, data_args, _, args = options
    data_args.eval_manifest = None
    args.eval_strategy, args.eval_on_start = IntervalStrategy.NO, False
    args.output_dir, args.resume_from_checkpoint = folder, None
    return build_grpo(tuple(options), "doctor")[0]


def examine(trainer) -> list:
    """The findings; says beforehand how much there is to do."""
    from editrl.doctor import diagnose

    args = trainer.args
    if trainer.is_world_process_zero():
        clips = f"{args.generation_batch_size} clips of {args.num_inference_steps} denoising steps"
        print(f"one rollout of {clips}, and its replay: as long as an update", file=sys.stderr)
    return diagnose(trainer)


def print_findings(findings: list) -> None:
    """A table for a person, aligned lines for a pipe; a summary at the end."""
    from editrl.doctor.finding import summary

    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table("check", "verdict", "finding")
        for finding in findings:
            table.add_row(finding.check, Text(finding.verdict, STYLES[finding.verdict]), finding.text)
        Console(markup=False, highlight=False).print(table)
    else:
        width = max(len(finding.check) for finding in findings)
        for finding in findings:
            print(f"{finding.check:<{width}}  {finding.verdict:<4}  {finding.text}")
    print(summary(findings))


def write_json(path: str, findings: list) -> None:
    """`{"summary": ..., "findings": [...]}`, whole or not at all; a number that is not finite is null."""
    from editrl.data import atomic_path
    from editrl.doctor.finding import summary

    listed = [dataclasses.asdict(finding) for finding in findings]
    for finding in listed:
        numbers = finding["numbers"].items()
        finding["numbers"] = {name: value if math.isfinite(value) else None for name, value in numbers}
    with atomic_path(path) as unfinished:
        unfinished.write_text(json.dumps({"summary": summary(findings), "findings": listed}, indent=2) + "\n")
