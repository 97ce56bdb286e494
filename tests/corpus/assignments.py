"""Everything that can be assigned to, and in which order."""

import sys

from corpus import Shown, call, case
from corpus.parts import Box

shared = "a module's global"
elsewhere = 1


# The compiler exchanges the stores of short swaps instead of the values.
@case("a b", call(1, 2, assigns=[("b", 1, 1), ("a", 1, 2)]))
def swap(a, b):
    a, b = b, a
    return a, b


@case("a b c", call(1, 2, 3, assigns=[("c", 1, 2), ("b", 1, 1), ("a", 1, 3)]))
def rotate(a, b, c):
    a, b, c = c, a, b
    return a, b, c


@case("x y z", call(7, assigns=[("x", 1, 7), ("z", 2, 7)]))
def store_then_load(y):
    x = y
    z = x
    return z


@case("a b c d", call((1, 2, 3, 4), assigns=[("a", 1, 1), ("b", 1, 2), ("c", 1, 3), ("d", 1, 4)]))
def unpack_four(a):
    a, b, c, d = a
    return d, c, b, a


@case("x y", call(1, assigns=[("x", 1, 1), ("x", 2, 2), ("y", 2, 2)]))
def store_the_same_twice(y):
    x = y
    x = y = x + 1
    return x


# From 3.13 on the compiler drops the first of the two stores.
@case("x pair", call((1, 2), assigns=[("x", 1, 1)] * (sys.version_info < (3, 13)) + [("x", 1, 2)]))
def unpack_twice_into_one_name(pair):
    x, x = pair
    return x


@case("a b c", call(assigns=[("a", 1, []), ("b", 1, []), ("c", 1, [])]))
def chained_assignment():
    a = b = c = []
    return a is b is c


@case("x box", call(Box(n=1), assigns=[("x", 1, 2), ("x", 2, 6), ("x", 3, [1]), ("x", 4, [1, 2])]))
def augmented(box):
    x = 2
    x *= 3
    x = [box.n]
    x += [2]
    return x


@case("box items key", call(assigns=[("box", 1, Box(n=1)), ("items", 2, [1, 2, 3]), ("key", 3, 0)]))
def augmented_attributes_and_subscripts():
    box = Box(n=1)
    items = [1, 2, 3]
    key = 0
    box.n += 1
    items[key] -= 5
    items[1:] += [9]
    items[box.n] <<= 2
    return box, items


@case("x", call(assigns=[("x", 1, 5)]))
def annotated():
    x: int = 5
    return x


@case("x", call(assigns=[("x", 2, "later")]))
def annotated_without_a_value():
    x: "str"
    x = "later"
    return x


@case("flag x", call(True), call(False, assigns=[("x", 3, 1)]))
def annotated_and_unbound(flag=None):
    x: int
    if not flag:
        x = 1
    return "end"


@case("data n", call("abcd", assigns=[("n", 1, 4)]), call("a", assigns=[("n", 1, 1)]))
def walrus_in_if(data):
    if (n := len(data)) > 3:
        return n
    return -n


@case("queue x", call(assigns=[("queue", 1, [3, 0, 5]), ("x", 2, 5), ("x", 2, 0)]))
def walrus_in_while():
    queue = [3, 0, 5]
    while x := queue.pop():
        pass
    return queue


@case("a b", call(1, assigns=[("b", 1, 2)]), call(0, assigns=[]))
def walrus_short_circuited(a):
    a and (b := a + 1)
    return a


@case("x y", call(2, assigns=[("y", 1, 3)]))
def walrus_as_the_result(x):
    return (y := x + 1)


@case("a b c", call(assigns=[("b", 1, 1), ("c", 1, 2), ("a", 1, [1, 2])]))
def walrus_inside_a_display():
    a = [b := 1, c := 2]
    return a, b, c


@case("first rest last", call("abcd", assigns=[("first", 1, "a"), ("rest", 1, ["b", "c"]), ("last", 1, "d")]))
def star_target(rest):
    first, *rest, last = rest
    return first, rest, last


@case("a b c d", call(((1, 2), [3, 4]), assigns=[("a", 1, 1), ("b", 1, 2), ("c", 1, 3), ("d", 1, [4])]))
def nested_targets(a):
    ((a, b), [c, *d]) = a
    return a, b, c, d


@case("a b", call((1,), assigns=[]), call((1, 2, 3), assigns=[]))
def unpacking_fails(a):
    a, b = a
    return b


@case("a b box", call(assigns=[("box", 1, Box()), ("a", 2, 1), ("b", 2, 3)]))
def mixed_targets():
    box = Box()
    a, box.x, b = 1, 2, 3
    return a, box, b


@case("items i x", call(assigns=[("items", 1, [0, 0]), ("i", 2, 1), ("x", 3, "target order")]))
def target_used_as_an_index():
    items = [0, 0]
    i, items[i] = 1, 2
    x = "target order"
    return items, i, x


items = i = None


@case("a b", call(((1, 2), (3, 4)), assigns=[("a", 1, 1), ("b", 1, 2), ("a", 1, 3), ("b", 1, 4)]))
def for_target_tuple(a=()):
    for a, b in a:
        pass
    return a


@case("box n", call(2, assigns=[("box", 1, Box())]))
def for_target_attribute(n):
    box = Box()
    for box.x in range(n):
        pass
    return box


@case("sys path join", call(assigns=[
    ("sys", 1, Shown("<module 'sys' (built-in)>")),
    ("path", 2, ["std"]),
    ("join", 2, Shown("<function joined>")),
]))
def imports():
    import sys
    from corpus.parts_to_import import paths as path, joined as join
    return sys.maxsize, path, join


@case("corpus", call(assigns=[("corpus", 1, Shown("<module>"))]))
def import_of_a_submodule():
    import corpus.parts
    return corpus.parts.Box


@case("parts", call(assigns=[("parts", 1, Shown("<module>"))]))
def import_as():
    import corpus.parts as parts
    return parts.Box


@case("nothing", call(assigns=[]))
def import_fails():
    from corpus.parts import nothing
    return nothing


@case(
    "inner x",
    call(assigns=[("inner", 1, Shown("<function nested_function.<locals>.inner>")), ("x", 3, 2)]),
)
def nested_function():
    def inner(x):
        return x + 1
    x = inner(1)
    return x


@case(
    "Local",
    call(assigns=[("Local", 1, Shown("<class 'corpus.assignments.nested_class.<locals>.Local'>"))]),
)
def nested_class():
    class Local:
        x = 1
        y = x + 1
    return Local.y


@case("x", call(assigns=[("x", 2, 3)]))
def local_named_like_a_global_elsewhere():
    # `shared` here is the global; `elsewhere` is a global in one function and a local in the next
    x = elsewhere + 2
    return shared, x


@case("elsewhere shared", call(assigns=[("elsewhere", 1, 10), ("shared", 2, 11)]))
def locals_with_names_of_globals():
    elsewhere = 10
    shared = elsewhere + 1
    return shared


@case("x", call(assigns=[("x", 2, 5)]))
def writes_a_global():
    global counter
    x = 5
    counter = x
    return counter


@case("x", call(assigns=[("x", 3, 1), ("x", 5, 3)]))
def global_is_deleted_again():
    global counter
    counter = 1
    x = counter
    del counter
    x = x + 2
    return x


@case("numbers big small", call(assigns=[
    ("big", 1, 2**200), ("small", 2, -(2**70)), ("numbers", 3, [1e300, 1j, 255, 256, -6, True]),
]))
def big_numbers():
    big = 1606938044258990275541962092341162602522202993782792835301376
    small = -1180591620717411303424
    numbers = [1e300, 1j, 255, 256, -6, True]
    return big + small, numbers


@case("x", call(assigns=[("x", 2, 1), ("x", 4, [2])]))
def name_alone_on_its_line():
    (
        x
    ) = 1
    x \
        = [2]
    return x


@case("x", call(assigns=[("x", 1, 3), ("x", 5, 6)]))
def value_over_several_lines():
    x = max(
        1,
        3,
    )
    x += (
        3
    )
    return x


@case("a b", call(assigns=[("a", 1, "é"), ("b", 2, "ß∂")]))
def unicode_in_the_line():
    a = "é"
    b = "ß∂"; return a + b  # ∂∂∂


@case("ñandú x", call(assigns=[("ñandú", 1, 1), ("x", 2, 2)]))
def unicode_name():
    ñandú = 1
    x = ñandú + 1
    return x


@case("__x _ __", call(assigns=[("__x", 1, 1), ("_", 2, 2), ("__", 3, 3)]))
def underscore_names():
    __x = 1
    _ = 2
    __ = 3
    return _ + __ + __x


class Mangled:
    @case("self _Mangled__secret", call(None, assigns=[("_Mangled__secret", 1, 1)]))
    def method(self):
        __secret = 1
        return __secret


@case("type match case soft", call(assigns=[("type", 1, 1), ("match", 2, 2), ("case", 3, 3), ("soft", 4, 6)]))
def soft_keywords():
    type = 1
    match = 2
    case = 3
    soft = type + match + case
    return soft


@case("hook key __name__", call(assigns=[("hook", 1, 1), ("key", 2, 2), ("__name__", 3, "n")]))
def names_the_engine_might_use():
    hook = 1
    key = 2
    __name__ = "n"
    return hook, key, __name__
