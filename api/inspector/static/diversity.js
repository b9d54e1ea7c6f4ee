// Entropy as the distribution it comes from, and K as the sum that it is.

import { colour, count, h, name, percent, refill, s, two } from "./dom.js";

const SHOWN = 8, NAMED = 2;

/** Panel that says how diverse a user is, and how many memories follow from it. */
export class Diversity {
  constructor() {
    this.element = h("div", { class: "diversity" });
  }

  draw(bank, titles, clusters) {
    if (!bank.entries.length) return refill(this.element, ...beginner(bank));
    refill(this.element,
      h("p", { class: "lead" }, sentence(bank)),
      scale("Entropy", bank.entropy, 0, 1, two(bank.entropy), ["one kind of item", "all kinds alike"]),
      h("h3", {}, "Kinds of items in this memory"),
      h("ul", { class: "bars" }, kinds(bank, titles, clusters)),
      bank.adaptive_k && [h("h3", {}, "From entropy to K"), h("ol", { class: "sums" }, sum(bank, "own"), sum(bank, "collective"))]);
  }
}

function beginner(bank) {
  return [
    h("p", { class: "lead" }, "Nothing is remembered yet: entropy counts as 0.50, and there is no memory to ask."),
    scale("Entropy", 0.5, 0, 1, "0.50", ["one kind of item", "all kinds alike"]),
    h("p", { class: "hint" }, `With the first item that is taken a bank of up to ${bank.capacity} memories begins.`),
  ];
}

function sentence(bank) {
  const own = bank.adaptive_k?.own, size = bank.entries.length, kindsHere = Object.keys(bank.clusters).length;
  const taste = bank.entropy < 0.4 ? "a narrow taste" : bank.entropy <= 0.6 ? "a mixed taste" : "a diverse taste";
  const said = [`${count(size, "memory", "memories")} of ${count(kindsHere, "kind")} of items: `, h("strong", {}, `entropy ${two(bank.entropy)}, ${size > 1 ? taste : "which counts as neutral"}`)];
  if (!own) return [...said, `. ${bank.k} of them are asked for each list.`];
  const at = (entropy) => bounded(own, wanted(own, entropy), size);
  return [...said, ". So ", h("strong", {}, `K = ${own.k}`), ` of them ${own.k === 1 ? "is" : "are"} asked for each list`,
    at(0) === at(1) ? "." : ` (${at(0)} if they were all of one kind, ${at(1)} if of all kinds alike).`];
}

function kinds(bank, titles, clusters) {
  const shares = Object.entries(bank.clusters).map(([cluster, share]) => [Number(cluster), share]).sort((a, b) => b[1] - a[1]);
  const largest = shares[0]?.[1] ?? 1;
  const shown = shares.slice(0, SHOWN).map(([cluster, share]) => bar(colour(cluster), [...examples(bank, titles, cluster)], share, largest));
  const rest = shares.slice(SHOWN);
  const left = rest.reduce((sum, [, share]) => sum + share, 0);
  if (rest.length) shown.push(bar("var(--unknown)", [h("em", {}, `${count(rest.length, "further kind")}`)], left, Math.max(largest, left)));
  const all = Math.max(clusters ?? 0, shares.length);
  return [...shown, h("li", { class: "hint" }, `${all - shares.length} of ${all} kinds do not occur.`)];
}

function* examples(bank, titles, cluster) {
  const best = bank.entries.filter((entry) => entry.cluster === cluster).sort((a, b) => b.quality - a.quality);
  for (const [n, entry] of best.slice(0, NAMED).entries()) {
    if (n) yield ", ";
    yield name(titles.get(entry.item_id).title);
  }
  if (best.length > NAMED) yield ` +${best.length - NAMED}`;
}

function bar(fill, label, share, largest) {
  return h("li", {},
    h("span", { class: "label" }, label),
    h("span", { class: "track", "aria-hidden": "true" }, h("span", { style: { width: `${(100 * share) / largest}%`, background: fill } })),
    h("span", { class: "value" }, percent(share)));
}

const wanted = (how, entropy) => how.base * (0.5 + entropy) * how.growth;
const bounded = (how, value, size) => Math.min(Math.max(Math.floor(value + 0.5), how.k_min), how.k_max, size);

/** One K, step by step. */
function sum(bank, scope) {
  const how = bank.adaptive_k[scope], size = bank.entries.length, value = wanted(how, bank.entropy);
  const rounded = Math.floor(value + 0.5);
  const why = rounded === how.k ? "rounded" : rounded > how.k ? (how.k === how.k_max ? `at most ${how.k_max}` : "all there are") : `at least ${how.k_min}`;
  const term = (number, text) => h("span", { class: "term" }, h("b", {}, number), h("small", {}, text));
  return h("li", { class: scope },
    h("span", { class: "whose" }, scope === "own" ? "the user's own" : "of all others"),
    h("span", { class: "sum" },
      term(how.base, "base"), "×", term(two(0.5 + bank.entropy), "½ + entropy"),
      scope === "own" && ["×", term(two(how.growth), growth(how, size, bank.capacity))],
      "=", term(value.toFixed(1), "wanted"), "→", h("span", { class: "term result" }, h("b", {}, how.k), h("small", {}, why))));
}

const growth = (how, size, capacity) => Math.abs(how.growth - Math.sqrt(size / capacity)) < 1e-3 ? `√ of ${size}/${capacity}` : "how full";

/** A marker on a line between two ends. */
function scale(label, value, low, high, said, ends) {
  const x = 4 + (292 * (value - low)) / (high - low);
  return h("div", { class: "scale" },
    s("svg", { viewBox: "0 0 300 26", role: "img", "aria-label": `${label} ${said}, between ${low} (${ends[0]}) and ${high} (${ends[1]})` },
      s("rect", { x: 4, y: 12, width: 292, height: 6, rx: 3 }),
      s("rect", { class: "reached", x: 4, y: 12, width: Math.max(0, x - 4), height: 6, rx: 3 }),
      s("circle", { cx: x, cy: 15, r: 8 })),
    h("p", { "aria-hidden": "true" }, h("span", {}, ends[0]), h("b", {}, `${label} ${said}`), h("span", {}, ends[1])));
}
