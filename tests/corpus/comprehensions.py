"""Comprehensions, which from 3.12 on are part of the function and borrow its variables (PEP 709)."""

from corpus import COMPREHENSIONS_INLINED, Shown, call, case


def lambdas(where: str) -> list[Shown]:
    """Two functions made in a list comprehension, which is a function of its own before 3.12."""
    inside = "" if COMPREHENSIONS_INLINED else "<listcomp>."
    return [Shown(f"<function {where}.<locals>.{inside}<lambda>>")] * 2


@case("xs ys", call((1, 2), assigns=[("ys", 1, [2, 4])]))
def list_comprehension(xs):
    ys = [x * 2 for x in xs]
    return ys


@case("xs ys zs", call((1, 2), assigns=[("ys", 1, {1, 2}), ("zs", 2, {1: 1, 2: 2})]))
def set_and_dict_comprehensions(xs):
    ys = {x for x in xs}
    zs = {k: v for k, v in zip(xs, xs)}
    return ys, zs


@case("xs", call((3, 4)))
def comprehension_as_the_result(xs):
    return [x for x in xs if x]


@case("x", call([1, 2]), call(()))
def shadows_an_argument(x):
    return [x for x in x]


@case("xs x y", call((1, 2), assigns=[("x", 1, "outer"), ("y", 2, [1, 2])]))
def shadows_a_bound_local(xs):
    x = "outer"
    y = [x for x in xs]
    return x


@case("xs x y", call((1, 2), assigns=[("y", 1, [1, 2]), ("x", 2, "later")]))
def shadows_a_local_bound_later(xs):
    y = [x for x in xs]
    x = "later"
    return y


@case(
    "xs x y flag",
    call((1, 2), False, assigns=[("y", 1, [1, 2])]),
    call((1,), True, assigns=[("y", 1, [1]), ("x", 3, 5)]),
)
def shadows_an_unbound_local(xs, flag):
    y = [x for x in xs]
    if flag:
        x = 5
    return y


@case("xs x y", call((1, 2), assigns=[("x", 1, 0), ("y", 3, [1, 2])]))
def shadows_a_deleted_local(xs):
    x = 0
    del x
    y = [x for x in xs]
    return y


@case("xs x f y", call((1, 2), assigns=[
    ("x", 1, "cell"), ("f", 2, Shown("<function shadows_a_cell.<locals>.<lambda>>")), ("y", 3, [1, 2]),
]))
def shadows_a_cell(xs):
    x = "cell"
    f = lambda: x
    y = [x for x in xs]
    return f(), y


@case(
    "xs x y flag",
    call((1, 2), False, assigns=[("y", 1, [1, 2])]),
    call((1,), True, assigns=[("y", 1, [1]), ("x", 3, 5)]),
)
def shadows_an_unbound_cell(xs, flag):
    y = [x for x in xs]
    if flag:
        x = 5
    return y, (lambda: x) and flag


@case("xs functions", call((1, 2), assigns=[
    ("functions", 1, lambdas("lambda_captures_the_iteration_variable")),
]))
def lambda_captures_the_iteration_variable(xs):
    functions = [lambda: x for x in xs]
    return [f() for f in functions]


@case("xs x functions", call((1, 2), assigns=[
    ("x", 1, "outer"), ("functions", 2, lambdas("captured_variable_shadows_a_local")),
]))
def captured_variable_shadows_a_local(xs):
    x = "outer"
    functions = [lambda: x for x in xs]
    return x, functions[0]()


@case("x functions", call((1, 2), assigns=[
    ("functions", 1, lambdas("captured_variable_shadows_an_argument")),
]))
def captured_variable_shadows_an_argument(x):
    functions = [lambda: x for x in x]
    return x, functions[1]()


@case("xs x f functions", call((1, 2), assigns=[
    ("x", 1, "cell"),
    ("f", 2, Shown("<function captured_variable_shadows_a_cell.<locals>.<lambda>>")),
    ("functions", 3, lambdas("captured_variable_shadows_a_cell")),
    ("x", 4, "new"),
]))
def captured_variable_shadows_a_cell(xs):
    x = "cell"
    f = lambda: x
    functions = [lambda: x for x in xs]
    x = "new"
    return f(), functions[0]()


def make_shadowing():
    x = "free"

    @case("xs x y", call((1, 2), assigns=[("y", 1, [1, 2])]))
    def shadows_a_free_variable(xs):
        y = [x for x in xs]
        return x, y

    @case("xs x", call((1, 2)))
    def captured_variable_shadows_a_free_variable(xs):
        return [f() for f in [lambda: x for x in xs]], x

    @case("xs x y", call((1, 2), assigns=[("y", 1, ["free", "free"])]))
    def reads_a_free_variable(xs):
        y = [x for _ in xs]
        return y

    return shadows_a_free_variable, captured_variable_shadows_a_free_variable, reads_a_free_variable


make_shadowing()


@case("n grid", call(2, assigns=[("grid", 1, [[0, 1], [1, 2]])]))
def nested(n):
    grid = [[i + j for j in range(n)] for i in range(n)]
    return grid


@case("x y", call(((1, 2), (3,)), assigns=[("y", 1, [1, 2, 3])]))
def two_loops(x):
    y = [x for x in x for x in x if x]
    return x, y


@case("x", call(((1, 2), (3,))))
def nested_with_one_name(x):
    return [[x for x in x] for x in x]


@case("xs x", call((2, 1), assigns=[("x", 1, "kept")]), call((1, 0), assigns=[("x", 1, "kept")]))
def raises(xs):
    x = "kept"
    return [1 / x for x in xs]


@case("xs x y", call((2, 0), assigns=[("x", 1, "kept"), ("y", 5, "handled")]))
def raises_and_is_handled(xs):
    x = "kept"
    try:
        y = [1 / x for x in xs]
    except ZeroDivisionError:
        y = "handled"
    return x, y


@case("xs x y", call((2, 0), assigns=[("y", 4, "handled")]))
def raises_with_its_name_unbound(xs):
    try:
        y = [1 / x for x in xs]
    except ZeroDivisionError:
        y = "handled"
        return y
    x = 1
    return x


@case("xs last ys", call((1, 5), assigns=(
    [("last", 2, 2), ("last", 2, 6)] if COMPREHENSIONS_INLINED else []
) + [("ys", 2, [2, 6])]))
def walrus_inside(xs):
    # before 3.12 the comprehension is a function of its own, and its walrus an inner function's nonlocal write
    ys = [last := x + 1 for x in xs]
    return last


@case("xs seen", call((1, 5, 2)), call(()))
def walrus_in_a_generator_expression(xs):
    if any((seen := x) > 4 for x in xs):
        return seen
    return "none"


@case("xs total y", call((1, 2), assigns=[("total", 1, 0)] + (
    [("total", 2, 1), ("total", 2, 3)] if COMPREHENSIONS_INLINED else []
) + [("y", 2, [1, 3])]))
def walrus_running_total(xs):
    total = 0
    y = [total := total + x for x in xs]
    return total, y


@case("x y", call((1, 2), assigns=[("y", 1, (1, 2))]))
def comprehension_with_a_condition_on_an_outer_name(x):
    y = x
    return [x for x in y if x in y and (x or y)]


@case(
    "xs f",
    call((1, 2), assigns=[("f", 1, Shown("<function comprehension_in_a_lambda.<locals>.<lambda>>"))]),
)
def comprehension_in_a_lambda(xs):
    f = lambda: [xs for xs in xs]
    return f()


@case("xs Local", call((1, 2), assigns=[
    ("Local", 1, Shown("<class 'corpus.comprehensions.comprehension_in_a_class_body.<locals>.Local'>")),
]))
def comprehension_in_a_class_body(xs):
    class Local:
        y = [x for x in xs]
        zs = [y for y in y]
    return Local.y, Local.zs


@case("xs x _x", call(((1, 2), (3, 4)), assigns=[("x", 1, 1), ("_x", 1, 2), ("x", 1, 3), ("_x", 1, 4)]))
def comprehensions_in_a_loop(xs):
    for x, _x in [(x, y) for x, y in xs]:
        if [x for x in range(x)][1:] and {x: _x for _x in (x,)}:
            return x
    return None


@case("a b", call((1, 2), assigns=[("b", 1, 3)]))
def comprehension_in_an_argument_list(a):
    b = sum([a for a in a], *[a for a in [0]])
    return max([b for b in [b]]) + b


@case("xs m x", call((1, 2), assigns=[("x", 1, 9), ("m", 3, [1, 2])]))
def comprehension_inside_try_finally(xs):
    x = 9
    try:
        m = [x for x in xs]
        return m
    finally:
        assert x == 9


@case("xs", call((1, 2)))
def locals_called_inside(xs):
    return [sorted(locals())[:1] and x for x in xs]


@case("xs y", call((1, 2), assigns=(
    [("y", 1, 1), ("y", 1, 2)] if COMPREHENSIONS_INLINED else []
)))
def walrus_around_a_comprehension_that_borrows_its_name(xs):
    return [(y := x) + sum([y for y in xs]) + y for x in xs], y


@case("xs x write y", call((1, 2), assigns=[
    ("write", 1, Shown("<function bound_only_by_an_inner_function.<locals>.write>")), ("y", 6, [1, 2]),
]))
def bound_only_by_an_inner_function(xs):
    def write():
        nonlocal x
        x = 5
    if not xs:
        x = None
    y = [x for x in xs]
    write()
    return y, x


@case(
    "xs x y",
    call(
        (1, 2),
        assigns=[("x", 1, 0), ("y", 2, [[(1, 1), (2, 1)], [(1, 2), (2, 2)]]), ("x", 4, 9), ("y", 5, [18])],
    ),
)
def borrowed_by_several(xs):
    x = 0
    y = [[(x, y) for x in xs] for y in [x for x in xs]]
    del x
    x = 9
    y = [x + y for y in [x]]
    return x


@case("xs x", call((3,), assigns=[("x", 1, 1), ("x", 4, 2), ("x", 1, 2), ("x", 4, 3)]))
def borrowed_in_a_loop_with_a_delete(xs):
    for x in (1, 2):
        if [x for x in xs if x > 5]:
            return x
        x = x + 1
        assert {x: x for x in xs} == {3: 3}
        del x
    return "unbound"


@case("xs f", call((1, 2), assigns=[("f", 1, Shown("<function comprehension_in_a_default.<locals>.f>"))]))
def comprehension_in_a_default(xs):
    def f(a=[x for x in xs], *, b=[lambda: x for x in xs]):
        return a, b[0]()
    return f()


@case("n", call(3), call(0))
def conditional_comprehension(n):
    return [i if i % 2 else -i for i in range(n) if i or n] if n else [n for n in ()] or {n for n in [n]}


@case("xs x", call((1, 2), assigns=[("x", 4, 9)]), call((0,), assigns=[("x", 4, 9)]), call(None, assigns=[("x", 4, 9)]))
def borrowed_where_a_finally_assigns_it(xs):
    try:
        return [x for x in xs if 1 / x]
    finally:
        x = 9


@case("xs x", call((1, 2), assigns=[]), call((0,), assigns=[("x", 3, Shown("ZeroDivisionError('division by zero')")), ("x", 4, 9)]))
def borrowed_where_an_except_names_it(xs):
    try:
        return [x for x in xs if 1 / x]
    except ZeroDivisionError as x:
        x = 9
    return xs
