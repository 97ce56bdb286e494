"""A plain vision transformer. Its attention is decorated as a user would do it."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..instrument import get_local


class PlainAttention(nn.Module):
    """Multi-head self-attention that computes its softmax in the open, so that a local holds the weights.

    It is not called Attention, so that the key ``Attention.forward`` stays free for your own model.

    The local ``attn`` of ``forward`` is (batch, heads, queries, keys) after the softmax: rows sum to one.

    >>> PlainAttention(width=8, heads=2)(torch.zeros(1, 5, 8)).shape
    torch.Size([1, 5, 8])
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    @get_local("attn")
    def forward(self, x: Tensor) -> Tensor:
        """Tokens (batch, N, width) after attention; same shape, dtype and device."""
        # N tokens; the width is split over the heads: d = width / heads
        q = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, d)
        k = self.key(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, d)
        v = self.value(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, d)
        attn = (q @ k.mT * self.scale).softmax(-1)  # (B, heads, N, N)
        gathered = (attn @ v).transpose(1, 2).flatten(-2)  # (B, N, width)
        result: Tensor = self.out(gathered)  # (B, N, width)
        return result


class Block(nn.Module):
    """One encoder layer: attention, then a perceptron, each after a LayerNorm and with a residual connection.

    >>> Block(width=8, heads=2, hidden=16, layer_scale=True)(torch.zeros(1, 5, 8)).shape
    torch.Size([1, 5, 8])
    """

    def __init__(self, width: int, heads: int, hidden: int, layer_scale: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = PlainAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.scale1 = nn.Parameter(torch.ones(width)) if layer_scale else None
        self.scale2 = nn.Parameter(torch.ones(width)) if layer_scale else None

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (batch, N, width) of the next layer; same shape, dtype and device."""
        mixed = self.attn(self.norm1(x))  # (B, N, width)
        x = x + (mixed if self.scale1 is None else mixed * self.scale1)  # (B, N, width)
        turned = self.fc2(F.gelu(self.fc1(self.norm2(x))))  # (B, N, width)
        result: Tensor = x + (turned if self.scale2 is None else turned * self.scale2)  # (B, N, width)
        return result


class VisionTransformer(nn.Module):
    """A plain vision transformer: image patches and one class token through a stack of encoder layers.

    >>> model = VisionTransformer(patch=4, width=8, depth=2, heads=2, hidden=16, grid=3, classes=10)
    >>> model(torch.zeros(1, 3, 12, 12)).shape              # logits
    torch.Size([1, 10])
    >>> model.features(torch.zeros(1, 3, 8, 20)).shape      # class token first, then 2 x 5 patches row by row
    torch.Size([1, 11, 8])

    Args:
        patch: side of a patch in pixels.
        width: size of a token.
        depth: number of layers.
        heads: heads in a layer.
        hidden: size of the perceptron's inner layer.
        grid: patches a side that the position embeddings are for; other images get them resized bicubically.
        classes: outputs of the head; 0 for no head.
        layer_scale: whether each layer scales what it adds, channel by channel.

    Raises:
        ValueError: ``heads`` does not divide ``width``.
    """

    def __init__(
        self,
        *,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        hidden: int,
        grid: int,
        classes: int = 0,
        layer_scale: bool = False,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"{heads} heads cannot share a width of {width} evenly")
        self.patch = patch
        self.grid = grid
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(nn.init.normal_(torch.empty(1, 1 + grid * grid, width), std=0.02))
        self.blocks = nn.Sequential(*(Block(width, heads, hidden, layer_scale) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes) if classes else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, classes), or the class token (batch, width) of a model without a head.

        Takes and raises what ``features`` does.
        """
        result: Tensor = self.head(self.features(images)[:, 0])  # (B, classes)
        return result

    def features(self, images: Tensor) -> Tensor:
        """All tokens after the last LayerNorm, (batch, 1 + patches, width): the class token first.

        ``images`` is (batch, 3, height, width), normalised as the weights expect, of the model's dtype and
        device.

        Raises:
            ValueError: another shape, or height or width is not a whole number of patches. The rest of the picture
                would be dropped silently, and a map drawn over it would be shifted.
        """
        sides = images.shape[2:]
        if images.ndim != 4 or images.shape[1] != 3 or any(side % self.patch or not side for side in sides):
            raise ValueError(
                f"images must be (batch, 3, height, width) with sides that are multiples of {self.patch} "
                f"pixels, not {tuple(images.shape)}; visualizer.models.prepare makes such a batch"
            )
        patches = self.patch_embedding(images)  # (B, width, rows, columns)
        rows, columns = patches.shape[-2:]
        patches = patches.flatten(2).mT  # (B, rows * columns, width)
        first = self.class_token.expand(len(images), -1, -1)  # (B, 1, width)
        x = torch.cat([first, patches], 1)  # (B, N, width), N = 1 + rows * columns
        x = x + self._positions(rows, columns)  # (B, N, width)
        result: Tensor = self.norm(self.blocks(x))  # (B, N, width)
        return result

    def _positions(self, rows: int, columns: int) -> Tensor:
        """Position embeddings (1, 1 + rows * columns, width); the class token's is never resized."""
        if rows == columns == self.grid:
            return self.positions
        table = self.positions[:, 1:].mT.reshape(1, -1, self.grid, self.grid)  # (1, width, grid, grid)
        table = F.interpolate(table, (rows, columns), mode="bicubic")  # (1, width, rows, columns)
        return torch.cat([self.positions[:, :1], table.flatten(2).mT], 1)  # (1, 1 + rows * columns, width)
