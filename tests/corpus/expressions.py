"""Expressions with jumps, temporaries on the stack or text of their own, around an ordinary local."""

from corpus import Shown, call, case
from corpus.parts import Box


@case("x name", call(3.14159, "pi"), call(1, None))
def f_strings(x, name):
    return f"{name!r:>{10}} {x:{'.2f' if name else 'd'}} {x=} {{}}"


@case("x text", call({"a": "b"}, assigns=[("text", 1, "a: b 'q' \"Q\"")]))
def f_string_with_quotes(x):
    text = f"a: {x['a']} 'q' " f'"{"Q"}"'
    return text


@case("x text", call(2, assigns=[("text", 1, "\n2 and\n3\n")]))
def f_string_over_lines(x):
    text = f"""
{x} and
{x + 1}
"""
    return text


@case("x", call(0), call(1))
def f_string_that_raises(x):
    return f"{x}{1 / x:.1f}"


@case("a b x", call([1], {"k": 2}, assigns=[("x", 1, [0, 1, "k"])]))
def star_displays(a, b):
    x = [0, *a, *b]
    return {*x, 5}, (*a, *b), {**b, "z": 0}


@case("a x", call([1, 2], assigns=[("x", 1, "1-2")]))
def star_call(a):
    x = "{}-{}".format(*a, **{})
    return x, dict(*[[("k", 1)]], **{"l": 2}, m=3)


@case("a b", call([1, 2, 3], assigns=[("b", 1, [3, 2])]), call("abc", assigns=[("b", 1, "cb")]))
def slices(a):
    b = a[:0:-1]
    return b[1:], a[..., ] if a is None else a[-1:][0]


@case("a b", call(1, 0, assigns=[]), call(1, 1, assigns=[]))
def conditional_chain(a, b):
    return "one" if a == b else "two" if b else ("three", a and not b)


@case("a", call(None), call(1))
def none_tests(a):
    if a is None:
        return "none"
    if a is not None and not a == 2:
        return "some"


@case("a b", call(1, [1]), call(2, [1]))
def containment(a, b):
    return a in b, a not in b, not a, -a, +a, ~a


@case("x f", call(2, assigns=[("f", 1, Shown("<function lambda_in_a_local.<locals>.<lambda>>"))]))
def lambda_in_a_local(x):
    f = lambda y, z=x: y + z  # noqa: E731
    return f(1)


@case("x y", call(box := Box(f=lambda *a, **k: (a, k)), assigns=[("y", 1, ((1,), {"k": 2}))]))
def method_call(x):
    y = x.f(1, k=2)
    return y


@case("x y", call(3, assigns=[("y", 4, (3, 4, 5))]))
def call_over_lines(x):
    return (
        tuple
        (
            y := (
                x,
                x + 1,
                x + 2,
            )
        )
    )


@case("s x", call("a" * 3, assigns=[("x", 1, "aaa;")]))
def semicolons(s):
    x = s + ";"; s.upper(); return x  # fmt: skip


@case("a b c", call(1, 2, assigns=[("c", 1, 3)]), call(0, 0, assigns=[("c", 1, 0)]))
def return_of_a_tuple_with_calls(a, b):
    c = a + b
    return a, (b, [c, {c: (a, b)}]), max(a, b) or (lambda: None)()


@case(
    "x deferred",
    call(4, assigns=[("deferred", 1, Shown("<generator object generator_expression.<locals>.<genexpr>>"))]),
)
def generator_expression(x):
    deferred = (i * x for i in range(x))
    return list(deferred)


@case("x", call(10), call(-1))
def generator_expression_in_a_call(x):
    return sum(i for i in range(x) if i % 2), any(i > 3 for i in range(x))
