"""Keys of records: those that `fields` renames or joins, and known spellings of ours.

fields="prompt=question+completion=answer"        renames
fields="prompt=instruction+input"                 joins, a blank line between
"""

from stagecraft import schema
from stagecraft.data import forms
from stagecraft.errors import UserError

# Keys of records, which the `fields` of a stage may rename.
_TEXTS = ("text", "messages", "prompt", "completion", "chosen", "rejected", "ranked")
KEYS = (*_TEXTS, "label", "preference", "margin")
# What other collections call a prompt and its completion. A prompt beside "answer" is
# one to verify answers against, unless the prompt has a name of that collection too.
_PROMPTS = ("instruction", "question", "query")
_COMPLETIONS = ("output", "response", "answer")
_BESIDE_PROMPT = ("output", "response")
# What belongs to an instruction or a question, behind it.
_MORE = ("input", "context")
# Keys that say what stands in a prompt, where all others may be a verifier's.
CONTENT = (*_MORE, "history", "system", "documents", "functions")
CONTENT += ("image", "images", "audio", "audios", "video", "videos")


def fields(text) -> dict[str, str]:
    """Returns {"our key": "the file's key"} of "prompt=question+completion=answer".

    A key of the file that follows another one is joined to it: "prompt=a+b" gives
    {"prompt": "a+b"}, the key that `joined` writes.
    """
    mapping, last = {}, ""
    for part in filter(None, text.split("+")):
        ours, equals, theirs = (word.strip() for word in part.partition("="))
        if last and ours and not equals:
            mapping[last] += f"+{ours}"
            continue
        if not ours or not theirs:
            raise UserError(
                f"fields={text!r}: expected our=theirs pairs joined by +, as in "
                "prompt=question+completion=answer, or prompt=instruction+input to "
                "join two keys"
            )
        if ours not in KEYS:
            near = schema.nearest(ours, KEYS)
            raise UserError(
                f"fields={text!r}: no key {ours!r} to rename; ours are "
                f"{', '.join(KEYS)}" + (f" (did you mean {near!r}?)" if near else "")
            )
        mapping[ours], last = theirs, ours
    return mapping


def spelled(record, accepted) -> dict[str, str]:
    """Returns the mapping of a record whose keys have known names of others; or {}.

    Args:
        record: without keys that `fields` names.
        accepted: the forms a reader takes, such as `forms.DEMONSTRATIONS`.

    >>> record = {"instruction": "Add.", "input": "1 1", "output": "2"}
    >>> spelled(record, forms.DEMONSTRATIONS)
    {'prompt': 'instruction+input', 'completion': 'output'}
    """
    needs_completion = accepted in (forms.DEMONSTRATIONS, forms.JUDGEMENTS)
    if accepted == forms.TEXT or any(
        key in record for key in ("messages", "conversations")
    ):
        return {}
    prompt = "prompt" if "prompt" in record else _prompt(record)
    if not prompt:
        return {}
    given = {"prompt": prompt} if prompt != "prompt" else {}
    if any(key in record for key in ("chosen", "ranked")):
        # Whole conversations hold their prompt.
        whole = forms.begins_conversation(record.get("chosen"))
        return {} if whole or accepted == forms.PROMPTS else given
    if not needs_completion or "completion" in record:
        return given
    words = _COMPLETIONS if given else _BESIDE_PROMPT
    completions = [word for word in words if word in record]
    return given | {"completion": completions[0]} if len(completions) == 1 else {}


def _prompt(record):
    """Returns the key, or two to be joined, that hold the prompt; "" for none."""
    names = [name for name in _PROMPTS if isinstance(record.get(name), (str, list))]
    if "goal" in record and "target" in record:  # AdvBench: a request, its compliance
        names.append("goal")
    if len(names) != 1:
        return ""
    more = [name for name in _MORE if isinstance(record.get(name), str)]
    return "+".join([*names, *more[:1]])


def joined(where, record, mapping) -> dict:
    """Returns the record with the texts that a mapping joins under the joined key."""
    more = {}
    for ours, key in mapping.items():
        parts = [record[name] for name in key.split("+") if name in record]
        if "+" not in key or key in record or not parts:
            continue
        if not all(isinstance(part, str) for part in parts):
            raise UserError(
                f"{where}: fields={ours}={key}: expected a text under each key to join"
            )
        more[key] = "\n\n".join(part for part in parts if part.strip())
    return record | more if more else record
