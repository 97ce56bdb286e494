"""Functions and classes that tests of the engine capture from; no torch, no numpy."""


def attend(x):
    q = x + 1
    attn = q * 2
    return attn + 1


class Base:
    def score(self, x):
        attn = [self, x]
        return x

    @classmethod
    def build(cls, x):
        made = (cls.__name__, x)
        return made

    @staticmethod
    def scale(x):
        scaled = 10 * x
        return x


class Derived(Base):
    def other(self, x):
        attn = -x
        return x


def make(gl, *names, **options):
    def forward(x):
        q = x + 1
        attn = q * 2
        return attn + 1

    forward.__qualname__ = "forward"
    return gl(*names, **options)(forward)
