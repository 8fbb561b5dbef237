"use strict";
/* The inspector: one element of one tensor, how it was computed, its gradient, and the proof of that by differences.

     study.inspector.open("blocks.0.norm1", [0, 2, 5])     what a click on a cell does; the address keeps it

   Numbers in it are links to the elements that they are, so that one can go through the whole model, either way. What
   it was computed from is outlined in the heat maps (study.path.light). */

study.graph = (() => {
  const stations = study.data.stations ?? [];
  const named = new Map(stations.map((station) => [station.name, station]));
  const makers = new Map(); // key -> the equation that defines it, and its station
  const users = new Map(); // key -> the forward equations that read it
  for (const station of stations) {
    for (const pass of ["forward", "backward"]) {
      for (const equation of station[pass]) {
        const key = station.wires[equation.tensor];
        if (!makers.has(key)) makers.set(key, { station, equation, pass });
        if (pass === "backward") continue;
        for (const { 1: name } of [...study.equations.walk(equation.tree)].filter((n) => n[0] === "tensor" || n[0] === "name")) {
          const read = station.wires[name];
          if (read === undefined) continue;
          const found = users.get(read) ?? [];
          users.set(read, found);
          if (!found.some((other) => other.equation === equation)) found.push({ station, equation });
        }
      }
    }
  }

  const split = (key) => (key.includes(">") ? key.split(">") : [null, key]);
  const has = (key) => key !== undefined && study.tensor(key) !== undefined;

  /** The key of a value's gradient, or undefined. */
  function gradientOf(key) {
    const [name, local] = split(key);
    if (name === null) return !key.startsWith("d.") && has(`d.${key}`) ? `d.${key}` : undefined;
    const of = named.get(name)?.wires[`d${local}`];
    return has(of) && makers.get(of)?.pass === "backward" ? of : undefined;
  }

  /** What a gradient is the gradient of: {key, only?}; `only` is the station through which alone it is counted. */
  function primalOf(key) {
    const [name, local] = split(key);
    if (name === null) return key.startsWith("d.") && has(key.slice(2)) ? { key: key.slice(2) } : undefined;
    if (!local.startsWith("d") || makers.get(key)?.pass !== "backward") return undefined;
    const of = named.get(name)?.wires[local.slice(1)];
    return has(of) ? { key: of, only: split(of)[0] === null ? name : undefined } : undefined;
  }

  /** The stations' own gradients that add up to a total one: [{station, equation, key}]; one where it is all. */
  function partsOf(key) {
    const listed = study.data.contributions?.[key];
    if (listed) {
      return listed.map(({ station, local, key: of }) => ({
        station: named.get(station), name: station, key: of, equation: named.get(station)?.backward.find((one) => one.tensor === local),
      }));
    }
    const maker = makers.get(key);
    return maker ? [{ ...maker, name: maker.station.name, key }] : [];
  }

  /** Letters of a tensor's axes by its name in a station; "" where the equations have none. */
  function letters(station, local) {
    const equations = [...station.forward, ...station.backward];
    const rank = study.tensor(station.wires[local]).shape.length;
    let best = Array(rank).fill("");
    for (const name of [local, `d${local}`, local.slice(1)]) {
      const defined = equations.find((equation) => equation.tensor === name);
      if (defined && defined.indices.length === rank) return [...defined.indices];
      for (const equation of equations) {
        for (const [kind, of, indices] of study.equations.walk(equation.tree)) {
          if (kind !== "tensor" || of !== name || indices.length !== rank) continue;
          const found = indices.map((index) => (index[0] === "index" ? index[1] : ""));
          if (found.filter(Boolean).length > best.filter(Boolean).length) best = found;
        }
      }
      if (best.every(Boolean)) return best;
    }
    return best;
  }

  const logits = stations.find((station) => station.wires.logits)?.wires.logits;

  /** Labels of a tensor's axes, where they are tokens or words. */
  function labels(station, local, of = letters(station, local)) {
    const { shape } = study.tensor(station.wires[local]);
    const vocabulary = study.data.vocabulary ?? [];
    return of.map((letter, axis) => {
      if ((letter === "t" || letter === "s") && shape[axis] === study.data.tokens?.length) return study.data.tokens;
      const words = (letter === "v" && station.wires.ids !== "positions") || (letter === "o" && station.wires.y === logits);
      return words && shape[axis] === vocabulary.length ? vocabulary : null;
    });
  }

  const whole = named.has("loss"); // a model; otherwise a layer that stands alone
  const objective = whole ? "the loss" : "the sum of dy · y";

  return { whole, objective, stations, named, makers, users, has, gradientOf, primalOf, partsOf, letters, labels, split };
})();

study.inspector = (() => {
  const { el, number, exact, label } = study;
  const graph = study.graph;
  const TERMS = 12;
  const BOUND = 1e-7; // of differences, relative to the gradient's largest entry
  const panel = el("aside", { class: "inspector", "aria-label": "Inspector", hidden: true, tabindex: "-1" });
  document.querySelector(".page").append(panel);
  let now = null; // {key, index}
  const before = []; // what was inspected earlier
  let asked = 0; // counts inspections, so that a late proof is not shown for another

  const address = (key, index) => `#${encodeURI(key)}[${index.join(",")}]`;
  const written = (name, index) => `${name}[${index.join(",")}]`;

  /** A link to an element. */
  function link(key, index, text, title) {
    return el("a", {
      href: address(key, index), class: "term", "data-key": key, "data-index": index.join(","),
      onclick: (event) => {
        event.preventDefault();
        study.tooltip();
        open(key, index, { scroll: true });
      },
      onpointermove: (event) => study.tooltip(event.clientX, event.clientY,
        el("div", { class: "value" }, exact(study.tensor(key).at(...index))), el("div", { class: "muted" }, title ?? written(key, index))),
      onpointerleave: () => study.tooltip(),
    }, text);
  }

  const stationLink = (name) => el("a", { href: `#${name}`, onclick: (event) => { event.preventDefault(); study.path.go(name); } }, graph.named.get(name)?.title ?? name);

  /** "y[0,2,3] = 0.12 · 0.5 + ..." with every number a link. */
  function spelled(equation, station, index, terms = TERMS) {
    const { parts, read } = study.equations.spell(equation, station, index, { terms });
    const nodes = parts.map((part) => {
      if (typeof part === "string") return part.replaceAll(" · ", "\u00a0·\u00a0"); // a product stays on its line
      if (part.rest) {
        const together = part.value === undefined ? "" : `, together ${number(part.value)}`;
        const text = part.hidden ? `(and ${part.rest} ${part.rest === 1 ? "term that is" : "terms that are"} not on this page${together})` : `(${part.rest} more${together})`;
        return el("span", { class: "rest" }, text);
      }
      if (part.value === undefined) return el("span", { class: "rest", title: "not on this page" }, part.text);
      return link(part.key, part.index, part.text, `${written(part.name, part.index)}  of  ${part.key}`);
    });
    const row = el("div", { class: "spelled" }, el("span", { class: "name" }, `${written(equation.tensor, index)} = `), nodes);
    const more = parts.find((part) => part.rest && !part.hidden);
    if (more) {
      const button = el("button", { type: "button", class: "plain", onclick: () => row.replaceWith(spelled(equation, station, index, Infinity).row) }, "Show all terms");
      row.append(" ", button);
    }
    return { row, read };
  }

  function equationOf({ station, equation }, index) {
    const { row, read } = spelled(equation, station, index);
    return { read, nodes: [el("div", { class: "formula" }, study.math(equation.mathml)), row] };
  }

  /** Which token or word each index stands for. */
  function meaning(key, index) {
    const maker = graph.makers.get(key);
    const station = maker?.station ?? graph.stations.find((one) => Object.values(one.wires).includes(key));
    const local = maker?.equation.tensor ?? Object.keys(station?.wires ?? {}).find((name) => station.wires[name] === key);
    if (!station) return "";
    const letters = graph.letters(station, local);
    const words = graph.labels(station, local, letters);
    return index.map((i, axis) => `${letters[axis] || "·"} = ${i}${words[axis] ? ` “${label(words[axis][i])}”` : ""}`).join(", ");
  }

  const heading = (text, kind) => el("h4", {}, kind ? el("i", { class: `swatch lit-${kind}`, title: "the colour of the outlines of what it was computed from" }) : null, text);

  function valueSection(key, index) {
    const maker = graph.makers.get(key);
    const parts = graph.primalOf(key) && !maker ? graph.partsOf(key) : [];
    if (maker) {
      const { read, nodes } = equationOf(maker, index);
      return { read, nodes: [heading(["How it was computed, in ", stationLink(maker.station.name)], 1), ...nodes] };
    }
    if (parts.length) return contributions(key, index, parts, 1);
    const why = key === "d.loss" ? "The way back begins here: of the loss itself the gradient is 1."
      : key.startsWith("d.") && graph.whole ? "What it was computed from is not on this page."
      : /\.(weight|bias|lora_a|lora_b)$/.test(key) ? "A parameter: it is not computed, it is learnt."
      : !graph.whole ? (key.startsWith("d.") ? "The gradient that arrives at the layer." : "An argument of the layer.")
      : graph.has(`d.${key}`) ? "It was computed by an operation that is not on this page."
      : graph.split(key)[0] === null ? "An input: whole numbers, given from outside."
      : "A constant of this pass.";
    return { read: new Map(), nodes: [el("p", { class: "muted small" }, why)] };
  }

  /** A gradient that is a sum, with each of its terms; or a single one. */
  function contributions(key, index, parts, kind) {
    const read = new Map();
    const merge = (more) => more.forEach((places, of) => read.set(of, [...(read.get(of) ?? []), ...places]));
    const nodes = [];
    if (parts.length > 1) {
      nodes.push(el("p", { class: "small" }, `The sum of ${parts.length} contributions, one from each place where it is used:`));
      const terms = parts.flatMap((part, k) => [k ? " + " : "", graph.has(part.key) ? link(part.key, index, number(study.tensor(part.key).at(...index))) : el("span", { class: "rest" }, "not on this page")]);
      nodes.push(el("div", { class: "spelled" }, el("span", { class: "name" }, `${written(key, index)} = `), terms));
      read.set("", []);
      for (const part of parts) if (graph.has(part.key)) merge(new Map([[part.key, [index]]]));
    }
    for (const part of parts) {
      if (!part.equation) {
        nodes.push(el("p", { class: "muted small" }, `${part.name} is not on this page.`));
        continue;
      }
      const from = equationOf(part, index);
      merge(from.read);
      nodes.push(el("p", { class: "small from" }, "from ", stationLink(part.name)), ...from.nodes);
    }
    read.delete("");
    return { read, nodes: [heading(kind === 1 ? "How it was computed" : ["Its gradient: ", link(key, index, `${number(study.tensor(key).at(...index), 6)}`)], kind), ...nodes] };
  }

  function gradientSection(key, index) {
    const primal = graph.primalOf(key);
    if (primal) {
      const part = primal.only ? `the part of it that comes through ${primal.only}, ` : "";
      const total = primal.only && graph.gradientOf(primal.key);
      return { read: new Map(), nodes: [heading("What it is the gradient of"), el("p", { class: "small" },
        `How much ${graph.objective} changes per change of `, link(primal.key, index, written(primal.key, index)), part ? `: ${part}the whole is ` : ".",
        total ? [link(total, index, number(study.tensor(total).at(...index))), "."] : null)] };
    }
    const gradient = graph.gradientOf(key);
    if (!gradient) {
      const maker = graph.makers.get(key);
      const text = maker?.pass === "backward" ? "A step of the way back, itself no gradient of a tensor shown here."
        : maker ? "The way back does not need this gradient by itself: it is worked into the equations of the station."
        : "No gradient: nothing is learnt through it.";
      return { read: new Map(), nodes: [heading("Its gradient"), el("p", { class: "muted small" }, text)] };
    }
    const parts = graph.partsOf(gradient);
    if (parts.length) return contributions(gradient, index, parts, 2);
    return { read: new Map(), nodes: [heading(["Its gradient: ", link(gradient, index, number(study.tensor(gradient).at(...index), 6))]), el("p", { class: "muted small" },
      gradient === "d.loss" ? "The way back begins here: of the loss itself the gradient is 1." : !graph.whole ? "The gradient that arrives at the layer, drawn at random." : "What it was computed from is not on this page.")] };
  }

  /** What of the loss' difference is to be measured for this element: {key, only, gradient}; undefined for nothing. */
  function measurable(key) {
    const primal = graph.primalOf(key);
    if (primal) return { ...primal, gradient: key };
    const maker = graph.makers.get(key);
    const gradient = graph.gradientOf(key);
    if (gradient || (maker && maker.pass === "forward")) return { key, gradient };
    return undefined;
  }

  function proofSection(key, index) {
    const box = el("div", { class: "proof" });
    const of = measurable(key);
    if (!of || graph.partsOf(graph.gradientOf(of.key)).length === 0 && of.gradient) return box; // where the way back begins
    box.append(heading("Proof by differences"));
    if (!study.data.complete) {
      box.append(el("p", { class: "muted small" }, "A difference of the whole loss needs every number of the pass, and this page has a part of them. The stations’ own proofs were computed when it was written."));
      return box;
    }
    const ticket = asked;
    setTimeout(() => ticket === asked && box.append(...proof(of, index)), 20);
    return box;
  }

  function proof({ key, only, gradient }, index) {
    const { slope, step } = study.equations.difference(key, index, only);
    const rows = [["by differences", exact(slope)]];
    const nodes = [];
    if (gradient) {
      const by = study.tensor(gradient).at(...index);
      // The true gradient of a key's bias is 0: what is computed of it is rounding, beside its weight's gradient.
      const of = study.tensor(key.endsWith(".attn.key.bias") ? gradient.replace(/bias$/, "weight") : gradient) ?? study.tensor(gradient);
      const largest = of.array.reduce((most, x) => Math.max(most, Math.abs(x)), 0);
      const error = Math.abs(slope - by);
      rows.unshift(["by hand", exact(by)]);
      // The loss is known to one rounding, which the division by a small step makes large.
      const rounding = (4 * Number.EPSILON * Math.max(1, Math.abs(study.data.loss))) / step;
      const passed = error <= BOUND * largest || error === 0 ? true : error <= rounding ? undefined : false;
      const text = largest ? `differ by ${number(error / largest, 2)} of the largest entry` : `differ by ${number(error, 2)}`;
      nodes.push(el("p", {}, study.badge(text, passed)));
      if (passed === undefined) nodes.push(el("p", { class: "muted small" }, "This gradient is so small beside the loss that a difference cannot tell it more exactly: the loss is known to 16 digits."));
    }
    const where = only ? ` in ${only} alone` : "";
    return [
      el("table", {}, el("tbody", {}, rows.map(([name, text]) => el("tr", {}, el("th", { scope: "row" }, name), el("td", { class: "number" }, text))))), ...nodes,
      el("p", { class: "muted small" }, `(L(x + h) − L(x − h)) / 2h, h = ${number(step, 2)}: ${graph.whole ? "the whole loss" : graph.objective}, computed twice in this page with this one number changed${where}.`),
    ];
  }

  function usersOf(key) {
    const found = graph.users.get(key) ?? [];
    if (!found.length) return null;
    return el("p", { class: "small muted" }, "Goes into ", found.slice(0, 8).flatMap(({ station, equation }, k) => [k ? ", " : "", el("span", { class: "mono" }, equation.tensor), " of ", stationLink(station.name)]), ".");
  }

  function draw() {
    asked++;
    const { key, index } = now;
    const { at } = study.tensor(key);
    const value = valueSection(key, index);
    const gradient = gradientSection(key, index);
    panel.replaceChildren(
      el("div", { class: "bar" },
        el("button", { type: "button", onclick: back, disabled: !before.length, title: "What was inspected before (Backspace)" }, "← Back"),
        el("button", { type: "button", onclick: close, title: "Close (Escape)", "aria-label": "Close the inspector" }, "Close")),
      el("h3", {}, el("span", { class: "key" }, key), el("span", { class: "place" }, `[${index.join(", ")}]`)),
      el("p", { class: "small muted" }, meaning(key, index)),
      el("p", { class: "value", "aria-live": "polite" }, exact(at(...index))),
      el("section", { class: "made" }, value.nodes), usersOf(key) ?? "",
      el("section", { class: "gradient" }, gradient.nodes),
      el("section", {}, proofSection(key, index)),
    );
    panel.hidden = false;
    panel.scrollTop = 0;
    for (const row of panel.querySelectorAll(".formula")) study.path.fit([row]);
    document.documentElement.classList.add("inspecting");
    study.path.mark(key, index, value.read, gradient.read);
    history.replaceState(null, "", address(key, index));
  }

  /** Inspect an element. `scroll`: bring its heat map into the window. */
  function open(key, index, { scroll = false, keep = true } = {}) {
    const of = study.tensor(key);
    if (!of || of.at(...index) === undefined) return false;
    const same = now && now.key === key && String(now.index) === String(index);
    if (now && keep && !same) {
      before.push(now);
      if (before.length > 200) before.shift();
    }
    now = { key, index: [...index] };
    if (scroll) study.path.reveal(key, index);
    draw();
    return true;
  }

  function back() {
    const last = before.pop();
    if (last) open(last.key, last.index, { scroll: true, keep: false });
  }

  function close() {
    if (!now) return;
    now = null;
    before.length = 0;
    asked++;
    panel.hidden = true;
    document.documentElement.classList.remove("inspecting");
    study.path.mark(null, null, new Map(), new Map());
    history.replaceState(null, "", location.pathname + location.search);
  }

  addEventListener("keydown", (event) => {
    if (event.key === "Escape" && now) close();
    if (event.key === "Backspace" && now && !event.target.closest("input, select, textarea")) {
      event.preventDefault();
      back();
    }
  });

  return { open, close, back, address, get current() { return now; } };
})();
