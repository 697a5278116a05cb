"""A conversation as typed: commands, paste, ctrl-C, logs, the default stage."""

import contextlib
import io
import logging
import os
import select
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from stagecraft.errors import UserError
from stagecraft.report import chat

ROOT = Path(__file__).parents[2]


class Language:
    """Answers with what it was asked, piece by piece; `during` happens in between."""

    def __init__(self, during=lambda: None):
        self.during, self.asked, self.model = during, [], {}

    def stream(self, prompt, *, chat, seed=0, **settings):
        if isinstance(prompt, str):  # to be compiled
            yield "warm", False
            yield "", True
            return
        self.asked.append([m["content"] for m in prompt])
        yield "one ", False
        self.during()
        yield "two", True


class Run:
    root = Path("runs/a")
    config = ConfigDict(
        {"stages": {"sft": {"start_from": ""}, "dpo": {"start_from": "sft"}}}
    )

    def __init__(self, language, bare=()):
        self.model, self.bare = language, bare

    def mesh(self):
        return None

    def language(self, name, rows):
        return self.model

    def chat_format(self, name):
        return name not in self.bare


@pytest.fixture
def talk(monkeypatch, capsys):
    """(language, what is typed) -> what is printed."""
    monkeypatch.setattr(chat.jax, "set_mesh", lambda mesh: contextlib.nullcontext())
    monkeypatch.setattr(chat.behaviour, "speaking_stages", lambda run: ["sft", "dpo"])

    def talk(language, typed, name=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        chat.chat(Run(language), name)
        return capsys.readouterr().out

    return talk


def test_unknown_commands_are_refused_and_said_to_nobody(talk):
    language = Language()
    out = talk(
        language, "/exit now\n /etc is a folder\n/reset\nb\n/quit\n"
    ).splitlines()
    assert out[0] == "/exit: no such command; there are /quit, /reset"
    assert language.asked == [["/etc is a folder"], ["b"]]


def test_a_backslash_goes_on_in_the_next_line(talk):
    language = Language()
    talk(language, "a\\\nb\\\nc\n")
    assert language.asked == [["a\nb\nc"]]


def test_ctrl_c_stops_the_answer_and_not_the_conversation(talk):
    def interrupt():
        if len(language.asked) == 1:
            raise KeyboardInterrupt

    language = Language(interrupt)
    out = talk(language, "a\nb\n").splitlines()
    assert out[:2] == ["dpo> one  ...", "dpo> one two"]
    assert language.asked == [["a"], ["a", "one ", "b"]]


def test_log_lines_come_after_the_answer(talk):
    log, out = logging.getLogger("stagecraft"), []
    handler = logging.Handler()
    handler.emit = lambda record: out.append(sys.stdout.getvalue())
    handlers, log.handlers = log.handlers, [handler]
    sys_stdout, sys.stdout = sys.stdout, io.StringIO()
    try:
        talk(Language(lambda: log.warning("compiled")), "a\n")
    finally:
        log.handlers, sys.stdout = handlers, sys_stdout
    assert out == ["dpo> one two\n"]


def test_the_end_of_the_longest_chain_that_answers_in_turns_by_default(monkeypatch):
    names = ["pretrain", "sft", "more_text", "dpo", "ppo", "sft_scratch"]
    parents = dict(sft="pretrain", more_text="sft", dpo="sft", ppo="sft")
    stages = {name: {"start_from": parents.get(name, "")} for name in names}
    monkeypatch.setattr(Run, "config", ConfigDict({"stages": stages}))
    monkeypatch.setattr(chat.behaviour, "speaking_stages", lambda run: names)
    run = Run(None, bare=("pretrain", "more_text"))
    assert (
        chat.stage_to_ask(run, "") == "dpo"
        and chat.stage_to_ask(run, "pretrain") == "pretrain"
    )
    assert chat.stage_to_ask(Run(None, bare=names), "") == "more_text"
    names.remove("dpo")
    assert chat.stage_to_ask(run, "") == "ppo"
    names.remove("ppo")
    assert chat.stage_to_ask(run, "") == "sft"  # and not sft_scratch, which comes later
    with pytest.raises(UserError, match="--stage=dpo: expected a finished stage"):
        chat.stage_to_ask(run, "dpo")
    names.clear()
    with pytest.raises(UserError, match="none is finished"):
        chat.stage_to_ask(run, "")


def test_the_banner_has_two_lines(monkeypatch):
    config = types.SimpleNamespace(max_length=128)
    model = types.SimpleNamespace(model=types.SimpleNamespace(config=config))
    monkeypatch.setattr(chat.behaviour, "speaking_stages", lambda run: ["sft", "dpo"])
    monkeypatch.setattr(chat.tree, "count", lambda model: 1234)
    first, second = chat._banner(Run(None), "dpo", model, {"temperature": 0.7}).split(
        "\n"
    )
    want = (
        "dpo of runs/a (--stage= also sft): 1,234 parameters, 128 tokens, temperature"
    )
    assert first == f"{want} 0.7" and second == chat.HELP


# Its terminal is the one whose ctrl-C reaches it, also where the tests run in the
# background and so ignore it.
PROGRAM = """
import fcntl, signal, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.default_int_handler)
from stagecraft.report import chat
for text in chat.lines():
    print("got", repr(text), flush=True)
print("over", flush=True)
"""

CTRL_C = b"\x03"


@pytest.fixture
def terminal():
    """(what is typed, what to wait for, what then) -> what the terminal has shown."""
    pty = pytest.importorskip("pty")
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=child,
        stdout=child,
        stderr=child,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm"},
        start_new_session=True,
    )
    os.close(child)
    shown = ""

    def type_(keys, until, then="you> "):
        nonlocal shown
        # Python's readline looks for signals and then waits for keys: a ctrl-C that
        # falls in between is seen no sooner than the next.
        time.sleep(0.3 if keys == CTRL_C else 0)
        os.write(parent, keys)
        fresh, began, sent = "", time.monotonic(), 1
        # A key before the next prompt is no key at it.
        while then not in fresh.partition(until)[2] or until not in fresh:
            waited = time.monotonic() - began
            if waited > 60:
                break
            if keys == CTRL_C and not fresh and waited > 10 * sent:
                os.write(parent, keys)
                sent += 1
            if select.select([parent], [], [], 0.1)[0]:
                try:
                    fresh += os.read(parent, 4096).decode(errors="replace")
                except OSError:
                    break
        shown += fresh
        assert then in fresh.partition(until)[2] and until in fresh, shown
        return fresh

    yield type_
    process.kill()
    process.wait()
    os.close(parent)


def test_keys_of_a_terminal(terminal):
    pytest.importorskip("readline")
    terminal(b"", "you> ", "")
    terminal(b"first\r", "got 'first'")
    terminal(b"\x1b[A\r", "got 'first'")  # the arrow key brings it back
    pasted = b"\x1b[200~def f():\n\n    pass\x1b[201~\r"
    terminal(pasted, r"got 'def f():\n\n    pass'")
    terminal(CTRL_C, chat.AGAIN)
    terminal(b"more\r", "got 'more'")  # one ctrl-C is forgotten
    terminal(CTRL_C, chat.AGAIN)
    terminal(CTRL_C, "over", "")
