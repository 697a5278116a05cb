"""The rules one by one: languages, quality, evaluation text, personal data, words."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from stagecraft.curate import classifier, language_id, overlap, personal, words
from stagecraft.errors import UserError

SAID = {
    "en": "When we came to the house, nobody was there, and the door had been "
    "left open.",
    "de": "Als wir zu dem Haus kamen, war niemand da, und die Tür war nicht "
    "geschlossen.",
    "fr": "Quand nous sommes arrivés à la maison, il n'y avait pas de lumière "
    "dans les rues.",
    "es": "Cuando llegamos a la casa no había nadie, y la puerta estaba abierta "
    "para todos.",
    "it": "Quando siamo arrivati alla casa non c'era nessuno e la porta era "
    "aperta per noi.",
    "pt": "Quando chegamos à casa não havia ninguém, e a porta estava aberta "
    "para os outros.",
    "nl": "Toen wij bij het huis kwamen was er niemand, en de deur van het huis "
    "was open.",
    "sv": "När vi kom till huset var det ingen där, och dörren hade lämnats "
    "öppen för oss.",
    "pl": "Kiedy do domu przyszliśmy, nie było tam nikogo, a drzwi były otwarte "
    "na ulicę.",
    "tr": "Eve bir saat sonra geldik ve kapı açık gibi ama evde hiç kimse yok "
    "diye gördük.",
    "ru": "Когда мы пришли к дому, там никого не было, и дверь была открыта для всех.",
    "ja": "家に着いたとき、そこには誰もいなくて、ドアは開いたままでした。",
    "ko": "우리가 집에 도착했을 때 아무도 없었고 문은 열려 있었습니다.",
    "zh": "我们到家的时候没有人在那里，门一直开着。",
    "ar": "عندما وصلنا إلى البيت لم يكن هناك أحد وكان الباب مفتوحا.",
    "he": "כשהגענו לבית לא היה שם איש והדלת נשארה פתוחה.",
    "el": "Όταν φτάσαμε στο σπίτι δεν ήταν κανείς εκεί και η πόρτα ήταν ανοιχτή.",
    "hi": "जब हम घर पहुँचे तो वहाँ कोई नहीं था और दरवाज़ा खुला था।",
    "th": "เมื่อเรามาถึงบ้านไม่มีใครอยู่ที่นั่นและประตูเปิดอยู่",
}


@pytest.mark.parametrize("name", language_id.NAMES)
def test_languages(name):
    assert language_id.recognise(SAID[name])[0] == name
    rule = language_id.Rule(name, False)
    assert rule.filter(SimpleNamespace(text=SAID[name])) is True
    other = "de" if name != "de" else "en"
    told = rule.filter(SimpleNamespace(text=SAID[other]))
    assert told == (False, f"language is {other}")


def test_few_kana_among_many_kanji_are_japanese():
    text = "東京都千代田区丸の内の会議室で経済産業省の会議が開催された。"
    assert language_id.recognise(text)[0] == "ja"


@pytest.mark.parametrize(
    "text", ["", "12 34 $$", "qwerty zxcvb asdfg hjkl", "the cat, the dog", "def f(x):"]
)
def test_no_language(text):
    assert language_id.recognise(text) == ("unknown", 0.0)
    document = SimpleNamespace(text=text)
    assert language_id.Rule("en", True).filter(document) is True
    assert language_id.Rule("en", False).filter(document)[0] is False


def test_words_and_sentences():
    made = words.Words("en")
    text = 'It isn\'t well-known... "Is it?" she said - 3 times! 我们 #tag & so'
    expected = "It isn't well-known Is it she said - 3 times 我 们 tag & so"
    assert made.word_tokenize(text) == expected.split(" ")
    text = "One. Two!  Three? Four"
    assert made.sent_tokenize(text) == ["One.", "Two!", "Three?", "Four"]
    for text in ("", "One", "One. ", "One.Two", "a\n\nb.\n"):
        spans = made.span_tokenize(text)
        assert spans[0][0] == 0 and spans[-1][1] == len(text)
        assert all(a[1] == b[0] for a, b in zip(spans, spans[1:], strict=False))


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("Ann.Lee+x@mail.firm.co.uk, bob@example.org.", {"e-mail": 2}),
        ("user@localhost, @name, a @ b.com, x@y", {}),
        ("from 8.8.8.8 and (1.2.3.4).", {"IP address": 2}),
        ("10.0.0.1, 127.0.0.1, 300.1.1.1, v1.2.3.4, 1.2.3.4.5, 1.2.3", {}),
        ("call +49 30 1234567, 212-555-0187 or (212) 555-0187", {"phone number": 3}),
        ("+1 23 45 and +1 23 456 7890 1234 5678", {}),
        ("2020-11-23, 1990-2020, 3.14159, 100 200 3000, ISBN 0-306-40615-2", {}),
    ],
)
def test_personal_data(text, counts):
    scrubbed, found = personal.scrub(text)
    assert found == counts
    assert (scrubbed == text) == (not counts)
    assert personal.scrub(text, False, False, False) == (text, {})
    again, _ = personal.scrub(scrubbed, phones=False)
    assert again == scrubbed or "e-mail" in counts
    for left in ("Ann", "8.8", "0187", "1234567"):
        assert left not in scrubbed or left in text and not counts


def test_evaluation_text_is_found_by_thirteen_words(tmp_path):
    rng = np.random.default_rng(0)
    items = [" ".join(f"w{i}" for i in rng.integers(1000, size=30)) for _ in range(40)]
    frame = "choose the best of the four answers given below and write its letter down"
    path = tmp_path / "test.jsonl"
    rows = [
        {"question": f"{frame}: {x}", "choices": ["a", "b"], "answer": 1} for x in items
    ]
    rows.append({"question": "Who?", "answer": "He."})
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) + "{\n")
    told = overlap.build(str(path), tmp_path, 13, 10)
    assert told == dict(asked=41, short=1, runs=told["runs"], common=2, bad=1)
    rule = overlap.Rule(tmp_path, 13)

    def judged(text):
        return rule.filter(SimpleNamespace(text=text))

    part = items[7].split()
    other = " ".join(f"v{i}" for i in range(50))
    keep, reason, note = judged(f"{other} {' '.join(part[5:18]).upper()}, {other}")
    assert (keep, reason) == (False, "overlaps evaluation")
    assert note == f"{path}:8: “{' '.join(part[5:18])}”"
    assert judged(f"{other} {', '.join(part[5:17])} {other}") is True  # twelve words
    assert judged(f"{other} {' '.join(part[17:4:-1])}") is True  # the other way round
    assert judged(f"{frame} {other}") is True  # every item's
    assert judged("") is True and judged("a few words") is True
    with pytest.raises(UserError, match="none of its 41 items has 99 words"):
        overlap.build(str(path), tmp_path, 99, 10)


def test_the_classifier_learns_and_is_named_by_its_content(tmp_path):
    rng = np.random.default_rng(0)
    fine, poor = (
        ["river", "stone", "carried", "slowly"],
        ["buy", "now", "free", "click"],
    )
    shared = ["the", "a", "of", "and", "to", "in", "it"]

    def texts(own, count):
        vocabulary = own + shared * 2
        return [" ".join(rng.choice(vocabulary, 40)) for _ in range(count)]

    good, bad = texts(fine, 60), texts(poor, 40)
    path, told = classifier.train(good, bad, tmp_path)
    assert told == dict(accuracy=1.0, auc=1.0, held=20, good=60, bad=40)
    assert classifier.train(good, bad, tmp_path)[0] == path
    assert classifier.train(good[1:], bad, tmp_path)[0] != path
    model = classifier.Classifier(path)
    assert min(map(model.score, texts(fine, 9))) > max(map(model.score, texts(poor, 9)))
    assert model.score("") == model.score(" ") and 0 <= model.score("") <= 1
    with pytest.raises(UserError, match="quality.bad: holds 3 documents, expected 20"):
        classifier.train(good, bad[:3], tmp_path)
    (tmp_path / "no.npy").write_bytes(b"no")
    with pytest.raises(UserError, match="not a classifier"):
        classifier.Classifier(tmp_path / "no.npy")


def test_the_fit_is_at_its_minimum():
    """Against the gradient written out with dense arrays."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abcdefgh"), 6)) for _ in range(30)]
    labels = np.repeat([1.0, 0.0], [10, 20])
    matrix = classifier._matrix(texts)
    found = classifier._fit(matrix, labels, 1e-2)
    dense, w, b = matrix.toarray(), found[:-1], found[-1]
    chance = 1 / (1 + np.exp(-(dense @ w + b)))
    weight = np.where(labels > 0, 0.5 / 10, 0.5 / 20)
    slope = dense.T @ (weight * (chance - labels)) + 1e-2 * w
    assert np.abs(slope).max() < 1e-4
    assert abs(weight @ (chance - labels)) < 1e-4
