"""Templates: what is filled in stays text, and a fault is named with its key."""

import pytest

from stagecraft.errors import UserError
from stagecraft.signals import template

GOOD = 'question = "{prompt} {first} {second}"\nlabels = ["A", "B"]\n'


def read(folder, text):
    path = folder / "t.toml"
    path.write_text(text)
    return template.read(str(path))


@pytest.mark.parametrize(
    ("name", "places"), [("pairwise", 2), ("score", 1), ("best_of_4", 4)]
)
def test_shipped_templates_have_their_places(name, places):
    asks = template.read(name)
    assert asks.places == places and asks.rationale and not asks.examples
    answers = [f"<{i}>" for i in range(places)]
    question = asks.ask("the prompt", answers)
    assert all(text in question.text for text in ["the prompt", *answers])
    assert "{" not in question.text and question.bare().endswith(asks.answer)


def test_places_spelled_in_texts_are_words(tmp_path):
    asked = read(tmp_path, GOOD).ask("{first}", ("{second}", "{prompt}"))
    assert asked.text == "{first} {second} {prompt}"


def test_a_conversation_names_its_speakers(tmp_path):
    turns = [("user", "Hi"), ("assistant", "Hello"), ("user", "Bye")]
    messages = [{"role": role, "content": text} for role, text in turns]
    asked = read(tmp_path, GOOD).ask(messages, ("a", "b"))
    assert asked.text == "User: Hi\n\nAssistant: Hello\n\nUser: Bye a b"
    assert read(tmp_path, GOOD).ask(messages[:1], ("a", "b")).text == "Hi a b"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("question = ", "not a TOML file"),
        ('labels = ["A", "B"]', "question: is missing"),
        ('question = "{prompt} {first}"', "labels: is missing"),
        (GOOD + "lables = []", "lables: unknown key; did you mean 'labels'"),
        (GOOD + "answer = 1", "answer: expected a text"),
        (GOOD.replace("{prompt}", ""), "has no place {prompt}"),
        (GOOD.replace("{first}", ""), "has no place {first}"),
        (GOOD.replace('"B"', '"B", "C"'), "has no place {answer_3}"),
        (GOOD.replace("{first}", "{first} {third}"), "{third} is no place"),
        (GOOD.replace('"B"', '" A"'), "labels: expected two or more different"),
        (GOOD.replace('"B"', '""'), "labels: expected two or more different"),
        (GOOD + 'render = "html"', "render='html': expected 'chat' or 'text'"),
        (GOOD + "examples = [1]", "example 1: expected a table"),
        (GOOD + '[[examples]]\nprompt = "p"', "example 1: first: is missing"),
        (
            GOOD + '[[examples]]\nprompt="p"\nfirst="f"\nsecond="s"\nlabel="C"',
            "example 1: label='C': expected one of 'A', 'B'",
        ),
    ],
)
def test_faults_are_named_in_one_line(tmp_path, text, says):
    with pytest.raises(UserError) as error:
        read(tmp_path, text)
    assert says in str(error.value) and "t.toml" in str(error.value)
    assert "\n" not in str(error.value).replace(str(tmp_path), "")
