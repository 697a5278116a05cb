"""A run in a folder that is removed afterwards."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
from ml_collections import ConfigDict

from stagecraft import experiment, groundwork, run, runs


@contextlib.contextmanager
def temporary(config: ConfigDict, root: Path | None) -> Iterator[runs.Run]:
    """Opens a run in a temporary folder that sees what a work directory holds."""
    config = experiment.resolve(config)
    if root and root.is_dir():
        run.check_same(runs.Run(root, config))
    for stage in config.stages.values():  # a cache of one's own is not written either
        if "cache" in stage.data:
            stage.data.cache = ""
    with tempfile.TemporaryDirectory(prefix="stagecraft-") as folder:
        here = Path(folder)
        for entry in root.iterdir() if root and root.is_dir() else ():
            if entry.name != "cache":
                (here / entry.name).symlink_to(entry.absolute())
        this = runs.Run(here, config, stages=experiment.order(config))
        with jax.set_mesh(this.mesh()):
            groundwork.read(this)
            yield this
