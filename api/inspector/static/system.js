// How the service does: health of its parts, throughput, where the time goes, banks, entropy and K. From /metrics.

import * as client from "./client.js";
import { count, h, ms, percent, refill, s, section } from "./dom.js";

const EVERY_MS = 2000, KEPT = 60;
const STAGES = { queue: "waiting", encode: "encoding", retrieve: "retrieving", fuse: "fusing", score: "scoring" };

export class SystemView {
  constructor(guard) {
    this.guard = guard;
    this.rates = [];
    this.health = h("ul", { class: "health" });
    this.traffic = h("div", {});
    this.split = h("div", {});
    this.spread = h("div", { class: "histograms" });
    this.model = h("div", {});
    this.element = h("div", { class: "view system waiting" },
      h("div", { class: "head" }, h("h1", {}, "System"), h("p", { class: "hint" }, "As the api process that answers this page counts; Prometheus and Grafana add up those of several.")),
      section("Health", "health", this.health),
      section("Model", "model", this.model),
      section("Throughput", "traffic", this.traffic),
      section("Where the time of a recommendation goes", "split", this.split, "Of a batch of requests answered together, since this process started."),
      section("Users answered from memory", "spread", this.spread, "Since this process started; each bar up to the number below it."));
  }

  async show() {
    clearInterval(this.timer);
    this.timer = setInterval(() => { if (!document.hidden) this.guard(() => this.refresh()); }, EVERY_MS);
    await this.refresh();
  }

  leave() {
    clearInterval(this.timer);
  }

  async refresh() {
    const [text, ready, model] = await Promise.all([client.metrics(), client.ready(), client.model()]);
    const now = { at: performance.now() / 1000, samples: parse(text) };
    const before = this.before && now.at > this.before.at && total(now.samples, "ramrec_api_requests_total") >= total(this.before.samples, "ramrec_api_requests_total") ? this.before : null;
    if (before) this.rates.push(asked(now.samples, before.samples) / (now.at - before.at));
    this.rates = this.rates.slice(-KEPT);
    this.before = now;
    this.draw(now.samples, before?.samples, ready, model);
  }

  draw(now, before, ready, model) {
    refill(this.health, health(ready, now));
    refill(this.traffic, traffic(now, before, this.rates));
    refill(this.split, split(now));
    refill(this.spread, histogram("Entropy", now, "ramrec_api_entropy"), histogram("K, own memories", now, "ramrec_api_k"), histogram("Memories in a bank", now, "ramrec_api_bank_size"));
    refill(this.model, about(model, ready));
    this.element.classList.remove("waiting");
  }
}

/** Prometheus' text format: name → [{labels, value}]. */
export function parse(text) {
  const samples = new Map();
  for (const line of text.split("\n")) {
    const found = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/.exec(line);
    if (!found) continue;
    const labels = Object.fromEntries([...(found[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)].map(([, label, value]) => [label, value]));
    if (!samples.has(found[1])) samples.set(found[1], []);
    samples.get(found[1]).push({ labels, value: found[3] === "+Inf" ? Infinity : Number(found[3]) });
  }
  return samples;
}

const matches = (labels, wanted) => Object.entries(wanted).every(([label, value]) => labels[label] === value);

function total(samples, metric, wanted = {}) {
  return (samples.get(metric) ?? []).filter(({ labels }) => matches(labels, wanted)).reduce((sum, { value }) => sum + value, 0);
}

const ASKED = ["/recommend", "/recommend/batch"];
const asked = (now, before) => ASKED.reduce((sum, route) => sum + total(now, "ramrec_api_requests_total", { route }) - (before ? total(before, "ramrec_api_requests_total", { route }) : 0), 0);

/** [{le, count}] of each bucket by itself; with `before` only what came since. */
function buckets(now, before, metric, wanted = {}) {
  const cumulative = (samples) => new Map((samples?.get(`${metric}_bucket`) ?? []).filter(({ labels }) => matches(labels, wanted)).map(({ labels, value }) => [labels.le, value]));
  const later = cumulative(now), earlier = cumulative(before);
  let below = 0;
  return [...later].map(([le, value]) => [le === "+Inf" ? Infinity : Number(le), value - (earlier.get(le) ?? 0)]).sort((a, b) => a[0] - b[0]).map(([le, value]) => {
    const one = { le, count: value - below };
    below = value;
    return one;
  });
}

/** The q-quantile, between the bounds of its bucket. */
function quantile(all, q) {
  const sum = all.reduce((n, { count: here }) => n + here, 0);
  if (!sum) return NaN;
  let seen = 0, low = 0;
  for (const { le, count: here } of all) {
    if (seen + here >= q * sum && here) return Number.isFinite(le) ? low + (le - low) * ((q * sum - seen) / here) : low;
    seen += here;
    if (Number.isFinite(le)) low = le;
  }
  return low;
}

function health(ready, now) {
  const part = (name, good, text) => h("li", { class: good ? "good" : "bad" }, h("b", {}, `${good ? "✓" : "✗"} ${name}`), h("span", {}, text));
  const degraded = total(now, "ramrec_api_degraded_total"), answers = total(now, "ramrec_api_answers_total");
  const memory = total(now, "process_resident_memory_bytes");
  return [
    part("api", true, memory ? `answers, ${Math.round(memory / 2 ** 20).toLocaleString("en")} MiB` : "answers"),
    part("memory service and Redis", ready.ready, ready.ready ? `ready, answered in ${ms(ready.memory_s)}` : ready.status),
    part("answers with memory", !degraded, degraded ? `${degraded.toLocaleString("en")} of ${answers.toLocaleString("en")} had to do without` : "none had to do without"),
  ];
}

function traffic(now, before, rates) {
  const route = { route: "/recommend" }, latency = buckets(now, before, "ramrec_api_request_seconds", route);
  const some = latency.some((one) => one.count), shown = some ? latency : buckets(now, null, "ramrec_api_request_seconds", route);
  const figure = (value, text) => h("li", {}, h("b", {}, value), h("span", {}, text));
  const sources = ["memory", "encoder", "popularity"].map((source) => [source, total(now, "ramrec_api_answers_total", { source })]);
  const all = sources.reduce((sum, [, value]) => sum + value, 0);
  return [
    h("ul", { class: "figures" },
      figure((rates.at(-1) ?? 0).toFixed(1), "calls for recommendations a second, now"),
      figure(ms(quantile(shown, 0.5)), some ? "median of the last seconds" : "median since the start"),
      figure(ms(quantile(shown, 0.99)), some ? "p99 of the last seconds" : "p99 since the start"),
      figure(total(now, "ramrec_api_interactions_total", { outcome: "accepted" }).toLocaleString("en"), "interactions remembered"),
      figure(percent(total(now, "ramrec_api_hit_rate", { scope: "any" })), "hit rate, as told by feedback")),
    spark(rates),
    h("p", { class: "hint" }, `Calls a second over the last two minutes; at most ${Math.max(...rates, 0).toFixed(1)}.`),
    h("p", {}, "Answered from: ", all ? sources.map(([source, value], n) => [n ? ", " : "", `${source} `, h("b", {}, percent(value / all))]) : "nothing yet", all ? ` of ${count(all, "list")}.` : "."),
  ];
}

function spark(rates) {
  const high = Math.max(...rates, 1), x = (n) => (1200 * (KEPT - rates.length + n)) / (KEPT - 1);
  const points = rates.map((rate, n) => `${x(n).toFixed(1)},${(54 - (48 * rate) / high).toFixed(1)}`).join(" ");
  return s("svg", { class: "spark", viewBox: "0 0 1200 60", preserveAspectRatio: "none", role: "img", "aria-label": `Calls a second over the last two minutes, at most ${high.toFixed(1)}` }, s("path", { class: "axis", d: "M0 57h1200" }), s("polyline", { points }));
}

function split(now) {
  const mean = (stage) => total(now, "ramrec_api_seconds_sum", { stage }) / total(now, "ramrec_api_seconds_count", { stage });
  const stages = Object.entries(STAGES).map(([stage, text]) => [text, mean(stage), quantile(buckets(now, null, "ramrec_api_seconds", { stage }), 0.99)]).filter(([, value]) => Number.isFinite(value));
  const largest = Math.max(...stages.map(([, value]) => value), 1e-9);
  if (!stages.length) return h("p", { class: "hint" }, "No recommendation was asked for yet.");
  return h("ul", { class: "bars" }, stages.map(([text, value, p99]) => h("li", {}, h("span", { class: "label" }, text), h("span", { class: "track", "aria-hidden": "true" }, h("span", { style: { width: `${(100 * value) / largest}%` } })), h("span", { class: "value" }, `${ms(value)} (p99 ${ms(p99)})`))));
}

function histogram(title, now, metric) {
  const every = buckets(now, null, metric), last = every.findLastIndex((one) => one.count);
  const all = every.slice(0, Math.max(last + 2, 5)), sum = all.reduce((n, one) => n + one.count, 0), most = Math.max(...all.map((one) => one.count), 1);
  const mean = sum ? total(now, `${metric}_sum`) / sum : NaN, wide = 300 / Math.max(all.length, 1);
  const label = ({ le }, n) => (Number.isFinite(le) ? String(le) : `>${all[n - 1]?.le ?? 0}`);
  const bars = all.map((one, n) => [
    s("rect", { x: n * wide + 1, y: 90 - (80 * one.count) / most, width: wide - 2, height: (80 * one.count) / most }, s("title", {}, `${label(one, n)}: ${one.count}`)),
    s("text", { x: (n + 0.5) * wide, y: 102 }, label(one, n)),
  ]);
  const said = sum ? `${title}: mean ${mean.toFixed(2)} of ${sum.toLocaleString("en")} answers. ${all.map((one, n) => `${label(one, n)}: ${one.count}`).join(", ")}` : `${title}: no answers yet`;
  return h("figure", {}, h("figcaption", {}, title, " ", h("b", {}, sum ? `mean ${mean.toFixed(2)}` : "–")), s("svg", { viewBox: "0 0 300 106", role: "img", "aria-label": said }, s("path", { class: "axis", d: "M0 90h300" }), bars));
}

function about(model, ready) {
  const moving = ready.moving ? `: ${ready.moving.moved.toLocaleString("en")} of about ${count(ready.moving.users, "user")} moved` : "";
  const { rules, encoder } = model.config;
  const row = (what, value) => h("tr", {}, h("th", { scope: "row" }, what), h("td", {}, value));
  return h("table", {}, h("tbody", {},
    row("serving", h("code", {}, model.model_version)),
    model.wanted !== model.model_version && row("to take over", [h("code", {}, model.wanted), moving]),
    row("items it was trained with", model.items.toLocaleString("en")),
    encoder && row("encoder", `${encoder.layers} layers, dimension ${encoder.dim}, window of ${encoder.window} items`),
    rules && row("a bank holds", `${rules.capacity} memories, ${rules.clusters} kinds of items`),
    rules && row("K of own memories, of others'", `${rules.k_min} to ${rules.k_max}, ${rules.collective_k_min} to ${rules.collective_k_max}`)));
}
