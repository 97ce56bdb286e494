"""match with captures, stars, classes and guards.

The order in which one pattern's captures are stored is the compiler's, seldom that of the source.
"""

from corpus import call, case
from corpus.parts import Box, Point


@case("command", call("go"), call("stop"), call("?"))
def literals(command):
    match command:
        case "go":
            return 1
        case "stop" | "halt":
            return 0
        case _:
            return None


@case("command", call("?"))
def no_case_fits(command):
    match command:
        case "go":
            return 1


@case("value x", call(3, assigns=[("x", 2, 3)]))
def capture(value):
    match value:
        case x:
            return x


@case(
    "items first rest only",
    call([1, 2, 3], assigns=[("first", 4, 1), ("rest", 4, [2, 3])]),
    call((7,), assigns=[("only", 2, 7)]),
    call([]),
    call("ab"),
)
def sequences(items):
    match items:
        case [only]:
            return only
        case [first, *rest]:
            return first, rest
        case []:
            return "empty"


@case("items last middle", call([1, 2, 3], assigns=[("middle", 2, [2]), ("last", 2, 3)]), call([0, 2]))
def star_in_the_middle(items):
    match items:
        case [1, *middle, last]:
            return last
        case [_, *_]:
            return "other"


@case(
    "data kind rest",
    call({"kind": "a", "n": 1}, assigns=[("rest", 2, {"n": 1}), ("kind", 2, "a")]),
    call({"n": 1}),
)
def mappings(data):
    match data:
        case {"kind": kind, **rest}:
            return rest
        case {"n": 1}:
            return "n"


@case(
    "shape x y whole",
    call(Point(1, 2), assigns=[("y", 4, 2), ("x", 4, 1)]),
    call(Point(0, 5), assigns=[("y", 2, 5)]),
    call(Box(x=1)),
    call(Point(3, [4, 5]), assigns=[("x", 6, 4), ("y", 6, 5), ("whole", 6, [4, 5])]),
)
def classes(shape):
    match shape:
        case Point(0, y):
            return y
        case Point(x=int(x), y=int() as y):
            return x, y
        case Point(3, [x, y] as whole):
            return x, whole
        case object(x=1):
            return "has x"


@case(
    "n x",
    call(5, assigns=[("x", 2, 5), ("x", 4, 5)]),
    call(50, assigns=[("x", 2, 50)]),
    call(0, assigns=[("x", 2, 0), ("x", 4, 0), ("x", 6, 0)]),
)
def guards(n):
    match n:
        case x if x > 9:
            return "big"
        case x if x > 0:
            return x
        case x:
            pass
    return "end"


@case(
    "value x",
    call([1], assigns=[("x", 2, 1)]),
    call((1, 2), assigns=[("x", 2, 2)]),
    call({"x": 3}, assigns=[("x", 2, 3)]),
    call(None, assigns=[]),
)
def alternatives_bind_the_same(value):
    match value:
        case [x] | (1, x) | {"x": x}:
            return x
    return "unbound"


@case("pair a b", call((1, 2), assigns=[("a", 3, 1), ("b", 3, 2)]), call((1,)))
def match_in_a_loop(pair):
    while True:
        match pair:
            case a, b:
                return a + b
            case _:
                break
    return pair


@case("value n", call(1, assigns=[("n", 1, 2)]), call(4, assigns=[("n", 1, 8)]))
def subject_with_a_walrus(value):
    match (n := value * 2):
        case 2:
            return n
        case _ if n > 7:
            return -n


@case(
    "value x y z",
    call((1, (2, 0)), assigns=[("x", 4, 2), ("z", 4, 0)]),
    call((1, (2, 1)), assigns=[("x", 4, 2), ("z", 4, 1)]),
    call((1, ("a",))),
)
def guard_that_raises(value):
    match value:
        case (2, (2, y)):
            return y
        case (_, (x, z)) if 1 / z > 5:
            return "never"
        case _:
            return "default"
