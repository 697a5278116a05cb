"""Mutants of what goes in: chats, tokenizers, templates, records, raters, verifiers."""

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
        "if ids[-1:] != [tokenizer.eos]:",
        "if False:",
        dict(within="document"),
    ),
    (
        "BOS doubled",
        "ids, mask = [tokenizer.bos], [False]",
        "ids, mask = [tokenizer.bos] * 2, [False] * 2",
    ),
    (
        "BOS before a prompt's answer",
        '[*_pieces(messages, tokenizer, "all", tools)[0], tokenizer.assistant]',
        '[*_pieces(messages, tokenizer, "all", tools)[0], tokenizer.assistant, '
        "tokenizer.bos]",
    ),
    ("every turn is learned", '(turns == "all" or number == last)', "True"),
    ("turns of weight 0 are learned", 'message.get("weight", 1) != 0', "True"),
    (
        "the user's turns are learned",
        'spoken = message["role"] == "assistant"',
        'spoken = message["role"] != "system"',
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
    (
        "pad as the folder says",
        "named_pad is not None and named_pad not in taken",
        "named_pad is not None",
    ),
    ("stops at eos alone", "dict.fromkeys([*turn, *stops, self.eos])", "[self.eos]"),
    ("stops without the template's", "[*turn, *stops, self.eos]", "[*stops, self.eos]"),
    (
        "one stop of several",
        "return found",
        "return found[:1]",
        dict(within="_generation_stops"),
    ),
    ("BOS always", "dressed[0] if put else None", "dressed[0]"),
    (
        "messages forge control tokens",
        "lambda text: self._pattern.sub(lambda m: hidden[m[0]], text)",
        "lambda text: text",
    ),
    (
        "documents forge control tokens",
        "ids = self._literal.encode(text, add_special_tokens=False).ids",
        "ids = self._inner.encode(text, add_special_tokens=False).ids",
    ),
    (
        "decodes control tokens",
        "[int(i) for i in ids if int(i) not in self._control]",
        "[int(i) for i in ids]",
    ),
    (
        "places are trimmed",
        "inner.post_processor = tokenizers.processors.Sequence([])",
        "pass",
    ),
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
        "{k: v for k, v in message.items() if v is not None and k not in OWN}",
        "{k: v for k, v in message.items() if k not in OWN}",
    ),
    (
        "our own keys are shown",
        "{k: v for k, v in message.items() if v is not None and k not in OWN}",
        "{k: v for k, v in message.items() if v is not None}",
    ),
    ("prefixes need not agree", "text.startswith(through)", "True"),
    (
        "an answer's prompt is learned",
        "spans.append((len(before), len(through)))",
        "spans.append((0, len(through)))",
    ),
    (
        "blocks may change the text",
        "not (_begins(plain, text) if cut else plain == text)",
        "not (_begins(plain, text) if cut else True)",
    ),
    (
        "a template's every turn is learned",
        "[i for i in learned if i == speaks[-1]]",
        "[i for i in learned]",
    ),
    ("weights are not seen", "if learned == speaks:", "if True:"),
    ("cut answers end", "text = _cut(rest.pop(0), marks[0])", "rest.pop(0)"),
)

_SANDBOX = in_file(
    "stagecraft/text/sandbox.py",
    "tests/text/template_test.py",
    (
        "attributes are silent",
        "raise jinja2.sandbox.SecurityError(\n"
        '    f"reaches for {attribute!r} of a {type(obj).__name__}"\n'
        ")",
        'return str(\n    f"reaches for {attribute!r} of a {type(obj).__name__}"\n)',
    ),
    ("JSON for html", 'self.filters["tojson"] = _to_json', "pass"),
    ("lines are not trimmed", "trim_blocks=True", "trim_blocks=False"),
)

_COMPARISONS = in_file(
    "stagecraft/stages/comparisons.py",
    "tests/stages/comparisons_test.py",
    (
        "the rater's verdict turned round",
        "pair if first else pair[::-1]",
        "pair[::-1] if first else pair",
    ),
    (
        "soft labels of the worse one",
        "max(probability, 1 - probability)",
        "min(probability, 1 - probability)",
    ),
    ("identical answers are pairs", "if protocol.same_text(pair):", "if False:"),
)

_RECORDS = in_file(
    "stagecraft/stages/records.py",
    "tests/stages/records_test.py",
    (
        "the journal's header is not written first",
        "if first is None:\n    self.append(header)",
        "self._header = header",
        "tests/stages/records_test.py -k on_disk",
    ),
    (
        "a journal is not replayed",
        "collections.deque(rest)",
        "collections.deque()",
    ),
    (
        "a replayed entry is made again",
        "return self._replay.popleft(), True",
        "make(*args)\nreturn self._replay.popleft(), True",
    ),
    (
        "answers are asked again after a replay",
        "return self._replay.popleft(), True",
        "self._replay.popleft()\nreturn make(*args), True",
    ),
    (
        "a rater's noise starts again",
        'rng.bit_generator.state = rated["rng"]',
        "pass",
    ),
    (
        "any journal will do",
        "if first is not None and (change := schema.difference(first, header)):",
        "if 0 and (change := schema.difference(first, header)):",
    ),
) + in_file(
    "stagecraft/storage.py",
    "tests/stages/records_test.py",
    ("a torn line stays", "self._file.truncate(self._end)", "pass"),
    ("entries are not synced", "os.fsync(self._file.fileno())", "pass"),
    (
        "entries are synced before they are flushed",
        "self._file.flush()\nos.fsync(self._file.fileno())",
        "os.fsync(self._file.fileno())\nself._file.flush()",
        "tests/stages/records_test.py -k on_disk",
    ),
)

_RATERS = in_file(
    "stagecraft/signals/reward.py",
    "tests/signals/reward_test.py",
    (
        "a reward model prefers the worse one",
        "1 - better if margin > 0 else better",
        "1 - better if margin < 0 else better",
    ),
    ("a NaN is a tie", "if not math.isfinite(margin):", "if False:"),
)

_SELECTION = in_file(
    "stagecraft/stages/selection.py",
    "tests/stages/selection_test.py",
    (
        "the worst of n",
        "max(fit, key=scores.__getitem__)",
        "min(fit, key=scores.__getitem__)",
    ),
    ("answers that were cut off are kept", "if not ended:", "if False:"),
)

_VERIFIERS = in_file(
    "stagecraft/signals/verifiers.py",
    "tests/signals",
    (
        "a verifier's NaN is a 0",
        "return reward if math.isfinite(reward) else FAILED",
        "return reward if math.isfinite(reward) else 0.0",
    ),
    (
        "a failure is no task",
        "ABSTAINED, FAILED = math.nan, math.inf",
        "ABSTAINED, FAILED = math.nan, math.nan",
    ),
    (
        "reward weights ignored",
        "weighted = finite * xp.asarray(weights, dtype=rewards.dtype)",
        "weighted = 1.0 * finite",
    ),
    (
        "one failure is made up for",
        "~xp.isinf(rewards).any(axis=1)",
        "~xp.isinf(rewards).all(axis=1)",
    ),
    ("every source must pay", "~abstained.all(axis=1)", "~abstained.any(axis=1)"),
    (
        "verifiers are given texts for messages",
        'text if isinstance(prompt, str) else [dict(role="assistant", content=text)]',
        "text",
    ),
    (
        "a run of failures goes on",
        "errors and len(errors) == len(rewards) and not self._scored",
        "errors and len(errors) == len(rewards) and self._scored",
    ),
    ("verifiers see the end token", "row[:-1] if end else row", "row"),
)

MUTANTS = (
    *_CHAT,
    *_TOKENIZER,
    *_HUGGING_FACE,
    *_TEMPLATE,
    *_SANDBOX,
    *_COMPARISONS,
    *_RECORDS,
    *_RATERS,
    *_SELECTION,
    *_VERIFIERS,
)
