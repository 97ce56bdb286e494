"""The command `visualizer`: record, draw and explore attention without writing code.

    visualizer run --var attn script.py
    visualizer info captured.safetensors
    visualizer plot captured.safetensors --kind heads --layer 3

Results go to stdout, messages to stderr. The exit status is 0 when the work is done; 1 when it failed or found nothing;
2 after a wrong argument, a file that cannot be read, or a missing package, which one line on stderr names. `run` ends
with the status of its script.
"""

from __future__ import annotations

import argparse
import errno
import inspect
import os
import re
import sys
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn

from ..errors import UnsupportedPythonError, did_you_mean
from . import demo, doctor, explore, info, plot, run, stats
from .outcome import Mistake, say, why_import_failed

_COMMANDS = (run, stats, info, plot, explore, demo, doctor)
"""Each has `arguments`, which adds its options, and `main`, whose docstring is its help."""
_STDOUT_ENDS = (errno.EPIPE, errno.ENOSPC)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status. Without arguments, those of the process are used.

    >>> main(["demo", "--layer", "99"])
    2
    """
    script = None
    try:
        options = _parser().parse_args(arguments)
        script = options.run(options)
        if script is None and sys.stdout is not None:
            sys.stdout.flush()  # here, where its errors are caught
    except Mistake as mistake:
        say(mistake)
        return mistake.status
    except UnsupportedPythonError as error:
        say(error)
        return 1
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "visualizer":
            raise
        say(f'{error}: pip install "get-local[demo]"')
        return 2
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _STDOUT_ENDS and error.filename is None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more when it ends
            if error.errno != errno.EPIPE:  # else the reader of the results, such as `head`, has closed the pipe
                say(f"cannot write the results: {error.strerror}")
            return 1
        is_advice = isinstance(error, ImportError) and "pip install" in str(error)
        why = str(error) if is_advice else why_import_failed(error)
        if why is None:
            raise
        say(why)
        return 2
    return 0 if script is None else script()  # outside the try: errors of the script are not errors of the command


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options, formatter_class=argparse.RawDescriptionHelpFormatter)

    def format_help(self) -> str:
        if callable(self.epilog):  # such a list may load torch
            self.epilog = self.epilog()
        return super().format_help()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:  # said here, by the parser of the command, which knows its options
            known = [option for action in self._actions for option in action.option_strings]
            options = [text.partition("=")[0] for text in unknown if text.startswith("-")]
            self.error(f"unrecognized arguments: {' '.join(unknown)}{did_you_mean(known, *options)}")
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        choice = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)$", message)
        hint = did_you_mean(re.findall(r"[\w-]+", choice[2]), choice[1]) if choice else ""
        raise Mistake(f"{message}{hint} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="visualizer", description="See inside models while they run.")
    version = sys.modules[__name__.partition(".")[0]].__version__
    parser.add_argument("--version", action="version", version=f"visualizer {version}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in _COMMANDS:
        about = inspect.getdoc(command.main) or ""  # python -OO drops it
        name, first = command.__name__.rpartition(".")[2], about.partition(".\n")[0]
        own = commands.add_parser(name, help=first, description=textwrap.fill(" ".join(about.split()), 80))
        command.arguments(own)
        own.set_defaults(run=command.main)
    return parser
