// Queues, and what can be said about them for the whole fleet.

import { call, now, post } from "./api.js";
import { Rows, age, ask, el, problem, setText } from "./dom.js";

const COUNTS = ["waiting", "delayed", "active", "completed", "failed", "cancelled"];

export async function showQueues(page) {
  const said = document.getElementById("said");
  const body = el("tbody", { id: "queues" });
  const nothing = el("p", { class: "empty", hidden: true }, "No queues yet: a queue appears with its first run.");
  const rows = new Rows(body, (queue) => queue.name, makeRow);

  async function refresh() {
    const { queues } = await call("/v1/queues");
    rows.show(queues);
    nothing.hidden = queues.length > 0;
    page.say("Live");
  }

  async function act(name, verb) {
    said.replaceChildren();
    try { await post(`/v1/queues/${encodeURIComponent(name)}/${verb}`); } catch (error) { said.replaceChildren(problem(error)); }
    await refresh();
  }

  function drain(name) {
    return ask({
      title: `Drain ${name}?`,
      fields: [el("p", {}, "Every run that waits in it is taken away, with all of its events. Runs that are running go on.")],
      verb: "Drain", danger: true, check: () => act(name, "drain"),
    });
  }

  function makeRow(queue) {
    const paused = el("span", { class: "badge" }, "paused");
    const numbers = COUNTS.map((name) => el("td", { class: `number ${name}`, "data-label": name }));
    const oldest = el("td", { class: "number", "data-label": "oldest" });
    const rate = el("td", { class: "number", "data-label": "per minute" });
    const workers = el("td", { class: "number", "data-label": "workers" });
    let halted = false;
    const toggle = el("button", { type: "button", "data-stop": true, onclick: () => act(queue.name, halted ? "resume" : "pause") });
    const emptied = el("button", { type: "button", class: "danger", "aria-label": `Drain ${queue.name}`, onclick: () => drain(queue.name) }, "Drain");
    return {
      node: el("tr", {}, el("td", { class: "title" },
        el("a", { href: `#/?queue=${encodeURIComponent(queue.name)}` }, queue.name), " ", paused),
        ...numbers, oldest, rate, workers, el("td", { class: "buttons" }, toggle, " ", emptied)),
      update(latest) {
        halted = Boolean(latest.paused_at);
        paused.hidden = !halted;
        COUNTS.forEach((name, place) => setText(numbers[place], String(latest[name])));
        numbers.forEach((cell) => cell.classList.toggle("zero", cell.textContent === "0"));
        setText(oldest, latest.oldest ? age(now() - Date.parse(latest.oldest)) : "–");
        setText(rate, String(latest.per_minute));
        setText(workers, String(latest.workers));
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
