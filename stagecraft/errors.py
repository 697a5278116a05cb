"""The one exception for errors that a user can fix."""

import os
import sys
from pathlib import Path

DISTRIBUTION = "stagecraft-lm"  # the package's name on the registry


class UserError(Exception):
    """Bad input, described in one line.

    The text names the file, line or key, what was expected, what was there, and what
    to do. Commands print it alone and exit with status 2; `--debug` adds the traceback.
    """


def install(extra: str) -> str:
    """Returns the command that installs an extra from where the user is.

    From a clone it installs the clone; the folder is named from elsewhere than inside.
    """
    root = Path(__file__).parents[1]
    package = DISTRIBUTION
    if (root / "pyproject.toml").is_file():
        package = "." if root == Path.cwd() else str(root)
    editable = "" if package == DISTRIBUTION else "-e "
    python = os.path.relpath(sys.executable)
    python = sys.executable if python.startswith(os.pardir) else python
    return f"{python} -m pip install {editable}'{package}[{extra}]'"
