"""`visualizer run`: runs a script unchanged, with capture on."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import opcodes
from ..instrument import capture
from .outcome import Commands, Mistake, destination, reason, say, warnings_as_lines
from .recorders import Decorated, Models, Recording, Target, has_values, save, summary
from .script import Program, show_own_frames_only


def add_to(commands: Commands) -> None:
    """Add the command to the parser's."""
    run = commands.add_parser(
        "run",
        help="run a script and save what its models attend to, or any local variables",
        usage="visualizer run [options] script.py [arguments]\n       visualizer run [options] -m module [arguments]",
        description="Runs a script unchanged, as Python does, and saves local variables of its functions in a file, "
        "also when the script fails. Without an option it saves those of the functions decorated by get_local.",
    )
    run.add_argument(
        "--var", action="append", metavar="NAME", help="this local in all modules of all models; repeatable"
    )
    run.add_argument("--target", metavar="MODULE:FUNCTION", help="the --var of one function: pkg.mod:Class.forward")
    run.add_argument(
        "--at",
        choices=("return", "assign"),
        help="when the --var is looked at; assign: at every value that it gets",
    )
    run.add_argument("--attention", action="store_true", help="the attention of all models, fused or not")
    run.add_argument("--limit", type=int, metavar="N", help="keep only the N newest calls of each function or module")
    run.add_argument(
        "--max-bytes", type=int, metavar="N", help="stop recording at N bytes; default: a quarter of the memory"
    )
    run.add_argument("-o", "--out", metavar="FILE", default="captured.safetensors", help="default: %(default)s")
    run.add_argument("-q", "--quiet", action="store_true", help="do not print what was saved")
    run.add_argument("-m", dest="is_module", action="store_true", help="run a module, as python -m does")
    run.add_argument("program", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    run.set_defaults(run=_prepared)


def _prepared(options: argparse.Namespace) -> Callable[[], int]:
    """A function that runs the script. Wrong arguments raise Mistake here, before anything runs."""
    if not options.program:
        raise Mistake("there is no script to run (see visualizer run --help)")
    for name in ("limit", "max_bytes"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise Mistake(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    out = destination(options.out, "safetensors").absolute()
    name, *arguments = options.program
    program = Program(name, arguments, options.is_module)
    recording = _recording(options, program)
    return lambda: _run(program, recording, out, options)


def _recording(options: argparse.Namespace, program: Program) -> Recording:
    names, limits = options.var or [], {"limit": options.limit, "max_bytes": options.max_bytes}
    how = {**limits, "at": options.at or "return"}
    if options.attention:
        if names or options.target or options.limit or options.at:
            raise Mistake("--attention finds the weights by itself: it takes no --var, --at, --target or --limit")

        def recorder(model: Any) -> Any:
            from ..intercept import attention  # the script has imported torch by now

            return attention(model, max_bytes=options.max_bytes)

        return Models(recorder, "no attention was seen in it", uncompiled=True)
    opcodes.require_supported()
    for name in names:
        if not name.isidentifier():
            raise Mistake(f"--var takes the name of a local variable, not {name!r}")
    if options.target:
        if not names:
            raise Mistake(f"--target {options.target} needs --var NAME: which local of it")
        return Target(options.target, program.names, lambda target: capture(target, *names, **how))
    if names:
        nothing = "had no value in the local; if its attention is fused, --attention gets the weights all the same"
        return Models(lambda model: capture(model, *names, **how), nothing)
    if options.at:
        raise Mistake("--at goes with --var; a decorated function says it itself: @get_local(NAME, at='assign')")
    return Decorated(**limits)


def _run(program: Program, recording: Recording, out: Path, options: argparse.Namespace) -> int:
    try:
        recording.start()
        program.run(recording.on_define if isinstance(recording, Target) and recording.is_in_program else None)
    except Mistake as mistake:  # the program is a module that does not exist
        with warnings_as_lines():
            recording.stop()
        say(mistake)
        return mistake.status
    except SystemExit as end:
        status = _finish(recording, out, options)
        if status == 2 or (status and end.code in (None, 0)):
            return status
        raise
    except BaseException:
        _finish(recording, out, options)
        show_own_frames_only()
        raise
    return _finish(recording, out, options)


def _finish(recording: Recording, out: Path, options: argparse.Namespace) -> int:
    """Save the results; returns the exit status of a script that ended well itself."""
    with warnings_as_lines():
        parts = [part for part in recording.stop() if has_values(part[1])]
    trouble = recording.trouble
    if trouble is not None:
        say(trouble if isinstance(trouble, Mistake) else f"not everything was captured: {trouble}")
    elif not parts:
        say(f"nothing was captured: {recording.why_nothing()}")
    status = trouble.status if isinstance(trouble, Mistake) else 1 if trouble is not None or not parts else 0
    if parts:
        try:
            save(parts, out)
        except (OSError, TypeError, ValueError) as error:
            say(f"cannot save what was captured in {options.out}: {reason(error)}")
            return 1
        if not options.quiet:
            say(f"{summary(parts)}, in {options.out}")
    return status
