"""Which weights did it, and to which tokens: a stage's answers beside its parent.

Two models A (before) and B (after) are read whole, side by side. B answers prompts; how
far a graft is from B is the mean KL(B || graft) in nats a token over those answers,
exact from logits. What A says to the same prompts tells whether a graft still speaks.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from stagecraft import losses, sharding, storage, stores, tree
from stagecraft.anatomy import changes, grafts, lens, token_shift
from stagecraft.anatomy.texts import Texts, answers, read_prompts
from stagecraft.errors import UserError
from stagecraft.models import locate
from stagecraft.models.language import Language
from stagecraft.models.transformer import Transformer
from stagecraft.text import tokenizer as tokenizers

TABLES = "causes.json"
DIRECTIONS = (1, 2, 4, 8, 16, 32, 64)
DRAWS = 4  # of random subspaces


@jax.jit
def divergence(model: Transformer, other: Transformer, batch: dict) -> jax.Array:
    """Returns KL(other || model) in nats a token of each row's answer: f32[B]."""
    _, mask = losses.shift(batch["ids"], batch["mask"], batch["segments"])
    rows = batch["ids"], batch["positions"], batch["segments"]
    p, q = (jax.nn.log_softmax(m.logits(*rows)) for m in (other, model))
    terms = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
    return jnp.sum(terms * mask, axis=1) / jnp.sum(mask, axis=1)


@jax.jit
def answer_loss(model: Transformer, batch: dict) -> jax.Array:
    """Returns the nats a token of all answers."""
    targets, mask = losses.shift(batch["ids"], batch["mask"], batch["segments"])
    hidden = model.hidden(batch["ids"], batch["positions"], batch["segments"])
    logps = model.token_logps(hidden, targets).logps
    return -jnp.sum(logps * mask) / jnp.sum(mask)


@jax.jit
def _streams(model, batch):
    """The residual stream behind each layer, before the final norm: f32[L, B, T, D]."""
    angles = model.angles(batch["positions"], batch["segments"])

    def step(x, layer, spec):
        def attend(query, key, value):
            return model.attend(query, key, value, batch["segments"], spec), None

        x, _, _ = layer(x, angles[spec], attend)
        return x, x

    x = model.lookup(batch["ids"], batch["positions"])
    return model.through(step, x, unroll=model.unroll)[1].astype(jnp.float32)


def of_run(
    root: str | Path, files: str, *, stages: Sequence[str] = (), to: str | Path = ""
) -> dict:
    """Asks of every finished stage that writes text which weights changed it.

    Args:
        root: WORKDIR.
        files: of prompts, as `data.files`.
        stages: which; by default all that write text and started from one that does.
        to: the folder to write causes.json into; WORKDIR/anatomy by default.

    Returns:
        {stage: what `compare` returns, or {"refused": why}; and "shift", `shifts`}.
    """
    root = stores.local(root)
    tokenizer = tokenizers.load(root / locate.TOKENIZER)
    prompts, out = read_prompts(files), {}
    for stage in changes.speaking(root, tokenizer):
        if stages and stage.name not in stages:
            continue
        before, after = stage.before, stage.after
        out[stage.name] = _asked(before, after, stage.chat, tokenizer, prompts)
    missing = [name for name in stages if name not in out]
    if missing or not out:
        known = ", ".join(out) or "none"
        raise UserError(
            f"--prompts: no stage {', '.join(missing)} that writes text and started "
            f"from one that does; there is {known}"
        )
    storage.write_json(Path(to or root / changes.FOLDER) / TABLES, out)
    return out


def of_pair(before: str, after: str, files: str, *, to: str | Path) -> dict:
    """Asks which weights changed one model into another.

    Args:
        before, after: "hf:FOLDER", or the folder WORKDIR/STAGE of a finished stage.
        files: of prompts.
        to: the folder to write causes.json into.

    Returns:
        as `of_run`, under the name of the model after.
    """
    one, other = locate.locate(before), locate.locate(after)
    tokenizer = tokenizers.load(other.tokenizer())
    chat = tuple(changes.chats(source, tokenizer) for source in (one, other))
    name = changes.short_names(before, after)[1]
    out = {name: _asked(one, other, chat, tokenizer, read_prompts(files))}
    storage.write_json(Path(to) / TABLES, out)
    return out


def _asked(before, after, chat, tokenizer, prompts):
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        models = [source.load(mesh) for source in (before, after)]
        new = ()
        if chat == (False, True) and tokenizer.template is None:
            marks = (tokenizer.system, tokenizer.user, tokenizer.assistant)
            new = tuple(t for t in (*marks, tokenizer.end) if t is not None)
        try:
            texts = [
                answers(Language(m, tokenizer, batch_size=len(prompts)), prompts, own)
                for m, own in zip(models, chat, strict=True)
            ]
        except UserError as error:
            return {"refused": str(error)}
        shift = {"shift": shifts(*models, *texts, tokenizer.name)}
        try:
            return compare(*models, *texts, new_tokens=new) | shift
        except UserError as error:
            return {"refused": str(error)} | shift


def shifts(before: Transformer, after: Transformer, own: Texts, said: Texts, name):
    """Returns which tokens A would not have written, and the other way round.

    Args:
        before, after: A and B.
        own, said: answers of A and of B to the same prompts.
        name: the text of a token.

    Returns:
        {"said", "own": `token_shift.measure`}: B's answers as A reads them, and A's as
        B does.
    """
    return {
        "said": token_shift.measure(after, before, said.batch, name),
        "own": token_shift.measure(before, after, own.batch, name),
    }


def nearness(after: Transformer, said: Texts) -> grafts.Behaviour:
    """Returns the behaviour that grafts are asked for: minus how far a model is from B.

    Args:
        after, said: B, and what it answered.

    Returns:
        model -> (minus the mean of KL(B || model) in nats a token, its standard error
        over answers).
    """

    def behaviour(model):
        rows = np.asarray(divergence(model, after, said.batch), np.float64)
        return -float(rows.mean()), float(rows.std(ddof=1) / len(rows) ** 0.5)

    return behaviour


def compare(
    before: Transformer,
    after: Transformer,
    own: Texts,
    said: Texts,
    *,
    new_tokens: Sequence[int] = (),
) -> dict:
    """Asks which weights of A changed it into B.

    Args:
        before, after: A and B.
        own, said: answers of A and of B to the same prompts.
        new_tokens: ids that B was the first to train.

    Returns:
        divergence: KL(B || A) in nats a token of B's answers, with its standard_error
        over answers. layers, kinds: `grafts.attribute`, of minus the divergence, with
        the loss on A's answers. path: `grafts.path` of the divergence (said) and of
        that loss (own). subspaces: `subspaces`. gains: {matrix: `lens.logit_gain`}.
        lenses: `lenses`.
    """

    behaviour = nearness(after, said)

    def loss(model):
        return float(answer_loss(model, own.batch))

    names, config = list(tree.named(before)), before.config
    value, error = behaviour(before)
    out = {
        "divergence": -value,
        "standard_error": error,
        "answers": len(said.batch["ids"]),
    }
    for key, divide in (
        ("layers", grafts.layer_players),
        ("kinds", grafts.kind_players),
    ):
        players = divide(names, config, new_tokens)
        out[key] = grafts.attribute(behaviour, before, after, players, loss=loss)
    out["path"] = {
        "said": grafts.path(lambda m: -behaviour(m)[0], before, after),
        "own": grafts.path(loss, before, after),
    }
    metric = output_metric(before, said)
    out["gains"] = gains(before, after, metric)
    out["subspaces"] = subspaces(behaviour, before, after, metric)
    out["lenses"] = lenses(before, after, own, said)
    return out


def output_metric(model: Transformer, texts: Texts) -> np.ndarray:
    """Returns `lens.logit_metric` for the tokens of some answers."""
    ids, mask = (np.asarray(texts.batch[key]) for key in ("ids", "mask"))
    counts = np.bincount(ids[mask], minlength=model.config.vocab_size)
    scale = np.asarray(model.norm.scale[...]) + model.config.norm_offset
    return lens.logit_metric(np.asarray(model.output_embedding()), scale, counts)


def gains(before: Transformer, after: Transformer, metric: np.ndarray) -> dict:
    """Returns the logit gain of what changed in each matrix that writes: {name: gain}.

    Layers of a stack are apart: "layers/0/attention/out". An isotropic change has 1.
    """
    out, others = {}, tree.named(after)
    for name, a in tree.named(before).items():
        change = np.asarray(others[name], np.float64) - np.asarray(a)
        if name == "embed":
            out[name] = lens.logit_gain(change, metric)
        elif name.endswith(grafts.WRITES):
            for layer, one in enumerate(change):
                where = name.replace("layers/", f"layers/{layer}/", 1)
                rows = one.reshape(-1, one.shape[-1])
                out[where] = lens.logit_gain(rows, metric)
    return out


def subspaces(
    behaviour, before, after, metric: np.ndarray, seed: int = 0
) -> dict | None:
    """Grafts what the writing matrices changed, within few directions of the stream.

    Args:
        behaviour: as of `grafts.attribute`.
        before, after: A and B.
        metric: `output_metric`, whose first directions logits read most.
        seed: of random directions.

    Returns:
        full: sufficiency of all of that change. directions: k. logits, change, random:
        sufficiency of the k first directions of the metric, of the change itself, and
        of random ones (mean over draws); logits_energy, ...: the share of the change's
        squared norm in them. None without such matrices.
    """
    written = _written(before, after)
    if written is None or not written.any():
        return None
    width = len(metric)
    own = np.linalg.eigh(written.T @ written)[1][:, ::-1]
    read = np.linalg.eigh(metric)[1][:, ::-1]
    random = np.random.default_rng(seed)
    turned = [np.linalg.qr(random.normal(size=(width, width)))[0] for _ in range(DRAWS)]
    start, end = behaviour(before)[0], behaviour(after)[0]

    def sufficiency(basis):
        graft = grafts.project(before, after, basis)
        return (behaviour(graft)[0] - start) / (end - start)

    def energy(basis):
        return float(np.sum((written @ basis) ** 2) / np.sum(written**2))

    ks = [k for k in DIRECTIONS if k < width]
    out = {"full": sufficiency(np.eye(width)), "directions": ks}
    for name, bases in (("logits", [read]), ("change", [own]), ("random", turned)):
        out[name] = [
            float(np.mean([sufficiency(basis[:, :k]) for basis in bases])) for k in ks
        ]
        out[f"{name}_energy"] = [
            float(np.mean([energy(basis[:, :k]) for basis in bases])) for k in ks
        ]
    return out


def _written(before, after):
    """What changed in all matrices that write to the stream, as rows: f64[N, D]."""
    others = tree.named(after)
    rows = [
        (np.asarray(others[name], np.float64) - np.asarray(a)).reshape(-1, a.shape[-1])
        for name, a in tree.named(before).items()
        if name.endswith(grafts.WRITES) or name.endswith("experts/down")
    ]
    return np.concatenate(rows) if rows else None


def lenses(before: Transformer, after: Transformer, own: Texts, said: Texts) -> dict:
    """Reads every layer's stream as if it were the last, in both models.

    The linear lens of each layer is fitted on A, on the answers of A, and applied to
    both models; the logit lens applies the final norm alone.

    Returns:
        {"before", "after": {"linear", "logit": [mean KL(the model's output || the
        lens's) in nats, layer by layer]}} on the answers of B; linear is None where A's
        answers have no more than 2 D positions, too few to fit it.
    """
    fitted = _positions(_streams(before, own.batch), own)
    enough = fitted.shape[1] > 2 * fitted.shape[2]
    maps = [lens.linear_lens(x, fitted[-1]) if enough else None for x in fitted]
    out = {}
    for name, model in (("before", before), ("after", after)):
        streams = _positions(_streams(model, said.batch), said)
        read = functools.partial(_read, model)
        truth = read(streams[-1])
        logit = [float(lens.kl(truth, read(x)).mean()) for x in streams]
        linear = None
        if enough:
            linear = [
                float(lens.kl(truth, read(x @ weights + offset)).mean())
                for x, (weights, offset) in zip(streams, maps, strict=True)
            ]
        out[name] = {"linear": linear, "logit": logit}
    return out


def _positions(streams, texts):
    """The stream at positions that predict a token of an answer: f32[L, N, D]."""
    mask = losses.shift(*(texts.batch[k] for k in ("ids", "mask", "segments")))[1]
    return np.asarray(streams)[:, np.asarray(mask)]


@jax.jit
def _logits(model, x):
    return model.project_out(model.norm(x))


def _read(model, x):
    return np.asarray(_logits(model, jnp.asarray(x, jnp.float32)))
