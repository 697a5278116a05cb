"""What several kinds of stages refuse in a config, each in one line that says where."""

from stagecraft import optim, schema, sharding
from stagecraft.data import mixture
from stagecraft.errors import UserError
from stagecraft.models import locate, lora
from stagecraft.models.config import ModelConfig, check_mesh
from stagecraft.signals import verifiers
from stagecraft.stages import objective


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
    _adapter(where, config)
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
                f"{where}.{key}: {count} rows at once do not divide over data * fsdp = "
                f"{across} devices"
            )
    shape = ModelConfig(vocab_size=experiment.tokenizer.vocab_size, **experiment.model)
    shape.validate()
    check_mesh(shape, mesh)
    optim.make(config.optimizer, steps=config.steps)
    files(where, config, check_data)
    return loss(where, config, kind)


def files(where, config, check_data=mixture.check):
    """Checks the data keys that every kind has; `check_data` refuses the others."""
    if not config.data.files:
        raise UserError(f"{where}.data.files: is empty; name the files to read")
    schema.positive(f"{where}.data.workers", config.data.workers, zero=True)
    try:
        check_data(config.data)
    except UserError as error:
        raise UserError(f"{where}.{error}") from None


def length(where, config, experiment):
    """Refuses rows longer than one of the stage's models holds."""
    _fits(
        where,
        config,
        experiment,
        f"data.length={config.data.length}",
        config.data.length,
    )


def room(where, config, experiment):
    """Refuses prompts and completions longer than one of the stage's models holds."""
    data, new = config.data, config.sampling.max_new_tokens
    prompt = data.prompt_length
    what = f"data.prompt_length={prompt} and sampling.max_new_tokens={new}"
    # Without a limit of their own, prompts have what is left, at least a token.
    _fits(where, config, experiment, what, (prompt or 1) + new)
    if data.get("ptx_rows"):
        what = f"data.ptx_length={data.ptx_length}"
        _fits(where, config, experiment, what, data.ptx_length)


def _fits(where, config, experiment, what, tokens):
    limit, why = locate.shortest_context(config, experiment)
    if tokens > limit:
        raise UserError(
            f"{where}.{what}: {tokens} tokens are longer than the context, {why}"
        )


def _adapter(where, config):
    lora.check(f"{where}.lora", config.lora)
    if config.lora.rank and not config.start_from:
        raise UserError(
            f"{where}.lora.rank={config.lora.rank}: an adapter sits on a trained "
            "model; set start_from, or lora.rank=0 to train all weights"
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


def moving_reference(where, config):
    """Checks the keys of TR-DPO's moving reference."""
    schema.positive(f"{where}.sync_every", config.sync_every, zero=True)
    if not 0 < config.sync_alpha <= 1:
        raise UserError(
            f"{where}.sync_alpha={config.sync_alpha}: expected above 0, up to 1"
        )
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


def sampling(where, config):
    """Refuses sampling that gives a stage the same completion every time."""
    if config.sampling.temperature <= 0:
        raise UserError(
            f"{where}.sampling.temperature={config.sampling.temperature}: "
            f"{config.kind} needs samples; expected more than 0"
        )


def rewards(where, config):
    """Checks the sources of rewards: a reward model, verifiers, or both."""
    sources = bool(config.reward_from) + len(verifiers.find(config.verifiers))
    if not sources:
        raise UserError(
            f"{where}.reward_from: is empty, and so is verifiers; a {config.kind} "
            "stage needs a stage of kind reward, the folder of a finished one, or "
            "verifiers='package.module:function'"
        )
    if len(config.reward_weights) not in (0, sources):
        raise UserError(
            f"{where}.reward_weights={tuple(config.reward_weights)}: expected one for "
            f"each of the {sources} rewards: the reward model's first, if there is one"
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
        estimators: {placement: the estimators it may have}; none where the estimator
            is not read.
    """
    schema.positive(f"{where}.kl_coef", config.kl_coef, zero=True)
    schema.choice(f"{where}.kl_placement", config.kl_placement, tuple(estimators))
    given = config.kl_estimator
    if config.kl_placement == "loss" and given == "k1" and config.kl_coef:
        raise UserError(
            f"{where}.kl_estimator='k1' with kl_placement='loss': its expected "
            "gradient on the policy's own samples is zero, so it would hold nothing "
            "back; use 'k2' or 'k3' in the loss, or 'k1' in the reward"
        )
    allowed = estimators[config.kl_placement]
    if config.kl_coef and allowed:
        schema.choice(f"{where}.kl_estimator", given, allowed)
