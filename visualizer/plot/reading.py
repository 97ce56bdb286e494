"""What a user hands to a plot, read into plain numpy: the chosen map, the patch grid, the picture.

An axis is picked by an index or by a named reduction, never dropped because its length happens to be one: a batch
of one image and a model of one head would otherwise be taken for each other. Only the layer asked for is converted,
so a list of large maps costs one of them. torch is recognised by what its tensors can do and never imported.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from ..errors import warn

Array: TypeAlias = npt.NDArray[np.floating[Any]]
Reduction: TypeAlias = Literal["mean", "max", "min"]
Choice: TypeAlias = int | Reduction
Size: TypeAlias = int | tuple[int, int]

_SHAPES = "(queries, keys), (heads, queries, keys), (batch, heads, queries, keys)"

# Rounding of a whole row in bfloat16 stays below this; logits and dropout do not.
_ROW_SUM_TOLERANCE = 0.02


@dataclass(frozen=True)
class Selection:
    """The weights to draw and the words that say which they are."""

    weights: Array
    """(queries, keys), or (heads, queries, keys) where all heads were asked for."""
    label: str
    """Such as "layer 11, mean of 6 heads"; empty where there was nothing to choose from."""


def select(maps: Any, *, layer: Choice | None, batch: Choice, head: Choice | None) -> Selection:
    """One layer's weights of one image, for one head; `select_all` takes every head.

    >>> select(np.full((1, 6, 2, 2), 0.5), layer=None, batch=0, head=-1).label
    'head 5'

    Raises ValueError for shapes and contents that are no attention maps and for a choice left open, IndexError for
    one out of range, TypeError for one that is neither an index nor a reduction. Warns of rows that do not sum to
    one and of NaN.
    """
    return _select(maps, layer, batch, head, all_heads=False)


def select_all(maps: Any, *, layer: Choice | None, batch: Choice) -> Selection:
    """Every head's weights of one layer and one image, (heads, queries, keys); raises and warns as `select` does.

    >>> select_all([np.full((1, 6, 2, 2), 0.5)] * 12, layer=-1, batch=0).label
    'layer 11'
    """
    return _select(maps, layer, batch, None, all_heads=True)


def _select(maps: Any, layer: Choice | None, batch: Choice, head: Choice | None, all_heads: bool) -> Selection:
    layers = _layers(maps)
    at = _position("layer", layer, len(layers), layers)
    reduced, problems, heads = [], set[str](), 1
    for number in range(len(layers)) if at is None else [at]:
        weights = layers[number][(None,) * (4 - len(layers[number].shape))]  # (batch, heads, queries, keys)
        image = _position("batch", batch, weights.shape[0], layers)
        weights = _numpy(weights if image is None else weights[image : image + 1])
        heads = weights.shape[1]
        if not all_heads:
            which = _position("head", head, heads, layers)
            weights = weights if which is None else weights[:, which : which + 1]
        problems |= _problems(weights)
        # Heads before layers, as rollout has it; max and mean do not commute.
        if not all_heads:
            weights = _reduce(weights, head if which is None else None, axis=1)  # one head or the reduction
        reduced.append(_reduce(weights, batch if image is None else None, axis=0)[0])  # (heads, queries, keys)
    if len({weights.shape for weights in reduced}) > 1:
        shapes = ", ".join(str(weights.shape) for weights in reduced)
        raise ValueError(f"layer={layer!r} needs layers of one shape, got (heads, queries, keys) {shapes}")
    weights = _reduce(np.stack(reduced), layer if at is None else None, axis=0)[0]
    for problem in sorted(problems):
        warn(problem)
    words = [_words("layer", layer, at, len(layers))]
    if not all_heads:
        words.append(_words("head", head, which, heads))
        weights = weights[0]
    return Selection(weights, ", ".join(word for word in words if word))


def _layers(maps: Any) -> list[Any]:
    """One unconverted tensor or array per layer, each of two to four axes."""
    if isinstance(maps, Mapping):
        maps = _of_mapping(maps)
    if maps is None or (isinstance(maps, (list, tuple)) and (not maps or any(one is None for one in maps))):
        what = "None" if maps is None else f"a {type(maps).__name__} " + ("of None" if maps else "without entries")
        raise ValueError(
            f"there are no attention maps here: got {what}. A transformers model with "
            'attn_implementation="sdpa" (the default) or another fused kernel does not return weights: load it with '
            'attn_implementation="eager" and call it with output_attentions=True. For captured maps: capture has '
            "to be active while the model runs"
        )
    if isinstance(maps, (list, tuple)):
        if any(isinstance(one, (list, tuple)) and any(_is_array(inner) for inner in one) for one in maps):
            raise ValueError(
                f"maps is a {type(maps).__name__} of {len(maps)} lists of arrays: choose one of them. "
                "generate() returns one tuple of layers per step, maps[step] is what a plot takes"
            )
        if all(_is_array(one) and len(one.shape) >= 2 for one in maps):
            layers = list(maps)
            for number, one in enumerate(layers):
                if len(one.shape) > 4 or 0 in one.shape:
                    raise ValueError(
                        f"layer {number} of the {len(layers)} has shape {tuple(one.shape)}; expected a non-empty "
                        + _SHAPES
                    )
            return layers
    if not _is_array(maps):
        maps = _numpy(maps)  # nested lists of numbers
    shape = tuple(maps.shape)
    if not 2 <= len(shape) <= 5 or 0 in shape:
        raise ValueError(
            f"maps has shape {shape}; expected a non-empty {_SHAPES} or (layers, batch, heads, queries, keys)"
        )
    return [maps[number] for number in range(shape[0])] if len(shape) == 5 else [maps]


def _of_mapping(maps: Mapping[Any, Any]) -> Any:
    """The list of layers in a cache: its only entry, or one array of each entry."""
    values = [value for value in maps.values() if not isinstance(value, list) or value]  # a key that nothing ran under
    if len(values) == 1:
        return values[0]
    singles = [value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value for value in values]
    if not all(_is_array(one) for one in singles):
        counts = ", ".join(
            f"{key!r}: {len(value) if isinstance(value, (list, tuple)) else type(value).__name__}"
            for key, value in list(maps.items())[:6]
        )
        raise ValueError(f"maps has {len(values)} keys and not one array for each ({counts}): pass maps[key]")
    return singles


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "__getitem__")


def _numpy(value: Any) -> Array:
    """The value as floats of at least 32 bits."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if value.is_floating_point() and value.element_size() < 4:
            value = value.float()  # numpy has no bfloat16
    try:
        array = np.asarray(value)
        if array.dtype.kind in "biufV" and array.dtype.names is None:  # V: bfloat16 as jax and ml_dtypes have it
            return array.astype(np.result_type(array.dtype, np.float32) if array.dtype.kind == "f" else np.float32)
    except ValueError as error:
        raise ValueError(f"maps is a ragged {type(value).__name__}, not an array: {error}") from error
    raise TypeError(f"expected numbers, got {type(value).__name__} of {array.dtype}")


def _position(name: str, choice: Choice | None, size: int, layers: list[Any]) -> int | None:
    """The axis' chosen index, counted from the front; None for a reduction."""
    options = f'{name}=0 to {size - 1} (negative counts from the end) or {name}="mean", "max" or "min"'
    if choice is None:
        if size > 1:
            raise ValueError(f"maps has {size} {name}s and none is chosen: pass {options}")
        return 0
    if isinstance(choice, str):
        if choice not in get_args(Reduction):
            raise ValueError(f"{name}={choice!r} is no reduction: pass {options}")
        return None
    try:
        index = operator.index(choice)
    except TypeError:
        raise TypeError(f"{name}={choice!r} is a {type(choice).__name__}: pass {options}") from None
    if not -size <= index < size:
        shape = tuple(layers[0].shape)
        axes = ["batch", "heads", "queries", "keys"][-len(shape) :]
        hint = ""
        if name == "layer" and size == 1 and len(shape) == 4:
            hint = "; if its first axis is the layers, pass list(maps), or maps[:, None] with an axis for the batch"
        raise IndexError(
            f"{name}={choice} is out of range: {len(layers)} layer(s) of shape {shape}, read as ({', '.join(axes)}), "
            f"have {size} along {name}: pass {options}{hint}"
        )
    return index % size


def _problems(weights: Array) -> set[str]:
    """What makes these (batch, heads, queries, keys) doubtful as attention weights, in words."""
    if np.isinf(weights).any():
        raise ValueError(
            "maps holds infinite values, which no colour scale can show: these look like masked logits, take their "
            "softmax over the keys first"
        )
    found = set()
    missing = np.isnan(weights).any(-1)
    if missing.all():
        raise ValueError("every row of the chosen map holds NaN: there is nothing to draw")
    if missing.any():
        found.add(
            f"{int(missing.sum())} of {missing.size} rows hold NaN and are left blank (a fully masked row gives NaN "
            "in a softmax)"
        )
    sums = weights.sum(-1, dtype=np.float64)
    # A fully masked row is all zeros in torch's fused attention: rightly so, and no reason to warn.
    odd = ~missing & (np.abs(sums - 1) > _ROW_SUM_TOLERANCE) & weights.any(-1)
    if odd.any():
        found.add(
            f"{int(odd.sum())} of {odd.size} rows do not sum to 1 (sums from {sums[odd].min():.3g} to "
            f"{sums[odd].max():.3g}): are these logits before the softmax, or weights after dropout? "
            "They are drawn as they are"
        )
    return found


def _reduce(weights: Array, reduction: Choice | None, axis: int) -> Array:
    if reduction is None:
        return weights
    reduced: Array = getattr(weights, str(reduction))(axis=axis, keepdims=True)
    return reduced


def _words(name: str, choice: Choice | None, position: int | None, size: int) -> str:
    if size == 1:
        return ""
    return f"{choice} of {size} {name}s" if position is None else f"{name} {position}"


@dataclass(frozen=True)
class Grid:
    """How the keys lie on a picture: named prefix tokens first, then the patches row by row."""

    rows: int
    columns: int
    prefix: tuple[str, ...]

    def token(self, query: int | tuple[int, int], queries: int, keys: int) -> int:
        """The token of a patch (row, column), or of an index among all tokens; from the front."""
        if isinstance(query, str) or not isinstance(query, Sequence):
            try:
                index = operator.index(query)
            except TypeError:
                raise TypeError(f"query={query!r}: pass a patch (row, column) or a token's index") from None
            if not -queries <= index < queries:
                raise IndexError(
                    f"query={index} is out of range: {queries} queries, the first {len(self.prefix)} of them prefix "
                    f"tokens; pass 0 to {queries - 1}, or a patch (row, column)"
                )
            return index % queries
        if len(query) != 2:
            raise ValueError(f"query={query!r} has {len(query)} numbers: pass a patch (row, column) or a token's index")
        if queries != keys:
            raise ValueError(
                f"query={query!r} names a patch, but these are {queries} queries over {keys} keys (cross-attention?), "
                "so queries are no patches: pass the query's index"
            )
        row, column = (operator.index(place) for place in query)
        if not (-self.rows <= row < self.rows and -self.columns <= column < self.columns):
            raise IndexError(
                f"query={query!r} is out of range: the grid has {self.rows} rows and {self.columns} columns of "
                f"patches, counted from 0; query is (row, column)"
            )
        return len(self.prefix) + (row % self.rows) * self.columns + column % self.columns


def read_grid(
    keys: int,
    *,
    grid: tuple[int, int] | None,
    image_size: Size | None,
    patch_size: Size | None,
    prefix_tokens: int | Sequence[str] | None,
    picture: tuple[int, int] | None,
) -> Grid:
    """The patch grid of that many keys, as told or, where only one is possible, worked out.

    >>> read_grid(197, grid=None, image_size=None, patch_size=None, prefix_tokens=None, picture=None)
    Grid(rows=14, columns=14, prefix=('CLS',))

    Without prefix_tokens, what the grid leaves over are prefix tokens; without a grid either, the keys, or the keys
    but one, must be a square. patch_size without image_size takes the picture's own (height, width).
    Raises ValueError when the numbers do not fit, with all of them.
    """
    names = None
    if isinstance(prefix_tokens, str):
        names = [prefix_tokens]
    elif isinstance(prefix_tokens, Sequence):
        names = [str(name) for name in prefix_tokens]
    count = len(names) if names is not None else None if prefix_tokens is None else operator.index(prefix_tokens)  # type: ignore[arg-type]
    if count is not None and not 0 <= count < keys:
        raise ValueError(f"prefix_tokens={prefix_tokens!r} does not leave a patch among {keys} keys")
    given = f"{keys} keys" + ("" if count is None else f", {count} of them prefix tokens")
    if grid is not None:
        rows, columns = _pair("grid", grid)
        how = f"grid={grid}"
    elif patch_size is not None:
        if image_size is None and picture is None:
            raise ValueError(f"patch_size={patch_size} alone gives no grid: pass image_size= too, or an image")
        high, wide = _pair("image_size", image_size) if image_size is not None else picture  # type: ignore[misc]
        patch_high, patch_wide = _pair("patch_size", patch_size)
        how = f"an image of {high} x {wide} pixels in patches of {patch_high} x {patch_wide}"
        if high % patch_high or wide % patch_wide:
            raise ValueError(f"{how} does not come out even: image_size= is the size the model saw")
        rows, columns = high // patch_high, wide // patch_wide
    elif image_size is not None:
        raise ValueError(f"image_size={image_size} alone gives no grid: pass patch_size= too")
    else:
        rows = columns = _square_side(keys, count, given)
        how = f"a square grid of side {rows}"
    left = keys - rows * columns
    if left < 0 or (count is not None and left != count):
        raise ValueError(
            f"{how} makes {rows} x {columns} = {rows * columns} patches, which does not fit {given}: "
            f"grid=(rows, columns) and prefix_tokens= must add up to {keys}"
        )
    return Grid(rows, columns, tuple(names if names is not None else _names(left)))


def _square_side(keys: int, count: int | None, given: str) -> int:
    for prefix in (0, 1) if count is None else (count,):
        side = math.isqrt(max(0, keys - prefix))
        if side > 0 and side * side == keys - prefix:
            return side
    tried = f"neither {keys} nor {keys - 1} is" if count is None else f"{keys - count} is not"
    raise ValueError(
        f"cannot tell the patch grid of {given}: {tried} a square number. Pass grid=(rows, columns), or image_size= "
        "and patch_size= in pixels; prefix_tokens= says how many tokens come before the patches"
    )


def _names(count: int) -> list[str]:
    """Names for a bare count: the first is nearly always the class token, the others differ by model."""
    return ["CLS", *(f"token {number}" for number in range(1, count))][:count]


def _pair(name: str, size: Size) -> tuple[int, int]:
    pair = (size, size) if not isinstance(size, Sequence) else tuple(size)
    try:
        high, wide = (operator.index(side) for side in pair)
    except (TypeError, ValueError):
        raise ValueError(f"{name}={size!r}: pass (height, width) as two whole numbers") from None
    if high < 1 or wide < 1:
        raise ValueError(f"{name}={size!r}: both must be at least 1")
    return high, wide


def read_image(image: Any) -> Array:
    """The picture as (height, width, 3) floats from 0 to 1, from an array, a tensor or a PIL image.

    >>> read_image(np.full((2, 3), 255, np.uint8)).shape
    (2, 3, 3)

    Takes (height, width), (height, width, channels) and, as torch has it, (channels, height, width); 1, 3 or 4
    channels, integers to 255 or floats to 1. What is transparent becomes white. Raises ValueError for anything else.
    """
    if hasattr(image, "convert"):
        image = image.convert("RGBA")  # a palette's indices are not colours
    if not _is_array(image) and not hasattr(image, "__array__") and not hasattr(image, "__array_interface__"):
        raise TypeError(f"image is a {type(image).__name__}: pass an array, a tensor or an opened PIL image")
    whole = not hasattr(image, "detach") and np.asarray(image).dtype.kind in "iu"
    if hasattr(image, "detach"):
        whole = not image.is_floating_point()
    pixels = _numpy(image)
    shape = pixels.shape
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim == 3 and shape[-1] not in (1, 3, 4) and shape[0] in (1, 3, 4):
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.ndim != 3 or pixels.shape[-1] not in (1, 3, 4) or 0 in shape:
        raise ValueError(
            f"image has shape {shape}; expected one picture: (height, width), (height, width, 3) or (3, height, width)"
            + ("; pass image[0] for the first of a batch" if len(shape) == 4 else "")
        )
    low, high = float(pixels.min()), float(pixels.max())
    top = 255 if whole else 1
    if not (-0.01 * top <= low and high <= 1.01 * top):  # NaN fails, a resize's overshoot passes
        raise ValueError(
            f"image has values from {low:.3g} to {high:.3g}; expected integers from 0 to 255 or floats from 0 to 1. "
            "Undo the model's normalisation first (image * std + mean), or divide by 255"
        )
    pixels = np.clip(pixels / top, 0, 1)
    if pixels.shape[-1] == 4:
        pixels = pixels[:, :, :3] * pixels[:, :, 3:] + 1 - pixels[:, :, 3:]
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3))
