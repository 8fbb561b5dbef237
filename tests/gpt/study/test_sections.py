"""The sections on attention, training and the flow of gradients, in a browser: what is shown is the data's number."""

import base64
import re

import numpy as np
import pytest

from gpt.study import page
from gpt.study.flow import flow
from gpt.study.heads import heads
from gpt.study.record import record
from gpt.study.subject import tiny
from gpt.study.training import training
from reference import attention as attention_layer
from reference.optim import clip_scale

TEXT = "the cat sat on"
SCRIPTS = ("bars", "attention", "training", "flow")
VIEWS = {"Weights": "p", "Scores": "scores", "Without the mask": "unmasked", "After dropout": "dropped"}


def unpack(packed):
    return np.frombuffer(base64.b64decode(packed["data"]), "<f8").reshape(packed["shown"])


def write(path, labels, **sections):
    page.write(path, "A page", {"title": "A page", "tokens": labels, "tensors": {}, "sections": sections}, SCRIPTS)
    return path


@pytest.fixture(scope="module")
def subject():
    return tiny(TEXT, steps=12, dropout=0.2)


@pytest.fixture(scope="module")
def recording(subject):
    return record(subject.config, subject.params, subject.tokens, subject.targets, subject.noise)


@pytest.fixture(scope="module")
def sections(subject, recording):
    kept = [step for step in subject.snapshots if step in (0, 5, 12)] or list(subject.snapshots)
    snapshots = [(step, subject.snapshots[step]) for step in {*kept, max(subject.snapshots)}]
    return {
        "attention": heads(recording, subject.labels),
        "training": training(
            subject.config, snapshots, subject.tokens, subject.targets, subject.labels, subject.vocabulary.__getitem__
        ),
        "flow": flow(recording),
    }


@pytest.fixture(scope="module")
def file(tmp_path_factory, subject, sections):
    return write(tmp_path_factory.mktemp("page") / "page.html", subject.labels[:-1], **sections)


@pytest.fixture
def opened(open_page, file):
    """The page with all of its sections drawn."""

    def open_it(**options):
        page = open_page(file, **options)
        page.evaluate("study.drawAll()")
        return page

    return open_it


def walk(page, canvas, places):
    """Select cells of a heat map with the arrow keys, from where its selection stands."""
    (i, j), *targets = places
    canvas.focus()
    for t, s in targets:
        for key, n in (("ArrowDown", t - i), ("ArrowUp", i - t), ("ArrowRight", s - j), ("ArrowLeft", j - s)):
            for _ in range(n):
                page.keyboard.press(key)
        (i, j) = (t, s)
        yield t, s


def last_number(text):
    return float(re.findall(r"-?\d+(?:\.\d+)?(?:e[+-]\d+)?", text)[-1])


# ---------------------------------------------------------------- attention


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("layer, head", [(0, 0), (1, 2)])
def test_each_view_shows_the_matrix_that_it_names(opened, recording, sections, view, layer, head):
    step = recording.step(f"blocks.{layer}.attn.heads")
    if view == "Without the mask":
        _, saved = attention_layer.forward(*(step.arguments[part] for part in "qkv"), causal=False)
        expected = attention_layer.weights(saved)[0, head]
    else:
        expected = unpack(sections["attention"]["matrices"][VIEWS[view]])[layer, head]
    page = opened()
    section = page.locator("#attention")
    section.get_by_role("radio", name=view).click()
    section.get_by_role("button", name=f"layer {layer}, head {head}").click()
    figure = section.locator(".sides figure:visible")
    assert figure.count() == 1
    assert figure.locator(".title").inner_text() == f"{view}, layer {layer}, head {head}"
    T = len(TEXT) - 1
    start = T - 1, int(np.argmax(unpack(sections["attention"]["matrices"]["p"])[0, 0, -1]))
    for t, s in walk(page, figure.locator("canvas"), [start, (T - 1, 0), (5, 2), (5, 5), (3, 7), (0, 0)]):
        said = section.locator(".said").inner_text()
        assert said.startswith(f"query {t} “{TEXT[t].replace(' ', '␣')}” → key {s} “{TEXT[s].replace(' ', '␣')}”")
        shown = float(section.locator(".said strong").inner_text())
        np.testing.assert_allclose(shown, expected[t, s], rtol=1e-5, atol=1e-12)
        hidden = s > t and view != "Without the mask"
        assert ("mask hides" in said or "comes after the query" in said) == hidden


def test_under_the_pointer_stand_both_tokens_and_every_digit(opened, sections):
    p = unpack(sections["attention"]["matrices"]["p"])[0, 0]
    page = opened()
    canvas = page.locator("#attention .sides figure:visible canvas")
    canvas.scroll_into_view_if_needed()
    box, seen = canvas.bounding_box(), set()
    for x, y in [(0.3, 0.3), (0.5, 0.9), (0.9, 0.5), (0.25, 0.8), (0.95, 0.97)]:
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
        value, named = page.locator(".tooltip").inner_text().split("\n")
        t, s = map(int, re.fullmatch(r"query (\d+) “.”, key (\d+) “.”", named).groups())
        assert float(value) == p[t, s]
        seen.add((t, s))
    assert len(seen) == 5


def test_the_laws_hold_with_the_mask_and_not_without(opened):
    page = opened()
    section = page.locator("#attention")
    laws = section.locator(".sides .laws")
    assert laws.locator(".passed").count() == 3
    section.get_by_role("radio", name="Without the mask").click()
    assert "every row sums to 1" in laws.locator(".passed").inner_text()
    failed = laws.locator(".failed").all_inner_texts()
    assert len(failed) == 2
    assert "queries see what comes after them" in failed[0]
    section.get_by_role("radio", name="After dropout").click()
    assert laws.locator(".failed").count() == 0
    assert "only in the mean over many masks" in laws.inner_text()


def test_the_causal_law_is_shown_with_the_mask_on_and_off(opened, sections):
    page = opened()
    section = page.locator("#attention")
    badge = section.locator(".badge", has_text="outputs before the changed token")
    assert "by exactly 0" in badge.inner_text()
    assert "passed" in badge.get_attribute("class")
    section.get_by_role("radio", name="Mask off").click()
    section.get_by_role("radio", name="layer 1").click()
    assert "failed" in badge.get_attribute("class")
    moved = unpack(sections["attention"]["influence"]["unmasked"])[1]
    np.testing.assert_allclose(last_number(badge.inner_text()), np.triu(moved, 1).max(), rtol=1e-3)


def test_how_far_back_heads_look_is_their_mean_by_distance(opened, sections):
    page = opened()
    figure = page.locator("#attention figure", has_text="Mean weight by distance")
    distances = unpack(sections["attention"]["by_distance"]).reshape(6, -1)
    expected = np.vstack([distances, unpack(sections["attention"]["uniform"])])
    canvas = figure.locator("canvas")
    canvas.focus()
    page.keyboard.press("Enter")
    for k, d in walk(page, canvas, [(0, 0), (2, 1), (5, 4), (6, 12)]):
        spoken = figure.locator("[aria-live]").inner_text()
        np.testing.assert_allclose(last_number(spoken), expected[k, d], rtol=1e-3)


# ---------------------------------------------------------------- training


def go_to(page, i):
    page.locator("#training input[type=range]").fill(str(i))


def test_the_slider_shows_each_snapshots_numbers(opened, sections):
    data, page = sections["training"], opened()
    section, T = page.locator("#training"), len(TEXT) - 1
    probabilities, right = unpack(data["probabilities"]), unpack(data["target_probabilities"])
    for i in [2, 0, 1]:
        go_to(page, i)
        assert section.locator(".timeline output").inner_text() == f"{data['steps'][i]} of 12"
        moment = section.locator(".moment").inner_text()
        loss, norm = map(float, re.search(r"loss (\S+), norm of the gradient (\S+),", moment).groups())
        np.testing.assert_allclose([loss, norm], [data["losses"][i], data["global_norms"][i]], rtol=1e-4)
        hits = sum(a == b for a, b in zip(data["said"][i], data["targets"], strict=True))
        assert f"{hits} of {T} next tokens right" in moment
        rows = section.locator(".predictions tbody tr").all_inner_texts()
        assert len(rows) == T
        for t, row in enumerate(rows):
            after, says, probability, should, its, mark = row.split("\t")
            assert after.startswith(f"{t} ")
            assert says == data["said"][i][t].replace(" ", "␣")
            assert should == TEXT[t + 1].replace(" ", "␣")
            np.testing.assert_allclose([float(probability), float(its)], [probabilities[i, t], right[i, t]], rtol=1e-3)
            assert (mark == "✓") == (says == should)
        title = section.locator(".sides figure .title").inner_text()
        assert title == f"Layer 0, head 0, after {data['steps'][i]} steps"


def test_a_cell_that_is_chosen_is_followed_over_heads_and_steps(opened, sections):
    weights = unpack(sections["training"]["attention"])
    page, T = opened(), len(TEXT) - 1
    section = page.locator("#training")
    section.get_by_role("button", name="layer 1, head 1").click()
    for t, s in walk(page, section.locator(".sides canvas").last, [(T - 1, T - 2), (T - 1, 3), (6, 4)]):
        sentence = section.locator(".pair")
        assert f"Query {t} “{TEXT[t].replace(' ', '␣')}”" in sentence.inner_text()
        shown = float(sentence.locator("strong").inner_text())
        np.testing.assert_allclose(shown, weights[-1, 1, 1, t, s], rtol=1e-5)
    track = section.locator("figure", has_text="The pair’s weight by head and step")
    for k, i in walk(page, track.locator("canvas"), [(4, 2), (4, 0), (0, 1), (5, 2)]):
        spoken = track.locator("[aria-live]").inner_text()
        np.testing.assert_allclose(last_number(spoken), weights[i, k // 3, k % 3, 6, 4], rtol=1e-3)
        title = section.locator(".sides figure .title").inner_text()
        assert title == f"Layer {k // 3}, head {k % 3}, after {sections['training']['steps'][i]} steps"
        shown = float(section.locator(".pair strong").inner_text())
        np.testing.assert_allclose(shown, weights[i, k // 3, k % 3, 6, 4], rtol=1e-5)
    lines = section.locator("figure.plot", has_text="The pair’s weight in the heads of layer 1")
    assert lines.locator("path.series").count() == 2 * 3  # in the plot and in its legend


def test_gradients_are_those_of_the_step(opened, sections):
    data, page = sections["training"], opened()
    norms = unpack(data["norms"])
    go_to(page, 1)
    shown = page.locator("#training table.bars .bar span").all_inner_texts()
    groups = [[0, 1], *([p for p, n in enumerate(data["parameters"]) if n.startswith(f"blocks.{b}.")] for b in (0, 1))]
    groups.append([p for p, name in enumerate(data["parameters"]) if name.startswith("final_norm")])
    expected = [np.linalg.norm(norms[1, group]) for group in groups]
    np.testing.assert_allclose(list(map(float, shown)), expected, rtol=1e-3)
    figure = page.locator("#training figure", has_text="Norm of each parameter’s gradient")
    figure.locator("canvas").focus()
    page.keyboard.press("Enter")
    for p, i in walk(page, figure.locator("canvas"), [(0, 0), (3, 2), (17, 0)]):
        np.testing.assert_allclose(last_number(figure.locator("[aria-live]").inner_text()), norms[i, p], rtol=1e-3)
        assert page.locator("#training .timeline output").inner_text() == f"{data['steps'][i]} of 12"


def test_the_loss_curve_moves_the_slider_and_the_slider_its_mark(opened, sections):
    page = opened()
    plot = page.locator("#training figure.plot").first

    def mark():
        return float(plot.locator("line.marker").get_attribute("x1"))

    go_to(page, 0)
    first = mark()
    go_to(page, 2)
    assert mark() > first
    plot.locator("svg[role=img]").focus()
    page.keyboard.press("ArrowLeft")
    assert page.locator("#training .timeline output").inner_text() == f"{sections['training']['steps'][1]} of 12"


def test_play_goes_through_all_snapshots_and_stops(opened):
    page = opened()
    button = page.locator("#training .timeline button")
    page.evaluate(
        """() => {
            const output = document.querySelector("#training .timeline output");
            window.seen = [];
            new MutationObserver(() => window.seen.push(output.textContent)).observe(output, { childList: true });
        }"""
    )
    button.click()
    assert button.inner_text() == "Pause"
    page.wait_for_function("document.querySelector('#training .timeline button').textContent === 'Play'")
    assert list(dict.fromkeys(page.evaluate("window.seen"))) == ["0 of 12", "5 of 12", "12 of 12"]
    button.click()
    button.click()
    assert button.inner_text() == "Play"
    assert page.locator("#training .timeline output").inner_text() == "0 of 12"


def test_of_one_snapshot_it_is_said_how_to_get_more(open_page, tmp_path, subject):
    only = [(0, subject.params)]
    data = training(subject.config, only, subject.tokens, subject.targets, subject.labels, str, [(0, 3.0), (1, 2.0)])
    page = open_page(write(tmp_path / "page.html", subject.labels[:-1], training=data))
    page.evaluate("study.drawAll()")
    assert "twingrad train --study-every N" in page.locator("#training").inner_text()
    assert not page.locator("#training .timeline").is_visible()
    assert "of the training batches" in page.locator("#training figure.plot").first.inner_text()


# ---------------------------------------------------------------- flow


@pytest.mark.parametrize("side, name", [("with", "with shortcuts"), ("without", "without shortcuts")])
def test_clipping_is_the_optimizers(opened, sections, side, name):
    data, page = sections["flow"][side], opened()
    section = page.locator("#flow")
    section.get_by_role("radio", name=name, exact=True).click()
    norm, seen = data["global_norm"], set()
    embeddings = np.linalg.norm(data["norms"][:2])
    for place in (0, 40, 120, 155, 200):
        section.locator("input[type=range]").fill(str(place))
        # What is shown is rounded: to four digits the norm that is set, to six what follows from it.
        most = float(section.locator(".clipped span").inner_text())
        shown_norm, scale, after = (
            float(section.locator(f".clipped .{part}").inner_text()) for part in ("norm", "scale", "after")
        )
        np.testing.assert_allclose(shown_norm, norm, rtol=1e-5)
        np.testing.assert_allclose(scale, clip_scale(norm, most), rtol=1e-3)
        np.testing.assert_allclose(after, norm * clip_scale(norm, most), rtol=1e-3)
        assert after <= most * (1 + 1e-3)
        bars = section.locator("table.bars").nth(1).locator("tr").first.locator(".bar span").all_inner_texts()
        np.testing.assert_allclose(list(map(float, bars)), [embeddings, embeddings * scale], rtol=1e-3)
        seen.add("is above" in section.locator(".clipped").inner_text())
    assert seen == {True, False}


def test_shortcuts_are_compared_by_three_measures(opened, sections):
    data, page = sections["flow"], opened()
    table, sizes = page.locator("#flow table.bars").first, np.array(data["sizes"])
    groups = np.array(data["groups"])

    def shown():
        rows = table.locator("tr")
        return [[float(text) for text in row.locator(".bar span").all_inner_texts()] for row in rows.all()]

    def by_part(measure):
        return [
            [measure(data[side], groups == part) for side in ("with", "without")]
            for part in ("before", "0", "1", "after")
        ]

    np.testing.assert_allclose(
        shown(), by_part(lambda one, here: np.linalg.norm(np.array(one["norms"])[here])), rtol=1e-3
    )
    page.locator("#flow").get_by_role("radio", name="Mean size").click()
    means = by_part(lambda one, here: np.average(np.array(one["mean_sizes"])[here], weights=sizes[here]))
    np.testing.assert_allclose(shown(), means, rtol=1e-3)
    page.locator("#flow").get_by_role("radio", name="Arriving").click()
    arriving = np.transpose([data[side]["arriving"] for side in ("with", "without")])
    np.testing.assert_allclose(shown(), arriving, rtol=1e-3)


def test_the_small_networks_table_has_the_experiments_numbers(opened, sections):
    plain, short = sections["flow"]["experiment"]
    page = opened()
    rows = page.locator("#flow .content > .scroll table tbody tr").all_inner_texts()
    for i, row in enumerate(rows):
        layer, units, *numbers = row.split("\t")
        assert (layer, units) == (str(i), f"3\u00a0→\u00a0{1 if i == 4 else 3}")
        expected = [short["means"][i], plain["means"][i], short["means"][i] / plain["means"][i]]
        np.testing.assert_allclose(list(map(float, numbers[:3])), expected, rtol=1e-3)
    assert len(rows) == 5
    assert page.locator("#flow .badge.passed").count() == 1
    bars = page.locator("#flow table.bars").last.locator(".bar span").all_inner_texts()
    np.testing.assert_allclose(list(map(float, bars[::2])), short["means"], rtol=1e-3)
    widths = [
        float(bar.evaluate("e => e.getBoundingClientRect().width"))
        for bar in page.locator("#flow table.bars").last.locator(".bar i").all()
    ]
    assert np.argsort(widths).tolist() == np.argsort(np.ravel(np.transpose([short["means"], plain["means"]]))).tolist()


# ---------------------------------------------------------------- the page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_sections_fit_the_window_in_both_schemes(opened, scheme, width):
    page = opened(viewport={"width": width, "height": 800}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator(".failure").count() == 0
    corner = page.evaluate(
        """() => [...document.querySelectorAll("#attention .thumbnails canvas")].map((canvas) =>
            [...canvas.getContext("2d").getImageData(canvas.width - 1, 0, 1, 1).data.slice(0, 3)])"""
    )
    assert all(max(pixel) < 60 if scheme == "dark" else min(pixel) > 240 for pixel in corner)
    assert len(corner) == 6


def test_small_pictures_follow_the_scheme(opened):
    page = opened(color_scheme="light")
    picture = "document.querySelector('#training .thumbnails canvas').toDataURL()"
    light = page.evaluate(picture)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"light => {picture} !== light", arg=light)
    page.emulate_media(color_scheme="light")
    page.wait_for_function(f"light => {picture} === light", arg=light)


def test_tokens_that_look_like_markup_are_text(open_page, tmp_path, subject, recording):
    labels = [
        "<b>",
        "</script><script>alert(1)</script>",
        "\n",
        "",
        " ",
        '"',
        "'",
        "&amp;",
        "𝒳",
        "\u202e",
        "${x}",
        "a" * 40,
        "é",
        "z",
    ]
    data = training(
        subject.config, [(0, subject.params)], subject.tokens, subject.targets, labels, lambda i: labels[i % 14]
    )
    page = open_page(
        write(tmp_path / "page.html", labels, attention=heads(recording, labels), training=data),
        viewport={"width": 400, "height": 800},
    )
    page.evaluate("study.drawAll()")
    assert page.locator("main b, main script").count() == 0
    assert "</script><script>alert(1)</script>" in page.locator("#attention .tinted").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


def test_on_paper_sections_are_light_and_whole(opened):
    page = opened(color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.querySelector('#training .timeline')).display") == "none"
    assert len(page.pdf()) > 10_000
