"""Type parameters (PEP 695) and f-strings that nest their own quotes (PEP 701)."""

import sys

from corpus import Shown, call, case

ALIAS = "Alias" if sys.version_info < (3, 15) else "type_statement.<locals>.Alias"


@case("x y T", call(1, assigns=[("y", 1, (1, "T"))]))
def type_parameter_used[T](x: T) -> T:
    y = (x, T.__name__)
    return y


@case("x y", call(1, assigns=[("y", 1, 1)]))
def type_parameters_unused[T: int, *Ts, **P](x: T) -> tuple[*Ts]:
    y = x
    return y


@case("inner T x", call(2, assigns=[
    ("inner", 1, Shown("<function generic_function_inside.<locals>.inner>")), ("T", 3, 2), ("x", 4, 4),
]))
def generic_function_inside(x):
    def inner[T](x: T) -> T:
        return x * 2
    T = 2
    x = inner(x)
    return x


@case("x Local", call(2, assigns=[
    ("Local", 1, Shown("<class 'corpus.since_312.generic_class_inside.<locals>.Local'>")),
]))
def generic_class_inside(x):
    class Local[T]:
        y = x
        def method(self) -> T:
            return super().__repr__() and __class__.y
    return Local().method(), Local[int].y


@case("x Alias", call(int, assigns=[("Alias", 1, Shown(ALIAS)), ("x", 2, "list")]))
def type_statement(x):
    type Alias[T] = dict[x, T]
    x = Alias.__value__ and "list"
    return x


class Generic[T]:
    def method[U](self, x: U) -> T:
        y = (T.__name__, U.__name__, __class__.__name__)
        return y


case("self x y T U __class__", call(Generic(), 1, assigns=[("y", 1, ("T", "U", "Generic"))]))(Generic.method)


@case("x", call({"a": {"b": 1}}))
def nested_quotes(x):
    return f"{x["a"]["b"]} {f"{x["a"]!r:{"<"}{10 + len(f"{1}")}}"}" f"{
        x  # a comment
    }"


@case("xs i x", call((1, 2), assigns=[("i", 1, 1), ("x", 2, "0.5"), ("i", 1, 2), ("x", 2, "0.25")]))
def many_inlined_in_one_function(xs):
    for i in [x for x in [x for x in xs]]:
        x = f"{[1 / x / 2 for x in [i]][0]}"
    else:
        return [i for i in xs], {i for i in xs}, {i: i for i in xs}, x, i
