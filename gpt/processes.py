"""Processes that this one starts: helpers, each a Python of its own which calls one function, and whole commands.

Helpers are neither forked, which a process with threads does not survive unharmed, nor spawned by multiprocessing,
which runs the caller's main module again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt.errors import INTERRUPTED

__all__ = ["heed_ctrl_c", "start", "twingrad"]

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


def twingrad(*arguments: str) -> int:
    """Run a command of twingrad to its end; its exit status. Ctrl-C is the command's to answer, in its own time.

    While Python starts, Ctrl-C would be a traceback, or death without a word: the command begins with it held back.
    """
    seen: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: seen.append(number))
    mask = _mask_ctrl_c(hold=True)
    try:
        process = subprocess.Popen([sys.executable, "-m", "gpt", *arguments])
        if seen or _ctrl_c_waits():
            process.send_signal(signal.SIGINT)  # it came before there was a process; two that are held back are one
        status = process.wait()
    finally:
        _mask_ctrl_c(hold=signal.SIGINT in mask)
        signal.signal(signal.SIGINT, handler)
    if status == -signal.SIGINT:  # CPython's end, whatever main() returns, where Ctrl-C came within exec(): dataclasses
        return INTERRUPTED
    if seen and status != INTERRUPTED:
        raise KeyboardInterrupt  # it came when there was nothing left to interrupt in the command
    return status


def _ctrl_c_waits() -> bool:
    return hasattr(signal, "sigpending") and signal.SIGINT in signal.sigpending()


def heed_ctrl_c() -> None:
    """From here on Ctrl-C is KeyboardInterrupt; now, if it came while it was held back."""
    _mask_ctrl_c(hold=False)


def _mask_ctrl_c(hold: bool) -> set[Any]:
    """Hold SIGINT back, in this thread and the processes that it starts, or no longer; which signals were, before."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        return set()
    return signal.pthread_sigmask(signal.SIG_BLOCK if hold else signal.SIG_UNBLOCK, {signal.SIGINT})
