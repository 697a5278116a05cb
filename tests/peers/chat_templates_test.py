"""Ids and masks of chat templates are those of transformers.

Two defects of its assistant masks are known, and looked for by name:

- a {% generation %} block in a macro is noted where the macro's text begins and not
  where it ends up: the template `in_a_macro` is judged by its looks alone;
- of a character that is several tokens (an emoji in byte-level BPE), it takes the first
  alone where the block ends: ours may learn more tokens there, of that character only.

Templates without blocks have no mask in transformers: theirs are judged by the family's
pattern, which knows a turn by its looks.
"""

import numpy as np
import pytest
import transformers

from stagecraft.text import chat
from stagecraft.text import tokenizer as tokenizers
from tests.text import families

pytestmark = pytest.mark.peers

CONVERSATIONS = 200


def learned(places, spans):
    """The mask by its definition: tokens that hold a character of a span."""
    return [any(s < end and e > start for start, end in spans) for s, e in places]


def check_blocks(name, ids, mask, theirs, places):
    """Masks are alike but for the rest of a character that ends a block."""
    differing = np.flatnonzero(np.asarray(mask) != np.asarray(theirs, bool))
    for at in differing:
        assert mask[at] and not theirs[at], name
        first = at
        while places[first - 1] == places[at]:
            first -= 1
        assert first < at and theirs[first], (name, at)
    return len(differing)


@pytest.mark.parametrize("kind", families.KINDS)
@pytest.mark.parametrize("name", families.FAMILIES)
def test_ids_and_masks_are_those_of_transformers(name, kind, tmp_path, parity_rng):
    folder = families.folder(tmp_path, name, kind)
    ours = tokenizers.load(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    family, refused = families.FAMILIES[name], 0
    for _ in range(CONVERSATIONS // len(families.KINDS) + 1):
        messages, tools = families.conversation(parity_rng, name)
        text = theirs.apply_chat_template(messages, tools=tools, tokenize=False)
        whole = theirs(text, add_special_tokens=False, return_offsets_mapping=True)
        spans = families.speech(name, text)
        ids, mask = chat.render(messages, ours, tools=tools)
        want = theirs.apply_chat_template(messages, tools=tools, return_dict=False)
        assert ids == want
        expected = learned(whole["offset_mapping"], spans)
        assert mask == expected
        if family.blocks and name != "in_a_macro":
            got = theirs.apply_chat_template(
                messages,
                tools=tools,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
            check_blocks(
                *(name, ids, mask, got["assistant_masks"], whole["offset_mapping"])
            )
        prompt = theirs.apply_chat_template(
            messages[:-1], tools=tools, add_generation_prompt=True, return_dict=False
        )
        assert chat.generation_prompt(messages[:-1], ours, tools=tools) == prompt
    assert not refused
