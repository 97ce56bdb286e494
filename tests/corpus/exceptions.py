"""Returns around try, except, else, finally and exception groups."""

from corpus import call, case
from corpus.parts import Box


def fail(kind, *args):
    raise kind(*args)


@case(
    "flag x",
    call(True, assigns=[("x", 2, 1)]),
    call(False, assigns=[("x", 2, 1), ("x", 7, 2)]),
)
def return_in_try(flag):
    try:
        x = 1
        if flag:
            return x
    except ValueError:
        return "never"
    x = 2
    return x


@case("x", call(assigns=[("x", 1, 0), ("x", 5, 1)]))
def return_in_except():
    x = 0
    try:
        fail(KeyError, "k")
    except KeyError:
        x = 1
        return x


@case(
    "kind x",
    call(KeyError, assigns=[("x", 4, "key")]),
    call(TypeError, assigns=[("x", 7, "other")]),
    call(OSError),
    call(ArithmeticError),
)
def several_handlers(kind):
    try:
        fail(kind, "message")
    except KeyError:
        x = "key"
        return x
    except (TypeError, ValueError):
        x = "other"
        return x, 2
    except OSError:
        return "unbound"


@case("n x", call(0, assigns=[("x", 4, "zero")]), call(2, assigns=[("x", 6, 0.5)]))
def return_in_try_else(n):
    try:
        1 / n
    except ZeroDivisionError:
        x = "zero"
    else:
        x = 1 / n
        return x
    return -1


@case(
    "n x y",
    call(0, assigns=[("x", 1, 1), ("y", 5, "finally")]),
    call(1, assigns=[("x", 1, 1), ("x", 3, 1.0), ("y", 5, "finally")]),
)
def finally_assigns(n):
    x = 1
    try:
        x = 1 / n; return x  # fmt: skip
    finally:
        y = "finally"


@case("x", call(assigns=[("x", 2, [1])]))
def finally_changes_the_captured_list():
    try:
        x = [1]
        return x
    finally:
        x.append(2)


@case("x", call(assigns=[("x", 2, 1), ("x", 5, 2)]))
def finally_rebinds_after_the_result_is_made():
    try:
        x = 1
        return x
    finally:
        x = 2


@case(
    "n x y",
    call(0, assigns=[("x", 2, 0), ("x", 5, "zero"), ("y", 9, "end")]),
    call(1, assigns=[("x", 2, 1), ("x", 7, "fine"), ("y", 9, "end")]),
    call("a", assigns=[("x", 2, "a"), ("y", 9, "end")]),
)
def all_four_clauses(n):
    try:
        x = n
        1 / n
    except ZeroDivisionError:
        x = "zero"
    else:
        x = "fine"
    finally:
        y = "end"
    return x, y


@case("log x", call(assigns=[("log", 1, []), ("x", 4, 1)]))
def nested_finally():
    log = []
    try:
        try:
            x = 1
            return log
        finally:
            log.append(x)
    finally:
        log.append("outer")


@case("error x", call(assigns=[("error", 3, ValueError("v")), ("x", 4, "ValueError('v')")]))
def except_as_is_unbound_afterwards():
    try:
        fail(ValueError, "v")
    except ValueError as error:
        x = repr(error)
    return x


@case("error", call(assigns=[("error", 3, ValueError("v"))]))
def return_inside_except_as():
    try:
        fail(ValueError, "v")
    except ValueError as error:
        return error.args


@case("error", call(assigns=[("error", 1, "before"), ("error", 4, KeyError("k")), ("error", 5, "rebound")]))
def except_as_rebinds_and_deletes():
    error = "before"
    try:
        fail(KeyError, "k")
    except KeyError as error:
        error = "rebound"
        del error
    return "gone"


@case("error saved", call(assigns=[("error", 3, KeyError("k")), ("saved", 4, KeyError("k"))]))
def exception_outlives_its_name():
    try:
        fail(KeyError, "k")
    except KeyError as error:
        saved = error
    saved.__traceback__ = None
    return type(saved)


@case(
    "kind first second",
    call(KeyError, assigns=[("first", 3, KeyError(1))]),
    call(LookupError, assigns=[("first", 3, LookupError(1)), ("second", 8, TypeError(2))]),
)
def nested_handlers(kind):
    try:
        fail(kind, 1)
    except LookupError as first:
        if isinstance(first, KeyError):
            return "key"
        try:
            fail(TypeError, 2)
        except TypeError as second:
            return type(first), type(second), second.__context__ is first


@case("x error", call(assigns=[("x", 1, 1), ("error", 4, KeyError("k"))]))
def raise_from(x=None):
    x = 1
    try:
        fail(KeyError, "k")
    except KeyError as error:
        raise ValueError("wrapped", x) from error


@case("x", call(assigns=[("x", 4, "seen")]))
def bare_reraise():
    try:
        fail(KeyError, "k")
    except:  # noqa: E722
        x = "seen"
        raise


@case("x", call(assigns=[("x", 1, 1), ("x", 5, 2)]))
def raise_in_finally():
    x = 1
    try:
        return x
    finally:
        x = 2
        fail(KeyError, x)


@case("x", call(3), call(0))
def traceback_of_a_multi_line_expression(x):
    return (
        x
        + 1
        / x
        - 1
    )  # fmt: skip


@case(
    "kinds group rest x",
    call(()),
    call((TypeError,), assigns=[("group", 4, ExceptionGroup("g", [TypeError(0)])), ("x", 5, "type")]),
    call(
        (TypeError, OSError, KeyError),
        assigns=[
            ("group", 4, ExceptionGroup("g", [TypeError(0)])),
            ("x", 5, "type"),
            ("rest", 6, ExceptionGroup("g", [OSError(1), KeyError(2)])),
            ("x", 7, 2),
        ],
    ),
    call((ArithmeticError,)),
)
def try_except_star(kinds):
    try:
        if kinds:
            raise ExceptionGroup("g", [kind(i) for i, kind in enumerate(kinds)])
    except* TypeError as group:
        x = group.message and "type"
    except* (OSError, LookupError) as rest:
        x = len(rest.exceptions)
    return x if kinds else None


@case(
    "x group",
    call(assigns=[("group", 3, ExceptionGroup("", [KeyError("k")])), ("x", 7, "end")]),
)
def except_star_with_a_plain_exception():
    try:
        fail(KeyError, "k")
    except* LookupError as group:
        pass
    else:
        return 1
    x = "end"
    return x


@case("x", call(assigns=[("x", 3, "first"), ("x", 6, "seen")]))
def except_star_that_raises():
    try:
        try:
            x = "first"
            raise ExceptionGroup("g", [ValueError(1), KeyError(2)])
        except* ValueError:
            x = "seen"
            raise TypeError("from the handler")
    except ExceptionGroup:
        return x


@case(
    "tries n error",
    call(
        2,
        assigns=[
            ("n", 1, 0),
            ("tries", 3, 2),
            ("error", 6, ValueError(0)),
            ("n", 7, 1),
            ("tries", 3, 2),
        ],
    ),
)
def retry_loop(tries):
    n = 0
    while True:
        tries = max(tries, 2)
        try:
            return n if n else fail(ValueError, n)
        except ValueError as error:
            n += 1
            if n == tries:
                raise RuntimeError from error


@case(
    "items item out",
    call((1, 0, 2), assigns=[("out", 1, []), ("item", 2, 1), ("item", 2, 0), ("item", 2, 2)]),
    call((1, "x"), assigns=[("out", 1, []), ("item", 2, 1), ("item", 2, "x")]),
)
def continue_and_break_through_finally(items):
    out = []
    for item in items:
        try:
            if item == 0:
                continue
            if item == "x":
                break
            out.append(item)
        finally:
            out.append("f")
    return out


@case("x", call(Box(a=1)), call(Box()))
def attribute_error_on_a_chain(x):
    return (x
            .a
            .real)  # fmt: skip


@case("x y", call(assigns=[("x", 2, 1), ("y", 8, "inner")]))
def handler_inside_a_handler_inside_finally():
    try:
        x = 1
        fail(KeyError, x)
    except KeyError:
        try:
            fail(TypeError)
        except TypeError:
            y = "inner"
            try:
                return y
            finally:
                try:
                    fail(OSError)
                except OSError:
                    pass
