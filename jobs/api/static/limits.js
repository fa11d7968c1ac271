// Limits and groups: who runs and who waits, and the numbers that a person can change.

import { call, lacks, now, put, scopes } from "./api.js";
import { Rows, age, ask, count, el, forbid, setText, tell } from "./dom.js";

const MOST = 1000; // that the server lists of each

export async function showLimits(page, query) {
  let limits = [];
  let groups = [];
  const filter = el("input", { "data-filter": true, value: query.get("find") ?? "", placeholder: "any name", maxlength: "256", autocomplete: "off", spellcheck: "false",
    oninput: () => {
      history.replaceState(null, "", filter.value ? `#/limits?${new URLSearchParams({ find: filter.value })}` : "#/limits");
      show();
    } });
  const oneLimit = table("Limits", "limits", ["Limit", "Key", "Lets in", "Running", "Waiting", "Oldest"],
    (limit) => JSON.stringify([limit.name, limit.key]), makeLimit);
  const oneGroup = table("Groups", "groups", ["Group", "Queue", "Weight", "Running", "Waiting", "Oldest"],
    (group) => JSON.stringify([group.group, group.queue]), makeGroup);
  const reason = (await scopes()).includes("admin") ? null : await lacks("queues"); // as the server has it

  function show() {
    const has = (...names) => names.some((name) => name?.toLowerCase().includes(filter.value.toLowerCase()));
    oneLimit.show(limits.filter(({ name, key }) => has(name, key)), limits.length,
      "No run uses a limit or waits for one, and none is set. Limits are declared by plans: Plan(…, limits=[…]).");
    oneGroup.show(groups.filter(({ group, queue }) => has(group, queue)), groups.length,
      "No unfinished run has a group, and no group has a weight. Runs get one when they are started: start_run(…, group=…).");
  }

  async function refresh() {
    [{ limits }, { groups }] = await Promise.all([call("/v1/limits"), call("/v1/groups")]);
    show();
    page.say("Live");
  }

  // After a dialog the row may be another one, or gone: the focus must not be lost with it.
  async function done(words, row) {
    tell(words);
    await refresh();
    const held = document.activeElement;
    if (held === document.body || held.disabled) ((row.isConnected && row.querySelector("button:enabled")) || document.getElementById("main")).focus();
  }

  async function change({ name, at_once: atOnce, rate }, row) {
    const member = rate === null ? "at_once" : "rate";
    const [label, input] = rate === null
      ? ["Runs of one key at once", el("input", { name: "number", type: "number", min: "1", max: "10000", required: true, value: atOnce })]
      : ["Runs of one key that begin in a time, as 100/min", el("input", { name: "number", required: true, autocomplete: "off", spellcheck: "false", value: rate })];
    const set = await ask({
      title: `Change ${name}`, verb: "Set",
      fields: [el("p", { class: "soft" }, "For all keys, whatever plans say, until it is released. Runs that have begun go on."), el("label", {}, label, input)],
      check: (data) => put(pathOf(name), { [member]: rate === null ? Number(data.get("number")) : data.get("number").trim() }),
    });
    if (set) await done(`Limit ${name} lets ${rulesOf(set)}.`, row);
  }

  async function release({ name }, row) {
    const gone = await ask({
      title: `Release ${name}?`, verb: "Release",
      fields: [el("p", {}, "Each run brings the number again that its plan had when it was started.")],
      check: () => call(pathOf(name), { method: "DELETE" }),
    });
    if (gone) await done(`Limit ${name} is that of its plans again.`, row);
  }

  async function weigh({ group, weight }, row) {
    const set = await ask({
      title: `Weigh ${group}`, verb: "Set",
      fields: [el("p", { class: "soft" }, "Its turns for one of a group with the weight 1, in all queues."),
        el("label", {}, "Weight, 1 to 100", el("input", { name: "weight", type: "number", min: "1", max: "100", required: true, value: weight }))],
      check: (data) => put("/v1/groups", { group, weight: Number(data.get("weight")) }),
    });
    if (set) await done(`Group ${group} has ${count(set.weight, "turn")} for one of the others.`, row);
  }

  function makeLimit({ name, key }) {
    let latest = null;
    const row = numbersOf();
    const rule = el("td", { "data-label": "lets in" });
    const which = key ? `${name} (${key})` : name;
    const alter = el("button", { type: "button", "data-stop": true, "aria-label": `Change ${which}`, onclick: () => change(latest, node) }, "Change…");
    const free = el("button", { type: "button", "aria-label": `Release ${which}`, onclick: () => release(latest, node) }, "Release…");
    const node = el("tr", { "data-limit": name, "data-key": key ?? "" }, el("td", { class: "title" }, name),
      el("td", { "data-label": "key" }, key || "–"), rule, ...row.cells, el("td", { class: "buttons" }, alter, " ", free));
    forbid(alter, reason);
    return {
      node,
      update(limit) {
        latest = limit;
        if (rule.dataset.rule !== `${rulesOf(limit)} ${limit.is_set}`) {
          rule.dataset.rule = `${rulesOf(limit)} ${limit.is_set}`;
          rule.replaceChildren(rulesOf(limit), ...(limit.is_set ? [" ", el("span", { class: "badge" }, "set")] : []));
        }
        row.update(limit, limit.rate !== null);
        forbid(free, reason ?? (limit.is_set ? null : "It is that of its plans: nobody has set another"));
      },
    };
  }

  function makeGroup({ group, queue }) {
    let latest = null;
    const row = numbersOf();
    const weight = el("td", { class: "number", "data-label": "weight" });
    const alter = el("button", { type: "button", "data-stop": true, "aria-label": `Weigh ${group}${queue === null ? "" : ` in ${queue}`}`, onclick: () => weigh(latest, node) }, "Weigh…");
    const node = el("tr", { "data-group": group }, el("td", { class: "title" }, group),
      el("td", { "data-label": "queue" }, queue ?? "–"), weight, ...row.cells, el("td", { class: "buttons" }, alter));
    forbid(alter, reason);
    return {
      node,
      update(state) {
        latest = state;
        setText(weight, String(state.weight));
        row.update(state, false);
      },
    };
  }

  page.show(el("h1", { class: "unseen" }, "Limits and groups"),
    el("div", { class: "bar" }, el("label", {}, "find", filter)), oneLimit.node, oneGroup.node);
  await page.every(2000, refresh);
}

// A card with a table of its own, and words in its place if it has no rows.
function table(title, id, heads, key, make) {
  const body = el("tbody", { id });
  const rows = new Rows(body, key, make);
  const nothing = el("p", { class: "empty", hidden: true });
  const rest = el("p", { class: "soft padded", hidden: true }, `The first ${MOST} are listed: there may be more.`);
  const numbers = new Set(["Weight", "Running", "Waiting", "Oldest"]);
  const list = el("table", { class: "queues limits" }, el("thead", {}, el("tr", {},
    ...heads.map((head) => el("th", { scope: "col", class: numbers.has(head) ? "number" : null }, head)),
    el("th", { scope: "col" }, el("span", { class: "unseen" }, "Actions")))), body);
  return {
    node: el("section", { class: "card", "aria-label": title }, el("h2", { class: "head-of" }, title), list, nothing, rest),
    show(found, known, words) {
      rows.show(found);
      list.hidden = found.length === 0;
      nothing.hidden = found.length > 0;
      setText(nothing, known ? `None of the ${known} listed has this in its name.` : words);
      rest.hidden = known < MOST;
    },
  };
}

// The cells that limits and groups have in common.
function numbersOf() {
  const running = el("td", { class: "number", "data-label": "running" });
  const waiting = el("td", { class: "number", "data-label": "waiting" });
  const oldest = el("td", { class: "number", "data-label": "oldest" });
  return {
    cells: [running, waiting, oldest],
    update(state, isRate) {
      setText(running, isRate ? "–" : String(state.running)); // a rate holds no slots
      setText(waiting, String(state.waiting));
      setText(oldest, state.oldest ? age(now() - Date.parse(state.oldest)) : "–");
      for (const cell of [running, waiting]) cell.classList.toggle("zero", cell.textContent === "0");
    },
  };
}

function rulesOf({ at_once: atOnce, rate, hold }) { return rate ?? `${atOnce} at once${hold ? ", held to the end" : ""}`; }

function pathOf(name) { return `/v1/limits/${encodeURIComponent(name)}`; }
