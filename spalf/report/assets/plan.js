/* The view of the plan: every derived number with its origin, and the filled recipe. */

function valueOf(row) {
  if (row.value === null) return h("span", { class: "muted" }, "to be calibrated");
  if (row.path.endsWith("bytes")) return bytes(row.value);
  if (row.path.startsWith("flops.")) return flops(row.value);
  return number(row.value, 6);
}
function planView() {
  const rows = DATA.parameters.map((row) => [row.path, [valueOf(row), row.calibrated && row.value !== null ? h("span", { class: "tag" }, "calibrated") : null], row.formula, row.origin]);
  const components = Object.entries(RUN.components).map(([name, origin]) => [name, origin]);
  const versions = Object.entries(RUN.versions).map(([name, version]) => [name, version]);
  return h("div", null,
    h("section", null, h("h2", null, "Derived parameters"),
      h("p", { class: "lead" }, "What the recipe left open, how it was settled, and what it came from."),
      table("Derived parameters", [{ text: "parameter" }, { text: "value", number: true }, { text: "formula" }, { text: "from" }], rows, { class: "plain" })),
    h("section", { class: "two" },
      h("div", null, h("h2", null, "Components"), table("Components", [{ text: "component" }, { text: "package" }], components)),
      versions.length ? h("div", null, h("h2", null, "Versions"), table("Versions", [{ text: "package" }, { text: "version" }], versions)) : null),
    DATA.recipe ? h("section", null, h("h2", null, "Recipe"), h("p", { class: "lead" }, "With every default written back: this file alone repeats the run."), h("pre", { tabindex: "0", role: "region", "aria-label": "Recipe" }, DATA.recipe)) : null);
}
