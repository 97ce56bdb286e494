"""What a function does and holds, learnt from the outside: by driving it, and by `sys.settrace` on its frames.

Nothing in here knows the rewriter. Values are compared as they looked when they were seen (`show`), since two runs
make two of everything; where one run can be looked at in two ways, they are compared by identity.
"""

from __future__ import annotations

import dis
import itertools
import re
import sys
from dataclasses import dataclass, field
from types import AsyncGeneratorType, CodeType, CoroutineType, FrameType, FunctionType, GeneratorType, TracebackType
from typing import Any

from corpus import NEXT, Call

# More steps than any case takes to its end: a function that never ends fails instead of hanging.
PATIENCE = 50


class _Unbound:
    def __repr__(self) -> str:
        return "<unbound>"


UNBOUND = _Unbound()


def show(value: object) -> str:
    """A value as it looks now, without what differs between runs, places and versions."""
    if isinstance(value, BaseExceptionGroup):
        return f"{type(value).__name__}({value.message!r}, {list(value.exceptions)!r})"
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
    return re.sub(r"^<(frame|code|module)\b.*>$", r"<\1>", text)


def behaviour(function: FunctionType, call: Call) -> list[tuple[Any, ...]]:
    """All that a caller can see of a call: what is yielded, awaited, returned and raised, in order."""
    log: list[tuple[Any, ...]] = []
    try:
        result = function(*call.args, **call.kwargs)
    except BaseException as error:
        log.append(("raised", _raised(error)))
        return log
    steps = itertools.repeat(NEXT, PATIENCE) if call.steps is None else call.steps
    if isinstance(result, AsyncGeneratorType):
        for step in steps:
            if not _async_step(result, step, log) and call.steps is None:
                break
    elif isinstance(result, GeneratorType | CoroutineType) and _is_own(result, function.__code__):
        for step in steps:
            if not _step(result, step, log) and call.steps is None:
                break
    else:
        log.append(("returned", show(result)))
    return log


def _is_own(result: GeneratorType[Any, Any, Any] | CoroutineType[Any, Any, Any], code: CodeType) -> bool:
    return (result.gi_code if isinstance(result, GeneratorType) else result.cr_code) is code


def _step(running: Any, step: tuple[Any, ...], log: list[tuple[Any, ...]]) -> bool:
    """Take one step of a generator or coroutine; whether it goes on after that."""
    try:
        if step[0] == "send":
            log.append(("yielded", show(running.send(step[1]))))
            return True
        if step[0] == "throw":
            log.append(("yielded", show(running.throw(step[1](*step[2])))))
            return True
        log.append(("closed", show(running.close())))
    except StopIteration as stop:
        log.append(("returned", show(stop.value)))
    except BaseException as error:
        log.append(("raised", _raised(error)))
    return False


def _async_step(running: AsyncGeneratorType[Any, Any], step: tuple[Any, ...], log: list[tuple[Any, ...]]) -> bool:
    """Take one step of an asynchronous generator, which may await several times on its way."""
    if step[0] == "send":
        awaitable: Any = running.asend(step[1])
    elif step[0] == "throw":
        awaitable = running.athrow(step[1](*step[2]))
    else:
        awaitable = running.aclose()
    try:
        for _ in range(PATIENCE):
            log.append(("awaited", show(awaitable.send(None))))
    except StopIteration as stop:
        log.append(("yielded", show(stop.value)))
        return step[0] != "close"
    except StopAsyncIteration:
        log.append(("returned", "None"))
    except BaseException as error:
        log.append(("raised", _raised(error)))
    return False


def _raised(error: BaseException | None) -> tuple[Any, ...] | None:
    """An exception with its places in the source, notes, group members, context and cause."""
    if error is None:
        return None
    return (
        type(error).__qualname__,
        show(error.args),
        _places(error.__traceback__),
        getattr(error, "__notes__", None),
        [_raised(member) for member in error.exceptions] if isinstance(error, BaseExceptionGroup) else [],
        _raised(error.__context__),
        _raised(error.__cause__),
        error.__suppress_context__,
    )


def _places(traceback: TracebackType | None) -> list[tuple[Any, ...]]:
    """Function, line and columns of each entry of a traceback, the driver's own left out."""
    places = []
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if code.co_filename != __file__:
            columns = next(itertools.islice(code.co_positions(), traceback.tb_lasti // 2, None))
            places.append((code.co_name, traceback.tb_lineno, columns))
        traceback = traceback.tb_next
    return places


@dataclass
class Traced:
    """What tracing one call showed: its behaviour, and the events and locals of the function's frames."""

    behaviour: list[tuple[Any, ...]] = field(default_factory=list)
    events: list[tuple[Any, ...]] = field(default_factory=list)
    # For each return of the function: which event it is, the frame's locals (the objects), and how they looked then.
    returns: list[int] = field(default_factory=list)
    locals: list[dict[str, Any]] = field(default_factory=list)
    shown: list[dict[str, str]] = field(default_factory=list)


def _returns(code: CodeType, offset: int) -> bool:
    """Whether a frame that stands there is returning; `return` events come for yields and exceptions, too."""
    return dis.opname[code.co_code[offset]] in ("RETURN_VALUE", "RETURN_CONST")


def traced(function: FunctionType, call: Call, names: tuple[str, ...], seen: Traced | None = None) -> Traced:
    """Make a call with its frames traced (into `seen`). An unbound name is UNBOUND among the locals."""
    seen = Traced() if seen is None else seen
    code = function.__code__

    def on_event(frame: FrameType, event: str, arg: Any) -> Any:
        line = None if frame.f_lineno is None else frame.f_lineno - code.co_firstlineno
        if event == "exception":
            seen.events.append((event, line, show(arg[1])))
        elif event == "return":
            seen.events.append((event, line, show(arg)))
            if _returns(code, frame.f_lasti):
                seen.returns.append(len(seen.events) - 1)
                held = frame.f_locals
                values = {name: held.get(name, UNBOUND) for name in names}
                seen.locals.append(values)
                seen.shown.append({name: show(value) for name, value in values.items()})
        else:
            seen.events.append((event, line))
        return on_event

    def on_call(frame: FrameType, event: str, arg: Any) -> Any:
        return on_event(frame, event, arg) if frame.f_code is code else None

    tracer_before = sys.gettrace()
    sys.settrace(on_call)
    try:
        seen.behaviour = behaviour(function, call)
    finally:
        sys.settrace(tracer_before)
    return seen
