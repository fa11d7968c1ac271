// The timeline of each step, folded from the events of a run, and drawn as bars over time.

import { el, setText, span } from "./dom.js";
import { member, parts } from "./json.js";

const SNOOZED = "beatless.snoozed";
const GIVEN_BACK = "beatless.given_back";
const CONNECTION_LOST = "beatless.connection_lost";
const MOST_LANES = 200;
const MOST_BARS = 200;
const MARKS = 100; // places for the marks of traces in one lane

export class Story {
  constructor() {
    this.lanes = new Map();
    this.start = null;
    this.last = null;
    this.begun = null;
    this.cancel = null;
    this.end = null;
    this.reused = {};
    this.place = null; // the step it is in, or goes on with, where the journal tells
    this.undo = null; // the step that the cancel has promised
    this.waits = new Map(); // the WaitStarted of each wait that is open
    this.undone = null; // the error of a run that is undone before it ends
    this.children = 0; // the highest number of a child
    this.waitsForChildren = false;
  }

  add(event) {
    const data = event.data ?? {};
    this.start ??= event.ts;
    this.last = event.ts;
    if (event.type === "RunStarted" && data.reused?.results) {
      this.reused = Object.fromEntries(parts(member(event.text, "data", "reused", "results")));
    }
    if (event.type === "RunStarted") this.place = data.reused?.next ?? null;
    if (event.type === "StepStarted") this.place = event.step;
    if (event.type === "StepFinished") this.place = this.undo ?? data.next ?? data.following ?? null;
    if (event.type === "ChildrenStarted") {
      this.children = Math.max(this.children, data.first + data.count - 1);
      this.place = event.step;
    }
    if (event.type === "ChildrenStarted" || event.type === "ChildrenFinished") this.waitsForChildren = event.type === "ChildrenStarted";
    if (event.type === "ChildrenFinished") this.place = this.undo ?? data.next ?? data.following ?? event.step;
    if (event.type === "WaitStarted") this.place = (this.waits.set(event.step, event), event.step);
    if (event.type === "WaitFinished") {
      this.waits.delete(event.step);
      this.place = this.undo ?? data.next ?? data.following ?? null;
    }
    if (event.type === "CancelRequested") {
      this.cancel = event;
      this.undo = data.on_cancel ?? null;
      this.place = this.undo ?? this.place;
    }
    if (event.type === "UndoStarted") [this.undone, this.waits, this.waitsForChildren] = [data.error ?? null, new Map(), false];
    if (event.type === "RunFinished") this.finish(event);
    if (!event.step) return;
    const lane = this.lane(event.step);
    const open = lane.attempts.at(-1);
    const running = open && open.end === null;
    if (event.type === "StepStarted") {
      this.begun ??= event.ts;
      if (data.renamed_from) this.leave(data.renamed_from, event.ts);
      if (running) { open.end = event.ts; open.kind = "lost"; } // its worker died without a word
      if (lane.waits.length && lane.waits.at(-1).end === null) lane.waits.at(-1).end = event.ts;
      lane.attempts.push({ number: event.attempt ?? 1, start: event.ts, end: null, kind: "now", error: null });
      lane.progress = null;
    } else if (event.type === "StepFinished" && running) {
      Object.assign(open, { end: event.ts, kind: "ok" });
      lane.result = member(event.text, "data", "result") ?? "null";
      lane.finished = true;
    } else if (event.type === "ChildrenStarted") {
      this.begun ??= event.ts;
      lane.waits.push({ start: event.ts, end: null, until: null });
    } else if (event.type === "ChildrenFinished") {
      if (lane.waits.length) lane.waits.at(-1).end = event.ts;
      lane.finished = true;
    } else if (event.type === "WaitStarted") {
      this.begun ??= event.ts;
      lane.waits.push({ start: event.ts, end: null, until: data.until ?? null });
    } else if (event.type === "WaitFinished") {
      if (lane.waits.length) lane.waits.at(-1).end = event.ts;
      lane.result = member(event.text, "data", "outcome") ?? "null";
      lane.finished = true;
    } else if (event.type === "StepFailed") {
      if (running) Object.assign(open, { end: event.ts, kind: "bad", error: data.error ?? null });
      const until = data.retry_at ?? (data.retry_in === undefined ? null : event.ts + 1000 * data.retry_in);
      if (until && !data.final) lane.waits.push({ start: event.ts, end: null, until });
    } else if (event.type === "DebugTrace") {
      if (data.name === "progress") lane.progress = data;
      else if (data.name === SNOOZED) {
        if (running) Object.assign(open, { end: event.ts, kind: "rest" });
        lane.waits.push({ start: event.ts, end: null, until: event.ts + 1000 * data.seconds });
      } else if (data.name === GIVEN_BACK || data.name === CONNECTION_LOST) {
        if (running) Object.assign(open, { end: event.ts, kind: "rest" });
      } else {
        lane.traces.push(event);
        if (lane.traces.length > 1000) lane.traces.splice(0, 500);
        lane.traced += 1;
      }
    }
  }

  finish(event) {
    this.end = event;
    for (const name of this.lanes.keys()) this.leave(name, event.ts);
  }

  // Nothing more happens in this lane.
  leave(name, ts) {
    const lane = this.lanes.get(name);
    const open = lane?.attempts.at(-1);
    if (open && open.end === null) Object.assign(open, { end: ts, kind: "lost" });
    const wait = lane?.waits.at(-1);
    if (wait && wait.end === null) wait.end = ts;
  }

  lane(name) {
    let lane = this.lanes.get(name);
    if (!lane) {
      lane = { name, attempts: [], waits: [], traces: [], traced: 0, progress: null, result: undefined, finished: false };
      this.lanes.set(name, lane);
    }
    return lane;
  }

  // The steps whose attempts have begun and not ended: several, of a run with branches.
  get inFlight() {
    return [...this.lanes.values()].filter((lane) => lane.attempts.at(-1)?.end === null);
  }

  // The wait that was begun last, of those that are open.
  get wait() {
    return [...this.waits.values()].at(-1) ?? null;
  }

  get state() {
    if (this.end) return this.end.data.outcome;
    if (this.inFlight.length) return "running";
    if (this.waits.size) return "waiting";
    const open = [...this.lanes.values()].at(-1);
    const waits = open?.waits.at(-1)?.end === null;
    return this.begun !== null && !waits ? "running" : "queued";
  }

  // The step that somebody wants to see first: the one that failed or is at work.
  get interesting() {
    const lanes = [...this.lanes.values()];
    if (this.end) return this.end.data.outcome === "failed" ? lanes.at(-1)?.name : null;
    return null;
  }
}

// The drawing of a story. `steps` are the plan's, so that what is still to come has its place;
// `ahead` says of them that they will, or of a function that they may.
export class Timeline {
  constructor(story, steps, ahead, select) {
    this.story = story;
    this.steps = steps;
    this.ahead = ahead;
    this.select = select;
    this.chosen = null;
    this.rows = new Map();
    this.all = false;
    this.axis = el("div", { class: "axis", "aria-hidden": "true" });
    this.list = el("div", { id: "timeline", role: "list", "aria-label": "Steps" });
    this.more = el("button", { type: "button", class: "quiet", hidden: true, onclick: () => { this.all = true; this.draw(this.now); } });
    this.node = el("section", { class: "card timeline", "aria-label": "Timeline" }, this.axis, this.more, this.list);
  }

  draw(now) {
    this.now = now;
    const { story } = this;
    if (story.start === null) return;
    const until = Math.max(story.end ? story.end.ts : now, story.last, story.start + 1);
    const scale = { from: story.start, length: until - story.start, until };
    this.drawAxis(scale);
    const lanes = [...story.lanes.values()];
    const hidden = this.all ? 0 : Math.max(0, lanes.length - MOST_LANES);
    this.more.hidden = hidden === 0;
    setText(this.more, `${hidden} earlier steps are not drawn. Draw all`);
    const shown = new Map();
    if (!hidden) {
      shown.set("", { queue: true });
      for (const name of Object.keys(story.reused)) if (!story.lanes.has(name)) shown.set(name, { ghost: "reused" });
    }
    for (const lane of lanes.slice(hidden)) shown.set(lane.name, lane);
    for (const name of this.steps) {
      if (!story.lanes.has(name) && !shown.has(name)) shown.set(name, { ghost: story.end ? "not reached" : this.ahead });
    }
    for (const [name, row] of this.rows) if (!shown.has(name)) { row.node.remove(); this.rows.delete(name); }
    let place = this.list.firstElementChild;
    for (const [name, lane] of shown) {
      let row = this.rows.get(name);
      if (!row) { row = this.makeRow(name); this.rows.set(name, row); }
      if (row.node === place) place = place.nextElementSibling; else this.list.insertBefore(row.node, place);
      this.drawRow(row, name, lane, scale);
    }
  }

  drawAxis(scale) {
    if (this.axisLength === scale.length) return;
    this.axisLength = scale.length;
    this.axis.replaceChildren(el("span"), el("div", {}, ...[0, 0.25, 0.5, 0.75, 1].map(
      (part) => el("span", {}, part ? span(scale.length * part) : "0"))), el("span"));
  }

  makeRow(name) {
    const title = name ? el("button", { type: "button", class: "name", "data-stop": true, "aria-expanded": "false",
      onclick: () => this.select(name) }, name) : el("span", { class: "name soft" }, "in the queue");
    const svg = el("svg", { role: "img", height: "22" });
    const note = el("span", { class: "took" });
    return { node: el("div", { class: "lane", role: "listitem", "data-step": name }, title, svg, note), title, svg, note };
  }

  choose(name) {
    this.rows.get(this.chosen)?.title.setAttribute("aria-expanded", "false");
    this.chosen = this.chosen === name ? null : name;
    this.rows.get(this.chosen)?.title.setAttribute("aria-expanded", "true");
    return this.chosen;
  }

  drawRow(row, name, lane, scale) {
    const { story } = this;
    if (lane.ghost) {
      row.node.className = "lane ghost";
      row.svg.setAttribute("aria-label", `${name}: ${lane.ghost}`);
      setText(row.note, lane.ghost);
      return;
    }
    row.node.className = "lane";
    const at = (ts) => 100 * (ts - scale.from) / scale.length;
    const bar = (kind, start, end, title, height = 14) => el("rect", { class: kind, x: `${Math.min(99.6, at(start)).toFixed(3)}%`,
      width: `${Math.max(0.4, at(end) - at(start)).toFixed(3)}%`, y: (22 - height) / 2, height, rx: Math.min(2, height / 2) }, el("title", {}, title));
    const track = el("rect", { class: "track", x: "0", y: "10.5", width: "100%", height: "1" });
    if (lane.queue) {
      const end = story.begun ?? scale.until;
      row.svg.replaceChildren(track, bar("wait", story.start, end, `waited ${span(end - story.start)}`, 8),
        ...(story.cancel ? [bar("mark", story.cancel.ts, story.cancel.ts, "cancel requested", 18)] : []));
      row.svg.setAttribute("aria-label", `in the queue for ${span(end - story.start)}`);
      setText(row.note, span(end - story.start));
      return;
    }
    const drawn = [track];
    for (const wait of lane.waits.slice(-MOST_BARS)) {
      const end = wait.end ?? scale.until;
      drawn.push(bar("wait", wait.start, end, `waited ${span(end - wait.start)}`, 6));
    }
    let total = 0; // of a wait or children, which have no attempts: the time waited
    if (!lane.attempts.length) for (const wait of lane.waits) total += (wait.end ?? scale.until) - wait.start;
    for (const attempt of lane.attempts.slice(-MOST_BARS)) {
      const end = attempt.end ?? scale.until;
      total += end - attempt.start;
      const said = { ok: "finished", bad: "failed", now: "running", lost: "its worker was lost", rest: "snoozed" }[attempt.kind];
      drawn.push(bar(attempt.kind, attempt.start, end, `attempt ${attempt.number}: ${said}, ${span(end - attempt.start)}`));
      if (attempt.kind === "now" && lane.progress) {
        drawn.push(bar("done", attempt.start, attempt.start + (end - attempt.start) * lane.progress.pct / 100, `${lane.progress.pct} %`));
      }
    }
    const marked = new Set();
    for (const trace of lane.traces) {
      const place = Math.round(at(trace.ts) * MARKS / 100);
      if (marked.has(place)) continue;
      marked.add(place);
      drawn.push(el("circle", { class: "trace", cx: `${at(trace.ts).toFixed(2)}%`, cy: "20.5", r: "1.5" }, el("title", {}, String(trace.data?.name ?? "trace"))));
    }
    row.svg.replaceChildren(...drawn);
    const last = lane.attempts.at(-1);
    const waits = lane.waits.at(-1)?.end === null ? lane.waits.at(-1) : null;
    const tries = lane.attempts.length > 1 ? `${lane.attempts.length}× ` : "";
    setText(row.note, waits?.until ? `in ${span(waits.until - scale.until)}`
      : last?.kind === "now" && lane.progress ? `${Math.round(lane.progress.pct)} %` : `${tries}${span(total)}`);
    row.node.dataset.kind = waits ? "wait" : last?.kind ?? "";
    row.svg.setAttribute("aria-label", `${name}: ${last ? `${lane.attempts.length} attempts,` : "waited"} ${span(total)}`);
  }
}
