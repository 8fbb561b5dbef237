"use strict";
/* The section "training": one text through the model as it was at each snapshot, under a slider.
   Its data are those of gpt/study/training.py. */

{
  const { el, number, label, unpack } = study;
  const FRAME = 600; // milliseconds of a step that is played

  study.section({
    id: "training",
    title: "While it learnt",
    order: 40,
    blurb: "The same text through the model as it was after so many training steps. Move the slider, or play, and see the loss, "
      + "the attention of a head, the gradients and the predictions of that moment.",
    render(element, data) {
      const attention = unpack(data.attention); // (S, L, H, T, T)
      const [S, L, H, T] = attention.shape;
      const norms = unpack(data.norms); // (S, P)
      const [said, right] = [unpack(data.probabilities), unpack(data.target_probabilities)]; // (S, T)
      const limit = study.weightLimit(attention.array, T);
      let [now, layer, head, pair] = [S - 1, 0, 0, [T - 1, T > 1 ? T - 2 : 0]];
      const token = (t) => `${t} “${label(data.labels[t])}”`;
      const cells = (i, l, h) => {
        const start = i * attention.strides[0] + l * attention.strides[1] + h * attention.strides[2];
        return attention.array.subarray(start, start + T * T);
      };
      const weight = (i, l, h) => attention.at(i, l, h, ...pair);

      // The slider.

      if (data.note) element.append(el("p", { class: "muted small" }, data.note));
      const controls = el("div", { class: "controls timeline" });
      element.append(controls);
      let timer = null;
      const play = el("button", { type: "button", onclick: () => (timer ? pause() : start()) }, "Play");
      controls.append(play);
      const slider = study.slider(controls, {
        min: 0, max: S - 1, value: now, name: "Training step", label: (i) => `${data.steps[i]} of ${data.steps[S - 1]}`,
        onInput(i) { pause(); go(i); },
      });
      if (S === 1) {
        controls.hidden = true;
        element.append(el("p", { class: "muted" }, "This model has one snapshot, so there is nothing to compare. ",
          "Train with ", el("code", {}, "twingrad train --study-every N"), " to keep more."));
      }
      function start() {
        if (now === S - 1) go(0);
        play.textContent = "Pause";
        timer = setInterval(() => {
          go(now + 1);
          if (now === S - 1) pause();
        }, FRAME);
      }
      function pause() {
        clearInterval(timer);
        timer = null;
        play.textContent = "Play";
      }
      function go(i) {
        now = Math.max(0, Math.min(S - 1, i));
        slider.set(now);
        show();
      }
      const index = (step) => data.steps.reduce((best, one, i) => (Math.abs(one - step) < Math.abs(data.steps[best] - step) ? i : best), 0);

      // The loss.

      const series = [{ name: "on this text", x: data.steps, y: data.losses }];
      if (data.curve.length) series.push({ name: "of the training batches", x: data.curve.map(([x]) => x), y: data.curve.map(([, y]) => y), dashed: true });
      const facts = el("p", { class: "moment", "aria-live": "polite" });
      const loss = study.plot(element, {
        series, xlabel: "training steps", ylabel: "loss", title: "Loss", marker: data.steps[now],
        onPick(step) { pause(); go(index(step)); },
      });
      element.append(facts);

      // The attention of a head.

      element.append(el("h3", {}, "Attention of a head"));
      const sides = el("div", { class: "sides" });
      const left = el("div");
      const rightSide = el("div");
      sides.append(left, rightSide);
      element.append(sides);
      const picker = study.headPicker(left, {
        layers: data.layers, heads: H, size: T, values: (l, h) => cells(now, l, h),
        onPick(l, h) { [layer, head] = [l, h]; show(); },
      });
      left.append(el("p", { class: "muted small" }, "Choose a head, then a cell to follow it."));
      const map = study.heatmap(rightSide, {
        values: cells(now, layer, head), rows: T, columns: T, rowLabels: data.labels, columnLabels: data.labels,
        rowTitle: "query", columnTitle: "key", diverging: false, max: limit, title: "Attention weights",
        onClick(t, s) { pair = [t, s]; show(); },
      });

      // One pair of tokens in all heads.

      element.append(el("h3", {}, "One pair of tokens, in all heads"));
      const sentence = el("p", { class: "said pair", "aria-live": "polite" });
      element.append(sentence);
      const shownSteps = data.steps.map(String);
      const names = Array.from({ length: L * H }, (_, k) => `${data.layers[Math.floor(k / H)]}.${k % H}`);
      const track = study.heatmap(element, {
        values: new Float64Array(L * H * S), rows: L * H, columns: S, rowLabels: names, columnLabels: shownSteps, rowTitle: "layer.head",
        columnTitle: "step", diverging: false, title: "The pair’s weight by head and step", cell: S <= 24 ? 22 : undefined,
        onClick(k, i) { pause(); [layer, head] = [Math.floor(k / H), k % H]; go(i); },
      });
      const lines = study.plot(element, { series: [], xlabel: "training steps", ylabel: "weight", marker: data.steps[now], onPick(step) { pause(); go(index(step)); } });

      // Gradients.

      const groups = [...new Set(data.parameters.map(group))];
      element.append(el("h3", {}, "Gradients"));
      const gradients = study.bars(element, { rows: groups.map(spoken), series: [{ name: "", values: groups.map(() => 0) }], high: most(groups) });
      const sorted = Float64Array.from(norms.array).sort();
      const byParameter = study.heatmap(element, {
        values: Float64Array.from({ length: data.parameters.length * S }, (_, k) => norms.at(k % S, Math.floor(k / S))),
        rows: data.parameters.length, columns: S, rowLabels: data.parameters.map((name) => name.replace("blocks.", "")), columnLabels: shownSteps,
        rowTitle: "parameter", columnTitle: "step", diverging: false, max: sorted[Math.floor(0.97 * (sorted.length - 1))] || undefined,
        title: "Norm of each parameter’s gradient", cell: S <= 24 ? 18 : undefined,
        onClick(_, i) { pause(); go(i); },
      });

      // Predictions.

      element.append(el("h3", {}, "What it would have said next"));
      const table = el("div", { class: "predictions" });
      element.append(table);

      function group(name) {
        const [first, second] = name.split(".");
        return first === "blocks" ? second : first.endsWith("emb") ? "before" : "after";
      }
      function spoken(name) {
        return { before: "embeddings", after: "final norm, head" }[name] ?? `block ${name}`;
      }
      function normOf(i, name) {
        return Math.sqrt(data.parameters.reduce((sum, one, p) => sum + (group(one) === name ? norms.at(i, p) ** 2 : 0), 0));
      }
      function most(all) {
        return Math.max(...all.flatMap((name) => data.steps.map((_, i) => normOf(i, name))));
      }

      function show() {
        const hits = data.said[now].filter((one, t) => one === data.targets[t]).length;
        const counted = data.targets.filter((one) => one !== "").length;
        facts.textContent = `After ${data.steps[now]} steps: loss ${number(data.losses[now], 5)}, `
          + `norm of the gradient ${number(data.global_norms[now], 5)}, ${hits} of ${counted} next tokens right.`;
        loss.update({ marker: data.steps[now] });
        picker.update();
        picker.select(layer, head);
        map.update(cells(now, layer, head), { max: limit });
        map.select(...pair);
        map.element.querySelector(".title").textContent = `Layer ${data.layers[layer]}, head ${head}, after ${data.steps[now]} steps`;

        const followed = Float64Array.from({ length: L * H * S }, (_, k) => weight(k % S, Math.floor(k / S / H), Math.floor(k / S) % H));
        track.update(followed);
        track.select(layer * H + head, now);
        sentence.replaceChildren(`Query ${token(pair[0])} → key ${token(pair[1])}: `, el("strong", { class: "mono" }, number(weight(now, layer, head), 6)),
          ` in layer ${data.layers[layer]}, head ${head}, after ${data.steps[now]} steps.`);
        lines.update({
          marker: data.steps[now],
          title: `The pair’s weight in the heads of layer ${data.layers[layer]}`,
          series: Array.from({ length: H }, (_, h) => ({ name: `head ${h}`, x: data.steps, y: data.steps.map((_, i) => weight(i, layer, h)), dashed: h >= 6 })),
        });
        gradients.update({ series: [{ name: `norm of the gradient, by part, after ${data.steps[now]} steps`, values: groups.map((name) => normOf(now, name)) }] });
        byParameter.highlight(data.parameters.map((_, p) => [p, now]));

        const scroll = table.firstElementChild?.scrollTop ?? 0;
        table.replaceChildren(study.table(["after", "says", "probability", "should say", "its probability", ""], data.labels.map((name, t) => [
          `${t} ${label(name)}`, label(data.said[now][t]), number(said.at(now, t), 4), data.targets[t] === "" ? "" : label(data.targets[t]),
          data.targets[t] === "" ? "" : number(right.at(now, t), 4), data.targets[t] === "" ? "" : data.said[now][t] === data.targets[t] ? "✓" : "✗",
        ])));
        table.firstElementChild.scrollTop = scroll;
      }
      show();
    },
  });
}
