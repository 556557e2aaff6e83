"""A live table of a GRPO run in the terminal."""

from __future__ import annotations

import math
import time

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers import TrainerCallback

BARS = "▁▂▃▄▅▆▇█"
PHASES = ("rollout", "decode", "reward", "train")


class LiveDisplay(TrainerCallback):
    """Progress, rewards and metrics with their course so far, and where the seconds go.

    In a terminal the table is redrawn in place; elsewhere (a log file, CI) one line an evaluation is printed.
    """

    def __init__(self, console: Console | None = None):
        self.console = console or Console()
        self.progress = Progress(
            TextColumn("update"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.live = Live(console=self.console, refresh_per_second=4)
        self.task = None
        self.started = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        self.started = time.perf_counter()
        self.task = self.progress.add_task("update", total=state.max_steps, completed=state.global_step)
        if self.console.is_terminal:
            self.live.start()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.task is None:
            return
        self.progress.update(self.task, completed=state.global_step)
        self.live.update(Group(self.progress, self.table(state.log_history)))
        if args.eval_strategy == "no" and not self.console.is_terminal and "reward" in logs:
            self._print_line(state, f"reward {logs['reward']:.3f}")

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if self.task is None or self.console.is_terminal:
            return
        scores = {name: value for name, value in metrics.items() if name.startswith(("eval_rewards/", "eval_metrics/"))}
        shown = ", ".join(f"{name.split('/')[1]} {value:.3f}" for name, value in scores.items())
        self._print_line(state, shown)

    def _print_line(self, state, values: str) -> None:
        seconds = time.perf_counter() - self.started
        line = f"update {state.global_step}/{state.max_steps} after {seconds:.0f} s: {values}"
        self.console.print(line, soft_wrap=True)

    def on_train_end(self, args, state, control, **kwargs):
        if self.live.is_started:
            self.live.stop()

    def table(self, history: list[dict[str, float]]) -> Table:
        """Held-out values and training rewards: first, latest, and their course."""
        table = Table(box=None, pad_edge=False)
        for heading in ("", "start", "now", "course"):
            table.add_column(heading, justify="left" if heading in ("", "course") else "right")
        names = dict.fromkeys(name for log in history for name in log)
        for name in names:
            kind, _, rest = name.partition("/")
            if kind not in ("eval_rewards", "eval_metrics", "rewards") or not rest.endswith("/mean"):
                continue
            values = [log[name] for log in history if name in log and math.isfinite(log[name])]
            if not values:
                continue
            where = "training" if kind == "rewards" else "held-out"
            label = f"{where} {rest.removesuffix('/mean')}"
            table.add_row(label, f"{values[0]:.3f}", f"{values[-1]:.3f}", sparkline(values))
        latest = next((log for log in reversed(history) if "loss" in log), None)
        if latest is not None:
            seconds = ", ".join(f"{phase} {latest.get(f'seconds/{phase}', 0):.1f}" for phase in PHASES)
            table.caption = f"seconds an update: {seconds}"
        return table


def sparkline(values: list[float], width: int = 30) -> str:
    """The last `width` values as a line of bars between their smallest and largest."""
    values = values[-width:]
    low, high = min(values), max(values)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[int((value - low) * scale + 0.5)] for value in values)
