// Find a user, and look into their memory.

import * as client from "./client.js";
import { count, h, name, refill, settled, two } from "./dom.js";
import { Person } from "./person.js";

const SAMPLE = 100, SHOWN = 12;
const address = (user) => `#/users/${encodeURIComponent(user)}`;

export class UsersView {
  constructor(guard) {
    this.input = h("input", { id: "user-search", type: "search", autocomplete: "off", spellcheck: "false", placeholder: "user id, or its beginning", on: { input: settled(() => guard(() => this.suggest())) } });
    this.found = h("ul", { class: "found", "aria-label": "Users found" });
    this.welcome = h("div", { class: "welcome" });
    this.person = new Person(guard);
    this.element = h("div", { class: "view" },
      h("form", { class: "search", role: "search", on: { submit: (event) => this.open(event) } }, h("label", { for: "user-search" }, "User"), this.input, h("button", { class: "main" }, "Show"), this.found),
      this.welcome, this.person.element);
  }

  async show(user) {
    this.person.element.hidden = !user;
    this.welcome.hidden = Boolean(user);
    refill(this.found);
    if (user) {
      this.input.value = user;
      await this.person.show(user);
    } else {
      await this.greet();
    }
  }

  refresh() {
    return this.welcome.hidden ? this.person.refresh() : this.greet();
  }

  open(event) {
    event.preventDefault();
    if (this.input.value) location.hash = address(this.input.value);
  }

  async suggest() {
    const typed = this.input.value, users = typed ? await client.users(typed, 8) : [];
    if (typed !== this.input.value) return;
    refill(this.found, users.map((user) => h("li", {}, h("a", { href: address(user) }, name(user)))));
  }

  /** Some users from narrow to diverse, to begin with. */
  async greet() {
    const users = await client.users("", SAMPLE);
    const answers = users.length ? await client.many(users.map((user) => ({ user_id: user, top_n: 1, explain: true }))) : [];
    const sorted = answers.filter((one) => one.memory.bank_size > 1).sort((a, b) => a.memory.entropy - b.memory.entropy);
    const step = Math.max(1, (sorted.length - 1) / (SHOWN - 1));
    const some = [...new Set(Array.from({ length: Math.min(SHOWN, sorted.length) }, (_, n) => sorted[Math.round(n * step)]))];
    refill(this.welcome,
      h("h1", {}, "What does RAMRec remember?"),
      h("p", {}, "Every interaction becomes a memory outside the model. For each list the service looks at how diverse a user's memories are (entropy), asks more of them the more diverse they are (adaptive K), and lets those speak. Choose a user to see it, or ", h("a", { href: "#/try" }, "try it as somebody new"), "."),
      some.length
        ? h("div", { class: "scroll" }, h("table", { class: "sample" },
          h("caption", {}, `${some.length} of ${count(users.length, "user")}, from the narrowest taste to the most diverse`),
          h("thead", {}, h("tr", {}, ["User", "Entropy", "Memories", "K: asked for each list"].map((text) => h("th", { scope: "col", class: text === "Memories" ? "number" : null }, text)))),
          h("tbody", {}, some.map(row))))
        : h("p", { class: "hint" }, "Nobody is known yet: send interactions to POST /memories, or run ramrec ingest."));
  }
}

function row({ user_id: user, memory }) {
  return h("tr", {},
    h("th", { scope: "row" }, h("a", { href: address(user) }, name(user))),
    h("td", {}, h("span", { class: "track", "aria-hidden": "true" }, h("span", { style: { width: `${100 * memory.entropy}%` } })), ` ${two(memory.entropy)}`),
    h("td", { class: "number" }, memory.bank_size),
    h("td", {}, h("span", { class: "track own", "aria-hidden": "true" }, h("span", { style: { width: `${Math.min(100, 4 * memory.k)}%` } })), ` ${memory.k}`));
}
