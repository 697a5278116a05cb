"""Mistakes in the decoder's parts that set the families apart."""

from tests.mutants.mutant import in_file

_ATTENTION = in_file(
    "stagecraft/models/attention.py",
    "tests/models/attention_test.py tests/models/families_test.py",
    (
        "a window one token wider",
        "index[rows, None] - index[None, seen] < window",
        "index[rows, None] - index[None, seen] <= window",
    ),
)

_BLOCKWISE = in_file(
    "stagecraft/models/blockwise.py",
    "tests/models/attention_test.py",
    (
        "the gradient forgets the soft-cap",
        "weights * (d_weights - own[..., None]) * slope * scale",
        "weights * (d_weights - own[..., None]) * scale",
    ),
    (
        "a block of keys too few under a window",
        "jnp.maximum(begin - (window - 1), 0) // block",
        "jnp.maximum(begin - (window - 1), 0) // block + 1",
    ),
)

_FAMILIES = (
    *in_file(
        "stagecraft/models/rope.py",
        "tests/models/families_test.py",
        (
            "linear scaling multiplies",
            "theta**-exponents / factor\n",
            "theta**-exponents * factor\n",
        ),
        (
            "longrope's long factors for all",
            "jnp.where(lengths > original_length, long, short)",
            "long",
        ),
        (
            "yarn's attention factor on the sines alone",
            "jnp.cos(turns) * factor, jnp.sin(turns) * factor",
            "jnp.cos(turns), jnp.sin(turns) * factor",
        ),
    ),
    *in_file(
        "stagecraft/models/norms.py",
        "tests/models/families_test.py",
        (
            "a norm's offset left out",
            "return norm.offset + scale if norm.offset else scale",
            "return scale",
        ),
    ),
    *in_file(
        "stagecraft/models/transformer.py",
        "tests/models/families_test.py",
        (
            "embeddings not scaled",
            "if self.config.embed_scale != 1:",
            "if self.config.embed_scale == 1:",
        ),
        (
            "all layers rotate",
            "made[own] if kind.rotates else None",
            "made[own]",
        ),
        (
            "sliding layers with the others' base",
            "spec.window > 0 and self.config.rope_theta_sliding > 0",
            "False",
        ),
        (
            "logits without their cap",
            "return linear.softcap(logits, self.config.logit_softcap)",
            "return logits",
        ),
    ),
    *in_file(
        "stagecraft/models/sampling.py",
        "tests/models/families_test.py",
        (
            "a cached window one slot wider",
            "slot[..., None] - slots < spec.window",
            "slot[..., None] - slots <= spec.window",
        ),
    ),
    *in_file(
        "stagecraft/models/experts.py",
        "tests/models/experts_test.py tests/models/families_test.py",
        ("shares always renormalised", "if self.renormalize:", "if True:"),
        (
            "padding counts in the balance",
            "jnp.where(real[..., None], each, 0)",
            "each",
        ),
        (
            "each micro-batch has a load of its own",
            "if share is None:",
            "if True:",
            "tests/stages/balance_test.py",
        ),
        (
            "blocks too few for the worst case",
            "blocks = opened + (copies - opened) // block",
            "blocks = -(-copies // block)",
        ),
    ),
)

_SPELLING = (
    *in_file(
        "stagecraft/models/translation_rope.py",
        "tests/models/huggingface_test.py tests/models/folder_refusals_test.py",
        (
            "the share of rotating channels is always the family's own",
            "float(_once(SHARE, places) or share)",
            "float(share)",
        ),
        (
            "a share that the family does not heed is passed over",
            "if key != share_key and value != 1.0:",
            "if False:",
        ),
    ),
    *in_file(
        "stagecraft/models/translation.py",
        "tests/models/huggingface_test.py",
        (
            "heads that do not fill the width leave as if they did",
            'named or hf["hidden_size"] // count',
            'hf.get("head_dim") or hf["hidden_size"] // count',
        ),
        (
            "a size of heads is written where no reader heeds it",
            'return out if fill_width else out | {"head_dim": c.head_dim}',
            'return out | {"head_dim": c.head_dim}',
        ),
    ),
    *in_file(
        "stagecraft/models/config.py",
        "tests/models/families_test.py",
        (
            "dynamic scaling of two channels divides by zero",
            'self.rope_scaling == "dynamic" and self.rotary_channels == 2',
            "False",
        ),
    ),
)

MUTANTS = _SPELLING + _ATTENTION + _BLOCKWISE + _FAMILIES
