// The bank as a picture: a memory is a dot where it was made, and the user's present state is the cross.

import { colour, day, h, name, percent, refill, s, two, withTip } from "./dom.js";
import { habitKept } from "./habit.js";

const WIDTH = 600, HEIGHT = 520, EDGE = 34;
const LEAST_SPAN = 0.3;

/** Draws banks into a panel of its own. `chosen(item_id)` is called when a memory is picked. */
export class Picture {
  constructor(chosen) {
    this.lines = s("g", { "aria-hidden": "true" });
    this.dots = s("g", { role: "listbox", "aria-label": "Memories; arrow keys move through them, Enter leaves one out" });
    this.cross = s("g", { class: "standing", "aria-hidden": "true" });
    this.empty = s("text", { class: "empty", x: WIDTH / 2, y: HEIGHT / 2 }, "No memories yet");
    this.svg = s("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "picture" }, this.lines, this.dots, this.cross, this.empty);
    this.element = h("div", {}, this.svg, legend());
    this.chosen = chosen;
    this.svg.addEventListener("keydown", (event) => this.move(event));
  }

  /** `used`: own memories behind the list, with similarity and attention; `ignored`: ids of those left out. */
  draw(bank, titles, used, ignored) {
    const placed = bank.entries.filter((entry) => entry.position !== null).sort((a, b) => b.quality - a.quality);
    const place = scale([...placed.map((entry) => entry.position), ...(bank.position ? [bank.position] : [])]);
    const at = apart(placed.map((entry) => place(entry.position)), placed.map((entry) => radius(entry.quality)));
    const attention = new Map(used.map((one) => [one.item_id, one]));
    const strongest = Math.max(...used.map((one) => one.weight), 1e-9);
    this.empty.toggleAttribute("hidden", placed.length > 0);
    refill(this.dots, placed.map((entry, n) => this.dot(entry, titles.get(entry.item_id), at[n], attention.get(entry.item_id), ignored)));
    this.dots.firstChild?.setAttribute("tabindex", "0");
    const standing = bank.position && placed.length ? place(bank.position) : null;
    refill(this.lines, standing && placed.map((entry, n) => {
      if (!attention.has(entry.item_id)) return null;
      const [x, y] = at[n], share = attention.get(entry.item_id).weight / strongest;
      return s("line", { x1: standing[0], y1: standing[1], x2: x, y2: y, "stroke-opacity": two(0.15 + 0.6 * share), "stroke-width": two(0.7 + 2.3 * share) });
    }));
    refill(this.cross, standing && [
      s("circle", { cx: standing[0], cy: standing[1], r: 9 }),
      s("path", { d: `M${standing[0] - 5} ${standing[1]}h10M${standing[0]} ${standing[1] - 5}v10` }),
      s("text", { x: standing[0] + 13, y: standing[1] + 4 }, "now"),
    ]);
  }

  dot(entry, item, [x, y], attention, ignored) {
    const out = ignored.has(entry.item_id);
    const said = `${item.title}: quality ${two(entry.quality)}, of ${day(entry.timestamp)}${habitKept(entry) ? `, ${taken(entry)}` : ""}${attention ? `, retrieved, attention ${percent(attention.weight)}` : ""}${out ? ", left out" : ""}`;
    const marks = ["dot", attention && "used", out && "out"].filter(Boolean).join(" ");
    const dot = s("g", { class: marks, role: "option", tabindex: "-1", "data-item": entry.item_id, "data-focus": entry.item_id, "aria-label": said, "aria-selected": attention ? "true" : "false", style: { transform: `translate(${two(x)}px, ${two(y)}px)` }, on: { click: () => this.chosen(entry.item_id) } },
      s("circle", { r: two(radius(entry.quality)), "fill-opacity": two(0.3 + 0.7 * entry.recency), style: { fill: colour(entry.cluster) } }),
      attention && s("circle", { class: "ring", r: two(radius(entry.quality) + 3) }));
    return withTip(dot, () => about(entry, item, attention, out));
  }

  /** Arrow keys, Home and End go from memory to memory, Enter and space pick one. */
  move(event) {
    const dots = [...this.dots.children], at = dots.indexOf(document.activeElement);
    if (at < 0) return;
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      this.chosen(dots[at].dataset.item);
      return;
    }
    const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: dots.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    const next = dots[Math.min(Math.max(to, 0), dots.length - 1)];
    dots[at].setAttribute("tabindex", "-1");
    next.setAttribute("tabindex", "0");
    next.focus();
  }

  /** Make one memory stand out while something that names it is pointed at. */
  point(item, on) {
    for (const dot of this.dots.children) if (dot.dataset.item === item) dot.classList.toggle("pointed", on);
    this.svg.classList.toggle("pointing", on && [...this.dots.children].some((dot) => dot.dataset.item === item));
  }

  /** Go to a memory. */
  visit(item) {
    const dot = [...this.dots.children].find((one) => one.dataset.item === item);
    dot?.focus();
  }
}

const taken = (entry) => `taken ${habitKept(entry) ?? `${entry.frequency}×`}`;
const radius = (quality) => 2.5 + 15 * quality;

function about(entry, item, attention, out) {
  const parts = entry.quality_parts;
  return [
    h("p", {}, h("strong", {}, name(item.title))),
    h("p", {}, `quality ${two(entry.quality)}`, parts && ` = ${Object.entries(parts).filter(([, value]) => value > 0.004).map(([term, value]) => `${term} ${two(value)}`).join(" + ")}`),
    h("p", {}, `${day(entry.timestamp)} · ${taken(entry)} · retrieved ${entry.access}×${entry.rating === null ? "" : ` · rated ${entry.rating}`}`),
    attention && h("p", {}, `retrieved for this list: similarity ${two(attention.similarity)}, attention ${percent(attention.weight)}`),
    h("p", { class: "hint" }, out ? "left out; choose it to count it again" : "choose it to see the list without it"),
  ];
}

/** From the plane of the keys to the picture: one scale for both directions, all points inside. */
function scale(points) {
  if (!points.length) return () => [WIDTH / 2, HEIGHT / 2];
  const low = [0, 1].map((axis) => Math.min(...points.map((point) => point[axis])));
  const high = [0, 1].map((axis) => Math.max(...points.map((point) => point[axis])));
  const span = [0, 1].map((axis) => Math.max(high[axis] - low[axis], LEAST_SPAN));
  const factor = Math.min((WIDTH - 2 * EDGE) / span[0], (HEIGHT - 2 * EDGE) / span[1]);
  return (point) => [
    WIDTH / 2 + factor * (point[0] - (low[0] + high[0]) / 2),
    HEIGHT / 2 - factor * (point[1] - (low[1] + high[1]) / 2),
  ];
}

const STEPS = 40, TOUCH = 0.8, FARTHEST = 16;

/** Points moved apart where their circles would hide each other, none farther than a little. */
function apart(points, radii) {
  const moved = points.map((point) => [...point]);
  for (let step = 0; step < STEPS; step++) {
    for (let a = 0; a < moved.length; a++) {
      for (let b = a + 1; b < moved.length; b++) {
        const [dx, dy] = [moved[b][0] - moved[a][0], moved[b][1] - moved[a][1]];
        const wanted = TOUCH * (radii[a] + radii[b]), distance = Math.hypot(dx, dy);
        if (distance >= wanted) continue;
        const angle = distance > 1e-6 ? Math.atan2(dy, dx) : 2.4 * b;
        const push = (wanted - distance) / 4;
        for (const [one, sign] of [[a, -1], [b, 1]]) {
          moved[one][0] += sign * push * Math.cos(angle);
          moved[one][1] += sign * push * Math.sin(angle);
        }
      }
    }
    moved.forEach((point, n) => {
      const [dx, dy] = [point[0] - points[n][0], point[1] - points[n][1]], far = Math.hypot(dx, dy);
      if (far > FARTHEST) moved[n] = [points[n][0] + (dx * FARTHEST) / far, points[n][1] + (dy * FARTHEST) / far];
    });
  }
  return moved;
}

function legend() {
  const circle = (attributes, r) => s("svg", { viewBox: "-12 -12 24 24", width: 20, height: 20, "aria-hidden": "true" }, s("circle", { r, ...attributes }));
  const entry = (sign, text) => h("li", {}, sign, text);
  return h("ul", { class: "legend" },
    entry([circle({ class: "sample" }, 4), circle({ class: "sample" }, 9)], "larger: higher quality"),
    entry([circle({ class: "sample", "fill-opacity": 0.25 }, 7)], "faded: old"),
    entry([s("svg", { viewBox: "-12 -12 24 24", width: 20, height: 20, class: "picture", "aria-hidden": "true" }, s("circle", { class: "sample", r: 6 }), s("circle", { class: "ring", r: 9.5 }))], "ringed: retrieved for the list"),
    entry([], "near each other: taken in like situations (dots that hid each other are moved apart a little)"),
    entry([], "colour: kind of item"));
}
