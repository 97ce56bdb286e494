"""Where the queries and keys of an attention come from: followed back to the inputs of the modules under way.

Each function of torch that runs is noted, with the tensors that it took and made. A query and a key that come from the
same inputs of their module are of one sequence ("self"); from different ones they are not ("cross"). Two inputs that
were joined, token behind token, and both look for and are looked at, are "joint", as text and picture in SD3.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Size, Tensor, nn

from .calls import name_of
from .contractions import MULTIPLIES, makes_row
from .kernels import KERNELS
from .modules import ModuleCall, inputs_of

_SAMPLE = 4  # numbers of a key: two keys that share them are the same
_PRODUCTS = frozenset(
    (
        *("linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "einsum", "bilinear"),
        *("conv1d", "conv2d", "conv3d", "conv_transpose2d", "embedding", "tensordot", "cdist", "inner"),
        *("cosine_similarity", "pairwise_distance", "linalg_vecdot", "linalg_matmul", "linalg_multi_dot"),
        *("chain_matmul", *KERNELS),
    )
)
_WRITES = frozenset(
    (
        *("__setitem__", "copy_", "index_copy", "index_copy_", "index_put", "index_put_", "index_add_", "scatter"),
        *("scatter_", "slice_scatter", "select_scatter", "masked_scatter", "masked_scatter_"),
    )
)
_JOINS = frozenset(("cat", "concat", "concatenate", "stack"))
_CUTS = frozenset(("__getitem__", "unbind", "split", "chunk", "tensor_split", "narrow", "select"))
_KEEPS = frozenset(
    (
        *("add", "__add__", "__radd__", "sub", "__sub__", "mul", "__mul__", "__rmul__", "div", "__truediv__"),
        *("neg", "__neg__", "layer_norm", "rms_norm", "clone"),
    )
)
"""Functions whose result has the axes of what they are given."""
_CASTS = frozenset(("to", "type", "type_as", "float", "half", "bfloat16", "double", "contiguous"))
"""The same, and they may return what they are given."""
_VIEWS = frozenset(
    (
        *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "transpose", "permute", "swapaxes"),
        *("movedim", "view_as", "reshape_as"),
    )
)
"""Functions that leave all numbers, in another shape."""
_PLAIN, _PRODUCT, _JOIN, _CUT, _KEEP, _SCRIPTED, _CAST, _VIEW = range(8)
_ROLES: dict[Any, int] = {}
"""By function; filled as functions are called."""


def _role_of(func: Any) -> int:
    name = name_of(func)
    role = _JOIN if name in _JOINS or name in _WRITES else _PLAIN
    for number, names in ((_PRODUCT, _PRODUCTS), (_CUT, _CUTS), (_KEEP, _KEEPS), (_CAST, _CASTS), (_VIEW, _VIEWS)):
        if name in names:
            role = number
    if isinstance(func, torch.jit.ScriptFunction):  # what it makes in another shape comes from a product in it
        role = _SCRIPTED
    if len(_ROLES) < 4096:
        _ROLES[func] = role
    return role


class _Node:
    """A tensor, and those that it was made of."""

    __slots__ = (
        "axis",
        "cut",
        "frame",
        "is_row",
        "join",
        "key_sample",
        "parents",
        "reference",
        "role",
        "size",
        "sizes",
    )
    frame: _Frame | None
    """Of a product of two tensors, the module's call in which it ran."""
    key_sample: Tensor | None
    """And a few numbers of each row of the second, which may be keys: (texts, 1, keys, numbers)."""
    sizes: tuple[int, ...]
    """Of a torch.cat or torch.stack, the lengths that it joined."""
    axis: int
    """And the axis on which it did."""
    join: _Node | None
    """The torch.cat or torch.stack whose result it is, or what was made of that and has the same axes."""
    is_row: bool
    """Whether it is a single query times each key."""
    cut: tuple[_Node, int, int] | None
    """Of a part of that, which it was, where the part begins on the axis, and how long it is there."""

    def __init__(self, tensor: Tensor, parents: Sequence[_Node] = (), role: int = _PLAIN) -> None:
        self.reference = ref(tensor)
        self.parents, self.role = parents, role
        self.size = tensor.numel()
        self.frame = self.join = self.cut = self.key_sample = None
        self.sizes, self.axis = (), 0
        self.is_row = False

    def has_axes_of(self, tensor: Any) -> bool:
        """Whether a tensor is the node's own, or a view of it with the same axes."""
        own = self.reference()
        return own is tensor or (own is not None and own.shape == tensor.shape and own.stride() == tensor.stride())


class _Part(NamedTuple):
    """Some tokens of a tensor, one behind the other."""

    tokens: int | None
    """How many; None: all there are."""
    roots: frozenset[_Node]
    """The inputs that they come from."""
    is_projected: bool
    """Whether there was a matrix product on the way."""
    join: _Node | None = None
    """What joined it with the others."""


_Parts = tuple[_Part, ...]
_NOTHING: _Parts = (_Part(None, frozenset(), False),)


class Origin(NamedTuple):
    """What is known of where queries and keys come from."""

    kind: str | None
    """"self", "cross" or "joint"; None if it is not known."""
    joined: dict[str, slice]
    """Of joint attention, the tokens that come from each input, by its name."""


class Provenance:
    """Notes what tensors are made of, in one thread."""

    def __init__(self) -> None:
        self._nodes: dict[int, _Node] = {}
        self._frames: dict[int, tuple[ModuleCall, _Frame]] = {}
        self.first_frame = 0
        """The outermost of the calls that were asked, the last time, where a query and a key come from."""

    def clear(self) -> None:
        """Forget all."""
        self._nodes.clear()
        self._frames.clear()

    def note(self, func: Any, args: Any, kwargs: Any, result: Any, calls: Sequence[ModuleCall]) -> None:
        """Note a function that has run, with the modules' calls under way."""
        if not isinstance(result, Tensor):
            if result is None and name_of(func) == "__setitem__":
                result = args[0]
            elif type(result) is Size or not isinstance(result, (tuple, list)):
                return
        role = _ROLES.get(func)
        if role is None:
            role = _role_of(func)
        if role >= _CAST:
            if args and (result is args[0] or (role == _VIEW and self._is_view_of_known(result, args[0]))):
                return
            role = _KEEP if role == _CAST else _PLAIN
        if role == _SCRIPTED:
            given = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]
            role = _PLAIN if any(one.shape == getattr(result, "shape", None) for one in given) else _PRODUCT
        parents: list[_Node] = []
        if role == _PRODUCT and name_of(func) in ("baddbmm", "addmm"):
            args = args[1:]
        self._add_nodes(args, parents)
        if kwargs:
            self._add_nodes(kwargs.values(), parents)
        for one in (result,) if isinstance(result, Tensor) else result:
            if isinstance(one, Tensor):
                self._nodes[id(one)] = node = _Node(one, parents, role)
                if role == _JOIN and name_of(func) in _JOINS:
                    node.sizes, node.axis = _joined_sizes(name_of(func), one, *args, **kwargs)
                    node.join = node if node.sizes else None
                elif role == _PRODUCT and len(parents) > 1:
                    node.frame = self._frame(calls, len(calls) - 1)
                    node.key_sample = _sample(name_of(func), args)
                elif role == _KEEP:
                    given = [each for each in args if isinstance(each, Tensor) and each.shape == one.shape]
                    same = (known for known in parents if any(map(known.has_axes_of, given)))
                    node.join = next((known.join for known in same), None)
                    if len(parents) == 2 and parents[0].size != parents[1].size and name_of(func) in MULTIPLIES:
                        node.is_row = makes_row(args)
                elif role == _CUT and parents and parents[0].join is not None and parents[0].has_axes_of(args[0]):
                    node.cut = _cut(args[0], one, parents[0].join)

    def note_layer(self, given: Sequence[Tensor], made: Tensor, has_product: bool) -> None:
        """Note a layer whose functions were not looked at."""
        parents: list[_Node] = []
        self._add_nodes(given, parents)
        self._nodes[id(made)] = node = _Node(made, parents, _PRODUCT if has_product else _KEEP)
        if not has_product and len(parents) == 1 and parents[0].size == node.size:
            node.join = parents[0].join

    def _add_nodes(self, items: Iterable[Any], parents: list[_Node]) -> None:
        """Add the nodes of the tensors among a function's arguments; parameters are no inputs."""
        nodes = self._nodes
        for item in items:
            kind = type(item)
            if kind is Tensor or (kind is not nn.Parameter and isinstance(item, Tensor)):
                node = nodes.get(id(item))
                parents.append(self._node_of(item) if node is None or node.reference() is not item else node)
            elif kind is list or kind is tuple:
                self._add_nodes(item, parents)

    def _is_view_of_known(self, view: Tensor, of: Tensor) -> bool:
        """Whether a view of all of a tensor needs no node of its own: it is found by its base, as that tensor is."""
        base = getattr(view, "_base", None)
        if base is None or (of is not base and id(of) in self._nodes):  # that may be a part of the base
            return False
        node = self._nodes.get(id(base))
        return node is not None and node.reference() is base

    def _node_of(self, tensor: Tensor) -> _Node:
        """The node of a tensor, or of the one that it is a view of; else a new one."""
        nodes = self._nodes
        node = nodes.get(id(tensor))
        if node is not None and node.reference() is tensor:
            return node
        base = getattr(tensor, "_base", None)
        node = None if base is None else nodes.get(id(base))
        if node is None or node.reference() is not base:
            nodes[id(tensor)] = node = _Node(tensor)
        return node

    def of_query_and_key(self, query: Tensor, key: Tensor, calls: Sequence[ModuleCall]) -> Origin:
        """Where they come from, by the calls under way; the last is the innermost."""
        return self._origin(self._node_of(query), self._node_of(key), calls, query.shape[-2], key.shape[-2])

    def of_weights(self, weights: Tensor, calls: Sequence[ModuleCall]) -> tuple[Origin, Tensor | None]:
        """Where the queries and keys of which weights were computed come from; and a sample of the keys, if known.

        The sample is a few numbers of each key, (texts, 1, keys, numbers).
        """
        frame = self._frame(calls, len(calls) - 1)
        best, made_by, node = 0, None, self._node_of(weights)
        for product in _products(node, frame.inputs, lambda one: bool(_roots(frame.trace(one)))):
            rooted = sum(bool(_roots(frame.trace(side))) for side in product.parents[:2])
            if rooted >= best:
                best, made_by = rooted + 1, product
            if rooted == 2:
                break
        if made_by is not None:
            query, key = made_by.parents[:2]
            return self._origin(query, key, calls, weights.shape[-2], weights.shape[-1]), made_by.key_sample
        for product in _products(
            node, (), lambda one: bool(one.parents)
        ):  # the module is handed the scores: the one that made them knows more
            if product.frame is not None:
                query, key = product.parents[:2]
                of_query, of_key = product.frame.trace(query), product.frame.trace(key)
                if any(part.is_projected for part in (*of_query, *of_key)):
                    return Origin(_kind(of_query, of_key), {}), product.key_sample
                # That one is handed query and key: a module around has made them.
                for end in range(len(calls) - 1, 0, -1):
                    frame = self._frame(calls, end - 1)
                    if _roots(frame.trace(query)) or _roots(frame.trace(key)):
                        origin = self._origin(query, key, calls[:end], weights.shape[-2], weights.shape[-1])
                        return origin, product.key_sample
        return Origin(None, {}), None

    def _frame(self, calls: Sequence[ModuleCall], number: int) -> _Frame:
        call, frame = self._frames.get(number, (None, None))
        if frame is None or call is not calls[number]:
            inputs = dict[_Node, str]()
            for name, tensor in inputs_of(calls[number]):
                inputs.setdefault(self._node_of(tensor), name)
            frame = _Frame(inputs)
            self._frames[number] = calls[number], frame
        return frame

    def _origin(self, query: _Node, key: _Node, calls: Sequence[ModuleCall], queries: int, keys: int) -> Origin:
        for number in range(len(calls) - 1, -1, -1):
            frame = self._frame(calls, number)
            around = self._frame(calls, number - 1) if number else None
            self.first_frame = number
            of_query, of_key = frame.trace(query), frame.trace(key)
            if around is not None and not any(part.is_projected for part in (*of_query, *of_key)):
                continue  # the module is handed query and key: the one around it has made them
            kind = _kind(of_query, of_key)
            parts = _joined(of_query, of_key, frame.inputs, queries, keys)
            is_unseen = kind is None and len(frame.inputs) == 1  # by functions that are not seen
            is_given_twice = False
            if kind == "cross" and around is not None:
                self.first_frame = number - 1
                is_given_twice = _is_one_sequence(of_query, of_key, around)
            if is_unseen or is_given_twice:
                kind = "self"
            elif kind == "self" and not parts and around is not None and len(_roots(of_query)) == 1:
                given = around.trace(_roots(of_query)[0])  # the module around may have joined it
                parts = _joined(given, given, around.inputs, queries, keys)
            return Origin("joint" if parts else kind, parts)
        return Origin(None, {})


class _Frame:
    """The inputs of a module's call, and what in it comes from them.

    Args:
        inputs: and their names.
    """

    def __init__(self, inputs: dict[_Node, str]) -> None:
        self.inputs = inputs
        self._traced: dict[_Node, _Parts] = {node: (_Part(None, frozenset((node,)), False),) for node in inputs}

    def trace(self, start: _Node) -> _Parts:
        """The inputs that a tensor comes from, part by part where several were joined."""
        traced, waiting = self._traced, [start]
        while waiting:
            node = waiting[-1]
            makers = _makers(node)
            missing = [] if node in traced else [parent for parent in makers if parent not in traced]
            if missing:
                waiting += missing
                continue
            if node not in traced:
                traced[node] = _made(node, [traced[parent] for parent in makers])
            waiting.pop()
        return traced[start]


def _is_one_sequence(of_query: _Parts, of_key: _Parts, around: _Frame) -> bool:
    """Whether the module around made both of one tensor, token by token, such as x + positions and x."""
    roots, others = _roots(of_query), _roots(of_key)
    if len(roots) != 1 or len(others) != 1 or roots[0].size != others[0].size:
        return False
    query, key = around.trace(roots[0]), around.trace(others[0])
    return _kind(query, key) == "self" and not any(part.is_projected for part in (*query, *key))


def _kind(of_query: _Parts, of_key: _Parts) -> str | None:
    query, key = {*_roots(of_query)}, {*_roots(of_key)}
    if not query and not key:
        return None
    if query == key:
        return "self"
    if not query & key or (query - key and key - query):
        return "cross"
    # One of them has more, such as positions, which are no smaller than a key that all heads share. Tokens that were
    # joined to it count if they are of another input, and no keys of earlier steps.
    are_others = (_has_tokens_of_others(parts, query & key) for parts in (of_query, of_key))
    return "cross" if any(are_others) else "self"


def _has_tokens_of_others(parts: _Parts, shared: set[_Node]) -> bool:
    """Whether some tokens come from none of these inputs, beside what all tokens come from, such as positions."""
    rooted = [part for part in parts if part.roots]
    of_all = frozenset[_Node]().union(*(part.roots for part in rooted)).intersection(*(part.roots for part in rooted))
    return any(
        part.tokens is not None and part.is_projected and part.roots != of_all and not (part.roots - of_all) & shared
        for part in rooted
    )


def _joined(of_query: _Parts, of_key: _Parts, inputs: dict[_Node, str], queries: int, keys: int) -> dict[str, slice]:
    """The tokens of each input, if several are joined, for the queries and for the keys; else none."""
    sizes = [part.tokens or 0 for part in of_query]
    same = [(part.tokens, part.roots) for part in of_query] == [(part.tokens, part.roots) for part in of_key]
    named = [part for part in of_query if part.roots]
    differ = any(one.roots - other.roots and other.roots - one.roots for one in named for other in named)
    if not same or not differ or sum(sizes) != queries or queries != keys:
        return {}
    parts, start = dict[str, slice](), 0
    for part, size in zip(of_query, sizes, strict=True):
        name = " + ".join(sorted(inputs[root] for root in part.roots))
        if name:
            parts[name] = slice(start, start + size)
        start += size
    return parts


def _roots(parts: _Parts) -> list[_Node]:
    return list(dict.fromkeys(root for part in parts for root in part.roots))


def _products(weights: _Node, inputs: Container[_Node], varies: Callable[[_Node], bool]) -> Iterator[_Node]:
    """The matrix products of two tensors that weights were computed from, the last one first.

    Behind them come sums of each query with each key, as additive attention has them.

    Args:
        inputs: where to stop.
        varies: whether something is made of more than parameters.
    """
    waiting, seen, sums = deque([weights]), {weights}, list[_Node]()
    while waiting:
        node = waiting.popleft()
        if node.role == _PRODUCT and len(node.parents) >= 2:
            yield node
            # Behind a product with a matrix of the model that mixes heads, as in talking heads, are the scores.
            mixed = [*filter(varies, node.parents)]
            waiting += mixed if len(mixed) == 1 and mixed[0].size == node.size else ()
        elif node not in inputs:
            is_pair = node.role == _KEEP and len(node.parents) == 2
            if is_pair and (node.is_row or all(one.size < node.size for one in node.parents)):
                sums.append(node)
            fresh = [parent for parent in node.parents if parent not in seen]
            seen.update(fresh)
            waiting += fresh
    yield from sums


def _sample(name: str, factors: Sequence[Any]) -> Tensor | None:
    """A few numbers of each key, if the second factor of a product may be the transpose of the keys.

    Taken at once, because nothing holds the keys until the weights are used.
    """
    if name not in ("matmul", "__matmul__") or len(factors) < 2:
        return None
    keys = factors[1]
    return keys.detach()[:, :1, :_SAMPLE].mT.clone() if keys.ndim == 4 else None


def _joined_sizes(
    name: str, result: Tensor, tensors: Sequence[Tensor], dim: int = 0, **options: Any
) -> tuple[tuple[int, ...], int]:
    """The lengths that torch.cat or torch.stack joins, and on which axis.

    There are no lengths if some of the tensors are parameters, which are not noted.
    """
    if any(type(tensor) is nn.Parameter for tensor in tensors):
        return (), 0
    dim = options.get("axis", dim)
    # An empty tensor may have one axis only: that of a cache which is empty yet.
    sizes = (1 if name == "stack" else tensor.shape[dim] if tensor.numel() else 0 for tensor in tensors)
    return tuple(sizes), dim % result.ndim


def _cut(whole: Tensor, part: Tensor, join: _Node) -> tuple[_Node, int, int] | None:
    """Where a part of what was joined begins on that axis, and how long it is there; None if it is no view of it."""
    step = whole.stride(join.axis)
    if not step or whole.untyped_storage().data_ptr() != part.untyped_storage().data_ptr():
        return None
    offset = int(part.storage_offset()) - int(whole.storage_offset())
    for other, size in zip(whole.stride(), whole.shape, strict=True):
        if other > step and size > 1:
            offset %= other
    lengths = [size for other, size in zip(part.stride(), part.shape, strict=True) if other == step]
    return join, offset // step, lengths[0] if lengths else 1


def _makers(node: _Node) -> Sequence[_Node]:
    """What a tensor was made of, without what only modulates it: a scale, a mask, the cosines of rotary positions."""
    if node.role not in (_PLAIN, _KEEP) or len(node.parents) < 2:
        return node.parents
    return [parent for parent in node.parents if parent.size >= node.size] or node.parents


def _made(node: _Node, parents: Sequence[_Parts]) -> _Parts:
    if not parents:
        return _NOTHING
    first = parents[0]
    if node.cut is not None and len(first) > 1 and first[0].join is node.cut[0]:
        return _part_of(first, *node.cut[1:])
    if len(first) == 1 and all(parts is first for parts in parents):  # as nearly always
        return first if node.role != _PRODUCT or first[0].is_projected else (first[0]._replace(is_projected=True),)
    if node.sizes and len({_merged(parts).roots for parts in parents}) > 1:
        merged = zip(node.sizes, map(_merged, parents), strict=True)
        return tuple(part._replace(tokens=size, join=node) for size, part in merged)
    longest = max(parents, key=len)
    if len(longest) > 1 and all(len(parts) == 1 or parts == longest for parts in parents):
        whole = frozenset(_roots(longest))
        made = longest if all({*_roots(parts)} <= whole for parts in parents) else (_merged(sum(parents, ())),)
    else:
        made = (_merged(sum(parents, ())),)
    if node.role == _PRODUCT:
        made = tuple(part._replace(is_projected=True) for part in made)
    return made


def _part_of(parts: _Parts, start: int, length: int) -> _Parts:
    """Those of the tokens from a place on."""
    found, begin = list[_Part](), 0
    for part in parts:
        size = part.tokens or 0
        kept = min(begin + size, start + length) - max(begin, start)
        if kept > 0:
            found.append(part._replace(tokens=kept))
        begin += size
    return tuple(found) if len(found) > 1 else (found[0]._replace(tokens=None),) if found else parts


def _merged(parts: _Parts) -> _Part:
    return _Part(None, frozenset(_roots(parts)), any(part.is_projected for part in parts))
