"""Checks of configs: unknown keys, wrong types, bad choices, functions by name.

Every refusal is one line that names the key, what it got, what it may be, and the
nearest known name.
"""

import difflib
import functools
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from stagecraft.errors import UserError

# Keys whose contents are checked elsewhere: keyword arguments of losses and verifiers.
FREE = ("objective_args", "verifier_args", "stages", "curation")


def group(**keys: Any) -> ConfigDict:
    """Returns a group of keys with their defaults."""
    return ConfigDict(keys)


def merge(config: ConfigDict, changes: Any, path: str = "") -> ConfigDict:
    """Sets keys of `config` from a nested mapping, checking names and types.

    Args:
        config: a complete ConfigDict of defaults; changed in place, and returned.
        changes: a mapping (dict or ConfigDict).
        path: of `config`, for messages: "stages.sft".
    """
    for key, value in changes.items():
        where = f"{path}.{key}" if path else key
        if key not in config:
            raise UserError(unknown(where, key, config.keys()))
        default = config[key]
        if isinstance(default, ConfigDict):
            if not hasattr(value, "items"):
                raise UserError(f"{where}={value!r}: expected a group of keys (a dict)")
            if key in FREE:
                config[key] = ConfigDict(dict(value))
            else:
                merge(default, value, where)
        else:
            with config.ignore_type():
                config[key] = coerce(where, value, default)
    return config


def coerce(where: str, value: Any, default: Any) -> Any:
    """Returns the value in the default's type, or raises a UserError."""
    wanted = type(default)
    if callable(value) and isinstance(default, str):
        return value  # an objective written in a notebook
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if wanted is tuple and isinstance(value, (list, tuple)):
        return tuple(value)
    if isinstance(value, wanted) and isinstance(value, bool) == (wanted is bool):
        return value
    raise UserError(
        f"{where}={value!r}: expected {kind_of(default)}, got {type(value).__name__}"
    )


def kind_of(default: Any) -> str:
    """Returns what values a key takes, in words: "a whole number" of 0."""
    return _NAMES[type(default)]


_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a text",
    tuple: "a tuple such as (32, 64)",
}


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns the name most similar to `name`; "" where none is similar."""
    close = difflib.get_close_matches(str(name), [*map(str, names)], n=1, cutoff=0.5)
    return close[0] if close else ""


def hint(name: str, names: Iterable[str]) -> str:
    """Returns "did you mean 'lr'? ", or "" where no name is similar."""
    near = nearest(name, names)
    return f"did you mean {near!r}? " if near else ""


def unknown(where: str, name: str, names: Iterable[str]) -> str:
    """Returns the message for an unknown key, with the nearest known one.

    >>> unknown("optimizer.lrr", "lrr", ["lr", "b1"])
    "optimizer.lrr: unknown key; did you mean 'lr'? known here: b1, lr"
    """
    listed = ", ".join(sorted(names))
    return f"{where}: unknown key; {hint(name, names)}known here: {listed}"


def choice(where: str, value: Any, allowed: Iterable) -> None:
    """Refuses a value that is not one of `allowed`."""
    if value not in allowed:
        near = nearest(value, allowed)
        options = ", ".join(map(repr, allowed))
        raise UserError(
            f"{where}={value!r}: expected one of {options}"
            + (f"; did you mean {near!r}?" if near else "")
        )


def imported(where: str, spec: Any) -> Any:
    """Returns the object that a name of a function stands for, or a callable itself.

    Args:
        where: the key, for the message.
        spec: its value: "package.module:function", "FILE.py:function", a callable.

    >>> imported("objective", "math:sqrt")(4.0)
    2.0
    """
    if callable(spec):
        return spec
    name, _, function = spec.rpartition(":")
    expected = "expected 'package.module:function' or 'FILE.py:function'"
    if not name:
        raise UserError(
            f"{where}={spec!r}: cannot import it (no module in it); {expected}"
        )
    try:
        module = _module(name)
    except (ImportError, OSError, ValueError) as error:
        raise UserError(
            f"{where}={spec!r}: cannot import it ({error}); {expected}"
        ) from error
    except Exception as error:  # the user's code
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"{where}={spec!r}: {name} cannot be imported: it raised {text} (--debug "
            "shows where)"
        ) from error
    if not hasattr(module, function):
        raise UserError(
            f"{where}={spec!r}: cannot import it ({name} has no {function!r}); "
            f"{hint(function, vars(module))}{expected}"
        )
    return getattr(module, function)


def _module(name):
    if name.endswith(".py"):
        return _of_file(Path(name).expanduser().absolute())
    return importlib.import_module(name)


@functools.cache
def _of_file(path):
    """Returns the module of a Python file, which is run once.

    It may import its neighbours, by their names alone.
    """
    if not path.is_file():
        raise FileNotFoundError("no such file")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    # By a name that no module has: the source of a function is looked up by it.
    spec = importlib.util.spec_from_file_location(str(path), path)
    module = sys.modules[str(path)] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def positive(where: str, value: float, *, zero: bool = False) -> None:
    """Refuses a number that is not positive; with `zero` also allows 0."""
    if value < 0 or (value == 0 and not zero):
        least = "0 or more" if zero else "more than 0"
        raise UserError(f"{where}={value!r}: expected {least}")


def plain(config: Any) -> Any:
    """Returns a config as nested dicts of JSON values, keys sorted; callables by name.

    >>> plain(ConfigDict(dict(b=(1, 2), a=dict(lr=0.1))))
    {'a': {'lr': 0.1}, 'b': [1, 2]}
    """
    if hasattr(config, "items"):
        return {k: plain(config[k]) for k in sorted(config)}
    if isinstance(config, (list, tuple)):
        return [plain(x) for x in config]
    if callable(config):
        return f"{config.__module__}:{config.__qualname__}"
    return config


def listed(text: str) -> list[str]:
    """Returns the names that commas separate: ["sft", "dpo"] of "sft, dpo,"."""
    return [part.strip() for part in text.split(",") if part.strip()]


def flat(value: Any, path: str = "", leave: Iterable[str] = ()) -> Iterator[tuple]:
    """Yields (dotted key, value) of nested dicts, without the keys to leave out.

    >>> dict(flat({"a": {"lr": 1}, "b": 2}))
    {'a.lr': 1, 'b': 2}
    """
    if not isinstance(value, dict):
        yield path, value
        return
    for key, inner in value.items():
        if key not in leave:
            yield from flat(inner, f"{path}.{key}" if path else key, leave)


def difference(old: Any, new: Any, path: str = "") -> str:
    """Returns where two plain configs first differ, "key: old -> new"; "" if nowhere.

    >>> difference({"a": {"lr": 1, "b": 2}}, {"a": {"lr": 3, "b": 2}})
    'a.lr: 1 -> 3'
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            where = f"{path}.{key}" if path else key
            if key not in old or key not in new:
                return f"{where}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}"
            if change := difference(old[key], new[key], where):
                return change
        return ""
    return "" if old == new else f"{path}: {old} -> {new}"
