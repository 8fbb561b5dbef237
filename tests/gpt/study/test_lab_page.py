"""The page's laboratory, its mistakes and its flash attention in a real browser: what is shown are Python's numbers."""

import base64

import numpy as np
import pytest

from gpt.study.broken import broken_of
from gpt.study.flash import flash_of
from gpt.study.laboratory import laboratory_of
from gpt.study.page import write
from tests.gpt.study.passes import TEXT, checked_pass, tiny_pass

SECTIONS = ("flash", "laboratory", "defects")


def data_of(recording, noise, tokens):
    return {
        "title": "Three sections",
        "tokens": tokens,
        "tensors": {},
        "sections": {
            "flash": flash_of(recording),
            "laboratory": laboratory_of(recording),
            "defects": broken_of(recording, noise),
        },
    }


@pytest.fixture(scope="module")
def data():
    return data_of(*tiny_pass(), list(TEXT[:-1]))


@pytest.fixture(scope="module")
def path(data, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "page.html"
    write(file, data["title"], data, SECTIONS)
    return file


@pytest.fixture
def page(path, open_page):
    page = open_page(path, reduced_motion="reduce")  # no scrolling that is still under way when a test goes on
    page.evaluate("study.drawAll()")
    return page


def unpack(packed):
    return np.frombuffer(base64.b64decode(packed["data"]), "<f8").reshape(packed.get("shown", packed["shape"]))


def under_the_pointer(page, canvas, i, j):
    """What the tooltip says of a cell of a heat map."""
    canvas.evaluate("canvas => canvas.scrollIntoView({ block: 'center' })")
    x, y = canvas.evaluate("(canvas, [i, j]) => canvas.heatmap.locate(i, j)", [i, j])
    page.mouse.move(x, y)
    return float(page.locator(".tooltip .value").inner_text())


def slide(page, section, value):
    page.locator(f"#{section} input[type=range]").evaluate(
        "(input, value) => { input.value = value; input.dispatchEvent(new Event('input')); }", value
    )


def four_digits(x):
    return float(f"{x:.4g}")


# Mistakes.


def test_a_switch_names_the_first_tensor_and_every_wrong_one(page, data):
    found = data["sections"]["defects"]
    for entry in found["defects"]:
        page.get_by_role("button", name=entry["name"], exact=True).click()
        assert page.locator("#defects .first-wrong").inner_text() == entry["first"]
        assert page.locator("#defects li.first").get_attribute("data-tensor") == entry["first"]
        expected = {
            name: error for name, error in zip(found["names"], entry["errors"], strict=True) if not error <= 1e-12
        }
        shown = page.eval_on_selector_all(
            "#defects li.wrong", "items => items.map((item) => [item.dataset.tensor, item.lastChild.textContent])"
        )
        assert {name for name, _ in shown} == set(expected)
        for name, text in shown:
            assert float(text) == pytest.approx(expected[name], rel=0.06)
        for _, line in entry["diff"]:
            assert line in page.locator("#defects .diff").inner_text()
        badges = page.locator("#defects .tests .badge").all_inner_texts()
        noticed = [True, entry["noticed"]["small"], entry["noticed"]["alone"], entry["noticed"]["shapes"]]
        assert badges == ["noticed" if one else "let pass" for one in noticed]


def test_only_one_mistake_is_planted_and_it_can_be_taken_out_again(page, data):
    pressed = page.locator("#defects button[aria-pressed=true]")
    names = [entry["name"] for entry in data["sections"]["defects"]["defects"][:2]]
    for name in names:
        page.get_by_role("button", name=name, exact=True).click()
        assert pressed.all_inner_texts() == [name]
    page.get_by_role("button", name="none: the sound pass").click()
    assert pressed.all_inner_texts() == ["none: the sound pass"]
    assert page.locator("#defects li.wrong").count() == 0
    assert "Nothing is planted: all 95 tensors" in page.locator("#defects .outcome").inner_text()


def test_the_map_of_a_mistake_shows_the_differences(page, data):
    for entry in data["sections"]["defects"]["defects"][::4]:
        page.get_by_role("button", name=entry["name"], exact=True).click()
        values = unpack(entry["map"])
        i, j = np.unravel_index(np.argmax(np.abs(values)), values.shape)
        canvas = page.locator("#defects canvas")
        assert under_the_pointer(page, canvas, int(i), int(j)) == values[i, j]


def test_what_is_not_used_here_is_listed(page, data):
    page.locator("#defects summary").click()
    shown = page.locator("#defects details li").all_inner_texts()
    assert shown == [f"{entry['name']}: {entry['why']}" for entry in data["sections"]["defects"]["others"]]


# The laboratory.


def test_the_reading_is_that_of_the_step_picked(page, data):
    for one in data["sections"]["laboratory"]["tensors"]:
        page.locator("#laboratory").get_by_role("radio", name=one["name"], exact=True).click()
        for dtype in ("float64", "float32"):
            page.locator("#laboratory").get_by_role("radio", name=dtype, exact=True).click()
            box = page.locator("#laboratory figure.plot svg[role=img]").bounding_box()
            page.mouse.click(box["x"] + 0.6 * box["width"], box["y"] + 100)
            said = page.locator("#laboratory p.small[aria-live]").inner_text()
            step = float(said.split("h = ")[1].split(" ")[0])
            k = int(np.argmin(np.abs(np.log(np.array(one[dtype]["steps"]) / step))))
            assert said.startswith(f"In {dtype} with h = ")
            assert one[dtype]["steps"][k] == pytest.approx(step, rel=0.01)
            central, forward = (float(f"{one[dtype][kind][k]:.3g}") for kind in ("central", "forward"))
            assert float(said.split("off by ")[1].split(" ")[0]) == pytest.approx(central, rel=0.01)
            assert float(said.split("forward difference by ")[1].rstrip(".")) == pytest.approx(forward, rel=0.01)


def test_arrow_keys_move_the_step_and_the_curves_are_the_measured_ones(page, data):
    plot = page.locator("#laboratory figure.plot svg[role=img]")
    plot.focus()
    readings = set()
    for _ in range(4):
        page.keyboard.press("ArrowLeft")
        readings.add(page.locator("#laboratory p.small[aria-live]").inner_text())
    assert len(readings) == 4
    one = data["sections"]["laboratory"]["tensors"][0]["float64"]
    path = page.locator("#laboratory path.series[d*='L']").nth(5).get_attribute("d")  # after five of the legend
    points = np.array([[float(x) for x in pair.split(" ")] for pair in path[1:].replace("M", "L").split("L")])
    kept = [(np.log10(h), np.log10(e)) for h, e in zip(one["steps"], one["central"], strict=True) if e]
    assert len(points) == len(kept)
    for axis, sign in ((0, 1), (1, -1)):
        assert np.corrcoef(points[:, axis], np.array(kept)[:, axis])[0, 1] * sign > 0.999999


def test_both_precisions_at_once(page):
    page.locator("#laboratory").get_by_role("radio", name="both").click()
    legend = page.locator("#laboratory .legend > span").all_inner_texts()
    assert legend == ["central, float64", "forward, float64", "central, float32", "forward, float32"]


# Flash attention.


def test_the_slider_shows_what_the_loop_held(page, data):
    one = data["sections"]["flash"]["heads"][0]
    states = one["forward"]
    m, l, shrink = (unpack(states[name]) for name in ("m", "l", "shrink"))  # noqa: E741
    for step in (0, 1, 7, len(states["rows"]) - 1):
        slide(page, "flash", step)
        r, rows = states["rows"][step]
        cells = page.locator("#flash tbody tr").evaluate_all(
            "rows => rows.map((row) => [...row.cells].map((cell) => cell.textContent))"
        )
        assert len(cells) == rows
        for i, (query, _, m_after, shrunk, _, _, l_after) in enumerate(cells):
            assert query.startswith(f"{r + i} ")
            assert float(m_after) == pytest.approx(four_digits(m[step, i]), rel=1e-3)
            assert float(shrunk) == pytest.approx(four_digits(shrink[step, i]), rel=1e-3)
            assert float(l_after) == pytest.approx(four_digits(l[step, i]), rel=1e-3)
        p = page.locator("#flash .inside canvas").first
        assert under_the_pointer(page, p, rows - 1, 0) == unpack(states["p"])[step, rows - 1, 0]
        o = page.locator("#flash .inside canvas").nth(1)
        assert under_the_pointer(page, o, 0, 3) == unpack(states["o"])[step, 0, 3]
    assert "ordinary attention" in page.locator("#flash .inside .badge.passed").inner_text()


def test_at_the_end_the_matrix_holds_the_softmax(page, data):
    recording, _ = tiny_pass()
    p = recording.step("blocks.1.attn.heads").values["p"][0, 2]
    page.locator("#flash").get_by_role("radio", name="block 1").click()
    page.locator("#flash").get_by_role("radio", name="head 2").click()
    slide(page, "flash", len(data["sections"]["flash"]["heads"][0]["forward"]["rows"]) - 1)
    canvas = page.locator("#flash .flash canvas").first
    for t, s in ((0, 0), (20, 0), (20, 20), (11, 4), (3, 9)):
        assert under_the_pointer(page, canvas, t, s) == pytest.approx(p[t, s], rel=1e-12)


@pytest.mark.parametrize("name, loop, ends", [("back: dq", "queries", ["dq"]), ("back: dk, dv", "keys", ["dk", "dv"])])
def test_the_way_back(page, data, name, loop, ends):
    one = data["sections"]["flash"]["heads"][0]
    page.locator("#flash").get_by_role("radio", name=name).click()
    last = len(one[loop]["rows"]) - 1
    slide(page, "flash", last)
    badges = page.locator("#flash .inside .badge.passed").all_inner_texts()
    assert [badge.split(" ")[0] for badge in badges] == ends
    total = page.locator("#flash .inside canvas").nth(2)
    true = tiny_pass()[0].step("blocks.0.attn.heads").gradients[ends[0][1:]][0, 0]
    start, size = one[loop]["rows" if loop == "queries" else "columns"][last]
    assert under_the_pointer(page, total, size - 1, 5) == pytest.approx(true[start + size - 1, 5], rel=1e-11)


def test_it_plays_and_stops(page):
    shown = page.locator("#flash .slider output")
    play = page.locator("#flash").get_by_role("button", name="Play")
    play.click()
    page.wait_for_function("document.querySelector('#flash .slider output').textContent.startsWith('3 ')")
    page.locator("#flash").get_by_role("button", name="Pause").click()
    before = shown.inner_text()
    page.get_by_role("button", name="Step on").click()
    assert int(shown.inner_text().split(" ")[0]) == int(before.split(" ")[0]) + 1


# All of them.


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_is_wider_than_the_window(path, open_page, scheme, width):
    page = open_page(path, viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.evaluate("study.drawAll()")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for section in SECTIONS:
        assert page.locator(f"#{section} .failure").count() == 0
        assert page.locator(f"#{section}").bounding_box()["height"] > 300
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) > 380) == (scheme == "light")


def test_a_model_with_grouped_heads_and_dropout(open_page, tmp_path):
    recording, noise = checked_pass("llama")
    tokens = [str(token) for token in recording.tensors["tokens"][0]]
    write(tmp_path / "page.html", "llama", data_of(recording, noise, tokens), SECTIONS)
    page = open_page(tmp_path / "page.html")
    page.evaluate("study.drawAll()")
    page.locator("#flash").get_by_role("radio", name="back: dk, dv").click()
    slide(page, "flash", 5)
    assert page.locator("#flash .inside canvas").count() == 4
    page.get_by_role("button", name="one head of each group counted", exact=True).click()
    assert page.locator("#defects .first-wrong").inner_text() == "d.blocks.1.attn.key.rope"


def test_what_was_left_out_says_why(open_page, tmp_path):
    recording, noise = tiny_pass()
    sections = {"laboratory": laboratory_of(recording, budget=0), "defects": broken_of(recording, noise, budget=0)}
    write(tmp_path / "page.html", "large", {"title": "large", "tensors": {}, "sections": sections}, SECTIONS)
    page = open_page(tmp_path / "page.html")
    page.evaluate("study.drawAll()")
    assert "parameters take minutes" in page.locator("#laboratory").inner_text()
    assert "parameters take minutes" in page.locator("#defects").inner_text()
    assert page.locator("#flash").count() == 0
