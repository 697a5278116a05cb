"""`stagecraft launch`: writes a job for a cluster's tool, and hands it over."""

import os
import shutil
import subprocess
from pathlib import Path

from stagecraft import schema, storage
from stagecraft.errors import UserError
from stagecraft.pods.job import Job
from stagecraft.pods.manifests import TOOLS


def write(job: Job, tool: str, path: str | Path = "") -> Path:
    """Writes a job as a tool reads it.

    Args:
        job: what to run.
        tool: a name of `manifests.TOOLS`.
        path: the file; by default NAME.TOOL.ENDING in this folder.

    Raises:
        UserError: a tool that is not known, a job it cannot run, a secret.
    """
    schema.choice("--on", tool, tuple(TOOLS))
    make, ending, _ = TOOLS[tool]
    text = make(job.check())
    path = Path(path or f"{job.name}.{tool}.{ending}")
    storage.write_text(path, text)
    if text.startswith("#!"):
        path.chmod(0o755)
    return path


def submit(job: Job, tool: str, path: Path) -> None:
    """Hands a job that was written to the tool's own command.

    Raises:
        UserError: the command is not here, a variable it passes on is not set, or it
            ended badly.
    """
    *_, words = TOOLS[tool]
    if shutil.which(words[0]) is None:
        raise UserError(
            f"--submit: {words[0]} is not here; install it, or on a machine that has "
            f"it run: {' '.join(words)} {path}"
        )
    missing = [name for name in job.passed if name not in os.environ]
    if missing:
        raise UserError(
            f"--submit: {', '.join(missing)} not set; export it, or unset --env"
        )
    command = [*words, str(path)]
    if tool == "skypilot":
        command += [word for name in job.passed for word in ("--secret", name)]
    done = subprocess.run(command)
    if done.returncode:
        raise UserError(f"--submit: {words[0]} ended with status {done.returncode}")
