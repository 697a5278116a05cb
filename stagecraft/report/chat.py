"""A conversation with one stage's model on the terminal."""

import sys

import jax

from stagecraft.anatomy import behaviour
from stagecraft.errors import UserError


def chat(run, name, *, temperature=0.0, max_new_tokens=64, seed=0):
    """Holds a conversation with one stage's model; answers appear token by token.

    An empty line, /quit or the end of input ends it, /reset begins anew. A model of
    bare text continues each line by itself.

    Args:
        run: a `runs.Run`.
        name: a finished stage that writes text.
        temperature, max_new_tokens, seed: of the sampling.
    """
    speaking = behaviour.speaking_stages(run)
    if name not in speaking:
        names = ", ".join(speaking) or "none is finished"
        raise UserError(
            f"--stage={name}: expected a finished stage that writes text: {names}"
        )
    with jax.set_mesh(run.mesh()):
        language = run.language(name, 1)
        in_turns, messages = run.chat_format(name), []
        for text in _lines():
            if text == "/reset":
                messages = []
                continue
            asked = [*messages, {"role": "user", "content": text}]
            answer = language.stream(
                asked if in_turns else text,
                chat=in_turns,
                temperature=temperature,
                max_new_tokens=max_new_tokens,
                seed=seed + len(asked),
            )
            try:
                reply = _show_answer(name, answer)
            except UserError as error:  # too long, or nothing its template can write
                print(f"{error}; /reset begins anew")
                continue
            messages = [*asked, {"role": "assistant", "content": reply}]


def _lines():
    """Lines typed or piped in, until an empty one, /quit or the end."""
    prompt = "you> " if sys.stdin.isatty() else ""
    while True:
        try:
            text = input(prompt).strip()
        except EOFError:
            print()
            return
        if text in ("", "/quit"):
            return
        yield text


def _show_answer(name, answer):
    """Prints an answer while it is sampled; returns its text."""
    parts, started, whole = [], False, False
    for more, ended in answer:
        if not parts:  # there is room for it, and the template could write it
            print(f"{name}> ", end="")
        parts.append(more)
        shown = more if started else more.lstrip()
        started, whole = started or bool(shown), ended
        print(shown, end="", flush=True)
    print("" if whole else " ...")
    return "".join(parts)
