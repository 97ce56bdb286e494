"""Of vit-pytorch: the models of every file, small, their arguments made from their names."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from typing import Any

import torch

from .making import BATCH, NotBuilt, in_words, normal, prepared, runner

_ARGUMENTS: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "image_patch_size": 8,
    "num_classes": 7,
    "dim": 32,
    "depth": 2,
    "heads": 4,
    "mlp_dim": 48,
    "dim_head": 8,
    "frames": 4,
    "max_frames": 4,
    "frame_patch_size": 2,
    "seq_len": 32,
    "spatial_depth": 2,
    "temporal_depth": 2,
    "cls_depth": 1,
    "max_tokens_per_depth": (12, 9),
    "ndim": 2,
    "input_shape": (32, 32),
    "num_slots": 4,
    "num_residual_streams": 2,
    "freq_patch_size": 8,
    "sm_dim": 32,
    "lg_dim": 32,
    "mlp_mult": 2,
    "block_repeats": (1, 1),
    "num_hierarchies": 2,
}
_OWN: dict[str, dict[str, Any]] = {
    "crossformer.CrossFormer": {"dim": (16, 16, 32, 32), "depth": (1, 1, 1, 1), "picture": 224, "dim_head": None},
    "regionvit.RegionViT": {"dim": (16, 16, 32, 32), "depth": (1, 1, 1, 1), "picture": 224},
    "scalable_vit.ScalableViT": {
        **{"dim": 16, "depth": (1, 1, 1, 1), "heads": (2, 2, 4, 4), "reduction_factor": (8, 4, 2, 1)},
        **{"window_size": (64, 32, None, None), "picture": 256},
    },
    "sep_vit.SepViT": {"dim": 16, "depth": (1, 1, 1, 1), "heads": (2, 2, 4, 4), "picture": 224},
    "max_vit.MaxViT": {"dim": 32, "depth": (1, 1), "dim_head": 8, "picture": 56},
    "max_vit_with_registers.MaxViT": {"dim": 32, "depth": (1, 1), "dim_head": 8, "picture": 56},
    "pit.PiT": {"depth": (1, 1), "image_size": 32, "patch_size": 8},
    "cross_vit.CrossViT": {"sm_patch_size": 8, "lg_patch_size": 16, "sm_enc_mlp_dim": 48, "lg_enc_mlp_dim": 48},
    "t2t.T2TViT": {"image_size": 64, "picture": 64},
    "cvt.CvT": {"picture": 64},
    "twins_svt.TwinsSVT": {"picture": 224},
    "mobile_vit.MobileViT": {
        **{"image_size": (64, 64), "dims": [32, 32, 32], "picture": 64},
        **{"channels": [16, 16, 24, 24, 24, 24, 32, 32, 32, 32, 48]},
    },
    "levit.LeViT": {"image_size": 64, "stages": 2, "depth": 1, "dim": (32, 48), "heads": (2, 4), "picture": 64},
    "nest.NesT": {"image_size": 32, "patch_size": 4},
    "look_vit.LookViT": {"image_size": 64, "patch_size": 16, "highres_patch_size": 8, "picture": 64},
    "xcit.XCiT": {"image_size": 32},
    "levjepa.VideoTransformer": {},
    "jet_vit.JetViT": {"window_size": 2},
}
_PARTS = (
    "LayerScale",
    "Transformer",
    "CrossTransformer",
    "MultiScaleEncoder",
    "ImageEmbedder",
    "MobileViTBlock",
    "R2LTransformer",
)
_PARTS += ("FactorizedTransformer", "XCATransformer", "AutoencodingHead", "Adapter", "TransformerClassifier")
_TRAINERS = (
    "Dino",
    "EsViTTrainer",
    "LeJEPA",
    "LeVJEPA",
    "MAE",
    "SimMIM",
    "MPP",
    "MP3",
    "DistillWrapper",
    "VAT",
    "SigLIPVAT",
)


def names() -> list[str]:
    """file.class of each model; trainers, which wrap one of these, and parts are not models of their own."""
    import vit_pytorch

    found = []
    for one in pkgutil.iter_modules(vit_pytorch.__path__):
        try:
            module = importlib.import_module(f"vit_pytorch.{one.name}")
        except ImportError:
            found.append(f"{one.name}.?")
            continue
        for name, value in vars(module).items():
            if inspect.isclass(value) and issubclass(value, torch.nn.Module) and value.__module__ == module.__name__:
                known = inspect.signature(value.__init__).parameters
                is_model = {"num_classes", "image_size", "input_shape", "num_classes_K"} & set(known) or name in (
                    "CCT",
                )
                if is_model and name not in _PARTS + _TRAINERS:
                    found.append(f"{one.name}.{name}")
    return sorted(found)


def build(name: str) -> Iterator[tuple[str, torch.nn.Module, Any, Any]]:
    """The model on pictures, films or sequences, whichever it takes."""
    file, _, class_name = name.partition(".")
    try:
        module = importlib.import_module(f"vit_pytorch.{file}")
    except ImportError as error:
        raise NotBuilt(in_words(error)) from None
    made = getattr(module, class_name)
    own = dict(_OWN.get(name, {}))
    size = own.pop("picture", 32)
    known = inspect.signature(made.__init__).parameters
    arguments = {key: value for key, value in _ARGUMENTS.items() if key in known}
    if "mlp_dim" not in known and any(one.kind == one.VAR_KEYWORD for one in known.values()):
        arguments |= {"img_size": 32, "embedding_dim": 32, "num_layers": 2, "num_heads": 4}
    arguments |= {key: value for key, value in own.items() if key in known}
    if class_name == "CCT":
        arguments = {"img_size": 32, "embedding_dim": 32, "num_layers": 2, "num_heads": 4, "num_classes": 7}
        arguments |= {"num_frames": 4} if file == "cct_3d" else {}
    if file == "efficient":
        layer = torch.nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
        arguments["transformer"] = torch.nn.TransformerEncoder(layer, 2)
    torch.manual_seed(0)
    model = prepared(made(**arguments))
    pictures = [normal(3, size, size), normal(3, size // 2, size)]
    tries: list[Any] = [
        (normal(BATCH, 3, size, size),),
        (normal(BATCH, 3, 4, size, size),),
        (normal(BATCH, 3, 32),),
        (pictures,),
    ]
    tries += [([normal(3, 4, size, size)] * 2,), ([pictures],)]
    errors = []
    for inputs in tries:
        run = runner(model, *inputs)
        try:
            with torch.no_grad():
                run()
        except Exception as error:
            errors.append(in_words(error))
            continue
        yield (
            "sequence" if inputs[0] is pictures else str(tuple(getattr(inputs[0], "shape", "nested"))),
            model,
            run,
            None,
        )
        return
    raise NotBuilt("; ".join(dict.fromkeys(errors)))
