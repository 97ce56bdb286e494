"""Which modules of CPython's tests are compared, which are not, and what is known to differ: each with its reason."""

from __future__ import annotations

import re
from dataclasses import dataclass

MODULES = (
    *("test_abc", "test_abstract_numbers", "test_annotationlib", "test_argparse", "test_array", "test_ast"),
    *("test_asyncgen", "test_atexit", "test_augassign", "test_base64", "test_baseexception", "test_binascii"),
    *("test_binop", "test_bisect", "test_bool", "test_bufio", "test_builtin", "test_bytes", "test_calendar"),
    *("test_call", "test_charmapcodec", "test_class", "test_cmath", "test_cmd", "test_code", "test_codeccallbacks"),
    *("test_codecs", "test_codeop", "test_collections", "test_colorsys", "test_compare", "test_complex"),
    *("test_configparser", "test_contains", "test_context", "test_contextlib", "test_contextlib_async", "test_copy"),
    *("test_copyreg", "test_coroutines", "test_csv", "test_dataclasses", "test_datetime", "test_decorators"),
    *("test_defaultdict", "test_deque", "test_descr", "test_descrtut", "test_dict", "test_dictcomps"),
    *("test_dictviews", "test_difflib", "test_doctest", "test_dynamic", "test_dynamicclassattribute", "test_email"),
    *("test_enum", "test_enumerate", "test_eof", "test_errno", "test_except_star", "test_exception_group"),
    *("test_exception_hierarchy", "test_exception_variations", "test_exceptions", "test_extcall", "test_fileinput"),
    *("test_float", "test_flufl", "test_fnmatch", "test_format", "test_fractions", "test_frame", "test_fstring"),
    *("test_funcattrs", "test_functools", "test_gc", "test_generator_stop", "test_generators", "test_genericalias"),
    *("test_genericpath", "test_genexps", "test_getopt", "test_gettext", "test_glob", "test_global", "test_grammar"),
    *("test_graphlib", "test_gzip", "test_hash", "test_hashlib", "test_heapq", "test_hmac", "test_html"),
    *("test_htmlparser", "test_http_cookiejar", "test_http_cookies", "test_index", "test_inspect", "test_int"),
    *("test_int_literal", "test_io", "test_ipaddress", "test_isinstance", "test_iter", "test_itertools", "test_json"),
    *("test_keyword", "test_keywordonlyarg", "test_linecache", "test_list", "test_listcomps", "test_locale"),
    *("test_logging", "test_long", "test_longexp", "test_mailbox", "test_math", "test_memoryio", "test_memoryview"),
    *("test_metaclass", "test_mimetypes", "test_minidom", "test_module", "test_named_expressions", "test_netrc"),
    *("test_numeric_tower", "test_opcodes", "test_operator", "test_optparse", "test_ordered_dict", "test_os"),
    *("test_pathlib", "test_patma", "test_pep646_syntax", "test_pickle", "test_picklebuffer", "test_pickletools"),
    *("test_pkgutil", "test_plistlib", "test_popen", "test_positional_only_arg", "test_posixpath", "test_pow"),
    *("test_pprint", "test_print", "test_property", "test_pstats", "test_pulldom", "test_pyclbr", "test_pyexpat"),
    *("test_queue", "test_quopri", "test_raise", "test_random", "test_range", "test_re", "test_reprlib"),
    *("test_richcmp", "test_rlcompleter", "test_runpy", "test_sax", "test_sched", "test_scope", "test_secrets"),
    *("test_set", "test_setcomps", "test_shelve", "test_shlex", "test_shutil", "test_slice", "test_sort"),
    *("test_sqlite3", "test_statistics", "test_str", "test_strftime", "test_string", "test_string_literals"),
    *("test_stringprep", "test_strptime", "test_strtod", "test_struct", "test_structseq", "test_subclassinit"),
    *("test_sundry", "test_super", "test_symtable", "test_syntax", "test_sys", "test_tarfile", "test_tempfile"),
    *("test_textwrap", "test_threadedtempfile", "test_threading_local", "test_time", "test_timeit", "test_tokenize"),
    *("test_tomllib", "test_traceback", "test_tuple", "test_type_aliases", "test_type_annotations"),
    *("test_type_comments", "test_type_params", "test_typechecks", "test_types", "test_typing", "test_ucn"),
    *("test_unary", "test_unicode", "test_unicode_identifiers", "test_unittest", "test_univnewlines", "test_unpack"),
    *("test_unpack_ex", "test_urllib", "test_urllib2", "test_urllib_response", "test_urlparse", "test_userdict"),
    *("test_userlist", "test_userstring", "test_uuid", "test_warnings", "test_wave", "test_weakref", "test_weakset"),
    *("test_with", "test_wsgiref", "test_xml_dom_minicompat", "test_xml_etree", "test_yield_from", "test_zipfile"),
    *("test_zipimport", "test_zlib", "test_zoneinfo", "test_asyncio.test_base_events"),
    *("test_asyncio.test_buffered_proto", "test_asyncio.test_context", "test_asyncio.test_eager_task_factory"),
    *("test_asyncio.test_events", "test_asyncio.test_futures", "test_asyncio.test_futures2"),
    *("test_asyncio.test_locks", "test_asyncio.test_pep492", "test_asyncio.test_proactor_events"),
    *("test_asyncio.test_protocols", "test_asyncio.test_queues", "test_asyncio.test_runners"),
    *("test_asyncio.test_selector_events", "test_asyncio.test_server", "test_asyncio.test_sock_lowlevel"),
    *("test_asyncio.test_sslproto", "test_asyncio.test_staggered", "test_asyncio.test_streams"),
    *("test_asyncio.test_subprocess", "test_asyncio.test_taskgroups", "test_asyncio.test_tasks"),
    *("test_asyncio.test_threads", "test_asyncio.test_timeouts", "test_asyncio.test_transports"),
    *("test_asyncio.test_unix_events", "test_asyncio.test_waitfor"),
)
"""A version is asked for those that it has."""

LEFT_OUT = {
    "test_compile, test_dis, test_peepholer": "they spell out the bytecode of functions of their own",
    "test_monitoring, test_sys_settrace": "they spell out trace events; an unbound local shows them one exception more",
    "test_bdb, test_pdb, test_sys_setprofile, test_trace": "they step through functions, and into a Python hook",
    "test_cprofile, test_profile": "they spell out all calls of a function, and the hook's are among them",
    "test_compileall, test_import, test_importlib, test_py_compile": "about compiled files, which are the means here",
    "test_threading": "hangs without the engine as well, on some machines",
    "test_concurrent_futures, test_multiprocessing*, test_subprocess": "about other processes, which start untouched",
    "test_selectors": "opens files by the ten thousands, and takes its time",
}
"""Modules whose very subject is what the rewriting changes, or whose result says nothing. Those that are in neither
table are about modules written in C, other platforms, servers, or tools beside the library."""


@dataclass(frozen=True)
class Difference:
    """Tests that end differently under the engine, and why that is right."""

    test: str
    """An id as unittest gives it; * stands for anything."""
    reason: str
    modes: tuple[str, ...] = ("captured", "identity")
    since: str = "3.11"
    until: str = "4"
    sometimes: bool = False
    """It may also end the same."""

    def matches(self, test: str) -> bool:
        """Whether this is about that test."""
        return re.fullmatch(re.escape(self.test).replace(r"\*", ".*"), test) is not None

    def holds(self, mode: str, version: str) -> bool:
        """Whether it differs in that mode on that version."""
        return mode in self.modes and ordered(self.since) <= ordered(version) <= ordered(self.until)


def ordered(version: str) -> tuple[int, ...]:
    """To compare 3.9 with 3.11."""
    return tuple(map(int, version.split(".")))


def place(file: str, function: str, line: int) -> str:
    """How a function is called here; the file is relative to the standard library."""
    return f"{file}:{function}:{line}"


_SEES_THE_NAME = "inspect.getclosurevars lists the globals that the code names: the hook's is among them"
_STEPS_INTO = "it steps through a function with pdb and comes into this mode's hook, which is written in Python"
_NEEDS_A_FRAME = "it goes to the recursion limit, and this mode's hook is one more call, written in Python"
_TAKES_LONGER = "it skips itself where a conversion takes less than 1/64 second, and rewritten it may take longer"
_ALLOCATES = "it lets the first allocation fail that comes, which is now one of this mode's hook"
_OWN_BYTECODE = "it asks CPython's internals what is in its functions' bytecode: a name and returns are counted in it"
_NO_KINDS = "it asks for the kinds of arguments, which any code object made by code.replace() has forgotten"

DIFFERENCES: tuple[Difference, ...] = (
    Difference("test.test_inspect.*TestGetClosureVars.test_generator_closure", _SEES_THE_NAME),
    Difference("test.test_inspect.*TestGetClosureVars.test_method_closure", _SEES_THE_NAME),
    Difference("test.test_inspect.*TestGetClosureVars.test_name_resolution", _SEES_THE_NAME),
    Difference("test.test_inspect.*.test_attribute_same_name_as_global_var", _SEES_THE_NAME, since="3.13"),
    Difference("test.test_doctest.*test_pdb_set_trace", _STEPS_INTO, modes=("identity",)),
    Difference("test.test_doctest.*test_pdb_set_trace_nested", _STEPS_INTO, modes=("identity",)),
    Difference("test.test_doctest.*test_debug", _STEPS_INTO, modes=("identity",), since="3.14"),
    Difference(
        "test.test_descr.ClassPropertiesAndMethods.test_slots",
        "it counts all objects that the collector knows, and the comparison keeps a note about each function it meets",
        modes=("identity",),
        until="3.12",
    ),
    Difference(
        "test.test_tomllib.test_misc.TestMiscellaneous.test_inline_*_recursion_limit",
        _NEEDS_A_FRAME,
        modes=("identity",),
    ),
    Difference("test.test_bytes.ByteArrayTest.test_resize_error", _ALLOCATES, modes=("identity",), since="3.14"),
    Difference("test.test_bytes.ByteArrayTest.test_take_bytes_error", _ALLOCATES, modes=("identity",), since="3.15"),
    Difference("test.test_code.CodeTest.test_local_kinds", _NO_KINDS, since="3.14"),
    Difference("test.test_code.CodeTest.test_returns_only_none", _OWN_BYTECODE, since="3.14"),
    Difference("test.test_code.CodeTest.test_var_counts", _OWN_BYTECODE, since="3.14"),
    Difference(
        "test.test_int.Int*StrDigitLimitsTests.test_denial_of_service_prevented_int_to_str",
        _TAKES_LONGER,
        since="3.12",
        sometimes=True,
    ),
)


def reason(test: str, mode: str, version: str) -> str | None:
    """Why a test differs, if that is known."""
    return next((it.reason for it in DIFFERENCES if it.holds(mode, version) and it.matches(test)), None)


MISMATCHES = {
    f"functools.py:_lru_cache_wrapper.<locals>.{function}: {name}": "a test counts in several threads at once"
    for function in ("wrapper", "cache_info", "cache_clear")
    for name in ("hits", "misses", "full", "root")
}
"""Values that another thread or a handler changes between the load and the comparison, by function and variable."""


def mismatch_reason(mismatch: str) -> str | None:
    """Why a value was not what the frame held, if that is known."""
    variable = mismatch.rpartition(" (")[0]
    return MISMATCHES.get(variable)


LEFT = {
    "test_runpy": "on 3.15 it imports test_import, and all that this needs, with compiled files of its own",
}
"""Modules at whose end functions are alive that are not rewritten."""


def left_reason(module: str) -> str | None:
    """Why functions were not rewritten, if that is known."""
    return LEFT.get(module)
