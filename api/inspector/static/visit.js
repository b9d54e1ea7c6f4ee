// Be a brand-new user: take items, and watch memory, entropy, K and recommendations follow.

import * as client from "./client.js";
import { announce, h, name, refill, section, settled } from "./dom.js";
import { difference, Person } from "./person.js";

const VISITOR = "ramrec-visitor", FOUND = 12;

/** The id of this tab's visitor: random, and kept until forgotten. */
function visitor() {
  const kept = sessionStorage.getItem(VISITOR);
  if (kept) return kept;
  const made = `visitor-${[...crypto.getRandomValues(new Uint8Array(6))].map((byte) => byte.toString(16).padStart(2, "0")).join("")}`;
  sessionStorage.setItem(VISITOR, made);
  return made;
}

export class VisitView {
  constructor(guard) {
    this.guard = guard;
    this.person = new Person(guard, { label: "Take", call: (item) => guard(() => this.take(item)) });
    this.input = h("input", { id: "item-search", type: "search", autocomplete: "off", placeholder: "title, genre, id …", on: { input: settled(() => guard(() => this.suggest())) } });
    this.found = h("ul", { class: "catalogue" });
    this.heard = h("p", { class: "heard" }, "Take something that you like.");
    this.out = h("button", { type: "button", class: "danger", on: { click: () => guard(() => this.forget()) } }, "Forget me");
    this.element = h("div", { class: "view visit" },
      section("Take items as somebody new", "picker", [
        h("form", { role: "search", on: { submit: (event) => event.preventDefault() } }, h("label", { for: "item-search" }, "Search the catalogue"), this.input),
        this.heard, this.found, this.out,
      ], "Each one is sent to POST /memories and counts from the next request on; nothing is trained."),
      this.person.element);
  }

  async show() {
    this.last = null;
    await Promise.all([this.suggest(), this.follow()]);
  }

  refresh() {
    return this.show();
  }

  async follow() {
    this.person.user = visitor();
    const now = await this.person.refresh();
    if (now) this.last = now;
    this.out.disabled = !this.last?.bank.entries.length;
    return now;
  }

  async take(item) {
    const before = this.last, title = (await client.items([item])).get(item).title;
    const kept = await client.remember({ user_id: visitor(), item_id: item });
    if (kept.rejected.length) throw new Error(kept.rejected[0].detail);
    const after = await this.follow();
    if (!after) return;
    const said = difference(before, after);
    refill(this.heard, "You took ", h("strong", {}, name(title)), `: ${said}.`);
    announce(`You took ${title}: ${said}.`);
  }

  async forget() {
    const gone = await client.forget(visitor());
    sessionStorage.removeItem(VISITOR);
    this.person.whatIf.clear();
    await this.show();
    const said = gone.existed ? "You are forgotten: memories, log and everything else about you are gone." : "Nothing was known about you.";
    refill(this.heard, said);
    announce(said);
  }

  /** What is searched for; before that, what is popular. */
  async suggest() {
    const typed = this.input.value.trim();
    const found = typed ? await client.search(typed, FOUND) : await popular();
    if (typed !== this.input.value.trim()) return;
    const button = (item, n) => h("li", {}, h("button", { type: "button", "data-focus": `item-${n}`, on: { click: () => this.guard(() => this.take(item.item_id)) } }, h("span", { class: "unseen" }, "Take "), name(item.title)));
    refill(this.found, found.length ? found.map(button) : h("li", { class: "hint" }, "Nothing in the catalogue has that."));
  }
}

async function popular() {
  const ids = (await client.recommend({ top_n: FOUND })).items.map((item) => item.item_id);
  return [...(await client.items(ids)).values()];
}
