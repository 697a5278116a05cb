"""Tokenizers as files that transformers opens.

A tokenizer read from a Hugging Face folder is written back unchanged, except for the
ids that generation ends on. Ours become a tokenizer.json, with a chat template that
writes turns as `chat` does.
"""

import json

import sentencepiece as spm

from stagecraft.text import byte_tokenizer
from stagecraft.text.tokenizer import CHAT_PIECES, FILE, SPACE, Tokenizer
from stagecraft.text.tokenizer_json import MOMENT

TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|' + message['role'] + '|>' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + '<|end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""
GENERATION = "generation_config.json"
CONTROL = ("<pad>", "<s>", "</s>", *CHAT_PIECES)


def files(tokenizer: Tokenizer) -> tuple[dict[str, bytes], list[str]]:
    """Returns the files to write beside a model's weights.

    Returns:
        {file name: bytes}; lines that say what a reader should know.
    """
    if not {FILE, byte_tokenizer.FILE} & tokenizer.files.keys():
        return _unchanged(tokenizer)
    if tokenizer.end is None:
        return dict(tokenizer.files), [
            f"the tokenizer is another's SentencePiece model: {FILE} as it came, which "
            "transformers converts by itself only for families that use one"
        ]
    if FILE in tokenizer.files:
        inner, ids = _pieces(tokenizer.files[FILE])
    else:
        inner, ids = _bytes(tokenizer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
    }
    if FILE in tokenizer.files:
        config["unk_token"] = "<unk>"
    out = {
        "tokenizer.json": _json(_tokenizer_json(inner, ids)),
        "tokenizer_config.json": _json(config),
        "chat_template.jinja": TEMPLATE.encode(),
    }
    return out, [
        "the tokenizer is written as a tokenizer.json: there a text that spells a "
        f"control piece ({CHAT_PIECES[-1]}) is read as that piece, here it is not"
    ]


def _unchanged(tokenizer):
    """Returns a Hugging Face tokenizer's files; generation ends where training did."""
    out, notes = dict(tokenizer.files), []
    if moment := out.pop(MOMENT, None):
        notes.append(
            f"the chat template reads the clock: in this run it read {moment.decode()} "
            "throughout, and reads the time of day again where the folder is opened"
        )
    if GENERATION in out:
        settings = json.loads(out[GENERATION])
        ends = settings.get("eos_token_id")
        ends_listed = ends if isinstance(ends, list) else [ends]
        if {*ends_listed} != {*tokenizer.stops}:
            settings["eos_token_id"] = list(tokenizer.stops)
            out[GENERATION] = (json.dumps(settings, indent=2) + "\n").encode()
            notes.append(
                f"{GENERATION}: eos_token_id={list(tokenizer.stops)}, where training "
                f"ended turns, and not {ends} as the folder it started from has it"
            )
    return out, notes


def _tokenizer_json(inner, ids):
    """Returns the contents of a tokenizer.json whose texts begin with <s>."""
    added = [
        dict(
            id=i, content=piece, single_word=False, lstrip=False, rstrip=False,
            normalized=False, special=True,
        )
        for piece, i in sorted(ids.items(), key=lambda item: item[1])
    ]  # fmt: skip
    start = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    first, second = ({"Sequence": {"id": x, "type_id": 0}} for x in "AB")
    post_processor = {
        "type": "TemplateProcessing",
        "single": [start, first],
        "pair": [start, first, second],
        "special_tokens": {
            "<s>": {"id": "<s>", "ids": [ids["<s>"]], "tokens": ["<s>"]}
        },
    }
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer"))
    return {
        "version": "1.0",
        "added_tokens": added,
        "post_processor": post_processor,
    } | (empty | inner)


def _pieces(model):
    """Spells our SentencePiece BPE; merges are in the order of the pieces."""
    processor = spm.SentencePieceProcessor(model_proto=model)
    count = processor.get_piece_size()
    vocab = {processor.id_to_piece(i): i for i in range(count)}
    special = {p: i for p, i in vocab.items() if p in CONTROL}
    special["<unk>"] = processor.unk_id()
    plain = {
        p: i
        for p, i in vocab.items()
        if not (processor.is_control(i) or processor.is_byte(i) or p == "<unk>")
    }
    merges = []
    for piece in sorted(plain, key=lambda p: -processor.get_score(plain[p])):
        halves = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        halves = [pair for pair in halves if pair[0] in plain and pair[1] in plain]
        merges += sorted(halves, key=lambda pair: (plain[pair[0]], plain[pair[1]]))
    space = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    inner = {
        "normalizer": space,
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}],
        },
        "model": _bpe(vocab, merges, byte_fallback=True, unk_token="<unk>"),
    }
    return inner, special


def _bytes(tokenizer):
    """Spells bytes as the printable characters that stand for them in GPT-2."""
    level = dict(
        type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=False
    )
    ids = (tokenizer.pad, tokenizer.bos, tokenizer.eos, *tokenizer.control_ids)
    special = dict(zip(CONTROL, ids, strict=True))
    inner = {
        "pre_tokenizer": level,
        "decoder": level,
        "model": _bpe(_alphabet(), [], byte_fallback=False, unk_token=None),
    }
    return inner, special


def _alphabet():
    """Returns {character: byte}: printable bytes are themselves, others lie above."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    spelled = {chr(b): b for b in shown}
    return spelled | {chr(256 + i): b for i, b in enumerate(hidden)}


def _bpe(vocab, merges, **settings):
    off = dict.fromkeys(("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
    return {
        "type": "BPE",
        "fuse_unk": False,
        "ignore_merges": False,
        **off,
        **settings,
        "vocab": vocab,
        "merges": [list(pair) for pair in merges],
    }


def _json(value):
    return (json.dumps(value, ensure_ascii=False) + "\n").encode()
