"""Models in and out of a work directory, as Hugging Face folders."""

import time
from pathlib import Path

import jax

from stagecraft import defaults, run, schema, sharding, storage
from stagecraft.checkpoint import Checkpoints
from stagecraft.errors import UserError
from stagecraft.models import huggingface, locate, peft, saved
from stagecraft.text import tokenizer as tokenizers
from stagecraft.text import tokenizer_export

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
    told = locate.info(folder)
    tokenizer = tokenizers.load(locate.tokenizer_of(folder))
    check_vocabulary(folder, told["model"]["vocab_size"], tokenizer)
    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh):
        model = locate.load(f"{huggingface.PREFIX}{folder}", mesh)
        checkpoints = Checkpoints(root / name / "checkpoints")
        checkpoints.save(0, model, {"step": 0}, {})
        checkpoints.close()
    if not (root / run.TOKENIZER).exists():
        tokenizers.keep(tokenizer, root / run.TOKENIZER)
    kind = "reward" if told["module"] == "scalar" else "language_model"
    parent = f"{huggingface.PREFIX}{folder}"
    source = locate.digest(folder)
    entry = {"kind": kind, "start_from": parent, "tokenizer": tokenizer.digest}
    entry["parents"] = {"start_from": {"stage": parent, "id": source}}
    entry["id"] = storage.digest(entry)
    storage.write_json(root / "lineage.json", {"stages": {name: entry}})
    talks = tokenizer.template is not None or kind == "reward"
    info = {"kind": kind, "start_from": parent, "format": "chat" if talks else "text"}
    info |= {"tokenizer": tokenizer.digest, "data": {}, "steps": 0, "tokens": {}}
    info |= saved.describe(model)
    info["seconds"] = {"total": round(time.perf_counter() - started, 3)}
    storage.write_json(root / name / "stage.json", info | {"finished": True})
    config = defaults.experiment()
    config.tokenizer.path = str(locate.tokenizer_of(folder))
    for key in config.model:
        config.model[key] = told["model"][key]
    config.stages[name] = defaults.stage(kind, start_from=parent, steps=0)
    storage.write_json(root / "config.json", schema.plain(config))
    return root / name


def check_vocabulary(folder, rows, tokenizer):
    """Refuses a tokenizer with ids that the model has no embedding for."""
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size} ids, its model embeds "
            f"{rows} (config.json: vocab_size); they do not belong together"
        )


def export(
    root,
    name,
    folder,
    *,
    dtype="float32",
    shard_size=None,
    overwrite=False,
    adapter=False,
    base="",
):
    """Writes a finished stage as a Hugging Face folder.

    Args:
        root: the work directory.
        name: the stage.
        folder: where to.
        dtype, shard_size, overwrite: see `huggingface.save`.
        adapter: write the adapter that the stage trained, as PEFT's folder, and not
            the whole model.
        base: what PEFT is to load the adapter onto; may be empty where it was trained
            on "hf:FOLDER".

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

    def extra(temporary):
        files, notes = tokenizer_export.files(tokenizer)
        said.extend(notes)
        for path, data in files.items():
            if path not in OURS:
                (temporary / path).parent.mkdir(parents=True, exist_ok=True)
                (temporary / path).write_bytes(data)

    if adapter:
        return [_export_adapter(current, name, folder, base, overwrite, extra), *said]
    ids = {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eos,
        "pad_token_id": tokenizer.pad,
    }
    mesh = current.mesh()
    with jax.set_mesh(mesh):
        model = current.load(name, mesh)
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


def _export_adapter(current, name, folder, base, overwrite, extra):
    stage = current.folder(name)
    info = saved.info(stage)
    if "lora" not in info:
        raise UserError(
            f"--adapter: the stage {name} trained all weights (lora.rank=0); leave the "
            "flag away"
        )
    theirs = huggingface.folder_of(info["base"]["name"])
    if not base and theirs is not None and peft.is_adapter(theirs):
        raise UserError(
            f"--adapter: {name} sits on {theirs}, an adapter itself; merge that one "
            "(stagecraft import, then export) and name the folder, --base=FOLDER"
        )
    if not base and theirs is None:
        raise UserError(
            f"--adapter: {name} sits on the stage {Path(info['base']['name']).name}; "
            "export that one first and name its folder, --base=FOLDER"
        )
    mesh = current.mesh()
    with jax.set_mesh(mesh):
        model, adapter = locate.load_adapter(stage, mesh)
        config = getattr(model, "body", model).config
        del model
        family = peft.save(
            *(adapter, config, folder, mesh),
            base=base or theirs,
            overwrite=overwrite,
            extra=extra,
        )
    return f"{folder}: a PEFT adapter on {family.classes[0]}, {base or theirs}"
