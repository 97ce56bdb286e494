"""Functions too big to write by hand: many constants, names, locals and parameters, long jumps, deep blocks."""

import itertools
import linecache
from types import FunctionType

from corpus import Assigned, Call, Shown, call, case
from corpus.parts import Box, Manager

__all__ = ["Manager"]  # for the generated sources


def generate(name: str, signature: str, body: list[str], names: str, *calls: Call, singles: str | None = None) -> None:
    """Make a case of generated source, which tracebacks and `inspect` find as if it came from a file."""
    source = f"def {name}({signature}):\n" + "".join(f"    {line}\n" for line in body)
    filename = f"<generated {name}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    exec(compile(source, filename, "exec"), globals())
    function: FunctionType = globals()[name]
    case(names, *calls, singles=singles)(function)


MANY = 300

generate(
    "many_constants",
    "n",
    ["x = n"] + [f"x = {i}.5" for i in range(MANY)] + ["if n: return 'a constant far back'", "return x"],
    "n x",
    call(0, assigns=[("x", 1, 0)] + [("x", 2 + i, i + 0.5) for i in range(MANY)]),
    call(1, assigns=[("x", 1, 1)] + [("x", 2 + i, i + 0.5) for i in range(MANY)]),
)

generate(
    "many_locals",
    "n",
    [f"v{i} = n + {i}" for i in range(MANY)] + ["if n: return v299", "del v298", "return v1"],
    " ".join(["n"] + [f"v{i}" for i in range(MANY)]),
    call(0, assigns=[(f"v{i}", i + 1, i) for i in range(MANY)]),
    call(1, assigns=[(f"v{i}", i + 1, i + 1) for i in range(MANY)]),
    singles="n v0 v255 v256 v298 v299",
)

generate(
    "many_cells",
    "n",
    [f"v{i} = n + {i}" for i in range(MANY)]
    + [
        "def inner():",
        "    return (" + ", ".join(f"v{i}" for i in range(MANY)) + ")",
        "return sum(inner())",
    ],
    " ".join(["n", "inner"] + [f"v{i}" for i in range(MANY)]),
    call(
        0,
        assigns=[
            *[(f"v{i}", i + 1, i) for i in range(MANY)],
            ("inner", MANY + 1, Shown("<function many_cells.<locals>.inner>")),
        ],
    ),
    singles="n inner v0 v255 v256 v299",
)

generate(
    "many_names",
    "box",
    [f"x = box.a{i}" for i in range(MANY)] + ["y = len(str(x))", "return x, y"],
    "box x y",
    call(
        Box(**{f"a{i}": i for i in range(MANY)}),
        assigns=[("x", i + 1, i) for i in range(MANY)] + [("y", MANY + 1, 3)],
    ),
)

generate(
    "many_parameters",
    ", ".join(f"p{i}" for i in range(MANY)) + ", /, *, k=1",
    ["p1 = p0 + p298 + k", "return p1, p299"],
    " ".join([f"p{i}" for i in range(MANY)] + ["k"]),
    call(*range(MANY), assigns=[("p1", 1, 299)]),
    call(*range(MANY), k=2, assigns=[("p1", 1, 300)]),
    call(1, assigns=None),
    singles="p0 p1 p255 p256 p299 k",
)

LONG = 400

# Jumps over the whole body, forwards and backwards, need an argument of more than one byte.
generate(
    "long_loop",
    "n",
    ["x = 0", "while n:"] + ["    x = x + 1"] * LONG + ["    if n == 2: return x", "    n = n - 1", "return -x"],
    "n x",
    call(0, assigns=[("x", 1, 0)]),
    call(2, assigns=[("x", 1, 0)] + [("x", 3 + i, 1 + i) for i in range(LONG)]),
    call(1, assigns=[("x", 1, 0)] + [("x", 3 + i, 1 + i) for i in range(LONG)] + [("n", 4 + LONG, 0)]),
    singles="n x",
)

generate(
    "long_try",
    "n",
    ["try:", "    if n: return n"]
    + ["    x = 1 / n if n else 2"] * LONG
    + [
        "    1 / n",
        "except ZeroDivisionError:",
        "    y = x",
        "    return y",
    ],
    "n x y",
    call(1),
    call(0, assigns=[("x", 3 + i, 2) for i in range(LONG)] + [("y", LONG + 5, 2)]),
)

# One line longer than any jump of two bytes can pass: with its caches each element takes six units or more.
WIDE = 11_000

generate(
    "very_long_jump",
    "n",
    ["for i in range(n):", "    y = [" + "len, " * WIDE + "]", "    if i == 1: return len(y)", "y = i", "return y"],
    "n i y",
    call(0),
    call(1, assigns=[("i", 1, 0), ("y", 2, [len] * WIDE), ("y", 4, 0)]),
    call(2, assigns=[("i", 1, 0), ("y", 2, [len] * WIDE), ("i", 1, 1), ("y", 2, [len] * WIDE)]),
    singles="y",
)

# Lines far apart, and a line table that goes backwards by as much.
generate(
    "far_apart",
    "n",
    ["x = (1 /"] + [""] * 3000 + [" n +"] + [""] * 3000 + [" 1)", "return x"],
    "n x",
    call(1, assigns=[("x", 1, 2.0)]),
    call(0),
)

generate(
    "wide_columns",
    "n",
    ["x = [n, " + "0, " * 500 + "1 / n]; return x[0]"],
    "n x",
    call(1, assigns=[("x", 1, [1] + [0] * 500 + [1.0])]),
    call(0),
)

# CPython allows twenty blocks within each other; a handler is one, too.
DEPTH = 20


def nest(openings: list[str], innermost: list[str]) -> list[str]:
    """The opening lines, each indented below the one before, and the innermost lines below them all."""
    return ["    " * depth + line for depth, line in enumerate(openings)] + [
        "    " * len(openings) + line for line in innermost
    ]


generate(
    "deep_loops",
    "n",
    nest([f"for i{depth} in range(n):" for depth in range(DEPTH)], ["x = i0", "if n: return x"]),
    " ".join(["n", "x"] + [f"i{depth}" for depth in range(DEPTH)]),
    call(0),
    call(1, assigns=[(f"i{depth}", depth + 1, 0) for depth in range(DEPTH)] + [("x", DEPTH + 1, 0)]),
    singles="x i0 i19",
)

generate(
    "deep_with",
    "n",
    nest([f"with Manager(n + {depth}) as m{depth}:" for depth in range(DEPTH)], ["x = 1 / n", "return x"]),
    " ".join(["n", "x"] + [f"m{depth}" for depth in range(DEPTH)]),
    call(0, assigns=[(f"m{depth}", depth + 1, depth) for depth in range(DEPTH)]),
    call(1, assigns=[(f"m{depth}", depth + 1, depth + 1) for depth in range(DEPTH)] + [("x", DEPTH + 1, 1.0)]),
    singles="x m0 m19",
)

generate(
    "deep_try",
    "n",
    nest(["try:"] * (DEPTH - 1), ["x = 1 / n", "return x"])
    + [
        "    " * depth + line
        for depth in reversed(range(DEPTH - 1))
        for line in ("except KeyError:", f"    return {depth}")
    ],
    "n x",
    call(0),
    call(1, assigns=[("x", DEPTH, 1.0)]),
    call(None),
)


def in_every_round(n: int) -> list[Assigned]:
    """What the four rounds of blocks assign, and the loop and the line inside them."""
    rounds = [[("a", line, 0), ("b", line + 2, n)] for line in (1, 6, 11, 16)]
    return [*itertools.chain(*rounds), ("a", 21, 0), ("x", 22, (0, n))]


generate(
    "deep_mix",
    "n",
    nest(
        ["for a in range(n):", "try:", "with Manager(n) as b:", "while True:", "if n:"] * 4 + ["for a in range(n):"],
        ["x = a, b", "if n == 1: return x", "raise KeyError(n)"],
    )
    + [
        "    " * depth + line
        for depth in (16, 11, 6, 1)
        for line in ("except LookupError:", f"    y = {depth}", "    return y")
    ],
    "n a b x y",
    call(0),
    call(1, assigns=in_every_round(1)),
    call(2, assigns=[*in_every_round(2), ("y", 26, 16)]),
)

generate(
    "many_returns",
    "n",
    [f"if n == {i}: x = {i}; return x" if i % 2 else f"if n == {i}: return 'even'" for i in range(MANY)],
    "n x",
    call(0),
    call(255, assigns=[("x", 256, 255)]),
    call(256),
    call(299, assigns=[("x", 300, 299)]),
    call(-1),
)


@case("x a b", call(1, assigns=[("a", 1, 1), ("b", 2, 1.0)]), call(0, assigns=[("a", 1, 0)]))
def columns_past_the_hundred_and_twenty_seventh(x):
    a = x
    b =                                                                                                                                a / x
    return                                                                                                                             a + b


@case("x a", call(1, assigns=[("a", 1, 1)]), call(0, assigns=[("a", 1, 0)]))
def an_error_below_long_lines(x):
    a = x
    if                                                                                                                                 a is None:
        return                                                                                                                         None
    else:
        pass
    return 1 / a
