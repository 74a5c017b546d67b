"""A running search in the terminal: a live line, a line per finding, and the closing table."""

from __future__ import annotations

import logging
import os
import time
import warnings

import rich.console
from rich.live import Live
from rich.text import Text

from ..core.codec import describe_plan
from ..core.types import Evaluation, State, Task
from ..evaluators.units import show
from ..studies.cross import cross_table, crossings
from ..studies.pareto import hypervolume
from ..studies.report import front_table
from ..studies.study import Record, Study
from .config import SearchConfig
from .engine import Progress


def prepare() -> None:
    """Keep libraries' chatter out of the terminal; must come before torch and Ray are imported."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    warnings.filterwarnings("ignore")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)


class Console:
    """Shows a search; on a terminal a live line, elsewhere a line per trial."""

    def __init__(self) -> None:
        self._console = rich.console.Console(highlight=False)
        self._live: Live | None = None
        self._study: Study | None = None
        self._config = SearchConfig()
        self._base: list[float] = []
        self._values: list[list[float]] = []
        self._start = time.monotonic()
        self._at_start = 0
        self._settling = False
        self.interrupted = False

    def started(self, study: Study, config: SearchConfig, task: Task, baseline: Record) -> None:
        """Say what is searched, what the untouched model does, and what the search may cost."""
        self._study, self._config, self._start = study, config, time.monotonic()
        self._base = study.values(baseline.metrics)
        records = study.records()
        self._at_start = len(records)
        self._values = [study.values(r.metrics) for r in records if r.state is State.COMPLETE]
        print_ = self._console.print
        named = {1: "1 worker", "auto": "as many workers as come"}
        workers = named.get(config.workers, f"{config.workers} workers")
        print_(f"[bold]{config.model}[/bold] on {config.data} for {', '.join(config.targets)} → {study.folder}")
        print_(f"{config.trials} trials, {workers}, sampler {config.sampler}, seed {config.seed}")
        if len(records) > 1:
            print_(f"resumed: {len(records)} trials were recorded before")
        figures = ", ".join(
            f"{o.name} {show(o.name, baseline.metrics[o.name].value, o.unit)}" for o in study.objectives
        )
        print_(f"untouched model: {figures}")
        side_by_side = config.trials if config.workers == "auto" else config.workers
        least = baseline.seconds * max(0, config.trials - len(records)) / side_by_side
        print_(f"cost: at least {_duration(least)} for the trials to come; training comes on top (forecast below)")
        if not task.trained:
            print_("warning: random weights, so accuracy means nothing; --weights loads trained ones", style="yellow")
        if self._console.is_terminal:
            self._live = Live(Text("starting the workers"), console=self._console, refresh_per_second=2, transient=True)
            self._live.start()

    def changed(self, progress: Progress, evaluation: Evaluation | None) -> None:
        """Refresh the live line; tell of a trial that ended."""
        assert self._study is not None
        if progress.ended:
            return
        if evaluation is not None:
            self._tell(progress, evaluation)
        if self._live is not None:
            self._live.update(self._line(progress))

    def measuring(self, done: int, total: int) -> None:
        """Say which front point is being measured again."""
        text = f"measuring the front again on the test split: {done + 1}/{total}"
        if self._live is not None:
            self._live.update(Text(text))
        elif done == 0:
            self._console.print(f"measuring {total} front points and baselines again on the test split")

    def settling(self, doubtful: int, left: float) -> None:
        """Say that the points are measured again on whose noise the front depends."""
        points = f"{doubtful} point{'s' if doubtful > 1 else ''}"
        text = f"the front depends on the noise of {points}: measuring again, {_duration(left)} left at most"
        if self._live is not None:
            self._live.update(Text(text))
        elif not self._settling:
            self._console.print(text)
        self._settling = True

    def settled(self, points: int, times: int, doubtful: int) -> None:
        """Say what became of them."""
        left = f"{doubtful} still in doubt (--verify-time gives them longer)" if doubtful else "none is in doubt now"
        self._console.print(f"{points} doubtful point{'s' if points > 1 else ''} measured again {times} times: {left}")
        self._settling = False

    def note(self, text: str) -> None:
        """Tell of something that is as it should be."""
        self._console.print(text, markup=False, soft_wrap=True)

    def trouble(self, text: str) -> None:
        """Tell of something that went wrong without ending the search."""
        self._console.print(text, style="yellow", markup=False)

    def ended(self, study: Study, progress: Progress) -> None:
        """Close the live line; print the front and where everything is."""
        if self._live is not None:
            self._live.stop()
        self.interrupted = progress.ended == "interrupted"
        for target, part in study.parts.items():
            self._console.print(front_table(part, target))
        self._console.print(cross_table(crossings(study)) if study.parts else front_table(study))
        reasons = [r for r in study.records() if r.state is State.FAILED]
        for record in reasons[:5]:
            self._console.print(f"[red]trial {record.trial} failed[/red] ({record.summary}): {record.reason}")
        if len(reasons) > 5:
            self._console.print(f"… and {len(reasons) - 5} more failures, see trials.csv")
        end = {"done": "", "space exhausted": "; the space holds no other candidates", "time is up": "; time is up"}
        self._console.print(
            f"{progress.trials} trials in {_duration(time.monotonic() - self._start)}: {progress.failures} failed, "
            f"{progress.infeasible} outside a constraint, {progress.repeats} repeats answered from the study"
            f"{f', {progress.stopped} stopped before their full training' if progress.stopped else ''}"
            f"{end.get(progress.ended, '')}"
        )
        drift = self._drift(study)
        if drift > 1.15:
            self._console.print(
                f"[yellow]the machine was uneven: the untouched model, timed beside every trial, took up to "
                f"{drift - 1:.0%} longer at some times than at others; compare the shares in brackets[/yellow]"
            )
        each = "trials.csv, front.csv, front.html, study.db, config.yaml"
        if study.parts:
            folders = ", ".join(f"{part.folder.name}/" for part in study.parts.values())
            self._console.print(f"{study.folder}: {folders} (each with {each}, artifacts/), cross.csv, {each}")
        else:
            self._console.print(f"{study.folder}: {each}, artifacts/")

    def _tell(self, progress: Progress, evaluation: Evaluation) -> None:
        assert self._study is not None
        if evaluation.state is State.COMPLETE:
            self._values.append(self._study.values(evaluation.measurements))
        if self._live is not None:
            return
        what = describe_plan(evaluation.candidate.plan)
        if evaluation.state in (State.COMPLETE, State.STOPPED):
            found = ", ".join(
                f"{o.name} {show(o.name, evaluation.measurements[o.name].value, o.unit)}"
                for o in self._study.objectives
            )
            found += f" ({evaluation.reason})" if evaluation.reason else ""
        else:
            found = f"{evaluation.state}: {evaluation.reason}"
        cost = f"[{evaluation.seconds:.1f} s; {self._left(progress)}]"
        text = f"{progress.trials}/{self._config.trials}  {what}: {found}  {cost}"
        self._console.print(text, markup=False, soft_wrap=True)

    def _line(self, progress: Progress) -> Text:
        assert self._study is not None
        volume = hypervolume(self._values, self._study.directions, self._base)
        parts = [
            f"{progress.trials}/{self._config.trials} trials",
            f"{progress.running} running",
            *([f"{progress.stopped} stopped early"] if progress.stopped else []),
            f"{progress.failures} failed",
            f"hypervolume {volume:.3f}",
            *self._best(),
            self._left(progress),
        ]
        return Text("  ·  ".join(parts))

    def _best(self) -> list[str]:
        """The best value of each objective so far."""
        assert self._study is not None
        found = []
        for column, objective in enumerate(self._study.objectives):
            values = [row[column] for row in self._values]
            if values:
                best = max(values) if objective.direction == "maximize" else min(values)
                found.append(f"{objective.name} {show(objective.name, best, objective.unit)}")
        return found

    @staticmethod
    def _drift(study: Study) -> float:
        """Longest over shortest latency of the untouched model among the trials' interleaved measurements."""
        worst = 1.0
        for part in study.parts.values() or [study]:
            found = [r.metrics["reference_latency"].value for r in part.records() if "reference_latency" in r.metrics]
            worst = max(worst, max(found) / min(found) if found else 1.0)
        return worst

    def _left(self, progress: Progress) -> str:
        """Forecast from this run's own pace."""
        done = progress.trials - self._at_start
        left = self._config.trials - progress.trials
        if done < 1 or left < 1:
            return "about the rest: unknown" if left > 0 else "last ones"
        return f"about {_duration((time.monotonic() - self._start) / done * left)} left"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
