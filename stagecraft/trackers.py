"""Trackers beside metrics.jsonl and TensorBoard: wandb, trackio and MLflow, on request.

`trackers="wandb"` in an experiment sends every stage's metrics there too, as one run a
stage; several names are separated by commas. A resumed stage continues the same run,
whose id is in WORKDIR/STAGE/tracker.json. Training never depends on a
tracker: one that fails is turned off with one warning.
"""

import contextlib
import importlib
import importlib.util
import json
import logging
import uuid
from pathlib import Path

from stagecraft import process, schema, storage
from stagecraft.errors import UserError, install

# The project (or experiment) of all runs, in each tracker's own terms.
PROJECT = "stagecraft"
# In a stage's folder: {tracker: id of its run}.
FILE = "tracker.json"

_log = logging.getLogger("stagecraft")


class Wandb:
    """Weights & Biases; configured by environment variables: WANDB_MODE=offline."""

    def start(self, name, config, folder, run_id):
        """Begins a run, or continues one.

        Args:
            name: of the run.
            config: plain nested dicts.
            folder: where the tracker may keep files.
            run_id: the id that `start` returned before, or None.

        Returns:
            the run's id, a text.
        """
        self._wandb = importlib.import_module("wandb")
        run_id = run_id or uuid.uuid4().hex[:16]
        self._run = self._wandb.init(
            project=PROJECT,
            name=name,
            id=run_id,
            resume="allow",
            config=config,
            dir=str(folder),
        )
        return run_id

    def scalars(self, step, values):
        """Logs {name: float}; several calls for one step add up."""
        self._run.log(values, step=step)

    def texts(self, step, samples):
        """Logs [{"prompt", "completion"}]; a prompt of messages as JSON."""
        table = self._wandb.Table(columns=["prompt", "completion"])
        for sample in samples:
            table.add_data(_text(sample["prompt"]), sample["completion"])
        self._run.log({"samples": table}, step=step)

    def close(self):
        self._run.finish()


class Trackio:
    """Trackio, which keeps runs on this machine, by name."""

    def start(self, name, config, folder, run_id):
        self._trackio = importlib.import_module("trackio")
        # Two work directories of one name are still two runs.
        run_id = run_id or f"{name}-{uuid.uuid4().hex[:8]}"
        self._trackio.init(project=PROJECT, name=run_id, config=config, resume="allow")
        return run_id

    def scalars(self, step, values):
        self._trackio.log(values, step=step)

    def texts(self, step, samples):
        for number, sample in enumerate(samples):
            self._trackio.log({f"samples/{number}": sample["completion"]}, step=step)

    def close(self):
        self._trackio.finish()


class Mlflow:
    """MLflow; configured by MLFLOW_TRACKING_URI."""

    def start(self, name, config, folder, run_id):
        self._mlflow = importlib.import_module("mlflow")
        self._mlflow.set_experiment(PROJECT)
        if run_id:
            return self._mlflow.start_run(run_id=run_id).info.run_id
        run = self._mlflow.start_run(run_name=name)
        # As a file: MLflow's parameters are short texts that never change.
        self._mlflow.log_dict(config, "config.json")
        return run.info.run_id

    def scalars(self, step, values):
        # Where it keeps files, "loss" cannot also be the folder of "loss/policy".
        values = {name.replace("/", "."): value for name, value in values.items()}
        self._mlflow.log_metrics(values, step=step)

    def texts(self, step, samples):
        self._mlflow.log_dict(list(samples), f"samples/{step}.json")

    def close(self):
        self._mlflow.end_run()


TRACKERS = {"wandb": Wandb, "trackio": Trackio, "mlflow": Mlflow}


def names(text: str) -> list[str]:
    """Returns the trackers of a config's `trackers`; each known and installed.

    Args:
        text: "", or names separated by commas.
    """
    trackers = list(dict.fromkeys(schema.listed(text)))
    for name in trackers:
        schema.choice("trackers", name, tuple(TRACKERS))
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"trackers={text!r}: {name} is not installed: {install(name)}"
            )
    return trackers


class Watch:
    """Sends a stage's metrics to trackers; drops one for good when it fails.

    Args:
        started: {name: tracker} that have begun a run.
    """

    def __init__(self, started):
        self._started = dict(started)

    def scalars(self, step, values):
        """Sends {name: float} of a step."""
        self._each("scalars", step, values)

    def texts(self, step, samples):
        """Sends [{"prompt", "completion", ...}] sampled at a step."""
        if samples:
            self._each("texts", step, samples)

    def close(self):
        """Ends the runs; nothing is sent after it."""
        self._each("close")
        self._started = {}

    def _each(self, method, *arguments):
        for name, tracker in list(self._started.items()):
            if not _try(name, getattr(tracker, method), *arguments):
                del self._started[name]


@contextlib.contextmanager
def watching(text: str, folder: str | Path, *, name: str, config: dict):
    """Yields a `Watch` of the named trackers while a stage trains.

    Args:
        text: the experiment's `trackers`.
        folder: WORKDIR/STAGE.
        name: of the run.
        config: plain nested dicts.
    """
    folder, started = Path(folder), {}
    ids = storage.read_json(folder / FILE, {})

    def start(tracker, key):
        ids[key] = tracker.start(name, config, folder, ids.get(key))
        storage.write_json(folder / FILE, ids)

    # One process reports for all.
    for key in names(text) if process.is_first() else ():
        tracker = TRACKERS[key]()
        if _try(key, start, tracker, key):
            started[key] = tracker
    watch = Watch(started)
    try:
        yield watch
    finally:
        watch.close()


def _try(name, call, *arguments):
    """Returns whether a call into a tracker succeeded; warns where it did not."""
    try:
        call(*arguments)
    except Exception as error:  # no tracker's failure may end a training run
        line = " ".join(str(error).split()) or type(error).__name__
        _log.warning("%s failed and is off from here on (%s)", name, line)
        return False
    return True


def _text(prompt):
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)
