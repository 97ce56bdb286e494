"""Figures of protein models: contacts by fair-esm's own head, the numbering of an antibody by ANARCII's own weights."""

from __future__ import annotations

import torch

from visualizer import analysis, attention

from .figures import below, figure

UBIQUITIN = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"
TRASTUZUMAB = (  # the heavy chain's variable domain
    "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRYADSVKGRFTISADTSKNTAYLQMNSLRAEDTAVYYCSRWGGDGFYAMDYWGQGTLVTVSS"
)


@figure(
    claim="`contacts` of two proteins in one padded batch, from our maps of ESM-2 (random weights), against "
    "`model(tokens, return_contacts=True)`",
    source="[fair-esm](https://github.com/facebookresearch/esm) 2.0.0, its `ContactPredictionHead`",
    tolerance="1e-5",
    needs=("esm",),
    is_slow=True,
)
def esm_contacts() -> str:
    import esm

    torch.manual_seed(0)
    model = esm.ESM2(num_layers=6, embed_dim=96, attention_heads=12, alphabet="ESM-1b").eval()
    torch.nn.init.normal_(model.contact_head.regression.weight, std=50)  # so that probabilities go from 0 to 1
    _, _, tokens = model.alphabet.get_batch_converter()([("ubiquitin", UBIQUITIN), ("a part", UBIQUITIN[20:50])])
    with torch.no_grad():
        theirs = model(tokens, return_contacts=True)["contacts"]
        with attention(model) as maps:
            model(tokens)
    special = torch.tensor([model.alphabet.cls_idx, model.alphabet.eos_idx, model.alphabet.padding_idx])
    ours = analysis.contacts(maps, model.contact_head.regression, residues=~torch.isin(tokens, special))
    assert theirs.min() < 0.1 and theirs.max() > 0.9
    assert ours.shape == theirs.shape
    gap = below((ours - theirs).abs().max().item(), 1e-5)
    return f"{len(UBIQUITIN)} and 30 residues, worst gap {gap}"


@figure(
    claim="`align(maps, [(1, 0)])` on the decoder's cross-attention: each number outside the three loops on the "
    "residue that it numbers",
    source="[ANARCII](https://github.com/oxpig/ANARCII) 2.0.8, its weights and its numbering of trastuzumab; "
    "Greenshields-Watson et al. 2025, https://doi.org/10.1101/2025.04.16.648720",
    tolerance="none",
    needs=("anarcii", "gemmi", "msgpack", "sortedcontainers"),
    is_slow=True,
)
def anarcii_numbering() -> str:
    from anarcii import Anarcii
    from anarcii.inference.model_runner import ModelRunner

    numbered = Anarcii(seq_type="antibody", mode="accuracy", batch_size=1, cpu=True, ncpu=1).number([TRASTUZUMAB])
    [result] = numbered.values()
    labels = [(number, residue) for (number, _), residue in result["numbering"] if residue != "-"]
    assert "".join(residue for _, residue in labels) == TRASTUZUMAB
    runner = ModelRunner("antibody", "accuracy", 1, torch.device("cpu"), False, False)
    source = torch.tensor(runner.sequence_tokeniser.encode(["<SOS>", *TRASTUZUMAB, "<EOS>"])).long()[None]
    numbers = [result["chain_type"], *(number for number, _ in labels)]
    target = torch.tensor(runner.number_tokeniser.encode(["<SOS>", *numbers])).long()[None]
    model = runner.model
    with torch.no_grad(), attention(model) as maps:
        mask = model.make_src_mask(source)
        encoded = model.encoder(source, mask)
        output, _ = model.decoder(target, encoded, *model.make_trg_mask(target), mask)
    # The query that is given the number before predicts the next one: query i, from 1 on, that of residue i - 1.
    count = len(TRASTUZUMAB)
    assert torch.equal(output[0, 1:-1].argmax(-1), target[0, 2:])
    found = analysis.align(maps, [(1, 0)], queries=slice(1, 1 + count), keys=slice(1, 1 + count), median=1)
    is_met = [begin <= residue < end for residue, (begin, end) in enumerate(found.spans)]
    loops = {*range(27, 39), *range(56, 66), *range(105, 118)}  # IMGT's definition
    framework = [met for met, (number, _) in zip(is_met, labels, strict=True) if number not in loops]
    assert all(framework), f"{sum(framework)} of {len(framework)}"
    return f"{sum(framework)} of {len(framework)} residues (with the loops {sum(is_met)} of {count})"
