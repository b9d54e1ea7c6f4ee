// Which view is shown, what happens when the service says no or nothing, the key and the theme.

import * as client from "./client.js";
import { announce, h } from "./dom.js";
import { SystemView } from "./system.js";
import { UsersView } from "./users.js";
import { VisitView } from "./visit.js";

const RETRY_MS = 1500;
const THEMES = ["auto", "light", "dark"];
const VIEWS = { users: UsersView, try: VisitView, system: SystemView };
const made = {};
const place = document.getElementById("view"), outage = document.getElementById("outage");
let current = null, waiting = null;

/** Run what asks the service. What goes wrong is said; once the service is back the view is asked for anew. */
async function guard(task) {
  try {
    const done = await task();
    if (!waiting) outage.hidden = true;
    return done;
  } catch (error) {
    if (error instanceof client.Unreachable) comeBack("The service does not answer. Trying again …", client.alive);
    else if (error instanceof client.Refused) refused(error);
    else say(`Something went wrong: ${error.message}`);
    return undefined;
  }
}

function refused(error) {
  if (error.status === 401 || error.status === 403) return askKey(error.message);
  if (error.status === 503 || error.status === 429) return comeBack(`${error.message} Trying again …`, itIsReady);
  return say(error.message);
}

async function itIsReady() {
  const { ready, status } = await client.ready();
  if (!ready) throw new Error(status);
}

function say(text) {
  outage.textContent = text;
  outage.hidden = false;
}

/** Until `probe` succeeds; then everything is asked for anew. */
function comeBack(text, probe) {
  say(text);
  if (waiting) return;
  const again = async () => {
    try {
      await probe();
    } catch {
      waiting = setTimeout(again, RETRY_MS);
      return;
    }
    waiting = null;
    outage.hidden = true;
    announce("The service answers again.");
    await guard(() => current.refresh());
  };
  waiting = setTimeout(again, RETRY_MS);
}

// ------------------------------------------------------------------------------------------- views

function route() {
  const [, wanted, ...rest] = location.hash.split("/");
  const view = VIEWS[wanted] ? wanted : "users";
  if (current && current !== made[view]) current.leave?.();
  const first = !made[view];
  current = made[view] ??= new VIEWS[view](guard);
  if (place.firstChild !== current.element) place.replaceChildren(current.element);
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#/${view}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${{ users: "Users", try: "Try it", system: "System" }[view]} · RAMRec inspector`;
  if (!first) place.focus({ preventScroll: true });
  guard(() => current.show(decoded(rest.join("/"))));
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

// ------------------------------------------------------------------------------------- key and theme

const dialog = document.getElementById("key-dialog");

function askKey(why) {
  document.getElementById("key-why").textContent = why;
  if (dialog.open) return;
  dialog.returnValue = "";
  dialog.showModal();
}

dialog.addEventListener("close", () => {
  const input = document.getElementById("key-input");
  if (dialog.returnValue === "ok") {
    client.key.set(input.value.trim());
    guard(() => current.refresh());
  }
  input.value = "";
  tellKey();
});

function tellKey() {
  document.getElementById("key-button").textContent = client.key.get() ? "API key ✓" : "API key";
}

const themeButton = document.getElementById("theme-button");

function wear(theme) {
  document.documentElement.dataset.theme = theme;
  themeButton.textContent = `Theme: ${theme}`;
}

themeButton.addEventListener("click", () => {
  const next = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length];
  localStorage.setItem("ramrec-theme", next);
  wear(next);
});
document.getElementById("key-button").addEventListener("click", () => askKey("Leave it empty to forget the key."));
document.getElementById("key-cancel").addEventListener("click", () => dialog.close());
window.addEventListener("hashchange", route);
wear(THEMES.includes(localStorage.getItem("ramrec-theme")) ? localStorage.getItem("ramrec-theme") : "auto");
tellKey();
place.append(h("p", { class: "hint" }, "Loading …"));
route();
