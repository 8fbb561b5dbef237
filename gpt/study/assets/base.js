"use strict";
/* What every section of the page is made of: elements, numbers, tensors, heat maps, plots, controls, the contents.

   A section registers itself and is drawn when it first comes near the window:

     study.section({ id: "flow", title: "...", blurb: "...", render(element, data) { ... } });

   `data` is study.data.sections[id]; a section whose data are not on the page is left out, unless it says `own: true`.
   Sections stand in the order of their `order`, which is 50 where none is given. */

const study = (() => {
  const data = JSON.parse(document.getElementById("study-data").textContent);
  const root = document.documentElement;

  // Elements.

  function fill(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes ?? {})) {
      if (value === null || value === undefined || value === false) continue;
      if (name.startsWith("on")) node.addEventListener(name.slice(2).toLowerCase(), value);
      else node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
    return node;
  }

  /** An element: attributes by name, listeners as on...; children are nodes, texts, or lists of them. */
  const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
  const svg = (tag, attributes, ...children) =>
    fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

  /** An element from MathML as text. */
  function math(text) {
    const holder = document.createElement("template");
    holder.innerHTML = text;
    return holder.content.firstElementChild;
  }

  // Numbers.

  /** So many significant digits and no zeros behind them, as Python's format "g" writes them. */
  function number(x, digits = 4) {
    if (typeof x !== "number" || Number.isNaN(x)) return "nan";
    if (!Number.isFinite(x)) return x > 0 ? "inf" : "-inf";
    if (x === 0) return "0";
    const [mantissa, power] = x.toExponential(digits - 1).split("e");
    const exponent = Number(power);
    const plain = (text) => (text.includes(".") ? text.replace(/\.?0+$/, "") : text);
    if (exponent >= -4 && exponent < digits) return plain(x.toFixed(digits - 1 - exponent));
    return `${plain(mantissa)}e${exponent < 0 ? "-" : "+"}${String(Math.abs(exponent)).padStart(2, "0")}`;
  }

  /** Every bit: the shortest text that is read as the same number. */
  const exact = (x) => (x === undefined ? "not on this page" : Number.isNaN(x) ? "nan" : String(x));

  /** A token as it is shown: what cannot be seen is shown by a sign. */
  const label = (text) =>
    String(text).replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll("\r", "␍") || "∅";

  // Tensors.

  const decoded = new WeakMap();

  /** What gpt.study.page.pack wrote -> {shape, shown, array}; the array has the part that is shown. */
  function unpack(packed) {
    let found = decoded.get(packed);
    if (found) return found;
    const text = atob(packed.data);
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < bytes.length; i++) bytes[i] = text.charCodeAt(i);
    const view = new DataView(bytes.buffer);
    const array = new Float64Array(bytes.length / 8);
    for (let i = 0; i < array.length; i++) array[i] = view.getFloat64(8 * i, true);
    const shown = packed.shown ?? packed.shape;
    const strides = shown.map((_, axis) => shown.slice(axis + 1).reduce((a, b) => a * b, 1));
    const at = (...index) => {
      let offset = 0;
      for (let axis = 0; axis < shown.length; axis++) {
        if (!(index[axis] >= 0 && index[axis] < shown[axis])) return undefined;
        offset += index[axis] * strides[axis];
      }
      return array[offset];
    };
    found = { shape: packed.shape, shown, strides, array, at };
    decoded.set(packed, found);
    return found;
  }

  /** A tensor of the pass by its key; undefined where there is none. `at(...index)` is undefined beyond what is shown. */
  const tensor = (key) => (Object.hasOwn(data.tensors ?? {}, key) ? unpack(data.tensors[key]) : undefined);

  // Colours.

  const themed = new Set();
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const paper = matchMedia("print");
  let palette = null;

  /** Call back whenever colours change: the system's scheme, or a print. Returns what ends that. */
  function onTheme(callback) {
    themed.add(callback);
    return () => themed.delete(callback);
  }
  function recolour() {
    palette = null;
    for (const callback of themed) callback();
  }
  dark.addEventListener("change", recolour);

  /** A colour of base.css by name, such as "accent", as [red, green, blue]. */
  function colour(name) {
    palette ??= { style: getComputedStyle(root), known: {} };
    return (palette.known[name] ??= (() => {
      const hex = palette.style.getPropertyValue(`--${name}`).trim();
      return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
    })());
  }
  const css = (name) => `rgb(${colour(name).join(" ")})`;

  // The tooltip, one for the page.

  const tip = el("div", { class: "tooltip", role: "status", hidden: true });
  document.body.append(tip);

  /** Show nodes or texts beside a place in the window; without any, hide. */
  function tooltip(x, y, ...content) {
    tip.hidden = !content.length;
    if (tip.hidden) return;
    tip.replaceChildren(...content);
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - box.width - 4))}px`;
    tip.style.top = `${y + 18 + box.height > innerHeight ? Math.max(4, y - box.height - 12) : y + 18}px`;
  }

  // Heat maps.

  const FONT = '11px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace';

  /** {values, rows, columns, rowLabels?, columnLabels?, rowTitle?, columnTitle?, diverging, max?, title?, cell?,
      onHover?(i, j), onClick?(i, j)} -> {element, update(values, {max?}), highlight([[i, j]], kind?), select(i, j)}.

      `values` row by row. Colours run from -max over 0 to max, or from 0 to max. `highlight` outlines cells, of
      two kinds in two colours, 1 and 2; `select` marks one cell, or none if it gets none. Arrow keys select as a click does. */
  function heatmap(parent, options) {
    const { rows, columns, rowTitle = "", columnTitle = "", diverging = true } = options;
    const flat = (values) => (Array.isArray(values?.[0]) ? values.flat() : values?.data ? unpack(values).array : values);
    let values = flat(options.values);
    let max = options.max;
    const cell = options.cell ?? Math.max(6, Math.min(24, Math.floor(Math.min(540 / columns, Math.max(300 / rows, 9)))));
    const canvas = el("canvas", { tabindex: "0", role: "img" });
    const scale = el("span", { class: "scale", "aria-hidden": "true" });
    const caption = el("figcaption", {}, el("span", { class: "title" }, options.title ?? ""), scale);
    const spoken = el("span", { class: "visually-hidden", "aria-live": "polite" });
    const element = el("figure", { class: "heatmap" }, caption, el("div", { class: "scroll" }, canvas), spoken);
    parent.append(element);

    const context = canvas.getContext("2d");
    const picture = document.createElement("canvas");
    picture.width = columns;
    picture.height = rows;
    const lit = { 1: [], 2: [] };
    let selected = null;
    let hovered = null;

    context.font = FONT;
    const widest = (labels) => Math.max(0, ...labels.map((text) => context.measureText(text).width));
    const ticks = (labels, n) => (labels ? labels.slice(0, n).map((text) => (text === "" ? "" : label(text))) : Array.from({ length: n }, (_, i) => String(i)));
    const rowTicks = ticks(options.rowLabels, rows);
    const columnTicks = ticks(options.columnLabels, columns);
    const left = Math.min(110, Math.ceil(widest(rowTicks)) + 8);
    const upright = Boolean(options.columnLabels) && widest(columnTicks) > cell - 2;
    const top = upright ? Math.min(100, Math.ceil(widest(columnTicks)) + 8) : 18;
    const every = (size, labels) => (labels && cell >= 10 ? 1 : Math.ceil(size / cell));
    const rowStep = every(15, options.rowLabels);
    const columnStep = every(upright ? 13 : widest(columnTicks) + 8, upright || options.columnLabels);
    const width = left + columns * cell + 2;
    const height = top + rows * cell + 2;

    function paint() {
      let most = 0;
      for (const value of values) if (Math.abs(value) > most && Number.isFinite(value)) most = Math.abs(value);
      const limit = max ?? most;
      const [zero, high, low, wrong] = [colour("background"), colour("positive"), colour("negative"), colour("bad")];
      const image = new ImageData(columns, rows);
      for (let k = 0; k < rows * columns; k++) {
        const value = values[k];
        const t = limit ? Math.min(1, Math.abs(value) / limit) : 0;
        const end = value < 0 ? low : high;
        const broken = value === undefined || value === null || Number.isNaN(value);
        for (let c = 0; c < 3; c++) image.data[4 * k + c] = broken ? wrong[c] : zero[c] + (end[c] - zero[c]) * t;
        image.data[4 * k + 3] = 255;
      }
      picture.getContext("2d").putImageData(image, 0, 0);
      scale.className = diverging ? "scale diverging" : "scale";
      scale.replaceChildren(
        el("span", {}, diverging ? number(-limit, 2) : "0"), el("i"), el("span", {}, number(limit, 2)),
      );
      canvas.setAttribute("aria-label", `Heat map ${options.title ?? ""}: ${rows} by ${columns}, largest ${number(most)}`);
      draw();
    }

    function outline(cells, stroke, size) {
      const inside = new Set(cells.map(([i, j]) => i * columns + j));
      context.beginPath();
      for (const [i, j] of cells) {
        const [x, y] = [left + j * cell, top + i * cell];
        if (!inside.has((i - 1) * columns + j)) context.moveTo(x, y), context.lineTo(x + cell, y);
        if (!inside.has((i + 1) * columns + j)) context.moveTo(x, y + cell), context.lineTo(x + cell, y + cell);
        if (j === 0 || !inside.has(i * columns + j - 1)) context.moveTo(x, y), context.lineTo(x, y + cell);
        if (j === columns - 1 || !inside.has(i * columns + j + 1)) context.moveTo(x + cell, y), context.lineTo(x + cell, y + cell);
      }
      context.lineCap = "square";
      context.strokeStyle = css("background");
      context.lineWidth = size + 2;
      context.stroke();
      context.strokeStyle = css(stroke);
      context.lineWidth = size;
      context.stroke();
    }

    function draw() {
      const dots = Math.min(3, devicePixelRatio || 1);
      if (canvas.width !== Math.round(width * dots)) {
        canvas.width = Math.round(width * dots);
        canvas.height = Math.round(height * dots);
        canvas.style.width = `${width}px`;
        canvas.style.height = `${height}px`;
      }
      context.setTransform(dots, 0, 0, dots, 0, 0);
      context.clearRect(0, 0, width, height);
      context.imageSmoothingEnabled = false;
      context.drawImage(picture, left, top, columns * cell, rows * cell);
      if (cell >= 9) {
        context.beginPath();
        for (let i = 1; i < rows; i++) context.moveTo(left, top + i * cell), context.lineTo(left + columns * cell, top + i * cell);
        for (let j = 1; j < columns; j++) context.moveTo(left + j * cell, top), context.lineTo(left + j * cell, top + rows * cell);
        context.strokeStyle = css("background");
        context.lineWidth = 0.5;
        context.stroke();
      }
      context.strokeStyle = css("line");
      context.lineWidth = 1;
      context.strokeRect(left - 0.5, top - 0.5, columns * cell + 1, rows * cell + 1);
      context.font = FONT;
      const emphasized = (here) => (here ? css("text") : css("muted"));
      const at = hovered ?? selected;
      context.textAlign = "right";
      context.textBaseline = "middle";
      for (let i = 0; i < rows; i++) {
        if (i % rowStep && at?.[0] !== i) continue;
        if (at && i !== at[0] && Math.abs(i - at[0]) * cell < 11) continue;
        context.fillStyle = emphasized(at?.[0] === i);
        context.fillText(rowTicks[i], left - 5, top + (i + 0.5) * cell, left - 6);
      }
      for (let j = 0; j < columns; j++) {
        if (j % columnStep && at?.[1] !== j) continue;
        if (at && j !== at[1] && Math.abs(j - at[1]) * cell < (upright ? 11 : context.measureText(columnTicks[at[1]]).width + 2)) continue;
        context.fillStyle = emphasized(at?.[1] === j);
        if (upright) {
          context.save();
          context.translate(left + (j + 0.5) * cell, top - 5);
          context.rotate(-Math.PI / 2);
          context.textAlign = "left";
          context.fillText(columnTicks[j], 0, 0, top - 6);
          context.restore();
        } else {
          context.textAlign = "center";
          context.fillText(columnTicks[j], left + (j + 0.5) * cell, top - 8);
        }
      }
      if (lit[1].length) outline(lit[1], "lit", 2);
      if (lit[2].length) outline(lit[2], "lit-2", 2);
      if (hovered) outline([hovered], "muted", 1);
      if (selected) outline([selected], "text", 2);
    }

    const place = (event) => {
      const box = canvas.getBoundingClientRect();
      const i = Math.floor((event.clientY - box.top - top) / cell);
      const j = Math.floor((event.clientX - box.left - left) / cell);
      return i >= 0 && j >= 0 && i < rows && j < columns ? [i, j] : null;
    };
    const named = (i, j) => {
      const part = (title, text, index) => `${title ? `${title} ` : ""}${index}${text !== String(index) ? ` “${text}”` : ""}`;
      return `${part(rowTitle, rowTicks[i], i)}, ${part(columnTitle, columnTicks[j], j)}`;
    };
    canvas.addEventListener("pointermove", (event) => {
      const here = place(event);
      if (here?.[0] === hovered?.[0] && here?.[1] === hovered?.[1] && !here === !hovered) {
        if (here) tooltip(event.clientX, event.clientY, ...tip.childNodes);
        return;
      }
      hovered = here;
      draw();
      if (!here) return tooltip();
      const [i, j] = here;
      tooltip(event.clientX, event.clientY, el("div", { class: "value" }, exact(values[i * columns + j])), el("div", { class: "muted" }, named(i, j)));
      options.onHover?.(i, j);
    });
    canvas.addEventListener("pointerleave", () => {
      hovered = null;
      draw();
      tooltip();
      options.onHover?.(null, null);
    });
    const choose = (i, j) => {
      select(i, j);
      spoken.textContent = `${named(i, j)}: ${number(values[i * columns + j])}`;
      options.onClick?.(i, j);
    };
    canvas.addEventListener("click", (event) => {
      const here = place(event);
      if (here) choose(...here);
    });
    canvas.addEventListener("keydown", (event) => {
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Enter: [0, 0] }[event.key];
      if (!step || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      const [i, j] = selected ?? [0, 0];
      const [di, dj] = selected ? step : [0, 0];
      choose(Math.max(0, Math.min(rows - 1, i + di)), Math.max(0, Math.min(columns - 1, j + dj)));
    });

    function select(i, j) {
      selected = i === undefined || i === null ? null : [i, j];
      draw();
      if (selected) show(i, j);
    }
    function show(i, j) {
      // Within the map's own box; the page stays where it is.
      const box = canvas.parentElement;
      const [x, y] = [left + j * cell, top + i * cell];
      if (x < box.scrollLeft || x + cell > box.scrollLeft + box.clientWidth) box.scrollLeft = x - box.clientWidth / 2;
      if (y < box.scrollTop || y + cell > box.scrollTop + box.clientHeight) box.scrollTop = y - box.clientHeight / 2;
    }
    function highlight(cells, which = 1) {
      lit[which] = cells.filter(([i, j]) => i >= 0 && j >= 0 && i < rows && j < columns);
      draw();
      if (lit[which].length && !selected) show(...lit[which][0]);
    }
    /** Outlines of both kinds and the selection, in one go. */
    function mark(first, second, cell) {
      lit[1] = first;
      lit[2] = second;
      selected = cell;
      draw();
      const to = cell ?? first[0] ?? second[0];
      if (to) show(...to);
    }
    function update(changed, more = {}) {
      values = flat(changed);
      if ("max" in more) max = more.max;
      paint();
    }
    onTheme(paint);
    paint();
    /** Where a cell is in the window, for those who point at it. */
    const locate = (i, j) => {
      const box = canvas.getBoundingClientRect();
      return [box.left + left + (j + 0.5) * cell, box.top + top + (i + 0.5) * cell];
    };
    const handle = { element, update, highlight, select, mark, locate, outlined: lit };
    canvas.heatmap = handle;
    return handle;
  }

  // Plots.

  const SERIES = ["negative", "positive", "lit", "lit-2", "muted"];

  function niceTicks(low, high, count) {
    const rough = (high - low) / Math.max(1, count);
    const power = 10 ** Math.floor(Math.log10(rough || 1));
    const step = [1, 2, 5, 10].map((m) => m * power).find((size) => size >= rough * 0.999) ?? power;
    const found = [];
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) found.push(k * step);
    return found;
  }

  function logTicks(low, high, count) {
    const step = Math.max(1, Math.ceil((high - low) / count));
    const found = [];
    for (let k = Math.ceil(low - 1e-9); k <= high + 1e-9; k++) if (k % step === 0) found.push(k);
    return found.length > 1 ? found : niceTicks(low, high, count);
  }

  /** {series: [{name, x, y, dashed?}], xlabel, ylabel, logx?, logy?, marker?, markerLabel?, onPick?(x), title?, height?}
      -> {element, update({...})}. With onPick a click, a drag or the arrow keys pick the nearest x of the series. */
  function plot(parent, options) {
    let now = { ...options };
    const drawing = svg("svg", { role: "img" });
    const [caption, legend] = [el("figcaption"), el("div", { class: "legend" })];
    const element = el("figure", { class: "plot" }, caption, legend, drawing);
    parent.append(element);
    let pick;
    const observer = new ResizeObserver(() => draw());

    function draw() {
      const width = Math.max(260, element.clientWidth || 560);
      const height = now.height ?? 260;
      const [left, right, top, bottom] = [54, 12, 10, 42];
      const finite = (v, log) => Number.isFinite(v) && (!log || v > 0);
      const to = (log) => (log ? Math.log10 : (v) => v);
      const [tx, ty] = [to(now.logx), to(now.logy)];
      const all = { x: [], y: [] };
      for (const line of now.series) {
        for (let k = 0; k < line.x.length; k++) {
          if (finite(line.x[k], now.logx) && finite(line.y[k], now.logy)) all.x.push(tx(line.x[k])), all.y.push(ty(line.y[k]));
        }
      }
      const range = (found) => {
        let [low, high] = found.length ? [Math.min(...found), Math.max(...found)] : [0, 1];
        if (low === high) [low, high] = [low - 0.5, high + 0.5];
        return [low, high];
      };
      const [x0, x1] = range(all.x);
      let [y0, y1] = range(all.y);
      [y0, y1] = [y0 - 0.05 * (y1 - y0), y1 + 0.05 * (y1 - y0)];
      const px = (v) => left + ((v - x0) / (x1 - x0)) * (width - left - right);
      const py = (v) => height - bottom - ((v - y0) / (y1 - y0)) * (height - top - bottom);
      const named = (v, log) => (log ? (Number.isInteger(v) ? power(v) : number(10 ** v, 2)) : number(Math.abs(v) < 1e-12 ? 0 : v, 4));
      const power = (v) => svg("tspan", {}, "10", svg("tspan", { "baseline-shift": "super", "font-size": "9" }, String(v)));
      const parts = [];
      for (const v of now.logx ? logTicks(x0, x1, width / 70) : niceTicks(x0, x1, width / 90)) {
        parts.push(svg("line", { x1: px(v), x2: px(v), y1: top, y2: height - bottom, class: "grid" }));
        parts.push(svg("text", { x: px(v), y: height - bottom + 17, "text-anchor": "middle" }, named(v, now.logx)));
      }
      for (const v of now.logy ? logTicks(y0, y1, 7) : niceTicks(y0, y1, 5)) {
        parts.push(svg("line", { x1: left, x2: width - right, y1: py(v), y2: py(v), class: "grid" }));
        parts.push(svg("text", { x: left - 7, y: py(v) + 4, "text-anchor": "end" }, named(v, now.logy)));
      }
      parts.push(svg("text", { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle", class: "label" }, now.xlabel ?? ""));
      parts.push(svg("text", { x: -(top + height - bottom) / 2, y: 12, transform: "rotate(-90)", "text-anchor": "middle", class: "label" }, now.ylabel ?? ""));
      now.series.forEach((line, k) => {
        let path = "";
        let pen = "M";
        for (let i = 0; i < line.x.length; i++) {
          if (!finite(line.x[i], now.logx) || !finite(line.y[i], now.logy)) { pen = "M"; continue; }
          path += `${pen}${px(tx(line.x[i])).toFixed(2)} ${py(ty(line.y[i])).toFixed(2)}`;
          pen = "L";
        }
        const style = `stroke: var(--${line.colour ?? SERIES[k % SERIES.length]})`;
        parts.push(svg("path", { d: path, class: "series", style, "stroke-dasharray": line.dashed ? "5 4" : null }));
      });
      if (now.marker !== undefined && now.marker !== null && finite(now.marker, now.logx)) {
        const x = px(tx(now.marker));
        parts.push(svg("line", { x1: x, x2: x, y1: top, y2: height - bottom, class: "marker" }));
        if (now.markerLabel) parts.push(svg("text", { x: x + 5, y: top + 10, class: "label" }, now.markerLabel));
      }
      drawing.replaceChildren(...parts);
      for (const [name, value] of Object.entries({
        viewBox: `0 0 ${width} ${height}`, height,
        "aria-label": `${now.title ?? now.ylabel ?? "Plot"} over ${now.xlabel ?? "x"}: ${now.series.map((line) => line.name).join(", ")}`,
      })) drawing.setAttribute(name, value);
      const sample = (line, k) => svg("svg", { viewBox: "0 0 22 8", class: "sample" }, svg("path", {
        d: "M0 4L22 4", class: "series", style: `stroke: var(--${line.colour ?? SERIES[k % SERIES.length]})`, "stroke-dasharray": line.dashed ? "5 4" : null,
      }));
      const several = now.series.length > 1 || now.series[0]?.name;
      legend.replaceChildren(...(several ? now.series.map((line, k) => el("span", {}, sample(line, k), line.name)) : []));
      caption.textContent = now.title ?? "";
      /** The place of the series that is nearest to where the pointer is. */
      pick = (clientX) => {
        const box = drawing.getBoundingClientRect();
        const at = ((clientX - box.left) / box.width) * width;
        return places().reduce((a, b) => (Math.abs(px(tx(b)) - at) < Math.abs(px(tx(a)) - at) ? b : a));
      };
    }
    const places = () => [...new Set(now.series.flatMap((line) => [...line.x]))].filter((v) => Number.isFinite(v) && (!now.logx || v > 0)).sort((a, b) => a - b);
    if (now.onPick) {
      drawing.setAttribute("tabindex", "0");
      drawing.style.cursor = "crosshair";
      drawing.addEventListener("pointerdown", (event) => now.onPick(pick(event.clientX)));
      drawing.addEventListener("pointermove", (event) => event.buttons && now.onPick(pick(event.clientX)));
      drawing.addEventListener("keydown", (event) => {
        const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
        const all = places();
        if (!step || !all.length) return;
        event.preventDefault();
        const from = all.reduce((a, b, i) => (Math.abs(b - now.marker) < Math.abs(all[a] - now.marker) ? i : a), 0);
        now.onPick(all[Math.max(0, Math.min(all.length - 1, from + step))]);
      });
    }
    draw();
    observer.observe(parent);
    return { element, update(changes) { now = { ...now, ...changes }; draw(); } };
  }

  // Controls.

  let controls = 0;

  /** {min, max, value, step?, name?, label(i), onInput(i)} -> {element, input, set(i)}; `set` does not call onInput. */
  function slider(parent, { min, max, value, step = 1, name, label: text = String, onInput }) {
    const id = `control-${controls++}`;
    const output = el("output", { for: id }, text(value));
    const input = el("input", { type: "range", id, min, max, step, "aria-label": name ?? null, "aria-valuetext": text(value) });
    input.value = value;
    const set = (i) => {
      input.value = i;
      output.textContent = text(Number(input.value));
      input.setAttribute("aria-valuetext", output.textContent);
    };
    input.addEventListener("input", () => {
      set(input.value);
      onInput?.(Number(input.value));
    });
    const element = el("div", { class: "slider" }, name ? el("label", { for: id }, name) : null, input, output);
    parent.append(element);
    return { element, input, set };
  }

  /** {options: [{value, label}], value, name?, onChange(value)}: buttons of which one is chosen, or a list where there
      are more than six -> {element, set(value)}; `set` does not call onChange. */
  function choice(parent, { options, value, name, onChange }) {
    if (options.length > 6) {
      const select = el("select", { "aria-label": name ?? null }, options.map((option, i) => el("option", { value: i }, option.label)));
      const set = (chosen) => { select.value = options.findIndex((option) => option.value === chosen); };
      set(value);
      select.addEventListener("change", () => onChange?.(options[select.value].value));
      const element = name ? el("label", { class: "small" }, `${name} `, select) : select;
      parent.append(element);
      return { element, set };
    }
    const buttons = options.map((option) => el("button", { type: "button", role: "radio" }, option.label));
    const set = (chosen) => buttons.forEach((button, i) => {
      const here = options[i].value === chosen;
      button.setAttribute("aria-checked", String(here));
      button.tabIndex = here ? 0 : -1;
    });
    const pick = (i) => {
      set(options[i].value);
      onChange?.(options[i].value);
    };
    buttons.forEach((button, i) => {
      button.addEventListener("click", () => pick(i));
      button.addEventListener("keydown", (event) => {
        const step = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
        if (!step) return;
        event.preventDefault();
        const next = (i + step + buttons.length) % buttons.length;
        buttons[next].focus();
        pick(next);
      });
    });
    set(value);
    const element = el("div", { class: "choice", role: "radiogroup", "aria-label": name ?? null }, buttons);
    parent.append(element);
    return { element, set };
  }

  /** What was checked; with a tick or a cross where it passed or did not. */
  const badge = (text, passed) =>
    el("span", { class: `badge${passed === true ? " passed" : passed === false ? " failed" : ""}` }, text);

  const PYTHON = new RegExp(
    [
      /(?<comment>#.*)/, /(?<text>"""[^]*?"""|[rf]?"(?:[^"\\\n]|\\.)*"|[rf]?'(?:[^'\\\n]|\\.)*')/,
      /(?<word>\b(?:def|return|if|elif|else|for|in|not|and|or|is|None|True|False|while|with|as|import|from|raise|lambda|class|yield|assert|del)\b)/,
      /(?<number>\b\d+(?:\.\d*)?(?:e[+-]?\d+)?\b)/,
    ].map((part) => part.source).join("|"), "g",
  );

  /** Python, with its words, texts, numbers and comments in colours. */
  function code(text) {
    const element = el("pre", { class: "code", tabindex: "0" });
    let end = 0;
    for (const match of text.matchAll(PYTHON)) {
      const kind = Object.keys(match.groups).find((name) => match.groups[name] !== undefined);
      element.append(text.slice(end, match.index), el("span", { class: kind }, match[0]));
      end = match.index + match[0].length;
    }
    element.append(text.slice(end));
    return element;
  }

  /** Cells are texts, nodes, or numbers, which stand on the right. */
  function table(head, rows) {
    const numeric = head.map((_, k) => rows.length > 0 && rows.every((row) => typeof row[k] === "number"));
    const cell = (tag, content, k) =>
      el(tag, { class: numeric[k] ? "number" : null, scope: tag === "th" ? "col" : null }, typeof content === "number" ? number(content) : content);
    return el("div", { class: "scroll", tabindex: "0" }, el("table", {},
      el("thead", {}, el("tr", {}, head.map((text, k) => cell("th", text, k)))),
      el("tbody", {}, rows.map((row) => el("tr", {}, row.map((content, k) => cell("td", content, k)))))));
  }

  // Sections and the contents.

  const main = document.querySelector("main");
  const list = el("ol");
  const tools = el("div", { class: "tools" });
  const folded = el("details", { open: true }, el("summary", {}, "Contents"), tools, list);
  document.querySelector("nav.contents").append(folded);
  const narrow = matchMedia("(max-width: 62rem)");
  const fold = () => { folded.open = !narrow.matches; };
  narrow.addEventListener("change", fold);
  fold();
  list.addEventListener("click", () => narrow.matches && (folded.open = false));

  const sections = new Map();
  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) draw(entry.target.id);
  }, { rootMargin: "700px" });

  /** Which entry of the contents is read now: the last one that has come up to the window's upper third. */
  function follow() {
    let here = null;
    for (const link of list.querySelectorAll("a")) {
      const target = document.getElementById(link.getAttribute("href").slice(1));
      if (target && target.getBoundingClientRect().top < innerHeight / 3) here = link;
    }
    for (const link of list.querySelectorAll("a")) link.toggleAttribute("aria-current", link === here);
  }
  let following = 0;
  addEventListener("scroll", () => { following ||= requestAnimationFrame(() => { following = 0; follow(); }); }, { passive: true });

  function section({ id, title, blurb = "", order = 50, own = false, render }) {
    if (!own && !Object.hasOwn(data.sections ?? {}, id)) return;
    const content = el("div", { class: "content" });
    const element = el("section", { class: "part", id }, el("h2", {}, title), blurb ? el("p", { class: "blurb" }, blurb) : null, content);
    const link = el("a", { href: `#${id}` }, title);
    const inner = el("ol");
    const item = el("li", {}, link, inner);
    const after = [...sections.values()].find((one) => one.order > order);
    main.insertBefore(element, after?.element ?? null);
    list.insertBefore(item, after?.item ?? null);
    const one = { id, order, element, content, link, item, inner, render, drawn: false };
    sections.set(id, one);
    const sorted = [...sections.entries()].sort(([, a], [, b]) => a.order - b.order);
    sections.clear();
    for (const [key, value] of sorted) sections.set(key, value);
    near.observe(element);
  }

  /** Draw a section now, if it has not been. */
  function draw(id) {
    const one = sections.get(id);
    if (!one || one.drawn) return;
    one.drawn = true;
    near.unobserve(one.element);
    try {
      one.render(one.content, data.sections?.[id]);
    } catch (error) {
      one.content.append(el("p", { class: "failure" }, `This section cannot be shown: ${error.message}`));
      console.error(error);
    }
  }

  /** Places within a section, for the contents: [{title, href}]. */
  function contents(id, places) {
    sections.get(id)?.inner.replaceChildren(...places.map(({ title, href }) => el("li", {}, el("a", { href }, title))));
  }

  /** Draw what is on the page and not yet drawn. */
  const drawAll = () => [...sections.keys()].forEach(draw);

  const printing = (on) => {
    if (root.classList.contains("printing") === on) return;
    root.classList.toggle("printing", on);
    if (on) drawAll();
    recolour();
  };
  addEventListener("beforeprint", () => printing(true));
  addEventListener("afterprint", () => printing(false));
  paper.addEventListener("change", (event) => printing(event.matches));

  // The head of the page.

  (function head() {
    const shown = data.tokens ?? [];
    const checked = data.checked;
    const same = checked && !checked.different.length;
    const facts = { ...(data.loss === undefined || data.loss === null ? {} : { loss: number(data.loss, 5) }), ...(data.model ?? {}) };
    document.querySelector("header.head").append(...[
      el("h1", {}, data.title ?? ""),
      data.text ? el("p", { class: "text" }, `“${data.text}”`) : null,
      shown.length ? el("ol", { class: "chips", "aria-label": "Tokens of the text, each with the one to be predicted" }, shown.map((token, t) => el("li", { class: "chip", title: `position ${t}: ${label(token)}, to be followed by ${label(data.targets?.[t] ?? "")}` },
        label(token), data.targets ? el("span", { class: "target" }, ` → ${label(data.targets[t])}`) : null))) : null,
      el("dl", { class: "facts" }, Object.entries(facts).map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, String(value))))),
      checked ? badge(same ? `${checked.tensors} tensors equal the engine’s, bit for bit` : `${checked.different.length} of ${checked.tensors} tensors differ from the engine’s: ${checked.different.slice(0, 3).join(", ")}`, same) : null,
      data.notes?.length ? el("ul", { class: "notes" }, data.notes.map((note) => el("li", {}, note))) : null,
    ].filter(Boolean));
  })();

  return {
    data, el, svg, math, number, exact, label, unpack, tensor, onTheme, colour, css, tooltip, heatmap, plot, slider, choice,
    badge, code, table, section, draw, drawAll, contents, tools,
  };
})();
