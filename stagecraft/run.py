"""Runs an experiment: its stages in order, or on from where a run stopped."""

import contextlib
import dataclasses
import functools
import time
import zlib
from pathlib import Path

import jax
from ml_collections import ConfigDict

from stagecraft import (
    defaults,
    experiment,
    process,
    schema,
    sharding,
    storage,
    trackers,
    train,
    worlds,
)
from stagecraft.anatomy import summary
from stagecraft.data import feed
from stagecraft.errors import UserError
from stagecraft.models import huggingface, locate, saved
from stagecraft.models.config import ModelConfig
from stagecraft.models.language import Language
from stagecraft.signals import comparisons, selection, verifier
from stagecraft.signals.reward import RewardModel
from stagecraft.stages import kinds, reward
from stagecraft.text import tokenizer as tokenizers

TOKENIZER = "tokenizer"  # its folder in a work directory


@dataclasses.dataclass
class Run:
    """A work directory with its config: what is finished, and how to load it."""

    root: Path
    config: ConfigDict
    tokenizer: object = None  # see `text.tokenizer`; None before it is made
    ran: list = dataclasses.field(default_factory=list)  # stages this process ran

    @property
    def stages(self):
        """Stage names, parents first."""
        return experiment.order(self.config)

    def folder(self, name):
        """WORKDIR/STAGE for a stage of this run, else a path as it is.

        "hf:FOLDER" leads to no stage: see `load` and `chat_format`.
        """
        return self.root / name if name in self.config.stages else Path(name)

    def finished(self, name):
        found = storage.read_json(self.root / name / "stage.json")
        return bool(found and found["finished"])

    def mesh(self, name=None):
        stage = self.config.stages[name] if name else None
        sizes = (
            experiment.mesh_sizes(self.config, stage)
            if stage
            else dict(self.config.mesh)
        )
        return sharding.make_mesh(**sizes)

    def load(self, name, mesh=None):
        """The parameters of a finished stage, or of "hf:FOLDER"."""
        folder = huggingface.folder_of(name)
        if folder is not None:
            model = self.config.model
            how = {k: model[k] for k in locate.HOW}
            return locate.load(name, mesh or self.mesh(), **how)
        return locate.load(self.folder(name), mesh or self.mesh())

    def chat_format(self, name):
        """Whether a stage speaks in chat turns (all but those trained on bare text).

        "hf:FOLDER" does where its tokenizer brings a chat template.
        """
        if huggingface.folder_of(name) is not None:
            return self.tokenizer.template is not None
        return saved.info(self.folder(name))["format"] != "text"


def open_run(root):
    """The run of an existing work directory."""
    root = Path(root)
    stored = storage.read_json(root / "config.json")
    if stored is None:
        raise UserError(
            f"{root}: no run here (no config.json); start one with: "
            "stagecraft run --config=experiments/quickstart.py "
            f"--workdir={root}"
        )
    folder = root / TOKENIZER
    if not folder.exists():
        raise UserError(
            f"{folder}: no tokenizer here: the run was stopped before it had one; the "
            "same command goes on"
        )
    return Run(root, experiment.resolve(stored, check=False), tokenizers.load(folder))


def run(config, root, only=()):
    """Runs the stages of an experiment, or goes on where an earlier run stopped.

    Args:
        config: what an experiment's `get_config` returns.
        root: the work directory.
        only: names of stages to run; () for all. Their parents must be finished.

    Returns:
        the summary, nested dicts of floats; also in WORKDIR/summary.json.
    """
    started = time.perf_counter()
    if jax.default_backend() == "cpu":
        process.keep_memory()
    config = experiment.resolve(config)
    for name in only:
        if name not in config.stages:
            raise UserError(schema.unknown("--only", name, config.stages.keys()))
    root = Path(root)
    current = Run(root, config)
    _claim(current)
    if not jax.config.jax_compilation_cache_dir:
        # Stages that differ in numbers alone share programs, and a resumed run starts
        # at once.
        jax.config.update("jax_compilation_cache_dir", str(root / "compiled"))
    names = experiment.order(config, only)
    todo = [name for name in names if not current.finished(name)]
    _check_parents(current, names)
    if todo:
        with jax.set_mesh(current.mesh()):
            _write_world(config, root)
            current.tokenizer = _tokenizer(config, root)
            feeds = _feeds(current, todo)
            for name in todo:
                _run_stage(current, name, feeds)
                current.ran.append(name)
    else:
        current.tokenizer = tokenizers.load(root / TOKENIZER)
    with jax.set_mesh(current.mesh()):
        return summary.conclude(current, changed=bool(todo), started=started)


def _claim(current):
    """Writes WORKDIR/config.json, or checks that it is the same experiment's."""
    path = current.root / "config.json"
    new, old = schema.plain(current.config), storage.read_json(path)
    if old is None:
        storage.write_json(path, new)
        return
    # Keys that are newer than the run get their defaults; keys that are gone, nothing.
    with contextlib.suppress(UserError):
        old = schema.plain(experiment.resolve(old, check=False))
    found = schema.difference(experiment.identity(old), experiment.identity(new))
    if found:
        raise UserError(
            f"{current.root}: holds a run of another config ({found}); choose another "
            "--workdir, or give the same config to resume"
        )
    storage.write_json(path, new)


def _check_parents(current, names):
    for name in names:
        stage = current.config.stages[name]
        needs = [*experiment.parents(current.config, name).values()]
        needs += feed.stages_named(stage.data)
        for parent in needs:
            known = parent in current.config.stages
            if known and parent not in names and not current.finished(parent):
                raise UserError(
                    f"--only: {name} needs {parent}, which is not finished in "
                    f"{current.root}; add it: --only={parent},{name}"
                )


def _write_world(config, root):
    if not config.world.name or (root / "world").exists():
        return
    worlds.write(config.world.name, root / "world", config.seed, config.world.size)


def _tokenizer(config, root):
    """The run's own, kept in WORKDIR/tokenizer once it is read or trained."""
    folder, given = root / TOKENIZER, config.tokenizer.path
    if folder.exists():
        return tokenizers.load(folder)
    if given:
        try:
            found = tokenizers.load(given)
        except UserError as error:
            raise UserError(f"tokenizer.path: {error}") from None
    elif config.tokenizer.files:
        texts = feed.texts(config.tokenizer.files, root)
        path = folder / tokenizers.FILE
        return tokenizers.Tokenizer.train(texts, config.tokenizer.vocab_size, path)
    elif experiment.outside(config):
        # With a model comes the tokenizer it was trained with.
        first = experiment.outside(config)[0]
        folder_ = huggingface.folder_of(first)
        beside = Path(first).parent / TOKENIZER
        source = locate.tokenizer_of(folder_) if folder_ else beside
        found = tokenizers.load(source)
    else:
        raise UserError("tokenizer: set tokenizer.path or tokenizer.files")
    tokenizers.keep(found, folder)
    return found


def _check_vocabulary(roles, tokenizer):
    """Refuses a model with fewer rows in its embedding than the tokenizer has ids."""
    for role, model in roles.items():
        rows = getattr(model, "body", model).config.vocab_size
        if rows < tokenizer.vocab_size:
            raise UserError(
                f"{role}_from: its model embeds {rows} ids, but the tokenizer has "
                f"{tokenizer.vocab_size}; use the tokenizer it was trained with "
                "(tokenizer.path)"
            )


def _feeds(current, names):
    """Data of the stages whose files are there: read and checked before training."""
    lineage = storage.read_json(current.root / "lineage.json", {"stages": {}})
    feeds = {}
    for name in names:
        stage = current.config.stages[name]
        if any(
            parent in current.config.stages and not current.finished(parent)
            for parent in feed.stages_named(stage.data)
        ):
            continue
        feeds[name] = _feed(current, name, lineage)
    return feeds


def _feed(current, name, lineage):
    stage = current.config.stages[name]
    found = feed.build(stage, current.tokenizer, current.root, current.config)
    known = lineage["stages"].get(name)
    if known and known["data"] != found.digests:
        changed = schema.difference(known["data"], found.digests)
        raise UserError(
            f"{name}: its data changed since the stage began ({changed}); restore the "
            "files, or start in another --workdir"
        )
    return found


def _run_stage(current, name, feeds):
    config, root = current.config, current.root
    stage, folder = config.stages[name], root / name
    lineage = storage.read_json(root / "lineage.json", {"stages": {}})
    data = feeds.pop(name, None) or _feed(current, name, lineage)
    lineage["stages"][name] = _lineage(current, name, data, lineage)
    storage.write_json(root / "lineage.json", lineage)
    mesh = current.mesh(name)
    key = jax.random.key(config.seed)
    key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    if stage.get("seed"):
        key = jax.random.fold_in(key, stage.seed)
    with jax.set_mesh(mesh):
        parents = experiment.parents(config, name)
        # One model for all the roles it plays.
        loaded = {p: current.load(p, mesh) for p in set(parents.values())}
        roles = {role.removesuffix("_from"): loaded[p] for role, p in parents.items()}
        del loaded
        if stage.kind in defaults.RECORDS:
            _write_records(current, name, roles, data, key)
            return
        made, hooks = _make(current, stage, mesh, roles, data)
        info = {"kind": stage.kind, "start_from": stage.start_from, "finished": False}
        info["format"] = "text" if _is_text(stage) else "chat"
        info["tokenizer"] = current.tokenizer.digest
        info["data"] = data.dataset.report
        if made.frozen is not None:
            entry = lineage["stages"][name]["parents"]["start_from"]
            parent = stage.start_from
            parent = parent if huggingface.folder_of(parent) else current.folder(parent)
            info["lora"] = schema.plain(stage.lora)
            info["base"] = locate.reference(parent, folder, entry["id"])
        storage.write_json(folder / "stage.json", info)
        told = schema.plain(config) | {"stage": name}
        where = f"{root.resolve().name}/{name}"
        with trackers.watching(config.trackers, folder, name=where, config=told) as w:
            state, result = train.train(
                *(made, stage, data.dataset, folder),
                name=name,
                key=key,
                hooks=hooks._replace(watch=w),
            )
    info |= saved.describe(train.deployable(state, made.frozen)) | result
    storage.write_json(folder / "stage.json", info | {"finished": True})


def _is_text(stage):
    return stage.kind == "language_model" and stage.data.format == "text"


def _make(current, stage, mesh, roles, data):
    tokenizer = current.tokenizer
    shape = ModelConfig(vocab_size=tokenizer.vocab_size, **current.config.model)
    if roles:
        shape = getattr(roles["start"], "config", shape)
    _check_vocabulary(roles, tokenizer)
    extra = {}
    if stage.kind in ("policy", "group_policy", "online_preference"):
        extra["stop_ids"] = tokenizer.stops
        found = verifier.find(stage.verifiers)
        if found:
            extra["verifiers"] = verifier.Verifiers(found, data.records, tokenizer)
    if stage.kind in ("preference", "unpaired_preference"):
        extra["dataset"] = data.dataset
    if stage.kind == "language_model":
        # Only bare text leaves the chat pieces unseen; who has talked knows them.
        unseen = stage.start_from and not current.chat_format(stage.start_from)
        talks = not _is_text(stage)
        extra["fresh_pieces"] = tokenizer.control_ids if unseen and talks else ()
    made = kinds.MAKE[stage.kind](stage, shape, mesh, roles, **extra)
    sample = _sampler(current, stage, mesh, data.samples)
    finish = None
    if data.reference is not None:
        finish = functools.partial(
            reward.normalize,
            reference=data.reference,
            batch_size=stage.batch_size,
            frozen=made.frozen,
        )
    return made, train.Hooks(data.heldout, sample, finish)


def _sampler(current, stage, mesh, prompts):
    """(model, step) -> what the model says to a few prompts; None for scalar models."""
    if stage.kind == "reward":
        return None
    in_turns, room = not _is_text(stage), current.config.model.max_length // 2
    shards = mesh.shape["data"] * mesh.shape["fsdp"]

    def sample(model, step):
        language = Language(
            model,
            current.tokenizer,
            batch_size=-(-max(len(prompts), 1) // shards) * shards,
        )
        fit = [
            p for p in prompts if len(language.encode(p, chat_format=in_turns)) < room
        ]
        texts = language.complete(
            fit,
            chat=in_turns,
            temperature=1.0,
            max_new_tokens=min(room, 48),
            seed=step,
        )
        return [
            {"prompt": p, "completion": text, "ended": ended}
            for p, (text, ended) in zip(fit, texts, strict=True)
        ]

    return sample


def _write_records(current, name, roles, data, key):
    """A stage that trains nothing: it samples, judges and writes records.jsonl."""
    stage, folder = current.config.stages[name], current.root / name
    started = time.perf_counter()
    language = Language(roles["start"], current.tokenizer, batch_size=stage.batch_size)
    path = folder / "records.jsonl"
    scorer = None
    if "reward" in roles:
        scorer = RewardModel(roles["reward"], current.tokenizer)
    if stage.kind == "comparisons":
        rate = scorer or comparisons.rater(stage.rater, current.config.world.name)
        result = comparisons.write(
            path, language, data.prompts, rate, stage, key, name=name
        )
    else:
        found = verifier.find(stage.verifiers)
        result = selection.write(
            path, language, data.records, scorer, found, stage, key, name=name
        )
    info = {"kind": stage.kind, "start_from": stage.start_from, "format": "records"}
    result["seconds"] = {"total": round(time.perf_counter() - started, 3)}
    storage.write_json(folder / "stage.json", info | result | {"finished": True})


def _lineage(current, name, data, lineage):
    """What a stage comes from: digests of its config, its data, its parents."""
    config = current.config
    shared = {"seed": config.seed, "model": schema.plain(config.model)}
    entry = {
        "kind": config.stages[name].kind,
        "start_from": config.stages[name].start_from,
        "config": storage.digest(
            experiment.identity(schema.plain(config.stages[name])) | shared
        ),
        "tokenizer": current.tokenizer.digest,
        "data": data.digests,
        "parents": {},
    }
    for role, parent in experiment.parents(config, name).items():
        known = lineage["stages"].get(parent)
        folder = huggingface.folder_of(parent)
        if folder is not None:
            known = {"id": locate.digest(folder)}
        elif known is None:
            path = Path(parent)
            other = storage.read_json(path.parent / "lineage.json", {"stages": {}})
            known = other["stages"].get(path.name, {"id": ""})
        entry["parents"][role] = {"stage": parent, "id": known["id"]}
    return entry | {"id": storage.digest(entry)}
