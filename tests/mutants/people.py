"""Mutants of the labelling page and of the agreement of raters."""

from tests.mutants.mutant import in_file

MUTANTS = (
    *in_file(
        "stagecraft/anatomy/statistics.py",
        "tests/anatomy/statistics_test.py -k wilson",
        (
            "Wald's interval",
            "half = z * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))",
            "half = z * np.sqrt(share * (1 - share) / count)",
        ),
    ),
    *in_file(
        "stagecraft/anatomy/agreement.py",
        "tests/anatomy/agreement_test.py",
        ("missing labels agree", "a is not None and b is not None", "True"),
        (
            "kappa of one rater's frequencies",
            "first[label] * second[label]",
            "first[label] * first[label]",
        ),
        (
            "a label is paired with itself",
            "np.outer(counts, counts) - np.diag(counts)",
            "np.outer(counts, counts)",
        ),
        (
            "items weigh by their pairs",
            "seen += together / (len(unit) - 1)",
            "seen += together",
        ),
        (
            "chance with replacement",
            "(n - 1) * (seen * distance).sum()",
            "n * (seen * distance).sum()",
        ),
        ("ends counted whole", "np.cumsum(totals) - totals / 2", "np.cumsum(totals)"),
    ),
    *in_file(
        "stagecraft/serve/labelling.py",
        "tests/serve/labelling_test.py",
        (
            "sides stay when shown again",
            "Showing(showing.item, showing.shown[::-1], True)",
            "Showing(showing.item, showing.shown, True)",
        ),
        ("shown again at once", "number + APART + int(rng.integers(APART))", "number"),
        (
            "all raters see one order",
            "[seed, zlib.crc32(rater.encode('utf-8'))]",
            "[seed, 0]",
        ),
        (
            "a tab's pair shows in another",
            "name == rater and owner != tab and until > now",
            "False",
        ),
        (
            "a lease has no end",
            "name == rater and owner != tab and until > now",
            "owner != tab",
        ),
        (
            "two verdicts on a place",
            "if place in self._said.get(rater, {}):",
            "if False:",
        ),
        ("undone verdicts count", 'said.pop(entry["undo"], None)', "pass"),
        (
            "the order of a file is shown",
            "shown = [item.answers[number] for number in showing.shown]",
            "shown = list(item.answers)",
        ),
        (
            "an answer stands at two places",
            "len({*places}) != len(places)",
            "False",
        ),
        (
            "a place beyond the answers",
            "type(place) is int and 0 <= place < size",
            "type(place) is int",
        ),
        (
            "of four, the first is better",
            'if choice in ("first", "second") and size > 2:',
            "if False:",
        ),
    ),
    *in_file(
        "stagecraft/serve/label_records.py",
        "tests/serve/labelling_test.py",
        (
            "cut answers are learned as ended",
            "if not ended:",
            "if False:",
        ),
        (
            "skips are ties",
            'entry.get("order")',
            'entry.get("order", [])',
        ),
        ("a tie is certain", "if certain < 1:", "if False:"),
        (
            "strength of the other side",
            "margin = statistics.fmean(strengths) * (1 if better == one else -1)",
            "margin = -statistics.fmean(strengths)",
        ),
        (
            "a repeat counts as another rater",
            "chances.append(statistics.fmean(of_one))",
            "chances += of_one",
        ),
        ("sides are mixed up", "out[shown[place]] = rank", "out[place] = rank"),
        (
            "who is left out of a ranking is the best",
            "out = [len(order)] * len(shown)",
            "out = [-1] * len(shown)",
        ),
        (
            "neighbours of a ranking alone",
            "itertools.combinations(range(len(item.answers)), 2)",
            "itertools.pairwise(range(len(item.answers)))",
        ),
    ),
    *in_file(
        "stagecraft/serve/agreement_report.py",
        "tests/serve/labelling_test.py",
        (
            "two answers of a ranking speak for all",
            "itertools.combinations(range(len(showing.shown)), 2)",
            "[(0, 1)]",
        ),
    ),
    *in_file(
        "stagecraft/serve/guard.py",
        "tests/serve/label_app_test.py",
        (
            "any name of the server",
            'if self.names and headers.get("host") not in self.names:',
            "if False:",
        ),
        (
            "any origin",
            'origin.removeprefix("http://") not in self.names',
            "False",
        ),
        ("any content type", 'if kind != "application/json":', "if False:"),
        ("any size", "if len(length) > 18 or int(length) > self.most:", "if False:"),
        ("any session", "hmac.compare_digest(value, self.token)", "True"),
        (
            "no session is asked",
            'scope["path"] in self.open_paths or self.holds(headers)',
            "True",
        ),
    ),
    *in_file(
        "stagecraft/serve/label_app.py",
        "tests/serve/label_app_test.py",
        (
            "any token",
            'if not hmac.compare_digest(str(value.get("token")), token):',
            "if False:",
        ),
    ),
)
