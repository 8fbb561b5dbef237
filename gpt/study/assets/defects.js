"use strict";
/* Known mistakes, planted in the reference one at a time: what goes wrong, where first, and who would have noticed. */

study.section({
  id: "defects",
  title: "Break it",
  order: 80,
  blurb:
    "Each switch plants one mistake in the source; most are mistakes that code for learning was published with, its tests passing. " +
    "Then the same pass is run again, and every tensor is held against the sound one, in the order of execution: " +
    "everything before the first red one agrees.",
  render(element, data) {
    const { el, number } = study;
    const others = el("details", { class: "small" },
      el("summary", {}, `${data.others.length} mistakes that change nothing here`),
      el("ul", {}, data.others.map((one) => el("li", {}, el("b", {}, one.name), `: ${one.why}`))));
    if (!data.defects.length) {
      element.append(el("p", {}, data.why ? `No mistake was planted here. ${data.why}` : "No known mistake shows in this pass."), others);
      return;
    }

    const tokens = study.data.tokens ?? [];
    const buttons = data.defects.map((defect, k) =>
      el("button", { type: "button", "aria-pressed": "false", "data-defect": defect.name, onclick: () => show(k) }, defect.name));
    const sound = el("button", { type: "button", "aria-pressed": "false", onclick: () => show(null) }, "none: the sound pass");
    const list = el("div", { class: "switches", role: "group", "aria-label": "Mistakes" }, sound);
    for (const file of new Set(data.defects.map((defect) => defect.file))) {
      list.append(el("h4", {}, file), ...buttons.filter((_, k) => data.defects[k].file === file));
    }
    const panel = el("div", { class: "outcome", "aria-live": "polite" });
    const isParameter = (name) => /\.(weight|bias|lora_a|lora_b)$/.test(name);
    const kinds = [
      ["Forward", (name) => !name.startsWith("d.")],
      ["Backward", (name) => name.startsWith("d.") && !isParameter(name)],
      ["Gradients of the parameters", (name) => name.startsWith("d.") && isParameter(name)],
    ];
    const cells = data.names.map((name) => {
      const error = el("span", { class: "error" });
      return { name, error, item: el("li", { "data-tensor": name }, el("span", { class: "name" }, name), error) };
    });
    const tensors = el("div", { class: "tensors" }, kinds.map(([title, belongs]) => [
      el("h3", {}, title), el("ol", {}, cells.filter((one) => belongs(one.name)).map((one) => one.item)),
    ]));
    element.append(el("div", { class: "defects" }, list, panel), tensors, others);

    const maps = []; // each is made once

    function show(k) {
      sound.setAttribute("aria-pressed", String(k === null));
      buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(i === k)));
      const defect = k === null ? null : data.defects[k];
      const first = defect ? data.names.indexOf(defect.first) : -1;
      cells.forEach(({ item, error, name }, i) => {
        const off = defect ? defect.errors[i] : 0;
        const wrong = defect !== null && !(off <= data.bound); // null: no number at all
        item.className = `${wrong ? "wrong" : ""} ${i === first ? "first" : ""}`.trim();
        error.textContent = wrong ? (off === null ? "nan" : number(off, 2)) : "";
        // From 1e-12, as wrong as rounding is, to 1: as large as the tensor itself.
        item.style.setProperty("--heat", wrong ? `${Math.round(36 * Math.max(0.12, Math.min(1, 1 + Math.log10(off ?? 1) / 12)))}%` : "0%");
        item.title = defect ? `${name}: off by ${off === null ? "nan" : number(off, 3)} of its largest entry` : name;
      });
      if (!defect) {
        panel.replaceChildren(el("p", {}, `Nothing is planted: all ${data.names.length} tensors are those of the sound pass, and the loss is ${number(data.loss, 6)}.`));
        return;
      }
      const wrongs = defect.errors.filter((off) => !(off <= data.bound)).length;
      const gradient = defect.first.startsWith("d.");
      panel.replaceChildren(
        el("h3", {}, defect.name),
        el("pre", { class: "code diff", tabindex: "0" }, el("span", { class: "place" }, `${defect.file}:${defect.line}\n`),
          defect.diff.map(([sign, line]) => el("span", { class: sign === "-" ? "removed" : "added" }, `${sign} ${line}\n`))),
        el("p", {}, "The first tensor to go wrong is ", el("b", { class: "first-wrong" }, defect.first),
          `, off by ${number(defect.errors[first], 3)} of its largest entry${gradient ? ", on the way back" : ""}; ${wrongs} of ${data.names.length} are wrong in all. `,
          gradient ? `The loss is still ${number(data.loss, 6)}: whoever looks at it alone sees nothing.` : `The loss is ${number(defect.loss ?? NaN, 6)} instead of ${number(data.loss, 6)}.`),
        el("div", { class: "tests" },
          test("every tensor, float64, 1e-12", true, "this comparison"),
          test("np.allclose, atol 1e-4", defect.noticed.small, "on this model as GPT-2 begins: weights of 0.02, norms of 1, biases of 0"),
          test("np.allclose, atol 1e-4", defect.noticed.alone, defect.check.startsWith("model ") ? "on another small model with weights of 0.02, after a training step" : "on the layer alone, inputs of 0.02 and all-ones upstream gradients"),
          test("shapes", defect.noticed.shapes, "every tensor as large as it should be")),
      );
      if (!defect.map) {
        panel.append(el("p", {}, "It has another shape than it should, so that there is no difference to draw."));
        return;
      }
      const [rows, columns] = defect.map.shown;
      const numbers = (size, start) => Array.from({ length: size }, (_, i) => String(start + i));
      const labels = (size, start, whole) => (whole === tokens.length && !isParameter(defect.first) ? tokens.slice(start, start + size) : numbers(size, start));
      const shape = defect.map.shape;
      const at = defect.map.index.length ? ` at [${defect.map.index.join(", ")}]` : "";
      if (maps[k]) panel.append(maps[k].element);
      else maps[k] = study.heatmap(panel, {
        values: study.unpack(defect.map).array, rows, columns, diverging: true,
        cell: Math.max(6, Math.min(20, Math.floor((panel.clientWidth - 40) / columns))), title: `${defect.first}${at}: wrong − sound`,
        rowLabels: labels(rows, defect.map.starts[0], shape.at(-2)), columnLabels: numbers(columns, defect.map.starts[1]),
      });
    }

    const test = (name, noticed, where) => el("div", {}, study.badge(noticed ? "noticed" : "let pass", noticed), el("span", {}, el("b", {}, name), ` ${where}`));

    show(0);
  },
});
