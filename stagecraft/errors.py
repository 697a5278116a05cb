"""The one exception for things a user can put right."""


class UserError(Exception):
    """Bad input, told in one line.

    The text names the file, line or key, what was expected, what was found, and what
    to do. Commands print it alone and exit with status 2; `--debug` adds the traceback.
    """
