"""`plot.statistic`: the artists that stand for what was collected over a data set."""

import copy

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from plots import no_figure_left  # noqa: F401
from ranks import Looking, all_statistics, texts

from visualizer import load, plot
from visualizer.statistics import Distance, MeanMap, Patterns, Sink, Statistic, collect


@pytest.fixture(scope="module")
def found():
    """Of two layers of two heads."""
    return collect(Looking(), texts(3), *all_statistics())


DOTS = {
    "confidence": "mean of the largest weight",
    "distance": "mean attention distance (patches)",
    "entropy": "mean entropy (nats)",
    "prefix_mass": "attention to prefix tokens (2)",
    "sink": "attention to token 0",
    "third": "attention to token 3",
}


@pytest.mark.parametrize("name", DOTS)
def test_one_number_a_head_is_a_dot_over_its_layer(name, found):
    ax = plot.statistic(found, name)
    assert (DOTS[name], "network depth (layer)") == (ax.get_ylabel(), ax.get_xlabel())
    assert "mean of 9 samples" == ax.get_title()
    [dots] = ax.collections
    means = found[name].mean
    assert [(0, means[0, 0]), (0, means[0, 1]), (1, means[1, 0]), (1, means[1, 1])] == [*map(tuple, dots.get_offsets())]
    assert (0, (-0.5, 1.5)) == (ax.get_ylim()[0], ax.get_xlim())
    assert all(tick == int(tick) for tick in ax.get_xticks())


def test_pixels_are_the_unit_where_the_size_of_a_patch_is_known():
    far = collect(Looking(), texts(1), Distance((3, 3), patch_size=16))
    assert "mean attention distance (pixels)" == plot.statistic(far, "distance").get_ylabel()


def test_positions_run_across_and_layers_down(found):
    ax = plot.statistic(found, "received", title="here")
    assert ("position", "layer", "here") == (ax.get_xlabel(), ax.get_ylabel(), ax.get_title())
    np.testing.assert_allclose(found["received"].mean.mean(1), ax.images[0].get_array())
    assert "share of the attention" == ax.figure.axes[1].get_ylabel()
    assert "LogNorm" == type(ax.images[0].norm).__name__


def test_heads_without_a_number_are_left_out(found):
    some = copy.deepcopy(found)
    some.states["entropy"][0, 0, 1] = some.states["received"][0, 0, 1] = 0
    [dots] = plot.statistic(some, "entropy").collections
    assert 3 == len(dots.get_offsets())
    image = plot.statistic(some, "received").images[0].get_array()
    np.testing.assert_allclose(found["received"].mean[0, 0], image[0])
    assert np.isfinite(image).all()


def test_each_pattern_has_a_panel(found):
    figure = plot.statistic(found, "patterns")
    *panels, bar = figure.axes
    assert [*Patterns.NAMES, ""] == [ax.get_title() for ax in panels]
    assert "score" == bar.get_ylabel()
    for number, ax in enumerate(panels[:7]):
        np.testing.assert_array_equal(found["patterns"].mean[:, :, number], ax.images[0].get_array().filled(np.nan))
        assert (0, 1) == ax.images[0].get_clim()
        assert ("head", "layer") == (ax.get_xlabel(), ax.get_ylabel())
    assert not panels[7].axison
    assert "mean of 9 samples" == figure.get_suptitle()


@pytest.mark.filterwarnings("ignore:.*rows do not sum to 1")  # texts have padding
@pytest.mark.parametrize(("layer", "number"), [(None, 1), (0, 0), (-1, 1)])
def test_mean_maps_are_matrices_of_a_layer(layer, number, found):
    figure = plot.statistic(found, "mean_map", layer=layer)
    for head in range(2):
        np.testing.assert_allclose(found["mean_map"].mean[number, head], figure.axes[head].images[0].get_array())
    assert f"layer {number}" in figure.get_suptitle()


@pytest.mark.parametrize("name", ["entropy", "received"])
def test_a_panel_is_drawn_where_it_is_wanted(name, found):
    _, ax = plt.subplots()
    assert ax is plot.statistic(found, name, ax=ax)


@pytest.mark.parametrize(
    ("name", "options", "error", "said"),
    [
        ("love", {}, KeyError, "there is no statistic 'love'; there are 'confidence'"),
        ("entropy", {"layer": 1}, ValueError, "layer=1: the picture of 'entropy' has all layers"),
        ("patterns", {"ax": True}, ValueError, "the picture of 'patterns' is a figure of several panels"),
        ("mean_map", {"ax": True}, ValueError, "the picture of 'mean_map' is a figure of several panels"),
    ],
)
def test_what_has_no_such_picture(name, options, error, said, found):
    with pytest.raises(error, match=said):
        plot.statistic(found, name, **options)


def test_maps_are_no_statistics():
    with pytest.raises(TypeError, match=r"found is a list: pass what statistics\.collect gives"):
        plot.statistic([np.ones((1, 2, 3, 3))], "entropy")


def test_nothing_to_draw(found):
    none = copy.deepcopy(found)
    none.states["sink"][0] = 0
    with pytest.raises(ValueError, match="no sample has a number of 'sink'"):
        plot.statistic(none, "sink")


class Lean(Statistic):
    """How far each head looks back or ahead, which may be below zero."""

    label = "mean offset (tokens)"

    def of(self, layer, tokens):
        places = torch.arange(layer.shape[3], dtype=layer.dtype)
        return (layer.dense() * (places - places[:, None])).sum(-1).mean(-1)


class Halves(Statistic):
    """What goes to the first and to the second half."""

    axes = 1
    number_names = ("first", "second")

    def of(self, layer, tokens):
        weights = layer.dense().mean(-2)
        return torch.stack([weights[..., :4].sum(-1), weights[..., 4:].sum(-1)], -1)


def test_a_statistic_of_ones_own_keeps_its_words_in_a_file(tmp_path):
    collect(Looking(), texts(2), Lean(), Halves(name="both_halves")).save(tmp_path / "own.safetensors")
    own = load(tmp_path / "own.safetensors")
    ax = plot.statistic(own, "lean")
    assert "mean offset (tokens)" == ax.get_ylabel()
    assert own["lean"].mean.min() < 0 and ax.get_ylim()[0] < own["lean"].mean.min()
    figure = plot.statistic(own, "both_halves")
    assert ["first", "second"] == [ax.get_title() for ax in figure.axes[:2]]
    assert "both halves" == figure.axes[2].get_ylabel()


@pytest.mark.filterwarnings("ignore:.*do not sum to 1")  # means of texts of different lengths
def test_other_plots_take_what_collect_returns():
    far = collect(Looking(), texts(1), Distance((3, 3), patch_size=16), MeanMap())
    ax = plot.distance(far)
    assert "mean attention distance (pixels)" == ax.get_ylabel()
    assert [*far["distance"].mean.ravel()] == [y for _, y in ax.collections[0].get_offsets()]
    for given in (far, far["mean_map"]):
        panels = [ax for ax in plot.heads(given, layer=1).axes if ax.get_label() != "<colorbar>"]
        for head, panel in enumerate(panels):
            np.testing.assert_allclose(far["mean_map"].mean[1, head, :8, :8], panel.images[0].get_array(), rtol=1e-5)
    with pytest.raises(ValueError, match="no maps: MeanMap"):
        plot.heads(collect(Looking(), texts(1), Sink()))
    with pytest.raises(ValueError, match=r"plot\.statistic"):
        plot.heads(far["distance"])
