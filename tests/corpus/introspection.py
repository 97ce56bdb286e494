"""Functions that look at themselves: they must see what they would see without the rewriter."""

import inspect
import sys
import traceback

from corpus import Shown, call, case


@case("b a x", call(2, 1, assigns=[("x", 1, 3)]))
def calls_locals(b, a):
    x = a + b
    return locals()


@case("z a f x", call(1, assigns=[
    ("a", 1, 2), ("f", 2, Shown("<function locals_with_cells.<locals>.<lambda>>")), ("x", 3, 3),
]))
def locals_with_cells(z):
    a = 2
    f = lambda: a + z
    x = f()
    return sorted(locals()), x


@case("x", call(assigns=[("x", 1, 1)]))
def calls_vars_and_dir():
    x = 1
    return vars(), dir()


@case("x y", call(assigns=[("x", 1, 1), ("y", 2, 2)]))
def evaluates():
    x = 1
    y = eval("x + 1")
    exec("x = 99")
    return x, y


@case("frame x", call(assigns=[("frame", 1, Shown("<frame>")), ("x", 2, 2)]))
def own_frame():
    frame = sys._getframe()
    x = frame.f_lineno - frame.f_code.co_firstlineno - 1
    return x, frame.f_code.co_name, inspect.getframeinfo(frame).function


@case("stack", call(assigns=[("stack", 1, [
    "stack = [entry.line for entry in traceback.extract_stack(sys._getframe(), limit=1)]",
])]))
def line_in_the_stack():
    stack = [entry.line for entry in traceback.extract_stack(sys._getframe(), limit=1)]
    return stack


@case("b a x f y code", call(1, a=2, assigns=[
    ("x", 1, 1), ("y", 2, 3), ("f", 3, Shown("<function own_code.<locals>.<lambda>>")), ("code", 4, Shown("<code>")),
]))
def own_code(b, /, *, a=2):
    x = b
    y = a + b
    f = lambda: (x, a)
    code = sys._getframe().f_code
    return code.co_varnames, code.co_cellvars, code.co_argcount, code.co_flags, code.co_qualname


@case("x error text", call(assigns=[
    ("x", 1, 0), ("error", 4, ZeroDivisionError("division by zero")), ("text", 5, ["1 / x"]),
]))
def own_traceback():
    x = 0
    try:
        1 / x
    except ZeroDivisionError as error:
        text = [entry.line for entry in traceback.extract_tb(error.__traceback__)]
        return text
