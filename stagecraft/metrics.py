"""Metrics of a running stage: metrics.jsonl, TensorBoard events, a progress bar.

Also the clock that splits a stage's wall time into compile, prepare, update, save and
so on. Nothing here knows about models or losses.
"""

import contextlib
import contextvars
import json
import math
import sys
import time
from pathlib import Path

import jax
from rich import progress
from rich.console import Console
from tensorboardX import SummaryWriter

from stagecraft import process, storage, stores

_COMPILE_EVENTS = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)


class _Compilation:
    """Adds up the seconds that JAX reports for tracing and compiling."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self, event, seconds, **_):
        if event in _COMPILE_EVENTS:
            self.seconds += seconds


_compilation = _Compilation()
jax.monitoring.register_event_duration_secs_listener(_compilation)
_running = contextvars.ContextVar("running", default=None)  # the innermost Clock


class Clock:
    """Wall seconds by section; tracing and compilation are a section of their own.

    >>> clock = Clock()
    >>> with clock("prepare"):
    ...     pass
    >>> sorted(clock.seconds)
    ['compile', 'prepare']
    """

    def __init__(self, seconds=None):
        self.seconds = dict(seconds or {"compile": 0.0})
        self._inside = []  # [seconds, compile seconds] spent in nested sections

    @contextlib.contextmanager
    def __call__(self, section):
        start, compiled = time.perf_counter(), _compilation.seconds
        self._inside.append([0.0, 0.0])
        token = _running.set(self)
        try:
            yield
        finally:
            _running.reset(token)
            nested, nested_compiling = self._inside.pop()
            # A jitted call compiles inside the section that first makes it.
            compiling = _compilation.seconds - compiled
            elapsed = time.perf_counter() - start
            spent = max(elapsed - compiling - nested, 0.0)
            self.seconds[section] = self.seconds.get(section, 0.0) + spent
            self.seconds["compile"] += compiling - nested_compiling
            if self._inside:
                self._inside[-1][0] += spent + nested
                self._inside[-1][1] += compiling

    def total(self) -> float:
        """Returns the seconds of all sections together."""
        return sum(self.seconds.values())


def section(name):
    """Times a part of the running section, apart from the rest of it.

    Does nothing where no clock runs.
    """
    clock = _running.get()
    return clock(name) if clock else contextlib.nullcontext()


class Writer:
    """Appends one JSON line per write, and the same scalars as TensorBoard events.

    Does nothing in a process that is not the first of its program.

    Args:
        folder: the stage's folder; holds metrics.jsonl, samples.jsonl and the events.
        resume_step: lines of later steps are dropped, so that a run that was cut off
            after its last checkpoint leaves each step once.
        evaluated_again, sampled_again: whether the model of that step will be evaluated
            or sampled once more: its eval_ metrics or samples are then dropped too.
        watch: a `trackers.Watch` that gets the same scalars and samples, or None.
    """

    def __init__(
        self,
        folder,
        *,
        resume_step=0,
        evaluated_again=False,
        sampled_again=False,
        watch=None,
    ):
        self._watch, self._on = watch, process.is_first()
        self.folder = Path(folder)
        if not self._on:
            return
        self.folder.mkdir(parents=True, exist_ok=True)

        def stays(row):
            evaluation = any(key.startswith("eval_") for key in row)
            return row["step"] <= resume_step - (evaluated_again and evaluation)

        _truncate(self.folder / "metrics.jsonl", stays)
        last = resume_step - sampled_again
        _truncate(self.folder / "samples.jsonl", lambda row: row["step"] <= last)
        self._lines = (self.folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._samples = (self.folder / "samples.jsonl").open("a", encoding="utf-8")
        self._events = SummaryWriter(
            str(self.folder), purge_step=resume_step + 1 if resume_step else None
        )

    def write(self, step, seconds, values):
        """Records {name: float} for a step; `seconds` since the stage began."""
        if not self._on:
            return
        row = {"step": step, "seconds": round(seconds, 3)} | values
        self._lines.write(storage.to_json(row) + "\n")
        self._lines.flush()
        stores.push_soon(self.folder / "metrics.jsonl")
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        if self._watch is not None:
            self._watch.scalars(step, values)

    def write_samples(self, step, samples):
        """Records [{"prompt", "completion", ...}] drawn at a step."""
        if not self._on:
            return
        for sample in samples:
            row = {"step": step, **sample}
            self._samples.write(storage.to_json(row) + "\n")
        self._samples.flush()
        stores.push_soon(self.folder / "samples.jsonl")
        if self._watch is not None:
            self._watch.texts(step, samples)

    def close(self):
        if not self._on:
            return
        self._lines.close()
        self._samples.close()
        self._events.close()
        stores.push(self.folder)


def _truncate(path, stays):
    """Drops the rows that do not stay, and a half-written last line."""
    if not path.exists():
        return
    rows = [row for row in read(path) if stays(row)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    storage.write_text(path, text)


def read(path):
    """Returns the rows of a metrics.jsonl or samples.jsonl, to a half-written line."""
    rows = []
    if not Path(path).exists():
        return rows
    with Path(path).open(encoding="utf-8") as lines:
        for line in lines:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


def is_number(value) -> bool:
    """Returns whether a value is a finite int or float, and no bool."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
    )


class Progress:
    """A bar for long work on a terminal; plain lines every `log` steps elsewhere.

    Args:
        name: what works: a stage, or a phase of a curation.
        steps: how many there are.
        log: steps between lines where there is no terminal.
        unit: of what `step` is told the number of, for the rate.
        stream: where to; by default standard error.
    """

    def __init__(self, name, steps, *, log=10, unit="tokens", stream=None):
        self.name, self.steps, self.log = name, steps, max(log, 1)
        self.unit = unit
        quiet = stream is None and not process.is_first()  # process 0 shows it
        self.console = Console(file=stream or sys.stderr, highlight=False, quiet=quiet)
        self.started = time.perf_counter()
        self.first = None
        self._count = 0
        self._bar = None
        if self.console.is_terminal:
            self._bar = progress.Progress(
                progress.TextColumn("{task.description:<12}", markup=False),
                progress.BarColumn(bar_width=20),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[text]}", markup=False),
                console=self.console,
            )
            self._task = self._bar.add_task(name, total=steps, text="")
            self._bar.start()

    def note(self, text):
        """Shows what a long silent moment is spent on: compiling, restoring, saving."""
        if self._bar:
            self._bar.update(self._task, text=text)
        else:
            self.console.print(f"{self.name:<12} {text}", markup=False)

    def step(self, step, values=None, tokens=0):
        """Shows a finished step.

        Args:
            step: steps done so far, of all runs of the stage.
            values: {name: float}; the loss and one or two companions are shown.
            tokens: those the step worked on, without padding; or what `unit` says.
        """
        now = time.perf_counter()
        if self.first is None:  # the first step of a run holds the compilation
            self.first, self._count = (step, now), 0
        else:
            self._count += tokens
        if self._bar:
            text = self._text(step, values or {}, now)
            self._bar.update(self._task, completed=step, text=text)
        elif step >= self.steps or step % self.log == 0:
            line = f"{self.name:<12} {step:>6}/{self.steps}  "
            line += self._text(step, values or {}, now)
            self.console.print(line.rstrip(), markup=False, soft_wrap=True)

    def _text(self, step, values, now):
        parts = [f"{k} {v:.4g}" for k, v in _shown(values).items()]
        last, done = step >= self.steps, step - self.first[0]
        if done:
            seconds = now - self.first[1]
            if self._count:
                parts.append(f"{self._count / seconds:,.0f} {self.unit}/s")
            if not last:
                parts.append(f"{(self.steps - step) * seconds / done:.0f} s left")
        if last:
            parts.append(f"{now - self.started:.1f} s")
        return "  ".join(parts)

    def close(self):
        if self._bar:
            self._bar.stop()


_SHOWN = (
    "loss",
    "mean_token_accuracy",
    "accuracy",
    "rewards/accuracies",
    "rewards/margins",
    "objective/scores",
    "objective/kl",
    "reward",
    "frac_reward_zero_std",  # where it is 1, no group of answers teaches anything
    "completions/mean_length",
    "kl",
)


def _shown(values):
    return {k.rsplit("/", 1)[-1]: values[k] for k in _SHOWN if k in values}
