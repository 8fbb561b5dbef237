"""The page of `twingrad diverge`, in a browser: what it names and shows are Python's numbers."""

import base64
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt.cli import main
from gpt.parity import check, model
from gpt.study.bisect import bisect
from gpt.study.diverge import First, Side, TensorPair, diverge
from gpt.study.diverge_cli import page_data
from gpt.study.diverge_page import MOST_COLUMNS, MOST_ENTRIES, MOST_ROWS, data_of, entries_of, write_page

torch = pytest.importorskip("torch")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    with check.one_thread():
        yield


def bumped(x, weight, bias, eps):
    """A layer norm that is wrong in two entries."""
    y = torch.nn.functional.layer_norm(x, (x.shape[-1],), weight, bias, eps)
    bump = torch.zeros_like(y)
    bump[3, 11, 7] = 0.5
    bump[3, 2, 4] = -0.25
    return y + bump


def not_finite(x, approximate):
    y = torch.nn.functional.gelu(x, approximate=approximate)
    hole = torch.zeros_like(y)
    hole[1, 2, 3], hole[1, 2, 5] = float("nan"), float("inf")
    return y + hole


def compared(dtype="float64", swapped=False, **kernels):
    """Both engines on a small model, the second with these operators: what was found, and the swaps."""
    config = model.CONFIGS["tied"]
    params = {name: value.astype(dtype) for name, value in model.parameters(config).items()}
    sides = Side("numpy", "numpy", config, params), Side("other torch", "torch", config, params, kernels)
    batch, noise = model.batch(config), model.noise()
    found = diverge(sides, batch, dtype, noise)
    return found, bisect(sides, batch, dtype, noise) if swapped else None


def written(path, found, swaps=None):
    config = model.CONFIGS["tied"]
    write_page(path, page_data(found, swaps), found.first, config, "tied, a small one")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def fault(folder):
    found, swaps = compared(swapped=True, layer_norm=bumped)
    return found, swaps, written(folder / "fault.html", found, swaps)


@pytest.fixture(scope="module")
def agreement(folder):
    found, _ = compared()
    return found, written(folder / "agreement.html", found)


@pytest.fixture
def opened(open_page):
    """A page with all of its sections drawn."""

    def open_it(path, **options):
        page = open_page(path, **options)
        page.evaluate("study.drawAll()")
        assert page.locator(".failure").count() == 0
        return page

    return open_it


def values(page):
    """What the table of the chosen element shows: of each side, and of the truth."""
    return list(map(float, page.locator("#first .detail .value").all_inner_texts()))


def move(page, key, n):
    page.locator("#first canvas").focus()
    for _ in range(n):
        page.keyboard.press(key)


def pixel(page, i, j):
    """The colour in the middle of a cell of the map, read from a copy: reading makes a canvas slow."""
    return page.evaluate(
        """([i, j]) => {
            const canvas = document.querySelector("#first canvas"), box = canvas.getBoundingClientRect();
            const [x, y] = canvas.heatmap.locate(i, j), dots = canvas.width / box.width;
            const copy = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
            copy.drawImage(canvas, -Math.floor((x - box.left) * dots), -Math.floor((y - box.top) * dots));
            return [...copy.getImageData(0, 0, 1, 1).data.slice(0, 3)];
        }""",
        [i, j],
    )


def bars(page, kind):
    """(name, what stands beside the bar, whether it is beyond the bound) of each row."""
    rows = page.locator(f"#tensors-{kind} tr").all()
    return [
        (
            row.locator(".name").get_attribute("data-tensor"),
            row.locator(".bar span").inner_text(),
            "--bad" in row.locator(".bar").get_attribute("style"),
        )
        for row in rows
    ]


# ---------------------------------------------------------------- two that agree


def test_of_two_that_agree_the_largest_error_is_told(opened, agreement):
    found, path = agreement
    page = opened(path)
    largest = max(found.pairs, key=lambda pair: pair.error)
    verdict = page.locator("header .verdict").inner_text()
    assert verdict.startswith(f"They agree: of {len(found.pairs)} tensors the largest error is ")
    assert verdict.endswith(f", of {largest.name}; the bound is 1e-12.")
    np.testing.assert_allclose(float(re.search(r"error is (\S+),", verdict)[1]), largest.error, rtol=5e-3)
    assert page.locator("#first, #swaps").count() == 0
    assert page.locator("#tensors .mark").all_inner_texts() == ["the largest error"]


def test_every_tensor_stands_in_order_with_its_error(opened, agreement):
    found, path = agreement
    page = opened(path)
    for kind in ("forward", "backward", "step", "gradient"):
        pairs = [pair for pair in found.pairs if pair.kind == kind]
        shown = bars(page, kind)
        assert [name for name, _, _ in shown] == [pair.name for pair in pairs]
        np.testing.assert_allclose([float(error) for _, error, _ in shown], [p.error for p in pairs], rtol=5e-4)
        assert not any(beyond for _, _, beyond in shown)


# ---------------------------------------------------------------- a fault


def test_a_fault_is_named_at_the_top_and_marked_on_the_path(opened, fault):
    found, _, path = fault
    page = opened(path)
    verdict = page.locator("header .verdict")
    assert "They part at blocks.0.norm1, in the forward pass: tensor 5 of" in verdict.inner_text()
    assert verdict.inner_text().endswith("other torch is farther from the truth.")
    marked = page.locator("#tensors tr:has(a.mark)")
    assert marked.count() == 1
    assert marked.locator(".name").get_attribute("data-tensor") == "blocks.0.norm1"
    for kind in ("forward", "backward", "gradient"):
        passed = [pair.passed for pair in found.pairs if pair.kind == kind]
        assert [not beyond for _, _, beyond in bars(page, kind)] == passed
    verdict.get_by_role("link").click()
    assert page.url.endswith("#first")


def test_bars_reach_over_the_bound_where_tensors_do(opened, fault):
    found, _, path = fault
    page = opened(path)
    places = page.evaluate(
        """() => [...document.querySelectorAll("#tensors .track")].map((track) => {
            const [bar, bound] = ["i", "b"].map((part) => track.querySelector(part).getBoundingClientRect());
            return [bar.right, bound.left];
        })"""
    )
    assert len(places) == len(found.pairs)
    assert [bar <= bound + 1 for bar, bound in places] == [pair.passed for pair in found.pairs]
    assert len({round(bound) for _, bound in places}) == 1


def test_only_what_is_beyond_the_bound_can_be_shown(opened, fault):
    found, _, path = fault
    page = opened(path)
    beyond = [pair for pair in found.pairs if not pair.passed]
    page.locator("#tensors").get_by_role("radio", name=f"{len(beyond)} beyond the bound").click()
    assert page.locator("#tensors .name").count() == len(beyond)
    page.locator("#tensors").get_by_role("radio", name="Distance of each").click()
    shown = page.locator("#tensors .bar span").all_inner_texts()
    np.testing.assert_allclose(
        list(map(float, shown)), [x for pair in beyond for x in pair.from_truth], rtol=5e-4, atol=1e-300
    )
    assert page.locator("#tensors b.bound").count() == 0


def test_the_worst_element_s_numbers_are_python_s(opened, fault):
    found, _, path = fault
    page = opened(path)
    section = page.locator("#first")
    assert section.locator(".detail h3").inner_text() == "The worst element, [3, 11, 7]"
    assert values(page) == list(found.first.at())  # every bit
    (row,) = section.locator(".detail tr:has(.badge)").all()
    assert row.locator("td").first.inner_text() == "other torch"
    assert "2 of 1,300 entries differ by more than" in section.inner_text()
    assert section.locator("figure .title").inner_text() == "other torch − numpy in [3, :, :]"
    assert page.evaluate("document.querySelector('#first canvas').getAttribute('aria-label')").endswith("largest 0.5")


def test_any_element_can_be_chosen_by_the_keyboard_and_those_around_it_are_shown(opened, fault):
    found, _, path = fault
    page = opened(path)
    section = page.locator("#first")
    ours, theirs, true = found.first.values[0], found.first.values[1], found.first.truth
    assert section.locator(".around .entry").count() == 5 * 7  # rows end at 12
    (chosen,) = section.locator(".around .entry.chosen span").all_inner_texts()[:1]
    np.testing.assert_allclose(float(chosen), ours[3, 11, 7], rtol=1e-3)
    move(page, "ArrowUp", 9)
    move(page, "ArrowLeft", 3)
    assert section.locator(".detail h3").inner_text() == "Element, [3, 2, 4]"
    assert values(page) == [ours[3, 2, 4], theirs[3, 2, 4], true[3, 2, 4]]
    section.get_by_role("radio", name="Minus the truth").click()
    shown = section.locator(".around .entry").evaluate_all(
        "all => all.map((e) => [...e.children].map((c) => +c.textContent))"
    )
    window = np.s_[3, 0:6, 1:8]
    expected = np.stack([(x - true)[window].ravel() for x in (ours, theirs)], 1)
    np.testing.assert_allclose(shown, expected, rtol=5e-3, atol=1e-300)
    assert section.locator(".around .entry.beyond").count() == 1
    section.locator(".steppers input").fill("0")
    assert section.locator(".detail h3").inner_text() == "Element, [0, 2, 4]"
    assert values(page) == [ours[0, 2, 4], theirs[0, 2, 4], true[0, 2, 4]]
    assert section.locator("figure .title").inner_text() == "other torch − numpy in [0, :, :]"
    section.get_by_role("button", name="Back to the worst element").click()
    assert values(page) == list(found.first.at())
    assert section.locator(".steppers output").inner_text() == "3 of 5"


def test_the_map_is_of_the_difference_that_is_chosen(opened, fault):
    _, _, path = fault
    page = opened(path)
    whiteness = {}
    for name in ("other torch − numpy", "numpy − truth", "other torch − truth"):
        page.locator("#first").get_by_role("radio", name=name, exact=True).click()
        whiteness[name] = pixel(page, 2, 4)
    assert whiteness["numpy − truth"] == [255, 255, 255]
    assert whiteness["other torch − numpy"] == whiteness["other torch − truth"]
    red, _, blue = whiteness["other torch − numpy"]
    assert blue > red  # theirs is too small there
    page.locator("#first .controls input").first.fill("0")
    deeper = pixel(page, 2, 4)
    assert deeper[0] < whiteness["other torch − truth"][0]


def test_swaps_stand_with_their_verdicts(opened, fault):
    _, swaps, path = fault
    page = opened(path)
    section = page.locator("#swaps")
    assert section.locator(".outcome").inner_text() == "Alone enough to part: layer_norm."
    rows = [row.split("\t") for row in section.locator("tbody tr").all_inner_texts()]
    expected = [*swaps.alone, swaps.together]
    assert [row[0] for row in rows] == [*(swap.operator for swap in swaps.alone), "all of them"]
    for row, swap in zip(rows, expected, strict=True):
        np.testing.assert_allclose(
            [float(row[1]), float(row[2]), float(row[4])], [swap.loss, swap.gradient, swap.error], rtol=5e-4
        )
        assert (row[3], row[5]) == (swap.tensor, "parts" if swap.parts else "agrees")


def test_what_is_not_finite_is_shown_as_such(opened, tmp_path):
    found, _ = compared(dtype="float32", gelu=not_finite)
    page = opened(written(tmp_path / "page.html", found))
    assert "They part at blocks.0.mlp.act" in page.locator("header .verdict").inner_text()
    assert "not finite" in page.locator("header .verdict").inner_text()
    assert page.locator("#first .detail h3").inner_text() == "The worst element, [1, 2, 3]"
    ours, theirs, true = values(page)
    assert np.float32(ours) == found.first.values[0][1, 2, 3]
    assert np.isnan(theirs)
    assert true == found.first.truth[1, 2, 3]
    with np.errstate(invalid="ignore"):
        gap = np.abs(np.subtract(*(x[1, 0:6, 0:7].astype(np.float64) for x in found.first.values)))
    assert page.locator("#first .around .entry.beyond").count() == np.sum(~(gap <= found.first.within()))
    off = [pair.name for pair in found.pairs if pair.kind == "forward" and not pair.passed]
    shown = bars(page, "forward")
    assert [name for name, _, beyond in shown if beyond] == off
    assert {error for name, error, _ in shown if name == "blocks.0.mlp.act"} == {"not finite"}


def test_a_single_number_and_tensors_of_two_names_have_a_page(opened, tmp_path):
    found, _ = compared(linear_cross_entropy=lambda *a: torch.tensor(1.0, dtype=torch.float64) + 0 * a[0].sum())
    page = opened(written(tmp_path / "number.html", found))
    assert found.first.pair.shape == ()
    assert page.locator("#first .detail h3").inner_text() == "Its value"
    assert values(page) == list(found.first.at())
    pair = TensorPair("forward", "emb", (2,), np.inf, 1e-12, np.inf, (np.inf, np.inf), "the other has x here")
    other = type(found)(
        found.sides, "float64", True, (1, 2), [pair], First(pair, 0, (np.zeros(2), np.zeros(3)), None, ()), ("", "")
    )
    page = opened(written(tmp_path / "names.html", other))
    assert "the other has x here" in page.locator("#first").inner_text()
    assert page.locator("#first canvas").count() == 0


# ---------------------------------------------------------------- a tensor that is cut


def first_of(shape, index):
    rng = np.random.default_rng(0)
    true = rng.normal(size=shape)
    other = true.copy()
    other[index] += 1
    pair = TensorPair("gradient", "w", shape, 1.0, 1e-12, 1.0, (0.0, 1.0))
    return First(pair, 0, (true, other), true, index)


@given(st.data())
def test_the_part_of_a_tensor_on_the_page_holds_its_worst_element(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 60), max_size=3)))
    if shape and data.draw(st.booleans()):
        shape = (*shape[:-1], data.draw(st.integers(1000, 3000))) if np.prod(shape) < 300 else shape
    index = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    first = first_of(shape, index)
    entries = entries_of(first)
    sizes, starts = entries["sizes"], entries["starts"]
    assert len(entries["shape"]) == max(2, len(shape))
    assert np.prod(sizes) <= MOST_ENTRIES
    assert sizes[-2] <= MOST_ROWS
    assert sizes[-1] <= MOST_COLUMNS
    full = (0,) * (len(sizes) - len(shape)) + index
    assert all(start <= i < start + size for i, start, size in zip(full, starts, sizes, strict=True))
    part = np.frombuffer(base64.b64decode(entries["b"]["data"]), "<f8").reshape(sizes)
    assert part[tuple(i - start for i, start in zip(full, starts, strict=True))] == first.at()[1]
    if np.prod(shape, dtype=int) <= MOST_ENTRIES and max(shape, default=1) <= MOST_ROWS:
        assert sizes == entries["shape"]


def test_of_a_tensor_that_is_cut_numbers_stay_those_of_the_whole(opened, tmp_path):
    first = first_of((900, 1500), (700, 1300))
    found, _ = compared()
    found = type(found)(found.sides, "float64", True, (1, 2), [first.pair], first, ("", ""))
    page = opened(written(tmp_path / "page.html", found))
    assert values(page) == list(first.at())
    move(page, "ArrowRight", 2)
    assert page.locator("#first .detail h3").inner_text() == "Element, [700, 1302]"
    assert values(page) == [first.truth[700, 1302]] * 3
    headed = page.locator("#first .around th").all_inner_texts()
    assert headed[1:] == list(map(str, range(1299, 1306)))
    assert "too large for a page" in page.locator("#first").inner_text()


# ---------------------------------------------------------------- the page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_fits_the_window_in_both_schemes(opened, fault, scheme, width):
    page = opened(fault[2], viewport={"width": width, "height": 800}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    corner = pixel(page, 0, 0)
    assert max(corner) < 60 if scheme == "dark" else min(corner) > 240


def test_on_paper_nothing_is_missing_but_the_controls(open_page, fault):
    page = open_page(fault[2], color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    page.wait_for_function("document.querySelector('#swaps tbody tr')")
    assert not page.locator("#first .controls").first.is_visible()
    assert page.locator("#first canvas").is_visible()
    assert len(page.pdf()) > 10_000


def test_what_looks_like_markup_is_text(opened, tmp_path):
    found, _ = compared(layer_norm=bumped)
    shown = page_data(found) | {"sides": ["<b>a</b>", "</script><script>alert(1)</script>"]}
    path = tmp_path / "page.html"
    write_page(path, shown, found.first, model.CONFIGS["tied"], "m", "<u>text</u>", ["<u>note</u>"])
    page = opened(path)
    assert page.locator("main u, main script, h1 b").count() == 0
    head = page.locator("header").inner_text()
    assert "“<u>text</u>”" in head
    assert "<u>note</u>" in head


@pytest.mark.parametrize(
    ("sides", "names"),
    [
        (["numpy", "torch with f"], ["numpy", "torch with f"]),
        (["runs/a.safetensors", "/models/b/"], ["a.safetensors", "b/"]),
        (["numpy runs/a", "torch runs/a"], ["numpy a", "torch a"]),
        (["runs/1/model", "runs/2/model"], ["runs/1/model", "runs/2/model"]),  # which would be one name
    ],
)
def test_of_paths_the_last_part_is_the_name(sides, names, agreement):
    shown = page_data(agreement[0]) | {"sides": sides}
    assert data_of(shown, None, model.CONFIGS["tied"], "m")["names"] == names


# ---------------------------------------------------------------- the command


def test_the_command_writes_the_page_of_what_it_prints(opened, tmp_path, capsys):
    mine, out = tmp_path / "mine.py", tmp_path / "new" / "page.html"
    mine.write_text(
        "import torch\ndef half(x, weight, bias, eps):\n"
        "    return torch.nn.functional.layer_norm(x, (x.shape[-1],), weight, bias, eps).detach() * 1.5\n"
    )
    flags = ["--kernel", f"{mine}:half", "--op", "layer_norm", "--dtype", "float64", "--out", str(out)]
    assert main(["diverge", *flags]) == 1
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].startswith(f"{out}  ")
    page = opened(out)
    assert "torch with half is farther from the truth" in page.locator("header").inner_text()
    assert (
        "What half returns cannot be differentiated: its gradient is PyTorch's own."
        in page.locator("header").inner_text()
    )
    (worst,) = re.findall(r"worst element (\[.*?\]) of", printed)
    assert page.locator("#first .detail h3").inner_text() == f"The worst element, {worst}"
    shown = [
        float(re.search(rf"^  {label}\s+(\S+)$", printed, re.M)[1]) for label in ("numpy", "torch with half", "truth")
    ]
    assert values(page) == shown


def test_json_is_printed_alone_beside_a_page(tmp_path, capsys):
    assert main(["diverge", "--json", "--out", str(tmp_path / "page.html")]) == 0
    assert json.loads(capsys.readouterr().out)["agree"]
    assert (tmp_path / "page.html").is_file()


def test_a_folder_is_refused_before_anything_is_computed(tmp_path):
    command = [sys.executable, "-m", "gpt", "diverge", "--out", "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: out: . is a folder, expected a file to write, such as page.html\n"
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())


def test_a_page_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["diverge", "--out", str(tmp_path / "file" / "page.html")]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: cannot write {tmp_path}/file/page.html: ")
    assert told.count("\n") == 1
