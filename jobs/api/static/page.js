"use strict";
// Everything shown is put in as text, never as markup: names and results come from users.

const main = document.getElementById("main");
const status = document.getElementById("status");
const STATES = ["queued", "running", "completed", "failed", "cancelled"];
let leave = () => {};

function el(tag, attributes = {}, ...children) {
  const svg = ["svg", "rect", "title"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag)
                   : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function token() { return sessionStorage.getItem("token"); }

async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (token()) headers.Authorization = `Bearer ${token()}`;
  if (options.body) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, { ...options, headers });
  if (answer.status === 401) { await login(); return call(path, options); }
  const body = answer.status === 204 ? null : await answer.json();
  if (!answer.ok) throw new Error(body.detail || answer.statusText);
  return body;
}

function login() {
  const dialog = document.getElementById("login");
  if (!dialog.open) dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => {
    sessionStorage.setItem("token", document.getElementById("token").value.trim());
    resolve();
  }, { once: true }));
}

function stateTag(state) { return el("span", { class: `state ${state}` }, state); }

function span(ms) {
  if (ms < 1000) return `${Math.round(ms)} ms`;
  if (ms < 60000) return `${(ms / 1000).toFixed(1)} s`;
  if (ms < 3600000) return `${Math.floor(ms / 60000)} m ${Math.round(ms % 60000 / 1000)} s`;
  return `${(ms / 3600000).toFixed(1)} h`;
}

function say(text) { status.textContent = text; }

function problem(error) { return el("p", { class: "problem", role: "alert" }, error.message); }

// The list of runs

async function showRuns() {
  const wanted = { state: "", plan: "" };
  const rows = el("tbody");
  const more = el("button", { hidden: "" }, "More");
  let shown = 50;
  const plans = (await call("/v1/plans")).plans;
  const refresh = async () => {
    const query = new URLSearchParams({ limit: shown });
    for (const [name, value] of Object.entries(wanted)) if (value) query.set(name, value);
    const found = await call(`/v1/runs?${query}`);
    rows.replaceChildren(...found.runs.map((run) => el("tr", {},
      el("td", {}, el("a", { href: `#/run/${encodeURIComponent(run.run_id)}`, class: "mono" }, run.run_id)),
      el("td", {}, run.plan),
      el("td", {}, stateTag(run.state)),
      el("td", { class: "hide" }, run.queue),
      el("td", { class: "number hide" }, String(run.last_seq)),
      el("td", { class: "number" }, span(Date.now() - Date.parse(run.created_at))))));
    if (!found.runs.length) {
      rows.replaceChildren(el("tr", {}, el("td", { colspan: "6", class: "empty" }, "No runs yet. Start one above.")));
    }
    more.hidden = !found.next || shown >= 500;
    say(`live · ${found.runs.length} runs`);
  };
  const filter = (name, options) => el("label", {}, name, el("select", {
    onchange: (event) => { wanted[name] = event.target.value; refresh(); },
  }, el("option", { value: "" }, "any"), ...options.map((option) => el("option", {}, option))));
  more.addEventListener("click", () => { shown = Math.min(500, shown + 100); refresh(); });
  main.replaceChildren(
    el("h1", {}, "Runs"),
    startForm(plans),
    el("div", { class: "bar" }, filter("state", STATES), filter("plan", plans.map((plan) => plan.name))),
    el("table", {},
      el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Run"), el("th", { scope: "col" }, "Plan"),
        el("th", { scope: "col" }, "State"), el("th", { scope: "col", class: "hide" }, "Queue"),
        el("th", { scope: "col", class: "number hide" }, "Events"), el("th", { scope: "col", class: "number" }, "Age"))),
      rows),
    more);
  await refresh();
  const timer = setInterval(() => {
    if (!document.hidden) refresh().catch(() => say("the server cannot be reached, trying again"));
  }, 2000);
  leave = () => clearInterval(timer);
}

function startForm(plans) {
  const plan = el("select", { name: "plan", required: "" }, ...plans.map((p) => el("option", {}, p.name)));
  const input = el("textarea", { name: "input", spellcheck: "false", placeholder: "{}" });
  const said = el("div");
  const form = el("form", {
    class: "bar",
    onsubmit: async (event) => {
      event.preventDefault();
      said.replaceChildren();
      try {
        const body = { plan: plan.value, input: input.value.trim() ? JSON.parse(input.value) : null };
        const run = await call("/v1/runs", { method: "POST", body: JSON.stringify(body) });
        location.hash = `#/run/${encodeURIComponent(run.run_id)}`;
      } catch (error) { said.replaceChildren(problem(error)); }
    },
  }, el("label", {}, "Start a run of", plan), el("label", {}, "with the JSON input", input),
     el("button", { id: "start" }, "Start"));
  return el("div", {}, form, said);
}

// Queues

async function showQueues() {
  const counts = ["waiting", "delayed", "active", "completed", "failed", "cancelled"];
  const rows = el("tbody", { id: "queues" });
  const said = el("div");
  const act = (name, verb) => el("button", { onclick: async () => {
    try { await call(`/v1/queues/${encodeURIComponent(name)}/${verb}`, { method: "POST" }); await refresh(); }
    catch (error) { said.replaceChildren(problem(error)); }
  } }, verb === "pause" ? "Pause" : "Resume");
  const refresh = async () => {
    const found = (await call("/v1/queues")).queues;
    rows.replaceChildren(...found.map((queue) => el("tr", {},
      el("td", {}, queue.name, queue.paused_at ? el("span", { class: "queued" }, " paused") : null),
      ...counts.map((name) => el("td", { class: "number" }, String(queue[name]))),
      el("td", { class: "number hide" }, queue.oldest ? span(Date.now() - Date.parse(queue.oldest)) : ""),
      el("td", { class: "number hide" }, String(queue.per_minute)),
      el("td", { class: "number hide" }, String(queue.workers)),
      el("td", {}, act(queue.name, queue.paused_at ? "resume" : "pause")))));
    if (!found.length) rows.replaceChildren(el("tr", {}, el("td", { colspan: "11", class: "empty" }, "No queues yet.")));
    say("live");
  };
  const titles = ["Queue", ...counts.map((name) => name[0].toUpperCase() + name.slice(1)),
                  "Oldest", "Per minute", "Workers", ""];
  main.replaceChildren(el("h1", {}, "Queues"), said, el("table", {}, el("thead", {}, el("tr", {},
    ...titles.map((title, place) => el("th", { scope: "col",
      class: place > 6 && place < 10 ? "number hide" : place && place < 7 ? "number" : null }, title)))), rows));
  await refresh();
  const timer = setInterval(() => {
    if (!document.hidden) refresh().catch(() => say("the server cannot be reached, trying again"));
  }, 2000);
  leave = () => clearInterval(timer);
}

// One run, live

async function showRun(runId) {
  const path = `/v1/runs/${encodeURIComponent(runId)}`;
  let run = await call(path);
  const events = [];
  let seq = 0;
  let epoch = "";
  let source = null;
  let stopped = false;
  const facts = el("dl", { class: "facts" });
  const lanes = el("div", { class: "timeline", id: "timeline" });
  const log = el("tbody", { id: "events" });
  const outcome = el("div");
  const cancel = el("button", { class: "danger", id: "cancel", onclick: async () => {
    try { run = await call(`${path}/cancel`, { method: "POST", body: "{}" }); draw(); }
    catch (error) { outcome.replaceChildren(problem(error)); }
  } }, "Cancel");

  function draw() {
    const last = events[events.length - 1];
    const over = last && last.type === "RunFinished";
    const state = over ? last.data.outcome : run.state === "queued" && events.length > 1 ? "running" : run.state;
    cancel.hidden = Boolean(over);
    const entries = [["State", stateTag(state)], ["Plan", run.plan], ["Queue", run.queue],
      ["Events", String(seq)], ["Started", new Date(run.created_at).toLocaleString()]];
    if (over) entries.push(["Took", span(last.ts - events[0].ts)]);
    facts.replaceChildren(...entries.map(([name, value]) =>
      el("div", {}, el("dt", {}, name), el("dd", {}, value))));
    drawLanes(lanes, events, over);
    if (over) {
      const shown = last.data.outcome === "completed" ? last.data.result : last.data.error;
      outcome.replaceChildren(el("h2", {}, last.data.outcome === "completed" ? "Result" : "Error"),
        el("pre", {}, shown && shown.traceback ? `${shown.type}: ${shown.message}\n\n${shown.traceback}`
                                               : JSON.stringify(shown, null, 2)));
    }
  }

  function add(event) {
    if (event.seq !== seq + 1) return;   // seen before; the server sends in order
    seq = event.seq;
    events.push(event);
    log.append(el("tr", { class: event.type === "StepFailed" ? "failed" : null },
      el("td", { class: "number" }, String(event.seq)),
      el("td", { class: "number hide" }, span(event.ts - events[0].ts)),
      el("td", {}, event.type),
      el("td", {}, [event.step, event.attempt > 1 ? `attempt ${event.attempt}` : ""].filter(Boolean).join(", ")),
      el("td", { class: "mono" }, event.data ? JSON.stringify(event.data).slice(0, 300) : "")));
    draw();
  }

  async function follow() {
    if (stopped) return;
    const query = new URLSearchParams({ from_seq: epoch ? `${epoch}.${seq}` : String(seq) });
    if (token()) query.set("token", (await call(`${path}/stream-token`, { method: "POST", body: "{}" })).token);
    source = new EventSource(`${path}/stream?${query}`);
    source.onopen = () => say("live");
    const types = ["RunStarted", "StepStarted", "StepFinished", "StepFailed", "DebugTrace",
                   "CancelRequested", "RunFinished"];
    for (const type of types) {
      source.addEventListener(type, (message) => {
        epoch = message.lastEventId.split(".")[0];
        add(JSON.parse(message.data));
        if (type === "RunFinished") { source.close(); say("finished"); }
      });
    }
    source.addEventListener("reset", () => { seq = 0; events.length = 0; log.replaceChildren(); });
    source.onerror = () => {
      if (events.length && events[events.length - 1].type === "RunFinished") return;
      say("connection lost, coming again");
      // A stream token may have expired meanwhile, so come again with a new one.
      source.close();
      setTimeout(() => follow().catch(() => source.onerror()), 1000 + 1000 * Math.random());
    };
  }

  main.replaceChildren(el("p", {}, el("a", { href: "#/" }, "← all runs")),
    el("h1", { class: "mono" }, runId), facts, el("div", { class: "bar" }, cancel), lanes, outcome,
    el("h2", {}, "Events"),
    el("table", {}, el("thead", {}, el("tr", {}, ...["Seq", "After", "Event", "Step", "Data"].map(
      (title, place) => el("th", { scope: "col", class: place === 1 ? "hide" : null }, title)))), log));
  if (run.input !== null) {
    lanes.before(el("h2", {}, "Input"), el("pre", {}, JSON.stringify(run.input, null, 2)));
  }
  draw();
  leave = () => { stopped = true; if (source) source.close(); };
  await follow();
}

function drawLanes(parent, events, over) {
  if (!events.length) { parent.replaceChildren(el("p", { class: "empty" }, "Waiting for a worker")); return; }
  const from = events[0].ts;
  const until = Math.max(over ? events[events.length - 1].ts : Date.now(), from + 1);
  const scale = 1000 / (until - from);
  const lanes = new Map();
  for (const event of events) {
    if (!event.step) continue;
    const lane = lanes.get(event.step) || { attempts: [], progress: null };
    lanes.set(event.step, lane);
    const open = lane.attempts[lane.attempts.length - 1];
    if (event.type === "StepStarted") {
      if (open && !open.end) { open.end = event.ts; open.kind = "bad"; }
      lane.attempts.push({ start: event.ts, end: null, kind: "now" });
    } else if (event.type === "StepFinished" && open) { open.end = event.ts; open.kind = "ok"; }
    else if (event.type === "StepFailed" && open) { open.end = event.ts; open.kind = "bad"; }
    else if (event.type === "DebugTrace" && event.data.name === "progress") lane.progress = event.data;
  }
  parent.replaceChildren(...[...lanes].map(([name, lane]) => {
    const svg = el("svg", { viewBox: "0 0 1000 14", preserveAspectRatio: "none", role: "img",
      "aria-label": `${name}: ${lane.attempts.length} attempts` });
    svg.append(el("rect", { class: "wait", x: "0", y: "6", width: "1000", height: "2" }));
    let total = 0;
    for (const attempt of lane.attempts) {
      const end = attempt.end || until;
      total += end - attempt.start;
      svg.append(el("rect", { class: attempt.kind, x: Math.min(996, (attempt.start - from) * scale), y: "1",
        width: Math.max(4, (end - attempt.start) * scale), height: "12", rx: "2" }));
    }
    const running = lane.attempts.some((attempt) => !attempt.end);
    const note = running && lane.progress ? `${Math.round(lane.progress.pct)} %` : span(total);
    return el("div", { class: "lane" },
      el("span", { class: "name", title: name }, lane.attempts.length > 1 ? `${name} ×${lane.attempts.length}` : name),
      svg, el("span", { class: "took" }, note));
  }));
}

async function route() {
  leave();
  leave = () => {};
  say("");
  try {
    const found = location.hash.match(/^#\/run\/(.+)$/);
    if (found) await showRun(decodeURIComponent(found[1]));
    else await (location.hash === "#/queues" ? showQueues() : showRuns());
  } catch (error) {
    main.replaceChildren(problem(error), el("p", {}, el("a", { href: "#/" }, "← all runs")));
  }
}

window.addEventListener("hashchange", route);
route();
