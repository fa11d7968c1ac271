// The dialog that retries the failed runs of a list.

import { call, post } from "./api.js";
import { ask, count, el, setText, tell } from "./dom.js";

const AT_ONCE = 100;
const MOST = 100000;

export async function retryFailed({ plan, queue, tag }) {
  const filters = Object.entries({ plan, queue, tag }).filter(([, value]) => value);
  const extent = el("p", { id: "extent", role: "status" });
  const error = el("input", { name: "error", maxlength: "1000", autocomplete: "off", placeholder: "any error", oninput: () => later() });
  const most = el("input", { name: "limit", type: "number", value: "1000", min: "1", max: String(MOST), required: true });
  let asking = 0;
  // Not at every key: a count may read many runs.
  const later = () => { clearTimeout(asking); asking = setTimeout(() => describe().catch(() => undefined), 300); };
  const wish = () => ({ ...(plan && { plan }), ...(queue && { queue }), ...(tag && { tag: [tag] }), ...(error.value.trim() && { error: error.value.trim() }) });
  let described = "";

  async function describe() {
    const wanted = wish();
    const { runs } = await call(`/v1/failed-runs/count?${new URLSearchParams({ ...wanted, limit: MOST })}`);
    if (JSON.stringify(wish()) !== JSON.stringify(wanted)) return 0; // an older answer
    const which = [...filters.map(([name, value]) => `${name} ${value}`), ...(wanted.error ? [`“${wanted.error}” in the error`] : [])];
    const words = which.length ? `, with ${which.join(", ")}` : "";
    setText(extent, runs ? `${runs === MOST ? "At least " : ""}${count(runs, "failed run")}${words}, not retried yet. Each is retried as a new run that takes over what had finished.`
      : `No failed run${words} is left to be retried.`);
    described = JSON.stringify(wanted);
    return runs;
  }

  describe().catch((problem) => setText(extent, problem.message));
  const done = await ask({
    title: "Retry failed runs", verb: "Retry them",
    fields: [el("div", { class: "columns" }, el("label", {}, "Only with this in the error", error), el("label", {}, "At most, oldest first", most)), extent],
    check: async () => {
      const wanted = wish();
      if (JSON.stringify(wanted) !== described) {
        await describe();
        throw new Error("What would be retried has just been counted: read it and confirm again");
      }
      return retry(wanted, Math.min(await describe(), Number(most.value)), extent);
    },
  });
  if (!done) return false;
  const [first] = done.refused;
  tell(`${count(done.started, "run")} retried.${first ? ` ${count(done.refused.length, "run")} could not be: ${first.detail}` : ""}`);
  return true;
}

// No more than there were when it began: a retry that fails at once is a failed run again.
async function retry(wanted, total, extent) {
  let started = 0;
  const refused = [];
  let cursor = null;
  while (started + refused.length < total) {
    const limit = Math.min(AT_ONCE, total - started - refused.length);
    const answer = await post("/v1/failed-runs/retry", { ...wanted, limit, ...(cursor && { cursor }) });
    started += answer.runs.length;
    refused.push(...answer.refused);
    cursor = answer.next;
    setText(extent, `${started + refused.length} of ${total} done.`);
    if (!cursor) break;
  }
  return { started, refused };
}
