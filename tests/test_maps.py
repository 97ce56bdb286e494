"""Attention maps: dense ones and those of query and key answer alike, and as an explicit softmax in float64 does."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from visualizer import AttentionMap
from visualizer.layout import Layout, Windows
from visualizer.maps import Block, Factors, Gradient, Joined, Keys, Modifiers, attention_map

B, H, Q, K, D = 2, 4, 7, 9, 8


def factors(batch=B, heads=H, queries=Q, keys=K, width=D, key_heads=None, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, queries, width, generator=generator, dtype=torch.float64)
    key = torch.randn(batch, key_heads or heads, keys, width, generator=generator, dtype=torch.float64)
    return query.to(dtype), key.to(dtype)


def reference(query, key, scale=None, mask=None, is_causal=False):
    """The weights by the book, in float64: a softmax over what may be seen, zeros where that is nothing."""
    query, key = query.double().numpy(), key.double().numpy()
    key = np.repeat(key, query.shape[1] // key.shape[1], axis=1)
    scores = np.einsum("bhqd,bhkd->bhqk", query, key) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        queries, keys = scores.shape[2:]
        scores = np.where(np.arange(keys) <= np.arange(queries)[:, None], scores, -np.inf)
    if mask is not None and mask.dtype == torch.bool:
        scores = np.where(mask.numpy(), scores, -np.inf)
    elif mask is not None:
        scores = scores + mask.double().numpy()
    largest = scores.max(-1, keepdims=True)
    raised = np.exp(scores - np.where(np.isinf(largest), 0, largest))
    sums = raised.sum(-1, keepdims=True)
    return raised / np.where(sums == 0, 1, sums)


def sdpa(query, key, **options):
    """The weights as torch's fused attention has them: what it makes of the identity as values."""
    heads, keys = query.shape[1], key.shape[2]
    key = key.repeat_interleave(heads // key.shape[1], 1)
    values = torch.eye(keys, dtype=query.dtype).expand(len(query), heads, keys, keys)
    return F.scaled_dot_product_attention(query, key, values, **options)


def close(expected, actual, tolerance=1e-6):
    assert tuple(expected.shape) == tuple(actual.shape)
    np.testing.assert_allclose(np.asarray(expected, np.float64), np.asarray(actual, np.float64), rtol=0, atol=tolerance)


def joined(query, key, weights=None):
    """A call for each image and every other head, and for the first two queries and the rest."""
    blocks = []
    for image, first, queries in itertools.product(range(B), range(2), (slice(0, 2), slice(2, Q))):
        part = slice(image, image + 1), slice(first, H, 2)
        if weights is None:
            one = AttentionMap.from_query_key(query[part][:, :, queries], key[part])
        else:
            one = AttentionMap(torch.from_numpy(weights[part][:, :, queries]).float())
        blocks.append(Block(one.source, torch.arange(image * H + first, (image + 1) * H, 2), queries.start))
    return AttentionMap.from_source(Joined(blocks, (B, H, Q, K)))


@pytest.fixture(params=["dense", "dense array", "factored", "factored, grouped and masked", "joined", "joined, dense"])
def case(request):
    """A map and what its weights are, in float64."""
    if request.param == "factored, grouped and masked":
        query, key = factors(key_heads=2)
        mask = torch.rand(B, 1, Q, K, generator=torch.Generator().manual_seed(1)) < 0.7
        return AttentionMap.from_query_key(query, key, mask=mask), reference(query, key, mask=mask)
    query, key = factors()
    weights = reference(query, key)
    if request.param.startswith("joined"):
        return joined(query, key, weights if "dense" in request.param else None), weights
    if request.param == "factored":
        return AttentionMap.from_query_key(query, key), weights
    single = weights.astype(np.float32)
    return AttentionMap(single if request.param == "dense array" else torch.from_numpy(single)), weights


class TestBoth:
    def test_shape_type_and_place(self, case):
        attention, _ = case
        assert (B, H, Q, K) == attention.shape
        assert torch.float32 == attention.dtype
        assert torch.device("cpu") == attention.device
        assert ("", None) == (attention.path, attention.kind)

    @pytest.mark.parametrize(
        ("queries", "index"),
        [
            (3, [3]),
            (-1, [-1]),
            ([0, -2, 0], [0, -2, 0]),
            ((4,), [4]),
            ([], []),
            (slice(2, 5), slice(2, 5)),
            (slice(-2, None), slice(-2, None)),
            (slice(None, 100, 3), slice(None, None, 3)),
            (slice(None, None, -2), slice(None, None, -2)),
            (slice(3, 3), slice(3, 3)),
            (torch.tensor(2), [2]),
            (torch.tensor([1, 5]), [1, 5]),
            (torch.tensor([1, 0], dtype=torch.uint8), [1, 0]),
            (torch.tensor([1, -1], dtype=torch.int32), [1, -1]),
            (np.array([6, 0]), [6, 0]),
            (np.int64(2), [2]),
            (range(2), [0, 1]),
            (torch.arange(Q) % 2 == 0, slice(0, None, 2)),
            ([True] + [False] * (Q - 1), [0]),
        ],
        ids=repr,
    )
    def test_rows(self, case, queries, index):
        attention, weights = case
        close(weights[:, :, np.array(index, int) if isinstance(index, list) else index], attention.rows(queries))

    @pytest.mark.parametrize(
        ("queries", "error", "said"),
        [
            (Q, IndexError, f"there is no query {Q}: the map has {Q} queries"),
            ([0, -Q - 1], IndexError, f"there is no query {-Q - 1}: "),
            ([0.0], TypeError, "a query is an integer, not torch.float32"),
            ([True, False], TypeError, "a query is an integer, not torch.bool"),
            (None, TypeError, "a query is chosen by its number, not by None"),
            ("cat", TypeError, "a query is chosen by its number, not by 'cat'"),
        ],
    )
    def test_rows_that_are_not_there(self, case, queries, error, said):
        with pytest.raises(error) as caught:
            case[0].rows(queries)
        assert said in str(caught.value)

    def test_columns(self, case):
        attention, weights = case
        for keys in (K - 1, [0, -1], slice(None, None, 2), slice(None, None, -3), torch.arange(K) > 3):
            index = keys.numpy() if isinstance(keys, torch.Tensor) else [keys] if isinstance(keys, int) else keys
            close(weights[..., index], attention.columns(keys))
        with pytest.raises(IndexError, match=f"there is no key {K}: the map has {K} keys"):
            attention.columns(K)

    def test_all_of_it(self, case):
        attention, weights = case
        close(weights, attention.dense())
        assert torch.float32 == attention.dense().dtype
        for array in (attention.numpy(), np.asarray(attention)):
            assert isinstance(array, np.ndarray)
            close(weights, array)
        assert np.float64 == np.asarray(attention, np.float64).dtype
        close(weights[0, 1, 2:], attention[0, 1, 2:])
        close(weights[..., -1], attention[..., -1])
        close(weights, torch.stack([*attention]))
        with pytest.raises(IndexError, match="index 9 is out of bounds"):
            attention[9]

    @pytest.mark.parametrize("max_bytes", [1, B * H * K * 4 * 3, 2**30])
    def test_chunks_are_all_rows_and_no_larger_than_asked(self, case, max_bytes):
        attention, weights = case
        chunks = list(attention.chunks(max_bytes))
        close(weights, torch.cat([rows for _, rows in chunks], 2))
        assert list(range(Q)) == [query for queries, _ in chunks for query in range(Q)[queries]]
        for queries, rows in chunks:
            assert rows.shape[2] == queries.stop - queries.start
            assert rows.nbytes <= max_bytes or rows.shape[2] == 1
        assert {1: Q, B * H * K * 4 * 3: 3, 2**30: 1}[max_bytes] == len(chunks)

    def test_reduce(self, case):
        attention, weights = case
        for size in (1, 1000, 2**30):
            close(weights.max(-1), attention.reduce(lambda rows: rows.amax(-1), size))
            close(weights[..., :2], attention.reduce(lambda rows: rows[..., :2], size))

    @pytest.mark.parametrize("max_bytes", [1, B * H * K * 4 * 2, 2**30])
    @pytest.mark.parametrize("sparse", [False, True])
    def test_row_product(self, case, sparse, max_bytes, monkeypatch):
        attention, weights = case
        at_once = AttentionMap._rows_at_once
        monkeypatch.setattr(AttentionMap, "_rows_at_once", lambda self, _: at_once(self, max_bytes))
        generator = torch.Generator().manual_seed(2)
        for shape in ((B, Q), (1, Q), (B, H, 3, Q), (B, 1, 2, Q), (1, H, 1, Q)):
            r = torch.randn(shape, generator=generator, dtype=torch.float64)
            if sparse:
                r[..., [0, 2, 3]] = 0
            whole = r[:, None, None] if r.ndim == 2 else r
            expected = np.matmul(whole.numpy(), weights)
            product = attention.row_product(r)
            assert torch.float32 == product.dtype
            close(expected[:, :, 0] if r.ndim == 2 else expected, product)

    def test_row_product_computes_only_what_has_a_share(self, case, monkeypatch):
        attention, _ = case
        computed = []
        rows = type(attention.source).rows
        monkeypatch.setattr(
            type(attention.source), "rows", lambda self, which: computed.append(which) or rows(self, which)
        )
        r = torch.zeros(B, Q)
        assert 0 == attention.row_product(r).abs().max()
        assert 0 == sum(map(len, computed))
        computed.clear()
        r[0, 1], r[1, 4] = 0.5, 0.5
        attention.row_product(r)
        assert [[1, 4]] == [which.tolist() for which in computed]

    @pytest.mark.parametrize("shape", [(B, Q + 1), (B + 1, Q), (B, 3, 1, Q), (B, H, Q), (Q,), (B, H, 1, 1, Q)])
    def test_row_product_of_a_wrong_shape(self, case, shape):
        with pytest.raises(ValueError) as caught:
            case[0].row_product(torch.zeros(shape))
        for part in ("(batch, heads, any, queries)", f"({B}, {Q})", str(shape)):
            assert part in str(caught.value)

    def test_topk(self, case):
        attention, weights = case
        values, keys = attention.topk(3)
        close(np.sort(weights)[..., ::-1][..., :3], values)
        close(np.take_along_axis(weights, keys.numpy(), -1), values)
        assert (B, H, Q, K) == tuple(attention.topk(K)[1].shape)
        for k in (0, K + 1):
            with pytest.raises(ValueError, match=f"topk takes 1 to {K} keys, not {k}"):
                attention.topk(k)

    def test_to_another_device(self, case):
        attention, weights = case
        attention.path, attention.kind = "blocks.0", "self"
        moved = attention.to("meta")
        assert "meta" == moved.device.type == moved.rows(slice(1)).device.type
        again = attention.to("cpu")
        assert ("blocks.0", "self", attention.shape) == (again.path, again.kind, again.shape)
        close(weights, again.dense())

    def test_it_says_what_it_is(self, case):
        attention, _ = case
        how = "dense" if attention.is_dense else "from query and key"
        assert f"<AttentionMap ({B}, {H}, {Q}, {K}), {how}, float32, cpu>" == repr(attention)
        attention.path, attention.kind = "blocks.0", "cross"
        assert f"<AttentionMap of 'blocks.0' ({B}, {H}, {Q}, {K}), cross, {how}, float32, cpu>" == repr(attention)

    def test_its_bytes(self, case):
        attention, _ = case
        held = attention.source.tensors()
        assert sum(tensor.nbytes for tensor in held) == attention.nbytes > 0

    def test_to_a_file_and_back(self, case):
        attention, weights = case
        attention.path, attention.kind = "blocks.0", "self"
        again = AttentionMap.unpacked(attention.packed({}))
        assert (attention.path, attention.kind, attention.is_dense) == (again.path, again.kind, again.is_dense)
        close(weights, again.dense())

    def test_no_gradients_were_recorded(self, case):
        for ask in (lambda: case[0].grad_rows(0), case[0].grad_dense):
            with pytest.raises(
                RuntimeError, match=r"no gradients were recorded: use attention\(model, gradients=True\)"
            ):
                ask()


class TestDense:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool])
    def test_types(self, dtype):
        weights = torch.eye(3, dtype=torch.float32).to(dtype).expand(1, 2, 3, 3)
        attention = AttentionMap(weights)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert wide == attention.dtype == attention.rows(0).dtype == attention.dense().dtype
        close(weights.double(), attention.dense())
        assert str(dtype).removeprefix("torch.") in repr(attention)

    def test_it_is_detached(self):
        attention = AttentionMap(torch.eye(3).expand(1, 1, 3, 3).clone().requires_grad_())
        assert not attention.rows(0).requires_grad
        assert isinstance(attention.numpy(), np.ndarray)

    @pytest.mark.parametrize(
        "view", [lambda a: a[..., ::-1], lambda a: np.broadcast_to(a[:1], a.shape), lambda a: a.astype(">f8")]
    )
    def test_arrays_that_torch_cannot_take(self, view):
        array = view(np.random.default_rng(0).random((2, 1, 3, 3)))
        close(array, AttentionMap(array).dense(), 0)

    def test_errors(self):
        with pytest.raises(TypeError, match="made of a tensor or an array, not of list"):
            AttentionMap([[1.0]])
        with pytest.raises(ValueError, match=r"\(batch, heads, queries, keys\), and these have \(2, 3\)"):
            AttentionMap(torch.zeros(2, 3))
        with pytest.raises(AttributeError, match=r"an AttentionMap has no 'mean': dense\(\) has its weights"):
            AttentionMap(torch.zeros(1, 1, 2, 3)).mean(1)
        for weights in (torch.zeros(1, 1, 2, 2).to_sparse(), torch.zeros(1, 1, 2, 2, dtype=torch.complex64)):
            with pytest.raises(TypeError, match=r"real numbers in a dense tensor, and these have (complex|the layout)"):
                AttentionMap(weights)


def smallest(dtype):
    """What models write for "nothing here" where they avoid infinity."""
    return torch.finfo(dtype).min


MASKS = {
    "bool": lambda g, dtype: torch.rand(B, H, Q, K, generator=g) < 0.6,
    "bool, for all heads": lambda g, dtype: torch.rand(B, 1, Q, K, generator=g) < 0.6,
    "bool, two axes": lambda g, dtype: torch.rand(Q, K, generator=g) < 0.6,
    "bool, three axes": lambda g, dtype: torch.rand(H, Q, K, generator=g) < 0.6,
    "padding": lambda g, dtype: (torch.arange(K) < torch.tensor([[5], [K]]))[:, None, None],
    "padding of everything": lambda g, dtype: (torch.arange(K) < torch.tensor([[0], [3]]))[:, None, None],
    "one query sees nothing": lambda g, dtype: (torch.arange(Q) != 2)[:, None].expand(Q, K),
    "numbers": lambda g, dtype: torch.randn(B, H, Q, K, generator=g).to(dtype),
    "numbers, two axes": lambda g, dtype: torch.randn(Q, K, generator=g).to(dtype),
    "numbers, one for each key": lambda g, dtype: torch.randn(1, H, 1, K, generator=g).to(dtype),
    "infinity": lambda g, dtype: torch.where(torch.rand(Q, K, generator=g) < 0.5, -math.inf, 0.0).to(dtype),
    "nothing but infinity": lambda g, dtype: torch.full((B, 1, Q, K), -math.inf, dtype=dtype),
    "smallest number": lambda g, dtype: (torch.rand(B, 1, Q, K, generator=g) < 0.5).to(dtype) * smallest(dtype),
    "nothing but the smallest number": lambda g, dtype: torch.full((B, 1, 1, K), smallest(dtype), dtype=dtype),
}
OPTIONS = {
    "plain": lambda g, dtype: {},
    "scale": lambda g, dtype: {"scale": 0.7},
    "scale 0": lambda g, dtype: {"scale": 0.0},
    "causal": lambda g, dtype: {"is_causal": True},
    **{name: lambda g, dtype, make=make: {"mask": make(g, dtype)} for name, make in MASKS.items()},
}


class TestFactored:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("name", OPTIONS)
    @pytest.mark.parametrize("key_heads", [H, 2, 1], ids=["", "grouped", "multi-query"])
    def test_as_an_explicit_softmax(self, name, key_heads, dtype):
        """Computed from the same rounded inputs, in at least float32."""
        query, key = factors(key_heads=key_heads, dtype=dtype)
        options = OPTIONS[name](torch.Generator().manual_seed(3), dtype)
        attention = AttentionMap.from_query_key(query, key, **options)
        wide, tolerance = (torch.float64, 1e-12) if dtype == torch.float64 else (torch.float32, 1e-6)
        if dtype == torch.float16 and name == "nothing but the smallest number":
            tolerance = 2e-3  # beside -65504, float32 has steps of 2 ** -8 left for the scores
        expected = reference(query, key, **options)
        close(expected, attention.dense(), tolerance)
        close(expected[:, :, [4, 0]], attention.rows([4, 0]), tolerance)
        assert wide == attention.dtype == attention.dense().dtype

    @pytest.mark.parametrize(("queries", "keys"), [(7, 7), (4, 9), (9, 4), (1, 6), (6, 1)])
    @pytest.mark.parametrize("key_heads", [H, 2, 1])
    def test_causal_as_torch_has_it(self, queries, keys, key_heads):
        """From the upper left corner, however many keys there are."""
        query, key = factors(queries=queries, keys=keys, key_heads=key_heads)
        attention = AttentionMap.from_query_key(query, key, is_causal=True)
        close(sdpa(query, key, is_causal=True), attention.dense())
        close(reference(query, key, is_causal=True), attention.dense())
        close(sdpa(query, key, is_causal=True)[:, :, [-1, 0]], attention.rows([-1, 0]))

    @pytest.mark.parametrize("causal", [-2, 0, 3])
    def test_causal_from_another_corner(self, causal):
        """As with a cache of keys; with a negative number the first queries see nothing."""
        query, key = factors()
        seen = torch.arange(K) <= torch.arange(Q)[:, None] + causal
        attention = AttentionMap.from_source(Factors(query, Keys(key), K, None, None, causal))
        close(reference(query, key, mask=seen), attention.dense())

    @pytest.mark.parametrize("name", MASKS)
    def test_masks_as_torch_has_them(self, name):
        query, key = factors(key_heads=2)
        mask = MASKS[name](torch.Generator().manual_seed(4), query.dtype)
        close(sdpa(query, key, attn_mask=mask), AttentionMap.from_query_key(query, key, mask=mask).dense())

    def test_rows_of_nothing_are_zeros(self):
        query, key = factors()
        attention = AttentionMap.from_query_key(query, key, mask=torch.zeros(Q, K, dtype=torch.bool))
        assert 0 == attention.dense().abs().max()

    @given(
        batch=st.integers(1, 2), key_heads=st.integers(1, 3), group=st.integers(1, 3), queries=st.integers(1, 6),
        keys=st.integers(1, 6), width=st.integers(1, 5), causal=st.booleans(), masked=st.booleans(),
        scale=st.none() | st.floats(-3, 3), size=st.integers(1, 500), seed=st.integers(0, 99),
    )  # fmt: skip
    @settings(max_examples=60, deadline=None)
    def test_any_shape(self, batch, key_heads, group, queries, keys, width, causal, masked, scale, size, seed):
        query, key = factors(batch, key_heads * group, queries, keys, width, key_heads, seed=seed)
        mask = torch.rand(queries, keys, generator=torch.Generator().manual_seed(seed)) < 0.5 if masked else None
        options = {"scale": scale, "mask": mask, "is_causal": causal}
        attention = AttentionMap.from_query_key(query, key, **options)
        expected = reference(query, key, **options)
        close(expected, attention.dense(), 2e-6)
        close(expected, torch.cat([rows for _, rows in attention.chunks(size)], 2), 2e-6)
        close(expected.mean(2), attention.row_product(torch.full((batch, queries), 1 / queries)), 2e-6)

    def test_views_and_expanded_tensors(self):
        """As timm's, of one qkv buffer; and a query that all images share."""
        packed = torch.randn(B, K, 3, H, D, generator=torch.Generator().manual_seed(5))
        query, key, _ = packed.permute(2, 0, 3, 1, 4)
        close(reference(query, key), AttentionMap.from_query_key(query, key).dense())
        shared = query[:1].expand(B, H, K, D)
        close(reference(shared, key), AttentionMap.from_query_key(shared, key).dense())

    def test_nothing_holds_a_graph(self):
        query, key = (tensor.requires_grad_() for tensor in factors())
        mask = torch.randn(H, Q, K, requires_grad=True)
        attention = AttentionMap.from_query_key(query, key, mask=mask)
        for found in (attention.dense(), attention.row_product(torch.ones(B, Q, requires_grad=True))):
            assert not found.requires_grad
        assert not any(tensor.requires_grad for tensor in attention.source.tensors())

    @pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)])
    def test_made_and_read_under_the_modes_of_a_forward_pass(self, mode):
        with mode():
            query, key = factors()
            attention = AttentionMap.from_query_key(query, key, is_causal=True)
            inside = attention.dense(), attention.row_product(torch.full((B, Q), 1 / Q))
        expected = reference(query, key, is_causal=True)
        for weights, means in (inside, (attention.dense(), attention.row_product(torch.full((B, Q), 1 / Q)))):
            close(expected, weights)
            close(expected.mean(2), means)

    def test_the_memory_of_some_rows(self):
        """The largest tensor that anything makes is no larger than a chunk."""
        query, key = factors(1, 2, 600, 600)
        attention = AttentionMap.from_query_key(query, key, is_causal=True)
        sizes = []

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                result = function(*args, **(kwargs or {}))
                sizes.extend(one.nbytes for one in tree_leaves(result) if hasattr(one, "nbytes"))
                return result

        with Watch():
            attention.reduce(lambda rows: rows.amax(-1), 2**16)
        assert 2**16 >= max(sizes)
        assert 2**15 < max(sizes)

    def test_errors(self):
        query, key = factors()
        for name, arguments in (("query", (query[0], key)), ("key", (query, key[0]))):
            with pytest.raises(
                ValueError, match=rf"{name} has the shape \(batch, heads, tokens, width\), this one \(4"
            ):
                AttentionMap.from_query_key(*arguments)
        for other in (key[:, :3], key[..., :4], key[:1]):
            with pytest.raises(ValueError, match="do not fit"):
                AttentionMap.from_query_key(query, other)
        for shape, said in (
            ((1, 1, 1, Q, K), "a mask broadcasts to"),
            ((Q, K - 1), r"does not fit a map of \(2, 4, 7"),
        ):
            with pytest.raises(ValueError, match=said):
                AttentionMap.from_query_key(query, key, mask=torch.ones(shape, dtype=torch.bool))


def distance(score, batch, head, query, key):
    return score - (query - key).abs() * 0.1 * (head + 1) + batch


def capped(score, batch, head, query, key):
    return 2 * torch.tanh(score / 2)


def hiding(score, batch, head, query, key):
    return torch.where(key < query, score, -math.inf)  # the first query sees nothing


def causal(batch, head, query, key):
    return key <= query


def every_third(batch, head, query, key):
    return ((query + head + batch) % 3 != 0) & (key >= 0)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
class TestFlex:
    @pytest.mark.parametrize("score_mod", [None, distance, capped, hiding])
    @pytest.mark.parametrize("mask_mod", [None, causal, every_third])
    def test_as_flex_attention_has_it(self, score_mod, mask_mod):
        flex = pytest.importorskip("torch.nn.attention.flex_attention")  # since torch 2.5
        query, key = factors(queries=K, key_heads=2)
        values = torch.eye(K).expand(B, 2, K, K)
        block = None if mask_mod is None else flex.create_block_mask(mask_mod, B, H, K, K, device="cpu")
        expected = flex.flex_attention(query, key, values, score_mod, block, scale=0.4, enable_gqa=True)
        factored = Factors(query, Keys(key), K, 0.4, None, None, score_mod, mask_mod)
        attention = AttentionMap.from_source(factored, path="blocks.0", kind="self")
        close(expected, attention.dense())
        close(expected[:, :, [5, 1]], attention.rows([5, 1]))
        close(expected.sum(2), attention.row_product(torch.ones(B, K)), 1e-5)

    def test_the_functions_may_hold_parameters(self):
        bias = torch.randn(H, requires_grad=True)
        factored = Factors(*self.parts(), None, None, None, lambda score, batch, head, query, key: score * bias[head])
        assert not factored.rows(slice(None)).requires_grad

    def test_it_is_written_dense_and_stays_where_it_is(self):
        factored = Factors(*self.parts(), None, None, None, distance)
        attention = AttentionMap.from_source(factored, path="blocks.0", kind="self")
        again = AttentionMap.unpacked(attention.packed({}))
        assert again.is_dense
        close(attention.dense(), again.dense(), 0)
        close(attention.dense(), attention.to("cpu").dense(), 0)
        with pytest.raises(ValueError, match="a score_mod or block_mask cannot move"):
            attention.to("meta")

    def parts(self):
        query, key = factors()
        return query, Keys(key), K


class TestModifiers:
    """What kernels such as flash attention do to scores: two sequences in one, windows, a softcap, slopes and sinks."""

    SPANS = torch.tensor([[0, 1], [0, 2], [0, 3], [3, 4], [4, 6], [5, 9], [2, 2]])  # of Q queries among K keys
    MODIFIERS = Modifiers(
        softcap=1.5,
        spans=SPANS[None, None],
        slopes=torch.linspace(0, 1, B * H).view(B, H, 1, 1),
        places=torch.arange(Q).view(1, 1, Q, 1),
        sequences=torch.tensor([[0, 3, 0, 3], [3, 7, 3, 9]]),
    )

    def by_the_book(self, query, key, sinks=None):
        scores = torch.einsum("bhqd,bhkd->bhqk", query, key.repeat_interleave(2, 1)).double() / D**0.5
        scores = 1.5 * (scores / 1.5).tanh()
        scores -= self.MODIFIERS.slopes.double() * (torch.arange(Q)[:, None] - torch.arange(K)).abs()
        terms = torch.zeros_like(scores)
        for number, (first, behind) in enumerate(self.SPANS.tolist()):
            terms[:, :, number, first:behind] = scores[:, :, number, first:behind].exp()
        totals = terms.sum(-1, keepdim=True)
        return terms / (totals.where(totals > 0, 1) if sinks is None else totals + sinks.double().exp())

    @pytest.mark.parametrize("sinks", [None, torch.linspace(-1, 2, H).view(1, H, 1, 1)], ids=["", "sinks"])
    def test_weights_are_those_by_the_book(self, sinks):
        query, key = factors(key_heads=2)
        factored = Factors(query, Keys(key), K, modifiers=replace(self.MODIFIERS, sinks=sinks))
        expected = self.by_the_book(query, key, sinks)
        packed = factored.packed({})
        for one in (factored, factored.to("cpu"), Factors.unpacked(packed)):
            attention = AttentionMap.from_source(one, path="blocks.0", kind="self")
            close(expected, attention.dense())
            close(expected[:, :, [5, 1]], attention.rows([5, 1]))
            close(expected.sum(2), attention.row_product(torch.ones(B, Q)), 1e-5)
            [first, second] = attention.sequences
            close(expected[:, :, :3, :3], first.dense())
            close(expected[:, :, 3:6, 3:], second.rows(slice(0, 3)))
            assert (second.path, second.kind, second.shape) == ("blocks.0", "self", (B, H, 4, 6))
        close(expected[1:, 2:], factored.of_head(1, 1).rows(slice(None)))
        close(expected.transpose(0, 1), factored.arranged(lambda tensor: tensor.transpose(0, 1)).rows(slice(None)))

    def test_a_mask_is_cut_too(self):
        query, key = factors()
        mask = torch.rand(B, 1, Q, K, generator=torch.Generator().manual_seed(0)) < 0.8
        factored = Factors(query, Keys(key), K, mask=mask, modifiers=replace(self.MODIFIERS, softcap=0.0))
        attention = AttentionMap.from_source(factored)
        close(attention.dense()[:, :, :3, :3], attention.sequences[0].dense())

    def test_a_map_without_any_is_written_as_before(self):
        query, key = factors()
        assert "modifiers" not in Factors(query, Keys(key), K).packed({})
        assert AttentionMap.from_query_key(query, key).sequences == ()


class TestKeys:
    """The keys of a cache that grows, as generation has them."""

    def test_a_growing_cache_shares_a_buffer_and_older_maps_keep_their_answers(self):
        query, key = factors(queries=1, keys=60)
        given = key[:, :, :5].clone()
        keys = Keys(given)
        taken, found = 0, []
        for length in (5, 6, 7, 7, 20, 60):
            now = key[:, :, :length]
            assert keys.begins(now)
            taken += keys.grow(now)
            found.append((length, AttentionMap.from_source(Factors(query, keys, length, None, None, None))))
        for length, attention in found:
            close(reference(query, key[:, :, :length]), attention.dense())
        assert taken == keys.buffer.nbytes - given.nbytes
        assert keys.buffer.nbytes < 2 * key.nbytes
        torch.testing.assert_close(given, key[:, :, :5], rtol=0, atol=0)

    def test_what_it_was_given_is_never_written_to(self):
        _, key = factors(keys=8)
        buffer = key.clone()
        keys = Keys(buffer[:, :, :4])
        keys.grow(torch.cat([key[:, :, :4], key[:, :, :2]], 2))
        torch.testing.assert_close(buffer, key, rtol=0, atol=0)

    def test_a_file_has_the_keys_once(self):
        query, key = factors(queries=1)
        keys, shared = Keys(key[:, :, :5]), {}
        first = AttentionMap.from_source(Factors(query, keys, 5, None, None, None))
        keys.grow(key)
        second = AttentionMap.from_source(Factors(query, keys, K, None, None, None))
        packed = [attention.packed(shared) for attention in (first, second)]
        assert packed[0]["key"] is packed[1]["key"]
        for attention, again in zip((first, second), map(AttentionMap.unpacked, packed), strict=True):
            close(attention.dense(), again.dense(), 0)

    def test_few_bytes_are_copied(self):
        """The buffer grows by half, so a token at a time costs its own bytes, not those of all before it."""
        _, key = factors(keys=300)
        keys, times = Keys(key[:, :, :1].clone()), 0
        for length in range(2, 301):
            times += keys.grow(key[:, :, :length]) > 0
        assert times < 15
        torch.testing.assert_close(keys.first(300), key, rtol=0, atol=0)

    def test_what_does_not_go_on_from_it(self):
        _, key = factors()
        keys = Keys(key)
        changed = key.clone()
        changed[0, 0, 0, 0] += 1
        for other in (changed, key[:, :, :-1], key[:1], key[:, :2], key[..., :4], key.double(), key.to("meta")):
            assert not keys.begins(other)
        assert keys.begins(key)


def in_steps(given, masks=None):
    """What is held of calls with one query each that were given these keys, and what it is held of."""
    query = factors(batch=len(given[0]), queries=1)[0]
    keys, sources = Keys(given[0].clone()), []
    for now, mask in zip(given, masks or [None] * len(given), strict=True):
        keys, begin, _ = keys.step(now, sources[-1].hides) if sources else (keys, 0, 0)
        sources.append(Factors(query, keys, now.shape[2], mask=mask, begin=begin))
    for now, mask, source in zip(given, masks or [None] * len(given), sources, strict=True):
        close(reference(query, now, mask=mask), source.rows(slice(None)))
    return keys, sources


class TestStepsOfACache:
    """A step's keys are kept where those before it are, and each step keeps its answers."""

    def test_a_window(self):
        _, key = factors(keys=30)
        keys, _ = in_steps([key[:, :, max(0, end - 6) : end] for end in range(4, 31)])
        assert keys.length == 30

    def test_beams(self):
        """Each step goes on from other texts of the step before, some from the same one."""
        _, new = factors(batch=3, keys=20)
        generator = torch.Generator().manual_seed(1)
        given = [new[:1, :, :5].expand(3, -1, -1, -1)]
        for place in range(5, 20):
            parents = torch.randint(3, (3,), generator=generator)
            given.append(torch.cat([given[-1][parents], new[:, :, place : place + 1]], 2))
        keys, sources = in_steps(given)
        shared = {}
        for now, source in zip(given, sources, strict=True):
            assert torch.equal(source.key, now)
            assert torch.equal(source.to("cpu").key, now)
            again = Factors.unpacked(source.packed(shared))
            assert torch.equal(again.rows(slice(None)), source.rows(slice(None)))
        [kept] = shared.values()
        assert kept.shape[2] == keys.length == 20
        moved = {}
        assert len({source.to("cpu", moved).keys.owner for source in sources}) == 1
        assert all(torch.equal(one.to("cpu", moved).key, now) for one, now in zip(sources, given, strict=True))

    def test_texts_that_keep_their_order_have_the_same_keys(self):
        _, new = factors(batch=2, keys=8)
        turned = torch.cat([new[[1, 0], :, :6], new[:, :, 6:7]], 2)
        given = [new[:, :, :4], new[:, :, :5], new[:, :, :6], turned, torch.cat([turned, new[:, :, 7:]], 2)]
        _, sources = in_steps(given)
        assert len({source.keys for source in sources[:3]}) == len({source.keys for source in sources[3:]}) == 1
        assert len({source.keys for source in sources}) == 2

    def test_a_window_over_beams(self):
        _, new = factors(batch=2, keys=12)
        given = [new[:, :, :4]]
        for place in range(4, 12):
            last = given[-1][[1, 0]] if place % 3 else given[-1]
            given.append(torch.cat([last[:, :, -4:], new[:, :, place : place + 1]], 2))
        keys, _ = in_steps(given)
        assert keys.length == 12

    @pytest.mark.parametrize("kind", [torch.bool, torch.float32])
    def test_a_static_cache(self, kind):
        """It has room for ten keys; those that are not written yet are hidden."""
        _, new = factors(keys=10)
        ends = range(4, 11)
        masks = [(torch.arange(10) < end)[None, None, None] for end in ends]
        if kind != torch.bool:
            masks = [torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(kind).min) for mask in masks]
        keys, _ = in_steps([torch.where(torch.arange(10)[:, None] < end, new, 0) for end in ends], masks)
        assert keys.length == keys.buffer.shape[2] == 10

    def test_a_place_that_a_call_has_looked_at_is_never_written_to(self):
        _, key = factors(keys=10)
        later, earlier = key.clone(), key.clone()
        later[:, :, 6] += 1
        earlier[:, :, 2] += 1
        keys = Keys(key.clone())
        assert keys.step(later, lambda first: first > 6) is None
        assert torch.equal(keys.buffer, key)
        assert keys.step(later, lambda first: first >= 6) == (keys, 0, 0)
        earlier[:, :, 6] += 1
        assert keys.step(earlier, lambda first: True) is None
        assert torch.equal(keys.buffer, later)

    def test_what_does_not_go_on_from_it(self):
        _, key = factors(keys=8)
        other = factors(keys=9, seed=1)[1]
        for now in (other, key[:, :, :1], key.double(), key[:1], key[:, :2], torch.full_like(key, math.nan)):
            assert Keys(key.clone()).step(now, lambda first: True) is None

    def test_which_keys_are_hidden(self):
        query, key = factors(queries=2, keys=5)

        def hides(**options):
            source = Factors(query, Keys(key), 5, **options)
            return [source.hides(first) for first in range(5)]

        seen = torch.tensor([True, True, False, False, False])
        never, behind_two = [False] * 5, [False, False, True, True, True]
        assert hides() == never
        assert hides(causal=1) == [False, False, False, True, True]
        assert hides(mask=seen) == behind_two
        assert hides(mask=torch.zeros(5).masked_fill(~seen, -math.inf)) == behind_two
        assert hides(mask=torch.zeros(5).masked_fill(~seen, -1e4)) == never
        spans = torch.tensor([[0, 2], [1, 3]])[None, None]
        assert hides(modifiers=Modifiers(spans=spans)) == [False, False, False, True, True]


class TestGradient:
    @pytest.mark.parametrize("key_heads", [H, 2, 1], ids=["", "grouped", "multi-query"])
    @pytest.mark.parametrize("passes", [1, 2])
    def test_as_autograd_has_it(self, key_heads, passes):
        query, key = factors(key_heads=key_heads)
        value = factors(queries=1, width=5, key_heads=key_heads, seed=1)[1]
        weights = (query @ key.repeat_interleave(H // key_heads, 1).mT / D**0.5).softmax(-1).requires_grad_()
        output = weights @ value.repeat_interleave(H // key_heads, 1)
        output.retain_grad()
        attention = AttentionMap.from_query_key(query, key)
        attention.gradient = Gradient(attention.shape, value)
        with pytest.raises(RuntimeError, match="no backward pass has come through"):
            attention.grad_rows(0)
        for number in range(passes):
            output.grad = None
            (output**2).sum().mul(number + 1).backward(retain_graph=True)
            attention.gradient.accumulate(output.grad)
        close(weights.grad, attention.grad_dense(), 1e-5 * weights.grad.abs().max().item())
        close(weights.grad[:, :, [-1, 2]], attention.grad_rows([-1, 2]), 1e-5 * weights.grad.abs().max().item())
        assert (B, H, 0, K) == tuple(attention.grad_rows([]).shape)
        assert attention.nbytes == query.nbytes + key.nbytes + value.nbytes + output.nbytes

    def test_of_weights_that_are_there(self):
        weights = torch.rand(B, H, Q, K).requires_grad_()
        attention = AttentionMap(weights)
        attention.gradient = Gradient(attention.shape, None)
        (weights**3).sum().backward()
        attention.gradient.accumulate(weights.grad)
        kept = weights.grad.clone()
        weights.grad.zero_()
        close(kept, attention.grad_dense(), 0)
        close(kept[:, :, [1]], attention.to("cpu").grad_rows(1), 0)

    def test_half_types_become_float32(self):
        value, incoming = torch.randn(B, H, K, 5).bfloat16(), torch.randn(B, H, Q, 5).bfloat16()
        gradient = Gradient((B, H, Q, K), value)
        gradient.accumulate(incoming)
        close(incoming.double() @ value.double().mT, gradient.rows(slice(None), torch.float32), 1e-5)

    def test_it_says_why_there_is_none(self):
        attention = AttentionMap.from_query_key(*factors())
        attention.gradient = Gradient(attention.shape, None, "dropout was on")
        with pytest.raises(RuntimeError, match="dropout was on"):
            attention.grad_dense()


class TestStitched:
    """Windows as one map of the whole picture: a shifted grid that they do not fill, of two pictures."""

    layout = Layout.picture((3, 4), windows=Windows((2, 2), (1, 1), pads_first=False))

    @pytest.fixture(params=["weights", "factors"])
    def windows(self, request):
        places = len(self.layout.windows.places(3, 4))
        query, key = factors(2 * places, 2, 4, 4)
        made = AttentionMap.from_query_key(query, key)
        return made if request.param == "factors" else AttentionMap(made.dense())

    def test_each_weight_lies_at_its_patches(self, windows):
        places, weights = self.layout.windows.places(3, 4), windows.dense()
        expected = torch.zeros(2, 2, 12, 12)
        for picture, (window, place) in itertools.product(range(2), enumerate(places.tolist())):
            for i, j in itertools.product(range(4), repeat=2):
                if min(place[i], place[j]) >= 0:
                    expected[picture, :, place[i], place[j]] = weights[picture * len(places) + window, :, i, j]
        whole = windows.stitched(self.layout)
        assert (2, 2, 12, 12) == whole.shape
        torch.testing.assert_close(whole.dense(), expected)
        torch.testing.assert_close(whole.rows([11, 0, 5]), expected[:, :, [11, 0, 5]])
        torch.testing.assert_close(torch.cat([rows for _, rows in whole.chunks(500)], 2), expected)
        again = AttentionMap.unpacked(whole.packed({})).to("cpu")
        torch.testing.assert_close(again.rows(slice(3, 9, 2)), expected[:, :, 3:9:2])
        assert whole.rows([]).shape == (2, 2, 0, 12)
        assert Layout.picture((3, 4)) == again.layout == again.query_layout

    def test_gradients_lie_at_the_same_patches(self, windows):
        """A gradient that is as large as the weight lies where the weight does."""
        assert windows.stitched(self.layout).gradient is None
        windows.gradient = Gradient(windows.shape, None)
        whole = windows.stitched(self.layout)
        assert whole.gradient.is_awaited
        with pytest.raises(RuntimeError, match="not known yet"):
            whole.grad_dense()
        windows.gradient.accumulate(windows.dense())
        torch.testing.assert_close(whole.to("cpu").grad_dense(), whole.dense())
        assert whole.nbytes > windows.stitched(self.layout).source.tensors()[0].nbytes

    def test_what_is_not_of_windows_stays_as_it_is(self, windows):
        assert windows.stitched() is windows
        with pytest.raises(ValueError, match=r"4 windows of 4 tokens a picture.*\(7, 2, 4, 4\)"):
            AttentionMap(windows.dense()[:7]).stitched(self.layout)


def test_a_chunk_fits_a_cache():
    assert 2**20 <= attention_map.CHUNK <= 2**25


@pytest.mark.parametrize("groups", [1, 2])
def test_columns_of_a_long_map_come_from_one_more_fused_call(groups: int) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 50, 8), torch.randn(2, 4 // groups, 70, 8)
    attention = AttentionMap.from_query_key(query, key)
    assert attention.source.columns(torch.tensor([3, 69])) is not None
    torch.testing.assert_close(attention.columns([3, -1, 3]), attention.dense()[..., [3, 69, 3]], atol=1e-6, rtol=0)
    masked = AttentionMap.from_query_key(query, key, mask=torch.rand(50, 70) > 0.5)
    assert masked.source.columns(torch.tensor([3])) is None
    torch.testing.assert_close(masked.columns([3]), masked.dense()[..., [3]])


def test_columns_come_from_the_sums_that_a_kernel_told_if_these_are_right() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8)
    attention, expected = AttentionMap.from_query_key(query, key), AttentionMap.from_query_key(query, key).dense()
    sums = (query @ key.repeat_interleave(2, 1).mT / 8**0.5).logsumexp(-1)
    for told in (sums, sums + 1):
        attention.source.log_sums = told
        torch.testing.assert_close(attention.columns([3, -1]), expected[..., [3, 6]])
    assert attention.source.columns(torch.tensor([3])) is None
    attention.source.log_sums = sums
    assert attention.source.columns(torch.tensor([3])) is not None
