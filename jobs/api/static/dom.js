// Elements and words. Everything shown is put in as text, never as markup: names, inputs, results
// and errors come from users.

const SVG = "http://www.w3.org/2000/svg";
const DRAWN = new Set(["svg", "rect", "circle", "line", "title"]);

export function el(tag, attributes = {}, ...children) {
  const node = DRAWN.has(tag) ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

// Rows that stay the same elements while their data changes, so that focus, selection and open
// details survive every refresh.
export class Rows {
  constructor(parent, key, make) {
    this.parent = parent;
    this.key = key;
    this.make = make;
    this.known = new Map();
  }

  show(items) {
    const wanted = new Map(items.map((item) => [this.key(item), item]));
    for (const [key, row] of this.known) {
      if (!wanted.has(key)) { row.node.remove(); this.known.delete(key); }
    }
    let place = this.parent.firstElementChild;
    for (const [key, item] of wanted) {
      let row = this.known.get(key);
      if (!row) { row = this.make(item); this.known.set(key, row); }
      row.update(item);
      if (row.node === place) place = place.nextElementSibling;
      else this.parent.insertBefore(row.node, place);
    }
  }
}

// The name of a member in words: not_before is "Not before".
export function worded(name) { return name[0].toUpperCase() + name.slice(1).replaceAll("_", " "); }

export function setText(node, text) { if (node.textContent !== text) node.textContent = text; }

// The part of an id that is worth reading: the last digits of a UUID, and names that people gave.
export function shortId(runId) { return /[0-9a-f]{8}-[0-9a-f-]{27}$/.test(runId) ? runId.slice(-8) : runId; }

export function runLink(runId, words = "", attributes = {}) {
  return el("a", { href: `#/run/${encodeURIComponent(runId)}`, title: runId, ...attributes }, words, el("span", { class: "mono" }, shortId(runId)));
}

export function span(ms) {
  if (ms < 0) return "0 ms";
  if (ms < 1000) return `${Math.round(ms)} ms`;
  if (ms < 60000) return `${(ms / 1000).toFixed(ms < 10000 ? 2 : 1)} s`;
  if (ms < 3600000) return `${Math.floor(ms / 60000)} m ${Math.floor(ms % 60000 / 1000)} s`;
  if (ms < 172800000) return `${Math.floor(ms / 3600000)} h ${Math.floor(ms % 3600000 / 60000)} m`;
  return `${Math.floor(ms / 86400000)} d`;
}

export function age(ms) { return ms < 1000 ? "now" : ms < 60000 ? `${Math.floor(ms / 1000)} s` : span(ms); }

export function problem(error) { return el("p", { class: "problem", role: "alert" }, error.message); }

// A message to those who see the page and to those who hear it, until something else is done.
export function tell(...parts) {
  const said = document.getElementById("said");
  const node = el("p", { class: "told" }, ...parts, " ", el("button", { type: "button", class: "quiet", onclick: () => node.remove() }, "Dismiss"));
  said.replaceChildren(node);
}

// A button that cannot be used says why; without a reason it can be used.
export function forbid(button, reason) {
  button.dataset.title ??= button.title;
  button.disabled = Boolean(reason);
  button.title = reason || button.dataset.title;
}

export function count(number, noun) { return `${number} ${noun}${number === 1 ? "" : "s"}`; }

export function time(iso) {
  return el("time", { datetime: iso, title: iso }, new Date(iso).toLocaleString());
}

export function copyable(text, what) {
  const button = el("button", { type: "button", class: "quiet", "aria-label": `Copy ${what}`, onclick: async () => {
    await navigator.clipboard.writeText(text);
    button.textContent = "copied";
    button.addEventListener("blur", () => { button.textContent = "copy"; }, { once: true });
  } }, "copy");
  return button;
}

// A menu of rare actions, behind a button. `items` have a label, its action, and "danger" if it is one.
export function menu(label, items) {
  const summary = el("summary", { "aria-label": label, title: label }, "⋯");
  const act = (action) => {
    node.open = false;
    summary.focus(); // where a dialog gives the focus back to
    action();
  };
  const node = el("details", { class: "menu" }, summary, el("div", { class: "items" },
    ...items.map(([words, action, kind]) => el("button", { type: "button", class: kind, onclick: () => act(action) }, words))));
  node.addEventListener("focusout", (event) => { if (event.relatedTarget && !node.contains(event.relatedTarget)) node.open = false; });
  node.addEventListener("keydown", (event) => { if (event.key === "Escape" && node.open) { node.open = false; summary.focus(); } });
  const outside = (event) => { if (!node.contains(event.target)) node.open = false; };
  node.addEventListener("toggle", () => {
    if (node.open) document.addEventListener("pointerdown", outside);
    else document.removeEventListener("pointerdown", outside);
  });
  return node;
}

// A dialog that is made, asked and thrown away. `fill(form)` adds the fields; resolves with the
// form's data, or null if it was left.
export function ask({ title, fields = [], verb, danger = false, check = async () => true }) {
  const said = el("div");
  const form = el("form", {}, el("h2", { id: "dialog-title" }, title), ...fields, said,
    el("div", { class: "actions" },
      el("button", { type: "button", onclick: () => dialog.close() }, verb ? "Back" : "Close"),
      verb ? el("button", { class: danger ? "danger" : "primary", "data-verb": true }, verb) : null));
  const dialog = el("dialog", { "aria-labelledby": "dialog-title" }, form);
  let answer = null;
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    said.replaceChildren();
    const verdict = form.querySelector("[data-verb]");
    verdict.disabled = true;
    try {
      answer = await check(new FormData(form));
      dialog.close();
    } catch (error) { said.replaceChildren(problem(error)); }
    verdict.disabled = false;
  });
  document.body.append(dialog);
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => { dialog.remove(); resolve(answer); }));
}
