/* The view of the evaluation: measures with their intervals, and what more or fewer features would buy. */

function interval(row) {
  return row.low === undefined ? "" : `${number(row.low)} to ${number(row.high)}`;
}
function measures(one) {
  const has = one.rows.some((row) => row.low !== undefined);
  const heads = [{ text: "measure" }, { text: "value", number: true }, ...(has ? [{ text: "95 % interval", number: true }] : [])];
  const rows = one.rows.map((row) => [row.name, number(row.value, 5), ...(has ? [interval(row)] : [])]);
  return table(one.name, heads, rows);
}
function evaluators() {
  return DATA.evaluation.filter((one) => one.rows.length).map((one) => h("section", { class: "evaluator" }, h("h3", null, one.name),
    one.documents ? h("p", { class: "lead" }, `over ${plural(one.documents, "document")}`) : null, measures(one)));
}

/* One frontier: points of one dictionary at scaled thresholds, from few features to many. */
function frontier(one, measure, title, lines) {
  const points = one.points.filter((p) => p.l0 && p[measure]).map((p) => ({ scale: p.scale, x: p.l0.value, y: p[measure] })).filter((p) => p.x > 0 && p.y.value !== null).sort((a, b) => a.x - b.x);
  if (points.length < 2) return null;
  const width = innerWidth < 600 ? 340 : 520, height = 300, left = 56, right = width - 18, top = 18, bottom = height - 40;
  const xs = [...points.map((p) => p.x), RUN.l0_target];
  const ys = points.flatMap((p) => [p.y.value, p.y.low, p.y.high]).concat(lines.map((l) => l.value)).filter((v) => typeof v === "number");
  const pad = (Math.max(...ys) - Math.min(...ys)) * 0.1 || 0.1, low = Math.min(...ys) - pad, high = Math.max(...ys) + pad;
  const from = Math.min(...xs) / 1.25, to = Math.max(...xs) * 1.25;
  const x = scale(from, to, left, right, true), y = scale(low, high, bottom, top);
  const svg = g("svg", { class: "plot frontier", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title} against L0: ` + points.map((p) => `${number(p.y.value)} at L0 ${number(p.x, 3)}`).join(", ") });
  for (const v of ticks(low, high, 5)) svg.append(g("line", { class: "grid", x1: left, x2: right, y1: y(v), y2: y(v) }), g("text", { class: "tick", x: left - 7, y: y(v) + 4, "text-anchor": "end" }, number(v, 3)));
  for (const v of logTicks(from, to)) svg.append(g("line", { class: "grid", x1: x(v), x2: x(v), y1: top, y2: bottom }), g("text", { class: "tick", x: x(v), y: bottom + 16, "text-anchor": "middle" }, number(v, 3)));
  svg.append(g("line", { class: "target", x1: x(RUN.l0_target), x2: x(RUN.l0_target), y1: top, y2: bottom }), g("text", { class: "target", x: x(RUN.l0_target) + 4, y: bottom - 6 }, "L0 target"));
  for (const l of lines) svg.append(g("line", { class: "target", x1: left, x2: right, y1: y(l.value), y2: y(l.value) }), g("text", { class: "target", x: left + 4, y: y(l.value) - 5 }, l.name));
  svg.append(g("path", { class: "curve", "--c": "var(--c0)", d: points.map((p, i) => (i ? "L" : "M") + x(p.x) + "," + y(p.y.value)).join("") }));
  for (const [i, p] of points.entries()) {
    const falls = i + 1 < points.length && points[i + 1].y.value < p.y.value;
    if (p.y.low !== undefined) svg.append(g("line", { class: "whisker", x1: x(p.x), x2: x(p.x), y1: y(p.y.low), y2: y(p.y.high) }));
    svg.append(g("circle", { class: p.scale === 1 ? "point own" : "point", cx: x(p.x), cy: y(p.y.value), r: p.scale === 1 ? 6.5 : 4.5 },
      g("title", null, `L0 ${number(p.x)}, ${title} ${number(p.y.value)}, thresholds x ${number(p.scale)}`)),
      g("text", { class: "tick", x: x(p.x) + 9, y: y(p.y.value) + (falls ? -8 : 15) }, p.scale === 1 ? "as trained" : "\u00d7" + number(p.scale)));
  }
  svg.append(g("text", { class: "axis", x: (left + right) / 2, y: height - 6, "text-anchor": "middle" }, "L0"));
  return h("figure", { class: "chart" }, h("figcaption", null, h("b", null, title), h("small", null, "against L0")), svg);
}
function frontiers() {
  const space = SUMMARY.r2_space === "white" ? [] : [{ value: RUN.r2_target, name: "R\u00b2 target" }];
  return DATA.evaluation.filter((one) => one.points).map((one) => h("section", null, h("h2", null, "Pareto front"),
    h("p", { class: "lead" }, "This dictionary with every threshold multiplied by one factor: what it costs to use fewer features, and what more would buy."),
    h("div", { class: "charts wide" }, frontier(one, "r2_raw", "R\u00b2, raw", SUMMARY.r2_space ? space : []),
      frontier(one, "ce", "Cross-entropy", typeof SUMMARY.ce_clean === "number" ? [{ value: SUMMARY.ce_clean, name: "clean model" }] : []))));
}
function evaluationView() {
  if (!DATA.evaluation.length) return h("p", { class: "lead" }, "Nothing has been evaluated: a run is measured when it ends.");
  return h("div", null, frontiers(), h("section", null, h("h2", null, "Measures"),
    h("p", { class: "lead" }, "On documents that training never saw." + (DATA.evaluation.some((one) => one.rows.some((row) => row.low !== undefined)) ? " Intervals come from resampling whole documents." : "")), h("div", { class: "evaluators" }, evaluators())));
}
