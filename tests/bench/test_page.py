"""The page of results and the README's figures: made of the results that are kept, and nothing else."""

import json
import re

import numpy as np
import pytest

from bench import __main__ as bench
from bench import breakdown, page, pictures, results
from bench.contest import summary
from bench.process import Taken
from bench.sweep import AXES
from gpt.errors import UserError

FOLDERS = sorted(results.HERE.glob("results*/"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_committed_page_and_readme_are_what_the_committed_results_give(folder, capsys):
    assert bench.main(["report", "--check", "--results", str(folder)]) == 0, capsys.readouterr().err


def test_the_readme_quotes_no_figures_but_those():
    text = page.README.read_text(encoding="utf-8")
    section = text.partition("## How fast it is")[2].partition("\n## ")[0]
    before, _, rest = section.partition(page.BEGIN)
    prose = re.sub(r"```.*?```", "", before + rest.partition(page.END)[2], flags=re.DOTALL)
    assert page.END in rest
    assert not re.findall(r"\d+\.\d+|\d+ ?(?:ms|MiB|GiB|%|tokens)", prose)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_plot_that_a_page_shows_is_there(folder):
    text = page.page_of(folder).read_text(encoding="utf-8")
    shown = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert shown
    for name in shown:
        assert (results.FOLDER.parent / name).read_bytes().startswith(b"\x89PNG"), name


def took(seconds):
    rounds = [
        [{"seconds": seconds * (1 + 0.1 * r), "gradients": 0.8 * seconds, "update": 0.2 * seconds} for r in range(3)]
    ]
    return Taken(rounds, [{}], [{"peak_bytes": 10**8, "libraries_bytes": 10**7, "planned_bytes": 15 * 10**7}])


def case(settings, who, **more):
    entry = summary(settings, {name: took(seconds) for name, seconds in who.items()}, {"torch": 0.9}, 1.1)
    for contestant in entry["contestants"].values():
        contestant["tokens_per_s"] = 1000.0
    return {**entry, **more}


@pytest.fixture
def folder(tmp_path):
    """A result of each kind."""
    folder = tmp_path / "results"
    step = {
        "work": "train",
        "preset": "gpt2-small",
        "changes": {},
        "batch": 2,
        "length": 256,
        "trained": [],
        "examples": "text",
    }
    who = {"numpy": 1.0, "torch": 2.0, "plain": 1.5, "transformers": 3.0}
    ceilings = {"operations_per_s": 1e12, "bytes_per_s": 1e11}
    lora = {**step, "changes": {"lora": {"rank": 2, "alpha": 2.0}}}
    adapters = case(lora, who, of_full={"numpy": 0.5, "torch": 0.6}, of_full_optimizer=0.0123)
    writes = case({"work": "generate", "preset": "gpt2-small", "prompt": 4, "tokens": 5}, who)
    cases = {"gpt2-small": case(step, who), "lora": adapters, "generate": writes}
    results.write(folder / "cpu.json", "cpu", cases, ceilings=ceilings)
    grown = {}
    for name in ("tokens", "length"):
        for point in AXES[name].points:
            settings = {"work": "train", "config": point.config.to_dict(), "batch": point.batch, "length": point.length}
            seconds = {"numpy": point.n**1.25, "torch": 2 * point.n**1.5}
            grown[f"{name} {point.n}"] = case(settings, seconds, axis=name, unit=AXES[name].unit, n=point.n)
    results.write(folder / "sweep.json", "sweep", grown, ceilings=ceilings)
    curve = {"steps": 3, "seconds": 1.5, "val_loss": 1.75, "evaluated_steps": [1, 3], "evaluated_losses": [3.0, 1.75]}
    learnt = {"settings": {"target": 1.8, "preset": "bytes-tiny"}, "engines": {"numpy": curve, "torch": curve}}
    results.write(folder / "quality.json", "quality", {"small": {**learnt, "coincides": True, "difference": 1e-9}})
    layer = {"layer": "linear", "direction": "backward", "size": [30, 2, 4, 50]}
    results.write(
        folder / "layers.json",
        "layers",
        {"linear backward": case(layer, {"numpy": 1.0, "torch": 2.0})},
        ceilings=ceilings,
    )
    results.write(
        folder / "matmul.json", "matmul", {"64": case({"work": "product", "n": 64}, {"numpy": 1.0, "torch cpu": 2.0})}
    )
    layers = dict.fromkeys((*breakdown.LAYERS, breakdown.OPTIMIZER, breakdown.REST), 0.1)
    spent = {"settings": {}, "n": 1000, "threads": 2, "operations": 4e11, "seconds": {"step": 0.8, **layers}}
    results.write(folder / "breakdown.json", "breakdown", {"parameters 1000": spent}, ceilings=ceilings)
    shared = {
        "seconds": {"one": [1.0, 1.2], "shared": [1.1, 1.3]}, "processes": 2, "parallel": "ddp",
        "throughput_ratio": 0.915, "throughput_ratio_quartiles": [0.91, 0.92], "throughput_target": 0.9,
    }  # fmt: skip
    results.write(folder / "distributed.json", "distributed", {"gpt2-small": shared})
    by_processes = {"2": {"bytes_per_s": 8e6, "share": 0.789, "share_quartiles": [0.7, 0.8]}}
    prepared = {"text": {"tiktoken_bytes_per_s": 5e6, "processes": by_processes}}
    results.write(folder / "data.json", "data", {"target": 0.8, "kinds": prepared})
    return folder


def test_a_page_has_each_kind_of_result_with_its_source(folder, capsys):
    assert bench.main(["report", "--results", str(folder)]) == 0
    text = (folder.parent / "RESULTS.md").read_text()
    assert text.count("No results yet") == 1, "of a GPU there is none"
    assert "none of a GPU is kept" in text
    assert "| PyTorch | 2,200 [2,100, 2,300] | 1,000 | 95 | 0.50 | 0.90: met |" in text
    of_plan = "Memory, libraries apart, of what `twingrad plan` says: NumPy 0.60, PyTorch 0.60."
    assert f"{of_plan}\n" in text
    assert f"{of_plan} (Of steps of 100 MiB and more.)" in text
    assert "A step of the adapters takes 0.50 of a step of the whole model in NumPy and 0.60 in PyTorch" in text
    assert re.search(
        r"\| tokens \| 128 to 4,096 tokens in a step, .* \| NumPy \| 1\.25 \+- 0\.00 \| 1\.25 \+- 0\.00 \|", text
    )
    assert re.search(r"\| length \| .* \| PyTorch \| 1\.50 \+- 0\.00", text)
    assert "NumPy's time is to be at most 0.90 of that of PyTorch: met at 11 of 11 sizes." in text
    assert "| small | numpy | 1.8 | 3 | 1.7500000 | 1.5 |" in text
    assert "products 1,000 GFLOP/s, copies 100.0 GB/s" in text
    # 48,000 operations and 16 kB, which is nothing of a second.
    assert "| linear | backward | 0.00 | 0 | 0% | 0% |" in text
    assert "| 1,000 | 800.0 | 50% | 12% |" in text
    assert "Matrix products at the machine's best rate would take 50% to 50% of a step" in text
    assert "| gpt2-small | 2 processes (ddp) | 1,100 | 1,200 | 0.92 [0.91, 0.92] | 0.90: met |" in text
    assert "| text | 2 | 5.0 | 8.0 | 0.79 [0.70, 0.80] | 0.80: missed |" in text
    for name in ("cpu", "sweep", "quality", "layers", "matmul", "breakdown", "distributed", "data"):
        assert f"- [{name}.json](results/{name}.json): " in text
    for name in pictures.TITLES:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"(results/{name}.png)" in text
    assert bench.main(["report", "--results", str(folder), "--check"]) == 0


def test_a_gpu_s_results_have_their_section(folder):
    measured = {"operator": "gelu", "direction": "forward", "setting": "exact", "x": 1024, "dtype": "bfloat16"}
    measured |= {"peer": "twingrad", "seconds": 1e-3, "quartiles": [9e-4, 2e-3], "rate": 1234.0, "unit": "GB/s"}
    step = {"model": "GPT 124M", "operators": "triton", "mode": "compiled", "seconds": 0.05, "quartiles": [0.04, 0.06]}
    found = {
        "device": "some GPU",
        "ceilings": {"copy": 4000.0, "bfloat16": 800.0},
        "measurements": [{**measured, "of_ceiling": 0.31}],
        "models": [{**step, "tokens_per_s": 163_840.0, "peak_bytes": 2**30}],
        "targets": [
            {"what": "gelu, share of the ceiling", "at_least": 0.9, "found": 0.31, "where": ""},
            {"what": "speed", "at_least": 1.15, "found": None, "where": ""},
        ],
    }
    results.write(folder / "gpu-some.json", "gpu", found)
    (folder / "gpu-some-model.png").touch()
    text = page.page(page.load(folder))
    assert "No results yet" not in text
    assert "**some GPU**; ceilings: copy 4,000 GB/s, bfloat16 800 TFLOP/s." in text
    assert "| gelu, share of the ceiling | 0.90 | 0.31 | **missed** |" in text
    assert "| speed | 1.15 |  | not measured |" in text
    assert "| GPT 124M | triton | compiled | 50 [40, 60] | 163,840 | 1,024 |" in text
    assert "| gelu forward | exact 1024 bfloat16 | twingrad | 1 [0.9, 2] | 1,234 GB/s | 31% |" in text
    assert "(results/gpu-some-model.png)" in text


def test_a_stale_page_is_named_and_nothing_written(folder, capsys):
    assert bench.main(["report", "--results", str(folder), "--check"]) == 1
    assert f"out of date: {folder.parent / 'RESULTS.md'}" in capsys.readouterr().err
    assert not (folder.parent / "RESULTS.md").exists()
    bench.main(["report", "--results", str(folder)])
    text = json.loads((folder / "matmul.json").read_text())
    text["cases"]["64"]["contestants"]["numpy"]["seconds"]["median"] = 1e-6
    (folder / "matmul.json").write_text(json.dumps(text))
    assert bench.main(["report", "--results", str(folder), "--check"]) == 1


def test_without_results_each_section_says_how_to_come_by_them(tmp_path):
    (tmp_path / "results").mkdir()
    assert bench.main(["report", "--results", str(tmp_path / "results")]) == 0
    text = (tmp_path / "RESULTS.md").read_text()
    assert text.count("No results yet") == text.count("\n## ") == 12
    assert text.count("They come by `python -m bench ") == 12


def test_the_roofline_is_the_lower_of_two_ceilings(folder):
    (one,) = [each for each in page.load(folder) if each.kind == "cpu"]
    parts = {part: (work, seconds) for name, part, work, seconds in page.roofs(one) if name == "GPT-2 124M"}
    assert parts["update"][1]["numpy"] == pytest.approx(0.2)
    shares = {(name, part): share for name, part, _, share in page._shares(one)}
    assert set(shares) == {("GPT-2 124M", "gradients"), ("GPT-2 124M", "update")}, "adapters' work is not counted"
    work, seconds = parts["gradients"]
    assert work.operations > 6 * 124e6 * 512
    assert shares["GPT-2 124M", "gradients"][0] == f"{work.operations / 1e12 / seconds['numpy']:.0%}"
    work, seconds = parts["update"]
    assert shares["GPT-2 124M", "update"][1] == f"{work.bytes / 1e11 / seconds['torch']:.0%}"


@pytest.mark.parametrize(
    "text", ["no marks", f"{page.BEGIN} twice {page.BEGIN} {page.END}", f"{page.END} {page.BEGIN}"]
)
def test_marks_that_are_not_once_in_order_are_one_line(text):
    with pytest.raises(UserError, match="expected the marks"):
        page.with_figures(text, "")


def test_figures_stand_between_the_marks_and_all_else_stays():
    text = f"before {page.BEGIN} old {page.END} after"
    made = page.with_figures(text, "new")
    assert made == f"before {page.BEGIN}\n\nnew\n\n{page.END} after"
    assert page.with_figures(made, "new") == made


@pytest.mark.parametrize("arguments, message", [(["nowhere"], "no such folder"), ([], "broken.json: not a result")])
def test_a_folder_that_is_none_and_a_file_that_is_no_result_are_one_line(folder, capsys, arguments, message):
    (folder / "broken.json").write_text("nothing")
    where = folder / arguments[0] if arguments else folder
    assert bench.main(["report", "--results", str(where)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_times_are_printed_with_the_digits_that_they_have():
    assert [page._milliseconds(x) for x in np.array([2.0549, 0.1004, 0.00321])] == ["2,055", "100", "3.21"]


def test_a_result_that_lacks_what_the_page_tells_is_one_line(folder, capsys):
    results.write(folder / "cpu.json", "cpu", {"gpt2-small": {}})
    assert bench.main(["report", "--results", str(folder)]) == 2
    error = capsys.readouterr().err
    assert "is damaged, or lacks what the page tells of it (KeyError: 'settings')" in error
    assert error.count("\n") == 1


def test_somebody_s_own_file_is_not_written_over(folder, capsys):
    own = page.page_of(folder)
    own.write_text("my notes")
    assert bench.main(["report", "--results", str(folder)]) == 2
    assert own.read_text() == "my notes"
    assert "not a page of results, and would be written over" in capsys.readouterr().err


def test_sizes_that_were_measured_several_times_count_once_and_say_how_far_they_are_off(folder):
    def case(n, ratio, length=8):
        pair = {"median": ratio, "quartiles": [ratio, ratio], "target": 0.9}
        return {"settings": {"length": length}, "axis": "tokens", "n": n, "ratios": {"numpy / torch": pair}}

    cases = [case(1, 0.8), case(2, 0.8), case(1, 1.1, 16), case(2, 0.6, 16), case(3, 0.7, 16), case(4, 1.0, 32)]
    assert list(page._met(cases)) == ["0.90 of that of PyTorch: met at 2 of 3 sizes"]
    assert list(page._again(cases)) == ["0.80 and 0.80 (tokens 1)", "1.10, 0.60 and 0.70 (tokens 1)"]
