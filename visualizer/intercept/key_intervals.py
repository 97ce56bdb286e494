"""Which keys each query may attend to, as an interval of keys: for windows, padded keys and packed sequences."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class KeyIntervals:
    """Where each query stands among the keys, and which keys are those of its sequence; each (batch or 1, queries)."""

    place: Tensor
    """The number of the key at which a query stands: the last that it sees where attention is causal."""
    first: Tensor
    """The first key of its sequence."""
    behind: Tensor
    """The key behind the last of its sequence."""
    sequence: Tensor | None = None
    """Which of the packed sequences each query is of, (queries,)."""
    ends: Tensor | None = None
    """Those of the packed sequences, as `packed` takes them."""

    def spans(self, left: int, right: int) -> Tensor:
        """The keys from `left` before to `right` behind a query's place, (batch or 1, 1, queries, 2); -1: no bound.

        >>> ends = torch.tensor([[0, 2, 0, 2], [2, 5, 2, 5]])     # two sequences, of two and of three tokens
        >>> packed(ends, 5).spans(-1, 0)[0, 0].tolist()           # causal
        [[0, 1], [0, 2], [2, 3], [2, 4], [2, 5]]
        """
        first = self.first if left < 0 else torch.maximum(self.first, self.place - left)
        behind = self.behind if right < 0 else torch.minimum(self.behind, self.place + right + 1)
        batch = max(len(first), len(behind))
        return torch.stack([first.expand(batch, -1), behind.expand(batch, -1)], -1)[:, None]

    def chunks(self, size: int) -> KeyIntervals:
        """The same where each query sees no keys but those of its own chunk: the first of a sequence begins with it.

        >>> unpacked(3, 5, torch.device("cpu")).chunks(2).spans(-1, -1)[0, 0].tolist()
        [[2, 4], [2, 4], [4, 5]]
        """
        begin = self.place - (self.place - self.first) % size
        first, behind = torch.maximum(self.first, begin), torch.minimum(self.behind, begin + size)
        return replace(self, first=first, behind=behind)


def unpacked(
    queries: int, keys: int, device: torch.device, first: Tensor | None = None, behind: Tensor | None = None
) -> KeyIntervals:
    """The places where the last query stands at the last key, of keys that each of the batch has in use.

    Args:
        first, behind: the first key in use and the one behind the last, (batch,); None: all.
    """
    start = torch.zeros(1, 1, dtype=torch.long, device=device) if first is None else first.long()[:, None]
    end = torch.full_like(start[:1], keys) if behind is None else behind.long()[:, None]
    place = end - queries + torch.arange(queries, device=device)
    return KeyIntervals(place, start.expand(-1, queries), end.expand(-1, queries))


def packed(ends: Tensor, queries: int, is_from_end: bool = True) -> KeyIntervals:
    """The places of the queries of several sequences.

    Args:
        ends: (sequences, 4): a sequence's first query, the one behind its last, its first key, the one behind its last.
        queries: how many there are in all. Those that are of no sequence attend to nothing.
        is_from_end: whether the last query of a sequence stands at its last key; else the first at the first.
    """
    index = torch.arange(queries, device=ends.device)
    sequence = torch.searchsorted(ends[:, 0].contiguous(), index, right=True) - 1
    first_query, behind_queries, first, behind = ends[sequence].unbind(-1)
    place = index + (behind - behind_queries if is_from_end else first - first_query)
    behind = torch.where(index < behind_queries, behind, first)
    return KeyIntervals(place[None], first[None], behind[None], sequence, ends)


def ends_of(query_starts: Tensor, key_starts: Tensor, key_lengths: Tensor | None = None) -> Tensor:
    """What `packed` takes, of cumulative lengths, (sequences + 1,).

    Args:
        query_starts, key_starts: the first query and key of each sequence, and how many there are in all.
        key_lengths: how many of the keys that a sequence has room for are in use; None: all.
    """
    keys, queries = key_starts.long(), query_starts.long()
    behind = keys[1:] if key_lengths is None else keys[:-1] + key_lengths.long()
    return torch.stack([queries[:-1], queries[1:], keys[:-1], behind], 1)
