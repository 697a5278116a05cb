"""The command line in this process: what starting Python anew would only repeat."""

import contextlib
import io
import logging
import signal

from absl import flags
from absl.testing import flagsaver

from stagecraft import cli


def stagecraft(*arguments):
    """Runs a command; (exit status, stdout, stderr). Flags and logs are as before."""
    flags_before = flagsaver.save_flag_values(flags.FLAGS)
    term = signal.getsignal(signal.SIGTERM)
    names = ("jax", "absl", "stagecraft")
    loggers = [logging.getLogger(name) for name in names]
    before = [(log.level, log.propagate, [*log.handlers]) for log in loggers]
    out, error = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            status = cli.main(["stagecraft", *map(str, arguments)])
    finally:
        flagsaver.restore_flag_values(flags_before, flags.FLAGS)
        signal.signal(signal.SIGTERM, term)
        for log, (level, propagate, handlers) in zip(loggers, before, strict=True):
            log.level, log.propagate, log.handlers = level, propagate, handlers
    return status, out.getvalue(), error.getvalue()
