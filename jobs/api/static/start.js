// The dialog that starts a run.

import { call, post } from "./api.js";
import { ask, el } from "./dom.js";

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
    check: (data) => post("/v1/runs", request(data)),
  });
  if (run) location.hash = `#/run/${encodeURIComponent(run.run_id)}`;
}

function request(data) {
  const text = (name) => data.get(name).trim();
  const body = { plan: data.get("plan"), input: null, priority: Number(text("priority") || 0) };
  if (text("input")) {
    try { body.input = JSON.parse(data.get("input")); } catch (error) {
      throw new Error(`The input is not JSON: ${error.message}`);
    }
  }
  if (text("key")) body.key = text("key");
  if (text("queue")) body.queue = text("queue");
  if (text("deadline")) body.deadline = Number(text("deadline"));
  if (text("not_before")) body.not_before = new Date(text("not_before")).toISOString();
  if (text("tags")) {
    const pairs = text("tags").split(/\s+/).map((pair) => pair.split(/=(.*)/s));
    if (pairs.some((pair) => pair.length < 2)) throw new Error("Tags are written like team=blue order=7");
    body.tags = Object.fromEntries(pairs.map(([name, value]) => [name, value]));
  }
  return body;
}
