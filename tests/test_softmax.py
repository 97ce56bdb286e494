"""The open softmax: what may happen to scores and to weights. The map is what is multiplied with the values."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from visualizer import VisualizerWarning, analysis, attention


class Written(nn.Module):
    """Attention of one head, as a function writes it; it keeps what it multiplies with the values."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        self.weights = self.function(x)
        return self.weights @ x


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.fixture
def x():
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


def map_of(function, x):
    model = Written(function)
    before = model(x)
    with attention(model) as maps:
        after = model(x)
    assert torch.equal(before, after)
    [found] = maps
    assert torch.equal(found.dense()[:, 0], model.weights)
    return found


def scores(x, factor=1.0):
    return x @ x.mT * factor / 8**0.5


SCORES = {
    "a floor": lambda s: torch.max(s, torch.tensor(-2.0)),
    "a floor as a method": lambda s: s.maximum(torch.tensor(-2.0)),
    "abs": lambda s: s.abs(),
    "power": lambda s: -(s**2),
    "softcap": lambda s: 5 * (s / 5).tanh(),
    "sigmoid": lambda s: torch.sigmoid(s),
    "exp and log": lambda s: torch.log1p(torch.exp(s)),
    "a mask": lambda s: s.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -torch.inf),
    "a mask in place": lambda s: s.masked_fill_(torch.ones(5, 5, dtype=torch.bool).triu(1), -torch.inf),
    "less the largest": lambda s: s - s.amax(-1, keepdim=True),
    "a bias": lambda s: s + torch.arange(5.0),
    "tril": lambda s: s.tril(),
    "lerp": lambda s: torch.lerp(s, torch.zeros(()), 0.5),
}


@pytest.mark.parametrize("name", SCORES)
def test_between_scores_and_softmax(x, name):
    found = map_of(lambda x: SCORES[name](scores(x)).softmax(-1), x)
    assert found.softmaxes == ()


def softmax_of_nothing(x, where=2):
    mask = torch.arange(5) == where
    return scores(x).masked_fill(mask[:, None], -torch.inf).softmax(-1)


def divided(weights):
    return weights / weights.sum(-1, keepdim=True)


def in_place(s):
    s -= s.amax(-1, keepdim=True)
    s = s.exp_()
    s /= s.sum(-1, keepdim=True)
    return s


BY_HAND = {
    "exp": lambda s: divided(s.exp()),
    "exp2": lambda s: divided((s * 1.4427).exp2()),
    "less the largest": lambda s: divided((s - s.amax(-1, keepdim=True)).exp()),
    "the largest less them": lambda s: divided((-(s.amax(-1, keepdim=True) - s)).exp()),
    "times one by the sum": lambda s: s.exp() * (1 / s.exp().sum(-1, keepdim=True)),
    "less the logarithm of the sum": lambda s: (s - s.logsumexp(-1, keepdim=True)).exp(),
    "log_softmax": lambda s: s.log_softmax(-1).exp(),
    "less the largest, then softmax": lambda s: (s - s.amax(-1, keepdim=True)).softmax(-1),
    "in place": in_place,
    "in another shape": lambda s: divided((s - s.amax(-1, keepdim=True)).exp().unsqueeze(1)).squeeze(1),
}


def less(s):
    return s - s.amax(-1, keepdim=True)


def empty(s, row):
    return s.masked_fill(row == 2, -torch.inf)


ONE = torch.zeros(5, 5)
ONE[1, 3] = torch.nan
LOST = {
    "filled": lambda s, row: divided(less(empty(s, row)).masked_fill(row == 4, torch.nan).exp()),
    "filled, then softmax": lambda s, row: torch.where(row == 4, torch.nan, less(empty(s, row))).softmax(-1),
    "made numbers, then filled": lambda s, row: divided(
        less(empty(s, row)).nan_to_num(0).masked_fill(row == 4, torch.nan).exp()
    ),
    "one number": lambda s, row: divided((less(empty(s, row)) + ONE).exp()),
    "a power": lambda s, row: divided(less(empty(s, row)).pow(torch.where(row == 4, 0.5, 1.0)).exp()),
    "a bias": lambda s, row: (empty(s, row) + torch.where(row == 2, torch.nan, 0.0)).softmax(-1),
    "scores of zeros": lambda s, row: (s.masked_fill(row == 2, 0).abs() / (row != 2)).softmax(-1),
    "a scale": lambda s, row: (s.abs() * torch.where(row == 2, torch.nan, 1.0)).softmax(-1),
}


ROW_LOST = dict.fromkeys(LOST, 4) | dict.fromkeys(("a bias", "scores of zeros", "a scale"), 2) | {"one number": 1}


EMPTY = {
    "alone": lambda w: w,
    "in another shape": lambda w: w.unsqueeze(0).squeeze(0),
    "dropped": lambda w: F.dropout(w, 0.5),
    "less another": lambda w: w - 0.3 * w.pow(2),
    "with zeros in it": lambda w: w.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), 0),
}


MOVED = {
    "for more heads": lambda w: w.repeat_interleave(2, 1),
    "expanded": lambda w: w[:, :1].expand(-1, 3, -1, -1),
    "heads in another order": lambda w: w.flip(1),
    "queries in another order": lambda w: w.flip(2),
    "queries rolled": lambda w: w.roll(1, 2),
    "turned twice": lambda w: w.mT.contiguous().mT,
    "split and put together": lambda w: torch.cat(w.split(2, 2), 2),
    "one head put behind another": lambda w: torch.cat([w[:, :1].roll(2, 2), w[:, 1:]], 1),
    "mixed": lambda w: torch.einsum("bhij,hg->bgij", w, torch.tensor([[0.5, 0.25], [0.5, 0.75]])),
    "less another": lambda w: w[:, :1] - 0.3 * w[:, 1:],
    "sorted": lambda w: w[:, :, [4, 2, 0, 1, 3]],
}


def by_hand(s, axis):
    terms = (s - s.amax(axis, keepdim=True)).exp()
    return terms / terms.sum(axis, keepdim=True)


def heads_last(x, fill):
    h = x.unflatten(-1, (2, 4))
    weights = by_hand(fill(torch.einsum("bihd,bjhd->bijh", h, h), 1), 2)
    return torch.einsum("bijh,bjhd->bihd", weights, h).flatten(2)


ELSEWHERE = {
    "keys first, matmul": lambda x, fill: by_hand(fill(x @ x.mT, 2), 1).mT @ x,
    "keys first, values times them": lambda x, fill: (x.mT @ by_hand(fill(x @ x.mT, 2), 1)).mT,
    "keys first, einsum": lambda x, fill: torch.einsum("bji,bjd->bid", by_hand(fill(x @ x.mT, 2), 1), x),
    "keys first, einsum of values": lambda x, fill: torch.einsum("bjd,bji->bid", x, by_hand(fill(x @ x.mT, 2), 1)),
    "keys first, summed": lambda x, fill: (by_hand(fill(x @ x.mT, 2), 1)[..., None] * x[:, :, None]).sum(1),
    "heads last": heads_last,
}


class TestQueriesThatMayAttendToNothing:
    """The model's weights and output are no numbers there, the map is zero, as that of a fused call."""

    @pytest.mark.parametrize("name", EMPTY)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_are_zeros_in_the_map(self, x, name, dtype):
        model = Written(lambda x: EMPTY[name](softmax_of_nothing(x)))
        with attention(model) as maps:
            y = model(x.to(dtype))
        assert y[:, 2].isnan().all()  # the model's own
        [found] = maps
        for one in (found, *found.softmaxes):
            assert torch.equal(one.dense()[:, 0, 2], torch.zeros(2, 5))
            assert not one.dense().isnan().any()
        assert analysis.entropy(found)[:, 0].isnan().tolist() == [[False, False, True, False, False]] * 2

    @pytest.mark.parametrize("name", BY_HAND)
    @pytest.mark.parametrize("product", ["matmul", "einsum", "sum"])
    def test_are_zeros_where_the_softmax_is_written_by_hand(self, x, name, product):
        def function(x, is_empty=True):
            s = scores(x).masked_fill((torch.arange(5) == 2)[:, None], -torch.inf if is_empty else 0)
            weights = BY_HAND[name](s)
            if product == "matmul":
                return weights @ x
            return (
                torch.einsum("bij,bjd->bid", weights, x)
                if product == "einsum"
                else (weights[..., None] * x[:, None]).sum(2)
            )

        for is_empty in (True, False):
            model = Calls(lambda x, is_empty=is_empty: function(x, is_empty))
            with attention(model) as maps:
                y = model(x)
            assert y[:, 2].isnan().all() == is_empty
            expected = scores(x).softmax(-1)
            expected[:, 2] = 0 if is_empty else 0.2
            torch.testing.assert_close(maps[0].dense()[:, 0], expected)

    @pytest.mark.parametrize("name", BY_HAND)
    def test_lost_numbers_of_a_softmax_by_hand_stay(self, x, name):
        x[:, 3, 0] = torch.nan
        model = Written(lambda x: BY_HAND[name](scores(x).masked_fill((torch.arange(5) == 2)[:, None], -torch.inf)))
        with attention(model) as maps:
            model(x)
        lost = torch.arange(5) != 2  # of all other queries, for key 3 has no numbers
        assert torch.equal(maps[0].dense()[:, 0].isnan(), lost[:, None].expand(2, 5, 5))

    @pytest.mark.parametrize("name", LOST)
    def test_numbers_that_are_lost_in_other_rows_stay_lost(self, x, name):
        model = Written(lambda x: LOST[name](scores(x), torch.arange(5)[:, None]))
        with attention(model) as maps:
            model(x)
        lost = torch.arange(5) == ROW_LOST[name]
        assert torch.equal(model.weights.isnan().any(-1), (lost | (torch.arange(5) == 2)).expand(2, 5)) == (
            name != "made numbers, then filled"
        )
        assert torch.equal(maps[0].dense()[:, 0].isnan(), lost[:, None].expand(2, 5, 5))

    def test_are_zeros_where_a_mode_counts_operators(self, x):
        model = Written(softmax_of_nothing)
        with attention(model) as maps, FlopCounterMode(display=False):
            model(x)
        assert torch.equal(maps[0].dense()[:, 0, 2], torch.zeros(2, 5))

    def test_exponentials_that_are_too_small_are_no_rows_without_keys(self):
        model = Written(lambda x: divided((scores(x) - 1000).exp()))
        with attention(model) as maps:
            model(torch.randn(2, 5, 8))
        assert maps[0].dense().isnan().all()

    def test_cosines_of_a_vector_of_zeros_are_no_numbers(self, x):
        x = x.relu()
        x[:, 2] = 0
        norm = x.norm(dim=-1, keepdim=True)
        model = Written(lambda x: (x @ x.mT / norm / norm.mT).softmax(-1))
        with attention(model) as maps:
            model(x)
        assert maps[0].dense().isnan().all()

    def test_others_are_what_the_model_used(self, x):
        found = {}
        for is_fused in (False, True):
            mask = (torch.arange(5) != 2)[:, None].expand(5, 5)

            def fused(x, mask=mask):
                return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], mask)

            def by_hand(x):
                return softmax_of_nothing(x) @ x

            model = Calls(fused if is_fused else by_hand)
            with attention(model) as maps:
                model(x)
            found[is_fused] = maps[0].dense()
        torch.testing.assert_close(found[False], found[True])

    @pytest.mark.parametrize("spoilt", [0, 3])
    def test_rows_without_numbers_for_another_reason_stay(self, x, spoilt):
        x[:, spoilt, 0] = torch.nan
        model = Written(softmax_of_nothing)
        with attention(model) as maps:
            model(x)
        assert model.weights.isnan().all()
        assert torch.equal(maps[0].dense()[:, 0].isnan(), (torch.arange(5) != 2)[:, None].expand(2, 5, 5))

    @pytest.mark.parametrize("gated", [0, 2])
    def test_numbers_that_are_lost_behind_the_softmax_stay_lost(self, x, gated):

        def function(x):
            gate = torch.ones(5, 1)
            gate[gated] = torch.nan
            return softmax_of_nothing(x) * gate

        model = Written(function)
        with attention(model) as maps:
            model(x)
        lost = (torch.arange(5) == gated) & (torch.arange(5) != 2)
        assert torch.equal(maps[0].dense()[:, 0].isnan(), lost[:, None].expand(2, 5, 5))

    def test_others_that_are_lost_once_they_are_cut_away(self, x):
        """As many as were cut away."""

        def function(x):
            gate = torch.ones(5, 1)
            gate[0] = torch.nan
            weights = softmax_of_nothing(x) * gate
            return weights[:, [0, 1, 3, 4]]

        model = Written(function)
        with attention(model) as maps:
            model(x)
        assert torch.equal(maps[0].dense()[:, 0].isnan(), model.weights.isnan())
        assert model.weights.isnan().any()

    @pytest.mark.parametrize("is_by_hand", [False, True])
    @pytest.mark.parametrize("name", MOVED)
    def test_are_zeros_where_they_were_moved_to(self, x, name, is_by_hand):
        row = (torch.arange(5) == 2)[:, None]

        def softmax(s):
            return divided(less(s).exp()) if is_by_hand else s.softmax(-1)

        def heads(x):
            return (x @ x.mT)[:, None] * torch.tensor([0.5, 2])[:, None, None]

        def function(x, fill=-torch.inf):
            return MOVED[name](softmax(heads(x).masked_fill(row, fill)))

        model = Calls(lambda x: function(x) @ x[:, None])
        with attention(model) as maps:
            y = model(x)
        assert y.isnan().any()
        expected = function(x, 0)
        is_empty = function(x).isnan()
        torch.testing.assert_close(maps[0].dense(), expected.masked_fill(is_empty, 0), check_stride=False)

    @pytest.mark.parametrize("is_empty", [False, True])
    @pytest.mark.parametrize("name", ELSEWHERE)
    def test_are_zeros_where_the_keys_of_a_softmax_by_hand_are_not_last(self, x, name, is_empty):
        def fill(s, queries):
            place = [1] * s.ndim
            place[queries] = 5
            return s.masked_fill((torch.arange(5) == 2).view(place), -torch.inf) if is_empty else s

        model = Calls(lambda x: ELSEWHERE[name](x, fill))
        with attention(model) as maps:
            y = model(x)
        assert y[:, 2].isnan().all() == is_empty
        h = x.unflatten(-1, (2, 4)).transpose(1, 2) if name == "heads last" else x[:, None]
        expected = (h @ h.mT).softmax(-1)
        expected[:, :, 2] *= not is_empty
        [found] = maps
        torch.testing.assert_close(found.dense(), expected)
        assert found.is_softmax

    @pytest.mark.parametrize("is_first", [False, True])
    def test_are_zeros_where_scores_are_added_to_others(self, x, is_first):
        def function(x):
            one, other = scores(x), less(scores(x, 0.5).masked_fill((torch.arange(5) == 2)[:, None], -torch.inf))
            return divided((other + one if is_first else one + other).exp())

        model = Written(function)
        with attention(model) as maps:
            model(x)
        assert torch.equal(maps[0].dense()[:, 0], model.weights.nan_to_num(0))
        assert model.weights[:, 2].isnan().all()

    def test_the_model_draws_the_same_random_numbers(self, x):
        def function(x):
            weights = F.dropout(softmax_of_nothing(x), 0.5)[:, None].expand(-1, 2, -1, -1)
            return F.dropout(weights, 0.5) @ x[:, None]

        model, found = Calls(function), []
        for is_recorded in (False, True):
            torch.manual_seed(1)
            with attention(model) if is_recorded else warnings.catch_warnings():
                found.append((model(x).nan_to_num(7), torch.rand(3)))
        assert all(map(torch.equal, *found))

    def test_nothing_of_the_model_is_changed(self, x):
        """Weights are put into a tensor that has others, which are not followed."""
        whole = torch.full((2, 5, 6), torch.nan)

        def function(x):
            whole[..., :5] = softmax_of_nothing(x)
            whole[..., 5] = 0.0
            return whole

        model = Calls(lambda x: function(x) @ F.pad(x, (0, 0, 0, 1)))
        with attention(model) as maps:
            model(x)
        assert whole[:, 2, :5].isnan().all()
        assert not whole[:, [0, 1, 3, 4]].isnan().any()
        assert torch.equal(maps[0].dense()[:, 0], whole.nan_to_num(0))

    @pytest.mark.parametrize("heads", [1, 3])
    def test_over_another_axis_and_for_several_heads(self, x, heads):
        """(keys, queries), as where key times query is taken; the weights serve several heads."""

        def function(x):
            hidden = torch.arange(5) == 2
            weights = scores(x).mT.masked_fill(hidden, -torch.inf).softmax(-2).mT
            return (weights[:, None].expand(-1, heads, -1, -1) @ x[:, None]).mean(1)

        model = Calls(function)
        with attention(model) as maps:
            model(x)
        weights = scores(x).softmax(-1)
        weights[:, 2] = 0
        torch.testing.assert_close(maps[0].dense(), weights[:, None].expand(-1, heads, -1, -1))

    def test_half_of_a_batch(self, x):
        """The model multiplies it in parts, of which one has no query without keys."""

        def function(x):
            weights = scores(x).masked_fill((torch.arange(2) == 1)[:, None, None], -torch.inf).softmax(-1)
            return torch.cat([part @ values for part, values in zip(weights.split(1), x.split(1), strict=True)])

        model = Calls(function)
        with attention(model) as maps:
            model(x)
        weights = scores(x).softmax(-1)
        weights[1] = 0
        torch.testing.assert_close(torch.cat([one.dense()[:, 0] for one in maps]), weights)

    def test_by_hand(self, x):
        def function(x):
            terms = scores(x).masked_fill((torch.arange(5) == 2)[:, None], -torch.inf)
            terms = (terms - terms.amax(-1, keepdim=True)).exp()
            return terms / terms.sum(-1, keepdim=True)

        model = Written(function)
        with attention(model) as maps:
            model(x)
        assert maps[0].is_softmax


def zero_first(weights):
    weights[..., 0] = 0
    return weights


def zero_by_a_view(weights):
    weights[:, :, 0].zero_()
    return weights


CHANGES = {
    "masked": lambda w: w.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), 0),
    "written to": zero_first,
    "written to by a view": zero_by_a_view,
    "scaled": lambda w: w * 2,
    "normalised again": lambda w: w / (1e-3 + w.sum(-2, keepdim=True)),
    "thresholded": lambda w: F.relu(w - 0.1),
    "gated": lambda w: w * torch.sigmoid(torch.arange(5.0)),
    "to a power": lambda w: w.pow(2),
    "sorted by a rule": lambda w: torch.where(w > 0.2, w, torch.zeros(())),
}


@pytest.mark.parametrize("name", CHANGES)
def test_between_softmax_and_values(x, name):
    kept = []

    def function(x):
        weights = scores(x).softmax(-1)
        kept.append(weights.clone())
        return CHANGES[name](weights)

    found = map_of(function, x)
    [softmax] = found.softmaxes
    assert torch.equal(softmax.dense()[:, 0], kept[-1])
    assert "made of 1 softmax" in repr(found)


@pytest.mark.parametrize(
    "change",
    [lambda w: w.masked_fill(w < 0, 7.0), lambda w: w * 1.0, lambda w: w.contiguous().clone(), lambda w: w + 0],
    ids=["a mask of nothing", "times 1", "a copy", "plus 0"],
)
def test_what_changes_no_number_leaves_one_softmax(x, change):
    assert map_of(lambda x: change(scores(x).softmax(-1)), x).softmaxes == ()


def changed(weights, by):
    by(weights)
    return weights


VIEWS = {
    "another shape": lambda w: w.view(2, 25)[:, :3].zero_(),
    "another order": lambda w: w.transpose(1, 2).mul_(2),
    "split": lambda w: [part.mul_(2) for part in w.unbind(0)],
    "a chunk": lambda w: w.chunk(2, 0)[0].zero_(),
    "detached": lambda w: w.detach().mul_(2),
    ".data": lambda w: w.data.mul_(2),
    "the diagonal": lambda w: w.diagonal(dim1=-2, dim2=-1).fill_(0),
    "by places": lambda w: w.index_put_((torch.tensor([0]), torch.tensor([1])), torch.zeros(5)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_weights_changed_in_place(x, name):
    found = map_of(lambda x: changed(scores(x).softmax(-1), VIEWS[name]), x)
    [softmax] = found.softmaxes
    assert not found.is_softmax
    assert torch.equal(softmax.dense()[:, 0], scores(x).softmax(-1))


MADE_OF_WEIGHTS = {
    "transposed by einsum": lambda w: torch.einsum("bij->bji", w),
    "times itself": lambda w: w @ w,
    "put together of parts": lambda w: torch.cat([w[..., :2], torch.zeros(2, 5, 1), w[..., 3:]], -1),
    "the best only": lambda w: torch.zeros_like(w).scatter(-1, w.topk(2).indices, w.topk(2).values),
}


@pytest.mark.parametrize("name", MADE_OF_WEIGHTS)
def test_weights_made_of_a_softmax(x, name):
    found = map_of(lambda x: MADE_OF_WEIGHTS[name](scores(x).softmax(-1)), x)
    [softmax] = found.softmaxes
    assert torch.equal(softmax.dense()[:, 0], scores(x).softmax(-1))


NORMALISED = {
    "exp over its sum": lambda s: s.exp() / s.exp().sum(-1, keepdim=True),
    "exp of a log-softmax": lambda s: F.log_softmax(s, -1).exp(),
    "softmin": lambda s: F.softmin(s, -1),
    "absolute numbers over their sum": lambda s: F.normalize(s.abs(), p=1, dim=-1),
    "over the queries, turned": lambda s: s.softmax(-2).mT,
    "a softmax of a softmax": lambda s: s.softmax(-1).softmax(-1),
}


@pytest.mark.parametrize("name", NORMALISED)
def test_what_is_as_good_as_a_softmax(x, name):
    found = map_of(lambda x: NORMALISED[name](scores(x)), x)
    assert found.is_softmax
    assert (found.dense().sum(-1) - 1).abs().max() < 1e-6


NO_SOFTMAX = {
    "sigmoid": torch.sigmoid,
    "relu": lambda s: torch.relu(s) / 5,
    "its square": lambda s: torch.relu(s) ** 2,
    "softplus": F.softplus,
}


@pytest.mark.parametrize("name", NO_SOFTMAX)
def test_weights_that_no_softmax_made(x, name, tmp_path):
    from visualizer import load

    model = Written(lambda x: NO_SOFTMAX[name](scores(x)))
    with attention(model) as maps:
        model(x)
    assert torch.equal(maps[0].dense()[:, 0], model.weights)
    maps.save(tmp_path / "maps.safetensors")
    for found in (maps[0], load(tmp_path / "maps.safetensors")[0], maps[0].to("cpu")):
        assert (found.is_softmax, found.softmaxes) == (False, ())
        assert "made of no softmax" in repr(found)


def test_sigmoid_attention_before_dropout(x):
    class Drops(nn.Module):
        def forward(self, x):
            self.weights = torch.sigmoid(x @ x.mT)
            return F.dropout(self.weights, 0.5) @ x

    model = Drops()
    with attention(model) as maps:
        model(x)
    assert torch.equal(maps[0].dense()[:, 0], model.weights)


@pytest.mark.parametrize("kind", ["layers", "linear attention", "signed"])
def test_products_that_are_no_attention(x, kind):
    class Products(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Parameter(torch.randn(8, 5)), nn.Parameter(torch.randn(8, 5))

        def forward(self, x):
            return {
                "layers": lambda: torch.relu(x @ self.one) @ self.other.mT,
                "linear attention": lambda: torch.relu(x) @ (torch.relu(x).mT @ x),
                "signed": lambda: (x @ x.mT) @ x,
            }[kind]()

    model = Products()
    with (
        pytest.warns(VisualizerWarning, match="neither a fused kernel of torch nor a softmax"),
        attention(model) as maps,
    ):
        model(x)
    assert len(maps) == 0


@pytest.mark.parametrize("is_filled", [False, True])
def test_chunks_of_queries_put_together(x, is_filled):
    def function(x):
        parts = [part.softmax(-1) for part in scores(x).split(3, 1)]
        if not is_filled:
            return torch.cat(parts, 1)
        whole = torch.empty(2, 5, 5)
        whole[:, :3], whole[:, 3:] = parts
        return whole

    assert len(map_of(function, x).softmaxes) == 2


@pytest.fixture(scope="module")
def scripted():
    """Functions that run without Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return {name: torch.jit.script(function) for name, function in SCRIPTS.items()}


def script_scores(x: torch.Tensor) -> torch.Tensor:
    return x @ x.transpose(-1, -2)


def script_weights(x: torch.Tensor) -> torch.Tensor:
    return torch.softmax(x @ x.transpose(-1, -2), -1)


def script_softmax(x: torch.Tensor) -> torch.Tensor:
    return torch.softmax(x * 0.5, -1)


def script_floor(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(min=0.2)


SCRIPTS = {"scores": script_scores, "weights": script_weights, "softmax": script_softmax, "floor": script_floor}


@pytest.mark.parametrize("name", ["scores", "weights", "softmax", "floor", "changed"])
def test_scripted_functions(x, name, scripted):
    before = torch.jit.ScriptFunction.__call__
    found = map_of(
        {
            "scores": lambda x: scripted["scores"](x).softmax(-1),
            "weights": lambda x: scripted["weights"](x),
            "softmax": lambda x: scripted["softmax"](scores(x)),
            "floor": lambda x: scripted["floor"](scores(x)).softmax(-1),
            "changed": lambda x: scripted["floor"](scores(x).softmax(-1)),
        }[name],
        x,
    )
    assert found.is_softmax == (name != "changed")
    assert len(found.softmaxes) == (name == "changed")
    assert torch.jit.ScriptFunction.__call__ == before


def test_a_scripted_softmax_of_features_is_no_attention(x, scripted):
    class LinearAttention(nn.Module):
        def forward(self, x):
            return scripted["softmax"](x) @ (x.mT @ x)

    model = LinearAttention()
    with pytest.warns(VisualizerWarning, match="LinearAttention"), attention(model) as maps:
        model(x)
    assert len(maps) == 0


@pytest.mark.parametrize("cut", ["index", "split"])
@pytest.mark.parametrize(("first", "second"), [(3, 5), (1, 5), (5, 1)])
def test_a_softmax_over_two_sets_of_keys(x, cut, first, second):
    """As in Longformer: neither part is one softmax, and none is dropped; a single key is no attention sink."""

    class Joint(nn.Module):
        def forward(self, x):
            joint = torch.cat([x @ x[:, :first].mT, x @ x[:, :second].mT], -1).softmax(-1)
            self.weights = joint
            near, far = (joint[..., :first], joint[..., first:]) if cut == "index" else joint.split([first, second], -1)
            return near @ x[:, :first] + far @ x[:, :second]

    model = Joint()
    with attention(model) as maps:
        model(x)
    assert [one.shape for one in maps] == [(2, 1, 5, first), (2, 1, 5, second)]
    for found, weights in zip(maps, model.weights.split([first, second], -1), strict=True):
        assert torch.equal(found.dense()[:, 0], weights)
        assert not found.is_softmax
        assert torch.equal(found.softmaxes[0].dense()[:, 0], model.weights)


def test_a_softmax_with_a_sink_behind_its_keys_stays_one(x):
    found = map_of(lambda x: torch.cat([scores(x), torch.zeros(2, 5, 1)], -1).softmax(-1)[..., :-1], x)
    assert found.is_softmax
    assert found.softmaxes == ()


def test_keys_near_by(x):
    """As in Longformer: the scores near the diagonal are cut out, and become columns; the weights become diagonals."""

    class Near(nn.Module):
        def forward(self, x):
            scores = F.pad(x @ x.mT, (0, 0, 0, 1)).view(2, 5, 6)[:, :, :3]
            weights = torch.zeros(2, 5, 4).masked_fill(torch.ones(5, 4).triu(3).bool(), -torch.inf)
            weights[:, :, :3] = scores
            weights = F.pad(weights.softmax(-1), (0, 3)).flatten(1)[:, :-5].view(2, 5, 6)[..., :-1]
            self.weights = weights
            return weights @ x

    model = Near()
    with attention(model) as maps:
        model(x)
    [found] = maps
    assert torch.equal(found.dense()[:, 0], model.weights)
    assert not found.is_softmax


def test_queries_that_are_chosen(x):
    """As in adaptive token sampling: rows are gathered from the weights."""
    chosen = torch.tensor([[4, 0, 2], [1, 1, 3]])[..., None].expand(-1, -1, 5)
    assert map_of(lambda x: scores(x).softmax(-1).gather(1, chosen), x).shape == (2, 1, 3, 5)


def test_distances(x):
    assert map_of(lambda x: (-torch.cdist(x, x)).softmax(-1), x).is_softmax


PAIRS = {
    "additive": lambda q, k: torch.tanh(q[:, :, None] + k[:, None]).sum(-1),
    "by a vector": lambda q, k: torch.tanh(q[:, :, None] + k[:, None]) @ torch.arange(8.0),
    "by a layer": lambda q, k: F.linear(F.gelu(q[:, :, None] - k[:, None]), torch.ones(1, 8)).squeeze(-1),
    "of a graph": lambda q, k: F.leaky_relu(q.sum(-1)[:, :, None] + k.mean(-1)[:, None]),
    "squared distances": lambda q, k: -(q[:, :, None] - k[:, None]).square().sum(-1),
    "distances": lambda q, k: -torch.linalg.vector_norm(q[:, :, None] - k[:, None], dim=-1),
    "a product by hand": lambda q, k: (q[:, :, None] * k[:, None]).sum(-1),
}


@pytest.mark.parametrize("name", PAIRS)
def test_scores_of_each_query_with_each_key(x, name):
    assert map_of(lambda x: PAIRS[name](x, x + 1).softmax(-1), x).is_softmax


def test_heads_of_additive_attention(x):
    class Additive(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads, self.out = nn.Linear(8, 2), nn.Linear(8, 8)

        def forward(self, x):
            pairs = self.heads(torch.tanh(x[:, :, None] + x[:, None]))
            self.weights = pairs.permute(0, 3, 1, 2).softmax(-1)
            return self.out((self.weights @ x.unflatten(-1, (2, 4)).transpose(1, 2)).transpose(1, 2).flatten(2))

    model = Additive()
    with attention(model) as maps:
        model(x)
    assert torch.equal(maps[0].dense(), model.weights)
    assert not maps[0].axes_assumed


@pytest.mark.parametrize("batch", [1, 2])
def test_biases_of_heads_and_masks_added_to_scores(x, batch):
    """As LongT5: both are added to one another first."""

    class Biased(nn.Module):
        def forward(self, x):
            bias = torch.zeros(1, 2, 5, 5) + torch.zeros(batch, 1, 1, 5).where(torch.arange(5) < 4, -torch.inf)
            rows = torch.relu(torch.arange(5.0)[:, None] + torch.arange(5.0)[None])
            q = x.unflatten(-1, (2, 4)).transpose(1, 2)
            scores = q @ q.mT
            scores += bias + rows
            self.weights = scores.softmax(-1)
            return self.weights @ q

    model = Biased()
    with attention(model) as maps:
        model(x)
    assert torch.equal(maps[0].dense(), model.weights)


POSITIONS = {
    "positions": lambda x, rows: x + torch.relu(rows[:, None] + rows[None])[0],
    "a scale a channel": lambda x, rows: torch.relu(x[:, :1] * rows[None]),
    "biases": lambda x, rows: F.relu(x.flatten(0, 1)[:, None] + rows[None])[:5, 0].expand(2, -1, -1),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_sums_of_other_pairs_are_no_scores(x, name):
    """Only one number for each query and key is a score."""

    class Sums(nn.Module):
        def forward(self, x):
            return POSITIONS[name](x, torch.arange(40.0).view(5, 8)).softmax(-1) @ (x.mT @ x)

    with pytest.warns(VisualizerWarning, match="neither a fused kernel of torch nor a softmax"):
        model = Sums()
        with attention(model) as maps:
            model(x)
    assert len(maps) == 0


def test_cosines_of_angles_are_no_scores(x):
    """Nothing is followed on after rotary positions were made: each function of the model would cost more."""
    from visualizer.intercept.softmax import Tracing

    class Rotates(nn.Module):
        def forward(self, x):
            angles = torch.arange(5.0)[:, None] @ torch.arange(8.0)[None]
            self.cos, self.sin = torch.cat([angles, angles]).cos(), torch.einsum("i,j->ij", x[0, 0], x[0, 1]).sin()
            return F.scaled_dot_product_attention(x, x, x)

    lineages, clear = [], Tracing.clear

    def look(tracing):
        lineages.append(len(tracing.lineage))
        clear(tracing)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tracing, "clear", look)
        model = Rotates()
        with attention(model) as maps:
            model(x)
    assert len(maps) == 1
    assert lineages[0] <= 1  # the output


@pytest.mark.parametrize("is_named", [False, True])
def test_linear_with_keys_in_place_of_a_layer(x, is_named):
    class Linear(nn.Module):
        def forward(self, x, keys):
            scores = F.linear(input=x, weight=keys) if is_named else F.linear(x, keys)
            self.weights = scores.softmax(-1)
            return F.linear(self.weights, keys.mT.contiguous(), torch.ones(8))

    model, keys = Linear(), torch.randn(3, 8)
    with attention(model) as maps:
        model(x, keys)
    assert torch.equal(maps[0].dense()[:, 0], model.weights)
    assert maps[0].kind == "cross"


def test_linear_with_weights_in_place_of_a_layer(x):
    class Turned(nn.Module):
        def forward(self, x):
            self.weights = (x[0] @ x[0].mT).softmax(-1)
            return F.linear(x[0].mT, self.weights).mT

    model = Turned()
    with attention(model) as maps:
        model(x)
    assert torch.equal(maps[0].dense()[0, 0], model.weights)


def test_layers_whose_weight_is_computed_are_no_attention(x):
    class Computed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

        def forward(self, x):
            return F.linear(torch.relu(F.linear(x, self.weight * 2)), self.weight * 3)

    with pytest.warns(VisualizerWarning, match="without any attention"):
        model = Computed()
        with attention(model) as maps:
            model(x)
    assert len(maps) == 0


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (5, 1), (1, 5)])
def test_a_single_key_or_query(queries, keys):
    class Few(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(8, 8)

        def forward(self, q, k):
            weights = (q @ k.mT).softmax(-1)
            return self.proj((weights @ k).transpose(1, 2).flatten(2))

    model = Few()
    with attention(model) as maps:
        model(torch.randn(2, 2, queries, 4), torch.randn(2, 2, keys, 4))
    assert (maps[0].shape, maps[0].axes_assumed) == ((2, 2, queries, keys), False)


def test_weights_without_keys_are_told(x):
    """As VOLO's outlook attention, whose weights a layer makes of the query alone."""

    class OutlookAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.Linear(8, 25)

        def forward(self, x):
            return (self.weights(x).view(2, 5, 5, 5).softmax(-1) @ x[:, None]).mean(1)

    model = nn.Sequential(OutlookAttention(), Written(lambda x: scores(x).softmax(-1)))
    with pytest.warns(VisualizerWarning, match="OutlookAttention .* weights that a layer made without keys"):
        with attention(model) as maps:
            model(x)
    assert len(maps) == 1


def test_heads_multiplied_one_by_one(x):
    """Each part of the weights has its own map."""

    class Parts(nn.Module):
        def forward(self, x):
            self.weights = (x @ x.mT).softmax(-1)
            return self.weights[0] @ x[0] + self.weights[1] @ x[1] + self.weights[1] @ x[0]

    model = Parts()
    with attention(model) as maps:
        model(x)
    assert len(maps) == 2
    for found, weights in zip(maps, model.weights, strict=True):
        assert torch.equal(found.dense()[0, 0], weights)
        assert found.is_softmax


def test_two_softmaxes_mixed(x):
    """As ConViT mixes content and position."""

    def function(x):
        mixed = 0.3 * scores(x).softmax(-1) + 0.7 * scores(x, 3).softmax(-1)
        return mixed / mixed.sum(-1, keepdim=True)

    found = map_of(function, x)
    assert len(found.softmaxes) == 2
    assert torch.equal(found.softmaxes[1].dense()[:, 0], scores(x, 3).softmax(-1))
    assert "made of 2 softmaxes" in repr(found)


def test_convit():
    """Its positions have a softmax of their own, of what a layer computes and no product."""
    import timm

    model = timm.create_model("convit_tiny", img_size=64, depth=2, local_up_to_layer=1).eval()
    kept = []
    model.blocks[0].attn.attn_drop.register_forward_pre_hook(lambda _, args: kept.append(args[0].clone()))
    with torch.no_grad(), attention(model) as maps:
        model(torch.randn(1, 3, 64, 64))
    assert torch.equal(maps["blocks.0.attn"].dense(), kept[0])
    content, position = maps["blocks.0.attn"].softmaxes
    gate = torch.sigmoid(model.blocks[0].attn.gating_param).view(1, -1, 1, 1)
    mixed = (1 - gate) * content.dense() + gate * position.dense()
    assert (mixed / mixed.sum(-1, keepdim=True) - kept[0]).abs().max() < 1e-6
    assert maps["blocks.1.attn"].is_softmax


def test_a_difference_of_softmaxes(x):
    found = map_of(lambda x: scores(x).softmax(-1) - 0.5 * scores(x, 3).softmax(-1), x)
    assert len(found.softmaxes) == 2


def test_talking_heads():
    class Talking(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.proj = nn.Linear(4, 4), nn.Linear(12, 12)

        def forward(self, q):
            self.softmax = (q @ q.mT).softmax(-1)
            self.weights = self.mix(self.softmax.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            return self.proj((self.weights @ q).transpose(1, 2).flatten(2))

    model = Talking()
    with attention(model) as maps:
        model(torch.randn(2, 4, 5, 3))
    assert torch.equal(maps[0].dense(), model.weights)
    assert torch.equal(maps[0].softmaxes[0].dense(), model.softmax)


MIX = torch.tensor([[0.7, 0.3, 0.1], [0.2, 0.5, 0.4], [0.1, 0.2, 0.5]])
MIXES = {
    "einsum": lambda w: torch.einsum("bhij,hg->bgij", w, MIX),
    "einsum, heads last": lambda w: torch.einsum("bijh,hg->bijg", w.permute(0, 2, 3, 1), MIX).permute(0, 3, 1, 2),
    "matmul from the left": lambda w: (MIX @ w.flatten(2)).view(w.shape),
    "matmul, heads last": lambda w: (w.permute(0, 2, 3, 1) @ MIX).permute(0, 3, 1, 2),
    "a factor for each head": lambda w: torch.einsum("bhij,h->bhij", w, MIX[0]),
    "a norm of heads": lambda w: F.layer_norm(w.permute(0, 2, 3, 1), (3,)).permute(0, 3, 1, 2),
    "a batch norm": lambda w: F.batch_norm(w, MIX[0], MIX[1]),
}


@pytest.mark.parametrize("name", MIXES)
@pytest.mark.parametrize("has_dropout", [False, True])
def test_heads_mixed_by_a_product(name, has_dropout):
    """As in CaiT and DeepViT; the sum is over heads, and not over keys."""

    class Mixed(nn.Module):
        def forward(self, q):
            weights = (q @ q.mT).softmax(-1)
            self.weights = MIXES[name](weights)
            used = MIXES[name](F.dropout(weights, 0.5)) if has_dropout else self.weights
            return (used @ q).transpose(1, 2).flatten(2) @ torch.eye(24)

    model, q = Mixed(), torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(2))
    with attention(model) as maps:
        model(q)
    [found] = maps
    assert torch.equal(found.dense(), model.weights)
    assert not found.axes_assumed
    assert torch.equal(found.softmaxes[0].dense(), (q @ q.mT).softmax(-1))


@pytest.mark.parametrize("equation", ["bhij,bjd->bhid", "bhij,bjd->bihd", "bihj,bjd->bihd", "ihbj,bjd->bihd"])
def test_heads_that_share_their_values(x, equation):
    """As where all heads have one key and value: an einsum of values without heads."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.out = nn.Linear(8, 24), nn.Linear(24, 8)

        def forward(self, x):
            q = self.q(x).unflatten(-1, (3, 8))
            self.weights = torch.einsum("bihd,bjd->bhij", q, x).softmax(-1)
            weights = torch.einsum("bhij->" + equation.partition(",")[0], self.weights)
            out = torch.einsum(equation, weights, x)
            return self.out((out.transpose(1, 2) if equation.endswith("bhid") else out).flatten(2))

    model = Shared()
    with attention(model) as maps:
        model(x)
    assert torch.equal(maps[0].dense(), model.weights)
    assert not maps[0].axes_assumed


def test_an_einsum_that_is_no_product_of_weights_and_values_is_told(x):
    class Joined(nn.Module):
        def forward(self, x):
            return torch.einsum("bij,bjd,de->bie", scores(x).softmax(-1), x, torch.eye(8))

    model = Joined()
    with pytest.warns(VisualizerWarning, match="'bij,bjd,de->bie' is no product"), attention(model) as maps:
        model(x)
    assert len(maps) == 0


def test_parts_go_to_a_file_and_to_a_device(x, tmp_path):
    model = Written(lambda x: scores(x).softmax(-1) - scores(x, 3).softmax(-1))
    with attention(model) as maps:
        model(x)
    maps.save(tmp_path / "maps.safetensors")
    from visualizer import load

    again = load(tmp_path / "maps.safetensors")[0]
    assert again.axes_assumed == maps[0].axes_assumed
    for one, other in zip(maps[0].softmaxes, again.softmaxes, strict=True):
        assert torch.equal(one.dense(), other.dense())
    assert len(again.to("cpu").softmaxes) == 2


def test_the_gradient_of_mixed_weights(x):
    model = Written(lambda x: 0.3 * scores(x).softmax(-1) + 0.7 * scores(x, 3).softmax(-1))
    with attention(model, gradients=True) as maps:
        y = model(x.requires_grad_())
        model.weights.retain_grad()
        y.square().sum().backward()
    assert torch.equal(maps[0].grad_dense()[:, 0], model.weights.grad)


def test_a_softmax_over_features_is_no_attention(x):
    class LinearAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.q(x).softmax(-1) @ (self.k(x).softmax(-2).mT @ x)

    model = LinearAttention()
    with pytest.warns(VisualizerWarning, match="LinearAttention"), attention(model) as maps:
        model(x)
    assert len(maps) == 0


@pytest.mark.parametrize("heads", [1, 3])
def test_a_single_query_with_a_single_key(heads):
    """As of a decoder's first step: no axis tells queries and keys from others of length 1."""

    class Step(nn.Module):
        def forward(self, query, key):
            return (torch.softmax(scores_of(query, key), -1) @ key).transpose(1, 2).flatten(2)

    def scores_of(query, key):
        return query @ key.mT + torch.zeros(1, 1, 1, 1)

    query, keys = torch.randn(2, heads, 1, 8), torch.randn(2, heads, 2, 8)
    model = Step()
    with attention(model) as maps:
        for count in (1, 2):
            model(query, keys[:, :, :count])
    assert [one.shape for one in maps] == [(2, heads, 1, 1), (2, heads, 1, 2)]
    assert torch.equal(maps[0].dense(), torch.ones(2, heads, 1, 1))
