"""The facts are well formed, and the split keeps its promises."""

import os
import subprocess
import sys

import pytest

from stagecraft import worlds
from stagecraft.errors import UserError
from stagecraft.worlds.countries.facts import (
    ATTRIBUTES,
    BY_NAME,
    COUNTRIES,
    KNOWN,
    MOST,
    SHOWN,
    VALUES,
    split,
)


def test_every_country_has_four_plain_facts():
    assert 104 <= len(COUNTRIES) <= 130 and len(BY_NAME) == len(KNOWN) == MOST
    for country in KNOWN:
        assert len(country) == 5 and all(v and v.isascii() for v in country)
        assert all(v == v.strip() for v in country)
    assert len(VALUES["continent"]) == 6
    assert len(VALUES["capital"]) == len(COUNTRIES)


@pytest.mark.parametrize(
    "name, facts",
    [
        ("France", ("Paris", "Europe", "euro", "French")),
        ("Papua New Guinea", ("Port Moresby", "Oceania", "kina", "English")),
        ("Brazil", ("Brasilia", "South America", "real", "Portuguese")),
        ("Kazakhstan", ("Astana", "Asia", "tenge", "Kazakh")),
        ("Myanmar", ("Naypyidaw", "Asia", "kyat", "Burmese")),
        ("Burundi", ("Gitega", "Africa", "franc", "Kirundi")),
    ],
)
def test_facts_known_by_heart(name, facts):
    assert tuple(getattr(BY_NAME[name], a) for a in ATTRIBUTES) == facts


@pytest.mark.parametrize("size", ["full", "tiny"])
@pytest.mark.parametrize("seed", range(5))
def test_split_is_a_partition_with_the_shown_country_in_test(seed, size):
    roles = split(seed, size)
    names = [c.name for role in roles for c in role]
    assert len(set(names)) == len(names) == (len(COUNTRIES) if size == "full" else 16)
    assert SHOWN in {c.name for c in roles.test}
    assert abs(len(roles.train) - len(names) / 2) <= 1
    assert abs(len(roles.dev) - len(roles.test)) <= 1


def test_split_depends_on_the_seed():
    assert split(0) == split(0)
    assert {c.name for c in split(0).test} != {c.name for c in split(1).test}


def test_an_unknown_world_is_refused():
    with pytest.raises(UserError, match="planets.*countries"):
        worlds.get("planets")


def test_files_do_not_depend_on_the_hash_seed(tmp_path):
    """Two processes with different string hashes write the same bytes."""
    code = (
        "import sys; from stagecraft import worlds; "
        "worlds.write('countries', sys.argv[1], 3, 'tiny')"
    )
    for name in "12":
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / name)],
            env=os.environ | {"PYTHONHASHSEED": name},
            check=True,
        )
    one, two = (sorted((tmp_path / n).iterdir()) for n in "12")
    assert [p.name for p in one] == [p.name for p in two]
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]
