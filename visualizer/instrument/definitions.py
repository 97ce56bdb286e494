"""Which decorated functions are one function of the source, and under which keys their values are."""

from __future__ import annotations

import ast
import linecache
import warnings
from itertools import count
from types import CodeType, FunctionType
from typing import Any

from ..store import Channel


class Definition:
    """One function in the source, however many times it is defined: its keys, and what its decorators capture."""

    def __init__(self, function: FunctionType) -> None:
        self.module, self.name = function.__module__ or "?", function.__qualname__
        self.file, self.line = _place(function)
        self.base = self.name
        """The key of its values, or the key's beginning: the name, unless another function has the same."""
        self.variables: list[str] = []
        self.channels: dict[tuple[Any, ...], Channel] = {}
        """One for each set of the decorator's arguments; all definitions of the function share them."""

    def key(self, variable: str, _: str | None = None) -> str:
        """The key of the values of a variable."""
        return self._with(self.base, variable)

    def short_key(self, variable: str) -> str:
        """The key that it would have if no other function had the name."""
        return self._with(self.name, variable)

    def _with(self, base: str, variable: str) -> str:
        return base if self.variables == [variable] else f"{base}:{variable}"

    @property
    def captured(self) -> list[str]:
        """The variables that it captures now, and those that earlier definitions did."""
        names = [name for channel in self.channels.values() for name in channel.names]
        return list(dict.fromkeys([*self.variables, *names]))


class Definitions:
    """The functions that were decorated."""

    def __init__(self) -> None:
        self._by_name: dict[str, list[Definition]] = {}
        self._by_base: dict[str, Definition] = {}

    def of(self, function: FunctionType) -> Definition:
        """The function in the source that this is a definition of; a new one is not known before `add`.

        A name that is defined again, in a reloaded module or a cell that is run again, is one function. So are all
        functions that one line makes. Two functions of a name in one file are two if its source still has both: a
        property's getter and setter, a class defined twice. Lambdas, and functions that are called `_` because nobody
        needs their names, are one only if they are in one file.
        """
        new = Definition(function)
        known = [definition for definition in self.named(new.name) if definition.module == new.module]
        for definition in known:
            if (definition.file, definition.line) == (new.file, new.line):
                return definition
        lines = _lines_of(function) if known else set()
        if new.line not in lines:  # some tools that reload a function compile it alone, as if it began on line 1
            lines = set()
        is_nameless = new.name.rpartition(".")[2] in ("<lambda>", "_")
        for definition in known:
            # Defined again: the source has it elsewhere now.
            is_gone = definition.file == new.file and definition.line not in lines
            is_cell_run_again = definition.file != new.file and not is_nameless
            if is_gone or is_cell_run_again:
                return definition
        return new

    def named(self, name: str) -> list[Definition]:
        """The functions of a qualified name, in the order of their first definitions."""
        return self._by_name.get(name, [])

    def add(self, definition: Definition, function: FunctionType) -> None:
        """Remember a function of which this is the latest definition; others of its name may get other keys."""
        definition.file, definition.line = _place(function)
        family = self._by_name.setdefault(definition.name, [])
        if definition not in family:
            family.append(definition)
        elif len(family) == 1:
            return
        for other in family:
            self._by_base.pop(other.base, None)
        for other in family:
            other.base = self._base(other, family)
            self._by_base[other.base] = other

    def namesakes(self, name: str) -> dict[str, dict[str, str]]:
        """For each short key that several functions would have: their keys, each with file and line."""
        family, found = self.named(name), dict[str, dict[str, str]]()
        for definition in family if len(family) > 1 else ():
            for variable in definition.captured:
                keys = found.setdefault(definition.short_key(variable), {})
                keys[definition.key(variable)] = f"{definition.file}:{definition.line}"
        return found

    def _base(self, definition: Definition, family: list[Definition]) -> str:
        in_module = sum(other.module == definition.module for other in family)
        place = f"{definition.module}.{definition.name}"
        base = place if in_module < len(family) else definition.name
        candidates = [f"{base}@{definition.line}" if in_module > 1 else base, place, f"{place}@{definition.line}"]
        numbered = (f"{candidates[-1]}@{number}" for number in count(2))
        free = [candidate for candidate in candidates if candidate not in self._by_base]
        return free[0] if free else next(base for base in numbered if base not in self._by_base)


def _place(function: FunctionType) -> tuple[str, int]:
    return function.__code__.co_filename, function.__code__.co_firstlineno


def _lines_of(function: FunctionType) -> set[int]:
    """The lines on which the source of a function, as it is now, defines functions of its name; none without source."""
    file = function.__code__.co_filename
    linecache.checkcache(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the source was compiled before
            source = "".join(linecache.getlines(file, function.__globals__))
            # A cell of a notebook may wait for something outside of a function.
            whole = compile(source, file, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    except (SyntaxError, ValueError):
        return set()
    lines, waiting = set(), [whole]
    while waiting:
        code = waiting.pop()
        if code.co_qualname == function.__code__.co_qualname:
            lines.add(code.co_firstlineno)
        waiting += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return lines
