"""python -m bench report: one page of all results that are kept, its plots, and the figures that the README quotes.

Everything on the page comes from the JSON files of one folder, and nothing is measured here; what there are no
results of it says. The README's figures stand between two marks, and are made of the same files.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench import breakdown, data, distributed, pictures, results, sweep, work
from bench.contest import ENGINES
from gpt.data.files import atomic_write
from gpt.errors import UserError
from reference.config import PRESETS, GPTConfig

README = results.HERE.parent / "README.md"
BEGIN, END = "<!-- figures: made by python -m bench report -->", "<!-- end of figures -->"
# How contestants are called in a table, in this order.
LABELS = {
    "numpy": "NumPy",
    "torch": "PyTorch",
    "torch compiled": "PyTorch, compiled",
    "plain": "plain loop",
    "plain fused": "plain loop, fused AdamW",
    "transformers": "transformers",
    "numpy uncached": "NumPy without a cache",
    "numpy full": "NumPy, whole model",
    "torch full": "PyTorch, whole model",
}
MOSTLY = 100 * 2**20  # bytes of a step beside which what libraries happen to keep does not count
CASES = {
    "gpt2-small": "GPT-2 124M",
    "course-llama": "a Llama of 138M",
    "bytes-small": "4 layers, 128 wide, bytes",
    "classify": "classification, last block",
    "lora": "adapters of rank 16 in all linear layers",
    "dpo": "DPO, the same adapters",
    "orpo": "ORPO, the same adapters",
    "generate": "GPT-2 124M",
    "generate-llama": "a Llama of 138M",
}


@dataclass(frozen=True)
class Result:
    """A file of results, read."""

    path: Path
    document: Mapping[str, Any]

    @property
    def kind(self) -> str:
        return self.document["kind"]

    @property
    def cases(self) -> Mapping[str, Any]:
        return self.document["cases"]

    def source(self) -> str:
        """Which file, when, where, of which code, with which versions: a line."""
        of = self.document
        versions = [f"Python {of['python']}", *(f"{name} {v}" for name, v in of["versions"].items() if v)]
        note = f"; {of['note']}" if of.get("note") else ""
        link = f"[{self.path.name}]({self.path.parent.name}/{self.path.name})"
        return (
            f"{link}: {of['date'][:10]}, commit {results.state(of)}, {results.machine(of)}; {', '.join(versions)}{note}"
        )


def load(folder: Path) -> list[Result]:
    """Every result of a folder, by name. UserError for a file that is none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected one of results, as bench/results")
    return [Result(path, results.read(path)) for path in sorted(folder.glob("*.json"))]


def page_of(folder: Path) -> Path:
    """Beside a folder of results, the page of them: results -> RESULTS.md, results-xeon -> RESULTS-XEON.md."""
    return folder.resolve().with_name(f"{folder.resolve().name.upper()}.md")


def main(folder: Path, check: bool) -> int:
    """Write the page beside the folder, plots into it, and the README's figures where it is the project's own folder.

    With `check`: write nothing; 1, and a line for each, where a text is not what would be written.
    """
    found = load(folder)
    texts = {page_of(folder): _made(found, folder, lambda: page(found))}
    if folder.resolve() == results.FOLDER.resolve():
        of_readme = _made(found, folder, lambda: figures(found))
        texts[README] = with_figures(README.read_text(encoding="utf-8"), of_readme)
    if check:
        stale = [path for path, text in texts.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
        for path in stale:
            print(f"out of date: {path}; python -m bench report makes it anew", file=sys.stderr)
        return int(bool(stale))
    own = page_of(folder)
    if own.is_file() and MADE not in own.read_text(encoding="utf-8", errors="replace"):
        raise UserError(f"{own}: not a page of results, and would be written over; rename it or the folder")
    for path in pictures.draw(found, folder):
        print(f"wrote {path}")
    for path, text in texts.items():
        with atomic_write(path) as file:
            file.write(text.encode())
        print(f"wrote {path}")
    return 0


def _made(found: Sequence[Result], folder: Path, text: Callable[[], str]) -> str:
    """A text of results. UserError where one of them lacks what a text says of its kind."""
    try:
        return text()
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        names = ", ".join(one.path.name for one in found)
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"{folder}: one of {names} is damaged, or lacks what the page tells of it ({what})") from error


# The page.

MADE = "made by python -m bench report"
SHARED = (
    "Processes of one thread each, against one process of PyTorch eager with as many threads, on the same batches\n"
    "([distributed.py](distributed.py))."
)
PREPARING = (
    "`twingrad data prepare` with GPT-2's tokenizer, from reading the text to the finished file, against tiktoken,\n"
    "which encodes the same text in memory with one thread ([data.py](data.py))."
)


def page(found: Sequence[Result]) -> str:
    """The page, whole."""
    parts = [
        f"# Results\n\n<!-- {MADE} from {_folder(found)}/*.json: edit neither -->\n",
        "Medians of rounds that all contestants took in turns, each in a process of its own, float32; in brackets the\n"
        "quartiles. A ratio is taken round by round: below 1, NumPy took less time than the peer. How results are\n"
        "compared says [compare.py](compare.py), what work counts [work.py](work.py), who the peers are\n"
        "[cpu.py](cpu.py).\n",
        _training(found),
        _finetuning(found),
        _generating(found),
        _roofline(found),
        _breakdown(found),
        _growth(found),
        _quality(found),
        _layers(found),
        _products(found),
        _tables(found, "distributed", "Steps shared by processes", SHARED, distributed.rows_of),
        _tables(found, "data", "Preparing token files", PREPARING, data.rows_of),
        _kernels(found),
    ]
    return "\n".join(parts)


def _section(title: str, sources: Sequence[Result], lines: Iterator[str], command: str) -> str:
    """A heading, what follows, and where it is from; where there is nothing, how to come by it."""
    body = list(lines) if sources else []
    if not body:
        return f"## {title}\n\nNo results yet. They come by `python -m bench {command}`.\n"
    return "\n\n".join([f"## {title}", *body, "\n".join(f"- {one.source()}" for one in sources)]) + "\n"


def _command(found: Sequence[Result], work: str, name: str = "") -> str:
    """What measures into this folder; `name`: of the file, where it is not the command's."""
    return f"{work} --out bench/{_folder(found)}/{name or work}.json"


def _folder(found: Sequence[Result]) -> str:
    """The name of the folder that they lie in."""
    return found[0].path.parent.name if found else results.FOLDER.name


def _with(found: Sequence[Result], kind: str, wanted: Any = None) -> list[Result]:
    """The results of a kind that have a case that is wanted."""
    these = [one for one in found if one.kind == kind]
    return [one for one in these if wanted is None or any(map(wanted, one.cases.values()))]


def _is_step(case: Mapping[str, Any]) -> bool:
    settings = case["settings"]
    return settings["work"] == "train" and not (settings["trained"] or settings["changes"])


def _is_finetuning(case: Mapping[str, Any]) -> bool:
    return case["settings"]["work"] == "train" and not _is_step(case)


def _is_writing(case: Mapping[str, Any]) -> bool:
    return case["settings"]["work"] == "generate"


def _cases(found: Sequence[Result], kind: str, wanted: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    return ((name, case) for one in found if one.kind == kind for name, case in one.cases.items() if wanted(case))


def _training(found: Sequence[Result]) -> str:
    def lines() -> Iterator[str]:
        yield "Forward, backward, clip, AdamW. The plain loop is GPT-2 and its loop in plain PyTorch, without ours."
        yield from _contests(found, _is_step)
        if picture := _picture(found, "steps"):
            yield picture

    return _section("Training steps", _with(found, "cpu", _is_step), lines(), _command(found, "cpu"))


def _finetuning(found: Sequence[Result]) -> str:
    def lines() -> Iterator[str]:
        yield "Of GPT-2 124M."
        yield from _contests(found, _is_finetuning)
        for _, case in _cases(found, "cpu", _is_finetuning):
            if "of_full" in case:
                yield of_full(case)

    command = _command(found, "cpu classify lora dpo orpo", "finetune")
    return _section("Steps that finetune", _with(found, "cpu", _is_finetuning), lines(), command)


def _generating(found: Sequence[Result]) -> str:
    command = _command(found, "cpu generate generate-llama", "generate")
    lines = _contests(found, _is_writing)
    return _section("Generating", _with(found, "cpu", _is_writing), lines, command)


def _contests(found: Sequence[Result], wanted: Any) -> Iterator[str]:
    for name, case in _cases(found, "cpu", wanted):
        yield f"**{CASES.get(name, name)}**, {_size(case['settings'])}{_rounds([case])}:"
        rows = []
        for who in _in_order(case["contestants"]):
            figures = case["contestants"][who]
            ratio = case["ratios"].get(f"{ENGINES[0]} / {who}")
            cells = [LABELS.get(who, who), _time(figures["seconds"]), f"{figures['tokens_per_s']:,.0f}"]
            cells += [f"{figures['peak_bytes'] / 2**20:,.0f}", _ratio(ratio), _target(ratio)]
            rows.append(cells)
        yield table(("contestant", "ms", "tokens/s", "peak MiB", "NumPy's time of it", "at most"), rows)
        if "memory_ratio" in case:
            memory = case["memory_ratio"]
            verdict = _verdict(memory["numpy / torch"] <= memory["target"])
            share = f"{memory['numpy / torch']:.2f}, at most {memory['target']:.2f}"
            yield f"Peak memory, NumPy / PyTorch: {share}: {verdict}."
        if of_plan := _of_plan([case]):
            yield of_plan


def _rounds(cases: Collection[Mapping[str, Any]]) -> str:
    """How often these were timed, the most of any contestant, after a comma; "" where rounds were not kept."""
    kept = [each["seconds"]["sessions"] for case in cases for each in case["contestants"].values()]
    if not all(kept):
        return ""
    sessions, rounds = (max(map(count, kept)) for count in (len, lambda each: max(map(len, each))))
    many = "rounds" if rounds > 1 else "round"
    return f", {rounds} {many} in {f'each of {sessions} sessions' if sessions > 1 else 'one session'}"


def _fewest_and_most(cases: Collection[Mapping[str, Any]]) -> str:
    """How many rounds medians are of, after a semicolon; "" where none were kept."""
    counts = [
        max(sum(map(len, each["seconds"]["sessions"] or ())) for each in case["contestants"].values()) for case in cases
    ]
    if not counts or not min(counts):
        return ""
    fewest, most = min(counts), max(counts)
    return f"; medians and quartiles of {f'{fewest} to {most}' if fewest < most else most} rounds"


def _of_plan(cases: Collection[Mapping[str, Any]], least_bytes: int = 0) -> str:
    """What memory steps took, in units of what `twingrad plan` says; "" where none of so many bytes was planned."""
    told = []
    for engine in ENGINES:
        each = [case["contestants"].get(engine, {}).get("of_plan") for case in cases]
        ratios = sorted(plan["ratio"] for plan in each if plan and plan["planned_bytes"] >= least_bytes)
        if ratios:
            least, most = f"{ratios[0]:.2f}", f"{ratios[-1]:.2f}"
            told.append(f"{LABELS[engine]} {least if least == most else f'{least} to {most}'}")
    return f"Memory, libraries apart, of what `twingrad plan` says: {', '.join(told)}." if told else ""


def _roofline(found: Sequence[Result]) -> str:
    measured = [one for one in found if one.document.get("ceilings")]

    def lines() -> Iterator[str]:
        yield (
            "The least time of a pass is the larger of its operations by the rate of matrix products and its bytes by\n"
            "the rate of copies, both measured in the same run. The share is that time of the time taken; it exceeds\n"
            "100% where a layer that is called again and again finds its bytes in a cache, from which they come faster."
        )
        for one in measured:
            ceilings = one.document["ceilings"]
            yield (
                f"{one.path.name}: products {ceilings['operations_per_s'] / 1e9:,.0f} GFLOP/s, copies "
                f"{ceilings['bytes_per_s'] / 1e9:,.1f} GB/s."
            )
            rows = [
                [case, part, f"{each.operations / 1e9:,.2f}", f"{each.bytes / 1e6:,.0f}", *shares]
                for case, part, each, shares in _shares(one)
            ]
            if rows:
                heads = [LABELS[engine] for engine in ENGINES]
                yield table(("case", "part", "GFLOP", "MB", *heads), rows)
        if picture := _picture(found, "roofline"):
            yield picture

    return _section("Roofline", measured, lines(), _command(found, "cpu"))


def _shares(one: Result) -> Iterator[tuple[str, str, work.Work, list[str]]]:
    """(case, part, its work, the share of the ceiling that each of our engines reaches)."""
    for case, part, each, seconds in roofs(one):
        ceilings = one.document["ceilings"]
        least = each.least_seconds(ceilings["operations_per_s"], ceilings["bytes_per_s"])
        yield case, part, each, [f"{least / seconds[engine]:.0%}" if engine in seconds else "" for engine in ENGINES]


def roofs(one: Result) -> Iterator[tuple[str, str, work.Work, dict[str, float]]]:
    """(case, part, its work, seconds by contestant) of what work is counted of: whole models' steps, and layers."""
    for name, case in one.cases.items():
        settings = case.get("settings", {})
        if one.kind in ("cpu", "sweep") and settings["work"] == "train" and not settings.get("trained"):
            config = config_of(settings)
            if config.lora:
                continue
            parts = {
                "gradients": work.gradients(config, settings["batch"], settings["length"]),
                "update": work.update(config),
            }
            for part, each in parts.items():
                seconds = {who: figures[part] for who, figures in case["contestants"].items() if part in figures}
                yield CASES.get(name, name), part, each, seconds
        elif one.kind == "layers" and settings["layer"] in work.LAYERS:
            both = work.LAYERS[settings["layer"]](*settings["size"])
            each = both[("forward", "backward").index(settings["direction"])]
            seconds = {who: figures["seconds"]["median"] for who, figures in case["contestants"].items()}
            yield settings["layer"], settings["direction"], each, seconds


def config_of(settings: Mapping[str, Any]) -> GPTConfig:
    """The model that a case trained."""
    if "config" in settings:
        return GPTConfig.from_dict(settings["config"])
    return PRESETS[settings["preset"]].replace(**settings["changes"])


def _breakdown(found: Sequence[Result]) -> str:
    def lines() -> Iterator[str]:
        yield (
            "What each layer takes of a step of the NumPy engine, forward and backward, and what the step's products\n"
            "would take at the rate of one large product, measured in the same run ([breakdown.py](breakdown.py))."
        )
        for one in _with(found, "breakdown"):
            yield breakdown.summary(one.cases, one.document["ceilings"])
            yield table(*breakdown.rows_of(one.cases, one.document["ceilings"]))

    return _section("Where a NumPy step's time goes", _with(found, "breakdown"), lines(), _command(found, "breakdown"))


def _tables(found: Sequence[Result], kind: str, title: str, words: str, rows_of: Callable[..., Any]) -> str:
    """Results of a kind that are one table each."""

    def lines() -> Iterator[str]:
        yield words
        for one in _with(found, kind):
            yield table(*rows_of(one.cases))

    return _section(title, _with(found, kind), lines(), _command(found, kind))


def _growth(found: Sequence[Result]) -> str:
    def lines() -> Iterator[str]:
        yield (
            "One size grows, the others stay; a step's time is fitted by c n^p. Exponents p, +- their standard\n"
            "errors, of all sizes and of the upper half of them."
        )
        for one in _with(found, "sweep"):
            rows = []
            for axis, who, every, upper in sweep.fits(one.cases):
                along = [case for case in one.cases.values() if case["axis"] == axis]
                sizes = f"{min(c['n'] for c in along):,} to {max(c['n'] for c in along):,} {along[0]['unit']}"
                rows.append([axis, sizes, LABELS.get(who, who), str(every), str(upper)])
            yield table(("axis", "sizes", "contestant", "exponent", "upper half"), rows)
            rows = []
            for name, case in one.cases.items():
                times = (_milliseconds(case["contestants"][who]["seconds"]["median"]) for who in case["contestants"])
                rows.append(
                    [name, *times, *(_ratio(r) for pair, r in case["ratios"].items() if pair.startswith("numpy / "))]
                )
            first = next(iter(one.cases.values()))
            heads = [f"{LABELS[who]}, ms" for who in first["contestants"]]
            heads += [
                f"NumPy / {LABELS[pair.partition(' / ')[2]]}" for pair in first["ratios"] if pair.startswith("numpy / ")
            ]
            yield f"A step of each{_rounds(one.cases.values())}:"
            yield table(("size", *heads), rows)
            if told := "; ".join(_met(one.cases.values())):
                yield f"NumPy's time is to be at most {told}."
            if told := ", ".join(_again(one.cases.values())):
                yield f"How far to trust that: of sizes on several axes NumPy / PyTorch came out as {told}."
            if of_plan := _of_plan(one.cases.values(), MOSTLY):
                yield f"{of_plan} (Of steps of {MOSTLY / 2**20:.0f} MiB and more.)"
        if picture := _picture(found, "growth"):
            yield picture

    return _section("Cost as the work grows", _with(found, "sweep"), lines(), _command(found, "sweep"))


def _met(cases: Collection[Mapping[str, Any]]) -> Iterator[str]:
    """Of each peer the target, and at how many of these sizes it is met."""
    sizes = _sizes(cases)
    for pair, first in next(iter(cases))["ratios"].items():
        if first["target"]:
            ratios = [median(case["ratios"][pair]["median"] for case in same) for same in sizes]
            met = sum(ratio <= first["target"] for ratio in ratios)
            peer = LABELS[pair.partition(" / ")[2]]
            yield f"{first['target']:.2f} of that of {peer}: met at {met} of {len(ratios)} sizes"


def _again(cases: Collection[Mapping[str, Any]]) -> Iterator[str]:
    """Of each size that was measured several times NumPy's time of PyTorch's, every time."""
    for same in _sizes(cases):
        if len(same) > 1 and "numpy / torch" in same[0]["ratios"]:
            found = [f"{case['ratios']['numpy / torch']['median']:.2f}" for case in same]
            yield f"{' and '.join([', '.join(found[:-1]), found[-1]])} ({same[0]['axis']} {same[0]['n']:,})"


def _sizes(cases: Collection[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Cases of equal settings together."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for case in cases:
        found.setdefault(json.dumps(case["settings"], sort_keys=True), []).append(case)
    return list(found.values())


def _quality(found: Sequence[Result]) -> str:
    def lines() -> Iterator[str]:
        yield (
            "The same model, data and seed, trained until the validation loss is at most the target. Steps and\n"
            "loss must coincide."
        )
        rows = []
        for one in _with(found, "quality"):
            for name, case in one.cases.items():
                for engine, taken in case["engines"].items():
                    steps = "not reached" if taken["steps"] is None else str(taken["steps"])
                    seconds = "" if taken["seconds"] is None else f"{taken['seconds']:.1f}"
                    rows.append(
                        [name, engine, f"{case['settings']['target']}", steps, f"{taken['val_loss']:.7f}", seconds]
                    )
        yield table(("case", "engine", "target", "steps", "validation loss", "seconds"), rows)
        for one in _with(found, "quality"):
            for name, case in one.cases.items():
                verdict = "coincide" if case["coincides"] else "**do not coincide**"
                yield f"{name}: steps and loss {verdict}; the losses at the target differ by {case['difference']:.1e}."
        if picture := _picture(found, "quality"):
            yield picture

    return _section("Quality", _with(found, "quality"), lines(), _command(found, "quality"))


def _layers(found: Sequence[Result]) -> str:
    def lines() -> Iterator[str]:
        yield "At GPT-2 124M's sizes for 2 x 256 tokens."
        rows = []
        for name, case in _cases(found, "layers", lambda case: True):
            ours, theirs = (case["contestants"][engine]["seconds"] for engine in ENGINES)
            rows.append([name, _time(ours), _time(theirs), f"{ours['median'] / theirs['median']:.2f}"])
        yield table(("layer", "NumPy, ms", "PyTorch, ms", "ratio of medians"), rows)

    return _section("Layers", _with(found, "layers"), lines(), _command(found, "layers"))


def _products(found: Sequence[Result]) -> str:
    def lines() -> Iterator[str]:
        yield "Of (n, n) by (n, n), GFLOP/s."
        rows = []
        for n, case in _cases(found, "matmul", lambda case: True):
            rates = [
                2 * int(n) ** 3 / case["contestants"][who]["seconds"]["median"] / 1e9 for who in ("numpy", "torch cpu")
            ]
            rows.append([n, *(f"{rate:,.0f}" for rate in rates)])
        yield table(("n", "NumPy", "PyTorch"), rows)

    return _section("Matrix products", _with(found, "matmul"), lines(), _command(found, "matmul"))


def _kernels(found: Sequence[Result]) -> str:
    """What is known of the kernels: what a GPU took, where there was one, and what compilers made of them."""
    measured, compiled = _with(found, "gpu"), _with(found, "static")
    parts = ["## Kernels on a GPU", *(text for one in measured for text in _on_gpu(one))]
    if not measured:
        parts.append("No results yet: none of a GPU is kept here. They come by `python -m bench gpu`.")
    for one in compiled:
        kernels = {name.partition(" ")[0] for name in one.cases}
        architectures = ", ".join(sorted({name.rpartition(" ")[2] for name in one.cases}))
        spill = sum(1 for case in one.cases.values() if case["stack"])
        parts.append(
            f"Compiled without a GPU: {len(one.cases):,} compilations of {len(kernels)} kernels for {architectures}; "
            f"{spill} of them spill registers."
        )
    parts.append("\n".join(f"- {one.source()}" for one in (*measured, *compiled)))
    return "\n\n".join(filter(None, parts)) + "\n"


def _on_gpu(one: Result) -> Iterator[str]:
    """One GPU: its ceilings, what became of the targets, a model's steps, each kernel beside its peers, the plots."""
    of = one.cases
    units = {name: "GB/s" if name == "copy" else "TFLOP/s" for name in of["ceilings"]}
    ceilings = (f"{name} {rate:,.4g} {units[name]}" for name, rate in of["ceilings"].items())
    yield f"**{of['device']}**; ceilings: {', '.join(ceilings)}."
    rows = []
    for target in of["targets"]:
        value = target["found"]
        verdict = "not measured" if value is None else _verdict(value >= target["at_least"])
        rows.append([target["what"], f"{target['at_least']:.2f}", "" if value is None else f"{value:.2f}", verdict])
    yield table(("wanted", "at least", "found, at worst", ""), rows)
    rows = []
    for m in of["models"]:
        times = _time({"median": m["seconds"], "quartiles": m["quartiles"]})
        tokens, memory = f"{m['tokens_per_s']:,.0f}", f"{m['peak_bytes'] / 2**20:,.0f}"
        rows.append([m["model"], m["operators"], m["mode"], times, tokens, memory])
    if rows:
        yield table(("model", "operators", "mode", "ms a step", "tokens/s", "peak MiB beyond weights"), rows)
    rows = []
    for m in of["measurements"]:
        size = " ".join(filter(None, (m["setting"], str(m["x"] or ""), m["dtype"])))
        times = _time({"median": m["seconds"], "quartiles": m["quartiles"]})
        rate = f"{m['rate']:,.4g} {m['unit']}"
        rows.append([f"{m['operator']} {m['direction']}", size, m["peer"], times, rate, f"{m['of_ceiling']:.0%}"])
    yield table(("operator", "size", "peer", "ms", "rate", "of ceiling"), rows)
    for path in sorted(one.path.parent.glob(f"{one.path.stem}-*.png")):
        yield f"![{path.stem}]({one.path.parent.name}/{path.name})"


def _picture(found: Sequence[Result], name: str) -> str:
    return f"![{pictures.TITLES[name]}]({_folder(found)}/{name}.png)" if pictures.can_draw(name, found) else ""


# The README.


def figures(found: Sequence[Result]) -> str:
    """The tables that the README has between its marks."""
    parts = []
    for wanted, intro, size in (
        (_is_step, "Training steps", "tokens in a step"),
        (_is_finetuning, "Steps that finetune GPT-2 124M", "texts x tokens"),
    ):
        cases = dict(_cases(found, "cpu", wanted))
        if cases:
            parts += [
                f"{intro} ({_links(found, wanted)}):",
                _steps(cases, "model" if wanted is _is_step else "task", size),
            ]
            parts += [of_full(case) for case in cases.values() if "of_full" in case]
    written = dict(_cases(found, "cpu", _is_writing))
    if written:
        settings = next(iter(written.values()))["settings"]
        intro = (
            f"A prompt of {settings['prompt']} tokens continued by {settings['tokens']}, greedily, in tokens a second"
        )
        parts += [f"{intro} ({_links(found, _is_writing)}):", _writing(written)]
    where = "; ".join(dict.fromkeys(_where(one) for one in found if one.kind == "cpu"))
    every = [case for one in found if one.kind == "cpu" for case in one.cases.values()]
    parts.append(
        f"Measured on {where}{_fewest_and_most(every)}. Spread, peers, roofline, cost as the work grows: "
        "[`bench/RESULTS.md`](bench/RESULTS.md)."
    )
    return "\n\n".join(parts)


def _links(found: Sequence[Result], wanted: Any) -> str:
    names = (one.path.name for one in _with(found, "cpu", wanted))
    return ", ".join(f"[`bench/results/{name}`](bench/results/{name})" for name in names)


def _where(one: Result) -> str:
    versions = one.document["versions"]
    return f"{results.machine(one.document)}, NumPy {versions['numpy']}, PyTorch {versions['torch']}, float32"


def _steps(cases: Mapping[str, Any], head: str, size: str) -> str:
    """A row for each case: our engines' milliseconds, and NumPy's time as a multiple of each other contestant's."""
    who = [
        name for name in LABELS if any(name in case["contestants"] for case in cases.values()) and " full" not in name
    ]
    others = [name for name in who if name != ENGINES[0]]
    rows = []
    for name, case in cases.items():
        times = (
            _cell(case["contestants"].get(one), lambda c: f"{1e3 * c['seconds']['median']:.0f}") for one in ENGINES
        )
        shares = (_ratio(case["ratios"].get(f"{ENGINES[0]} / {one}")) for one in others)
        memory = _cell(case.get("memory_ratio"), lambda m: f"{m['numpy / torch']:.2f}")
        settings = case["settings"]
        rows.append([CASES.get(name, name), f"{settings['batch']} x {settings['length']}", *times, *shares, memory])
    heads = [f"{LABELS[one]}, ms" for one in ENGINES] + [f"NumPy / {LABELS[one]}" for one in others]
    return table((head, size, *heads, "peak memory, NumPy / PyTorch"), rows)


def _writing(cases: Mapping[str, Any]) -> str:
    who = [name for name in LABELS if any(name in case["contestants"] for case in cases.values())]
    pairs = [("numpy", "torch"), ("torch", "transformers")]
    rows = []
    for name, case in cases.items():
        rates = (_cell(case["contestants"].get(one), lambda c: f"{c['tokens_per_s']:.0f}") for one in who)
        rows.append([CASES.get(name, name), *rates, *(_ratio(case["ratios"].get(" / ".join(pair))) for pair in pairs)])
    heads = [*(LABELS[one] for one in who), *(f"time, {LABELS[a]} / {LABELS[b]}" for a, b in pairs)]
    return table(("model", *heads), rows)


def of_full(case: Mapping[str, Any]) -> str:
    """What adapters spare, in a sentence."""
    of = case["of_full"]
    return (
        f"A step of the adapters takes {of['numpy']:.2f} of a step of the whole model in NumPy and {of['torch']:.2f} "
        f"in PyTorch, and the optimizer keeps {case['of_full_optimizer']:.1%} of its numbers."
    )


def with_figures(text: str, made: str) -> str:
    """The README with these figures between its marks. UserError where the marks are not there once, in order."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise UserError(f"README.md: expected the marks {BEGIN} and {END} once each, in this order")
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{after}"


# Cells.


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _in_order(names: Mapping[str, Any]) -> list[str]:
    order = [*LABELS, *names]
    return sorted(names, key=order.index)


def _size(settings: Mapping[str, Any]) -> str:
    if settings["work"] == "generate":
        return f"{settings['tokens']} tokens after {settings['prompt']}"
    return f"{settings['batch']} x {settings['length']} tokens"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}"


def _time(seconds: Mapping[str, Any]) -> str:
    return _spread(seconds, _milliseconds)


def _ratio(ratio: Mapping[str, Any] | None) -> str:
    return _spread(ratio, lambda value: f"{value:.2f}") if ratio else ""


def _spread(of: Mapping[str, Any], text: Callable[[float], str]) -> str:
    """The median, and in brackets the quartiles, which of one round there are none of."""
    low, high = of["quartiles"] or (0.0, 0.0)
    return text(of["median"]) + (f" [{text(low)}, {text(high)}]" if low < high else "")


def _target(ratio: Mapping[str, Any] | None) -> str:
    return f"{ratio['target']:.2f}: {_verdict(ratio['median'] <= ratio['target'])}" if ratio and ratio["target"] else ""


def _verdict(met: bool) -> str:
    return "met" if met else "**missed**"


def _cell(value: Any, text: Any) -> str:
    return text(value) if value is not None else ""
