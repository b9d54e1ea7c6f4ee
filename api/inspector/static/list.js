// Recommendations, the memories that speak for each, and "what if": the same question asked otherwise.

import { count, h, name, percent, refill, signed, two } from "./dom.js";
import { habitNow } from "./habit.js";

const OPERATORS = { any: "is", none: "is not", gte: "at least", lte: "at most" };

/** A list of recommendations. `pointed(item, on)` and `visited(item)` show a memory of the user's elsewhere. */
export class List {
  /** `act`: {label, call(item_id)} of the button at each item, or null. */
  constructor({ pointed, visited, act = null }) {
    Object.assign(this, { pointed, visited, act });
    this.element = h("div", { class: "recommendations" });
  }

  /** `since(item_id)`: how long before the request it was taken last, where that is known. */
  draw(answer, titles, before, since = () => undefined) {
    this.since = since;
    const ranks = before && new Map(before.items.map((item, n) => [item.item_id, n]));
    const gone = before ? before.items.filter((item) => !answer.items.some((one) => one.item_id === item.item_id)) : [];
    refill(this.element,
      h("p", { class: "lead" }, summary(answer)),
      answer.memory.degraded && h("p", { class: "warning" }, "The memory could not be asked, or only in part: this list is made without it."),
      answer.source !== "popularity" && h("p", { class: "hint" }, "The figure at a memory: by how much it raises the item's probability. ", h("span", { class: "tag own" }, "own"), " ", h("span", { class: "tag collective" }, "another user's")),
      before && h("p", { class: "changes" }, changes(answer, ranks, gone, titles)),
      answer.items.length
        ? h("ol", { class: "items" }, answer.items.map((item, n) => this.item(item, n, titles, ranks, answer)))
        : h("p", { class: "hint" }, "Nothing is left to recommend: all was taken, hidden or filtered out."));
  }

  item(item, n, titles, ranks, answer) {
    const largest = Math.exp(answer.items[0].score), p = Math.exp(item.score);
    const reasons = (item.because ?? []).filter((one) => raised(one) > 0);
    const act = this.act && h("button", { type: "button", class: "small", "data-focus": `act-${n}`, "aria-label": `${this.act.label} ${titles.get(item.item_id).title}`, on: { click: () => this.act.call(item.item_id) } }, this.act.label);
    return h("li", {},
      h("div", { class: "what" },
        h("span", { class: "rank" }, n + 1),
        h("span", { class: "title" }, name(titles.get(item.item_id).title)),
        ranks && moved(ranks.get(item.item_id), n),
        h("span", { class: "chance", title: `log P = ${item.score.toFixed(3)}` }, percent(p)), act),
      h("span", { class: "track", "aria-hidden": "true" }, h("span", { style: { width: `${(100 * p) / largest}%` } })),
      reasons.length > 0 && h("p", { class: "because" }, h("span", { class: "hint" }, "speak for it: "), reasons.map((one, m) => this.reason(one, titles, `${n}-${m}`, item.item_id))),
      item.parts && numbers(item, answer));
  }

  /** A habit speaks for its own item only: elsewhere it is told on the side. */
  reason(one, titles, where, speaksFor) {
    const title = titles.get(one.item_id).title, by = signed(raised(one));
    if (one.scope === "collective") {
      return h("span", { class: "reason collective", title: `a memory of other users; whose is never said. ${attention(one)}` }, h("span", { class: "unseen" }, "another user's "), name(title), ` ${by}`);
    }
    const on = (pointed) => () => this.pointed(one.item_id, pointed);
    const habit = one.habit ? habitNow(one.habit, this.since(one.item_id)) : "", itself = habit !== "" && one.item_id === speaksFor;
    return h("button", {
      type: "button", class: itself ? "reason own habit" : "reason own", title: habit && !itself ? `taken ${habit}. ${attention(one)}` : attention(one), "data-focus": `reason-${where}`,
      "aria-label": `${title}, own memory${habit ? `, taken ${habit}: ` : ", "}${by}; show it in the picture`,
      on: { click: () => this.visited(one.item_id), pointerenter: on(true), pointerleave: on(false), focus: on(true), blur: on(false) },
    }, name(title), itself ? `, ${habit}: ${by}` : ` ${by}`);
  }
}

const attention = (one) => `attention ${percent(one.weight)}, similarity ${two(one.similarity)}`;

/** How much a memory raises an item's probability: by its part in the logit, and by what is copied from it. */
export const raised = (one) => Math.exp(one.logit) / (1 - Math.min(one.copied, 1 - 1e-6)) - 1;

function summary(answer) {
  const { own, collective, gate, copying } = answer.memory;
  if (answer.source === "popularity") return ["Nothing is known, so this is ", h("strong", {}, "what is popular"), "."];
  const asked = [h("strong", { class: "own" }, count(own.retrieved, "own memory", "own memories")), " and ", h("strong", { class: "collective" }, `${collective.retrieved} of others`), " were asked. "];
  if (own.retrieved < own.k) asked.push(`K allows ${own.k} of the user's own; ${own.retrieved ? "only these are" : "none is"} similar enough to where the user stands now. `);
  return [...asked, explained("They turn the user's state by", gate, "g, the gate: the share of memory in the state that ranks the items"), "; ",
    explained("copied from others:", copying, "λ: the share of all probability that goes to the items of others' memories"), "."];
}

const explained = (text, value, what) => h("span", { title: what }, `${text} `, h("strong", {}, percent(value)), h("span", { class: "unseen" }, ` (${what})`));

function moved(was, now) {
  if (was === undefined) return h("span", { class: "moved new" }, "new");
  if (was === now) return h("span", { class: "moved" }, h("span", { class: "unseen" }, "unmoved"));
  const steps = Math.abs(was - now);
  return h("span", { class: was > now ? "moved up" : "moved down", "aria-label": `${was > now ? "up" : "down"} ${steps}` }, `${was > now ? "▲" : "▼"} ${steps}`);
}

function changes(answer, ranks, gone, titles) {
  const stays = answer.items.filter((item, n) => ranks.get(item.item_id) === n).length;
  if (!gone.length && stays === answer.items.length) return "Against the default list: nothing moves.";
  const left = gone.map((item, n) => [n ? ", " : "", name(titles.get(item.item_id).title)]);
  return [`Against the default list: ${count(answer.items.length - stays, "place")} of ${answer.items.length} change.`, gone.length ? [" Gone: ", left, "."] : ""];
}

function numbers(item, { memory }) {
  const { state, calibration, memories, copied } = item.parts;
  const rows = state === null
    ? [["copied from others' memories", "all of it: the model itself does not know this item"]]
    : [
        ["what the user's state says", two(state)],
        ["habit of repeating, and what is popular", two(calibration)],
        ["all memories together", memories.toFixed(4)],
        ["minus log Z", `−${two(memory.log_z)}`],
        ["share copied from others' memories", percent(copied)],
      ];
  return h("details", {}, h("summary", {}, "the sum"), h("table", {}, h("tbody", {}, rows.map(([what, value]) => h("tr", {}, h("th", { scope: "row" }, what), h("td", {}, value))), h("tr", {}, h("th", { scope: "row" }, "log of its probability"), h("td", {}, item.score.toFixed(3))))));
}

/** The controls above a list; `changed()` is called whenever `request()` gives something else. */
export class WhatIf {
  constructor(changed) {
    this.changed = changed;
    this.ignored = new Set();
    this.takenToo = false;
    this.conditions = [];
    this.titles = new Map();
    this.own = box("own memories", true, changed);
    this.collective = box("memories of others", true, changed);
    this.seen = box("also what was taken already", false, changed);
    this.auto = box("as the entropy says", true, () => { this.k.disabled = this.auto.firstChild.checked; changed(); });
    this.k = h("input", { type: "range", min: 1, max: 40, value: 10, disabled: true, "aria-label": "K, own memories asked", on: { input: () => this.label(), change: changed } });
    this.kValue = h("output", {}, "10");
    this.at = h("input", { type: "datetime-local", min: "1970-01-01T00:00", max: "9999-12-31T23:59", "aria-describedby": "as-of-hint", on: { change: changed } });
    this.left = h("p", { class: "chips" });
    this.filters = h("div", { class: "filters" });
    this.reset = h("button", { type: "button", class: "small", on: { click: () => { this.clear(); changed(); } } }, "Back to the default");
    this.element = h("details", { class: "what-if" },
      h("summary", {}, "What if …"),
      h("fieldset", {}, h("legend", {}, "Whose memories"), this.own, this.collective),
      h("fieldset", {}, h("legend", {}, "K"), this.auto, this.k, this.kValue),
      h("fieldset", {}, h("legend", {}, "Items"), this.seen, this.filters),
      h("fieldset", {}, h("legend", {}, "Time"), h("label", { class: "box" }, "Ask as of", this.at), h("span", { class: "hint", id: "as-of-hint" }, "UTC; empty: now")),
      h("fieldset", {}, h("legend", {}, "Memories left out"), this.left),
      this.reset);
    this.tell();
  }

  /** Attributes that items have: name → a value of it. */
  offer(attributes) {
    this.attributes = attributes;
    this.tell();
  }

  /** `takenToo`: whether lists hold what was taken already, unless they are asked not to. */
  usually(takenToo) {
    if (takenToo === this.takenToo) return;
    this.takenToo = this.seen.firstChild.checked = takenToo;
  }

  request() {
    const scopes = [this.own.firstChild.checked && "own", this.collective.firstChild.checked && "collective"].filter(Boolean);
    return {
      ...(scopes.length < 2 && { scopes }),
      ...(!this.auto.firstChild.checked && { k: Number(this.k.value) }),
      ...(this.seen.firstChild.checked !== this.takenToo && { exclude_seen: this.takenToo }),
      ...(this.ignored.size && { ignore_memories: [...this.ignored] }),
      ...(this.conditions.length && { filter: filter(this.conditions) }),
      ...(this.moment !== null && { timestamp: this.moment }),
    };
  }

  /** Seconds that are asked for; null: now, or a time that is not typed to its end. */
  get moment() {
    return this.at.value && this.at.validity.valid ? Date.parse(`${this.at.value}Z`) / 1000 : null;
  }

  toggle(item) {
    if (!this.ignored.delete(item)) this.ignored.add(item);
    this.element.open = true;
    this.tell();
    this.changed();
  }

  clear() {
    this.ignored.clear();
    this.conditions = [];
    for (const [one, on] of [[this.own, true], [this.collective, true], [this.seen, this.takenToo], [this.auto, true]]) one.firstChild.checked = on;
    this.k.disabled = true;
    this.at.value = "";
    this.tell();
  }

  /** What is asked for now; `k`: what the entropy says, where the slider starts from. */
  tell(titles = this.titles, k = null, most = 100) {
    this.titles = titles;
    if (k !== null) this.k.max = Math.min(most, 100);
    if (k !== null && this.auto.firstChild.checked) this.k.value = k;
    this.label();
    this.reset.disabled = !Object.keys(this.request()).length;
    refill(this.left, this.ignored.size
      ? [...this.ignored].map((item) => chip(name(this.titles.get(item)?.title ?? item), `count ${this.titles.get(item)?.title ?? item} again`, () => this.toggle(item)))
      : h("span", { class: "hint" }, "none; choose a memory in the picture"));
    refill(this.filters,
      this.conditions.map((one, n) => chip([name(one.attribute), ` ${OPERATORS[one.operator]} `, name(String(one.value))], "drop this condition", () => { this.conditions.splice(n, 1); this.tell(); this.changed(); })),
      this.attributes?.size ? this.adder() : h("span", { class: "hint" }, "the items have no attributes to filter by"));
  }

  label() {
    this.kValue.textContent = this.auto.firstChild.checked ? "" : this.k.value;
  }

  adder() {
    const pick = (label, options) => h("select", { "aria-label": label }, options.map(([value, text]) => h("option", { value }, text)));
    const attribute = pick("attribute", [...this.attributes.keys()].map((one) => [one, one.slice(0, 40)]));
    const operator = pick("condition", Object.entries(OPERATORS));
    const value = h("input", { type: "text", "aria-label": "value", size: 10, required: true });
    const hint = () => { value.placeholder = String(this.attributes.get(attribute.value) ?? "").slice(0, 20); };
    attribute.addEventListener("change", hint);
    hint();
    const add = (event) => {
      event.preventDefault();
      const number = typeof this.attributes.get(attribute.value) === "number" && value.value.trim() !== "" && Number.isFinite(Number(value.value));
      this.conditions.push({ attribute: attribute.value, operator: operator.value, value: number ? Number(value.value) : value.value });
      this.tell();
      this.changed();
    };
    return h("form", { class: "adder", on: { submit: add } }, attribute, operator, value, h("button", { class: "small" }, "Only these"));
  }
}

function box(text, checked, changed) {
  return h("label", { class: "box" }, h("input", { type: "checkbox", checked, on: { change: changed } }), text);
}

const chip = (text, label, drop) => h("span", { class: "chip" }, text, h("button", { type: "button", "aria-label": label, "data-focus": label, on: { click: drop } }, "×"));

function filter(conditions) {
  const wanted = {};
  for (const { attribute, operator, value } of conditions) {
    const of = (wanted[attribute] ??= {});
    if (operator === "any" || operator === "none") (of[operator] ??= []).push(value);
    else of[operator] = value;
  }
  return wanted;
}

/** Attributes of some items, and a value of each. */
export function attributesOf(items) {
  const found = new Map();
  for (const { metadata } of items) {
    for (const [attribute, value] of Object.entries(metadata ?? {})) {
      const one = Array.isArray(value) ? value[0] : value;
      if (["string", "number"].includes(typeof one) && !found.has(attribute)) found.set(attribute, one);
    }
  }
  return found;
}
