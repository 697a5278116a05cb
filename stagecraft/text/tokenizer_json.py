"""A tokenizer as Hugging Face keeps it, through the `tokenizers` library alone.

tokenizer.json says how text is cut into ids; the files beside it say which tokens begin
and end a text, which end an assistant's turn, and how a conversation is written.

No text can forge a control token: where a document or a message spells one, it is
encoded by a second tokenizer, whose control tokens have other spellings. Text that
spells none is encoded as transformers does it, to the id.
"""

import collections
import functools
import hashlib
import json
import re
from pathlib import Path

from stagecraft.errors import UserError
from stagecraft.text import template as templates

MAIN = "tokenizer.json"
# What a folder may say beside it. config.json matters where nothing else names the end.
BESIDE = (
    *("tokenizer_config.json", "special_tokens_map.json", "generation_config.json"),
    *("chat_template.jinja", "chat_template.json", "added_tokens.json"),
    *("tokenizer.model", "vocab.json", "merges.txt"),
)
NAMED = "additional_chat_templates"
# Ends of a text, for a tokenizer.json that comes alone.
ENDS = ("</s>", "<|endoftext|>", "<eos>", "<|end_of_text|>", "<｜end▁of▁sentence｜>")
# Names of tokens that nothing else uses, the best first.
SPARE = ("pad", "unused", "reserved", "dummy", "placeholder")
# The private plane whose characters spell control tokens in the second tokenizer.
ALIASES = 0xF0000


class HuggingFace:
    """Text to ids and back.

    Args:
        files: {name: bytes} of a folder, `MAIN` among them.
        where: what to call it in messages.

    Attributes:
        bos: the id that begins a text, None where the tokenizer puts none.
        named_bos: the id the folder calls bos, whether it is put or not; or None.
        eos: the id that ends a text.
        pad: an id that is neither, nor ends a turn, whatever the folder says.
        stops: ids that end an assistant's turn: those of generation_config, eos, and
            the one its chat template writes.
        control_ids: the other ids that plain text never holds.
        template: a `Template`, or None.
        files: as given.
    """

    # A turn is written by a template, if at all.
    system = user = assistant = end = None

    def __init__(self, files, where):
        self.files, self._where = files, where
        said = _read(files, "tokenizer_config.json", where)
        said = _read(files, "special_tokens_map.json", where) | said
        self._inner, whole = _open(files[MAIN], said, where)
        self._ids = self._inner.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._ids.values()) + 1
        added = {t["content"]: t["id"] for t in whole["added_tokens"]}
        special = {t["content"] for t in whole["added_tokens"] if t["special"]}
        named = {k: _content(v) for k, v in said.items() if k.endswith("_token")}
        named = {k: v for k, v in named.items() if isinstance(v, str)}
        stops = self._generation_stops()
        self.eos = self._end(named, stops, added)
        self.bos = self._beginning(whole)
        self.named_bos = self._ids.get(named.get("bos_token"))
        sources = _templates(files, said, where)
        self.template, turn = None, []
        if sources:
            try:
                self.template = templates.Template(sources, named)
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

    # -- text --------------------------------------------------------------------------

    def encode(self, text):
        """Ids of a text, without bos or eos, none of them a control token."""
        if not self._pattern.search(text):
            ids = self._inner.encode(text, add_special_tokens=False).ids
            if self._control.isdisjoint(ids):
                return ids
        self._check_aliases(text)
        ids = self._literal.encode(text, add_special_tokens=False).ids
        self._check_forged(ids, collections.Counter())
        return ids

    def decode(self, ids):
        """The text of ids; control tokens have none."""
        kept = [int(i) for i in ids if int(i) not in self._control]
        return self._inner.decode(kept, skip_special_tokens=False)

    # -- conversations -----------------------------------------------------------------

    def encode_turns(self, messages, tools, write):
        """Ids of what a template makes of a conversation.

        Args:
            messages, tools: see `chat.render`.
            write: (messages, tools) -> text, spans in characters.

        Returns:
            ids; their (start, end) in characters; the spans.
        """
        spelled = {
            token
            for text in templates.texts([messages, tools])
            for token in self._pattern.findall(text)
        }
        text, spans = write(messages, tools)
        hidden = {}
        if spelled:
            # As many characters instead, so that no place in the text moves.
            marks = templates.unused(len(spelled), templates.texts([messages, tools]))
            hidden = {
                t: m * len(t) for t, m in zip(sorted(spelled), marks, strict=True)
            }
            shown, spans = write(
                *(self._hide(value, hidden) for value in (messages, tools))
            )
            if _put_back(shown, hidden) != text:
                raise UserError(
                    f"a message spells the control token {sorted(spelled)[0]!r}, and "
                    "the chat template does not write it as it is"
                )
            text = shown
        own = collections.Counter(self._ids[t] for t in self._pattern.findall(text))
        if hidden:
            self._check_aliases(text)
            text = self._pattern.sub(lambda m: self._alias(m[0]), text)
            text = _put_back(text, hidden)
        encoder = self._literal if hidden else self._inner
        found = encoder.encode(text, add_special_tokens=False)
        self._check_forged(found.ids, own)
        return found.ids, found.offsets, spans

    def _hide(self, value, hidden):
        return templates.replaced(
            value, lambda text: self._pattern.sub(lambda m: hidden[m[0]], text)
        )

    def _check_forged(self, ids, own):
        """Refuses control tokens beyond those the template wrote itself."""
        found = collections.Counter(i for i in ids if i in self._control) - own
        if found:
            token = self._inner.id_to_token(next(iter(found)))
            raise UserError(
                f"a text spells the control token {token!r} in a way that this "
                "tokenizer cannot tell from the token; change the text"
            )

    # -- the second tokenizer ----------------------------------------------------------

    def _alias(self, token):
        """Another spelling of a control token, as long and in private characters."""
        return chr(ALIASES + self._spelled.index(token)) * len(token)

    @functools.cached_property
    def _literal(self):
        """The same tokenizer, its control tokens spelled by their aliases."""
        import tokenizers

        whole = json.loads(self._inner.to_str())
        model = whole["model"]
        for token in self._spelled:
            alias = self._alias(token)
            for entry in whole["added_tokens"]:
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
            gone = set(self._spelled)
            model["merges"] = [
                pair
                for pair in map(_pair, model["merges"])
                if gone.isdisjoint([*pair, "".join(pair)])
            ]
        return tokenizers.Tokenizer.from_str(json.dumps(whole))

    def _check_aliases(self, text):
        high = {c for c in text if ALIASES <= ord(c) < ALIASES + len(self._spelled)}
        if high:
            raise UserError(
                "a text spells a control token and holds the private-use character "
                f"U+{ord(min(high)):X}; take one of them out"
            )

    # -- what the files say ------------------------------------------------------------

    def _generation_stops(self):
        """Ids that end a generation, by generation_config.json or else config.json."""
        for name in ("generation_config.json", "config.json"):
            found = _read(self.files, name, self._where).get("eos_token_id")
            if found is None:
                continue
            found = found if isinstance(found, list) else [found]
            for number in found:
                known = isinstance(number, int) and 0 <= number < self.vocab_size
                if not known:
                    raise UserError(
                        f"{self._where}/{name}: eos_token_id={number!r} is no id of "
                        f"this tokenizer (0 to {self.vocab_size - 1})"
                    )
            return found
        return []

    def _end(self, named, stops, added):
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

    def _beginning(self, whole):
        """The id that a text begins with, by the post-processor, or None.

        transformers goes by it too where there is a tokenizer.json, whatever
        add_bos_token says.
        """
        import tokenizers

        plain = self._inner.encode("a", add_special_tokens=False).ids
        dressed = tokenizers.Tokenizer.from_str(json.dumps(whole)).encode("a").ids
        put = len(dressed) > len(plain) and dressed[0] not in plain
        return dressed[0] if put else None

    def _turn_end(self, added):
        """The first token a template writes after an answer, if it writes one."""
        (mark,) = templates.unused(1, self.template.sources.values())
        for before in ([], [{"role": "system", "content": "a"}]):
            messages = [
                *before,
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": mark},
            ]
            try:
                text = self.template.text(messages)
            except templates.Refusal:
                continue
            longest = sorted(added, key=len, reverse=True)
            pattern = "|".join(map(re.escape, longest)) or r"(?!)"
            found = re.search(pattern, text.partition(mark)[2])
            return [added[found[0]]] if found else []
        return []

    def _padding(self, named, added, control):
        """pad_token, unless it ends texts or turns; else a token nothing else uses."""
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
        """Of what decides ids and masks, not of how the files are laid out."""
        what = {
            "tokenizer": hashlib.sha256(self.files[MAIN]).hexdigest(),
            "templates": self.template.sources if self.template else {},
            "ids": [self.bos, self.eos, self.pad, *self.stops],
            "vocab_size": self.vocab_size,
        }
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    @classmethod
    def load(cls, path):
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


def _open(data, said, where):
    """The `tokenizers.Tokenizer` and its JSON, without a post-processor."""
    try:
        import tokenizers
    except ModuleNotFoundError:
        raise UserError(
            f"{where}: needs the tokenizers library: pip install "
            "'stagecraft[huggingface]'"
        ) from None
    try:
        whole = json.loads(data)
        inner = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
    except Exception as error:  # of serde, which has no type of its own
        line = " ".join(str(error).split())
        raise UserError(f"{where}: {MAIN} is not a tokenizer ({line})") from None
    known = {t["content"] for t in whole["added_tokens"]}
    listed = said.get("added_tokens_decoder") or {}
    declared = [listed[key] for key in sorted(listed, key=int)]
    declared += [v for k, v in said.items() if k.endswith("_token")]
    declared += said.get("additional_special_tokens") or []
    for entry in declared:
        content = _content(entry)
        if not isinstance(content, str) or content in known:
            continue
        known.add(content)
        flags = entry if isinstance(entry, dict) else {}
        kept = ("single_word", "lstrip", "rstrip", "normalized")
        token = tokenizers.AddedToken(
            content,
            special=flags.get("special", True),
            **{k: flags[k] for k in kept if k in flags},
        )
        add = inner.add_special_tokens if token.special else inner.add_tokens
        add([token])
    whole = json.loads(inner.to_str())
    # It would trim the places of tokens in the text, and ids need it not.
    bare = tokenizers.Tokenizer.from_str(json.dumps(whole | {"post_processor": None}))
    bare.no_truncation()
    bare.no_padding()
    return bare, whole


def _read(files, name, where):
    if name not in files:
        return {}
    try:
        found = json.loads(files[name])
    except ValueError as error:
        raise UserError(f"{where}/{name}: not a JSON file ({error})") from None
    if not isinstance(found, dict):
        raise UserError(f"{where}/{name}: expected a JSON object")
    return found


def _templates(files, said, where):
    """{name: jinja text}; files of their own go before what is in a config."""
    found = said.get("chat_template")
    if found is None:
        found = _read(files, "chat_template.json", where).get("chat_template")
    sources = {}
    if isinstance(found, str):
        sources["default"] = found
    elif isinstance(found, list):
        sources |= {one["name"]: one["template"] for one in found}
    elif isinstance(found, dict):
        sources |= found
    apart = {}
    if "chat_template.jinja" in files:
        apart["default"] = files["chat_template.jinja"].decode("utf-8")
    for name, data in files.items():
        folder, _, file = name.rpartition("/")
        if folder == NAMED:
            apart[file.removesuffix(".jinja")] = data.decode("utf-8")
    return apart or sources


def _content(token):
    return token.get("content") if isinstance(token, dict) else token


def _pair(merge):
    # Older files join the two by a space.
    return merge.split(" ") if isinstance(merge, str) else merge


def _put_back(text, hidden):
    for token, run in hidden.items():
        text = text.replace(run, token)
    return text
