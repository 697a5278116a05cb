"""The labelling page from outside: who may ask what, and what bad requests get."""

import re

import pytest
from starlette.testclient import TestClient

from stagecraft.errors import UserError
from stagecraft.serve import guard, label_app, listening
from stagecraft.serve.items import Item
from stagecraft.serve.labelling import Labelling

PORT, TOKEN = 8123, "correct-horse"


@pytest.fixture
def given(tmp_path):
    items = [Item(f"q{i}", [(f"a{i}", True), (f"b{i}", True)]) for i in range(5)]
    labels = Labelling(tmp_path / "labels", items, repeats=0.0)
    yield labels
    labels.close()


@pytest.fixture
def client(given):
    app = label_app.app(given, token=TOKEN, hosts=guard.LOOPBACK, port=PORT)
    with TestClient(app, base_url=f"http://127.0.0.1:{PORT}") as client:
        yield client


@pytest.fixture
def signed(client):
    assert client.post("/session", json={"token": TOKEN}).status_code == 200
    return client


ANN = {"rater": "ann", "tab": "t"}


def test_a_verdict_goes_to_disk_before_the_next_pair(signed, given):
    one = signed.post("/next", json=ANN).json()
    assert (one["done"], one["total"], one["place"]) == (0, 5, 0)
    two = signed.post("/verdict", json=ANN | {"place": 0, "choice": "first"}).json()
    assert (two["done"], two["place"]) == (1, 1)
    assert len((given.folder / "journal.jsonl").read_text().splitlines()) == 2
    assert signed.post("/undo", json=ANN).json()["place"] == 0
    for place in range(5):
        last = signed.post("/verdict", json=ANN | {"place": place, "choice": "second"})
    assert last.json() == {"done": 5, "total": 5, "place": None}
    assert len((given.folder / "records.jsonl").read_text().splitlines()) == 5
    assert signed.get("/report.json").json()["raters"]["ann"]["verdicts"] == 5


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 421),
        ({"host": f"evil.example:{PORT}"}, 421),  # DNS rebinding
        ({"host": "127.0.0.1:1"}, 421),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": f"https://127.0.0.1:{PORT}"}, 403),
        ({"origin": "null"}, 403),
        ({"content-type": "text/plain"}, 415),  # which a form of another site can send
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"origin": f"http://127.0.0.1:{PORT}"}, 200),
        ({"host": f"localhost:{PORT}", "cookie": f"{guard.cookie(PORT)}={TOKEN}"}, 200),
    ],
)
def test_requests_from_elsewhere_are_refused(signed, given, headers, status):
    headers = {"content-type": "application/json"} | headers
    body = b'{"rater": "ann", "tab": "t", "place": 0, "choice": "first"}'
    answer = signed.post("/verdict", content=body, headers=headers)
    assert answer.status_code == status
    assert given.progress("ann")[0] == (status == 200)
    assert "access-control-allow-origin" not in answer.headers
    assert all(answer.headers[name] == text for name, text in guard.HEADERS.items())


def test_without_a_session_there_is_the_empty_page_alone(client):
    assert client.get("/").status_code == 200 and "q0" not in client.get("/").text
    for call in (
        lambda: client.post("/next", json=ANN),
        lambda: client.get("/report.json"),
        lambda: client.get("/journal.jsonl"),
    ):
        assert call().status_code == 401
    assert client.post("/session", json={"token": "wrong"}).status_code == 400
    assert client.post("/session", json={}).status_code == 400
    assert client.post("/next", json=ANN).status_code == 401
    client.cookies.set(guard.cookie(PORT), "wrong")
    assert client.post("/next", json=ANN).status_code == 401
    signed = client.post("/session", json={"token": TOKEN}).headers["set-cookie"]
    assert "HttpOnly" in signed and "SameSite=strict" in signed


def test_bad_requests_get_a_line(signed, given):
    json_ = {"content-type": "application/json"}
    for answer, status, says in (
        (signed.post("/next", content=b"{", headers=json_), 400, "expected a JSON obj"),
        (signed.post("/next", content=b"[1]", headers=json_), 400, "expected a JSON"),
        (signed.post("/next", json={"rater": "", "tab": "t"}), 400, "rater: expected"),
        (signed.post("/next", json={"rater": "x" * 99, "tab": "t"}), 400, "rater: exp"),
        (signed.post("/next", json={"rater": "x"}), 400, "tab: expected a name"),
        (signed.post("/verdict", json=ANN | {"choice": "?"}), 400, "choice='.': exp"),
        (signed.post("/next", content=b"x" * 2**17, headers=json_), 413, "at most"),
        (signed.put("/next", json=ANN), 405, "expected GET or POST"),
    ):
        assert answer.status_code == status
        assert re.search(says, answer.json()["error"])
    assert signed.get("/next").status_code == 405
    assert given.raters() == []


def test_a_port_in_use_is_one_line():
    bound = listening.bind("127.0.0.1", 0)
    port = bound.getsockname()[1]
    with pytest.raises(UserError, match=f"--port={port}: cannot listen on 127.0.0.1"):
        listening.bind("127.0.0.1", port)
    bound.close()
