"""Trackers beside metrics.jsonl and TensorBoard: wandb, trackio and MLflow, on request.

`trackers="wandb"` in an experiment sends every stage's numbers there too, as one run a
stage; several names are separated by commas. A stage that is resumed goes on in the
same run, whose id is kept in WORKDIR/STAGE/tracker.json. Training never depends on a
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
from stagecraft.errors import UserError

# The name of what all runs belong to, in each tracker's own sense.
PROJECT = "stagecraft"
# In a stage's folder: {tracker: id of its run}.
FILE = "tracker.json"

_log = logging.getLogger("stagecraft")


class Wandb:
    """Weights & Biases; its environment variables say where to: WANDB_MODE=offline."""

    def start(self, name, config, folder, known):
        """Begins a run, or goes on in a known one.

        Args:
            name: of the run.
            config: plain nested dicts.
            folder: where the tracker may keep files.
            known: the id that `start` returned before, or None.

        Returns:
            the run's id, a text.
        """
        self._wandb = importlib.import_module("wandb")
        id_ = known or uuid.uuid4().hex[:16]
        self._run = self._wandb.init(
            project=PROJECT,
            name=name,
            id=id_,
            resume="allow",
            config=config,
            dir=str(folder),
        )
        return id_

    def scalars(self, step, values):
        """Records {name: float}; several calls for one step add up."""
        self._run.log(values, step=step)

    def texts(self, step, samples):
        """Records [{"prompt", "completion"}]; a prompt of messages as JSON."""
        table = self._wandb.Table(columns=["prompt", "completion"])
        for sample in samples:
            table.add_data(_text(sample["prompt"]), sample["completion"])
        self._run.log({"samples": table}, step=step)

    def close(self):
        self._run.finish()


class Trackio:
    """Trackio, which keeps runs on this machine and knows them by their names."""

    def start(self, name, config, folder, known):
        self._trackio = importlib.import_module("trackio")
        # Two work directories of one name are still two runs.
        id_ = known or f"{name}-{uuid.uuid4().hex[:8]}"
        self._trackio.init(project=PROJECT, name=id_, config=config, resume="allow")
        return id_

    def scalars(self, step, values):
        self._trackio.log(values, step=step)

    def texts(self, step, samples):
        for number, sample in enumerate(samples):
            self._trackio.log({f"samples/{number}": sample["completion"]}, step=step)

    def close(self):
        self._trackio.finish()


class Mlflow:
    """MLflow; MLFLOW_TRACKING_URI says where to."""

    def start(self, name, config, folder, known):
        self._mlflow = importlib.import_module("mlflow")
        self._mlflow.set_experiment(PROJECT)
        if known:
            return self._mlflow.start_run(run_id=known).info.run_id
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


def names(text):
    """The trackers that `trackers` names; each known and installed.

    Args:
        text: "", or names separated by commas.

    Returns:
        list of str.
    """
    found = list(
        dict.fromkeys(filter(None, (part.strip() for part in text.split(","))))
    )
    for name in found:
        schema.choice("trackers", name, tuple(TRACKERS))
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"trackers={text!r}: {name} is not installed: pip install "
                f"'stagecraft[{name}]'"
            )
    return found


class Watch:
    """Hands a stage's numbers to trackers; drops one for good when it fails.

    Args:
        started: {name: tracker} that have begun a run.
    """

    def __init__(self, started):
        self._started = dict(started)

    def scalars(self, step, values):
        """Hands on {name: float} of a step."""
        self._each("scalars", step, values)

    def texts(self, step, samples):
        """Hands on [{"prompt", "completion", ...}] drawn at a step."""
        if samples:
            self._each("texts", step, samples)

    def close(self):
        """Ends the runs; nothing is handed on after it."""
        self._each("close")
        self._started = {}

    def _each(self, method, *arguments):
        for name, tracker in list(self._started.items()):
            if not _try(name, getattr(tracker, method), *arguments):
                del self._started[name]


@contextlib.contextmanager
def watching(text, folder, *, name, config):
    """A `Watch` of the named trackers while a stage trains.

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

    # One process speaks for all.
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
    """Whether a call into a tracker went well; a warning where it did not."""
    try:
        call(*arguments)
    except Exception as error:  # whatever it is, it is not worth a training run
        line = " ".join(str(error).split()) or type(error).__name__
        _log.warning("%s failed and is off from here on (%s)", name, line)
        return False
    return True


def _text(prompt):
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)
