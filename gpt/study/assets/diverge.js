"use strict";
/* The page of `twingrad diverge`: the verdict, the first tensor on which two sides part, entry by entry, every tensor
   with its error in the order of execution, and what came of swapping operators one at a time.

   What is shown is `study.data.diverge`: what `page_data` of gpt/study/diverge_cli.py returns, as `--json` prints it,
   and first.entries of gpt/study/diverge_page.py. */

{
  const { el, number, exact } = study;
  const found = study.data.diverge;
  const sides = study.data.names;
  const [A, B] = sides;
  const { tensors, first, bisection } = found;
  const float32 = found.dtype === "float32";
  const bound = tensors[0].bound;
  const beyond = tensors.filter((tensor) => !tensor.passed).length;

  const KINDS = {
    parameter: "Parameters", forward: "Forward", backward: "Backward", fused: "Forward once more, fused as in training",
    step: "The loss of the step", gradient: "Gradients of the parameters",
  };
  const PLACES = {
    parameter: "a parameter, before anything is computed", forward: "in the forward pass", backward: "on the way back",
    fused: "in the forward pass as training computes it, with steps fused", step: "in the loss that is fused with the head; nothing before it does",
    gradient: "the gradient of a parameter",
  };

  /** An error as a number, and in words with what it is a multiple of; null is not finite. */
  const multiple = (error) => (error >= 100 && error < 1e7 ? Math.round(error).toLocaleString("en") : number(error, 3));
  const measured = (error) => (float32 ? `${multiple(error)} times` : number(error, 3));
  const spoken = (error) => (float32 ? `${multiple(error)} times as far from the truth as the other side` : `${number(error, 3)} of the largest entry`);
  const limit = float32 ? `${number(bound)} times` : number(bound);
  const called = (tensor) => el("b", { class: "tensor" }, tensor.name);
  const full = (x) => (float32 && Number.isFinite(x) ? number(x, 9) : exact(x)); // as many digits as tell float32 numbers apart
  const mono = (text, more = "") => el("span", { class: `mono ${more}`.trim() }, text);

  // The verdict.

  {
    const sentence = [];
    if (found.agree) {
      const largest = tensors.reduce((a, b) => (b.error > a.error ? b : a));
      sentence.push(`They agree: of ${tensors.length} tensors the largest error is `, mono(float32 ? `${number(largest.error, 3)} times` : number(largest.error, 3)),
        ", of ", called(largest), `; the bound is ${limit}.`);
    } else {
      const { tensor, number: at, farther } = first;
      sentence.push("They part at ", el("a", { href: "#first" }, called(tensor)), `, ${PLACES[tensor.kind]}: tensor ${at + 1} of ${tensors.length}, `);
      if (tensor.error === null) sentence.push(tensor.note || "not finite");
      else sentence.push("error ", mono(measured(tensor.error)), `, the bound is ${limit}`);
      sentence.push(`; ${beyond} beyond it in all.`);
      if (found.one_model && (farther === 0 || farther === 1)) sentence.push(" ", el("b", {}, sides[farther]), " is farther from the truth.");
    }
    document.querySelector("header.head h1").after(
      el("p", { class: `verdict ${found.agree ? "agree" : "part"}` }, sentence));
  }

  // The first tensor on which they part.

  if (first) study.section({
    id: "first",
    title: "Where they part",
    order: 10,
    own: true,
    render(element) {
      const { tensor, entries } = first;
      element.append(el("p", {}, called(tensor), ` is ${PLACES[tensor.kind]}${tensor.shape.length ? `, of shape ${tensor.shape.join(" × ")}` : ""}. `,
        first.number ? (first.number === 1 ? "The one tensor before it agrees." : `All ${first.number} tensors before it agree.`) : "It is the very first.",
        tensor.error === null ? ` There: ${tensor.note || "not finite"}.` : ` Its error is ${spoken(tensor.error)}.`));
      found.not_finite.forEach((name, side) => name && element.append(
        el("p", {}, `${sides[side]}: the first tensor that is not finite is `, el("b", { class: "tensor" }, name), ".")));
      if (!entries) {
        element.append(el("p", {}, "The sides do not both have this tensor in one shape, so that there are no entries to compare."));
        return;
      }

      const { shape, starts, sizes } = entries;
      const rank = tensor.shape.length;
      const parts = ["a", "b", "truth"].map((name) => study.unpack(entries[name]));
      const whole = sizes.every((size, k) => size === shape[k]);
      const worst = [...Array(shape.length - rank).fill(0), ...first.index];
      const [rows, columns] = sizes.slice(-2);
      const traced = ["forward", "backward", "fused"].includes(tensor.kind);
      const AXES = { 1: ["entry"], 2: ["row", "column"], ...(traced ? { 3: ["example", "position", "channel"], 4: ["example", "head", "position", "channel"] } : {}) };
      const axes = [...Array(shape.length - rank).fill(""), ...(AXES[rank] ?? tensor.shape.map((_, k) => `axis ${k}`))];
      const at = (part, index) => part.at(...index.map((i, k) => i - starts[k]));
      const inside = (index) => index.every((i, k) => i >= starts[k] && i < starts[k] + sizes[k]);
      const shownIndex = (index) => `[${index.slice(shape.length - rank).join(", ")}]`;

      // The difference of two of the three, of the plane that the leading axes select.

      const gap = ([p, q], index) => at(parts[p], index) - at(parts[q], index);
      const isBeyond = (difference) => !(Math.abs(difference) <= first.within); // true of NaN
      const MAPS = [[1, 0], [0, 2], [1, 2]];
      const names = [A, B, "truth"];
      const titles = MAPS.map(([p, q]) => `${names[p]} − ${names[q]}`);
      let largest = 0;
      let wrong = 0;
      for (let k = 0; k < parts[0].array.length; k++) {
        for (const [p, q] of MAPS) {
          const size = Math.abs(parts[p].array[k] - parts[q].array[k]);
          if (Number.isFinite(size) && size > largest) largest = size;
        }
        wrong += isBeyond(parts[1].array[k] - parts[0].array[k]);
      }
      const total = parts[0].array.length;
      if (rank) element.append(el("p", {}, wrong
        ? `${wrong.toLocaleString("en")} of ${total.toLocaleString("en")} entries${whole ? "" : " on this page"} differ by more than ${number(first.within, 3)}, which is what the bound allows a single one.`
        : "No single entry differs by more than the bound allows one; together they do."));
      if (!whole) {
        const range = (k) => `${axes[k]} ${starts[k]} to ${starts[k] + sizes[k] - 1} of ${shape[k]}`;
        element.append(el("p", { class: "muted small" }, `The tensor is too large for a page: here is the part around its worst element, ${sizes.flatMap((size, k) => (size < shape[k] ? [range(k)] : [])).join(", ")}.`));
      }

      let leading = worst.slice(0, -2);
      let chosen = worst;
      let view = 0;
      let most = largest;
      const controls = el("div", { class: "controls" });
      const stepped = el("div", { class: "steppers controls" });
      const detail = el("div", { class: "detail" });
      element.append(controls, stepped);

      const place = (i, j) => [...leading, i + starts.at(-2), j + starts.at(-1)];
      const plane = ([p, q]) => {
        const from = leading.reduce((sum, i, k) => sum + (i - starts[k]) * parts[p].strides[k], 0);
        const [x, y] = [parts[p].array, parts[q].array];
        return Float64Array.from({ length: rows * columns }, (_, k) => x[from + k] - y[from + k]);
      };
      const drawn = () => plane(MAPS[view]).map((x) => (Number.isFinite(x) ? x : NaN));
      const title = () => `${titles[view]}${shape.length > 2 ? ` in [${[...leading, ":", ":"].join(", ")}]` : ""}`;
      const numbered = (k) => (starts.at(k) ? Array.from({ length: sizes.at(k) }, (_, i) => String(starts.at(k) + i)) : undefined);
      const counted = (k) => (starts.at(k) ? `${axes.at(k)}, counted from ${starts.at(k)}:` : axes.at(k));
      const options = {
        values: drawn(), rows, columns, diverging: true, max: most, title: title(), rowTitle: counted(-2), columnTitle: counted(-1),
        rowLabels: numbered(-2), columnLabels: numbered(-1), onClick: (i, j) => { chosen = place(i, j); tell(); },
      };
      const map = rank ? study.heatmap(element, options) : null;
      if (map) element.append(el("p", { class: "muted small legend" }, [
        ["chosen", "chosen"], ["worst", "the worst element"], ["beyond", "beyond the bound, where not most are"], ["broken", "not finite"],
      ].map(([kind, text]) => el("span", {}, el("i", { class: kind }), text))));

      function show() {
        if (!map) return;
        options.title = title(); // which the map tells those who hear it
        map.element.querySelector(".title").textContent = options.title;
        map.update(drawn(), { max: most });
        const off = [];
        plane(MAPS[0]).forEach((x, k) => { if (isBeyond(x)) off.push([Math.floor(k / columns), k % columns]); });
        map.highlight(off.length * 2 <= rows * columns ? off : [], 1);
        const here = (index) => leading.every((i, k) => i === index[k]);
        const cell = (index) => [index.at(-2) - starts.at(-2), index.at(-1) - starts.at(-1)];
        map.highlight(here(worst) ? [cell(worst)] : [], 2);
        map.select(...(here(chosen) ? cell(chosen) : []));
      }

      if (map) {
        study.choice(controls, {
          name: "Which difference", value: 0, options: titles.map((label, value) => ({ value, label })), onChange(value) { view = value; show(); },
        });
        const STEPS = 60;
        const toMax = (i) => first.within * (largest / first.within) ** (i / STEPS);
        if (first.within > 0 && largest > first.within) study.slider(controls, {
          name: "full colour at", min: 0, max: STEPS, value: STEPS, label: (i) => number(toMax(i), 3), onInput(i) { most = toMax(i); show(); },
        });
      }
      const steppers = leading.map((i, k) => (sizes[k] > 1 ? study.slider(stepped, {
        name: axes[k], min: starts[k], max: starts[k] + sizes[k] - 1, value: i, label: (n) => `${n} of ${shape[k]}`,
        onInput(n) { leading = leading.with(k, n); chosen = [...leading, ...chosen.slice(-2)]; show(); tell(); },
      }) : null));
      const back = el("button", {
        type: "button",
        onclick() { chosen = worst; leading = worst.slice(0, -2); steppers.forEach((stepper, k) => stepper?.set(leading[k])); show(); tell(); },
      }, "Back to the worst element");
      if (map && total > 1) stepped.append(back);
      element.append(detail);

      // One entry, and those around it.

      const REACH = 3;
      let around = "values";
      const table = el("div", { class: "around" });

      function tell() {
        const isWorst = chosen.every((i, k) => i === worst[k]);
        back.disabled = isWorst;
        const [x, y, true_] = parts.map((part) => at(part, chosen));
        const away = [x - true_, y - true_];
        const size = (d) => (Number.isNaN(d) ? Infinity : Math.abs(d));
        const farther = size(away[0]) === size(away[1]) ? null : Number(size(away[1]) > size(away[0]));
        detail.replaceChildren(
          el("h3", {}, rank ? `${isWorst ? "The worst element" : "Element"}, ${shownIndex(chosen)}` : "Its value"),
          study.table(["", "value", "minus the truth", ""], [
            ...[x, y].map((value, side) => [
              el("span", { class: `side-${side}` }, sides[side]), mono(full(value), "value"), mono(number(away[side], 3)),
              found.one_model && farther === side ? study.badge("farther from the truth", false) : "",
            ]),
            ["truth", mono(exact(true_), "value"), "", ""],
          ]),
          el("p", { class: "muted small" }, `${B} − ${A}: `, mono(number(y - x, 3)),
            `. Of the whole tensor, ${A} is ${far(0)} from the truth, ${B} ${far(1)}, relative to its norm.`),
        );
        surround();
      }
      const far = (side) => (tensor.from_truth[side] === null ? "not a finite distance" : number(tensor.from_truth[side], 3));

      function surround() {
        const lines = [-2, -1].map((k) => Array.from({ length: 2 * REACH + 1 }, (_, i) => chosen.at(k) - REACH + i).filter((i) => i >= starts.at(k) && i < starts.at(k) + sizes.at(k)));
        const index = (i, j) => [...leading, i, j];
        const all = lines[0].flatMap((i) => lines[1].map((j) => index(i, j)));
        // As many digits as the differences take to be seen.
        const peak = (values) => Math.max(0, ...values.map(Math.abs).filter(Number.isFinite));
        const [height, step] = [peak(all.flatMap((here) => [at(parts[0], here), at(parts[1], here)])), peak(all.map((here) => gap(MAPS[0], here)))];
        const digits = step ? Math.max(4, Math.min(17, Math.ceil(Math.log10(height / step)) + 2)) : 4;
        const pair = {
          values: (here) => [at(parts[0], here), at(parts[1], here)].map((x) => number(x, digits)),
          truth: (here) => [gap(MAPS[1], here), gap(MAPS[2], here)].map((x) => number(x, 3)),
        }[around];
        table.replaceChildren(study.table(["", ...lines[1].map(String)], lines[0].map((i) => [String(i), ...lines[1].map((j) => {
          const here = index(i, j);
          const marks = [isBeyond(gap(MAPS[0], here)) ? "beyond" : "", here.every((n, k) => n === chosen[k]) ? "chosen" : ""].join(" ").trim();
          const [x, y] = pair(here);
          return el("span", { class: `entry ${marks}`.trim() }, el("span", { class: "side-0" }, x), el("span", { class: "side-1" }, y));
        })])));
      }

      if (rank && total > 1) {
        element.append(el("h3", {}, "Around it"), el("p", { class: "muted small" }, "Above ", el("span", { class: "side-0" }, A), ", below it ", el("span", { class: "side-1" }, B),
          rank > 1 ? `; down: ${axes.at(-2)}, across: ${axes.at(-1)}.` : "."));
        const kinds = el("div", { class: "controls" });
        element.append(kinds, table);
        study.choice(kinds, {
          name: "What of them", value: around, options: [{ value: "values", label: "Values" }, { value: "truth", label: "Minus the truth" }],
          onChange(value) { around = value; surround(); },
        });
      }
      show();
      tell();
    },
  });

  // Every tensor.

  study.section({
    id: "tensors",
    title: "Every tensor, in the order of execution",
    order: 20,
    own: true,
    blurb: found.agree ? "What both sides computed, from the first tensor to the last; the dashed line is the bound."
      : "The first one beyond the dashed line, the bound, is where they part. What follows is computed from it, and may be wrong for no other reason.",
    render(element) {
      const controls = el("div", { class: "controls" });
      element.append(controls);
      let measure = "error";
      let only = false;
      study.choice(controls, {
        name: "What is measured", value: measure, onChange(value) { measure = value; draw(); },
        options: [{ value: "error", label: "Error" }, { value: "truth", label: "Distance of each from the truth" }],
      });
      if (beyond && beyond < tensors.length) study.choice(controls, {
        name: "Which tensors", value: only, onChange(value) { only = value; draw(); },
        options: [{ value: false, label: `All ${tensors.length}` }, { value: true, label: `${beyond} beyond the bound` }],
      });
      const SERIES = {
        error: [{ name: "error", colour: "accent", of: (tensor) => tensor.error }],
        truth: [0, 1].map((side) => ({ name: sides[side], colour: ["accent", "accent-2"][side], of: (tensor) => tensor.from_truth[side] })),
      };
      const largest = found.agree ? tensors.reduce((a, b) => (b.error > a.error ? b : a)) : null;
      const groups = Object.entries(KINDS).map(([kind, title]) => ({ kind, title, members: tensors.filter((tensor) => tensor.kind === kind) })).filter((group) => group.members.length);

      const named = (tensor) => el("span", { class: "name", "data-tensor": tensor.name, title: `${tensor.name}: ${tensor.shape.join(" × ") || "a number"}` },
        tensor.name.split(/(?<=\.)/).map((part, k) => [k ? el("wbr") : null, part]), // where there is no room, lines end after a dot
        tensor === tensors[first?.number] ? el("a", { href: "#first", class: "mark" }, "first beyond the bound") : tensor === largest ? el("span", { class: "mark" }, "the largest error") : null,
        tensor.note && tensor.note !== "not finite" ? el("span", { class: "muted note" }, tensor.note) : null);
      const blank = { rows: [], series: [{ name: "", values: [] }], log: true };
      for (const group of groups) {
        const off = group.members.filter((tensor) => !tensor.passed).length;
        group.element = el("details", { open: true, id: `tensors-${group.kind}` }, el("summary", {}, el("h3", {}, group.title),
          el("span", { class: "muted small" }, ` ${group.members.length}${off ? `, ${off} beyond the bound` : ""}`)));
        element.append(group.element);
        group.bars = study.bars(group.element, blank);
      }
      study.contents("tensors", groups.map(({ kind, title }) => ({ title, href: `#tensors-${kind}` })));

      function draw() {
        const series = SERIES[measure];
        // One scale for all, so that what is as long is as wrong.
        const values = tensors.flatMap((tensor) => series.map((one) => one.of(tensor))).filter((x) => x > 0);
        const ends = measure === "error" ? [...values, bound] : values;
        const [low, high] = ends.length ? [Math.min(...ends), 10 ** Math.ceil(Math.log10(Math.max(...ends)))] : [0, 0];
        for (const group of groups) {
          const members = group.members.filter((tensor) => !only || !tensor.passed);
          group.element.hidden = !members.length;
          group.bars.update({
            low, high, bound: measure === "error" ? bound : undefined, rows: members.map(named),
            series: series.map(({ name, colour, of }) => ({ name, colour, values: members.map(of) })),
          });
        }
      }
      draw();
    },
  });

  // Swaps.

  if (bisection) study.section({
    id: "swaps",
    title: "One operator at a time",
    order: 30,
    own: true,
    blurb: `Into the model on ${bisection.base} goes one operator of ${bisection.other}, and all else stays as it is. Loss and gradients of a step `
      + "are held against those without the swap: an operator that parts them is enough for what is seen above.",
    render(element) {
      const { culprits } = bisection;
      element.append(el("p", { class: "outcome" }, `${bisection.verdict[0].toUpperCase()}${bisection.verdict.slice(1)}.`));
      const row = (swap, name) => [
        culprits.includes(swap.operator) && swap !== bisection.together ? el("b", {}, name) : name,
        swap.loss ?? NaN, swap.gradient ?? NaN, mono(swap.tensor), swap.error ?? NaN, study.badge(swap.parts ? "parts" : "agrees", !swap.parts),
      ];
      element.append(
        study.table([`${bisection.other}’s in ${bisection.base}`, "loss", "gradient", "of", "error", "verdict"], [
          ...bisection.alone.map((swap) => row(swap, swap.operator)),
          row(bisection.together, "all of them"),
          ...bisection.all_but_one.map((swap) => row(swap, `all but ${swap.operator}`)),
        ]),
        el("p", { class: "muted small" }, "loss and gradient: the difference that the swap makes, relative to the loss, and to the largest entry of the gradient that changes most. "
          + `error: the largest of all, in the measure of the bound, ${limit}.`),
      );
    },
  });
}
