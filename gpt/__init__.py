"""What both engines share: models, data, training, generation, parity checks and the command line. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt.llm import LLM

__all__ = ["LLM"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "LLM":  # looked up when asked for, so that `import gpt` costs nothing
        from gpt.llm import LLM

        return LLM
    raise AttributeError(f"module 'gpt' has no attribute {name!r}")
