"""`stagecraft serve` from the shell: asked, stopped, and refused."""

import os
import select
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from stagecraft.errors import UserError
from stagecraft.run import open_run
from stagecraft.serve import model_app
from tests.conftest import ROOT


class Command:
    """A running `stagecraft serve`."""

    def __init__(self, *arguments, **environment):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "stagecraft", "serve", "--port=0", *arguments],
            cwd=ROOT,
            env=os.environ
            | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"}
            | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        ready, _, _ = select.select([self.process.stdout], [], [], 120)
        self.url = self.process.stdout.readline().strip() if ready else ""

    def end(self, number):
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


def test_a_stage_is_served_until_ctrl_c(tiny_run):
    command = Command(f"--workdir={tiny_run}", "--stage=sft", "--key=KEY", KEY="sk-1")
    assert command.url.startswith("http://127.0.0.1:")
    headers = {"authorization": "Bearer sk-1"}
    with httpx.Client(base_url=command.url, timeout=120, headers=headers) as client:
        assert client.get("/v1/models").json()["data"][0]["id"] == "sft"
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        body = dict(messages=messages, max_tokens=8, temperature=0)
        answer = client.post("/v1/chat/completions", json=body).json()
        run = open_run(tiny_run)
        language = run.language("sft", 1)
        ((text, _),) = language.complete([messages], max_new_tokens=8)
        assert answer["choices"][0]["message"]["content"] == text
        # In the middle of an answer: its client is told, and the command ends.
        body |= dict(stream=True, max_tokens=64, n=8)
        with client.stream("POST", "/v1/chat/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            status, out, err = command.end(signal.SIGINT)
            assert len(list(lines)) > 0
    assert (status, out) == (0, "")
    assert "Traceback" not in err and "sk-1" not in err


def test_what_cannot_be_served_is_one_line(tiny_run, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port={port}: cannot listen on 127"):
            model_app.serve(tiny_run, "sft", port=port)
    monkeypatch.setenv("EMPTY", "")
    for root, stage, settings, says in (
        (tiny_run, "reward", {}, "--stage=reward: expected a finished stage that wri"),
        (tiny_run, "nothing", {}, "--stage=nothing: expected a finished stage"),
        (tiny_run / "none", "", {}, "no run here"),
        (None, "nowhere", {}, "--stage=nowhere: expected hf:FOLDER, the folder of a"),
        (None, "hf:nowhere", {}, "nowhere"),
        (None, str(tiny_run / "reward"), {}, "reward.*writes no text"),
        (tiny_run, "sft", dict(key="EMPTY"), "--key='EMPTY': there is no such env"),
        (tiny_run, "sft", dict(host="0.0.0.0"), "--host=0.0.0.0: whoever .*--key=NAME"),
        (tiny_run, "sft", dict(port=70000), "--port=70000: cannot listen"),
    ):
        with pytest.raises(UserError, match=says) as error:
            model_app.serve(root, stage, **settings)
        assert "\n" not in str(error.value)
