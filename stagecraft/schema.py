"""Configs that refuse what they do not know: unknown keys, wrong types, bad choices.

Every refusal is one line that names the key, what it got, what it may be, and the
nearest known name.
"""

import difflib
import importlib
from typing import Any

from ml_collections import ConfigDict

from stagecraft.errors import UserError

# Keys whose contents belong to somebody else: a loss's own keyword arguments.
FREE = ("objective_args", "stages")


def merge(config, changes, path=""):
    """Sets keys of `config` from a nested mapping, checking names and types.

    Args:
        config: a complete ConfigDict of defaults; changed in place.
        changes: a mapping (dict or ConfigDict).
        path: where `config` sits, for messages: "stages.sft".

    Returns:
        config.
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


def coerce(where, value, default):
    """The value in the default's type, or a UserError."""
    kind = type(default)
    if callable(value) and isinstance(default, str):
        return value  # an objective written in a notebook
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is tuple and isinstance(value, (list, tuple)):
        return tuple(value)
    if isinstance(value, kind) and isinstance(value, bool) == (kind is bool):
        return value
    raise UserError(
        f"{where}={value!r}: expected {_NAMES[kind]}, got {type(value).__name__}"
    )


_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a text",
    tuple: "a tuple such as (32, 64)",
}


def unknown(where, name, known):
    """The one line for a name nobody knows, with the nearest known one.

    >>> unknown("optimizer.lrr", "lrr", ["lr", "b1"])
    "optimizer.lrr: unknown key; did you mean 'lr'? known here: b1, lr"
    """
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{where}: unknown key; {hint}known here: {', '.join(sorted(known))}"


def choice(where, value, allowed):
    """Refuses a value that is not one of `allowed`."""
    if value not in allowed:
        near = difflib.get_close_matches(str(value), list(map(str, allowed)), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        options = ", ".join(map(repr, allowed))
        raise UserError(f"{where}={value!r}: expected one of {options}{hint}")


def positive(where, value, *, zero=False):
    """Refuses a number below one (or below zero)."""
    if value < 0 or (value == 0 and not zero):
        least = "0 or more" if zero else "more than 0"
        raise UserError(f"{where}={value!r}: expected {least}")


def imported(where: str, spec: str) -> Any:
    """Imports "package.module:function".

    Args:
        where: the key that names it, for the message.
        spec: what the key is set to.

    Raises:
        UserError: when there is no such module or function.

    >>> imported("objective", "math:sqrt")(9.0)
    3.0
    """
    module, _, name = spec.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"{where}={spec!r}: cannot import it ({error}); expected "
            "'package.module:function'"
        ) from error


def plain(config):
    """A config as nested dicts of JSON values, keys sorted; callables by name.

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


def difference(old, new, path=""):
    """Where two plain configs first differ, as "key: old -> new"; "" if nowhere.

    >>> difference({"a": {"lr": 1, "b": 2}}, {"a": {"lr": 3, "b": 2}})
    'a.lr: 1 -> 3'
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            where = f"{path}.{key}" if path else key
            if key not in old or key not in new:
                return f"{where}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}"
            found = difference(old[key], new[key], where)
            if found:
                return found
        return ""
    return "" if old == new else f"{path}: {old} -> {new}"
