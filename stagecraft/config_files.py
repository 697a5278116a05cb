"""Experiment files: those that come with the package, and a user's own."""

import ast
import importlib.util
import os
import shutil
import sys
import traceback
import types
from pathlib import Path

from ml_collections import ConfigDict

from stagecraft import schema
from stagecraft.errors import UserError

# Holds experiments/ alone: on the path of modules, `from experiments import common`
# works in a copy of an experiment, wherever it lies.
SHIPPED = Path(__file__).parent / "shipped"


def shipped() -> dict[str, str]:
    """Returns {name: first line of its docstring} of the package's own experiments."""
    experiments = {}
    for path in sorted((SHIPPED / "experiments").glob("**/*.py")):
        text = path.read_text()
        if "def get_config(" in text:
            name = path.relative_to(SHIPPED / "experiments").with_suffix("").as_posix()
            docstring = ast.get_docstring(ast.parse(text)) or ""
            experiments[name] = docstring.split("\n")[0]
    return experiments


def find(name: str) -> Path:
    """Returns the file of an experiment.

    Args:
        name: a path, or the name of one that comes with the package ("quickstart").
    """
    if Path(name).is_file():
        return Path(name)
    names = shipped()
    if name in names:
        return SHIPPED / "experiments" / f"{name}.py"
    raise UserError(
        f"--config={name}: no such file, and no experiment of that name; "
        f"{schema.hint(name, names)}there are: {', '.join(names)}"
    )


def module(path: Path) -> types.ModuleType:
    """Runs an experiment's file; returns the module."""
    # An experiment file may import its neighbours, as `experiments.NAME`.
    for folder in (str(path.absolute().parent.parent), os.getcwd()):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    if str(SHIPPED) not in sys.path:
        sys.path.append(str(SHIPPED))
    spec = importlib.util.spec_from_file_location("experiment_file", path)
    file = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(file)
    return file


def load(path: Path, argument: str) -> ConfigDict:
    """Returns what the file's get_config returns; the file may write data it names.

    Args:
        path: the file.
        argument: what get_config is called with.
    """
    try:
        file = module(path)
        if not hasattr(file, "get_config"):
            raise UserError(f"--config={path}: has no function get_config(arg)")
        config = file.get_config(argument)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"--config={path}: {_reason(error, path)}") from error
    if isinstance(config, ConfigDict):
        return config
    if not isinstance(config, dict):
        raise UserError(
            f"--config={path}: get_config returned {type(config).__name__}; expected "
            "a ConfigDict, as from stagecraft.defaults.experiment()"
        )
    return ConfigDict(config)


def _reason(error, path):
    """Returns in one line what an experiment file raised, and in which line."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f.lineno for f in frames if Path(f.filename) == Path(path).absolute()]
    lines = lines or [f.lineno for f in frames if f.filename == str(path)]
    where = f"line {lines[-1]} " if lines else ""
    text = " ".join(str(error).split())
    return f"{where}raised {type(error).__name__}: {text} (--debug shows where)"


def copy(name: str, target: Path) -> Path:
    """Copies an experiment to a file to edit; refuses one that is there."""
    target = Path(target)
    if target.exists():
        raise UserError(f"{target}: is there already; name another file")
    if target.suffix != ".py":
        raise UserError(f"{target}: expected a Python file, as in mine.py")
    source = find(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    return target
