"""What finished stages say: one prompt through all of them, or a talk."""

import sys

import jax
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stagecraft.errors import UserError

# Kinds of stages whose model writes text.
SPEAKING = (
    *("language_model", "preference", "unpaired_preference"),
    *("policy", "group_policy", "online_preference"),
)


def speaking_stages(run):
    """Finished stages whose model writes text, in the order of the graph."""
    return [
        name
        for name in run.stages
        if run.config.stages[name].kind in SPEAKING and run.finished(name)
    ]


def through_stages(
    run, prompt, *, temperature=0.0, samples=1, max_new_tokens=48, seed=0
):
    """The same prompt given to every finished stage.

    Args:
        run: a `runs.Run`.
        prompt: a text; a base model continues it bare, the others answer it as a turn.
        temperature, samples, max_new_tokens, seed: of the sampling.

    Returns:
        {stage: [{"text", "ended", "temperature"}]}.
    """
    names = speaking_stages(run)
    if not names:
        raise UserError(
            f"{run.root}: no finished stage yet; run it: stagecraft run "
            f"--config=... --workdir={run.root}"
        )
    answers = {}
    mesh = run.mesh()
    with jax.set_mesh(mesh):
        for name in names:
            language = run.language(name, samples, mesh)
            got = language.complete(
                [prompt] * samples,
                chat=run.chat_format(name),
                temperature=temperature,
                max_new_tokens=max_new_tokens,
                seed=seed,
            )
            answers[name] = [
                {"temperature": temperature, "text": text, "ended": ended}
                for text, ended in got
            ]
    return answers


def show(prompt, answers, file=None):
    """Prints what `through_stages` returned, stages side by side in rows."""
    console = Console(file=file or sys.stdout, highlight=False)
    table = Table(title=Text(prompt), show_lines=True, title_justify="left")
    table.add_column("stage", no_wrap=True)
    table.add_column("says", overflow="fold")
    for name, found in answers.items():
        says = Text("\n").join(
            Text(one["text"].strip() + ("" if one["ended"] else " ..."))
            for one in found
        )
        table.add_row(name, says)
    console.print(table)


def chat(run, name, *, temperature=0.0, max_new_tokens=64, seed=0):
    """A talk with one stage's model on the terminal; answers come token by token.

    An empty line, /quit or the end of input ends it, /reset begins anew. A model of
    bare text continues each line by itself.
    """
    if name not in speaking_stages(run):
        known = ", ".join(speaking_stages(run)) or "none is finished"
        raise UserError(
            f"--stage={name}: expected a finished stage that writes text: {known}"
        )
    mesh = run.mesh()
    with jax.set_mesh(mesh):
        language = run.language(name, 1, mesh)
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
                said = _show_answer(name, answer)
            except UserError as error:  # too long, or nothing its template can write
                print(f"{error}; /reset begins anew")
                continue
            messages = [*asked, {"role": "assistant", "content": said}]


def _lines():
    """What is typed, or piped in, until an empty line, /quit or the end."""
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
    """Prints an answer as it comes; returns its text."""
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
