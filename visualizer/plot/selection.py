"""The weights that a plot draws, as numpy arrays: those of the chosen layers, heads and queries.

An axis is chosen by an index or by a named reduction. An axis of length 1 stays, so that a batch of one image and a
model of one head cannot be confused. Only the chosen layers are converted, and of an `AttentionMap` only the
rows that are drawn are computed.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias, get_args

import numpy as np

from ..errors import warn
from ..images import part_seen
from ..layout import Indices, Layout, Patches, Size, layout_in_windows, layout_of
from ..reading import Array, Reduction, RowCheck, as_numbers, check_not_empty, is_array, layers_in

if TYPE_CHECKING:
    from ..analysis.sinks import Sinks

Choice: TypeAlias = int | Reduction


QUERY_NEEDED = (
    "an image shows what one query attends to: pass query= too, a patch (row, column) or a token's index; query=0 is "
    "the class token"
)


@dataclass(frozen=True)
class Selection:
    """The weights to draw, and a label that says which these are."""

    weights: Array
    """(queries, keys), or (heads, queries, keys) for all heads."""
    label: str
    """Such as "layer 11, mean of 6 heads"; empty if there was nothing to choose from."""
    axes: TokenAxes
    """The axes of all weights, padding included."""

    @property
    def queries(self) -> Indices:
        """Which queries the weights are of, where they are of all: those that are no padding."""
        return _not_padding(self.axes.query_layout, self.axes.queries)

    @property
    def keys(self) -> Indices:
        """Which keys the weights are of, where they are of all queries: those that are no padding."""
        return _not_padding(self.axes.layout, self.axes.keys)


@dataclass(frozen=True)
class TokenAxes:
    """The queries and the keys of a layer."""

    queries: int
    keys: int
    query_layout: Layout | None = None
    """What the map knows of the queries of the chosen image or text."""
    layout: Layout | None = None
    """What the map knows of the keys."""

    @property
    def is_self(self) -> bool:
        """Whether the queries are the keys, as far as it is known."""
        return self.queries == self.keys and self.query_layout == self.layout


def select(
    maps: Any,
    *,
    layer: Choice | None,
    batch: Choice | None,
    head: Choice | None = None,
    all_heads: bool = False,
    query: int | None = None,
) -> Selection:
    """The weights of one layer and image, and of one head or of all; of all queries but padding, or of one.

    >>> select(np.full((1, 6, 2, 2), 0.5), layer=None, batch=0, head=-1).label
    'head 5'

    Warns of rows that do not sum to one and of rows with NaN.

    Raises:
        ValueError: there are no attention maps; all rows hold NaN, or there are infinite values; or there are several
            layers, images or heads and none is chosen.
        IndexError: a choice is out of range.
        TypeError: a choice is neither an index nor a reduction.
    """
    layers, check = read_layers(maps, batch), RowCheck()
    batch = 0 if batch is None else batch
    axes = token_axes(layers, layer, batch)
    at = _position("layer", layer, len(layers), layers)
    chosen = layers if at is None else [layers[at]]
    weights = np.stack([_image(one, layers, batch, head, all_heads, query, check) for one in chosen])
    check.warn("left blank", "drawn")
    weights = _reduce(weights, layer if at is None else None, axis=0)[0]
    words = [_words("layer", layer, at, len(layers)), "" if all_heads else head_words(chosen[0], head), note_of(layers)]
    selection = Selection(weights, ", ".join(word for word in words if word), axes)
    if query is None:
        weights = weights[:, selection.queries][..., selection.keys]
    return replace(selection, weights=weights if all_heads else weights[0])


def _not_padding(layout: Layout | None, count: int) -> Indices:
    if layout is None or layout.count != count:
        return np.arange(count)
    return np.flatnonzero(~layout.are("padding"))


def select_layers(maps: Any, *, batch: Choice | None, head: Choice | None, query: int | None) -> Iterator[Array]:
    """The weights of one image, one layer at a time: (heads, queries, keys), with one head if it is chosen.

    >>> [weights.shape for weights in select_layers([np.full((1, 6, 2, 2), 0.5)] * 2, batch=0, head=None, query=0)]
    [(6, 1, 2), (6, 1, 2)]

    Raises as `select` does, and warns after the last layer.
    """
    layers, check = read_layers(maps, batch), RowCheck()
    batch = 0 if batch is None else batch
    for number, one in enumerate(layers):
        weights = _image(one, layers, batch, head, head is None, query, check)
        if query is None:
            axes = token_axes(layers, number, batch)
            weights = weights[:, _not_padding(axes.query_layout, axes.queries)]
            weights = weights[..., _not_padding(axes.layout, axes.keys)]
        yield weights
    check.warn("left blank", "drawn")


@dataclass(frozen=True)
class Row:
    """What one query attends to."""

    weights: Array
    """(tokens,), or (heads, tokens) for all heads; NaN outside the query's window."""
    layout: Layout
    """Of these tokens."""
    label: str
    """Which layer and head these are, as in `Selection`."""
    name: str
    """What the query is called."""
    framed: int | None
    """Which of the tokens the query is; None where it is none of them."""
    keys: int
    """How many tokens the query may attend to."""


def select_row(
    maps: Any,
    query: Any,
    picture: Array | None,
    options: Patches,
    *,
    layer: Choice | None,
    batch: Choice | None,
    head: Choice | None = None,
    all_heads: bool = False,
    query_tokens: Sequence[str] | None = None,
    window: Size | None = None,
    shift: Size = 0,
) -> Row:
    """What one query attends to, in one layer and image, by one head or by each; see `plot.query`.

    Raises as `select` does, and ValueError where grid, picture and tokens do not fit together.
    """
    layers = read_layers(maps, batch if window is None else 0)  # of windows, the first axis cannot be the layers
    is_said, batch = batch is not None or window is not None, batch_over(picture, layers, batch)
    axes = token_axes(layers, layer, batch)
    count = int(layers[0].shape[0])
    if not is_said and not is_array(maps) and picture is not None and axes.layout is None and count > 1:
        warn(
            f"these are maps of {count} pictures, and the first is drawn over the one that is given: pass batch=0 if "
            "that is right; if they are windows of this one, pass window= and grid=",
            "array-of-four-axes",
        )
    if window is not None:
        layout = layout_in_windows(axes.keys, options, picture, window, shift)
    elif shift not in (0, (0, 0)):
        raise ValueError(f"shift={shift!r} is by how much windows are moved: pass window= too, their sides in patches")
    else:
        layout = layout_of(axes.keys, options, picture, axes.layout)
    if layout.windows is not None:
        return _row_in_window(layers, query, layout, layer, batch, head, all_heads)
    token, name, framed = find_query(axes, layout, query, query_tokens)
    chosen = select(layers, layer=layer, batch=batch, head=head, all_heads=all_heads, query=token)
    weights = chosen.weights[..., 0, :]
    if np.isnan(weights).all():
        raise ValueError(
            f"the row of query {token} holds nothing but NaN: there is nothing to draw (is it fully masked?)"
        )
    return Row(weights, layout, chosen.label, name, framed, axes.keys)


def find_query(
    axes: TokenAxes, layout: Layout, query: Any, query_tokens: Sequence[str] | None = None
) -> tuple[int, str, int | None]:
    """The number of the query that a user names, what a title calls it, and its number if it is one of the keys.

    Raises as `Layout.token` does.
    """
    is_self = query_tokens is None and axes.is_self
    if query_tokens is not None:
        if isinstance(query_tokens, str) or len(query_tokens) != axes.queries:
            raise ValueError(
                f"query_tokens are the words of the {axes.queries} queries, a list: got {query_tokens!r:.80}"
            )
        own = Layout.text(query_tokens)
    else:
        own = layout if is_self else axes.query_layout or Layout.text(axes.queries)
    if isinstance(query, Sequence) and not isinstance(query, str) and own.patches is None:
        raise ValueError(
            f"query={query!r} names a patch, but these are {axes.queries} queries over {axes.keys} keys "
            "(cross-attention?), so the queries are not patches: pass the query's index"
        )
    token = own.token(query, "; a word needs query_tokens=, the words of all queries")
    name = own.name(token)
    if own.are("text")[token]:
        name = repr(name) if own.has_words else f"token {token}"
    return token, name, token if is_self else None


def _row_in_window(
    layers: list[Any],
    query: Any,
    layout: Layout,
    layer: Choice | None,
    batch: Choice,
    head: Choice | None,
    all_heads: bool,
) -> Row:
    """What a patch attends to in its window, over the whole grid."""
    windows, patches = layout.windows, layout.patches
    assert windows is not None and patches is not None
    if isinstance(layer, str) or isinstance(batch, str):
        raise ValueError(f"layer={layer!r}, batch={batch!r}: of windows, pass the index of one layer and one image")
    grid = replace(layout, windows=None)
    patch = grid.patch(query)
    places = windows.places(*patches.shape)
    [[number, token]] = np.argwhere(places == patch)
    maps = layers[layer or 0]
    images, left = divmod(int(maps.shape[0]), len(places))
    if left or not -images <= batch < images:
        raise ValueError(
            f"maps of {images * len(places) + left} windows, shape {tuple(maps.shape)}, and {len(places)} windows an "
            f"image of {layout}: "
            + (f"batch={batch} is not among its {images} images" if not left else "the grid= does not fit this layer")
        )
    at = batch % images * len(places) + int(number)
    chosen = select(layers, layer=layer, batch=at, head=head, all_heads=all_heads, query=int(token))
    weights, is_patch = chosen.weights[..., 0, :], places[number] >= 0
    whole = np.full((*weights.shape[:-1], layout.count), np.nan, weights.dtype)
    whole[..., places[number][is_patch]] = weights[..., is_patch]
    return Row(whole, grid, chosen.label, grid.name(patch), patch, int(is_patch.sum()))


def select_mean_row(
    maps: Any, layout: Layout, *, layer: Choice | None, batch: Choice | None, head: Choice | None
) -> Row:
    """What all patches attend to in the mean, as the output of a model without a class token is the mean of all.

    Raises as `select` does.
    """
    import torch

    from ..analysis.layers import maps_of
    from ..maps import AttentionMap

    layers, patches = read_layers(maps, batch), layout.patches
    at = _position("layer", layer, len(layers), layers)
    if at is None or patches is None:
        raise ValueError(f"layer={layer!r}: of models without a class token, pass the index of one layer")
    one = maps_of([layers[at]]).layers[0].stitched(layout)
    counts = torch.from_numpy(layout.are("patches")).expand(one.shape[0], -1)
    mean = AttentionMap(one.row_product(counts)[:, :, None] / patches.count)  # (images, heads, 1, keys)
    mean.is_softmax = not one.may_lack_weight
    chosen = select([mean], layer=None, batch=batch, head=head, query=0)
    label = ", ".join(filter(None, (_words("layer", layer, at, len(layers)), chosen.label, note_of(layers))))
    name = f"mean of {patches.count} patches"
    return Row(chosen.weights[0], replace(layout, windows=None), label, name, None, layout.count)


def batch_over(picture: Array | None, layers: list[Any], batch: Choice | None) -> Choice:
    """Which image of the batch is drawn over a picture: where none is chosen, the one that the model saw as it, or else
    the first."""
    layout = getattr(layers[-1], "layout", None)
    if batch is None and picture is not None and picture.ndim == 3 and isinstance(layout, Layout):
        size = None if layout.patches is None else layout.patches.image_size
        for number, seen in enumerate(layout.seen if len(layout.seen) > 1 and size else ()):
            if size is not None and part_seen(picture, seen, size) is not None:
                return number
    return 0 if batch is None else batch


def token_axes(maps: Any, layer: Choice | None, batch: Choice | None = 0) -> TokenAxes:
    """The axes of the chosen layer, or of the layers that are reduced to one; computes no weights."""
    layers = read_layers(maps)
    at = _position("layer", layer, len(layers), layers)
    if at is None:
        same_shape(layers, f"layer={layer!r}")
    chosen = layers if at is None else [layers[at]]
    queries, keys = map(int, chosen[0].shape[2:])
    known = []
    for name in ("query_layout", "layout"):
        layout = getattr(chosen[0], name, None)
        layout = layout if isinstance(layout, Layout) else None  # a tensor has a layout of another kind
        if layout is not None and any(getattr(one, name, None) != layout for one in chosen):
            layout = None
        if layout is not None and (layout.samples or layout.seen):
            if isinstance(batch, int):
                _position("batch", batch, int(chosen[0].shape[0]), layers)
                layout = layout.of(batch)
            elif layout.samples:  # several texts that are reduced to one
                layout = None
        known.append(layout)
    return TokenAxes(queries, keys, *known)


def head_words(layer: Any, head: Choice | None) -> str:
    """Such as "head 3" or "mean of 6 heads"; empty if the layer has one head."""
    heads = int(layer.shape[1])
    return _words("head", head, _position("head", head, heads, [layer]), heads)


def read_maps(maps: Any, sinks: Sinks, options: Mapping[str, Any]) -> Any:
    """What a plot draws of the maps that it is passed: these, or a map of each layer without its sinks.

    `options` are the plot's other keywords. Raises as `read_layers` and `analysis.without_sinks` do, and ValueError for
    `sinks` that are neither "keep" nor "remove".
    """
    if isinstance(sinks, str) and sinks == "keep":
        return maps
    from ..analysis.sinks import check_sinks, without_sinks

    check_sinks(sinks)
    # Of windows, the first axis cannot be the layers.
    return without_sinks(read_layers(maps, options.get("batch") if options.get("window") is None else 0))


def note_of(layers: Sequence[Any]) -> str:
    """What a title says of the weights, such as "sinks removed"; empty if they are as the model has them."""
    return str(getattr(getattr(layers[0], "source", None), "note", ""))


def same_shape(layers: Sequence[Any], user: str) -> None:
    """Raise ValueError unless the layers agree in all axes but the batch; `user` is what needs it, for the message."""
    shapes = [tuple(map(int, one.shape[1:])) for one in layers]
    if len(set(shapes)) > 1:
        listing = ", ".join(map(str, shapes))
        raise ValueError(f"{user} needs layers of one shape, got (heads, queries, keys) {listing}")


def _image(
    one: Any, layers: list[Any], batch: Choice, head: Choice | None, all_heads: bool, query: int | None, check: RowCheck
) -> Array:
    """(heads, queries, keys) of one layer, for one image or for all images reduced to one."""
    images, heads = map(int, one.shape[:2])
    image = _position("batch", batch, images, layers)
    which = None if all_heads else _position("head", head, heads, layers)
    if hasattr(one, "rows") and hasattr(one, "dense"):  # an AttentionMap
        weights = one.dense() if query is None else one.rows(query)
    else:
        weights = one if query is None else one[:, :, query : query + 1]
    weights = as_numbers(weights if image is None else weights[image : image + 1])
    weights = weights if which is None else weights[:, which : which + 1]
    if check.look(weights, "the map", getattr(one, "may_lack_weight", False)).all():
        raise ValueError("every row of the chosen map holds NaN: there is nothing to draw")
    # Heads are reduced before layers, as in a rollout; max and mean do not commute.
    if not all_heads:
        weights = _reduce(weights, head if which is None else None, axis=1)
    chosen: Array = _reduce(weights, batch if image is None else None, axis=0)[0]
    return chosen


def read_layers(maps: Any, batch: Choice | None = 0) -> list[Any]:
    """The layers in whatever holds attention, as in `layers_in`; raises ValueError if one is empty, too.

    Warns of one array with several images where none is chosen, `batch` None: its first axis may be the layers.
    """
    if batch is None and is_array(maps) and not hasattr(maps, "rows") and len(maps.shape) == 4 and maps.shape[0] > 1:
        warn(
            f"an array of the shape {tuple(maps.shape)} is read as (batch, heads, queries, keys), and its first image "
            "or text is drawn: pass batch=0 if that is right; if its first axis is the layers, pass list(maps)",
            "array-of-four-axes",
        )
    layers = layers_in(maps).layers
    check_not_empty(layers)
    return layers


def _position(name: str, choice: Choice | None, size: int, layers: list[Any]) -> int | None:
    """The chosen index along an axis, counted from the front; None for a reduction."""
    options = f'{name}=0 to {size - 1} (negative counts from the end) or {name}="mean", "max" or "min"'
    if choice is None:
        if size > 1:
            raise ValueError(f"there are {size} {name}s and none is chosen: pass {options}")
        return 0
    if isinstance(choice, str):
        if choice not in get_args(Reduction):
            raise ValueError(f"{name}={choice!r} is not a reduction: pass {options}")
        return None
    try:
        index = operator.index(choice)
    except TypeError:
        raise TypeError(f"{name}={choice!r} is a {type(choice).__name__}: pass {options}") from None
    if not -size <= index < size:
        shape = tuple(map(int, layers[0].shape))
        hint = ""
        if name == "layer" and size == 1 and shape[0] > 1:
            hint = "; if its first axis is the layers, pass list(maps), or maps[:, None] with an axis for the batch"
        raise IndexError(
            f"{name}={choice} is out of range: {len(layers)} layer(s) of (batch, heads, queries, keys) = {shape} have "
            f"{size} along {name}: pass {options}{hint}"
        )
    return index % size


def _reduce(weights: Array, reduction: Choice | None, axis: int) -> Array:
    if reduction is None:
        return weights
    reduced: Array = getattr(weights, str(reduction))(axis=axis, keepdims=True)
    return reduced


def _words(name: str, choice: Choice | None, position: int | None, size: int) -> str:
    if size == 1:
        return ""
    return f"{choice} of {size} {name}s" if position is None else f"{name} {position}"
