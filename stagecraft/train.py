"""The only training loop: every stage of every experiment goes through it.

Chapters: restore, prepare, update, log, save, evaluate and sample when due. The loop
reads a step's numbers one step late, so that the device never waits for the host.
"""

import contextlib
import functools
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from stagecraft import (
    checkpoint,
    masked,
    metrics,
    process,
    processes,
    sharding,
    stores,
    tree,
)
from stagecraft.data.dataset import Dataset
from stagecraft.errors import UserError
from stagecraft.models import lora
from stagecraft.stages.stage import Stage, State, averaged
from stagecraft.trackers import Watch

EVALUATIONS = 10  # about so many a stage, with every.eval=-1
# Logged as they are in a step; the other metrics are means over the steps since the
# last line, as TRL's are.
OF_THE_STEP = ("learning_rate", "objective/kl_coef")


class Hooks(NamedTuple):
    """What a stage does besides training; None for what it does not.

    Attributes:
        heldout: the data of eval_ metrics.
        sample: (model, step) -> [{"prompt", "completion"}].
        finish: (state) -> (state, {metric: float}), called after the last step.
        watch: the trackers that also get metrics and samples.
    """

    heldout: Dataset | None = None
    sample: Callable[[Any, int], list[dict[str, Any]]] | None = None
    finish: Callable[[State], tuple[State, dict[str, float]]] | None = None
    watch: Watch | None = None


def train(
    stage: Stage,
    config: ConfigDict,
    data: Dataset,
    folder: str | Path,
    *,
    name: str,
    key: jax.Array,
    hooks: Hooks | None = None,
) -> tuple[State, dict[str, Any]]:
    """Trains a stage to its last step, from its newest checkpoint if there is one.

    Args:
        stage: what is trained, and how.
        config: the stage's resolved config: steps, batch_size, every.
        data: the batches; their order is a function of (seed, step).
        folder: WORKDIR/STAGE.
        name: the stage's name, for the progress line.
        key: the stage's random key.
        hooks: what the stage does besides training.

    Returns:
        the final state, and {"steps", "seconds", "tokens", "peak_memory_bytes"}.
    """
    loop = _Loop(stage, config, Path(folder), name, hooks or Hooks())
    init_key, step_key = jax.random.split(key)
    try:
        with process.stoppable(loop.note_stop) as stopping:
            loop.restore(data, init_key)
            while loop.step < config.steps:
                loop.watch(stopping)
                with loop.pace(loop.step + 1):
                    loop.update(step_key)
                    late, stop = loop.agreed(stopping)
                if loop.due(config.every.save) or late or stop:
                    loop.save()
                if stop:
                    loop.stop(stop)
            loop.conclude()
            loop.watch(stopping)
            # Asked for since the last step, it holds for the stages after this one.
            if number := loop.agreed(stopping)[1]:
                loop.stop(number)
    except UserError:
        raise
    except Exception as error:
        processes.crash(error)  # now: closing may wait for a process that is gone
        raise
    finally:
        loop.close()
    return loop.state, loop.result()


class _Loop:
    """A stage being trained: its state, its counters and the files it writes.

    A step is saved before its model is evaluated, sampled and concluded, so that
    nothing that fails there costs any training: a resumed loop does that again.
    """

    def __init__(self, stage, config, folder, name, hooks):
        self.stage, self.config, self.hooks = stage, config, hooks
        self.folder, self.name = folder, name
        self.checkpoints = checkpoint.Checkpoints(folder / "checkpoints")
        # Where the last step is until `hooks.finish` has made of it what is kept.
        self.unconcluded = stores.place(folder / "unconcluded")
        self.clock = metrics.Clock()
        self.progress = metrics.Progress(name, config.steps, log=config.every.log)
        self.writer = self.iterator = None
        self.step = self.last_saved = 0
        self.work = {}  # {what was done with tokens, padding too: count}
        self.num_tokens = 0.0  # seen, without padding
        self.begun = {}  # {later step: its rollout}; after a restart there is none
        self.pending = None  # the newest step's numbers, not yet read
        self.since = {}  # {metric: [sum, steps]} since the last line was logged
        self.saved_at = time.monotonic()
        several = jax.process_count() > 1
        self.vote = sharding.Vote() if several else None
        self.pace = processes.Pace(name)

    def restore(self, data, key):
        """Begins at the newest checkpoint, or at step 0."""
        self.progress.note("starting")
        with self.clock("start"):
            self.state = self.stage.init(key)
            mesh = jax.sharding.get_mesh()
            own = (
                None if mesh.empty else functools.partial(sharding.own_rows, mesh=mesh)
            )
            self.data, self.iterator = data, data.iterator(own=own)
            self.state, latest, saved = self._newest()
            if latest is not None:
                self.step = self.last_saved = latest
                self.work, self.clock.seconds = saved["tokens"], saved["seconds"]
                # Checkpoints of older versions have counted padding alone.
                self.num_tokens = saved.get("num_tokens", 0.0)
                self.since = saved.get("since", {})
                self.iterator.set_state(saved["data"])
        self.writer = metrics.Writer(
            self.folder,
            resume_step=self.step,
            evaluated_again=self._evaluates(),
            sampled_again=self._samples(),
            watch=self.hooks.watch,
        )
        self.before = self.clock.total()
        self.progress.note("compiling")

    def _newest(self):
        """Returns the newest state with its step and counters; None at step 0."""
        latest = self.checkpoints.latest()
        if latest != self.config.steps and self.unconcluded.is_dir():
            trained = checkpoint.Checkpoints(self.unconcluded)
            with contextlib.closing(trained):
                if (step := trained.latest()) is not None:
                    self.progress.note(f"restoring step {step}")
                    state, saved = _restore(trained, step, self.state)
                    return state, step, saved
        if latest is None:
            return self.state, None, {}
        self.progress.note(f"restoring step {latest}")
        state, saved = _restore(self.checkpoints, latest, self.state)
        return state, latest, saved

    def due(self, every):
        """Returns whether what is done every so many steps is due, as in the last."""
        last = self.step == self.config.steps
        return self.step > 0 and (last or (every > 0 and self.step % every == 0))

    def late(self):
        """Returns whether the last save is longer ago than every.save_minutes."""
        minutes = self.config.every.save_minutes
        return 0 < minutes * 60 <= time.monotonic() - self.saved_at

    def agreed(self, stopping):
        """Returns whether to save now, and the signal to stop for or None.

        Of several processes any one may be asked to stop, and each has a clock of its
        own: what one wants after a step, all do after the next.
        """
        if self.vote is None:
            return self.late(), stopping.signal
        wanted = self.vote.count()
        self.vote.cast(2 * (stopping.signal or 0) + self.late())
        if self.step == self.config.steps:
            wanted = max(wanted, self.vote.count())
        return bool(wanted % 2), wanted // 2 or None

    def note_stop(self, number):
        """Says that a request to stop has come."""
        self.progress.note(
            f"{signal.Signals(number).name}: stopping after this step; again to stop "
            "at once"
        )

    def stop(self, number):
        """Ends training, once the step that was saved is on disk."""
        self.checkpoints.wait()
        processes.barrier("stop")
        raise process.Stopped(
            f"{self.name} is saved at step {self.step} of {self.config.steps}; the "
            "same command goes on from there",
            number,
        )

    def update(self, key):
        """Takes one step; `key` is folded with its number."""
        with self.clock("data"):
            raw = next(self.iterator)
        self.pace.ready()
        with self.clock("prepare"):
            batch = self._prepare(raw, key)
        with self.clock("update"):
            self.state, values = self.stage.update(self.state, batch)
            self.step += 1
            # The step before has long been computed: reading it costs no wait.
            self._read()
        self.pending = (self.step, batch, values)
        work = self.stage.work(raw, batch)
        # A causal row attends to half of it.
        self.work["context"] = (work.pop("length") + 1) / 2
        for use, count in work.items():
            self.work[use] = self.work.get(use, 0) + count

    def _prepare(self, raw, key):
        """Prepares a batch, and starts the rollouts that later steps will take."""
        own = jax.random.fold_in(key, self.step)
        if self.stage.ahead is None:
            return self.stage.prepare(self.state, raw, own)
        begun = self.begun.pop(self.step, None)
        batch = self.stage.prepare(self.state, raw, own, begun)
        end = min(self.step + self.config.staleness + 1, self.config.steps)
        for step in range(self.step + 1, end):
            if step not in self.begun:
                later, own = self.data.batch_at(step), jax.random.fold_in(key, step)
                self.begun[step] = self.stage.ahead(self.state, later, own)
        return batch

    def save(self):
        """Saves a step whose numbers are finite."""
        with self.clock("update"):
            self._read()
        last = self.step == self.config.steps
        if last and self.hooks.finish:
            trained = checkpoint.Checkpoints(self.unconcluded)
            self._save(trained)
            trained.close()
            return
        self._save(self.checkpoints)
        if last:
            self.checkpoints.wait()

    def conclude(self):
        """Lets the stage change its last state, which is on disk, and saves that."""
        if not self.hooks.finish or self.checkpoints.latest() == self.config.steps:
            return
        self.state, figures = self.hooks.finish(self.state)
        self.writer.write(self.step, self.clock.total(), figures)
        self._save(self.checkpoints)
        self.checkpoints.wait()
        processes.barrier("concluded")
        if process.is_first() and self.unconcluded.exists():
            self.unconcluded.rmtree()

    def _save(self, checkpoints):
        with self.clock("save"):
            counters = {
                # Copies: they are written while the next steps count on.
                "tokens": dict(self.work),
                "num_tokens": self.num_tokens,
                "since": {name: list(pair) for name, pair in self.since.items()},
                "seconds": dict(self.clock.seconds),
                "data": self.iterator.get_state(),
            }
            # What is behind a checkpoint is never older than it.
            stores.push(self.folder)
            checkpoints.save(self.step, *_split(self.state), counters)
            self.last_saved, self.saved_at = self.step, time.monotonic()

    def watch(self, stopping):
        """Evaluates the model and samples from it, where the step is due for it.

        Asked to stop meanwhile, it saves the step and stops: a resumed loop begins by
        evaluating and sampling. Several processes stop together, after a step.
        """
        asked = stopping if self.vote is None else ()
        if self._evaluates():
            rows = self.config.batch_size
            with self.clock("eval"):
                figures = evaluate(
                    self.stage, self.state, self.hooks.heldout, rows, asked
                )
            if figures:
                self.writer.write(self.step, self.clock.total(), figures)
        if self._samples() and not asked:
            with self.clock("watch"):
                model = deployable(self.state, self.stage.frozen)
                samples = self.hooks.sample(model, self.step)
                self.writer.write_samples(self.step, samples)
        if asked and self.step:
            if self.last_saved != self.step:
                self.save()
            self.stop(asked.signal)

    def close(self):
        """Closes whatever was opened; a save that was started is completed."""
        self.progress.close()
        for opened in (self.writer, self.iterator, self.checkpoints):
            if opened is not None:
                opened.close()

    def result(self):
        """Returns what stage.json says of the training."""
        seconds = {k: round(v, 3) for k, v in self.clock.seconds.items()}
        return {
            "steps": self.config.steps,
            "seconds": seconds | {"total": round(self.clock.total(), 3)},
            "seconds_this_time": round(self.clock.total() - self.before, 3),
            "tokens": self.work,
            "peak_memory_bytes": peak_memory(),
        }

    def _evaluates(self):
        every = self.config.every.eval
        every = max(self.config.steps // EVALUATIONS, 1) if every < 0 else every
        return self.hooks.heldout is not None and self.due(every)

    def _samples(self):
        return self.hooks.sample is not None and self.due(self.config.every.sample)

    def _read(self):
        """Reads and writes the pending numbers; stops where one is not finite."""
        if self.pending is None:
            return
        (step, batch, values), self.pending = self.pending, None
        values = {k: float(v) for k, v in jax.device_get(values).items()}
        seen = values.pop("num_tokens")
        self.num_tokens += seen
        for key, value in values.items():
            pair = self.since.setdefault(key, [0.0, 0])
            pair[:] = pair[0] + value, pair[1] + 1
        if step % max(self.config.every.log, 1) == 0 or step in (1, self.config.steps):
            means = {key: total / count for key, (total, count) in self.since.items()}
            means |= {k: v for k, v in values.items() if k.startswith(OF_THE_STEP)}
            means["num_tokens"] = self.num_tokens
            self.writer.write(step, self.clock.total(), means)
            self.since = {}
        _stop_if_not_finite(
            self.name, self.folder, step, batch, values, self.last_saved
        )
        self.progress.step(step, values, seen)


def evaluate(stage, state, heldout, batch_size, stopping=()):
    """Returns {"eval_" + metric: float} over a held-out set, each row once.

    {} where a request to stop comes meanwhile.
    """
    total = None
    batches = heldout.epoch(batch_size)
    # The same keys at every evaluation, so that two of them differ in the model alone.
    for number, raw in enumerate(batches):
        if stopping:
            return {}
        key = jax.random.fold_in(jax.random.key(0), number)
        sums = stage.evaluate(state, raw, key)
        total = sums if total is None else masked.merge(total, sums)
    return {f"eval_{k}": float(v) for k, v in masked.compute(total).items()}


def peak_memory():
    """Returns the most bytes held: on the device where it says, else in the process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def deployable(state, frozen=None):
    """Returns the module a stage is trained for: of {"policy", "value"}, the policy.

    Where the stage averages its weights, that is the average. Where it trains an
    adapter, it is the whole model with the stage's `frozen`, and the adapter alone
    without.
    """
    model = lora.join(frozen, averaged(state).model)
    return model["policy"] if isinstance(model, dict) else model


def _split(state):
    """Returns the parameters a child stage starts from, and the rest of the state."""
    rest = {"opt_state": state.opt_state, "step": state.step, "extra": state.extra}
    if "ema" in state.extra:
        rest["model"] = state.model
        rest["extra"] = {k: v for k, v in state.extra.items() if k != "ema"}
        if isinstance(state.model, dict):
            average = state.extra["ema"]
            rest["beside"] = {k: v for k, v in average.items() if k != "policy"}
    elif isinstance(state.model, dict):
        rest["beside"] = {k: v for k, v in state.model.items() if k != "policy"}
    return deployable(state), rest


def _restore(checkpoints, step, state):
    model, rest, saved = checkpoints.restore(step, *_split(state))
    if isinstance(state.model, dict):
        model = {"policy": model, **rest["beside"]}
        model = {k: model[k] for k in state.model}
    if "ema" in state.extra:
        rest["extra"] = rest["extra"] | {"ema": model}
        model = rest["model"]
    state = state._replace(
        model=model, opt_state=rest["opt_state"], step=rest["step"], extra=rest["extra"]
    )
    return state, saved


def _stop_if_not_finite(name, folder, step, batch, values, last_saved):
    bad = [k for k in ("loss", "grad_norm") if not np.isfinite(values[k])]
    if not bad:
        return
    path = folder / "not_finite.npz"
    batch = sharding.to_host(tree.named(batch))
    if process.is_first():
        np.savez(path, **batch)
        stores.push(path)
    raise UserError(
        f"{name}: {bad[0]} is {values[bad[0]]} at step {step}; the batch is in {path}, "
        f"the last checkpoint is step {last_saved}; a lower optimizer.lr or a smaller "
        "optimizer.clip_norm often helps"
    )
