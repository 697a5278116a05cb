"""Which language a text is in, from its script and its commonest words; offline.

What it can do: tell the eleven languages below from each other and from those written
in a script of their own, on texts of about twenty words or more. What it cannot: short
texts, mixed ones, languages that share these words (Norwegian passes for Danish's
neighbours), code from prose. A text in none of them is "unknown".
"""

import re
from collections import Counter

# The commonest function words of each, by which a text gives itself away.
WORDS = {
    "en": "the of and to a in is it you that he was for on are with as his they be at "
    "this have from or had by not but what all were when we there can an which "
    "their if do will would who been",
    "de": "der die und in den von zu das mit sich des auf für ist im dem nicht ein "
    "eine als auch es an werden aus er hat dass sie nach wird bei einer um am sind "
    "noch wie einem über so zum war haben nur oder aber",
    "fr": "le de un à être et en avoir que pour dans ce il qui ne sur se pas plus par "
    "je avec tout faire son mais comme ou si leur y dire elle la les des une est "
    "du au aux cette nous vous sont",
    "es": "el la de que y en un ser se no haber por con su para como estar tener le lo "
    "todo pero más hacer o este otro ese si me ya ver porque los las del una es "
    "son fue al sus muy",
    "it": "il di che la e un a per non in una sono mi ho ma si le lo con ti cosa i da "
    "se della dei nel alla gli questo è del come anche più delle suo era degli",
    "pt": "o de e que do da em um para é com não uma os no se na por mais as dos como "
    "mas foi ao ele das tem à seu sua ou ser quando muito há nos já está também "
    "pelo pela até isso",
    "nl": "de het een van en in is dat op te zijn met voor niet aan er om ook als dan "
    "maar bij of uit nog worden door naar heeft hij ze wordt tot je deze werd wel "
    "wat over geen",
    "sv": "och att det i en som är av för på med den till inte han har de ett om hade "
    "men sig vid så från kan var när under skulle eller efter också hon blev "
    "mycket detta ut oss",
    "pl": "i w na z się nie do to że jest o jak za od po co ale przez dla czy tak jego "
    "są był tym który oraz może przy być jej także było ich już tego lub ze",
    "tr": "bir ve bu da de için ile çok olarak daha olan gibi en kadar sonra ne ancak "
    "ya her var o ama değil mi ise olduğu tarafından göre iki ben yok diye şey",
    "ru": "и в не на я что тот быть с а весь это как она по но они к у ты из мы за вы "
    "так же от сказать этот который мочь о до если для он его был было только уже "
    "их",
}
STOP_WORDS = {name: frozenset(text.split()) for name, text in WORDS.items()}
# Languages with a script to themselves, among those recognised here.
SCRIPTS = {
    "ja": r"[\u3040-\u30ff]",
    "ko": r"[\uac00-\ud7af\u1100-\u11ff]",
    "zh": r"[\u4e00-\u9fff]",
    "ar": r"[\u0600-\u06ff]",
    "he": r"[\u0590-\u05ff]",
    "el": r"[\u0370-\u03ff]",
    "hi": r"[\u0900-\u097f]",
    "th": r"[\u0e00-\u0e7f]",
}
NAMES = (*STOP_WORDS, *SCRIPTS)
# Of a text's letters in a script of its own; kana are few beside kanji.
_SHARE = {"ja": 0.05}
# Of a text's words among a language's commonest; below it none is recognised.
_LEAST = 0.08
_DIFFERENT = 3  # of those words, at least
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_LOOKED_AT = 20_000  # characters

_PATTERNS = {name: re.compile(pattern) for name, pattern in SCRIPTS.items()}


def recognise(text):
    """Returns (language, share of words or letters); ("unknown", 0.0) for none.

    >>> recognise("The cat was on the mat, and it is not what we had asked for.")[0]
    'en'
    >>> recognise("Der Hund ist nicht auf der Matte, aber das war nicht zu sehen")[0]
    'de'
    """
    text = text[:_LOOKED_AT]
    letters = sum(map(str.isalpha, text))
    if not letters:
        return "unknown", 0.0
    for name, pattern in _PATTERNS.items():
        share = len(pattern.findall(text)) / letters
        if share >= _SHARE.get(name, 0.4):
            return name, min(share, 1.0)
    words = [w.lower() for w in _WORD.findall(text)]
    # Single letters stand in lists, formulas and code of every language.
    counts = Counter(w for w in words if len(w) > 1)
    hits = {
        name: [counts[w] for w in stop_words if w in counts]
        for name, stop_words in STOP_WORDS.items()
    }
    best = max(hits, key=lambda name: sum(hits[name]))
    share = sum(hits[best]) / max(len(words), 1)
    if share < _LEAST or len(hits[best]) < _DIFFERENT:
        return "unknown", 0.0
    return best, share


class Rule:
    """Keeps the documents of one language.

    Args:
        keep: its name.
        unknown: whether to keep what is recognised as none.
    """

    def __init__(self, keep, unknown):
        self.keep, self.unknown = keep, unknown

    def filter(self, document):
        """Returns True, or False and which language it is."""
        language, _ = recognise(document.text)
        if language == self.keep or (language == "unknown" and self.unknown):
            return True
        return False, f"language is {language}"
