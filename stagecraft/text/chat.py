"""Conversations and documents as ids and a mask of what is to be learned.

    <bos> <|user|> question <|assistant|> answer <|end|> <|user|> ...
    <bos> document <eos>

The mask marks targets: in a conversation every assistant turn with its <|end|> (or the
last alone; none whose weight is 0), in a document everything but bos. Each part is
tokenised on its own, so that no piece spans the border between what is given and what
is learned.
"""

from stagecraft.errors import UserError

ROLES = ("system", "user", "assistant")

# Which assistant turns of a conversation are learned.
TURNS = ("all", "last")


def document(text, tokenizer):
    """A plain document.

    Returns:
        ids list[int], mask list[bool]: all but bos are targets.
    """
    ids = [tokenizer.bos, *tokenizer.encode(text), tokenizer.eos]
    return ids, [False] + [True] * (len(ids) - 1)


def render(messages, tokenizer, *, turns="all"):
    """A whole conversation.

    Args:
        messages: [{"role", "content"}]; one with "ended" False was cut off by a length
            limit and gets no end of turn; an assistant's with "weight" 0 is context
            and not learned.
        turns: "all" to learn every assistant turn, "last" the last one alone.

    Returns:
        ids list[int], mask list[bool]: the assistant's words and its end of turn.
    """
    last = max(
        (i for i, m in enumerate(messages) if m["role"] == "assistant"), default=-1
    )
    ids, mask = [tokenizer.bos], [False]
    pieces = {role: getattr(tokenizer, role) for role in ROLES}
    for number, message in enumerate(messages):
        words = tokenizer.encode(message["content"])
        spoken = message["role"] == "assistant"
        learned = spoken and message.get("weight", 1) != 0
        learned = learned and (turns == "all" or number == last)
        ids += [pieces[message["role"]], *words]
        mask += [False] + [learned] * len(words)
        if spoken and message.get("ended", True):  # others end where the next begins
            ids.append(tokenizer.end)
            mask.append(learned)
    return ids, mask


def generation_prompt(messages, tokenizer):
    """Ids of a conversation up to the point where the assistant is to speak."""
    return [*render(messages, tokenizer)[0], tokenizer.assistant]


def as_messages(value, role="user"):
    """A text as one message of `role`; a list of messages checked and returned.

    >>> as_messages("Hello")
    [{'role': 'user', 'content': 'Hello'}]
    """
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise UserError("expected a text or a list of messages")
    for message in value:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise UserError('expected messages like {"role": "user", "content": "..."}')
        if message["role"] not in ROLES:
            raise UserError(
                f"role {message['role']!r}: expected one of {', '.join(ROLES)}"
            )
        if not isinstance(message["content"], str):
            raise UserError("expected every message's content to be a text")
        if "weight" in message:
            _check_weight(message)
    return value


def _check_weight(message):
    weight = message["weight"]
    if message["role"] != "assistant":
        raise UserError(
            f"a message of {message['role']!r} has a weight; only the assistant's are "
            "learned"
        )
    if isinstance(weight, bool) or weight not in (0, 1):
        raise UserError(
            f"a message's weight is {weight!r}, expected 0 (not learned) or 1"
        )


def check_turns(messages, last=ROLES):
    """Refuses what no conversation looks like; returns the messages.

    Args:
        messages: a whole conversation: perhaps a system message, then a user's and an
            assistant's in turn.
        last: roles it may end with.
    """
    allowed = ("system", "user")
    for number, message in enumerate(messages, 1):
        if message["role"] not in allowed:
            raise UserError(
                f"message {number} is of {message['role']!r}, expected "
                f"{' or '.join(map(repr, allowed))}: a system message may come first, "
                "then user and assistant take turns"
            )
        allowed = ("assistant",) if message["role"] == "user" else ("user",)
    if messages[-1]["role"] not in last:
        raise UserError(
            f"the last message is of {messages[-1]['role']!r}, expected "
            f"{' or '.join(map(repr, last))}"
        )
    return messages


def conversation(record):
    """The messages of a demonstration: {"messages"} or {"prompt", "completion"}."""
    if "messages" in record:
        messages = as_messages(record["messages"])
    else:
        answer = as_messages(record["completion"], role="assistant")
        messages = as_messages(record["prompt"]) + answer
    if not any(m["role"] == "assistant" and m.get("weight", 1) for m in messages):
        raise UserError("expected at least one assistant message to learn from")
    return check_turns(messages)
