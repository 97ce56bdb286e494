"""`visualizer run`: runs a script unchanged, with capture on."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import opcodes
from ..instrument import capture
from .outcome import Mistake, destination, reason, say, warnings_as_lines
from .recorders import Decorated, Models, Recording, Target, has_values, save, summary
from .saved import whole_number
from .script import Program, show_own_frames_only


def arguments(run: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    run.usage = "visualizer run [options] script.py [arguments]\n       visualizer run [options] -m module [arguments]"
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
    run.add_argument("--limit", type=whole_number(1), metavar="N", help="keep only the N newest calls of each key")
    run.add_argument(
        "--max-bytes",
        type=whole_number(1),
        metavar="N",
        help="stop recording at N bytes; default: a quarter of the memory",
    )
    run.add_argument("-o", "--out", metavar="FILE", default="captured.safetensors", help="default: %(default)s")
    run.add_argument("-q", "--quiet", action="store_true", help="do not print what was saved")
    run.add_argument("-m", dest="is_module", action="store_true", help="run a module, as python -m does")
    run.add_argument("program", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def main(options: argparse.Namespace) -> Callable[[], int]:
    """Run a script and save what its models attend to, or any local variables.

    The script runs unchanged, as Python runs it. The results are saved also when it fails. Without an option they are
    the local variables of the functions decorated by get_local.
    """
    # What is returned runs the script. A wrong argument raises Mistake here, before anything runs.
    if not options.program:
        raise Mistake("there is no script to run (see visualizer run --help)")
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
