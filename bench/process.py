"""A worker (worker.py) as its owner sees it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from reference.config import GPTConfig


class Worker:
    """An engine in its process, ready for the work that `settings` describe."""

    def __init__(self, config: GPTConfig, settings: dict[str, Any]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.ask({"config": config.to_dict(), **settings})

    def ask(self, message: Any) -> Any:
        """Send one line, wait for one back."""
        assert self.process.stdin
        print(json.dumps(message), file=self.process.stdin, flush=True)
        return self.hear()

    def hear(self) -> Any:
        """The next line the worker writes."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"error: a worker ended early with status {self.process.wait()}")
        return json.loads(line)

    def close(self) -> Any:
        """End the worker; its last words."""
        assert self.process.stdin
        self.process.stdin.close()
        last = self.hear()
        self.process.wait()
        return last
