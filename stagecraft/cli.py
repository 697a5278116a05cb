"""The command line: `stagecraft run`, `prompt`, `export` and others (`commands`).

A UserError is printed as one line and ends the command with status 2; `--debug` shows
the traceback. Any other exception is a bug in the library and is shown whole.
"""

import logging
import os
import signal
import sys
import threading
import traceback

from absl import flags
from ml_collections import config_flags

from stagecraft import commands, config_files, process, processes, schema, stores
from stagecraft.commands.flag import CONFIG, GIVEN, Flag
from stagecraft.errors import UserError

FLAGS = flags.FLAGS
DEBUG = Flag("debug", False, "show the traceback of an error")
CACHE = Flag(
    "cache",
    "",
    "a folder of this machine for what can be made again: compiled programs, tokens",
)


def main(argv=None):
    """Runs a command; returns the exit status."""
    argv = list(sys.argv if argv is None else argv)
    debug = "--debug" in argv
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    try:
        status = _dispatch(argv)
        processes.finish()
        return status
    except UserError as error:
        if debug:
            traceback.print_exc()
        line = stores.named(error)
        processes.fail(line, 2)
        if debug:
            raise
        print(f"stagecraft: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        text, number = getattr(stop, "text", ""), getattr(stop, "signal", signal.SIGINT)
        if not text and argv[1] in ("run", "curate"):
            text = "the same command goes on from what is saved"
        processes.fail("; ".join(filter(None, ["stopped", text])), 128 + number)
        print(
            f"\nstagecraft: {'; '.join(filter(None, ['stopped', text]))}",
            file=sys.stderr,
        )
        return 128 + number
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        processes.fail("nobody reads its output any more", 1)
        return 1
    except Exception as error:
        processes.crash(error)
        raise


def _terminate(number, frame):
    raise process.Stopped("", number)


def _dispatch(argv):
    if len(argv) < 2 or argv[1] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    name = argv[1]
    if name == "--version":
        from stagecraft import __version__

        print(f"stagecraft {__version__}")
        return 0
    if name not in commands.COMMANDS:
        hint = schema.hint(name, commands.COMMANDS)
        raise UserError(
            f"unknown command {name!r}; {hint}commands: {', '.join(commands.COMMANDS)}"
        )
    command = commands.COMMANDS[name]
    taken = (*command.flags, CACHE, DEBUG)
    if any(a in ("-h", "--help", "--helpfull") for a in argv[2:]):
        print(_help(name, command, taken))
        return 0
    GIVEN[:] = argv[2:]
    _, *rest = _parse(argv[1:], taken)
    _quiet()
    if rest and not command.words:
        raise UserError(f"unexpected argument {rest[0]!r}; flags begin with --")
    _check_outputs(taken)
    process.cache_in(FLAGS.cache)
    if "coordinator" in {flag.name for flag in taken}:
        processes.start(FLAGS.coordinator, FLAGS.process, FLAGS.processes)
        _quiet()
    command(rest)
    return 0


# -- flags -----------------------------------------------------------------------------


def _parse(argv, taken):
    """Defines a command's flags and parses them; returns the other arguments.

    Raises UserError for a wrong flag.
    """
    FLAGS.set_gnu_getopt(True)  # flags may stand behind folders and prompts
    config = None
    if any(flag.kind is CONFIG for flag in taken):
        config, argv = _take_config(argv)
    try:
        for flag in taken:
            _define(flag, config, argv)
        return FLAGS(argv)
    except (flags.Error, TypeError, ValueError) as error:
        line = " ".join(str(error).split())
        raise UserError(f"{line} (see stagecraft {argv[0]} --help)") from error


def _check_outputs(taken):
    """Refuses an address where a command writes a folder or file of this machine."""
    for name in {"to", "out"} & {flag.name for flag in taken}:
        if "://" in (value := FLAGS[name].value or ""):
            raise UserError(
                f"--{name}={value}: expected a path of this machine; copy from there "
                "with the store's own client"
            )


def _define(flag, config, argv):
    """Defines a flag; with a config, those of its overrides in `argv` too."""
    kind = flag.kind or type(flag.default)
    if kind is CONFIG and config is not None:
        config_flags.DEFINE_config_dict(flag.name, config, flag.help, sys_argv=argv)
    elif kind is int:
        flags.DEFINE_integer(flag.name, flag.default, flag.help, flag.least)
    else:
        by_kind = {bool: flags.DEFINE_bool, float: flags.DEFINE_float}
        by_kind.get(kind, flags.DEFINE_string)(flag.name, flag.default, flag.help)


def _take_config(argv):
    """Loads --config=EXPERIMENT[:ARG]; the file runs here and never again.

    Returns:
        the config, or None without the flag; and the other arguments.
    """
    value, rest, arguments = None, [], iter(argv)
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if name == "--config":
            value = text if equals else next(arguments, "")
        else:
            rest.append(argument)
    if value is None:
        return None, rest
    name, _, argument = value.partition(":")
    config = config_files.load(config_files.find(name), argument)
    _check_overrides(config, rest)
    return config, rest


def _check_overrides(config, argv):
    """Refuses --config.KEY=VALUE whose key is not there, with the nearest name."""
    for argument in argv:
        if not argument.startswith("--config."):
            continue
        keys = argument.removeprefix("--config.").partition("=")[0].split(".")
        node = config
        for i, key in enumerate(keys):
            where = f"--config.{'.'.join(keys[: i + 1])}"
            if not hasattr(node, "keys"):
                raise UserError(f"{where}: {'.'.join(keys[:i])} has no keys below it")
            if key not in node:
                raise UserError(schema.unknown(where, key, node.keys()))
            node = node[key]


class _Remarks(logging.Handler):
    """Prints the library's own log lines to standard error."""

    def emit(self, record):
        index, _ = processes.here()
        who = f"process {index}: " if index else ""
        print(f"stagecraft: {who}{stores.named(record.getMessage())}", file=sys.stderr)


def _quiet():
    """Silences other libraries' logs, except errors, and prints our own."""
    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.ERROR)
    logging.getLogger("jax").setLevel(logging.ERROR)
    own = logging.getLogger("stagecraft")
    # What all processes would say alike process 0 says; of rewards each has its own.
    index, _ = processes.here()
    own.setLevel(logging.ERROR if index else logging.INFO)
    if index:
        logging.getLogger("stagecraft.signals").setLevel(logging.WARNING)
    own.propagate = False
    if not own.handlers:
        own.addHandler(_Remarks())


# -- help ------------------------------------------------------------------------------


def _overview():
    lines = [
        "stagecraft: train a language model through all its stages and measure what "
        "each one changed.",
        "",
        "commands:",
    ]
    for name, command in commands.COMMANDS.items():
        lines.append(f"  {name:<8} {command.__doc__.splitlines()[0]}")
    lines += ["", "stagecraft COMMAND --help lists the flags of a command."]
    return "\n".join(lines)


def _help(name, command, taken):
    lines = [f"stagecraft {name}: {command.__doc__.splitlines()[0]}"]
    lines += [line.removeprefix("    ") for line in command.__doc__.splitlines()[1:]]
    lines.append("flags:")
    for flag in taken:
        default = "" if flag.default in (None, "", False) else f" [{flag.default}]"
        lines.append(f"  --{flag.name:<16} {flag.help}{default}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
