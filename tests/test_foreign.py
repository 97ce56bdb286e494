"""Attention that is not seen is told by what ran: a function of somebody else that took tensors and made one."""

import warnings

import kernels_by_hand
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from visualizer import VisualizerWarning, attention


def by_numpy(q, k, v):
    arrays = [tensor.detach().numpy() for tensor in (q, k, v)]
    return torch.from_numpy(kernels_by_hand.attend_batch(*map(torch.from_numpy, arrays)).numpy())


class Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        return kernels_by_hand.attend_batch(q.contiguous(), k.contiguous(), v.contiguous())


def into_memory(q, k, v):
    """As a kernel of Triton is called."""
    output = torch.empty_like(q)
    output.numpy()[...] = by_numpy(q, k, v).numpy()
    return output


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return kernels_by_hand.attend_batch(q, k, v)


HAS_OPERATORS = hasattr(torch.library, "custom_op")  # since torch 2.4
operator = torch.library.custom_op("visualizer_tests::attend", mutates_args=())(_attend) if HAS_OPERATORS else _attend


def plain(q, k, v):
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def scripted(q, k, v):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(plain)(q, k, v)


def compiled(q, k, v):
    return kernels_by_hand.attend_batch(q, k, v)


def seen(q, k, v):
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class MHA(nn.Module):
    """An attention whose class says nothing of the sort."""

    def __init__(self, kernel, form="three layers"):
        super().__init__()
        self.kernel, self.form = kernel, form
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.qkv = nn.Linear(16, 48)

    def forward(self, x):
        x = F.layer_norm(x, (16,))
        if self.form == "one layer":
            qkv = self.qkv(x).unflatten(-1, (3, 4, 4))
            heads = self.kernel(*(qkv[:, :, place] for place in range(3)))
        elif self.form == "unpacked":
            q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 1, 3, 4)
            heads = self.kernel(q, k, v)
        else:
            heads = self.kernel(*(layer(x).unflatten(-1, (4, 4)) for layer in (self.q, self.k, self.v)))
        return self.out(heads.flatten(2))


class Layer(nn.Module):
    def __init__(self, mixer):
        super().__init__()
        self.mixer, self.mlp = mixer, nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x):
        x = x + self.mixer(x)
        return x + self.mlp(x)


def model_of(*mixers):
    return nn.Sequential(*map(Layer, mixers)).eval()


def told(model, *args):
    with warnings.catch_warnings(record=True) as caught, attention(model) as maps:
        warnings.simplefilter("always")
        model(*args)
    return maps, [str(warning.message) for warning in caught if warning.category is VisualizerWarning]


X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
KERNELS = [by_numpy, Attend.apply, into_memory, operator, scripted, compiled]
NAMES = ["numpy", "autograd", "memory", "operator", "scripted", "compiled"]


@pytest.mark.parametrize("kernel", KERNELS, ids=NAMES)
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("form", ["three layers", "one layer", "unpacked"])
def test_one_layer_of_three(kernel, place, form):
    mixers = [MHA(seen, form) for _ in range(3)]
    mixers[place] = MHA(kernel, form)
    with torch.no_grad():
        maps, [text] = told(model_of(*mixers), X)
    assert len(maps) == 2
    assert text.startswith(f"MHA ('{place}.mixer') called a function that is not torch's")


def test_all_layers():
    model = model_of(*(MHA(compiled) for _ in range(3)))
    maps, [text] = told(model, X)
    assert len(maps) == 0
    assert text.startswith("MHA ('0.mixer' and 2 more) called a function that is not torch's")


class Packed(nn.Module):
    """Query, key and value are one tensor for its kernel."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        qkv = self.qkv(x).view(2, 5, 3, 4, 4)
        return self.out(foreign(lambda qkv: compiled(*qkv.unbind(2)))(qkv).flatten(2))


def test_a_kernel_that_takes_three_in_one():
    _, [text] = told(model_of(MHA(seen), Packed()), X)
    assert text.startswith("Packed ('1.mixer') called a function that is not torch's")


class Kernel(nn.Module):
    """A module around a kernel, as flash_attn's FlashSelfAttention is."""

    def forward(self, q, k, v):
        return compiled(q, k, v)


def test_a_module_around_the_kernel():
    _, [text] = told(model_of(MHA(seen), MHA(Kernel())), X)
    assert text.startswith("Kernel ('1.mixer.kernel') called a function that is not torch's")


def foreign(function):
    """A function that no mode sees."""

    def run(*args):
        with torch._C.DisableTorchFunction():
            return function(*args)

    return run


class RMSNorm(nn.Module):
    """Of a fused kernel."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, x):
        return foreign(lambda x, weight: x * weight)(x.float(), self.weight)


class GatedMLP(nn.Module):
    """Of a fused activation."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return self.down(foreign(lambda gate, up: F.silu(gate) * up)(self.gate(x), self.up(x)))


class Unpacked(nn.Module):
    """What is taken from a tensor by unpacking it was made by no function that is seen."""

    def __init__(self):
        super().__init__()
        self.qkv, self.scale = nn.Linear(16, 48), torch.randn(1, 1, 16)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 16)).permute(2, 0, 1, 3)
        return self.scale * q.relu() + k + v


class Mixer(nn.Module):
    """As in an MLP-Mixer."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Linear(5, 5)

    def forward(self, x):
        return self.tokens(x.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize("mixer", [RMSNorm, GatedMLP, Unpacked, Mixer, nn.Identity])
def test_what_does_not_attend_is_not_told(mixer):
    maps, texts = told(model_of(MHA(seen), mixer()), X)
    assert len(maps) == 1
    assert texts == []


def test_rotary_embedding_by_a_kernel_of_somebody_else():
    """It takes tensors and makes others; then the attention is seen."""
    rotate = foreign(lambda *tensors: tuple(tensor + 1 for tensor in tensors))
    maps, texts = told(model_of(MHA(lambda q, k, v: seen(*rotate(q, k), v))), X)
    assert len(maps) == 1
    assert texts == []
