"""RXNMapper's own figures, from our maps of its model: which atom goes where, and how sure that is."""

from __future__ import annotations

import functools
import re
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch

from visualizer import attention, models

from .figures import below, figure

SOURCE = (
    "[RXNMapper](https://github.com/rxn4chemistry/rxnmapper) 0.4.3, its tests and README; "
    "Schwaller et al. 2021, https://doi.org/10.1126/sciadv.abe4166"
)
LAYER, HEAD, MULTIPLIER = 10, 5, 90.0


class Published(NamedTuple):
    reaction: str
    """As the model reads it: with the molecules spelled and ordered by RDKit, where RXNMapper asks it to do so."""
    confidence: float
    mapped: str


PUBLISHED = (
    Published(
        "CC(C)S.CN(C)C=O.Fc1cccnc1F.O=C([O-])[O-].[K+].[K+]>>CC(C)Sc1ncccc1F",
        0.9565619900376546,
        "[CH3:1][CH:2]([CH3:3])[SH:4].CN(C)C=O.F[c:5]1[n:6][cH:7][cH:8][cH:9][c:10]1[F:11].O=C([O-])[O-].[K+].[K+]>>"
        "[CH3:1][CH:2]([CH3:3])[S:4][c:5]1[n:6][cH:7][cH:8][cH:9][c:10]1[F:11]",
    ),
    Published(
        "C1COCCO1.CC(C)(C)OC(=O)CONC(=O)NCc1cccc2ccccc12.Cl>>O=C(O)CONC(=O)NCc1cccc2ccccc12",
        0.9704424331552834,
        "C1COCCO1.CC(C)(C)[O:3][C:2](=[O:1])[CH2:4][O:5][NH:6][C:7](=[O:8])[NH:9][CH2:10][c:11]1[cH:12][cH:13][cH:14]"
        "[c:15]2[cH:16][cH:17][cH:18][cH:19][c:20]12.Cl>>[O:1]=[C:2]([OH:3])[CH2:4][O:5][NH:6][C:7](=[O:8])[NH:9]"
        "[CH2:10][c:11]1[cH:12][cH:13][cH:14][c:15]2[cH:16][cH:17][cH:18][cH:19][c:20]12",
    ),
    Published(
        "C=CCN=C=S.CNCc1ccc(C#N)cc1.NNC(=O)c1cn2c(n1)CCCC2>>C=CCn1c(-c2cn3c(n2)CCCC3)nnc1N(C)Cc1ccc(C#N)cc1",
        0.919023506871605,
        "S=[C:17]=[N:4][CH2:3][CH:2]=[CH2:1].[NH:18]([CH3:19])[CH2:20][c:21]1[cH:22][cH:23][c:24]([C:25]#[N:26])[cH:27]"
        "[cH:28]1.O=[C:5]([c:6]1[cH:7][n:8]2[c:9]([n:10]1)[CH2:11][CH2:12][CH2:13][CH2:14]2)[NH:15][NH2:16]>>[CH2:1]="
        "[CH:2][CH2:3][n:4]1[c:5](-[c:6]2[cH:7][n:8]3[c:9]([n:10]2)[CH2:11][CH2:12][CH2:13][CH2:14]3)[n:15][n:16][c:17]1"
        "[N:18]([CH3:19])[CH2:20][c:21]1[cH:22][cH:23][c:24]([C:25]#[N:26])[cH:27][cH:28]1",
    ),
    Published(
        "CCBr.CC[O-]~[Na+].[H-]~[Na+]>>CCOCC",
        0.9606074439250337,
        "Br[CH2:2][CH3:1].[Na+]~[O-:3][CH2:4][CH3:5].[H-]~[Na+]>>[CH3:1][CH2:2][O:3][CH2:4][CH3:5]",
    ),
    Published(
        "C(C)O.BrC(C)>>CCOCC",
        0.9754605679009868,
        "[CH2:2]([CH3:1])[OH:3].Br[CH2:4][CH3:5]>>[CH3:1][CH2:2][O:3][CH2:4][CH3:5]",
    ),
    Published(
        "CCO.BrCFC>>CCOCFC",
        0.9730222157275086,
        "[CH3:1][CH2:2][OH:3].Br[CH2:4][F:5][CH3:6]>>[CH3:1][CH2:2][O:3][CH2:4][F:5][CH3:6]",
    ),
    Published(
        "CCOCC.[Br-]~[Na+]>>CCBr.CC[O-]~[Na+]",
        0.7312865053856896,
        "[CH3:1][CH2:2][O:6][CH2:5][CH3:4].[Br-:3]~[Na+:7]>>[CH3:1][CH2:2][Br:3].[CH3:4][CH2:5][O-:6]~[Na+:7]",
    ),
    Published(
        "COC(=O)CCBr.O=C[O-]->[K+]>>COC(=O)CCOC(=O)C",
        0.9322116305783666,
        "[CH3:1][O:2][C:3](=[O:4])[CH2:5][CH2:6]Br.[O:9]=[CH:8][O-:7]->[K+]>>[CH3:1][O:2][C:3](=[O:4])[CH2:5][CH2:6]"
        "[O:7][C:8](=[O:9])[CH3:10]",
    ),
    Published(
        "[1*]C=C.O>>*CCO",
        0.9988284870307568,
        "[1*:1][CH:2]=[CH2:3].[OH2:4]>>[*:1][CH2:2][CH2:3][OH:4]",
    ),
)

_TOKEN = re.compile(r"\[[^]]+]|Br|Cl|%\d\d|>>|.")


class Side(NamedTuple):
    """What stands on one side of the arrow."""

    elements: list[str]
    places: list[int]
    """Of each atom its number among the tokens of the side."""
    numbers: list[int]
    """Of each atom its number in a mapped reaction, 0 if it has none."""
    bonds: list[tuple[int, int]]


def read_smiles(smiles: str) -> Side:
    """The atoms and bonds of molecules; what kind of bond does not matter here."""
    side = Side([], [], [], [])
    last: int | None = None
    branches: list[int | None] = []
    rings: dict[str, int] = {}
    for place, token in enumerate(_TOKEN.findall(smiles)):
        if token == ".":
            last = None
        elif token == "(":
            branches.append(last)
        elif token == ")":
            last = branches.pop()
        elif token.isdigit() or token[0] == "%":
            if token in rings:
                side.bonds.append((rings.pop(token), last))
            else:
                rings[token] = last
        elif token[0].isalpha() or token[0] in "[*":
            atom = len(side.elements)
            side.elements.append(re.match(r"\[?\d*([A-Za-z][a-z]?|\*)", token)[1].capitalize())
            side.places.append(place)
            number = re.search(r":(\d+)]", token)
            side.numbers.append(int(number[1]) if number else 0)
            if last is not None:
                side.bonds.append((last, atom))
            last = atom
    return side


def neighbours(side: Side) -> np.ndarray:
    """(atoms, atoms): which are bound to each other."""
    bound = np.zeros((len(side.elements),) * 2, bool)
    for one, other in side.bonds:
        bound[one, other] = bound[other, one] = True
    return bound


def map_atoms(attended: np.ndarray, reactants: Side, products: Side) -> tuple[list[int], float]:
    """Of each product atom the reactant atom that it was, -1 if none, and how sure that is; RXNMapper's own procedure.

    The surest pair is taken first. Then pairs of their neighbours count 90 times as much, and neither atom can be had
    again. Pairs of different elements are never taken. `attended` has what a product atom and a reactant atom give each
    other, (products, reactants).
    """
    alike = np.array(products.elements)[:, None] == np.array(reactants.elements)
    attended = attended.astype(np.float64) * alike
    factor = np.ones_like(attended)
    bound, bound_before = neighbours(products), neighbours(reactants)
    origin, confidence = [-1] * len(products.elements), 1.0
    for _ in origin:
        weighed = attended * factor
        total = weighed.sum(1, keepdims=True)
        shares = np.divide(weighed, total, out=np.zeros_like(weighed), where=total != 0)
        if np.isclose(shares.max(), 0):
            break
        after, before = np.unravel_index(shares.argmax(), shares.shape)
        origin[after], confidence = int(before), confidence * shares[after, before]
        factor[np.ix_(bound[after], bound_before[before])] *= MULTIPLIER
        factor[after] = factor[:, before] = 0
    return origin, float(confidence)


@functools.cache
def computed() -> list[tuple[Side, Side, list[int], float]]:
    """For each published reaction its two sides, our atom map and our confidence, from maps of the fused model."""
    model, tokenizer = models.load("rxnmapper")
    model.set_attn_implementation("sdpa")
    results = []
    for published in PUBLISHED:
        with attention(model) as maps, torch.inference_mode():
            model(**tokenizer(published.reaction, return_tensors="pt"))
        weights = maps[LAYER].numpy()[0, HEAD]  # (tokens, tokens)
        before, after = map(read_smiles, published.reaction.split(">>"))
        arrow = 1 + len(_TOKEN.findall(published.reaction.split(">>")[0]))  # [CLS] comes first
        here, there = 1 + np.array(before.places), arrow + 1 + np.array(after.places)
        attended = weights[np.ix_(there, here)] + weights[np.ix_(here, there)].T
        results.append((before, after, *map_atoms(attended, before, after)))
    return results


@figure(
    claim="the confidence of nine reactions, from head (10, 5) of the fused model",
    source=SOURCE,
    tolerance="1e-6",
    needs=("rxnmapper", "transformers"),
    is_slow=True,
)
def rxnmapper_confidences() -> str:
    gaps = [abs(ours - one.confidence) for one, (*_, ours) in zip(PUBLISHED, computed(), strict=True)]
    return f"{len(gaps)} of {len(PUBLISHED)}, worst gap {below(max(gaps), 1e-6)}"


def _labelled(side: Side, numbers: list[int]) -> tuple[Counter, Counter]:
    """The atoms and the bonds with the numbers of the atoms, in no order: two spellings of the same are equal."""
    names = list(zip(side.elements, numbers, strict=True))
    return Counter(names), Counter(tuple(sorted((names[one], names[other]))) for one, other in side.bonds)


@figure(
    claim="which atom goes where in nine reactions: every atom and bond of the mapped reactions",
    source=SOURCE,
    tolerance="none",
    needs=("rxnmapper", "transformers"),
    is_slow=True,
)
def rxnmapper_atom_maps() -> str:
    atoms = 0
    for one, (before, after, origin, _) in zip(PUBLISHED, computed(), strict=True):
        theirs_before, theirs_after = map(read_smiles, one.mapped.split(">>"))
        numbers = [origin.index(atom) + 1 if atom in origin else 0 for atom in range(len(before.elements))]
        assert _labelled(before, numbers) == _labelled(theirs_before, theirs_before.numbers), one.reaction
        own = list(range(1, len(after.elements) + 1))
        assert _labelled(after, own) == _labelled(theirs_after, theirs_after.numbers), one.reaction
        atoms += sum(place >= 0 for place in origin)
    return f"{len(PUBLISHED)} of {len(PUBLISHED)} reactions, {atoms} atoms"
