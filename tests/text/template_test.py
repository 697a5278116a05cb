"""Chat templates: what they may do, and what is learned of what they write."""

import pytest

from stagecraft.errors import UserError
from stagecraft.text import sandbox
from stagecraft.text.template import Template

ASKED = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
TWO = [*ASKED, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]


def template(source, **variables):
    return Template({"default": source}, variables)


def turns(inside):
    return (
        "{% for m in messages %}{% if m.role == 'assistant' %}<A>"
        + inside
        + "{% else %}<U>{{ m.content }}{% endif %}{% endfor %}"
        + "{% if add_generation_prompt %}<A>{% endif %}"
    )


BLOCKS = turns("{% generation %}{{ m.content }}.{% endgeneration %}")
BARE = turns("{{ m.content }}.")


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", 0.4)


# -- what is learned -------------------------------------------------------------------


def said(source, messages, **settings):
    """The text, and the parts of it that are learned."""
    text, spans = template(source).conversation(messages, **settings)
    return text, [text[start:end] for start, end in spans]


@pytest.mark.parametrize("source", [BLOCKS, BARE], ids=["blocks", "bare"])
def test_turns_are_found_with_blocks_and_without(source):
    assert said(source, TWO) == ("<U>a<A>b.<U>c<A>d.", ["b.", "d."])
    assert said(source, TWO, turns="last") == ("<U>a<A>b.<U>c<A>d.", ["d."])
    assert said(source, TWO[:3]) == ("<U>a<A>b.<U>c", ["b."])
    assert template(source).text(TWO[:3], prompt=True) == "<U>a<A>b.<U>c<A>"
    weighed = [TWO[0], TWO[1] | {"weight": 0}, *TWO[2:]]
    assert said(source, weighed) == ("<U>a<A>b.<U>c<A>d.", ["d."])
    assert said(source, weighed[:3]) == ("<U>a<A>b.<U>c", [])
    empty = [TWO[0], {"role": "assistant", "content": ""}, *TWO[2:]]
    assert said(source, empty) == ("<U>a<A>.<U>c<A>d.", [".", "d."])


@pytest.mark.parametrize("source", [BLOCKS, BARE], ids=["blocks", "bare"])
@pytest.mark.parametrize("words", ["b", "b \n", "", "\U0010fffd b"])
def test_an_answer_that_was_cut_off_gets_no_end(source, words):
    cut = [ASKED[0], {"role": "assistant", "content": words, "ended": False}]
    assert said(source, cut) == (f"<U>a<A>{words}", [words])
    with pytest.raises(UserError, match="before the last one was cut off"):
        said(source, [*cut, *TWO[2:]])


def test_a_cut_answer_keeps_the_spaces_a_template_would_trim():
    source = BARE.replace("m.content }}.", "m.content | trim }}.")
    cut = [ASKED[0], {"role": "assistant", "content": "b \n", "ended": False}]
    assert said(source, cut) == ("<U>a<A>b \n", ["b \n"])
    source = BARE.replace("{{ m.content }}.", "{{ m.content[:1] }}.")
    with pytest.raises(UserError, match="does not write the answer that was cut off"):
        said(source, cut)


def test_several_blocks_a_turn():
    source = turns(
        "{% generation %}{{ m.content }}{% endgeneration %}:"
        "{% generation %}!{% endgeneration %}"
    )
    assert said(source, TWO)[1] == ["b", "!", "d", "!"]
    assert said(source, TWO, turns="last")[1] == ["d", "!"]
    assert said(source, [TWO[0], TWO[1] | {"weight": 0}, *TWO[2:]])[1] == ["d", "!"]


def test_a_block_is_where_its_text_ends_up():
    macro = (
        "{% macro say(m) %}<A>{% generation %}{{ m.content }}.{% endgeneration %}"
        "{% endmacro %}{% for m in messages %}"
        "{% if m.role == 'assistant' %}{{ say(m) }}{% else %}<U>{{ m.content }}"
        "{% endif %}{% endfor %}"
    )
    assert said(macro, TWO) == ("<U>a<A>b.<U>c<A>d.", ["b.", "d."])
    kept = turns(
        "{% set x %}{% generation %}{{ m.content }}.{% endgeneration %}{% endset %}"
        "--{{ x }}"
    )
    assert said(kept, ASKED) == ("<U>a<A>--b.", ["b."])
    within = turns(
        "{% generation %}{{ m.content }}{% generation %}.{% endgeneration %}"
        "{% endgeneration %}"
    )
    assert said(within, ASKED)[1] == ["b."]


@pytest.mark.parametrize(
    "change", ["length", "trim", "reverse", "list | first", "upper"]
)
def test_a_block_whose_text_is_changed_after_is_refused_or_right(change):
    source = turns(
        "{% set x %}{% generation %} {{ m.content }} {% endgeneration %}{% endset %}"
        "{{ x | " + change + " }}"
    )
    if change == "upper":  # the marks pass through it
        assert said(source, ASKED) == ("<U>a<A> B ", [" B "])
        return
    with pytest.raises(UserError, match="what is learned is unknown"):
        said(source, ASKED)


def test_turns_that_are_written_another_way_later_are_refused():
    source = BARE.replace("{{ m.content }}.", "{{ '' if loop.last else '-' }}.")
    with pytest.raises(UserError, match="up to message 2 does not begin") as error:
        said(source, TWO)
    assert "\n" not in str(error.value)
    # The last one alone is clear.
    assert said(source, TWO, turns="last")[1] == ["."]


def test_whatever_the_messages_hold_is_kept_apart_from_the_marks():
    held = "\U0010fffd\U0010fffc\U0010fffb"
    assert said(BLOCKS, [ASKED[0], {"role": "assistant", "content": held}]) == (
        f"<U>a<A>{held}.",
        [f"{held}."],
    )


# -- what templates see ----------------------------------------------------------------


def test_messages_are_as_transformers_passes_them():
    made = template(
        "{{ messages | tojson }}{{ bos_token }}{{ documents }}", bos_token="^"
    )
    shown = [{"role": "assistant", "content": None, "weight": 0, "tool_calls": [{}]}]
    assert made.text(shown) == '[{"role": "assistant", "tool_calls": [{}]}]^None'


def test_json_is_not_escaped_for_html():
    made = template("{{ messages[0].content | tojson }}{{ tools | tojson(indent=1) }}")
    text = made.text([{"role": "user", "content": "<é> & 'x'\n"}], [{"b": 1, "a": 2}])
    assert text == '"<é> & \'x\'\\n"[\n {\n  "b": 1,\n  "a": 2\n }\n]'


def test_blocks_and_lines_are_trimmed_and_loops_may_break():
    source = "  {% if true %}\nx\n  {% endif %}\n{% for m in messages %}{{ m.role }}"
    source += "{% break %}{% endfor %}\n"
    assert template(source).text(TWO) == "x\nuser"


def test_the_clock_is_there_and_stands_still():
    made = template("{{ strftime_now('%Y') }}{% for m in messages %}{% endfor %}")
    assert made.text(ASKED).startswith("20")


def test_a_template_for_tools():
    made = Template({"default": "plain", "tool_use": "tools"}, {})
    assert made.text(ASKED) == "plain" and made.text(ASKED, [{}]) == "tools"
    with pytest.raises(UserError, match=r"none named 'default' \(rag\)"):
        Template({"rag": "x"}, {}).text(ASKED)


# -- what templates may not do ---------------------------------------------------------


@pytest.mark.parametrize(
    "source, told",
    [
        ("{{ ''.__class__ }}", "not safe: it reaches for '__class__' of a str"),
        ("{{ ().__class__.__base__.__subclasses__() }}", "reaches for '__class__'"),
        ("{{ messages.append(1) }}", "not safe"),
        ("{{ cycler.__init__.__globals__ }}", "reaches for '__init__'"),
        ("{{ raise_exception.__globals__ }}", "reaches for '__globals__'"),
        ("{{ messages | attr('__class__') }}", "reaches for '__class__'"),
        ("{{ '{0.__class__}'.format(1) }}", "reaches for '__class__'"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ raise_exception('no system role\nhere') }}", "refuses: no system role h"),
        ("{{ messages[0].no.such }}", "failed (UndefinedError"),
        ("{{ 1 / 0 }}", "failed (ZeroDivisionError"),
        ("\n{% if x %}", "line 2: Unexpected end"),
        ("{% generation %}x", "line 1"),
        ("{% frobnicate %}", "unknown tag 'frobnicate'"),
        ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
        ("{{ 'a' * 10**10 }}", "too much memory"),
        ("{% for i in range(99999) %}{{ 'a' * 999 }}{% endfor %}", "too much memory"),
    ],
)
def test_what_goes_wrong_is_one_line(source, told):
    with pytest.raises(UserError) as error:
        template(source).text(ASKED)
    assert told in str(error.value) and "chat template" in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


R = "range(99999)"
ENDLESS = {
    "loops": f"{{% for i in {R} %}}{{% for j in {R} %}}{{% endfor %}}{{% endfor %}}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}"
    "{% endmacro %}{{ f(99) }}",
    "numbers": "{{ (messages | length) ** (9 ** 9) % 7 }}",
    "lists": "{% set n = namespace(x=[]) %}{% for i in range(60) %}"
    "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_without_end_is_ended(name):
    made = template(
        BARE + "{% if messages | length > 2 %}" + ENDLESS[name] + "{% endif %}"
    )
    for _ in range(2):
        with pytest.raises(UserError, match="was stopped|too much memory") as error:
            made.text(TWO)
        assert "\n" not in str(error.value)
    # It lives on: another conversation is written.
    assert made.text(ASKED) == "<U>a<A>b."
