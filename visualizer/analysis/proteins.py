"""Which residues of a protein touch, read from the attention between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..maps import AttentionMap, without_autograd
from .layers import as_floats, for_each_token, layers_of, like_input

__all__ = ["contacts"]


@without_autograd
def contacts(attention: Any, regression: Any = None, *, residues: Any = None) -> Any:
    """Which tokens belong to each other beyond what each gets from all: attention, symmetrised and corrected.

    >>> import torch
    >>> from visualizer.analysis import contacts
    >>> maps = torch.randn(4, 2, 8, 12, 12).softmax(-1)               # 4 layers, 2 proteins, 8 heads, 12 tokens
    >>> contacts(maps).shape                                          # the first and the last token are no residues
    torch.Size([4, 2, 8, 10, 10])
    >>> contacts(maps, torch.nn.Linear(4 * 8, 1)).shape               # the probability that two residues touch
    torch.Size([2, 10, 10])

    Per head, S = A + A^T over the residues, and S_ij - S_i S_j / S, where S_i is a row's sum and S that of all: the
    average product correction, which takes away what a residue gives and gets because of what it is. A logistic
    regression over all heads makes a probability of it, as in Rao et al. 2021
    (https://doi.org/10.1101/2020.12.15.422761); ESM-2 comes with one, `model.contact_head.regression`.

    Args:
        attention: layers of one shape whose queries and keys are the same tokens; or one map.
        regression: what has a `weight` with a number for each head, those of the first layer first, and a `bias`, as
            `torch.nn.Linear` does; or the pair (weight, bias). None: no regression.
        residues: (tokens,) or (batch, tokens), true for the tokens that are residues; None: all but the first and the
            last, ESM's <cls> and <eos>. In a batch with padding pass it: weights from and to other tokens are left out.

    Returns:
        Without a regression (batch, heads, residues, residues), around 0; several layers are the first axis. With one
        the probabilities, (batch, residues, residues). The axes go from the first residue of any sequence to the last;
        what is no residue has 0, or with a regression the probability that it gives to 0.

    Raises:
        ValueError: queries are not keys, the layers differ in shape, no residue is left, or the regression has not one
            number for each head.
    """
    read = layers_of(attention)
    shape = read.layers[0].shape
    if any(layer.shape != shape for layer in read.layers) or shape[2] != shape[3]:
        raise ValueError(
            "contacts need layers of one shape, whose queries and keys are the same tokens, not of the shapes "
            f"{sorted({layer.shape for layer in read.layers})}. Pass the layers that have such maps"
        )
    real = _residues(residues, shape[0], shape[3])
    corrected = [_corrected(layer, real.to(layer.device)) for layer in read.layers]
    device = corrected[0].device
    stacked = torch.stack([layer.to(device) for layer in corrected])  # (layers, batch, heads, residues, residues)
    if regression is None:
        return like_input(stacked[0] if read.is_one else stacked, read.are_arrays)
    weight, bias = regression if isinstance(regression, (tuple, list)) else (regression.weight, regression.bias)
    factors, offset = (as_floats(part)[0].flatten().to(device, stacked.dtype) for part in (weight, bias))
    if len(factors) != len(stacked) * shape[1] or len(offset) != 1:
        raise ValueError(
            f"the regression has {len(factors)} weights and {len(offset)} biases: it takes one bias, and one weight "
            f"for each of the {shape[1]} heads of {len(stacked)} layers"
        )
    scores = torch.einsum("lbhij,lh->bij", stacked, factors.view(len(stacked), -1)) + offset
    return like_input(scores.sigmoid(), read.are_arrays)


def _residues(residues: Any, batch: int, tokens: int) -> Tensor:
    """Which tokens are residues, (batch, tokens), at least one of them."""
    if residues is None:
        real = torch.zeros(batch, tokens, dtype=torch.bool)
        real[:, 1:-1] = True
    else:
        real = for_each_token("residues", residues, batch, tokens) != 0
    if not bool(real.any()):
        raise ValueError(f"none of the {tokens} tokens is a residue")
    return real


def _corrected(layer: AttentionMap, real: Tensor) -> Tensor:
    """The symmetrised and corrected maps of one layer, (batch, heads, residues, residues)."""
    [places] = real.any(0).nonzero(as_tuple=True)
    kept = slice(int(places[0]), int(places[-1]) + 1)
    both = (real[:, :, None] & real[:, None]).unsqueeze(1)[..., kept, kept]  # (batch, 1, residues, residues)
    weights = torch.where(both, layer.rows(kept)[..., kept], 0)
    weights = weights + weights.mT
    rows = weights.sum(-1, keepdim=True)
    total = rows.sum(-2, keepdim=True)
    # Where no residue attends to another there is nothing to correct.
    return weights - rows * rows.mT / total.masked_fill(total == 0, 1)
