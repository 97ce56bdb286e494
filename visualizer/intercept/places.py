"""Where the patches of pictures lie among the tokens: the one file that knows how families of models arrange them.

A picture's place is a grid of token numbers: its entry (row, column) is the token of that patch. So tiles, tokens
between the rows, merged patches and the frames of a video are all the same to whoever reads weights there. For prompts
with pictures there is one small function for each arrangement; for makers of pictures one for each way to say how large
the picture is.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_IDS = ("image_token_id", "image_token_index", "image_token", "video_token_id", "video_token_index")


ABOUT_PICTURES = ("image_grid_thw", "video_grid_thw", "image_sizes", "image_embeds_position_mask")
"""The arguments beside the ids that say where the pictures of a prompt lie."""


class Picture(NamedTuple):
    """Where one picture of a prompt lies."""

    views: tuple[Tensor, ...]
    """Grids of token numbers, (rows, columns) or (frames, rows, columns): each shows the whole picture, such as a small
    version of it, and the tiles of a large one. Of a query former's tokens, which have no place on the picture, they
    are in a row, (tokens,). Empty: no grid fits them."""
    tokens: tuple[int, ...]
    """All tokens that stand for it."""


class Prompt(NamedTuple):
    """What a model was given: its ids, and what goes with them."""

    rows: list[list[int]]
    """The ids of each text of the batch."""
    config: Any
    arguments: dict[str, Any]
    words: Callable[[Sequence[int]], Sequence[str]]
    """The tokens of ids, as texts."""


def pictures_in(prompt: Prompt) -> list[list[Picture]]:
    """The pictures of each text of a batch, in order.

    Raises ValueError where the tokens do not fit what the model was given beside them.
    """
    ids, mask = image_ids(prompt.config), prompt.arguments.get("image_embeds_position_mask")
    is_of_picture = [[one in ids for one in row] for row in prompt.rows] if mask is None else (mask > 0).tolist()
    places = [[place for place, one in enumerate(row) if one] for row in is_of_picture]
    for name, arrange in _ARRANGEMENTS:
        if _has(prompt, name):
            return arrange(prompt, places)
    return _squares(prompt, places)


def image_ids(config: Any) -> frozenset[int]:
    """The ids of the tokens that stand for patches."""
    return frozenset(one for name in _IDS if isinstance(one := getattr(config, name, None), int))


def reads_pictures(config: Any) -> bool:
    """Whether a model has pictures among its tokens, by its configuration."""
    return bool(image_ids(config)) or queries_of_former(config) > 0


def queries_of_former(config: Any) -> int:
    """How many tokens a query former makes of each picture; 0 where the patches themselves are tokens."""
    name = "num_query_tokens" if getattr(config, "qformer_config", None) is not None else "latent_query_num"
    return getattr(config, name, None) or 0


def patches_of_former(config: Any, arguments: dict[str, Any], keys: int) -> Tensor | None:
    """The grid of the patches among the keys of a query former, (rows, columns); None where they are not these.

    A class token may come before them, and behind them the queries themselves.
    """
    pixels, side = arguments.get("pixel_values"), getattr(getattr(config, "vision_config", None), "patch_size", None)
    if not isinstance(pixels, Tensor) or not isinstance(side, int):
        return None
    rows, columns = (size // side for size in pixels.shape[-2:])
    first = (keys - rows * columns) % queries_of_former(config)
    fits = first in (0, 1) and keys - rows * columns - first in (0, queries_of_former(config))
    return first + torch.arange(rows * columns).view(rows, columns) if fits else None


def ids_of_prompt(config: Any, arguments: dict[str, Any]) -> list[list[int]] | None:
    """The ids that a model, or its `generate`, is given for each text; None where it is given none."""
    ids = next((one for name in ("input_ids", "inputs") if isinstance(one := arguments.get(name), Tensor)), None)
    pixels, queries = arguments.get("pixel_values"), queries_of_former(config)
    if ids is None and isinstance(pixels, Tensor) and queries and image_ids(config):  # BLIP-2 begins by itself
        return [[*image_ids(config)] * queries + [config.text_config.bos_token_id]] * len(pixels)
    return None if ids is None or ids.ndim != 2 or ids.is_floating_point() else ids.tolist()


def _has(prompt: Prompt, name: str) -> bool:
    return prompt.arguments.get(name) is not None or getattr(prompt.config, name, None) is not None


def _merged(prompt: Prompt, places: list[list[int]]) -> list[list[Picture]]:
    """Qwen2-VL and its followers: frames x rows x columns of patches, of which a square of them is one token."""
    sizes = {kind: prompt.arguments.get(f"{kind}_grid_thw") for kind in ("image", "video")}
    waiting = {kind: iter([] if size is None else size.tolist()) for kind, size in sizes.items()}
    is_video = getattr(prompt.config, "video_token_id", None)
    side = prompt.config.vision_config.spatial_merge_size
    found: list[list[Picture]] = []
    for row, own in zip(prompt.rows, places, strict=True):
        found.append([])
        while own:
            kind = "video" if row[own[0]] == is_video else "image"
            size = next(waiting[kind], None)
            frames, high, wide = size or (1, 0, 0)
            shape = frames, high // side, wide // side
            count = math.prod(shape)
            if not 0 < count <= len(own):
                raise ValueError(f"{len(own)} tokens of a picture do not fit {kind}_grid_thw {size}")
            found[-1].append(_picture(own[:count], shape[frames == 1 :]))
            own = own[count:]
    return found


def _pinpoints(prompt: Prompt, places: list[list[int]]) -> list[list[Picture]]:
    """LLaVA-NeXT: the whole picture small, then large in tiles, without their padding, with a token behind each row."""
    from transformers.models.llava_next import modeling_llava_next

    config, sizes = prompt.config, prompt.arguments.get("image_sizes")
    tiles_of: Any = modeling_llava_next.get_anyres_image_grid_shape
    if sizes is None:
        return _squares(prompt, places)
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    waiting = iter(torch.as_tensor(sizes).tolist())
    found: list[list[Picture]] = []
    for own in places:
        found.append([])
        while own:
            high, wide = next(waiting)
            down, across = tiles_of((high, wide), config.image_grid_pinpoints, vision.image_size)
            rows, columns = _unpadded(high, wide, down * side, across * side)
            count = side * side + rows * (columns + 1)
            if count > len(own):
                raise ValueError(f"{len(own)} tokens of a picture do not fit its size of {high} x {wide} pixels")
            whole = torch.tensor(own[: side * side]).view(side, side)
            tiles = torch.tensor(own[side * side : count]).view(rows, columns + 1)[:, :-1]
            found[-1].append(Picture((whole, tiles), tuple(own[:count])))
            own = own[count:]
    return found


def _unpadded(high: int, wide: int, rows: int, columns: int) -> tuple[int, int]:
    """Of a grid of patches the (rows, columns) that a picture of (high, wide) pixels fills."""
    if wide / high > columns / rows:
        filled = int(round(high * (columns / wide), 7))
        return rows - (rows - filled) // 2 * 2, columns
    filled = int(round(wide * (rows / high), 7))
    return rows, columns - (columns - filled) // 2 * 2


def _tiles(prompt: Prompt, places: list[list[int]]) -> list[list[Picture]]:
    """Idefics3 and SmolVLM: tiles that the words between them number, then the whole picture small."""
    found: list[list[Picture]] = []
    for row, own in zip(prompt.rows, places, strict=True):
        words = prompt.words(row)
        found.append([])
        tiles: dict[tuple[int, int], Tensor] = {}
        tokens: list[int] = []
        for run in _runs(own):
            side = math.isqrt(len(run))
            if side * side != len(run):
                raise ValueError(f"{len(run)} tokens of a tile are no square")
            grid, before = torch.tensor(run).view(side, side), words[run[0] - 1] if run[0] else ""
            numbered = re.fullmatch(r"<row_(\d+)_col_(\d+)>", before)
            tokens += run
            if numbered is not None:
                tiles[int(numbered[1]), int(numbered[2])] = grid
                continue
            views = [grid]
            if tiles:
                down, across = (max(sides) for sides in zip(*tiles, strict=True))
                lines = [
                    torch.cat([tiles[line, one] for one in range(1, across + 1)], 1) for line in range(1, down + 1)
                ]
                views.append(torch.cat(lines))
            found[-1].append(Picture((*views,), (*tokens,)))
            tiles, tokens = {}, []
    return found


def _formed(prompt: Prompt, places: list[list[int]]) -> list[list[Picture]]:
    """BLIP-2 and Kosmos-2: the tokens of a query former, each of which has looked at all patches."""
    each = queries_of_former(prompt.config)
    found: list[list[Picture]] = []
    for own in places:
        if len(own) % each:
            raise ValueError(f"{len(own)} tokens of pictures are no multiple of the {each} of a query former")
        parts = (own[start : start + each] for start in range(0, len(own), each))
        found.append([Picture((torch.tensor(part),), tuple(part)) for part in parts])
    return found


def _squares(prompt: Prompt, places: list[list[int]]) -> list[list[Picture]]:
    """LLaVA 1.5, PaliGemma, Gemma 3, InternVL ...: so many tokens for each picture, in a square, perhaps behind one."""
    config = prompt.config
    is_known = getattr(config, "model_type", None) in _IN_SQUARES
    if not is_known or getattr(getattr(config, "vision_config", None), "model_type", None) == "pixtral":
        # A square number of tokens tells nothing: a resampler's have no place, and others lie in rows or tiles.
        return [[Picture((), tuple(own))] if own else [] for own in places]
    known = (getattr(config, name, None) for name in ("mm_tokens_per_image", "image_seq_length", "num_image_tokens"))
    each = next((count for count in known if isinstance(count, int)), 0)
    found: list[list[Picture]] = []
    for own in places:
        found.append([])
        for run in _runs(own):
            count = each if each and len(run) % each == 0 else len(run)
            parts = [run[start : start + count] for start in range(0, len(run), count)]
            if getattr(config, "model_type", "") == "internvl":  # the tiles of one picture, and the whole of it last
                found[-1].append(_square(parts[-1], run))
            else:
                found[-1] += [_square(part, part) for part in parts]
    return found


_IN_SQUARES = frozenset(
    (
        *("llava", "llava_next", "vipllava", "paligemma", "gemma3", "gemma3n", "shieldgemma2", "internvl"),
        *("florence2", "got_ocr2", "janus", "deepseek_vl"),
    )
)
"""The families of which it is known, by their `model_type`."""


def _square(tokens: list[int], all_tokens: list[int]) -> Picture:
    for left in (0, 1):  # a class token may stand before the patches
        side = math.isqrt(len(tokens) - left)
        if side * side == len(tokens) - left and side > 1:
            return _picture(tokens[left:], (side, side))._replace(tokens=tuple(all_tokens))
    return Picture((), tuple(all_tokens))


def _picture(tokens: list[int], shape: Sequence[int]) -> Picture:
    return Picture((torch.tensor(tokens).view(*shape),), tuple(tokens))


def _runs(places: Iterable[int]) -> Iterator[list[int]]:
    """Neighbouring numbers, together."""
    for _, run in itertools.groupby(enumerate(places), lambda pair: pair[1] - pair[0]):
        yield [place for _, place in run]


_Arrange = Callable[[Prompt, list[list[int]]], list[list[Picture]]]
_ARRANGEMENTS: tuple[tuple[str, _Arrange], ...] = (
    ("image_grid_thw", _merged),
    ("video_grid_thw", _merged),
    ("image_grid_pinpoints", _pinpoints),
    ("scale_factor", _tiles),
    ("qformer_config", _formed),
    ("latent_query_num", _formed),
)
"""By what a family's calls are given, or its configuration has, the function for its arrangement."""


class Canvas(NamedTuple):
    """The picture that a denoiser is at work on."""

    shape: tuple[int, ...]
    """(rows, columns) of its latents or tokens, or (frames, rows, columns)."""
    is_exact: bool
    """Whether these are the tokens; else layers see it smaller by powers of two."""

    def grid(self, tokens: int) -> tuple[int, ...] | None:
        """The (rows, columns), or (frames, rows, columns), of that many tokens; None if they are not the picture's."""
        *frames, high, wide = self.shape
        if tokens == 1:  # the mean of others, such as that of a text
            return None
        for halvings in range(1 if self.is_exact else 8):
            rows, columns = -(-high // 2**halvings), -(-wide // 2**halvings)
            for deep in [[frame] for frame in {*frames, *(-(-frame // 2) for frame in frames)}] or [[]]:
                if math.prod(deep) * rows * columns == tokens:
                    return (*deep, rows, columns)
        return None


def canvas_of(arguments: dict[str, Any]) -> Canvas | None:
    """The picture, by what the call of a denoiser was given; None where it does not tell."""
    latents = next((arguments[name] for name in ("sample", "hidden_states", "x") if name in arguments), None)
    if not isinstance(latents, Tensor):
        return None
    if latents.ndim in (4, 5):  # (batch, channels, rows, columns), of a video (batch, channels, frames, rows, columns)
        return Canvas(tuple(latents.shape[2:]), False)
    frames, high, wide = (arguments.get(name) for name in ("num_frames", "height", "width"))
    if isinstance(high, int) and isinstance(wide, int):  # LTX
        return Canvas((frames or 1, high, wide), True)
    places = arguments.get("img_ids")
    if isinstance(places, Tensor):  # FLUX: (tokens, 3), frame, row and column of each
        _, high, wide = (int(one) + 1 for one in places.reshape(-1, places.shape[-1])[:, :3].amax(0).tolist())
        return Canvas((high, wide), True)
    shapes = arguments.get("img_shapes")
    if shapes:  # Qwen-Image: of each picture of each row
        first = shapes[0][0] if isinstance(shapes[0], list) else shapes[0]
        return Canvas(tuple(first[1:]) if first[0] == 1 else tuple(first), True)
    return None


def words_start(joined: dict[str, slice], keys: int, picture: int, words: int, is_text_first: bool) -> int | None:
    """Where the words begin among the tokens of a joint attention; None where that is not known.

    Args:
        joined: which tokens come from which input, see `AttentionMap`.
        keys, picture, words: how many tokens all of them have, the picture, and the text.
        is_text_first: where other layers have the text.
    """
    for name, part in joined.items():
        if is_text(name):
            return part.start if part.stop - part.start == words else None
    return None if keys != picture + words else 0 if is_text_first else picture


def is_text(name: str) -> bool:
    """Whether an input of a joint attention is the text, by the name of the argument."""
    return any(word in name for word in ("encoder", "context", "prompt", "caption", "text"))
