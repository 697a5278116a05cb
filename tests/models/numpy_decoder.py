"""The decoder again, in plain numpy: one document, one head, one token at a time.

Written from the papers' formulas and the fields' meaning, in float64, without a thought
for speed. It shares nothing with the package but the names of parameters.
"""

import math

import numpy as np

from stagecraft import tree

erf = np.vectorize(math.erf)


def logits(model, ids):
    """One document, i32[T] -> [T, V]."""
    c = model.config
    p = {k: np.asarray(v, np.float64) for k, v in tree.named(model).items()}
    x = p["embed"][ids] * c.embed_scale
    if c.positions == "learned":
        x = x + p["positions"][: len(ids)]
    taken = {"dense": 0, "sparse": 0}
    sparse = [c.experts > 0 and yes(c.sparse, i) for i in range(c.layers)]
    for i in range(c.layers):
        own = "sparse" if sparse[i] else "dense"
        prefix = f"layers/{own}/" if len(set(sparse)) == 2 else "layers/"
        w = {
            k.removeprefix(prefix): v[taken[own]]
            for k, v in p.items()
            if k.startswith(prefix)
        }
        taken[own] += 1
        x = block(c, w, x, i, sparse[i])
    x = norm(c, p, "norm", x)
    out = x @ (p["embed"] if c.tied else p["unembed"]).T
    return capped(out, c.logit_softcap)


def block(c, w, x, i, sparse):
    y = norm(c, w, "attention_norm", x) if c.norm_place != "post" else x
    y = attention(c, w, y, i)
    x = x + (norm(c, w, "attention_post_norm", y) if c.norm_place != "pre" else y)
    y = norm(c, w, "ff_norm", x) if c.norm_place != "post" else x
    y = experts(c, w, y) if sparse else feed_forward(c, w, y)
    return x + (norm(c, w, "ff_post_norm", y) if c.norm_place != "pre" else y)


def norm(c, w, name, x):
    if c.norm == "layer":
        x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps)
    x = x * (c.norm_offset + w[f"{name}/scale"])
    return x + w[f"{name}/bias"] if c.norm == "layer" else x


def rms(c, x, scale):
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps)
    return x * (c.norm_offset + scale)


def attention(c, w, x, i):
    t = len(x)
    heads = {"query": c.heads, "key": c.kv_heads, "value": c.kv_heads}
    made = {}
    for name, count in heads.items():
        y = np.stack([x @ w[f"attention/{name}"][:, h] for h in range(count)], 1)
        if c.qkv_bias:
            y = y + w[f"attention/{name}_bias"]
        if c.qk_norm and name != "value":
            scale = w[f"attention/{name}_norm/scale"]
            if c.qk_norm_over == "head":
                y = rms(c, y, scale)
            else:
                y = rms(c, y.reshape(t, -1), scale).reshape(y.shape)
        made[name] = y
    slides = c.window > 0 and yes(c.sliding, i)
    if c.positions == "rope" and yes(c.rotates, i):
        for name in ("query", "key"):
            made[name] = rotate(c, made[name], slides)
    out = np.zeros_like(x)
    scale = c.attention_scale or 1 / np.sqrt(c.head_dim)
    for h in range(c.heads):
        k = h // (c.heads // c.kv_heads)
        for row in range(t):
            first = max(0, row + 1 - c.window) if slides else 0
            scores = made["key"][first : row + 1, k] @ made["query"][row, h] * scale
            scores = capped(scores, c.attention_softcap)
            seen = np.exp(scores - scores.max())
            mixed = (seen / seen.sum()) @ made["value"][first : row + 1, k]
            out[row] += mixed @ w["attention/out"][h]
    return out + w["attention/out_bias"] if c.out_bias else out


def rotate(c, x, slides):
    turning = int(c.head_dim * c.rope_share)
    half, out = turning // 2, x.copy()
    for position in range(len(x)):
        for i in range(half):
            speed, size = frequency(c, i, turning, len(x), slides)
            cos, sin = size * np.cos(position * speed), size * np.sin(position * speed)
            a, b = x[position, :, i], x[position, :, i + half]
            out[position, :, i] = a * cos - b * sin
            out[position, :, i + half] = b * cos + a * sin
    return out


def frequency(c, i, turning, length, slides):
    """Radians a position of pair i, and what the rotated pair is multiplied by."""
    if slides and c.rope_theta_sliding:
        return c.rope_theta_sliding ** (-2 * i / turning), 1.0
    plain, a = c.rope_theta ** (-2 * i / turning), c.rope_arguments
    if c.rope_scaling == "none":
        return plain, 1.0
    if c.rope_scaling == "linear":
        return plain / a[0], 1.0
    if c.rope_scaling == "dynamic":
        factor, original = a
        growth = factor * max(length, original) / original - (factor - 1)
        theta = c.rope_theta * growth ** (turning / (turning - 2))
        return theta ** (-2 * i / turning), 1.0
    if c.rope_scaling == "llama3":
        factor, low, high, original = a
        wave = 2 * np.pi / plain
        if wave < original / high:
            return plain, 1.0
        if wave > original / low:
            return plain / factor, 1.0
        smooth = (original / wave - low) / (high - low)
        return (1 - smooth) * plain / factor + smooth * plain, 1.0
    if c.rope_scaling == "longrope":
        short, long, original, size = a
        return plain / (long if length > original else short)[i], size
    factor, original, fast, slow, size, truncate = a  # yarn
    ends = []
    for turns in (fast, slow):
        wave = original / turns  # tokens a turn
        ends.append(turning * np.log(wave / (2 * np.pi)) / (2 * np.log(c.rope_theta)))
    if truncate:
        ends = np.floor(ends[0]), np.ceil(ends[1])
    low, high = max(ends[0], 0), min(ends[1], turning - 1)
    ramp = min(max((i - low) / (high - low), 0), 1)
    return plain * (1 - ramp) + plain / factor * ramp, size


def feed_forward(c, w, x):
    up = x @ w["ff/up"]
    if c.ff_bias:
        up = up + w["ff/up_bias"]
    if c.gated:
        gate = x @ w["ff/gate"]
        gate = gate + w["ff/gate_bias"] if c.ff_bias else gate
        inner = activate(c, gate) * up
    else:
        inner = activate(c, up)
    out = inner @ w["ff/down"]
    return out + w["ff/down_bias"] if c.ff_bias else out


def experts(c, w, x):
    out = np.zeros_like(x)
    for row, y in enumerate(x):
        scores = np.exp(y @ w["experts/router"])
        scores = scores / scores.sum()
        chosen = np.argsort(-scores)[: c.experts_per_token]
        total = scores[chosen].sum() if c.experts_renormalize else 1.0
        for e in chosen:
            inner = activate(c, y @ w["experts/gate"][e]) * (y @ w["experts/up"][e])
            out[row] += scores[e] / total * (inner @ w["experts/down"][e])
    return out


def activate(c, x):
    if c.activation == "silu":
        return x / (1 + np.exp(-x))
    if c.activation == "relu":
        return np.maximum(x, 0)
    if c.activation == "gelu":
        return x * (1 + erf(x / np.sqrt(2))) / 2
    cube = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    return x * (1 + np.tanh(cube)) / 2


def capped(x, cap):
    return cap * np.tanh(x / cap) if cap else x


def yes(pattern, layer):
    return bool(pattern[layer % len(pattern)]) if pattern else True
