"use strict";
/* The section "flow": gradients with shortcuts and without, before clipping and after, and in a small deep network.
   Its data are those of gpt/study/flow.py. */

{
  const { el, number } = study;

  /** What gradients of this global norm are multiplied by (reference/optim.py, clip_scale). */
  const clipScale = (norm, most) => Math.min(1, most / (norm + 1e-6));

  study.section({
    id: "flow",
    title: "How gradients flow",
    order: 45,
    blurb: "A shortcut adds a block’s input to what the block computes, so that the gradient that arrives goes on to the block "
      + "below unchanged, beside what the block passes on. Clipping makes all gradients together shorter, and turns none.",
    render(element, data) {
      const parts = [...new Set(data.groups)];
      const spoken = (part) => ({ before: "embeddings", after: "final norm, head" })[part] ?? `block ${part}`;
      const of = (part) => data.groups.flatMap((one, p) => (one === part ? [p] : []));
      const norm = (side, part) => Math.sqrt(of(part).reduce((sum, p) => sum + data[side].norms[p] ** 2, 0));
      const mean = (side, part) => {
        const size = of(part).reduce((sum, p) => sum + data.sizes[p], 0);
        return of(part).reduce((sum, p) => sum + data[side].mean_sizes[p] * data.sizes[p], 0) / size;
      };
      const SIDES = [["with", "with shortcuts", "accent"], ["without", "without shortcuts", "accent-2"]];

      // Shortcuts.

      element.append(el("h3", {}, "This model with its shortcuts and without"), el("p", {},
        "The same parameters, the same text: once as the model is, once with every x + branch(x) of a block replaced by branch(x) alone. "
        + `The loss is ${number(data.with.loss, 5)} with shortcuts and ${number(data.without.loss, 5)} without, for which the model was never trained. `
        + "Each branch begins with a norm layer, which scales what it is given to size 1: without shortcuts, gradients of a few such blocks may as well grow "
        + "as shrink. What shortcuts do to a network without such layers, the five layers below show."));
      const controls = el("div", { class: "controls" });
      element.append(controls);
      const MEASURES = {
        norm: ["Norm", "norm of the gradient of the parameters of each part", () => ({ rows: parts.map(spoken), values: (side) => parts.map((part) => norm(side, part)) })],
        mean: ["Mean size", "mean size of the entries of these gradients", () => ({ rows: parts.map(spoken), values: (side) => parts.map((part) => mean(side, part)) })],
        arriving: ["Arriving", "norm of the gradient that arrives at the end of each block", () => ({
          rows: Array.from({ length: data.blocks }, (_, i) => `block ${i}`), values: (side) => data[side].arriving,
        })],
      };
      const compared = study.bars(element, { rows: [], series: [{ name: "", values: [] }], log: true });
      const compare = (measure) => {
        const [, title, get] = MEASURES[measure];
        const { rows, values } = get();
        compared.update({ title: `The ${title}`, rows, series: SIDES.map(([side, name, colour]) => ({ name, colour, values: values(side) })) });
      };
      study.choice(controls, {
        name: "What is measured", value: "norm", options: Object.entries(MEASURES).map(([value, [text]]) => ({ value, label: text })), onChange: compare,
      });
      compare("norm");

      // Clipping.

      element.append(el("h3", {}, "Clipping"), el("p", {},
        "All gradients are multiplied by one number, so that their global norm, the root of the sum of the squares of all entries, is at most "
        + "the one that is set: ", el("code", {}, "scale = min(1, max_norm / (norm + 1e-6))"), "."));
      const clipControls = el("div", { class: "controls" });
      const facts = el("p", { class: "clipped", "aria-live": "polite" });
      element.append(clipControls, facts);
      const [LOW, STEPS] = [-3, 200]; // the slider's powers of ten, and how many places it has
      const HIGH = Math.ceil(Math.log10(Math.max(1, data.with.global_norm, data.without.global_norm)) + 0.3);
      const toNorm = (i) => 10 ** (LOW + (i * (HIGH - LOW)) / STEPS);
      const start = Math.round((-LOW * STEPS) / (HIGH - LOW)); // a norm of 1
      let [side, most] = ["with", toNorm(start)];
      study.choice(clipControls, {
        name: "Which pass", value: side, options: SIDES.map(([value, text]) => ({ value, label: text })), onChange(value) { side = value; clip(); },
      });
      study.slider(clipControls, {
        min: 0, max: STEPS, value: start, name: "max_norm", label: (i) => number(toNorm(i), 3),
        onInput(i) { most = toNorm(i); clip(); },
      });
      const clipped = study.bars(element, { rows: parts.map(spoken), series: [{ name: "", values: [] }], log: true });
      function clip() {
        const whole = data[side].global_norm;
        const scale = clipScale(whole, most);
        const before = parts.map((part) => norm(side, part));
        const after = before.map((value) => value * scale);
        facts.replaceChildren("Global norm ", el("strong", { class: "mono norm" }, number(whole, 6)), scale < 1 ? " is above " : " is within ",
          el("span", { class: "mono" }, number(most, 4)), ": scale ", el("strong", { class: "mono scale" }, number(scale, 6)), ", norm afterwards ",
          el("strong", { class: "mono after" }, number(whole * scale, 6)), ".");
        const all = before.filter((value) => value > 0);
        clipped.update({
          low: Math.min(...all) * clipScale(whole, toNorm(0)), high: Math.max(...all),
          series: [{ name: "before", values: before, colour: "muted" }, { name: "after", values: after, colour: "accent" }],
        });
      }
      clip();

      // The small network.

      const [plain, short] = data.experiment;
      element.append(el("h3", {}, "Five layers that can be followed by eye"), el("p", {},
        `Linear layers of ${data.widths.join("–")} units, a GELU after each, weights as PyTorch draws them from seed 123. `
        + "The input is (1, 0, −1), the loss the square of the output. Where a layer keeps the width, a shortcut may lead past it. "
        + "The mean size of each weight’s gradient:"));
      const layers = plain.means.map((_, i) => `layer ${i}`);
      study.bars(element, {
        rows: layers, log: true,
        series: [{ name: "with shortcuts", values: short.means, colour: "accent" }, { name: "without shortcuts", values: plain.means, colour: "accent-2" }],
      });
      element.append(
        study.table(["layer", "units", "with shortcuts", "without shortcuts", "ratio", "error, with", "error, without"], plain.means.map((mean, i) => [
          String(i), `${data.widths[i]}\u00a0→\u00a0${data.widths[i + 1]}`, short.means[i], mean, short.means[i] / mean, short.errors[i], plain.errors[i],
        ])),
        el("p", { class: "muted small" }, "error: the largest difference of an entry from central differences of the loss, relative to the largest entry."),
        el("div", { class: "laws" },
          study.badge(`all gradients equal central differences to ${number(Math.max(...plain.errors, ...short.errors), 2)}`, plain.passed && short.passed)),
      );
    },
  });
}
