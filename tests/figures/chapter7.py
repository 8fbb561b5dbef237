"""Chapter 7: instructions, their prompts and batches, and the loss that ignores padding. ORPO's steps in the course."""

from __future__ import annotations

from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from gpt import tokenizers
from gpt.data.catalogue import get
from gpt.data.examples import ExampleLoader, JsonEntries, Subset
from gpt.engine import Batch
from gpt.finetune import preferences
from gpt.finetune.instructions import InstructionDataset, collate, pad_rows, shift, split
from gpt.prompts import alpaca
from reference.torch_rng import Generator
from tests.figures.engines import Layers
from tests.figures.registry import figure

END = 50256
ROWS = [[0, 1, 2, 3, 4], [5, 6], [7, 8, 9]]
LOGITS = np.array([[-1.0, 1.0], [-0.5, 1.5], [-0.5, 1.5]], np.float32)
HEADING = "\n\n### Response:\n"


def entries() -> JsonEntries:
    return JsonEntries(get("instruction-data"))


def parts() -> dict[str, Subset]:
    return dict(zip(("train", "val", "test"), split(entries()), strict=True))


def listed(batch: Batch) -> dict[str, list]:
    return {"inputs": batch.inputs.tolist(), "targets": batch.targets.tolist()}


@figure("ch07.data.len")
def number_of_entries() -> int:
    return len(entries())


@figure("ch07.data.entry50")
def entry_50() -> dict[str, Any]:
    return entries()[50]


@figure("ch07.data.entry0")
def first_entry() -> dict[str, Any]:
    return entries()[0]


@figure("ch07.prompt.entry999")
def prompt_and_answer() -> str:
    entry = entries()[999]
    return alpaca(entry) + entry["output"]


@figure("ch07.split")
def sizes_of_the_parts() -> dict[str, int]:
    return {name: len(part) for name, part in parts().items()}


@figure("ch07.val0.prompt")
def first_validation_prompt() -> str:
    return alpaca(parts()["val"][0]).removesuffix(HEADING)


@figure("ch07.tokens.lengths")
def lengths() -> dict[str, list[int]]:
    gpt2, found = tokenizers.load("gpt2"), {}
    for name, part in parts().items():
        sizes = [len(ids) for ids, _ in InstructionDataset(part, gpt2)]
        found[name] = [min(sizes), max(sizes), sum(sizes)]
    return found


@figure("ch07.collate.draft1")
def padded_rows() -> list:
    return pad_rows(ROWS, END)[:, :-1].tolist()


@figure("ch07.collate.draft2")
def rows_and_the_next_tokens() -> dict[str, list]:
    return listed(shift(pad_rows(ROWS, END)))


@figure("ch07.collate.fn")
def batch_without_the_padding() -> dict[str, list]:
    return listed(collate([(row, 0) for row in ROWS], END))


@figure("ch07.ignore_index")
def ignored_targets(layers: Layers) -> list[float]:
    return [
        layers.cross_entropy(LOGITS[: len(targets)], np.array(targets)) for targets in ([0, 1], [0, 1, 1], [0, 1, -100])
    ]


@figure("ch07.loader.shapes")
def shapes_of_the_batches() -> dict[str, Any]:
    train = InstructionDataset(parts()["train"], tokenizers.load("gpt2"))
    loader = ExampleLoader(train, partial(collate, pad_id=END, allowed_max_length=1024), 8, True, True, Generator(123))
    return {"batches": len(loader), "first5": [list(batch.inputs.shape) for batch in islice(loader, 5)]}


@figure("course.orpo.steps")
def steps_of_three_epochs() -> dict[str, int]:
    """The filter's 39,091 are not printed: the one number of which 37,136 are left when 1/20 is held out."""

    def steps(n: int) -> int:
        train, _ = preferences.split([{}] * n, 0.05, seed=42)
        return 3 * len(ExampleLoader(train, list, 1, True, True, Generator(42)))

    return {"filtered": steps(39_091), "unfiltered": steps(43_704)}
