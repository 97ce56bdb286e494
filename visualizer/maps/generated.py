"""The steps of a generation as one map of each module: the prompt's rows, and behind them those of each step.

A step has queries of its own, and keys from a cache: all up to now, or those within a sliding window, or those of a
static cache, which has room for more. Their numbers say where the rows and keys of a step lie in the whole. The keys
themselves prove it: what a step has from the cache must be what the step before left there. Beam search puts the cache
into another order, and the same comparison says which. Only a few rows are computed: each row of the whole is read from
its own step.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layout import Layout, Part
from .attention_map import AttentionMap, joined_map
from .joined import Block
from .sources import Factors, same_texts

_ROUNDING = 1e-3  # between the weights of a row computed twice, in half precision too
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Calls = Mapping[str, Sequence[AttentionMap]]
"""The maps of all calls of each module, by its path."""


class _Step(NamedTuple):
    """A call, and where it lies in the whole."""

    map: AttentionMap
    first: int
    """Its first query."""
    first_key: int = 0
    """Its first key."""


class _Steps(NamedTuple):
    """The calls of one module."""

    steps: list[_Step]
    prompt: int
    """How many queries the first call had."""
    keys: int | None = None
    """How many keys there are, where a step does not add its own to them; None: as many as there are tokens."""
    begun: int = 0
    """How many keys come before the first query."""
    are_recomputed: bool = False
    """Whether each call had the whole text up to then, so that the last one is all."""

    def keys_shared(self, number: int) -> tuple[Tensor, Tensor] | None:
        """The keys that a step has of the step before, as they were there and as it has them; None: not kept."""
        before, after = self.steps[number - 1 : number + 1]
        begin, end = max(before.first_key, after.first_key), self.begun + after.first
        parts = [(one.map, slice(begin - one.first_key, end - one.first_key)) for one in (before, after)]
        return _as_pair(*(_keys(one, which) for one, which in parts))


def is_generation(calls: Calls) -> bool:
    """Whether the calls are, by their shapes, the steps of a generation, which ends with one query at a time.

    >>> step = lambda queries, keys: AttentionMap(torch.zeros(1, 1, queries, keys))
    >>> is_generation({"attn": [step(5, 5), step(1, 6), step(1, 7)]}), is_generation({"attn": [step(5, 5), step(5, 5)]})
    (True, False)
    """
    several = [one for one in calls.values() if not _are_apart(one)]
    if not several or not all(map(_may_be_steps, several)):
        return False
    if any(map(_grow, several)):
        return True
    # Of cross-attention alone nothing grows: then all that was recorded looks at the same keys again and again.
    return all(len(one) == 1 or _look_at_the_same(one) for one in calls.values())


def _are_apart(calls: Sequence[AttentionMap]) -> bool:
    """Whether calls have nothing to do with each other, such as those of a vision tower for each picture."""
    queries, keys = calls[0].shape[2:]
    return len(calls) == 1 or (queries == keys and all(one.shape[2:] == (queries, keys) for one in calls))


def _may_be_steps(calls: Sequence[AttentionMap]) -> bool:
    if _are_recomputed(calls):
        return all(_begins(one, calls[-1]) for one in calls[:-1])
    if len({one.shape[:2] for one in calls}) > 1 or calls[-1].shape[2] != 1:
        return False
    return _look_elsewhere(calls) or all(one.shape[2] < one.shape[3] for one in calls[1:])


def _look_elsewhere(calls: Sequence[AttentionMap]) -> bool:
    """Whether the keys are those of another sequence, such as an encoder's, which does not grow."""
    return calls[0].kind == "cross" and len({one.shape[3] for one in calls}) == 1


def _look_at_the_same(calls: Sequence[AttentionMap]) -> bool:
    """Whether the calls have the same keys of another sequence, and not the same query, as for one picture again."""
    if not _look_elsewhere(calls) or torch.equal(calls[0].rows([-1]), calls[-1].rows([-1])):
        return False
    pairs = (_as_pair(*(_keys(one, slice(None)) for one in pair)) for pair in itertools.pairwise(calls))
    return all(pair is not None and _are_same(*pair) for pair in pairs)


def _grow(calls: Sequence[AttentionMap]) -> bool:
    """Whether a module's calls have more keys than those before, or use more of them."""
    if _look_elsewhere(calls):
        return False
    return len({one.shape[2:] for one in calls}) > 1 or _keys_in_use(calls[0]) < _keys_in_use(calls[-1])


def _are_recomputed(calls: Sequence[AttentionMap]) -> bool:
    """Whether each call has one token more than the one before, and all before it, as without a cache."""
    sizes = [one.shape[2:] for one in calls]
    has_all = _look_elsewhere(calls) or all(queries == keys for queries, keys in sizes)
    return has_all and all(after[0] == before[0] + 1 for before, after in itertools.pairwise(sizes))


def generated_maps(calls: Calls, are_new: bool, beam_indices: Any = None) -> dict[str, list[AttentionMap]]:
    """One map of the whole text for each module; of a module whose calls have nothing to do with it, all of them.

    Args:
        are_new: whether to leave out the rows of the first call, the prompt's, and modules that have no others.
        beam_indices: of which beam each step of each text is, (texts, steps), as transformers' `generate` returns it;
            below 0 behind the end of a text. None: the texts are the beams of the last step.

    Raises:
        ValueError: the calls are not the steps of one generation; the message says why.
    """
    steps = {path: _steps_of(path, several) for path, several in calls.items() if not _are_apart(several)}
    apart = {path: list(several) for path, several in calls.items() if path not in steps}
    repeated = next((path for path, several in apart.items() if len(several) > 1), None)
    if repeated is not None and not steps:
        raise _not_one(repeated, "each has as many keys as queries, and none has keys of those before it")
    order = _orders(steps) if beam_indices is None else _orders_of_beams(steps, beam_indices)
    joined = {path: [_joined(one, order, are_new)] for path, one in steps.items()}
    return {path: joined[path] if path in joined else apart[path] for path in (joined if are_new else calls)}


def _steps_of(path: str, calls: Sequence[AttentionMap]) -> _Steps:
    """Where the calls of a module lie in the whole."""
    first, prompt = calls[0], calls[0].shape[2]
    if any(one.shape[:2] != first.shape[:2] for one in calls):
        shapes = ", ".join(map(str, dict.fromkeys(one.shape for one in calls)))
        raise _not_one(path, f"they have different numbers of texts or heads: {shapes}")
    if _are_recomputed(calls):
        for number, one in enumerate(calls[:-1]):
            if not _begins(one, calls[-1]):
                raise _not_one(path, f"the text of call {number} is not the beginning of the last call's")
        return _Steps([_Step(calls[-1], 0)], prompt, calls[-1].shape[3], are_recomputed=True)
    firsts = [*itertools.accumulate((one.shape[2] for one in calls), initial=0)]
    if _look_elsewhere(calls):
        for number, (before, after) in enumerate(itertools.pairwise(calls), 1):
            pair = _as_pair(_keys(before, slice(None)), _keys(after, slice(None)))
            if pair is not None and not _are_same(*pair):
                raise _not_one(path, f"call {number} looks at other keys than the one before")
        return _Steps([_Step(*pair) for pair in zip(calls, firsts, strict=False)], prompt, first.shape[3])
    begun = max(prompt, _keys_in_use(first)) - prompt
    steps = [_Step(first, 0)]
    for number, one in enumerate(calls[1:], 1):
        (queries, keys), end = one.shape[2:], begun + firsts[number + 1]
        if queries == keys:
            raise _not_one(path, f"call {number} has no keys of those before it: another text begins")
        if keys != end and _keys_in_use(one) != min(keys, end):
            raise _not_one(path, f"call {number} has {keys} keys, and these are not of the {end} tokens up to then")
        if keys < end and queries > 1 and _keys(one, slice(None)) is None:
            raise _not_one(
                path,
                f"call {number} has {queries} queries and fewer keys than there are tokens: either tokens were taken "
                "back, as in assisted decoding, or keys dropped out of a window. Weights alone do not tell",
            )
        steps.append(_Step(one, firsts[number], max(0, end - keys)))
    return _Steps(steps, prompt, begun=begun)


def _keys_in_use(one: AttentionMap) -> int:
    """How many keys there are up to the last one that the last query attends to, which is its own.

    Those behind it are room in a static cache.
    """
    if one.shape[2] == one.shape[3]:
        return one.shape[3]
    weights = one.rows([-1]).amax((0, 1, 2))
    return int(weights.nonzero().max()) + 1 if bool(weights.any()) else 0


def _begins(one: AttentionMap, last: AttentionMap) -> bool:
    """Whether the last row of a call is that of a later one too; for each text, that of any text before.

    Beams change their order.
    """
    queries, keys = one.shape[2:]
    if one.shape[:2] != last.shape[:2]:
        return False
    apart = (one.rows([-1])[:, None] - last.rows([queries - 1])[None, ..., :keys]).abs().amax((2, 3, 4))
    return bool((apart < _ROUNDING).any(0).all())


def _keys(one: AttentionMap, which: slice) -> Tensor | None:
    """Some keys of a call, (batch, key heads, keys, width), or a sample of them; None where neither is kept."""
    keys = one.source.key if isinstance(one.source, Factors) else one.key_sample
    return None if keys is None or len(keys) != one.shape[0] else keys[:, :, which]


def _as_pair(one: Tensor | None, other: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """The keys of two calls with as many heads: for some calls a key head is repeated for each query head."""
    if one is None or other is None:
        return None
    heads, bits = min(one.shape[1], other.shape[1]), _BITS[one.element_size()]  # a padded token's may be NaN
    return one[:, :: one.shape[1] // heads].view(bits), other[:, :: other.shape[1] // heads].view(bits)


def _are_same(one: Tensor, other: Tensor) -> bool:
    is_same_memory = one.data_ptr() == other.data_ptr() and one.stride() == other.stride()
    return one.shape == other.shape and (is_same_memory or torch.equal(one, other))


def _orders(all_steps: Mapping[str, _Steps]) -> list[Tensor] | None:
    """For each step, which text of its call each text of the whole is; None: all stay in their places."""
    cached = {path: one for path, one in all_steps.items() if one.keys is None}
    count = max((len(one.steps) for one in cached.values()), default=0)
    texts = max((one.steps[0].map.shape[0] for one in cached.values()), default=0)
    if not cached:
        _check_texts_differ(all_steps)
    order = [torch.arange(texts)]
    for number in range(count - 1, 0, -1):
        parents = _parents({path: one for path, one in cached.items() if number < len(one.steps)}, number)
        order.append(order[-1] if parents is None else parents[order[-1]])
    order.reverse()
    if all(torch.equal(one, order[-1]) for one in order):
        return None
    for path, one in all_steps.items():
        if len(one.steps) != count:
            raise _not_one(path, f"beams have changed their order, and it was called {len(one.steps)} times of {count}")
    return order


def _check_texts_differ(all_steps: Mapping[str, _Steps]) -> None:
    """Raise ValueError where only cross-attention was recorded and its texts may be beams, which look at the same keys.

    Nothing tells then which beam a step goes on from.
    """
    for path, one in all_steps.items():
        first = one.steps[0].map
        keys = _keys(first, slice(None))
        are_apart = keys is not None and not any(_are_same(*pair) for pair in itertools.combinations(keys, 2))
        if first.shape[0] > 1 and not one.are_recomputed and not are_apart:
            raise ValueError(
                f"only cross-attention was recorded, and the {first.shape[0]} texts of {path!r} may be beams, which "
                "change their order from step to step: record the decoder's self-attention too, or pass beam_indices="
            )


def _parents(cached: Mapping[str, _Steps], number: int) -> Tensor | None:
    """Which text of the step before each text of a step goes on from, (texts,); None: the one in its own place.

    Where several were the same up to there, as the copies of a prompt that beams begin with, any of them will do.
    """
    pairs = {path: pair for path, one in cached.items() if (pair := one.keys_shared(number)) is not None}
    if not pairs and any(one.steps[0].map.shape[0] > 1 for one in cached.values()):
        raise ValueError(
            "the weights of several texts do not tell whether these are beams, whose cache changes its order from step "
            "to step, and their keys were not seen: record with a fused kernel, such as transformers' "
            'attn_implementation="sdpa", whose keys are kept; or pass beam_indices='
        )
    if all(_are_same(*pair) for pair in pairs.values()):
        return None
    may_be: Tensor | None = None
    for path, (before, after) in pairs.items():
        own = same_texts(before, after)
        may_be = own if may_be is None else may_be & own.to(may_be.device)
        if not may_be.any(1).all():
            raise _not_one(
                path,
                f"what call {number} has of the keys before it is not what those calls left: it goes on from another "
                "text, or tokens were taken back, as in assisted decoding",
            )
    assert may_be is not None
    return may_be.int().argmax(1).cpu()


def _orders_of_beams(all_steps: Mapping[str, _Steps], beam_indices: Any) -> list[Tensor]:
    """The same by what is known of beams, as far as the keys confirm it."""
    indices = torch.as_tensor(beam_indices).long().cpu()
    if indices.ndim != 2 or not indices.numel():
        raise ValueError(f"beam_indices has the shape (texts, steps), not {tuple(indices.shape)}")
    order = [*indices.unbind(1)]
    for path, one in all_steps.items():
        texts, count = one.steps[0].map.shape[0], len(one.steps)
        if one.are_recomputed:
            raise ValueError(f"beam_indices tell of a cache, and {path!r} had none: each call has the whole text")
        if int(indices.max()) >= texts or len(order) > count:
            raise ValueError(
                f"beam_indices of {len(order)} steps and of beams up to {int(indices.max())} are not those of "
                f"{path!r}, which was called {count} times with {texts} beams"
            )
        for number in range(1, len(order)):
            pair = one.keys_shared(number) if one.keys is None else None
            goes_on = (order[number] >= 0) & (order[number - 1] >= 0)
            before, after = (order[at][goes_on] for at in (number - 1, number))
            if pair is not None and not _are_same(pair[0][before], pair[1][after]):
                raise ValueError(
                    f"beam_indices are not those of this generation: by the keys of {path!r}, step {number} goes on "
                    "from other beams"
                )
    return order


def _joined(whole: _Steps, order: list[Tensor] | None, are_new: bool) -> AttentionMap:
    """One map of a module's calls."""
    order = None if whole.are_recomputed else order
    steps = whole.steps if order is None else whole.steps[: len(order)]
    left = whole.prompt if are_new else 0
    if are_new and len(steps) == 1 and not whole.are_recomputed:
        raise ValueError('queries="new": beam_indices end with the prompt')
    queries = steps[-1].first + steps[-1].map.shape[2]
    keys = whole.begun + queries if whole.keys is None else whole.keys
    texts, heads = len(order[0]) if order else steps[0].map.shape[0], steps[0].map.shape[1]
    of_keys, of_queries = _layouts(whole, steps, order, texts)
    if are_new and not whole.are_recomputed:
        steps, order = steps[1:], order and order[1:]

    def blocks(sources: Sequence[Any]) -> list[Block]:
        made, numbers = [], torch.arange(heads)
        places, taken = torch.arange(texts * heads), None
        for at, (source, step) in enumerate(zip(sources, steps, strict=True)):
            if order:
                goes_on = order[at] >= 0
                places = (goes_on.nonzero() * heads + numbers).flatten()
                taken = (order[at][goes_on, None] * heads + numbers).flatten()
            made.append(Block(source, places, step.first - left, step.first_key, taken))
        return made

    made = joined_map([step.map for step in steps], blocks, (texts, heads, queries - left, keys))
    made.layout = of_keys
    made.query_layout = of_queries if of_queries is None or not (begin := whole.begun + left) else of_queries.cut(begin)
    return made


def _layouts(
    whole: _Steps, steps: Sequence[_Step], order: list[Tensor] | None, texts: int
) -> tuple[Layout | None, Layout | None]:
    """What the keys and the queries of all steps are, those of the answer told apart; None where a step does not know.

    The queries are those of the keys that come from before the first step, too.
    """
    first, last = steps[0].map, steps[-1].map
    tokens = last.layout if order is None and last.kind != "cross" else None
    if (
        tokens is None or tokens.count != whole.begun + steps[-1].first + last.shape[2]
    ):  # a window's, or a static cache's
        known = [step.map.query_layout for step in steps]
        tokens = None if None in known else Layout.batch([_of_text(whole, steps, order, text) for text in range(texts)])
    tokens = None if tokens is None else tokens.written_from(whole.begun + whole.prompt)
    if first.kind != "cross":
        return tokens, tokens
    source = first.layout
    if source is not None and order is not None:
        source = Layout.batch([source.of(max(0, int(place))) for place in order[0]])
    return source, tokens


def _of_text(whole: _Steps, steps: Sequence[_Step], order: list[Tensor] | None, text: int) -> Layout:
    """The tokens of one text, put together from what each step knows of its own; behind its end they are padding."""
    each = [Layout.text(whole.begun)] if whole.begun else []
    for at, (step, _, _) in enumerate(steps):
        place = text if order is None else int(order[at][text])
        assert step.query_layout is not None
        each.append(step.query_layout.of(place) if place >= 0 else Layout((Part("padding", step.shape[2]),)))
    return Layout.joined(each)


def _not_one(path: str, why: str) -> ValueError:
    return ValueError(
        f"the calls of {path!r} are not the steps of one generation: {why}. Record one generation at a time, with "
        "clear() before each"
    )
