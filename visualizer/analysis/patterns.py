"""What single heads do: which of a few known patterns each follows, and the numbers that say so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..maps import AttentionMap, without_autograd
from ..store import as_html, as_text
from .reading import each, layers_of, name

Floats: TypeAlias = npt.NDArray[np.float64]

_HALF = 0.5
_BROAD = 0.9
_REPEATS = 8
_SPECIAL = {
    "[CLS]", "[SEP]", "[PAD]", "[MASK]", "[UNK]", "[BOS]", "[EOS]", "<s>", "</s>", "<pad>", "<mask>", "<unk>", "<bos>",
    "<eos>", "<cls>", "<sep>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>", "<|end_of_text|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>",
}  # fmt: skip
# The most specific first: what a previous-token head does is local too.
_WORDS = {
    "induction": "induction, what followed the same token before",
    "previous": "previous token",
    "next": "next token",
    "self": "the token itself",
    "special": "special tokens",
    "local": "tokens nearby",
    "broad": "broad",
    "mixed": "mixed",
}


@dataclass(repr=False, eq=False)
class HeadPatterns:
    """The pattern of each head and the scores behind it; made by `head_patterns`."""

    labels: npt.NDArray[np.str_]
    """(layers, heads): "induction", "previous", "next", "self", "special", "local", "broad" or "mixed"."""
    scores: dict[str, Floats]
    """By pattern, (layers, heads), 0 to 1: the share of its attention that a head gives to the keys of the pattern; of
    "broad" its entropy as a share of the largest. NaN where it cannot be told."""
    uniform: dict[str, Floats]
    """By pattern, (layers, heads): the score of a head that attends evenly, to all keys that it may see the same."""

    def evidence(self, layer: int, head: int) -> str:
        """One line that says why a head has its label.

        >>> import torch
        >>> from visualizer.analysis import head_patterns
        >>> head_patterns(torch.eye(8).roll(-1, 1).expand(1, 1, 8, 8)).evidence(0, 0)
        'previous token: 1.00 of its attention (0.12 if it were even)'
        """
        label = str(self.labels[layer, head])
        if label == "mixed":
            told = [pattern for pattern in self.scores if pattern != "broad"]
            told = [pattern for pattern in told if not np.isnan(self.scores[pattern][layer, head])]
            best = max(told, key=lambda pattern: _gain(self.scores[pattern], self.uniform[pattern])[layer, head])
            return f"mixed: no pattern has it; the nearest is {self._share(best, layer, head)}"
        if label == "broad":
            return f"broad: {self.scores['broad'][layer, head]:.2f} of the largest entropy"
        return self._share(label, layer, head)

    def _share(self, pattern: str, layer: int, head: int) -> str:
        score, even = self.scores[pattern][layer, head], self.uniform[pattern][layer, head]
        return f"{_WORDS[pattern]}: {score:.2f} of its attention ({even:.2f} if it were even)"

    def __repr__(self) -> str:
        return as_text(*self._table())

    def _repr_html_(self) -> str:
        return as_html(*self._table())

    def _table(self) -> tuple[str, list[tuple[str, ...]]]:
        layers, heads = self.labels.shape
        counts = [(int((self.labels == pattern).sum()), pattern) for pattern in _WORDS]
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
    """Which pattern each head follows: previous or next token, itself, special tokens, nearby, broad, induction.

    >>> import torch
    >>> from visualizer.analysis import head_patterns
    >>> before = torch.eye(8).roll(-1, 1)                     # each token sees the one before it
    >>> even = torch.full((8, 8), 1 / 8)
    >>> found = head_patterns(torch.stack([before, even])[None])
    >>> found
    <patterns of 1 x 2 heads: 1 previous, 1 broad
      layer  head 0    head 1
      0      previous  broad>
    >>> found.scores["previous"].round(2)
    array([[1.  , 0.12]])

    After Clark et al. 2019 (https://arxiv.org/abs/1906.04341), Voita et al. 2019 (https://arxiv.org/abs/1905.09418)
    and, for induction, Olsson et al. 2022 (https://arxiv.org/abs/2209.11895). Scores are means over the texts and the
    queries:

    - "previous", "next", "self": the weight of the key one before, one behind, and at the query, over the queries that
      have such a key. In a causal map "next" is 0.
    - "induction": the weights of the keys that came next after earlier occurrences of the query's token, over the
      queries whose token occurred before. NaN where these are fewer than eight, or tokens are not known: a sequence of
      random tokens, twice, tells best.
    - "special": the weights of the special tokens; of a causal map also of the first token, where heads send what they
      have no use for. NaN where there is none.
    - "local": the weights of the keys at most `window` away.
    - "broad": the entropy over ln(keys that the query may see), over the queries that see more than one.

    A head has the first of the patterns, in the order of induction, previous, next, self, special and local, whose
    score goes at least half of the way from that of even attention to 1; else "broad" if that is 0.9 or more; else
    "mixed". A query may see all keys but padding, and in a causal model (whose first tokens see only themselves) none
    behind itself. Distances are those in a row of tokens; for pictures see `attention_distance`.

    Args:
        attention: layers of one number of heads, queries and keys being the same tokens; or one map.
        tokens: the texts of the tokens, one list for all texts, or a list for each. They tell which are special and
            which repeat.
        ids: the tokens' numbers, (batch, tokens) or (tokens,); they tell which repeat, and count before `tokens`.
        special: names or numbers of places (-1 is the last) of special tokens; None: the tokens with names that
            tokenizers use, such as [CLS], [SEP], <s> and <|im_end|>.
        attention_mask: (batch, tokens), 0 for padding, as a tokenizer gives it; queries of padding do not count.
        window: how far "local" reaches, in tokens, to either side.

    Returns:
        The labels and scores of all heads; printed, a table of the labels. One map is one layer.

    Raises:
        ValueError: a layer's queries are not its keys, layers differ in their heads or tokens, or what is said of the
            tokens does not fit them.
    """
    maps, _, _ = layers_of(attention)
    for number, layer in enumerate(maps):
        why = None
        if layer.kind in ("cross", "window"):
            why = f"is attention of another kind ({layer.kind})"
        elif layer.shape[2] != layer.shape[3]:
            why = f"has {layer.shape[2]} queries and {layer.shape[3]} keys"
        elif layer.shape != maps[0].shape:
            why = f"has the shape {layer.shape}, and {name(0, maps[0])} has {maps[0].shape}"
        if why is not None:
            raise ValueError(
                "patterns are those of layers of one shape, whose queries are the keys, in a row of tokens, and "
                f"{name(number, layer)} {why}. Leave such layers out"
            )
    if window < 0:
        raise ValueError(f"window={window!r}: pass how many tokens, 0 or more")
    batch, _, count, _ = maps[0].shape
    names = _names(tokens, batch, count)
    real = (
        torch.ones(batch, count, dtype=torch.bool)
        if attention_mask is None
        else _numbers("attention_mask", attention_mask, batch, count) != 0
    )
    if not bool(real.any(1).all()):
        raise ValueError("attention_mask leaves a text without a token: it is 0 everywhere")
    marked, causal = _special(special, names, batch, count), is_causal(maps, real)
    if causal:
        marked = torch.zeros_like(real) if marked is None else marked
        marked[torch.arange(batch), real.int().argmax(1)] = True
    texts = Texts(
        repeats=_numbers("ids", ids, batch, count) if ids is not None else _as_numbers(names),
        special=marked,
        real=real,
        is_causal=causal,
        window=window,
    )
    # (layers, 2, patterns, heads): the score, and that of even attention
    found = each(maps, lambda layer: _means(*score_sums(layer, texts)).cpu())
    scores, uniform = (
        {pattern: found[:, kind, place].numpy() for place, pattern in enumerate(SCORES)} for kind in (0, 1)
    )
    return HeadPatterns(_labels(scores, uniform), scores, uniform)


SCORES = ("previous", "next", "self", "local", "special", "broad", "induction")


@dataclass
class Texts:
    """What is known of the tokens, on the CPU, each (batch, tokens)."""

    repeats: Tensor | None
    """Numbers, the same for the same token."""
    special: Tensor | None
    real: Tensor
    """Which are no padding."""
    is_causal: bool
    window: int


def _labels(scores: dict[str, Floats], uniform: dict[str, Floats]) -> npt.NDArray[np.str_]:
    labels = np.where(scores["broad"] >= _BROAD, "broad", "mixed").astype("<U9")
    for pattern in reversed([pattern for pattern in _WORDS if pattern in scores and pattern != "broad"]):
        labels[_gain(scores[pattern], uniform[pattern]) >= _HALF] = pattern
    return labels


def _gain(score: Floats, even: Floats) -> Floats:
    """How far a score is on the way from that of even attention to 1; 0 where there is no such way."""
    way = 1 - even
    return np.where(way > 1e-6, (score - even) / np.maximum(way, 1e-6), 0)  # NaN compares as False


def is_causal(maps: list[AttentionMap], real: Tensor) -> bool:
    """Whether the first token of each text sees only itself: in a map that is not causal no softmax hides all keys."""
    firsts = real.int().argmax(1).tolist()  # behind padding on the left
    if real.shape[1] == 1:
        return False
    is_told = False
    for layer in maps:
        for text, first in enumerate(firsts):
            row = layer.rows([first])[text, :, 0]
            if bool((row[:, :first] > 0).any()) or bool((row[:, first + 1 :] > 0).any()):
                return False
            is_told |= bool((row[:, first] > 0).any())  # a row of zeros is a masked query's, and tells nothing
    return is_told


def _means(sums: Tensor, counts: Tensor) -> Tensor:
    """(2, patterns, heads): each score in the mean over the queries of all texts, and that of even attention."""
    total, counted = sums.sum(2), counts.sum(1)
    return torch.where(has_evidence(counted)[:, None], total / counted[:, None], math.nan)


def has_evidence(counts: Tensor) -> Tensor:
    """Of which patterns, (patterns, ...), enough queries have a say."""
    least = torch.ones(len(SCORES), *[1] * (counts.ndim - 1), device=counts.device)
    least[SCORES.index("induction")] = _REPEATS
    return counts >= least


def score_sums(layer: AttentionMap, texts: Texts) -> tuple[Tensor, Tensor]:
    """The scores added up over each text's queries, and how many these are.

    Both float64: (2, patterns, batch, heads), of the heads and of one that attends evenly; and (patterns, batch).
    """
    batch, heads, count, _ = layer.shape
    device = layer.device
    real = texts.real.to(device)
    special, repeats = (None if known is None else known.to(device) for known in (texts.special, texts.repeats))
    total = torch.zeros(2, len(SCORES), batch, heads, dtype=torch.float64, device=device)
    counted = torch.zeros(len(SCORES), batch, dtype=torch.float64, device=device)
    keys = torch.arange(count, device=device)
    for part, rows in layer.chunks():
        queries = keys[part, None]
        seen = real[:, None] & (keys <= queries) if texts.is_causal else real[:, None].expand(-1, len(queries), -1)
        visible = seen.sum(-1)  # (batch, some queries)
        even = seen.to(rows.dtype) / visible.clamp(min=1)[..., None]
        both = torch.cat([rows, even[:, None]], 1)  # as one more head
        anywhere = torch.ones_like(queries[:, 0], dtype=torch.bool)
        before, behind = (real.roll(shift, 1)[:, part] for shift in (1, -1))  # whether the neighbour is no padding
        # Which keys, (some queries, keys) or with the batch before; and which queries have such a key.
        where = {
            "previous": (keys == queries - 1, before & (queries[:, 0] > 0)),
            "next": (keys == queries + 1, behind & (queries[:, 0] < count - 1)),
            "self": (keys == queries, anywhere),
            "local": ((keys - queries).abs() <= texts.window, anywhere),
        }
        if special is not None:
            where["special"] = special[:, None], anywhere
        if repeats is not None:
            # Key k is one where k - 1 holds the query's token and k comes before the query.
            targets = torch.zeros_like(real)[:, None] & (keys == queries)
            targets[..., 1:] = (repeats[:, part, None] == repeats[:, None, :-1]) & real[:, None, :-1]
            targets &= keys < queries
            where["induction"] = targets, targets.any(-1)
        for place, pattern in enumerate(SCORES):
            if pattern == "broad":
                has_key = visible > 1
                values = torch.special.entr(both).sum(-1) / visible.clamp(min=2).to(rows.dtype).log()[:, None]
            elif pattern in where:
                which, has_key = where[pattern]
                values = (both * (which if which.ndim == 2 else which[:, None])).sum(-1)  # (batch, heads + 1, queries)
            else:
                continue
            counts = real[:, part] & has_key
            sums = (values * counts[:, None]).sum(2, dtype=torch.float64)
            total[0, place] += sums[:, :-1]
            total[1, place] += sums[:, -1:]
            counted[place] += counts.sum(1)
    return total, counted


def _names(tokens: Any, batch: int, count: int) -> list[list[str]] | None:
    """The texts of the tokens, a list for each text."""
    if tokens is None:
        return None
    lists = [list(tokens)] * batch if all(isinstance(token, str) for token in tokens) else [list(one) for one in tokens]
    if len(lists) != batch or any(len(one) != count for one in lists):
        raise ValueError(
            f"tokens is a list of {count} texts, or {batch} such lists, one for each text; this has "
            f"{sorted({len(one) for one in lists})} in {len(lists)} lists"
        )
    return lists


def _numbers(what: str, values: Any, batch: int, count: int) -> Tensor:
    """Whole numbers for each token, (batch, tokens), on the CPU."""
    numbers = torch.as_tensor(values).detach().cpu()
    if numbers.shape not in ((batch, count), (1, count), (count,)):
        raise ValueError(f"{what} has the shape ({batch}, {count}) or ({count},), not {tuple(numbers.shape)}")
    return numbers.expand(batch, count)


def _as_numbers(names: list[list[str]] | None) -> Tensor | None:
    """The same number for the same text."""
    if names is None:
        return None
    known: dict[str, int] = {}
    return torch.tensor([[known.setdefault(token, len(known)) for token in one] for one in names])


def _special(special: Any, names: list[list[str]] | None, batch: int, count: int) -> Tensor | None:
    """Which tokens are special, (batch, tokens); None where there is none."""
    if isinstance(special, (str, int)):
        special = [special]
    wanted = {entry for entry in special if isinstance(entry, str)} if special is not None else _SPECIAL
    if special is not None and wanted and names is None:
        raise ValueError(f"special={list(special)!r} has names: pass tokens, or the numbers of places")
    found = torch.tensor([[token in wanted for token in one] for one in names or [[""] * count] * batch])
    for place in special or ():
        if not isinstance(place, str):
            if not -count <= place < count:
                raise ValueError(f"special={list(special)!r} has the place {place}, and there are {count} tokens")
            found[:, place] = True
    return found if bool(found.any()) else None
