"""Returns in `with`, and managers that give, swallow and raise."""

from corpus import call, case
from corpus.parts import Box, Manager


@case("x m", call(assigns=[("m", 1, 5), ("x", 2, 6)]))
def return_in_with():
    with Manager(5) as m:
        x = m + 1
        return x


@case("x", call(assigns=[("x", 2, 1)]))
def return_of_a_constant_in_with():
    with Manager():
        x = 1
        return "constant"


@case("x", call(assigns=[("x", 1, 0), ("x", 3, 1)]))
def swallowed_exception_goes_on_after_with():
    x = 0
    with Manager(swallow=True):
        x = 1
        raise KeyError(x)
    return x


@case("a b x", call(assigns=[("a", 1, "a"), ("b", 2, "b"), ("x", 3, "ab")]))
def nested_with():
    with Manager("a") as a:
        with Manager("b") as b:
            x = a + b
            return x


@case("a b", call(assigns=[("a", 2, 1), ("b", 3, 2)]))
def parenthesised_with():
    with (
        Manager(1) as a,
        Manager(2) as b,
        Manager(3),
    ):
        return a, b


@case(
    "a b rest c",
    call(assigns=[("a", 1, 1), ("b", 1, 2), ("rest", 1, []), ("c", 2, 9)]),
)
def with_as_unpacking():
    with Manager((1, (2,))) as (a, (b, *rest)):
        with Manager(9) as c:
            return a, b, rest, c


@case("box items", call(Box(a=0), assigns=[("items", 1, [None])]))
def with_as_attribute_and_subscript(box):
    items = [None]
    with Manager(1) as items[0], Manager(2) as box.a:
        pass
    return items, box.a


@case("m x", call(assigns=[("m", 3, 1)]))
def manager_raises_on_exit():
    x: int
    try:
        with Manager(1, leave=KeyError) as m:
            return m
    except KeyError:
        return "on exit"
    x = 2
    return x


@case("m", call(assigns=[]))
def manager_raises_on_entry():
    try:
        with Manager(1, enter=LookupError) as m:
            return m
    except LookupError:
        return "on entry"


@case("m x", call(assigns=[("m", 1, None), ("x", 2, 1)]))
def raises_through_with():
    with Manager() as m:
        x = 1
        raise ValueError(x, m)


@case(
    "items item",
    call((1, 2), assigns=[("item", 1, 1), ("item", 1, 2)]),
    call((1,), assigns=[("item", 1, 1)]),
)
def return_in_with_in_loop(items):
    for item in items:
        with Manager():
            if item == 1:
                continue
            return item
    else:
        return None


@case("x", call(assigns=[("x", 3, 1), ("x", 5, 2)]))
def with_in_try_in_with():
    with Manager(swallow=True):
        try:
            x = 1
            with Manager():
                x = 2
                return x
        finally:
            raise KeyError("swallowed by the outer manager")
