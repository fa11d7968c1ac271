// The dialog that removes runs that ended long ago.

import { call, post } from "./api.js";
import { ask, count, el, setText, tell } from "./dom.js";

export const ENDS = ["completed", "failed", "cancelled"];
const UNITS = { seconds: 1, minutes: 60, hours: 3600, days: 86400 };

export async function cleanRuns(state) {
  const extent = el("p", { id: "extent", role: "status" });
  const numbers = (name, value, least, most) => el("input", { name, type: "number", value, min: least, max: most, required: true, oninput: () => later() });
  let asking = 0;
  // Not at every key: a count reads all runs of its namespace.
  const later = () => { clearTimeout(asking); asking = setTimeout(() => describe().catch(() => undefined), 300); };
  const choice = (name, items, chosen) => el("select", { name, onchange: () => later() },
    ...items.map((item) => el("option", { selected: item === chosen }, item)));
  const ended = choice("state", ENDS, ENDS.includes(state) ? state : "completed");
  const old = numbers("age", "7", "0", "3649");
  const unit = choice("unit", Object.keys(UNITS), "days");
  const most = numbers("limit", "1000", "1", "100000");
  const wish = () => ({ state: ended.value, older_than: Number(old.value) * UNITS[unit.value], limit: Number(most.value) });
  let described = "";

  const counted = ({ state: end, older_than }) => call(`/v1/finished-runs?${new URLSearchParams({ state: end, older_than })}`);

  async function describe() {
    if (![old, most].every((input) => input.checkValidity())) return;
    const wanted = wish();
    const { runs, events } = await counted(wanted);
    if (JSON.stringify(wish()) !== JSON.stringify(wanted)) return; // an older answer
    const since = `ended ${old.value} ${unit.value} ago or earlier`;
    setText(extent, runs === 0 ? `No ${wanted.state} run ${since}: nothing is taken away.`
      : `${count(runs, `${wanted.state} run`)} with ${count(events, "event")} ${since}, in all plans and queues. `
        + `${runs <= wanted.limit ? "All of this is" : wanted.limit === 1 ? "The oldest run is" : `The ${wanted.limit} oldest runs are`} taken away for good, with all events.`);
    described = JSON.stringify(wanted);
  }

  describe().catch(() => undefined);
  const done = await ask({
    title: "Clean up runs that ended",
    fields: [
      el("div", { class: "columns" }, el("label", {}, "State", ended), el("label", {}, "At most, oldest first", most),
        el("label", {}, "Ended so long ago", old), el("label", {}, "Unit", unit)), extent],
    verb: "Clean up", danger: true,
    check: async () => {
      const wanted = wish();
      if (JSON.stringify(wanted) !== described) {
        await describe();
        throw new Error("What would be taken away has just been counted: read it and confirm again");
      }
      return { wanted, ...await post("/v1/finished-runs/clean", wanted) };
    },
  });
  if (!done) return false;
  const left = await counted(done.wanted).then(({ runs }) => `, ${runs} that ended as long ago left`, () => "");
  tell(`${count(done.removed, `${done.wanted.state} run`)} removed${left}.`);
  return true;
}
