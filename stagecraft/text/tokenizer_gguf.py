"""The tokenizer in a GGUF file, as the files of a Hugging Face folder.

A GGUF holds tokens, merges and which tokens are control tokens; how text is cut before
merges is a name (`tokenizer.ggml.pre`). A name that is not known here is refused:
another cut would give other ids than the model was trained with. Source of the names:
github.com/ggml-org/llama.cpp, src/llama-vocab.cpp.
"""

import json
from pathlib import Path
from typing import NamedTuple

from stagecraft import gguf_file
from stagecraft.errors import UserError
from stagecraft.text.tokenizer_json import MAIN, HuggingFaceTokenizer

SUFFIX = ".gguf"
# Kinds of tokens, `tokenizer.ggml.token_type`.
CONTROL, USER_DEFINED = 3, 4

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class Cut(NamedTuple):
    """How a byte-level tokenizer cuts text before it merges.

    Attributes:
        pattern: of the pieces; "" for GPT-2's.
        digits: whether digits are cut apart first.
        whole: whether a piece that is a token is not merged from smaller ones.
        composed: whether characters are composed first (NFC).
        bos: whether texts begin with bos where the file does not say.
    """

    pattern: str = ""
    digits: bool = False
    whole: bool = False
    composed: bool = False
    bos: bool = False


_LLAMA3 = Cut(_WORDS + r"\p{N}{1,3}" + _REST, whole=True, bos=True)
CUTS = {
    "gpt-2": Cut(),
    "smollm": Cut(digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": Cut(_WORDS + r"\p{N}" + _REST, composed=True),
}
NAMED = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def load(path: str | Path) -> HuggingFaceTokenizer:
    """Reads the tokenizer and the chat template of a GGUF file."""
    return HuggingFaceTokenizer(files(path), str(path))


def files(path: str | Path) -> dict[str, bytes]:
    """Returns {name: bytes} of a Hugging Face folder with a file's tokenizer.

    Raises:
        UserError: the file has none, or none that can be built exactly.
    """
    content = gguf_file.read(path)
    kind = content.get("tokenizer.ggml.model", str)
    if kind != "gpt2":
        raise UserError(
            f"{path}: tokenizer.ggml.model={kind!r} is not read from a GGUF, "
            "byte-level BPE ('gpt2') is; take the model's Hugging Face folder"
        )
    name = content.get("tokenizer.ggml.pre", str, "")
    if name not in CUTS:
        raise UserError(
            f"{path}: tokenizer.ggml.pre={name!r}: how its text is cut is not known "
            f"here; expected one of {', '.join(CUTS)}; take the model's Hugging Face "
            "folder"
        )
    cut, tokens = CUTS[name], content.get("tokenizer.ggml.tokens", list)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        raise UserError(f"{path}: tokenizer.ggml.tokens holds a token twice")
    named = _named(content, tokens)
    main = {
        "version": "1.0",
        "added_tokens": _added(content, tokens),
        "normalizer": {"type": "NFC"} if cut.composed else None,
        "pre_tokenizer": _pre_tokenizer(cut),
        "post_processor": _post_processor(content, cut, named, vocabulary),
        "decoder": _byte_level(True),
        "model": {
            "type": "BPE",
            "vocab": vocabulary,
            "merges": _merges(content),
            "ignore_merges": cut.whole,
        },
    }
    config = {f"{key}_token": token for key, token in named.items()}
    if "tokenizer.chat_template" in content.values:
        config["chat_template"] = content.get("tokenizer.chat_template", str)
    return {
        MAIN: json.dumps(main, ensure_ascii=False).encode(),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False).encode(),
    }


def _named(content, tokens):
    """Returns {"bos": its token, ...} of those that the file names."""
    named = {}
    for key, theirs in NAMED.items():
        where = f"tokenizer.ggml.{theirs}_token_id"
        if where not in content.values:
            continue
        number = content.get(where, int)
        if not 0 <= number < len(tokens):
            raise UserError(
                f"{content.path}: {where}={number} is no id of its {len(tokens)} tokens"
            )
        named[key] = tokens[number]
    return named


def _added(content, tokens):
    """Returns the tokens that are matched whole, as tokenizer.json lists them."""
    kinds = content.get("tokenizer.ggml.token_type", list, [])
    if kinds and len(kinds) != len(tokens):
        raise UserError(
            f"{content.path}: tokenizer.ggml.token_type has {len(kinds)} entries for "
            f"{len(tokens)} tokens"
        )
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [
        {"id": number, "content": token, **flags, "special": kind == CONTROL}
        for number, (token, kind) in enumerate(zip(tokens, kinds, strict=False))
        if kind in (CONTROL, USER_DEFINED)
    ]


def _merges(content):
    merges = [m.split(" ") for m in content.get("tokenizer.ggml.merges", list)]
    if any(len(pair) != 2 for pair in merges):
        raise UserError(f"{content.path}: tokenizer.ggml.merges: expected pairs")
    return merges


def _pre_tokenizer(cut):
    parts = []
    if cut.digits:
        parts.append({"type": "Digits", "individual_digits": True})
    if cut.pattern:
        split = {"type": "Split", "pattern": {"Regex": cut.pattern}}
        parts.append(split | {"behavior": "Isolated", "invert": False})
    parts.append(_byte_level(not cut.pattern))
    return {"type": "Sequence", "pretokenizers": parts}


def _byte_level(use_regex):
    flags = {"add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}
    return {"type": "ByteLevel"} | flags


def _post_processor(content, cut, named, vocabulary):
    """Returns what puts bos before a text; None where nothing does."""
    if not content.get("tokenizer.ggml.add_bos_token", bool, cut.bos):
        return None
    if "bos" not in named:
        raise UserError(
            f"{content.path}: tokenizer.ggml.add_bos_token is set, and no "
            "tokenizer.ggml.bos_token_id says which token that is"
        )
    token = named["bos"]
    bos = {"SpecialToken": {"id": token, "type_id": 0}}
    text, other = ({"Sequence": {"id": x, "type_id": 0}} for x in "AB")
    entry = {"id": token, "ids": [vocabulary[token]], "tokens": [token]}
    return {
        "type": "TemplateProcessing",
        "single": [bos, text],
        "pair": [bos, text, bos, other],
        "special_tokens": {token: entry},
    }
