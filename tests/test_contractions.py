"""Attention whose products are no matrix products by name: the map is the weights, whichever way they are multiplied.

What is written the same and is no attention has no map.
"""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from visualizer import VisualizerWarning, attention


class Written(nn.Module):
    """Attention as functions write it; it keeps its weights."""

    def __init__(self, scores, product, heads=1, dim=-1):
        super().__init__()
        torch.manual_seed(0)
        self.scores, self.product, self.heads, self.dim = scores, product, heads, dim
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x, context=None):
        context = x if context is None else context
        q, k, v = self.q(x), self.k(context), self.v(context)
        if self.heads > 1:
            q, k, v = (one.unflatten(-1, (self.heads, -1)).transpose(1, 2) for one in (q, k, v))
        self.weights = self.scores(q, k).softmax(self.dim)
        out = self.product(self.weights, v)
        return self.out(out.transpose(1, 2).flatten(2) if self.heads > 1 else out)


@pytest.fixture
def x():
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


def only_map_of(model, *args, **options):
    with torch.no_grad():
        before = model(*args)
        with attention(model, **options) as maps:
            after = model(*args)
    assert torch.equal(before, after)
    [found] = maps
    return found


def by_matmul(q, k):
    return q @ k.mT


def summed(weights, values):
    return (weights[..., None] * values[..., None, :, :]).sum(-2)


def each(function):
    """What a function of two matrices makes of many."""

    def made(one, other):
        parts = [function(*both) for both in zip(one.flatten(0, -3), other.flatten(0, -3), strict=True)]
        return torch.stack(parts).unflatten(0, one.shape[:-2])

    return made


def flat(function):
    return lambda one, other: function(one.flatten(0, -3), other.flatten(0, -3)).unflatten(0, one.shape[:-2])


def filled(function):
    return lambda one, other: function(one, other, out=torch.empty(*one.shape[:-1], other.shape[-1]))


def weighed(w, v):
    return torch.mul(v.unsqueeze(-3), w.unsqueeze(-1))


PRODUCTS = {
    "sum": summed,
    "torch.sum": lambda w, v: torch.sum(weighed(w, v), dim=-2),
    "axis": lambda w, v: weighed(w, v).sum(axis=(-2,)),
    "keepdim": lambda w, v: weighed(w, v).sum(-2, keepdim=True).squeeze(-2),
    "width first": lambda w, v: (w[..., None, :] * v.mT[..., None, :, :]).sum(-1),
    "keys first": lambda w, v: (w.mT[..., None] * v[..., :, None, :]).sum(-3),
    "expanded": lambda w, v: (
        w.unsqueeze(-1).expand(*w.shape, v.shape[-1]) * v.unsqueeze(-3).expand(*w.shape, v.shape[-1])
    ).sum(-2),
    "vecdot": lambda w, v: torch.linalg.vecdot(w[..., None, :], v.mT[..., None, :, :]),
    "linalg.matmul": torch.linalg.matmul,
    "tensordot": each(lambda w, v: torch.tensordot(w, v, 1)),
    "tensordot by axes": each(lambda w, v: torch.tensordot(w, v, dims=([-1], [0]))),
    "tensordot, turned": each(lambda w, v: torch.tensordot(v, w, dims=([0], [1])).mT),
    "inner": each(lambda w, v: torch.inner(w, v.mT)),
    "inner, turned": each(lambda w, v: torch.inner(v.mT, w).mT),
    "linear": each(lambda w, v: F.linear(w, v.mT)),
    "mm": each(torch.mm),
    "addmm": each(lambda w, v: torch.addmm(torch.ones(v.shape[-1]), w, v)),
    "addmm by names": each(lambda w, v: torch.addmm(mat2=v, mat1=w, input=torch.ones(1, 1), beta=0.5, alpha=2)),
    "baddbmm": flat(lambda w, v: torch.baddbmm(torch.ones(1, 1, 1), w, v)),
    "baddbmm without what is added": flat(lambda w, v: torch.baddbmm(torch.full((1, 1, 1), torch.nan), w, v, beta=0)),
    "baddbmm, scaled": flat(lambda w, v: torch.baddbmm(torch.ones(1, 1, 1), w, v, beta=0.5, alpha=2)),
    "bmm to a tensor": flat(filled(torch.bmm)),
    "matmul to a tensor": filled(torch.matmul),
    "matmul by names": lambda w, v: torch.matmul(other=v, input=w),
    "einsum": lambda w, v: torch.einsum("...ij,...jd->...id", w, v),
}


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("keys", [None, 6, 1])
def test_products_of_weights_and_values(x, name, heads, keys):
    model = Written(by_matmul, PRODUCTS[name], heads)
    found = only_map_of(model, x, *([] if keys is None else [torch.randn(2, keys, 8)]))
    assert torch.equal(found.dense(), model.weights if heads > 1 else model.weights[:, None])
    assert (found.kind, found.is_softmax, found.softmaxes) == ("self" if keys is None else "cross", True, ())
    assert not found.axes_assumed


def pairs(q, k):
    return q[..., :, None, :], k[..., None, :, :]


def all_pairs(q, k):
    return (one.expand(*q.shape[:-1], *k.shape[-2:]) for one in pairs(q, k))


def bilinear(q, k):
    return F.bilinear(*all_pairs(q, k), torch.eye(q.shape[-1])[None]).squeeze(-1)


SCORES = {
    "a product by hand": lambda q, k: torch.mul(*pairs(q, k)).sum(-1),
    "keepdim": lambda q, k: torch.sum(torch.mul(*pairs(q, k)), -1, keepdim=True).squeeze(-1),
    "distances": lambda q, k: -torch.cdist(q, k),
    "pairwise distances": lambda q, k: -F.pairwise_distance(*pairs(q, k)),
    "cosines": lambda q, k: F.cosine_similarity(*pairs(q, k), dim=-1),
    "bilinear": bilinear,
    "vecdot": lambda q, k: torch.linalg.vecdot(*pairs(q, k)),
    "additive": lambda q, k: torch.tanh(torch.add(*pairs(q, k))).sum(-1),
    "einsum": lambda q, k: torch.einsum("...id,...jd->...ij", q, k),
    "turned": lambda q, k: (k @ q.mT).mT,
    "exp over its sum": lambda q, k: F.normalize(by_matmul(q, k).exp(), p=1, dim=-1).log(),
}
ALL_SCORES = [(scores, product) for scores in SCORES for product in ("matmul", "sum", "keys first", "vecdot")]


@pytest.mark.parametrize(("scores", "product"), ALL_SCORES)
@pytest.mark.parametrize("heads", [1, 2])
def test_scores_with_each_product(x, scores, product, heads):
    model = Written(SCORES[scores], PRODUCTS.get(product, torch.matmul), heads)
    found = only_map_of(model, x)
    assert torch.equal(found.dense(), model.weights if heads > 1 else model.weights[:, None])
    assert (found.kind, found.is_softmax, found.axes_assumed) == ("self", True, False)


FLAT_SCORES = {
    "mm": lambda q, k: torch.mm(q, k.t()),
    "addmm": lambda q, k: torch.addmm(torch.zeros(len(k)), q, k.t()),
    "inner": torch.inner,
    "tensordot": lambda q, k: torch.tensordot(q, k, dims=([1], [1])),
    "linear": F.linear,
    "a product by hand": lambda q, k: (q[:, None] * k[None]).sum(-1),
    "bilinear": bilinear,
}
FLAT_PRODUCTS = {
    "sum": summed,
    "tensordot": lambda w, v: torch.tensordot(w, v, 1),
    "inner": lambda w, v: torch.inner(w, v.mT),
    "addmm": lambda w, v: torch.addmm(torch.ones(8), w, v),
    "vecdot": lambda w, v: torch.linalg.vecdot(w[:, None], v.mT),
}


@pytest.mark.parametrize("scores", FLAT_SCORES)
@pytest.mark.parametrize("product", FLAT_PRODUCTS)
@pytest.mark.parametrize("is_self", [True, False])
def test_attention_without_a_batch(x, scores, product, is_self):
    model = Written(FLAT_SCORES[scores], FLAT_PRODUCTS[product])
    found = only_map_of(model, x[0], *([] if is_self else [x[1, :4]]))
    assert torch.equal(found.dense()[0, 0], model.weights)
    assert found.kind == ("self" if is_self else "cross")


def first(q):
    return q[..., :1, :]


SINGLE = {
    "a row": (lambda q, k: first(q) @ k.mT, lambda w, v: summed(w, v), -1),
    "no axis": (lambda q, k: (first(q) * k).sum(-1), lambda w, v: (w[..., None] * v).sum(-2, keepdim=True), -1),
    "scaled": (lambda q, k: (first(q) * k / 3).mean(-1), lambda w, v: (w[..., None] * v).sum(-2, keepdim=True), -1),
    "a column": (lambda q, k: (first(q) * k).sum(-1, True), lambda w, v: (w * v).sum(-2, keepdim=True), -2),
    "a column of a product": (lambda q, k: k @ first(q).mT, lambda w, v: (w * v).sum(-2, keepdim=True), -2),
    "einsum": (
        lambda q, k: torch.einsum("...d,...jd->...j", q[..., 0, :], k),
        lambda w, v: torch.einsum("...j,...jd->...d", w, v).unsqueeze(-2),
        -1,
    ),
    "masked": (
        lambda q, k: (k @ first(q).mT).squeeze(-1).masked_fill(torch.arange(5) > 3, -torch.inf),
        lambda w, v: (w[..., None] * v).sum(-2, keepdim=True),
        -1,
    ),
}


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("batch", [2, 1])
def test_a_single_query(x, name, heads, batch):
    scores, product, dim = SINGLE[name]
    model = Written(scores, product, heads, dim)
    found = only_map_of(model, x[:batch])
    assert torch.equal(found.dense(), model.weights.reshape(batch, heads, 1, 5))
    assert (found.kind, found.is_softmax, found.axes_assumed) == ("self", True, False)


def test_a_query_for_each_neighbourhood(x):
    """As of points with their nearest neighbours: each has keys and values of its own."""
    near = torch.arange(15).view(5, 3) % 5
    model = Written(lambda q, k: (q[:, :, None] * k[:, near]).sum(-1), lambda w, v: (w[..., None] * v[:, near]).sum(-2))
    found = only_map_of(model, x)
    assert found.shape == (2, 5, 1, 3)
    assert torch.equal(found.dense()[:, :, 0], model.weights)


LAYOUTS = {
    "queries, heads, keys": ("bihd,bjhd->bihj", -1, lambda w, v: (w[..., None] * v.transpose(1, 2)[:, None]).sum(-2)),
    "queries, keys, heads": ("bihd,bjhd->bijh", 2, lambda w, v: (w[..., None] * v[:, None]).sum(2)),
    "queries, keys, batch, heads": (
        "bihd,bjhd->ijbh",
        1,
        lambda w, v: (w[..., None] * v.transpose(0, 1)).sum(1).transpose(0, 1),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("heads", [2, 4])
def test_axes_in_other_orders(x, name, heads):
    equation, dim, product = LAYOUTS[name]

    def split(one):
        return one.unflatten(-1, (heads, -1))

    model = Written(
        lambda q, k: torch.einsum(equation, split(q), split(k)), lambda w, v: product(w, split(v)).flatten(2), dim=dim
    )
    found = only_map_of(model, x)
    assert torch.equal(found.dense(), torch.einsum(f"{equation[-4:]}->bhij", model.weights))
    assert (found.kind, found.is_softmax, found.axes_assumed) == ("self", True, False)


def test_heads_that_share_keys_and_values(x):
    model = Written(lambda q, k: q @ k[:, :1].mT, lambda w, v: summed(w, v[:, :1]), heads=2)
    found = only_map_of(model, x)
    assert torch.equal(found.dense(), model.weights)
    assert not found.axes_assumed


def test_weights_that_sum_to_one_without_a_softmax(x):
    class Normalised(nn.Module):
        def forward(self, x):
            weights = (x @ x.mT / 8).exp()
            self.weights = weights / weights.sum(-1, keepdim=True)
            return summed(self.weights, x)

    model = Normalised()
    found = only_map_of(model, x)
    assert torch.equal(found.dense()[:, 0], model.weights)
    assert found.is_softmax


def test_weights_changed_before_they_are_summed(x):
    model = Written(by_matmul, lambda w, v: summed(w * torch.arange(5.0), v))
    found = only_map_of(model, x)
    assert torch.equal(found.dense()[:, 0], model.weights * torch.arange(5.0))
    assert torch.equal(found.softmaxes[0].dense()[:, 0], model.weights)
    assert not found.is_softmax


@pytest.mark.parametrize("is_expanded", [False, True])
def test_dropout_and_gradients(x, is_expanded):
    def product(w, v):
        dropped = F.dropout(w, 0.5)[..., None]
        return ((dropped.expand(-1, -1, -1, 8) if is_expanded else dropped) * v[:, None]).sum(-2)

    model = Written(by_matmul, product)
    with attention(model, gradients=True) as maps:
        out = model(x)
        model.weights.retain_grad()
        out.square().sum().backward()
    [found] = maps
    assert torch.equal(found.dense()[:, 0], model.weights)
    assert torch.equal(found.grad_dense()[:, 0], model.weights.grad)


def test_values_of_another_type(x):
    for dtype in (torch.float64, torch.bfloat16):
        model = Written(by_matmul, lambda w, v, dtype=dtype: summed(w, v.to(dtype)).float())
        assert torch.equal(only_map_of(model, x).dense()[:, 0], model.weights)


def test_inference_mode(x):
    model = Written(by_matmul, summed)
    with torch.inference_mode(), attention(model) as maps:
        model(x)
    assert (maps[0].kind, maps[0].shape) == ("self", (2, 1, 5, 5))


def test_relative_values_before_the_values(x):
    """Rows of positions have no batch, and a row for each query: the map is that of the values."""
    rows = torch.randn(5, 5, 8)
    model = Written(by_matmul, lambda w, v: (w[..., None] * rows).sum(-2) + summed(w, v))
    found = only_map_of(model, x)
    assert torch.equal(found.dense()[:, 0], model.weights)
    assert not found.axes_assumed


@pytest.mark.parametrize("function", [torch.linalg.multi_dot, torch.chain_matmul])
@pytest.mark.filterwarnings("ignore:torch.chain_matmul is deprecated")
def test_products_of_more_than_weights_and_values_are_told(x, function):
    multiplied = (lambda *several: function(several)) if function is torch.linalg.multi_dot else function
    model = Written(by_matmul, lambda w, v: multiplied(w, v, torch.eye(8)))
    with pytest.warns(VisualizerWarning, match=f"{function.__name__} multiplies more than weights with values"):
        with attention(model) as maps:
            model(x[0])
    assert len(maps) == 0


class Other(nn.Module):
    """What is no attention."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.one, self.gates, self.layer = nn.Linear(8, 1), nn.Linear(8, 3), nn.Linear(8, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.matrix, self.rows, self.vector, self.square = (
            nn.Parameter(torch.randn(*shape)) for shape in ((8, 3), (3, 8), (8,), (8, 8))
        )
        self.pair = nn.Bilinear(8, 8, 3)

    def of_experts(self, x):
        return torch.stack([expert(x) for expert in self.experts], -2)

    def cosines(self, x):
        return F.normalize(x, dim=-1) @ F.normalize(self.rows, dim=-1).mT

    def forward(self, x):
        return self.function(self, x)


def pooled(weights, values):
    return (weights[..., None] * values).sum(-2)


def of_split(model, x, weights):
    """As SKNet weighs branches, channel by channel."""
    branches = model.of_experts(x).transpose(1, 2)
    return (branches * weights(branches.mean(2))[:, :, None]).sum(1)


def linear_attention(queries, keys, values):
    states = (keys.softmax(1)[..., None] * values[:, :, None]).sum(1)
    return (queries.softmax(-1)[..., None] * states[:, None]).sum(-2)


OTHERS = {
    "experts, gated by a layer": lambda m, x: pooled(m.gates(x).softmax(-1), m.of_experts(x)),
    "experts, gated by a matrix": lambda m, x: pooled((x @ m.matrix).softmax(-1), m.of_experts(x)),
    "experts, gated by cosines": lambda m, x: pooled(m.cosines(x).softmax(-1), m.of_experts(x)),
    "experts, gated by an image": lambda m, x: pooled(m.cosines(x.mean(1)).softmax(-1)[:, None], m.of_experts(x)),
    "experts of a token": lambda m, x: pooled(m.cosines(x[0, :1]).softmax(-1), m.of_experts(x[0, :1])),
    "the best experts": lambda m, x: pooled(m.cosines(x).softmax(-1).topk(2).values, m.of_experts(x)[..., :2, :]),
    "experts before tokens": lambda m, x: (
        m.of_experts(x).movedim(-2, 0) * m.cosines(x).softmax(-1).movedim(-1, 0)[..., None]
    ).sum(0),
    "experts with keys made elsewhere": lambda m, x: pooled((x @ m.layer(x)[:, :3].mT).softmax(-1), m.of_experts(x)),
    "a codebook": lambda m, x: pooled((x @ m.rows.mT).softmax(-1), m.rows),
    "a codebook by distances": lambda m, x: pooled((-torch.cdist(x, m.rows * 1)).softmax(-1), m.rows * 1),
    "a codebook by gumbel": lambda m, x: pooled(F.gumbel_softmax(m.cosines(x)), m.rows * 1),
    "a codebook by tensordot": lambda m, x: torch.tensordot(m.cosines(x).softmax(-1), m.rows * 1, 1),
    "classes": lambda m, x: pooled(m.gates(x.mean(1)).softmax(-1), m.rows),
    "classes of pairs": lambda m, x: m.pair(x, x + 1).softmax(-1) @ (m.rows * 1),
    "squeeze and excitation": lambda m, x: (x * m.layer(x.mean(1)).softmax(-1)[:, None]).sum(-1),
    "branches, by a layer": lambda m, x: of_split(m, x, lambda means: m.layer(means).softmax(1)),
    "branches, by a product": lambda m, x: of_split(m, x, lambda means: (means @ (m.square * 1)).softmax(1)),
    "pooling by a layer": lambda m, x: (m.one(x).softmax(1) * x).sum(1),
    "pooling by a gated layer": lambda m, x: (m.one(torch.tanh(m.layer(x))).softmax(1) * x).sum(1),
    "pooling by a vector": lambda m, x: pooled((x @ m.vector).softmax(-1), x),
    "pooling by a vector that is computed": lambda m, x: pooled((x @ (m.vector * 1)).softmax(-1), x),
    "linear attention by layers": lambda m, x: linear_attention(m.layer(x), m.layer(x), x),
    "linear attention by matrices": lambda m, x: linear_attention(x @ m.square, x @ m.square, x),
    "linear attention by other matrices": lambda m, x: linear_attention(x @ (m.square * 1), x @ (m.square * 1), x),
    "clusters": lambda m, x: (m.cosines(x).softmax(-1)[..., None] * (x[:, :, None] - m.rows)).sum(1),
    "places in a list": lambda m, x: ((x @ x.mT).softmax(-1) * torch.arange(float(x.shape[1]))).sum(-1),
    "losses": lambda m, x: ((x @ x.mT).softmax(-1) * (x - 1).square().sum(-1)[:, None]).sum(-1),
    "masked sums": lambda m, x: ((x[:1] @ x[:1].mT).softmax(-1) * torch.rand(4, 1, x.shape[1])).sum(-1),
    "distances of points": lambda m, x: (torch.cdist(x, x)[..., None] * (x[:, None] - x[:, :, None])).sum(-2),
    "gates by features": lambda m, x: pooled((x @ (x.mT @ x)).softmax(-1), torch.randn(*x.shape, 4)),
    "modulation": lambda m, x: (m.one(torch.tanh(x * m.layer(x.mean(1))[:, None])).softmax(1) * x).sum(1),
    "a layer whose matrix is computed": lambda m, x: (
        torch.addmm(m.vector, x[0], m.square * 1).softmax(-1) @ x[0].mT @ x[0]
    ),
}
SIZES = [(2, 5), (3, 3), (8, 8), (1, 5), (1, 8), (3, 8), (8, 3), (1, 3)]
"""Of batch and tokens. Some are as many as experts or features: no length may tell what an axis is."""


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_attention_has_no_map(name):
    model = Other(OTHERS[name])
    for batch, tokens in SIZES:
        with torch.no_grad(), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            with attention(model) as maps:
                model(torch.randn(batch, tokens, 8))
        assert len(maps) == 0
        assert ["without any attention that can be seen" in str(one.message) for one in told] == [True]


@pytest.mark.parametrize("gates", ["x @ matrix", "cosines"])
def test_an_einsum_of_gates_and_experts_is_told(x, gates):
    model = Other(
        lambda m, x: torch.einsum(
            "bte,bted->btd", (x @ m.matrix if "matrix" in gates else m.cosines(x)).softmax(-1), m.of_experts(x)
        )
    )
    with pytest.warns(VisualizerWarning, match="'bte,bted->btd' is no product"), attention(model) as maps:
        model(x)
    assert len(maps) == 0


def test_pooling_beside_attention_leaves_its_map_alone(x):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.pooling = Written(by_matmul, summed), Other(OTHERS["pooling by a layer"])

        def forward(self, x):
            return self.pooling(self.attention(x))

    model = Both()
    found = only_map_of(model, x)
    assert found.path == "attention"
    assert torch.equal(found.dense()[:, 0], model.attention.weights)
