"""The path and the inspector in a real browser: every number that they show is the engine's, and every sum adds up."""

import math
import re

import numpy as np
import pytest

from gpt.parity import model as parity
from gpt.study import page as pages
from gpt.study import report
from gpt.study.record import record
from gpt.study.subject import Subject, tiny

TEXT = "the cat sat"
CONFIGS = ("tied", "untied", "llama", "adapted")
WORDS = {"exp": math.exp, "log": math.log, "sqrt": math.sqrt, "tanh": math.tanh}
WORDS |= {"max": lambda *terms: max(terms), "cdf": lambda x: math.erfc(-x / math.sqrt(2)) / 2}


def subject_of(name):
    """The tiny model that a report makes by itself, or one of the checker's models, with dropout."""
    if name == "tiny":
        return tiny(TEXT, 5)
    config, batch = parity.CONFIGS[name], parity.batch(parity.CONFIGS[name])
    tokens, targets = batch.inputs[:1], batch.targets[:1]
    labels = [str(token) for token in (*tokens[0], 0)]
    return Subject(name, config, {0: parity.parameters(config)}, tokens, targets, labels, [], parity.noise())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A function: a subject's name to its page's path, its data, and the recording that the page must agree with."""
    folder, known = tmp_path_factory.mktemp("pages"), {}

    def write(name):
        if name not in known:
            subject = subject_of(name)
            data = report.build(subject)
            path = folder / f"{name}.html"
            pages.write(path, data["title"], data, report.SCRIPTS)
            recording = record(subject.config, subject.params, subject.tokens, subject.targets, subject.noise)
            known[name] = path, data, recording
        return known[name]

    return write


def numbers(recording, data):
    """The engine's own arrays by the page's keys, from the recording and not from the page."""
    found = {**recording.tensors, **{f"d.{name}": gradient for name, gradient in recording.gradients.items()}}
    for step in recording.steps:
        for local, value in step.values.items():
            found.setdefault(f"{step.name}>{local}", value)
    return {key: np.asarray(found[key]) for key in data["tensors"]}


def largest(truth, key):
    """Of a tensor; of the key's bias, whose true gradient is 0 so that all of it is rounding, of its weight."""
    return np.abs(truth[key.replace("attn.key.bias", "attn.key.weight")]).max()


def calculated(text):
    """What the right side of a spelled equation is, by Python's own arithmetic."""
    text = re.sub(r"\(\d+ more, together ([^()]+)\)", r"(\1)", text)
    for sign, word in {"·": "*", "−": "-", "^": "**", " = ": " == ", "[": "(", "]": ")", "\u00a0": " "}.items():
        text = text.replace(sign, word)
    return eval(text, {"__builtins__": {}}, WORDS)  # a page's text, in a test


@pytest.mark.parametrize("name", CONFIGS)
def test_all_equations_computed_by_the_page_give_the_engines_tensors(name, written, open_page):
    path, data, recording = written(name)
    truth = numbers(recording, data)
    page = open_page(path)
    computed = page.evaluate(
        """() => study.data.stations.map((station) => [...station.forward, ...station.backward].map((equation) =>
        [station.wires[equation.tensor], station.name, [...study.equations.evaluate(equation, station)]]))"""
    )
    assert sum(map(len, computed)) > 100
    for key, station, values in (one for equations in computed for one in equations):
        true = truth[key]
        size = largest(truth, key)
        np.testing.assert_allclose(np.reshape(values, true.shape), true, rtol=0, atol=1e-12 * size, err_msg=station)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_sum_written_out_in_full_is_the_engines_number(name, written, open_page):
    """Digits enough for every bit, all terms: calculated by Python, the text gives what the engine computed."""
    path, data, recording = written(name)
    truth, rng = numbers(recording, data), np.random.default_rng(1)
    asked = []
    for s, station in enumerate(data["stations"]):
        for way in ("forward", "backward"):
            for e, equation in enumerate(station[way]):
                shape = truth[station["wires"][equation["tensor"]]].shape
                for _ in range(2):
                    asked.append([s, way, e, [int(rng.integers(n)) for n in shape]])
    texts = open_page(path).evaluate(
        """(asked) => asked.map(([s, way, e, index]) => {
            const station = study.data.stations[s];
            const options = { terms: Infinity, digits: 17 };
            const { parts } = study.equations.spell(station[way][e], station, index, options);
            return parts.map((part) => part.text ?? part).join("");
        })""",
        asked,
    )
    for (s, way, e, index), text in zip(asked, texts, strict=True):
        station = data["stations"][s]
        key = station["wires"][station[way][e]["tensor"]]
        true = truth[key][tuple(index)]
        assert calculated(text) == pytest.approx(true, rel=1e-11, abs=1e-13 * largest(truth, key)), (key, index, text)


def test_a_click_on_every_tensor_of_every_station_shows_its_value_and_its_sum(written, open_page):
    path, data, recording = written("tiny")
    truth = numbers(recording, data)
    page = open_page(path)
    shown = page.evaluate(
        """() => {
        const found = [];
        for (const station of study.data.stations) {
            study.path.unfold(station.name);
            for (const view of [...study.path.views.values()].flat().filter((one) => one.station === station)) {
                const { shown } = study.tensor(view.key);
                const [i, j] = [shown.at(-2) ?? 1, shown.at(-1) ?? 1].map((n) => Math.floor(n * 0.6));
                const [clientX, clientY] = view.map.locate(i, j);
                const canvas = view.element.querySelector("canvas");
                canvas.dispatchEvent(new MouseEvent("click", { clientX, clientY, bubbles: true }));
                const { key, index } = study.inspector.current;
                const panel = document.querySelector(".inspector");
                found.push({
                    station: station.name, local: view.local, key, index,
                    value: panel.querySelector(".value").textContent,
                    made: [...panel.querySelectorAll(".made .spelled")].map((row) => row.textContent),
                    gradient: panel.querySelector(".gradient h4").textContent,
                });
            }
        }
        return found;
    }"""
    )
    seen = {(one["station"], one["local"]) for one in shown}
    for station in data["stations"]:
        for equation in (*station["forward"], *station["backward"]):
            assert (station["name"], equation["tensor"]) in seen
    made = 0
    for one in shown:
        assert one["key"] == next(s for s in data["stations"] if s["name"] == one["station"])["wires"][one["local"]]
        true = truth[one["key"]][tuple(one["index"])]
        assert float(one["value"]) == true, one
        if not one["made"]:
            continue
        made += 1
        text = one["made"][0].replace("Show all terms", "").partition(" = ")[2]
        # Four digits of each number, so of the largest entry about three.
        assert calculated(text) == pytest.approx(true, abs=5e-3 * largest(truth, one["key"])), one
        if f"d.{one['key']}" in truth:
            assert float(one["gradient"].rpartition(" ")[2]) == pytest.approx(
                truth[f"d.{one['key']}"][tuple(one["index"])], rel=1e-5
            )
    assert made > 150


def test_what_an_element_was_computed_from_is_lit(written, open_page):
    path, _, recording = written("tiny")
    page = open_page(path)
    C = recording.tensors["blocks.0.norm1"].shape[2]

    def lit(key, index):
        page.evaluate("([key, index]) => study.inspector.open(key, index, { scroll: true })", [key, index])
        return page.evaluate(
            """() => {
            const found = {}; // in the part of each tensor that its maps show
            for (const [key, views] of study.path.views) {
                for (const { map } of views) if (map.outlined[1].length) found[key] = map.outlined[1];
            }
            return found;
        }"""
        )

    name = "blocks.0.attn.query"
    assert lit(name, [0, 2, 5]) == {
        "blocks.0.norm1": [[2, c] for c in range(C)],
        f"{name}.weight": [[5, c] for c in range(C)],
        f"{name}.bias": [[0, 5]],
    }
    # The fourth of the tokens sees itself and those before it: what is masked is neither lit nor written.
    heads = "blocks.0.attn.heads"
    assert lit(f"{heads}>m", [0, 1, 3]) == {f"{heads}>scores": [[3, s] for s in range(4)]}
    assert lit(f"{heads}>z", [0, 1, 3]) == {f"{heads}>scores": [[3, s] for s in range(4)], f"{heads}>m": [[1, 3]]}
    assert page.locator(".made .spelled .term").count() == 8
    # A row of the table is learnt where its token stands, and nowhere else.
    token = int(recording.tensors["tokens"][0, 2])
    places = np.flatnonzero(recording.tensors["tokens"][0] == token).tolist()
    assert lit("tok_emb>dweight", [token, 3]) == {
        "tokens": [[0, t] for t in places],
        "d.tok_emb": [[t, 3] for t in places],
    }
    # Positions are not added up over examples alone: the row of one position, of all examples.
    assert lit("d.pos_emb", [4, 3]) == {"d.emb": [[4, 3]]}

    # And in the picture: the outline's colour is there, and it goes when the inspector is closed.
    page.evaluate("([key, index]) => study.inspector.open(key, index, { scroll: true })", [name, [0, 2, 5]])
    weights = page.locator(f'.station[data-station="{name}"] .tensor[data-local="weight"] canvas')
    count = """(canvas) => {
        const colour = study.colour("lit");
        const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        let n = 0;
        for (let i = 0; i < data.length; i += 4) n += colour.every((c, k) => Math.abs(data[i + k] - c) < 3);
        return n;
    }"""
    assert weights.evaluate(count) > 100
    page.keyboard.press("Escape")
    assert weights.evaluate(count) == 0
    assert page.locator(".inspector").is_hidden()


def test_a_gradient_that_is_a_sum_shows_each_contribution(written, open_page):
    path, data, recording = written("tiny")
    page = open_page(path)
    total = "d.blocks.0.norm1"
    parts = data["contributions"][total]
    assert len(parts) == 3
    page.evaluate("study.inspector.open('blocks.0.norm1', [0, 4, 7])")
    panel = page.locator(".inspector .gradient")
    assert "The sum of 3 contributions" in panel.inner_text()
    row = panel.locator(".spelled").first
    terms = [float(text) for text in row.locator(".term").all_inner_texts()]
    truth = numbers(recording, data)
    assert terms == [pytest.approx(truth[part["key"]][0, 4, 7], rel=1e-3) for part in parts]
    assert sum(terms) == pytest.approx(truth[total][0, 4, 7], rel=1e-2)
    # A tied table learns both where it is looked up and where words are told apart.
    assert len(data["contributions"]["d.tok_emb.weight"]) == 2


@pytest.mark.parametrize("name", ["tiny", "llama", "adapted"])
def test_the_pages_differences_of_the_loss_are_the_recordings(name, written, open_page):
    path, data, recording = written(name)
    page = open_page(path)
    rng = np.random.default_rng(3)
    keys = [key for key in data["tensors"] if f"d.{key}" in data["tensors"] and key != "loss"]
    asked = [[key, [int(rng.integers(n)) for n in data["tensors"][key]["shape"]]] for key in keys]
    found = page.evaluate(
        """(asked) => asked.map(([key, index]) => {
            const of = study.tensor(key);
            const at = index.reduce((sum, i, axis) => sum + i * of.strides[axis], 0);
            const moved = Float64Array.from(of.array);
            moved[at] += 0.01;
            return [study.equations.lossWith(key, moved), study.equations.difference(key, index).slope];
        })""",
        asked,
    )
    for (key, index), (loss, slope) in zip(asked, found, strict=True):
        moved = recording.tensors[key].copy()
        moved[tuple(index)] += 0.01
        assert loss == pytest.approx(recording.loss_with(key, moved), rel=1e-12), key
        gradient = recording.gradients[key]
        size = largest(recording.gradients, key)
        assert slope == pytest.approx(gradient[tuple(index)], rel=0, abs=2e-7 * size + 1e-9), (key, index)


def test_the_gradient_within_a_station_is_proved_too(written, open_page):
    """Of an intermediate result, and of one station's part in a sum."""
    path, data, recording = written("tiny")
    page = open_page(path)
    truth = numbers(recording, data)
    for key, index in {
        "blocks.0.attn.heads>scores": [0, 1, 4, 2],
        "blocks.1.norm2>dh": [0, 3, 5],
        data["contributions"]["d.blocks.0.norm1"][0]["key"]: [0, 4, 7],
        "d.blocks.1.norm1": [0, 4, 7],
    }.items():
        page.evaluate("([key, index]) => study.inspector.open(key, index)", [key, index])
        page.wait_for_selector(".proof .badge")
        rows = page.locator(".proof td").all_inner_texts()
        gradient = key if key in truth and ("d." in key[:2] or ">d" in key) else key.replace(">", ">d")
        assert float(rows[0]) == truth[gradient][tuple(index)]
        assert float(rows[1]) == pytest.approx(float(rows[0]), abs=1e-7 * np.abs(truth[gradient]).max())
        assert "passed" in page.locator(".proof .badge").get_attribute("class")


def test_the_normal_distribution_is_exact(written, open_page):
    page = open_page(written("tiny")[0])
    xs = [float(x) for x in np.concatenate([np.linspace(-9, 9, 3001), [-37.5, -30, 30, 1e-9, 0]])]
    found = page.evaluate("(xs) => xs.map(study.equations.cdf)", xs)
    for x, value in zip(xs, found, strict=True):
        assert value == pytest.approx(math.erfc(-x / math.sqrt(2)) / 2, rel=1e-12, abs=1e-300)


def test_links_go_through_the_model_and_back(written, open_page):
    page = open_page(written("tiny")[0])
    page.evaluate("study.inspector.open('blocks.0.attn.query', [0, 2, 5], { scroll: true })")
    assert page.locator(".inspector .bar button").first.is_disabled()
    trail = [page.locator(".inspector h3").inner_text()]
    for _ in range(6):  # always to the first number of the sum: through norms and blocks, down to a parameter
        page.locator(".made .term").first.click()
        trail.append(page.locator(".inspector h3").inner_text())
        key = page.evaluate("study.inspector.current.key")
        canvas = page.locator(f'.tensor[data-key="{key}"] canvas').first
        assert canvas.is_visible()
        if not page.locator(".made .term").count():
            break
    assert len(set(trail)) == len(trail) > 3
    for expected in reversed(trail[:-1]):
        page.locator(".inspector .bar button").first.click()
        assert page.locator(".inspector h3").inner_text() == expected


def test_an_address_can_be_shared(written, open_page):
    page = open_page(written("tiny")[0])
    page.evaluate("study.inspector.open('blocks.1.attn.heads>scores', [0, 2, 4, 1])")
    address = page.url
    assert address.endswith("[0,2,4,1]")
    page.goto("about:blank")
    page.goto(address)
    page.wait_for_selector(".inspector h3")
    assert page.evaluate("study.inspector.current") == {"key": "blocks.1.attn.heads>scores", "index": [0, 2, 4, 1]}
    map_ = page.locator('.station[data-station="blocks.1.attn.heads"] .tensor[data-local="scores"]')
    assert "head 2 of 3" in map_.inner_text()
    box = map_.bounding_box()
    assert -box["height"] < box["y"] < 900
    for wrong in ("#nothing[0,1]", "#blocks.1.attn.heads[0,99,0,0]", "#%E0%A4%A", "#blocks.1.norm1[]"):
        page.goto("about:blank")
        page.goto(address.partition("#")[0] + wrong)
        page.wait_for_timeout(50)
        assert page.locator(".inspector").is_hidden()


def test_the_keyboard_moves_closes_and_finds(written, open_page):
    path, _, recording = written("tiny")
    page = open_page(path)
    page.keyboard.press("/")
    page.keyboard.type("norm1 block 1".replace("block ", "blocks."))
    assert page.locator(".results li").count() > 1
    page.keyboard.press("Enter")
    station = page.locator('.station[data-station="blocks.1.norm1"]')
    assert 0 <= station.bounding_box()["y"] < 900
    canvas = station.locator('.tensor[data-local="x"] canvas')
    canvas.focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowRight", "ArrowLeft", "ArrowUp", "ArrowDown"):
        page.keyboard.press(key)  # the first selects
    x = recording.tensors["blocks.0.shortcut2"]
    assert page.locator(".inspector .value").inner_text() == repr(float(x[0, 1, 1]))
    assert page.evaluate("document.activeElement.tagName") == "CANVAS"
    page.keyboard.press("Escape")
    assert page.locator(".inspector").is_hidden()
    assert "#" not in page.url
    page.keyboard.press("/")
    page.keyboard.type("no such thing")
    assert page.locator(".results").inner_text() == "nothing of that name"
    page.keyboard.press("Escape")
    assert page.locator(".results").is_hidden()


def test_steppers_show_each_head(written, open_page):
    path, data, recording = written("tiny")
    page = open_page(path)
    page.evaluate("study.path.go('blocks.0.attn.heads')")
    tensor = page.locator('.station[data-station="blocks.0.attn.heads"] .tensor[data-local="p"]')
    p = numbers(recording, data)["blocks.0.attn.heads>p"]
    for head in (1, 2, 0):
        tensor.get_by_label("Next head").click()
        assert f"head {head} of 3" in tensor.inner_text()
        tensor.scroll_into_view_if_needed()
        x, y = tensor.locator("canvas").evaluate("(canvas) => canvas.heatmap.locate(5, 3)")
        page.mouse.move(x, y)
        assert page.locator(".tooltip .value").inner_text() == repr(float(p[0, head, 5, 3]))
        page.mouse.click(x, y)
        assert page.evaluate("study.inspector.current.index") == [0, head, 5, 3]


def test_each_station_has_its_formulas_and_its_code(written, open_page):
    path, data, _ = written("tiny")
    page = open_page(path)
    page.evaluate("study.data.stations.forEach((station) => study.path.unfold(station.name))")
    boxes = page.evaluate(
        """() => [...document.querySelectorAll(".passes .formula > math")].map((math) => {
            const box = math.getBoundingClientRect();
            return [math.namespaceURI, box.width, box.height];
        })"""
    )
    assert len(boxes) == sum(len(s["forward"]) + len(s["backward"]) for s in data["stations"])
    for namespace, width, height in boxes:
        assert namespace.endswith("MathML")
        assert width > 20
        assert height > 10
    station = page.locator('.station[data-station="blocks.0.mlp.act"]')
    station.locator("details.more > summary").first.click()
    assert "def backward(dy" in station.inner_text()
    station.get_by_role("radio", name="Backward").click()
    assert station.locator(".pass.forward").first.is_hidden()
    assert station.locator(".pass.backward").first.is_visible()


def test_laws_and_proofs_are_shown_where_there_are_some(tmp_path, open_page):
    data = report.build(tiny(TEXT, 0))
    station = next(s for s in data["stations"] if s["name"] == "blocks.0.norm1")
    station["laws"] = [
        {"name": "rows sum to 0", "error": 3.2e-16, "bound": 1e-12, "passed": True, "doc": "Why."},
        {"name": "a law that does not hold", "error": 0.5, "bound": 1e-12, "passed": False, "doc": "Why."},
    ]
    proof = {"tensor": "x", "index": [0, 1, 2], "by_hand": 0.5, "differences": 0.5000001, "error": 2e-7, "bound": 1e-7}
    station["proofs"] = [proof]
    pages.write(tmp_path / "page.html", "A page", data, report.SCRIPTS)
    page = open_page(tmp_path / "page.html")
    page.evaluate("study.path.go('blocks.0.norm1')")
    shown = page.locator('.station[data-station="blocks.0.norm1"]')
    assert shown.locator(".badge.passed").inner_text() == "rows sum to 0: 3.2e-16"
    assert shown.locator(".badge.failed").all_inner_texts() == ["a law that does not hold: 0.5", "2e-07"]
    shown.locator(".proofs a").click()
    assert page.evaluate("study.inspector.current") == {"key": "emb", "index": [0, 1, 2]}


def test_of_a_model_that_was_cut_a_sum_says_what_it_lacks(tmp_path, open_page, monkeypatch):
    monkeypatch.setattr(report, "MOST_NUMBERS", 2500)
    subject = tiny(TEXT, 5)
    data = report.build(subject)
    assert not data["complete"]
    pages.write(tmp_path / "page.html", "A page", data, report.SCRIPTS)
    page = open_page(tmp_path / "page.html")
    recording = record(subject.config, subject.params, subject.tokens, subject.targets)
    key, index = "blocks.0.attn.query", [0, 2, 3]
    page.evaluate("([key, index]) => study.inspector.open(key, index)", [key, index])
    shown = data["tensors"][key]["shown"][-1]
    x, weight = recording.tensors["blocks.0.norm1"], recording.tensors[f"{key}.weight"]
    text = page.locator(".made .spelled").inner_text()
    rest, together = re.search(r"and (\d+) terms that are not on this page, together (\S+)\)", text).groups()
    assert int(rest) == x.shape[2] - shown
    assert float(together) == pytest.approx(float(x[0, 2, shown:] @ weight[3, shown:]), rel=1e-3)
    assert page.locator(".made .term").count() == 2 * shown + 1
    assert "needs every number of the pass" in page.locator(".proof").inner_text()
    assert page.locator(".notes").inner_text().startswith("Of each tensor the first")
    page.evaluate("study.data.stations.forEach((station) => study.path.unfold(station.name))")
