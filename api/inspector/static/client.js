// The public REST API, with the visitor's key where one is needed. Nothing else is ever asked.

/** An answer that says no: an RFC 9457 problem. */
export class Refused extends Error {
  constructor(status, problem) {
    super(problem.detail ?? (typeof problem.status === "string" ? problem.status : `The service answered ${status}.`));
    this.status = status;
    this.code = problem.code ?? "unknown";
  }
}

/** No answer at all. */
export class Unreachable extends Error {}

const TIMEOUT_MS = 15_000;
const KEY = "ramrec-key";
const IDS_A_CALL = 50;
const CHARACTERS_A_CALL = 4000;

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

async function ask(method, path, body) {
  const headers = key.get() ? { Authorization: `Bearer ${key.get()}` } : {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response, text;
  try {
    const options = { method, headers, cache: "no-store", credentials: "omit", signal: AbortSignal.timeout(TIMEOUT_MS) };
    response = await fetch(path, body === undefined ? options : { ...options, body: JSON.stringify(body) });
    text = await response.text();
  } catch {
    throw new Unreachable("The service does not answer.");
  }
  if (!response.ok) throw new Refused(response.status, json(text) ?? {});
  return response.headers.get("content-type")?.startsWith("text/plain") ? text : json(text);
}

function json(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

function user(id) {
  if (id === "." || id === "..") throw new Error("browsers cannot ask for an id of dots only; `ramrec inspect` can.");
  return `users/${encodeURIComponent(id)}/memory`;
}

export const users = async (prefix, limit = 20) =>
  (await ask("GET", `users?limit=${limit}&prefix=${encodeURIComponent(prefix)}`)).users;
export const bank = async (id) => ask("GET", user(id));
export const forget = async (id) => ask("DELETE", user(id));
export const recommend = (request) => ask("POST", "recommend", { explain: true, ...request });
export const many = async (requests) => (await ask("POST", "recommend/batch", { requests })).results;
export const remember = (interaction) => ask("POST", "memories", { interactions: [interaction] });
export const search = async (query, limit = 20) =>
  (await ask("GET", `items?limit=${limit}&query=${encodeURIComponent(query)}`)).items;
export const model = () => ask("GET", "model");
export const metrics = () => ask("GET", "metrics");
export const alive = () => ask("GET", "health/live");

/** {ready, …what the service says}. */
export async function ready() {
  try {
    return { ready: true, ...(await ask("GET", "health/ready")) };
  } catch (error) {
    if (error instanceof Refused) return { ready: false, status: error.message };
    throw error;
  }
}

const known = new Map();

/** What the catalogue says about items, by id; those it does not have are called by their ids. Asked once each. */
export async function items(ids) {
  const wanted = [...new Set(ids)].filter((id) => !known.has(id));
  await Promise.all(portions(wanted).map(async (portion) => {
    const query = portion.map((id) => `id=${encodeURIComponent(id)}`).join("&");
    for (const item of (await ask("GET", `items?${query}`)).items) known.set(item.item_id, item);
  }));
  return new Map(ids.map((id) => [id, known.get(id) ?? { item_id: id, title: id, metadata: {}, cluster: null }]));
}

function* pieces(ids) {
  let piece = [], length = 0;
  for (const id of ids) {
    const more = encodeURIComponent(id).length + 4;
    if (piece.length === IDS_A_CALL || (piece.length && length + more > CHARACTERS_A_CALL)) {
      yield piece;
      [piece, length] = [[], 0];
    }
    piece.push(id);
    length += more;
  }
  if (piece.length) yield piece;
}

const portions = (ids) => [...pieces(ids)];
