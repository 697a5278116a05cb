"""Mistakes in what the report says and draws of gold, KL and layers."""

from tests.mutants.mutant import in_file

_GOLD = "tests/report/frontier_test.py"
_MAP = "tests/report/heat_map_test.py"

_FRONTIER = in_file(
    "stagecraft/report/frontier.py",
    _GOLD,
    (
        "the nearest stage is called the farthest",
        "far = max(stages, key=lambda stage: part(run.summary, stage.name)[DISTANCE])",
        "far = min(stages, key=lambda stage: part(run.summary, stage.name)[DISTANCE])",
    ),
    (
        "intervals of two stages are not joined",
        "abs(own[0][key] - own[1][key]) > math.hypot(*halves)",
        "abs(own[0][key] - own[1][key]) > 0",
    ),
    (
        "a fall is called a rise",
        'verb = "falls" if fell else "rises"',
        'verb = "rises" if fell else "falls"',
    ),
    (
        "a peak without points beyond it is believed",
        "curve and curve.peak and curve.past >= overoptimisation.PAST",
        "curve and curve.alpha",
    ),
    (
        "Gao's curve is fitted against KL, not its root",
        "overoptimisation.fit([math.sqrt(max(x, 0.0)) for x in kl], gold)",
        "overoptimisation.fit(list(kl), gold)",
    ),
)

_CELLS = in_file(
    "stagecraft/report/heat_map.py",
    _MAP,
    (
        "a stage against pretraining is in the map",
        'one["role"] == changes.PARENT and one["stage"] in names',
        'one["stage"] in names',
    ),
    (
        "a cell is its first matrix",
        "fmean((line[key] for line in known))",
        "known[0][key]",
    ),
    (
        "a cell below noise is near it",
        "abs(math.log(ratio)) if ratio > 0 else 0.0",
        "ratio",
    ),
    (
        "shares are no percent",
        'f"{value * (100 if share else 1):.4g}"',
        'f"{value:.4g}"',
    ),
)

_FINDINGS = in_file(
    "stagecraft/report/findings.py",
    "tests/report/page_test.py -k title_of",
    (
        "bars name the least first",
        "key=lambda row: -row[1]",
        "key=lambda row: row[1]",
    ),
    ("a curve ends at its last value", "count < LEAST", "count > LEAST - 9"),
    ("the first tenth is its end", "values[-count:]", "values[:count]"),
)

_TOKENS = in_file(
    "stagecraft/report/tokens.py",
    "tests/report/page_test.py -k answer",
    (
        "spaces are not seen",
        '"␣" * left',
        '" " * left',
    ),
    (
        "ranks are said to be the last reader's",
        "span(token, readers[0])",
        "span(token, readers[-1])",
    ),
    ("what is no reading is taken for one", "all(map(_is_whole, rows))", "True"),
    ("control tokens look like text", 'bool(token.get("control"))', "False"),
)

_PAGES = in_file(
    "stagecraft/report/render.py",
    "tests/report/page_test.py -k might_have_been",
    (
        "what a model wrote is a piece of the page",
        "autoescape=True",
        "autoescape=False",
    ),
)

MUTANTS = _FRONTIER + _CELLS + _FINDINGS + _TOKENS + _PAGES
