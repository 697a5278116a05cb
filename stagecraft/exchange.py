"""Models in and out of a work directory, as Hugging Face folders."""

import time
from pathlib import Path

import jax

from stagecraft import defaults, runs, schema, sharding, stores
from stagecraft.checkpoint import Checkpoints
from stagecraft.errors import UserError
from stagecraft.lineage import Lineage, LineageEntry, Parent, StageRecord
from stagecraft.models import huggingface, locate, peft, saved
from stagecraft.run import open_run
from stagecraft.stages import kinds
from stagecraft.text import tokenizer as tokenizers
from stagecraft.text import tokenizer_export

# Files of the folder that the tokenizer's own files must not replace.
OURS = ("config.json",)


def import_folder(folder: str | Path, root: str | Path, name: str = "base") -> Path:
    """Makes a work directory with one finished stage out of a Hugging Face folder.

    Args:
        folder: config.json, *.safetensors and a tokenizer; or "gguf:FILE".
        root: the work directory, which must not hold a run.
        name: of the stage.

    Returns:
        WORKDIR/NAME, for another experiment's start_from.
    """
    started = time.perf_counter()
    root, text = stores.local(root, writing=True), str(folder)
    if runs.read_config(root) is not None:
        raise UserError(f"{root}: holds a run already; choose another --workdir")
    if not text.startswith(locate.GGUF):
        text = f"{locate.PREFIX}{folder}"
    source = locate.locate(text)
    info = source.info()
    tokenizer = tokenizers.load(source.tokenizer())
    check_vocabulary(folder, info["model"]["vocab_size"], tokenizer)
    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh):
        model = source.load(mesh)
        checkpoints = Checkpoints(root / name / "checkpoints")
        checkpoints.save(0, model, {"step": 0}, {})
        checkpoints.close()
    if not (root / runs.TOKENIZER).exists():
        tokenizers.keep(tokenizer, root / runs.TOKENIZER)
    kind = kinds.of_folder(info["module"])
    entry = LineageEntry(
        kind=kind.name,
        start_from=source.name,
        tokenizer=tokenizer.digest,
        parents={"start_from": Parent(stage=source.name, id=source.id())},
    )
    Lineage(stages={name: entry}).write(root)
    in_turns = tokenizer.template is not None or not kind.speaks
    record = {
        "kind": kind.name,
        "start_from": source.name,
        "format": "chat" if in_turns else "text",
        "tokenizer": tokenizer.digest,
        "data": {},
        "steps": 0,
        "tokens": {},
        **saved.describe(model),
        "seconds": {"total": round(time.perf_counter() - started, 3)},
        "finished": True,
    }
    StageRecord.from_json(record).write(root / name)
    config = defaults.experiment()
    config.tokenizer.path = str(source.tokenizer())
    for key in config.model:
        config.model[key] = info["model"][key]
    config.stages[name] = defaults.stage(kind.name, start_from=source.name, steps=0)
    runs.write_config(root, schema.plain(config))
    return root / name


def check_vocabulary(folder, rows, tokenizer):
    """Refuses a tokenizer with ids that the model has no embedding for."""
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size} ids, its model embeds "
            f"{rows} (config.json: vocab_size); they do not belong together"
        )


def export(
    root: str | Path,
    name: str,
    folder: str | Path,
    *,
    dtype: str = "float32",
    shard_size: int | None = None,
    overwrite: bool = False,
    adapter: bool = False,
    base: str = "",
) -> list[str]:
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
        lines that say what was written and what a reader of the folder should know.
    """
    run = open_run(root)
    if name not in run.config.stages:
        raise UserError(schema.unknown("--stage", name, run.config.stages.keys()))
    if not kinds.of(run.config.stages[name]).trains:
        raise UserError(f"--stage={name}: writes records and has no model to export")
    if not run.finished(name):
        raise UserError(f"--stage={name}: is not finished; run it again to resume")
    tokenizer, remarks = run.tokenizer, []

    def extra(temporary):
        files, notes = tokenizer_export.files(tokenizer)
        remarks.extend(notes)
        for path, data in files.items():
            if path not in OURS:
                (temporary / path).parent.mkdir(parents=True, exist_ok=True)
                (temporary / path).write_bytes(data)

    if adapter:
        return [_export_adapter(run, name, folder, base, overwrite, extra), *remarks]
    ids = {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eos,
        "pad_token_id": tokenizer.pad,
    }
    with jax.set_mesh(run.mesh()):
        model = run.model(name)
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
    scalar = saved.describe(model)["module"] == "scalar"
    if scalar and float(model.bias[...]):
        remarks.append(
            f"the reward's constant {float(model.bias[...]):.4g} is in config.json "
            f"({huggingface.BIAS}): a ForSequenceClassification has none and scores "
            "that much lower; orders and differences are the same"
        )
    return [f"{folder}: {family.classes[scalar]}, {dtype}", *remarks]


def _export_adapter(run, name, folder, base, overwrite, extra):
    folder_of_stage = run.source(name).folder
    record = StageRecord.read_finished(folder_of_stage)
    if record.lora is None:
        raise UserError(
            f"--adapter: the stage {name} trained all weights (lora.rank=0); leave the "
            "flag away"
        )
    under = locate.locate(record.base["name"])
    if not base and under.where == "adapter":
        raise UserError(
            f"--adapter: {name} sits on {under.folder}, an adapter itself; merge that "
            "one (stagecraft import, then export) and name the folder, --base=FOLDER"
        )
    if not base and not under.outward:
        raise UserError(
            f"--adapter: {name} sits on the stage {under.folder.name}; export that one "
            "first and name its folder, --base=FOLDER"
        )
    base = base or under.name.removeprefix(locate.PREFIX)
    mesh = run.mesh()
    with jax.set_mesh(mesh):
        model, adapter = locate.load_adapter(folder_of_stage, mesh)
        config = getattr(model, "body", model).config
        del model
        family = peft.save(
            adapter, config, folder, mesh, base=base, overwrite=overwrite, extra=extra
        )
    return f"{folder}: a PEFT adapter on {family.classes[0]}, {base}"
