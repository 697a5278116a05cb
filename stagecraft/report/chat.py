"""A conversation with one stage's model on the terminal."""

import contextlib
import logging
import logging.handlers
import sys
from collections.abc import Iterator

import jax

from stagecraft import process, runs, tree
from stagecraft.anatomy import behaviour
from stagecraft.errors import UserError
from stagecraft.models.language import ROUND

COMMANDS = ("/quit", "/reset")
HELP = (
    "/quit or an empty line ends, /reset forgets, ctrl-C stops an answer; a line that "
    "ends in \\ goes on"
)
AGAIN = "ctrl-C again, or /quit, ends"


def chat(
    run: runs.Run,
    name: str = "",
    *,
    temperature: float = 0.0,
    max_new_tokens: int = 64,
    seed: int = 0,
) -> None:
    """Holds a conversation with one stage's model; answers appear token by token.

    A model of bare text continues each line by itself. What is compiled is compiled
    before the first line is asked for.

    Args:
        run: a `runs.Run`.
        name: a finished stage that writes text; "" for the one that answers in turns
            and most stages led up to, the first of several.
        temperature, max_new_tokens, seed: of the sampling.
    """
    name = stage_to_ask(run, name)
    with jax.set_mesh(run.mesh()):
        language = run.language(name, 1)
        in_turns, messages = run.chat_format(name), []
        settings = {"temperature": temperature, "max_new_tokens": max_new_tokens}
        _warm_up(language, in_turns, settings)
        if sys.stdin.isatty():
            print(_banner(run, name, language, settings))
        for text in lines():
            if text == "/reset":
                messages = []
                continue
            asked = [*messages, {"role": "user", "content": text}]
            pieces = language.stream(
                asked if in_turns else text,
                chat=in_turns,
                seed=seed + len(asked),
                **settings,
            )
            try:
                with _logs_held_back():
                    reply = _show_answer(name, pieces)
            except UserError as error:  # too long, or nothing its template can write
                print(f"{error}; /reset begins anew")
                continue
            if reply:
                messages = [*asked, {"role": "assistant", "content": reply}]


def stage_to_ask(run, name):
    """Returns the stage to talk to, which is finished and writes text.

    Args:
        run: a `runs.Run`.
        name: as of `chat`.
    """
    speaking = behaviour.speaking_stages(run)
    if name in speaking:
        return name
    if name or not speaking:
        names = ", ".join(speaking) or "none is finished"
        raise UserError(
            f"--stage={name}: expected a finished stage that writes text: {names}"
        )
    in_turns = [stage for stage in speaking if run.chat_format(stage)]
    return max(in_turns or speaking, key=lambda stage: _depth(run.config, stage))


def _depth(config, name):
    """Returns how many stages of the run a model went through."""
    depth = 0
    while name in config.stages:
        name, depth = config.stages[name].start_from, depth + 1
    return depth


def _banner(run, name, language, settings):
    """Returns two lines: with whom one talks, and how."""
    heat = settings["temperature"]
    others = [stage for stage in behaviour.speaking_stages(run) if stage != name]
    others = f" (--stage= also {', '.join(others)})" if others else ""
    count, limit = tree.count(language.model), language.model.config.max_length
    how = f"temperature {heat:g}" if heat else "the likeliest answers"
    return (
        f"{name} of {run.root}{others}: {count:,} parameters, {limit} tokens, {how}\n"
        f"{HELP}"
    )


def _warm_up(language, in_turns, settings):
    """Compiles what the first turns need: prompts are padded to a few lengths."""
    for words in ("Hi", "Hi " * ROUND):
        with contextlib.suppress(UserError):  # no room for it
            pieces = language.stream(words, chat=in_turns, **settings)
            next(pieces), next(pieces, None)
            pieces.close()


def lines() -> Iterator[str]:
    r"""Yields what is typed or piped in, until an empty line, /quit or the end.

    A line that ends in a backslash goes on in the next, and so does text pasted into a
    terminal that marks what is pasted. Commands that are not known are refused; a space
    before a slash makes text of it. Two ctrl-C at an empty prompt end it.
    """
    prompt = "you> " if sys.stdin.isatty() else ""
    if prompt:
        _edit_lines()
    stopped = False
    while True:
        try:
            line = input(prompt)
            while line.endswith("\\"):
                line = f"{line[:-1]}\n{input('...> ' if prompt else '')}"
        except EOFError:
            print()
            return
        except KeyboardInterrupt as stop:
            if isinstance(stop, process.Stopped) or not prompt:
                raise
            if stopped:
                print()
                return
            stopped = True
            print(f"\n{AGAIN}")
            continue
        stopped, text = False, line.strip()
        if text in ("", "/quit"):
            return
        if line.startswith("/") and text not in COMMANDS:
            commands = ", ".join(COMMANDS)
            print(f"{text.split()[0]}: no such command; there are {commands}")
            continue
        yield text


def _edit_lines():
    """Turns on arrow keys, history and pasted text as one line, where there are any."""
    try:
        import readline
    except ImportError:
        return
    with contextlib.suppress(Exception):  # libedit does not know it
        readline.parse_and_bind("set enable-bracketed-paste on")


@contextlib.contextmanager
def _logs_held_back():
    """Keeps log lines out of an answer; they come after it."""
    log = logging.getLogger("stagecraft")
    memory = logging.handlers.MemoryHandler(10_000, flushLevel=sys.maxsize)
    handlers, log.handlers = log.handlers, [memory]
    try:
        yield
    finally:
        log.handlers = handlers
        for record in memory.buffer:
            log.handle(record)


def _show_answer(name, pieces):
    """Prints an answer while it is sampled; returns its text.

    Ctrl-C stops the answer, which stays as far as it came.
    """
    parts, started, whole = [], False, False
    try:
        for more, ended in pieces:
            if not parts:  # there is room for it, and the template could write it
                print(f"{name}> ", end="")
            parts.append(more)
            shown = more if started else more.lstrip()
            started, whole = started or bool(shown), ended
            print(shown, end="", flush=True)
    except KeyboardInterrupt as stop:
        if isinstance(stop, process.Stopped):
            raise
        pieces.close()
    print("" if whole else " ...")
    return "".join(parts)
