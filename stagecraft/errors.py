"""The one exception for errors that a user can fix."""


class UserError(Exception):
    """Bad input, described in one line.

    The text names the file, line or key, what was expected, what was there, and what
    to do. Commands print it alone and exit with status 2; `--debug` adds the traceback.
    """
