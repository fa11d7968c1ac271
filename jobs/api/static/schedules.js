// Schedules: their next ticks and last runs, and the controls over them.

import { call, lacks, now, post } from "./api.js";
import { Rows, age, ask, count, el, forbid, menu, problem, runLink, setText, span, tell } from "./dom.js";

const PAGE = 50;
const LATE = 5000; // ms after which a tick that nobody has fired is told
const STATES = { active: "completed", paused: "queued", undeclared: "cancelled", stopped: "failed" }; // by their colours

export async function showSchedules(page, query) {
  const said = document.getElementById("said");
  const afters = [before(query.get("from") ?? "")]; // of the pages from the first to the one that is shown
  let following = null;
  const body = el("tbody", { id: "schedules" });
  const nothing = el("p", { class: "empty", hidden: true });
  const rows = new Rows(body, (schedule) => schedule.name, makeRow);
  const back = el("button", { type: "button", onclick: () => turn(-1) }, "← Before");
  const on = el("button", { type: "button", onclick: () => turn(1) }, "After →");
  const from = el("input", { "data-filter": true, value: query.get("from") ?? "", placeholder: "the first", maxlength: "128", autocomplete: "off", spellcheck: "false",
    onchange: () => {
      const name = from.value.trim();
      afters.splice(0, afters.length, before(name));
      history.replaceState(null, "", name ? `#/schedules?${new URLSearchParams({ from: name })}` : "#/schedules");
      return refresh();
    } });
  const reason = await lacks("runs:write");

  function turn(by) {
    if (by > 0) afters.push(following); else afters.pop();
    return refresh();
  }

  async function refresh() {
    const found = await call(`/v1/schedules?${new URLSearchParams({ limit: PAGE, after: afters.at(-1) })}`);
    following = found.next;
    rows.show(found.schedules);
    nothing.hidden = found.schedules.length > 0;
    setText(nothing, afters.at(-1) ? "No schedule has a name from there on."
      : "No schedules. Give them to the App and run beatless migrate, or store them by create_schedule.");
    back.disabled = afters.length === 1;
    on.disabled = !following;
    page.say("Live");
  }

  async function act(action) {
    said.replaceChildren();
    try { await action(); } catch (error) { said.replaceChildren(problem(error)); }
    await refresh();
  }

  async function backfill({ name, tz }) {
    const moment = (member, label) => el("label", {}, label, el("input", { name: member, type: "datetime-local", step: "1", required: true }));
    const done = await ask({
      title: `Backfill ${name}`, verb: "Start the runs",
      fields: [
        el("p", { class: "soft" }, `Starts a run for each tick of this time that has none. Times are those of this browser (${zone()}); the schedule is in ${tz}.`),
        el("div", { class: "columns" }, moment("from", "From"), moment("to", "To, exclusive")),
      ],
      check: (data) => post(`${pathOf(name)}/backfill`, { from: iso(data.get("from")), to: iso(data.get("to")) }),
    });
    if (!done) return;
    tell(el("a", { href: `#/?${new URLSearchParams({ tag: `backfill=${done.id}` })}` }, count(done.runs, "run")), ` of ${name} started. `,
      el("button", { type: "button", onclick: () => act(() => cancel(done.id)) }, "Cancel them"));
    await refresh();
  }

  async function cancel(id) {
    const { cancelled } = await post(`/v1/backfills/${encodeURIComponent(id)}/cancel`);
    tell(`${count(cancelled, "run")} of the backfill cancelled.`);
  }

  async function askToCancel() {
    await ask({
      title: "Cancel a backfill", verb: "Cancel its runs", danger: true,
      fields: [el("p", { class: "soft" }, "Its runs have the tag ", el("code", {}, "backfill"), ", whose value is asked for. Those that have ended stay as they are."),
        el("label", {}, "Backfill", el("input", { name: "id", autocomplete: "off", spellcheck: "false", required: true }))],
      check: async (data) => { await cancel(data.get("id").trim()); return true; },
    });
  }

  async function remove(name) {
    const gone = await ask({
      title: `Delete ${name}?`, verb: "Delete", danger: true,
      fields: [el("p", {}, "It fires no more. Its runs stay.")],
      check: async () => { await call(pathOf(name), { method: "DELETE" }); return true; },
    });
    if (!gone) return;
    tell(`Schedule ${name} deleted.`);
    await refresh();
    if (document.activeElement === document.body) document.getElementById("main").focus(); // its row is gone
  }

  function makeRow({ name }) {
    let latest = null;
    const plan = el("a");
    const rule = el("td", { class: "rule", "data-label": "at" });
    const next = el("span");
    const ticks = el("ol", { class: "ticks" });
    const ahead = el("details", {}, el("summary", { "aria-label": `The next ticks of ${name}` }, next), ticks);
    const last = el("td", { "data-label": "last run" });
    const late = el("td", { class: "number", "data-label": "late" });
    const state = el("span", { class: "state" });
    const why = el("span", { class: "why" });
    const toggle = el("button", { type: "button", "data-stop": true, onclick: () => act(() => post(`${pathOf(name)}/${halted(latest) ? "resume" : "pause"}`)) });
    const run = el("button", { type: "button", "aria-label": `Run ${name} now`, onclick: () => act(async () => {
      const started = await post(`${pathOf(name)}/run-now`);
      tell("Started ", runLink(started.run_id, `${started.plan} `));
    }) }, "Run now");
    const more = menu(`More for ${name}`, [["Backfill…", () => backfill(latest)], ["Cancel a backfill…", askToCancel], ["Delete…", () => remove(name), "danger"]]);
    const [fill, , erase] = more.querySelectorAll("button");
    return {
      node: el("tr", { "data-schedule": name }, el("td", { class: "title" }, name, " ", el("span", { class: "of" }, plan)), rule,
        el("td", { "data-label": "next tick" }, ahead), last, late, el("td", { class: "at" }, state, why),
        el("td", { class: "buttons" }, toggle, " ", run, " ", more)),
      update(schedule) {
        const changed = JSON.stringify(latest) !== JSON.stringify(schedule);
        latest = schedule;
        if (changed) {
          setText(plan, schedule.plan);
          plan.href = `#/?${new URLSearchParams({ plan: schedule.plan })}`;
          rule.replaceChildren(...ruleOf(schedule));
          ticks.replaceChildren(...schedule.next_ticks.map((tick) => el("li", {}, clock(tick, schedule.tz))));
          last.replaceChildren(...(schedule.last_run_id ? [runLink(schedule.last_run_id), " ", el("span", { class: "soft ago" })] : ["–"]));
          setText(state, schedule.state);
          state.className = `state ${STATES[schedule.state] ?? ""}`;
          setText(why, schedule.reason ?? "");
          why.title = schedule.reason ?? "";
          setText(toggle, halted(schedule) ? "Resume" : "Pause");
          toggle.setAttribute("aria-label", `${halted(schedule) ? "Resume" : "Pause"} ${name}`);
          forbid(toggle, reason ?? (schedule.state === "undeclared" ? `The app ${schedule.app} declares it no more: declare it and migrate, or delete it` : null));
          for (const button of [run, fill, erase]) forbid(button, reason);
          erase.hidden = schedule.declared && schedule.state !== "undeclared";
        }
        const waits = schedule.next_tick === null ? null : Date.parse(schedule.next_tick) - now();
        setText(next, waits === null ? "–" : waits > 0 ? `in ${age(waits)}` : "now");
        ahead.classList.toggle("none", waits === null);
        const ago = last.querySelector(".ago");
        const old = schedule.last_fired_at ? age(now() - Date.parse(schedule.last_fired_at)) : "";
        if (ago) setText(ago, old === "now" ? old : `${old} ago`);
        // Jitter puts a tick off; one that replaces a run waits for its end.
        const due = waits === null ? 0 : -waits - 1000 * schedule.jitter;
        setText(late, due > LATE ? `due for ${age(due)}` : schedule.last_late_s === null ? "–" : span(1000 * schedule.last_late_s));
        late.classList.toggle("failed", due > LATE);
      },
    };
  }

  page.show(el("h1", { class: "unseen" }, "Schedules"),
    el("div", { class: "bar" }, el("label", {}, "from the name", from)),
    el("div", { class: "card" },
      el("table", { class: "queues schedules" }, el("thead", {}, el("tr", {},
        ...[["Schedule"], ["At"], ["Next tick"], ["Last run"], ["Late", "number"], ["State"]].map(([title, kind]) => el("th", { scope: "col", class: kind }, title)),
        el("th", { scope: "col" }, el("span", { class: "unseen" }, "Actions")))), body), nothing),
    el("div", { class: "pager" }, back, on));
  await page.every(2000, refresh);
}

function halted({ state }) { return state !== "active"; }

function pathOf(name) { return `/v1/schedules/${encodeURIComponent(name)}`; }

// The name behind which a list begins that starts with this one: names have no ~, which is above all
// that they have.
function before(name) { return name && `${name.slice(0, -1)}${String.fromCharCode(name.charCodeAt(name.length - 1) - 1)}~`; }

// In words of the declaration; what is not the default follows.
function ruleOf({ cron, every, tz, catch_up: catchUp, overlap, jitter }) {
  const at = cron ?? (every === null ? "by another rule" : `every ${every} s`);
  const more = [...(cron && tz !== "UTC" ? [tz] : []), ...(overlap === "allow" ? [] : [`overlap ${overlap}`]),
    ...(catchUp === "one" ? [] : [`catch up ${catchUp}`]), ...(jitter ? [`jitter ${jitter} s`] : [])];
  return [el("code", {}, at), ...more.map((words) => el("span", { class: "soft" }, ` ${words}`))];
}

// A tick in the zone of its schedule, or in UTC if this browser lacks that.
function clock(tick, tz) {
  const form = { weekday: "short", day: "numeric", month: "short", hour: "2-digit", minute: "2-digit", second: "2-digit", timeZoneName: "short" };
  let text;
  try { text = new Date(tick).toLocaleString(undefined, { ...form, timeZone: tz }); } catch { text = new Date(tick).toLocaleString(undefined, { ...form, timeZone: "UTC" }); }
  return el("time", { datetime: tick, title: tick }, text);
}

function zone() { return Intl.DateTimeFormat().resolvedOptions().timeZone; }

function iso(text) { return new Date(text).toISOString(); }
