"""Find the functions to capture from, and whose calls are meant, for what a user names."""

from __future__ import annotations

import importlib
import inspect
import weakref
from collections.abc import Iterator
from itertools import chain, count
from types import FunctionType
from typing import Any, NamedTuple

from ..errors import UnknownLocalError, did_you_mean, warn
from ..rewrite import At, local_names, rebinds
from .error_messages import (
    MethodsByClass,
    never_assigned,
    no_code,
    no_forward,
    no_owner,
    no_target,
    nothing_has,
    nowhere_in,
    unknown_local,
)
from .module_paths import is_module, module_classes, named_modules
from .unwrapping import (
    bound_method,
    definer_of_forward,
    forward_of_instance,
    functions_behind,
    has_local,
    layers,
    members,
    methods_of_module,
    methods_with,
    owner_parameter,
)


class Owners:
    """The objects whose calls are recorded, with their paths. It keeps none of them alive."""

    def __init__(self) -> None:
        self._paths: dict[int, str] = {}
        self._alive: dict[int, Any] = {}
        self._has_warned = False

    def add(self, owner: Any, path: str) -> None:
        """Record this object's calls too."""
        number = id(owner)
        paths, alive = self._paths, self._alive

        def remove(_: Any) -> None:
            paths.pop(number, None)
            alive.pop(number, None)

        paths[number] = path
        try:
            alive[number] = weakref.ref(owner, remove)
        except TypeError:  # it has slots and none for weak references
            alive[number] = owner

    def has(self, owner: Any) -> bool:
        """Whether the object has a path already."""
        return id(owner) in self._paths

    @property
    def paths(self) -> list[str]:
        """The paths of the objects that are alive."""
        return list(self._paths.values())

    def path_of(self, owner: Any) -> str | None:
        """The path of the object, or None where its calls are not recorded."""
        path = self._paths.get(id(owner))
        if path is None and not self._has_warned and getattr(owner, "__dict__", {}).get("_is_replica"):
            self._has_warned = True
            warn(
                f"a {type(owner).__qualname__} is a copy that nn.DataParallel made of the model: it is not recorded. "
                "Capture from the class's forward instead of the model, or use one device.",
                "copies-of-dataparallel",
            )
        return path


class InstancesOf(Owners):
    """All instances of a class that inherits the captured function; for class methods the class itself, too."""

    def __init__(self, cls: type) -> None:
        super().__init__()
        self._class = cls

    def path_of(self, owner: Any) -> str | None:
        """ "" for an object of the class, else None."""
        of_the_class = isinstance(owner, self._class) or (isinstance(owner, type) and issubclass(owner, self._class))
        return "" if of_the_class else None


class Site(NamedTuple):
    """A function to capture from, and for whom."""

    function: Any  # a FunctionType, which mypy would take for a method here
    names: tuple[str, ...]
    base: str
    """The key of its values; where `owners` has paths, the path comes before it."""
    owners: Owners | None
    """The objects whose calls of it are recorded; None: every call."""

    @property
    def owner(self) -> str | None:
        """The parameter that holds the object whose method is called; None where every call is recorded."""
        return None if self.owners is None else owner_parameter(self.function)


def beginning(base: str, path: str | None) -> str:
    """The key of a site's values, or its beginning, for the object of this path."""
    return base if not path else f"{path}.{base}" if base else path


def sites_of(target: Any, names: tuple[str, ...], at: At) -> tuple[list[Site], list[tuple[str, str]]]:
    """The sites of everything that `capture` takes; and all keys, as pairs of a key's beginning and a local.

    Raises:
        UnknownLocalError: nothing in a target has one of the names.
        ValueError: with at="assign", nothing in a target assigns to one of them.
        TypeError, ValueError, ImportError, AttributeError: a target is nothing that can be captured from, or a dotted
            name leads nowhere.
    """
    sites: list[Site] = []
    keys: list[tuple[str, str]] = []
    named: dict[Any, str] = {}
    of_modules: dict[Any, Site] = {}
    for item, prefix in _flattened(target, ""):
        if is_module(item):
            _add_module(item, names, at, prefix, of_modules, keys)
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
    sites = [*of_modules.values(), *sites]
    for site in sites:
        _check_owner(site, at)
    return sites, keys


def function_with(target: Any, names: tuple[str, ...], at: At) -> FunctionType:
    """The innermost of the Python functions behind an object that has all the names.

    Raises:
        UnknownLocalError: none has them all.
        ValueError: with at="assign", none assigns to them all.
        TypeError: there is no Python code.
    """
    functions = list(functions_behind(target))
    if not functions:
        raise TypeError(no_code(target))
    if isinstance(target, type) and definer_of_forward(target) in module_classes():
        raise TypeError(no_forward(target, names))
    for function in reversed(functions):
        if all(has_local(function, name, at) for name in names):
            return function
    for function in reversed(functions):
        if set(names) <= set(local_names(function.__code__)):
            raise ValueError(never_assigned(function, next(n for n in names if not has_local(function, n, at))))
    raise UnknownLocalError(unknown_local(target, functions[-1], names))


def _check_owner(site: Site, at: At) -> None:
    """TypeError where one object's calls are wanted and the function does not say whose a call is."""
    if site.owners is None:
        return
    is_rebound = site.owner is not None and at == "return" and rebinds(site.function.__code__, site.owner)
    if site.owner is None or is_rebound:
        raise TypeError(no_owner(site.function, site.names, site.owner))


def _flattened(target: Any, prefix: str) -> Iterator[tuple[Any, str]]:
    """The targets of a list of any depth, dotted names imported; each with its indices, which begin a module's path."""
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
    value: Any = importlib.import_module(module_name)
    for part in qualname.split("."):
        try:
            # Not getattr, which would bind a class method, or run a property.
            value = inspect.getattr_static(value, part) if isinstance(value, type) else getattr(value, part)
        except AttributeError:
            hint = did_you_mean(dir(value), part)
            raise AttributeError(f"{text!r} leads nowhere: there is no {part!r}{hint}") from None
    return value


def _function_site(target: Any, names: tuple[str, ...], at: At) -> Site:
    if not any(True for _ in functions_behind(target)):
        raise TypeError(no_target(target, names))
    function = function_with(target, names, at)
    owners, method = None, bound_method(target)
    is_its_own = method is not None and function in functions_behind(method)  # and not a wrapper around it
    if method is not None and is_its_own and not isinstance(method.__self__, type):
        owners = Owners()
        owners.add(method.__self__, "")
    return Site(function, names, function.__qualname__, owners)


def _class_sites(cls: type, names: tuple[str, ...], at: At) -> list[Site]:
    """The class's methods that have the locals: its `forward` before any other."""
    attributes = members(cls, (object, *module_classes()))
    methods = {name: list(functions_behind(member)) for name, member in attributes.items()}
    names_by_function: dict[FunctionType, list[str]] = {}
    for name in names:
        holders = methods_with(methods, name, at)
        if not holders:
            raise nothing_has(name, at, f"no method of {cls.__qualname__} has", {cls: methods})
        for function in holders.values():
            names_by_function.setdefault(function, []).append(name)
    # All calls of these are the class's own. Those of inherited methods may be of objects of another class.
    own = {
        function
        for name, member in attributes.items()
        if name in vars(cls) or any(isinstance(layer, staticmethod) for layer in layers(member))
        for function in functions_behind(member)
    }
    return [
        Site(function, tuple(its_names), function.__qualname__, None if function in own else InstancesOf(cls))
        for function, its_names in names_by_function.items()
    ]


def _add_module(
    module: Any, names: tuple[str, ...], at: At, prefix: str, sites: dict[Any, Site], keys: list[tuple[str, str]]
) -> None:
    """Add every submodule to the sites of the functions of its class that have the locals: `forward` before any other.

    Each site is a hook call in its function, so one serves all modules that run the function. A module that is in a
    list of targets twice has two keys, and so needs a second site.
    """
    classes: MethodsByClass = {}
    available: set[str] = set()
    for path, submodule in named_modules(module):
        path = f"{prefix}{path}".rstrip(".")
        cls = type(submodule)
        if cls not in classes:
            classes[cls] = methods_of_module(cls)
        methods = classes[cls]
        if "forward" in vars(submodule):  # put there by hand, or by a library that offloads weights
            methods = {**methods, "forward": forward_of_instance(submodule, methods)}
        wanted: dict[tuple[FunctionType, str], list[str]] = {}
        for name in names:
            holders = methods_with(methods, name, at)
            for method, function in holders.items():
                available.add(name)
                wanted.setdefault((function, "" if len(holders) == 1 else method), []).append(name)
        for (function, base), its_names in wanted.items():
            for repetition in count():
                identity = (function, base, tuple(its_names), repetition)
                owners = sites.setdefault(identity, Site(function, tuple(its_names), base, Owners())).owners
                assert owners is not None
                if not owners.has(submodule):
                    owners.add(submodule, path)
                    break
            keys += [(beginning(base, path), name) for name in its_names]
    for name in names:
        if name not in available:
            raise nothing_has(name, at, nowhere_in(module), classes)
