"""Small tokenizers and chat templates in the manner of known families, for tests.

The templates are written for these tests from what each family's does: roles renamed,
texts trimmed, a system message moved, tools listed, thoughts dropped from earlier
turns. `speech` finds what is the assistant's in a text by its looks alone, so that it
can judge masks.
"""

import functools
import itertools
import json
import re
from pathlib import Path
from typing import NamedTuple

import tokenizers
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

HERE = Path(__file__).parent / "templates"

TEXT = [
    "The capital of France is Paris; the assistant told the user so at once.",
    "You are a helpful assistant. Today Date: 26 July. What is the weather in Oslo?",
    "def area(width, height):\n    return width * height  # 12 * 30 = 360\n\n",
    "Größe, naïve, Ελλάδα, 東京, かな, 한국어, \U0001f600 \U0001f469\u200d\U0001f467",
    '{"name": "weather", "arguments": {"city": "Oslo", "days": 3}}\n[INST] yes [/INST]',
] * 8


class Family(NamedTuple):
    """How one family writes conversations.

    Attributes:
        tokens: its special tokens besides bos and eos.
        bos, eos: their spellings; bos may be "".
        turn: what a text holds where the assistant speaks; a pattern with one group.
        blocks: whether its template has {% generation %} blocks.
        system, tools: whether it takes a system message, and tools.
        several: whether prefixes agree in a conversation of several answers.
    """

    tokens: tuple
    bos: str
    eos: str
    turn: str
    blocks: bool = False
    system: bool = True
    tools: bool = False
    several: bool = True


IM = ("<|im_start|>", "<|im_end|>")
FAMILIES = {
    "chatml": Family(
        IM, "", "<|im_end|>", r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", True
    ),
    "llama2": Family((), "<s>", "</s>", r"\[/INST\]( .*? </s>)"),
    "llama3": Family(
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        *("<|begin_of_text|>", "<|eot_id|>"),
        r"assistant<\|end_header_id\|>\n\n(.*?<\|eot_id\|>)",
        tools=True,
    ),
    "mistral": Family(
        ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")
        + ("[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        *("<s>", "</s>", r"(?:\[/INST\]|\[/TOOL_RESULTS\])((?!\[TOOL_R).*?</s>)"),
        tools=True,
    ),
    "qwen2_5": Family(
        (*IM, "<|endoftext|>"),
        *("", "<|im_end|>", r"<\|im_start\|>assistant\n(.*?<\|im_end\|>\n)"),
        tools=True,
    ),
    "qwen3": Family(
        (*IM, "<|endoftext|>"),
        *("", "<|im_end|>", r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", True),
        tools=True,
    ),
    "gemma2": Family(
        ("<start_of_turn>", "<end_of_turn>"),
        *("<bos>", "<eos>", r"<start_of_turn>model\n(.*?<end_of_turn>\n)"),
        system=False,
    ),
    "gemma3": Family(
        ("<start_of_turn>", "<end_of_turn>"),
        *("<bos>", "<eos>", r"<start_of_turn>model\n(.*?<end_of_turn>\n)", True),
    ),
    "olmo2": Family(
        (),
        *("<|endoftext|>", "<|endoftext|>"),
        r"<\|assistant\|>\n(.*?<\|endoftext\|>)",
    ),
    "smollm3": Family(
        IM,
        "",
        "<|im_end|>",
        r"(<\|im_start\|>assistant\n.*?<\|im_end\|>\n)",
        True,
        tools=True,
    ),
    "phi3": Family(
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        *("", "<|endoftext|>"),
        r"<\|assistant\|>\n(.*?<\|end\|>\n)|(<\|endoftext\|>)$",
        True,
    ),
    "phi4": Family(
        (*IM, "<|im_sep|>"),
        *("", "<|im_end|>", r"<\|im_start\|>assistant<\|im_sep\|>(.*?<\|im_end\|>)"),
    ),
    "zephyr": Family((), "<s>", "</s>", r"(<\|assistant\|>\n.*?</s>\n)", True),
    "deepseek": Family(
        ("<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>")
        + ("<｜tool▁calls▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
        *("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        r"<｜Assistant｜>(.*?<｜end▁of▁sentence｜>)",
        tools=True,
    ),
    "command": Family(
        ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>")
        + ("<|USER_TOKEN|>", "<|SYSTEM_TOKEN|>"),
        *("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
        r"<\|CHATBOT_TOKEN\|>(.*?<\|END_OF_TURN_TOKEN\|>)",
        True,
    ),
    "in_a_macro": Family(
        IM, "", "<|im_end|>", r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", True
    ),
}


def source(name):
    """The text of a family's template."""
    return (HERE / f"{name}.jinja").read_text(encoding="utf-8")


def speech(name, text):
    """(start, end) in characters of what the assistant says in a text."""
    return [
        match.span(match.lastindex)
        for match in re.finditer(FAMILIES[name].turn, text, re.DOTALL)
    ]


# What Llama 3 and Qwen cut text by, in short.
WORDS = r"'(?:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
WORDS += r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@functools.cache
def _trained(kind):
    """The JSON of a small tokenizer of one kind, without special tokens."""
    settings = dict(vocab_size=600, show_progress=False)
    if kind == "bytes":
        made = tokenizers.Tokenizer(models.BPE())
        split = pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.pre_tokenizer = pre_tokenizers.Sequence([split, level])
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(initial_alphabet=alphabet, **settings)
    else:
        # Llama 2's: spaces are marked, and what is not in the vocabulary is bytes.
        made = tokenizers.Tokenizer(
            models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True)
        )
        steps = [normalizers.Replace(" ", "\u2581")]
        if kind == "prefixed":
            steps.insert(0, normalizers.Prepend("\u2581"))
            made.normalizer = normalizers.Sequence(steps)
        else:
            made.pre_tokenizer = pre_tokenizers.Metaspace(
                prepend_scheme="first", split=False
            )
        tail = [decoders.Strip(" ", 1, 0)]
        made.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback()]
            + [decoders.Fuse(), *tail]
        )
        pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(
            special_tokens=pieces, limit_alphabet=90, **settings
        )
    made.train_from_iterator(TEXT, trainer)
    whole = json.loads(made.to_str())
    # The byte pieces are a part of the vocabulary and no added tokens.
    whole["added_tokens"] = whole["added_tokens"][:1] if kind != "bytes" else []
    return json.dumps(whole)


KINDS = ("bytes", "prefixed", "first")


def folder(path, name, kind="bytes", **changes):
    """Writes the tokenizer folder of a family.

    Args:
        path: the folder, made here.
        name: of the family.
        kind: how its tokenizer cuts text, one of `KINDS`.
        **changes: entries of tokenizer_config.json; None leaves one out.
    """
    family, path = FAMILIES[name], Path(path)
    path.mkdir(parents=True, exist_ok=True)
    made = tokenizers.Tokenizer.from_str(_trained(kind))
    names = dict.fromkeys(filter(None, (family.bos, family.eos, *family.tokens)))
    made.add_special_tokens([AddedToken(t, normalized=False) for t in names])
    made.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    if family.bos:
        made.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A",
            special_tokens=[(family.bos, made.token_to_id(family.bos))],
        )
    made.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": family.bos or None,
        "eos_token": family.eos,
        "pad_token": family.eos,
        "unk_token": None if kind == "bytes" else "<unk>",
        "chat_template": source(name),
        "clean_up_tokenization_spaces": False,
    } | changes
    config = {k: v for k, v in config.items() if v is not None}
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


# -- conversations ---------------------------------------------------------------------

WORDS_SAID = (
    *("yes", "Paris", "it is", "12 * 30 = 360", "The capital of", "Oslo\n", "ok."),
    *("\U0001f600", "\U0001f469\u200d\U0001f467", "naïve", "東京", "한국어", "Ελλάδα"),
    *(
        "e\u0301",
        "\t",
        "  ",
        "\n\n",
        "[INST]",
        "<|user|>",
        "</tool",
        "#",
        "a<b>c",
        "\\",
    ),
    *(
        '"quoted"',
        "it's",
        "{{ x }}",
        "{% y %}",
        "\u00a0",
        "\u2581",
        "\ufffd",
        "\U0010ffff",
    ),
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'The weather of a <city> & its "surroundings" — naïve',
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    }
]


def words(rng, name, most=6):
    """A text of a few random words, sometimes empty; none is the family's token."""
    known = [w for w in WORDS_SAID if w not in FAMILIES[name].tokens]
    picked = rng.integers(0, len(known), int(rng.integers(0, most + 1)))
    return "".join(known[int(i)] + " " * int(rng.integers(0, 2)) for i in picked)


def prompts(messages, tools, write):
    """The text before each answer; write: (messages, tools, prompt=) -> text."""
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    return [write(messages[:i], tools, prompt=True) for i in answers]


def parted(encode, decode, text, prompts):
    """(ids, places) of a text whose answers stand apart from the prompts before them.

    They are those of the whole text, unless a token lies over the end of a prompt and
    the two parts, encoded by themselves, are still the same text.

    Args:
        encode: (text) -> ids, places.
        decode: (ids) -> text.
        text: a conversation.
        prompts: the text before each answer, as a model is asked with it.
    """
    ids, places = whole = encode(text)
    cuts = [0]
    for prompt in filter(text.startswith, prompts):
        asked, border = encode(prompt)[0], len(prompt)
        over = any(start < border < end for start, end in places)
        if over and asked != ids[: len(asked)]:
            cuts.append(border)
    ids, places = [], []
    for start, end in itertools.pairwise([*cuts, len(text)]):
        more, where = encode(text[start:end])
        ids += more
        places += [(a + start, b + start) for a, b in where]
    return (ids, places) if decode(ids) == decode(whole[0]) else whole


def conversation(rng, name):
    """(messages, tools or None) as a family can write them."""
    family, messages = FAMILIES[name], []
    if family.system and rng.random() < 0.5:
        messages.append({"role": "system", "content": words(rng, name)})
    tools = TOOLS if family.tools and rng.random() < 0.5 else None
    for _ in range(int(rng.integers(1, 4)) if family.several else 1):
        messages.append({"role": "user", "content": words(rng, name)})
        if tools and rng.random() < 0.6:
            call = {
                "name": "weather",
                "arguments": {"city": words(rng, name), "days": 3},
            }
            call = {"type": "function", "function": call}
            messages.append(
                {"role": "assistant", "content": None, "tool_calls": [call]}
            )
            messages.append(
                {"role": "tool", "name": "weather", "content": words(rng, name)}
            )
        answer = {"role": "assistant", "content": words(rng, name)}
        if rng.random() < 0.2:
            answer["content"] = (
                f"<think>\n{words(rng, name)}\n</think>\n\n{words(rng, name)}"
            )
        messages.append(answer)
    return messages, tools
