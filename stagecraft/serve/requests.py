"""What requests of OpenAI's protocol may ask for, checked.

A field that is not known, or asks for what is not there, is refused by its name: an
answer that silently left it out would be another one than was asked for. Text is
literal: a control token that a prompt or message spells is letters. Control tokens come
as ids, or in messages, which the model's chat template writes.
"""

import json
import math
import secrets
from typing import Any, NamedTuple

from stagecraft import schema
from stagecraft.errors import UserError
from stagecraft.models.language import Language
from stagecraft.models.slots import TOP
from stagecraft.text import chat

MOST_CHOICES = 128  # of one request, over all its prompts
MOST_STOPS = 16
DEFAULT_TOKENS = 16  # of a completion, as OpenAI's

SHARED = ("model", "max_tokens", "temperature", "top_p", "n", "stop", "seed")
SHARED += ("stream", "stream_options", "logprobs", "user")
OWN = {
    "completions": ("prompt", "echo"),
    "chat": ("messages", "max_completion_tokens", "top_logprobs"),
}
# Known, but allowed only where they ask for nothing.
NEUTRAL = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "best_of": (1,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "metadata": ({},),
}


class Refused(UserError):
    """A request that cannot be answered.

    Attributes:
        param: the field that is to blame, or None.
        code, status: OpenAI's name of the error, or None; that of HTTP.
    """

    def __init__(self, text, param=None, *, code=None, status=400):
        super().__init__(text if param is None else f"{param}: {text}")
        self.param, self.code, self.status = param, code, status


class Prompt(NamedTuple):
    """A prompt: its ids, and its text where it came as one."""

    ids: list[int]
    text: str | None


class Asked(NamedTuple):
    """What a request asks for.

    Attributes:
        api: "completions" or "chat".
        prompts: list of `Prompt`.
        n: choices of each.
        max_tokens: of each choice.
        temperature, top_p: of the sampling.
        seed: an integer, drawn where none was given.
        stops: texts that end a choice.
        echo: whether a choice begins with its prompt.
        logprobs: alternatives to each token; None for no log-probabilities.
        stream, usage: whether the answer comes piece by piece, with its counts last.
    """

    api: str
    prompts: list[Prompt]
    n: int
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stops: tuple[str, ...]
    echo: bool
    logprobs: int | None
    stream: bool
    usage: bool


def read(api: str, body: bytes, language: Language, *, served, in_turns, context):
    """Returns what a body asks for, as `Asked`.

    Args:
        api: "completions" or "chat".
        body: of the request.
        language: the model.
        served: its name.
        in_turns: whether it was trained on turns of a chat.
        context: the most tokens of a prompt and its completion.

    Raises:
        Refused: it is no such request.
    """
    given = _object(body)
    known = (*SHARED, *OWN[api])
    for name, value in list(given.items()):
        if name in NEUTRAL and (value is None or value in NEUTRAL[name]):
            given.pop(name)
        elif name in NEUTRAL:
            raise Refused(f"{json.dumps(value)[:80]} is not supported here", name)
        elif name not in known:
            raise Refused(
                f"not a field of this server; {schema.hint(name, known)}it takes "
                f"{', '.join(known)}",
                name[:80],
            )
    given = {name: value for name, value in given.items() if value is not None}
    if given.get("model") not in (None, "", served):
        raise Refused(
            f"this server has one model, {served!r}",
            "model",
            code="model_not_found",
            status=404,
        )
    n = _integer(given, "n", 1, 1, MOST_CHOICES)
    if api == "chat":
        prompts = [_conversation(given, language, in_turns)]
        logprobs = _chat_logprobs(given)
    else:
        prompts = _prompts(given, language)
        logprobs = _integer(given, "logprobs", None, 0, TOP)
    if len(prompts) * n > MOST_CHOICES:
        raise Refused(
            f"{len(prompts)} prompts with n={n} are more than the {MOST_CHOICES} "
            "choices of one request",
            "prompt",
        )
    stream = _flag(given, "stream")
    return Asked(
        api,
        prompts,
        n,
        _max_tokens(given, api, max(len(one.ids) for one in prompts), context),
        _number(given, "temperature", 1.0, 0.0, 2.0),
        _top_p(given),
        _integer(given, "seed", secrets.randbits(62), -(2**63), 2**63 - 1),
        _stops(given),
        _flag(given, "echo"),
        logprobs,
        stream,
        _usage(given, stream),
    )


def _object(body):
    def refuse(name):
        raise ValueError(f"{name} is no JSON")

    try:
        value = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        line = " ".join(str(error).split())[:200]
        raise Refused(f"the body is not JSON ({line})") from None
    if not isinstance(value, dict):
        raise Refused("the body is not a JSON object, as {...}")
    return value


def _text(value, name):
    """Returns a text that is whole; JSON can spell half of a character."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise Refused("holds half of a character (a lone surrogate)", name) from None
    return value


def _prompts(given, language):
    """Returns the prompts of a text, a list of texts, ids, or a list of ids."""
    value = given.get("prompt")
    if isinstance(value, str) or (_is_list(value, int) and value):
        value = [value]
    if not isinstance(value, list) or not value:
        raise Refused("expected a text, ids of tokens, or a list of either", "prompt")
    return [_prompt(one, language) for one in value]


def _prompt(value, language):
    size = language.model.config.vocab_size
    if isinstance(value, str):
        ids = language.encode(_text(value, "prompt"), chat_format=False)
        # An empty text begins as others do, or behind the end of another.
        return Prompt(ids or [language.tokenizer.eos], value)
    if not _is_list(value, int) or not value:
        raise Refused("expected a text, ids of tokens, or a list of either", "prompt")
    if wrong := next((one for one in value if not 0 <= one < size), None):
        raise Refused(f"{wrong} is no id of this model (0 to {size - 1})", "prompt")
    return Prompt(value, None)


def _is_list(value, kind):
    return isinstance(value, list) and all(type(one) is kind for one in value)


def _conversation(given, language, in_turns):
    """Returns the `Prompt` of messages, written by the model's chat template."""
    if not in_turns:
        raise Refused(
            "this model was trained on bare text and knows no turns; ask /completions",
            "messages",
        )
    messages = given.get("messages")
    try:
        if isinstance(messages, list):
            messages = [_message(one) for one in messages]
        if not isinstance(messages, list):
            raise UserError('expected a list like [{"role": "user", "content": "..."}]')
        messages = chat.as_messages(messages)
        return Prompt(language.encode(messages, chat_format=True), None)
    except Refused:
        raise
    except UserError as error:
        raise Refused(str(error), "messages") from None


def _message(value):
    """Returns a message whose content is one text."""
    if not isinstance(value, dict):
        return value
    content = value.get("content")
    if isinstance(content, list):
        parts = [one.get("text") for one in content if isinstance(one, dict)]
        kinds = {one.get("type") for one in content if isinstance(one, dict)}
        if kinds != {"text"} or len(parts) < len(content) or not _is_list(parts, str):
            raise Refused("expected parts of the type 'text' alone", "messages")
        content = "".join(parts)
    if isinstance(content, str):
        _text(content, "messages")
        value = value | {"content": content}
    if value.get("role") == "developer":  # as newer clients call it
        value = value | {"role": "system"}
    return value


def _chat_logprobs(given):
    count = _integer(given, "top_logprobs", 0, 0, TOP)
    if _flag(given, "logprobs"):
        return count
    if count:
        raise Refused("needs logprobs=true", "top_logprobs")
    return None


def _max_tokens(given, api, longest, context):
    """Returns the most tokens of a choice; a chat's fill the context by default."""
    name = "max_tokens"
    if api == "chat" and "max_completion_tokens" in given:
        name = "max_completion_tokens"
    room = context - longest
    default = DEFAULT_TOKENS if api == "completions" else max(room, 1)
    tokens = _integer(given, name, default, int(api == "chat"), 2**31)
    if tokens > room:
        raise Refused(
            f"a prompt of {longest} tokens and {name}={tokens} exceed the context of "
            f"{context} tokens; shorten one of them",
            "messages" if api == "chat" else "prompt",
            code="context_length_exceeded",
        )
    return tokens


def _top_p(given):
    top_p = _number(given, "top_p", 1.0, 0.0, 1.0)
    if top_p == 0:
        raise Refused("expected more than 0 and at most 1", "top_p")
    return top_p


def _stops(given):
    value = given.get("stop", [])
    stops = [value] if isinstance(value, str) else value
    fit = _is_list(stops, str) and all(stops) and len(stops) <= MOST_STOPS
    if not fit:
        raise Refused(f"expected a text, or up to {MOST_STOPS} of them", "stop")
    return tuple(dict.fromkeys(stops))


def _usage(given, stream):
    options = given.get("stream_options")
    if options is None:
        return False
    fit = isinstance(options, dict) and options.keys() <= {"include_usage"}
    if not fit or not stream:
        raise Refused("expected {'include_usage': true} with stream", "stream_options")
    return _flag(options, "include_usage")


def _flag(given, name):
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise Refused(f"expected true or false, got {_shown(value)}", name)
    return value


def _integer(given, name, default: Any, least, most):
    value = given.get(name, default)
    if value is default:
        return default
    if type(value) is not int or not least <= value <= most:
        raise Refused(
            f"expected a whole number from {least} to {most}, got {_shown(value)}", name
        )
    return value


def _number(given, name, default, least, most):
    value = given.get(name, default)
    fit = type(value) in (int, float) and math.isfinite(value)
    if not fit or not least <= value <= most:
        raise Refused(
            f"expected a number from {least:g} to {most:g}, got {_shown(value)}", name
        )
    return float(value)


def _shown(value):
    return json.dumps(value)[:80]
