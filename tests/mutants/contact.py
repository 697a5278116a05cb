"""Mistakes with records as people have them."""

from tests.mutants.mutant import in_file

_TALLY = in_file(
    "stagecraft/data/tally.py",
    "tests/data/first_contact_test.py",
    (
        "most records may be lost",
        "if gone <= most * self.read and not (self.cut and self.lost_share > most):",
        "if True:",
        "tests/data/first_contact_test.py -k lose_most",
    ),
    (
        "the ends of pairs are cut unasked",
        'if self.data.too_long == "cut":',
        "if True:",
        "tests/data/first_contact_test.py -k lose_most",
    ),
    (
        "pairs alike once cut are learned",
        "if not alike and all(any(mask) for _, mask in cut):",
        "if all(any(mask) for _, mask in cut):",
        "tests/data/first_contact_test.py -k pairs_that_are_cut",
    ),
    (
        "keys that are not read are not named",
        "self.unread[key] += 1",
        "pass",
        "tests/data/first_contact_test.py -k named",
    ),
    (
        "bad records are dropped unasked",
        'return self.data is not None and self.data.bad == "drop"',
        "return True",
        "tests/data/odd_records_test.py -k bad_records",
    ),
)

_CONTACT = (
    *in_file(
        "stagecraft/data/corpus.py",
        "tests/data/first_contact_test.py -k loses_its_end",
        (
            "demonstrations lose their ends unsaid",
            "return numbers[~long]",
            "return numbers",
        ),
    ),
    *in_file(
        "stagecraft/data/files.py",
        "tests/data/odd_records_test.py -k splits",
        (
            "the test split is trained on",
            'if "train" not in splits or not others:',
            "if True:",
        ),
    ),
    *in_file(
        "stagecraft/data/keys.py",
        "tests/data/first_contact_test.py -k records_of_others",
        (
            "an instruction without its input",
            '"+".join([*names, *more[:1]])',
            "names[0]",
        ),
    ),
    *in_file(
        "stagecraft/data/rendering.py",
        "tests/data/odd_records_test.py -k spell",
        (
            "spelled control tokens are not counted",
            "self.notes[spelled(self.tokenizer)] += 1",
            "pass",
        ),
    ),
    *in_file(
        "stagecraft/data/rendering.py",
        "tests/data/first_contact_test.py -k leaves_out",
        (
            "calls that a template leaves out are learned",
            "called and _alike(template, (messages, tools), (bare, tools))",
            "False",
        ),
        (
            "tools are held against tools",
            "_alike(template, (messages, tools), (messages, None))",
            "_alike(template, (messages, tools), (messages, tools))",
        ),
    ),
    *in_file(
        "stagecraft/stages/records.py",
        "tests/stages/comparisons_test.py -k tools",
        (
            "answers are sampled without tools",
            "dict(config.sampling) | tools_of(each)",
            "dict(config.sampling)",
        ),
    ),
    *in_file(
        "stagecraft/text/chat.py",
        "tests/data/odd_records_test.py -k continued",
        (
            "the prompt is learned",
            "mask = [False] * count + [True] * (len(ids) - count)",
            "mask = [True] * len(ids)",
        ),
    ),
    *in_file(
        "stagecraft/data/forms.py",
        "tests/data/first_contact_test.py",
        (
            "what is not to be trained on is learned",
            'message.setdefault("weight", int(learned))',
            "pass",
            "tests/data/first_contact_test.py -k trained_on",
        ),
        (
            "a system text is left out",
            'return [{"role": "system", "content": system}, *turns]',
            "return turns",
            "tests/data/first_contact_test.py -k records_of_others",
        ),
        (
            "arguments stay text",
            'function = function | {"arguments": arguments}',
            "",
            "tests/data/first_contact_test.py -k arguments",
        ),
    ),
)

MUTANTS = _TALLY + _CONTACT
