"""Mistakes in what a folder says twice, in ends of turns, and in half copies."""

from tests.mutants.mutant import in_file

_TWICE = (
    *in_file(
        "stagecraft/models/huggingface.py",
        "tests/models/contradictions_test.py",
        (
            "a tied head that differs is thrown away",
            "config.tied and _is_torn(Path(folder), config)",
            "False",
        ),
        (
            "a tied table under its second name is lost",
            'present.setdefault(family.top["embed"][0], head)',
            "pass",
        ),
    ),
    *in_file(
        "stagecraft/models/tensors.py",
        "tests/models/contradictions_test.py",
        (
            "the first rows decide that tables are equal",
            "starts = range(0, len(a), rows)",
            "starts = range(0, 1)",
        ),
        (
            "of two files of one tensor the last is read",
            "for name in tensors.keys() & header.keys():",
            "for name in ():",
        ),
    ),
    *in_file(
        "stagecraft/models/translation.py",
        "tests/models/contradictions_test.py",
        ("the first of two keys is taken", "if value != given[first]:", "if False:"),
        (
            "the part about text goes before the rest",
            "if differences(*map(meaning, configs)):",
            "if False:",
        ),
    ),
    *in_file(
        "stagecraft/models/peft.py",
        "tests/models/peft_test.py",
        (
            "tables of a resize need not agree",
            "len(set(rows)) > 1",
            "False",
        ),
    ),
)

_ENDS = (
    *in_file(
        "stagecraft/text/chat.py",
        "tests/text/end_of_turn_test.py",
        (
            "an end behind the block is not learned",
            "mask[after : last + 1] = [True] * (last + 1 - after)",
            "pass",
        ),
        (
            "answers melt into their prompts",
            "encoded = _apart(encoded, messages, tools, tokenizer, write)",
            "pass",
        ),
        (
            "the end of a prompt is where a block begins",
            "{*starts, *(start + template.lead for start in starts)}",
            "{*starts}",
        ),
        (
            "a stop that is given counts as learned",
            "learned and token in stops for token, learned in backwards",
            "token in stops for token, learned in backwards",
        ),
        ("data that never stop are taken", "if required and not ends:", "if False:"),
    ),
    *in_file(
        "stagecraft/text/tokenizer_json.py",
        "tests/text/end_of_turn_test.py",
        (
            "a clock goes on between two loads",
            "{MOMENT: now.encode()} | self.files",
            "self.files | {MOMENT: now.encode()}",
        ),
    ),
    *in_file(
        "stagecraft/text/tokenizer_export.py",
        "tests/text/end_of_turn_test.py",
        (
            "generation ends where the first folder says",
            'settings["eos_token_id"] = list(tokenizer.stops)',
            "pass",
        ),
    ),
)

_COPIES = (
    *in_file(
        "stagecraft/groundwork.py",
        "tests/copied_runs_test.py",
        (
            "another tokenizer is taken for the run's",
            "if entry.tokenizer not in (None, tokenizer.digest):",
            "if False:",
        ),
    ),
    *in_file(
        "stagecraft/hub.py",
        "tests/hub_test.py",
        (
            "a snapshot without weights is a model",
            "return folder if any(path.exists() for path in present) else None",
            "return folder if folder.is_dir() else None",
        ),
    ),
)

MUTANTS = _TWICE + _ENDS + _COPIES
