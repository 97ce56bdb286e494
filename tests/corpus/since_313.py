"""Type parameters with defaults (PEP 696)."""

from corpus import call, case


@case("x y T", call(1, assigns=[("y", 1, (1, int))]))
def type_parameter_with_a_default[T = int, *Ts = *tuple[int, ...]](x: T):
    y = (x, T.__default__)
    return y
