/* Line charts over steps, drawn as SVG. They share one range of steps and one cursor. */

const charts = { all: [], range: null, at: null };

function ticks(low, high, wanted) {
  const rough = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const out = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i += 1) out.push(Number((i * step).toPrecision(12)));
  return out;
}
function logTicks(low, high) {
  const decades = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e += 1) decades.push(e);
  const steps = decades.length > 3 ? [1] : [1, 2, 5];
  return decades.flatMap((e) => steps.map((m) => Number((m * 10 ** e).toPrecision(6)))).filter((v) => v >= low && v <= high);
}
function scale(low, high, from, to, log) {
  const f = log ? Math.log10 : (v) => v, a = f(low), b = f(high) - a || 1;
  return (v) => from + ((f(v) - a) / b) * (to - from);
}

/* Steps inside the range; the whole run where there is none. */
function span() {
  const steps = STORY.steps;
  return charts.range || [Math.min(0, steps[0] || 0), steps[steps.length - 1] || 1];
}
function nearest(step) {
  let best = 0;
  STORY.steps.forEach((s, i) => { if (Math.abs(s - step) < Math.abs(STORY.steps[best] - step)) best = i; });
  return best;
}
function inside() {
  const [from, to] = span();
  return STORY.steps.map((s, i) => i).filter((i) => STORY.steps[i] >= from && STORY.steps[i] <= to);
}

/* options: title, unit, series [{name, values, color, faint}], lines [{value, name}], band {low, high, color}, over, zero, log */
function lineChart(options) {
  const readouts = options.series.filter((s) => !s.faint).map((s) => ({ series: s, value: h("output", null) }));
  const legend = readouts.map(({ series, value }) =>
    h("span", { class: "key" }, h("i", { class: "swatch", "--c": `var(--${series.color})` }), series.name, " ", value));
  const stepShown = h("span", { class: "at" });
  const svg = g("svg", { class: "plot", role: "img", tabindex: "0", "aria-label": describe(options), focusable: "true" });
  const figure = h("figure", { class: "chart" },
    h("figcaption", null, h("b", null, options.title), options.unit ? h("small", null, options.unit) : null, stepShown,
      h("div", { class: "legend" }, legend)), svg);
  const chart = { figure, svg, options, readouts, stepShown, width: 0 };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), [from, to] = span();
    const share = (event.clientX - box.left - chart.left) / (chart.right - chart.left);
    moveCursor(nearest(from + share * (to - from)));
  });
  svg.addEventListener("pointerleave", () => moveCursor(null));
  svg.addEventListener("blur", () => moveCursor(null));
  svg.addEventListener("keydown", (event) => stepCursor(event));
  charts.all.push(chart);
  return figure;
}
function describe(options) {
  const parts = options.series.filter((s) => !s.faint).map((s) => {
    const known = s.values.filter((v) => v !== null && v !== undefined);
    return known.length ? `${s.name} from ${number(known[0])} to ${number(known[known.length - 1])}` : "";
  });
  const lines = (options.lines || []).map((l) => `${l.name} ${number(l.value)}`);
  return `${options.title} over steps: ${[...parts, ...lines].filter(Boolean).join(", ")}. Left and right arrows move the cursor.`;
}
function stepCursor(event) {
  const shown = inside(), moves = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10 };
  let place = shown.indexOf(charts.at === null ? shown[shown.length - 1] : charts.at);
  if (event.key === "Home") place = 0;
  else if (event.key === "End") place = shown.length - 1;
  else if (event.key in moves) place += moves[event.key];
  else return;
  event.preventDefault();
  moveCursor(shown[Math.max(0, Math.min(shown.length - 1, place))]);
}
function moveCursor(at) {
  charts.at = at;
  for (const chart of charts.all) if (chart.width) drawCursor(chart);
}
function setRange(range) {
  charts.range = range;
  charts.at = null;
  for (const chart of charts.all) drawChart(chart, chart.width);
}

function extent(options, shown) {
  let low = Infinity, high = -Infinity;
  const see = (v) => { if (v !== null && v !== undefined) { low = Math.min(low, v); high = Math.max(high, v); } };
  for (const s of options.series) if (!s.faint) shown.forEach((i) => see(s.values[i]));
  if (options.band) shown.forEach((i) => { see(options.band.low[i]); see(options.band.high[i]); });
  (options.lines || []).forEach((l) => see(l.value));
  if (options.zero) see(0);
  if (low === Infinity) return { low: 0, high: 1, log: false };
  if (options.log && low > 0 && high / low > 30) return { low: low / 1.1, high: high * 1.1, log: true };
  const pad = (high - low || Math.abs(high) || 1) * 0.06;
  return { low: options.zero && low >= 0 ? 0 : low - pad, high: high + pad, log: false };
}
function path(x, y, values, shown) {
  let out = "", pen = false;
  for (const i of shown) {
    const v = values[i];
    if (v === null || v === undefined) { pen = false; continue; }
    out += (pen ? "L" : "M") + x(STORY.steps[i]).toFixed(1) + "," + y(v).toFixed(1);
    pen = true;
  }
  return out;
}

function drawChart(chart, width) {
  if (!width) return;
  const { svg, options } = chart, height = 172, shown = inside(), [from, to] = span();
  Object.assign(chart, { width, height, left: 46, right: width - 10, top: 16, bottom: height - 22 });
  const { low, high, log } = extent(options, shown);
  const x = scale(from, to, chart.left, chart.right), y = scale(low, high, chart.bottom, chart.top, log);
  Object.assign(chart, { x, y });
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren(...drawPhases(chart, x), ...drawAxes(chart, x, y, log ? logTicks(low, high) : ticks(low, high, 4)));
  if (options.over && high > 0) {
    svg.append(g("rect", { class: "over", x: chart.left, width: chart.right - chart.left, y: chart.top,
      height: Math.max(0, Math.min(chart.bottom, y(0)) - chart.top) }));
  }
  drawMarks(chart, x, y, shown);
  chart.cursor = g("g", { class: "cursor" });
  svg.append(chart.cursor);
  drawCursor(chart);
}
function drawMarks(chart, x, y, shown) {
  const { svg, options } = chart;
  const id = "clip" + charts.all.indexOf(chart);
  const box = { x: chart.left, y: chart.top, width: chart.right - chart.left, height: chart.bottom - chart.top };
  svg.append(g("clipPath", { id }, g("rect", box)));
  for (const line of options.lines || []) {
    svg.append(g("line", { class: "target", x1: chart.left, x2: chart.right, y1: y(line.value), y2: y(line.value) }),
      g("text", { class: "target", x: chart.right - 3, y: y(line.value) + (y(line.value) - chart.top < 16 ? 11 : -4), "text-anchor": "end" }, line.name));
  }
  if (options.band) {
    const known = shown.filter((i) => options.band.low[i] != null && options.band.high[i] != null);
    const there = known.map((i) => `${x(STORY.steps[i]).toFixed(1)},${y(options.band.high[i]).toFixed(1)}`);
    const back = known.reverse().map((i) => `${x(STORY.steps[i]).toFixed(1)},${y(options.band.low[i]).toFixed(1)}`);
    svg.append(g("polygon", { class: "band", points: [...there, ...back].join(" "), "--c": `var(--${options.band.color})` }));
  }
  for (const s of [...options.series].sort((a, b) => Number(Boolean(b.faint)) - Number(Boolean(a.faint)))) {
    svg.append(g("path", { class: s.faint ? "curve faint" : "curve", d: path(x, y, s.values, shown),
      "--c": `var(--${s.color})`, "clip-path": `url(#${id})` }));
  }
}
function drawPhases(chart, x) {
  const [from, to] = span(), out = [];
  STORY.phases.forEach((phase, i) => {
    const a = Math.max(from, phase.from), b = Math.min(to, phase.to);
    if (b <= a) return;
    out.push(g("rect", { class: "phase phase" + (i % 2), x: x(a), y: chart.top, width: x(b) - x(a), height: chart.bottom - chart.top }));
    if (x(b) - x(a) > 8 * phase.name.length) out.push(g("text", { class: "phase", x: x(a) + 4, y: chart.top - 4 }, phase.name));
  });
  return out;
}
function drawAxes(chart, x, y, marks) {
  const [from, to] = span(), out = [];
  for (const v of marks) {
    out.push(g("line", { class: "grid", x1: chart.left, x2: chart.right, y1: y(v), y2: y(v) }),
      g("text", { class: "tick", x: chart.left - 6, y: y(v) + 3.5, "text-anchor": "end" }, number(v, 3)));
  }
  for (const v of ticks(from, to, Math.max(2, Math.floor(chart.width / 75)))) {
    out.push(g("text", { class: "tick", x: x(v), y: chart.bottom + 15, "text-anchor": "middle" }, number(v)));
  }
  return out;
}
function drawCursor(chart) {
  const { options, x, y } = chart, shown = inside();
  const at = charts.at === null ? shown[shown.length - 1] : charts.at;
  chart.cursor.replaceChildren();
  chart.stepShown.textContent = charts.at === null || at === undefined ? "" : "step " + number(STORY.steps[at]);
  for (const { series, value } of chart.readouts) {
    const v = at === undefined ? null : series.values[at];
    value.textContent = options.signed ? signed(v) : number(v);
    if (charts.at !== null && v !== null && v !== undefined) {
      chart.cursor.append(g("circle", { cx: x(STORY.steps[at]), cy: y(v), r: 3.2, "--c": `var(--${series.color})` }));
    }
  }
  if (charts.at !== null) {
    chart.cursor.prepend(g("line", { x1: x(STORY.steps[at]), x2: x(STORY.steps[at]), y1: chart.top, y2: chart.bottom }));
  }
}

/* Drawn at the width that they get, so that their text keeps its size. */
const widths = new ResizeObserver((entries) => {
  for (const entry of entries) {
    const chart = charts.all.find((one) => one.figure === entry.target);
    const width = Math.floor(entry.contentRect.width);
    if (chart && width > 60 && width !== chart.width) drawChart(chart, width);
  }
});
function watchCharts() { charts.all.forEach((chart) => widths.observe(chart.figure)); }
