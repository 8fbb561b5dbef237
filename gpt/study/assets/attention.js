"use strict";
/* The section "attention": every head's matrix on the text, the causal law, and how far back each head looks.
   Its data are those of gpt/study/heads.py. */

{
  const { el, number, label, unpack } = study;

  const VIEWS = {
    p: "Weights",
    scores: "Scores",
    unmasked: "Without the mask",
    dropped: "After dropout",
  };
  const MEANING = {
    p: "Softmax of the scores over the keys up to the query: how the query divides 1 among them.",
    scores: "Query times key, scaled, before the mask and softmax. Above the diagonal are the scores that the mask hides.",
    unmasked: "Softmax over all keys, as if a query saw what comes after it.",
    dropped: "The weights as dropout leaves them: some are 0, the others divided by 1 − rate. These weigh the values.",
  };

  /** The part of a tensor (L, H, T, T), or (L, T, T), that belongs to these leading indices, row by row. */
  function matrix(tensor, ...index) {
    const size = tensor.strides[index.length - 1];
    const start = index.reduce((sum, i, axis) => sum + i * tensor.strides[axis], 0);
    return tensor.array.subarray(start, start + size);
  }

  function softmaxRows(scores, T) {
    const p = new Float64Array(T * T);
    for (let t = 0; t < T; t++) {
      const row = scores.subarray(t * T, (t + 1) * T);
      const most = row.reduce((a, b) => Math.max(a, b));
      let sum = 0;
      for (let s = 0; s < T; s++) sum += p[t * T + s] = Math.exp(row[s] - most);
      for (let s = 0; s < T; s++) p[t * T + s] /= sum;
    }
    return p;
  }

  /** Where colours end in maps of attention: 97 of 100 weights up to the diagonal are smaller. Matrices are T by T. */
  study.weightLimit = (array, T) => {
    const seen = array.filter((_, k) => k % T <= Math.floor(k / T) % T).sort();
    return seen[Math.floor(0.97 * (seen.length - 1))] || 1;
  };

  /** A row of buttons for each layer, with a small picture of each head; -> {element, select(l, h), update()}. */
  study.headPicker = (parent, { layers, heads, size, values, onPick }) => {
    const buttons = layers.map((layer, l) => Array.from({ length: heads }, (_, h) => {
      const canvas = el("canvas", { width: size, height: size });
      return { canvas, button: el("button", { type: "button", "aria-label": `layer ${layer}, head ${h}`, title: `layer ${layer}, head ${h}`, onclick: () => onPick(l, h) }, canvas) };
    }));
    const element = el("div", { class: "thumbnails", role: "group", "aria-label": "Heads by layer" },
      buttons.map((row, l) => el("div", { class: "row" }, el("span", {}, `layer ${layers[l]}`), row.map(({ button }) => button))));
    parent.append(element);
    function update() {
      const [zero, high] = [study.colour("background"), study.colour("positive")];
      buttons.forEach((row, l) => row.forEach(({ canvas }, h) => {
        const image = new ImageData(size, size);
        values(l, h).forEach((value, k) => {
          const t = Math.sqrt(Math.max(0, Math.min(1, value)));
          for (let c = 0; c < 3; c++) image.data[4 * k + c] = zero[c] + (high[c] - zero[c]) * t;
          image.data[4 * k + 3] = 255;
        });
        canvas.getContext("2d").putImageData(image, 0, 0);
      }));
    }
    update();
    study.onTheme(update);
    return {
      element, update,
      select: (l, h) => buttons.forEach((row, i) => row.forEach(({ button }, j) => button.setAttribute("aria-pressed", String(i === l && j === h)))),
    };
  };

  study.section({
    id: "attention",
    title: "What each head attends to",
    order: 30,
    blurb: "A head compares each token’s query with the keys of the tokens up to it and divides a weight of 1 among them. "
      + "Queries go down, keys to the right; point at a cell for its number, choose one to see its row in the text. "
      + "The colours of all weights end where 97 of 100 are reached.",
    render(element, data) {
      const tensors = Object.fromEntries(Object.entries(data.matrices).map(([name, packed]) => [name, unpack(packed)]));
      const [L, H, T] = tensors.p.shape;
      const limit = study.weightLimit(tensors.p.array, T);
      let [layer, head, view] = [0, 0, "p"];
      const last = tensors.p.array.subarray((T - 1) * T, T * T);
      let chosen = [T - 1, last.indexOf(last.reduce((a, b) => Math.max(a, b)))];
      const values = (name = view, l = layer, h = head) =>
        name === "unmasked" ? softmaxRows(matrix(tensors.scores, l, h), T) : matrix(tensors[name], l, h);

      if (data.note) element.append(el("p", { class: "muted small" }, data.note));
      const controls = el("div", { class: "controls" });
      const meaning = el("p", { class: "meaning" });
      const sides = el("div", { class: "sides" });
      const left = el("div");
      const right = el("div");
      sides.append(left, right);
      element.append(controls, meaning, sides);

      study.choice(controls, {
        name: "What the matrix shows",
        options: Object.entries(VIEWS).filter(([name]) => name === "unmasked" || name in tensors).map(([value, text]) => ({ value, label: text })),
        value: view,
        onChange(name) { view = name; show(); },
      });
      const picker = study.headPicker(left, {
        layers: data.layers, heads: H, size: T, values: (l, h) => values("p", l, h),
        onPick(l, h) { [layer, head] = [l, h]; show(); },
      });

      const shared = {
        rows: T, columns: T, rowLabels: data.labels, columnLabels: data.labels, rowTitle: "query", columnTitle: "key",
        onHover: (t, s) => say(t ?? chosen[0], s ?? chosen[1]),
        onClick: (t, s) => { chosen = [t, s]; say(t, s); tint(); },
      };
      const maps = {
        weights: study.heatmap(right, { ...shared, values: values("p"), diverging: false, max: limit, title: "Attention weights" }),
        scores: study.heatmap(right, { ...shared, values: values("scores"), diverging: true, title: "Scores" }),
      };
      const sentence = el("p", { class: "said", "aria-live": "polite" });
      const badges = el("div", { class: "laws" });
      const text = el("ol", { class: "tinted", "aria-label": "The text, each token tinted by its weight" });
      right.append(sentence, badges);
      element.append(text);

      const token = (t) => `${t} “${label(data.labels[t])}”`;
      function say(t, s) {
        const value = values()[t * T + s];
        const hidden = view !== "unmasked" && s > t;
        const kind = view === "scores" ? "score" : "weight";
        sentence.replaceChildren(`query ${token(t)} → key ${token(s)}: ${kind} `, el("strong", { class: "mono" }, number(value, 6)),
          hidden ? (view === "scores" ? ", which the mask hides" : ", as the key comes after the query") : "");
      }
      function tint() {
        const row = values(view === "scores" ? "p" : view).subarray(chosen[0] * T, (chosen[0] + 1) * T);
        const most = row.reduce((a, b) => Math.max(a, b));
        text.replaceChildren(...data.labels.map((name, s) => el("li", {
          class: `chip${s === chosen[0] ? " query" : ""}`, style: `--weight: ${(row[s] / most).toFixed(4)}`, title: `key ${token(s)}: ${study.exact(row[s])}`,
        }, label(name))));
      }
      function laws() {
        if (view === "scores") return badges.replaceChildren();
        const p = values();
        let [least, most, ahead] = [Infinity, -Infinity, 0];
        for (let t = 0; t < T; t++) {
          let sum = 0;
          for (let s = 0; s < T; s++) {
            sum += p[t * T + s];
            if (s > t) ahead = Math.max(ahead, p[t * T + s]);
          }
          [least, most] = [Math.min(least, sum), Math.max(most, sum)];
        }
        const off = Math.max(Math.abs(least - 1), Math.abs(most - 1));
        badges.replaceChildren(
          view === "dropped"
            ? study.badge(`rows sum to between ${number(least)} and ${number(most)}: to 1 only in the mean over many masks`)
            : study.badge(`every row sums to 1, to ${number(off, 2)}`, off <= 1e-12),
          study.badge(ahead ? `above the diagonal up to ${number(ahead)}: queries see what comes after them` : "0 above the diagonal", ahead === 0),
          view === "dropped" ? "" : study.badge(`the first token gives itself ${number(p[0], 6)}`, p[0] === 1),
        );
      }
      function show() {
        const current = view === "scores" ? maps.scores : maps.weights;
        maps.scores.element.hidden = current !== maps.scores;
        maps.weights.element.hidden = current !== maps.weights;
        current.update(values(), view === "scores" ? {} : { max: limit });
        current.select(...chosen);
        current.element.querySelector(".title").textContent = `${VIEWS[view]}, layer ${data.layers[layer]}, head ${head}`;
        meaning.textContent = MEANING[view];
        picker.select(layer, head);
        say(...chosen);
        laws();
        tint();
      }
      show();

      element.append(el("div", { class: "laws" }, data.laws.map((law) =>
        study.badge(`all layers and heads: ${law.name}${law.error ? `, to ${number(law.error, 2)}` : ", exactly"}`, law.passed))));

      // The causal law.

      element.append(el("h3", {}, "The causal law"), el("p", {},
        "No token may change what the model says before it. Here key and value of one token are turned into their negatives and "
        + "the layer’s attention is computed again: a cell says how far its output at a query moved, at most, when that key was changed."));
      const lawControls = el("div", { class: "controls" });
      const lawBadge = el("div", { class: "laws" });
      element.append(lawControls, lawBadge);
      let [mask, lawLayer] = ["masked", 0];
      const moved = { masked: unpack(data.influence.masked), unmasked: unpack(data.influence.unmasked) };
      const largest = moved.unmasked.array.reduce((a, b) => Math.max(a, b), moved.masked.array.reduce((a, b) => Math.max(a, b), 0));
      study.choice(lawControls, {
        name: "Mask", value: mask, options: [{ value: "masked", label: "Mask on" }, { value: "unmasked", label: "Mask off" }],
        onChange(value) { mask = value; showLaw(); },
      });
      if (L > 1) {
        study.choice(lawControls, {
          name: "Layer", value: 0, options: data.layers.map((number, l) => ({ value: l, label: `layer ${number}` })),
          onChange(l) { lawLayer = l; showLaw(); },
        });
      }
      const lawMap = study.heatmap(element, {
        ...shared, onHover: null, onClick: null, values: matrix(moved.masked, 0), diverging: false, max: largest,
        rowTitle: "output", columnTitle: "changed", title: "How far the outputs move",
      });
      function showLaw() {
        const cells = matrix(moved[mask], lawLayer);
        lawMap.update(cells, { max: largest });
        let ahead = 0;
        for (let t = 0; t < T; t++) for (let s = t + 1; s < T; s++) ahead = Math.max(ahead, cells[t * T + s]);
        lawBadge.replaceChildren(study.badge(
          ahead ? `outputs before the changed token move by up to ${number(ahead)}` : "outputs before the changed token move by exactly 0", ahead === 0));
      }
      showLaw();

      // How far back.

      const distances = unpack(data.by_distance);
      const uniform = unpack(data.uniform).array;
      const [layers, heads] = distances.shape;
      element.append(el("h3", {}, "How far back each head looks"), el("p", {},
        "The mean weight that a head gives to the key so many tokens back, over all queries that have one. A bright cell far from the "
        + "left edge is a head that looks back by a fixed distance. The last row is a head that looks at all keys alike."));
      study.heatmap(element, {
        values: [...distances.array, ...uniform], rows: layers * heads + 1, columns: T, diverging: false,
        rowLabels: [...Array.from({ length: layers * heads }, (_, k) => `${Math.floor(k / heads)}.${k % heads}`), "alike"],
        rowTitle: "layer.head", columnTitle: "tokens back", title: "Mean weight by distance",
      });
    },
  });
}
