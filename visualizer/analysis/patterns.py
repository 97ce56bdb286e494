"""What each head does: which of a few known patterns it follows, and the scores that say so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import ALL_WORDS
from ..maps import AttentionMap, without_autograd
from ..store import Printed
from ..words import is_special, word_list
from .layers import for_each_token, layer_label, layers_of, real_tokens

__all__ = ["HeadPatterns", "head_patterns"]

SCORES = ("previous", "next", "self", "local", "special", "broad", "induction")
"""The patterns with a score, in the order of `score_sums`; "vertical", which reads a map twice, is not here."""

Floats: TypeAlias = npt.NDArray[np.float64]

_GAIN = 0.5  # how far from even attention to 1 a score must be for its pattern to be the head's label
_BROAD = 0.9
_REPEATS = 8
# The most specific first: a previous-token head is also local.
_PATTERNS = {
    "induction": "induction, what followed the same token before",
    "previous": "previous token",
    "next": "next token",
    "self": "the token itself",
    "special": "special tokens",
    "local": "tokens nearby",
    "broad": "broad",
    "vertical": "the same keys for all queries",
    "mixed": "mixed",
}


@dataclass(repr=False, eq=False)
class HeadPatterns(Printed):
    """The pattern of each head, and the scores behind it; made by `head_patterns`."""

    labels: npt.NDArray[np.str_]
    """(layers, heads): "induction", "previous", "next", "self", "special", "local", "broad", "vertical" or "mixed"."""
    scores: dict[str, Floats]
    """By pattern, (layers, heads), 0 to 1: the share of its attention that a head gives to the keys of the pattern; for
    "broad" its entropy as a share of the largest possible. NaN where it is not known."""
    uniform: dict[str, Floats]
    """By pattern, (layers, heads): the score of a head that attends evenly to all keys that it may see; for "vertical"
    how much of the head's attention is that of such a head."""

    def evidence(self, layer: int, head: int) -> str:
        """One line that says why a head has its label.

        >>> import torch
        >>> from visualizer.analysis import head_patterns
        >>> head_patterns(torch.eye(8).roll(-1, 1).expand(1, 1, 8, 8)).evidence(0, 0)
        'previous token: 1.00 of its attention (0.12 if it were even)'
        """
        label = str(self.labels[layer, head])
        if label == "mixed":
            nearest = self.nearest(layer, head)
            if nearest is None:
                return "mixed: its queries attend to nothing"
            return f"mixed: it fits no pattern; the nearest is {self._share(nearest, layer, head)}"
        if label == "broad":
            return f"broad: {self.scores['broad'][layer, head]:.2f} of the largest entropy"
        return self._share(label, layer, head)

    def nearest(self, layer: int, head: int) -> str | None:
        """The pattern whose score is farthest from even attention, "broad" left out; None where no score is known.

        >>> import torch
        >>> from visualizer.analysis import head_patterns
        >>> before, even = torch.eye(8).roll(-1, 1), torch.full((8, 8), 1 / 8)
        >>> some = head_patterns((0.4 * before + 0.6 * even)[None, None])
        >>> str(some.labels[0, 0]), some.nearest(0, 0)
        ('mixed', 'previous')
        """
        gains = {
            pattern: _gain(score, self.uniform[pattern])[layer, head]
            for pattern, score in self.scores.items()
            if pattern != "broad" and not np.isnan(score[layer, head])
        }
        return max(gains, key=gains.__getitem__, default=None)

    def _share(self, pattern: str, layer: int, head: int) -> str:
        score, even = self.scores[pattern][layer, head], self.uniform[pattern][layer, head]
        return f"{_PATTERNS[pattern]}: {score:.2f} of its attention ({even:.2f} if it were even)"

    def table(self) -> tuple[str, list[tuple[str, ...]]]:
        """How many heads follow each pattern, and a row of labels for each layer."""
        layers, heads = self.labels.shape
        counts = [(int((self.labels == pattern).sum()), pattern) for pattern in _PATTERNS]
        listing = ", ".join(f"{count} {pattern}" for count, pattern in counts if count)
        rows = [("layer", *(f"head {head}" for head in range(heads)))]
        rows += [(str(number), *map(str, row)) for number, row in enumerate(self.labels)]
        return f"patterns of {layers} x {heads} heads: {listing}", rows


@without_autograd
def head_patterns(
    attention: Any,
    tokens: Sequence[str] | Sequence[Sequence[str]] | None = None,
    *,
    ids: Any = None,
    special: Sequence[str | int] | None = None,
    attention_mask: Any = None,
    window: int = 2,
) -> HeadPatterns:
    """Which pattern each head follows: previous or next token, itself, special tokens, nearby, induction and others.

    >>> import torch
    >>> from visualizer.analysis import head_patterns
    >>> before = torch.eye(8).roll(-1, 1)                     # each token sees the one before it
    >>> even = torch.full((8, 8), 1 / 8)
    >>> patterns = head_patterns(torch.stack([before, even])[None])
    >>> patterns
    <patterns of 1 x 2 heads: 1 previous, 1 broad
      layer  head 0    head 1
      0      previous  broad>
    >>> patterns.scores["previous"].round(2)
    array([[1.  , 0.12]])

    After Clark et al. 2019 (https://arxiv.org/abs/1906.04341), Voita et al. 2019 (https://arxiv.org/abs/1905.09418)
    and, for induction, Olsson et al. 2022 (https://arxiv.org/abs/2209.11895). Scores are means over the texts and the
    queries:

    - "previous", "next", "self": the weight of the key before the query, after it, and at it, over the queries that
      have such a key. In a causal map "next" is 0.
    - "induction": the weights of the keys that directly follow earlier occurrences of the query's token, over the
      queries whose token occurred before. NaN for fewer than eight such queries, or if the tokens are not known. A
      sequence of random tokens, repeated once, shows it best.
    - "special": the weights of the special tokens; in a causal map also of the first token, where heads send attention
      that they have no use for. NaN where there is no such token.
    - "local": the weights of the keys at most `window` away.
    - "broad": the entropy divided by ln(keys that the query may see), over the queries that see more than one.
    - "vertical", after Kovaleva et al. 2019 (https://arxiv.org/abs/1908.08593): how much of a query's attention the
      mean of all other queries has too, the sum of the smaller weights. The map of such a head is made of columns.

    The label of a head is the first pattern, in the order induction, previous, next, self, special, local, whose score
    is at least half of the way from the score of even attention to 1. If there is none, it is "broad" for a score of
    0.9 or more; else "vertical", if that score is at least half of the way from the head's likeness to even attention
    to 1; else "mixed". A query may see all keys except padding, and in a causal model (whose first tokens see only
    themselves) no key after itself. Distances are counted along the text; for pictures see `attention_distance`.

    Args:
        attention: layers with the same number of heads, whose queries and keys are the same tokens; or one map.
        tokens: the words of the tokens, one list for all texts, or a list for each text. They show which tokens are
            special and which repeat. None: what the maps know, as those of `attention(model, tokenizer=...)` do.
        ids: the tokens' numbers, (batch, tokens) or (tokens,). They show which tokens repeat, in place of `tokens`.
        special: names or positions (-1 is the last) of special tokens; None: those that the maps know, and the tokens
            with names that tokenizers use, such as [CLS], [SEP], <s> and <|im_end|>.
        attention_mask: (batch, tokens), 0 for padding, as tokenizers give it; queries that are padding do not count.
            None: what the maps know.
        window: how far "local" reaches, in tokens, to either side.

    Returns:
        The labels and scores of all heads; it prints as a table of the labels. One map is one layer.

    Raises:
        ValueError: a layer's queries are not its keys, layers differ in their heads or tokens, or `tokens`, `ids`,
            `special` or `attention_mask` do not fit the maps.
    """
    maps = layers_of(attention).layers
    for number, layer in enumerate(maps):
        why = None
        if layer.kind in ("cross", "window"):
            why = f"has another kind of attention ({layer.kind})"
        elif layer.shape[2] != layer.shape[3]:
            why = f"has {layer.shape[2]} queries and {layer.shape[3]} keys"
        elif layer.shape != maps[0].shape:
            why = f"has the shape {layer.shape}, and {layer_label(0, maps[0])} has {maps[0].shape}"
        if why is not None:
            raise ValueError(
                "patterns need layers of one shape, whose queries and keys are the same row of tokens; "
                f"{layer_label(number, layer)} {why}. Leave such layers out"
            )
    if window < 0:
        raise ValueError(f"window={window!r}: pass how many tokens, 0 or more")
    batch, _, count, _ = maps[0].shape
    known = maps[0].layout
    if tokens is None and known is not None and known.of(0).has_words:
        tokens = [known.of(text).names for text in range(batch)]
    names = _names(tokens, batch, count)
    real = real_tokens(known, batch, count) if attention_mask is None else None
    if attention_mask is not None:
        real = for_each_token("attention_mask", attention_mask, batch, count) != 0
    real = torch.ones(batch, count, dtype=torch.bool) if real is None else real
    if not bool(real.any(1).all()):
        raise ValueError("attention_mask leaves a text without a token: it is 0 everywhere")
    repeats = for_each_token("ids", ids, batch, count) if ids is not None else _as_numbers(names)
    are_special = _special(special, names, batch, count)
    if special is None and known is not None and known.count == count:
        of_layout = torch.from_numpy(np.stack([known.of(text).are("special") for text in range(batch)]))
        are_special = of_layout if are_special is None else are_special | of_layout
        are_special = are_special if bool(are_special.any()) else None
    facts = facts_of(maps, repeats, are_special, real, window)
    # Twice (layers, patterns, heads): the scores, and those of even attention.
    of_heads, of_even = torch.stack([_means(*score_sums(layer, facts)).cpu() for layer in maps], 1).numpy()
    scores, uniform = (
        {pattern: means[:, place] for place, pattern in enumerate(SCORES)} for means in (of_heads, of_even)
    )
    alike = torch.stack([_likeness(layer, facts).cpu() for layer in maps], 1).numpy()
    scores["vertical"], uniform["vertical"] = alike
    return HeadPatterns(_labels(scores, uniform), scores, uniform)


@dataclass
class TokenFacts:
    """What is known about the tokens of a batch; the tensors are on the CPU, each (batch, tokens)."""

    repeats: Tensor | None
    """Numbers that are the same for the same token."""
    special: Tensor | None
    """Which tokens are special."""
    real: Tensor
    """Which tokens are not padding."""
    is_causal: bool
    window: int
    """How far "local" reaches, in tokens, to either side."""


def facts_of(
    maps: list[AttentionMap], repeats: Tensor | None, special: Tensor | None, real: Tensor, window: int
) -> TokenFacts:
    """What is known about the tokens of these layers. In a causal model each text's first token is special too."""
    is_causal = _is_causal(maps, real)
    if is_causal:
        special = torch.zeros_like(real) if special is None else special
        special[torch.arange(len(real)), real.int().argmax(1)] = True
    return TokenFacts(repeats, special, real, is_causal, window)


def _labels(scores: dict[str, Floats], uniform: dict[str, Floats]) -> npt.NDArray[np.str_]:
    labels = np.full(scores["broad"].shape, "mixed", "<U9")
    for pattern in reversed([pattern for pattern in _PATTERNS if pattern in scores]):
        is_broad = scores["broad"] >= _BROAD
        labels[is_broad if pattern == "broad" else _gain(scores[pattern], uniform[pattern]) >= _GAIN] = pattern
    return labels


def _gain(score: Floats, even: Floats) -> Floats:
    """Where a score is between even attention (0) and all attention (1); 0 where even attention is all."""
    room = 1 - even
    return np.where(room > 1e-6, (score - even) / np.maximum(room, 1e-6), 0)  # NaN compares as False


def _is_causal(maps: list[AttentionMap], real: Tensor) -> bool:
    """Whether the first token of each text sees only itself, which no softmax gives without a causal mask."""
    firsts = real.int().argmax(1).tolist()  # the first after padding on the left
    if real.shape[1] == 1:
        return False
    is_known = False
    for layer in maps:
        for text, first in enumerate(firsts):
            row = layer.rows([first])[text, :, 0]
            if bool((row[:, :first] > 0).any()) or bool((row[:, first + 1 :] > 0).any()):
                return False
            is_known |= bool((row[:, first] > 0).any())  # the row of a masked query is zeros, and shows nothing
    return is_known


def _means(sums: Tensor, counts: Tensor) -> Tensor:
    """(2, patterns, heads): the mean of each score over the queries of all texts, and that of even attention."""
    total, counted = sums.sum(2), counts.sum(1)
    return torch.where(has_evidence(counted), total / counted, math.nan)


def has_evidence(counts: Tensor) -> Tensor:
    """For which patterns, (patterns, ...), there are enough queries."""
    least = torch.ones(len(SCORES), *[1] * (counts.ndim - 1), device=counts.device)
    least[SCORES.index("induction")] = _REPEATS
    return counts >= least


def score_sums(layer: AttentionMap, facts: TokenFacts) -> tuple[Tensor, Tensor]:
    """The sum of the scores over the queries of each text, and the number of these queries.

    Both float64: (2, patterns, batch, heads), of the heads and of a head that attends evenly; and (patterns, batch,
    heads). A query that attends to nothing in a head does not count there.
    """
    batch, heads, count, _ = layer.shape
    device = layer.device
    real = facts.real.to(device)
    special, repeats = (None if known is None else known.to(device) for known in (facts.special, facts.repeats))
    total = torch.zeros(2, len(SCORES), batch, heads, dtype=torch.float64, device=device)
    counted = torch.zeros(len(SCORES), batch, heads, dtype=torch.float64, device=device)
    keys = torch.arange(count, device=device)
    for part, rows in layer.chunks():
        queries = keys[part, None]
        seen = _seen(queries, real, facts)
        visible = seen.sum(-1)  # (batch, some queries)
        even = seen.to(rows.dtype) / visible.clamp(min=1)[..., None]
        both = torch.cat([rows, even[:, None]], 1)  # even attention as one more head
        attends = rows.amax(-1) > 0  # (batch, heads, some queries)
        anywhere = torch.ones_like(queries[:, 0], dtype=torch.bool)
        before, after = (real.roll(shift, 1)[:, part] for shift in (1, -1))  # whether the neighbour is not padding
        # The keys of each pattern, ([batch,] some queries, keys), and which queries have such a key.
        where = {
            "previous": (keys == queries - 1, before & (queries[:, 0] > 0)),
            "next": (keys == queries + 1, after & (queries[:, 0] < count - 1)),
            "self": (keys == queries, anywhere),
            "local": ((keys - queries).abs() <= facts.window, anywhere),
        }
        if special is not None:
            where["special"] = special[:, None], anywhere
        if repeats is not None:
            # A key is a target if the token before it is the query's token and it comes before the query.
            targets = torch.zeros_like(real)[:, None] & (keys == queries)
            targets[..., 1:] = (repeats[:, part, None] == repeats[:, None, :-1]) & real[:, None, :-1]
            targets &= keys < queries
            where["induction"] = targets, targets.any(-1)
        for place, pattern in enumerate(SCORES):
            if pattern == "broad":
                has_key = visible > 1
                values = torch.special.entr(both).sum(-1) / visible.clamp(min=2).to(rows.dtype).log()[:, None]
            elif pattern in where:
                wanted, has_key = where[pattern]
                # (batch, heads + 1, queries)
                values = (both * (wanted if wanted.ndim == 2 else wanted[:, None])).sum(-1)
            else:
                continue
            counts = attends & (real[:, part] & has_key)[:, None]
            total[0, place] += (values[:, :-1] * counts).sum(2, dtype=torch.float64)
            total[1, place] += (values[:, -1:] * counts).sum(2, dtype=torch.float64)
            counted[place] += counts.sum(2)
    return total, counted


def _seen(queries: Tensor, real: Tensor, facts: TokenFacts) -> Tensor:
    """Which keys some queries, (queries, 1), may see, (batch, queries, keys)."""
    keys = torch.arange(real.shape[1], device=real.device)
    return real[:, None] & (keys <= queries) if facts.is_causal else real[:, None].expand(-1, len(queries), -1)


def _likeness(layer: AttentionMap, facts: TokenFacts) -> Tensor:
    """The score of "vertical" of each head, and how much of its attention is even, (2, heads)."""
    batch, heads, count, _ = layer.shape
    real = facts.real.to(layer.device)
    places = torch.arange(count, device=layer.device)[:, None]
    # What each key gets, and from how many queries that may see it: (batch, heads, keys).
    received, times = torch.zeros(2, batch, heads, count, dtype=torch.float64, device=layer.device)
    for part, rows in layer.chunks():
        counts = (real[:, None, part] & (rows.amax(-1) > 0))[..., None]
        received += (rows * counts).sum(2, dtype=torch.float64)
        times += (counts & _seen(places[part], real, facts)[:, None]).sum(2)
    shares = torch.zeros(2, heads, dtype=torch.float64, device=layer.device)
    number = torch.zeros(heads, dtype=torch.float64, device=layer.device)
    for part, rows in layer.chunks():
        counts = real[:, None, part] & (rows.amax(-1) > 0)
        seen = _seen(places[part], real, facts)[:, None].double()
        others = (received[:, :, None] - rows).clamp(min=0) / (times[:, :, None] - 1).clamp(min=1) * seen
        others = others / others.sum(-1, keepdim=True).clamp(min=1e-12)
        even = seen / seen.sum(-1, keepdim=True).clamp(min=1)
        for place, wanted in enumerate((others, even)):
            shares[place] += (torch.minimum(rows.double(), wanted).sum(-1) * counts).sum((0, 2))
        number += counts.sum((0, 2))
    return torch.where(number > 0, shares / number, math.nan)


def _names(tokens: Any, batch: int, count: int) -> list[list[str]] | None:
    """The words of the tokens, a list for each text."""
    if tokens is None:
        return None
    entries = word_list(tokens)
    is_shared = not any(isinstance(entry, (list, tuple)) for entry in entries)
    lists = [list(map(str, words)) for words in ([entries] * batch if is_shared else map(word_list, entries))]
    if len(lists) != batch or any(len(words) != count for words in lists):
        raise ValueError(
            f"tokens is a list of {count} words, or {batch} such lists, one for each text; this has "
            f"{sorted({len(words) for words in lists})} in {len(lists)} lists. {ALL_WORDS}"
        )
    return lists


def _as_numbers(names: list[list[str]] | None) -> Tensor | None:
    """The same number for the same word, (batch, tokens)."""
    if names is None:
        return None
    known: dict[str, int] = {}
    return torch.tensor([[known.setdefault(token, len(known)) for token in words] for words in names])


def _special(special: Any, names: list[list[str]] | None, batch: int, count: int) -> Tensor | None:
    """Which tokens are special, (batch, tokens); None if no token is."""
    if isinstance(special, (str, int)):
        special = [special]
    wanted = None if special is None else {entry for entry in special if isinstance(entry, str)}
    if wanted and names is None:
        raise ValueError(f"special={list(special)!r} has names: pass tokens=, or positions")
    are_special = torch.tensor(
        [
            [is_special(token) if wanted is None else token in wanted for token in words]
            for words in names or [[""] * count] * batch
        ]
    )
    for position in special or ():
        if not isinstance(position, str):
            if not -count <= position < count:
                raise ValueError(f"special={list(special)!r} has the position {position}, and there are {count} tokens")
            are_special[:, position] = True
    return are_special if bool(are_special.any()) else None
