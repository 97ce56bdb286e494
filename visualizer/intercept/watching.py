"""Watches the modules of a model run: which one is running, and what of torch's functions it calls is attention.

A softmax is attention when its scores come from a matrix product, and a matrix product takes its weights: both as they
are, or after operations that keep each number in its place, such as a mask, dropout, or a new shape.
"""

from __future__ import annotations

import fnmatch
import re
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import warn
from ..instrument import Uncompiled, named_modules
from ..maps import AttentionMap, Factors, Gradient, Keys, Weights
from ..tensors import bytes_by_device, why_unreal
from .functions import (
    BEGINNINGS,
    MADE_UP,
    autocast_dtype,
    four_axes,
    is_in_place,
    mixes_heads,
    role_of,
    seen_through,
    with_buffers,
)

if TYPE_CHECKING:
    from .recorded import Maps

Growing = dict[str, Keys]

_PICTURES = {"pixel_values", "input_features"}


class _Call(NamedTuple):
    """A module's call under way."""

    path: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Softmax:
    """Weights that a softmax has made, until a product shows that they are attention."""

    def __init__(self, weights: Tensor) -> None:
        self._reference = weakref.ref(weights)
        self._weights: Tensor | None = None
        self.copy: Tensor | None = None
        self.keys = weights.shape[-1]
        """How many of its last axis are keys: an "attention sink" may come behind them, and is cut off later."""
        self.is_known = False

    def hold(self) -> None:
        """Keep them, now that another tensor stands for them."""
        self._weights = self._reference()

    def note_slice(self, whole: Any, part: Any) -> None:
        """Note that only the first keys of what stands for the weights go on."""
        if not isinstance(whole, Tensor) or not isinstance(part, Tensor) or part.shape[:-1] != whole.shape[:-1]:
            return
        if whole.shape[-1] == self.keys > part.shape[-1] and part.data_ptr() == whole.data_ptr():
            self.keys = part.shape[-1]

    def save(self) -> None:
        """Copy them, now that they may be changed."""
        weights = self.weights
        if weights is not None and self.copy is None:
            self.copy = _copied(weights)

    @property
    def weights(self) -> Tensor | None:
        return self._reference() if self._weights is None else self._weights


_SCORES = object()
"""Stands for what a matrix product has made: the scores of a softmax, perhaps."""


class _State(threading.local):
    """What one thread is doing."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []
        self.is_watched = False
        self.heads: int | None = None
        self.followed: dict[int, tuple[weakref.ref[Tensor], Any]] = {}
        """By their ids, the tensors that are _SCORES or the weights of a _Softmax."""


@dataclass
class _Seen:
    """Modules named after attention: those that ran, and those whose calls had maps."""

    ran: dict[str, str] = field(default_factory=dict)
    with_maps: set[str] = field(default_factory=set)


class Watch:
    """The hooks and the mode by which a model's calls are seen, until `end`."""

    def __init__(self, maps: Maps, model: nn.Module) -> None:
        modules = list(named_modules(model))
        compiled = [path for path, module in modules if _is_compiled(module)]
        if compiled and not Uncompiled.is_possible():
            raise RuntimeError(
                f"{repr(compiled[0]) if compiled[0] else 'the model'} is compiled, and torch before 2.6 cannot run it "
                "uncompiled meanwhile: record the model as it was before torch.compile"
            )
        self._maps = weakref.ref(maps)
        self._state = _State()
        self._mode = _Mode(self)
        self._seen = _Seen()
        self._told: set[str] = set()
        self._has_run = False
        self._masks: dict[int, tuple[weakref.ref[Tensor], Any, Tensor]] = {}
        self.growing: Growing = {}
        self._uncompiled = Uncompiled()
        self._handles: list[Any] = []
        scripted = []
        for path, module in modules:
            if isinstance(module, torch.jit.ScriptModule):
                scripted.append(path)
                continue
            if path and _cannot_attend(module):
                continue
            begin = self._beginning_of(path, weakref.ref(module))
            self._handles += [
                module.register_forward_pre_hook(begin, prepend=True, with_kwargs=True),
                module.register_forward_hook(self._ending, always_call=True),
            ]
        if scripted:
            tops = [path for path in scripted if not any(path != top and _is_within(path, top) for top in scripted)]
            warn(
                f"{', '.join(repr(path) if path else 'the model' for path in tops)} is scripted (torch.jit): it runs "
                "without Python, and its attention is not seen."
            )

    def end(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._uncompiled.end()

    def missing(self) -> list[str]:
        """What ran without being seen, and what was asked for and did not come, in words."""
        missing: dict[str, list[str]] = {}
        for path, name in self._seen.ran.items():
            near = any(_is_within(path, other) or _is_within(other, path) for other in self._seen.with_maps)
            inner = any(_is_within(other, path) for other in self._seen.ran if other != path)
            if not near and not inner:
                missing.setdefault(name, []).append(path)
        texts = list(self._unseen())
        for name, paths in missing.items():
            more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            texts.append(
                f"{name} ({paths[0]!r}{more}) ran, but no softmax of it stands between two matrix products: it has no "
                "map here. Linear attention has none at all; a kernel of another library is not seen: switch it off "
                '(attn_implementation="sdpa" in transformers).'
            )
        return texts

    def _unseen(self) -> Iterator[str]:
        maps = self._maps()
        if maps is None or not self._has_run:
            return
        paths = list(maps._paths)
        seen = self._seen  # also what has been cleared since
        if not (paths or seen.with_maps or seen.ran or self._told):
            yield (
                f"{maps._title.rpartition(' ')[2]} ran without any attention that can be seen: neither a fused "
                "kernel of torch nor a softmax between two matrix products was called in it."
            )
        for layer in maps._layers or () if paths else ():
            is_there = (
                any(fnmatch.fnmatchcase(path, layer) for path in paths)
                if isinstance(layer, str)
                else -len(paths) <= layer < len(paths)
            )
            if not is_there:
                named = ", ".join(map(repr, paths[:12])) + (f" and {len(paths) - 12} more" if len(paths) > 12 else "")
                yield f"no attention was seen in {layer!r}, one of the layers to record; it was in {named}."

    def __deepcopy__(self, memo: Any) -> Watch:
        return self  # in the hooks of a model that is copied

    def _beginning_of(self, path: str, known: weakref.ref[nn.Module]) -> Callable[..., None]:
        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if known() is not module and not getattr(module, "_is_replica", False):
                return  # a deep copy, which has the hooks too
            state = self._state
            self._has_run = True
            # In a backward pass checkpointing computes what has been seen already.
            if not state.calls and torch._C._current_graph_task_id() == -1:
                self._mode.__enter__()  # type: ignore[no-untyped-call]
                state.is_watched = True
            state.calls.append(_Call(path, module, args, kwargs))

        return begin

    def _ending(self, module: nn.Module, args: Any, output: Any) -> None:
        state = self._state
        if not state.calls or state.calls[-1].module is not module:
            return  # it began before recording did
        path = state.calls.pop().path
        if _is_attention(type(module).__qualname__):
            self._seen.ran[path] = type(module).__qualname__
        if not state.calls and state.is_watched:
            state.is_watched = False
            state.followed.clear()
            self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def given(self, name: str) -> list[Any]:
        """What the calls under way in this thread were given by that keyword, the innermost call first."""
        found = []
        for call in reversed(self._state.calls):
            if name in call.kwargs:
                found.append(call.kwargs[name])
            elif _PICTURES & call.kwargs.keys():  # what is told beyond is of texts that go with them
                return [*found, None]
        return found

    @property
    def follows(self) -> bool:
        """Whether this thread has tensors that may be scores or weights."""
        return bool(self._state.followed)

    def see(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run one of torch's functions for a module, and record what it is of attention."""
        state, role = self._state, role_of(func)
        if role == "sdpa":
            output = func(*args, **kwargs)
            self._record_fused(output, *args, **kwargs)
        elif role == "flex":
            output = func(*args, **kwargs)
            self._record_flex(output[0], *args, **kwargs)
        elif role == "heads":
            before, state.heads = state.heads, args[4] if len(args) > 4 else kwargs.get("num_heads")
            try:
                with self._mode:
                    output = seen_through(*args, **kwargs)
            finally:
                state.heads = before
        else:
            found = self._followed_in(args) or self._followed_in(kwargs.values())
            softmax = found if isinstance(found, _Softmax) else None
            if softmax is not None and (role == "in place" or is_in_place(args, kwargs)):
                softmax.save()
            output = func(*args, **kwargs)
            if role == "product":
                if softmax is not None:
                    self._record_explicit(softmax)
                else:
                    self._follow(output, _SCORES)
            elif role == "softmax" and found is _SCORES:
                axis = kwargs.get("dim", args[1] if len(args) > 1 else None)
                if output.ndim >= 2 and axis in (-1, output.ndim - 1):
                    self._follow(output, _Softmax(output))
            elif found is not None and (role == "carries" or (role == "mixes" and mixes_heads(args, output))):
                if softmax is not None and output is not softmax.weights:
                    softmax.hold()
                    softmax.note_slice(args[0], output)
                self._follow(output, found)
        return output

    def _follow(self, tensor: Any, what: Any) -> None:
        if isinstance(tensor, Tensor):
            followed, number = self._state.followed, id(tensor)
            followed[number] = weakref.ref(tensor, lambda _: followed.pop(number, None)), what

    def _followed_in(self, args: Iterable[Any]) -> Any:
        """What one of a function's arguments is followed as: a softmax before scores, None if none of them is."""
        found, followed = None, self._state.followed
        if followed:
            for item in args:
                known = followed.get(id(item))
                what = known[1] if known is not None and known[0]() is item else None
                if what is None and isinstance(item, (list, tuple)):
                    what = self._followed_in(item)
                if isinstance(what, _Softmax):
                    return what
                found = what or found
        return found

    def _record_explicit(self, softmax: _Softmax) -> None:
        weights = softmax.weights
        if weights is None or softmax.is_known:
            return
        softmax.is_known = True
        heads = self._heads_of(weights)

        def make(growing: Growing | None) -> tuple[AttentionMap, dict[str, int]]:
            values = (weights if softmax.copy is None else softmax.copy).detach()[..., : softmax.keys]
            if softmax.copy is None and growing is not None:
                values = _copied(values)
            values = four_axes(values, heads)
            made = AttentionMap.from_source(
                Weights(values), path=path, kind=self._kind_of(values.shape[2], values.shape[3])
            )
            made.gradient = self._gradient_of(weights, made.shape, None)
            return made, _sizes(values)

        path = self._state.calls[-1].path
        self._record(path, weights, make)

    def _record_fused(
        self,
        output: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        mask, causal = attn_mask, 0 if is_causal else None
        if type(mask).__name__ == "CausalBias":  # a tensor that says how, without numbers
            lower = mask.variant.name == "LOWER_RIGHT"
            mask, causal = None, key.shape[-2] - query.shape[-2] if lower else 0
        heads = self._heads_of(query)
        lead = query.shape[:-2]
        if mask is not None and len(lead) != 2:
            mask = four_axes(mask.expand(*lead, *mask.shape[-2:]), heads)
        query, key, value = (four_axes(tensor, heads) for tensor in (query, key, value))
        groups = 1 if enable_gqa else self._packed_groups(query, key)
        if groups > 1:
            query = query.flatten(1, 2).unsqueeze(2)
            mask = mask if mask is None or mask.ndim < 4 or mask.shape[1] == 1 else mask.flatten(1, 2).unsqueeze(2)
        reason = (
            "there was dropout on the weights, whose pattern a fused kernel does not tell: the gradient is known with "
            "model.eval(), or without attention dropout"
            if dropout_p
            else None
        )
        self._record_factors(output, query, key, value, scale, mask, causal, reason)

    def _record_flex(
        self,
        output: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        score_mod: Callable[..., Tensor] | None,
        block_mask: tuple[Any, ...],
        scale: float | None,
        kernel_options: Any = None,
        score_mod_buffers: tuple[Any, ...] = (),
        mask_mod_buffers: tuple[Any, ...] = (),
    ) -> None:
        mask_mod = block_mask[-1] if block_mask else None
        functions = [
            None if function is None or function.__name__ in MADE_UP else with_buffers(function, buffers)
            for function, buffers in ((score_mod, score_mod_buffers), (mask_mod, mask_mod_buffers))
        ]
        self._record_factors(output, query, key, value, scale, None, None, None, *functions)

    def _record_factors(
        self,
        output: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        mask: Tensor | None,
        causal: int | None,
        reason: str | None,
        *functions: Any,
    ) -> None:
        path = self._state.calls[-1].path
        dtype = autocast_dtype(query)
        query, key = (query, key) if dtype is None else (query.to(dtype), key.to(dtype))
        count, length = query.shape[2], key.shape[2]

        def make(growing: Growing | None) -> tuple[AttentionMap, dict[str, int]]:
            kept_mask, rest = mask, dict[str, int]()
            if growing is None:
                kept_query, keys = query.detach(), Keys(key.detach())
            else:
                kept_query = _copied(query)
                keys, rest = self._kept_keys(path, key.detach(), count, growing)
                if mask is not None:
                    kept_mask, more = self._kept_mask(mask)
                    rest = _added(rest, more)
            source = Factors(kept_query, keys, length, scale, kept_mask, causal, *functions)
            made = AttentionMap.from_source(source, path=path, kind=self._kind_of(count, length))
            made.gradient = self._gradient_of(output, made.shape, value, reason)
            held = [kept_query] + ([] if made.gradient is None else made.gradient.tensors())
            return made, _added(rest, _sizes(*held))

        self._record(path, query, make)

    def _record(self, path: str, example: Tensor, make: Callable[..., Any]) -> None:
        maps = self._maps()
        if maps is None:
            return
        reason = why_unreal(example)
        if reason is None and torch._C._functorch.is_functorch_wrapped_tensor(example):
            reason = "was inside a transform of torch.func, such as vmap"
        if reason is None and example.is_nested:
            reason = "was a nested tensor"
        if reason is not None:
            if path not in self._told:
                self._told.add(path)
                warn(f"the attention of {path!r} {reason}: such calls are not recorded.")
            return
        self._seen.with_maps.add(path)
        # Copies made in inference mode could not be worked on outside of it.
        with torch.inference_mode(False), torch.no_grad():
            maps._take(path, make)

    def _kept_keys(self, path: str, key: Tensor, count: int, growing: Growing) -> tuple[Keys, dict[str, int]]:
        """The keys of a call. Those of a growing cache share what they begin with; only new ones are copied."""
        known = growing.get(path)
        if known is not None and count < key.shape[2] and known.begins(key):
            return known, {_device(key): known.grow(key)}
        growing[path] = made = Keys(_copied(key))
        return made, _sizes(made.buffer)

    def _kept_mask(self, mask: Tensor) -> tuple[Tensor, dict[str, int]]:
        """A copy of a mask, the same one for all layers that are given this mask."""
        version = None if mask.is_inference() else mask._version
        number = id(mask)
        known = self._masks.get(number)
        if known is not None and known[0]() is mask and known[1] == version:
            return known[2], {}
        compact = mask.detach()
        for axis, step in enumerate(compact.stride()):
            if step == 0:  # expanded: one number stands for all
                compact = compact.narrow(axis, 0, 1)
        kept = _copied(compact)
        masks = self._masks
        masks[number] = weakref.ref(mask, lambda _: masks.pop(number, None)), version, kept
        return kept, _sizes(kept)

    def _gradient_of(
        self, output: Tensor, shape: Any, value: Tensor | None, reason: str | None = None
    ) -> Gradient | None:
        maps = self._maps()
        if maps is None or not maps._gradients or not output.requires_grad:
            return None
        gradient = Gradient(shape, None if value is None else _copied(value), reason)
        output.register_hook(gradient.accumulate)  # type: ignore[no-untyped-call]
        return gradient

    def _heads_of(self, tensor: Tensor) -> int | None:
        """How many heads share the first axis of a tensor that has only three."""
        if tensor.ndim != 3:
            return None
        if self._state.heads is not None:
            return self._state.heads
        call = self._state.calls[-1]
        heads = getattr(call.module, "num_heads", None)
        batch = next((item.shape[0] for item in call.args if isinstance(item, Tensor) and item.ndim), None)
        return heads if isinstance(heads, int) and batch is not None and tensor.shape[0] == batch * heads else None

    def _packed_groups(self, query: Tensor, key: Tensor) -> int:
        """How many query heads transformers has put on the axis of queries, which it does for single queries."""
        module = self._state.calls[-1].module
        groups = getattr(module, "num_key_value_groups", 1)
        heads = getattr(getattr(module, "config", None), "num_attention_heads", None)
        is_packed = (
            isinstance(groups, int)
            and groups > 1
            and query.shape[1] == key.shape[1]
            and query.shape[2] == groups
            and heads == query.shape[1] * groups
        )
        return groups if is_packed else 1

    def _kind_of(self, queries: int, keys: int) -> Literal["self", "cross", "window"] | None:
        """What the calls under way say about where the keys are from."""
        for call in reversed(self._state.calls[-2:]):
            said = getattr(call.module, "is_cross_attention", None)
            if isinstance(said, bool):
                return "cross" if said else "self"
            if any(call.kwargs.get(name) is not None for name in ("encoder_hidden_states", "key_value_states")):
                return "cross"
            if isinstance(call.module, nn.MultiheadAttention):
                given = [*call.args, *(call.kwargs[name] for name in ("query", "key") if name in call.kwargs)]
                return "self" if given[0] is given[1] else "cross"
            if getattr(call.module, "window_size", None):
                return "window"
        return "self" if queries == keys else None


class _Mode(TorchFunctionMode):
    """Shows a watch what torch's functions are called with; several threads may be in it."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = weakref.ref(watch)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        watch = self._watch()
        if watch is None or (not watch.follows and role_of(func) not in BEGINNINGS):  # the usual case: only a look
            return func(*args, **kwargs)
        return watch.see(func, args, kwargs)


def _is_compiled(module: nn.Module) -> bool:
    """Whether its calls run what torch.compile made of it."""
    return type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None


def _cannot_attend(module: nn.Module) -> bool:
    """Whether it is one of torch's own layers without parts, such as nn.Linear: no hook need tell when those run."""
    own = type(module).__module__.startswith("torch.nn.modules.")
    return own and not module._modules and not isinstance(module, nn.MultiheadAttention)


@lru_cache(maxsize=4096)
def _is_attention(name: str) -> bool:
    own = name.rpartition(".")[2]  # LxmertAttentionOutput and its kind project what another module attended to
    return re.search("attention|attn", own, re.IGNORECASE) is not None and not own.endswith("Output")


def _is_within(path: str, other: str) -> bool:
    """Whether a path is another one, or of a module in that."""
    return path == other or not other or path.startswith(f"{other}.")


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _device(tensor: Tensor) -> str:
    return next(iter(bytes_by_device(tensor)))


def _sizes(*tensors: Tensor) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for tensor in tensors:
        sizes = _added(sizes, bytes_by_device(tensor))
    return sizes


def _added(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    return {device: one.get(device, 0) + other.get(device, 0) for device in {**one, **other}}
