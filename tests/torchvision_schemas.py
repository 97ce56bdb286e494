"""Lets torchvision be imported beside a torch of another build, such as torch's own CPU build.

Its compiled operators are then missing, and registering their fake versions fails for want of a schema. Nothing here
uses the operators; timm and transformers only want the import to succeed. Where the two fit, nothing is done.
"""

import functools
import sys

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class BeforeTorchvision:
    """A finder that finds nothing but declares the schemas when torchvision is looked for: torch loads no sooner."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            declare()


@functools.cache  # the declaration lasts as long as the library that is returned
def declare():
    from importlib.metadata import PackageNotFoundError, version

    try:
        builds = {version(name).partition("+")[2] for name in ("torch", "torchvision")}  # "cpu", "cu126", ""
    except PackageNotFoundError:
        return None
    if len(builds) == 1:
        return None
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for schema in SCHEMAS:
        library.define(schema)
    return library


sys.meta_path.insert(0, BeforeTorchvision())
