"use strict";
/* The stations' equations, as trees (see Equation.tree in gpt/study/equations.py): computed as a whole, spelled out in
   numbers at one element, and followed to the loss, so that its derivative can be measured in the page.

   An equation stands in a station, which says what its names mean: station.wires[name] is the key of a tensor,
   station.constants[name] a number. */

study.equations = (() => {
  const COMPARISONS = new Set(["==", "!=", "<=", "<", ">=", ">"]);
  const FUNCTIONS = { exp: Math.exp, log: Math.log, sqrt: Math.sqrt, tanh: Math.tanh, cdf };
  const BINDING = { "+": 1, "-": 1, "*": 2, "/": 2, "//": 2, "%": 2, neg: 2, "**": 3 };
  const ATOM = 4;
  const NOTHING = -1e300; // what a masked element is to max
  const remainder = (a, b) => a - b * Math.floor(a / b);

  /** The distribution function of the normal distribution. Near 0 its power series, all of whose terms have one sign,
      so that nothing cancels; far away the continued fraction of what is left. Both to the last digits of a double. */
  function cdf(x) {
    const z = Math.abs(x) / Math.SQRT2;
    if (Number.isNaN(z)) return z;
    if (z < 2) {
      let term = z;
      let sum = z;
      for (let n = 1; term > 1e-18 * sum; n++) {
        term *= (2 * z * z) / (2 * n + 1);
        sum += term;
      }
      const half = (Math.exp(-z * z) * sum) / Math.sqrt(Math.PI);
      return x < 0 ? 0.5 - half : 0.5 + half;
    }
    let fraction = 0;
    for (let n = 70; n > 0; n--) fraction = n / 2 / (z + fraction);
    const tail = Math.exp(-z * z) / Math.sqrt(Math.PI) / (z + fraction) / 2;
    return x < 0 ? tail : 1 - tail;
  }

  function* walk(tree) {
    yield tree;
    if (tree[0] === "tensor") for (const index of tree[2]) yield* walk(index);
    else if (tree[0] === "sum" || tree[0] === "max") yield* walk(tree[2]);
    else for (const part of tree.slice(1)) if (Array.isArray(part)) yield* walk(part);
  }

  const known = new WeakMap();
  function remembered(equation, name, find) {
    const found = known.get(equation) ?? {};
    known.set(equation, found);
    return (found[name] ??= find());
  }

  /** The names on the right that stand for tensors, in order. */
  const reads = (equation, station) => remembered(equation, "reads", () => [
    ...new Set([...walk(equation.tree)].filter((n) => n[0] === "tensor" || (n[0] === "name" && n[1] in station.wires)).map((n) => n[1])),
  ]);

  /** How far each letter runs, from the shapes of the tensors that it selects from. */
  const sizes = (equation, station) => remembered(equation, "sizes", () => {
    const target = ["tensor", equation.tensor, equation.indices.map((letter) => ["index", letter])];
    const found = {};
    for (const [kind, name, indices] of [target, ...walk(equation.tree)]) {
      if (kind !== "tensor" || !(name in station.wires)) continue;
      const { shape } = study.tensor(station.wires[name]);
      indices.forEach((index, axis) => { if (index[0] === "index") found[index[1]] ??= shape[axis]; });
    }
    return found;
  });

  // As a whole: an equation becomes a loop in JavaScript, once.

  function compile(equation, station) {
    return remembered(equation, "compiled", () => {
      const size = sizes(equation, station);
      const names = reads(equation, station);
      const shapes = Object.fromEntries(names.map((name) => [name, study.tensor(station.wires[name]).shape]));
      let count = 0;

      /** An expression for the tree; what must run before it is added to `lines`. */
      function emit(tree, lines) {
        const [kind, ...parts] = tree;
        if (kind === "number") return `(${parts[0]})`;
        if (kind === "index") return `i_${parts[0]}`;
        if (kind === "name") return parts[0] in station.constants ? `(${station.constants[parts[0]]})` : `of.${parts[0]}[0]`;
        if (kind === "tensor") {
          const [name, indices] = parts;
          const offset = indices.reduce((before, index, axis) => {
            const n = shapes[name][axis];
            const within = index[0] === "index" && size[index[1]] === n;
            const here = within ? emit(index, lines) : `Math.min(Math.max(${emit(index, lines)}, 0), ${n - 1})`;
            return before ? `(${before}) * ${n} + ${here}` : here;
          }, "");
          return `of_${name}[${offset || 0}]`;
        }
        if (kind === "sum" || kind === "max") {
          const result = `r${count++}`;
          const inner = [];
          const over = emit(parts[1], inner);
          lines.push(`let ${result} = ${kind === "sum" ? 0 : "-Infinity"};`);
          for (const letter of parts[0]) lines.push(`for (let i_${letter} = 0; i_${letter} < ${size[letter]}; i_${letter}++) {`);
          lines.push(...inner, kind === "sum" ? `${result} += ${over};` : `${result} = Math.max(${result}, ${over});`);
          lines.push("}".repeat(parts[0].length));
          return result;
        }
        if (kind === "where") return branch(emit(parts[0], lines), parts[1], parts[2], lines);
        if (kind === "*") { // what a condition that does not hold is multiplied with is not computed
          const at = parts.findIndex((part) => COMPARISONS.has(part[0]));
          if (at >= 0) return branch(emit(parts[at], lines), parts[1 - at], ["number", 0], lines);
        }
        if (kind === "**" && parts[1][0] === "number" && parts[1][1] === 2) {
          const result = `r${count++}`;
          lines.push(`const ${result} = ${emit(parts[0], lines)};`);
          return `(${result} * ${result})`;
        }
        const operands = parts.map((part) => emit(part, lines));
        if (kind in FUNCTIONS) return `${kind}(${operands[0]})`;
        if (kind === "neg") return `(-${operands[0]})`;
        if (kind === "//") return `Math.floor(${operands[0]} / ${operands[1]})`;
        if (kind === "%") return `remainder(${operands[0]}, ${operands[1]})`;
        if (kind === "**") return `Math.pow(${operands[0]}, ${operands[1]})`;
        if (COMPARISONS.has(kind)) return `(${operands[0]} ${kind === "==" ? "===" : kind === "!=" ? "!==" : kind} ${operands[1]} ? 1 : 0)`;
        return `(${operands[0]} ${kind} ${operands[1]})`;
      }
      function branch(condition, yes, no, lines) {
        const result = `r${count++}`;
        const [whenTrue, whenFalse] = [[], []];
        const [a, b] = [emit(yes, whenTrue), emit(no, whenFalse)];
        lines.push(`let ${result}; if (${condition}) {`, ...whenTrue, `${result} = ${a}; } else {`, ...whenFalse, `${result} = ${b}; }`);
        return result;
      }

      const body = [];
      const value = emit(equation.tree, body);
      const loops = equation.indices.map((letter) => `for (let i_${letter} = 0; i_${letter} < ${size[letter]}; i_${letter}++) {`);
      const lines = [
        '"use strict";', ...Object.keys(FUNCTIONS).map((name) => `const ${name} = functions.${name};`),
        ...names.map((name) => `const of_${name} = of.${name};`),
        `const out = new Float64Array(${equation.indices.reduce((n, letter) => n * size[letter], 1)}); let at = 0;`,
        ...loops, ...body, `out[at++] = ${value};`, "}".repeat(loops.length), "return out;",
      ];
      return new Function("of", "functions", "remainder", lines.join("\n"));
    });
  }

  /** The whole tensor that an equation defines, as a Float64Array; `read(key)` gives the arrays that it is made of. */
  function evaluate(equation, station, read = (key) => study.tensor(key).array) {
    const of = Object.fromEntries(reads(equation, station).map((name) => [name, read(station.wires[name])]));
    return compile(equation, station)(of, FUNCTIONS, remainder);
  }

  /** The loss with a tensor replaced, everywhere or `only` in the station of that name: what depends on it is computed
      anew by the stations' equations, the rest is as it was. */
  function lossWith(key, array, only = null) {
    const changed = new Map();
    for (const station of study.data.stations) {
      const here = only === null || station.name === only;
      const read = (name) => (here && name === key ? array : changed.get(name) ?? study.tensor(name).array);
      const differs = (name) => (here && name === key) || changed.has(name);
      for (const equation of station.forward) {
        const of = station.wires[equation.tensor];
        if (of !== key && reads(equation, station).some((name) => differs(station.wires[name]))) {
          changed.set(of, evaluate(equation, station, read));
        }
      }
    }
    return (changed.get("loss") ?? study.tensor("loss").array)[0];
  }

  /** The loss' central difference along one element of a tensor: {slope, step}. The step goes by the tensor's largest
      entry; where all are near 0, as a bias's may be, by what they are added to, which is not so small. */
  function difference(key, index, only = null) {
    const { array, strides } = study.tensor(key);
    const at = index.reduce((sum, i, axis) => sum + i * strides[axis], 0);
    const step = 1e-5 * array.reduce((most, x) => Math.max(most, Math.abs(x)), 0.1);
    const [up, down] = [1, -1].map((sign) => {
      const moved = Float64Array.from(array);
      moved[at] += sign * step;
      return [lossWith(key, moved, only), moved[at]];
    });
    return { slope: (up[0] - down[0]) / (up[1] - down[1]), step }; // the step that was really taken
  }

  // At one element.

  /** A sum without the error of adding up. */
  function total(values) {
    let [sum, lost] = [0, 0];
    for (const x of values) {
      const next = sum + x;
      lost += Math.abs(sum) >= Math.abs(x) ? sum - next + x : x - next + sum;
      sum = next;
    }
    return sum + lost;
  }

  function operate(kind, a, b) {
    switch (kind) {
      case "+": return a + b;
      case "-": return a - b;
      case "*": return a * b;
      case "/": return a / b;
      case "//": return Math.floor(a / b);
      case "%": return remainder(a, b);
      case "**": return a ** b;
      case "==": return Number(a === b);
      case "!=": return Number(a !== b);
      case "<=": return Number(a <= b);
      case "<": return Number(a < b);
      case ">=": return Number(a >= b);
      default: return Number(a > b);
    }
  }

  /** All values of the letters, the last one running fastest. */
  function* places(letters, size) {
    if (!letters.length) return yield {};
    const [first, ...others] = letters;
    for (let i = 0; i < size[first]; i++) for (const rest of places(others, size)) yield { [first]: i, ...rest };
  }

  /** One element in numbers: {value, parts, read}. `parts` are texts, and {name, key, index, value, text} for each
      number that is an element of a tensor, and {rest, hidden, value} for the terms of a sum that are not written:
      beyond the first `terms`, or, `hidden`, because what they are made of is not on the page. `read`: a Map from a
      tensor's key to the places in it that the element came from. What is multiplied by a condition that does not hold
      is not read, and neither is a masked term of max. `value` is undefined where the page has not all of it. */
  function spell(equation, station, index, { terms = 12, digits = 4 } = {}) {
    const size = sizes(equation, station);
    const format = (x) => study.number(x, digits);
    let read = new Map();

    function atom(value, part) {
      return { value, parts: [part], binding: ATOM, zero: (part.text ?? part) === "0" };
    }
    const first = (node) => (typeof node.parts[0] === "string" ? node.parts[0] : node.parts[0].text ?? "");
    function inside(node, binding) {
      const negative = first(node).startsWith("-") && binding > 1;
      return node.binding < binding || negative ? ["(", ...node.parts, ")"] : node.parts;
    }
    function quietly(find) { // without noting what is read
      const before = read;
      read = new Map();
      try {
        return find();
      } finally {
        read = before;
      }
    }
    const valueOf = (tree, at) => quietly(() => build(tree, at).value);

    /** `goal`: what the value is known to be where the page has not all of what it is made of. */
    function build(tree, at, goal) {
      const [kind, ...parts] = tree;
      if (kind === "number") return atom(parts[0], format(parts[0]));
      if (kind === "index") return atom(at[parts[0]], String(at[parts[0]]));
      if (kind === "name" && parts[0] in station.constants) return atom(station.constants[parts[0]], format(station.constants[parts[0]]));
      if (kind === "tensor" || kind === "name") {
        const key = station.wires[parts[0]];
        const of = study.tensor(key);
        const place = (parts[1] ?? []).map((part, axis) => Math.max(0, Math.min(of.shape[axis] - 1, build(part, at).value)));
        const value = of.at(...place);
        const seen = read.get(key) ?? [];
        read.set(key, seen);
        if (value !== undefined && !seen.some((other) => other.every((i, axis) => i === place[axis]))) seen.push(place);
        const text = value === undefined ? `${parts[0]}[${place.join(",")}]` : format(value);
        return atom(value, { name: parts[0], key, index: place, value, text });
      }
      if (kind === "sum" || kind === "max") return reduction(kind, parts[0], parts[1], at, goal);
      if (kind === "where") return build(build(parts[0], at).value ? parts[1] : parts[2], at, goal);
      if (kind === "*") {
        const conditions = parts.filter((part) => COMPARISONS.has(part[0]));
        if (conditions.some((part) => valueOf(part, at) === 0)) return atom(0, "0");
        if (conditions.length) {
          for (const part of conditions) build(part, at); // what they compare is read
          return build(parts.find((part) => !conditions.includes(part)) ?? ["number", 1], at, goal);
        }
      }
      if (parts.length === 1) {
        const [node] = parts.map((part) => build(part, at, kind === "neg" && goal !== undefined ? -goal : undefined));
        const value = node.value;
        if (kind === "neg") return { value: value === undefined ? value : -value, parts: ["-", ...inside(node, 2)], binding: 2 };
        return { value: value === undefined ? value : FUNCTIONS[kind](value), parts: [`${kind}(`, ...node.parts, ")"], binding: ATOM };
      }
      const goals = study.data.complete || goal === undefined ? [] : inverse(kind, parts.map((part) => valueOf(part, at)), goal);
      const a = build(parts[0], at, goals[0]);
      if (kind === "*" && a.zero) return a; // and so is what only multiplies a zero
      const b = build(parts[1], at, goals[1]);
      const value = a.value === undefined || b.value === undefined ? undefined : operate(kind, a.value, b.value);
      const sign = { "*": " · ", "**": "^", "-": " − ", "==": " = ", "!=": " ≠ ", "<=": " ≤ ", ">=": " ≥ " }[kind] ?? ` ${kind} `;
      if (COMPARISONS.has(kind)) return { value, parts: ["[", ...inside(a, 1), sign, ...inside(b, 1), "]"], binding: ATOM };
      const binding = BINDING[kind];
      return { value, parts: [...inside(a, binding), sign, ...inside(b, binding + (kind !== "+" && kind !== "*"))], binding };
    }

    /** What an operand must be for the result to be `goal`, where the other one is known. */
    function inverse(kind, [a, b], goal) {
      if (a === undefined && b !== undefined) return [{ "+": goal - b, "-": goal + b, "*": goal / b, "/": goal * b }[kind]];
      if (b === undefined && a !== undefined) return [undefined, { "+": goal - a, "-": a - goal, "*": goal / a }[kind]];
      return [];
    }

    function reduction(kind, letters, over, at, goal) {
      const found = [];
      let hidden = 0;
      for (const place of places(letters, size)) {
        const node = build(over, { ...at, ...place });
        if (node.value === undefined) hidden++;
        else if (!node.zero && !(kind === "max" && node.value <= NOTHING)) found.push(node);
      }
      const values = found.map((node) => node.value);
      const part = kind === "sum" ? total(values) : values.length ? Math.max(...values) : 0;
      const shown = found.slice(0, terms).map((node) => inside(node, 1));
      const more = found.slice(terms);
      if (more.length) {
        shown.push([{ rest: more.length, value: kind === "sum" ? total(more.map((node) => node.value)) : undefined }]);
      }
      if (hidden) {
        const left = kind === "sum" && goal !== undefined ? goal - part : undefined;
        shown.push([{ rest: hidden, hidden: true, value: left }]);
      }
      const between = kind === "sum" ? " + " : ", ";
      const text = shown.flatMap((term, k) => (k ? [between, ...term] : term));
      const value = hidden ? undefined : part;
      if (kind === "max") return { value, parts: ["max(", ...text, ")"], binding: ATOM };
      if (!shown.length) return atom(value, "0");
      return { value, parts: text, binding: shown.length > 1 ? 1 : ATOM, zero: shown.length === 1 && found.length === 1 && found[0].zero };
    }

    const at = Object.fromEntries(equation.indices.map((letter, axis) => [letter, index[axis]]));
    const goal = study.tensor(station.wires[equation.tensor])?.at(...index);
    const node = build(equation.tree, at, goal);
    return { value: node.value, parts: node.parts, read };
  }

  return { cdf, compile, difference, evaluate, lossWith, reads, sizes, spell, walk };
})();
