/* Views by their hash, so that each of them, and each feature, has an address. */

const VIEWS = { run: ["Run", runView], features: ["Features", featuresView], evaluation: ["Evaluation", evaluationView], plan: ["Plan", planView] };
const drawn = {};

function header() {
  const said = [];
  if (SUMMARY.outcome) said.push(h("span", { class: "badge " + (SUMMARY.outcome === "done" ? "good" : "bad") }, SUMMARY.outcome));
  if (SUMMARY.outcome === "done" && typeof SUMMARY.feasible === "boolean" && Object.keys(SUMMARY.constraints || {}).length) said.push(h("span", { class: "badge " + (SUMMARY.feasible ? "good" : "bad") }, SUMMARY.feasible ? "feasible" : "infeasible"));
  document.getElementById("outcome").replaceChildren(...said);
  const facts = [[RUN.model, RUN.hook].filter(Boolean).join(", ") || "no model", `d_model ${number(RUN.d_model)}`, `${number(RUN.F)} features`, `${number(RUN.tokens)} activations in batches of ${number(RUN.batch)}`, `seed ${RUN.seed}`];
  document.getElementById("facts").textContent = facts.join("  \u00b7  ");
  const views = Object.entries(VIEWS).filter(([name]) => name !== "features" || packedAtlas);
  document.getElementById("views").replaceChildren(...views.map(([name, [title]]) => h("a", { href: "#/" + name, id: "to-" + name }, title)));
}

const THEMES = { auto: ["\u25d0", "as the system has them"], light: ["\u2600", "light"], dark: ["\u263e", "dark"] };
function setTheme(theme) {
  const button = document.getElementById("theme"), [sign, words] = THEMES[theme];
  if (theme === "auto") document.documentElement.removeAttribute("data-theme");
  else document.documentElement.setAttribute("data-theme", theme);
  button.textContent = sign;
  button.setAttribute("aria-label", "Colours: " + words);
  button.title = "Colours: " + words;
  button.dataset.theme = theme;
}
function nextTheme() {
  const names = Object.keys(THEMES), theme = names[(names.indexOf(document.getElementById("theme").dataset.theme) + 1) % names.length];
  setTheme(theme);
  remember("theme", theme);
}

async function route() {
  const [, asked, id] = /^#\/(\w+)(?:\/(\d+))?$/.exec(location.hash) || [];
  const name = asked in VIEWS && (asked !== "features" || packedAtlas) ? asked : "run";
  if (name === "features" && !ATLAS) openAtlas(await atlasPromise);
  const main = document.getElementById("main");
  drawn[name] = drawn[name] || VIEWS[name][1]();
  if (main.firstElementChild !== drawn[name]) {
    main.replaceChildren(drawn[name]);
    main.className = "view-" + name;
    if (name === "run") watchCharts();
    scrollTo(0, 0);
  }
  for (const link of document.querySelectorAll("#views a")) {
    if (link.id === "to-" + name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${RUN.name} \u2013 ${name === "features" && id ? "feature " + id : VIEWS[name][0].toLowerCase()}`;
  document.body.classList.remove("reading");
  if (name === "features") drawFeature(id === undefined ? null : Number(id));
  document.body.dataset.ready = name;
}

setTheme(remember("theme") in THEMES ? remember("theme") : "auto");
document.getElementById("theme").addEventListener("click", nextTheme);
document.addEventListener("keydown", (event) => {
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
  if (event.key === "/" && !typing && ui.search && ui.search.isConnected) { event.preventDefault(); ui.search.focus(); ui.search.select(); }
});
addEventListener("hashchange", route);
header();
route();
