"""Topologies are read, counted and refused by their own arithmetic."""

import math
import types

import pytest

from stagecraft import chips
from stagecraft.errors import UserError


@pytest.mark.parametrize(
    "text, counts",
    [
        # chips, devices, hosts, chips of a host
        ("v5e:16x16", (256, 256, 64, 4)),
        ("2xv5e:16x16", (512, 512, 128, 4)),
        ("v5p:8x8x8", (512, 512, 128, 4)),
        ("tpu7x:4x4x4", (64, 128, 16, 4)),
        ("h200:8", (8, 8, 1, 8)),
        ("h200:64", (64, 64, 8, 8)),
        ("h200:1", (1, 1, 1, 1)),
    ],
)
def test_what_a_topology_counts(text, counts):
    t = chips.parse(text)
    assert (t.chips, t.devices, t.hosts, t.host_chips) == counts
    assert t.devices * t.memory == t.chips * t.chip.memory
    assert math.isclose(
        t.peak("bfloat16") * t.devices, t.chips * t.chip.peaks["bfloat16"]
    )


@pytest.mark.parametrize(
    "text, says",
    [
        ("v5e:16x16x2", "did you mean 'v5e:16x16'"),
        ("v6:16x16", "did you mean 'v6e:16x16'"),
        ("v5p:16x16", "no such topology"),
        ("h200:12", "multiple of it"),
        ("h200", "no such topology"),
        ("v5e:0x4", "no such topology"),
        ("", "no such topology"),
    ],
)
def test_what_does_not_exist_is_refused_in_a_line(text, says):
    with pytest.raises(UserError, match="--topology=") as refusal:
        chips.parse(text)
    assert says in str(refusal.value) and "\n" not in str(refusal.value)


def test_every_known_name_is_read_back():
    for name in chips.KNOWN:
        assert chips.parse(name).name == name


def test_every_chip_says_where_its_figures_are_from():
    for chip in chips.CHIPS.values():
        assert chip.source and chip.memory > 10 * chips.GIB
        # Bytes moved in the time of a product: between 100 and 700 FLOPs a byte.
        assert 100 < chip.peaks["bfloat16"] / chip.bandwidth < 700


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 PCIe", None),  # fewer units and slower memory than the table's
        ("cpu", None),
    ],
)
def test_the_chip_of_a_device(kind, name):
    chip = chips.of_device(types.SimpleNamespace(device_kind=kind))
    assert (chip and chip.name) == name
