"""Words and sentences by regular expressions, for datatrove's rules: no models."""

import re

from datatrove.utils.word_tokenizers import WordTokenizer

_HAN = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
# A Chinese or Japanese character is a word, since these scripts put no spaces between
# words. A punctuation mark is a word only where it stands alone, so that the rules'
# shares of words are their papers'.
_WORD = re.compile(
    rf"[{_HAN}]|[^\W{_HAN}]+(?:['’-][^\W{_HAN}]+)*|(?<!\S)[^\w\s]+(?!\S)"
)
_END = re.compile(r"[.!?…]+[\"'”’»)\]]*\s+|[。！？]+\s*")


class Words(WordTokenizer):
    """Words, marks that stand alone, and sentences up to . ! or ?."""

    def word_tokenize(self, text):
        """Returns the words of a text, list[str]."""
        return _WORD.findall(text)

    def sent_tokenize(self, text):
        """Returns the sentences of a text, list[str]."""
        return [text[a:b].strip() for a, b in self.span_tokenize(text)]

    def span_tokenize(self, text):
        """Returns [(start, end)] of the sentences of a text."""
        ends = [match.end() for match in _END.finditer(text)]
        if not ends or text[ends[-1] :].strip():
            ends.append(len(text))
        return list(zip([0, *ends[:-1]], ends, strict=True))
