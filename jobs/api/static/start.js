// The dialog that starts a run.

import { call, postText } from "./api.js";
import { ask, el } from "./dom.js";
import { object, offence } from "./json.js";

export async function startRun() {
  let plans = [];
  let refused = null;
  try { plans = (await call("/v1/plans")).plans; } catch (error) { refused = error; }
  if (refused || document.querySelector("dialog")) return;
  const steps = el("p", { class: "soft" });
  const plan = el("select", { name: "plan", required: true, onchange: () => describe() },
    ...plans.map((one) => el("option", {}, one.name)));
  const describe = () => {
    const found = plans.find((one) => one.name === plan.value);
    steps.textContent = found ? found.steps.join(" → ") : "";
  };
  describe();
  const run = await ask({
    title: "Start a run",
    verb: "Start",
    fields: [
      el("label", {}, "Plan", plan), steps,
      el("label", {}, "Input, as JSON", el("textarea", { name: "input", rows: "5", spellcheck: "false", placeholder: "null" })),
      el("details", {}, el("summary", {}, "More"),
        el("div", { class: "columns" },
          el("label", {}, "Key", el("input", { name: "key", autocomplete: "off", placeholder: "starts once, however often asked" })),
          el("label", {}, "Queue", el("input", { name: "queue", autocomplete: "off", placeholder: "the plan's own" })),
          el("label", {}, "Tags", el("input", { name: "tags", autocomplete: "off", placeholder: "team=blue order=7" })),
          el("label", {}, "Not before", el("input", { name: "not_before", type: "datetime-local" })),
          el("label", {}, "Deadline, seconds", el("input", { name: "deadline", type: "number", min: "1" })),
          el("label", {}, "Priority", el("input", { name: "priority", type: "number", min: "0", max: "9", value: "0" })))),
    ],
    check: (data) => postText("/v1/runs", request(data)),
  });
  if (run) location.hash = `#/run/${encodeURIComponent(run.run_id)}`;
}

// The JSON text of the request, with the input as it was typed: numbers that this browser would round
// stay what they are.
function request(data) {
  const text = (name) => data.get(name).trim();
  const members = { plan: data.get("plan"), priority: Number(text("priority") || 0) };
  if (text("key")) members.key = text("key");
  if (text("queue")) members.queue = text("queue");
  if (text("deadline")) members.deadline = Number(text("deadline"));
  if (text("not_before")) members.not_before = new Date(text("not_before")).toISOString();
  if (text("tags")) {
    const pairs = text("tags").split(/\s+/).map((pair) => pair.split(/=(.*)/s));
    if (pairs.some((pair) => pair.length < 2)) throw new Error("Tags are written like team=blue order=7");
    members.tags = Object.fromEntries(pairs.map(([name, value]) => [name, value]));
  }
  const input = text("input") || "null";
  try { JSON.parse(input); } catch (error) { throw new Error(`The input is not JSON: ${error.message}`); }
  const wrong = offence(input);
  if (wrong !== null) throw new Error(`The input cannot be stored as it is: ${wrong}`);
  return object([...Object.entries(members).map(([name, value]) => [name, JSON.stringify(value)]), ["input", input]]);
}
