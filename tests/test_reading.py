"""What counts as attention is one rule: each entrance reads each form alike, and refuses the rest for one reason."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from visualizer import AttentionMap, VisualizerWarning, analysis, attention, capture, explore, plot
from visualizer.analysis.layers import layers_of, maps_of, without_nan
from visualizer.plot.selection import select_layers
from visualizer.reading import RowCheck, as_numbers, check_least, check_not_empty, layers_in
from visualizer.statistics import MeanMap

L, H, N = 2, 3, 4


def random_weights(*shape, seed=0):
    raised = np.exp(np.random.default_rng(seed).normal(size=shape))
    return raised / raised.sum(-1, keepdims=True)


class Foreign:
    """An array of a library that nobody here knows."""

    def __init__(self, array):
        self._array, self.shape, self.ndim = array, array.shape, array.ndim

    def __getitem__(self, index):
        return Foreign(self._array[index])

    def __array__(self, dtype=None, copy=None):
        return self._array if dtype is None else self._array.astype(dtype)


def captured(weights):
    def attend(layer):
        attn = weights[layer]
        return layer

    with capture(attend, "attn") as found:
        for layer in range(len(weights)):
            attend(layer)
    return found


def drawn(maps):
    """(layers, 1, heads, queries, keys), as the plots read them."""
    return np.stack([weights[None] for weights in select_layers(maps, batch=0, head=None, query=None)])


def explored(maps):
    """The weights on a page: these are few enough keys that all are exact."""
    [example] = explore(maps)._examples
    weights = np.zeros(example.codes.shape, np.float32)
    np.put_along_axis(weights, example.top_keys.astype(int), example.top, -1)
    return weights[:, None]


def analysed(maps):
    """The weights, from an analysis that gives rows."""
    read = layers_of(maps)
    again = np.stack([layer.numpy() for layer in read.layers])
    first = np.asarray(analysis.cls_attention(maps if not hasattr(maps, "__next__") else read.layers, prefix_tokens=0))
    np.testing.assert_array_equal(first.reshape(again[:, :, :, 0].shape), again[:, :, :, 0])
    return again


def collected(maps):
    statistic = MeanMap()
    statistic.update(maps)
    return np.asarray(statistic.compute().mean)[:, None]


ENTRANCES = {"analysis": analysed, "plot": drawn, "explorer": explored, "statistics": collected}

# Each makes the input of (layers, 1, heads, queries, keys) in float32.
SEVERAL = {
    "array of five axes": lambda w: w,
    "tensor of five axes": torch.from_numpy,
    "list of arrays": list,
    "tuple of tensors": lambda w: tuple(torch.from_numpy(w)),
    "tensors that need gradients": lambda w: list(torch.from_numpy(w).clone().requires_grad_()),
    "float64": lambda w: w.astype(np.float64),
    "bfloat16": lambda w: torch.from_numpy(w).bfloat16(),
    "float16": lambda w: list(w.astype(np.float16)),
    "read-only, backwards": lambda w: np.broadcast_to(w[::-1].copy(), w.shape)[::-1],
    "maps": lambda w: [AttentionMap(layer) for layer in w],
    "maps, arrays and tensors": lambda w: [AttentionMap(w[0]), *torch.from_numpy(w[1:2]), *w[2:]],
    "generator": lambda w: (AttentionMap(layer) for layer in w),
    "layers of three axes": lambda w: list(w[:, 0]),
    "tensors of three axes": lambda w: list(torch.from_numpy(w[:, 0])),
    "another library's arrays": lambda w: [Foreign(layer) for layer in w],
    "another library's five axes": Foreign,
    "captured": lambda w: captured(list(w)),
    "a key for each layer": lambda w: {f"blocks.{number}": [layer] for number, layer in enumerate(w)},
    "a key for each map": lambda w: {f"blocks.{number}": layer for number, layer in enumerate(w)},
    "a key for all layers": lambda w: {"Attention.forward": list(w), "never ran": []},
    "a key for a tuple": lambda w: {"attentions": tuple(torch.from_numpy(w))},
    "a key for five axes": lambda w: {"all": w},
}
# Each makes the input of (heads, queries, keys).
ONE = {
    "array of three axes": lambda w: w,
    "array of four axes": lambda w: w[None],
    "tensor of three axes": torch.from_numpy,
    "tensor of four axes": lambda w: torch.from_numpy(w[None]),
    "map": lambda w: AttentionMap(w[None]),
    "nested lists": lambda w: w.tolist(),
    "another library's array": Foreign,
}
LAYERS_OF_ARRAYS = {
    "array of five axes", "list of arrays", "float64", "float16", "read-only, backwards", "layers of three axes",
    "another library's arrays", "another library's five axes", "captured", "a key for each layer", "a key for each map",
    "a key for all layers", "a key for five axes",
}  # fmt: skip


@pytest.mark.parametrize("form", SEVERAL)
@pytest.mark.parametrize("entrance", ENTRANCES)
def test_every_entrance_reads_layers_in_every_form(entrance, form):
    weights = random_weights(L, 1, H, N, N).astype(np.float32)
    tolerance = 4e-3 if form in ("bfloat16", "float16") else 1e-7
    np.testing.assert_allclose(weights, ENTRANCES[entrance](SEVERAL[form](weights)), rtol=0, atol=tolerance)


@pytest.mark.parametrize("form", ONE)
@pytest.mark.parametrize("entrance", ENTRANCES)
def test_every_entrance_reads_one_map_in_every_form(entrance, form):
    weights = random_weights(H, N, N).astype(np.float32)
    np.testing.assert_allclose(weights[None, None], ENTRANCES[entrance](ONE[form](weights)), rtol=0, atol=1e-7)


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy, np.ndarray.tolist], ids=["array", "tensor", "lists"])
@pytest.mark.parametrize("entrance", ENTRANCES)
def test_every_entrance_reads_queries_by_keys_as_one_head_of_one_image(entrance, make):
    weights = random_weights(N, 5).astype(np.float32)
    np.testing.assert_allclose(weights[None, None, None], ENTRANCES[entrance](make(weights)), rtol=0, atol=1e-7)


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_every_entrance_reads_what_attention_recorded(entrance):
    class Model(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    x = torch.randn(1, H, N, 8)
    model = Model()
    with attention(model) as maps:
        model(x)
    expected = (x @ x.mT / 8**0.5).softmax(-1).numpy()
    np.testing.assert_allclose(expected[None], ENTRANCES[entrance](maps), rtol=0, atol=1e-6)


def test_reading_says_whether_it_was_one_and_whether_there_were_arrays_alone():
    weights = random_weights(L, 1, H, N, N).astype(np.float32)
    for form, make in SEVERAL.items():
        read = maps_of(make(weights))
        assert (False, form in LAYERS_OF_ARRAYS) == (read.is_one, read.are_arrays), form
        assert all(isinstance(layer, AttentionMap) for layer in read.layers)
    for form, make in ONE.items():
        read = maps_of(make(weights[0, 0]))
        assert (True, "tensor" not in form and form != "map") == (read.is_one, read.are_arrays), form


def test_a_map_is_read_as_itself_and_nothing_is_copied():
    weights = torch.rand(1, H, N, N)
    layer = AttentionMap(weights)
    assert layer is layers_in(layer).layers[0] is maps_of([layer]).layers[0] is layers_of(layer).layers[0]
    assert weights is layers_in([weights]).layers[0]
    assert weights.data_ptr() == layers_in(weights[0]).layers[0].data_ptr()
    assert [weights] == layers_in({"attn": [weights]}).sources


def test_layers_of_one_key_keep_their_axis():
    """A cache has layers, even one: the result has an axis for them."""
    weights = random_weights(1, H, N, N)
    assert (1, 1, H, N) == analysis.entropy({"attn": [weights]}).shape == analysis.entropy({"attn": weights}).shape
    assert (1, H, N) == analysis.entropy(weights).shape == analysis.entropy(weights[0]).shape


@pytest.mark.parametrize("name", ["entropy", "received", "confidence", "attention_distance", "rollout"])
@pytest.mark.parametrize("axes", [2, 3])
def test_analyses_of_fewer_axes_are_those_of_a_batch_of_one(name, axes):
    weights = random_weights(1, H if axes == 3 else 1, 9, 9)
    few = weights[0] if axes == 3 else weights[0, 0]
    options = {"query": 0} if name == "rollout" else {}
    np.testing.assert_array_equal(getattr(analysis, name)(weights, **options), getattr(analysis, name)(few, **options))


def test_gradients_of_fewer_axes_are_those_of_a_batch_of_one():
    weights = torch.rand(H, N, N, requires_grad=True)
    (weights.softmax(-1) ** 2).sum().backward()
    whole = analysis.relevance(weights[None].detach(), gradients=weights.grad[None])
    torch.testing.assert_close(whole, analysis.relevance(weights), rtol=0, atol=0)
    torch.testing.assert_close(whole, analysis.relevance([weights.detach()], gradients=[weights.grad]), rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
def test_a_sparse_map_is_read_with_its_zeros(layout):
    weights = torch.eye(4).roll(1, 0)
    with warnings.catch_warnings(action="ignore"):  # of torch, that CSR is in beta
        sparse = getattr(weights, layout)()
    torch.testing.assert_close(analysis.received(weights), analysis.received(sparse), rtol=0, atol=0)
    np.testing.assert_array_equal(weights, plot.head(sparse).images[0].get_array())


NO_MAPS = ["there are no attention maps here", 'attn_implementation="eager"', "visualizer.attention(model)"]


@pytest.mark.parametrize(
    ("form", "error", "said"),
    [
        (None, ValueError, [*NO_MAPS, "got None"]),
        ((None, None), ValueError, [*NO_MAPS, "a tuple of None"]),
        ({"attn": [None]}, ValueError, [*NO_MAPS, "a list of None"]),
        ({"attn": None}, ValueError, NO_MAPS),
        ([], ValueError, [*NO_MAPS, "a list without entries"]),
        ({}, ValueError, [*NO_MAPS, "a dict without entries"]),
        ({"attn": []}, ValueError, NO_MAPS),
        (np.zeros((0, 1, 1, 2, 2)), ValueError, [*NO_MAPS, "(0, 1, 1, 2, 2)"]),
        ("attn", TypeError, ["not of str"]),
        (5, TypeError, ["not of int"]),
        (["a", "b"], TypeError, ["expected numbers"]),
        (np.ones(3) / 3, ValueError, ["(3,)", "(queries, keys)", "(layers, batch, heads, queries, keys)"]),
        (np.zeros((1, 1, 1, 1, 2, 2)), ValueError, ["(1, 1, 1, 1, 2, 2)"]),
        ([torch.zeros(1, 1, 1, 2, 2)], ValueError, ["layer 0 has the shape (1, 1, 1, 2, 2)"]),
        ([[np.eye(2), np.eye(2)]], ValueError, ["a list of 1 lists of maps", "generate()", "attentions[step]"]),
        ([[0.5, 0.5], [1.0]], ValueError, ["ragged"]),
        (np.full((2, 2), 0.5j), TypeError, ["complex128", "real numbers"]),
        (torch.full((2, 2), 0.5j), TypeError, ["torch.complex64", "real numbers"]),
        (np.array([["a", "b"]]), TypeError, ["<U1", "real numbers"]),
        (torch.zeros(2, 2, device="meta"), TypeError, ["on the meta device"]),
        (np.ma.masked_less(np.eye(2), 0.5), TypeError, ["a masked array", "array.filled(0)"]),
        (
            {"a": [np.eye(2), np.eye(2)], "b": [np.eye(2)]},
            ValueError,
            ["'a' (2 values)", "each key must have one map", "values[-1]"],
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("entrance", ENTRANCES)
def test_every_entrance_refuses_for_one_reason(entrance, form, error, said):
    with pytest.raises(error) as caught:
        ENTRANCES[entrance](form)
    for part in said:
        assert part in str(caught.value)


def test_what_a_model_of_transformers_returns_is_read_for_its_attentions():
    outputs = pytest.importorskip("transformers.modeling_outputs", reason="needs transformers")
    maps, hidden = (torch.eye(3).expand(1, 2, 3, 3),), torch.zeros(1, 3, 8)
    read = layers_in(outputs.BaseModelOutput(last_hidden_state=hidden, attentions=maps)).layers
    assert [(1, 2, 3, 3)] == [tuple(layer.shape) for layer in read]
    with pytest.raises(ValueError, match=r"got a BaseModelOutput without attentions.*output_attentions=True"):
        layers_in(outputs.BaseModelOutput(last_hidden_state=hidden))
    encoder = outputs.BaseModelOutputWithCrossAttentions(hidden, attentions=maps, cross_attentions=())
    assert 1 == len(layers_in(encoder).layers)
    both = outputs.Seq2SeqModelOutput(last_hidden_state=hidden, decoder_attentions=maps, cross_attentions=maps)
    with pytest.raises(ValueError, match="has decoder_attentions, cross_attentions: pass one of them"):
        layers_in(both)


class TestWeights:
    @pytest.mark.parametrize("entrance", ENTRANCES)
    def test_rounding_below_zero_is_zero(self, entrance):
        weights = np.array([[1.0, -1e-7], [0.5, 0.5]], np.float32)
        found = ENTRANCES[entrance](weights)[0, 0, 0]
        np.testing.assert_allclose([[1, 0], [0.5, 0.5]], found, rtol=0, atol=1.1e-7)
        assert entrance == "plot" or found.min() == 0, "a plot draws numbers as they are"

    @pytest.mark.parametrize("entrance", ["analysis", "explorer", "statistics"])
    @pytest.mark.parametrize("make", [np.asarray, torch.tensor], ids=["array", "tensor"])
    def test_scores_are_no_weights(self, entrance, make):
        with pytest.raises(ValueError, match=r"layer 1 holds -0\.5.* are these scores before the softmax\? Take"):
            ENTRANCES[entrance]([make([[0.5, 0.5], [0.5, 0.5]]), make([[0.5, 0.5], [1.5, -0.5]])])

    def test_plots_draw_scores_with_a_warning(self):
        with pytest.warns(VisualizerWarning, match=r"1 of 2 rows do not sum to 1 .*2.5.*: are these scores before the"):
            plot.head(np.array([[3.0, -0.5], [0.5, 0.5]]))
        plt.close("all")

    @pytest.mark.parametrize("entrance", ENTRANCES)
    def test_infinite_values_are_refused(self, entrance):
        for value in (np.inf, -np.inf):
            with pytest.raises(ValueError, match="holds infinite values, and attention weights are finite"):
                ENTRANCES[entrance](np.array([[value, 0.5], [0.5, 0.5]]))

    @pytest.mark.parametrize(("entrance", "shown"), [("plot", "left blank"), ("explorer", "shown as zeros")])
    def test_rows_of_nan_are_told(self, entrance, shown):
        weights = np.array([[np.nan, np.nan], [0.5, 0.5]])
        with pytest.warns(VisualizerWarning, match=f"1 of 2 rows hold NaN and are {shown} "):
            found = ENTRANCES[entrance](weights)[0, 0, 0]
        expected = weights if entrance == "plot" else np.nan_to_num(weights)
        np.testing.assert_array_equal(expected, found)

    def test_rows_of_nan_are_zeros_in_an_analysis(self):
        weights = np.array([[np.nan, np.nan], [0.5, 0.5]])
        np.testing.assert_array_equal(np.nan_to_num(weights), analysed(weights)[0, 0, 0])

    def test_a_map_without_faults_is_not_copied_to_be_checked(self, monkeypatch):
        layer = AttentionMap(torch.full((1, 2, 600, 600), 1 / 600, dtype=torch.float16))
        monkeypatch.setattr(AttentionMap, "dense", lambda self: pytest.fail("it was copied"))
        assert layer is without_nan(layer)

    def test_maps_keep_who_they_are_without_nan(self):
        layer = AttentionMap(torch.full((1, 1, 2, 2), torch.nan), path="blocks.3", kind="self")
        clean = without_nan(layer)
        assert ("blocks.3", "self", 0.0) == (clean.path, clean.kind, clean.dense().abs().max().item())
        with pytest.raises(ValueError, match=r"layer 7 \('blocks.3'\) holds -1, and"):
            without_nan(AttentionMap(torch.full((1, 1, 2, 2), -1.0), path="blocks.3"), 7)

    def test_empty_maps(self):
        assert (0, 2, 3) == analysis.entropy(np.zeros((0, 2, 3, 3))).shape
        with pytest.raises(ValueError, match=r"layer 1 is empty: .* its shape is \(1, 0, 5, 5\)"):
            check_not_empty([np.eye(2)[None, None], np.zeros((1, 0, 5, 5))])


class TestRowCheck:
    def test_it_counts_over_all_that_it_looks_at(self):
        check = RowCheck()
        assert [False, True] == check.look(np.array([[0.5, 0.5], [np.nan, 0.5]], np.float16), "layer 0").tolist()
        check.look(np.array([[[0.0, 0.0], [0.9, 0.9]], [[0.2, 0.1], [0.505, 0.505]]]), "layer 1")
        with pytest.warns(VisualizerWarning) as caught:
            check.warn("left blank", "drawn")
        nan, odd = (str(one.message) for one in caught)
        assert nan.startswith("1 of 6 rows hold NaN and are left blank")
        assert odd.startswith("2 of 6 rows do not sum to 1 (sums from 0.3 to 1.8)")
        assert odd.endswith("They are drawn as they are (docs/errors.md#rows-that-do-not-sum-to-1)")

    def test_it_says_nothing_of_attention(self):
        check = RowCheck()
        check.look(random_weights(2, 3, 5, 5).astype(np.float16), "layer 0")
        check.look(np.zeros((3, 3)), "a masked row of a fused kernel")
        check.warn("left blank", "drawn")

    def test_the_least(self):
        check_least(-1e-6, "layer 0")
        with pytest.raises(ValueError, match="layer 0 holds -2e-06, and attention weights are finite and not negative"):
            check_least(-2e-6, "layer 0")


class TestNumbers:
    @pytest.mark.parametrize(
        ("value", "dtype"),
        [
            ([[1, 2]], np.float32),
            (np.ones(2, np.float64), np.float64),
            (np.ones(2, np.float16), np.float32),
            (np.ones(2, bool), np.float32),
            (torch.ones(2, dtype=torch.bfloat16, requires_grad=True), np.float32),
            (torch.ones(2, dtype=torch.int64), np.float32),
        ],
    )
    def test_they_are_floats_of_at_least_32_bits(self, value, dtype):
        assert dtype == as_numbers(value).dtype
        np.testing.assert_array_equal(np.ones_like(as_numbers(value)) * as_numbers(value), as_numbers(value))

    @pytest.mark.parametrize(
        ("value", "error", "said"),
        [
            ([[1], [1, 2]], ValueError, "rates is a ragged list"),
            (["a"], TypeError, "rates: expected numbers, got list of <U1"),
            (np.ones(2, complex), TypeError, "rates: expected numbers, got ndarray of complex128"),
        ],
    )
    def test_what_is_none_is_refused(self, value, error, said):
        with pytest.raises(error, match=said):
            as_numbers(value, "rates")


def test_reading_needs_no_torch():
    code = (
        "import sys, numpy as np; from visualizer.reading import layers_in\n"
        "assert len(layers_in([np.eye(3)] * 2).layers) == 2; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (0, "False\n") == (done.returncode, done.stdout), done.stderr


class TestPublicNames:
    def test_each_file_of_the_analyses_names_what_is_public(self):
        files = [file for name, file in sys.modules.items() if name.startswith("visualizer.analysis.")]
        files = [file for file in files if hasattr(file, "__all__")]
        names = [name for file in files for name in file.__all__]
        assert sorted(names) == sorted(set(names)) == sorted(analysis.__all__)
        for file in files:
            assert sorted(file.__all__) == file.__all__
            assert f"`{file.__name__.rpartition('.')[2]}`" in analysis.__doc__, "the package's page says what is in it"
            for name in file.__all__:
                assert getattr(file, name) is getattr(analysis, name) and getattr(analysis, name).__doc__
