"""What stands for what: the Python functions behind the objects that users name, and whose calls are meant."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import types
import weakref
from collections.abc import Iterable, Iterator
from itertools import chain, count
from types import FunctionType
from typing import Any, NamedTuple

from .. import opcodes
from ..errors import RewriteError, UnknownLocalError, did_you_mean, warn
from ..rewrite import At, assigns, local_names, rebinds
from .patches import place_of


class Site(NamedTuple):
    """A function to capture from, and for whom."""

    function: Any  # a FunctionType, which mypy would take for a method here
    names: tuple[str, ...]
    base: str
    """The key of what it brings; behind a module's path, where `owners` has paths."""
    owners: Owners | None
    """The objects whose calls of it are meant; None: every call."""


def beginning(base: str, path: str | None) -> str:
    """What the keys of a site begin with, for the object of this path."""
    return base if not path else f"{path}.{base}" if base else path


class Owners:
    """The objects whose calls are meant, with their paths. It keeps none of them alive."""

    def __init__(self) -> None:
        self._paths: dict[int, str] = {}
        self._alive: dict[int, Any] = {}
        self._has_told = False

    def add(self, owner: Any, path: str) -> None:
        """Mean this object's calls too."""
        number = id(owner)
        paths, alive = self._paths, self._alive

        def forget(_: Any) -> None:
            paths.pop(number, None)
            alive.pop(number, None)

        paths[number] = path
        try:
            alive[number] = weakref.ref(owner, forget)
        except TypeError:  # it has slots and none for weak references
            alive[number] = owner

    def has(self, owner: Any) -> bool:
        """Whether the object has a path already."""
        return id(owner) in self._paths

    def path_of(self, owner: Any) -> str | None:
        """The path of the object, or None where its calls are not meant."""
        path = self._paths.get(id(owner))
        if path is None and not self._has_told and getattr(owner, "__dict__", {}).get("_is_replica"):
            self._has_told = True
            warn(
                f"a {type(owner).__qualname__} is a copy that nn.DataParallel made of the model: it is not recorded. "
                "Capture from the class's forward instead of the model, or use one device."
            )
        return path


class _InstancesOf(Owners):
    """All instances of a class that inherits the function which is captured from, and the class, for class methods."""

    def __init__(self, cls: type) -> None:
        super().__init__()
        self._class = cls

    def path_of(self, owner: Any) -> str | None:
        of_the_class = isinstance(owner, self._class) or (isinstance(owner, type) and issubclass(owner, self._class))
        return "" if of_the_class else None


def sites_of(target: Any, names: tuple[str, ...], at: At) -> tuple[list[Site], list[tuple[str, str]]]:
    """Where the locals are to be captured from, for all that `capture` takes; and each key's beginning with its local.

    Raises:
        UnknownLocalError: nothing in a target has one of the names.
        ValueError: with at="assign", nothing in a target assigns to one of them.
        TypeError, ValueError, ImportError, AttributeError: a target is not of the kinds that can be captured from, or
            a dotted name leads nowhere.
    """
    sites: list[Site] = []
    keys: list[tuple[str, str]] = []
    named: dict[Any, str] = {}
    modules: dict[Any, Site] = {}
    for item, prefix in _flattened(target, ""):
        if _is_module(item):
            _add_module(item, names, at, prefix, modules, keys)
            continue
        for site in _class_sites(item, names, at) if isinstance(item, type) else [_function_site(item, names, at)]:
            function, base = site.function, site.base
            identity = function, site.names, item if site.owners is not None else None
            if identity in named:  # the same function by two names
                continue
            # Functions of one qualified name in two modules get two keys.
            place = f"{function.__module__}.{base}"
            candidates = chain((base, place), (f"{place}@{number}" for number in count(2)))
            named[identity] = base = next(key for key in candidates if key not in named.values())
            sites.append(site._replace(base=base))
            keys += [(base, name) for name in site.names]
    sites = [*modules.values(), *sites]
    for site in sites:
        _check_owner(site, at)
    return sites, keys


def _check_owner(site: Site, at: At) -> None:
    """TypeError where nothing in a function's calls says whose they are."""
    if site.owners is None:
        return
    function, owner = site.function, _owner(site.function)
    if owner is None:
        reason = "has no parameter of its own for the object whose method is called"
    elif at == "return" and rebinds(function.__code__, owner):
        reason = f"binds its parameter {owner!r} anew or deletes it (at='assign' looks at it before)"
    else:
        return
    raise TypeError(
        f"{place_of(function)} {reason}, so nothing tells whose call returns. Capture from the function itself, "
        f"which means all objects' calls: capture({function.__qualname__}, {', '.join(map(repr, site.names))})."
    )


def _flattened(target: Any, prefix: str) -> Iterator[tuple[Any, str]]:
    """The targets of a list of any depth, dotted names imported; modules in it with the index as first path part."""
    if isinstance(target, str):
        yield _imported(target), prefix
    elif isinstance(target, (list, tuple)):
        if not target:
            raise ValueError("capture has nothing to capture from: the list of targets is empty")
        for index, item in enumerate(target):
            yield from _flattened(item, f"{prefix}{index}.")
    else:
        yield target, prefix


def _imported(text: str) -> Any:
    module_name, colon, qualname = text.partition(":")
    if not colon or not qualname or not module_name:
        raise ValueError(f"{text!r} is no target: write 'package.module:function' or 'package.module:Class.method'")
    found: Any = importlib.import_module(module_name)
    for part in qualname.split("."):
        try:
            # Not getattr, which would bind a class method, or run a property.
            found = inspect.getattr_static(found, part) if isinstance(found, type) else getattr(found, part)
        except AttributeError:
            hint = did_you_mean(dir(found), part)
            raise AttributeError(f"{text!r} leads nowhere: there is no {part!r}{hint}") from None
    return found


def _is_module(target: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(target, torch.nn.Module)


def _function_site(target: Any, names: tuple[str, ...], at: At) -> Site:
    if not any(True for _ in functions_behind(target)):
        raise TypeError(
            "capture takes an nn.Module, a function, method or class, 'package.module:name', or a list of these; "
            f"{_short(target)} has no Python code to capture from"
        )
    function = function_with(target, names, at)
    owners, method = None, _bound_method(target)
    is_its_own = method is not None and function in functions_behind(method)  # and not a wrapper around it
    if method is not None and is_its_own and not isinstance(method.__self__, type):
        owners = Owners()
        owners.add(method.__self__, "")
    return Site(function, names, function.__qualname__, owners)


def _bound_method(target: Any) -> types.MethodType | None:
    """The method of an object that it is, behind a partial or a wrapper such as torch.compile's too."""
    return next((item for item in _layers(target) if isinstance(item, types.MethodType)), None)


def _class_sites(cls: type, names: tuple[str, ...], at: At) -> list[Site]:
    """The class's methods that have the locals: its `forward` before any other."""
    members = _members(cls, (object, *_base_of_modules()))
    methods = {name: list(functions_behind(member)) for name, member in members.items()}
    wanted: dict[FunctionType, list[str]] = {}
    for name in names:
        having = _having(methods, name, at)
        if not having:
            raise _nothing_has(name, at, f"no method of {cls.__qualname__} has", {cls: methods})
        for function in having.values():
            wanted.setdefault(function, []).append(name)
    everybodys = {
        function
        for name, member in members.items()
        if name in vars(cls) or any(isinstance(layer, staticmethod) for layer in _layers(member))
        for function in functions_behind(member)
    }
    return [
        Site(
            function,
            tuple(having_names),
            function.__qualname__,
            None if function in everybodys else _InstancesOf(cls),
        )
        for function, having_names in wanted.items()
    ]


def _add_module(
    module: Any, names: tuple[str, ...], at: At, prefix: str, sites: dict[Any, Site], keys: list[tuple[str, str]]
) -> None:
    """Add every submodule to the sites of the functions of its class that have the locals: `forward` before any other.

    One site serves all modules that run a function: each site is a hook call in it. A module that is in a list of
    targets twice has two keys, and so needs a second one.
    """
    kinds: dict[type, dict[str, list[FunctionType]]] = {}
    found: set[str] = set()
    for path, submodule in named_modules(module):
        path = f"{prefix}{path}".rstrip(".")
        kind = type(submodule)
        if kind not in kinds:
            kinds[kind] = {
                name: [function for function in functions_behind(member) if _owner(function)]
                for name, member in _methods(kind).items()
            }
        methods = kinds[kind]
        if "forward" in vars(submodule):  # put there by hand, or by a library that offloads weights
            methods = {**methods, "forward": _patched_forward(submodule, methods)}
        wanted: dict[tuple[FunctionType, str], list[str]] = {}
        for name in names:
            having = _having(methods, name, at)
            for method, function in having.items():
                found.add(name)
                wanted.setdefault((function, "" if len(having) == 1 else method), []).append(name)
        for (function, base), having_names in wanted.items():
            for again in count():
                way = (function, base, tuple(having_names), again)
                owners = sites.setdefault(way, Site(function, tuple(having_names), base, Owners())).owners
                assert owners is not None
                if not owners.has(submodule):
                    owners.add(submodule, path)
                    break
            keys += [(beginning(base, path), name) for name in having_names]
    for name in names:
        if name not in found:
            raise _nothing_has(name, at, _nowhere_in(module), kinds)


def _having(methods: dict[str, list[FunctionType]], name: str, at: At) -> dict[str, FunctionType]:
    """The methods that have the local, each with the innermost function that has it; `forward` alone if it does."""
    having = {}
    for method, functions in methods.items():
        for function in reversed(functions):
            if _brings(function, name, at):
                having[method] = function
                break
    return {"forward": having["forward"]} if "forward" in having else having


def _brings(function: FunctionType, name: str, at: At) -> bool:
    """Whether capturing the local from the function can bring anything."""
    code = function.__code__
    if name not in local_names(code) or at == "return":
        return name in local_names(code)
    try:
        return opcodes.why_unsupported() is not None or assigns(code, name)
    except RewriteError:
        return True  # a refusal is for those who want it rewritten


def _never_assigned(function: FunctionType, name: str) -> str:
    code = function.__code__
    stars = bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    if name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + stars]:
        what = "it is a parameter"
    elif name in code.co_freevars:
        what = "it is a variable of an outer function"
    else:
        what = "only what is defined inside it does, if anything"
    return (
        f"{place_of(function)} itself never assigns to {name!r}: {what}. "
        "So at='assign' would record nothing; at='return' has its value."
    )


def _base_of_modules() -> tuple[type, ...]:
    torch = sys.modules.get("torch")
    return () if torch is None else (torch.nn.Module,)


def _members(cls: type, ends: tuple[type, ...]) -> dict[str, Any]:
    """What a class and its bases define, up to those that everything shares, nested classes excepted."""
    members: dict[str, Any] = {}
    for base in cls.__mro__:
        if base not in ends:
            for name, member in vars(base).items():
                if not isinstance(member, type):
                    members.setdefault(name, member)
    return members


def _methods(cls: type) -> dict[str, Any]:
    """The methods that a module's call may run, as far up as the class that defines `forward`."""
    mro = cls.__mro__
    above = next((i for i, base in enumerate(mro) if "forward" in vars(base)), -1) + 1
    if not above or mro[above - 1] in _base_of_modules():
        return {}  # a container, which nobody calls
    return {
        name: member
        for name, member in _members(cls, mro[above:]).items()
        if _is_called(name) and not isinstance(member, (staticmethod, classmethod))
    }


def _is_called(attribute: str) -> bool:
    """Whether a class's attribute may be run by calling its objects: `__init__` and its like are not."""
    return attribute == "__call__" or not attribute.startswith("__")


def _patched_forward(module: Any, methods: dict[str, list[FunctionType]]) -> list[FunctionType]:
    """The functions behind a `forward` that was put on the instance, as far as they get the module first."""
    forward = vars(module)["forward"]
    own = {function for functions in methods.values() for function in functions}
    if isinstance(forward, types.MethodType) and forward.__self__ is module:
        own.update(functions_behind(forward))
    behind = [function for function in functions_behind(forward) if function in own and _owner(function)]
    return behind or methods.get("forward", [])


def _owner(function: FunctionType) -> str | None:
    """The parameter that holds the object whose method is called."""
    code = function.__code__
    return code.co_varnames[0] if code.co_argcount else None


def owner_of(site: Site) -> str | None:
    """The parameter by which a site's calls are told apart; None where every call is meant."""
    return None if site.owners is None else _owner(site.function)


WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
}
"""The attributes by which torch's wrappers, by the names of their classes, hold the model that they wrap."""


def named_modules(module: Any) -> Iterator[tuple[str, Any]]:
    """`module.named_modules()`, with the paths that they have in the plain model: without those of wrappers."""
    plain, modules = {"": ""}, {"": module}
    for path, submodule in module.named_modules():
        modules[path] = submodule
        parent, _, name = path.rpartition(".")
        if path:
            holder = modules[parent]
            is_wrapped = name == WRAPPERS.get(type(holder).__name__) and type(holder).__module__.startswith("torch.")
            above = plain[parent]
            plain[path] = above if is_wrapped else f"{above}.{name}" if above else name
        yield plain[path], submodule


def _nowhere_in(module: Any) -> str:
    torch = sys.modules["torch"]
    if isinstance(module, torch.jit.ScriptModule):
        return f"{type(module).__qualname__} is scripted: torch runs it without Python, and nothing in it has"
    count = sum(1 for _ in module.modules()) - 1
    return f"no submodule of {type(module).__qualname__} ({count}, and the model itself) has"


def _nothing_has(
    name: str, at: At, beginning: str, kinds: dict[type, dict[str, list[FunctionType]]]
) -> ValueError | UnknownLocalError:
    """The error for a local that is nowhere, with those that are, by class: its `forward` first, torch's own last."""
    everything = (function for methods in kinds.values() for functions in methods.values() for function in functions)
    having = next((function for function in everything if name in local_names(function.__code__)), None)
    if having is not None and at == "assign":
        return ValueError(_never_assigned(having, name))
    lines: dict[str, tuple[str, ...]] = {}
    pairs = [(kind, method, functions) for kind, methods in kinds.items() for method, functions in methods.items()]
    pairs.sort(key=lambda pair: (pair[1] != "forward", pair[0].__module__.startswith("torch.")))
    for kind, method, functions in pairs:
        known = tuple(name for function in functions[-1:] for name in local_names(function.__code__) if name != "self")
        if known:
            lines[f"{kind.__qualname__}.{method}"] = known
    everywhere = list(dict.fromkeys(local for known in lines.values() for local in known))
    listing = [f"\n  {where}: {', '.join(known)}" for where, known in lines.items()]
    if len(listing) > _LISTED:
        listing[_LISTED:] = [f"\n  and {len(listing) - _LISTED} more functions"]
    hint = did_you_mean(everywhere, name) or "."
    existing = f" The locals that exist:{''.join(listing)}" if listing else ""
    return UnknownLocalError(f"{beginning} a local {name!r}{hint}{_elsewhere(name, at, kinds)}{existing}")


def _elsewhere(name: str, at: At, kinds: Iterable[type]) -> str:
    """A sentence on what the classes define that has the local and is none of the methods that were looked at."""
    found = dict.fromkeys(
        f"{base.__qualname__}.{attribute}"
        for kind in kinds
        for base in kind.__mro__
        if base not in (object, *_base_of_modules())
        for attribute, member in vars(base).items()
        if _is_called(attribute) and not isinstance(member, type)
        if any(_brings(function, name, at) for function in functions_behind(member))
    )
    places = list(found)[:5]
    ways = " or ".join(f"capture({place}, {name!r})" for place in places)
    return f" {' and '.join(places)} {'has' if len(places) == 1 else 'have'} it: {ways}." if places else ""


_LISTED = 60


def function_with(target: Any, names: tuple[str, ...], at: At) -> FunctionType:
    """The Python function behind a decorated object that has all the names: the innermost such.

    Raises:
        UnknownLocalError: none has them all.
        ValueError: with at="assign", none assigns to them all.
        TypeError: there is no Python code.
    """
    functions = list(functions_behind(target))
    if not functions:
        raise TypeError(_no_code(target))
    if isinstance(target, type) and _definer_of_forward(target) in _base_of_modules():
        raise TypeError(
            f"get_local takes the forward of an nn.Module class, and {target.__qualname__} defines none."
            f"{_own_methods(target, names)}"
        )
    for function in reversed(functions):
        if all(_brings(function, name, at) for name in names):
            return function
    for function in reversed(functions):
        if set(names) <= set(local_names(function.__code__)):
            raise ValueError(_never_assigned(function, next(n for n in names if not _brings(function, n, at))))
    raise UnknownLocalError(_unknown(target, functions[-1], names))


def functions_behind(target: Any) -> Iterator[FunctionType]:
    """The Python functions that an object runs, from the outermost wrapper to the wrapped function."""
    if isinstance(target, type):
        if not _is_module_class(target):
            return iter(())
        target = inspect.getattr_static(target, "forward")
    return (item for item in _layers(target) if type(item) is FunctionType)


def _layers(target: Any) -> Iterator[Any]:
    """An object and what it wraps, layer by layer, the outermost first."""
    seen: dict[int, Any] = {}  # the objects too: another one that is made meanwhile must not get the number of one
    waiting = [target]
    while waiting:
        item = waiting.pop(0)
        if item is None or id(item) in seen:
            continue
        seen[id(item)] = item
        yield item
        if isinstance(item, property):
            waiting.extend([item.fdel, item.fset, item.fget])
        elif isinstance(item, (staticmethod, classmethod, types.MethodType)):
            waiting.append(item.__func__)
        else:
            if isinstance(item, _WITH_FUNC):
                waiting.append(item.func)
            # Only one that it really has: a `__getattr__` may answer to any name, or raise anything.
            if inspect.getattr_static(item, "__wrapped__", None) is not None:
                waiting.append(getattr(item, "__wrapped__", None))


_WITH_FUNC = (
    functools.partial,
    functools.partialmethod,
    functools.cached_property,
    functools.singledispatchmethod,  # the default implementation
)


def _is_module_class(target: type) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and issubclass(target, torch.nn.Module)


def _no_code(target: Any) -> str:
    if isinstance(target, type):
        return (
            f"get_local decorates functions, and {target.__qualname__} is a class that is no nn.Module: "
            "put the decorator above the method that has the local"
        )
    kind = "a builtin or compiled function" if inspect.isroutine(target) else f"of type {type(target).__qualname__}"
    return f"get_local needs a function with Python code, and {_short(target)} is {kind}"


def why_shared(target: Any, names: tuple[str, ...]) -> str | None:
    """What to say of a decorated class whose forward is another's too; None where it is its own."""
    if not isinstance(target, type) or "forward" in vars(target):
        return None
    own, base = target.__qualname__, _definer_of_forward(target).__qualname__
    return (
        f"{own} inherits its forward, so get_local takes {base}.forward, which all {base} objects run: they are all "
        f"recorded. Decorate {base} to say so, or record {own} objects alone: capture({own}, "
        f"{', '.join(map(repr, names))})."
    )


def _definer_of_forward(cls: type) -> type:
    return next(base for base in cls.__mro__ if "forward" in vars(base))


def _own_methods(cls: type, names: tuple[str, ...]) -> str:
    """A sentence on the methods that a class itself defines that have the locals."""
    methods = [
        method.__qualname__
        for method in vars(cls).values()
        if isinstance(method, FunctionType) and set(names) <= set(local_names(method.__code__))
    ]
    return f" Decorate {' or '.join(methods)}, which has it." if methods else ""


def _short(target: Any) -> str:
    text = repr(target)
    return text if len(text) <= 80 else f"an instance of {type(target).__qualname__}"


def _unknown(target: Any, function: FunctionType, names: tuple[str, ...]) -> str:
    code = function.__code__
    known = local_names(code)
    missing = [name for name in names if name not in known]
    message = f"{place_of(function)} has no local {' and no local '.join(map(repr, missing))}"
    hint = did_you_mean(known, *missing)
    if hint:
        message += hint
    elif any(name in code.co_names for name in missing):
        message += "; the name is a global or an attribute there: assign it to a local first."
    else:
        message += "."
    message += f" It has: {', '.join(known)}." if known else " It has no locals at all."
    if isinstance(target, type):
        message += _own_methods(target, names)
    for inner in _enclosed(function):
        if set(names) <= set(local_names(inner.__code__)):
            message += (
                f" {place_of(inner)}, which it uses, has it. If a decorator made {function.__qualname__} of that, "
                "put @get_local beneath the decorator, or functools.wraps into it."
            )
    return message


def _enclosed(function: FunctionType) -> Iterator[FunctionType]:
    """The functions among the variables of outer functions that a function uses."""
    for cell in function.__closure__ or ():
        try:
            content = cell.cell_contents
        except ValueError:  # not bound yet
            continue
        yield from functions_behind(content)
