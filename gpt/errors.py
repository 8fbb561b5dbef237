"""The errors that a user can cause, the message for an optional package that is not installed, Ctrl-C's status."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

__all__ = ["INTERRUPTED", "UserError", "check_installed", "is_installed", "require"]

INTERRUPTED = 130  # 128 + SIGINT: the exit status that a shell reports of what Ctrl-C ended


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
        raise _not_installed(package, extra) from error


def is_installed(module: str) -> bool:
    """Whether a top-level module can be found, without its import. What is set to None in sys.modules cannot."""
    return sys.modules[module] is not None if module in sys.modules else importlib.util.find_spec(module) is not None


def check_installed(module: str, extra: str) -> None:
    """Raise what `require` would, without the import: for a package that another process will use."""
    if not is_installed(module):
        raise _not_installed(module, extra)


def _not_installed(package: str, extra: str) -> UserError:
    return UserError(f"this needs {package}, which is not installed: pip install 'twingrad[{extra}]'")
