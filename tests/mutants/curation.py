"""Mistakes in the curation of text."""

from tests.mutants.mutant import in_file

_INPUTS = in_file(
    "stagecraft/curate/inputs.py",
    "tests/curate/reader_test.py",
    ("many files are one task", "room = aim", 'room = float("inf")'),
    (
        "the digest knows names alone",
        r'f"{path}\n{source}\n{contents.hexdigest()}\n"',
        r'f"{path}\n{source}\n"',
    ),
    (
        "a column of another name passes",
        "isinstance(row, dict) and text_key not in row",
        "False",
    ),
)

_READER = in_file(
    "stagecraft/curate/reader.py",
    "tests/curate/reader_test.py",
    ("a number is a text", "if not isinstance(text, str):", "if text is None:"),
    (
        "the record's source is ignored",
        "not isinstance(source, str)",
        "True",
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
        (
            "words in any order overlap",
            "total * _BASE",
            "total",
        ),
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
        (
            "good and bad swapped",
            "np.repeat([1.0, 0.0], [len(good), len(bad)])",
            "np.repeat([0.0, 1.0], [len(good), len(bad)])",
        ),
        (
            "no penalty in the gradient",
            "matrix.T @ slope + penalty * w",
            "matrix.T @ slope",
        ),
    ),
    *in_file(
        "stagecraft/curate/personal.py",
        "tests/curate/rules_test.py",
        (
            "private addresses are replaced",
            "ipaddress.ip_address(address).is_global",
            "ipaddress.ip_address(address).version == 4",
        ),
        (
            "short numbers are telephones",
            "return 8 <= sum(map(str.isdigit, number)) <= 15",
            "return 4 <= sum(map(str.isdigit, number)) <= 15",
        ),
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
    (
        "the worst stays",
        "(np.arange(len(groups)), -score, groups)",
        "(np.arange(len(groups)), score, groups)",
    ),
    (
        "the last stays",
        "(np.arange(len(groups)), -score, groups)",
        "(-np.arange(len(groups)), -score, groups)",
    ),
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
        'keys["score"][candidates] >= threshold',
        'keys["score"][candidates] <= threshold',
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
            "document.text, counts = personal.scrub(document.text, **self.kinds)",
            "_, counts = personal.scrub(document.text, **self.kinds)",
        ),
        (
            "verdicts of the next document",
            'verdicts[document.metadata["number"]]',
            'verdicts[document.metadata["number"] - 1]',
        ),
        (
            "signatures cut off are taken for a task's",
            "if self.output_folder.exists(path):",
            "if False:",
            "tests/curate/duplicates_test.py -k cut_off",
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
            "storage.new_folder(self.out, replace=True)",
            "storage.new_folder(self.out)",
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
