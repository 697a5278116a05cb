"""The house keeps its floors: a file imports only from lower ones, and no circles."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "stagecraft"

# What each file or folder of the package stands on, from the ground up. Files of one
# folder may import each other; files of one floor may where the list below says so.
FLOORS = (
    (
        "errors",
        "hub",
        "gguf_file",
        "process",
        "native_lines",
        "masked",
        "tree",
        "sharding",
        "stores",
        "storage",
        "lineage",
        "schema",
        "processes",
        "chips",
        "bounds",
    ),
    ("checkpoint", "metrics", "trackers"),
    ("losses", "optim"),
    ("text",),
    ("models",),
    ("runs",),
    ("defaults",),
    ("data", "worlds"),
    ("curate",),
    ("signals",),
    ("stages",),
    ("train",),
    ("anatomy",),
    ("report",),
    ("bench", "experiment"),
    ("groundwork",),
    ("run",),
    ("exchange", "config_files", "preview", "judging", "refusals", "serve"),
    ("claims_lab", "pods"),
    ("commands",),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}
# Beside each other on the ground, but one after the other.
GROUND = FLOORS[0]


def modules():
    return sorted(p for p in PACKAGE.rglob("*.py") if p.parts[-1] != "__init__.py")


def room(path):
    """The file or folder directly under the package: "losses", "train"."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path):
    """Dotted names of the package's modules that a file imports, at any depth."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "stagecraft":
                yield from (a.name for a in node.names)
            elif node.module.startswith("stagecraft."):
                yield node.module.removeprefix("stagecraft.")
            else:
                yield f"!{node.module}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.name
                inside = name.startswith("stagecraft.")
                yield name.removeprefix("stagecraft.") if inside else f"!{name}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    own = room(path)
    assert own in LEVEL, f"{own} has no floor: add it to FLOORS"
    for name in imported(path):
        if name.startswith("!"):
            outside = name[1:].split(".")[0]
            assert outside not in ("experiments", "notebooks", "tests"), name
            continue
        other = name.split(".")[0]
        if other in (own, "__version__"):
            continue
        below = LEVEL[other] < LEVEL[own]
        if LEVEL[other] == LEVEL[own] == 0:
            below = GROUND.index(other) < GROUND.index(own)
        assert below, f"{own} (floor {LEVEL[own]}) imports {other} ({LEVEL[other]})"


def test_no_circles():
    graph = {}
    for path in modules():
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        graph[name] = {n for n in imported(path) if not n.startswith("!")}
    done = set()

    def visit(name, trail):
        assert name not in trail, " -> ".join([*trail, name])
        if name in done or name not in graph:
            return
        for other in graph[name]:
            visit(other, [*trail, name])
        done.add(name)

    for name in graph:
        visit(name, [])


def test_files_are_read_in_one_sitting():
    for path in modules():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= 500, f"{path.relative_to(ROOT)} has {lines} lines"
        assert path.name != "utils.py"


def test_docstrings_say_what_a_file_is():
    for path in modules():
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def test_what_takes_long_to_import_waits_until_it_is_used():
    """Of what most commands import, each of these is a third of a second or more."""
    slow = {"scipy.stats", "scipy.optimize", "matplotlib", "torch", "transformers"}
    for path in modules():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [a.name for a in getattr(node, "names", ())]
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{n}" for n in names)]
            taken = {n for n in names for s in slow if n == s or n.startswith(f"{s}.")}
            assert not taken, f"{path}: import {taken} in the function that uses it"
