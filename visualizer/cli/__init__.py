"""The command `visualizer`: attention out of scripts and saved files, without writing code.

    visualizer run --var attn script.py
    visualizer info captured.safetensors
    visualizer plot captured.safetensors --kind heads --layer 3

Results go to stdout, messages to stderr. Exit status: 0 done; 1 nothing was found or the work failed; 2 a wrong
argument, a file that cannot be read, or a missing package, said in one line; `run` has the status of its script.
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
    """Run the command; returns its exit status.

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
    except BrokenPipeError:  # whoever read the results has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at its end
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    return 0 if script is None else script()  # out here what a user's script raises is the script's


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Mistake(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="visualizer", description="See inside models while they run.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_to(commands)
    return parser
