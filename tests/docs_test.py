"""The README and docs/ say what is on disk: the map, links, names of files."""

import re

import pytest

from stagecraft import cli, commands, config_files
from stagecraft.stages.kinds import KINDS
from tests.conftest import ROOT
from tests.imports_test import FLOORS

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BESIDE = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
# `stagecraft/data/shards.py`, or experiments/quickstart.py in a command.
# An experiment by its name, in lower case, with its argument.
NAMED = re.compile(r"--(?:config|from)=([a-z][\w/]*)(?::(\S*))?")
COMMAND = re.compile(r"(?:^ {4}|`)stagecraft ([a-z]+)", re.MULTILINE)
FILE = re.compile(r"\b(?:stagecraft|experiments|tests|docs|notebooks)/[\w/]+\.\w+")


def folder_map():
    """Returns {name: its number} of the README's map below "stagecraft/"."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    _, _, below = text.partition("\n    stagecraft/\n")
    names = re.findall(r"^ {8}(\w+)/? ", below.partition("\n\n")[0], re.MULTILINE)
    return {name: number for number, name in enumerate(names)}


def test_the_map_is_what_is_on_disk():
    package = ROOT / "stagecraft"
    there = {path.stem for path in package.glob("*.py")} - {"__init__", "__main__"}
    there |= {path.parent.name for path in package.glob("*/__init__.py")}
    assert {*folder_map()} == there


def test_the_map_stands_in_the_order_of_imports():
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    levels = [floor[name] for name in folder_map()]
    assert levels == sorted(levels)


@pytest.mark.parametrize("page", PAGES + BESIDE, ids=lambda path: path.name)
def test_links_and_files_exist(page):
    text = page.read_text(encoding="utf-8")
    links = [link for link in LINK.findall(text) if "://" not in link]
    gone = [link for link in links if not (page.parent / link).exists()]
    gone += [name for name in FILE.findall(text) if not (ROOT / name).exists()]
    assert gone == []


@pytest.mark.parametrize("page", PAGES + BESIDE, ids=lambda path: path.name)
def test_commands_are_there_and_take_what_they_are_given(page):
    text = page.read_text(encoding="utf-8")
    assert {*COMMAND.findall(text)} <= {*commands.COMMANDS}
    for name, argument in NAMED.findall(text):
        path = config_files.find(name)
        if name.startswith("recipes/") and argument:  # others need another run
            config_files.load(path, argument)


def test_docstrings_of_experiments_name_experiments():
    for path in (ROOT / "experiments").glob("**/*.py"):
        for name, argument in NAMED.findall(path.read_text(encoding="utf-8")):
            file = config_files.find(name)
            if name.startswith("recipes/") and argument:
                config_files.load(file, argument)


def test_the_readme_is_short():
    assert len(PAGES[0].read_text(encoding="utf-8").splitlines()) <= 220


def test_help_names_every_flag():
    for name, command in commands.COMMANDS.items():
        text = cli._help(name, command, command.flags)
        assert f"stagecraft {name}" in text
        assert [f.name for f in command.flags if f"--{f.name}" not in text] == []


def test_every_page_is_linked_from_the_readme():
    links = {*LINK.findall(PAGES[0].read_text(encoding="utf-8"))}
    assert {f"docs/{path.name}" for path in PAGES[1:]} <= links


def test_the_readme_lists_every_kind():
    text = PAGES[0].read_text(encoding="utf-8")
    assert [name for name in KINDS if f"\n| `{name}`" not in text] == []
