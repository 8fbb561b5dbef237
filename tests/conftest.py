"""Settings that hold for all tests."""

import dataclasses
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")

# Kernels run on the CPU, in the interpreter: Triton asks when it is imported, after this.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.pop("TWINGRAD_TRACEBACK", None)  # a developer's: what is tested is the one line

# A shell has what it starts in the background ignore Ctrl-C, and so would the processes that tests stop with it.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup has ignored


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """A command tried in this process sets variables, of threads say: processes of the next test are spared them."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def pytest_collection_finish() -> None:
    """Once the tests have imported what they need: no process imports Triton for this alone."""
    if "triton" in sys.modules:
        _patch_once_a_launch()
        _leave_out_what_is_thrown_away()


def _patch_once_a_launch() -> None:
    """Halve the interpreter's time: what it computes stays the same, bit for bit.

    A launch has each function of triton.language replaced by one that NumPy computes, and puts them back at its end. In
    between, each call of a function that kernels share goes through all of the language again, to find nothing left to
    replace. Here the first call of a launch does, as the modules differ by which a function knows the language.
    """
    from triton.runtime import interpreter

    sound, tl = getattr(interpreter, "_patch_lang", None), getattr(interpreter, "tl", None)
    if sound is None or tl is None or not hasattr(interpreter, "_LangPatchScope"):
        return  # another version of Triton, which is slower at worst
    patched: set[tuple[bool, bool]] = set()

    class Launch(interpreter._LangPatchScope):
        def restore(self) -> None:
            patched.clear()
            super().restore()

    def patch(fn: Any) -> Any:
        known = fn.__globals__.values()
        modules = (any(value is tl for value in known), any(value is tl.core for value in known))
        scope = Launch()
        if modules not in patched:
            patched.add(modules)
            scope._changes = sound(fn)._changes
        return scope

    interpreter._patch_lang = patch


def _leave_out_what_is_thrown_away() -> None:
    """Without its option `debug` the interpreter computes whether integers overflow, and tells nobody."""
    from triton.runtime import interpreter

    builder = getattr(interpreter, "interpreter_builder", None)
    options = getattr(builder, "options", None)
    if hasattr(options, "sanitize_overflow") and not options.debug:
        builder.options = dataclasses.replace(options, sanitize_overflow=False)
