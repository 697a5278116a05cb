"""The labelling page in a real browser, as a person's hands and eyes meet it."""

import os
import threading

import pytest
import uvicorn

from stagecraft.serve import guard, label_app, listening
from stagecraft.serve.items import Item
from stagecraft.serve.labelling import Labelling

TOKEN = "secret-of-the-test"
SCRIPT = "<script>document.title = 'taken'</script><img src=x onerror=alert(1)>"


@pytest.fixture
def served(tmp_path):
    """(labels, address) of a page that runs in a thread."""
    items = [
        Item("What is <b>bold</b>?", [(SCRIPT, True), ("</script>", False)]),
        Item("Turned?", [("a\u202eb\u200bc", True), ("x" * 100_000, True)]),
        Item([{"role": "user", "content": "Hi\u0007"}], [("one", True), ("two", True)]),
        *(Item(f"q{i}", [(f"a{i}", True), (f"b{i}", True)]) for i in range(9)),
    ]
    yield from serving(Labelling(tmp_path / "labels", items, repeats=0.0))


def serving(given):
    """Yields (labels, address) while a page runs in a thread."""
    bound = listening.bind("127.0.0.1", 0)
    port = bound.getsockname()[1]
    app = label_app.app(given, token=TOKEN, hosts=guard.LOOPBACK, port=port)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    yield given, f"http://127.0.0.1:{port}/"
    server.should_exit = True
    thread.join(10)
    given.close()


def opened(context, address, name="ann"):
    """A page where a person has given a name, and what went wrong on it."""
    page, wrong = context.new_page(), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda r: r.url.startswith(address) or wrong.append(r.url))
    page.goto(f"{address}#{TOKEN}")
    page.wait_for_selector("#who:not([hidden])")
    assert page.url == address  # the token is not in it
    page.keyboard.type(name)
    page.keyboard.press("Enter")
    page.wait_for_selector("#pair:not([hidden])")
    return page, wrong


def done(page, count):
    page.wait_for_function(
        "n => document.getElementById('progress').textContent.startsWith(n + ' of')",
        arg=count,
    )


def said(given, rater="ann"):
    return [entry["choice"] for _, entry in given.verdicts(rater)]


def test_by_keyboard_alone(browser, served):
    given, address = served
    page, wrong = opened(browser.new_context(), address)
    for count, (key, choice) in enumerate(
        {"1": "first", "2": "second", " ": "tie", "b": "both_bad", "s": "skip"}.items()
    ):
        page.keyboard.press(key)
        done(page, count + 1)
        assert said(given)[-1] == choice
    # Keys that are held, or meant for the browser, or typed into a field, say nothing.
    page.keyboard.press("Control+1")
    page.keyboard.press("z")
    for _ in range(6):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.tagName") == "SUMMARY":
            break
    page.keyboard.press("Enter")
    page.wait_for_selector("#reason", state="visible")
    page.focus("#reason")
    page.keyboard.type("1 2 best")
    assert len(said(given)) == 5
    # The space bar presses the button in focus; strength and reason go with it.
    page.check("input[name=strength][value='3']")
    page.focus("button[data-choice=answer-1]")
    page.keyboard.press(" ")
    done(page, 6)
    entry = given.verdicts("ann")[-1][1]
    assert (entry["choice"], entry["strength"], entry["reason"]) == (
        *("second", 3),
        "1 2 best",
    )
    assert 0 < entry["seconds"] < 60
    page.keyboard.press("u")
    done(page, 5)
    assert page.input_value("#reason") == ""
    while len(said(given)) < 12:
        count = len(said(given))
        page.keyboard.press("1")
        done(page, count + 1)
    page.wait_for_selector("#pair", state="hidden")
    assert page.inner_text("#message").startswith("All done")
    assert wrong == []


def test_texts_are_only_text(browser, served):
    given, address = served
    page, wrong = opened(browser.new_context(), address, "bob")
    texts = {}
    for count in range(12):
        answers = [page.inner_text(f"#answer-{side}") for side in (0, 1)]
        cut = [page.is_visible(f"#cut-{side}") for side in (0, 1)]
        texts[page.inner_text("#prompt")] = dict(zip(answers, cut, strict=True))
        wide = page.evaluate("document.documentElement.scrollWidth > innerWidth")
        assert not wide
        page.keyboard.press("2")
        done(page, count + 1)
    # Which answer was cut off is said beside it.
    assert texts["What is <b>bold</b>?"] == {SCRIPT: False, "</script>": True}
    assert "aU+202EbU+200Bc" in texts["Turned?"]
    assert any("HiU+0007" in prompt for prompt in texts)
    assert page.title() == "Which answer is better?" and wrong == []


def test_two_tabs_show_two_pairs_and_a_stale_one_goes_on(browser, served):
    given, address = served
    context = browser.new_context()
    (one, _), (two, _) = opened(context, address), opened(context, address)
    assert one.inner_text("#prompt") != two.inner_text("#prompt")
    one.keyboard.press("1")
    done(one, 1)
    two.keyboard.press("2")
    done(two, 2)
    # What another tab has said meanwhile is not said twice.
    place = one.evaluate("shown.place")
    given.say("ann", place, "tie")
    one.keyboard.press("1")
    one.wait_for_function("p => shown.place !== p", arg=place)
    assert "has a verdict" in one.inner_text("#message")
    assert sorted(said(given)) == ["first", "second", "tie"]
    assert len(given.verdicts("ann")) == 3


@pytest.fixture
def ranked(tmp_path):
    """(labels, address) of items of four answers."""
    items = [Item(f"q{i}", [(f"{i}{j}", True) for j in range(4)]) for i in range(4)]
    yield from serving(Labelling(tmp_path / "labels", items, repeats=0.0))


def test_several_are_ranked_by_keys_and_by_hand(browser, ranked):
    given, address = ranked
    page, wrong = opened(browser.new_context(), address)
    page.keyboard.press("3")
    assert page.inner_text("#picked").startswith("Answer 3 is 1st")
    page.keyboard.press("3")  # is said
    page.keyboard.press("5")  # is not there
    page.keyboard.press("1")
    page.keyboard.press("u")  # takes the last place back, and no verdict
    page.keyboard.press("4")
    assert page.inner_text("#title-3") == "Answer 4 2nd" and not said(given)
    page.keyboard.press("1")
    done(page, 1)
    assert page.inner_text("#picked") == "Which is the best?"
    page.click("button[data-choice=answer-1]")
    page.keyboard.press(" ")  # the rest are equal
    done(page, 2)
    page.keyboard.press(" ")
    done(page, 3)
    page.keyboard.press("u")
    done(page, 2)
    page.keyboard.press("b")
    done(page, 3)
    entries = [entry for _, entry in given.verdicts("ann")]
    assert [e.get("order") for e in entries] == [[2, 3, 0], [1], None]
    assert said(given) == ["rank", "rank", "both_bad"] and wrong == []
    if folder := os.environ.get("PICTURES"):
        page.keyboard.press("2")
        page.screenshot(path=f"{folder}/rank_wide.png")


@pytest.mark.parametrize(
    ("size", "dark"), [((390, 780), False), ((1280, 800), False), ((390, 780), True)]
)
def test_it_fits_a_phone_and_the_dark(browser, served, size, dark, tmp_path):
    _, address = served
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]},
        color_scheme="dark" if dark else "light",
        has_touch=size[0] < 500,
    )
    page, wrong = opened(context, address)
    for name in ("answer-0", "answer-1", "tie"):
        box = page.locator(f"button[data-choice={name}]").bounding_box()
        assert box["height"] >= 44 and box["x"] >= 0
        assert (
            box["x"] + box["width"] <= size[0] and box["y"] + box["height"] <= size[1]
        )
    lightness = page.evaluate(
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    )
    assert (max(lightness) < 80) == dark
    if folder := os.environ.get("PICTURES"):
        page.screenshot(
            path=f"{folder}/label_{size[0]}_{'dark' if dark else 'light'}.png"
        )
    page.click("button[data-choice=answer-0]")
    done(page, 1)
    assert wrong == []
