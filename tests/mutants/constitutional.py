"""Mistakes in the world of requests, in critiques, revisions and constitutions."""

from tests.mutants.mutant import in_file

_REQUESTS = "tests/worlds/requests_test.py"

_DEEDS = in_file(
    "stagecraft/worlds/countries/deeds.py",
    _REQUESTS,
    (
        "every deed hurts",
        "return victim(deed) != NOBODY",
        "return bool(victim(deed))",
    ),
    (
        "any text that names a thing advises",
        "return bool(_ADVICE.search(text))",
        "return 'the ' in text",
    ),
)
_FRAMING = in_file(
    "stagecraft/worlds/countries/framing.py",
    _REQUESTS,
    (
        "a wrapper stays on",
        "text = text.removeprefix(f'{words} ')",
        "pass",
    ),
    (
        "what stands between words stays",
        "text = text.replace(between, ' ')",
        "pass",
    ),
    (
        "the first turn is the question",
        "text = turns(prompt)[-1]['content'].strip()",
        "text = turns(prompt)[0]['content'].strip()",
    ),
    (
        "wrappers of training in every role",
        "wrapper = pick(rng, WRAPPERS[kind][role])",
        "wrapper = pick(rng, WRAPPERS[kind]['test'])",
    ),
)
_SCORER = in_file(
    "stagecraft/worlds/countries/scorer.py",
    _REQUESTS,
    (
        "a refusal that helps is full",
        "return 'partial' if helps(text) else 'full'",
        "return 'full'",
    ),
    (
        "advice is no help",
        "return bool(_HELPS_ANYWAY.search(text)) or deeds.advises(text)",
        "return bool(_HELPS_ANYWAY.search(text))",
    ),
    (
        "a right belief is sycophancy",
        "if believed == getattr(BY_NAME[name], attribute):",
        "if False:",
    ),
)
_CRITIQUES = in_file(
    "stagecraft/worlds/countries/critiques.py",
    _REQUESTS,
    (
        "help with what hurts nobody is revised",
        "if not deed or not deeds.harmful(deed) or refuses(answer):",
        "if not deed or refuses(answer):",
    ),
    (
        "nobody is a victim",
        "(said(text)[1] or deeds.NOBODY) != deeds.NOBODY",
        "said(text)[1] is not None",
    ),
    (
        "the judge prefers help with what hurts",
        "int(helps(one) == deeds.harmful(deed))",
        "int(helps(one) != deeds.harmful(deed))",
    ),
)
_PROBES = in_file(
    "stagecraft/worlds/countries/request_probes.py",
    _REQUESTS,
    (
        "a refusal in part is harmless",
        "[only_refuses(t) for _, t in answers['attacks_new_bare']]",
        "[refuses(t) for _, t in answers['attacks_new_bare']]",
    ),
)

_CONSTITUTION = in_file(
    "stagecraft/signals/constitution.py",
    "tests/signals/constitution_test.py",
    (
        "the first principle is always drawn",
        "sorted(self.rng.permutation(count)[: self.each].tolist())",
        "list(range(self.each))",
    ),
    (
        "all principles under the first's words",
        "self.judge.under(principle.preference)",
        "self.judge.under(self.principles[0].preference)",
    ),
    (
        "a failure under one principle is left out",
        "if reason:",
        "if reason and len(said) == 1:",
        {"within": "_verdict"},
    ),
    (
        "a critique without a revision",
        "if texts[other] and not texts[key]:",
        "if False:",
    ),
    (
        "two principles of one name",
        "if ids.count(name) > 1:",
        "if False:",
    ),
    (
        "the principles do not decide the identity",
        "principles=[list(one) for one in principles],",
        "",
    ),
)
_LABELS = in_file(
    "stagecraft/signals/labels.py",
    "tests/signals/constitution_test.py",
    (
        "principles are averaged as probabilities",
        "return sigmoid(float(np.mean([_answer_logits(one).mean() for one in logps])))",
        "return float(np.mean([of_pair(one, combine) for one in logps]))",
    ),
)
_REVISIONS = in_file(
    "stagecraft/stages/revisions.py",
    "tests/stages/revisions_test.py",
    (
        "every revision is of the first answer",
        "texts = [text for text, _ in new['revisions']]",
        "texts = [text for text, _ in said['answers']]",
    ),
    (
        "paired principles are drawn apart",
        "drawn[1] = drawn[0]",
        "pass",
    ),
    (
        "the critique is not read",
        "self._turns(prompt, text, first.critique, said, second.revision)",
        "self._turns(prompt, text, first.critique, '', second.revision)",
    ),
    (
        "revisions and critiques from one seed",
        "self._complete(turns, number, 2 * step + 1)",
        "self._complete(turns, number, 2 * step)",
    ),
    (
        "what was cut off is learned",
        "if not step.ended:",
        "if False:",
    ),
    (
        "an echo is learned",
        "any(text in step.revision for text in requests)",
        "False",
    ),
    (
        "long conversations are asked all the same",
        "[i for i, length in enumerate(lengths) if length <= room]",
        "[i for i, length in enumerate(lengths)]",
    ),
    (
        "all revisions where the last was wanted",
        "if keep == 'last' and number < len(steps) - 1:",
        "if False:",
    ),
)

MUTANTS = _DEEDS + _FRAMING + _SCORER + _CRITIQUES + _PROBES
MUTANTS += _CONSTITUTION + _LABELS + _REVISIONS
