"""What each token is, and where it lies: words, patches of a picture, special tokens, padding.

A `Layout` says it once. `attention(model)` reads it off the model and its input, and each map carries it; `layout_of`
makes one of the keywords that say so, or of the picture. Analyses, plots, the explorer, statistics and the command line
ask it, and guess nothing themselves.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, TypeAlias, TypedDict, get_args

import numpy as np
import numpy.typing as npt

from .errors import few, warn
from .images import FRAMES_ACROSS, Thumbnail, part_seen, side_by_side
from .reading import Array
from .words import readable, word_index, word_list

Size: TypeAlias = int | tuple[int, int]
Kind: TypeAlias = Literal["text", "patches", "special", "padding"]
Indices: TypeAlias = npt.NDArray[np.intp]

_MOST_PREFIX = 16  # tokens that a grid may leave over without a word; models have a class token and up to 8 registers
_MOST_NAMES = 12  # of special tokens, as the layout is printed
_TOLERANCE = 0.05  # how far from square a patch may be on the picture


class Patches(TypedDict, total=False):
    """The keywords that say where the patches lie; `plot.query` explains them."""

    layout: Layout | None
    grid: tuple[int, int] | None
    image_size: Size | None
    patch_size: Size | None
    prefix_tokens: int | Sequence[str] | None


@dataclass(frozen=True)
class Part:
    """Some neighbouring tokens of one kind."""

    kind: Kind
    count: int
    """How many tokens."""
    names: tuple[str, ...] = ()
    """The words of a text, or what special tokens are called; () where that is not known."""
    shape: tuple[int, ...] = ()
    """Of patches (rows, columns); or (frames, rows, columns) of a video, (depth, rows, columns) of a volume."""
    patch_size: tuple[float, float] | None = None
    """(height, width) of a patch in pixels of the picture that the model saw."""
    image_size: tuple[int, int] | None = None
    """(height, width) of that picture in pixels."""
    is_generated: bool = False
    """Whether the model wrote these tokens, in a generation."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind={self.kind!r}: pass one of {few(get_args(Kind), 4)}")
        if self.count < 0 or len(self.names) not in (0, self.count):
            raise ValueError(f"count={self.count} with {len(self.names)} names: pass none or one for each of 0 or more")
        if self.kind == "patches" and math.prod(self.shape) != self.count:
            raise ValueError(f"count={self.count}, and a grid of {self.shape} is {math.prod(self.shape)} of them")

    def __str__(self) -> str:
        return self._in_words() + " generated" * self.is_generated

    def _in_words(self) -> str:
        if self.kind == "patches":
            size = ""
            if self.patch_size is not None:
                high, wide = (f"{side:.4g}" for side in self.patch_size)
                size = f" of {high} pixels" if high == wide else f" of {high} x {wide} pixels"
            return f"{' x '.join(map(str, self.shape))} patches{size}"
        if self.kind == "special" and self.names:
            runs = [
                (stem, [*run]) for stem, run in itertools.groupby(self.names, lambda name: name.rstrip("0123456789"))
            ]
            if len(runs) > _MOST_NAMES:
                return f"{self.count} special, {self.names[0]} to {self.names[-1]}"
            return ", ".join(
                ", ".join(run) if len(run) < 3 else f"{len(run)} {'registers' if stem == 'REG' else stem}"
                for stem, run in runs
            )
        if self.kind == "padding":
            return f"{self.count} padding"
        return f"{self.count} token{'s' * (self.count > 1)}" if self.kind == "text" else f"{self.count} special"


@dataclass(frozen=True)
class Windows:
    """How a layer cuts the grid of patches into windows, each of which attends within itself."""

    size: tuple[int, int]
    """(rows, columns) of patches in a window."""
    shift: tuple[int, int] = (0, 0)
    """By how many (rows, columns) the grid is rolled before it is cut."""
    pads_first: bool = True
    """Whether a grid that the windows do not fill is padded before it is rolled, or behind."""
    is_spread: bool = False
    """Whether the patches of a window lie at even distances over the whole grid, as in MaxViT's grid attention."""
    order: tuple[int, ...] = ()
    """Of one window over the whole grid which patch each token is, where they are not row by row, as those of Qwen2-VL,
    of which each four neighbours follow each other."""

    def __post_init__(self) -> None:
        pair_of("size", self.size)
        if len(self.shift) != 2 or not all(isinstance(step, int) for step in self.shift):
            raise ValueError(f"shift={self.shift!r}: pass (rows, columns), two whole numbers")
        if self.order and sorted(self.order) != list(range(math.prod(self.size))):
            raise ValueError(
                f"order has {len(self.order)} numbers: pass each of 0 to {math.prod(self.size) - 1} once, the patches "
                f"of a window of {self.size[0]} x {self.size[1]}"
            )

    def check_fits(self, shape: tuple[int, ...]) -> None:
        """Raise ValueError where a grid of this shape cannot be cut so."""
        sides = list(zip(shape, self.size, strict=False))
        if len(shape) != 2:
            why = "windows lie on (rows, columns)"
        elif self.order and shape != tuple(self.size):
            why = "a window with an order covers the whole grid"
        elif self.is_spread and any(side % own for side, own in sides):
            why = "spread windows divide it"
        else:
            return
        raise ValueError(f"windows={self!r} do not fit a grid of {' x '.join(map(str, shape))} patches: {why}")

    def places(self, rows: int, columns: int) -> Indices:
        """For each window and each of its tokens the index of the patch, row by row; -1 where it is padding.

        >>> Windows((2, 2), (1, 1)).places(4, 4)[0]  # the last window of this grid is its four corners
        array([ 5,  6,  9, 10])
        """
        if self.order:
            return np.array([self.order], np.intp)
        places = np.arange(rows * columns).reshape(rows, columns)
        high, wide = self.size
        if self.is_spread:
            return places.reshape(high, -1, wide, columns // wide).transpose(1, 3, 0, 2).reshape(-1, high * wide)
        filling = [(0, -size % side) for size, side in zip((rows, columns), self.size, strict=True)]
        back = [-step for step in self.shift]
        if self.pads_first:
            places = np.roll(np.pad(places, filling, constant_values=-1), back, axis=(0, 1))
        else:
            places = np.pad(np.roll(places, back, axis=(0, 1)), filling, constant_values=-1)
        down, across = places.shape[0] // high, places.shape[1] // wide
        return places.reshape(down, high, across, wide).swapaxes(1, 2).reshape(down * across, high * wide)


@dataclass(frozen=True, repr=False)
class Layout:
    """What the tokens along one axis of a map are, from the first to the last.

    >>> layout = Layout.picture((2, 3), prefix_tokens=["CLS"])
    >>> layout
    <Layout: CLS, 2 x 3 patches>
    >>> layout.name(0), layout.name(5), layout.place(5), layout.token((1, 1))
    ('CLS', 'patch (1, 1)', (1, 1), 5)
    """

    parts: tuple[Part, ...] = ()
    windows: Windows | None = None
    """How the layer cuts the patches into windows; the keys of a map are then those of one window."""
    samples: tuple[Layout, ...] = ()
    """Where the texts of a batch differ, the layout of each; `parts` is then empty. `of` chooses one."""
    seen: tuple[Thumbnail, ...] = field(default=(), compare=False)
    """Of each picture of the batch a small grey copy, by which `on` finds the part of a picture that the model saw; not
    kept in files."""

    def __post_init__(self) -> None:
        if isinstance(self.parts, str) or not all(isinstance(part, Part) for part in self.parts):
            raise TypeError(f"parts={self.parts!r}: pass Parts, or use Layout.picture(grid) or Layout.text(words)")
        if self.windows is not None and self.patches is not None:
            self.windows.check_fits(self.patches.shape)

    @classmethod
    def picture(
        cls,
        grid: Sequence[int],
        prefix_tokens: int | Sequence[str] = 0,
        *,
        patch_size: Size | None = None,
        image_size: Size | None = None,
        windows: Windows | None = None,
    ) -> Layout:
        """Patches row by row, behind tokens with names or only a number of tokens.

        `grid` is (rows, columns); (frames, rows, columns) of a video; or (depth, rows, columns) of a volume.

        >>> Layout.picture((8, 14, 14), patch_size=16)
        <Layout: 8 x 14 x 14 patches of 16 pixels>

        Raises ValueError unless these are whole numbers from 1, and windows fit them.
        """
        shape = tuple(map(operator.index, grid))
        if len(shape) not in (2, 3) or min(shape) < 1:
            raise ValueError(f"grid={grid!r}: pass (rows, columns) or (frames, rows, columns), each at least 1")
        names, count = _read_prefix(prefix_tokens)
        names = _prefix_names(count or 0) if names is None else names
        patch, image = (None if size is None else pair_of("size", size) for size in (patch_size, image_size))
        patches = Part("patches", math.prod(shape), (), shape, patch, image)
        return cls((*([Part("special", len(names), tuple(names))] if names else []), patches), windows)

    @classmethod
    def text(cls, words: Sequence[str] | int, special: Iterable[int] = ()) -> Layout:
        """Words, or only a number of them; `special` are the places of those that are no words.

        >>> Layout.text(["[CLS]", "cat", "Ġsat"], special=[0])
        <Layout: [CLS], 2 tokens>

        Raises IndexError where there is no such place.
        """
        if isinstance(words, int):
            return cls((Part("text", words),))
        words = word_list(words, "words")
        marked = set(special)
        if wrong := sorted(marked - set(range(len(words)))):
            raise IndexError(f"special={wrong} is out of range: {len(words)} words, counted from 0")
        kinds: list[Kind] = ["special" if place in marked else "text" for place in range(len(words))]
        each = zip(kinds, readable(words), strict=True)
        return cls.joined(cls((Part(kind, 1, (word,)),)) for kind, word in each)

    @classmethod
    def joined(cls, layouts: Iterable[Layout]) -> Layout:
        """The layout of tokens behind each other, such as those of a prompt and of each step of the answer.

        >>> Layout.joined([Layout.text(4), Layout.text(1), Layout.text(1)])
        <Layout: 6 tokens>
        """
        parts: list[Part] = []
        every = enumerate(part for layout in layouts for part in layout.parts)
        for _, run in itertools.groupby(every, lambda one: _what_is_alike(*one)):
            first, *more = [part for _, part in run]
            names = itertools.chain(first.names, *(part.names for part in more))
            parts.append(
                replace(first, count=first.count + sum(part.count for part in more), names=tuple(names))
                if more
                else first
            )
        return cls(tuple(parts))

    @classmethod
    def batch(cls, samples: Sequence[Layout]) -> Layout:
        """The layout of several texts or pictures: one that all share, or each its own."""
        return samples[0] if all(one == samples[0] for one in samples) else cls(samples=tuple(samples))

    def of(self, sample: int) -> Layout:
        """The layout of one text or picture of the batch."""
        if len(self.seen) > 1:
            return replace(self, seen=self.seen[sample : sample + 1 or None])
        return self.samples[sample] if self.samples else self

    def cut(self, start: int, stop: int | None = None) -> Layout:
        """The layout of some neighbouring tokens. Patches that are cut apart are special tokens with their names.

        >>> Layout.picture((2, 2), ["CLS"]).cut(0, 2)
        <Layout: CLS, patch (0, 0)>
        """
        if self.samples:
            return replace(self, samples=tuple(one.cut(start, stop) for one in self.samples))
        parts, first = [], 0
        for part in self.parts:
            begin, end = (min(max(at - first, 0), part.count) for at in (start, self.count if stop is None else stop))
            if begin < end:
                kind, names = part.kind, part.names
                if kind == "patches" and end - begin < part.count:
                    kind, names = "special", self.names[first : first + part.count]
                parts.append(replace(part, kind=kind, count=end - begin, names=names[begin:end]))
            first += part.count
        return replace(self, parts=tuple(parts))

    def written_from(self, first: int) -> Layout:
        """The layout of a generation, in which the model wrote the tokens from that number on.

        >>> Layout.text(7).written_from(4)
        <Layout: 4 tokens, 3 tokens generated>
        """
        if self.samples:
            return replace(self, samples=tuple(one.written_from(first) for one in self.samples))
        answer = (replace(part, is_generated=part.kind != "padding") for part in self.cut(first).parts)
        return replace(self, parts=(*self.cut(0, first).parts, *answer))

    @property
    def generated(self) -> npt.NDArray[np.bool_]:
        """Which tokens the model wrote, (tokens,)."""
        return np.repeat([part.is_generated for part in self.parts], [part.count for part in self.parts])

    @property
    def count(self) -> int:
        """How many tokens."""
        return self.samples[0].count if self.samples else sum(part.count for part in self.parts)

    @property
    def keys(self) -> int:
        """How many keys a map of these tokens has: those of one window, where there are windows."""
        return math.prod(self.windows.size) if self.windows is not None else self.count

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """What each token is called: its word, "CLS", "patch (2, 1)"; its number where nothing more is known."""
        return self._names("patch {}")

    @functools.cached_property
    def labels(self) -> tuple[str, ...]:
        """The names as they are written at the side of a map: of a patch only its place, "(2, 1)"."""
        return self._names("{}")

    @property
    def _order(self) -> tuple[int, ...]:
        return () if self.windows is None else self.windows.order

    def _names(self, of_patch: str) -> tuple[str, ...]:
        named: list[str] = []
        for part in self.parts:
            if part.kind == "patches":
                patches = [of_patch.format(tuple(map(int, place))) for place in np.ndindex(*part.shape)]
                named += [patches[place] for place in self._order] if self._order else patches
            elif part.kind == "padding":
                named += ["[PAD]"] * part.count
            else:
                named += part.names or map(str, range(len(named), len(named) + part.count))
        return tuple(named)

    @property
    def has_words(self) -> bool:
        """Whether the words of its texts are known."""
        return any(part.kind == "text" and part.names for part in self.parts)

    def are(self, kind: Kind) -> npt.NDArray[np.bool_]:
        """Which tokens are of a kind, (tokens,).

        >>> Layout.text(["[CLS]", "cat"], special=[0]).are("special")
        array([ True, False])
        """
        return np.repeat([part.kind == kind for part in self.parts], [part.count for part in self.parts])

    def name(self, token: int) -> str:
        """What a token is called, see `names`."""
        return self.names[token]

    @property
    def patches(self) -> Part | None:
        """The patches of its picture; None where it has none."""
        return next((part for part in self.parts if part.kind == "patches"), None)

    @property
    def is_picture(self) -> bool:
        """Whether all of its tokens are the patches of one picture."""
        return len(self.parts) == 1 and len(self.parts[0].shape) == 2

    @property
    def first_patch(self) -> int:
        """The number of the first patch."""
        return int(self.are("patches").argmax())

    def place(self, token: int) -> tuple[int, ...] | None:
        """The (row, column), or (frame, row, column), of a token that is a patch of its picture; else None."""
        patches, number = self.patches, token - self.first_patch
        if patches is None or not 0 <= number < patches.count:
            return None
        number = self._order[number] if self._order else number
        return tuple(int(place) for place in np.unravel_index(number, patches.shape))

    def patch(self, query: Any) -> int:
        """Which token a patch is that a user names by its (row, column), or (frame, row, column).

        Raises IndexError for one that is not on the grid, ValueError where this is no patch.
        """
        patches = self.patches
        axes = ("frame", "row", "column")[-len(patches.shape) :] if patches is not None else ("row", "column")
        wanted = f"({', '.join(axes)})"
        is_sequence = isinstance(query, Sequence) and not isinstance(query, str)
        if patches is None:
            raise ValueError(f"query={query!r} names a patch, and these tokens are no patches: {self}")
        if not is_sequence or len(query) != len(axes):
            count = f" has {len(query)} numbers" if is_sequence else ""
            raise ValueError(f"query={query!r}{count}: pass a patch {wanted} or a token's index")
        place = [operator.index(one) for one in query]
        if not all(-size <= one < size for one, size in zip(place, patches.shape, strict=True)):
            grid = " and ".join(f"{size} {axis}s" for axis, size in zip(axes, patches.shape, strict=True))
            raise IndexError(
                f"query={query!r} is out of range: the grid has {grid} of patches, counted from 0; query is {wanted}"
            )
        number = int(np.ravel_multi_index(place, patches.shape, mode="wrap"))
        return self._order.index(number) if self._order else self.first_patch + number

    def token(self, query: Any, hint: str = "") -> int:
        """The number, from 0, of the token that a user names: by its number, a patch's place, or its word or name.

        Raises TypeError, IndexError or ValueError where there is no such token; `hint` ends the first one's message.
        """
        if isinstance(query, str):
            if any(part.names for part in self.parts):
                return word_index(query, self.names)
            raise TypeError(f"query={query!r}: pass a patch (row, column) or a token's index{hint}")
        if isinstance(query, Sequence):
            return self.patch(query)
        try:
            index = operator.index(query)
        except TypeError:
            raise TypeError(f"query={query!r}: pass a patch (row, column) or a token's index") from None
        if not -self.count <= index < self.count:
            first = self.first_patch if self.patches else 0
            raise IndexError(
                f"query={index} is out of range: {self.count} queries, the first {first} of them prefix tokens; pass 0 "
                f"to {self.count - 1}, or a patch (row, column)"
            )
        return index % self.count

    @functools.cached_property
    def sheet(self) -> Indices:
        """The patches as they are drawn, (rows, columns) of token numbers; the frames of a video stand side by side.

        -1 where there is none.
        """
        patches = self.patches
        if patches is None:
            raise ValueError(
                f"these tokens are no patches of a picture: {self}. plot.tokens draws words; grid= says "
                "where patches lie"
            )
        tokens = np.argsort(self._order) if self._order else np.arange(patches.count) + self.first_patch
        sheet: Indices = side_by_side(tokens.reshape(patches.shape), -1)
        return sheet

    def spread(self, weights: Array) -> Array:
        """The weights (..., tokens) as they are drawn, (..., rows, columns); NaN where there is no patch."""
        sheet = self.sheet
        return weights[..., sheet] if sheet.min() >= 0 else np.where(sheet >= 0, weights[..., sheet], np.nan)

    def coordinates(self) -> npt.NDArray[np.float64]:
        """The place of each patch, (patches, 2), or (patches, 3) of a video or volume."""
        patches = self.patches
        assert patches is not None
        return np.stack(np.unravel_index(np.arange(patches.count), patches.shape), -1).astype(float)

    def on(self, picture: Array | None, frames_across: int = FRAMES_ACROSS) -> Array | None:
        """The picture that lies behind `sheet`: what the patches cover of it, the frames of a video side by side.

        `picture` is (height, width, 3), or (frames, height, width, 3). Where the model saw only its middle, it is that.
        Warns where the patches are far from square on it, so that it cannot be the one that the model saw.

        Raises ValueError for the frames of a video where the patches are those of a picture.
        """
        patches = self.patches
        if picture is None or patches is None:
            return picture
        if picture.ndim == 4 and len(patches.shape) == 2:
            raise ValueError(
                f"image has {len(picture)} frames, and the patches are those of one picture: {self}; pass image[0] for "
                "the first of a batch, or layout=Layout.picture((frames, rows, columns)) for a video"
            )
        part = None
        if picture.ndim == 3 and len(self.seen) == 1 and patches.image_size is not None:
            part = part_seen(picture, self.seen[0], patches.image_size)
        if part is None:
            _check_sides(self, patches, picture.shape[-3:-1])
        picture = picture if part is None else part
        if patches.patch_size is not None and patches.image_size is not None:
            high, wide = (
                round(side * count * size / whole)
                for side, count, size, whole in zip(
                    picture.shape[-3:-1], patches.shape[-2:], patches.patch_size, patches.image_size, strict=True
                )
            )
            more = [(0, max(0, size - side)) for size, side in zip((high, wide), picture.shape[-3:-1], strict=True)]
            picture = np.pad(picture, [*[(0, 0)] * (picture.ndim - 3), *more, (0, 0)])[..., :high, :wide, :]
        if len(patches.shape) == 2:
            return picture
        frames = patches.shape[0]
        if picture.ndim == 3:
            picture = picture[None]
        # Of frames that are one patch deep together the middle one.
        each = picture[((np.arange(frames) + 0.5) * len(picture) / frames).astype(int)]
        behind: Array = side_by_side(each, 1.0, frames_across)
        return behind

    def only(self, picture: int) -> Layout:
        """The layout of a text with several pictures, of which one is drawn, counted from 0.

        >>> two = Layout((Part("patches", 4, (), (2, 2)), Part("text", 1), Part("patches", 6, (), (2, 3))))
        >>> two.only(1).patches.shape, two.only(1).first_patch
        ((2, 3), 5)

        Raises IndexError where there is no such picture.
        """
        places = [place for place, part in enumerate(self.parts) if part.kind == "patches"]
        if not 0 <= picture < len(places):
            raise IndexError(f"there is no picture {picture}: {self} has {len(places)}")
        parts = [
            Part("special", part.count, (f"picture {places.index(place)}",) * part.count)
            if place in places and place != places[picture]
            else part
            for place, part in enumerate(self.parts)
        ]
        return replace(self, parts=tuple(parts))

    def _with_prefix(self, names: Sequence[str]) -> Layout:
        """The layout with other names for the tokens before the patches."""
        special = [Part("special", len(names), tuple(names))] if names else []
        return replace(self, parts=(*special, *(part for part in self.parts if part.kind == "patches")))

    def packed(self) -> dict[str, Any]:
        """The layout as plain data, for a file."""
        return {name: value for name, value in asdict(replace(self, seen=())).items() if name != "seen"}

    @classmethod
    def unpacked(cls, packed: dict[str, Any]) -> Layout:
        """The layout that `packed` was called on."""
        plain: list[dict[str, Any]] = [
            {name: tuple(value) if isinstance(value, list) else value for name, value in part.items()}
            for part in packed["parts"]
        ]
        parts = tuple(Part(**part) for part in plain)
        windows: dict[str, Any] | None = packed["windows"]
        if windows is not None:
            windows = {name: tuple(one) if isinstance(one, list) else one for name, one in windows.items()}
        return cls(parts, None if windows is None else Windows(**windows), tuple(map(cls.unpacked, packed["samples"])))

    def __str__(self) -> str:
        if self.samples:
            different = list(dict.fromkeys(map(str, self.samples)))
            return "; ".join(different[:3]) + ("; ..." if len(different) > 3 else "")
        windows = " in another order" if self.windows is not None and self.windows.order else ""
        if self.windows is not None and not self.windows.order:
            windows = " in windows of {} x {}".format(*self.windows.size)
            windows += " shifted by {} x {}".format(*self.windows.shift) if any(self.windows.shift) else ""
            windows += " spread over the grid" if self.windows.is_spread else ""
        return ", ".join(map(str, self.parts)) + windows

    def __repr__(self) -> str:
        return f"<Layout: {self}>"


def _what_is_alike(place: int, part: Part) -> Any:
    """What neighbours must have in common to be one part; a picture's patches are always one of their own."""
    return place if part.kind == "patches" else (part.kind, not part.names, part.is_generated)


def layout_of(count: int, options: Patches, picture: Array | None = None, known: Layout | None = None) -> Layout:
    """The layout of that many tokens, the first of these that is sure:

    - what the keywords say: `layout`, or `grid`, `image_size`, `patch_size` and `prefix_tokens`;
    - what is known of the map, as the model has told it;
    - the only grid that makes the patches square on the picture;
    - without a picture the only square.

    >>> layout_of(197, {})
    <Layout: CLS, 14 x 14 patches>
    >>> layout_of(145, {}, np.zeros((720, 1280, 3)))
    <Layout: CLS, 9 x 16 patches>

    `patch_size` without `image_size` divides the picture, (height, width, channels). Without `prefix_tokens`, the
    tokens that the grid leaves over are prefix tokens, as far as they are few. Without a grid either, all tokens, or
    all but one, must form it: with more prefixes to choose from, many numbers of tokens would.

    Raises ValueError where the numbers do not fit; the message lists the grids that would.
    """
    layout, prefix_tokens = options.get("layout"), options.get("prefix_tokens")
    names, prefix = _read_prefix(prefix_tokens)
    sides = _read_sides(options, picture)
    check_layout(layout)
    if layout is not None:
        if sides is not None or prefix_tokens is not None:
            raise ValueError("layout= says where the patches lie: leave grid=, patch_size= and prefix_tokens= out")
        if layout.keys != count:
            raise ValueError(f"the layout= has {layout.keys} tokens, {layout}, and the map has {count}")
        return layout
    pictures = 0 if known is None else sum(part.kind == "patches" for part in known.parts)
    if known is not None and known.keys == count and known.patches is not None and pictures == 1:
        own = known.patches.shape
        if (sides is None or sides[:2] == own) and prefix in (None, known.first_patch):
            return known if names is None else known._with_prefix(names)
        if sides is not None and len(own) == 2 and sides[:2] != own and sides[0] * sides[1] == math.prod(own):
            raise ValueError(
                f"{sides[2]} makes {sides[0]} x {sides[1]} patches, and the model made {own[0]} x {own[1]}: leave it "
                "out, or insist by layout=Layout.picture(...)"
            )
    if known is not None and known.keys == count and sides is None and prefix is None:
        raise ValueError(
            f"these tokens are no patches of a picture: {known}. plot.tokens draws words; grid= says where patches lie"
            if not pictures
            else f"these tokens have {pictures} pictures, {known}: choose one by layout=maps.layout.only(0)"
        )
    if prefix is not None and not 0 <= prefix < count:
        raise ValueError(f"prefix_tokens={prefix_tokens!r} does not leave a patch among {count} tokens")
    tokens = f"{count} tokens" + ("" if prefix is None else f", {prefix} of them prefix tokens")
    rows, columns, source = sides or _only_grid(count, prefix, tokens, picture)
    left = count - rows * columns
    if left < 0 or (prefix is not None and left != prefix):
        raise ValueError(
            f"{source} makes {rows} x {columns} = {rows * columns} patches, which does not fit {tokens}: "
            f"grid=(rows, columns) and prefix_tokens= must add up to {count}{_that_fit(count, prefix, picture)}"
        )
    if prefix is None and left > _MOST_PREFIX:
        raise ValueError(
            f"{source} makes {rows} x {columns} = {rows * columns} patches and leaves {left} of {tokens} over: if "
            f"these come before the patches, pass prefix_tokens={left}{_that_fit(count, prefix, picture)}"
        )
    return Layout.picture((rows, columns), _prefix_names(left) if names is None else names)


def check_layout(layout: Any) -> None:
    """Raise TypeError unless this is a Layout or None."""
    if not isinstance(layout, (Layout, type(None))):
        raise TypeError(f"layout={layout!r}: pass a Layout, such as Layout.picture((rows, columns))")


def layout_in_windows(keys: int, options: Patches, picture: Array | None, window: Size, shift: Size) -> Layout:
    """The layout of maps of windows, whose keys are those of one, by the keywords that say how the grid is cut.

    >>> layout_in_windows(4, {"grid": (4, 4)}, None, window=2, shift=1)
    <Layout: 4 x 4 patches in windows of 2 x 2 shifted by 1 x 1>

    As in the models, a side that one window covers is not shifted. Raises ValueError where the numbers do not fit.
    """
    if (prefix_tokens := options.get("prefix_tokens")) not in (None, 0):
        raise ValueError(f"prefix_tokens={prefix_tokens!r}: windows have patches only")
    grid = _read_sides(options, picture)
    if grid is None:
        raise ValueError("window= needs grid=(rows, columns) of the whole picture's patches in this layer")
    sides, sizes = pair_of("window", window), grid[:2]
    if sides[0] * sides[1] != keys:
        raise ValueError(
            f"window={window} makes {sides[0]} x {sides[1]} = {sides[0] * sides[1]} keys, and this layer has {keys}: "
            "maps of windows are (windows, heads, window * window, window * window)"
        )
    steps = (shift, shift) if not isinstance(shift, Sequence) else tuple(shift)
    if len(steps) != 2 or any(not 0 <= operator.index(step) < side for step, side in zip(steps, sides, strict=True)):
        raise ValueError(f"shift={shift!r}: pass 0 to {min(sides) - 1} patches, half a window in most models")
    steps = tuple(0 if size <= side else step for size, side, step in zip(sizes, sides, steps, strict=True))
    if any(steps) and any(size % side for size, side in zip(sizes, sides, strict=True)):
        raise ValueError(
            f"windows of {sides[0]} x {sides[1]} do not fill the grid of {sizes[0]} x {sizes[1]} patches, and models "
            "differ in whether they shift or pad first: pass the padded grid="
        )
    return Layout.picture(sizes, windows=Windows(sides, (steps[0], steps[1])))


def _prefix_names(count: int) -> list[str]:
    """What prefix tokens are called whose names are not known: the first is the class token in nearly every model."""
    return ["CLS", *(f"token {number}" for number in range(1, count))][:count]


def _read_prefix(prefix_tokens: int | Sequence[str] | None) -> tuple[list[str] | None, int | None]:
    """The names and the number of prefix tokens, None where the user does not say."""
    if prefix_tokens is None:
        return None, None
    if not isinstance(prefix_tokens, Sequence):
        if not hasattr(prefix_tokens, "__index__"):
            raise TypeError(
                f"prefix_tokens={prefix_tokens!r}: pass how many tokens come before the patches, or their names"
            )
        return None, operator.index(prefix_tokens)
    names = [prefix_tokens] if isinstance(prefix_tokens, str) else [str(name) for name in prefix_tokens]
    return names, len(names)


def _read_sides(options: Patches, picture: Array | None) -> tuple[int, int, str] | None:
    """The rows and columns that the user describes, and the words for the source of these numbers."""
    grid, image_size, patch_size = options.get("grid"), options.get("image_size"), options.get("patch_size")
    if grid is not None:
        return *pair_of("grid", grid), f"grid={grid}"
    if patch_size is None:
        if image_size is not None:
            raise ValueError(f"image_size={image_size} alone gives no grid: pass patch_size= too")
        return None
    if image_size is not None:
        size = pair_of("image_size", image_size)
    elif picture is not None:
        size = picture.shape[-3], picture.shape[-2]
    else:
        raise ValueError(f"patch_size={patch_size} alone gives no grid: pass image_size= too, or an image")
    high, wide = pair_of("patch_size", patch_size)
    source = f"an image of {size[0]} x {size[1]} pixels in patches of {high} x {wide}"
    if size[0] % high or size[1] % wide:
        raise ValueError(f"{source} leaves a remainder: image_size= is the size that the model saw")
    return size[0] // high, size[1] // wide, source


def fitting_grids(count: int, ratio: float, prefixes: Iterable[int] = (0, 1)) -> list[tuple[int, int, int]]:
    """Each (rows, columns, prefix tokens) of that many tokens whose patches are square on a picture.

    >>> fitting_grids(145, 9 / 16), fitting_grids(145, 1)
    ([(9, 16, 1)], [(12, 12, 1)])

    `ratio` is the picture's height divided by its width. Square is what is square to within 5 %.
    """
    return [grid[1:] for grid in _grids(count, ratio, prefixes) if grid[0] <= math.log1p(_TOLERANCE)]


def _grids(count: int, ratio: float, prefixes: Iterable[int]) -> list[tuple[float, int, int, int]]:
    """All (how far from square, rows, columns, prefix tokens), the squarest patches first."""
    found = []
    for prefix in prefixes:
        left = count - prefix
        for low in range(1, math.isqrt(max(left, 0)) + 1):
            if left % low == 0:
                for rows, columns in {(low, left // low), (left // low, low)}:
                    found.append((abs(math.log(rows / columns / ratio)), rows, columns, prefix))
    return sorted(found, key=lambda grid: (round(grid[0], 3), grid[3]))


def _only_grid(count: int, prefix: int | None, tokens: str, picture: Array | None) -> tuple[int, int, str]:
    """The only grid that is square on the picture, or without one is a square itself; and the words for its source."""
    prefixes = (0, 1) if prefix is None else (prefix,)
    if picture is None:
        for left in prefixes:
            side = math.isqrt(count - left)
            if side > 0 and side * side == count - left:
                return side, side, f"a square grid of side {side}"
        tried = f"neither {count} nor {count - 1} is" if prefix is None else f"{count - prefix} is not"
        why = f"{tried} a square number"
    else:
        high, wide = picture.shape[-3:-1]
        fitting = fitting_grids(count, high / wide, prefixes)
        if len(fitting) == 1:
            return *fitting[0][:2], f"a picture of {high} x {wide} pixels"
        why = f"{'no' if not fitting else 'not one'} grid makes square patches on a picture of {high} x {wide} pixels"
        why += ", which must be the picture as the model saw it, cropped alike" if not fitting else " alone"
    raise ValueError(
        f"cannot tell the patch grid of {tokens}: {why}. Pass grid=(rows, columns); prefix_tokens= says how many "
        f"tokens come before the patches{_that_fit(count, prefix, picture)}"
    )


def _that_fit(count: int, prefix: int | None, picture: Array | None) -> str:
    """The end of a message: grids that fit, square on the picture, or on the square that a model saw of it."""
    prefixes = range(max(2, min(_MOST_PREFIX, count // 16) + 1)) if prefix is None else (prefix,)
    ratio = 1.0 if picture is None else picture.shape[-3] / picture.shape[-2]
    best = fitting_grids(count, ratio, prefixes)[:3]
    best += [grid for grid in fitting_grids(count, 1.0, prefixes)[:2] if grid not in best]
    best = best or [grid[1:] for grid in _grids(count, ratio, prefixes)[:3]]
    listing = ", ".join(f"({rows}, {columns}) with prefix_tokens={left}" for rows, columns, left in best)
    return f". Grids that fit: {listing}" if listing else ""


def _check_sides(layout: Layout, patches: Part, size: tuple[int, ...]) -> None:
    """Warn where a picture of (height, width) has other proportions than the one that the model saw.

    Raises ValueError where a grid fits the picture if its rows and columns change places.
    """
    rows, columns = patches.shape[-2:]
    seen = patches.image_size
    stretch = size[0] / size[1] * (columns / rows if seen is None else seen[1] / seen[0])
    limit = math.log1p(_TOLERANCE)
    if abs(math.log(stretch)) <= limit:
        return
    if seen is None and abs(math.log(size[0] / size[1] * rows / columns)) <= limit:
        raise ValueError(
            f"a grid of {rows} x {columns} patches is turned: on a picture of {size[0]} x {size[1]} pixels, (height, "
            f"width), {columns} x {rows} are square. Pass the picture that the model saw; if the grid is yours, pass "
            f"grid=({columns}, {rows})"
        )
    what = "the patches would be square on the model's" if seen is None else f"the model saw {seen[0]} x {seen[1]}"
    warn(
        f"{layout} on a picture of {size[0]} x {size[1]} pixels, (height, width), makes patches of "
        f"{size[0] / rows:.3g} x {size[1] / columns:.3g} pixels, and {what}: if the model saw a part of this picture, "
        "they are in the wrong places. Pass the picture as the model saw it, cropped alike",
        "patches-out-of-place",
    )


def pair_of(name: str, size: Size) -> tuple[int, int]:
    """(height, width) of whole numbers from 1, both the same where one number is given."""
    pair = (size, size) if not isinstance(size, Sequence) else tuple(size)
    try:
        high, wide = (operator.index(side) for side in pair)
    except (TypeError, ValueError):
        raise ValueError(f"{name}={size!r}: pass (height, width) as two whole numbers") from None
    if high < 1 or wide < 1:
        raise ValueError(f"{name}={size!r}: both must be at least 1")
    return high, wide
