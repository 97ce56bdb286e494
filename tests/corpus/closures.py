"""Cells, free variables, class bodies and zero-argument super()."""

from corpus import Shown, call, case
from corpus.parts import Box


@case("x inner", call(assigns=[("x", 1, 1), ("inner", 2, Shown("<function cell_variable.<locals>.inner>"))]))
def cell_variable():
    x = 1
    def inner():
        return x
    return inner()


@case("x inner", call(assigns=[
    ("x", 1, 1), ("inner", 2, Shown("<function nonlocal_write_from_inside.<locals>.inner>")), ("x", 7, 20),
]))
def nonlocal_write_from_inside():
    x = 1
    def inner():
        nonlocal x
        x = 10
    inner()
    # what inner wrote is seen at the return, not as an assignment of this function
    x = x * 2
    inner()
    return "ten"


@case("x bump", call(5, assigns=[("bump", 1, Shown("<function cell_of_an_argument.<locals>.bump>"))]))
def cell_of_an_argument(x):
    def bump():
        nonlocal x
        x += 1
        return x
    return bump() + bump()


@case("args key kwargs f", call(1, key=2, z=3, assigns=[
    ("f", 1, Shown("<function cells_of_all_kinds_of_arguments.<locals>.<lambda>>")),
    ("key", 2, 4),
]))
def cells_of_all_kinds_of_arguments(*args, key, **kwargs):
    f = lambda: (args, key, kwargs)
    key = key + 2
    return f()


@case("x f", call(assigns=[("x", 1, 1), ("f", 2, Shown("<function deleted_cell.<locals>.<lambda>>"))]))
def deleted_cell():
    x = 1
    f = lambda: x
    del x
    return "gone"


@case(
    "x f",
    call(assigns=[("x", 1, 1), ("f", 2, Shown("<function reading_a_deleted_cell.<locals>.<lambda>>"))]),
)
def reading_a_deleted_cell():
    x = 1
    f = lambda: x
    del x
    return f()


@case("flag x f", call(True, assigns=[
    ("x", 2, 1), ("f", 3, Shown("<function cell_bound_in_one_branch.<locals>.<lambda>>")),
]), call(False, assigns=[("f", 3, Shown("<function cell_bound_in_one_branch.<locals>.<lambda>>"))]))
def cell_bound_in_one_branch(flag):
    if flag:
        x = 1
    f = lambda: x
    return f() if flag else "unbound"


@case("x", call(1), call(2))
def deleted_cell_of_an_argument(x):
    if x == 2:
        del x
        return "gone"
    return (lambda: x)()


def make(x, y):
    def reads():
        return x

    def reads_and_assigns(z):
        nonlocal y
        y = z
        z = x + y
        return z

    def deletes():
        nonlocal y
        del y
        return "gone"

    def one_of_many(x):
        w = x
        return lambda: (w, y)

    return reads, reads_and_assigns, deletes, one_of_many


(reads, reads_and_assigns, *_), one_of_many = make(1, 2), make(1, 2)[-1]  # a cell of its own: whatever runs before it
case("x", call())(reads)
case("x y z", call(5, assigns=[("y", 2, 5), ("z", 3, 6)]), call("a", assigns=[("y", 2, "a")]))(reads_and_assigns)
case("x w y", call(7, assigns=[("w", 1, 7)]))(one_of_many)


def make_deleting():
    y = 1

    @case("y", call(assigns=[("y", 2, 3)]), call(assigns=[("y", 2, 3)]))
    def binds_and_deletes_a_free_variable():
        nonlocal y
        y = 3
        del y
        return "gone"

    return binds_and_deletes_a_free_variable


def make_unbound():
    @case("later unbound_free_variable", call())
    def unbound_free_variable():
        if unbound_free_variable is None:
            return later
        return "unbound"

    return unbound_free_variable
    later = 1


def make_reader_of_unbound():
    @case("later", call())
    def reading_an_unbound_free_variable():
        return later

    return reading_an_unbound_free_variable
    later = 1


def make_recursive():
    @case("factorial n", call(3, assigns=[None, None]), call(1))
    def factorial(n):
        return n * factorial(n - 1) if n > 1 else 1

    return factorial


make_deleting()
make_unbound()
make_reader_of_unbound()
make_recursive()


def make_middle():
    top = "top"

    @case("top middle inner", call(assigns=[
        ("middle", 1, "m"),
        ("inner", 2, Shown("<function make_middle.<locals>.passes_a_variable_down.<locals>.inner>")),
    ]))
    def passes_a_variable_down():
        middle = "m"
        def inner():
            return lambda: (top, middle)
        return inner()()

    return passes_a_variable_down


make_middle()


@case("functions i", call(assigns=[
    ("functions", 1, []), ("i", 2, 0), ("i", 2, 1), ("i", 2, 2),
]))
def late_binding_in_a_loop():
    functions = []
    for i in range(3):
        functions.append(lambda: i)
    return [f() for f in functions]


@case(
    "x Local",
    call(
        1,
        assigns=[("Local", 1, Shown("<class 'corpus.closures.class_body_reads_a_local.<locals>.Local'>"))],
    ),
)
def class_body_reads_a_local(x):
    class Local:
        y = x
        z = [x, y]
    return Local.y, Local.z, x


@case("x Local", call(assigns=[
    ("x", 1, 1), ("Local", 2, Shown("<class 'corpus.closures.class_body_writes_a_local.<locals>.Local'>")),
]))
def class_body_writes_a_local():
    x = 1
    class Local:
        nonlocal x
        x = 2
    return Local


class Base:
    def __init__(self, n=0):
        self.n = n

    def twice(self):
        return self.n * 2

    def __repr__(self):
        return f"{type(self).__name__}({self.n})"


class Child(Base):
    @case("self x __class__", call(Base(1), assigns=[]))
    def super_of_a_stranger(self):
        x = super().twice()
        return x

    def twice(self):
        x = super().twice() + 1
        return x

    def own_class(self):
        cls = __class__
        return cls.__name__

    def super_in_a_comprehension(self):
        x = [__class__.__name__ for _ in range(2)]
        return x, super(__class__, self).twice()

    def self_in_a_cell(self):
        x = super().twice()
        return (lambda: (self, x))()

    def rebinds_self(self, other):
        self = other
        return super().twice()

    def __init__(self, n):
        super().__init__(n)
        m = n + 1


case("self x __class__", call(Child(3), assigns=[("x", 1, 7)]), call(Box()))(Child.twice)
case("self cls __class__", call(Child(3), assigns=[("cls", 1, Child)]))(Child.own_class)
case("self x __class__", call(Child(4), assigns=[("x", 1, ["Child", "Child"])]))(Child.super_in_a_comprehension)
case("self x __class__", call(Child(5), assigns=[("x", 1, 10)]))(Child.self_in_a_cell)
case("self other __class__", call(Child(5), Child(6), assigns=[("self", 1, Child(6))]))(Child.rebinds_self)
case("self n m __class__", call(Box(), 1, assigns=[]), call(Child(8), 8, assigns=[("m", 2, 9)]))(Child.__init__)


@case("n Local x", call(2, assigns=[
    ("Local", 1, Shown("<class 'corpus.closures.class_with_super_inside.<locals>.Local'>")), ("x", 7, 4),
]))
def class_with_super_inside(n):
    class Local(Base):
        def twice(self):
            return super().twice()

        def itself(self):
            return __class__ is Local
    x = Local(n).twice()
    return x, Local(n).itself()


@case("decorate inner calls", call(assigns=[
    ("calls", 1, []),
    ("decorate", 2, Shown("<function decorators_inside.<locals>.decorate>")),
    ("inner", 7, Shown("<function decorators_inside.<locals>.inner>")),
]))
def decorators_inside():
    calls = []
    def decorate(function):
        calls.append(function.__name__)
        return function
    @decorate
    @decorate
    def inner(x=len(calls)):
        return x
    return inner(), calls


@case("b a d c f", call(3, assigns=[
    ("a", 1, 4), ("d", 2, 5), ("c", 3, 6),
    ("f", 4, Shown("<function cells_among_plain_locals.<locals>.<lambda>>")), ("a", 5, 0),
]))
def cells_among_plain_locals(b):
    a = b + 1
    d = a + 1
    c = d + 1
    f = lambda: (c, b)
    a = 0
    return f(), a, d


@case("x box", call(Box(), assigns=[("x", 1, [1])]))
def closure_outlives_the_call(box):
    x = [1]
    box.__dict__.clear()
    box.keep = lambda: x
    x.append(box.keep()[0])
    del box.keep
    return x
