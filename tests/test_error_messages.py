"""What users are told when a local cannot be captured: what is wrong, where, and what to do. Nothing changes."""

import pytest

from visualizer import UnknownLocalError, capture


def test_a_local_of_a_function_inside():
    def outer(x):
        def inner(y):
            secret = y + x
            return secret

        return inner

    line = outer.__code__.co_firstlineno
    with pytest.raises(UnknownLocalError) as caught:
        capture(outer, "secret")
    assert "did you mean" not in str(caught.value)
    for part in (f"defines inner in line {line + 1}, which has 'secret'", "@get_local('secret') above that def"):
        assert part in str(caught.value)
    inner = outer(1)
    with capture(inner, "secret") as found:  # as the message says
        inner(2)
    assert [[3]] == list(found.values())
    with pytest.raises(UnknownLocalError) as caught:
        capture(outer, "nothing")
    assert "defines" not in str(caught.value)
    with pytest.raises(UnknownLocalError, match="did you mean 'secret'"):
        capture(outer, "secrt")


class Nested:
    def method(self, x):
        def helper(y):
            def deeper(z):
                deepest = z
                return deepest

            return deeper(y)

        return helper(x)

    def twins(self):
        found = (lambda both: both)(1)

        def one():
            both = 1
            return both

        def other():
            both = 2
            return both

        return one() + other() + found

    def expressions(self, x):
        total = sum(part for part in x)
        return (lambda argument: argument)(total)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("deepest", r"Nested\.method defines deeper in line \d+, which has 'deepest': put @get_local"),
        ("both", r"Nested\.twins defines one in line \d+, which has 'both' \(so has other in line \d+\): put"),
        ("argument", r"Nested\.expressions has a lambda in line \d+, which has 'argument': .* write it as a def"),
        ("part", r"Nested\.expressions has a generator expression in line \d+, which has 'part': .* as a loop"),
    ],
)
def test_a_local_inside_a_method(name, told):
    with pytest.raises(UnknownLocalError, match=told):
        capture(Nested, name)
    with pytest.raises(TypeError, match=told):
        capture(Nested(), name)


def test_a_module_of_python():
    import colorsys

    with pytest.raises(
        TypeError, match=r"colorsys is a module\. 'sumc' is a local of \.rgb_to_hls: pass that function"
    ):
        capture(colorsys, "sumc")
    with pytest.raises(TypeError, match=r"no function of the module colorsys has a local 'sumd'; did you mean 'sumc'"):
        capture(colorsys, "sumd")


def test_a_local_of_an_expression_inside_a_module():
    torch = pytest.importorskip("torch", reason="engine only: torch is not in this environment")

    class Model(torch.nn.Module):
        def forward(self, x):
            return sum(part + 1 for part in x)

    with pytest.raises(
        UnknownLocalError, match=r"Model\.forward has a generator expression in line \d+, which has 'part'"
    ):
        capture(Model(), "part")


def test_an_object_with_methods():
    class Means:
        def fit(self, x):
            labels = x + 1
            return self

    means = Means()
    with pytest.raises(TypeError, match=r"'labels' is a local of \.fit: pass that method.*or its class .*Means"):
        capture(means, "labels")
    with capture(means.fit, "labels") as found:
        means.fit(1), Means().fit(5)
    assert [[2]] == list(found.values())
    with pytest.raises(TypeError, match=r"no method of .*Means.* has a local 'lables'; did you mean 'labels'\?"):
        capture(means, "lables")
    with pytest.raises(TypeError, match=r"3 has no Python code to capture from$"):
        capture(3, "x")


@pytest.mark.parametrize("active", [False, True], ids=["off", "on"])
def test_a_wrong_name(gl, active):
    if active:
        gl.activate()

    def attention(query, key):
        attn_weights = query
        return attn_weights

    code = attention.__code__
    with pytest.raises(UnknownLocalError) as caught:
        gl("attn_weight")(attention)
    for part in (
        *("attention", __file__, str(code.co_firstlineno)),
        *("'attn_weight'", "did you mean 'attn_weights'?", "query, key, attn_weights"),
    ):
        assert part in str(caught.value)
    assert isinstance(caught.value, NameError)
    assert attention.__code__ is code
    assert gl.cache == {}


def test_a_parameter_that_is_never_assigned_has_nothing_for_assign(gl):
    def forward(x, attn):
        x = attn
        return x

    with pytest.raises(ValueError, match=r"forward \(.*'attn': it is a parameter.*at='return'"):
        gl("attn", at="assign")(forward)
    assert gl("x", at="assign")(forward) is forward
    assert [forward.__qualname__] == list(gl.cache)


def test_a_name_that_is_an_attribute_there(gl):
    def forward(self):
        self.attn_weights = 1

    with pytest.raises(UnknownLocalError, match="assign it to a local first"):
        gl("attn_weights")(forward)


def test_above_a_decorator_that_does_not_say_what_it_wraps(gl):
    def logged(function):
        later = []

        def wrapper(*args):
            later.append(unbound)
            return function(*args)

        return wrapper
        unbound = 1

    def forward(x):
        attn = x
        return attn

    with pytest.raises(UnknownLocalError) as caught:
        gl("attn")(logged(forward))
    line = forward.__code__.co_firstlineno
    for part in (f"forward ({__file__}:{line}), which it uses, has it", "@get_local beneath", "functools.wraps"):
        assert part in str(caught.value)
    with pytest.raises(UnknownLocalError) as caught:
        gl("atn")(logged(forward))
    assert "has it" not in str(caught.value)


@pytest.mark.parametrize("thing", [len, "attn".upper, 3, None, int, dict, type("Plain", (), {})])
def test_what_has_no_python_code(gl, thing):
    with pytest.raises(TypeError) as caught:
        gl("attn")(thing)
    assert "function" in str(caught.value)
