"""A judge over HTTP: what it reads, what it waits for, and what it never tells."""

import contextlib
import http.server
import json
import math
import socket
import threading
import time

import numpy as np
import pytest

from stagecraft import defaults
from stagecraft.errors import UserError
from stagecraft.signals import endpoint, template
from stagecraft.signals.endpoint import Endpoint
from stagecraft.signals.judge import Judge

SECRET = "sk-never-to-be-seen"
PAIR = (("Paris.", True), ("Rome.", True))


class Server:
    """A loopback server; `reply` answers (path, body) with (status, headers, bytes).

    Attributes:
        asked: [(path, body, headers)], in order.
    """

    def __init__(self, reply):
        self.asked, server = [], self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                size = int(self.headers["Content-Length"])
                body = json.loads(self.rfile.read(size))
                server.asked.append((self.path, body, dict(self.headers)))
                with contextlib.suppress(OSError):
                    self._send(reply(self.path, body))

            def _send(self, answer):
                if callable(answer):
                    answer(self.wfile)
                    return
                status, headers, data = answer
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.inner = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.inner.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.inner.server_port}/v1"
        threading.Thread(target=self.inner.serve_forever, args=(0.02,)).start()


@pytest.fixture
def serve():
    servers = []

    def start(reply):
        servers.append(Server(reply))
        return servers[-1]

    yield start
    for one in servers:
        one.inner.shutdown()
        one.inner.server_close()


def ok(value):
    return 200, {}, json.dumps(value).encode()


def chat(*tokens, usage=7):
    top = [{"token": token, "logprob": logp} for token, logp in tokens]
    content = [{"token": tokens[0][0], "logprob": 0.0, "top_logprobs": top}]
    choice = {"message": {"content": "A"}, "logprobs": {"content": content}}
    return ok({"choices": [choice], "usage": {"total_tokens": usage}})


def settings(server, **changes):
    own = defaults.judge()
    own.update(dict(url=server.url, model="m", timeout=5.0, parallel=1) | changes)
    return own


def rate(server, folder=None, pair=PAIR, **changes):
    own = settings(server, **changes)
    return Judge(Endpoint(own, folder), own).rate(["Capital?"], [pair])[0]


def test_chat_labels_are_those_of_the_first_token(serve):
    tokens = ("A", -1.0), (" A", -2.0), (" B", -1.5), ("The", -3.0)
    server = serve(lambda path, body: chat(*tokens))
    verdict = rate(server)
    logps = [np.logaddexp(-1.0, -2.0), -1.5]
    np.testing.assert_allclose(verdict.evidence["logps"], [logps, logps])
    assert verdict.probability == 0.5 and verdict.evidence["tokens"] == 14
    assert "bounded" not in verdict.evidence
    (path, body, headers), (_, other, _) = server.asked
    assert path == "/v1/chat/completions" and body["model"] == "m"
    assert (body["max_tokens"], body["temperature"]) == (1, 0)
    assert (body["logprobs"], body["top_logprobs"]) == (True, 20)
    assert "Authorization" not in headers
    texts = [one["messages"][-1]["content"] for one in (body, other)]
    assert texts[0] != texts[1] and texts[0].index("Paris") < texts[0].index("Rome")


def test_a_label_that_is_not_reported_is_bounded_and_not_zero(serve):
    server = serve(lambda path, body: chat(("A", -0.1), ("The", -2.5), ("An", -4.0)))
    verdict = rate(server)
    assert verdict.evidence["logps"] == [[-0.1, -4.0]] * 2
    assert verdict.evidence["bounded"] == [[1], [1]]
    none = rate(serve(lambda path, body: chat(("The", -0.1))))
    assert (none.probability, none.reason) == (None, "no_label")


def test_completions_read_whole_labels_from_an_echo(serve):
    def reply(path, body):
        assert path == "/v1/completions" and body["echo"] and body["max_tokens"] == 1
        text = body["prompt"]
        start = len(text) - 2  # " A" as two tokens, and one that was generated
        offsets = [0, start, start + 1, start + 2]
        logps = [None, -0.5, -1.0 if text[-1] == "A" else -2.0, -9.0]
        given = {"text_offset": offsets, "token_logprobs": logps}
        return ok({"choices": [{"logprobs": given}], "usage": {"total_tokens": 3}})

    verdict = rate(serve(reply), api="completions")
    assert verdict.evidence["logps"] == [[-1.5, -2.5]] * 2
    assert verdict.evidence["tokens"] == 12

    def melted(path, body):
        given = {"text_offset": [0, 5], "token_logprobs": [None, -1.0]}
        return ok({"choices": [{"logprobs": given}]})

    assert rate(serve(melted), api="completions").reason == "unparsed"


def junk(value):
    return ok({"choices": [{"logprobs": {"content": [{"top_logprobs": value}]}}]})


@pytest.mark.parametrize(
    "reply",
    [
        (200, {}, b"<html>"),
        (200, {}, b"[1]"),
        (200, {}, b"[" * 200_000),
        (200, {}, b"\xff\xfe{"),
        ok({}),
        ok({"choices": []}),
        ok({"choices": [{"logprobs": None}]}),
        junk([{"token": "A", "logprob": None}]),
        junk([{"token": "A", "logprob": True}]),
        junk([{"token": "A", "logprob": 3.0}]),
        (200, {}, b'{"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token":'
         b' "A", "logprob": NaN}]}]}}]}'),
        junk([{"token": "A", "logprob": 1e400}]),
        junk("A"),
    ],
)  # fmt: skip
def test_junk_is_no_verdict(serve, reply):
    verdict = rate(serve(lambda path, body: reply))
    assert (verdict.probability, verdict.reason) == (None, "unparsed")


def test_the_deadline_is_of_the_whole_question(serve):
    def hang(file):
        time.sleep(20)

    def drip(file):
        file.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        for _ in range(100):
            file.write(b" ")
            file.flush()
            time.sleep(0.05)

    def drip_headers(file):
        for byte in b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100:
            file.write(bytes([byte]))
            file.flush()
            time.sleep(0.05)

    for slow in (hang, drip, drip_headers):
        server, began = serve(lambda path, body, slow=slow: slow), time.monotonic()
        verdict = rate(server, timeout=0.4)
        assert (verdict.probability, verdict.reason) == (None, "timed_out")
        # Two questions, one after the other; neither is asked again.
        assert time.monotonic() - began < 4 and len(server.asked) == 2


def test_a_reply_has_a_largest_size(serve, monkeypatch):
    monkeypatch.setattr(endpoint, "MOST_BYTES", 1000)
    big = ok({"padding": "x" * 1000})
    assert rate(serve(lambda path, body: big)).reason == "too_large"


def test_busy_endpoints_are_asked_again_as_late_as_they_say(serve, monkeypatch):
    waited, left = [], [(429, {"Retry-After": "2"}, b""), (503, {}, b"")]
    monkeypatch.setattr(endpoint.time, "sleep", waited.append)

    def reply(path, body):
        return left.pop(0) if left else chat(("A", -1.0), ("B", -2.0))

    server = serve(reply)
    assert rate(server, timeout=60.0).probability == 0.5
    assert waited == [2.0, 1.0] and len(server.asked) == 4
    # Longer than there is time for is no reason to wait at all.
    busy = serve(lambda path, body: (429, {"Retry-After": "3600"}, b""))
    assert rate(busy).reason == "unavailable" and len(busy.asked) == 2
    broken = serve(lambda path, body: (500, {}, b""))
    assert rate(broken, tries=3, timeout=60.0).reason == "unavailable"
    assert len(broken.asked) == 6


def test_what_the_client_did_wrong_is_final(serve):
    refused = serve(lambda path, body: (400, {}, b"too long"))
    assert rate(refused).reason == "refused" and len(refused.asked) == 2
    for status, says in (
        (401, "refuses the key .401."),
        (404, "no such path or model"),
    ):
        server = serve(lambda path, body, status=status: (status, {}, b""))
        with pytest.raises(UserError, match=says) as error:
            rate(server)
        assert len(server.asked) == 1 and "\n" not in str(error.value)


def test_a_redirect_is_not_followed(serve, monkeypatch):
    monkeypatch.setenv("A_KEY", SECRET)
    other = serve(lambda path, body: chat(("A", -1.0)))
    server = serve(lambda path, body: (307, {"Location": other.url}, b""))
    with pytest.raises(UserError, match="redirect .307., which is not followed"):
        rate(server, key="A_KEY")
    assert not other.asked


def test_nobody_there(serve):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    server = serve(lambda path, body: None)
    assert rate(server, url=url, tries=1).reason == "unreachable"


def test_a_key_goes_to_the_endpoint_and_nowhere_else(
    serve, monkeypatch, tmp_path, caplog, capsys
):
    monkeypatch.setenv("A_KEY", SECRET)
    server = serve(lambda path, body: chat(("A", -1.0), ("B", -2.0)))
    rate(server, tmp_path, key="A_KEY")
    assert server.asked[0][2]["Authorization"] == f"Bearer {SECRET}"
    bad = serve(lambda path, body: (401, {}, SECRET.encode()))
    with pytest.raises(UserError) as error:
        rate(bad, key="A_KEY")
    files = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    seen = [*files, str(error.value), caplog.text, *capsys.readouterr()]
    assert files and not any(SECRET in text for text in seen)
    own = settings(server, key="A_KEY")
    keyless = settings(server)
    assert Endpoint(own).identity == Endpoint(keyless).identity
    for value, says in (("", "no such environment"), (f"{SECRET}\n", "odd characters")):
        monkeypatch.setenv("A_KEY", value)
        with pytest.raises(UserError, match=says) as error:
            Endpoint(own)
        assert SECRET not in str(error.value)


def test_nothing_is_asked_twice_also_after_a_kill(serve, tmp_path):
    server = serve(lambda path, body: chat(("A", -1.0), ("B", -2.0)))
    first = rate(server, tmp_path)
    path = tmp_path / endpoint.FILE
    whole = path.read_bytes()
    assert len(server.asked) == 2 == whole.count(b"\n")
    # The pair turned round is the same two questions.
    turned = rate(server, tmp_path, pair=PAIR[::-1])
    assert len(server.asked) == 2
    assert turned.evidence["logps"] == first.evidence["logps"][::-1]
    path.write_bytes(whole[:-7])  # cut off in the second line
    assert rate(server, tmp_path) == first and len(server.asked) == 3
    assert path.read_bytes() == whole
    rate(server, tmp_path, model="other")
    assert len(server.asked) == 5


def test_a_failure_is_asked_again(serve, tmp_path):
    replies = [(400, {}, b"")] * 2
    server = serve(
        lambda path, body: replies.pop() if replies else chat(("A", -1.0), ("B", -1.0))
    )
    assert rate(server, tmp_path).reason == "refused"
    assert rate(server, tmp_path).probability == 0.5


def test_many_at_once_are_not_crossed(serve):
    def reply(path, body):
        text = body["messages"][-1]["content"]
        number = int(text.partition("### Prompt\n")[2].partition("\n")[0])
        time.sleep(0.01 * (number % 3))
        return chat(("A", -1.0 - number), ("B", -0.5))

    own = settings(serve(reply), parallel=8, min_mass=0.0)
    prompts = list(map(str, range(24)))
    verdicts = Judge(Endpoint(own), own).rate(prompts, [PAIR] * 24)
    got = [verdict.evidence["logps"][0][0] for verdict in verdicts]
    assert got == [-1.0 - number for number in range(24)]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(api="chats"), "api='chats': expected one of"),
        (dict(tries=0), "tries=0: expected more than 0"),
        (dict(url="127.0.0.1:80"), "expected an address such as"),
        (dict(url="ftp://h/v1"), "expected an address such as"),
        (dict(url="http://h:x/v1"), "expected an address such as"),
        (dict(url=f"http://u:{SECRET}@h/v1"), "holds more than an address"),
        (dict(url=f"http://h/v1?key={SECRET}"), "holds more than an address"),
        (dict(url="http://example.org/v1", key="A_KEY"), "use https"),
        (dict(rationale_tokens=3), "asked for its label alone"),
    ],
)
def test_settings_that_cannot_be_are_refused(monkeypatch, changes, says):
    monkeypatch.setenv("A_KEY", SECRET)
    own = defaults.judge()
    own.update(dict(url="http://127.0.0.1/v1") | changes)
    with pytest.raises(UserError, match=says) as error:
        endpoint.check("s.it.judge", own, template.read("pairwise"))
    assert "\n" not in str(error.value) and SECRET not in str(error.value)


def test_a_date_to_wait_for():
    assert endpoint._wait("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert math.isclose(endpoint._wait("4"), 4.0) and endpoint._wait("x") is None
