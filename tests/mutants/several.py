"""Mistakes in what several processes share."""

from tests.mutants.mutant import in_file

_TESTS = "tests/processes/processes_test.py"

MUTANTS = (
    *in_file(
        "stagecraft/native_lines.py",
        f"{_TESTS} -k other_crashes",
        (
            "any crash is taken for a lost process",
            "lost(text) if _ENDS in text else text",
            "lost(text)",
        ),
    ),
    *in_file(
        "stagecraft/processes.py",
        _TESTS,
        (
            "a task alone waits for others",
            "if one.get_process_count() == 1:",
            "if False:",
        ),
        (
            "a long step is late whatever the others took",
            "max(self.FACTOR * median, self.LEAST)",
            "self.LEAST",
        ),
        (
            "who waits is called behind",
            "place < furthest or silent > SILENT",
            "place <= furthest or silent > SILENT",
        ),
    ),
    *in_file(
        "stagecraft/data/dataset.py",
        "tests/data/dataset_test.py",
        (
            "rows of a replay are counted from the batch's begin",
            "own = own[(own >= begin) & (own < begin + len(index))] - begin",
            "own = own[own < len(index)]",
        ),
        (
            "a process whose own rows are silent refuses the batch",
            "if own:  # those of other rows count\n    return self.batch_at(step)",
            "pass",
        ),
    ),
    *in_file(
        "stagecraft/run.py",
        "tests/processes/run_test.py -k differ",
        (
            "processes of different configs go on together",
            'processes.check_same("config", schema.plain(config))',
            "",
        ),
    ),
)
