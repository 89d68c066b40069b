/* The list of features: searched, sorted, and only as long in the page as the screen is high. */

const ROW = 46;
const listState = { query: "", where: "any", stratum: "", show: "all", sort: "density", down: true, order: [], at: 0 };
const SORTS = {
  density: { name: "density", down: true, of: (A, i) => A.fired[i] },
  id: { name: "number", down: false, of: (A, i) => A.id[i] },
  stratum: { name: "stratum", down: false, of: (A, i) => A.stratum[i] },
  token: { name: "token", down: false, of: (A, i) => (A.tokens[i].length ? A.text[A.tokens[i][0]].trim().toLowerCase() || "\uffff" : "\uffff") },
  focus: { name: "focus on one token", down: true, of: (A, i) => (A.tokens[i].length ? A.tokens[i][1] : -1) },
  peak: { name: "peak activation", down: true, of: (A, i) => A.peak[i] },
  likeness: { name: "nearest neighbour", down: true, of: (A, i) => (A.neighbours[i].length ? A.neighbours[i][1] : -2) },
  drift: { name: "drift from the anchor", down: true, of: (A, i) => (A.anchored[i] ? A.anchored[i][1] : -1), only: (A) => A.anchored.some(Boolean) },
  absorption: { name: "absorption", down: true, of: (A, i) => (A.absorption[i] === null ? -1 : A.absorption[i]), only: (A) => A.absorption.some((x) => x !== null) },
  planted: { name: "match with a planted direction", down: true, of: (A, i) => (A.planted[i].length ? A.planted[i][1] : -2), only: (A) => A.planted.some((p) => p.length) },
};

let ATLAS = null, STRATA = [], PLACE = new Map(), haystacks = null;

function openAtlas(atlas) {
  ATLAS = atlas;
  STRATA = Object.keys(atlas.strata);
  PLACE = new Map(atlas.id.map((id, i) => [id, i]));
}
const densityOf = (i) => ATLAS.fired[i] / ATLAS.rows;
const strataColor = (s) => "c" + (s % 8);

/* What a search looks through, per feature, in lower case; made on the first search. */
function haystack() {
  if (haystacks) return haystacks;
  const A = ATLAS, words = (flat) => flat.filter((_, k) => k % 2 === 0).map((t) => A.text[t]).join("\u0000");
  haystacks = A.id.map((_, i) => {
    const fires = words(A.tokens[i]) + "\u0000" + (A.anchored[i] ? A.text[A.anchored[i][0]] : "");
    const context = A.places[i].map(([s, p]) => A.sequences[s].slice(Math.max(0, p - 12), p + 7).map((t) => A.text[t]).join("")).join("\u0000");
    return { fires: fires.toLowerCase(), promotes: words(A.promoted[i]).toLowerCase(), context: context.toLowerCase() };
  });
  return haystacks;
}
function found() {
  const { query, where, stratum, show } = listState, A = ATLAS, needle = query.toLowerCase();
  const asNumber = /^#?\d+$/.test(query.trim()) ? Number(query.trim().replace("#", "")) : null;
  const hay = needle.trim() ? haystack() : null;
  const keep = [];
  for (let i = 0; i < A.id.length; i += 1) {
    if (stratum !== "" && A.stratum[i] !== Number(stratum)) continue;
    if (show === "firing" && !A.fired[i]) continue;
    if (show === "silent" && A.fired[i]) continue;
    if (hay && A.id[i] !== asNumber) {
      const texts = where === "any" ? Object.values(hay[i]) : [hay[i][where]];
      if (!texts.some((text) => text.includes(needle))) continue;
    }
    keep.push(i);
  }
  const { of } = SORTS[listState.sort], keys = new Map(keep.map((i) => [i, of(A, i)])), sign = listState.down ? -1 : 1;
  keep.sort((a, b) => {
    if (A.id[a] === asNumber || A.id[b] === asNumber) return A.id[a] === asNumber ? -1 : 1;
    const x = keys.get(a), y = keys.get(b);
    if (x !== y) return (x < y ? -1 : 1) * sign;
    return A.id[a] - A.id[b];
  });
  return keep;
}

function spark(i, width, height) {
  const bars = ATLAS.histogram[i], most = Math.max(1, ...bars.map((n) => Math.sqrt(n)));
  const w = width / Math.max(1, bars.length);
  return g("svg", { class: "spark", width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" },
    bars.map((n, k) => (n ? g("rect", { x: k * w, width: Math.max(0.8, w - 0.6), y: height - (height * Math.sqrt(n)) / most, height: (height * Math.sqrt(n)) / most }) : null)));
}
/* Log density from one firing in all rows (empty) to every row (full). */
function densityBar(i) {
  const floor = Math.log10(1 / ATLAS.rows), share = ATLAS.fired[i] ? 1 - Math.log10(densityOf(i)) / floor : 0;
  return h("span", { class: "meter", "aria-hidden": "true", "--w": `${100 * share}%` });
}
function nameOf(i) {
  const A = ATLAS, flat = A.tokens[i];
  if (flat.length) return flat.filter((_, k) => k % 2 === 0).slice(0, 4).map((t) => chip(A.text[t]));
  if (A.anchored[i]) return [chip(A.text[A.anchored[i][0]])];
  if (!A.fired[i]) return [h("span", { class: "muted" }, "silent")];
  if (A.planted[i].length) return [h("span", { class: "muted" }, `planted ${A.planted[i][0]}, cosine ${number(A.planted[i][1], 3)}`)];
  return [];
}
function sortedBy(i) {
  const A = ATLAS;
  if (listState.sort === "peak") return number(A.peak[i], 3);
  if (listState.sort === "focus") return A.tokens[i].length ? percent(A.tokens[i][1], 2) : NONE;
  if (listState.sort === "likeness") return A.neighbours[i].length ? number(A.neighbours[i][1], 3) : NONE;
  if (listState.sort === "drift") return A.anchored[i] ? number(A.anchored[i][1], 3) : NONE;
  if (listState.sort === "absorption") return percent(A.absorption[i], 2);
  if (listState.sort === "planted") return A.planted[i].length ? number(A.planted[i][1], 3) : NONE;
  return A.fired[i] ? percent(densityOf(i), 2) : "silent";
}
function listRow(i, place, count) {
  const A = ATLAS, own = listState.at === i;
  return h("div", { class: "item" + (own ? " own" : ""), role: "option", id: "item" + A.id[i], "aria-selected": own ? "true" : "false", "aria-setsize": count, "aria-posinset": place + 1, "--y": `${place * ROW}px`, onclick: () => openFeature(i) },
    h("span", { class: "number" }, h("i", { class: "swatch dot", "--c": `var(--${strataColor(A.stratum[i])})` }), String(A.id[i]), hidden(", " + STRATA[A.stratum[i]] + ", ")),
    h("span", { class: "names" }, nameOf(i)), spark(i, 46, 18),
    h("span", { class: "density" }, densityBar(i), sortedBy(i)));
}

const ui = {};
function drawRows() {
  const { box, rows } = ui, count = listState.order.length, height = box.clientHeight || 600;
  const first = Math.max(0, Math.floor(box.scrollTop / ROW) - 6), last = Math.min(count, Math.ceil((box.scrollTop + height) / ROW) + 6);
  rows.style.setProperty("--h", `${count * ROW}px`);
  const shown = [];
  for (let place = first; place < last; place += 1) shown.push(listRow(listState.order[place], place, count));
  rows.replaceChildren(...shown);
  const own = rows.querySelector(".own");
  if (own) box.setAttribute("aria-activedescendant", own.id);
  else box.removeAttribute("aria-activedescendant");
}
function refresh(keepScroll) {
  listState.order = found();
  const total = ATLAS.id.length, n = listState.order.length;
  ui.count.textContent = n === total ? plural(n, "feature") : `${number(n)} of ${plural(total, "feature")}`;
  ui.empty.hidden = n > 0;
  if (!keepScroll) ui.box.scrollTop = 0;
  drawRows();
}
function reveal() {
  const place = listState.order.indexOf(listState.at), { box } = ui;
  if (place < 0) { drawRows(); return; }
  const top = place * ROW, height = box.clientHeight;
  if (top < box.scrollTop) box.scrollTop = top;
  else if (top + ROW > box.scrollTop + height) box.scrollTop = top + ROW - height;
  drawRows();
}
function openFeature(i, focus) {
  ui.focusDetail = focus;
  listState.at = i; // at once: the next key may come before the address has been followed
  reveal();
  location.hash = "#/features/" + ATLAS.id[i];
}
function stepFeature(by) {
  const { order, at } = listState, place = order.indexOf(at);
  if (!order.length) return;
  openFeature(order[Math.max(0, Math.min(order.length - 1, place < 0 ? 0 : place + by))]);
}
function listKeys(event) {
  const page = Math.max(1, Math.floor(ui.box.clientHeight / ROW) - 1), all = listState.order.length;
  const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -all, End: all };
  if (event.key in moves && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    stepFeature(moves[event.key]);
  } else if (event.key === "Enter") {
    document.getElementById("feature").focus();
  }
}

function choice(label, options, value, onchange) {
  const select = h("select", { onchange: (event) => onchange(event.currentTarget.value) }, options.map(([v, text]) => h("option", { value: v, selected: v === value }, text)));
  return h("label", null, h("span", null, label), select);
}
function controls() {
  ui.search = h("input", { type: "search", id: "search", placeholder: ATLAS.sequences.length ? "token, text or number" : "number", spellcheck: "false", autocomplete: "off", "aria-label": "Search the features", "aria-keyshortcuts": "/", value: listState.query,
    oninput: (event) => { listState.query = event.currentTarget.value; refresh(); },
    onkeydown: (event) => { if (event.key === "ArrowDown" || event.key === "Enter") { event.preventDefault(); ui.box.focus(); if (!listState.order.includes(listState.at)) stepFeature(0); } } });
  const direction = h("button", { type: "button", class: "quiet", onclick: () => { listState.down = !listState.down; turn(); refresh(); } });
  const turn = () => { direction.textContent = listState.down ? "\u2193" : "\u2191"; direction.setAttribute("aria-label", listState.down ? "Largest first" : "Smallest first"); direction.title = direction.getAttribute("aria-label"); };
  turn();
  const sorts = Object.entries(SORTS).filter(([, sort]) => !sort.only || sort.only(ATLAS)).map(([key, sort]) => [key, sort.name]);
  ui.count = h("p", { class: "count", role: "status" });
  return h("div", { class: "controls" }, ui.search,
    ATLAS.sequences.length ? choice("in", [["any", "anything"], ["fires", "fires on"], ["promotes", "promotes"], ["context", "contexts"]], listState.where, (v) => { listState.where = v; refresh(); }) : null,
    STRATA.length > 1 ? choice("stratum", [["", "all"], ...STRATA.map((name, s) => [String(s), name])], listState.stratum, (v) => { listState.stratum = v; refresh(); }) : null,
    choice("show", [["all", "all"], ["firing", "firing"], ["silent", "silent"]], listState.show, (v) => { listState.show = v; refresh(); }),
    h("div", { class: "sort" }, choice("sort by", sorts, listState.sort, (v) => { listState.sort = v; listState.down = SORTS[v].down; turn(); refresh(); }), direction),
    ui.count);
}

/* How dense the features of the whole dictionary are, stacked by stratum. */
function densities() {
  const A = ATLAS, bars = A.density[0].length, totals = Array.from({ length: bars }, (_, k) => A.density.reduce((sum, counts) => sum + counts[k], 0));
  const most = Math.max(1, ...totals), width = 580, height = 110, w = width / bars, svg = g("svg", { class: "plot", viewBox: `0 0 ${width} ${height + 16}`, role: "img", "aria-label": `Features by density: ${totals.reduce((a, b) => a + b, 0)} fire, ${A.silent} are silent` });
  for (let k = 0; k < bars; k += 1) {
    let y = height;
    A.density.forEach((counts, s) => {
      const tall = ((height - 4) * counts[k]) / most;
      y -= tall;
      if (tall > 0) svg.append(g("rect", { class: "bar", x: k * w + 0.5, width: w - 1, y, height: tall, "--c": `var(--${strataColor(s)})` }));
    });
  }
  [["0.001\u202f%", 0], ["0.01\u202f%", 4], ["0.1\u202f%", 8], ["1\u202f%", 12], ["10\u202f%", 16], ["100\u202f%", 20]].forEach(([text, k]) =>
    svg.append(g("text", { class: "tick", x: k * w, y: height + 13, "text-anchor": k === 0 ? "start" : k === 20 ? "end" : "middle" }, text)));
  return h("figure", { class: "densities" },
    h("figcaption", null, h("b", null, "Densities"), h("small", null, `on ${number(A.rows)} ${A.sequences.length ? "tokens" : "activations"}; ${number(A.silent)} of ${number(A.width)} silent`)),
    svg, h("div", { class: "legend" }, STRATA.map((name, s) => h("span", { class: "key" }, h("i", { class: "swatch", "--c": `var(--${strataColor(s)})` }), name, " ", h("output", null, number(A.strata[name]))))));
}

function featuresView() {
  ui.rows = h("div", { class: "rows" });
  ui.empty = h("p", { class: "lead", hidden: true }, "No feature matches.");
  ui.box = h("div", { class: "box", role: "listbox", tabindex: "0", "aria-label": "Features", onkeydown: listKeys, onscroll: () => requestAnimationFrame(drawRows) }, ui.rows);
  ui.detail = h("article", { id: "feature", tabindex: "-1", "aria-live": "off" });
  const less = ATLAS.width > ATLAS.id.length ? h("p", { class: "lead" }, `${number(ATLAS.id.length)} of ${number(ATLAS.width)} features, spread evenly over the densities.`) : null;
  const view = h("div", { class: "browser" }, h("aside", { class: "finder", "aria-label": "Find a feature" }, controls(), ui.empty, ui.box), h("div", { class: "reader" }, ui.detail));
  new ResizeObserver(() => drawRows()).observe(ui.box);
  refresh();
  ui.overview = () => h("div", { class: "overview" }, less, densities(), highlights(), h("p", { class: "lead" }, "Choose a feature, or search: / jumps to the search, the arrow keys walk the list, Enter goes to the feature."));
  return view;
}
