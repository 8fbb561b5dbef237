"use strict";
/* Flash attention, tile by tile: what the loops of reference/flash_attention.py held after each step. */

study.section({
  id: "flash",
  title: "Flash attention, tile by tile",
  order: 60,
  blurb:
    "Attention without its matrix: of all scores only one small tile exists at a time. Each query keeps the largest score " +
    "so far, m, the sum of exponentials beside it, l, and the result so far, o; when a larger score comes, what was added up " +
    "before is scaled down. At the end it is the same softmax.",
  render(element, data) {
    const { el, number } = study;
    const tokens = (study.data.tokens ?? []).slice(0, data.tokens);
    const T = data.tokens;
    const blocks = [...new Set(data.heads.map((one) => one.block))];
    let head = data.heads[0];
    let pass = "forward";
    let step = 0;
    let timer = null;

    const FORMULAS = {
      forward: [
        "s  = q kᵀ · scale · log₂ e          a tile of scores, to base 2; −∞ for later keys",
        "m′ = max(m, largest s of the row)   p = 2^(s − m′)",
        "l′ = l · 2^(m − m′) + sum of p",
        "o′ = o · 2^(m − m′) + p v           and after the last tile  y = o / l,  lse = m + log₂ l",
      ],
      queries: [
        "p  = 2^(s − lse)                    the softmax again, from one number a query",
        "ds = p · (dy vᵀ − delta)            delta = sum of y · dy, one number a query",
        "dq = scale · sum of ds k            over the tiles of keys",
      ],
      keys: [
        "p  = 2^(s − lse)                    the softmax again, from one number a query",
        "ds = p · (dy vᵀ − delta)            delta = sum of y · dy, one number a query",
        "dv = sum of pᵀ dy",
        "dk = scale · sum of dsᵀ q           over the tiles of queries",
      ],
    };
    const range = (start, size) => (size === 1 ? String(start) : `${start}–${start + size - 1}`);
    const word = (t) => `${t} “${study.label(tokens[t] ?? "")}”`;

    // Controls.
    const which = el("div", { class: "controls" });
    const moves = el("div", { class: "controls" });
    element.append(which, moves);
    if (blocks.length > 1) {
      study.choice(which, { name: "Block", options: blocks.map((b) => ({ value: b, label: `block ${b}` })), value: head.block, onChange(b) {
        choose(data.heads.find((one) => one.block === b && one.head === head.head) ?? data.heads.find((one) => one.block === b));
      } });
    }
    const heads = el("span");
    which.append(heads);
    study.choice(which, {
      name: "Pass", value: pass,
      options: [{ value: "forward", label: "forward" }, { value: "queries", label: "back: dq" }, { value: "keys", label: "back: dk, dv" }],
      onChange(chosen) { pass = chosen; restart(); },
    });
    const play = el("button", { type: "button", onclick: () => (timer ? stop() : start()) }, "Play");
    moves.append(play,
      el("button", { type: "button", "aria-label": "Step back", onclick: () => { stop(); go(step - 1); } }, "‹"),
      el("button", { type: "button", "aria-label": "Step on", onclick: () => { stop(); go(step + 1); } }, "›"));
    const sliding = el("div", { class: "grow" });
    moves.append(sliding);
    let slider = null;

    const formulas = el("pre", { class: "code", tabindex: "0" });
    const said = el("p", { "aria-live": "polite" });
    const map = el("div");
    const inside = el("div", { class: "inside" });
    element.append(formulas, el("div", { class: "flash" }, map, el("div", { class: "now" }, said, inside)));
    const maps = new Map(); // each is made once and then filled anew
    let matrix = null;

    function choose(one) {
      head = one;
      heads.replaceChildren();
      study.choice(heads, {
        name: "Head", value: head,
        options: data.heads.filter((other) => other.block === head.block).map((other) => ({ value: other, label: `head ${other.head}` })),
        onChange(chosen) { head = chosen; restart(); },
      });
      restart();
    }
    function stop() {
      clearInterval(timer);
      timer = null;
      play.textContent = "Play";
    }
    function start() {
      if (step === count() - 1) go(0);
      play.textContent = "Pause";
      timer = setInterval(() => (step < count() - 1 ? go(step + 1) : stop()), 700);
    }
    const count = () => head[pass].rows.length;
    function restart() {
      stop();
      sliding.replaceChildren();
      slider = study.slider(sliding, { min: 0, max: count() - 1, value: 0, name: "Step", label: (i) => `${i + 1} of ${count()}`, onInput(i) { stop(); go(i); } });
      formulas.textContent = FORMULAS[pass].join("\n");
      map.replaceChildren();
      matrix = drawn(map, pass, {
        cell: Math.max(8, Math.min(16, Math.floor((element.clientWidth - 40) / T), Math.floor(420 / T))), values: new Float64Array(T * T), rows: T, columns: T, rowLabels: tokens, columnLabels: tokens, rowTitle: "query", columnTitle: "key",
        diverging: pass !== "forward", max: pass === "forward" ? 1 : largest(), title: pass === "forward" ? "weights as they are so far" : "ds, tile by tile",
      });
      go(0);
    }
    const largest = () => study.unpack(head[pass].ds).array.reduce((most, x) => (Math.abs(x) > most ? Math.abs(x) : most), 0);

    /** Each cell of the matrix that has been computed by now. */
    function matrixNow() {
      const states = head[pass];
      const values = new Float64Array(T * T);
      const m = new Float64Array(T);
      const l = new Float64Array(T);
      for (let k = step; k >= 0 && pass === "forward"; k--) { // the latest of each query
        const [first, size] = states.rows[k];
        for (let i = 0; i < size; i++) if (!l[first + i]) [m[first + i], l[first + i]] = [study.unpack(states.m).at(k, i), study.unpack(states.l).at(k, i)];
      }
      const tile = study.unpack(pass === "forward" ? states.s : states.ds);
      for (let k = 0; k <= step; k++) {
        if (states.heads[k] !== states.heads[step]) continue;
        const [[r, rows], [c, columns]] = [states.rows[k], states.columns[k]];
        for (let i = 0; i < rows; i++) {
          for (let j = 0; j < columns; j++) {
            const x = tile.at(k, i, j);
            values[(r + i) * T + c + j] = pass === "forward" ? 2 ** (x - m[r + i]) / l[r + i] : x;
          }
        }
      }
      return values;
    }

    function go(to) {
      step = Math.max(0, Math.min(count() - 1, to));
      slider.set(step);
      const states = head[pass];
      const [[r, rows], [c, columns]] = [states.rows[step], states.columns[step]];
      matrix.update(matrixNow());
      matrix.highlight(Array.from({ length: rows * columns }, (_, n) => [r + Math.floor(n / columns), c + (n % columns)]));
      inside.replaceChildren();
      (pass === "forward" ? showForward : showBackward)(states, r, rows, c, columns);
    }

    /** One step of a packed array, cut to what is there: rows of numbers. */
    function part(states, name, rows, columns) {
      const { at, shape } = study.unpack(states[name]);
      const wide = columns ?? shape[2];
      return Array.from({ length: rows }, (_, i) => Array.from({ length: wide }, (_, j) => at(step, i, j)));
    }
    function small(title, values, more) {
      const [r, rows, c, columns] = [...head[pass].rows[step], ...head[pass].columns[step]];
      const options = { values, rows: values.length, columns: values[0].length, title, cell: values[0].length > 24 ? 7 : 15, ...more };
      drawn(inside, [pass, title, r, rows, c, columns].join(" "), options);
    }
    function drawn(parent, key, options) {
      const known = maps.get(key);
      if (!known) maps.set(key, study.heatmap(parent, options));
      else {
        parent.append(known.element);
        known.update(options.values, { max: options.max });
      }
      return maps.get(key);
    }
    const labels = (start, size) => tokens.slice(start, start + size);

    function showForward(states, r, rows, c, columns) {
      const { m, l, shrink } = Object.fromEntries(["m", "l", "shrink"].map((name) => [name, study.unpack(states[name])]));
      const first = c === 0;
      const last = step + 1 === count() || states.rows[step + 1][0] !== r;
      const p = part(states, "p", rows, columns);
      said.replaceChildren(
        `Queries ${range(r, rows)} meet keys ${range(c, columns)}: ${rows * columns} scores exist, of ${T * T}. `,
        last ? "It is their last tile: o / l is the result." : "",
      );
      inside.append(study.table(["query", "m", "m′", "2^(m − m′)", "l", "sum of p", "l′"], Array.from({ length: rows }, (_, i) => [
        word(r + i), first ? "−∞" : number(m.at(step - 1, i)), number(m.at(step, i)), first || shrink.at(step, i) === 1 ? number(shrink.at(step, i)) : el("b", {}, number(shrink.at(step, i))),
        first ? "0" : number(l.at(step - 1, i)), number(p[i].reduce((a, b) => a + b, 0)), number(l.at(step, i)),
      ])));
      const rowLabels = labels(r, rows);
      small("p, this tile", p, { rowLabels, columnLabels: labels(c, columns), diverging: false, max: 1 });
      small("o, so far", part(states, "o", rows), { rowLabels });
      if (last) {
        const y = study.unpack(head.y);
        small("y = o / l", Array.from({ length: rows }, (_, i) => Array.from({ length: y.shape[1] }, (_, d) => y.at(r + i, d))), { rowLabels });
      }
      if (step + 1 === count()) inside.append(same("y"));
    }

    function showBackward(states, r, rows, c, columns) {
      const delta = study.unpack(head.delta);
      const lse = study.unpack(head.lse);
      const h = states.heads[step];
      said.replaceChildren(pass === "queries"
        ? `Queries ${range(r, rows)} meet keys ${range(c, columns)} once more: their softmax is made again from lse, and dq grows by ds k.`
        : `Keys ${range(c, columns)} meet queries ${range(r, rows)}${h === head.head ? "" : ` of head ${h}, which shares them`}: earlier queries do not see them and are left out.`);
      if (h === head.head) {
        inside.append(study.table(["query", "lse", "delta"], Array.from({ length: rows }, (_, i) => [word(r + i), number(lse.at(r + i)), number(delta.at(r + i))])));
      }
      small("p, kept", part(states, "kept", rows, columns), { rowLabels: labels(r, rows), columnLabels: labels(c, columns), diverging: false });
      small("ds, this tile", part(states, "ds", rows, columns), { rowLabels: labels(r, rows), columnLabels: labels(c, columns) });
      const scaled = (name, factor) => part(states, name, name === "dq" ? rows : columns).map((row) => row.map((x) => x * factor));
      if (pass === "queries") {
        small("dq, so far", scaled("dq", head.scale), { rowLabels: labels(r, rows) });
        if (step + 1 === count()) inside.append(same("dq"));
      } else {
        small("dk, so far", scaled("dk", head.scale), { rowLabels: labels(c, columns) });
        small("dv, so far", scaled("dv", head.factor), { rowLabels: labels(c, columns) });
        if (step + 1 === count()) inside.append(same("dk"), same("dv"));
      }
    }
    const same = (name) => el("p", {}, study.badge(`${name} is ordinary attention’s, off by ${number(head.errors[name], 2)} of ${name === "y" ? "its" : "the gradients’"} largest entry`, head.errors[name] <= 1e-12));

    const tiles = Math.ceil(T / data.tile);
    element.append(el("p", { class: "small muted" }, `Tiles of ${data.tile} by ${data.tile}. Those above the diagonal, which no query sees, are never computed: ${tiles * (tiles + 1) / 2} of ${tiles * tiles} are.`));
    const cut = [];
    if (T < (study.data.tokens ?? []).length) cut.push(`the first ${T} tokens`);
    if (data.heads.length < data.of_heads) cut.push(`${data.heads.length} of ${data.of_heads} heads`);
    if (cut.length) element.append(el("p", { class: "small muted" }, `Replayed here: ${cut.join(", ")}.`));
    choose(head);
  },
});
