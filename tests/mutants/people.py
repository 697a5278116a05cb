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
            "Showing(showing.item, 1 - showing.first, True)",
            "Showing(showing.item, showing.first, True)",
        ),
        ("shown again at once", "number + APART + int(rng.integers(APART))", "number"),
        (
            "all raters see one order",
            "[seed, zlib.crc32(rater.encode('utf-8'))]",
            "[seed, 0]",
        ),
        (
            "sides are mixed up",
            '(entry["choice"] == "first") == (entry["first"] == 0)',
            'entry["choice"] == "first"',
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
            "cut answers are learned as ended",
            "if not ended:",
            "if False:",
        ),
        (
            "skips are ties",
            'if entry["choice"] == "tie":',
            'if entry["choice"] in ("tie", "skip"):',
        ),
        ("a tie is certain", "if certain < 1:", "if False:"),
        (
            "strength of the other side",
            "margin = statistics.fmean(strengths) * (1 if better == 0 else -1)",
            "margin = -statistics.fmean(strengths)",
        ),
        (
            "a repeat counts as another rater",
            "opinions = [_opinion(entries) for entries in said.values()]",
            "opinions = [_opinion([e]) for entries in said.values() for e in entries]",
        ),
        (
            "the order of a file is shown",
            "shown = [item.answers[showing.first], item.answers[1 - showing.first]]",
            "shown = list(item.answers)",
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
