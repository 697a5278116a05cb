"""Mutants of attacks, of refusals in free text, and of what labels come to."""

from tests.mutants.mutant import in_file

MUTANTS = (
    *in_file(
        "stagecraft/stages/attacks.py",
        "tests/stages/attacks_test.py",
        (
            "what asks for nothing is an attack too",
            "row['harmful'] and row['attack'].strip()",
            "row['attack'].strip()",
            "tests/stages/attacks_test.py -k withstood",
        ),
        (
            "a harmless question is an attack",
            "ended and harmful and success and useful",
            "ended and success and useful",
        ),
        (
            "an answer of no use is success",
            "ended and harmful and success and useful",
            "ended and harmful and success",
        ),
        (
            "an attack without an end counts",
            "ended and harmful and success and useful",
            "harmful and success and useful",
        ),
        (
            "nothing is new twice, won or not",
            "if won: before.append(own)",
            "before.append(own)",
        ),
        (
            "the same attack is rewarded again",
            "if won: before.append(own)",
            "pass",
        ),
        (
            "earlier attacks are new",
            "before = [_pairs(text) for text in known]",
            "before = []",
        ),
        (
            "likeness by the smaller set",
            "both = len(ones | others)",
            "both = min(len(ones), len(others))",
        ),
        (
            "an attack need not be a text",
            "if not isinstance(record.get(ATTACK), str):",
            "if False:",
        ),
    ),
    *in_file(
        "stagecraft/worlds/countries/scorer.py",
        "tests/stages/attacks_test.py",
        (
            "a refusal with help withstands",
            "not refuses(answer) or helps(answer)",
            "not refuses(answer)",
        ),
        (
            "every attack asks for harm",
            'harmful = dialogue.topic(prompt)[0] == "harmful"',
            "harmful = True",
        ),
    ),
    *in_file(
        "stagecraft/anatomy/refusal.py",
        "tests/anatomy/refusal_test.py -k 'rules or error or files'",
        (
            "advice behind a refusal is none",
            "PARTIAL if len(_ADVICE.findall(text)) >= LIST else FULL",
            "FULL",
        ),
        (
            "a refusal anywhere",
            "_SENTENCE.split(text.strip())[:OPENING]",
            "_SENTENCE.split(text.strip())",
        ),
        (
            "what it lacks is refused in full",
            "if _LACKS.search(opening): return PARTIAL",
            "pass",
        ),
        (
            "the table lies on its side",
            "table[said, detect(text)] += 1",
            "table[detect(text), said] += 1",
        ),
        (
            "refused in part is not missed",
            "missed = sum(table[one, NONE] for one in refused)",
            "missed = table[FULL, NONE]",
        ),
        (
            "phrases by their case",
            "text.strip().lower().startswith(lower)",
            "text.strip().startswith(lower)",
        ),
    ),
    *in_file(
        "stagecraft/data/containers.py",
        "tests/data/containers_test.py -k csv",
        (
            "a row of another length",
            "len(row) == len(names)",
            "True",
        ),
        (
            "two columns of one name",
            "if twice or not any(row):",
            "if not any(row):",
        ),
    ),
    *in_file(
        "stagecraft/anatomy/signal_figures.py",
        "tests/anatomy/signal_figures_test.py",
        (
            "ties of the label count",
            "better != worse and one.preference != 0.5",
            "better != worse",
        ),
        (
            "ties of gold count",
            "better != worse and one.preference != 0.5",
            "one.preference != 0.5",
        ),
        (
            "PPO learns from nothing",
            "_spec(run, reward) if reward in run.config.stages else None",
            "None",
        ),
    ),
    *in_file(
        "stagecraft/data/stage_data.py",
        "tests/data/stage_data_test.py -k labels",
        (
            "labels of another run are of this one",
            "folder = Path(folder or root)",
            "folder = Path(root)",
        ),
    ),
    *in_file(
        "stagecraft/report/terminal.py",
        "tests/report/summary_test.py",
        (
            "an interval of what was sampled",
            'drawn = row.name in runs.part(runs.part(own, "draws"), "standard_error")',
            "drawn = False",
        ),
    ),
)
