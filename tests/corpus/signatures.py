"""Every kind of parameter, lambdas, and the functions inside methods and properties."""

import functools

from corpus import call, case
from corpus.parts import Box


@case("a b c", call(1, 2, 3), call(1, b=5, c=6), call(1))
def defaults(a, b=2, c=None):
    return a, b, c


@case("a b c", call(1, 2), call(1, 2, 3))
def positional_only(a, b, /, c=9):
    return a + b + c


@case("a b", call(a=1, b=2), call(b=3))
def keyword_only(*, a=7, b):
    return a * b


@case(
    "a b c args kwargs x",
    call(1, 2, 3, 4, c=5, d=6, assigns=[("x", 1, 21)]),
    call(0, 0, c=0, assigns=[("x", 1, 0)]),
)
def all_kinds(a, /, b, *args, c, **kwargs):
    x = a + b + sum(args) + c + sum(kwargs.values())
    return x


@case("a b c d x", call(1, 2, c=3, d=4, assigns=[("x", 1, (1, 2, 3, 4))]))
def positional_and_keyword_only(a, b, /, c, *, d):
    x = a, b, c, d
    return x


@case("args", call(), call(1, 2))
def only_star_args(*args):
    return args


@case("args x", call(1, 2, assigns=[("args", 1, [1, 2]), ("x", 2, 2)]))
def star_args_rebound(*args):
    args = list(args)
    x = len(args)
    return x


@case("kwargs", call(), call(a=1, kwargs=2))
def only_star_kwargs(**kwargs):
    return sorted(kwargs)


@case("a self kwargs", call(1, self=2, a=3))
def keywords_named_like_positionals(a, /, self, **kwargs):
    return a, self, kwargs


@case("a", call(1), call(1, 2, assigns=None), call(b=1, assigns=None), call(assigns=None))
def wrong_arguments(a):
    return a


@case("a b", call([1], assigns=[("a", 1, [1, 2]), ("b", 2, [1, 2])]))
def argument_reassigned(a, b=None):
    a = a + [2]
    b = a
    return b


@case("a b", call(1), call(1, 2))
def mutable_default(a, b=()):
    return a, *b


@case("self x", call(Box(n=2), 3, assigns=[("x", 1, 5)]))
def annotated_parameters(self: "Box", x: int = 0) -> "list[int]":
    x = self.n + x
    return [x]


double = case("x", call(2), call("a"))(lambda x: x * 2)

constant = case("", call())(lambda: "constant")

multi_line = case("a b key", call(3, b=4), call(3), call(0))(
    lambda a, b=1, *, key=None: (
        a
        / (key or b)
        if a
        else 1 / a
    )
)

assigning = case("x y", call(2, assigns=[("y", 1, 3)]))(
    lambda x:
        (y := x + 1) * y
)

variadic = case("args kwargs", call(1, 2, a=3))(lambda *args, **kwargs: (args, kwargs))


class Methods:
    """The functions inside, called as functions, and once through the real thing."""

    value = 3

    @property
    @case("self x", call(Box(value=1), assigns=[("x", 1, 2)]))
    def prop(self):
        x = self.value * 2
        return x

    @prop.setter
    @case("self value", call(Box(value=1), 1, assigns=[("value", 1, 2)]))
    def prop(self, value):
        value = value + 1
        self.value = value - 1

    @staticmethod
    @case("x y", call(1, assigns=[("y", 1, 2)]))
    def static(x):
        y = x + 1
        return y

    @classmethod
    @case("cls x", call(Box(value=5), assigns=[("x", 1, 5)]))
    def of_the_class(cls):
        x = cls.value
        return x

    @functools.cached_property
    @case("self x", call(Box(value=2), assigns=[("x", 1, 4)]))
    def cached(self):
        x = self.value ** 2
        return x

    @case("self other x", call(Box(value=1), Box(value=2), assigns=[("x", 1, 3)]), call(1, 2))
    def __add__(self, other):
        x = self.value + other.value
        return x


def methods_in_use(methods):
    methods.prop = 4
    return methods.prop, methods.static(1), methods.of_the_class(), methods + methods


@case("self x", call(Methods(), assigns=[("x", 1, (8, 2, 3, 8))]))
def through_the_descriptors(self):
    x = methods_in_use(self)
    return x


def log_calls(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args)

    return wrapper


@log_calls
@case("x y", call(1, assigns=[("y", 1, 2)]))
def decorated_from_outside(x):
    y = x + 1
    return y


@case(
    "n rest",
    call(
        3,
        assigns=[None, None, None, ("rest", 3, 1), ("rest", 3, 2), ("rest", 3, 6)],
    ),
    call(0),
)
def recursive(n):
    if n == 0:
        return 1
    rest = n * recursive(n - 1)
    return rest


def even(n):
    return True if n == 0 else odd(n - 1)


@case(
    "n x",
    call(4, assigns=[None, None, ("x", 2, False), ("x", 2, False)]),
    call(1, assigns=[("x", 2, True)]),
)
def odd(n):
    if n:
        x = even(n - 1)
        return x
    return False


@case("n below", call(150, assigns=[None] * 150 + [("below", 1, depth) for depth in range(151)]))
def deep_recursion(n):
    below = 0 if n == 0 else (
        1 +
        deep_recursion(n - 1))
    return below
