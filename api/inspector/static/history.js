// What was taken, in order; what was forgotten, and why; the bank as a table.

import { colour, count, day, h, moment, name, s, two, withTip } from "./dom.js";
import { habitKept } from "./habit.js";

const WIDTH = 1200, HIGH = 58, LABELS = 16;
const ROWS = 12;

/** Every interaction of the log as a stroke in the order of time: full where it is still remembered. */
export function timeline(bank, titles) {
  const log = bank.log, kept = new Set(bank.entries.map((entry) => entry.item_id));
  const step = WIDTH / Math.max(log.length, 30), wide = Math.min(Math.max(step * 0.7, 1), 14);
  const strokes = log.map(({ item_id: item, timestamp }, n) => {
    const is = kept.has(item), high = is ? HIGH : HIGH * 0.42, about = titles.get(item);
    const stroke = s("rect", { class: is ? "kept" : "gone", x: two(n * step), y: two(HIGH - high), width: two(wide), height: two(high), rx: 1, style: { fill: is ? colour(about.cluster) : "none", stroke: colour(about.cluster) } });
    return withTip(stroke, () => [h("p", {}, h("strong", {}, name(about.title))), h("p", {}, moment(timestamp)), h("p", {}, is ? "remembered" : "forgotten since")]);
  });
  const days = marks(log).map(({ n, text }) => s("text", { x: two(n * step), y: HIGH + 13 }, text));
  const said = `${count(log.length, "interaction")} in order of time, ${log.filter((one) => kept.has(one.item_id)).length} of them still remembered`;
  return h("figure", { class: "timeline", tabindex: 0, "aria-label": "Timeline, scrolls sideways" },
    s("svg", { viewBox: `0 0 ${WIDTH} ${HIGH + LABELS}`, role: "img", "aria-label": said }, strokes, days),
    h("figcaption", {}, `${said[0].toUpperCase()}${said.slice(1)} (full strokes; low and hollow: forgotten since). ${bank.events > log.length ? `The log keeps the newest ${log.length} of ${bank.events}.` : ""}`));
}

/** Where a new day begins, as far as there is room to say so. */
function marks(log) {
  const found = [], room = Math.max(log.length, 30) / 9;
  log.forEach(({ timestamp }, n) => {
    const text = day(timestamp), last = found.at(-1);
    if (text !== last?.text && (!last || n - last.n >= room)) found.push({ n, text });
  });
  return found.filter(({ n }) => n <= Math.max(log.length, 30) - room * 0.8 || n === 0);
}

/** Panel on pruning. `takenToo`: whether what was taken may be recommended again. */
export function forgotten(bank, titles, takenToo = false) {
  const { entries, pruned_items: gone, threshold } = bank;
  if (!bank.pruned) {
    return h("div", {}, h("p", { class: "lead" }, `Nothing yet: ${entries.length} of ${bank.capacity} places are taken. When the bank is full the memories of least quality go.`), strip(entries, [], null));
  }
  const lowest = Math.min(...entries.map((entry) => entry.quality));
  return h("div", {},
    h("p", { class: "lead" }, h("strong", {}, count(bank.pruned, "memory", "memories")), ` had to go: a bank holds ${bank.capacity}. Whenever a new one came to a full bank, those of a quality below the adaptive threshold went, or the lowest. What was pruned still counts as taken${takenToo ? "" : " and is not recommended again"}.`),
    strip(entries, gone, threshold),
    gone.length > 0 && h("p", { class: "hint" }, `The latest ${Math.min(ROWS, gone.length)} of the ${gone.length} that the log still names, at what they would be worth today (weakest kept: ${two(lowest)}). Ratings and retrievals are forgotten with them, so both are left out.`),
    gone.length > 0 && h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Forgotten memories" }, h("table", {},
      h("thead", {}, h("tr", {}, ["Memory", "Last taken", "Times", "Quality", "Why it went"].map((text, n) => h("th", { scope: "col", class: n === 2 || n === 3 ? "number" : null }, text)))),
      h("tbody", {}, gone.slice(0, ROWS).map((one) => h("tr", {}, h("th", { scope: "row" }, name(titles.get(one.item_id).title)), h("td", {}, day(one.timestamp)), h("td", { class: "number" }, one.frequency), h("td", { class: "number" }, two(one.quality)), h("td", {}, why(one, entries, lowest))))))));
}

/** Against the kept: what it lacks most. */
function why(one, entries, lowest) {
  if (one.quality >= lowest) return "rated low, or the bank was fuller of better ones then";
  const mean = (term) => entries.reduce((sum, entry) => sum + (entry.quality_parts?.[term] ?? 0), 0) / entries.length;
  const lacking = ["recency", "frequency"].map((term) => [term, mean(term) - one.quality_parts[term]]).filter(([, by]) => by > 0.005).sort((a, b) => b[1] - a[1]);
  if (!lacking.length) return "rated lower or retrieved less than those kept";
  return lacking.map(([term, by]) => `${term === "recency" ? "older" : "taken less often"} than those kept (−${two(by)})`).join(", ");
}

/** Qualities on a line: kept above, forgotten below, the threshold between. */
function strip(entries, gone, threshold) {
  const x = (quality) => two(10 + 580 * Math.min(Math.max(quality, 0), 1));
  const at = threshold === null ? null : x(threshold);
  const svg = s("svg", { class: "strip", viewBox: "0 0 600 76", role: "img", "aria-label": `Qualities from 0 to 1: ${entries.length} kept${gone.length ? `, ${gone.length} forgotten` : ""}${threshold === null ? "" : `, threshold ${two(threshold)}`}` },
    s("path", { class: "axis", d: "M10 60h580" }),
    [0, 0.25, 0.5, 0.75, 1].map((tick) => s("text", { x: x(tick), y: 73, "text-anchor": tick === 0 ? "start" : tick === 1 ? "end" : "middle" }, tick === 0 ? "quality 0" : String(tick))),
    entries.map((entry) => s("path", { class: "kept", d: `M${x(entry.quality)} 14v20`, style: { stroke: colour(entry.cluster) } })),
    gone.map((one) => s("path", { class: "gone", d: `M${x(one.quality)} 42v12` })),
    at && s("path", { class: "threshold", d: `M${at} 6v54` }),
    at && s("text", { class: "threshold", x: Number(at) > 450 ? Number(at) - 5 : Number(at) + 5, y: 10, "text-anchor": Number(at) > 450 ? "end" : "start" }, `threshold ${two(threshold)}`));
  return h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Qualities on a line" }, svg);
}

/** All memories as a table, for those who rather read. */
export function table(bank, titles) {
  const columns = ["Memory", "Quality", "Frequency", "Recency", "Access", "Rating", "Taken", "Last taken", "Retrieved"];
  const part = (entry, term) => (entry.quality_parts ? two(entry.quality_parts[term]) : "–");
  return h("details", { "data-open": "table" }, h("summary", {}, "All memories as a table"), h("p", { class: "hint" }, "A quality is the sum of four parts."), h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "All memories" }, h("table", {},
    h("thead", {}, h("tr", {}, columns.map((text, n) => h("th", { scope: "col", class: n ? "number" : null }, text)))),
    h("tbody", {}, bank.entries.toSorted((a, b) => b.quality - a.quality).map((entry) => h("tr", {},
      h("th", { scope: "row" }, name(titles.get(entry.item_id).title)),
      [two(entry.quality), part(entry, "frequency"), part(entry, "recency"), part(entry, "access"), part(entry, "rating"), habitKept(entry) ?? entry.frequency, day(entry.timestamp), entry.access].map((text) => h("td", { class: "number" }, text))))))));
}
