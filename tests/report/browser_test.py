"""The report in a real browser: the map by mouse and keyboard, the page without it."""

import pytest

from stagecraft.report import page
from tests.report import fake_run


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report with all its parts, as an address."""
    folder = fake_run.write(tmp_path_factory.mktemp("run"))
    fake_run.write_anatomy(folder)
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


@pytest.mark.parametrize("width", [1280, 360])
def test_nothing_is_wider_than_the_window(opened, width):
    tab = opened(width)
    near_the_map(tab)
    assert tab.evaluate("document.documentElement.scrollWidth") == width
