// Elements, and how numbers and times are written. Text from outside only ever becomes text nodes and attributes.

const SVG = "http://www.w3.org/2000/svg";

/** An HTML element. Attributes: `on` maps events to handlers, `style` CSS properties to values; null and false are left out. */
export function h(tag, attributes, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
export function s(tag, attributes, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") for (const [event, handler] of Object.entries(value)) element.addEventListener(event, handler);
    else if (name === "style") for (const [property, to] of Object.entries(value)) element.style.setProperty(property, to);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** A title or id of somebody else's: whatever direction it is written in, it does not reach beyond itself. */
export function name(text) {
  return h("bdi", { class: "name", title: text.length > 40 ? text.slice(0, 1000) : null }, text.slice(0, 300));
}

/** A part of a view under a heading. */
export function section(title, id, content, hint) {
  return h("section", { class: `panel ${id}`, "aria-labelledby": `title-${id}` }, h("h2", { id: `title-${id}` }, title), hint && h("p", { class: "hint" }, hint), content);
}

const PAUSE_MS = 150;

/** What runs a task once nothing more has been typed for a moment. */
export function settled(task) {
  let timer;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(task, PAUSE_MS);
  };
}

/** Put children into a panel; who had the focus there has it again, if it still exists (`data-focus` says who is who), and
 * what was open stays so (`data-open`). */
export function refill(panel, ...children) {
  const held = panel.contains(document.activeElement) ? document.activeElement.dataset.focus : undefined;
  const open = new Set([...panel.querySelectorAll("details[open]")].map((one) => one.dataset.open));
  panel.replaceChildren(...children.flat(Infinity).filter(Boolean));
  for (const details of panel.querySelectorAll("details[data-open]")) details.open = open.has(details.dataset.open);
  if (held === undefined) return;
  const again = [...panel.querySelectorAll("[data-focus]")].find((one) => one.dataset.focus === held);
  (again ?? panel.querySelector("button, input, [tabindex]") ?? document.getElementById("view")).focus({ preventScroll: true });
}

export const two = (value) => value.toFixed(2);
export const count = (value, one, many = `${one}s`) => `${value.toLocaleString("en")} ${value === 1 ? one : many}`;

/** A share: 12 %, 1.3 %, 0.04 %. */
export function percent(share) {
  const of100 = Math.abs(share) * 100;
  const digits = of100 >= 10 || of100 === 0 ? 0 : of100 >= 1 ? 1 : 2;
  if (of100 > 0 && of100 < 0.005) return "<0.01 %";
  return `${(share * 100).toFixed(digits)} %`;
}

export const signed = (share) => `${share < 0 ? "−" : "+"}${percent(Math.abs(share))}`;

/** Milliseconds from seconds. */
export function ms(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  const value = seconds * 1000;
  return `${value >= 100 ? value.toFixed(0) : value.toFixed(value >= 10 ? 1 : 2)} ms`;
}

/** A day of a timestamp in seconds; positions of data without times stay numbers. */
export function day(timestamp) {
  return timestamp < 1e6 ? `no. ${timestamp}` : new Date(timestamp * 1000).toISOString().slice(0, 10);
}

/** Day and minute. */
export function moment(timestamp) {
  return timestamp < 1e6 ? day(timestamp) : `${new Date(timestamp * 1000).toISOString().slice(0, 16).replace("T", " ")} UTC`;
}

/** The colour of an item cluster: hues a golden angle apart, so that clusters of near numbers look unlike. */
export function colour(cluster) {
  if (cluster === null || cluster === undefined) return "var(--unknown)";
  const hue = (cluster * 137.508) % 360;
  return `hsl(${hue.toFixed(0)} var(--cluster-saturation) var(${cluster % 2 ? "--cluster-deep" : "--cluster-light"}))`;
}

/** Say something to screen readers. */
export function announce(text) {
  document.getElementById("status").textContent = text;
}

/** A bubble beside an element while it is pointed at or has the focus. */
export function withTip(element, told) {
  const tip = document.getElementById("tip");
  const show = () => {
    tip.replaceChildren(...[told()].flat(Infinity).filter(Boolean));
    tip.hidden = false;
    const at = element.getBoundingClientRect(), own = tip.getBoundingClientRect();
    const left = Math.min(Math.max(8, at.left + at.width / 2 - own.width / 2), document.documentElement.clientWidth - own.width - 8);
    const above = at.top - own.height - 8;
    tip.style.setProperty("left", `${Math.max(8, left)}px`);
    tip.style.setProperty("top", `${above > 8 ? above : at.bottom + 8}px`);
  };
  const hide = () => { tip.hidden = true; };
  element.addEventListener("pointerenter", show);
  element.addEventListener("pointerleave", hide);
  element.addEventListener("focus", show);
  element.addEventListener("blur", hide);
  return element;
}
