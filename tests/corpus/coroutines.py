"""Coroutines and asynchronous generators, run step by step by hand."""

from corpus import CLOSE, COMPREHENSIONS_INLINED, NEXT, Shown, call, case, send, throw
from corpus.parts import Manager, Ticks, pause


@case("x", call(assigns=[("x", 1, 1)]))
async def no_await():
    x = 1
    return x


@case("x", call(assigns=[("x", 1, None)]), call(assigns=[("x", 1, "sent")], steps=[NEXT, send("sent")]))
async def awaits():
    x = await pause("p")
    return x


@case("x", call(1, steps=[NEXT, throw(KeyError, 1)]), call(1, steps=[NEXT, CLOSE]), call(1))
async def thrown_into_and_closed(x):
    await pause(x)
    await pause(-x)


@case(
    "x y",
    call(assigns=[("x", 2, None), ("y", 7, "end")]),
    call(assigns=[("x", 5, "caught"), ("y", 7, "end")], steps=[NEXT, throw(KeyError), NEXT, NEXT]),
    call(assigns=[("y", 7, "end")], steps=[NEXT, throw(ValueError), NEXT]),
    call(assigns=[], steps=[NEXT, CLOSE]),
)
async def awaiting_in_try_and_finally():
    try:
        x = await pause(1)
        return x
    except KeyError:
        x = await pause("caught") or "caught"
    finally:
        y = await pause(2) or "end"
    return "after"


@case(
    "x n",
    call(2, assigns=[("x", 1, 0), ("x", 2, 0), ("x", 2, 1), ("x", 5, "done")]),
    call(0, assigns=[("x", 1, 0), ("x", 5, "done")]),
)
async def async_for(n):
    x = 0
    async for x in Ticks(n):
        pass
    else:
        x = "done"
    return x


@case("n x", call(3, assigns=[("x", 1, 0), ("x", 1, 1)]))
async def return_in_async_for(n):
    async for x in Ticks(n):
        if x:
            return "early"


@case("n x", call(1, assigns=[("x", 2, 0)]))
async def async_for_that_raises(n):
    try:
        async for x in Ticks(n, OSError):
            await pause(x)
    except OSError:
        return "raised"


@case("m x", call(assigns=[("m", 1, 5), ("x", 2, None)]))
async def return_in_async_with():
    async with Manager(5) as m:
        x = await pause(m)
        return x


@case("a b", call(assigns=[("a", 1, 1), ("b", 2, 2)]))
async def nested_async_with():
    async with Manager(1) as a:
        async with Manager(2) as b, Manager(3):
            return a, b


@case("x", call(assigns=[("x", 1, 0), ("x", 3, 1)]))
async def async_with_that_swallows():
    x = 0
    async with Manager(swallow=True):
        x = 1
        raise KeyError
    return x


@case("n xs", call(2, assigns=[("xs", 1, [0, 1])]))
async def async_comprehension(n):
    xs = [x async for x in Ticks(n)]
    return xs


@case("n x xs", call(2, assigns=[("x", 1, "outer"), ("xs", 2, [1, 2])]))
async def async_comprehension_shadows_a_local(n):
    x = "outer"
    xs = [x + 1 async for x in Ticks(n)]
    return x


@case("n x xs", call(2, assigns=[("xs", 1, {0: None, 1: None})]))
async def async_comprehension_shadows_an_unbound_local(n):
    xs = {x: await pause(x) async for x in Ticks(n)}
    if n == 5:
        x = 1
    return xs


@case("n x xs", call(2, assigns=[("xs", 1, [[0, 1], [0, 1]]), ("x", 2, 3)]))
async def nested_async_comprehensions(n):
    xs = [[await pause(x) or x async for x in Ticks(n) if x is not await pause(n)] async for _ in Ticks(n)]
    x = 3
    return xs


@case("n x functions", call(2, assigns=[("x", 1, "outer"), ("functions", 2, 2)]))
async def async_comprehension_with_a_captured_variable(n):
    x = "outer"
    functions = len([lambda: x async for x in Ticks(n)])
    return x, functions


@case("n x", call(2, assigns=[("x", 1, "kept")]))
async def async_comprehension_that_raises(n):
    x = "kept"
    return [x async for x in Ticks(n, OSError)]


@case("items last y", call((1, 2), assigns=(
    [("last", 1, None)] * 2 if COMPREHENSIONS_INLINED else []
) + [("y", 1, [None, None])]))
async def await_in_a_comprehension(items):
    y = [last := await pause(item) for item in items]
    return y, last


@case("n gen", call(2, assigns=[
    ("gen", 1, Shown("<async_generator object async_generator_expression.<locals>.<genexpr>>")),
]))
async def async_generator_expression(n):
    gen = (x * 2 async for x in Ticks(n))
    return [x async for x in gen]


@case("x inner", call(assigns=[
    ("x", 1, 1), ("inner", 2, Shown("<function closure_in_a_coroutine.<locals>.inner>")),
]))
async def closure_in_a_coroutine():
    x = 1
    async def inner():
        nonlocal x
        x = await pause(x)
        return x
    return await inner(), x


@case("n", call(2, assigns=[None, None]))
async def recursive_coroutine(n):
    if n:
        return await recursive_coroutine(n - 1)
    return await pause("bottom")


@case(
    "n i",
    call(2, assigns=[("i", 1, 0), ("i", 1, 1)]),
    call(0),
    call(2, assigns=[("i", 1, 0)], steps=[NEXT, CLOSE]),
)
async def async_generator(n):
    for i in range(n):
        yield i


@case("x y", call(assigns=[("x", 1, None), ("y", 2, "sent")], steps=[NEXT, send("sent"), NEXT]))
async def async_generator_with_awaits():
    x = await pause(1)
    y = yield x
    await pause(y)


@case("x", call(assigns=[("x", 2, 1), ("x", 5, 2)], steps=[NEXT, throw(KeyError, 1), NEXT]), call(
    assigns=[("x", 2, 1)], steps=[NEXT, CLOSE],
))
async def async_generator_thrown_into():
    try:
        x = 1
        yield x
    except KeyError:
        x = 2
        yield x
        return
    finally:
        await pause(x)
    x = 4


@case("x", call(assigns=[("x", 1, 1)], steps=[NEXT, NEXT, NEXT]))
async def async_generator_bare_return():
    x = 1
    yield x
    if x:
        return
    yield 2


@case("n x", call(2, assigns=[("x", 1, 0), ("x", 1, 1)]))
async def async_generator_over_async_for(n):
    async for x in Ticks(n):
        yield x
