"""The only training loop: every stage of every experiment goes through it.

Chapters: restore, evaluate and sample when due, prepare, update, log, save. The loop
reads a step's numbers one step late, so that the device never waits for the host.
"""

import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from stagecraft import checkpoint, masked, metrics, process, tree
from stagecraft.data.dataset import Dataset
from stagecraft.errors import UserError
from stagecraft.models import lora
from stagecraft.stages.stage import Stage, State
from stagecraft.trackers import Watch


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
    hooks = hooks or Hooks()
    folder, every = Path(folder), config.every
    init_key, step_key = jax.random.split(key)
    checkpoints = checkpoint.Checkpoints(folder / "checkpoints")
    clock = metrics.Clock()
    progress = metrics.Progress(name, config.steps, log=every.log)
    writer = iterator = None
    try:
        # -- restore ------------------------------------------------------------------
        progress.note("starting")
        with clock("start"):
            state = stage.init(init_key)
            step, tokens = 0, {}
            iterator = data.iterator(
                process_index=jax.process_index(), process_count=jax.process_count()
            )
            latest = checkpoints.latest()
            if latest is not None:
                progress.note(f"restoring step {latest}")
                state, saved = _restore(checkpoints, latest, state)
                step, tokens = latest, saved["tokens"]
                clock.seconds = saved["seconds"]
                iterator.set_state(saved["data"])
        writer = metrics.Writer(folder, resume_step=step, watch=hooks.watch)
        before = clock.total()
        last_saved, pending = step, None
        progress.note("compiling")

        def finish(pending):
            """Reads a step's numbers, writes them, and stops on what is not finite."""
            step, batch, values, worked = pending
            values = {k: float(v) for k, v in jax.device_get(values).items()}
            values["num_tokens"] = float(
                sum(v for k, v in tokens.items() if "trained" in k)
            )
            if step % max(every.log, 1) == 0 or step in (1, config.steps):
                writer.write(step, clock.total(), values)
            _stop_if_not_finite(name, folder, step, batch, values, last_saved)
            progress.step(step, values, worked)

        while step < config.steps:
            # -- prepare and update ---------------------------------------------------
            with clock("data"):
                raw = next(iterator)
            work = stage.work(raw)
            with clock("prepare"):
                batch = stage.prepare(state, raw, jax.random.fold_in(step_key, step))
            with clock("update"):
                state, values = stage.update(state, batch)
                step += 1
                # The step before has long been computed: reading it costs no wait.
                if pending is not None:
                    finish(pending)
            length = work.pop("length")
            for use, count in work.items():
                tokens[use] = tokens.get(use, 0) + count
            tokens["context"] = (length + 1) / 2  # a causal row attends to half of it
            worked = work.get("trained", 0) + work.get("scalar_trained", 0)
            pending = (step, batch, values, worked)

            # -- evaluate, sample, save -----------------------------------------------
            last = step == config.steps
            if last or (every.save and step % every.save == 0):
                with clock("update"):
                    finish(pending)
                    pending = None
            if last and hooks.finish:
                state, figures = hooks.finish(state)
                writer.write(step, clock.total(), figures)
            if hooks.heldout and (last or (every.eval and step % every.eval == 0)):
                with clock("eval"):
                    figures = evaluate(stage, state, hooks.heldout, config.batch_size)
                writer.write(step, clock.total(), figures)
            if hooks.sample and (last or (every.sample and step % every.sample == 0)):
                with clock("watch"):
                    model = deployable(state, stage.frozen)
                    writer.write_samples(step, hooks.sample(model, step))
            if last or (every.save and step % every.save == 0):
                with clock("save"):
                    saved = {
                        # Copies: they are written while the next steps count on.
                        "tokens": dict(tokens),
                        "seconds": dict(clock.seconds),
                        "data": iterator.get_state(),
                    }
                    checkpoints.save(step, *_split(state), saved)
                    last_saved = step
        with clock("save"):
            checkpoints.wait()
    finally:
        progress.close()
        if writer is not None:
            writer.close()
        if iterator is not None:
            iterator.close()
        checkpoints.close()
    seconds = {k: round(v, 3) for k, v in clock.seconds.items()}
    return state, {
        "steps": config.steps,
        "seconds": seconds | {"total": round(clock.total(), 3)},
        "seconds_this_time": round(clock.total() - before, 3),
        "tokens": tokens,
        "peak_memory_bytes": peak_memory(),
    }


def evaluate(stage, state, heldout, batch_size):
    """Returns {"eval_" + metric: float} over a held-out set, each row once."""
    total = None
    batches = heldout.epoch(
        batch_size, process_index=jax.process_index(), process_count=jax.process_count()
    )
    # The same keys at every evaluation, so that two of them differ in the model alone.
    for number, raw in enumerate(batches):
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
    model = lora.join(frozen, state.extra.get("ema", state.model))
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
    if process.is_first():
        np.savez(path, **{k: np.asarray(v) for k, v in tree.named(batch).items()})
    raise UserError(
        f"{name}: {bad[0]} is {values[bad[0]]} at step {step}; the batch is in {path}, "
        f"the last checkpoint is step {last_saved}; a lower optimizer.lr or a smaller "
        "optimizer.clip_norm often helps"
    )
