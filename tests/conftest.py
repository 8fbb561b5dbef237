"""Settings that hold for all tests."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")

# Kernels run on the CPU, in the interpreter: Triton asks when it is imported, after this.
os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """A command tried in this process sets variables, of threads say: processes of the next test are spared them."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
