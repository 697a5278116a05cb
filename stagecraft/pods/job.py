"""A job on a cluster: one description, whatever tool starts it."""

import re
import shlex
from typing import NamedTuple

from stagecraft.chips import Topology
from stagecraft.errors import UserError

# What values of secrets look like: tokens of Hugging Face, OpenAI, GitHub, Slack, AWS,
# Google and W&B, JSON web tokens, private keys, and passwords in an address.
_SECRETS = (
    r"hf_\w{20,}",
    r"\b(?:sk|rk|pk)-[\w\-]{16,}",
    r"\b(?:gh[pousr]|github_pat)_\w{20,}",
    r"xox[abprs]-[\w\-]{10,}",
    r"\bA(?:KIA|SIA)[0-9A-Z]{16}\b",
    r"\bAIza[\w\-]{30,}",
    r"\b[0-9a-f]{40}\b",
    r"\beyJ[\w\-]{10,}\.[\w\-]{10,}\.",
    r"-----BEGIN [A-Z ]*PRIVATE KEY",
    r"://[^/\s:@]+:[^/\s@]+@",
)
_SECRET = re.compile("|".join(_SECRETS))
_SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.I)
_ENVIRONMENT = re.compile(r"[A-Za-z_]\w*")
_NAME = re.compile(r"[a-z]([a-z0-9\-]{0,38}[a-z0-9])?")


class Job(NamedTuple):
    """What to run, and where.

    Attributes:
        name: of the job: small letters, digits and -, at most 40 characters.
        command: `stagecraft run ...`, without what tells its processes apart.
        topology: the chips.
        image: a container image; "" where the machines have the package.
        environment: {NAME: value}, none of them secret.
        passed: names of environment variables that are passed on, secrets among them;
            their values are in no file.
        restarts: after failures; preemptions do not count where the tool knows them.
        spot: on capacity that may be taken away.
        grace: seconds between the request to end and the end.
        volume: "CLAIM:/path", storage that all hosts share; "" for none.
        port: of the coordinator.
        hosts: names of machines, for ssh.
        partition: of slurm; "" for its default.
        cluster: of xpk.
    """

    name: str
    command: tuple[str, ...]
    topology: Topology
    image: str = ""
    environment: dict[str, str] = {}
    passed: tuple[str, ...] = ()
    restarts: int = 3
    spot: bool = False
    grace: int = 120
    volume: str = ""
    port: int = 8476
    hosts: tuple[str, ...] = ()
    partition: str = ""
    cluster: str = ""

    def line(self, *more: str) -> str:
        """Returns the command as one line for a shell.

        Args:
            *more: arguments behind it, which the shell is to expand.
        """
        return " ".join([shlex.join(self.command), *more])

    def numbered(self, coordinator: str, process: str) -> str:
        """Returns the command of one process of several, for a shell.

        Args:
            coordinator: host of process 0, as the shell is to expand it.
            process: the process's number, likewise.
        """
        if self.topology.hosts == 1:
            return self.line()
        return self.line(
            f"--coordinator={coordinator}:{self.port}",
            f"--process={process}",
            f"--processes={self.topology.hosts}",
        )

    def check(self) -> "Job":
        """Returns itself; refuses what no tool takes, and secrets.

        Raises:
            UserError: names the flag, never the secret's value.
        """
        if not _NAME.fullmatch(self.name):
            raise UserError(
                f"--name={self.name}: expected at most 40 small letters, digits and -, "
                "the first a letter, as in sft-8b"
            )
        for name in (*self.environment, *self.passed):
            if not _ENVIRONMENT.fullmatch(name):
                raise UserError(
                    f"--env: {name!r} is no name of an environment variable; expected "
                    "NAMES and NAME=VALUE, separated by commas"
                )
        for name, value in self.environment.items():
            if _SECRET.search(value) or (value and _SECRET_NAME.search(name)):
                raise UserError(
                    f"--env: the value of {name} looks like a secret, which must be in "
                    f"no file; pass the name alone (--env={name}) and set it where the "
                    "job is submitted"
                )
        for flag, text in (
            ("--image", self.image),
            ("--volume", self.volume),
            *(("the command", word) for word in self.command),
        ):
            if _SECRET.search(text):
                shown = text.partition("=")[0] if "=" in text else flag
                raise UserError(
                    f"{flag}: {shown} looks like it holds a secret, which must be in "
                    "no file; pass it in an environment variable (--env=NAME)"
                )
        if self.volume and not re.fullmatch(r"[a-z0-9.\-]+:/\S+", self.volume):
            raise UserError(f"--volume={self.volume}: expected CLAIM:/PATH")
        return self


def environment(text: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """Reads "A,B=1": the values given, and the names to pass on.

    >>> environment("HF_TOKEN,JAX_TRACEBACK_FILTERING=off")
    ({'JAX_TRACEBACK_FILTERING': 'off'}, ('HF_TOKEN',))
    """
    given, passed = {}, []
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, value = part.partition("=")
        if equals:
            given[name] = value
        else:
            passed.append(name)
    return given, tuple(passed)
