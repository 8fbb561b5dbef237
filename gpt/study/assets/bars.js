"use strict";
/* study.bars: horizontal bars with their numbers, as a table, a row for each name and in it a bar for each series. */

{
  const { el, number } = study;
  const COLOURS = ["accent", "accent-2", "good", "bad"];

  /** {title?, rows: [names], series: [{name, values, colour?}], log?, head?} -> {element, update({rows?, series?, ...})}.

      On a logarithmic scale bars begin at a power of ten below the smallest value; `low` and `high` fix its ends. */
  study.bars = (parent, options) => {
    let now = options;
    const element = el("table", { class: "bars" });
    parent.append(element);

    function draw() {
      const { rows, series, log = false, title = "" } = now;
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
      const bar = (value, k) => el("div", { class: "bar", style: fill(k), title: `${series[k].name}: ${study.exact(value)}` },
        el("div", { class: "track" }, el("i", { style: `width: ${width(value).toFixed(2)}%` }), el("span", {}, number(value))));
      element.replaceChildren(
        el("caption", {},
          title ? el("div", {}, title) : null,
          series.length > 1 || series[0]?.name ? el("span", { class: "key" }, series.map((one, k) => el("span", { style: fill(k) }, el("i"), one.name))) : null,
          log ? el("span", { class: "muted" }, `logarithmic, from ${number(10 ** from)}`) : null),
        el("tbody", {}, rows.map((name, r) => el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, series.map((one, k) => bar(one.values[r], k)))))),
      );
    }
    draw();
    return { element, update(changes) { now = { ...now, ...changes }; draw(); } };
  };
}
