"""Mistakes below and around the stages: text, model, sampler, optimizer."""

from tests.mutants.mutant import in_file

_CHAT = in_file(
    "stagecraft/text/chat.py",
    "tests/text/chat_test.py",
    (
        "EOS dropped",
        "            ids.append(tokenizer.end)\n            mask.append(learned)\n",
        "            pass\n",
    ),
    (
        "EOS not learned",
        "            mask.append(learned)\n",
        "            mask.append(False)\n",
    ),
    (
        "documents without an end",
        "tokenizer.encode(text), tokenizer.eos]",
        "tokenizer.encode(text)]",
    ),
    (
        "BOS doubled",
        "ids, mask = [tokenizer.bos], [False]",
        "ids, mask = [tokenizer.bos] * 2, [False] * 2",
    ),
    (
        "BOS before a prompt's answer",
        "tools)[0], tokenizer.assistant]",
        "tools)[0], tokenizer.assistant, tokenizer.bos]",
    ),
    ("every turn is learned", '(turns == "all" or number == last)', "True"),
    ("turns of weight 0 are learned", 'message.get("weight", 1) != 0', "True"),
    (
        "the user's turns are learned",
        'message["role"] == "assistant"\n        learned',
        'message["role"] != "system"\n        learned',
    ),
    ("an answer that was cut off ends", 'message.get("ended", True)', "True"),
)

_TOKENIZER = in_file(
    "stagecraft/text/tokenizer.py",
    "tests/text/tokenizer_test.py",
    (
        "pad is eos",
        'self.pad, self.bos, self.eos = piece("<pad>"), piece("<s>"), piece("</s>")',
        'self.pad, self.bos, self.eos = piece("</s>"), piece("<s>"), piece("</s>")',
    ),
)

_HUGGING_FACE = in_file(
    "stagecraft/text/tokenizer_json.py",
    "tests/text/tokenizer_json_test.py",
    ("pad as the folder says", "and named_pad not in taken", ""),
    ("stops at eos alone", "dict.fromkeys([*turn, *stops, self.eos])", "[self.eos]"),
    ("stops without the template's", "[*turn, *stops, self.eos]", "[*stops, self.eos]"),
    ("one stop of several", "return found\n        return []", "return found[:1]"),
    ("BOS always", "dressed[0] if put else None", "dressed[0]"),
    (
        "messages forge control tokens",
        "lambda text: self._pattern.sub(lambda m: hidden[m[0]], text)",
        "lambda text: text",
    ),
    (
        "documents forge control tokens",
        "ids = self._literal.encode(text, add",
        "ids = self._inner.encode(text, add",
    ),
    ("decodes control tokens", "if int(i) not in self._control", ""),
    ("places are trimmed", '{"post_processor": None}', "{}"),
    ("a config's tokens are not added", "        add([token])\n", ""),
    (
        "templates of a config go first",
        "return apart or sources",
        "return sources or apart",
    ),
)

_TEMPLATE = in_file(
    "stagecraft/text/template.py",
    "tests/text/template_test.py",
    (
        "messages with what is none",
        "if v is not None and k not in OWN",
        "if k not in OWN",
    ),
    ("our own keys are shown", "if v is not None and k not in OWN", "if v is not None"),
    ("prefixes need not agree", "text.startswith(through)", "True"),
    ("an answer's prompt is learned", "spans.append((len(before),", "spans.append((0,"),
    ("blocks may change the text", "plain == text)", "True)"),
    ("a template's every turn is learned", "if i == speaks[-1]]", "]"),
    ("weights are not seen", "if learned == speaks:", "if True:"),
    ("cut answers end", "text = _cut(stopped[0], marks[0])", "text = plain"),
)

_SANDBOX = in_file(
    "stagecraft/text/sandbox.py",
    "tests/text/template_test.py",
    ("attributes are silent", "raise jinja2.sandbox.SecurityError(\n", "return str(\n"),
    ("JSON for html", 'self.filters["tojson"] = _to_json', "pass"),
    ("lines are not trimmed", "trim_blocks=True", "trim_blocks=False"),
)

_COMPARISONS = in_file(
    "stagecraft/signals/comparisons.py",
    "tests/signals tests/run_test.py",
    (
        "the rater's word turned round",
        '"chosen": two[better][0]',
        '"chosen": two[1 - better][0]',
    ),
    (
        "soft labels of the worse one",
        "(int(m > 0), 1 / (1 + math.exp(-abs(m))))",
        "(int(m > 0), 1 / (1 + math.exp(abs(m))))",
    ),
)

_SELECTION = in_file(
    "stagecraft/signals/selection.py",
    "tests/signals",
    ("the worst of n", "return [max(fit, key=scored", "return [min(fit, key=scored"),
    ("answers that were cut off are kept", "if answers[r][1] and math", "if math"),
)

_VERIFIER = in_file(
    "stagecraft/signals/verifier.py",
    "tests/signals",
    (
        "a verifier's NaN is a 0",
        "return value if math.isfinite(value) else math.nan",
        "return value if math.isfinite(value) else 0.0",
    ),
    ("verifiers see the end token", "row[:-1] if end else row", "row"),
)

_MODEL = in_file(
    "stagecraft/models/attention.py",
    "tests/models/transformer_test.py",
    (
        "attention across documents",
        "visible = segments[:, rows, None] == segments[:, None, seen]",
        "visible = segments[:, rows, None] > 0",
    ),
    (
        "attention sees what comes",
        "index[rows, None] >= index[None, seen]",
        "index[rows, None] >= index[None, seen] - 1",
    ),
)

_SCORES = in_file(
    "stagecraft/models/scores.py",
    "tests/stages/pairs_test.py tests/models/language_test.py",
    (
        "score read one token early",
        "last = length - 1 - jnp.argmax",
        "last = length - 2 - jnp.argmax",
    ),
    (
        "score read in the last column",
        "jnp.where(mask.any(-1), last, 0)",
        "jnp.full_like(last, length - 1)",
    ),
)

_HEADS = in_file(
    "stagecraft/models/heads.py",
    "tests/models/heads_test.py",
    ("log-normaliser less its maximum", "log_z=lse + top / temperature", "log_z=lse"),
    (
        "entropy without the maximum",
        "entropy=held(lse) - expected",
        "entropy=-expected",
    ),
)

_SAMPLING = in_file(
    "stagecraft/models/sampling.py",
    "tests/models/sampling_test.py",
    (
        "the stop token is masked out",
        "mask=_write(sample.mask, step, live)",
        "mask=_write(sample.mask, step, live & ~ended)",
    ),
    (
        "temperature multiplies",
        "logits = logits if greedy else logits / temperature",
        "logits = logits if greedy else logits * temperature",
    ),
    (
        "stops at the wrong token",
        "jnp.array(drawing.stop_ids, jnp",
        "1 + jnp.array(drawing.stop_ids, jnp",
    ),
    ("stops at the first id alone", "now.any(axis=1)", "now[:, :1].any(axis=1)"),
)

_RUN = in_file(
    "stagecraft/run.py",
    "tests/mutation_gaps_test.py tests/run_test.py",
    (
        "missing EOS on the document's end",
        'extra["stop_ids"] = tokenizer.stops',
        'extra["stop_ids"] = (tokenizer.eos,)',
    ),
)

_MASKED = in_file(
    "stagecraft/masked.py",
    "tests/masked_test.py",
    (
        "means count padding",
        "return total / jnp.maximum(count(mask, axis), 1.0)",
        "return total / jnp.maximum(count(mask == mask, axis), 1.0)",
    ),
    (
        "merged means of means",
        "return Mean(self.total + other.total, self.count + other.count)",
        "return Mean((self.compute() + other.compute()) / 2, 1 + 0 * self.count)",
    ),
    (
        "NaN times zero",
        "return jnp.where(mask, x, jnp.zeros_like(x))",
        "return x * mask.astype(x.dtype)",
    ),
)

_OPTIMIZER = in_file(
    "stagecraft/optim.py",
    "tests/optim",
    ("norms and biases decay", "mask=decayed)", "mask=None)"),
    (
        "EMA decay swapped",
        "optax.incremental_update(params, average, 1.0 - decay)",
        "optax.incremental_update(params, average, decay)",
    ),
    ("ascends", "-rate * x).astype", "rate * x).astype"),
    ("parts at one learning rate", "(-rate * factor * x)", "(-rate * x)"),
    ("warm-up starts at 0", "ramp = (step + 1).astype", "ramp = step.astype"),
)

_TRAIN = in_file(
    "stagecraft/train.py",
    "tests/stages/preference_test.py tests/run_test.py",
    (
        "the average is never deployed",
        'state.extra.get("ema", state.model)',
        "state.model",
    ),
)

MUTANTS = (
    *(_CHAT + _TOKENIZER + _HUGGING_FACE + _TEMPLATE + _SANDBOX),
    *(_COMPARISONS + _SELECTION + _VERIFIER + _MODEL + _SCORES + _HEADS + _SAMPLING),
    *(_RUN + _MASKED + _OPTIMIZER + _TRAIN),
)
