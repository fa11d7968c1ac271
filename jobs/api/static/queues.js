// Queues, and the controls over them for the whole fleet.

import { call, now, post, put } from "./api.js";
import { Rows, age, ask, count, el, menu, problem, setText, tell } from "./dom.js";

const COUNTS = ["queued", "delayed", "waiting", "active", "completed", "failed", "cancelled"];

export async function showQueues(page) {
  const said = document.getElementById("said");
  const body = el("tbody", { id: "queues" });
  const nothing = el("p", { class: "empty", hidden: true }, "No queues yet: a queue appears with its first run or worker.");
  const rows = new Rows(body, (queue) => queue.name, makeRow);
  let latest = new Map();
  let describe = () => {}; // what an open dialog says will happen

  async function refresh() {
    const { queues } = await call("/v1/queues");
    latest = new Map(queues.map((queue) => [queue.name, queue]));
    rows.show(queues);
    nothing.hidden = queues.length > 0;
    describe();
    page.say("Live");
  }

  async function act(name, verb) {
    said.replaceChildren();
    try { await post(`${pathOf(name)}/${verb}`); } catch (error) { said.replaceChildren(problem(error)); }
    await refresh();
  }

  // A dialog whose words follow the queue while it is open. `words` are of its counts.
  async function destroy(name, { words, done, ...dialog }) {
    said.replaceChildren();
    const extent = el("p", { id: "extent" });
    const counts = () => latest.get(name) ?? Object.fromEntries(COUNTS.map((state) => [state, 0]));
    describe = () => setText(extent, words(counts()));
    describe();
    const answer = await ask({ ...dialog, danger: true, fields: [extent, ...(dialog.fields ?? [])] });
    describe = () => {};
    if (!answer) return;
    tell(done(answer.removed));
    await refresh();
    if (document.activeElement === document.body) document.getElementById("main").focus(); // its row is gone
  }

  async function changeAgeing(name) {
    said.replaceChildren();
    const set = await ask({
      title: `Ageing in ${name}`, verb: "Set",
      fields: [el("p", { class: "soft" }, "A run that waits for longer comes before those of a higher priority. Left empty, priority alone decides."),
        el("label", {}, "Seconds", el("input", { name: "seconds", type: "number", min: "0.001", max: "315360000", step: "any", value: latest.get(name)?.age_after ?? "" }))],
      check: (data) => put(pathOf(name), { age_after: data.get("seconds") ? Number(data.get("seconds")) : null }),
    });
    if (!set) return;
    tell(set.age_after === null ? `In queue ${name} priority alone decides which run comes first.` : `In queue ${name} runs that wait for ${set.age_after} s come first.`);
    await refresh();
  }

  function drain(name) {
    return destroy(name, {
      title: `Drain ${name}?`, verb: "Drain",
      words: (queue) => `${are(queue.queued, "run", "is", "are")} queued, ${queue.delayed} delayed and ${queue.waiting} waiting for a signal or a time, begun or not: all of them are taken away for good, `
        + `with their events, and no on_cancel is called. ${queue.active ? `${are(queue.active, "run", "is", "are")} running and ${queue.active === 1 ? "goes" : "go"} on.` : "None is running."}`,
      check: () => post(`${pathOf(name)}/drain`),
      done: (removed) => `${count(removed, "run")} of queue ${name} removed.`,
    });
  }

  function obliterate(name) {
    const typed = el("input", { name: "name", autocomplete: "off", autocapitalize: "off", spellcheck: "false", required: true, oninput: () => confirm() });
    const confirm = () => typed.setCustomValidity(typed.value === name ? "" : `Type ${name}, the queue's name`);
    confirm();
    return destroy(name, {
      title: `Obliterate ${name}?`, verb: "Obliterate",
      words: (queue) => `${are(queue.queued + queue.delayed + queue.waiting, "run", "waits", "wait")}, ${queue.active} ${queue.active === 1 ? "is" : "are"} running, `
        + `${queue.completed + queue.failed + queue.cancelled} ended. All of them are taken away for good, with their events, and the queue itself. Other queues stay as they are.`,
      fields: [
        el("label", { class: "check" }, el("input", { type: "checkbox", name: "force" }),
          el("span", {}, "Force: also take runs that are running away from their workers, which then write nothing more. Without it nothing is done while a run is running.")),
        el("label", {}, `Type ${name} to confirm`, typed),
      ],
      check: (data) => call(`${pathOf(name)}${data.has("force") ? "?force=true" : ""}`, { method: "DELETE" }),
      done: (removed) => `Queue ${name} obliterated: ${count(removed, "run")} removed.`,
    });
  }

  function makeRow(queue) {
    const paused = el("span", { class: "badge" }, "paused");
    const ageing = el("span", { class: "soft ageing", hidden: true });
    const numbers = COUNTS.map((name) => el("td", { class: `number ${name}`, "data-label": name }));
    const oldest = el("td", { class: "number", "data-label": "oldest" });
    const rate = el("td", { class: "number", "data-label": "per minute" });
    const workers = el("td", { class: "number", "data-label": "workers" });
    let halted = false;
    const toggle = el("button", { type: "button", "data-stop": true, onclick: () => act(queue.name, halted ? "resume" : "pause") });
    const more = menu(`More for ${queue.name}`, [["Change ageing…", () => changeAgeing(queue.name)], ["Drain…", () => drain(queue.name), "danger"], ["Obliterate…", () => obliterate(queue.name), "danger"]]);
    return {
      node: el("tr", {}, el("td", { class: "title" },
        el("a", { href: `#/?queue=${encodeURIComponent(queue.name)}` }, queue.name), " ", paused, " ", ageing),
        ...numbers, oldest, rate, workers, el("td", { class: "buttons" }, toggle, " ", more)),
      update(state) {
        halted = Boolean(state.paused_at);
        paused.hidden = !halted;
        ageing.hidden = state.age_after === null;
        setText(ageing, state.age_after === null ? "" : `ages after ${state.age_after} s`);
        COUNTS.forEach((name, place) => setText(numbers[place], String(state[name])));
        numbers.forEach((cell) => cell.classList.toggle("zero", cell.textContent === "0"));
        setText(oldest, state.oldest ? age(now() - Date.parse(state.oldest)) : "–");
        setText(rate, String(state.per_minute));
        setText(workers, String(state.workers));
        setText(toggle, halted ? "Resume" : "Pause");
        toggle.setAttribute("aria-label", `${halted ? "Resume" : "Pause"} ${queue.name}`);
      },
    };
  }

  page.show(el("h1", {}, "Queues"), el("div", { class: "card" },
    el("table", { class: "queues" }, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Queue"),
      ...[...COUNTS, "oldest", "per minute", "workers"].map((title) => el("th", { scope: "col", class: "number" }, title)),
      el("th", { scope: "col" }, el("span", { class: "unseen" }, "Actions")))), body), nothing));
  await page.every(2000, refresh);
}

function pathOf(name) { return `/v1/queues/${encodeURIComponent(name)}`; }

function are(number, noun, one, more) { return `${count(number, noun)} ${number === 1 ? one : more}`; }
