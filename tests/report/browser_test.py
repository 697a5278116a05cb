"""The report in a real browser: the map by mouse and keyboard, the page without it."""

import os

import pytest

from stagecraft.report import page
from tests.report import fake_run


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report with all its parts, as an address."""
    folder = fake_run.write(tmp_path_factory.mktemp("run"))
    fake_run.write_anatomy(folder)
    fake_run.write_readings(folder)
    return page.write(folder).as_uri()


@pytest.fixture
def opened(browser, report):
    """Opens the report; what it logs, and what its policy stops, ends the test."""
    contexts, said = [], []

    def open_(width=1280, scheme="light", **more):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, **more
        )
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: said.append(request.url))
        tab.goto(report)
        return tab

    yield open_
    for context in contexts:
        context.close()
    assert said == [report] * len(contexts)


def near_the_map(tab):
    tab.locator("#fig-map").scroll_into_view_if_needed()
    tab.wait_for_selector("#fig-map svg")
    return tab.locator("#fig-map .chart"), tab.locator("#fig-map output")


def test_the_map_is_drawn_when_it_is_near(opened):
    tab = opened()
    assert tab.evaluate("typeof vega") == "undefined"
    chart, output = near_the_map(tab)
    cells = chart.locator("[aria-roledescription='rect mark']")
    assert cells.count() == 4
    first = cells.first.get_attribute("aria-label")
    assert first.startswith("tuned, layer 0, query: Eff. rank ") and "noise" in first
    cells.first.hover()
    assert output.inner_text() == first
    choices = tab.locator("#fig-map .choices")
    choices.get_by_label("Stage").select_option("policy")
    choices.get_by_label("Figure").select_option("Change, %")
    choices.get_by_label("Show").select_option("ratio to noise")
    label = cells.first.get_attribute("aria-label")
    assert label.startswith("policy, layer 0, query: Change, % ")


def test_arrow_keys_go_from_cell_to_cell(opened):
    chart, output = near_the_map(opened())
    chart.focus()
    for key, place in (
        ("ArrowDown", "layer 0, query"),
        ("ArrowDown", "layer 1, query"),
        ("ArrowRight", "layer 1, output"),
        ("ArrowRight", "layer 1, output"),  # the last kind
        ("ArrowUp", "layer 0, output"),
    ):
        chart.press(key)
        assert output.inner_text().startswith(f"tuned, {place}: Eff. rank ")


def test_the_page_reads_without_scripts(opened):
    tab = opened(java_script_enabled=False)
    assert tab.locator("#fig-map b").inner_text().startswith("Farthest from noise")
    assert tab.locator("#fig-map tbody tr").count() > 4
    assert not tab.locator("#fig-map .chart").is_visible()


def test_tables_are_copied_as_csv(opened):
    """What stands small gets a column; no text is a formula or breaks its row."""
    tab = opened(permissions=["clipboard-read", "clipboard-write"])

    def copied(button):
        button.click()
        button.and_(tab.get_by_text("Copied", exact=True)).wait_for()
        return tab.evaluate("navigator.clipboard.readText()").splitlines()

    tab.evaluate(
        """() => document.querySelector('#figures tbody tr th').prepend('=1+"a",')"""
    )
    head, *rows = copied(tab.locator("#figures .csv").first)
    assert head.startswith("Figure,,tuned,") and len({r.count(",") for r in rows}) > 0
    assert rows[0].startswith('"\'=1+""a"",')
    assert any("Gold score" in row and ",-0.500" in row for row in rows)
    near_the_map(tab)
    head, *rows = copied(tab.locator("#fig-map output + .csv"))
    assert head == "figure,stage,layer,kind,value,noise,low,high,ratio"
    assert len(rows) == 4 and rows[0].startswith("Eff. rank,tuned,0,query,")


def test_without_a_clipboard_it_is_copied_the_old_way(opened):
    tab = opened(permissions=["clipboard-read"])
    tab.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject() }")
    tab.locator("#fig-kl .csv").click()
    tab.wait_for_function(
        "document.querySelector('#fig-kl .csv').innerText != 'Copy as CSV'"
    )
    assert tab.evaluate("navigator.clipboard.readText()").startswith("policy,")


def test_tokens_are_read_on_hover_and_by_keyboard(opened):
    tab = opened(width=360, java_script_enabled=False)
    shifted = tab.locator("#strip .tok.shifted").last
    assert "rank 12 of tuned" in shifted.get_attribute("title")
    styles = {
        name: tab.locator(f"#strip .tok.{name}").first.evaluate(
            "(e) => [getComputedStyle(e).borderBottomStyle,"
            " getComputedStyle(e).borderBottomColor]"
        )
        for name in ("unshifted", "marginal", "shifted")
    }
    assert styles["marginal"][0] == "dotted" and styles["shifted"][0] == "solid"
    assert styles["unshifted"][1] == "rgba(0, 0, 0, 0)"
    table = tab.locator("#tokens table")
    assert not table.is_visible()
    tab.locator("#tokens summary").focus()
    tab.keyboard.press("Enter")
    assert table.is_visible() and table.locator("tbody tr").count() == 5


@pytest.mark.parametrize("width", [1280, 360])
def test_nothing_is_wider_than_the_window(opened, width):
    tab = opened(width)
    near_the_map(tab)
    assert tab.evaluate("document.documentElement.scrollWidth") == width


@pytest.fixture(scope="module")
def axe():
    """axe-core; skipped where it is not installed, but for CI."""
    if not os.environ.get("CI"):
        pytest.importorskip("axe_playwright_python", reason="needs extra dev")
    from axe_playwright_python.sync_playwright import Axe

    return Axe()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_axe_finds_no_violation(opened, axe, width, scheme):
    tab = opened(width, scheme)
    near_the_map(tab)
    tab.evaluate("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    violations = axe.run(tab).response["violations"]
    assert [(v["id"], [n["html"] for n in v["nodes"]]) for v in violations] == []
