// One run: its timeline and its events, live.

import { address, call, callText, lacks, now, post, postText, token } from "./api.js";
import { ask, copyable, count, el, forbid, problem, runLink, setText, shortId, span, tell, time, worded } from "./dom.js";
import { Form } from "./form.js";
import { member, object, parts, pretty, typed } from "./json.js";
import { Output } from "./output.js";
import { mayStream, seen, take, watch } from "./places.js";
import { Story, Timeline } from "./timeline.js";

const TYPES = ["RunStarted", "StepStarted", "StepFinished", "StepFailed", "DebugTrace", "StepOutput", "CancelRequested", "WaitStarted",
  "SignalReceived", "WaitFinished", "ChildrenStarted", "ChildrenFinished", "RunRestarted", "UndoStarted", "InputReplaced", "RunFinished"];
const PLACED = new Set(["run_id", "namespace", "plan", "plan_version", "queue", "state", "input", "result", "error", "key",
  "last_seq", "attempt", "worker", "cancel_requested_at", "not_before", "deadline_at", "retry_of", "created_at", "started_at",
  "finished_at", "pruned_seq", "priority", "tags", "retried_by", "parent_id", "child_no", "start", "schedule", "tick"]); // members with a place of their own, or none
const BATCH = 2000; // events in one answer while the past is read
const CHILDREN = 50; // in one page of the list of children
const MOST_ROWS = 400; // rows of the log that are in the document
const MOST_TEXT = 20000; // characters of one value that are shown
const TICK = 250;
const POLL = 1000; // between two questions of a window that has no stream
const PERSON = "beatless-person"; // who decides, kept for the tab
const LOOK = 5000; // whether it is still there: of a run that has ended nothing else would tell

export async function showRun(page, runId) {
  const path = `/v1/runs/${encodeURIComponent(runId)}`;
  const [text, plans, links, reason] = await Promise.all([callText(path), call("/v1/plans"), call("/links"), lacks("runs:write")]);
  if (page.left) return;
  let run = JSON.parse(text);
  const said = document.getElementById("said");
  let story = new Story();
  let seq = 0;
  let epoch = "";
  let gap = false; // an event came before an earlier one
  let wake = () => {}; // what waits for this page to be seen, left or removed
  let dirty = true;
  let removing = false; // by this page, which then tells more than that it is gone
  let removed = false;

  const plan = plans.plans.find((each) => each.name === run.plan);
  const steps = plan?.steps ?? [];
  const ahead = plan?.function ? "may come" : "to come"; // only the function knows
  const known = new Set([...steps, plan?.on_cancel, ...(plan?.undo ?? []), ...Object.keys(plan?.renamed ?? {})]);
  const state = el("span", { id: "state" });
  const facts = el("dl", { class: "facts" });
  const outcome = el("div", { id: "outcome" });
  const question = el("div", { id: "question" });
  let asks = null; // the seq of the WaitStarted whose card is shown
  const detail = el("div", { id: "detail" });
  const family = el("div", { id: "children" });
  let told = -1; // the seq at which the children were read last
  const timeline = el("div");
  const log = new Log();
  const output = new Output();
  let drawing = new Timeline(story, steps, ahead, choose);
  timeline.append(drawing.node);

  const cancel = el("button", { type: "button", class: "danger", id: "cancel", title: "Cancel (c)", onclick: askToCancel }, "Cancel");
  const retry = el("button", { type: "button", id: "retry", title: "Retry (t)", onclick: askToRetry }, "Retry");
  const remove = el("button", { type: "button", id: "remove", title: "Remove (x)", onclick: askToRemove }, "Remove");
  const signal = el("button", { type: "button", id: "signal", title: "Signal (w)", onclick: askToSignal }, "Signal");
  forbid(signal, reason);
  forbid(cancel, reason);
  forbid(retry, reason);

  async function act(action) {
    said.replaceChildren();
    try { return await action(); } catch (error) { said.replaceChildren(problem(error)); return null; }
  }

  async function askToCancel() {
    if (cancel.hidden || cancel.disabled) return;
    const found = await ask({
      title: "Cancel this run?", verb: "Cancel the run", danger: true,
      fields: [el("p", {}, "The step in flight commits or stops at its next look; no other begins."),
        el("label", {}, "Reason", el("input", { name: "reason", maxlength: "1000", autocomplete: "off" }))],
      check: (data) => post(`${path}/cancel`, { reason: data.get("reason") || null }),
    });
    if (found) { run = found; dirty = true; draw(); }
  }

  async function askToSignal() {
    const names = story.wait?.data?.names ?? [];
    if (signal.hidden || signal.disabled) return;
    const name = el("input", { name: "name", required: true, maxlength: "100", value: names[0] ?? "", autocomplete: "off", list: "signals" });
    const sent = await ask({
      title: "Send a signal to this run", verb: "Send",
      fields: [el("label", {}, "Name", name), el("datalist", { id: "signals" }, ...names.map((each) => el("option", { value: each }))),
        el("label", {}, "Data (JSON)", el("textarea", { name: "data", rows: "4", spellcheck: "false" }))],
      check: (data) => {
        const given = typed(data.get("data").trim() || "null", "The data");
        return postText(`${path}/signals`, object([["name", JSON.stringify(data.get("name"))], ["data", given]]));
      },
    });
    if (sent?.new && !sent.waits_for.includes(name.value)) {
      tell(`${name.value} is kept for a later wait: the run waits for ${sent.waits_for.join(" or ") || "no signal"} now.`);
    }
  }

  // The card of the approval for which the run waits; it stays as it is while the run does.
  function showQuestion(wait) {
    if ((wait?.seq ?? null) === asks) return;
    asks = wait?.seq ?? null;
    if (!wait) { question.replaceChildren(); return; }
    const form = new Form(member(wait.text, "data", "schema") ?? "{}");
    const refused = el("div");
    const by = el("input", { name: "beatless-by", required: true, maxlength: "200", autocomplete: "email", value: sessionStorage.getItem(PERSON) ?? "" });
    const buttons = form.verdict
      ? [el("button", { class: "primary", value: "true" }, "Approve"), el("button", { class: "danger", value: "false" }, "Reject")]
      : [el("button", { class: "primary" }, "Send the decision")];
    for (const button of buttons) forbid(button, reason);
    const send = async (event) => {
      event.preventDefault();
      refused.replaceChildren();
      for (const button of buttons) button.disabled = true;
      try {
        const decision = form.read(new FormData(card), event.submitter?.value === "true");
        sessionStorage.setItem(PERSON, by.value.trim());
        const exact = wait.step.includes("#") ? wait.step : `${wait.step}#1`; // the one that was read, and no later one
        await postText(`${path}/approvals/${encodeURIComponent(exact)}`, object([["data", decision], ["by", JSON.stringify(by.value.trim())]]));
        tell(`Decided: ${wait.data.title}`);
      } catch (error) { refused.replaceChildren(problem(error)); }
      for (const button of buttons) forbid(button, reason);
    };
    const card = el("form", { class: "card padded approval", "aria-label": "Approval", onsubmit: send },
      form.verdict ? el("button", { hidden: true, disabled: true }) : null, // Enter presses the first: it shall not approve
      el("h2", {}, wait.data.title), ...form.nodes, el("label", {}, "You are", by), refused, el("div", { class: "actions" }, ...buttons));
    question.replaceChildren(card);
  }

  function goToQuestion() { question.querySelector("input, select, textarea, button:not([hidden])")?.focus(); }

  async function askToRetry() {
    if (retry.hidden || retry.disabled) return;
    const began = [...story.lanes.keys()];
    const made = await ask({
      title: "Retry as a new run", verb: "Retry",
      fields: [el("p", {}, "What has finished is taken over, and not done again."),
        el("label", {}, "Begin with", el("select", { name: "step" }, el("option", { value: "" }, "where it stopped"),
          ...began.map((name) => el("option", {}, name))))],
      check: (data) => post(`${path}/retry`, { from_step: data.get("step") || null }),
    });
    if (made) location.hash = `#/run/${encodeURIComponent(made.run_id)}`;
  }

  async function askToRemove() {
    if (remove.hidden || remove.disabled) return;
    const done = await ask({
      title: "Remove this run?", verb: "Remove the run", danger: true,
      fields: [el("p", {}, story.end ? `It is ${story.state}. ` : run.finished_at ? `It is ${run.state}. ` : "It waits, and will not start. ",
        `It is taken away for good, with all of its ${count(seq, "event")}; whoever has it open is told so.`)],
      check: async () => {
        removing = true;
        try { await call(path, { method: "DELETE" }); } catch (error) { removing = false; throw error; }
        return true;
      },
    });
    if (done) gone(`Run ${runId} and its ${count(seq, "event")} removed.`);
  }

  function gone(words = `Run ${runId} was removed.`) {
    if (removed || page.left) return;
    removed = true;
    wake();
    page.timers.forEach(clearInterval);
    for (const button of [signal, cancel, retry, remove]) button.hidden = true;
    showQuestion(null);
    state.replaceChildren(el("span", { class: "state cancelled" }, "removed"));
    outcome.prepend(el("section", { class: "card padded outcome", id: "removed" }, el("h2", {}, "This run was removed"),
      el("p", { class: "message" }, "Neither it nor its events are stored any more. Below is what this page had read before.")));
    page.say("Removed", "ended");
    tell(words);
    if (document.activeElement === document.body) document.getElementById("main").focus();
  }

  async function look() {
    if (!seen() || removing) return;
    showChildren();
    try {
      const latest = await call(path);
      dirty ||= latest.retried_by !== run.retried_by;
      run = latest;
    } catch (error) { if (error.status === 404 && !removing) gone(); }
  }

  function choose(name) {
    const chosen = drawing.choose(name);
    detail.replaceChildren();
    if (chosen !== null) showDetail(chosen);
  }

  function showDetail(name) {
    const lane = story.lanes.get(name);
    const nodes = [el("h2", {}, name)];
    if (!lane) {
      nodes.push(el("p", { class: "soft" }, name in story.reused ? "Taken over from the run that was retried." : "This step has not begun."));
      if (name in story.reused) nodes.push(value("Result", story.reused[name]));
    } else {
      nodes.push(el("table", { class: "small" }, el("thead", {}, el("tr", {}, ...["Attempt", "After", "Took", "Outcome"].map(
        (title) => el("th", { scope: "col" }, title)))),
        el("tbody", {}, ...lane.attempts.slice(-50).map((attempt) => el("tr", {}, el("td", {}, String(attempt.number)),
          el("td", {}, span(attempt.start - story.start)),
          el("td", {}, attempt.end === null ? "…" : span(attempt.end - attempt.start)),
          el("td", { class: attempt.kind === "bad" ? "failed" : null },
            attempt.error ? `${attempt.error.type}: ${attempt.error.message}`
              : { ok: "finished", bad: "failed", now: "running", lost: "lost: its worker died, or it was ended", rest: "snoozed" }[attempt.kind]))))));
      const failed = lane.attempts.findLast((attempt) => attempt.error?.traceback);
      if (failed) nodes.push(el("pre", { class: "traceback", tabindex: "0" }, failed.error.traceback));
      if (lane.traces.length) {
        nodes.push(el("h3", {}, `Traces (${lane.traced})`), el("ul", { class: "traces" }, ...lane.traces.slice(-30).map((trace) => {
          const title = String(trace.data?.name);
          const rest = object(Array.from(parts(member(trace.text, "data") ?? "{}")).filter(([part]) => part !== "name"));
          return el("li", {}, el("span", { class: "soft" }, `+${span(trace.ts - story.start)} `), el("strong", {}, title), " ", el("code", {}, rest));
        })));
      }
      if (output.of(name) !== null) nodes.push(el("h3", {}, "Output"), el("pre", { tabindex: "0" }, output.of(name)));
      if (lane.finished) nodes.push(value("Result", lane.result));
    }
    detail.replaceChildren(el("section", { class: "card padded", "aria-label": `Step ${name}` }, ...nodes));
  }

  function value(title, text) { return el("div", {}, el("h3", {}, title), el("pre", { tabindex: "0" }, shown(text))); }

  function draw() {
    if (page.left || removed) return;
    const over = story.end;
    if (dirty) {
      dirty = false;
      const told = over ? story.state : ["queued", "waiting", "running"].includes(run.state) ? story.state : run.state;
      const stopping = !over && (story.cancel || run.cancel_requested_at);
      const final = over || run.finished_at;
      state.replaceChildren(el("span", { class: `state ${told}` }, stopping && !final ? "cancelling" : told));
      cancel.hidden = Boolean(final || stopping);
      showQuestion(story.wait?.data?.kind === "approval" && !final && !stopping ? story.wait : null);
      signal.hidden = Boolean(final || stopping || !story.wait?.data?.names);
      retry.hidden = !final;
      forbid(remove, reason ?? (told === "running" && !final ? "A worker has it: cancel it first" : null));
      page.title(`${run.plan} ${shortId(runId)} · ${told}`);
      const entries = [["Plan", el("a", { href: `#/?plan=${encodeURIComponent(run.plan)}` }, run.plan)],
        ["Queue", el("a", { href: `#/?queue=${encodeURIComponent(run.queue)}` }, run.queue)], ["Started", time(run.created_at)]];
      if (run.priority) entries.push(["Priority", String(run.priority)]);
      if (run.key) entries.push(["Key", el("code", {}, run.key)]);
      if (run.not_before && !story.wait && !story.waitsForChildren) entries.push(["Not before", time(run.not_before)]);
      if (run.deadline_at) entries.push(["Deadline", time(run.deadline_at)]);
      if (run.parent_id) entries.push(["Child of", el("span", { id: "parent" }, runLink(run.parent_id), ` (number ${run.child_no})`)]);
      if (run.schedule) entries.push(["Schedule", el("a", { href: `#/schedules?${new URLSearchParams({ from: run.schedule })}` }, run.schedule)], ["Tick", time(run.tick)]);
      if (run.retry_of) entries.push(["Retry of", runLink(run.retry_of)]);
      if (run.retried_by) entries.push(["Retried by", runLink(run.retried_by)]);
      if (run.worker && !["queued", "waiting"].includes(run.state)) entries.push(["Worker", el("code", {}, run.worker)]);
      for (const [name, content] of Object.entries(run)) {
        if (!PLACED.has(name) && content !== null) entries.push([worded(name), typeof content === "object" ? JSON.stringify(content) : String(content)]);
      }
      if (links.flower) entries.push(["In", el("a", { href: `${links.flower.replace(/\/$/, "")}/task/${encodeURIComponent(runId)}` }, "Flower")]);
      const lacking = final || !story.place ? null : story.place.split("#")[0];
      // The code of a function alone knows all of its steps and waits, but for its `on_cancel` step.
      if (lacking && plan && (!plan.function || lacking === story.undo) && !known.has(lacking)) {
        entries.push(["Waits in", el("span", { id: "unknown-step" }, el("code", {}, story.place), ", which this version of the plan does not have")]);
      } else if (story.wait && !final && !stopping) {
        const { names, until, title } = story.wait.data;
        entries.push(["Waits for", el("span", { id: "waits-for" }, title ? "a person" : names?.join(" or ") ?? "its time",
          ...(until ? [names || title ? ", until " : ": until ", time(new Date(until).toISOString())] : []))]);
      }
      else if (story.waitsForChildren && !final && !stopping) entries.push(["Waits for", el("span", { id: "waits-for" }, "its children")]);
      if (story.undone && !final) entries.push(["Is undone", el("span", { id: "undone" }, `after ${story.undone.type}: ${story.undone.message}`)]);
      entries.push(["Events", el("span", { id: "seq" }, String(seq))]);
      entries.push(["Took", el("span", { id: "took" })]);
      facts.replaceChildren(...entries.map(([name, content]) => el("div", {}, el("dt", {}, name), el("dd", {}, content))));
      output.draw();
      if (over) showOutcome(member(over.text, "data"));
      if (drawing.chosen !== null) showDetail(drawing.chosen);
    }
    if (story.start !== null) {
      const took = document.getElementById("took");
      if (took) setText(took, span((over ? over.ts : Math.max(now(), story.last)) - story.start));
    }
    drawing.draw(now());
  }

  // The list of children, from the first one after a number on; read again as the run goes on.
  async function showChildren(after = 0) {
    if (!story.children || removed || (after === 0 && told === seq)) return;
    told = seq;
    let answer;
    try { answer = await call(`${path}/children?limit=${CHILDREN}&cursor=${after}`); } catch { return; }
    if (page.left || removed) return;
    const rows = answer.runs.map((child) => el("tr", {}, el("td", {}, String(child.child_no)), el("td", {}, runLink(child.run_id)),
      el("td", {}, child.plan), el("td", {}, el("span", { class: `state ${child.state}` }, child.state))));
    const more = answer.next === null ? null
      : el("button", { type: "button", onclick: () => showChildren(Number(answer.next)) }, "Next children");
    family.replaceChildren(el("section", { class: "card padded", "aria-label": "Children" }, el("h2", {}, `Children (${story.children})`),
      el("table", { class: "small" }, el("thead", {}, el("tr", {}, ...["Number", "Run", "Plan", "State"].map((title) => el("th", { scope: "col" }, title)))),
        el("tbody", {}, ...rows)), more));
  }

  function showOutcome(text) {
    if (outcome.childElementCount) return;
    const data = JSON.parse(text);
    if (data.outcome === "completed") outcome.append(el("section", { class: "card padded" }, value("Result", member(text, "result") ?? "null")));
    else if (data.error) {
      const { type, message, traceback, ...rest } = data.error;
      outcome.append(el("section", { class: `card padded outcome ${data.outcome}` },
        el("h2", {}, data.outcome === "failed" ? "Failed" : "Cancelled", rest.step ? ` in ${rest.step}` : ""),
        el("p", { class: "message" }, el("strong", {}, String(type ?? "")), type ? ": " : "", String(message ?? "")),
        traceback ? el("pre", { class: "traceback", tabindex: "0" }, String(traceback)) : null));
    }
  }

  // An event as text: it is shown as it is written.
  function add(text) {
    const event = { ...JSON.parse(text), text };
    gap ||= event.seq > seq + 1; // of a type that this page does not know
    if (event.seq !== seq + 1) return; // seen before: an event is shown once, whoever sent it
    seq = event.seq;
    story.add(event);
    log.add(event, story.start);
    output.add(event);
    dirty = true;
  }

  function reset() {
    seq = 0;
    story = new Story();
    log.clear();
    output.clear();
    outcome.replaceChildren();
    detail.replaceChildren();
    drawing = new Timeline(story, steps, ahead, choose);
    timeline.replaceChildren(drawing.node);
    dirty = true;
  }

  // The past in large answers, because a stream of thousands of frames would be slow.
  async function readPast() {
    for (;;) {
      const answer = await callText(`${path}/events?from_seq=${seq}&limit=${BATCH}`);
      const found = Object.fromEntries(parts(answer));
      const told = JSON.parse(found.epoch);
      if (epoch && told !== epoch) reset();
      epoch = told;
      const texts = Array.from(parts(found.events), ([, text]) => text);
      texts.forEach(add);
      if (page.left || !texts.length || seq >= JSON.parse(found.last_seq)) return;
    }
  }

  // Until the run has ended: by a stream, or by asking while other windows have the places.
  async function follow() {
    while (!story.end && !page.left && !removed) {
      if (!seen()) { await pause(); continue; }
      let free = null;
      let wait = POLL;
      try {
        await readPast();
        if (story.end || page.left || removed) break;
        page.say("Live");
        free = await take();
        if (free) {
          await stream();
          wait = 500 + 1000 * Math.random(); // not all viewers of a server at once
        }
      } catch (error) {
        if (error.status === 410) { page.say("Its events are not kept any more", "ended"); return; }
        if (error.status !== 404) page.say("Connection lost, coming again", "lost");
        else if (!removing) gone();
      } finally { free?.(); }
      if (!story.end && !removed) await pause(wait);
    }
    if (story.end && !page.left) await finished();
  }

  // For so long, or until this page is seen, left or removed.
  function pause(ms) {
    return new Promise((resolve) => {
      const timer = ms === undefined ? null : setTimeout(done, ms);
      const forget = watch(() => { if (seen()) done(); });
      function done() { clearTimeout(timer); forget(); resolve(); }
      wake = done;
    });
  }

  // Follows by one stream until that ends, for whatever reason.
  async function stream() {
    // A stream token may have expired meanwhile: each stream has its own.
    const query = new URLSearchParams({ from_seq: `${epoch}.${seq}` });
    if (token()) query.set("token", (await post(`${path}/stream-token`)).token);
    if (page.left || removed || !mayStream()) return;
    gap = false;
    const source = new EventSource(address(`${path}/stream?${query}`));
    let forget;
    await new Promise((resolve) => {
      wake = resolve;
      forget = watch(() => { if (!mayStream()) resolve(); });
      source.onopen = () => page.say("Live");
      source.onerror = resolve;
      for (const type of TYPES) {
        source.addEventListener(type, (message) => {
          epoch = message.lastEventId.split(".")[0];
          add(message.data);
          if (story.end || gap) resolve();
        });
      }
      source.addEventListener("reset", (message) => { epoch = JSON.parse(message.data).epoch; reset(); });
    });
    forget();
    source.close();
  }

  async function finished() {
    page.say("Ended", "ended");
    run = await call(path).catch(() => run); // if it is gone, the next look tells
    dirty = true;
    log.draw();
    draw();
  }

  page.keys = { a: goToQuestion, w: askToSignal, c: askToCancel, t: askToRetry, x: askToRemove };
  showChildren();
  page.timers.push(setInterval(look, LOOK));
  page.endings.push(() => wake());
  const input = el("details", { class: "card padded input" }, el("summary", {}, "Input"),
    el("pre", { tabindex: "0" }, shown(member(text, "input"))));
  page.show(el("p", { class: "crumb" }, el("a", { href: "#/" }, "← Runs")),
    el("div", { class: "head" }, el("h1", {}, run.plan, " ", el("span", { class: "mono soft" }, shortId(runId))), state,
      el("span", { class: "tags" }, ...Object.entries(run.tags).map(([name, text]) => el("a", { class: "tag", href: `#/?${new URLSearchParams({ tag: `${name}=${text}` })}` }, `${name}=${text}`))),
      el("span", { class: "actions" }, signal, cancel, retry, remove)),
    el("p", { class: "id soft" }, el("span", { class: "mono", id: "run-id" }, runId), copyable(runId, "the id")),
    facts, question, outcome, timeline, output.node, detail, family, run.input === null ? null : input, log.node);
  draw();
  try { await readPast(); } catch (error) {
    if (error.status !== 410) throw error;
    log.node.replaceChildren(el("p", { class: "empty" }, "The events of this run are not kept any more."));
    showOutcome(object([["outcome", JSON.stringify(run.state)], ["result", member(text, "result")], ["error", member(text, "error")]]));
    return;
  }
  log.draw();
  draw();
  if (story.interesting) choose(story.interesting);
  page.timers.push(setInterval(() => {
    if (!seen()) return;
    log.draw();
    if (dirty || !story.end) draw();
  }, TICK));
  await follow();
}

function shown(text) {
  const all = pretty(text);
  return all.length > MOST_TEXT ? `${all.slice(0, MOST_TEXT)}\n… ${all.length - MOST_TEXT} more characters` : all;
}

// The events as a table that holds its last rows only, however many there are.
class Log {
  constructor() {
    this.events = [];
    this.waiting = [];
    this.first = 0; // place of the first row that is shown, of those that match
    this.matching = 0;
    this.body = el("tbody", { id: "events" });
    this.count = el("span", { class: "soft" });
    this.earlier = el("button", { type: "button", class: "quiet", hidden: true, onclick: () => this.reach() });
    this.type = el("select", { "aria-label": "Type of event", onchange: () => this.filter() }, el("option", { value: "" }, "all types"), ...TYPES.map((type) => el("option", {}, type)));
    this.text = el("input", { "aria-label": "Find in events", "data-filter": true, placeholder: "find in events", oninput: () => this.filter() });
    this.node = el("section", { class: "card log", "aria-label": "Events" },
      el("div", { class: "bar" }, el("h2", {}, "Events"), this.count, this.type, this.text), this.earlier,
      el("table", {}, el("thead", {}, el("tr", {}, ...[["Seq", "number"], ["After", "number"], ["Event"], ["Step"], ["Data", "wide"]].map(
        ([title, kind]) => el("th", { scope: "col", class: kind }, title)))), this.body));
  }

  add(event, start) { this.start = start; this.events.push(event); this.waiting.push(event); }

  clear() { this.events = []; this.waiting = []; this.matching = 0; this.body.replaceChildren(); }

  matches(event) {
    // Spaces do not count: JSON is stored with them, and people type it without.
    const plain = (text) => text.toLowerCase().replace(/\s+/g, "");
    const wanted = plain(this.text.value);
    return (!this.type.value || event.type === this.type.value) && (!wanted || plain(event.text).includes(wanted));
  }

  filter() {
    this.body.replaceChildren();
    this.matching = 0;
    this.waiting = [...this.events];
    this.draw();
  }

  draw() {
    if (!this.waiting.length && this.body.childElementCount) return;
    const fresh = this.waiting.filter((event) => this.matches(event));
    this.waiting = [];
    this.matching += fresh.length;
    this.body.append(...fresh.slice(-MOST_ROWS).map((event) => this.row(event)));
    while (this.body.childElementCount > MOST_ROWS) this.body.firstElementChild.remove();
    this.tell();
  }

  tell() {
    const hidden = this.matching - this.body.childElementCount;
    this.earlier.hidden = hidden <= 0;
    setText(this.earlier, `${hidden} earlier events. Show ${Math.min(hidden, MOST_ROWS)} of them`);
    setText(this.count, this.matching === this.events.length ? String(this.events.length) : `${this.matching} of ${this.events.length}`);
  }

  reach() {
    const found = this.events.filter((event) => this.matches(event));
    const end = found.length - this.body.childElementCount;
    this.body.prepend(...found.slice(Math.max(0, end - MOST_ROWS), end).map((event) => this.row(event)));
    this.tell();
  }

  row(event) {
    const text = member(event.text, "data") ?? "";
    const brief = event.type === "DebugTrace" ? `${event.data?.name ?? ""} ${text}` : text;
    const data = el("td", { class: "data" });
    if (text.length > 80) {
      const details = el("details", {}, el("summary", { class: "mono" }, brief.slice(0, 120)));
      details.addEventListener("toggle", () => {
        if (details.childElementCount === 1) details.append(el("pre", { tabindex: "0" }, shown(text)));
      });
      data.append(details);
    } else data.append(el("code", {}, text));
    const attempt = event.attempt > 1 ? ` (attempt ${event.attempt})` : "";
    return el("tr", { "data-seq": event.seq, class: event.type }, el("td", { class: "number" }, String(event.seq)),
      el("td", { class: "number after" }, `+${span(event.ts - this.start)}`), el("td", { class: "type" }, event.type),
      el("td", { class: "step" }, `${event.step ?? ""}${attempt}`), data);
  }
}
