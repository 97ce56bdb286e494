"""What a module cuts of the picture that it was given: its patches, the tokens before them, its windows.

- pictures and videos: the module that was given one, and its convolution whose stride is its kernel, as timm,
  transformers and torchvision cut patches. The names of its parameters tell the tokens before the patches;
- patches that come as a sequence, each picture with a grid of its own: the arguments beside them;
- windows: the module that has `window_size` and was given a grid of patches.
"""

from __future__ import annotations

import itertools
import math
import operator
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..images import THUMBNAIL, Thumbnail
from ..layout import Layout, Part, Windows, pair_of
from ..maps import AttentionMap
from ..tensors import version_of
from .modules import ModuleCall, arguments_named, arguments_of, inputs_of, may_have, shapes_of

# The parameters that become tokens before the patches, in this order, as timm, transformers, torchvision and DINO's own
# code call them.
_PREFIXES = {
    "cls_token": "CLS",
    "class_token": "CLS",
    "class_embedding": "CLS",
    "dist_token": "DIST",
    "distillation_token": "DIST",
    "reg_token": "REG",
    "register_tokens": "REG",
    "storage_tokens": "REG",
}


@dataclass(frozen=True)
class Picture:
    """A picture or video that a module was given, as its first convolution cuts it."""

    shape: tuple[int, ...]
    """(rows, columns) of patches, or (frames, rows, columns)."""
    size: tuple[int, int]
    """(height, width) in pixels."""
    patch: tuple[float, float]
    """(height, width) of a patch in pixels."""
    prefix: tuple[str, ...]
    """What the tokens before the patches are called."""
    seen: tuple[Thumbnail, ...] = ()
    """A small copy of each picture of the batch."""
    _told: dict[tuple[int, int], Layout | None] = field(default_factory=dict, init=False, repr=False, compare=False)

    def of(self, tokens: int, batch: int) -> Layout | None:
        """The layout of that many tokens; None where these are not the patches, with or without what precedes them."""
        key = tokens, batch
        if key not in self._told:
            self._told[key] = self._layout(tokens, batch)
        return self._told[key]

    def _layout(self, tokens: int, batch: int) -> Layout | None:
        prefix = _by_count(self.prefix)
        patches = Part("patches", math.prod(self.shape), (), self.shape, self.patch, self.size)
        names = prefix.get(tokens - patches.count)
        if names is None and len(self.shape) == 3:  # space and time apart, as TimeSformer has them
            frames, *sides = self.shape
            patches = replace(patches, count=math.prod(sides), shape=tuple(sides))
            if patches.count == tokens == frames:
                return None  # which of the two cannot be told
            names = prefix.get(tokens - patches.count) if batch % frames == 0 else None
            if names is None and tokens == frames and batch % patches.count == 0:
                return Layout((Part("text", frames, tuple(f"frame {number}" for number in range(frames))),))
        if names is None:
            return None
        return Layout((*([Part("special", len(names), names)] if names else []), patches), seen=self.seen)


class Pictures:
    """The pictures that the modules of a model are given, as these cut them."""

    def __init__(self) -> None:
        # By the id of a module that module, its convolution, and what the tokens before the patches are called.
        self._convolutions: dict[int, tuple[weakref.ref[nn.Module], Any, tuple[str, ...]]] = {}
        self._last: _Seen | None = None

    def of(self, call: ModuleCall, given: Sequence[tuple[str, Tensor]] | None = None) -> Picture | None:
        """The picture that a call was given; None where it was given none, or does not cut it into patches.

        Args:
            given: the tensors with names that it may be; None: these are looked for.
        """
        module = call.module
        known = self._convolutions.get(id(module))
        if known is not None and known[1] is None and known[0]() is module:
            return None
        for name, pixels in inputs_of(call, 4) if given is None else given:
            if pixels.ndim in (4, 5) and "mask" not in name:
                convolution, prefix = self._known_of(module)
                if convolution is None:
                    return None
                if self._last is not None and self._last.is_of(pixels, convolution):
                    return self._last.picture
                sizes = _sides(pixels, convolution, name)
                if sizes is not None:
                    picture = replace(_cut(module, convolution, sizes, prefix), seen=_thumbnails(pixels))
                    self._last = _Seen(weakref.ref(pixels), version_of(pixels), convolution, picture)
                    return picture
        return None

    def whole(self, call: ModuleCall) -> Picture | None:
        """The picture that a model was given whose first layers cut no patches; None where it was given none."""
        pixels = next((one for _, one in inputs_of(call) if one.ndim == 4 and one.shape[1] in (1, 3)), None)
        if pixels is None:
            return None
        if self._last is None or not self._last.is_of(pixels, None):
            size = pixels.shape[2], pixels.shape[3]
            picture = Picture((), size, (1.0, 1.0), (), _thumbnails(pixels))
            self._last = _Seen(weakref.ref(pixels), version_of(pixels), None, picture)
        return self._last.picture

    def prefix_of(self, module: nn.Module) -> tuple[str, ...]:
        """What the tokens before the patches of a module are called."""
        return self._known_of(module)[1]

    def _known_of(self, module: nn.Module) -> tuple[Any, tuple[str, ...]]:
        """The convolution of a module that cuts patches, and what the tokens before these are called."""
        known = self._convolutions.get(id(module))
        if known is None or known[0]() is not module:
            known = weakref.ref(module), _first_convolution(module), _prefix(module)
            self._convolutions[id(module)] = known
        return known[1:]


class _Seen(NamedTuple):
    """The pixels that were seen last, as for all layers of a model."""

    pixels: weakref.ref[Tensor]
    version: int | None
    """See `version_of`: another picture may be written in place."""
    convolution: Any
    """What cut them; None: nothing did."""
    picture: Picture

    def is_of(self, pixels: Tensor, convolution: Any) -> bool:
        """Whether these pixels are still those that were seen, and cut by the same."""
        is_same = self.pixels() is pixels and self.convolution is convolution
        return is_same and self.version is not None and self.version == version_of(pixels)


def _first_convolution(module: nn.Module) -> nn.Conv2d | nn.Conv3d | None:
    """The first convolution of a module, where it cuts its input into patches."""
    embeds: Any = getattr(module, "embeds", None)
    if getattr(embeds, "is_linear", False):  # of timm's NaFlex models: the same, as a product
        return nn.Conv2d(3, 1, embeds.patch_size, embeds.patch_size, device="meta")
    first = next((one for one in module.modules() if isinstance(one, (nn.Conv2d, nn.Conv3d))), None)
    if first is None or max(first.stride[-2:]) < 2 or tuple(first.kernel_size) != tuple(first.stride):
        return None
    return first


def _prefix(module: nn.Module) -> tuple[str, ...]:
    """What the tokens before the patches are called, by the names of the parameters that they are."""
    found: dict[str, tuple[str, ...]] = {}
    for name, parameter in _parameters_near(module):
        stem = _PREFIXES.get(name)
        if stem is not None:
            count = parameter.shape[-2] if parameter.ndim > 1 else 1
            found[name] = (stem,) if count == 1 else tuple(f"{stem}{number + 1}" for number in range(count))
    return tuple(itertools.chain(*(found[name] for name in _PREFIXES if name in found)))


def _parameters_near(module: nn.Module, depth: int = 2) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a module and of those at most so many levels within it, but none of a row of layers."""
    yield from module.named_parameters(recurse=False)
    for name, inner in module.named_children():
        if depth and not name.isdigit():
            yield from _parameters_near(inner, depth - 1)


def _thumbnails(pixels: Tensor) -> tuple[Thumbnail, ...]:
    """A small copy of each picture, in shades of grey from 0 to 255; none of videos, or of pictures without shades."""
    if pixels.ndim != 4:
        return ()
    pixels = pixels.detach().float()
    if pixels.device.type == "cpu":
        grey = _shrunk(pixels.numpy())
    else:  # there this is one kernel, and little has to be fetched
        grey = nn.functional.adaptive_avg_pool2d(pixels, THUMBNAIL).mean(1).flatten(1).cpu().numpy()
    low, high = grey.min(1, keepdims=True), grey.max(1, keepdims=True)
    if not (high > low).all():  # false for NaN
        return ()
    with np.errstate(all="ignore"):
        shades = np.rint((grey - low) / (high - low) * np.float32(255)).astype(np.uint8)
    return tuple([tuple(one.tobytes()) for one in shades])


def _shrunk(pixels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The sums of the channels of pictures as `adaptive_avg_pool2d` shrinks them, (pictures, pixels).

    Its kernel for CPUs adds one number after another. Here whole channels are added, then rows, then columns. A product
    of matrices would be as fast, but waits for threads where others use the cores.
    """
    pictures, channels, rows, columns = pixels.shape
    with np.errstate(all="ignore"):
        lines = np.empty((pictures, THUMBNAIL, columns), np.float32)
        few = max(1, 2**17 // max(1, rows * columns))  # whose shades stay in the processor's cache
        room = np.empty((min(few, pictures), rows, columns), np.float32)
        for first in range(0, pictures, few):
            some = pixels[first : first + few]
            shades = np.add(some[:, 0], some[:, 1] if channels > 1 else np.float32(0), out=room[: len(some)])
            for channel in range(2, channels):
                shades += some[:, channel]
            lines[first : first + few] = _sums_of_parts(shades)
        columns_first = np.ascontiguousarray(lines.reshape(pictures * THUMBNAIL, columns).T)
        small = _sums_of_parts(columns_first[None]).reshape(THUMBNAIL, pictures, THUMBNAIL)
        means = small.transpose(1, 2, 0) / _sizes_of_parts(rows)[:, None] / _sizes_of_parts(columns)
    return means.reshape(pictures, THUMBNAIL**2)


def _sums_of_parts(numbers: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The sums of `THUMBNAIL` parts of the second of three axes."""
    outer, side, inner = numbers.shape
    blocks = math.gcd(side, THUMBNAIL)  # all of which have the same parts
    numbers = numbers.reshape(outer * blocks, side // blocks, inner)
    sums = np.empty((outer * blocks, THUMBNAIL // blocks, inner), np.float32)
    for part, (start, stop) in enumerate(_parts_of(side // blocks, THUMBNAIL // blocks)):
        np.add.reduce(numbers[:, start:stop], axis=1, out=sums[:, part])
    return sums.reshape(outer, THUMBNAIL, inner)


@lru_cache(maxsize=64)
def _sizes_of_parts(side: int) -> npt.NDArray[np.float32]:
    return np.array([stop - start for start, stop in _parts_of(side, THUMBNAIL)], np.float32)


@lru_cache(maxsize=64)
def _parts_of(side: int, count: int) -> list[tuple[int, int]]:
    """(start, stop) of so many neighbouring parts of a side, all of about one size: neighbours may overlap by one."""
    return [(part * side // count, -(-(part + 1) * side // count)) for part in range(count)]


def _sides(pixels: Tensor, convolution: nn.Conv2d | nn.Conv3d, name: str) -> tuple[int, ...] | None:
    """(height, width) of what a convolution is given, or (frames, height, width); None where it is no picture."""
    channels, shape = convolution.in_channels, pixels.shape
    if pixels.ndim == 4:
        return tuple(shape[2:]) if shape[1] == channels and isinstance(convolution, nn.Conv2d) else None
    # transformers has the frames before the channels.
    is_frames_first = shape[2] == channels and (shape[1] != channels or name.startswith("pixel_values"))
    if is_frames_first:
        return shape[1], *shape[3:]
    return tuple(shape[2:]) if shape[1] == channels else None


def _cut(
    module: nn.Module, convolution: nn.Conv2d | nn.Conv3d, sides: tuple[int, ...], prefix: tuple[str, ...]
) -> Picture:
    """The picture of these sides as the module cuts it."""
    steps: list[int] = list(convolution.stride)
    if len(sides) > len(steps):
        steps = [1, *steps]  # each frame by itself
    grid_of = getattr(getattr(module, "patch_embed", None), "dynamic_feat_size", None)
    if grid_of is not None and len(sides) == 2:  # timm, which may pad
        shape = tuple(map(int, grid_of(sides)))
    else:
        shape = tuple(side // step for side, step in zip(sides, steps, strict=True))
    return Picture(shape, (sides[-2], sides[-1]), (float(steps[-2]), float(steps[-1])), prefix)


def _by_count(prefix: tuple[str, ...]) -> dict[int, tuple[str, ...]]:
    """The names of the tokens before the patches, by how many there are: all, or the class token, or none."""
    return {len(names): names for names in (prefix[:1], prefix, ())}


def patches_given(
    call: ModuleCall,
    arguments: dict[str, Any],
    calls: Callable[[], Sequence[ModuleCall]],
    prefix_of: Callable[[nn.Module], tuple[str, ...]],
    tokens: int,
) -> Layout | None:
    """The layout of patches that a module was given as a sequence, each picture with a grid and padding of its own.

    So do timm's NaFlex models and SigLIP 2. None where the module was given no such sequence.
    """
    grids = arguments.get("grid_thw")
    side = getattr(call.module, "spatial_merge_size", None) if isinstance(grids, Tensor) else None
    if isinstance(grids, Tensor) and isinstance(side, int):
        ends = next(iter(arguments_named(calls(), "cu_seqlens")), None)
        return _merging_next(call.module, grids.tolist(), side, ends, tokens)
    given = call.args[0] if call.args and isinstance(call.args[0], Mapping) else arguments
    coordinates, sizes = given.get("patch_coord"), given.get("spatial_shapes")
    if not isinstance(coordinates, Tensor) and not isinstance(sizes, Tensor):
        return None
    patches = next((given[name] for name in ("patches", "pixel_values", "x") if name in given), None)
    if not isinstance(patches, Tensor) or patches.ndim != 3:
        return None
    prefix = prefix_of(call.module)
    if tokens - patches.shape[1] not in _by_count(prefix):
        return None
    if isinstance(coordinates, Tensor):
        sizes = coordinates.amax(1) + 1
    if not isinstance(sizes, Tensor) or sizes.shape != (len(patches), 2):
        return None
    names, side = _by_count(prefix)[tokens - patches.shape[1]], float(math.isqrt(patches.shape[2] // 3))
    samples = []
    for at, (rows, columns) in enumerate(sizes.tolist()):
        count = rows * columns
        if isinstance(coordinates, Tensor):
            places = coordinates[at, :count]
            if not torch.equal(places[:, 0] * columns + places[:, 1], torch.arange(count).to(places)):
                return None  # not row by row, as where patches were dropped
        size = int(rows * side), int(columns * side)
        parts = [Part("special", len(names), names)] if names else []
        parts.append(Part("patches", count, (), (rows, columns), (side, side), size))
        left = patches.shape[1] - count
        samples.append(Layout((*parts, Part("padding", left)) if left else tuple(parts)))
    return Layout.batch(samples)


def _merging_next(module: nn.Module, grids: list[list[int]], side: int, ends: Any, tokens: int) -> Layout | None:
    """The layout of patches that come in squares, which are merged later, as in the vision tower of Qwen2-VL.

    Where the module has windows besides, the squares of a window follow each other. A kernel is called for each picture
    or frame; or for all of them packed, whose tokens then have names only.

    Args:
        ends: where the tokens of each picture or frame end, as its layers are given it; of a layer that attends within
            windows those of each window, and which window a call has is not known.
    """
    each = [(rows, columns) for frames, rows, columns in grids for _ in range(frames)]
    if not isinstance(ends, Tensor) or ends.diff().tolist() != [rows * columns for rows, columns in each]:
        return None
    window, pixels = (
        getattr(one, name, None) for one, name in ((module, "window_size"), (module.config, "patch_size"))
    )

    def order(shape: tuple[int, int]) -> list[int]:
        squares = Windows((side, side)).places(*shape)
        if isinstance(window, int) and isinstance(pixels, int):
            high = window // pixels // side
            windows = Windows((high, high)).places(*(size // side for size in shape))
            squares = squares[windows[windows >= 0]]
        return list(map(int, squares.ravel()))

    alike = {shape for shape in each if math.prod(shape) == tokens}
    if len(alike) == 1:
        [shape] = alike
        size = None if pixels is None else (shape[0] * pixels, shape[1] * pixels)
        windows = Windows(shape, order=tuple(order(shape)))
        return Layout.picture(shape, patch_size=pixels, image_size=size, windows=windows)
    if sum(map(math.prod, each)) != tokens:
        return None
    places = ((number, divmod(place, shape[1])) for number, shape in enumerate(each) for place in order(shape))
    names = tuple(f"picture {number}, patch {place}" for number, place in places)
    return Layout((Part("special", tokens, names),))


def on_the_way(picture: Picture, calls: Sequence[ModuleCall], tokens: int) -> Layout | None:
    """The layout of tokens that are no longer the first patches, as where layers merge 2 x 2 of them.

    A module was given them, as a grid or as a sequence. A single token is no patch, but what pools them.
    """
    if tokens == 1:
        return None
    merged = [tuple(-(-side // 2**times) for side in picture.shape) for times in range(1, 6)]
    shapes = shapes_of(calls)
    for number, shape in enumerate(shapes):
        grids: list[tuple[int, ...]] = []
        if len(shape) == 4:
            grids = [sides for sides in (shape[1:3], shape[2:4]) if math.prod(sides) == tokens]
            # (batch, blocks, tokens of each, width), as in Nest, is longer than what the modules around are given.
            around: list[tuple[Sequence[int], ...]] = [(picture.shape[-2:],)]
            around += [(one[1:3], one[2:4]) for one in shapes[number + 1 :] if len(one) == 4]
            grids = [grid for grid in grids if all(any(_fits(grid, one) for one in pair) for pair in around)]
        elif len(shape) == 3 and shape[1] == tokens:
            grids = [grid for grid in merged if math.prod(grid) == tokens]
        if len(set(grids)) == 1 and len(grids[0]) == 2:
            rows, columns = grids[0]
            patch = picture.size[0] / rows, picture.size[1] / columns
            return Layout((Part("patches", tokens, (), (rows, columns), patch, picture.size),), seen=picture.seen)
    return None


def _fits(grid: Sequence[int], outer: Sequence[int]) -> bool:
    """Whether a grid is no finer than another one."""
    return all(map(operator.le, grid, outer))


def cut_in_windows(made: AttentionMap, calls: Sequence[ModuleCall]) -> tuple[tuple[int, int], Windows] | None:
    """(rows, columns) of the patches and the windows of a map, as Swin's layers and those like it cut them."""
    batch, _, queries, keys = made.shape
    if queries != keys:
        return None
    for call in reversed(calls):
        size = _window_size(call.module) if may_have(call.module, _OF_WINDOWS) else None
        if size is None:
            continue
        sides = pair_of("window_size", tuple(size) if isinstance(size, (list, tuple)) else size)
        if math.prod(sides) != keys:
            continue
        library = type(call.module).__module__.partition(".")[0]
        shift = getattr(call.module, "shift_size", 0)
        steps = [int(step) for step in (shift if isinstance(shift, (list, tuple)) else (shift, shift))]
        is_spread = getattr(call.module, "partition_type", None) == "grid" or not _is_block(call.module)
        for images, rows, columns in _grids_given(call):
            own = steps
            if library == "torchvision":
                own = [
                    0 if side >= size else step for step, side, size in zip(steps, sides, (rows, columns), strict=True)
                ]
            windows = Windows(sides, (own[0], own[1]), library != "timm", is_spread)
            is_filled = not is_spread or not (rows % sides[0] or columns % sides[1])
            if is_filled and batch == images * len(windows.places(rows, columns)):
                return (rows, columns), windows
    return None


_OF_WINDOWS = ("window_size", "partition_size", "partition_type")


def _window_size(module: nn.Module) -> Any:
    """The sides of the windows that a module cuts; None where it cuts none. MaxViT calls them partitions."""
    size = getattr(module, "window_size", getattr(module, "partition_size", None))
    if size is None and hasattr(module, "partition_type"):  # torchvision has the number of windows under either name
        size = module.g if module.partition_type == "grid" else module.p
    return size


def _is_block(module: nn.Module) -> bool:
    return bool(getattr(module, "partition_block", True))


def _grids_given(call: ModuleCall) -> list[tuple[int, int, int]]:
    """What may be (images, rows, columns) of the patches that a module was given, which has the width last, or second;
    or the sides beside it."""
    tensor = next((one for _, one in inputs_of(call)), None)
    if tensor is None:
        return []
    if tensor.ndim == 4:
        images, first, second, third = tensor.shape
        return [(images, first, second), (images, second, third)]
    sides = arguments_of(call).get("input_dimensions")
    return [(tensor.shape[0], int(sides[0]), int(sides[1]))] if sides is not None and tensor.ndim == 3 else []
