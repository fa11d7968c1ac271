// The fleet: what runs of it, in which versions, and how far publishing is behind.

import { call, now } from "./api.js";
import { Rows, age, count, el, setText, span } from "./dom.js";

export async function showSystem(page) {
  const facts = el("dl", { class: "facts" });
  const notes = el("div");
  const relays = el("tbody", { id: "relays" });
  const workers = el("tbody", { id: "workers" });
  const relayRows = new Rows(relays, (relay) => relay.pid, makeRow);
  const workerRows = new Rows(workers, (worker) => worker.name, makeRow);
  const none = el("p", { class: "empty", hidden: true }, "No relay runs: nothing is dispatched, and no event is live. Start ", el("code", {}, "beatless relay"), ".");
  const idle = el("p", { class: "empty", hidden: true }, "No worker tells that it is there: runs wait for one. Start ", el("code", {}, "beatless worker"), ".");

  async function refresh() {
    const found = await call("/v1/system");
    const entries = [["beatless", found.version], ["PostgreSQL", found.postgres], ["Redis", found.redis ?? "cannot be reached"],
      ["Celery", found.celery], ["Python", found.python], ["Schema", found.revision ?? "none"],
      ["Not published", `${count(found.unpublished, "append")}${found.unpublished ? `, oldest ${span(1000 * found.lag_seconds)}` : ""}`],
      ["Dead letters", found.dead_letters ? el("a", { href: "#/dead-letters" }, String(found.dead_letters)) : "0"]];
    facts.replaceChildren(...entries.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", { id: `system-${name.toLowerCase().replace(" ", "-")}` }, value))));
    relayRows.show(found.relays.map((relay) => ({ pid: relay.pid, cells: [
      ["relay", relay.process ?? relay.address ?? "this host"], ["shards", `${relay.shards.length} of ${found.shards}`],
      ["version", relay.version ?? "unknown"], ["up", relay.since ? age(now() - Date.parse(relay.since)) : "unknown"]] })));
    workerRows.show(found.workers.map((worker) => ({ name: `${worker.hostname} ${worker.started_at}`, cells: [
      ["worker", worker.hostname], ["queues", worker.queues.join(", ")], ["processes", String(worker.processes)],
      ["version", worker.version], ["up", age(now() - Date.parse(worker.started_at))]] })));
    none.hidden = found.relays.length > 0;
    idle.hidden = found.workers.length > 0;
    const others = new Set([...found.relays, ...found.workers].map(({ version }) => version).filter((version) => version && version !== found.version));
    const told = [];
    if (others.size) told.push(`Other versions of beatless run beside ${found.version}: ${[...others].sort().join(", ")}.`);
    if (found.revision !== found.revision_needed) told.push(`The schema is at revision ${found.revision ?? "none"}, this version is made for ${found.revision_needed}.`);
    const led = found.relays.reduce((sum, relay) => sum + relay.shards.length, 0);
    if (found.relays.length && led < found.shards) told.push(`${count(found.shards - led, "shard")} of ${found.shards} without a leader: if it stays so, restart the relays.`);
    notes.replaceChildren(...told.map((text) => el("p", { class: "note" }, text)));
    page.say("Live");
  }

  page.show(el("h1", {}, "System"), facts, notes,
    card("Relays", ["Relay", "Leads shards", "Version", "Up"], relays, none),
    card("Workers", ["Worker", "Queues", "Processes", "Version", "Up"], workers, idle),
    el("p", { class: "soft" }, "Every hop is tried, and known misconfigurations are looked for, by ", el("code", {}, "beatless doctor"), "."));
  await page.every(5000, refresh);
}

function card(title, heads, body, empty) {
  return el("section", { class: "card", "aria-label": title }, el("h2", { class: "head-of" }, title),
    el("table", { class: "fleet" }, el("thead", {}, el("tr", {}, ...heads.map((head) => el("th", { scope: "col" }, head)))), body), empty);
}

function makeRow(item) {
  const cells = item.cells.map(([label], place) => el("td", { "data-label": label, class: place ? null : "title" }));
  return {
    node: el("tr", {}, ...cells),
    update(latest) { latest.cells.forEach(([, text], place) => setText(cells[place], text)); },
  };
}
