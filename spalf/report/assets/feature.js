/* One feature: what fires it, what it does, what lies near it. */

/* The last is as far as a place has activations. */
const BEFORE = 14, AFTER = 8, REACH = 128;

function contextLine(i, place) {
  const A = ATLAS, [sequence, peak, rank, flat] = place, tokens = A.sequences[sequence], at = new Map();
  for (let k = 0; k < flat.length; k += 2) at.set(flat[k], flat[k + 1]);
  const level = (A.peak[i] * at.get(peak)) / 100;
  const line = h("div", { class: "tokens" });
  const draw = (wide) => {
    const from = Math.max(0, peak - (wide ? REACH : BEFORE)), to = Math.min(tokens.length, peak + (wide ? REACH : AFTER) + 1);
    const spans = [];
    for (let t = from; t < to; t += 1) {
      const text = A.text[tokens[t]], share = at.get(t), shown = wide ? text.replace(/\n/g, RETURN + "\n") : visible(text);
      if (share === undefined) spans.push(shown);
      else spans.push(h("mark", { class: t === peak ? "peak" : null, "--a": `${share}%`, title: `${number((A.peak[i] * share) / 100, 3)} at ${JSON.stringify(text)}` }, shown));
    }
    line.replaceChildren(from > 0 ? h("span", { class: "cut", "aria-hidden": "true" }, "\u2026") : "", ...spans, to < tokens.length ? h("span", { class: "cut", "aria-hidden": "true" }, "\u2026") : "");
    line.classList.toggle("wide", wide);
  };
  draw(false);
  const more = h("button", { type: "button", class: "quiet more", "aria-expanded": "false", "aria-label": "Show the whole context", title: "Show the whole context", onclick: () => {
    const wide = more.getAttribute("aria-expanded") === "false";
    more.setAttribute("aria-expanded", String(wide));
    more.textContent = wide ? "\u2212" : "+";
    draw(wide);
  } }, "+");
  return h("li", { class: "context" }, h("span", { class: "level", title: `rank ${percent(rank, 2)} of its firings` }, number(level, 3)), line, more);
}
function contexts(i) {
  const places = ATLAS.places[i];
  if (!places.length) return ATLAS.sequences.length ? h("p", { class: "lead" }, "It fired on none of the held-out tokens.") : null;
  let split = places.findIndex((p, k) => k > 0 && places[k - 1][2] > p[2]);
  split = places.length > 8 && split < 0 ? 8 : split < 0 ? places.length : split;
  const list = (some) => h("ol", { class: "contexts" }, some.map((p) => contextLine(i, p)));
  return [h("h3", null, "Strongest contexts"), list(places.slice(0, split)),
    split < places.length ? [h("h3", null, "From the rest of its range"), list(places.slice(split))] : null];
}
function histogram(i) {
  const A = ATLAS, bars = A.histogram[i];
  if (!bars.length) return null;
  const width = 320, height = 84, w = width / bars.length, most = Math.log10(1 + Math.max(...bars));
  const svg = g("svg", { class: "plot", viewBox: `0 0 ${width} ${height + 16}`, role: "img", "aria-label": `Histogram of ${A.fired[i]} activations from 0 to ${number(A.peak[i])}, mean ${number(A.mean[i])}` });
  bars.forEach((n, k) => {
    const tall = n ? Math.max(1.5, (height * Math.log10(1 + n)) / most) : 0;
    svg.append(g("rect", { class: "bar", x: k * w + 0.5, width: w - 1, y: height - tall, height: tall, "--c": "var(--heat)" }, g("title", null, `${number((A.peak[i] * k) / bars.length, 3)} to ${number((A.peak[i] * (k + 1)) / bars.length, 3)}: ${number(n)}`)));
  });
  const mean = (A.mean[i] / A.peak[i]) * width;
  svg.append(g("line", { class: "mean", x1: mean, x2: mean, y1: 0, y2: height }), g("text", { class: "tick", x: 0, y: height + 13 }, "0"),
    g("text", { class: "tick", x: Math.min(width - 60, Math.max(40, mean)), y: height + 13, "text-anchor": "middle" }, "mean " + number(A.mean[i], 3)), g("text", { class: "tick", x: width, y: height + 13, "text-anchor": "end" }, number(A.peak[i], 3)));
  return h("section", { class: "panel" }, h("h3", null, "Activations"), h("p", { class: "hint" }, "log counts, from 0 to the peak"), svg);
}
function bars(title, hint, flat, entry, shown, largest) {
  if (!flat.length) return null;
  const items = [], most = largest || Math.max(...flat.filter((_, k) => k % 2).map(Math.abs), 1e-9);
  for (let k = 0; k < flat.length; k += 2) {
    items.push(h("li", null, entry(flat[k]), h("span", { class: "bar", "aria-hidden": "true", "--w": `${(100 * Math.abs(flat[k + 1])) / most}%` }), h("span", { class: "n" }, shown(flat[k + 1]))));
  }
  return h("section", { class: "panel" }, h("h3", null, title), h("p", { class: "hint" }, hint), h("ol", { class: "bars" }, items));
}
/* Where to begin: the first few by what a feature can be remarkable for. */
const HIGHLIGHTS = [
  ["focus", "On one token", "share of its activation on its first token", (x) => percent(x, 2), 1],
  ["likeness", "Nearest to another", "cosine of the two decoder rows", (x) => number(x, 3), 1],
  ["drift", "Moved furthest", "from the anchor, whitened", (x) => number(x, 3)],
  ["absorption", "Absorbed most", "share of its token's places", (x) => percent(x, 2), 1],
  ["planted", "Closest to a planted one", "cosine", (x) => number(x, 3), 1],
];
function highlights() {
  const A = ATLAS, often = A.id.map((_, i) => i).filter((i) => A.fired[i] >= 20);
  return h("div", { class: "panels" }, HIGHLIGHTS.map(([sort, title, hint, shown, largest]) => {
    const of = (i) => SORTS[sort].of(A, i);
    const first = often.filter((i) => of(i) > 0).sort((a, b) => of(b) - of(a) || A.id[a] - A.id[b]).slice(0, 8);
    return bars(title, hint, first.flatMap((i) => [A.id[i], of(i)]), (id) => featureLink(id, sort === "drift" || sort === "absorption"), shown, largest);
  }));
}
function featureLink(id, byAnchor) {
  const i = PLACE.get(id);
  if (i === undefined) return h("span", { class: "number" }, String(id));
  return h("a", { href: "#/features/" + id }, h("i", { class: "swatch dot", "--c": `var(--${strataColor(ATLAS.stratum[i])})` }), h("span", { class: "number" }, String(id)), " ", byAnchor ? chip(ATLAS.text[ATLAS.anchored[i][0]]) : nameOf(i).slice(0, 2));
}
function facts(i) {
  const A = ATLAS, out = [], add = (name, value, note) => out.push(h("div", null, h("dt", null, name), h("dd", null, value), note ? h("p", null, note) : null));
  const often = A.fired[i] ? `one in ${number(Number((A.rows / A.fired[i]).toPrecision(3)))} ${A.sequences.length ? "tokens" : "activations"}` : "never seen firing";
  add("Density", A.fired[i] ? percent(densityOf(i)) : "0", often);
  add("Peak", number(A.peak[i]), `mean ${number(A.mean[i], 3)}`);
  if (A.tokens[i].length) add("Most on", chip(A.text[A.tokens[i][0]]), `${percent(A.tokens[i][1], 2)} of its activation`);
  const tied = A.anchored[i];
  if (tied) {
    add("Anchored to", chip(A.text[tied[0]]), `cosine ${number(tied[2], 3)} with its anchor`);
    add("Drift", number(tied[1], 3), "from the anchor, whitened");
  }
  if (A.absorption[i] !== null) add("Absorption", percent(A.absorption[i]), "of its token's places: another feature speaks");
  if (A.planted[i].length) add("Planted", "number " + A.planted[i][0], `cosine ${number(A.planted[i][1], 3)}`);
  return h("dl", { class: "facts" }, out);
}
function drawFeature(id) {
  const i = PLACE.get(id), { detail } = ui;
  document.body.classList.toggle("reading", id !== null);
  if (id === null) { listState.at = -1; detail.replaceChildren(ui.overview()); drawRows(); return; }
  const back = h("a", { class: "back", href: "#/features" }, "\u2190 all features");
  if (i === undefined) {
    detail.replaceChildren(back, h("p", { class: "lead" }, id < ATLAS.width ? `Feature ${id} is not among those on this page.` : `There is no feature ${id}.`));
    return;
  }
  const A = ATLAS, token = (t) => chip(A.text[t]);
  listState.at = i;
  detail.replaceChildren(back,
    h("header", { class: "row" }, h("h2", null, "Feature ", h("span", { class: "number" }, String(id)), h("span", { class: "tag" }, h("i", { class: "swatch dot", "--c": `var(--${strataColor(A.stratum[i])})` }), STRATA[A.stratum[i]])),
      h("div", { class: "segments" }, h("button", { type: "button", onclick: () => stepFeature(-1), "aria-label": "Previous feature" }, "\u2191"), h("button", { type: "button", onclick: () => stepFeature(1), "aria-label": "Next feature" }, "\u2193"))),
    facts(i),
    h("div", { class: "columns" }, h("div", null, contexts(i)),
      h("div", { class: "panels" }, histogram(i),
        bars("Fires on", "share of its activation", A.tokens[i], token, (x) => percent(x, 2), 1),
        bars("Promotes", "logit through the unembedding", A.promoted[i], token, (x) => "+" + number(x, 3)),
        bars("Suppresses", "logit through the unembedding", A.suppressed[i], token, (x) => number(x, 3)),
        bars("Nearest decoder rows", "cosine in model space", A.neighbours[i], (id) => featureLink(id), (x) => number(x, 3), 1),
        bars("Fires together with", "share of its firings", A.partners[i], (id) => featureLink(id), (x) => percent(x, 2), 1))));
  reveal();
  detail.scrollTop = 0;
  if (ui.focusDetail || matchMedia("(max-width: 760px)").matches) { detail.focus({ preventScroll: true }); scrollTo(0, 0); }
  ui.focusDetail = false;
}
