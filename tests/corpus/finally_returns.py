"""Control flow out of `finally`, which swallows what is on its way (a SyntaxWarning from 3.14 on)."""

from corpus import call, case


@case("x", call(0, assigns=[]), call(1, assigns=[]))
def return_in_finally_swallows(x):
    try:
        return 1 / x
    finally:
        return "swallowed"


@case(
    "n x",
    call(0, assigns=[("x", 2, "try"), ("x", 5, "finally")]),
    call(1, assigns=[("x", 2, "try"), ("x", 5, "finally")]),
)
def return_in_finally_of_the_captured(n):
    try:
        x = "try"
        return 1 / n
    finally:
        x = "finally"
        return x


@case("n i", call(3, assigns=[("i", 1, 0), ("i", 1, 1), ("i", 1, 2)]), call(0))
def break_in_finally_swallows(n):
    for i in range(n):
        try:
            1 / (1 - i)
        finally:
            if i == 2:
                break
            continue
    return n


@case("x error", call(assigns=[("error", 3, ZeroDivisionError("division by zero")), ("x", 6, 2)]))
def finally_returns_over_a_return_in_except():
    try:
        1 / 0
    except ZeroDivisionError as error:
        return error
    finally:
        x = 2
        return x


@case("x", call(assigns=[("x", 3, 1), ("x", 8, 2)]))
def nested_finally_returns():
    try:
        try:
            x = 1
            return x
        finally:
            return x + 10
    finally:
        x = 2
        return x + 100
