// Messages that could not be published, kept until a person decides.

import { call, now, post } from "./api.js";
import { Rows, age, ask, el, problem, runLink, setText } from "./dom.js";

export async function showLetters(page) {
  const said = document.getElementById("said");
  const body = el("tbody", { id: "letters" });
  const nothing = el("p", { class: "empty", hidden: true }, "No dead letters: every message was published.");
  const rows = new Rows(body, (letter) => letter.id, makeRow);

  async function refresh() {
    const letters = (await call("/v1/dead-letters")).dead_letters;
    rows.show(letters);
    nothing.hidden = letters.length > 0;
    page.say("Live");
  }

  async function act(action) {
    said.replaceChildren();
    try { await action(); } catch (error) { said.replaceChildren(problem(error)); }
    await refresh();
  }

  function makeRow(letter) {
    const old = el("td", { class: "number", "data-label": "age" });
    const path = `/v1/dead-letters/${letter.id}`;
    const discard = () => ask({
      title: "Discard this message?",
      fields: [el("p", {}, "Its events stay in the journal, and streams read them there.")],
      verb: "Discard", danger: true, check: () => act(() => call(path, { method: "DELETE" })),
    });
    return {
      node: el("tr", {},
        el("td", { class: "id" }, runLink(letter.run_id)),
        el("td", { class: "number", "data-label": "events" }, letter.from_seq === letter.to_seq ? String(letter.from_seq) : `${letter.from_seq}–${letter.to_seq}`),
        el("td", { class: "reason" }, letter.reason), old,
        el("td", { class: "buttons" },
          el("button", { type: "button", "data-stop": true, onclick: () => act(() => post(`${path}/requeue`)) }, "Publish again"), " ",
          el("button", { type: "button", onclick: discard }, "Discard…"))),
      update() { setText(old, age(now() - Date.parse(letter.created_at))); },
    };
  }

  page.show(el("h1", {}, "Dead letters"),
    el("p", { class: "soft" }, "A dead letter is a message that Redis refused while it took others: its events are stored, and were not sent to who watches. Runs that failed are ",
      el("a", { href: "#/?state=failed&retried=false" }, "failed runs"), "."),
    el("div", { class: "card" }, el("table", { class: "queues" }, el("thead", {}, el("tr", {},
      ...[["Run"], ["Events", "number"], ["Reason"], ["Age", "number"]].map(([title, kind]) =>
        el("th", { scope: "col", class: kind }, title)), el("th", { scope: "col" }, el("span", { class: "unseen" }, "Actions")))),
      body), nothing));
  await page.every(3000, refresh);
}
