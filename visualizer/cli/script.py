"""The code of the user: a program, run as Python itself runs it, tracebacks too; or a function that builds a model."""

from __future__ import annotations

import importlib.util
import os
import sys
import zipfile
from collections import UserDict
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType, TracebackType
from typing import Any

from .outcome import Mistake, trying_to

OnDefine = Callable[[str, Any], None]
"""Called with each name that the program's own module defines, and its value."""


class Program:
    """The program of `python script.py ...`, `python folder ...` or `python -m module ...`.

    Raises Mistake where there is no such script. A module is looked up only when it is run.
    """

    def __init__(self, name: str, arguments: list[str], is_module: bool) -> None:
        self._name, self._arguments, self._is_module = name, arguments, is_module
        self._is_folder = not is_module and (os.path.isdir(name) or zipfile.is_zipfile(name))
        self._source = b""
        if not is_module and not self._is_folder:
            with trying_to(f"read the script {name}"), open(name, "rb") as file:
                self._source = file.read()

    @property
    def names(self) -> set[str]:
        """The module names by which a user may mean it."""
        stem = os.path.splitext(os.path.basename(self._name))[0]
        return {"__main__", self._name if self._is_module else stem}

    def run(self, on_define: OnDefine | None = None) -> None:
        """Run it.

        Raises whatever the program raises, and Mistake where there is no such module.
        """
        main = ModuleType("__main__")
        global _before
        _before = sys.modules["__main__"]
        sys.modules["__main__"] = main
        namespace = vars(main)
        namespace["__builtins__"] = sys.modules["builtins"]
        if sys.version_info < (3, 14):
            namespace["__annotations__"] = {}
        code = self._begin(namespace)
        exec(code, namespace, None if on_define is None else _Namespace(namespace, on_define))

    def _begin(self, namespace: dict[str, Any]) -> CodeType:
        """Set `sys.argv`, `sys.path` and the namespace as Python does; returns the program's code."""
        if self._is_module:
            sys.argv = ["-m", *self._arguments]
            _put_first(os.getcwd())
            spec = _spec_of(self._name)
            sys.argv[0] = spec.origin or self._name
        else:
            sys.argv = [self._name, *self._arguments]
            path = os.path.abspath(self._name)
            if not self._is_folder:
                _put_first(os.path.dirname(os.path.realpath(path)))
                namespace["__file__"], namespace["__cached__"] = path, None
                namespace["__loader__"] = SourceFileLoader("__main__", path)
                return compile(self._source, path, "exec", dont_inherit=True)
            sys.path[: not sys.flags.safe_path] = [path]
            main = PathFinder.find_spec("__main__", [path])
            if main is None:
                raise Mistake(f"there is no __main__.py in {self._name}")
            spec = main
        code: CodeType | None = getattr(spec.loader, "get_code", lambda _: None)(spec.name)
        if code is None:
            raise Mistake(f"{self._name} cannot be run: it is not written in Python")
        namespace["__spec__"], namespace["__loader__"], namespace["__package__"] = spec, spec.loader, spec.parent
        namespace["__file__"], namespace["__cached__"] = spec.origin, spec.cached
        return code


_before: ModuleType | None = None
"""The module that was `__main__` before. Its functions still run: without a reference Python would clear them."""


def show_own_frames_only() -> None:
    """Print the traceback of an uncaught exception from the program's own first frame on, without ours above it."""
    hook = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> Any:
        ours = traceback
        while ours is not None and ours.tb_frame.f_code is not Program.run.__code__:
            ours = ours.tb_next
        if ours is not None:
            traceback = ours.tb_next
            while traceback is not None and traceback.tb_frame.f_code.co_filename == __file__:
                traceback = traceback.tb_next
        return hook(kind, error.with_traceback(traceback), traceback)

    sys.excepthook = show


class _Namespace(UserDict[str, Any]):
    """A module's namespace that reports each name that the module's top level defines."""

    def __init__(self, namespace: dict[str, Any], on_define: OnDefine) -> None:
        self.data, self._on_define = namespace, on_define

    def __setitem__(self, name: str, value: Any) -> None:
        self.data[name] = value
        self._on_define(name, value)


def _put_first(folder: str) -> None:
    if not sys.flags.safe_path:  # python -P leaves the folder out
        sys.path[:1] = [folder]


def _spec_of(name: str) -> ModuleSpec:
    """The spec of the module that `python -m name` runs."""
    if not all(part.isidentifier() for part in name.split(".")):
        raise Mistake(f"{name!r} is not the name of a module; to run a file, leave out the -m")
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
            if spec is None:
                raise Mistake(f"{name} cannot be run: it is a package without a __main__ module")
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # it is another module that is missing: one that the package imports
        spec = None
    if spec is None:
        raise Mistake(f"there is no module {name!r}; to run a file, leave out the -m")
    return spec


def is_builder(name: str) -> bool:
    """Whether the name of a model is one of a function: it has a colon, and no file is called so."""
    return ":" in name and not os.path.exists(name)


def build(name: str) -> Any:
    """What `package.module:function` returns, or the model that `package.module:model` is.

    The module may lie in the current folder. Mistake where there is no such function, or where it raises.
    """
    import torch

    module, _, qualname = name.partition(":")
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        value: Any = importlib.import_module(module)
        for part in qualname.split("."):
            value = getattr(value, part)
        if isinstance(value, torch.nn.Module):
            return value
        try:
            return value()
        except Exception as error:
            raise Mistake(f"{name}() raised {type(error).__name__}: {error}") from error
    except (ImportError, AttributeError, ValueError) as error:
        raise Mistake(f"{name!r} leads nowhere: {error}") from error
    finally:
        sys.path.remove(folder)
