"""Returns in every place of if, while and for, and functions that end without one."""

from corpus import call, case


@case("", call())
def empty():
    pass


@case("", call())
def docstring_only():
    """Nothing but words."""


@case("", call())
def ellipsis_only(): ...


@case("x", call(1))
def argument_only(x):
    pass


@case("x", call(assigns=[("x", 1, 1)]))
def ends_without_return():
    x = 1


@case("x", call(assigns=[("x", 1, 1)]))
def bare_return():
    x = 1
    return


@case("x", call(assigns=[("x", 1, 1)]))
def returns_none():
    x = 1
    return None


@case("x", call(assigns=[("x", 1, "kept")]))
def constant_return():
    x = "kept"
    return "constant"


@case("n x", call(0, assigns=[("x", 1, 0)]), call(1, assigns=[("x", 1, 2)]), call(2, assigns=[("x", 1, 4)]))
def constant_returns(n):
    x = n * 2
    if n == 0:
        return "zero"
    if n == 1:
        return (1, "one")
    return 12345678901234567890


@case("x", call(assigns=[("x", 1, [1])]))
def returns_captured():
    x = [1]
    return x


@case("x", call(assigns=[("x", 1, 1)]))
def all_on_two_lines():
    x = 1; return x  # fmt: skip


@case("x y", call(3, assigns=[("y", 0, 4)]))
def all_on_one_line(x): y = x + 1; return y  # fmt: skip


@case(
    "flag x",
    call(True, assigns=[("x", 2, 1)]),
    call(False, assigns=[("x", 4, 2)]),
)
def return_in_if(flag):
    if flag:
        x = 1
        return x
    x = 2
    return -x


@case(
    "n x",
    call(-1, assigns=[("x", 2, "negative")]),
    call(0, assigns=[("x", 5, "zero")]),
    call(1, assigns=[("x", 8, "positive")]),
)
def return_in_every_branch(n):
    if n < 0:
        x = "negative"
        return 1
    elif n == 0:
        x = "zero"
        return 2
    else:
        x = "positive"
        return 3


@case("flag x", call(True), call(False, assigns=[("x", 2, 1)]))
def falls_off_a_branch(flag):
    if not flag:
        x = 1


@case(
    "n x",
    call(0, assigns=[("x", 1, 0)]),
    call(3, assigns=[("x", 1, 0), ("x", 3, 1), ("x", 3, 2), ("x", 3, 3)]),
    call(9, assigns=[("x", 1, 0), ("x", 3, 1), ("x", 3, 2), ("x", 3, 3), ("x", 3, 4), ("x", 3, 5)]),
)
def return_in_while(n):
    x = 0
    while x < n:
        x += 1
        if x == 5:
            return "five"
    return x


@case("x", call(assigns=[("x", 1, 0), ("x", 3, 1), ("x", 3, 2), ("x", 3, 3)]))
def while_true_with_break():
    x = 0
    while True:
        x = x + 1
        if x > 2:
            break
    return x


@case("x", call(assigns=[("x", 1, 0), ("x", 3, 1), ("x", 3, 2)]))
def while_true_without_end():
    x = 0
    while True:
        x += 1
        if x == 2:
            return


@case(
    "n x",
    call(2, assigns=[("n", 4, 1), ("n", 4, 0), ("x", 6, "ended")]),
    call(0, assigns=[("x", 6, "ended")]),
    call(8, assigns=[("n", 4, 7)]),
)
def while_with_else(n):
    while n > 0:
        if n == 7:
            break
        n -= 1
    else:
        x = "ended"
        return x
    return "broken"


@case(
    "items item x",
    call((1, 2, 3), assigns=[("item", 1, 1), ("item", 1, 2), ("x", 3, "two")]),
    call((1, 3), assigns=[("item", 1, 1), ("item", 1, 3)]),
    call(()),
)
def return_in_for(items):
    for item in items:
        if item == 2:
            x = "two"
            return x


@case(
    "items item x",
    call("ab", assigns=[("item", 1, "a"), ("item", 1, "b"), ("x", 5, "exhausted")]),
    call("a!", assigns=[("item", 1, "a"), ("item", 1, "!")]),
    call("", assigns=[("x", 5, "exhausted")]),
)
def for_else(items):
    for item in items:
        if item == "!":
            break
    else:
        x = "exhausted"
        return x
    return item


@case(
    "rows row cell",
    call(
        ((1, 2), (3, 0), (5,)),
        assigns=[
            ("row", 1, (1, 2)), ("cell", 2, 1), ("cell", 2, 2),
            ("row", 1, (3, 0)), ("cell", 2, 3), ("cell", 2, 0),
        ],
    ),
    call(((1,),), assigns=[("row", 1, (1,)), ("cell", 2, 1)]),
)
def return_in_nested_for(rows):
    for row in rows:
        for cell in row:
            if not cell:
                return row
            if cell == 9:
                continue


@case("i", call(assigns=[("i", 1, 0), ("i", 3, 10), ("i", 1, 1), ("i", 3, 11)]))
def loop_variable_is_reassigned():
    for i in range(2):
        # the iterator does not care
        i = i + 10
    return i


@case("x y", call(assigns=[("x", 1, 1)]))
def dead_code_after_return():
    x = 1
    return x
    y = 2
    return y


@case("x y", call(assigns=[("x", 1, 1)]))
def dead_branches():
    x = 1
    if 0:
        y = 2
        return y
    while False:
        return "never"
    if not __debug__:
        return "optimised"
    return x


@case("x", call(assigns=[("x", 2, "debug")]))
def debug_branch():
    if __debug__:
        x = "debug"
    return x


@case("x", call(1), call(0))
def only_raises(x):
    1 / x
    raise LookupError(x)


@case("x y", call(1, assigns=[("y", 1, 2)]), call(-2, assigns=[("y", 1, -1)]))
def asserts(x):
    y = x + 1
    assert y > 0, f"{y} is not positive"
    return y


@case(
    "a b c",
    call(1, 2, 3),
    call(3, 2, 1),
    call(1, 5, 3),
)
def chained_comparison_return(a, b, c):
    return a < b < c


@case("a b found", call(1, 2, assigns=[("found", 2, True)]), call(2, 1))
def chained_comparison_in_if(a, b):
    if 0 < a < b <= 3:
        found = True
        return found
    return not a < b > 0


@case("x", call(1, assigns=[]), call(0, assigns=[]))
def conditional_expression_return(x):
    return "yes" if x else "no"


@case("a b", call(0, 2), call(1, 2), call(0, 0))
def boolean_expression_return(a, b):
    return a and b or [a, b]


@case(
    "n total",
    call(2, assigns=[("total", 1, 0), ("total", 5, 2), ("n", 6, 1), ("total", 5, 3), ("n", 6, 0)]),
)
def loop_test_at_both_ends(n):
    total = 0
    while (
        n
    ):
        total += n
        n -= 1
    return total


@case("n i j", call(2, assigns=[("i", 1, 0), ("j", 2, 0), ("i", 1, 1), ("j", 2, 0), ("j", 2, 1)]))
def return_three_deep(n):
    for i in range(n):
        for j in range(n):
            if j < i:
                continue
            if i:
                while True:
                    if j == i:
                        return i, j
                    break
            break
