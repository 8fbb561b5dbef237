"use strict";
/* study.bars: horizontal bars with their numbers, as a table, a row for each name and in it a bar for each series. */

{
  const { el, number } = study;
  const COLOURS = ["accent", "accent-2", "good", "bad"];

  /** {title?, rows: [names], series: [{name, values, colour?}], log?, bound?} -> {element, update({rows?, series?, ...})}.

      On a logarithmic scale bars begin at a power of ten below the smallest value; `low` and `high` fix its ends.
      `bound` is a line across all bars; those beyond it, and what is not finite, are of the colour "bad". */
  study.bars = (parent, options) => {
    let now = options;
    const element = el("table", { class: "bars" });
    parent.append(element);

    function draw() {
      const { rows, series, log = false, title = "", bound } = now;
      const values = series.flatMap((one) => [...one.values]).filter((value) => Number.isFinite(value) && value > 0);
      const high = now.high ?? Math.max(...values, 0);
      const low = now.low ?? Math.min(...values, high);
      const from = log && low > 0 ? Math.floor(Math.log10(low)) - (Number.isInteger(Math.log10(low)) ? 1 : 0) : 0;
      const to = log && high > 0 ? Math.log10(high) : high;
      const width = (value) => {
        if (!(value > 0) || to === from) return 0;
        return 100 * Math.max(0, Math.min(1, ((log ? Math.log10(value) : value) - from) / (to - from)));
      };
      const fill = (k) => `--fill: var(--${series[k].colour ?? COLOURS[k % COLOURS.length]})`;
      const line = () => (bound === undefined ? null : el("b", { class: "bound", style: `--at: ${(width(bound) / 100).toFixed(4)}` }));
      const bar = (value, k) => {
        const beyond = bound !== undefined && !(value !== null && value <= bound);
        const size = beyond && !Number.isFinite(value) ? 100 : width(value);
        const told = value === null ? "not finite" : study.exact(value);
        return el("div", { class: "bar", style: beyond ? "--fill: var(--bad)" : fill(k), title: `${series[k].name}: ${told}` },
          el("div", { class: "track" }, line(), el("i", { style: `width: ${size.toFixed(2)}%` }), el("span", {}, value === null ? "not finite" : number(value))));
      };
      element.replaceChildren(
        el("caption", {},
          title ? el("div", {}, title) : null,
          series.length > 1 || series[0]?.name ? el("span", { class: "key" }, series.map((one, k) => el("span", { style: fill(k) }, el("i"), one.name))) : null,
          bound === undefined ? null : el("span", { class: "key" }, el("span", {}, el("b", { class: "bound" }), `bound ${number(bound)}`)),
          log ? el("span", { class: "muted" }, `logarithmic, from ${number(10 ** from)}`) : null),
        el("tbody", {}, rows.map((name, r) => el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, series.map((one, k) => bar(one.values[r], k)))))),
      );
    }
    draw();
    return { element, update(changes) { now = { ...now, ...changes }; draw(); } };
  };
}
