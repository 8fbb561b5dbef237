"""What both engines share: models, data, training, generation, parity checks and the command line. Imports no torch."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt.llm import LLM

__all__ = ["LLM"]
__version__ = "0.1.0"


# After a product, a thread of OpenBLAS waits busily for the next one, by default for a tenth of a second. The system
# sees a busy core, and keeps the threads that share the optimizer's work together on another. 2^20 ticks of the
# processor last from one product to the next. Read when NumPy is loaded; what the user has set stands.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "20")


def __getattr__(name: str) -> Any:
    if name == "LLM":  # looked up when asked for, so that `import gpt` costs nothing
        from gpt.llm import LLM

        return LLM
    raise AttributeError(f"module 'gpt' has no attribute {name!r}")
