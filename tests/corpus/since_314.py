"""Template strings (PEP 750), handlers without parentheses (PEP 758), annotations that wait (PEP 649)."""

from corpus import Shown, call, case


@case("x", call(1))
def template_string(x):
    return t"{x} and {x + 1!r:>{x}}".values


@case("x", call(assigns=[("x", 1, ("plain",))]))
def template_string_without_values():
    x = t"plain".strings
    return x


@case("x y", call(1, assigns=[("y", 1, (1,))]))
def template_string_without_conversions(x):
    y = t"{x}".values
    return y


@case(
    "kind x",
    call(KeyError, assigns=[("x", 4, "seen")]),
    call(OSError, assigns=[("x", 4, "seen")]),
    call(ArithmeticError),
)
def except_without_parentheses(kind):
    try:
        raise kind
    except KeyError, OSError:
        x = "seen"
        return x


@case("kind x", call(KeyError, assigns=[("x", 4, "seen"), ("x", 5, "end")]))
def except_star_without_parentheses(kind):
    try:
        raise kind
    except* KeyError, OSError:
        x = "seen"
    x = "end"
    return x


@case("x inner", call(int, assigns=[
    ("inner", 1, Shown("<function waiting_annotations.<locals>.inner>")), ("x", 3, str),
]))
def waiting_annotations(x):
    def inner(a: x, b: later) -> undefined:
        return a
    x = str
    return inner(1)


@case("x later Local", call(assigns=[
    ("Local", 1, Shown("<class 'corpus.since_314.waiting_annotations_of_a_class.<locals>.Local'>")), ("later", 3, int),
    ("x", 4, {"a": int}),
]))
def waiting_annotations_of_a_class():
    class Local:
        a: later
    later = int
    x = Local.__annotations__
    return x


@case(
    "n i small",
    call(3, assigns=[("small", 1, 255), ("i", 2, 0), ("small", 3, 256), ("i", 2, 1), ("small", 3, 257)]),
)
def small_integers(n):
    small = 255
    for i in range(2):
        small += 1
    return 257 if small == n else 7


@case("a b", call([1], assigns=[("b", 1, [1]), ("a", 2, 0)]))
def borrowed_references(a):
    b = a
    a = 0
    return b, a, b, (a, b), [b, a]
