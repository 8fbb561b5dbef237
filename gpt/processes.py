"""Processes that help this one: each a Python of its own, which calls one function.

They are neither forked, which a process with threads does not survive unharmed, nor spawned by multiprocessing, which
runs the caller's main module again.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["start"]

_ROOT = Path(__file__).parents[1]


def start(function: Callable[..., None], *arguments: int, **settings: Any) -> subprocess.Popen:
    """A process that calls function(*arguments). `settings` are Popen's; of `env` only what is to be different."""
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, **settings.pop("env", {})}
    # Where the caller has found its packages, should that be elsewhere; behind all else, so that it hides nothing.
    call = (
        f"import sys; sys.path += {sys.path[1:]!r}; "
        f"from {function.__module__} import {function.__name__} as call; call{arguments}"
    )
    # -P: not what lies in the folder it is started in. And a terminal's Ctrl-C reaches the owner alone.
    return subprocess.Popen([sys.executable, "-P", "-c", call], env=environment, start_new_session=True, **settings)
