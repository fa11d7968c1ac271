// The dialog that starts a run.

import { call, postText } from "./api.js";
import { ask, el, worded } from "./dom.js";
import { object, typed } from "./json.js";

export async function startRun() {
  let plans = [];
  let options = [];
  let refused = null;
  try {
    const [known, document] = await Promise.all([call("/v1/plans"), call("/openapi.json")]);
    plans = known.plans;
    options = Object.entries(document.components.schemas.StartRequest.properties).slice(2).map(option); // after plan and input
  } catch (error) { refused = error; }
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
        el("div", { class: "columns" }, ...options.map(({ node }) => node))),
    ],
    check: (data) => postText("/v1/runs", request(data, options)),
  });
  if (run) location.hash = `#/run/${encodeURIComponent(run.run_id)}`;
}

// A field for an option of a run, as the API describes it, and how its text becomes JSON.
function option([name, about]) {
  const { type, format, enum: choices } = [about, ...(about.anyOf ?? [])].find((each) => each.type && each.type !== "null");
  const input = { name, autocomplete: "off", title: about.description, placeholder: about.description };
  let read = (text) => text;
  if (type === "integer" || type === "number") {
    Object.assign(input, { type: "number", min: about.minimum ?? 0, max: about.maximum, step: type === "integer" ? 1 : "any" });
    read = Number;
  } else if (format === "date-time") {
    input.type = "datetime-local";
    read = (text) => new Date(text).toISOString();
  } else if (type === "object") {
    input.placeholder = "team=blue order=7";
    read = (text) => pairs(name, text);
  }
  const field = choices
    ? el("select", { name, title: about.description }, el("option", {}), ...choices.map((one) => el("option", {}, one)))
    : el("input", input);
  return { name, read, node: el("label", {}, worded(name), field) };
}

function pairs(name, text) {
  const found = text.split(/\s+/).map((pair) => pair.split(/=(.*)/s));
  if (found.some((pair) => pair.length < 2)) throw new Error(`${worded(name)} are written like team=blue order=7`);
  return Object.fromEntries(found.map(([key, value]) => [key, value]));
}

// The JSON text of the request, with the input as it was typed: numbers that this browser would round
// stay what they are.
function request(data, options) {
  const text = (name) => data.get(name).trim();
  const members = { plan: data.get("plan") };
  for (const { name, read } of options) if (text(name)) members[name] = read(text(name));
  const input = typed(text("input") || "null", "The input");
  return object([...Object.entries(members).map(([name, value]) => [name, JSON.stringify(value)]), ["input", input]]);
}
