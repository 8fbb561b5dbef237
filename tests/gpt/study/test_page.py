"""The page's parts in a real browser: heat maps, plots, controls, sections, themes, narrow windows, print."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from gpt.study import page as pages
from gpt.study import report
from gpt.study.subject import tiny

TEXT = "the cat sat"
ROOT = Path(pages.__file__).parents[2]
VALUES = np.random.default_rng(0).normal(size=(5, 7))
PARTS = """() => study.section({ id: "parts", title: "Parts", render(element, data) {
    window.calls = { clicked: [], hovered: [], picked: [], slid: [], chosen: [] };
    window.map = study.heatmap(element, {
        values: study.unpack(data.values).array, rows: 5, columns: 7, rowLabels: ["a", "b", " ", "d", "e"],
        rowTitle: "t", columnTitle: "c", diverging: true, title: "A map", cell: 20,
        onClick: (i, j) => calls.clicked.push([i, j]), onHover: (i, j) => calls.hovered.push([i, j]),
    });
    window.chart = study.plot(element, {
        series: [
            { name: "one", x: [1, 10, 100], y: [1e-3, 1e-5, 1e-4] },
            { name: "two", x: [1, 10, 100], y: [2, 3, NaN], dashed: true },
        ],
        xlabel: "steps", ylabel: "error", logx: true, logy: true, marker: 10,
        onPick: (x) => { calls.picked.push(x); chart.update({ marker: x }); },
    });
    study.slider(element, {
        min: 0, max: 4, value: 1, name: "Step", label: (i) => `step ${i}`, onInput: (i) => calls.slid.push(i),
    });
    const options = (n) => Array.from({ length: n }, (_, i) => ({ value: i, label: `choice ${i}` }));
    study.choice(element, { name: "Few", options: options(3), value: 0, onChange: (i) => calls.chosen.push(i) });
    study.choice(element, { name: "Many", options: options(9), value: 4, onChange: (i) => calls.chosen.push(i) });
    element.append(study.badge("fine", true), study.code('def f(x):  # doubles\\n    return 2 * x'));
    element.append(study.table(["name", "number"], [["<b>", 0.5], ["c", 1.25e-7]]));
} })"""


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    """A page that has data and no section yet."""
    path = tmp_path_factory.mktemp("page") / "empty.html"
    data = {
        "title": "A <title> & more", "text": "</script><b>text</b>", "tokens": ["a", " "], "targets": [" ", "\n"],
        "loss": 0.5, "checked": {"tensors": 105, "different": ["d.head"]}, "notes": ["Something was cut."],
        "tensors": {"x": pages.pack(VALUES, (3, 7))}, "sections": {"parts": {"values": pages.pack(VALUES)}},
    }  # fmt: skip
    pages.write(path, "A page", data, ())
    return path


@pytest.fixture
def parts(empty, open_page):
    """A function: the page with one section of all the parts, drawn."""

    def open_one(**options):
        page = open_page(empty, **options)
        page.evaluate(PARTS)
        page.evaluate("study.draw('parts'); document.querySelector('#parts').scrollIntoView()")
        return page

    return open_one


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A report."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    data = report.build(tiny(TEXT, 5))
    pages.write(path, data["title"], data, report.SCRIPTS)
    return path


def calls(page, name):
    return page.evaluate(f"calls.{name}")


# The page as a whole.


def test_the_head_says_what_the_page_is_about(whole, open_page):
    page = open_page(whole)
    data = page.evaluate("study.data")
    head = page.locator("header.head")
    assert head.locator("h1").inner_text() == data["title"] == page.title()
    assert head.locator(".chip").all_inner_texts() == [
        f"{a} → {b}" for a, b in zip("the␣cat␣sa", "he␣cat␣sat", strict=True)
    ]
    assert f"{data['checked']['tensors']} tensors equal the engine’s, bit for bit" in head.inner_text()
    assert float(head.locator("dd").first.inner_text()) == pytest.approx(data["loss"], rel=1e-4)
    assert data["model"]["parameters"] in head.inner_text()


def test_texts_are_shown_and_never_run(empty, open_page):
    page = open_page(empty)
    assert page.locator("h1").inner_text() == "A <title> & more"
    assert page.locator(".head .text").inner_text() == "“</script><b>text</b>”"
    assert page.locator(".chip").all_inner_texts() == ["a → ␣", "␣ → ⏎"]
    assert page.locator(".notes").inner_text() == "Something was cut."
    assert page.locator(".head .badge.failed").inner_text() == "1 of 105 tensors differ from the engine’s: d.head"


def test_sections_stand_in_order_and_one_that_fails_stops_no_other(empty, browser):
    page, errors = browser.new_page(), []
    page.on("console", lambda message: errors.append(message.text))
    page.goto(empty.as_uri())
    page.evaluate(
        """() => {
        study.section({ id: "z", title: "Last", own: true, blurb: "Why.", render: (e) => e.append("the last") });
        study.section({ id: "parts", title: "Fails", render() { throw new Error("what went wrong"); } });
        study.section({ id: "absent", title: "Without data", render() {} });
        study.section({ id: "first", title: "First", own: true, order: 1, render: (e) => e.append("the first") });
        study.contents("first", [{ title: "Within", href: "#first" }]);
        study.drawAll();
    }"""
    )
    assert page.locator("section.part > h2").all_inner_texts() == ["First", "Last", "Fails"]
    assert page.locator("nav.contents ol a").all_inner_texts() == ["First", "Within", "Last", "Fails"]
    assert "what went wrong" in page.locator("#parts .failure").inner_text()
    assert any("what went wrong" in text for text in errors)
    assert page.locator("#z").inner_text() == "Last\n\nWhy.\n\nthe last"
    page.close()


def test_a_section_is_drawn_when_it_comes_near(empty, open_page):
    page = open_page(empty)
    high = 'study.el("div", { style: "height:9000px" })'
    page.evaluate(f"""study.section({{ id: "parts", title: "Near", render: (e) => e.append({high}) }})""")
    page.wait_for_selector("#parts .content > div")
    page.evaluate("""study.section({ id: "far", title: "Far", own: true, render: (e) => e.append("now") })""")
    page.wait_for_timeout(200)
    assert page.locator("#far .content").inner_text() == ""
    page.evaluate("document.querySelector('#far').scrollIntoView()")
    page.wait_for_function("document.querySelector('#far .content').textContent === 'now'")


def test_nothing_can_be_fetched(whole, browser):
    """The page's own policy forbids it, whatever a text that it shows may contain."""
    page = browser.new_page()
    page.goto(whole.as_uri())
    assert page.evaluate("fetch('data:,x').then(() => 'fetched', () => 'refused')") == "refused"
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_window_scrolls_down_and_never_sideways(whole, open_page, scheme):
    page = open_page(whole, viewport={"width": 400, "height": 800}, color_scheme=scheme)
    page.evaluate("study.data.stations.forEach((station) => study.path.unfold(station.name))")
    width = "document.scrollingElement.scrollWidth"
    assert page.evaluate(width) == 400
    page.evaluate("study.inspector.open('blocks.0.attn.heads>p', [0, 1, 4, 2], { scroll: true })")
    page.wait_for_selector(".proof .badge")
    assert page.evaluate(width) == 400
    panel = page.locator(".inspector").bounding_box()
    assert panel["x"] == 0
    assert panel["width"] == 400
    assert panel["y"] + panel["height"] == pytest.approx(800, abs=1)
    assert panel["height"] <= 0.53 * 800
    # What is inspected can be seen above the panel.
    x, y = page.evaluate(
        "study.path.views.get('blocks.0.attn.heads>p')[0].map.locate(4, 2)",
    )
    assert 0 < x < 400
    assert 0 < y < panel["y"]
    forward, backward = (
        page.locator(f"#station\\:tok_emb .pass.{way}").bounding_box() for way in ("forward", "backward")
    )
    assert backward["y"] >= forward["y"] + forward["height"]
    assert not page.locator("nav.contents details").evaluate("(details) => details.open")
    page.keyboard.press("Escape")
    page.locator("nav.contents summary").click()
    page.locator("nav.contents a", has_text="Block 1").click()
    assert page.locator("#path-block-1").bounding_box()["y"] < 400


def test_the_passes_stand_side_by_side_where_there_is_room(whole, open_page):
    page = open_page(whole)
    page.evaluate("study.path.go('tok_emb')")
    forward, backward = (
        page.locator(f"#station\\:tok_emb .pass.{way}").bounding_box() for way in ("forward", "backward")
    )
    assert forward["y"] == backward["y"]
    assert forward["x"] + forward["width"] <= backward["x"]
    before = page.locator("#station\\:tok_emb canvas").first.bounding_box()
    page.locator("#station\\:tok_emb canvas").first.click()
    panel = page.locator(".inspector").bounding_box()
    assert panel["x"] + panel["width"] <= forward["x"]  # at the side, over nothing but the contents
    assert page.locator("#station\\:tok_emb canvas").first.bounding_box() == before  # and what was clicked stays


def test_light_and_dark_are_both_drawn_and_change_at_once(whole, open_page):
    page = open_page(whole, color_scheme="light")
    canvas = page.locator("#station\\:tok_emb canvas").first
    corner = (
        """(canvas) => [...canvas.getContext("2d").getImageData(canvas.width - 12, canvas.height - 12, 1, 1).data]"""
    )
    background = "getComputedStyle(document.body).backgroundColor"
    canvas.wait_for()
    light = page.screenshot(), page.evaluate(background), canvas.evaluate("(canvas) => canvas.toDataURL()")
    page.emulate_media(color_scheme="dark")
    dark = page.screenshot(), page.evaluate(background), canvas.evaluate("(canvas) => canvas.toDataURL()")
    assert all(a != b for a, b in zip(light, dark, strict=True))
    assert light[1] == "rgb(255, 255, 255)"
    assert sum(canvas.evaluate(corner)[:3]) < 3 * 255
    page.emulate_media(color_scheme="light")
    assert canvas.evaluate("(canvas) => canvas.toDataURL()") == light[2]


def test_a_print_has_everything_that_is_unfolded_and_is_light(whole, open_page, tmp_path):
    page = open_page(whole, color_scheme="dark")
    page.evaluate(
        """() => addEventListener("beforeprint", () => { window.printed = {
        drawn: document.querySelectorAll(".path .body.drawn").length,
        open: [...document.querySelectorAll(".path .body")].filter((b) => !b.closest("details:not([open])")).length,
        background: getComputedStyle(document.documentElement).getPropertyValue("--background"),
    }; })"""
    )
    page.pdf(path=tmp_path / "page.pdf", print_background=True)
    printed = page.evaluate("printed")
    assert printed["drawn"] == printed["open"] > 15
    assert printed["background"] == "#ffffff"
    written = (tmp_path / "page.pdf").read_bytes()
    assert written.startswith(b"%PDF")
    assert written.count(b"/Type /Page\n") > 5
    page.wait_for_function("getComputedStyle(document.documentElement).getPropertyValue('--background') !== '#ffffff'")


# Numbers and tensors.


@pytest.mark.parametrize("digits", [1, 2, 4, 9, 17])
def test_numbers_are_written_as_python_writes_them(empty, open_page, digits):
    rng = np.random.default_rng(digits)
    xs = [float(x) for x in rng.normal(size=400) * 10.0 ** rng.integers(-12, 12, 400)]
    xs += [0.0, -0.0, 1.0, -1.0, 100.0, 1e300, 123456789.0, 0.0001, 0.00001, 9.9999e-5, 99999.5, 1e-300]
    shown = open_page(empty).evaluate("([xs, digits]) => xs.map((x) => study.number(x, digits))", [xs, digits])
    assert shown == [f"{x + 0.0:.{digits}g}" for x in xs]


def test_tensors_are_unpacked_to_every_bit(empty, open_page):
    page = open_page(empty)
    found = page.evaluate("[...study.unpack(study.data.sections.parts.values).array]")
    assert np.array_equal(np.reshape(found, VALUES.shape), VALUES)
    x = page.evaluate(
        """() => {
        const x = study.tensor("x");
        const [beyond, none] = [x.at(3, 0) === undefined, study.tensor("y") === undefined];
        return { shape: x.shape, shown: x.shown, at: x.at(2, 6), beyond, none };
    }"""
    )
    assert x == {"shape": [5, 7], "shown": [3, 7], "at": VALUES[2, 6], "beyond": True, "none": True}


# Heat maps.


def test_a_heat_map_tells_the_exact_number_under_the_pointer(parts):
    page = parts()
    for i, j in [(0, 0), (2, 3), (4, 6)]:
        x, y = page.evaluate("([i, j]) => map.locate(i, j)", [i, j])
        page.mouse.move(x, y)
        assert float(page.locator(".tooltip .value").inner_text()) == VALUES[i, j]
        assert page.locator(".tooltip .muted").inner_text() == f"t {i} “{'ab␣de'[i]}”, c {j}"
    page.mouse.click(x, y)
    assert calls(page, "clicked") == [[4, 6]]
    page.mouse.move(1, 1)
    assert page.locator(".tooltip").is_hidden()
    assert calls(page, "hovered")[-2:] == [[4, 6], [None, None]]


def test_a_heat_maps_colours_are_the_numbers(parts):
    page = parts()
    colour = """([i, j]) => {
        const canvas = document.querySelector("#parts canvas");
        const [x, y] = map.locate(i, j);
        const box = canvas.getBoundingClientRect();
        const dots = canvas.width / box.width;
        return [...canvas.getContext("2d").getImageData((x - box.x) * dots, (y - box.y) * dots, 1, 1).data].slice(0, 3);
    }"""
    ends = {name: np.array(page.evaluate(f"study.colour('{name}')")) for name in ("background", "positive", "negative")}

    def expected(value, limit):
        end = ends["positive" if value > 0 else "negative"]
        return ends["background"] + (end - ends["background"]) * min(1, abs(value) / limit)

    for i, j in np.ndindex(VALUES.shape):
        np.testing.assert_allclose(
            page.evaluate(colour, [i, j]), expected(VALUES[i, j], np.abs(VALUES).max()), atol=1.5
        )
    page.evaluate("map.update(study.unpack(study.data.sections.parts.values).array.map((x) => -x), { max: 0.5 })")
    for i, j in [(0, 0), (1, 2), (3, 3)]:
        np.testing.assert_allclose(page.evaluate(colour, [i, j]), expected(-VALUES[i, j], 0.5), atol=1.5)


def test_arrow_keys_move_a_heat_maps_selection(parts):
    page = parts()
    page.locator("#parts canvas").focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "ArrowRight", "ArrowUp", "ArrowUp", "ArrowLeft"):
        page.keyboard.press(key)  # the first one selects; at an edge it stays
    assert calls(page, "clicked") == [[0, 0], [1, 0], [1, 1], [1, 2], [0, 2], [0, 2], [0, 1]]
    spoken = page.locator("#parts figure.heatmap [aria-live]").inner_text()
    assert spoken == f"t 0 “a”, c 1: {VALUES[0, 1]:.4g}"
    assert page.locator("#parts canvas").get_attribute("aria-label").startswith("Heat map A map: 5 by 7")


# Plots and controls.


def test_a_plot_draws_its_lines_and_picks_the_nearest_place(parts):
    page = parts()
    paths = page.locator("#parts figure.plot svg[role=img] path.series")
    assert paths.count() == 2
    assert [paths.nth(k).get_attribute("d").count("L") for k in range(2)] == [2, 1]  # what is no number is left out
    assert page.locator("#parts .legend").inner_text().split() == ["one", "two"]
    drawing = page.locator("#parts figure.plot svg[role=img]")
    box = drawing.bounding_box()
    page.mouse.click(box["x"] + box["width"] - 30, box["y"] + box["height"] / 2)
    assert calls(page, "picked") == [100]
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert calls(page, "picked") == [100, 10, 1, 1]
    texts = drawing.evaluate("(svg) => svg.textContent")
    assert "steps" in texts
    assert "10-4" in texts


def test_a_slider_and_choices_say_what_they_are_set_to(parts):
    page = parts()
    slider = page.get_by_role("slider", name="Step")
    slider.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("End")
    assert calls(page, "slid") == [2, 4]
    assert page.locator("#parts output").inner_text() == "step 4" == slider.get_attribute("aria-valuetext")
    page.get_by_role("radio", name="choice 2").click()
    page.keyboard.press("ArrowRight")
    assert page.get_by_role("radio", name="choice 0").get_attribute("aria-checked") == "true"
    page.get_by_role("combobox", name="Many").select_option(label="choice 7")
    assert calls(page, "chosen") == [2, 0, 7]


def test_code_and_tables_show_text_as_it_is(parts):
    page = parts()
    code = page.locator("#parts pre.code")
    assert code.evaluate("(pre) => pre.textContent") == "def f(x):  # doubles\n    return 2 * x"
    assert code.locator(".word").all_inner_texts() == ["def", "return"]
    assert code.locator(".comment").inner_text() == "# doubles"
    assert page.locator("#parts tbody").inner_text().split() == ["<b>", "0.5", "c", "1.25e-07"]


def test_the_assets_are_in_a_wheel(tmp_path):
    pytest.importorskip("setuptools", reason="setuptools, which builds the wheel, is not installed")
    source = tmp_path / "source"  # a copy, because building leaves files behind
    ignored = shutil.ignore_patterns("__pycache__", "results", "*.pyc")
    for name in ("gpt", "reference", "kernels", "bench"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-c", "from setuptools.build_meta import build_wheel; build_wheel('..')"]
    made = subprocess.run(build, cwd=source, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"gpt/study/assets/{path.name}" for path in (ROOT / "gpt/study/assets").iterdir()} <= names
