/* The view of the run: how it ended, and how it came there. */

const SUMMARY = RUN.summary;
const constraintColor = (name) => "c" + (Object.keys(STORY.constraints).indexOf(name) % 8);

function card(name, value, note, state) {
  return h("div", { class: "card" + (state ? " " + state : "") }, h("dt", null, name), h("dd", null, value), note ? h("p", null, note) : null);
}
function cards() {
  const white = SUMMARY.r2_space === "white", l0 = SUMMARY.l0, target = RUN.l0_target;
  const r2 = white ? SUMMARY.r2_whitened : SUMMARY.r2_raw, out = [];
  if (typeof l0 === "number") out.push(card("L0", number(l0, 4), `target ${number(target)}`, l0 <= 1.1 * target ? "good" : "bad"));
  if (typeof r2 === "number") {
    const other = white ? SUMMARY.r2_raw : SUMMARY.r2_whitened;
    const note = (SUMMARY.r2_space ? `target ${number(RUN.r2_target)}, ` : "") + `${white ? "raw" : "whitened"} ${number(other, 3)}`;
    const met = SUMMARY.r2_space ? (r2 >= RUN.r2_target - 5e-4 ? "good" : "bad") : null;
    out.push(card(white ? "R\u00b2 whitened" : "R\u00b2", number(r2, 4), note, met));
  }
  if (typeof SUMMARY.loss_recovered === "number") out.push(card("Loss recovered", percent(SUMMARY.loss_recovered), `cross-entropy ${number(SUMMARY.ce_patched, 4)}, clean ${number(SUMMARY.ce_clean, 4)}`));
  if (typeof SUMMARY.kl === "number") out.push(card("KL", number(SUMMARY.kl, 3), "nats per position, clean to patched"));
  if (typeof SUMMARY.dead_fraction === "number") out.push(card("Dead features", percent(SUMMARY.dead_fraction), `in ${number(SUMMARY.dead_window)} activations`));
  if (SUMMARY.wall_seconds) out.push(card("Wall time", duration(Object.values(SUMMARY.wall_seconds).reduce((a, b) => a + (b || 0), 0)), `on ${SUMMARY.device || "an unknown device"}`));
  return out.length ? h("dl", { class: "cards" }, out) : null;
}
function verdicts() {
  const held = SUMMARY.constraints || {}, names = Object.keys(held);
  if (!names.length) return null;
  const largest = Math.max(0.05, ...names.map((n) => Math.abs(held[n].violation || 0)));
  const rows = names.map((name) => {
    const one = held[name], v = one.violation;
    const bar = h("span", { class: "gauge " + (v > 0 ? "over" : "under"), "aria-hidden": "true", "--w": `${(50 * Math.abs(v || 0)) / largest}%` });
    const met = one.feasible ? h("span", { class: "yes" }, "met") : h("span", { class: "no" }, "not met");
    return [[h("i", { class: "swatch", "--c": `var(--${constraintColor(name)})` }), name], [bar, signed(v)], number(one.budget), number(one.multiplier), number(one.penalty), met];
  });
  return h("section", null, h("h2", null, "Constraints"),
    h("p", { class: "lead" }, "Violations on held-out data, value over budget less one: above zero is over budget."),
    table("Constraints", [{ text: "constraint" }, { text: "violation", number: true }, { text: "budget", number: true }, { text: "multiplier", number: true }, { text: "penalty", number: true }, { text: "" }], rows));
}
function notes() {
  const said = SUMMARY.notes || [];
  return said.length ? h("section", { class: "notes" }, h("h2", null, "Notes"), h("ul", null, said.map((n) => h("li", null, n)))) : null;
}

/* Which curves lie together. A curve of a component that this page does not know still gets a chart of its own. */
function storyCharts() {
  const curves = STORY.curves, used = new Set(), out = [];
  const take = (name) => { used.add(name); return curves[name]; };
  const one = (name, more) => { if (curves[name]) out.push(lineChart({ title: more.title || name, series: [{ name: more.label || name, values: take(name), color: "c0" }], ...more })); };
  one("l0", { title: "L0", label: "active features", unit: "per activation", lines: [{ value: RUN.l0_target, name: "target" }], log: true });
  const r2 = [["r2_raw", "raw", "c0"], ["r2_white", "whitened", "c1"]].filter(([name]) => curves[name]);
  if (r2.length) out.push(lineChart({ title: "R\u00b2", unit: "of the batch", series: r2.map(([name, label, color]) => ({ name: label, values: take(name), color })), lines: SUMMARY.r2_space === null ? [] : [{ value: RUN.r2_target, name: "target" }] }));
  const names = Object.keys(STORY.constraints);
  const each = (measure, faint) => names.map((name) => ({ name, values: STORY.constraints[name][measure], color: constraintColor(name), faint }));
  if (names.length) {
    out.push(lineChart({ title: "Violations", unit: "filtered; thin: of the batch", series: [...each("fast"), ...each("g", true)], lines: [{ value: 0, name: "budget" }], over: true, signed: true }));
    out.push(lineChart({ title: "Multipliers", series: each("lam"), zero: true }));
    out.push(lineChart({ title: "Penalties", series: each("rho"), zero: true }));
  }
  for (const [name, title] of [["threshold", "Thresholds"], ["bandwidth", "Bandwidths"]]) {
    const [low, mid, high] = ["p05", "p50", "p95"].map((p) => take(`${name}.${p}`));
    if (mid) out.push(lineChart({ title, unit: "5 to 95 % of the features", series: [{ name: "median", values: mid, color: "c0" }], band: { low, high, color: "c0" } }));
  }
  const terms = Object.keys(curves).filter((name) => name.startsWith("term."));
  if (terms.length) out.push(lineChart({ title: "Objective", unit: "by term", series: terms.map((name, i) => ({ name: name.slice(5), values: take(name), color: "c" + (i % 8) })), zero: true }));
  one("loss", { title: "Loss", unit: "the Lagrangian" });
  one("lr", { title: "Learning rate", zero: true });
  one("dead", { title: "Dead features", unit: "share", zero: true });
  one("gain", { title: "Gain" });
  for (const name of Object.keys(curves)) if (!used.has(name)) one(name, {});
  return out;
}
function rangeButtons() {
  const steps = STORY.steps, last = steps[steps.length - 1], phase = STORY.phases[STORY.phases.length - 1];
  const choices = [["whole run", null], ["second half", [last / 2, last]], ["last phase", [phase.from, phase.to]]];
  const buttons = choices.map(([name, range], i) => h("button", { type: "button", "aria-pressed": i === 0 ? "true" : "false", onclick: (event) => {
    buttons.forEach((b) => b.setAttribute("aria-pressed", b === event.currentTarget ? "true" : "false"));
    setRange(range);
  } }, name));
  return h("div", { class: "segments", role: "group", "aria-label": "Steps shown" }, buttons);
}
function wallTime() {
  const wall = Object.entries(SUMMARY.wall_seconds || {}).filter(([, s]) => s > 0).sort((a, b) => b[1] - a[1]);
  const total = wall.reduce((sum, [, s]) => sum + s, 0);
  if (!total) return null;
  return h("section", null, h("h2", null, "Wall time"),
    h("div", { class: "stack", "aria-hidden": "true" }, wall.map(([, s], i) => h("span", { "--w": `${(100 * s) / total}%`, "--c": `var(--c${i % 8})` }))),
    h("ul", { class: "legend" }, wall.map(([name, s], i) => h("li", { class: "key" }, h("i", { class: "swatch", "--c": `var(--c${i % 8})` }), name, " ", h("output", null, duration(s))))));
}

function runView() {
  const parts = [];
  if (!SUMMARY.outcome) parts.push(h("p", { class: "lead" }, "This run has not ended: what follows is what it has logged so far."));
  parts.push(cards(), verdicts(), notes());
  if (STORY.steps.length) {
    const thinned = STORY.every > 1 ? ` Every ${STORY.every}th logged line is drawn.` : "";
    const seen = DATA.parameters.find((row) => row.path === "phase.calibrate.tokens" && row.value !== null);
    const calibrated = seen ? ` Before step 0, calibration looked at ${number(seen.value)} activations.` : "";
    parts.push(h("section", null, h("div", { class: "row" }, h("h2", null, "Course of the run"), rangeButtons()),
      h("p", { class: "lead" }, `Shaded by phase; a line was logged every ${plural(STORY.log_every, "step")}.${thinned}${calibrated} Point at a chart, or focus it and use the arrow keys.`),
      h("div", { class: "charts" }, storyCharts())));
  } else {
    parts.push(h("p", { class: "lead" }, "No training step has been logged."));
  }
  parts.push(wallTime());
  return h("div", null, parts);
}
