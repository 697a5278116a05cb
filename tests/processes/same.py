"""What two runs of one config must have in common, whatever they ran on."""

import json
from pathlib import Path

from stagecraft import metrics

# Of time, and of the machine.
APART = ("seconds", "made_with", "peak_memory_bytes", "seconds_this_time")


def differences(one, other, *, relative=1e-5):
    """Lines that say where two work directories differ; seconds may.

    Args:
        one, other: work directories.
        relative: by how much numbers of training and of the summary may.
    """
    one, other = Path(one), Path(other)
    lines = []
    names = {path.relative_to(one) for path in one.glob("*/*.jsonl")}
    others = {path.relative_to(other) for path in other.glob("*/*.jsonl")}
    lines += [f"{name}: in one alone" for name in sorted(names ^ others)]
    for name in sorted(names & others):
        rows = metrics.read(one / name), metrics.read(other / name)
        near = relative if name.name == "metrics.jsonl" else 0.0
        if name.name == "journal.jsonl":
            near = relative  # strengths of verdicts are numbers of a model
        lines += _compared(str(name), *rows, near)
    for name in ("summary.json", "prompt.json", "lineage.json"):
        values = (json.loads((root / name).read_text()) for root in (one, other))
        lines += _compared(name, *values, relative)
    return lines


def _compared(where, one, other, relative):
    if isinstance(one, dict) and isinstance(other, dict):
        keys = (one.keys() | other.keys()) - set(APART)
        return [
            line
            for key in sorted(keys)
            for line in _compared(
                f"{where}.{key}", one.get(key), other.get(key), relative
            )
        ]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [
            line
            for number, pair in enumerate(zip(one, other, strict=True))
            for line in _compared(f"{where}[{number}]", *pair, relative)
        ]
    if isinstance(one, float) and isinstance(other, float):
        # Numbers about 0 are sums of others about 1.
        near = abs(one - other) <= relative * max(abs(one), abs(other), 1.0)
    elif where.endswith(".rank"):
        near = abs(one - other) <= 1  # of two logits that are next to equal
    else:
        near = one == other
    return [] if near else [f"{where}: {one!r}, {other!r}"]
