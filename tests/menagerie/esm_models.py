"""Of ESM (fair-esm): its protein language models, small."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import torch

from .judging import Answer
from .making import BATCH, integers, prepared, runner

_SIZES = {
    "layers": 2,
    "embed_dim": 32,
    "ffn_embed_dim": 48,
    "attention_heads": 4,
    "max_positions": 64,
    "emb_layer_norm_before": True,
    "token_dropout": True,
    "logit_bias": True,
    "max_tokens": 64,
    "max_tokens_per_msa": 2**14,
    "embed_positions_msa": True,
    "embed_positions_msa_dim": 32,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "final_bias": True,
}


def names() -> list[str]:
    """Every architecture."""
    return ["esm1", "esm1b", "esm2", "msa_transformer"]


def build(name: str) -> Iterator[tuple[str, torch.nn.Module, Any, Any]]:
    """The model on two proteins, or on two alignments."""
    import esm

    torch.manual_seed(0)
    if name == "esm2":
        model = esm.model.esm2.ESM2(num_layers=2, embed_dim=32, attention_heads=4)
    elif name == "msa_transformer":
        alphabet = esm.data.Alphabet.from_architecture("msa_transformer")
        model = esm.model.msa_transformer.MSATransformer(Namespace(**_SIZES, arch="msa_transformer"), alphabet)
    else:
        arch = {"esm1": "protein_bert_base", "esm1b": "roberta_large"}[name]
        alphabet = esm.data.Alphabet.from_architecture({"esm1": "ESM-1", "esm1b": "ESM-1b"}[name])
        model = esm.model.esm1.ProteinBertModel(Namespace(**_SIZES, arch=arch), alphabet)
    model = prepared(model)
    tokens = integers(24, BATCH, *((3,) if name == "msa_transformer" else ()), 11, low=4)
    run = runner(model, tokens)

    def answers() -> list[Answer]:
        output = run(need_head_weights=True)
        found = []
        for key in ("attentions", "row_attentions", "col_attentions"):
            if key in output:
                found += [Answer(key, one) for one in output[key].unbind(1)]
        return found

    yield type(model).__name__, model, run, answers
