"""Settings that hold for all tests."""

import os

from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")

# Kernels run on the CPU, in the interpreter: Triton asks when it is imported, after this.
os.environ.setdefault("TRITON_INTERPRET", "1")
