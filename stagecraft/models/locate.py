"""Models by the names that start_from knows: stages on disk and Hugging Face folders.

A stage that trained an adapter has only that on disk. It is read with what it sits on
and handed out as a plain model, so that nobody else needs to know.
"""

from pathlib import Path

from stagecraft import checkpoint, storage
from stagecraft.errors import UserError
from stagecraft.models import huggingface, lora, peft, saved
from stagecraft.models.translation import THE_RUNS

# Fields of a model's config that are the run's and not the folder's.
HOW = tuple(key for key in THE_RUNS if key not in ("init_std", "family"))


def load(name, mesh, **how):
    """Reads a model, adapters merged into the weights they sit on.

    Args:
        name: WORKDIR/STAGE, or "hf:FOLDER".
        mesh: where to put the parameters.
        **how: fields of `ModelConfig` that are the run's, for a folder.

    Returns:
        a `Transformer` or a `ScalarModel`.
    """
    folder = huggingface.folder_of(name)
    if folder is not None:
        reader = peft if peft.is_adapter(folder) else huggingface
        return reader.load(folder, mesh, **how)
    if "lora" in saved.info(name):
        return lora.merge(*load_adapter(name, mesh))
    return saved.load(name, mesh)


def info(folder):
    """Module and model of a Hugging Face folder, an adapter's merged."""
    return (peft if peft.is_adapter(folder) else huggingface).info(folder)


def examine(folder, mesh, *, module=None):
    """Looks at a Hugging Face folder before anything is read of it."""
    if not peft.is_adapter(folder):
        huggingface.examine(folder, mesh, module=module)
        return
    found = peft.info(folder)["module"]
    if module not in (None, found):
        raise UserError(f"{folder}: makes a {found} model, expected a {module} one")
    huggingface.examine(peft.base_of(folder), mesh)


def digest(folder):
    """SHA-256 of a Hugging Face folder's config and weights."""
    return (peft if peft.is_adapter(folder) else huggingface).digest(folder)


def tokenizer_of(folder):
    """Where the tokenizer of a Hugging Face folder lies: an adapter may bring none."""
    folder = Path(folder)
    if peft.is_adapter(folder) and not any(folder.glob("tokenizer*")):
        return peft.base_of(folder)
    return folder


def load_adapter(name, mesh):
    """The base of a stage that trained an adapter, and the `lora.Adapter`."""
    info = saved.info(name)
    if "lora" not in info:
        raise UserError(f"{name}: trained all weights and has no adapter")
    how = {key: info["model"][key] for key in HOW if key in info["model"]}
    base = load(base_of(name, info), mesh, **how)
    abstract = lora.abstract(
        *(lora.Settings(**info["lora"]), base, mesh),
        scalar=info["module"] == "scalar",
    )
    adapter, _ = checkpoint.load_model(name, abstract)
    return base, adapter


def base_of(name, info):
    """What a stage's adapter sits on, as `load` takes it; it must be the same still."""
    told = info["base"]
    folder = huggingface.folder_of(told["name"])
    path = Path(name) / told["name"] if folder is None else folder
    if not path.is_dir():
        raise UserError(
            f"{name}: is an adapter (LoRA) on {path}, which is not there; restore that "
            "folder"
        )
    if folder is None:
        lineage = storage.read_json(path.parent / "lineage.json", {"stages": {}})
        now = lineage["stages"].get(path.name, {}).get("id", "")
    else:
        now = digest(folder)
    if now != told["id"]:
        raise UserError(
            f"{name}: is an adapter (LoRA) on {path}, which is another model now; "
            "restore the one it was trained on"
        )
    return path if folder is None else told["name"]


def reference(parent, folder, id_):
    """What stage.json says of an adapter's base.

    Args:
        parent: WORKDIR/STAGE of the base, or "hf:FOLDER".
        folder: WORKDIR/STAGE of the adapter; stages of one run are found beside it,
            wherever the run is moved.
        id_: the base's id in a lineage.
    """
    theirs = huggingface.folder_of(parent)
    if theirs is not None:
        name = f"{huggingface.PREFIX}{theirs.absolute()}"
    elif Path(parent).parent.resolve() == Path(folder).parent.resolve():
        name = f"../{Path(parent).name}"
    else:
        name = str(Path(parent).absolute())
    return {"name": name, "id": id_}
