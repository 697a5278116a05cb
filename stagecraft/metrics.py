"""What a run writes while it works: metrics.jsonl, TensorBoard events, one live line.

Also the clock that splits a stage's wall time into compile, prepare, update, save and
so on. Nothing here knows about models or losses.
"""

import contextlib
import json
import math
import sys
import time
from pathlib import Path

import jax
from rich.console import Console
from rich.live import Live
from rich.text import Text
from tensorboardX import SummaryWriter

from stagecraft import process

_COMPILE_EVENTS = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)
_compile_seconds = 0.0


def _on_duration(event, seconds, **_):
    global _compile_seconds
    if event in _COMPILE_EVENTS:
        _compile_seconds += seconds


jax.monitoring.register_event_duration_secs_listener(_on_duration)


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
        start, compiled = time.perf_counter(), _compile_seconds
        self._inside.append([0.0, 0.0])
        _active.append(self)
        try:
            yield
        finally:
            _active.pop()
            nested, nested_compiling = self._inside.pop()
            # A jitted call compiles inside the section that first makes it.
            compiling = _compile_seconds - compiled
            elapsed = time.perf_counter() - start
            spent = max(elapsed - compiling - nested, 0.0)
            self.seconds[section] = self.seconds.get(section, 0.0) + spent
            self.seconds["compile"] += compiling - nested_compiling
            if self._inside:
                self._inside[-1][0] += spent + nested
                self._inside[-1][1] += compiling

    def total(self):
        """All sections together, in seconds."""
        return sum(self.seconds.values())


_active = []


def section(name):
    """A part of whatever section runs: its time is counted there, not in the whole.

    Does nothing where no clock runs.
    """
    return _active[-1](name) if _active else contextlib.nullcontext()


class Writer:
    """Appends one JSON line per write, and the same scalars as TensorBoard events.

    Does nothing in a process that is not the first of its program.

    Args:
        folder: the stage's folder; holds metrics.jsonl, samples.jsonl and the events.
        resume_step: lines of later steps are dropped, so that a run that was cut off
            after its last checkpoint leaves each step once.
        watch: what else is told of everything, with `scalars` and `texts` as
            `trackers.Watch` has them; or None.
    """

    def __init__(self, folder, *, resume_step=0, watch=None):
        self._watch, self._on = watch, process.is_first()
        self.folder = Path(folder)
        if not self._on:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "samples.jsonl"):
            _truncate(self.folder / name, resume_step)
        self._lines = (self.folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._samples = (self.folder / "samples.jsonl").open("a", encoding="utf-8")
        self._events = SummaryWriter(
            str(self.folder), purge_step=resume_step + 1 if resume_step else None
        )

    def write(self, step, seconds, values):
        """Records {name: float} for a step; `seconds` since the stage began."""
        if not self._on:
            return
        row = {"step": step, "seconds": round(seconds, 3)}
        # NaN is not JSON: a number that is not finite is written as null.
        row |= {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._lines.write(json.dumps(row) + "\n")
        self._lines.flush()
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
            self._samples.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._samples.flush()
        if self._watch is not None:
            self._watch.texts(step, samples)

    def close(self):
        if not self._on:
            return
        self._lines.close()
        self._samples.close()
        self._events.close()


def _truncate(path, step):
    """Keeps the rows up to `step`; a half-written last line goes too."""
    if not path.exists():
        return
    kept = [row for row in read(path) if row["step"] <= step]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
    path.write_text(text, encoding="utf-8")


def read(path):
    """The rows of a metrics.jsonl or samples.jsonl; stops at a half-written line."""
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
    """One live line a stage on a terminal; plain lines every `log` steps elsewhere."""

    def __init__(self, name, steps, *, log=10, stream=None):
        self.name, self.steps, self.log = name, steps, max(log, 1)
        self.console = Console(file=stream or sys.stderr, highlight=False)
        self.started = time.perf_counter()
        self.first = None
        self._tokens = 0
        self._live = None
        if self.console.is_terminal:
            self._live = Live("", console=self.console, refresh_per_second=4)
            self._live.start()

    def note(self, text):
        """Says what a long silent moment is about: compiling, restoring, saving."""
        if self._live:
            self._live.update(Text(f"{self.name:<12} {text}", style="dim"))
        else:
            self.console.print(f"{self.name:<12} {text}", markup=False)

    def step(self, step, values, tokens):
        """Shows a finished step.

        Args:
            step: steps done so far, of all runs of the stage.
            values: {name: float}; the loss and one or two companions are shown.
            tokens: tokens the step worked on, for the rate.
        """
        now = time.perf_counter()
        if self.first is None:  # the first step of a run holds the compilation
            self.first, self._tokens = (step, now), 0
        else:
            self._tokens += tokens
        last = step >= self.steps
        if not self._live and not last and step % self.log:
            return
        line = f"{self.name:<12} {step:>6}/{self.steps}"
        line += "".join(f"  {k} {v:.4g}" for k, v in _shown(values).items())
        done = step - self.first[0]
        if done:
            rate = done / (now - self.first[1])
            left = (self.steps - step) / rate
            line += f"  {self._tokens / (now - self.first[1]):,.0f} tokens/s"
            line += f"  {left:.0f} s left" if not last else ""
        if last:
            line += f"  {now - self.started:.1f} s"
        if self._live:
            self._live.update(Text(line))
        else:
            self.console.print(line, markup=False, soft_wrap=True)

    def close(self):
        if self._live:
            self._live.stop()


_SHOWN = (
    "loss",
    "mean_token_accuracy",
    "accuracy",
    "rewards/accuracies",
    "objective/scores",
    "objective/kl",
)


def _shown(values):
    return {k.rsplit("/", 1)[-1]: values[k] for k in _SHOWN if k in values}
