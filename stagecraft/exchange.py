"""Models in and out of a work directory, as Hugging Face folders."""

import time
from pathlib import Path

import jax

from stagecraft import defaults, mesh, run, schema, workdir
from stagecraft.checkpoint import Checkpoints
from stagecraft.errors import UserError
from stagecraft.models import huggingface, saved
from stagecraft.text import outward
from stagecraft.text import tokenizer as tokenizers

# What a folder's tokenizer files must not replace: it is written anew.
OURS = ("config.json",)


def import_folder(folder, root, name="base"):
    """Makes a work directory with one finished stage out of a Hugging Face folder.

    Args:
        folder: config.json, *.safetensors and a tokenizer.
        root: the work directory, which must not hold a run.
        name: of the stage.

    Returns:
        WORKDIR/NAME, for another experiment's start_from.
    """
    started = time.perf_counter()
    folder, root = Path(folder), Path(root)
    if (root / "config.json").exists():
        raise UserError(f"{root}: holds a run already; choose another --workdir")
    told = huggingface.info(folder)
    tokenizer = tokenizers.load(folder)
    check_vocabulary(folder, told["model"]["vocab_size"], tokenizer)
    shared_mesh = mesh.make()
    with jax.set_mesh(shared_mesh):
        model = huggingface.load(folder, shared_mesh)
        checkpoints = Checkpoints(root / name / "checkpoints")
        checkpoints.save(0, model, {"step": 0}, {})
        checkpoints.close()
    if not (root / run.TOKENIZER).exists():
        tokenizers.keep(tokenizer, root / run.TOKENIZER)
    kind = "reward" if told["module"] == "scalar" else "language_model"
    parent = f"{huggingface.PREFIX}{folder}"
    source = huggingface.digest(folder)
    entry = {"kind": kind, "start_from": parent, "tokenizer": tokenizer.digest}
    entry["parents"] = {"start_from": {"stage": parent, "id": source}}
    entry["id"] = workdir.digest(entry)
    workdir.write_json(root / "lineage.json", {"stages": {name: entry}})
    talks = tokenizer.template is not None or kind == "reward"
    info = {"kind": kind, "start_from": parent, "format": "chat" if talks else "text"}
    info |= {"tokenizer": tokenizer.digest, "data": {}, "steps": 0, "tokens": {}}
    info |= saved.describe(model)
    info["seconds"] = {"total": round(time.perf_counter() - started, 3)}
    workdir.write_json(root / name / "stage.json", info | {"finished": True})
    config = defaults.experiment()
    config.tokenizer.path = str(folder)
    for key in config.model:
        config.model[key] = getattr(huggingface.config(folder), key)
    config.stages[name] = defaults.stage(kind, start_from=parent, steps=0)
    workdir.write_json(root / "config.json", schema.plain(config))
    return root / name


def check_vocabulary(folder, rows, tokenizer):
    """Refuses a tokenizer with ids that the model has no embedding for."""
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size} ids, its model embeds "
            f"{rows} (config.json: vocab_size); they do not belong together"
        )


def export(root, name, folder, *, dtype="float32", shard_size=None, overwrite=False):
    """Writes a finished stage as a Hugging Face folder.

    Args:
        root: the work directory.
        name: the stage.
        folder: where to.
        dtype, shard_size, overwrite: see `huggingface.save`.

    Returns:
        lines that say what was written, and what a reader should know of it.
    """
    current = run.open_run(root)
    if name not in current.config.stages:
        raise UserError(schema.unknown("--stage", name, current.config.stages.keys()))
    if current.config.stages[name].kind in defaults.RECORDS:
        raise UserError(f"--stage={name}: writes records and has no model to export")
    if not current.finished(name):
        raise UserError(f"--stage={name}: is not finished; run it again to resume")
    tokenizer, said = current.tokenizer, []
    ids = {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eos,
        "pad_token_id": tokenizer.pad,
    }

    def extra(temporary):
        files, notes = outward.files(tokenizer)
        said.extend(notes)
        for path, data in files.items():
            if path not in OURS:
                (temporary / path).parent.mkdir(parents=True, exist_ok=True)
                (temporary / path).write_bytes(data)

    shared_mesh = current.mesh()
    with jax.set_mesh(shared_mesh):
        model = current.load(name, shared_mesh)
        family = huggingface.save(
            model,
            folder,
            dtype=dtype,
            shard_size=shard_size or huggingface.SHARD_SIZE,
            overwrite=overwrite,
            ids=ids,
            generation={**ids, "eos_token_id": sorted({*tokenizer.stops})},
            extra=extra,
        )
    kind = saved.describe(model)["module"]
    if kind == "scalar" and float(model.bias[...]):
        said.append(
            f"the reward's constant {float(model.bias[...]):.4g} is in config.json "
            f"({huggingface.BIAS}): a ForSequenceClassification has none and scores "
            "that much lower; orders and differences are the same"
        )
    return [f"{folder}: {family.classes[kind == 'scalar']}, {dtype}", *said]
