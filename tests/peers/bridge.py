"""The same weights, tokens and optimizer on both sides: transformers and TRL, and ours.

A peer's trainer runs as it is. It leaves behind the batches its own collator made and
the losses its own training step returned; the batches then go through one of our
stages, and the two series of losses are compared.
"""

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from stagecraft import defaults, sharding, tree
from stagecraft.models.config import ModelConfig
from stagecraft.models.transformer import ScalarModel, Transformer

# Tiny matrices: a second thread only waits.
torch.set_num_threads(1)
datasets.disable_progress_bars()

PAD, UNKNOWN, END = 0, 1, 2  # of `tokenizer`; words start at FIRST_WORD
FIRST_WORD = 3

CONFIG = ModelConfig(
    vocab_size=64,
    width=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    ff_width=56,
    max_length=64,
    qk_norm=False,
    rope_theta=5e3,
    norm_eps=1e-6,
)

SGD = dict(name="sgd", lr=0.1, weight_decay=0.0)
# With the usual eps of 1e-8, gradients that are nothing but rounding errors would still
# become whole steps, in opposite directions on the two sides.
ADAMW = dict(name="adamw", lr=1e-3, b1=0.9, b2=0.99, eps=1e-5, weight_decay=0.1)
STEPS = 20
BATCHES = 5  # different ones; the steps go over them four times, and it shows


# Models


def make_peer(c, seed=0, *, scalar=False, bias=False, std=0.15, pads=True):
    """transformers' model of a config, with random weights, norm scales among them.

    Args:
        c: a `ModelConfig`; with qk_norm it is a Qwen 3, otherwise a Llama.
        seed: int.
        scalar: whether the head gives one number a token instead of logits.
        bias: whether a scalar head has a bias, as ours has (transformers' has none).
        std: of the weights; large enough that a wrong mask shows in the numbers.
        pads: False for a policy that never says PAD, which TRL would take for an end,
            and says END more often.
    """
    family = "Qwen3" if c.qk_norm else "Llama"
    config = getattr(transformers, f"{family}Config")(
        vocab_size=c.vocab_size,
        hidden_size=c.width,
        intermediate_size=c.ff_width,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads,
        head_dim=c.head_dim,
        max_position_embeddings=c.max_length,
        rms_norm_eps=c.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        tie_word_embeddings=c.tied,
        attn_implementation="eager",
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=END,
        **({"num_labels": 1} if scalar else {}),
    )
    kind = "ForSequenceClassification" if scalar else "ForCausalLM"
    torch.manual_seed(seed)
    peer = getattr(transformers, f"{family}{kind}")(config).eval()
    if bias:
        peer.score = torch.nn.Linear(c.width, 1, bias=True)
        torch.nn.init.zeros_(peer.score.bias)
    with torch.no_grad():
        for name, weight in peer.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
            elif not name.endswith("bias"):
                weight.normal_(0, std)
        if not pads:
            # A channel that is 1 after every word, and against which PAD points.
            peer.model.norm.weight[0] = 1.0
            peer.model.embed_tokens.weight[:, 0] = 1.0
            peer.model.embed_tokens.weight[PAD, 0] = -16.0
            peer.model.embed_tokens.weight[END, 0] = 2.0
            for layer in peer.model.layers:
                layer.self_attn.o_proj.weight[0] = 0.0
                layer.mlp.down_proj.weight[0] = 0.0
    return peer


def clone(peer):
    """A second model with the same weights."""
    other = type(peer)(peer.config).eval()
    if getattr(peer, "score", None) is not None and peer.score.bias is not None:
        other.score = torch.nn.Linear(*peer.score.weight.shape[::-1], bias=True)
    other.load_state_dict(peer.state_dict())
    return other


def weights(peer, c):
    """The peer's weights under our names and in our shapes: {name: f32 array}.

    A scalar model has `head` and `bias` beside its body.
    """
    theirs = {k: v.detach().float().numpy() for k, v in peer.state_dict().items()}

    def layers(name):
        return np.stack(
            [theirs[f"model.layers.{i}.{name}.weight"] for i in range(c.layers)]
        )

    def transposed(name, *shape):
        return layers(name).swapaxes(1, 2).reshape(c.layers, *shape)

    query = (c.width, c.heads, c.head_dim)
    key = (c.width, c.kv_heads, c.head_dim)
    body = {
        "embed": theirs["model.embed_tokens.weight"],
        "norm/scale": theirs["model.norm.weight"],
        "layers/attention_norm/scale": layers("input_layernorm"),
        "layers/ff_norm/scale": layers("post_attention_layernorm"),
        "layers/attention/query": transposed("self_attn.q_proj", *query),
        "layers/attention/key": transposed("self_attn.k_proj", *key),
        "layers/attention/value": transposed("self_attn.v_proj", *key),
        "layers/attention/out": transposed(
            "self_attn.o_proj", c.heads, c.head_dim, c.width
        ),
        "layers/ff/gate": transposed("mlp.gate_proj", c.width, c.ff_width),
        "layers/ff/up": transposed("mlp.up_proj", c.width, c.ff_width),
        "layers/ff/down": transposed("mlp.down_proj", c.ff_width, c.width),
    }
    if c.qk_norm:
        body["layers/attention/query_norm/scale"] = layers("self_attn.q_norm")
        body["layers/attention/key_norm/scale"] = layers("self_attn.k_norm")
    if "score.weight" in theirs:
        bias = theirs.get("score.bias", np.zeros(1, np.float32))
        return {f"body/{k}": v for k, v in body.items()} | {
            "head": theirs["score.weight"][0],
            "bias": bias[0],
        }
    if not c.tied:
        body["unembed"] = theirs["lm_head.weight"]
    return body


def convert(peer, c):
    """A `Transformer` or `ScalarModel` with the peer's weights."""
    ours = weights(peer, c)

    def make(key):
        body = Transformer(c, key)
        return ScalarModel(body, key) if "head" in ours else body

    abstract = jax.eval_shape(make, jax.random.key(0))
    assert ours.keys() == tree.named(abstract).keys()
    # Copied: torch goes on writing into the memory these came from.
    return tree.map_names(lambda name, leaf: jnp.array(ours[name]), abstract)


# Tokens


def tokenizer(c=CONFIG):
    """A tokenizer of one word a token: the word of id 7 is "w7"."""
    import tokenizers

    words = {"<pad>": PAD, "<unk>": UNKNOWN, "<end>": END}
    words |= {f"w{i}": i for i in range(FIRST_WORD, c.vocab_size)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    inner.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<end>",
    )


def words(rng, low, high, c=CONFIG):
    """Ids of low to high (inclusive) random words, as a list."""
    count = rng.integers(low, high + 1)
    return rng.integers(FIRST_WORD, c.vocab_size, count).tolist()


def spelled(ids):
    """The text that `tokenizer` reads as these ids, with a space before each."""
    return "".join(f" w{i}" for i in ids)


def padded(x, length, value=0):
    """[..., t] as [..., length], filled on the right: one program serves all."""
    x = np.asarray(x)
    assert x.shape[-1] <= length
    width = [(0, 0)] * (x.ndim - 1) + [(0, length - x.shape[-1])]
    return np.pad(x, width, constant_values=value)


def rows(ids, seen, trained, length):
    """A batch as our stages take it, from a peer's right-padded one.

    Args:
        ids: int[..., t] tokens.
        seen: int or bool[..., t], the attention mask.
        trained: int or bool[..., t], True on tokens of the completion.
        length: T to pad to.

    Returns:
        ids, segments, positions i32[..., T], mask bool[..., T].
    """
    seen = padded(np.asarray(seen).astype(np.int32), length)
    return {
        "ids": padded(np.asarray(ids).astype(np.int32), length),
        "mask": padded(np.asarray(trained).astype(bool), length, False),
        "segments": seen,
        "positions": ((seen.cumsum(-1) - 1) * seen).astype(np.int32),
    }


def pairs(batch, length):
    """Our batch of pairs from TRL's: all chosen first, then all rejected."""
    ids, seen = batch["input_ids"].numpy(), batch["attention_mask"].numpy()
    trained = batch.get("completion_mask", batch["attention_mask"]).numpy()
    half = len(ids) // 2
    paired = [np.stack([x[:half], x[half:]], 1) for x in (ids, seen, trained)]
    return rows(*paired, length)


# Their trainer


def recording(trainer_class):
    """The trainer, keeping what each training step was given and what it returned."""

    class Recording(trainer_class):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.remove_callback(transformers.PrinterCallback)

        def training_step(self, model, inputs, *args, **kwargs):
            if not hasattr(self, "batches"):
                self.batches, self.losses = [], []
            self.batches.append(_copied(inputs))
            loss = super().training_step(model, inputs, *args, **kwargs)
            self.losses.append(loss.item())
            return loss

    Recording.__name__ = trainer_class.__name__  # names its output and its model card
    return Recording


def _copied(x):
    if hasattr(x, "items"):
        return {k: _copied(v) for k, v in x.items()}
    return x.detach().clone() if isinstance(x, torch.Tensor) else x


def arguments(config_class, folder, optimizer=None, *, rows, steps=STEPS, **changes):
    """A TRL config: plain float32, constant learning rate, data in its order.

    Args:
        config_class: such as `trl.DPOConfig`.
        folder: where the trainer may write.
        optimizer: `SGD` or `ADAMW`, the same dict that our stage gets.
        rows: examples a micro-batch.
        steps: optimizer steps.
        **changes: further settings.
    """
    o = SGD if optimizer is None else optimizer
    settings = dict(
        output_dir=str(folder),
        per_device_train_batch_size=rows,
        max_steps=steps,
        learning_rate=o["lr"],
        lr_scheduler_type="constant",
        warmup_steps=0,
        max_grad_norm=0.0,  # off
        weight_decay=o["weight_decay"],
        optim={"sgd": "sgd", "adamw": "adamw_torch"}[o["name"]],
        train_sampling_strategy="sequential",
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    if o["name"] == "adamw":
        settings |= dict(adam_beta1=o["b1"], adam_beta2=o["b2"], adam_epsilon=o["eps"])
    return config_class(**settings | changes)


# Our stage


def config(kind, optimizer=None, **changes):
    """The config of one of our stages, to run beside `arguments`."""
    o = dict(schedule="constant", warmup_steps=0, clip_norm=0.0)
    o |= SGD if optimizer is None else optimizer
    return defaults.stage(kind, **dict(optimizer=o, steps=STEPS) | changes)


def single():
    """A mesh of one device."""
    return sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])


def train(make, batches, model=None):
    """Runs a stage's own prepare and update over raw batches, from its own init.

    Args:
        make: (mesh) -> `Stage`.
        batches: raw batches in order.
        model: parameters to start from instead of those `init` makes.

    Returns:
        the losses; the metrics of each step; the final parameters, {name: array}.
    """
    shared = single()
    with jax.set_mesh(shared):
        made = make(shared)
        state = made.init(jax.random.key(0))
        if model is not None:
            like = jax.tree.map(lambda x: x.sharding, state.model)
            state = state._replace(model=jax.device_put(model, like))
        told = []
        for step, raw in enumerate(batches):
            batch = made.prepare(state, raw, jax.random.key(step))
            state, metrics = made.update(state, batch)
            told.append({k: float(v) for k, v in metrics.items()})
        final = {k: np.asarray(v) for k, v in tree.named(state.model).items()}
    return [m["loss"] for m in told], told, final


def assert_losses(ours, theirs, tolerance=1e-4):
    """Every step's loss is the peer's, and it is the weights that moved it."""
    assert len(ours) == len(theirs) == STEPS
    np.testing.assert_allclose(ours, theirs, atol=tolerance, rtol=0)
    # The same batch again, an epoch later: equal because nothing moves is no proof.
    moved = np.abs(np.subtract(theirs[BATCHES:], theirs[:-BATCHES]))
    assert moved.mean() > 30 * tolerance


def assert_weights(ours, peer, c, start, tolerance=1e-4, ignore=()):
    """Every parameter ends where the peer's does.

    Args:
        ours: {name: array} from `train`.
        peer: the trained peer.
        c: the `ModelConfig`.
        start: {name: array}, `weights` of the peer before training.
        tolerance: on the absolute difference.
        ignore: names of parameters that only one side has.
    """
    theirs = weights(peer, c)
    for name in theirs.keys() - set(ignore):
        np.testing.assert_allclose(
            ours[name], theirs[name], atol=tolerance, rtol=0, err_msg=name
        )
    moved = {name: np.abs(theirs[name] - start[name]).max() for name in theirs}
    assert max(moved.values()) > 30 * tolerance, moved


def assert_metrics(ours, trainer, keys, tolerance=1e-4):
    """The metrics of every step agree with those the peer logged, by its names."""
    logs = [log for log in trainer.state.log_history if "train_runtime" not in log]
    assert len(logs) == len(ours)
    for key in keys:
        theirs = [log[key] for log in logs]
        found = [metrics[key] for metrics in ours]
        np.testing.assert_allclose(
            found, theirs, atol=tolerance, rtol=1e-5, err_msg=key
        )
