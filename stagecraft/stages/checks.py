"""What several kinds of stages refuse in a config, each in one line that says where."""

import jax

from stagecraft import defaults, losses, optim, schema, sharding
from stagecraft.data import mixture
from stagecraft.errors import UserError
from stagecraft.models import locate, lora
from stagecraft.models.config import ROPE_SCALING, ModelConfig, check_mesh
from stagecraft.models.rope import BY_LENGTH
from stagecraft.signals import judge, raters, verifiers
from stagecraft.stages import objective
from stagecraft.stages.stage import OFFLOADED, OPTIMIZER


def training(
    where,
    config,
    experiment,
    mesh,
    kind,
    *,
    rows=None,
    at_once=None,
    check_data=mixture.check,
):
    """Checks what all stages that train have in common.

    Args:
        where: "stages.NAME".
        config: the stage's config; experiment: the whole config.
        mesh: the stage's mesh.
        kind: the stage's `Kind`.
        rows: rows of one optimizer step; batch_size if None.
        at_once: {key of the config: rows} that go through a model together, beside
            those of a micro-batch.
        check_data: refuses the data keys that not every kind has.

    Returns:
        the stage's `objective.Loss`.
    """
    for key in ("steps", "micro_batches", "batch_size"):
        schema.positive(f"{where}.{key}", config[key])
    _adapter(where, config, kind)
    _offload(where, config, kind)
    if not 0 <= config.ema_decay < 1:
        raise UserError(
            f"{where}.ema_decay={config.ema_decay}: expected from 0 (off) to below 1"
        )
    rows = config.batch_size if rows is None else rows
    if rows % config.micro_batches:
        raise UserError(
            f"{where}.micro_batches={config.micro_batches}: does not divide the "
            f"{rows} rows of one optimizer step"
        )
    across = sharding.row_shards(mesh)
    together = {f"batch_size={config.batch_size}": rows // config.micro_batches}
    for key, count in (together | (at_once or {})).items():
        if count % across:
            raise UserError(
                f"{where}.{key}: {count} rows at once do not divide over "
                f"{sharding.rows_split_by(mesh)} devices"
            )
    shape = ModelConfig(vocab_size=experiment.tokenizer.vocab_size, **experiment.model)
    shape.validate()
    if shape.dtype == "float16":
        raise UserError(
            f"model.dtype='float16': {where} trains, and small gradients would round "
            "to 0, since losses are not scaled; use 'bfloat16'"
        )
    check_mesh(shape, mesh)
    optimizer(where, config, "optimizer")
    files(where, config, check_data)
    return loss(where, config, kind)


def optimizer(where, config, name):
    """Checks the settings of an optimizer, those under the key `name`."""
    optim.make(config[name], steps=config.steps)
    reasons = optim.unread(config[name])
    keys = {f"{name}.{k}": f"{name}.{why}" for k, why in reasons.items()}
    unread(where, config, keys)


def unread(where, config, keys):
    """Refuses keys that nothing reads, where they are not at their defaults.

    Args:
        keys: {dotted key: what the config has that makes it so}.
    """
    default = dict(schema.flat(defaults.stage(config.kind).to_dict()))
    values = dict(schema.flat(config.to_dict()))
    for key, because in keys.items():
        if values[key] != default[key]:
            raise UserError(
                f"{where}.{key}={values[key]!r}: changes nothing with {because}; "
                f"change that, or leave {key} at {default[key]!r}"
            )


def files(where, config, check_data=mixture.check):
    """Checks the data keys that every kind has; `check_data` refuses the others."""
    if not config.data.files:
        raise UserError(f"{where}.data.files: is empty; name the files to read")
    if "workers" in config.data:
        schema.positive(f"{where}.data.workers", config.data.workers, zero=True)
    try:
        check_data(config.data)
    except UserError as error:
        raise UserError(f"{where}.{error}") from None


def length(where, config, experiment, mesh):
    """Refuses rows longer than a model holds, or that do not divide over `context`."""
    _splits(f"{where}.data.length={config.data.length}", config.data.length, mesh)
    _fits(
        where,
        config,
        experiment,
        f"data.length={config.data.length}",
        config.data.length,
    )


def room(where, config, experiment, mesh=None):
    """Refuses prompts and completions longer than a model holds.

    Where they are trained on, on `mesh`, rows must divide over its `context` as well.
    """
    data, new = config.data, config.sampling.max_new_tokens
    prompt = data.prompt_length
    what = f"data.prompt_length={prompt} and sampling.max_new_tokens={new}"
    parts = mesh.shape["context"] if mesh else 1
    if parts > 1 and not prompt:
        raise UserError(
            f"{where}.data.prompt_length: is not set, so that rows have the length of "
            "the longest prompt, which mesh.context need not divide; set it"
        )
    if parts > 1:
        _splits(f"{where}.{what}", prompt + new, mesh)
    # Without a limit of their own, prompts have what is left, at least a token.
    _fits(where, config, experiment, what, (prompt or 1) + new)
    if data.get("ptx_rows"):
        what = f"data.ptx_length={data.ptx_length}"
        _fits(where, config, experiment, what, data.ptx_length)


def _splits(what, tokens, mesh):
    parts = mesh.shape["context"]
    if tokens % parts:
        raise UserError(
            f"{what}: rows of {tokens} tokens do not divide over mesh.context={parts}; "
            f"use a multiple of {parts}"
        )


def _fits(where, config, experiment, what, tokens):
    limit, why = locate.shortest_context(config, experiment)
    if tokens > limit:
        raise UserError(
            f"{where}.{what}: {tokens} tokens are longer than the context, {why}"
        )


def _adapter(where, config, kind):
    lora.check(f"{where}.lora", config.lora)
    if not config.lora.rank:
        unread(where, config, {f"lora.{key}": "lora.rank=0" for key in config.lora})
    if config.lora.dropout and "reference" in kind.roles:
        raise UserError(
            f"{where}.lora.dropout={config.lora.dropout}: a {config.kind} stage "
            "compares log-probabilities of the same weights, and dropped inputs would "
            "count as a change of the policy; expected 0"
        )
    if config.lora.rank and not config.start_from:
        raise UserError(
            f"{where}.lora.rank={config.lora.rank}: an adapter sits on a trained "
            "model; set start_from, or lora.rank=0 to train all weights"
        )


def _offload(where, config, kind):
    """Checks what is to wait in the host's memory."""
    known = (OPTIMIZER, *(role for role in OFFLOADED if role in kind.roles))
    for name in config.offload:
        schema.choice(f"{where}.offload", name, known)
    if "reference" not in config.offload:
        return
    because = ""
    if config.get("sync_every"):
        because = "a reference that moves (sync_every) is changed in every step"
    elif config.lora.rank and config.reference_from in ("", config.start_from):
        because = "it is what the adapter sits on (lora), which every step needs"
    if because:
        raise UserError(
            f"{where}.offload: 'reference' cannot wait in the host's memory, since "
            f"{because}; leave it out"
        )


def loss(where, config, kind):
    """Checks the objective: its names, weights, arguments and arrays."""
    try:
        combined = objective.combine(config, kind)
    except UserError as error:
        raise UserError(f"{where}.{error}") from None
    if combined.across_rows and config.micro_batches > 1:
        raise UserError(
            f"{where}.micro_batches={config.micro_batches}: "
            f"{', '.join(combined.across_rows)} compares all rows of a batch with each "
            "other, so it cannot be split; expected 1"
        )
    return combined


def sequence_losses(where, config, combined, aggregation=""):
    """Refuses losses of whole completions without the mean over completions."""
    if combined.by_sequence and aggregation != "grpo":
        raise UserError(
            f"{where}.objective={config.objective!r}: {combined.by_sequence[0]} has "
            "one loss a completion, so it needs a group_policy stage with "
            "aggregation='grpo', the mean over completions"
        )


def apart(where, config, experiment, loss, prompts):
    """Checks rollouts apart from training: their mesh, and how old they may be.

    Args:
        loss: the stage's `objective.Loss`.
        prompts: that are sampled from at once.
    """
    schema.positive(f"{where}.staleness", config.staleness, zero=True)
    schema.positive(f"{where}.importance_cap", config.importance_cap)
    weights = ("sharded", "gathered")
    schema.choice(f"{where}.rollout_weights", config.rollout_weights, weights)
    sizes = dict(config.rollout_mesh)
    devices = sizes.pop("devices")
    if not devices:
        keys = [f"rollout_mesh.{axis}" for axis in sizes] + ["staleness"]
        unread(where, config, dict.fromkeys(keys, "rollout_mesh.devices=0"))
    if not config.staleness:
        unread(where, config, {"importance_cap": "staleness=0"})
    elif loss.by_sequence:
        raise UserError(
            f"{where}.staleness={config.staleness}: {loss.by_sequence[0]} has one loss "
            "a completion, and old tokens are weighed one by one; set it to 0, or use "
            "a loss by tokens"
        )
    if not devices:
        return
    if jax.process_count() > 1:
        raise UserError(
            f"{where}.rollout_mesh.devices={devices}: takes a run of one process, this "
            f"has {jax.process_count()}; set it to 0"
        )
    try:
        mesh = sharding.make_mesh(**sizes, devices=devices)
    except UserError as error:
        raise UserError(f"{where}.rollout_{error}") from None
    across = sharding.row_shards(mesh)
    if prompts % across:
        raise UserError(
            f"{where}.rollout_mesh: {prompts} prompts do not divide over "
            f"{sharding.rows_split_by(mesh)} devices; change batch_size, or "
            "rollout_mesh.tensor"
        )
    shape = ModelConfig(vocab_size=experiment.tokenizer.vocab_size, **experiment.model)
    try:
        check_mesh(shape, mesh)
    except UserError as error:
        raise UserError(f"{where}.rollout_mesh: {error}") from None


def reference(where, config, loss):
    """Refuses the keys of a reference where no loss compares the policy with one.

    Args:
        loss: the stage's `objective.Loss`.
    """
    if loss.needs.isdisjoint(("ref_logps", "scores", "kl", "delta")):
        keys = ("reference_from", "sync_every", "sync_alpha")
        because = f"objective={config.objective!r}, which takes no reference"
        unread(where, config, {key: because for key in keys if key in config})


def moving_reference(where, config):
    """Checks the keys of TR-DPO's moving reference."""
    schema.positive(f"{where}.sync_every", config.sync_every, zero=True)
    if not 0 < config.sync_alpha <= 1:
        raise UserError(
            f"{where}.sync_alpha={config.sync_alpha}: expected above 0, up to 1"
        )
    if not config.sync_every:
        unread(where, config, {"sync_alpha": "sync_every=0"})
    if not config.sync_every or not config.lora.rank:
        return
    if config.sync_alpha < 1:
        raise UserError(
            f"{where}.sync_alpha={config.sync_alpha}: the mean of two adapters is not "
            "the mean of their weights; with lora expected 1"
        )
    if config.reference_from not in ("", config.start_from):
        raise UserError(
            f"{where}.reference_from={config.reference_from!r}: with lora a reference "
            "that moves (sync_every) is the policy's adapter as it was, on start_from; "
            "leave it empty"
        )


def sampling(where, config, experiment):
    """Refuses sampling that a stage cannot learn from.

    Greedy completions are all the same, and log-probabilities are those of the whole
    distribution of a full pass: what is sampled must be that distribution.
    """
    chosen = config.sampling
    if chosen.temperature <= 0:
        raise UserError(
            f"{where}.sampling.temperature={chosen.temperature}: "
            f"{config.kind} needs samples; expected more than 0"
        )
    for key, unset in (("top_k", 0), ("top_p", 1.0)):
        if chosen[key] != unset:
            raise UserError(
                f"{where}.sampling.{key}={chosen[key]}: {config.kind} learns from its "
                "samples, and log-probabilities are of the whole distribution, not of "
                f"the truncated one; expected {unset}"
            )
    model = _model(config, experiment) or {}
    scaling = model.get("rope_scaling", "none")
    if scaling not in BY_LENGTH:
        return
    names = ROPE_SCALING[scaling]
    original = model["rope_arguments"][names.index("original_length")]
    length = experiment.model.max_length
    if config.data.prompt_length:
        length = min(length, config.data.prompt_length + chosen.max_new_tokens)
    if length > original:
        raise UserError(
            f"{where}.start_from: the model has model.rope_scaling={scaling!r}, whose "
            f"wavelengths change beyond {original} tokens, so that a completion of up "
            f"to {length} is not scored as it was sampled; lower data.prompt_length "
            f"+ sampling.max_new_tokens, or model.max_length, to {original}"
        )


def _model(config, experiment):
    """Returns the fields of the model that a stage starts from; None in a circle."""
    for _ in experiment.stages:
        if not config.start_from:
            return experiment.model
        if config.start_from not in experiment.stages:
            return locate.locate(config.start_from).info()["model"]
        config = experiment.stages[config.start_from]
    return None


def rater(where, config):
    """Refuses settings that only raters other than the stage's read."""
    own = raters.reads(config.rater)
    if "judge" not in own and (config.judge_from or config.judge.url):
        raise UserError(
            f"{where}.rater={config.rater!r} with a judge (judge_from, judge.url): set "
            "rater='judge', or name no judge"
        )
    others = {key for name in raters.RATERS for key in raters.reads(name)} - {*own}
    keys = [
        key
        for key, _ in schema.flat(config.to_dict())
        if others & {key, key.partition(".")[0]} and not key.startswith("judge.")
    ]
    reasons = dict.fromkeys(keys, f"rater={config.rater!r}")
    unread(where, config, reasons | _unread_of_judge(config, own))


def _unread_of_judge(config, read_by_rater=()):
    """Returns {key of the group judge that changes nothing: why}.

    Args:
        read_by_rater: the keys that a rater of pairs reads; () where answers get a
            reward.
    """
    own, pairs = config.judge, bool(read_by_rater)
    if not (config.judge_from or own.url):
        because = "neither judge_from nor judge.url"
        keys = {f"judge.{key}" for key in own} - {*read_by_rater}
        return dict.fromkeys(sorted(keys), because)
    remote = ("model", "api", "key", "timeout", "tries", "parallel")
    if own.url:
        keys = {"judge.batch_size": f"judge.url={own.url!r}"}
    else:
        keys = dict.fromkeys((f"judge.{key}" for key in remote), "judge.url=''")
    if not pairs:
        because = "a reward, whose answers are not compared in two orders"
        keys |= dict.fromkeys(("judge.orders", "judge.combine", "judge.clamp"), because)
    return keys


def rewards(where, config, samples=1):
    """Checks the sources of rewards: a reward model, a judge, verifiers, or several.

    Args:
        samples: completions of each prompt, which a judge may also compare.
    """
    judged = bool(config.judge_from or config.judge.url)
    sources = bool(config.reward_from) + judged
    try:
        scorers = verifiers.find(config.verifiers, config.verifier_args)
    except UserError as error:
        raise UserError(f"{where}.{error}") from None
    sources += len(scorers)
    if judged:
        judge.check_settings(where, config, (1, samples) if samples > 1 else (1,))
    unread(where, config, _unread_of_judge(config))
    if not sources:
        raise UserError(
            f"{where}.reward_from: is empty, and so is verifiers; a {config.kind} "
            "stage needs a stage of kind reward, the folder of a finished one, a judge "
            "(judge_from), or verifiers such as 'number' or 'FILE.py:function'"
        )
    if len(config.reward_weights) not in (0, sources):
        raise UserError(
            f"{where}.reward_weights={tuple(config.reward_weights)}: expected one for "
            f"each of the {sources} rewards: the reward model's, the judge's, then "
            "each verifier's"
        )


def epochs(where, config, rows):
    """Checks epochs and minibatches; returns the rows of one optimizer step."""
    schema.positive(f"{where}.epochs", config.epochs)
    schema.positive(f"{where}.minibatches", config.minibatches)
    if rows % config.minibatches:
        raise UserError(
            f"{where}.batch_size={config.batch_size}: {rows} rows are not divisible by "
            f"minibatches={config.minibatches}"
        )
    return rows // config.minibatches


def kl(where, config, estimators):
    """Checks the KL penalty.

    Args:
        estimators: {placement: the estimators it may have}.
    """
    schema.positive(f"{where}.kl_coef", config.kl_coef, zero=True)
    schema.choice(f"{where}.kl_placement", config.kl_placement, tuple(estimators))
    if not config.kl_coef:
        keys = ("placement", "estimator", "bias_correction", "target", "horizon")
        keys = [f"kl_{key}" for key in keys]
        unread(where, config, {k: "kl_coef=0.0" for k in keys if k in config})
        return
    given = config.kl_estimator
    if config.kl_placement == "loss" and given == "k1":
        raise UserError(
            f"{where}.kl_estimator='k1' with kl_placement='loss': its expected "
            "gradient on the policy's own samples is zero, so it would hold nothing "
            "back; use 'k2' or 'k3' in the loss, or 'k1' in the reward"
        )
    allowed = estimators[config.kl_placement]
    if given not in allowed and given in losses.ESTIMATORS:
        raise UserError(
            f"{where}.kl_estimator={given!r} with kl_placement={config.kl_placement!r}:"
            f" expected {' or '.join(map(repr, allowed))}"
        )
    schema.choice(f"{where}.kl_estimator", given, allowed)
