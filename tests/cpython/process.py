"""Run one module of CPython's tests in this process and write down how each test ended; `run.py` starts it.

    python -X frozen_modules=off process.py plain|captured|identity CACHE OUT test_grammar

Everything imported after `begin` comes from the compiled files under CACHE: untouched ones that Python puts there by
itself, or those that `run.py` has rewritten. The engine and the `bytecode` package are not loaded here, so that no part
of them can be rewritten while it works. This file imports nothing at its top that is written in Python.
"""

import _operator  # as its namesakes without underscore, but without their parts in Python
import _signal
import builtins
import gc
import marshal
import resource
import sys

HOOK = "__get_local__"
LIBRARY: str
MEMORY = 4 << 30
"""Bytes that a test gone wild may take."""


def begin(mode: str, cache: str) -> None:
    """Put the hook in place, take imports from the cache, and exchange what start-up has imported before."""
    global LIBRARY
    sys.path.pop(0)  # this file's folder
    _signal.signal(_signal.SIGINT, _signal.default_int_handler)  # a shell's background jobs are started without it
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    # Takes a key and a value, keeps neither, and shows no frame: the least that a hook can be.
    setattr(builtins, HOOK, _operator.is_)
    import os

    LIBRARY = os.path.dirname(os.__file__) + os.sep
    sys.pycache_prefix = cache
    if mode != "plain":
        exchange_what_start_up_imported()


FROZEN = ("importlib._bootstrap", "importlib._bootstrap_external", "zipimport")
"""Modules that are part of the interpreter; their functions give such names, in <>, for their file."""


def source_of(module) -> str | None:
    """The file that a module of the standard library was made from."""
    name = getattr(getattr(module, "__spec__", None), "name", "").replace("_frozen_importlib", "importlib._bootstrap")
    if name in FROZEN:
        return f"{LIBRARY}{name.replace('.', '/')}.py"
    file = getattr(module, "__file__", None)
    return file if isinstance(file, str) and file.startswith(LIBRARY) and file.endswith(".py") else None


def rewritten_codes(source: str) -> dict:
    """The code objects of a file as `run.py` has rewritten them, by name and line; None where two have the same."""
    from importlib.util import cache_from_source

    found: dict = {}
    try:
        with open(cache_from_source(source), "rb") as file:
            codes = [marshal.loads(file.read()[16:])]
    except FileNotFoundError:
        return found
    while codes:
        code = codes.pop()
        codes.extend(one for one in code.co_consts if isinstance(one, type(code)))
        place = code.co_qualname, code.co_firstlineno
        found[place] = None if place in found else code
    return found


def exchange_what_start_up_imported() -> None:
    """Give functions that are there already the code that their file has in the cache."""
    sources = {f"<frozen {name}>": f"{LIBRARY}{name.replace('.', '/')}.py" for name in FROZEN}
    sources |= {source: source for source in map(source_of, list(sys.modules.values())) if source}
    codes = {seen: rewritten_codes(source) for seen, source in sources.items()}
    for function in gc.get_objects():
        if type(function) is type(begin) and function.__code__.co_filename in codes:
            code = function.__code__
            new = codes[code.co_filename].get((code.co_qualname, code.co_firstlineno))
            if new and (new.co_varnames, new.co_freevars) == (code.co_varnames, code.co_freevars):
                function.__code__ = new


class Identity:
    """Compares what reaches the hook with what the frame holds, by identity.

    The hook looks no name up while it runs: tests replace builtins such as `len` by functions of their own.
    """

    def __init__(self):
        self.calls = self.values = 0
        self.mismatches = []
        self.hook = self.make_hook(self.make_reader())

    def make_hook(self, identities, length=len, zip=zip, id=id, frame_of=sys._getframe):
        names_of = {}

        def hook(key, values):
            names = names_of.get(key)
            if names is None:
                names = names_of[key] = tuple(key.split(" "))
            if length(names) == 1:
                values = (values,)
            self.calls += 1
            self.values += length(names)
            frame = frame_of(1)
            for name, value, there in zip(names, values, identities(frame, names)):
                # The hook stands for an unbound variable; one that goes through all builtins may hold it as well.
                if id(value) != there and not (value is hook and there == 0):
                    self.report(frame.f_code, name, value, there)

        return hook

    def report(self, code, name, value, there, type=type):
        kind = f"{type(value).__name__}{'' if there else ', unbound in the frame'}"
        self.mismatches.append(f"{code.co_filename.removeprefix(LIBRARY)}:{code.co_qualname}: {name} ({kind})")

    def make_reader(self):
        """A function that gives the ids of what a frame's variables hold, 0 for unbound, and changes nothing by it."""
        return self.reader_by_proxy() if sys.version_info >= (3, 13) else self.reader_of_memory()

    def reader_by_proxy(self, id=id, KeyError=KeyError):
        """From 3.13 on f_locals is a view of the frame; before, reading it copies variables about."""

        def identities(frame, names):
            held = frame.f_locals
            found = []
            for name in names:
                try:
                    found.append(id(held[name]))
                except KeyError:
                    found.append(0)
            return found

        return identities

    def reader_of_memory(self, id=id):
        """3.11 and 3.12: the addresses are read from the frame's memory, without taking references."""
        import ctypes

        word = ctypes.sizeof(ctypes.c_void_p)
        at = ctypes.c_size_t.from_address
        cell_type = id(type((lambda: word).__closure__[0]))
        places = {}

        def identities(frame, names):
            # PyFrameObject: count, type, f_back, f_frame; _PyInterpreterFrame: eight words, eight bytes, the variables.
            code = frame.f_code
            _, where = places.get(id(code), (None, None))
            if where is None:
                own = (*code.co_varnames, *(n for n in code.co_cellvars if n not in code.co_varnames))
                order = {name: index for index, name in enumerate((*own, *code.co_freevars))}
                cells = {*code.co_cellvars, *code.co_freevars}
                where = [(order[name] * word, name in cells) for name in names]
                places[id(code)] = code, where  # with the code, so that no other takes its id
            start = at(id(frame) + 3 * word).value + 8 * word + 8
            found = []
            for offset, is_cell in where:
                address = at(start + offset).value
                # 3.12: a plain local that a comprehension makes a cell of, and only where that has been run.
                if is_cell and address and at(address + word).value == cell_type:
                    address = at(address + 2 * word).value  # what the cell holds
                found.append(address)
            return found

        return identities


def functions_alive() -> tuple[int, list[str]]:
    """How many functions of the library are rewritten by now, and those with locals that are not."""
    from opcode import opmap

    returns = {opmap[name] for name in ("RETURN_VALUE", "RETURN_CONST") if name in opmap}
    codes = {f.__code__ for f in gc.get_objects() if type(f) is type(begin)}
    rewritten, left = 0, []
    while codes:
        code = codes.pop()
        codes.update(one for one in code.co_consts if isinstance(one, type(code)))
        if HOOK in code.co_names:
            rewritten += 1
        elif code.co_flags & 1 and (code.co_varnames or code.co_freevars or code.co_cellvars):
            returning = not returns.isdisjoint(code.co_code[::2])
            if returning and code.co_filename.startswith((LIBRARY, "<frozen ")):
                left.append(f"{code.co_filename.removeprefix(LIBRARY)}:{code.co_qualname}:{code.co_firstlineno}")
    return rewritten, sorted(left)


def main() -> None:
    mode, cache, out, name = sys.argv[1:]
    begin(mode, cache)
    import json
    import unittest
    from importlib import import_module

    class Results(unittest.TextTestResult):
        """Each test's id with how it ended."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.ended = {}

        def note(self, test, how):
            if isinstance(test, unittest.case._SubTest):  # its own id shows arguments, and addresses in them
                test, how = test.test_case, f"part {how}"
            self.ended.setdefault(test.id(), []).append(how)

        def addSuccess(self, test):
            super().addSuccess(test)
            self.note(test, "passed")

        def addError(self, test, error):
            super().addError(test, error)
            self.note(test, f"error: {error[0].__name__}")

        def addFailure(self, test, error):
            super().addFailure(test, error)
            self.note(test, "failed")

        def addSkip(self, test, reason):
            super().addSkip(test, reason)
            self.note(test, "skipped")

        def addExpectedFailure(self, test, error):
            super().addExpectedFailure(test, error)
            self.note(test, "failed as expected")

        def addUnexpectedSuccess(self, test):
            super().addUnexpectedSuccess(test)
            self.note(test, "passed unexpectedly")

        def addSubTest(self, test, subtest, error):
            super().addSubTest(test, subtest, error)
            if error is not None:
                how = "failed" if issubclass(error[0], test.failureException) else f"error: {error[0].__name__}"
                self.note(subtest, how)

    identity = Identity()
    from test import support

    support.use_resources = {}  # as `python -m test` does: no network, no large files, nothing that takes minutes
    support.verbose = 0
    if mode == "identity":
        setattr(builtins, HOOK, identity.hook)
    try:
        module = import_module(f"test.{name}")
        suite = unittest.defaultTestLoader.loadTestsFromModule(module)
    except unittest.SkipTest as skip:
        ended = {f"test.{name}": [f"skipped as a whole: {skip}"]}
        log = ""
    else:
        import io

        stream = io.StringIO()
        runner = unittest.TextTestRunner(stream=stream, resultclass=Results, warnings="default")
        ended = runner.run(suite).ended
        log = stream.getvalue()
    if mode == "identity":
        setattr(builtins, HOOK, _operator.is_)
    files = {source_of(one) for one in list(sys.modules.values())} - {None}
    rewritten, left = functions_alive()
    with open(out, "w", encoding="utf-8", errors="backslashreplace") as file:
        json.dump(
            {
                "ended": ended,
                "log": log,
                "files": sorted(files),
                "functions": rewritten,
                "left": left,
                "calls": identity.calls,
                "values": identity.values,
                "mismatches": identity.mismatches,
            },
            file,
        )


if __name__ == "__main__":
    main()
