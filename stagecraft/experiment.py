"""An experiment is a graph of stages: here it is completed, checked and ordered.

Whatever can be refused is refused here, before anything is compiled or written.
"""

from pathlib import Path

from stagecraft import defaults, losses, optim, schema, sharding, trackers, worlds
from stagecraft.anatomy import summary
from stagecraft.data import corpus, feed, mixture
from stagecraft.errors import UserError
from stagecraft.models import huggingface, locate, lora, saved
from stagecraft.models.config import ModelConfig, check_mesh
from stagecraft.models.translation import THE_RUNS
from stagecraft.signals import comparisons, verifier
from stagecraft.stages import group_policy, kinds, objective, policy, preference

# Which other stage a key may name, and what kinds that stage may be of.
_LANGUAGE = (
    *("language_model", "preference", "unpaired_preference", "online_preference"),
    *("policy", "group_policy"),
)
_START, _REFERENCE = {"start_from": _LANGUAGE}, {"reference_from": _LANGUAGE}
_REWARD = {"reward_from": ("reward",)}
ROLES = {
    "language_model": _START,
    "reward": {"start_from": (*_LANGUAGE, "reward")},
    "preference": _START | _REFERENCE,
    "unpaired_preference": _START | _REFERENCE,
    "online_preference": _START | _REFERENCE | _REWARD,
    "policy": _START | _REFERENCE | _REWARD | {"value_from": ("reward",)},
    "group_policy": _START | _REFERENCE | _REWARD,
    "comparisons": _START | _REWARD,
    "selection": _START | _REWARD,
}
# A role left empty is played by another: the reference is the parent as it was.
FALLBACK = {"reference_from": "start_from", "value_from": "reward_from"}
# Every kind but one needs a parent; what else a kind needs is checked with the rest.
WITHOUT_PARENT = ("language_model",)
# Keys that change no number of a run, so that it may be resumed with others.
LEFT_OUT = ("mesh", "every", "cache", "workers", "trackers")
# Kinds whose completions are scored, by a reward model or by verifiers.
SCORED = ("policy", "group_policy", "online_preference", "selection")


def resolve(config, *, check=True):
    """The complete config: defaults filled in, every key, type and reference checked.

    Args:
        config: a ConfigDict or dict as an experiment's `get_config` returns.
        check: also refuse impossible values and combinations.

    Returns:
        a new ConfigDict. Raises UserError before anything is compiled.
    """
    given = {k: v for k, v in config.items() if k != "stages"}
    full = schema.merge(defaults.experiment(), given)
    if not config.get("stages"):
        raise UserError("stages: this experiment has none; add c.stages.NAME = ...")
    for name, stage in config["stages"].items():
        where = f"stages.{name}"
        if not name.replace("_", "").isalnum() or name in (
            "world",
            "runs",
            "tokenizer",
        ):
            raise UserError(f"{where}: expected a name of letters, digits and _")
        if not hasattr(stage, "items") or "kind" not in stage:
            raise UserError(f"{where}: needs kind=, one of {', '.join(defaults.KINDS)}")
        schema.choice(f"{where}.kind", stage["kind"], tuple(defaults.KINDS))
        full.stages[name] = schema.merge(defaults.KINDS[stage["kind"]](), stage, where)
    if check:
        _take_model(full)
        _check(full)
    return full


def outside(c):
    """Where stages start from outside this experiment: folders, each once."""
    found = [stage.start_from for stage in c.stages.values()]
    return list(dict.fromkeys(f for f in found if f and f not in c.stages))


def _take_model(c):
    """Where no stage starts from nothing, c.model is what is started from.

    What says how to compute stays the experiment's, and so does a max_length that was
    changed: the longest the run is to see, not what the model was made for.
    """
    if not outside(c) or any(not stage.start_from for stage in c.stages.values()):
        return
    first = outside(c)[0]
    folder = huggingface.folder_of(first)
    if folder is None and not (Path(first) / "stage.json").exists():
        return  # a name nobody knows, which is refused below
    told = (locate.info(folder) if folder else saved.info(first))["model"]
    given = c.model.max_length
    for key in c.model:
        if key in told and key not in THE_RUNS:
            value = told[key]
            c.model[key] = tuple(value) if isinstance(value, list) else value
    if given != defaults.model().max_length:
        c.model.max_length = given
        if told.get("positions") == "learned" and given > told["max_length"]:
            raise UserError(
                f"model.max_length={given}: the model of {first} has learned positions "
                f"for {told['max_length']} tokens and no more"
            )


def _check(c):
    schema.choice("world.size", c.world.size, ("full", "tiny"))
    schema.choice("measure.split", c.measure.split, ("test", "dev"))
    trackers.names(c.trackers)
    if c.world.name:
        worlds.get(c.world.name)
    for claim in c.measure.claims:
        summary.check_claim(claim)
    for name, stage in c.stages.items():
        where = f"stages.{name}"
        for role, allowed in ROLES[stage.kind].items():
            _check_role(c, name, role, allowed)
        if stage.kind in SCORED:
            _check_rewards(where, stage)
        if stage.kind in defaults.RECORDS:
            _check_records(c, where, stage)
        else:
            _check_training(c, where, stage)
        schema.positive(f"{where}.batch_size", stage.batch_size)
        if not stage.data.files:
            raise UserError(f"{where}.data.files: is empty; name the files to read")
        _check_data(where, stage)
    order(c)


def _check_data(where, stage):
    schema.positive(f"{where}.data.workers", stage.data.workers, zero=True)
    check = corpus.check if stage.kind == "language_model" else mixture.check
    try:
        check(stage.data)
    except UserError as error:
        raise UserError(f"{where}.{error}") from None


def _check_role(c, name, role, kinds):
    where, stage = f"stages.{name}.{role}", c.stages[name]
    value = stage[role]
    if not value:
        if role == "start_from" and stage.kind not in WITHOUT_PARENT:
            raise UserError(
                f"{where}: is empty; a {stage.kind} stage needs a stage of kind "
                f"{' or '.join(kinds)}, the folder of a finished one, or hf:FOLDER"
            )
        return
    folder = huggingface.folder_of(value)
    if folder is not None:
        _check_folder(c, f"{where}={value!r}", folder, kinds, stage)
    elif value in c.stages:
        if c.stages[value].kind not in kinds:
            raise UserError(
                f"{where}={value!r}: that stage is of kind {c.stages[value].kind}, "
                f"expected {' or '.join(kinds)}"
            )
    elif "/" not in value and not Path(value).exists():
        raise UserError(schema.unknown(f"{where}={value!r}", value, c.stages.keys()))
    else:
        saved.info(value)


def _check_folder(c, where, folder, kinds, stage):
    """Looks at a Hugging Face folder that plays a role."""
    module = None if "reward" in kinds else "transformer"
    if kinds == ("reward",):
        module = "scalar"
    try:
        locate.examine(
            folder, sharding.make_mesh(**mesh_sizes(c, stage)), module=module
        )
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _check_rewards(where, stage):
    sources = bool(stage.reward_from) + len(verifier.find(stage.verifiers))
    if not sources:
        raise UserError(
            f"{where}.reward_from: is empty, and so is verifiers; a {stage.kind} stage "
            "needs a stage of kind reward, the folder of a finished one, or "
            "verifiers='package.module:function'"
        )
    if len(stage.reward_weights) not in (0, sources):
        raise UserError(
            f"{where}.reward_weights={tuple(stage.reward_weights)}: expected one for "
            f"each of the {sources} rewards: the reward model's first, if there is one"
        )


def _check_records(c, where, stage):
    schema.positive(f"{where}.prompts", stage.prompts)
    if stage.kind == "selection":
        schema.choice(f"{where}.keep", stage.keep, ("best", "above"))
        schema.positive(f"{where}.samples", stage.samples)
        return
    if (stage.rater == "reward") != bool(stage.reward_from):
        raise UserError(
            f"{where}.rater={stage.rater!r} with reward_from={stage.reward_from!r}: "
            "rater='reward' and reward_from go together"
        )
    if stage.soft_labels and stage.rater != "reward":
        raise UserError(
            f"{where}.soft_labels=True: needs rater='reward', whose scores give the "
            "probability"
        )
    if stage.rater != "reward":
        comparisons.rater(stage.rater, c.world.name)


def _check_training(c, where, stage):
    for key in ("steps", "micro_batches"):
        schema.positive(f"{where}.{key}", stage[key])
    rows = stage.batch_size
    if stage.kind == "group_policy":
        _check_group(where, stage)
        rows *= stage.group_size
    if stage.kind in ("policy", "group_policy", "online_preference"):
        if stage.sampling.temperature <= 0:
            raise UserError(
                f"{where}.sampling.temperature={stage.sampling.temperature}: "
                f"{stage.kind} needs samples; expected more than 0"
            )
    elif stage.data.length > c.model.max_length:
        raise UserError(
            f"{where}.data.length={stage.data.length}: longer than the context, "
            f"model.max_length={c.model.max_length}"
        )
    if stage.kind in ("policy", "group_policy"):
        rows = _check_epochs(where, stage, rows)
    parts = stage.micro_batches
    if stage.kind == "policy":
        _check_policy(where, stage)
        parts *= stage.minibatches
    _check_lora(c, where, stage)
    if not 0 <= stage.ema_decay < 1:
        raise UserError(
            f"{where}.ema_decay={stage.ema_decay}: expected from 0 (off) to below 1"
        )
    if "ld_alpha" in stage:
        schema.choice(f"{where}.weighting", stage.weighting, ("", "wpo"))
        if not 0 <= stage.ld_alpha <= 1:
            raise UserError(f"{where}.ld_alpha={stage.ld_alpha}: expected from 0 to 1")
    if "sync_every" in stage:
        schema.positive(f"{where}.sync_every", stage.sync_every, zero=True)
        if not 0 < stage.sync_alpha <= 1:
            raise UserError(
                f"{where}.sync_alpha={stage.sync_alpha}: expected above 0, up to 1"
            )
    if rows % stage.micro_batches:
        raise UserError(
            f"{where}.micro_batches={stage.micro_batches}: does not divide the "
            f"{rows} rows of one optimizer step"
        )
    sizes = mesh_sizes(c, stage)
    shards = sharding.make_mesh(**sizes).shape
    across = shards["data"] * shards["fsdp"]
    at_once = {f"batch_size={stage.batch_size}": rows // stage.micro_batches}
    if stage.kind == "group_policy":  # prompts, before each is sampled from often
        prompts = stage.batch_size * stage.oversample
        at_once |= {f"oversample={stage.oversample}": prompts}
    for key, count in at_once.items():
        if count % across:
            raise UserError(
                f"{where}.{key}: {count} rows at once do not divide over data * fsdp = "
                f"{across} devices"
            )
    if stage.kind == "policy" and stage.data.ptx_rows % (parts * across):
        raise UserError(
            f"{where}.data.ptx_rows={stage.data.ptx_rows}: expected a multiple of "
            f"minibatches * micro_batches * devices along data and fsdp = "
            f"{parts * across}"
        )
    ModelConfig(vocab_size=c.tokenizer.vocab_size, **c.model).validate()
    check_mesh(
        ModelConfig(vocab_size=c.tokenizer.vocab_size, **c.model),
        sharding.make_mesh(**sizes),
    )
    optim.make(stage.optimizer, steps=stage.steps)
    _check_objective(where, stage)


def _check_lora(c, where, stage):
    lora.check(f"{where}.lora", stage.lora)
    if not stage.lora.rank:
        return
    if not stage.start_from:
        raise UserError(
            f"{where}.lora.rank={stage.lora.rank}: an adapter sits on a trained model; "
            "set start_from, or lora.rank=0 to train all weights"
        )
    parent = c.stages.get(stage.start_from)
    if (
        stage.kind == "language_model"
        and stage.data.format != "text"
        and parent is not None
        and parent.kind == "language_model"
        and parent.data.format == "text"
        and not stage.lora.embeddings
    ):
        raise UserError(
            f"{where}.lora.embeddings=False: {stage.start_from} learns from bare text "
            "and never sees the pieces of a chat, whose embeddings an adapter leaves "
            "alone; set it to True"
        )
    if not stage.get("sync_every", 0):
        return
    if stage.sync_alpha < 1:
        raise UserError(
            f"{where}.sync_alpha={stage.sync_alpha}: the mean of two adapters is not "
            "the mean of their weights; with lora expected 1"
        )
    if stage.reference_from not in ("", stage.start_from):
        raise UserError(
            f"{where}.reference_from={stage.reference_from!r}: with lora a reference "
            "that moves (sync_every) is the policy's adapter as it was, on start_from; "
            "leave it empty"
        )


def _check_epochs(where, stage, rows):
    """Rows of one optimizer step."""
    schema.positive(f"{where}.epochs", stage.epochs)
    schema.positive(f"{where}.minibatches", stage.minibatches)
    if rows % stage.minibatches:
        raise UserError(
            f"{where}.batch_size={stage.batch_size}: {rows} rows are not divisible by "
            f"minibatches={stage.minibatches}"
        )
    return rows // stage.minibatches


def _check_policy(where, stage):
    _check_kl(where, stage, {"reward": ("k1", "k3"), "loss": ("k2", "k3")})
    schema.choice(f"{where}.score_placement", stage.score_placement, ("A", "B"))
    policy.make_optimizers(stage)
    if bool(stage.data.ptx) != bool(stage.data.ptx_rows):
        raise UserError(
            f"{where}.data.ptx_rows={stage.data.ptx_rows} with data.ptx="
            f"{stage.data.ptx!r}: set both to mix pretraining text in, or neither"
        )


def _check_group(where, stage):
    schema.positive(f"{where}.oversample", stage.oversample)
    if stage.group_size < 2 and stage.advantage != "returns":
        raise UserError(
            f"{where}.group_size={stage.group_size}: advantage={stage.advantage!r} "
            "compares the completions of one prompt; expected 2 or more"
        )
    schema.choice(f"{where}.advantage", stage.advantage, group_policy.ADVANTAGES)
    scales = ("group", "batch", "none")
    schema.choice(f"{where}.scale_rewards", stage.scale_rewards, scales)
    schema.choice(f"{where}.aggregation", stage.aggregation, losses.AGGREGATIONS)
    _check_kl(where, stage, {"reward": ("k1",), "loss": ("k2", "k3")})
    if stage.kl_bias_correction and stage.kl_estimator != "k3":
        raise UserError(
            f"{where}.kl_bias_correction=True: is for kl_estimator='k3', got "
            f"{stage.kl_estimator!r}"
        )
    if not 0 <= stage.overlong_cache <= stage.sampling.max_new_tokens:
        raise UserError(
            f"{where}.overlong_cache={stage.overlong_cache}: expected from 0 (off) to "
            f"sampling.max_new_tokens={stage.sampling.max_new_tokens}"
        )


def _check_kl(where, stage, allowed):
    schema.positive(f"{where}.kl_coef", stage.kl_coef, zero=True)
    schema.choice(f"{where}.kl_placement", stage.kl_placement, tuple(allowed))
    estimators, given = allowed[stage.kl_placement], stage.kl_estimator
    if stage.kl_placement == "loss" and given == "k1" and stage.kl_coef:
        raise UserError(
            f"{where}.kl_estimator='k1' with kl_placement='loss': its expected "
            "gradient on the policy's own samples is zero, so it would hold nothing "
            "back; use 'k2' or 'k3' in the loss, or 'k1' in the reward"
        )
    if stage.kl_coef and (stage.kind == "policy" or stage.kl_placement == "loss"):
        schema.choice(f"{where}.kl_estimator", given, estimators)


def _check_objective(where, stage):
    offers, places = kinds.OFFERS[stage.kind], kinds.PLACES[stage.kind]
    try:
        loss = objective.combine(stage, offers, places)
        if "f_divergence" in stage:
            preference.check_scores(stage, loss)
    except UserError as error:
        raise UserError(f"{where}.{error}") from None
    if loss.across_rows and stage.micro_batches > 1:
        raise UserError(
            f"{where}.micro_batches={stage.micro_batches}: "
            f"{', '.join(loss.across_rows)} compares all rows of a batch with each "
            "other, so it cannot be split; expected 1"
        )
    if loss.by_sequence and stage.get("aggregation") != "grpo":
        raise UserError(
            f"{where}.objective={stage.objective!r}: {loss.by_sequence[0]} has one "
            "loss a completion, so it needs a group_policy stage with "
            "aggregation='grpo', the mean over completions"
        )
    turned = stage.kind == "unpaired_preference" and "kl" in loss.needs
    if turned and stage.batch_size < 2:
        raise UserError(
            f"{where}.batch_size={stage.batch_size}: {stage.objective} measures each "
            "prompt with another row's completion; expected 2 or more"
        )
    if "weighting" in stage and stage.weighting and "rows" not in loss.places:
        raise UserError(
            f"{where}.weighting={stage.weighting!r}: weighs pairs, but "
            f"objective={stage.objective!r} has no loss of pairs"
        )


def mesh_sizes(c, stage):
    return {axis: stage.mesh[axis] or c.mesh[axis] for axis in sharding.AXES}


def parents(c, name):
    """{role: stage name or path} of a stage, empty roles filled by their fallback."""
    stage, out = c.stages[name], {}
    for role in ROLES[stage.kind]:
        value = stage[role] or stage.get(FALLBACK.get(role, ""), "")
        if value:
            out[role] = value
    return out


def order(c, only=()):
    """Stage names, parents first; a circle is a UserError."""
    done, open_ = [], []

    def visit(name):
        if name in done:
            return
        if name in open_:
            circle = " -> ".join([*open_[open_.index(name) :], name])
            raise UserError(f"stages: they start from each other in a circle: {circle}")
        open_.append(name)
        needs = [*parents(c, name).values(), *feed.stages_named(c.stages[name].data)]
        for parent in needs:
            if parent in c.stages:
                visit(parent)
            elif parent in feed.stages_named(c.stages[name].data):
                raise UserError(
                    schema.unknown(
                        f"stages.{name}.data: stage:{parent}", parent, c.stages.keys()
                    )
                )
        open_.pop()
        done.append(name)

    for name in c.stages:
        visit(name)
    return [name for name in done if not only or name in only]


def identity(plain):
    """The part of a plain config that decides the numbers: not mesh, not every.

    Nor who is told of them, where tokens are kept and who puts batches together.
    """
    if not isinstance(plain, dict):
        return plain
    return {k: identity(v) for k, v in plain.items() if k not in LEFT_OUT}
