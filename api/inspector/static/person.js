// One user: the bank as a picture, how K came about, the list and what speaks for it, and what was forgotten.

import * as client from "./client.js";
import { Diversity } from "./diversity.js";
import { announce, count, h, name, refill, section } from "./dom.js";
import { forgotten, table, timeline } from "./history.js";
import { attributesOf, List, WhatIf } from "./list.js";
import { Picture } from "./picture.js";

const TOP_N = 10, SAMPLE = 200;

export class Person {
  /** `guard` runs what asks the service and says what went wrong; `act` is the button at each recommendation, if any. */
  constructor(guard, act = null) {
    this.guard = guard;
    this.turn = 0;
    this.headline = h("div", { class: "headline" });
    this.picture = new Picture((item) => this.whatIf.toggle(item));
    this.diversity = new Diversity();
    this.whatIf = new WhatIf(() => guard(() => this.refresh()));
    this.list = new List({ pointed: (item, on) => this.picture.point(item, on), visited: (item) => this.picture.visit(item), act });
    this.order = h("div", {});
    this.gone = h("div", {});
    this.element = h("div", { class: "person" },
      this.headline,
      section("The memory", "bank", this.picture.element, "Each dot is an item that was taken, placed by the situation it was taken in."),
      section("Diversity decides how many memories are asked", "adaptive", this.diversity.element),
      section("Recommendations, and why", "list", [this.whatIf.element, this.list.element]),
      section("What was taken", "order", this.order),
      section("What was forgotten", "forgotten", this.gone));
    this.element.classList.add("waiting");
  }

  /** Show another user. */
  async show(user) {
    if (user !== this.user) this.whatIf.clear();
    this.user = user;
    await this.refresh();
  }

  /** Ask anew. Returns {bank, answer}, or null where a later call has overtaken this one. */
  async refresh() {
    const turn = ++this.turn, user = this.user, asked = { user_id: user, top_n: TOP_N }, otherwise = this.whatIf.request();
    const [model, catalogue, bank, usual, other] = await Promise.all([
      this.model ?? client.model(),
      this.catalogue ?? client.search("", SAMPLE),
      client.bank(user).catch(missing),
      client.recommend(asked),
      Object.keys(otherwise).length ? client.recommend({ ...asked, ...otherwise }) : null,
    ]);
    Object.assign(this, { model, catalogue });
    const shown = bank ?? nobody(model), titles = await client.items(named(shown, usual, other));
    if (turn !== this.turn) return null;
    this.draw(shown, titles, usual, other, bank !== null, otherwise.timestamp);
    return { bank: shown, answer: usual, titles };
  }

  /** Whether people come back to what they took, as the model that answers has learned. */
  get takenToo() {
    return this.model.config.rules?.exclude_seen === false;
  }

  draw(bank, titles, usual, other, isKnown, at = Date.now() / 1000) {
    const answer = other ?? usual, used = (answer.memory.memories ?? []).filter((one) => one.scope === "own");
    refill(this.headline, headline(this.user, bank, answer, isKnown));
    this.picture.draw(bank, titles, used, this.whatIf.ignored);
    this.diversity.draw(bank, titles, this.model.config.rules?.clusters);
    this.whatIf.usually(this.takenToo);
    this.whatIf.offer(attributesOf([...titles.values(), ...this.catalogue]));
    this.whatIf.tell(titles, Math.max(bank.k, 1), bank.capacity);
    const taken = new Map(bank.entries.map((entry) => [entry.item_id, entry.timestamp]));
    this.list.draw(answer, titles, other && usual, (item) => (taken.has(item) ? at - taken.get(item) : undefined));
    refill(this.order, bank.log.length ? [timeline(bank, titles), table(bank, titles)] : h("p", { class: "hint" }, "Nothing yet."));
    refill(this.gone, forgotten(bank, titles, this.takenToo));
    this.element.classList.remove("waiting");
    if (other) announce("The list was asked for anew.");
  }
}

/** A user of whom nothing is known has no bank. */
function missing(error) {
  if (error instanceof client.Refused && error.code === "user_not_found") return null;
  throw error;
}

function nobody(model) {
  return { events: 0, entries: [], log: [], clusters: {}, pruned_items: [], pruned: 0, entropy: 0.5, k: 0, threshold: null, position: null, adaptive_k: null, capacity: model.config.rules?.capacity ?? 75, version: 0 };
}

function named(bank, ...answers) {
  const ids = [...bank.entries, ...bank.log, ...bank.pruned_items].map((one) => one.item_id);
  for (const answer of answers.filter(Boolean)) {
    for (const item of answer.items) ids.push(item.item_id, ...(item.because ?? []).map((one) => one.item_id));
  }
  return ids;
}

function headline(user, bank, answer, isKnown) {
  const fact = (number, text) => h("li", {}, h("b", {}, number), ` ${text}`);
  return [
    h("h1", {}, name(user)),
    h("ul", { class: "facts" },
      isKnown
        ? [fact(bank.events.toLocaleString("en"), bank.events === 1 ? "interaction" : "interactions"), fact(`${bank.entries.length} of ${bank.capacity}`, "memories"), fact(bank.entropy.toFixed(2), "entropy"), fact(bank.k, "= K"), fact(`v${bank.version}`, "of the record")]
        : h("li", {}, "Nothing is remembered about this user."),
      bank.share === false && h("li", {}, "not shared with others"),
      h("li", {}, "answered from ", h("b", {}, answer.source)),
      bank.model_version && bank.model_version !== answer.model_version && h("li", {}, `record of model ${bank.model_version}`)),
  ];
}

/** What a change of a bank did, in words. */
export function difference(before, after) {
  const said = [count(after.bank.entries.length, "memory", "memories")];
  if (before) {
    const listed = new Set(before.answer.items.map((item) => item.item_id));
    const fresh = after.answer.items.filter((item) => !listed.has(item.item_id)).length;
    said.push(`entropy ${before.bank.entropy.toFixed(2)} → ${after.bank.entropy.toFixed(2)}`, `K ${before.bank.k} → ${after.bank.k}`, `${fresh} of ${after.answer.items.length} recommendations are new`);
  }
  return said.join(", ");
}
