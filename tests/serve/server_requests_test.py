"""A served model and requests that are wrong, too large, locked out, or given up."""

import json
import re
import socket
import time

import jax
import pytest
from starlette.testclient import TestClient

from stagecraft.serve import engine as engines
from stagecraft.serve import model_app
from tests.serve.live import CONTEXT, Live, language

JSON = {"content-type": "application/json"}
CHAT = [{"role": "user", "content": "a"}]


@pytest.fixture(scope="module")
def live():
    server = Live(language(), rows=2)
    yield server
    server.close()


def refused(answer, param, says, status=400):
    """Checks that an answer is a line in OpenAI's form that names what is wrong."""
    error = answer.json()["error"]
    assert answer.status_code == status and error["param"] == param
    assert error["type"] == "invalid_request_error"
    message = error["message"]
    assert re.search(says, message) and "\n" not in message, message
    assert param is None or message.startswith(f"{param}: ")


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        (dict(), "prompt", "expected a text, ids"),
        (dict(prompt=[]), "prompt", "expected a text, ids"),
        (dict(prompt=[[1], "a", 2.0]), "prompt", "expected a text, ids"),
        (dict(prompt=[[]]), "prompt", "expected a text, ids"),
        (dict(prompt=[True]), "prompt", "expected a text, ids"),
        (dict(prompt=[0, 263]), "prompt", "263 is no id of this model .0 to 262."),
        (dict(prompt=[-1]), "prompt", "-1 is no id"),
        (dict(prompt="a\ud800"), "prompt", "half of a character"),
        (dict(prompt=["a"] * 65, n=2), "prompt", "more than the 128 choices"),
        (dict(prompt="a", promt="b"), "promt", "did you mean 'prompt'"),
        (dict(prompt="a", messages=[]), "messages", "not a field"),
        (dict(prompt="a", logit_bias={"3": 5}), "logit_bias", "not supported"),
        (dict(prompt="a", best_of=2), "best_of", "2 is not supported"),
        (dict(prompt="a", presence_penalty=1), "presence_penalty", "1 is not supp"),
        (dict(prompt="a", n=0), "n", "whole number from 1 to 128, got 0"),
        (dict(prompt="a", n=1.5), "n", "whole number"),
        (dict(prompt="a", max_tokens=-1), "max_tokens", "whole number from 0"),
        (dict(prompt="a", max_tokens=True), "max_tokens", "whole number"),
        (dict(prompt="a", temperature=3), "temperature", "a number from 0 to 2"),
        (dict(prompt="a", temperature="1"), "temperature", "a number from 0 to 2"),
        (dict(prompt="a", top_p=0), "top_p", "more than 0"),
        (dict(prompt="a", seed=2**63), "seed", "whole number"),
        (dict(prompt="a", logprobs=21), "logprobs", "from 0 to 20"),
        (dict(prompt="a", logprobs=True), "logprobs", "whole number"),
        (dict(prompt="a", stop=[""]), "stop", "expected a text, or up to 16"),
        (dict(prompt="a", stop=["x"] * 17), "stop", "expected a text, or up to 16"),
        (dict(prompt="a", stop=3), "stop", "expected a text, or up to 16"),
        (dict(prompt="a", stream="yes"), "stream", "true or false"),
        (dict(prompt="a", echo=1), "echo", "true or false"),
        (dict(prompt="a", stream_options={}), "stream_options", "with stream"),
        (dict(prompt="a" * CONTEXT), "prompt", f"context of {CONTEXT} tokens"),
        (dict(prompt="a", max_tokens=CONTEXT - 1), "prompt", "max_tokens=159 exceed"),
        (dict(prompt="a", model="gpt"), "model", "one model, 'tiny'"),
    ],
)
def test_a_wrong_field_is_named(live, body, param, says):
    answer = live.client.post("completions", content=json.dumps(body), headers=JSON)
    refused(answer, param, says, 404 if param == "model" else 400)


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        (dict(), "messages", "expected a list"),
        (dict(messages="a"), "messages", "expected a list"),
        (dict(messages=[]), "messages", "list of messages"),
        (dict(messages=["a"]), "messages", "expected messages like"),
        (dict(messages=[{"role": "x", "content": "a"}]), "messages", "role 'x'"),
        (dict(messages=[{"role": "user"}]), "messages", "expected messages like"),
        (
            dict(messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
            "messages",
            "type 'text' alone",
        ),
        (dict(messages=CHAT, tools=[{"type": "function"}]), "tools", "not supported"),
        (dict(messages=CHAT, top_logprobs=2), "top_logprobs", "needs logprobs=true"),
        (dict(messages=CHAT, logprobs=2), "logprobs", "true or false"),
        (dict(messages=CHAT, max_tokens=0), "max_tokens", "from 1"),
        (dict(messages=CHAT, echo=True), "echo", "not a field"),
        (
            dict(messages=CHAT, response_format={"type": "json_object"}),
            *("response_format", "not supported"),
        ),
        (
            dict(messages=[{"role": "user", "content": "a" * CONTEXT}]),
            "messages",
            "exceed the context",
        ),
    ],
)
def test_a_wrong_message_is_named(live, body, param, says):
    refused(live.client.post("chat/completions", json=body), param, says)


def test_neutral_fields_of_clients_are_taken(live):
    body = dict(model="tiny", prompt="a", max_tokens=2, temperature=0, best_of=1)
    body |= dict(presence_penalty=0.0, logit_bias=None, user="me", suffix=None)
    body |= dict(frequency_penalty=0, stop=None, seed=None, logprobs=None, stream=False)
    assert live.ask(**body)["choices"][0]["logprobs"] is None
    more = dict(tools=[], tool_choice="none", response_format={"type": "text"})
    live.ask("chat/completions", messages=CHAT, max_completion_tokens=2, **more)
    system = [{"role": "developer", "content": "Be brief."}, *CHAT]
    long = live.ask("chat/completions", messages=system, max_tokens=1)["usage"]
    short = live.ask("chat/completions", messages=CHAT, max_tokens=1)["usage"]
    assert long["prompt_tokens"] == short["prompt_tokens"] + 1 + len("Be brief.")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "the body is not JSON"),
        (b"\xff", "the body is not JSON"),
        (b"[" * 100_000, "the body is not JSON"),
        (b'{"prompt": "a", "temperature": NaN}', "NaN is no JSON"),
        (b"[1]", "not a JSON object"),
        (b"", "the body is not JSON"),
    ],
)
def test_bad_json_is_one_line(live, content, says):
    answer = live.client.post("completions", content=content, headers=JSON)
    refused(answer, None, says)


def test_a_body_of_10_megabytes_is_refused_and_heard(live):
    body = json.dumps({"prompt": "a" * 10_000_000}).encode()
    refused(
        live.client.post("completions", content=body, headers=JSON),
        None,
        "at most 4194304 bytes",
        413,
    )
    assert live.ask(prompt="a", max_tokens=1)


def test_paths_methods_and_models(live):
    listed = live.client.get("models").json()
    assert [one["id"] for one in listed["data"]] == ["tiny"]
    assert live.client.get("models/tiny").json() == listed["data"][0]
    assert live.client.get("models/other").json()["error"]["code"] == "model_not_found"
    for answer, status in (
        (live.client.get("models/other"), 404),
        (live.client.get("nothing"), 404),
        (live.client.get("completions"), 405),
        (live.client.put("completions", json={}), 405),
        (live.client.post("completions", data={"prompt": "a"}), 415),
        (live.client.post("completions", json={}, headers={"host": "a.b"}), 421),
        (live.client.post("completions", json={}, headers={"origin": "http://a"}), 403),
    ):
        assert answer.status_code == status and answer.json()["error"]["message"]


def test_a_model_of_bare_text_has_no_chat(live):
    settings = dict(name="bare", in_turns=False, port=80)
    app = model_app.app(live.language, live.engine, **settings)
    with TestClient(app, base_url="http://127.0.0.1:80") as client:
        client.headers["host"] = "127.0.0.1:80"
        answer = client.post("/v1/chat/completions", json={"messages": CHAT})
        refused(answer, "messages", "trained on bare text.* ask /completions")


def test_a_key_opens_the_server_and_nothing_else_does(live):
    settings = dict(name="it", in_turns=True, key="sk-secret", hosts=(), port=80)
    app = model_app.app(live.language, live.engine, **settings)
    with TestClient(app, base_url="http://anywhere.example") as client:
        for header in (
            None,
            "sk-secret",
            "Basic sk-secret",
            "Bearer sk-wrong",
            "Bearer",
        ):
            headers = {} if header is None else {"authorization": header}
            for answer in (
                client.get("/v1/models", headers=headers),
                client.post("/v1/completions", json={}, headers=headers),
            ):
                error = answer.json()["error"]
                assert (answer.status_code, error["code"]) == (401, "invalid_api_key")
                assert "sk-" not in answer.text
        headers = {"authorization": "Bearer sk-secret"}
        assert client.get("/v1/models", headers=headers).status_code == 200
        body = {"prompt": "a", "max_tokens": 1}
        answer = client.post("/v1/completions", json=body, headers=headers)
        assert answer.status_code == 200


def slowly(monkeypatch, live):
    """Makes each block of steps take a twentieth of a second; returns their count."""
    blocks, advance = [], live.engine._advance

    def slow():
        blocks.append(1)
        time.sleep(0.05)
        advance()

    monkeypatch.setattr(live.engine, "_advance", slow)
    return blocks


LONG = dict(prompt=[[65]] * 6, max_tokens=CONTEXT - 1, temperature=0)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_rows(live, monkeypatch, stream):
    live.ask(**LONG)  # compiled, and known not to end early
    blocks = slowly(monkeypatch, live)
    body = json.dumps(LONG | {"stream": stream}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {live.client.base_url.netloc.decode()}"
    )
    head += f"\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(
        (live.client.base_url.host, live.client.base_url.port)
    ) as it:
        it.sendall(head.encode() + body)
        while not blocks:
            time.sleep(0.01)
        assert live.engine.busy() == 6  # two in rows, four that wait
    assert live.idle(2.0) and len(blocks) < (CONTEXT // engines.STEPS)
    whole = live.ask(prompt=[[65]], max_tokens=9, temperature=0)  # as in LONG
    assert whole["usage"]["completion_tokens"] == 9


def test_more_than_can_wait_is_refused_for_now(live, monkeypatch):
    monkeypatch.setattr(engines, "WAITING", 5)
    answer = live.client.post("completions", json=LONG)
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
    assert "wait already; try later" in answer.json()["error"]["message"]
    assert live.ask(prompt="a", max_tokens=2) and live.idle()


@pytest.mark.parametrize("program", ["advance", "insert"])
def test_what_the_device_cannot_do_fails_alone(live, monkeypatch, program):
    def broken(*arguments, **_):
        if program == "insert":  # whose first argument is given away
            jax.tree.map(lambda array: array.delete(), arguments[0])
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nand more")

    with monkeypatch.context() as patch:
        patch.setattr(engines.slots, program, broken)
        answer = live.client.post("completions", json={"prompt": "a", "max_tokens": 9})
        error = answer.json()["error"]
        assert (answer.status_code, error["type"]) == (500, "server_error")
        assert error["message"] == "RESOURCE_EXHAUSTED: out of memory"
        body = {"prompt": "a", "max_tokens": 9, "stream": True}
        lines = live.client.post("completions", json=body).text.split("\n\n")
        assert "server_error" in lines[-2] and "[DONE]" not in lines[-2]
    whole = live.ask(prompt=[[65]], max_tokens=9, temperature=0)  # as in LONG
    assert whole["usage"]["completion_tokens"] == 9
