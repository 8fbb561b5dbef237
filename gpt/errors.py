"""The errors that a user can cause, and the message for an optional package that is not installed."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["UserError", "require"]


class UserError(ValueError):
    """A mistake in what the user gave: one line saying what was wrong, what was expected and what came.

    The command line prints it as ``error: ...``, without a traceback.
    """


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or raise UserError naming the command that installs the extra it belongs to.

    Only the package's absence is translated: an error inside an installed package stays as it is.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise UserError(f"this needs {package}, which is not installed: pip install 'twingrad[{extra}]'") from error
