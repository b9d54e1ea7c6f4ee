// How often something is taken, and when, in words; `api/commands/inspect/text.py` says the same. Times in seconds.

const MINUTE = 60, HOUR = 3600, DAY = 86400;
const UNITS = [["year", 365.25 * DAY], ["month", 30.44 * DAY], ["week", 7 * DAY], ["day", DAY], ["hour", HOUR], ["minute", MINUTE]];
const DAYS = ["Mondays", "Tuesdays", "Wednesdays", "Thursdays", "Fridays", "Saturdays", "Sundays"];
const CALENDAR = 1e6;

/** [number, unit]: the largest unit that says it well; null below a minute. */
function measured(seconds) {
  for (const [unit, length] of UNITS) {
    const number = seconds / length;
    if (number >= 1.95 || (number >= 0.95 && (number <= 1.05 || unit === "minute"))) return [Math.floor(number + 0.5), unit];
  }
  return null;
}

const spelled = ([number, unit]) => `${number.toLocaleString("en")} ${unit}${number === 1 ? "" : "s"}`;
const times = (number) => (number === 1 ? "once" : number === 2 ? "twice" : `${number.toLocaleString("en")} times`);

/** 3 days ago. */
export function ago(seconds) {
  const how = measured(Math.abs(seconds));
  return how === null ? "a moment ago" : `${spelled(how)} ${seconds < 0 ? "ahead" : "ago"}`;
}

function rhythm(count, gap) {
  const how = measured(gap);
  if (how === null) return "seconds apart";
  if (count === 2) return `${spelled(how)} apart`;
  return `every ${how[0] === 1 ? how[1] : spelled(how)}`;
}

function last(count, since) {
  return since === null ? [] : [count === 1 ? ago(since) : `last ${ago(since)}`];
}

function usually(hour, day) {
  if (hour === null && day === null) return [];
  const on = day === null ? "" : ` on ${DAYS[Math.floor(day) % 7]}`;
  return [`usually${on}${hour === null ? " (UTC)" : ` around ${String(Math.floor(hour + 0.5) % 24).padStart(2, "0")}:00 UTC`}`];
}

/** An entry of the bank; null where the service says nothing about habits, or the data has no times. */
export function habitKept(entry, now = Date.now() / 1000) {
  if (entry.first_time === undefined || entry.timestamp < CALENDAR) return null;
  const { frequency: count, mean_gap_s: gap = null, usual_hour: hour = null, usual_day: day = null } = entry;
  return [times(count), ...(count > 1 && gap ? [rhythm(count, gap)] : []), ...last(count, now - entry.timestamp), ...(count > 1 ? usually(hour, day) : [])].join(", ");
}

/** What a memory that speaks for an item tells at the time of the request. `since`: how long ago it was, where the model
 * looks no further back than `habit.since_s`. */
export function habitNow(habit, since = habit.since_s) {
  const { count, at_this_hour: hour, on_this_day: day } = habit;
  const when = [day && "on this day of the week", hour && "at this hour"].filter(Boolean);
  return [times(count), ...last(count, habit.since_s === null ? null : Math.max(habit.since_s, since ?? 0)), ...(when.length ? [`usually ${when.join(" and ")}`] : [])].join(", ");
}
