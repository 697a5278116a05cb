"""Mistakes in the curation of text."""

from tests.mutants.mutant import in_file

_INPUTS = in_file(
    "stagecraft/curate/inputs.py",
    "tests/curate/reader_test.py",
    ("many files are one task", "room = aim", 'room = float("inf")'),
    (
        "the digest knows names alone",
        r"{source}\n{contents.hexdigest()}\n",
        r"{source}\n",
    ),
    ("a column of another name passes", "text_key not in row:", "text_key in ():"),
)

_READER = in_file(
    "stagecraft/curate/reader.py",
    "tests/curate/reader_test.py",
    ("a number is a text", "if not isinstance(text, str):", "if text is None:"),
    (
        "the record's source is ignored",
        "if not isinstance(source, str) or",
        "if True or",
    ),
    ("damage is not told", "    if part.damage:\n", "    if False:\n"),
)

_RULES = (
    *in_file(
        "stagecraft/curate/overlap.py",
        "tests/curate/rules_test.py",
        (
            "twelve words suffice",
            "count = len(words) - n + 1",
            "n -= 1; count = len(words) - n + 1",
        ),
        ("words in any order overlap", "total = total * _BASE +", "total = total +"),
        ("common runs count", "keep = counts <= common", "keep = counts > 0"),
        ("case tells runs apart", "_WORD.findall(text.lower())", "_WORD.findall(text)"),
    ),
    *in_file(
        "stagecraft/curate/classifier.py",
        "tests/curate/rules_test.py",
        (
            "the larger sample weighs more",
            "0.5 / (1 - labels).sum()",
            "0.5 / labels.sum()",
        ),
        ("good and bad swapped", "np.repeat([1.0, 0.0]", "np.repeat([0.0, 1.0]"),
        (
            "no penalty in the gradient",
            "matrix.T @ slope + penalty * w",
            "matrix.T @ slope",
        ),
    ),
    *in_file(
        "stagecraft/curate/personal.py",
        "tests/curate/rules_test.py",
        ("private addresses are replaced", ".is_global", ".version == 4"),
        ("short numbers are telephones", "return 8 <=", "return 4 <="),
    ),
    *in_file(
        "stagecraft/curate/language_id.py",
        "tests/curate/rules_test.py",
        ("kana count as Chinese", '_SHARE = {"ja": 0.05}', "_SHARE = {}"),
        (
            "one word is a language",
            "_DIFFERENT = 3",
            "_DIFFERENT = 0",
            "tests/curate/rules_test.py",
        ),
    ),
)

_DUPLICATES = in_file(
    "stagecraft/curate/duplicates.py",
    "tests/curate/duplicates_test.py",
    ("the worst stays", "-score, groups", "score, groups"),
    ("the last stays", "(np.arange(len(groups)),", "(-np.arange(len(groups)),"),
    (
        "what an exact duplicate resembles is forgotten",
        "found = twin[_read_pairs(self.pairs, starts)]",
        "found = _read_pairs(self.pairs, starts)",
    ),
    ("pairs of the first task alone", "starts[rows[:, 2]] + rows[:, 3]", "rows[:, 3]"),
    ("the temperature multiplies", "value / temperature", "value * temperature"),
    (
        "chance is the place in the list",
        '_mix(keys["low"][candidates] ^ salt)',
        "_mix(candidates.astype(np.uint64) ^ salt)",
    ),
    (
        "the threshold is an upper bound",
        '["score"][candidates] >= threshold',
        '["score"][candidates] <= threshold',
    ),
    ("case tells documents apart", "text.lower().split()", "text.split()"),
)

_WHOLE = (
    *in_file(
        "stagecraft/curate/steps.py",
        "tests/curate/curation_test.py",
        ("the time is in the bytes", "mtime=0", "mtime=None"),
        (
            "personal data stays",
            "document.text, counts = personal",
            "_, counts = personal",
        ),
        (
            "verdicts of the next document",
            'document.metadata["number"]]',
            'document.metadata["number"] - 1]',
        ),
    ),
    *in_file(
        "stagecraft/curate/engine.py",
        "tests/curate/curation_test.py",
        (
            "workers outlive their parent",
            "    process.end_with_parent()\n",
            "",
            "tests/curate/curation_test.py -k killed",
        ),
        (
            "done is done again",
            "    left = executor.get_incomplete_ranks()\n",
            "    left = range(phase.tasks)\n",
            "tests/curate/curation_test.py -k killed",
        ),
    ),
    *in_file(
        "stagecraft/curate/ledger.py",
        "tests/curate/curation_test.py -k no_example_tells",
        (
            "examples tell of people",
            "    text, _ = personal.scrub(text[:_LOOKED_AT])\n",
            "",
        ),
        (
            "what is cut off is not looked at",
            "_LOOKED_AT = 100_000",
            "_LOOKED_AT = 600",
        ),
    ),
    *in_file(
        "stagecraft/curate/publish.py",
        "tests/curate/curation_test.py",
        (
            "what stays tells of people",
            'ledger.shown(row["text"])',
            'row["text"]',
            "tests/curate/curation_test.py -k no_example_tells",
        ),
        (
            "an older result stays",
            "new_folder(self.out, replace=True)",
            "new_folder(self.out)",
        ),
        ("where it lies is in the bytes", 'PLACES = ("out", "work")', "PLACES = ()"),
    ),
    *in_file(
        "stagecraft/curate/curation.py",
        "tests/curate/curation_test.py",
        (
            "a full disk is a traceback",
            "with alone(work), _writing(work):",
            "with alone(work):",
            "tests/curate/disk_full_test.py",
        ),
        (
            "evaluation files are not in the identity",
            "map(_contents, read)",
            "map(_contents, ())",
        ),
    ),
)

MUTANTS = _INPUTS + _READER + _RULES + _DUPLICATES + _WHOLE
