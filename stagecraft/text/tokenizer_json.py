"""Hugging Face tokenizers, read with the `tokenizers` library alone.

tokenizer.json says how text is cut into ids; the files beside it say which tokens begin
and end a text, which end an assistant's turn, and how a conversation is written.

No text can forge a control token: where a document or a message spells one, it is
encoded by a second tokenizer, whose control tokens have other spellings. Text that
spells none gets the very ids that transformers gives it.
"""

import collections
import copy
import datetime
import functools
import hashlib
import itertools
import json
import re
from pathlib import Path

from stagecraft.errors import UserError, install
from stagecraft.text.template import Refusal, Template, replaced, texts, unused

MAIN = "tokenizer.json"
# Kept by a run whose chat template reads the clock: what it reads there.
MOMENT = "chat_moment.txt"
# Files that may lie beside it. config.json matters where nothing else names the end.
BESIDE = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    MOMENT,
)
NAMED = "additional_chat_templates"
# Ends of a text, for a tokenizer.json that comes alone.
ENDS = ("</s>", "<|endoftext|>", "<eos>", "<|end_of_text|>", "<｜end▁of▁sentence｜>")
# Names of tokens that nothing else uses, the best first.
SPARE = ("pad", "unused", "reserved", "dummy", "placeholder")
# The private plane whose characters spell control tokens in the second tokenizer.
ALIASES = 0xF0000


class HuggingFaceTokenizer:
    """A Hugging Face tokenizer: text to ids and back.

    Args:
        files: {name: bytes} of a folder, `MAIN` among them.
        where: what to call it in messages.

    Attributes:
        bos: the id that begins a text, None where the tokenizer puts none.
        named_bos: the id the folder calls bos, whether texts begin with it; or None.
        eos: the id that ends a text.
        pad: an id that is neither, nor ends a turn, whatever the folder says.
        stops: ids that end an assistant's turn: those of generation_config, eos, and
            the one its chat template writes.
        control_ids: the other ids that plain text never holds.
        template: a `Template`, or None.
        files: as given, with the moment that a template reads on the clock.
    """

    # A turn is written by a template, if at all.
    system = user = assistant = end = None

    def __init__(self, files, where):
        self.files, self._where = files, where
        config = _read(files, "tokenizer_config.json", where)
        config = _read(files, "special_tokens_map.json", where) | config
        self._inner, content, processed = _open(files[MAIN], config, where)
        self._ids = self._inner.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._ids.values()) + 1
        added = {t["content"]: t["id"] for t in content["added_tokens"]}
        special = {t["content"] for t in content["added_tokens"] if t["special"]}
        named = {k: _content(v) for k, v in config.items() if k.endswith("_token")}
        named = {k: v for k, v in named.items() if isinstance(v, str)}
        stops = self._generation_stops()
        self.eos = self._end(named, stops, added)
        self.bos = self._beginning(processed)
        self.named_bos = self._ids.get(named.get("bos_token"))
        sources = _templates(files, config, where)
        self.template, turn = None, []
        if sources:
            try:
                self.template = Template(sources, named, self._moment(sources))
                turn = self._turn_end(added)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
        self.stops = tuple(dict.fromkeys([*turn, *stops, self.eos]))
        # What an unknown character becomes is no control token.
        special -= {named.get("unk_token")}
        control = {added[t] for t in special} | {self.eos, *self.stops}
        control |= set() if self.bos is None else {self.bos}
        self.pad = self._padding(named, added, control)
        if self.pad in added.values() and self.pad != self._ids.get(
            named.get("unk_token")
        ):
            control.add(self.pad)
        self._control = frozenset(control)
        ordinary = {self.eos, self.bos, self.pad}
        self.control_ids = tuple(sorted(self._control - ordinary))
        spelled = [t for t, i in added.items() if i in self._control]
        self._spelled = sorted(spelled, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, self._spelled)) or r"(?!)")
        self.digest = self._digest()

    # Whether texts may spell control tokens and mean them.
    parses = False

    def parsing(self):
        """Returns a tokenizer that reads spelled control tokens as those tokens."""
        other = copy.copy(self)
        other.parses = True
        return other

    def spells(self, text: str) -> bool:
        """Whether a text spells a control token."""
        return bool(self._pattern.search(text))

    # -- text --------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without bos, eos or any control token."""
        if self.parses or not self._pattern.search(text):
            ids = self._inner.encode(text, add_special_tokens=False).ids
            if self.parses or self._control.isdisjoint(ids):
                return ids
        self._check_aliases(text)
        ids = self._literal.encode(text, add_special_tokens=False).ids
        self._check_forged(ids, collections.Counter())
        return ids

    def decode(self, ids) -> str:
        """Returns the text of ids; control tokens have none."""
        plain = [int(i) for i in ids if int(i) not in self._control]
        return self._inner.decode(plain, skip_special_tokens=False)

    def name(self, id_: int) -> str:
        """Returns how an id is shown."""
        return self._inner.id_to_token(int(id_)) or f"<{id_}>"

    # -- conversations -----------------------------------------------------------------

    def encode_turns(self, messages, tools, write, cuts=()):
        """Returns the ids of a conversation that a template writes.

        Args:
            messages, tools: see `chat.render`.
            write: (messages, tools) -> text, spans in characters.
            cuts: places in the text that no token spans, in order.

        Returns:
            ids; their (start, end) in characters; the spans.
        """
        spelled = {
            token
            for text in texts([messages, tools] if not self.parses else [])
            for token in self._pattern.findall(text)
        }
        text, spans = write(messages, tools)
        hidden = {}
        if spelled:
            # As many characters instead, so that no place in the text moves.
            marks = unused(len(spelled), texts([messages, tools]))
            hidden = {
                t: m * len(t) for t, m in zip(sorted(spelled), marks, strict=True)
            }
            shown, spans = write(
                self._hide(messages, hidden), self._hide(tools, hidden)
            )
            if _put_back(shown, hidden) != text:
                raise UserError(
                    f"a message spells the control token {sorted(spelled)[0]!r}, and "
                    "the chat template does not write it as it is"
                )
            text = shown
        written = self._pattern.findall(text)  # by the template itself
        allowed = collections.Counter(self._ids[t] for t in written)
        if hidden:
            self._check_aliases(text)
            text = self._pattern.sub(lambda m: self._alias(m[0]), text)
            text = _put_back(text, hidden)
        encoder = self._literal if hidden else self._inner
        ids, offsets = [], []
        for start, end in itertools.pairwise([0, *cuts, len(text)]):
            encoding = encoder.encode(text[start:end], add_special_tokens=False)
            ids += encoding.ids
            offsets += [(start + a, start + b) for a, b in encoding.offsets]
        self._check_forged(ids, allowed)
        return ids, offsets, spans

    def _hide(self, value, hidden):
        """Returns messages or tools with other characters for control tokens."""
        return replaced(
            value, lambda text: self._pattern.sub(lambda m: hidden[m[0]], text)
        )

    def _check_forged(self, ids, allowed):
        """Refuses control tokens beyond those the template wrote itself."""
        forged = collections.Counter(i for i in ids if i in self._control) - allowed
        if forged:
            token = self._inner.id_to_token(next(iter(forged)))
            raise UserError(
                f"a text spells the control token {token!r} in a way that this "
                "tokenizer cannot tell from the token; change the text"
            )

    # -- the second tokenizer ----------------------------------------------------------

    def _alias(self, token):
        """Returns a control token in private characters, with the same length."""
        return chr(ALIASES + self._spelled.index(token)) * len(token)

    @functools.cached_property
    def _literal(self):
        """The tokenizer with its control tokens spelled by their aliases."""
        import tokenizers

        content = json.loads(self._inner.to_str())
        model = content["model"]
        for token in self._spelled:
            alias = self._alias(token)
            for entry in content["added_tokens"]:
                if entry["content"] == token:
                    entry["content"] = alias
            if isinstance(model["vocab"], dict):
                if token in model["vocab"]:
                    model["vocab"][alias] = model["vocab"].pop(token)
            else:
                model["vocab"] = [
                    [alias if piece == token else piece, *rest]
                    for piece, *rest in model["vocab"]
                ]
            if model.get("unk_token") == token:
                model["unk_token"] = alias
        if "merges" in model:
            aliased = set(self._spelled)
            model["merges"] = [
                pair
                for pair in map(_pair, model["merges"])
                if aliased.isdisjoint([*pair, "".join(pair)])
            ]
        return tokenizers.Tokenizer.from_str(json.dumps(content))

    def _check_aliases(self, text):
        high = {c for c in text if ALIASES <= ord(c) < ALIASES + len(self._spelled)}
        if high:
            raise UserError(
                "a text spells a control token and holds the private-use character "
                f"U+{ord(min(high)):X}; take one of them out"
            )

    # -- special tokens ---------------------------------------------------------------

    def _moment(self, sources):
        """Returns the time that templates read: once read, it stands still; or ""."""
        if not any("strftime_now" in source for source in sources.values()):
            self.files = {k: v for k, v in self.files.items() if k != MOMENT}
            return ""
        now = datetime.datetime.now().isoformat(timespec="seconds")
        self.files = {MOMENT: now.encode()} | self.files
        moment = self.files[MOMENT].decode().strip()
        try:
            datetime.datetime.fromisoformat(moment)
        except ValueError:
            raise UserError(
                f"{MOMENT}: expected a time such as {now}, got {moment!r}"
            ) from None
        return moment

    def _generation_stops(self):
        """Returns the eos_token_id of generation_config.json or else of config.json."""
        for name in ("generation_config.json", "config.json"):
            ids = _read(self.files, name, self._where).get("eos_token_id")
            if ids is None:
                continue
            ids = ids if isinstance(ids, list) else [ids]
            for number in ids:
                if not (isinstance(number, int) and 0 <= number < self.vocab_size):
                    raise UserError(
                        f"{self._where}/{name}: eos_token_id={number!r} is no id of "
                        f"this tokenizer (0 to {self.vocab_size - 1})"
                    )
            return ids
        return []

    def _end(self, named, stops, added):
        """Returns the id that ends a text."""
        token = named.get("eos_token")
        if token is not None:
            return self._ids[token]
        alone = [t for t in ENDS if t in added]
        if stops or len(alone) == 1:
            return stops[0] if stops else added[alone[0]]
        raise UserError(
            f"{self._where}: does not say which token ends a text; name eos_token in "
            "tokenizer_config.json"
        )

    def _beginning(self, processed):
        """Returns the id the post-processor puts before a text, or None.

        So does transformers where there is a tokenizer.json, whatever add_bos_token is.
        """
        plain = self._inner.encode("a", add_special_tokens=False).ids
        has_bos = len(processed) > len(plain) and processed[0] not in plain
        return processed[0] if has_bos else None

    def _turn_end(self, added):
        """Returns the first token a template writes after an answer, [] for none."""
        (mark,) = unused(1, self.template.sources.values())
        for before in ([], [{"role": "system", "content": "a"}]):
            messages = [
                *before,
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": mark},
            ]
            try:
                text = self.template.text(messages)
            except Refusal:
                continue
            longest = sorted(added, key=len, reverse=True)
            pattern = "|".join(map(re.escape, longest)) or r"(?!)"
            match = re.search(pattern, text.partition(mark)[2])
            return [added[match[0]]] if match else []
        return []

    def _padding(self, named, added, control):
        """Returns pad_token, unless it ends texts or turns; else an unused id."""
        taken = {self.eos, self.bos, *self.stops}
        named_pad = self._ids.get(named.get("pad_token"))
        if named_pad is not None and named_pad not in taken:
            return named_pad
        spare = [
            number
            for name in SPARE
            for token, number in sorted(added.items(), key=lambda item: item[1])
            if name in token.lower()
        ]
        unknown = self._ids.get(named.get("unk_token"))
        others = [] if unknown is None else [unknown]
        # Masks say what is real, so any other id will do.
        rest = (i for i in range(self.vocab_size) if i not in control)
        return next(i for i in [*spare, *others, *rest] if i not in taken)

    def _digest(self):
        """Hashes what decides ids and masks, not how the files are laid out."""
        decisive = {
            "tokenizer": hashlib.sha256(self.files[MAIN]).hexdigest(),
            "templates": self.template.sources if self.template else {},
            "ids": [self.bos, self.eos, self.pad, *self.stops],
            "vocab_size": self.vocab_size,
        }
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    @classmethod
    def load(cls, path: str | Path) -> "HuggingFaceTokenizer":
        """Reads a folder, or a .json file alone."""
        path = Path(path)
        if path.is_dir():
            names = [n for n in (MAIN, *BESIDE) if (path / n).is_file()]
            names += [
                f"{NAMED}/{p.name}" for p in sorted(path.glob(f"{NAMED}/*.jinja"))
            ]
            if "generation_config.json" not in names:
                names += ["config.json"] * (path / "config.json").is_file()
            return cls({name: (path / name).read_bytes() for name in names}, path)
        return cls({MAIN: path.read_bytes()}, path)


def _open(data, config, where):
    """Opens a tokenizer.

    Returns:
        the `tokenizers.Tokenizer` without a post-processor; its JSON; the ids of "a"
        with what a post-processor puts around them.
    """
    try:
        import tokenizers
    except ModuleNotFoundError:
        raise UserError(
            f"{where}: needs the tokenizers library: {install('huggingface')}"
        ) from None
    try:
        content = json.loads(data)
        inner = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
    except Exception as error:  # of serde, which has no type of its own
        line = " ".join(str(error).split())
        raise UserError(f"{where}: {MAIN} is not a tokenizer ({line})") from None
    added = {t["content"] for t in content["added_tokens"]}
    listed = config.get("added_tokens_decoder") or {}
    declared = [listed[key] for key in sorted(listed, key=int)]
    declared += [v for k, v in config.items() if k.endswith("_token")]
    declared += config.get("additional_special_tokens") or []
    for entry in declared:
        text = _content(entry)
        if not isinstance(text, str) or text in added:
            continue
        added.add(text)
        flags = entry if isinstance(entry, dict) else {}
        options = ("single_word", "lstrip", "rstrip", "normalized")
        token = tokenizers.AddedToken(
            text,
            special=flags.get("special", True),
            **{k: flags[k] for k in options if k in flags},
        )
        add = inner.add_special_tokens if token.special else inner.add_tokens
        add([token])
    content = json.loads(inner.to_str())
    processed = inner.encode("a").ids
    # A post-processor would trim the tokens' offsets in the text; ids do not need it.
    inner.post_processor = tokenizers.processors.Sequence([])
    inner.no_truncation()
    inner.no_padding()
    return inner, content, processed


def _read(files, name, where):
    if name not in files:
        return {}
    try:
        content = json.loads(files[name])
    except ValueError as error:
        raise UserError(f"{where}/{name}: not a JSON file ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{where}/{name}: expected a JSON object")
    return content


def _templates(files, config, where):
    """Returns {name: jinja text}; files of their own take precedence over a config."""
    template = config.get("chat_template")
    if template is None:
        template = _read(files, "chat_template.json", where).get("chat_template")
    sources = {}
    if isinstance(template, str):
        sources["default"] = template
    elif isinstance(template, list):
        sources |= {one["name"]: one["template"] for one in template}
    elif isinstance(template, dict):
        sources |= template
    from_files = {}
    if "chat_template.jinja" in files:
        from_files["default"] = files["chat_template.jinja"].decode("utf-8")
    for name, data in files.items():
        folder, _, file = name.rpartition("/")
        if folder == NAMED:
            from_files[file.removesuffix(".jinja")] = data.decode("utf-8")
    return from_files or sources


def _content(token):
    return token.get("content") if isinstance(token, dict) else token


def _pair(merge):
    # Older files join the two by a space.
    return merge.split(" ") if isinstance(merge, str) else merge


def _put_back(text, hidden):
    for token, run in hidden.items():
        text = text.replace(run, token)
    return text
