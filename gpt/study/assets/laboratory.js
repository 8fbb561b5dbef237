"use strict";
/* The error of a finite difference over its step, measured in float64 and float32, beside what is known of it. */

study.section({
  id: "laboratory",
  title: "How good is a finite difference?",
  order: 70,
  blurb:
    "A finite difference needs no derivation, and so it can tell whether a derivation is right. But it is not exact " +
    "either. A large step leaves out how the loss bends, a small one divides the rounding of the loss by almost nothing. " +
    "The gradient by hand shows both errors apart.",
  render(element, data) {
    const { el, number } = study;
    if (!data.tensors.length) {
      element.append(el("p", {}, `Nothing was measured here. ${data.why}`));
      return;
    }
    const EPS = { float64: "2.2e-16", float32: "1.2e-07" };
    let tensor = data.tensors[0];
    let precision = "float64";

    const controls = el("div", { class: "controls" });
    const holder = el("div");
    const reading = el("p", { class: "small", "aria-live": "polite" });
    const results = el("div");
    element.append(controls, holder, reading, results);
    study.choice(controls, {
      name: "Parameter",
      options: data.tensors.map((one) => ({ value: one, label: one.name })),
      value: tensor,
      onChange(chosen) { tensor = chosen; draw(); },
    });
    study.choice(controls, {
      name: "Precision",
      options: [{ value: "float64", label: "float64" }, { value: "float32", label: "float32" }, { value: "both", label: "both" }],
      value: precision,
      onChange(chosen) { precision = chosen; draw(); },
    });

    /** Where the worst of three neighbouring steps is best: a step alone may be lucky. */
    function best(values) {
      const worst = values.map((_, k) => Math.max(values[Math.max(0, k - 1)], values[k], values[Math.min(values.length - 1, k + 1)]));
      const k = worst.indexOf(Math.min(...worst));
      return [k, worst[k]];
    }
    /** A straight line, as far as the measured errors go. */
    function line(name, steps, f, more) {
      const kept = steps.filter((h) => f(h) < 10 && f(h) > 1e-14);
      return { name, x: kept, y: kept.map(f), dashed: true, ...more };
    }
    function series() {
      if (precision === "both") {
        return ["float64", "float32"].flatMap((dtype, k) => ["central", "forward"].map((kind, i) => ({
          name: `${kind}, ${dtype}`, x: tensor[dtype].steps, y: tensor[dtype][kind], dashed: k === 1, colour: ["negative", "positive"][i],
        })));
      }
      const { steps, central, forward, rounding } = tensor[precision];
      const size = Math.abs(tensor.by_hand) || 1;
      return [
        { name: "central difference", x: steps, y: central, colour: "negative" },
        { name: "forward difference", x: steps, y: forward, colour: "positive" },
        line("left out, f‴ h² / 6", steps, (h) => (tensor.third * h * h) / 6 / size, { colour: "negative" }),
        line("left out, f″ h / 2", steps, (h) => (tensor.second * h) / 2 / size, { colour: "positive" }),
        line("rounding, ε f / 2h", steps, (h) => rounding / 2 / h, { colour: "muted" }),
      ];
    }

    const plot = study.plot(holder, {
      series: series(), logx: true, logy: true, height: 340,
      xlabel: "step h", ylabel: "error, relative to the gradient", onPick: pick,
    });

    function pick(h) {
      const dtype = precision === "both" ? "float64" : precision;
      const { steps, central, forward } = tensor[dtype];
      const k = steps.reduce((best, step, i) => (Math.abs(Math.log(step / h)) < Math.abs(Math.log(steps[best] / h)) ? i : best), 0);
      plot.update({ marker: steps[k], markerLabel: `h = ${number(steps[k], 2)}` });
      reading.replaceChildren(
        `In ${dtype} with h = ${number(steps[k], 3)} at ${tensor.name}[${tensor.index.join(",")}], the central difference is off by `,
        `${number(central[k], 3)} of the gradient, ${number(tensor.by_hand, 6)}, the forward difference by ${number(forward[k], 3)}.`,
      );
    }

    function draw() {
      const dtype = precision === "both" ? "float64" : precision;
      plot.update({ series: series() });
      pick(tensor[dtype].steps[best(tensor[dtype].central)[0]]);
      const rows = ["float64", "float32"].flatMap((name) => ["central", "forward"].map((kind) => {
        const [k, error] = best(tensor[name][kind]);
        return [name, kind, number(tensor[name].steps[k], 2), number(error, 2), number(tensor[name].best[kind], 2)];
      }));
      results.replaceChildren(
        el("h3", {}, "The best step"),
        study.table(["precision", "difference", "best step measured", "its error", "best step by the formulas"], rows),
        el("p", { class: "small muted", style: "margin-top: 0.8rem" },
          `The loss is ${number(data.loss, 5)}. A float64 has its digits down to ε = ${EPS.float64} of the number, a float32 to ${EPS.float32}. `,
          `Now and then a step is lucky: the table takes the worst of three neighbours. Where both errors are of one size the step is best: near the cube root of ε for central differences, near its square root for forward ones. `,
          `What is left of the error there is far above ε, and no step does better: this is why the proofs on this page extrapolate from several steps, `,
          `and why a gradient in float32 cannot be checked by differences in float32.`),
      );
    }
    draw();
  },
});
