"""Names that are not bound, or no longer, at some return."""

from corpus import call, case


@case("flag x", call(True, assigns=[("x", 2, 1)]), call(False))
def bound_in_one_branch(flag):
    if flag:
        x = 1
    return flag


@case("flag x", call(True, assigns=[("x", 2, 1)]), call(False))
def reading_it_raises(flag):
    if flag:
        x = 1
    return x


@case("x", call())
def never_bound():
    if False:
        x = 1
    return "x is a local all the same"


@case("items item", call(()), call((1,), assigns=[("item", 1, 1)]))
def loop_that_may_not_run(items):
    for item in items:
        pass
    return len(items)


@case("x", call(assigns=[("x", 1, 1)]))
def deleted():
    x = 1
    del x
    return "gone"


@case("x", call(assigns=[("x", 1, 1), ("x", 3, 2)]))
def deleted_and_bound_again():
    x = 1
    del x
    x = 2
    return x


@case("x", call(1))
def deleted_argument(x):
    del x
    return "gone"


@case("x", call(1))
def deleted_argument_raises(x):
    del x
    return x


@case("x flag", call(1, True), call(1, False))
def argument_deleted_on_one_path(x, flag):
    if flag:
        del x
        return 1
    return 2


@case("x", call(None), call(1), call(0))
def deleted_twice_is_an_error(x):
    try:
        if x is not None:
            del x
            del x
    except UnboundLocalError:
        return "unbound"
    return "bound"


@case(
    "a b c d",
    call(0, assigns=[]),
    call(1, assigns=[("b", 3, 1)]),
    call(2, assigns=[("b", 3, 1), ("c", 6, 2)]),
    call(3, assigns=[("b", 3, 1), ("c", 6, 2), ("d", 9, 3)]),
)
def bound_one_by_one(a):
    if a == 0:
        return "a"
    b = 1
    if a == b:
        return "ab"
    c = 2
    if a == c:
        return "abc"
    d = 3
    return "abcd"


@case("x y", call(assigns=[("x", 1, None), ("y", 2, 1)]))
def bound_to_none_is_bound():
    x = None
    y = 1
    del y
    return x


@case("n i x", call(2, assigns=[("i", 1, 0), ("x", 2, 0), ("i", 1, 1), ("x", 2, 1)]), call(0))
def bound_and_deleted_in_a_loop(n):
    for i in range(n):
        x = i
        if i == 7:
            return x
        del x
    return "done"


@case("x", call(assigns=[]))
def unbound_before_its_handler():
    try:
        x = x + 1
    except UnboundLocalError:
        return "unbound"


@case("x y", call(assigns=[("y", 3, 1), ("y", 6, 1)]))
def unbound_in_finally():
    try:
        try:
            y = 1
            x = 1 / 0
        finally:
            y += 0 if y else x
    except ZeroDivisionError:
        return y


@case("x y z", call(True, assigns=[("z", 2, 1)]), call(False, assigns=[("y", 4, 2)]))
def different_names_on_different_paths(x):
    if x:
        z = 1
    else:
        y = 2
    return x


@case("a b", call(0, assigns=[("b", 1, 0), ("a", 2, 1), ("b", 3, 2)]))
def both_deleted_at_once(a):
    b = a
    a = 1
    b = 2
    del a, b
    return "gone"
