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
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from ..errors import UnsupportedPythonError
from . import demo, doctor, explore, info, plot, run, stats
from .outcome import Mistake, say

_COMMANDS = (run, stats, info, plot, explore, demo, doctor)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status. Without arguments, those of the process are used.

    >>> main(["demo", "--layer", "99"])
    2
    """
    script = None
    try:
        options = _parser().parse_args(arguments)
        script = options.run(options)
    except Mistake as mistake:
        say(mistake)
        return mistake.status
    except UnsupportedPythonError as error:
        say(error)
        return 1
    except ImportError as error:
        if error.name is None or error.name.partition(".")[0] == "visualizer":
            raise
        advice = "" if "pip install" in str(error) else ': pip install "get-local[demo]"'
        say(f"{error}{advice}")
        return 2
    except BrokenPipeError:  # the reader of the results, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout once more when it ends
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    return 0 if script is None else script()  # outside the try: errors of the script are not errors of the command


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Mistake(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="visualizer", description="See inside models while they run.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_to(commands)
    return parser
