"""The flags that commands take, and what they hold."""

from typing import Any, NamedTuple

from absl import flags

from stagecraft import stores
from stagecraft.errors import UserError

FLAGS = flags.FLAGS


class Flag(NamedTuple):
    """One flag of a command.

    Attributes:
        name: --NAME.
        default: its value when it is not given.
        help: a few words.
        kind: type of its value; by default that of `default`.
        least: smallest number allowed.
    """

    name: str
    default: Any
    help: str
    kind: Any = None
    least: int | None = None


GIVEN: list[str] = []  # the arguments of the command, as they were given
CONFIG = "config"  # the kind of a flag that is read as an experiment file
WORKDIR = Flag("workdir", None, "the run's folder, or gs://..., s3://...", str)
SAMPLING = (
    Flag("temperature", 0.0, "0 for the likeliest answer"),
    Flag("max_new_tokens", 48, "longest answer, in tokens"),
    Flag("seed", 0, "random seed of the sampling"),
)
# Which of several processes this is; see stagecraft/processes.py.
PROCESSES = (
    Flag("coordinator", "", "HOST:PORT of process 0, of several processes"),
    Flag("process", None, "which of them this is, from 0 on", int, 0),
    Flag("processes", None, "how many there are", int, 1),
)
# How tasks are asked.
ASKING = (
    Flag("limit", 0, "documents of each task; 0 for all", least=0),
    Flag("batch_size", 32, "rows computed at once", least=1),
    Flag("apply_chat_template", False, "ask through the model's chat template"),
    Flag("num_fewshot", None, "examples before each question", int, 0),
    Flag("seed", 0, "seed of sampled generations"),
    Flag("out", None, "file of results; by default WORKDIR/evaluations.json", str),
)


def takes(*taken, words=False):
    """Marks a command with its flags, and with whether it takes other arguments."""

    def mark(command):
        command.flags, command.words = taken, words
        return command

    return mark


def values_of(taken):
    """Returns {name: value} of some flags."""
    return {flag.name: FLAGS[flag.name].value for flag in taken}


def config_given():
    """Returns the config of --config; refuses to go on without one."""
    if FLAGS.config is None:
        raise UserError("--config is missing, as in --config=quickstart")
    return FLAGS.config


def workdir_given():
    """Returns the path of --workdir; refuses to go on without one."""
    if not FLAGS.workdir:
        raise UserError("--workdir is missing, as in --workdir=runs/a")
    return stores.local(FLAGS.workdir)


def size_in_bytes(flag, text):
    """Returns the bytes of a size: 5000000 of "5MB"."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = text[:-2], text[-2:].upper()
    if unit not in units or not number.isdecimal() or not int(number):
        raise UserError(f"--{flag}={text}: expected a size such as 500MB or 5GB")
    return int(number) * units[unit]
