"""Where the phases of a pipeline run: here, on a Ray cluster, or through Slurm.

A phase is a list of datatrove steps and a number of tasks; each begins when the one
before it is done. All three run the same phases over the same work folder, which on a
cluster must be on shared storage, and skip the tasks that are done.
"""

import contextlib
import multiprocessing
import os
import sys
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

from stagecraft import process
from stagecraft.errors import UserError

NAMES = ("local", "ray", "slurm")
_SLURM = ("partition", "time", "workers", "mem_per_cpu_gb", "qos", "venv_path")


class Phase(NamedTuple):
    """Steps that run together over each task.

    Attributes:
        name: and that of its folder of logs.
        steps: a list of datatrove's PipelineStep.
    """

    name: str
    steps: list
    tasks: int


def check(executor):
    """Refuses what names no executor, and one whose package is missing."""
    name, _, rest = executor.partition(":")
    if name not in NAMES:
        raise UserError(
            f"--executor={executor}: expected local, ray:ADDRESS or "
            "slurm:partition=NAME,time=HH:MM:SS"
        )
    if name == "ray":
        if not rest:
            raise UserError("--executor=ray: needs an address, as in ray:auto")
        try:
            import ray  # noqa: F401
        except ImportError:
            raise UserError(
                f"--executor={executor}: needs the package ray, which is not "
                "installed; pip install ray. Nothing was run"
            ) from None
    if name == "slurm":
        import shutil

        _slurm_settings(rest)
        if not shutil.which("sbatch"):
            raise UserError(
                f"--executor={executor}: needs the command sbatch, which is not here; "
                "start it on a login node of the cluster. Nothing was run"
            )


def run(phases, work, executor, workers) -> bool:
    """Runs the phases; True when they are done, False when they were handed on.

    Args:
        phases: a list of Phase.
        work: the work folder.
        executor: "local", "ray:ADDRESS" or "slurm:KEY=VALUE,...".
        workers: tasks at once.
    """
    name, _, rest = executor.partition(":")
    if name == "local":
        with _pool(workers) as pool:
            for phase in phases:
                _run_here(phase, work, pool, workers)
        return True
    if name == "ray":
        import ray
        from datatrove.executor.ray import RayPipelineExecutor

        ray.init(address=rest, ignore_reinit_error=True)
        chain(phases, work, RayPipelineExecutor, workers=workers).run()
    else:
        from datatrove.executor.slurm import SlurmPipelineExecutor

        settings = _slurm_settings(rest)
        chain(phases, work, SlurmPipelineExecutor, **settings).run()
    return name == "ray"


def chain(phases, work, executor, **settings):
    """Returns the executor of the last phase; each waits for the one before it.

    Args:
        phases, work: as in `run`.
        kind: a class of datatrove's executors.
        **settings: its own.
    """
    last = None
    for phase in phases:
        last = executor(
            pipeline=phase.steps,
            tasks=phase.tasks,
            logging_dir=str(Path(work) / "logs" / phase.name),
            depends=last,
            **settings,
        )
    return last


def _slurm_settings(text):
    settings = {"time": "04:00:00", "job_name": "stagecraft-curate"}
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        if key not in _SLURM or not value:
            raise UserError(
                f"--executor=slurm:{text}: {part!r} is none of "
                f"{', '.join(_SLURM)}, as in slurm:partition=cpu,time=04:00:00"
            )
        settings[key] = int(value) if value.isdigit() else value
    if "partition" not in settings:
        raise UserError(
            f"--executor=slurm:{text}: needs a partition, as in slurm:partition=cpu"
        )
    return settings


# -- this machine ----------------------------------------------------------------------
# datatrove's own local executor waits forever for a worker that was killed, so its
# tasks are given to a pool that notices.


def _run_here(phase, work, pool, workers):
    from datatrove.executor import LocalPipelineExecutor

    from stagecraft import metrics  # in this process alone: it comes with jax

    executor = LocalPipelineExecutor(
        pipeline=phase.steps,
        tasks=phase.tasks,
        workers=workers,
        logging_dir=str(Path(work) / "logs" / phase.name),
    )
    left = executor.get_incomplete_ranks()
    done = phase.tasks - len(left)
    # One line a phase where there is no terminal.
    progress = metrics.Progress(phase.name, phase.tasks, log=phase.tasks)
    try:
        if done:
            progress.step(done)
        waiting = {pool.submit(_run_task, executor, rank): rank for rank in left}
        for future in futures.as_completed(waiting):
            future.result()
            done += 1
            progress.step(done)
    except BrokenProcessPool:
        hint = "--workers=1 or a smaller task_bytes needs less"
        if not done:
            hint += "; a script of your own must call curate() under "
            hint += "if __name__ == '__main__'"
        raise UserError(
            f"curate: a worker was killed in {phase.name!r}, perhaps for want of "
            f"memory; {done} of {phase.tasks} tasks are done, and the same command "
            f"goes on from there ({hint})"
        ) from None
    finally:
        progress.close()


@contextlib.contextmanager
def _pool(workers):
    """Starts worker processes that end with this one, whatever ends it."""
    before = set(multiprocessing.active_children())
    pool = futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_attend
    )
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()
        raise
    pool.shutdown()


def _attend():
    """Prepares a worker: quiet, deaf to interrupts, ending with its parent."""
    import signal

    from loguru import logger

    logger.remove()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    process.end_with_parent()
    # datatrove logs to the terminal as well as to the task's file; the file is enough.
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def _run_task(executor, rank):
    executor._run_for_rank(rank, local_rank=1)
