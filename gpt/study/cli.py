"""`twingrad study`: what it takes, and what it writes."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from gpt.errors import UserError
from gpt.options import given

TEXT = "the cat sat on the mat"
OF_A_MODEL = ("text", "model", "steps", "dropout")  # options of its page


@dataclass(frozen=True)
class StudyConfig:
    """Write a page with every number of a model's forward and backward pass over a text, or study one layer alone."""

    text: str = TEXT
    """The text that the pass is over."""
    model: str | None = None
    """A run's folder, a folder or file of weights, or a name (weights list); none: a tiny model learns the text."""
    layer: str | None = None
    """One layer alone, such as layer_norm or attention-grouped: in the terminal, or with out as a page."""
    yours: str | None = None
    """With layer: FILE.py with your own forward and backward, held against the layer's."""
    text_only: bool = False
    """With layer: in the terminal, though there is an out."""
    out: str | None = None
    """The page [report.html]."""
    steps: int = 30
    """Training steps of the tiny model."""
    dropout: float = 0.0
    """Rate at all places of the model."""
    seed: int = 1
    """Of the tiny model's first weights and of dropout."""


def study(config: StudyConfig) -> int:
    """Write what `config` asks for. Raises UserError."""
    # Read by NumPy when it is first imported. These products have the rows of one short text: with a second thread they
    # take three to ten times as long, of GPT-2's weights as of the tiny model's.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if config.layer is not None:
        for name in given(config):
            if name in OF_A_MODEL:
                raise UserError(f"{name}: of a model's page, and --layer studies one layer alone; leave one out")
        out = "" if config.text_only else config.out or ""
        if config.yours is not None and out:
            raise UserError("out: your own layer is compared in the terminal alone; leave out --out or --yours")
        from gpt.study.layer import show

        return show(config.layer, config.yours or "", config.seed, out)
    if config.yours is not None:
        raise UserError("yours: a file of your own is held against a layer, expected --layer NAME beside it")
    if config.text_only:
        raise UserError("text_only: a layer alone is shown as text, expected --layer NAME beside it")
    from rich.console import Console

    from gpt.study.report import write_report
    from gpt.study.subject import loaded, tiny

    path = Path(config.out or "report.html")
    if path.is_dir():
        raise UserError(f"out: {path} is a folder, expected a file to write, such as report.html")
    start = time.perf_counter()
    with Console(stderr=True).status("the model") as status:  # shown on a terminal alone
        if config.model is None:
            subject = tiny(config.text, config.steps, config.seed, config.dropout)
        else:
            subject = loaded(config.model, config.text, config.seed, config.dropout)
        write_report(path, subject, status.update)
    size, seconds = path.stat().st_size / 1e6, time.perf_counter() - start
    print(f"{path}  {size:.1f} MB, {seconds:.1f} s; open it in a browser")
    return 0
