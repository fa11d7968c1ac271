// The list of runs.

import { call, lacks, now } from "./api.js";
import { cleanRuns } from "./clean.js";
import { Rows, age, el, forbid, runLink, setText, span } from "./dom.js";
import { retryFailed } from "./failed.js";

const STATES = ["queued", "waiting", "running", "completed", "failed", "cancelled"];
const PAGE = 50;

export async function showRuns(page, query) {
  const wanted = Object.fromEntries(["state", "plan", "queue", "tag", "retried"].map((name) => [name, query.get(name) ?? ""]));
  const cursors = [null]; // of the pages from the first to the one that is shown
  let found = { runs: [], next: null };
  let persons = new Map();
  const body = el("tbody", { id: "runs" });
  const rows = new Rows(body, (run) => run.run_id, makeRow);
  const nothing = el("p", { class: "empty", hidden: true });
  const newer = el("button", { type: "button", onclick: () => turn(-1) }, "← Newer");
  const older = el("button", { type: "button", onclick: () => turn(1) }, "Older →");
  const place = el("span", { class: "soft" });
  const retry = el("button", { type: "button", id: "retry-all", title: "Retry the failed runs of this list", onclick: async () => {
    if (await retryFailed(wanted)) await refresh();
  } }, "Retry all that match…");
  const open = el("input", { type: "checkbox", id: "not-retried", onchange: () => filter("retried", open.checked ? "false" : "") });
  const unretried = el("label", { class: "check" }, open, el("span", {}, "not retried"));
  const clean = el("button", { type: "button", id: "clean", title: "Take away runs that ended long ago", onclick: async () => {
    if (await cleanRuns(wanted.state)) await refresh();
  } }, "Clean up…");
  const tabs = ["", ...STATES].map((state) => {
    const count = el("span", { class: "count" });
    const tab = el("button", { type: "button", "aria-pressed": String(wanted.state === state), class: `tab ${state}`,
      onclick: () => filter("state", state) }, state || "all", count);
    return { state, tab, count };
  });

  function filter(name, value) {
    wanted[name] = value.trim();
    cursors.length = 1;
    mark();
    const kept = new URLSearchParams(Object.entries(wanted).filter(([, text]) => text));
    history.replaceState(null, "", `#/${kept.size ? `?${kept}` : ""}`);
    return refresh();
  }

  // Which filters are chosen, and what goes with failed runs only.
  function mark() {
    const failed = wanted.state === "failed";
    if (!failed) wanted.retried = "";
    for (const { state, tab } of tabs) tab.setAttribute("aria-pressed", String(wanted.state === state));
    retry.hidden = unretried.hidden = !failed;
    open.checked = wanted.retried === "false";
  }

  function turn(by) {
    if (by > 0) cursors.push(found.next); else cursors.pop();
    return refresh();
  }

  async function refresh() {
    const asked = new URLSearchParams({ limit: PAGE });
    for (const [name, value] of Object.entries(wanted)) if (value) asked.append(name, value);
    const cursor = cursors[cursors.length - 1];
    if (cursor) asked.set("cursor", cursor);
    found = await call(`/v1/runs?${asked}`);
    await askForPersons(found.runs);
    rows.show(found.runs);
    nothing.hidden = found.runs.length > 0;
    const filtered = Object.values(wanted).some(Boolean);
    setText(nothing, filtered ? "No run is like this." : "No runs yet. Press n to start one.");
    newer.disabled = cursors.length === 1;
    older.disabled = !found.next;
    setText(place, `page ${cursors.length}`);
    page.say("Live");
  }

  // Which of the runs wait for a person; asked only of those that have gone on since.
  async function askForPersons(runs) {
    const waiting = runs.filter((run) => run.state === "waiting");
    if (waiting.some((run) => persons.get(run.run_id)?.seq !== run.last_seq)) {
      const { approvals } = await call("/v1/approvals?limit=500");
      const asking = new Set(approvals.map((each) => each.run_id));
      persons = new Map(waiting.map((run) => [run.run_id, { seq: run.last_seq, asks: asking.has(run.run_id) }]));
    }
    for (const run of waiting) run.asks = persons.get(run.run_id)?.asks;
  }

  async function count() {
    let queues;
    // Without the right to see queues there are no counts, and nothing else is missing.
    if (await lacks("queues")) return;
    try { queues = (await call("/v1/queues")).queues; } catch { return; }
    const sums = { queued: 0, waiting: 0, running: 0, completed: 0, failed: 0, cancelled: 0 };
    for (const queue of queues) {
      sums.queued += queue.queued + queue.delayed;
      sums.waiting += queue.waiting;
      sums.running += queue.active;
      for (const state of ["completed", "failed", "cancelled"]) sums[state] += queue[state];
    }
    for (const { state, count: shown } of tabs) if (state in sums) setText(shown, String(sums[state]));
  }

  const [{ plans: known }, reason] = await Promise.all([call("/v1/plans"), lacks("runs:write")]);
  const plans = known.map((plan) => plan.name);
  forbid(clean, reason);
  forbid(retry, reason);
  mark();
  if (wanted.plan && !plans.includes(wanted.plan)) plans.push(wanted.plan);
  const choice = el("select", { id: "plan", "data-filter": true, onchange: (event) => filter("plan", event.target.value) },
    el("option", { value: "" }, "any plan"), ...plans.map((name) => el("option", { selected: name === wanted.plan }, name)));
  const typed = (name, hint) => el("label", {}, name, el("input", { id: name, value: wanted[name], placeholder: hint,
    autocomplete: "off", spellcheck: "false", onchange: (event) => filter(name, event.target.value) }));
  page.show(
    el("h1", { class: "unseen" }, "Runs"),
    el("div", { class: "bar" },
      el("div", { class: "tabs", role: "group", "aria-label": "State" }, ...tabs.map(({ tab }) => tab)),
      unretried, el("div", { class: "filters" },
        el("label", {}, "plan", choice), typed("queue", "any queue"), typed("tag", "name=value"))),
    el("div", { class: "card" },
      el("table", { class: "runs" },
        el("thead", {}, el("tr", {}, ...[["Run"], ["State"], ["Tags"], ["Queue"], ["Events", "number"],
           ["Took", "number"], ["Age", "number"]].map(([title, kind]) =>
          el("th", { scope: "col", class: kind }, title)))),
        body),
      nothing),
    el("div", { class: "pager" }, clean, retry, newer, place, older));
  await page.every(2000, () => Promise.all([refresh(), count()]));
}

function makeRow(run) {
  const state = el("span", {});
  const events = el("td", { class: "number events" });
  const took = el("td", { class: "number took" });
  const old = el("td", { class: "number age" });
  const why = el("span", { class: "why", hidden: true });
  const link = runLink(run.run_id, el("strong", {}, run.plan), { "data-stop": true });
  const again = el("span", { class: "again", hidden: true });
  const node = el("tr", { "data-run": run.run_id, onclick: (event) => {
    if (!event.target.closest("a") && !getSelection().toString()) link.click();
  } },
    el("td", { class: "run" }, link, again, why), el("td", { class: "at" }, state),
    el("td", { class: "tags" }, ...Object.entries(run.tags).map(([name, value]) => el("span", { class: "tag" }, `${name}=${value}`))),
    el("td", { class: "queue" }, run.queue), events, took, old);
  return {
    node,
    update(latest) {
      const waits = latest.state === "queued" && latest.not_before && Date.parse(latest.not_before) > now();
      const asked = latest.cancel_requested_at && !latest.finished_at;
      setText(state, asked ? "cancelling" : waits ? "delayed" : latest.asks ? "waiting for a person" : latest.state);
      state.className = `state ${latest.state}`;
      why.hidden = latest.state !== "failed" || !latest.error;
      if (!why.hidden) setText(why, `${latest.error.type}: ${latest.error.message}`);
      again.hidden = !latest.retried_by;
      node.classList.toggle("retried", Boolean(latest.retried_by));
      if (latest.retried_by && again.dataset.by !== latest.retried_by) {
        again.dataset.by = latest.retried_by;
        again.replaceChildren(runLink(latest.retried_by, "retried by ", { class: "badge" }));
      }
      setText(events, String(latest.last_seq));
      const until = latest.finished_at ? Date.parse(latest.finished_at) : now();
      setText(took, latest.started_at ? span(until - Date.parse(latest.started_at)) : "");
      setText(old, age(now() - Date.parse(latest.created_at)));
    },
  };
}
