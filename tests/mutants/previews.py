"""Mistakes in what is said before a run, and in a conversation on the terminal."""

from tests.mutants.mutant import in_file

_DATA = in_file(
    "stagecraft/preview/data.py",
    "tests/preview_test.py",
    (
        "the first token of a piece is shown as learned",
        'batch["mask"] & (batch["positions"] > 0)',
        'batch["mask"]',
    ),
    (
        "control characters reach the terminal",
        "words = visible(tokenizer.decode(ids[part].tolist()))",
        "words = tokenizer.decode(ids[part].tolist())",
    ),
)

_PLAN = in_file(
    "stagecraft/preview/plan.py",
    "tests/preview_test.py",
    (
        "the optimizer takes no memory",
        '"state_bytes": _bytes(state)',
        '"state_bytes": _bytes(state.model)',
    ),
    (
        "a stage costs what its first step costs",
        "{use: count * stage.steps for use, count in work.items()}",
        "work",
    ),
)

_GRAPH = in_file(
    "stagecraft/preview/graph.py",
    "tests/preview_test.py",
    (
        "records are no edge of the graph",
        'lines = [f"records of {parent}" for parent in named]',
        "lines = []",
    ),
)

_CHAT = in_file(
    "stagecraft/report/chat.py",
    "tests/report/chat_test.py",
    (
        "log lines stand inside an answer",
        "handlers, log.handlers = log.handlers, [memory]",
        "handlers = log.handlers",
    ),
    (
        "an unknown command is said to the model",
        'line.startswith("/") and text not in COMMANDS',
        "False",
    ),
    (
        "the default stage need not answer in turns",
        "in_turns or speaking",
        "speaking",
    ),
    (
        "one ctrl-C at a prompt ends the conversation",
        "if stopped:\n    print()\n    return",
        "print()\nreturn",
    ),
)

MUTANTS = (*_DATA, *_PLAN, *_GRAPH, *_CHAT)
