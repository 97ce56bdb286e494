"""Unpacking in comprehensions (PEP 798)."""

from corpus import call, case


@case("xs ys", call(((1, 2), (3,)), assigns=[("ys", 1, [1, 2, 3])]))
def unpacking_list_comprehension(xs):
    ys = [*x for x in xs]
    return ys


@case(
    "xs x ys",
    call(((1, 2), (2, 3)), assigns=[("x", 1, "outer"), ("ys", 2, {1, 2, 3})]),
    call((1,), assigns=[("x", 1, "outer")]),
)
def unpacking_set_comprehension(xs):
    x = "outer"
    ys = {*x for x in xs}
    return ys, x


@case("xs x", call(({"a": 1}, {"b": 2})), call((3,)), call((), assigns=[("x", 2, 1)]))
def unpacking_dict_comprehension(xs):
    if not xs:
        x = 1
    return {**x for x in xs}


@case("xs", call(((1, 2), (3,))))
def unpacking_generator_expression(xs):
    return tuple((*x for x in xs))


@case("xs fs", call(((1, 2), (3,)), assigns=[("fs", 1, [1, 2, 3])]))
def unpacking_with_a_captured_variable(xs):
    fs = [*(lambda: x)() for x in xs]
    return fs
