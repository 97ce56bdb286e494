"""`python -m outside.hub`: published figures of models that only a hub has, beside ours.

No machine of this project reaches the hub. What these commands call is tested on other models.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from visualizer import analysis, attention, models


class Command(NamedTuple):
    line: str
    published: str
    source: str


COMMANDS = (
    Command(
        "induction gpt2",
        "heads 5.5 0.932, 6.9 0.913, 7.10 0.910, 5.1 0.908, 7.2 0.833",
        "induction scores of GPT-2 small on random tokens, once and again, as TransformerLens computes them",
    ),
    Command(
        "contacts facebook/esm2_t6_8M_UR50D FOLDER",
        "long range, top L: 15.9 % (35M: 28.8 %, 150M: 42.2 %)",
        "[ESM-2](https://github.com/facebookresearch/esm), on its own test set; FOLDER has PDB files",
    ),
    Command(
        "jaccard facebook/dino-vits16 FOLDER",
        "45.9 (random weights 22.0, supervised 27.3)",
        "[DINO](https://arxiv.org/abs/2104.14294); FOLDER has PASCAL VOC 2012",
    ),
    Command(
        "retrieval mistralai/Mistral-7B-v0.2",
        "heads 18-0 0.94, 12-7 0.93",
        "[Retrieval heads](https://arxiv.org/abs/2404.15574), over many texts and depths",
    ),
)

SMOLLM2 = {
    "induction": {(18, 6): 0.92, (17, 3): 0.83, (17, 4): 0.79},
    "real": {(17, 5): 0.32, (17, 3): 0.25, (20, 7): 0.15},
    "retrieval": {(18, 6): 0.98, (20, 6): 0.81, (17, 3): 0.76},
}
"""What the same code gives for SmolLM2-135M-Instruct, whose weights are here: the best three heads of each score."""

HAYSTACK = (
    "Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in "
    "Liberty, and dedicated to the proposition that all men are created equal. Now we are engaged in a great civil "
    "war, testing whether that nation, or any nation so conceived and so dedicated, can long endure. We are met on "
    "a great battle-field of that war. We have come to dedicate a portion of that field, as a final resting place "
    "for those who here gave their lives that that nation might live. It is altogether fitting and proper that we "
    "should do this. But, in a larger sense, we can not dedicate, we can not consecrate, we can not hallow this "
    "ground. The brave men, living and dead, who struggled here, have consecrated it, far above our poor power to "
    "add or detract."
)  # Lincoln's address at Gettysburg
NEEDLE = " The best thing to do in San Francisco is to eat a sandwich and sit in Dolores Park on a sunny day."
QUESTION = "\nThe best thing to do in San Francisco is"
ANSWER = " to eat a sandwich and sit in Dolores Park on a sunny day"


def best(scores: torch.Tensor, count: int = 5) -> list[str]:
    """The highest of (layers, heads), as "layer.head score"."""
    top = scores.flatten().nan_to_num(0).topk(count)
    return [
        f"{place // scores.shape[1]}.{place % scores.shape[1]} {value:.3f}"
        for value, place in zip(top.values.tolist(), top.indices.tolist(), strict=True)
    ]


def induction(model: Any, *, length: int = 50, batch: int = 10, first: int | None = None) -> torch.Tensor:
    """(layers, heads): what queries give to the key behind the same token, on random tokens that come twice.

    As TransformerLens takes it: the mean of that diagonal, over all its queries.
    """
    once = torch.randint(100, 20_000, (batch, length), generator=torch.Generator().manual_seed(0))
    start = torch.full((batch, 0 if first is None else 1), first or 0)
    with attention(model) as maps, torch.inference_mode():
        model(torch.cat([start, once, once], 1).to(model.device))
    return torch.stack([one.dense().diagonal(1 - length, -2, -1).mean((0, 2)) for one in maps]).cpu()


def induction_of_text(model: Any, tokenizer: Any) -> torch.Tensor:
    """(layers, heads): what queries of a real text give to what followed the same token before."""
    ids = tokenizer(HAYSTACK, return_tensors="pt").input_ids.to(model.device)
    with attention(model) as maps, torch.inference_mode():
        model(ids)
    return torch.from_numpy(analysis.head_patterns(maps, ids=ids).scores["induction"])


def retrieval(model: Any, tokenizer: Any, *, depth: float = 0.5) -> torch.Tensor:
    """(layers, heads): how much of a sentence each head copies out of a text, where the sentence lies at a depth."""
    place = HAYSTACK.index(" ", int(depth * len(HAYSTACK)))
    before, after = HAYSTACK[:place], HAYSTACK[place:]
    ids = tokenizer(before + NEEDLE + after + QUESTION + ANSWER, return_offsets_mapping=True)
    spans = ids["offset_mapping"]

    def tokens(begin: int, end: int) -> list[int]:
        return [number for number, (low, high) in enumerate(spans) if low < end and high > begin and high > low]

    total = spans[-1][1]
    needle = tokens(len(before), len(before) + len(NEEDLE))
    answer = tokens(total - len(ANSWER), total)
    numbers = torch.tensor(ids["input_ids"])[None].to(model.device)
    with attention(model) as maps, torch.inference_mode():
        model(numbers)
    return analysis.retrieval(maps, numbers, needle=needle, answer=answer)[:, 0].cpu()


def read_pdb(path: Path) -> tuple[str, np.ndarray]:
    """The residues of the first chain of a PDB file, and (residues, 3) where their C-beta is, or glycine's C-alpha."""
    letters = dict(
        zip(
            "ALA ARG ASN ASP CYS GLN GLU GLY HIS ILE LEU LYS MET PHE PRO SER THR TRP TYR VAL".split(),
            "ARNDCQEGHILKMFPSTWYV",
            strict=True,
        )
    )
    found: dict[str, tuple[str, list[float]]] = {}
    chain = None
    for line in path.read_text().splitlines():
        if line.startswith(("ENDMDL", "TER")) and found:
            break
        name, residue = line[12:16].strip(), line[17:20]
        if line.startswith("ATOM") and name == ("CA" if residue == "GLY" else "CB") and residue in letters:
            chain = chain or line[21]
            if line[21] == chain:
                at = [float(line[start : start + 8]) for start in (30, 38, 46)]
                found.setdefault(line[22:27], (letters[residue], at))
    return "".join(letter for letter, _ in found.values()), np.array([at for _, at in found.values()])


def contact_precision(model: Any, tokenizer: Any, proteins: Iterable[tuple[str, np.ndarray]]) -> float:
    """Of the L likeliest pairs that are 24 or more apart, L residues, the share within 8 Angstrom; the mean of all."""
    shares = []
    for sequence, places in proteins:
        batch = tokenizer(sequence, return_tensors="pt").to(model.device)
        with attention(model) as maps, torch.inference_mode():
            model(**batch)
        likely = analysis.contacts(maps, model.contact_head.regression)[0].cpu()
        apart = np.linalg.norm(places[:, None] - places, axis=-1)
        far = np.triu(np.ones(apart.shape, bool), 24)
        order = likely.numpy()[far].argsort()[::-1][: len(sequence)]
        shares.append((apart[far][order] < 8).mean())
    return float(np.mean(shares))


def jaccard(model: Any, pictures: Iterable[tuple[Any, np.ndarray]], *, size: int = 480, share: float = 0.6) -> float:
    """How well the best head's patches, which hold a share of the class token's attention, cover the objects.

    Of each picture, with a mask (height, width) that is true on objects: intersection over union; the mean.
    """
    overlaps = []
    patch = model.config.patch_size
    for picture, objects in pictures:
        images, _ = models.prepare(picture, size=size, patch=patch)
        with attention(model) as maps, torch.inference_mode():
            model(images.to(model.device), interpolate_pos_encoding=True)
        side = size // patch
        kept = analysis.mass_mask(analysis.cls_attention(maps[-1]), share)[0].unflatten(-1, (side, side)).cpu()
        crop = min(objects.shape)  # as prepare crops: the middle
        top, left = (objects.shape[0] - crop) // 2, (objects.shape[1] - crop) // 2
        truth = torch.from_numpy(objects[top : top + crop, left : left + crop].astype(np.float32))
        truth = F.interpolate(truth[None, None], (side, side), mode="area")[0, 0] > 0.5
        both, either = (kept & truth).sum((-2, -1)), (kept | truth).sum((-2, -1))
        overlaps.append((both / either.clamp(min=1)).max().item())
    return float(np.mean(overlaps))


def voc(folder: Path) -> Iterable[tuple[Any, np.ndarray]]:
    """The validation pictures of PASCAL VOC 2012, and where their objects are."""
    from PIL import Image

    root = next(folder.rglob("ImageSets")).parent
    for name in (root / "ImageSets" / "Segmentation" / "val.txt").read_text().split():
        numbers = np.array(Image.open(root / "SegmentationClass" / f"{name}.png"))
        yield root / "JPEGImages" / f"{name}.jpg", (numbers > 0) & (numbers < 255)


def main() -> None:
    """Compute one figure and print it beside the published one."""
    parser = argparse.ArgumentParser(prog="python -m outside.hub", description=__doc__)
    parser.add_argument("figure", choices=[one.line.split()[0] for one in COMMANDS])
    parser.add_argument("model", help="its name on the hub")
    parser.add_argument("folder", nargs="?", type=Path, help="the data, for contacts and jaccard")
    options = parser.parse_args()
    model, tokenizer = models.load(options.model)
    model.set_attn_implementation("sdpa")
    if options.figure == "induction":
        print(*best(induction(model, first=tokenizer.bos_token_id)), sep=", ")
    elif options.figure == "retrieval":
        scores = torch.stack([retrieval(model, tokenizer, depth=depth) for depth in np.linspace(0.05, 0.95, 10)])
        print(*best(scores.mean(0)), sep=", ")
    elif options.figure == "contacts":
        proteins = map(read_pdb, sorted(options.folder.glob("*.pdb")))
        print(f"{100 * contact_precision(model, tokenizer, proteins):.1f} %")
    else:
        print(f"{100 * jaccard(model, voc(options.folder)):.1f}")
    [published] = [one.published for one in COMMANDS if one.line.split()[0] == options.figure]
    print(f"published: {published}")


if __name__ == "__main__":
    main()
