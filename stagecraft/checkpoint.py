"""Checkpoints of a stage: parameters, optimizer state and data position, by Orbax.

A checkpoint has three items, so that a child stage or an export reads the parameters
alone: `model` (names such as layers/attention/query), `train` (optimizer state, step
and the rest of the stage's state) and `data` (the data iterator's state). Orbax writes
into a temporary folder and renames it, so that a checkpoint exists whole or not at all,
whenever the process is killed. Large parameters are cut on disk, stacked layers into
single ones: what looks at one matrix reads no other.
"""

import contextlib
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from stagecraft import stores, tree
from stagecraft.errors import UserError

CHUNK = 1 << 22  # bytes that an array may have and be one piece on disk


class Checkpoints:
    """Saves and restores checkpoints of one folder; saving runs in the background.

    Args:
        folder: WORKDIR/STAGE/checkpoints, of which the newest is kept.
    """

    def __init__(self, folder: str | Path):
        self.folder = _place(folder)
        options = ocp.CheckpointManagerOptions(max_to_keep=1, create=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest(self) -> int | None:
        """Returns the newest complete step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, model: Any, train: Any, data: dict) -> None:
        """Starts a save; arrays are copied out before this returns.

        Args:
            step: int, steps done.
            model, train: pytrees of arrays.
            data: a JSON-able dict, the data iterator's state and the stage's counters.
        """
        items = ocp.args.Composite(
            model=ocp.args.StandardSave(_nest(model), _pieces(model)),
            train=ocp.args.StandardSave(_nest(train)),
            data=ocp.args.JsonSave(data),
        )
        self._manager.save(step, args=items, force=True)

    def restore(self, step: int, model: Any, train: Any) -> tuple[Any, Any, dict]:
        """Reads a checkpoint into the shapes, dtypes and shardings of `model`, `train`.

        Args:
            step: which one.
            model, train: pytrees of arrays or of ShapeDtypeStructs with shardings.

        Returns:
            model, train, data.
        """
        args = ocp.args.Composite(
            model=ocp.args.StandardRestore(_abstract(model)),
            train=ocp.args.StandardRestore(_abstract(train)),
            data=ocp.args.JsonRestore(),
        )
        with _whole(self.folder):
            items = self._manager.restore(step, args=args)
        return _refill(model, items.model), _refill(train, items.train), items.data

    def wait(self) -> None:
        """Returns once every started save is complete on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for saves and closes the manager."""
        self._manager.wait_until_finished()
        self._manager.close()


def load_model(folder: str | Path, abstract: Any) -> tuple[Any, int]:
    """Reads only the parameters of the newest checkpoint under `folder`.

    Args:
        folder: a stage's folder, WORKDIR/STAGE.
        abstract: the model as ShapeDtypeStructs with shardings: each device reads its
            own part.

    Returns:
        the model, and the step it was saved at.
    """
    newest = _newest(folder)
    path, step = newest.parent, int(newest.name)
    with _whole(path), ocp.CheckpointManager(path) as manager:
        args = ocp.args.Composite(model=ocp.args.StandardRestore(_abstract(abstract)))
        items = manager.restore(step, args=args)
    return _refill(abstract, items.model), step


def open_model(folder: str | Path) -> Callable[[str], Any]:
    """Opens the parameters of the newest checkpoint without reading them.

    Args:
        folder: a stage's folder, WORKDIR/STAGE.

    Returns:
        (name) -> `tensorstore.TensorStore`, of which any slice can be read.
    """
    import tensorstore

    path = _newest(folder)
    store = {"driver": "ocdbt", "base": stores.key_values(path / "model")}
    # One piece at a time: as many as there are cores would be in memory else.
    one = {"limit": 1}
    context = tensorstore.Context(
        {"data_copy_concurrency": one, "file_io_concurrency": one}
    )

    @functools.cache
    def opened(name):
        spec = {"driver": "zarr", "kvstore": store | {"path": name.replace("/", ".")}}
        with _whole(path):
            return tensorstore.open(
                spec, read=True, open=True, context=context
            ).result()

    return opened


def _newest(folder):
    """Returns the folder of the newest complete checkpoint of WORKDIR/STAGE."""
    path = _place(Path(folder) / "checkpoints")
    if not path.is_dir():
        raise UserError(
            f"{folder}: no checkpoints here; copy the whole folder, or remove its "
            "stage.json to run that stage again"
        )
    with _whole(path), ocp.CheckpointManager(path) as manager:
        step = manager.latest_step()
    if step is None:
        raise UserError(
            f"{path}: no complete checkpoint; copy the whole folder, or remove the "
            "stage's stage.json to run it again"
        )
    return path / str(step)


def steps(folder: str | Path) -> list[int]:
    """Returns the steps of the complete checkpoints of WORKDIR/STAGE/checkpoints."""
    path = _place(folder)
    return sorted(ocp.utils.checkpoint_steps(path)) if path.is_dir() else []


def _place(folder):
    path = stores.place(folder)
    if str(path).startswith("s3://"):
        _let_orbax_know_s3()
    return path


@functools.cache
def _let_orbax_know_s3():
    """Makes Orbax write to s3:// as it does to gs://: in place, with a commit file.

    By itself it takes an address of S3 for a local folder. What is replaced is not
    public, and a test saves and restores through it.
    """
    from orbax.checkpoint._src.path import gcs_utils
    from orbax.checkpoint._src.serialization import tensorstore_utils

    plain, normal = gcs_utils.get_kvstore_for_gcs, tensorstore_utils._normalize_path

    def key_values(path):
        path = str(path)
        if not path.startswith("s3://"):
            return plain(path)
        spec = stores.key_values(path)
        return spec | {"path": spec["path"].removesuffix("/")}

    gcs_utils._GCS_PATH_PREFIX = ("gs://", "s3://")
    gcs_utils.get_kvstore_for_gcs = key_values
    tensorstore_utils._use_gcs_driver = lambda path: path.startswith(
        gcs_utils._GCS_PATH_PREFIX
    )
    tensorstore_utils._normalize_path = lambda path: normal(path).replace(
        "s3:/", "s3://"
    )


@contextlib.contextmanager
def _whole(folder):
    """Turns what Orbax raises of a checkpoint with files missing into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of whatever type the missing file leads to
        # The other arrays of the checkpoint fail too, and each would print a traceback.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{folder}: cannot be read ({reason}); it is damaged, or only a part of it "
            "was copied: copy the whole folder, or remove it and the stage's stage.json"
        ) from error


def _nest(pytree):
    """Nests {"layers/up": x} as {"layers": {"up": x}}, the tree Orbax stores."""
    out = {}
    for name, leaf in tree.named(pytree).items():
        *folders, last = name.split("/")
        node = out
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = leaf
    return out


def _pieces(model):
    """Returns how the parameters are cut on disk, a tree of `ocp.SaveArgs`.

    A compressed piece can only be read whole. Above `CHUNK` bytes a stack is cut into
    its layers, and into experts where it has them, then anything into that many bytes.
    """

    def cut(name, leaf):
        if leaf.size * leaf.dtype.itemsize <= CHUNK:
            return ocp.SaveArgs()
        stacked = name.removeprefix("body/").startswith("layers/")
        experts = "/experts/" in name and leaf.ndim > 3
        axes = ((0, 1) if experts else (0,)) if stacked else ()
        return ocp.SaveArgs(chunk_byte_size=CHUNK, shard_axes=axes)

    named = tree.named(model)
    return _nest({name: cut(name, leaf) for name, leaf in named.items()})


def _abstract(pytree):
    def one(leaf):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(leaf, (int, float)):
            leaf = np.asarray(leaf)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(one, _nest(pytree))


def _refill(pytree, nested):
    """Returns `pytree` with the restored arrays as its leaves."""
    flat = tree.named(nested)
    leaves = [flat[name] for name in tree.named(pytree)]
    return jax.tree.unflatten(jax.tree.structure(pytree), leaves)
