"use strict";
/* The computation as a path: the stations in order, each with its formulas and tensors, forward and backward.

   A tensor is shown as heat maps of its last two axes; small steppers choose the others. Every map of every tensor is
   known by the tensor's key, so that the inspector can outline in all of them what an element was computed from. */

study.path = (() => {
  const { el, label } = study;
  const graph = study.graph;
  const views = new Map(); // key -> the views of that tensor which have been drawn
  const bodies = new Map(); // a station's name -> what draws its body
  const elements = new Map(); // a station's name -> its element
  let marked = { key: null, index: null, lit: new Map() };
  let direction = "both";
  const directions = new Set();

  const LETTERS = { b: "example", h: "head", g: "head" };
  const idOf = (name) => `station:${name}`;

  // One tensor.

  /** A tensor's heat map, with steppers for the axes before the last two. */
  function view(parent, station, local) {
    const key = station.wires[local];
    const { shape, shown, array, strides } = study.tensor(key);
    const rank = shown.length;
    const letters = graph.letters(station, local);
    const words = graph.labels(station, local, letters);
    const [rows, columns] = [rank > 1 ? shown[rank - 2] : 1, rank > 0 ? shown[rank - 1] : 1];
    const leading = shown.slice(0, Math.max(0, rank - 2));
    const lead = leading.map(() => 0);
    const cut = shown.some((n, axis) => n < shape[axis]);
    const element = el("div", { class: "tensor", "data-key": key, "data-local": local });
    const size = `${shape.length ? shape.join(" × ") : "one number"}${letters.some(Boolean) ? `  ${letters.map((letter) => letter || "·").join(" ")}` : ""}`;
    element.append(el("div", { class: "label" }, el("b", {}, local), el("span", { class: "shape" }, size), array.length === 1 ? el("span", { class: "mono" }, study.number(array[0], 6)) : null, cut ? el("span", { class: "cut", title: `${shown.join(" × ")} of it are on this page` }, "cut") : null));
    parent.append(element);
    if (!array.length) return;

    const slice = () => {
      const start = lead.reduce((sum, i, axis) => sum + i * strides[axis], 0);
      return array.subarray(start, start + rows * columns);
    };
    const whole = (i, j) => [...lead, ...(rank > 1 ? [i] : []), ...(rank > 0 ? [j] : [])];
    const steppers = leading.map((n, axis) => {
      if (n < 2) return null;
      const at = el("output", {}, "");
      const move = (by) => { turn(lead.map((i, other) => (other === axis ? (i + by + n) % n : i))); };
      const name = LETTERS[letters[axis]] ?? (letters[axis] || `axis ${axis}`);
      element.append(el("div", { class: "stepper" },
        el("button", { type: "button", "aria-label": `Previous ${name}`, onclick: () => move(-1) }, "‹"), at,
        el("button", { type: "button", "aria-label": `Next ${name}`, onclick: () => move(1) }, "›")));
      return () => { at.textContent = `${name} ${lead[axis]} of ${n}`; };
    });

    const room = Math.max(200, parent.clientWidth - 40);
    const map = study.heatmap(element, {
      values: slice(), rows, columns, max: array.reduce((most, x) => Math.max(most, Math.abs(x)), 0), title: "",
      diverging: array.some((x) => x < 0), rowLabels: rank > 1 ? words[rank - 2] : [""], columnLabels: rank > 0 ? words[rank - 1] : [""],
      rowTitle: rank > 1 ? letters[rank - 2] : "", columnTitle: rank > 0 ? letters[rank - 1] : "",
      cell: Math.round(Math.max(5, Math.min(20, room / columns, Math.max(320 / rows, 7)))),
      onClick: (i, j) => study.inspector.open(key, whole(i, j)),
    });
    map.element.querySelector("canvas").setAttribute("aria-label", `${local} of ${station.name}, ${shape.join(" by ")}; arrow keys move, each element is shown in the inspector`);

    /** Show the part of the tensor with these leading indices. */
    function turn(where) {
      if (String(where) !== String(lead)) {
        lead.splice(0, lead.length, ...where);
        map.update(slice());
      }
      steppers.forEach((show) => show?.());
      decorate();
    }
    const here = (place) => lead.every((i, axis) => place[axis] === i);
    const cell = (place) => [rank > 1 ? place[rank - 2] : 0, rank > 0 ? place[rank - 1] : 0];
    /** Outlines and selection as they are to be now. */
    function decorate() {
      const cells = (kind) => (marked.lit.get(kind)?.get(key) ?? []).filter(here).map(cell);
      const selected = (marked.key === key || marked.also === key) && here(marked.index);
      map.mark(cells(1), cells(2), selected ? cell(marked.index) : null);
    }
    /** Turn to where something is to be seen, if it is not where the view is. */
    function follow() {
      const wanted = [marked.key === key || marked.also === key ? [marked.index] : [], ...[1, 2].map((kind) => marked.lit.get(kind)?.get(key) ?? [])].find((places) => places.length);
      turn(wanted && !wanted.some(here) ? wanted[0].slice(0, lead.length) : [...lead]);
    }
    const one = { key, station, local, element, map, follow, decorate };
    views.set(key, [...(views.get(key) ?? []), one]);
    follow();
  }

  /** Mark an element in all maps, and outline what it (1) and its gradient (2) were computed from. */
  function mark(key, index, made, gradient) {
    const touched = new Set();
    const collect = () => {
      for (const name of [marked.key, marked.also, ...(marked.lit.get(1)?.keys() ?? []), ...(marked.lit.get(2)?.keys() ?? [])]) if (name) touched.add(name);
    };
    collect();
    const of = key === null ? undefined : graph.gradientOf(key) ?? graph.primalOf(key)?.key;
    marked = { key, index, also: of, lit: new Map([[1, made], [2, gradient]]) };
    collect();
    for (const name of touched) for (const one of views.get(name) ?? []) one.follow();
  }

  // One station.

  /** A formula that is too wide is set somewhat smaller; what is still too wide scrolls. */
  function fit(row) {
    if (row.scrollWidth > row.clientWidth) row.style.fontSize = `${Math.max(0.76, row.clientWidth / row.scrollWidth)}em`;
  }

  function body(station, parent) {
    const { wires } = station;
    const arrays = (names) => [...new Set(names)].filter((name) => name in wires);
    const made = new Set(station.forward.map((equation) => equation.tensor));
    const read = station.forward.flatMap((equation) => study.equations.reads(equation, station));
    const result = station.forward.at(-1).tensor;
    const inputs = arrays(read).filter((name) => !made.has(name));
    const extra = arrays(station.backward.flatMap((equation) => study.equations.reads(equation, station)))
      .filter((name) => !made.has(name) && !inputs.includes(name) && name !== `d${result}` && !station.backward.some((equation) => equation.tensor === name));

    const pass = (name, title, equations, groups) => {
      const column = el("div", { class: `pass ${name}` }, el("h4", {}, title), equations.map((equation) => el("div", { class: "formula" }, study.math(equation.mathml))));
      return { column, groups };
    };
    const forward = pass("forward", "Forward", station.forward, [["In", inputs], ["Computed", arrays([...made])]]);
    const backward = pass("backward", "Backward", station.backward, [["Arrives", arrays([`d${result}`, ...extra])], ["Computed", arrays(station.backward.map((equation) => equation.tensor))]]);
    const columns = el("div", { class: "passes", "data-show": direction }, forward.column, backward.column);

    const producers = [...new Set(inputs.map((name) => graph.makers.get(wires[name])).filter((maker) => maker?.pass === "forward").map((maker) => maker.station.name))];
    const consumers = [...new Set((graph.users.get(wires[result]) ?? []).map((user) => user.station.name))].filter((name) => name !== station.name);
    const chips = (title, names) => (names.length ? el("span", {}, `${title} `, names.map((name) => el("a", { class: "chip", href: `#${name}`, onclick: (event) => { event.preventDefault(); go(name); } }, name))) : null);
    const bar = el("div", { class: "controls" }, el("div", { class: "links small muted" }, chips("from", producers), chips("to", consumers)));
    const control = study.choice(bar, {
      name: `Passes of ${station.name}`, value: direction,
      options: [{ value: "both", label: "Both" }, { value: "forward", label: "Forward" }, { value: "backward", label: "Backward" }],
      onChange: (value) => { columns.dataset.show = value; },
    });
    directions.add((value) => {
      columns.dataset.show = value;
      control.set(value);
    });
    parent.append(bar, columns);
    for (const row of columns.querySelectorAll(".formula")) fit(row);
    for (const { column, groups } of [forward, backward]) {
      for (const [title, names] of groups) {
        if (!names.length) continue;
        column.append(el("p", { class: "group" }, title));
        const holder = el("div", { class: "tensors" });
        column.append(holder);
        for (const name of names) view(holder, station, name);
      }
    }
    const fold = (title, ...content) => el("details", { class: "more" }, el("summary", {}, title), content);
    const { code } = station;
    if (code) {
      parent.append(fold(["The reference’s own code ", el("span", { class: "muted" }, `${code.file}:${code.line}`)],
        el("div", { class: "passes", "data-show": "both" }, el("div", { class: "pass" }, el("h4", {}, "Forward"), study.code(code.forward)), el("div", { class: "pass" }, el("h4", {}, "Backward"), study.code(code.backward)))));
    }
    if (station.doc) parent.append(fold("What the module says of itself", el("pre", { class: "code plain-text" }, station.doc)));
    if (station.laws?.length) {
      parent.append(el("div", { class: "laws" }, el("h4", {}, "Laws that these numbers obey"), station.laws.map((law) =>
        el("div", { class: "law" }, study.badge(`${law.name}: ${study.number(law.error, 2)}`, law.passed), el("span", { class: "small muted" }, ` bound ${study.number(law.bound, 2)}. ${law.doc ?? ""}`)))));
    }
    if (station.proofs?.length) {
      parent.append(el("div", { class: "proofs" }, el("h4", {}, "Proofs: the gradient by hand, and by differences of the whole loss"), study.table(
        ["element", "by hand", "by differences", "error", "bound"],
        station.proofs.map((proof) => [
          reference(station, proof), study.number(proof.by_hand, 10), study.number(proof.differences, 10),
          study.badge(study.number(proof.error, 2), proof.error <= proof.bound), proof.bound,
        ]))));
    }
  }

  /** A link to the element that a proof is about, where it is on the page. */
  function reference(station, proof) {
    const key = station.wires[proof.tensor];
    const text = `${proof.tensor}[${proof.index.join(",")}]`;
    if (!key || study.tensor(key).at(...proof.index) === undefined) return el("span", { class: "mono" }, text);
    return el("a", { class: "mono", href: study.inspector.address(key, proof.index), onclick: (event) => { event.preventDefault(); study.inspector.open(key, proof.index); } }, text);
  }

  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) bodies.get(entry.target.dataset.station)?.();
  }, { rootMargin: "600px" });

  function element(station) {
    const inner = el("div", { class: "body" });
    const result = station.forward.at(-1).tensor;
    const shape = study.tensor(station.wires[result]).shape;
    const summary = el("summary", {}, el("span", { class: "title" }, station.title), el("code", {}, station.name), el("span", { class: "shape" }, shape.length ? shape.join(" × ") : "one number"));
    const folded = el("details", { open: true }, summary, inner);
    const found = el("article", { class: "station", id: idOf(station.name), "data-station": station.name }, folded);
    const draw = () => {
      if (!bodies.delete(station.name)) return;
      near.unobserve(inner);
      body(station, inner);
      inner.classList.add("drawn");
    };
    inner.dataset.station = station.name;
    bodies.set(station.name, draw);
    elements.set(station.name, found);
    near.observe(inner);
    return found;
  }

  /** Stations in order; what a shortcut, an adapter's layer or the like passes by stands in a box of its own. */
  function lay(stations) {
    const places = new Map(stations.map((station, i) => [station.wires[station.forward.at(-1).tensor], i]));
    const nodes = [];
    for (let i = stations.length - 1; i >= 0; i--) {
      const station = stations[i];
      nodes.unshift(element(station));
      const from = station.layer === "add" ? places.get(station.wires.x) ?? -1 : i;
      if (from < i - 1) {
        nodes.unshift(el("div", { class: "bypass", title: `${station.wires.x} passes by, to ${station.name}` }, lay(stations.slice(from + 1, i))));
        i = from + 1;
      }
    }
    return nodes;
  }

  // Jumps.

  /** Make a station visible: draw it, open what it is folded in. */
  function unfold(name) {
    const found = elements.get(name);
    for (let parent = found; parent; parent = parent.parentElement) if (parent.tagName === "DETAILS") parent.open = true;
    found.firstElementChild.open = true;
    bodies.get(name)?.();
    return found;
  }

  /** Scroll to an element, and again while what comes near the window is drawn and moves it. */
  let settling = 0;
  function settle(target, block, frames = 14) {
    cancelAnimationFrame(settling);
    target.scrollIntoView({ block });
    const before = target.getBoundingClientRect().top;
    const again = (left) => {
      if (Math.abs(target.getBoundingClientRect().top - before) > 2) target.scrollIntoView({ block });
      if (left) settling = requestAnimationFrame(() => again(left - 1));
    };
    again(frames);
  }
  for (const name of ["wheel", "touchstart", "pointerdown", "keydown"]) addEventListener(name, () => cancelAnimationFrame(settling), { passive: true });

  /** Go to a station. */
  function go(name) {
    study.draw("path");
    if (!elements.has(name)) return false;
    settle(unfold(name), "start");
    history.replaceState(null, "", `#${name}`);
    return true;
  }

  /** Bring an element's heat map into the window: that of the station which makes it, if it is not there already. */
  function reveal(key, index) {
    study.draw("path");
    const maker = graph.makers.get(key)?.station ?? graph.stations.find((station) => Object.values(station.wires).includes(key));
    const parts = graph.partsOf(key);
    const station = maker ?? parts.find((part) => part.station)?.station;
    if (!station) return;
    unfold(station.name);
    const found = (views.get(key) ?? []).find((one) => one.station === station) ?? views.get(key)?.[0];
    if (!found) return;
    const columns = found.element.closest(".passes");
    if (!found.element.offsetParent) columns.dataset.show = "both";
    const box = found.element.getBoundingClientRect();
    const bottom = matchMedia("(max-width: 62rem)").matches ? innerHeight * 0.45 : innerHeight;
    if (box.top < 0 || Math.min(box.bottom, box.top + 160) > bottom) settle(found.element, bottom < innerHeight ? "start" : "center");
  }

  /** Follow the address: an element, a station, or neither. */
  function follow() {
    let text;
    try {
      text = decodeURIComponent(location.hash.slice(1));
    } catch {
      return; // no address that this page wrote
    }
    const element = /^(.+)\[([\d,]*)\]$/.exec(text);
    if (element) {
      const index = element[2] ? element[2].split(",").map(Number) : [];
      if (graph.has(element[1])) study.inspector.open(element[1], index, { scroll: true });
    } else if (graph.named.has(text)) go(text);
  }

  // The section.

  function search() {
    const keys = Object.keys(study.data.tensors);
    const results = el("ul", { class: "results", role: "listbox", id: "search-results", hidden: true });
    let found = [];
    let at = 0;
    const pick = (i) => {
      if (!found[i]) return;
      const { name, station } = found[i];
      input.value = "";
      show();
      if (station) go(name);
      else study.inspector.open(name, study.tensor(name).shape.map(() => 0), { scroll: true });
    };
    const show = () => {
      const words = input.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
      const fits = (text) => words.every((word) => text.toLowerCase().includes(word));
      found = words.length ? [
        ...graph.stations.filter((station) => fits(`${station.name} ${station.title}`)).map((station) => ({ name: station.name, station })),
        ...keys.filter(fits).sort((a, b) => a.length - b.length).map((name) => ({ name })),
      ].slice(0, 12) : [];
      at = 0;
      results.hidden = !words.length;
      input.setAttribute("aria-expanded", String(!results.hidden));
      paint();
    };
    const paint = () => {
      results.replaceChildren(...(found.length ? found.map(({ name, station }, i) => el("li", {
        role: "option", "aria-selected": String(i === at), onpointerdown: (event) => { event.preventDefault(); pick(i); },
      }, station ? [station.title, " "] : null, el("code", {}, name))) : [el("li", { class: "muted" }, "nothing of that name")]));
    };
    const input = el("input", {
      type: "search", placeholder: "Find a station or tensor  /", "aria-label": "Find a station or a tensor by name", role: "combobox",
      "aria-expanded": "false", "aria-controls": "search-results", autocomplete: "off", spellcheck: "false",
      oninput: show, onblur: () => { results.hidden = true; },
      onkeydown: (event) => {
        if (event.key === "Enter") pick(at);
        else if (event.key === "Escape") { input.value = ""; show(); input.blur(); event.stopPropagation(); }
        else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
          at = Math.max(0, Math.min(found.length - 1, at + (event.key === "ArrowDown" ? 1 : -1)));
          paint();
        } else return;
        event.preventDefault();
      },
    });
    study.tools.append(el("div", { class: "search" }, input, results));
    addEventListener("keydown", (event) => {
      if (event.key !== "/" || event.ctrlKey || event.metaKey || event.target.closest?.("input, select, textarea")) return;
      event.preventDefault();
      if (study.inspector.current) study.inspector.close();
      input.closest("details").open = true;
      input.focus();
    });
  }

  function render(parent) {
    const { stations } = graph;
    const bar = el("div", { class: "controls" });
    study.choice(bar, {
      name: "Passes", value: direction,
      options: [{ value: "both", label: "Both passes" }, { value: "forward", label: "Forward" }, { value: "backward", label: "Backward" }],
      onChange: (value) => {
        direction = value;
        directions.forEach((set) => set(value));
      },
    });
    const all = (open) => [...elements.values()].forEach((found) => { found.firstElementChild.open = open; });
    bar.append(
      el("button", { type: "button", onclick: () => all(false) }, "Outline only"),
      el("button", { type: "button", onclick: () => { all(true); parent.querySelectorAll("details.block").forEach((block) => { block.open = true; }); } }, "Unfold everything"));
    parent.append(bar, el("p", { class: "small muted" }, "Click any cell, or move with the arrow keys: its value, the sum that it is, its gradient, and the proof of it. Numbers there are links. ", el("kbd", {}, "/"), " finds a station or tensor, ", el("kbd", {}, "Esc"), " closes the inspector."));

    const groups = [];
    for (const station of stations) {
      const name = station.block ?? (groups.some((group) => typeof group.name === "number") ? "out" : "in");
      if (groups.at(-1)?.name !== name) groups.push({ name, stations: [] });
      groups.at(-1).stations.push(station);
    }
    const path = el("div", { class: "path" });
    let last = -1;
    let first = true;
    for (const { name, stations: members } of groups) {
      if (typeof name !== "number") {
        path.append(el("div", { class: "group", id: `path-${name}` }, lay(members)));
        continue;
      }
      if (name > last + 1) path.append(el("p", { class: "gap small muted" }, name - last === 2 ? `Block ${last + 1} is not on this page.` : `Blocks ${last + 1} to ${name - 1} are not on this page.`));
      path.append(el("details", { class: "block", id: `path-block-${name}`, open: first }, el("summary", {}, `Block ${name}`, el("span", { class: "shape" }, `${members.length} operations`)), lay(members)));
      last = name;
      first = false;
    }
    path.append(el("p", { class: "turn small muted" }, "Here the way back begins, with dloss = 1: through the same stations, from the last to the first."));
    parent.append(path);
    study.contents("path", groups.map(({ name }) => (typeof name === "number" ? { title: `Block ${name}`, href: `#path-block-${name}` } : { title: name === "in" ? "Tokens to vectors" : "Logits and loss", href: `#path-${name}` })));
    study.onTheme(() => {
      if (!document.documentElement.classList.contains("printing")) return;
      for (const [name, draw] of [...bodies]) if (!elements.get(name).closest("details.block:not([open])")) draw();
    });
  }

  if (graph.stations.length) {
    study.section({
      id: "path", order: 0, own: true, title: "The path of the numbers",
      blurb: `Every operation of the model in order, with what went in, what came out, and what came back. Nothing here is an illustration: these are the engine’s own numbers${study.data.complete ? ", all of them" : ""}.`,
      render,
    });
    search();
    addEventListener("hashchange", follow);
    setTimeout(follow); // when all scripts have run
  }

  return { mark, go, reveal, views, unfold, fit };
})();
