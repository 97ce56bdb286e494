"""Where the queries and keys of an attention come from: followed back to the inputs of the modules under way.

Each function of torch that runs is noted, with the tensors that it took and made. A query and a key that come from the
same inputs of their module are of one sequence ("self"); from different ones they are not ("cross"). Two inputs that
were joined, token behind token, and both look for and are looked at, are "joint", as text and picture in SD3.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import ref

from torch import Size, Tensor, nn

from .calls import name_of
from .kernels import KERNELS
from .modules import ModuleCall, inputs_of

_PRODUCTS = frozenset(
    (
        *("linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "einsum", "bilinear"),
        *("conv1d", "conv2d", "conv3d", "conv_transpose2d", "embedding", "tensordot", "cdist", *KERNELS),
    )
)
_WRITES = frozenset(
    (
        *("__setitem__", "copy_", "index_copy", "index_copy_", "index_put", "index_put_", "index_add_", "scatter"),
        *("scatter_", "slice_scatter", "select_scatter", "masked_scatter", "masked_scatter_"),
    )
)
_JOINS = frozenset(("cat", "concat", "concatenate"))
_PLAIN, _PRODUCT, _JOIN = range(3)


@lru_cache(maxsize=4096)
def _role(func: Any) -> int:
    name = name_of(func)
    return _PRODUCT if name in _PRODUCTS else _JOIN if name in _JOINS or name in _WRITES else _PLAIN


class _Node:
    """A tensor, and those that it was made of."""

    __slots__ = ("parents", "reference", "role", "size", "sizes")

    def __init__(
        self, tensor: Tensor, parents: Sequence[_Node] = (), role: int = _PLAIN, sizes: tuple[int, ...] = ()
    ) -> None:
        self.reference = ref(tensor)
        self.parents, self.role = parents, role
        self.size = tensor.numel()
        self.sizes = sizes
        """Of a torch.cat, the lengths that it joined."""


class _Part(NamedTuple):
    """Some tokens of a tensor, one behind the other."""

    tokens: int | None
    """How many; None: all there are."""
    roots: frozenset[_Node]
    """The inputs that they come from."""
    is_projected: bool
    """Whether there was a matrix product on the way."""


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

    def clear(self) -> None:
        """Forget all."""
        self._nodes.clear()
        self._frames.clear()

    def note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Note a function that has run."""
        if not isinstance(result, Tensor):
            if result is None and name_of(func) == "__setitem__":
                result = args[0]
            elif type(result) is Size or not isinstance(result, (tuple, list)):
                return
        role = _role(func)
        parents: list[_Node] = []
        sizes: tuple[int, ...] = ()
        if role != _PLAIN:
            name = name_of(func)
            if name == "baddbmm":
                args = args[1:]
            elif name in _JOINS:
                sizes = _joined_sizes(*args, **kwargs)
        self._add_nodes(args, parents)
        if kwargs:
            self._add_nodes(kwargs.values(), parents)
        if isinstance(result, Tensor):
            self._nodes[id(result)] = _Node(result, parents, role, sizes)
            return
        for one in result:
            if isinstance(one, Tensor):
                self._nodes[id(one)] = _Node(one, parents, role, sizes)

    def _add_nodes(self, items: Iterable[Any], parents: list[_Node]) -> None:
        """Add the nodes of the tensors among a function's arguments; parameters are no inputs."""
        nodes = self._nodes
        for item in items:
            kind = type(item)
            if kind is Tensor or (kind is not nn.Parameter and isinstance(item, Tensor)):
                node = nodes.get(id(item))
                if node is None or node.reference() is not item:
                    nodes[id(item)] = node = _Node(item)
                parents.append(node)
            elif kind is list or kind is tuple:
                self._add_nodes(item, parents)

    def _node_of(self, tensor: Tensor) -> _Node:
        node = self._nodes.get(id(tensor))
        if node is None or node.reference() is not tensor:
            self._nodes[id(tensor)] = node = _Node(tensor)
        return node

    def of_query_and_key(self, query: Tensor, key: Tensor, calls: Sequence[ModuleCall]) -> Origin:
        """Where they come from, by the calls under way; the last is the innermost."""
        return self._origin(self._known(query), self._known(key), calls, query.shape[-2], key.shape[-2])

    def of_weights(self, weights: Tensor, calls: Sequence[ModuleCall]) -> tuple[Origin, Tensor | None]:
        """Where the queries and keys of which weights were computed come from; and the keys, if they still exist."""
        frame = self._frame(calls, len(calls) - 1)
        best, sides = 0, None
        for product in _products(self._known(weights), frame.inputs):
            rooted = sum(bool(_roots(frame.trace(side))) for side in product.parents[:2])
            if rooted >= best:
                best, sides = rooted + 1, product.parents[:2]
            if rooted == 2:
                break
        if sides is None:
            return Origin(None, {}), None
        query, key = sides
        return self._origin(query, key, calls, weights.shape[-2], weights.shape[-1]), _living_keys(key)

    def _known(self, tensor: Tensor) -> _Node:
        """The node of a tensor, or of the one that it is a view of."""
        known = self._nodes.get(id(tensor))
        base = getattr(tensor, "_base", None)
        return self._node_of(tensor if base is None or (known is not None and known.reference() is tensor) else base)

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
            of_query, of_key = frame.trace(query), frame.trace(key)
            if around is not None and not any(part.is_projected for part in (*of_query, *of_key)):
                continue  # the module is handed query and key: the one around it has made them
            kind = _kind(of_query, of_key)
            parts = _joined(of_query, of_key, frame.inputs, queries, keys)
            is_unseen = kind is None and len(frame.inputs) == 1  # by functions that are not seen
            is_given_twice = kind == "cross" and around is not None and _is_one_sequence(of_query, of_key, around)
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
    # One of them has more, such as positions; tokens that were joined to it count if they are no keys of earlier steps.
    more = [part for part in (*of_query, *of_key) if not part.roots <= (query & key)]
    return "cross" if any(part.tokens is not None and part.is_projected for part in more) else "self"


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


def _products(weights: _Node, inputs: Container[_Node]) -> Iterator[_Node]:
    """The matrix products of two tensors that weights were computed from, the last one first."""
    waiting, seen = deque([weights]), {weights}
    while waiting:
        node = waiting.popleft()
        if node.role == _PRODUCT and len(node.parents) >= 2:
            yield node
        elif node not in inputs:
            fresh = [parent for parent in node.parents if parent not in seen]
            seen.update(fresh)
            waiting += fresh


def _living_keys(node: _Node) -> Tensor | None:
    """The keys, (..., keys, width), of which a product took the transpose; None where they are gone."""
    tensor = node.reference()
    if tensor is not None:
        return tensor.mT if tensor.ndim > 1 else None
    while tensor is None and node.role == _PLAIN and node.parents:
        node = node.parents[0]
        tensor = node.reference()
    return tensor


def _joined_sizes(tensors: Sequence[Tensor], dim: int = 0, **_: Any) -> tuple[int, ...]:
    """The lengths that torch.cat joins; none if some of the tensors are parameters, which are not noted."""
    if any(type(tensor) is nn.Parameter for tensor in tensors):
        return ()
    # An empty tensor may have one axis only: that of a cache which is empty yet.
    return tuple(tensor.shape[dim] if tensor.numel() else 0 for tensor in tensors)


def _makers(node: _Node) -> Sequence[_Node]:
    """What a tensor was made of, without what only modulates it: a scale, a mask, the cosines of rotary positions."""
    if node.role != _PLAIN or len(node.parents) < 2:
        return node.parents
    return [parent for parent in node.parents if parent.size >= node.size] or node.parents


def _made(node: _Node, parents: Sequence[_Parts]) -> _Parts:
    if not parents:
        return _NOTHING
    first = parents[0]
    if len(first) == 1 and all(parts is first for parts in parents):  # as nearly always
        return first if node.role != _PRODUCT or first[0].is_projected else (first[0]._replace(is_projected=True),)
    if node.sizes and len({_merged(parts).roots for parts in parents}) > 1:
        return tuple(part._replace(tokens=size) for size, part in zip(node.sizes, map(_merged, parents), strict=True))
    longest = max(parents, key=len)
    if len(longest) > 1 and all(len(parts) == 1 or parts == longest for parts in parents):
        whole = frozenset(_roots(longest))
        made = longest if all({*_roots(parts)} <= whole for parts in parents) else (_merged(sum(parents, ())),)
    else:
        made = (_merged(sum(parents, ())),)
    if node.role == _PRODUCT:
        made = tuple(part._replace(is_projected=True) for part in made)
    return made


def _merged(parts: _Parts) -> _Part:
    return _Part(None, frozenset(_roots(parts)), any(part.is_projected for part in parts))
