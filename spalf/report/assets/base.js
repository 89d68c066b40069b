/* What every view stands on: elements, numbers, tokens, data. Text is always set as text, never as markup. */

const SVG = "http://www.w3.org/2000/svg";
const RETURN = "\u23ce", TAB = "\u21e5", SPACE = "\u2423", MINUS = "\u2212", THIN = "\u202f", NONE = "\u2013";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) element.style.setProperty(name, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(3).filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}
const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const g = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

/* Whole and large numbers in full, others to a few digits; a dash where nothing was measured. */
function number(x, digits = 4) {
  if (x === null || x === undefined || Number.isNaN(x)) return NONE;
  if (typeof x === "boolean") return x ? "yes" : "no";
  if (typeof x !== "number") return String(x);
  let text;
  if (Math.abs(x) < 1e15 && (Number.isInteger(x) || Math.abs(x) >= 10 ** digits)) {
    text = Math.round(Math.abs(x)).toString().replace(/\B(?=(\d{3})+$)/g, THIN);
  } else if (Math.abs(x) < 1e-3 || Math.abs(x) >= 1e15) {
    text = Math.abs(x).toExponential(digits - 2).replace("e-", "e" + MINUS).replace("e+", "e");
  } else {
    text = String(Number(Math.abs(x).toPrecision(digits)));
  }
  return (x < 0 ? MINUS : "") + text;
}
function signed(x) {
  if (typeof x !== "number") return NONE;
  return (x < 0 ? MINUS : "+") + Math.abs(x).toFixed(3);
}
function percent(x, digits = 3) {
  if (typeof x !== "number") return NONE;
  return number(Number((100 * x).toPrecision(digits)), digits) + THIN + "%";
}
function bytes(x) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let i = 0;
  while (x >= 1024 && i < units.length - 1) { x /= 1024; i += 1; }
  return number(Number(x.toPrecision(3)), 4) + THIN + units[i];
}
function flops(x) {
  const units = ["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP", "ZFLOP"];
  let i = 0;
  while (x >= 1000 && i < units.length - 1) { x /= 1000; i += 1; }
  return number(Number(x.toPrecision(3)), 4) + THIN + units[i];
}
function duration(seconds) {
  if (typeof seconds !== "number") return NONE;
  if (seconds < 60) return number(Number(seconds.toPrecision(3))) + THIN + "s";
  const whole = Math.round(seconds), two = (n) => String(n).padStart(2, "0");
  const hours = Math.floor(whole / 3600), minutes = Math.floor(whole / 60) % 60;
  return (hours ? hours + ":" + two(minutes) : minutes) + ":" + two(whole % 60) + (hours ? " h" : " min");
}
const plural = (n, word) => number(n) + " " + word + (n === 1 ? "" : "s");

/* A text on one line: line breaks and tabs as signs, long blanks as short ones. */
function visible(text, blank = () => "  ") {
  return Array.from(text.replace(/ {3,}/g, (run) => blank(run.length)), (c) => {
    if (c === "\n") return RETURN;
    if (c === "\t") return TAB;
    return c < " " || c === "\u007f" ? "\\x" + c.charCodeAt(0).toString(16).padStart(2, "0") : c;
  }).join("");
}
function chip(text, ...more) {
  const shown = text === "" ? "\u2205" : visible(text, (n) => SPACE + "\u00d7" + n);
  const lead = /^ */.exec(shown)[0].length, inner = shown.slice(lead);
  const blanks = lead ? h("span", { class: "blank" }, SPACE.repeat(lead)) : null;
  return h("span", { class: "chip" }, blanks, inner, ...more);
}

function hidden(text) { return h("span", { class: "hidden" }, text); }
function table(caption, heads, rows, attributes) {
  const cell = (tag, content, i, scope) =>
    h(tag, { class: heads[i].number ? "n" : null, scope }, content === undefined ? "" : content);
  return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    h("table", attributes,
      h("caption", { class: "hidden" }, caption),
      h("thead", null, h("tr", null, heads.map((head, i) => cell("th", head.text, i, "col")))),
      h("tbody", null, rows.map((row) =>
        h("tr", null, row.map((content, i) => cell(i ? "td" : "th", content, i, i ? null : "row")))))));
}

const DATA = JSON.parse(document.getElementById("data").textContent);
const RUN = DATA.run, STORY = DATA.story;

/* The features are packed: 4,096 of them are megabytes of text. */
async function inflate(text) {
  const packed = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}
const packedAtlas = document.getElementById("atlas").textContent.trim();
const atlasPromise = packedAtlas ? inflate(packedAtlas) : Promise.resolve(null);

function remember(key, value) {
  try {
    if (value === undefined) return localStorage.getItem("spalf." + key);
    localStorage.setItem("spalf." + key, value);
  } catch (error) { /* A page from disk may have no storage: it forgets. */ }
  return null;
}
