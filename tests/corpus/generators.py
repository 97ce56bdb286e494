"""Generators run to their end, left early, closed and thrown into."""

from corpus import CLOSE, NEXT, Shown, call, case, send, throw


@case("n i", call(2, assigns=[("i", 1, 0), ("i", 1, 1)]), call(0))
def yields(n):
    for i in range(n):
        yield i


@case("x", call(assigns=[("x", 1, 1)]))
def returns_a_value():
    x = 1
    yield x
    return x + 1


@case("x", call(assigns=[("x", 1, "constant")]))
def returns_a_constant():
    x = "constant"
    yield
    return 7


@case(
    "x",
    call(assigns=None, steps=[]),
    call(assigns=None, steps=[CLOSE, NEXT]),
    call(assigns=None, steps=[throw(KeyError, 1)]),
)
def never_started():
    x = 1
    yield x


@case("x", call(assigns=[("x", 1, 1)], steps=[NEXT]), call(assigns=[("x", 1, 1)], steps=[NEXT, CLOSE, NEXT]))
def left_early():
    x = 1
    yield x
    x = 2
    return x


@case("x total", call(
    assigns=[("total", 1, 0), ("x", 3, 5), ("total", 6, 5), ("x", 3, 7), ("total", 6, 12), ("x", 3, None)],
    steps=[NEXT, send(5), send(7), send(None), NEXT],
))
def sent_values():
    total = 0
    while True:
        x = yield total
        if x is None:
            return total
        total += x


@case(
    "x",
    call(assigns=[("x", 2, 1)], steps=[NEXT, CLOSE]),
    call(assigns=[("x", 2, 1), ("x", 6, 2)], steps=[NEXT, NEXT]),
)
def closed_and_returning():
    try:
        x = 1
        yield x
    except GeneratorExit:
        return "closed"
    x = 2


@case(
    "x",
    call(assigns=[("x", 2, 1), ("x", 4, 2)], steps=[NEXT, CLOSE]),
    call(assigns=[("x", 2, 1), ("x", 4, 2)]),
)
def closed_with_finally(x=None):
    try:
        x = 1; yield x  # fmt: skip
    finally:
        x = 2


@case("x error", call(
    assigns=[("x", 1, 0), ("error", 5, KeyError("k")), ("x", 6, ("k",))],
    steps=[NEXT, throw(KeyError, "k"), NEXT],
), call(assigns=[("x", 1, 0)], steps=[NEXT, throw(OSError, "o")]), call(assigns=[("x", 1, 0)]))
def thrown_into():
    x = 0
    while True:
        try:
            return (yield x)
        except KeyError as error:
            x = error.args


@case("x", call(assigns=[("x", 1, 1)], steps=[NEXT, throw(StopIteration, 1)]), call(assigns=[("x", 1, 1)]))
def stop_iteration_becomes_a_runtime_error():
    x = 1
    yield x
    raise StopIteration(x)


def inner(n):
    got = yield n
    return got


@case(
    "n a b",
    call(3, assigns=[("a", 1, None), ("b", 2, None)]),
    call(3, assigns=[("a", 1, "A"), ("b", 2, None)], steps=[NEXT, send("A"), NEXT, NEXT]),
    call(3, steps=[NEXT, throw(ValueError, "v")]),
    call(3, steps=[NEXT, CLOSE]),
)
def delegates(n):
    a = yield from inner(n)
    b = yield from inner(a)
    return a, b


@case("items x", call([1, 2], assigns=[("x", 1, None)]))
def delegates_to_a_list(items):
    x = yield from items
    return items


@case("items", call([1, 2]))
def returns_what_it_delegates_to(items):
    return (yield from items)


@case("n", call(2, assigns=[None] * 6))
def recursive_generator(n):
    yield n
    if n:
        yield from recursive_generator(n - 1)
        yield from recursive_generator(n - 1)


@case("x y", call(1, assigns=[("y", 1, None), ("x", 1, 2)]))
def yield_in_an_expression(x):
    x = [(y := (yield x)), 2][1]
    return f"{yield x}", x, y


@case(
    "x y z",
    call(assigns=[("x", 1, 1), ("z", 2, None)], steps=[NEXT, NEXT]),
    call(assigns=[("x", 1, 1), ("z", 2, "sent"), ("y", 4, "sent")], steps=[NEXT, send("sent")]),
)
def unbound_at_the_end():
    x = 1
    z = yield x
    if z:
        y = z
    return x


@case(
    "items n item",
    call((1, 2), assigns=[("n", 1, 0), ("item", 2, 1), ("n", 3, 1), ("item", 2, 2), ("n", 3, 3)]),
)
def cells_in_a_generator(items):
    n = 0
    for item in items:
        n += item; yield (lambda: (n, item))()  # fmt: skip
    return n


@case("x inner", call(assigns=[
    ("x", 1, 1), ("inner", 2, Shown("<function nonlocal_write_between_yields.<locals>.inner>")),
]))
def nonlocal_write_between_yields():
    x = 1
    def inner():
        nonlocal x
        x += 1
        yield x
    yield from inner()
    return x


@case(
    "n i",
    call(2, assigns=[("i", 2, 0), ("i", 2, 1)]),
    call(2, assigns=[("i", 2, 0)], steps=[NEXT, NEXT, CLOSE]),
)
def comprehensions_between_yields(n):
    yield [i for i in range(n)]
    for i in range(n):
        yield [(i, j) for j in range(n) if j != i]
    return [n for n in (n,)]


@case("x", call(1), call(2))
def empty_generator(x):
    return x
    yield


@case("x", call(1, assigns=[("x", 3, 2)], steps=[NEXT, NEXT, NEXT, NEXT]))
def yields_in_every_clause(x):
    try:
        yield "try"
        x = 2
        raise KeyError
    except KeyError:
        yield "except"
    finally:
        yield "finally"


@case("x", call(1, steps=[NEXT, CLOSE]), call(1))
def ignores_close(x):
    try:
        yield x
    except GeneratorExit:
        yield "ignored"


gen_lambda = case("x y", call(2, assigns=[("y", 0, None)]))(lambda x: [(yield x), (y := (yield -x))])
