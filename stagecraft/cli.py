"""The command line: `stagecraft run`, `prompt`, `export` and others (`commands`).

A UserError is printed as one line and ends the command with status 2; `--debug` shows
the traceback. Anything else that escapes is a bug of ours and is shown whole.
"""

import importlib.util
import logging
import os
import sys
from pathlib import Path

from absl import flags

from stagecraft import commands, schema
from stagecraft.errors import UserError

FLAGS = flags.FLAGS
DEBUG = commands.Flag("debug", False, "show the traceback of an error")


def main(argv=None):
    """The entry point; returns the exit status."""
    argv = list(sys.argv if argv is None else argv)
    debug = "--debug" in argv
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        return _dispatch(argv)
    except UserError as error:
        if debug:
            raise
        print(f"stagecraft: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "\nstagecraft: stopped; the same command goes on from the last checkpoint",
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


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
    wanted = (*command.flags, DEBUG)
    _define(wanted)
    if any(a in ("-h", "--help", "--helpfull") for a in argv[2:]):
        print(_help(name, command, wanted))
        return 0
    rest = _parse(argv[1:])
    _quiet()
    command(rest[1:])
    return 0


# -- flags -----------------------------------------------------------------------------


def _define(wanted):
    """Defines a command's flags."""
    FLAGS.set_gnu_getopt(True)  # flags may stand behind folders and prompts
    plain = {bool: flags.DEFINE_bool, float: flags.DEFINE_float}
    for flag in wanted:
        kind = flag.kind or type(flag.default)
        if kind is commands.CONFIG:
            from ml_collections import config_flags

            config_flags.DEFINE_config_file(flag.name, flag.default, flag.help)
        elif kind is int:
            flags.DEFINE_integer(flag.name, flag.default, flag.help, flag.least)
        else:
            plain.get(kind, flags.DEFINE_string)(flag.name, flag.default, flag.help)


def _parse(argv):
    """Parses the flags; what goes wrong in them is a UserError."""
    given = next((a for a in argv if a.startswith("--config=")), None)
    if given:
        path, _, argument = given.removeprefix("--config=").partition(":")
        if not Path(path).is_file():
            raise UserError(
                f"--config={path}: no such file; experiments lie in experiments/"
            )
        # An experiment file may import its neighbours: experiments.common.
        for folder in (str(Path(path).absolute().parent.parent), os.getcwd()):
            if folder not in sys.path:
                sys.path.insert(0, folder)
        _check_overrides(_load(path, argument), argv)
    try:
        return FLAGS(argv)
    except (flags.Error, TypeError, ValueError) as error:
        line = " ".join(str(error).split())
        raise UserError(f"{line} (see stagecraft {argv[0]} --help)") from error


def _load(path, argument):
    """What the experiment's get_config returns, before any override."""
    spec = importlib.util.spec_from_file_location("experiment_file", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"--config={path}: has no function get_config(arg)")
    return module.get_config(argument)


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


class _Told(logging.Handler):
    """Our own remarks, on what standard error is now: a live line steps aside."""

    def emit(self, record):
        print(f"stagecraft: {record.getMessage()}", file=sys.stderr)


def _quiet():
    """Libraries speak up only about what goes wrong."""
    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.ERROR)
    logging.getLogger("jax").setLevel(logging.ERROR)
    own = logging.getLogger("stagecraft")
    own.setLevel(logging.INFO)
    own.propagate = False
    if not own.handlers:
        own.addHandler(_Told())


# -- help ------------------------------------------------------------------------------


def _overview():
    lines = [
        "stagecraft: train a language model through all its stages, and measure what "
        "each one changed.",
        "",
        "commands:",
    ]
    for name, command in commands.COMMANDS.items():
        lines.append(f"  {name:<8} {command.__doc__.splitlines()[0]}")
    lines += ["", "stagecraft COMMAND --help tells the flags of each."]
    return "\n".join(lines)


def _help(name, command, wanted):
    lines = [f"stagecraft {name}: {command.__doc__.splitlines()[0]}"]
    lines += [line.removeprefix("    ") for line in command.__doc__.splitlines()[1:]]
    lines.append("flags:")
    for flag in wanted:
        default = "" if flag.default in (None, "", False) else f" [{flag.default}]"
        lines.append(f"  --{flag.name:<16} {flag.help}{default}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
