// Which page is shown, and the keys that work on all of them.

import { lacks } from "./api.js";
import { ask, el, forbid, problem } from "./dom.js";
import { showLetters } from "./letters.js";
import { showLimits } from "./limits.js";
import { seen, watch } from "./places.js";
import { showQueues } from "./queues.js";
import { showRun } from "./run.js";
import { showRuns } from "./runs.js";
import { showSchedules } from "./schedules.js";
import { showSystem } from "./system.js";
import { startRun } from "./start.js";

const main = document.getElementById("main");
const status = document.getElementById("status");
const fresh = document.getElementById("new");
const SHORTCUTS = [
  ["n", "start a run"], ["r", "runs"], ["q", "queues"], ["h", "schedules"], ["l", "limits and groups"], ["d", "dead letters"], ["s", "system"],
  ["/", "go to the filter"], ["j  k", "next, previous row or step"], ["Enter", "open it"],
  ["a", "decide: go to the question of the run that is shown"], ["w", "send a signal to the run that is shown"], ["c", "cancel the run that is shown"], ["t", "retry the run that is shown"],
  ["x", "remove the run that is shown"], ["?", "this list"],
];

// One page. `leave` is called when another one takes its place, `keys` are its own shortcuts.
class Page {
  constructor() { this.left = false; this.keys = {}; this.timers = []; this.endings = []; }

  title(words) { if (!this.left) document.title = `${words} · beatless`; }

  show(...nodes) { if (!this.left) main.replaceChildren(...nodes); }

  say(text, kind = "live") {
    if (this.left || status.textContent === text) return;
    status.className = kind;
    status.textContent = text;
  }

  // Now, and then every so often while somebody looks.
  async every(ms, action) {
    const guarded = async () => {
      try { await action(); } catch (error) {
        if (this.left) return;
        this.say(error.status ? error.message : "The server cannot be reached, trying again", "lost");
      }
    };
    await action();
    if (this.left) return;
    let busy = false;
    const look = async () => {
      if (!seen() || busy) return;
      busy = true;
      await guarded();
      busy = false;
    };
    this.timers.push(setInterval(look, ms));
    this.endings.push(watch(look));
  }

  leave() {
    this.left = true;
    this.timers.forEach(clearInterval);
    this.endings.forEach((end) => end());
  }
}

let page = new Page();

async function route(event) {
  page.leave();
  page = new Page();
  const mine = page;
  document.getElementById("said").replaceChildren();
  status.textContent = "";
  const [path, query] = location.hash.replace(/^#/, "").split("?");
  const run = runOf(path);
  const [name, title, show] = run !== null ? ["runs", run, () => showRun(mine, run)]
    : path === "" || path === "/" ? ["runs", "Runs", () => showRuns(mine, new URLSearchParams(query))]
    : path === "/queues" ? ["queues", "Queues", () => showQueues(mine)]
    : path === "/schedules" ? ["schedules", "Schedules", () => showSchedules(mine, new URLSearchParams(query))]
    : path === "/limits" ? ["limits", "Limits", () => showLimits(mine, new URLSearchParams(query))]
    : path === "/dead-letters" ? ["letters", "Dead letters", () => showLetters(mine)]
    : path === "/system" ? ["system", "System", () => showSystem(mine)]
    : ["", "No such page", () => showNothing(mine, path)];
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.page === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  mine.title(title);
  if (event) main.focus({ preventScroll: true });
  lacks("runs:write").then((reason) => forbid(fresh, reason)).catch(() => {}); // the page tells what is wrong
  try { await show(); } catch (error) {
    mine.show(problem(error), el("p", {}, el("a", { href: "#/" }, "← All runs")));
  }
}

function runOf(path) {
  try { return decodeURIComponent(path.match(/^\/run\/(.+)$/)?.[1] ?? "") || null; } catch { return null; }
}

function showNothing(shown, path) {
  shown.show(el("h1", {}, "There is no such page"),
    el("p", {}, "Nothing is at ", el("code", {}, `#${path}`), "."), el("p", {}, el("a", { href: "#/" }, "← All runs")));
}

function help() {
  ask({ title: "Keyboard shortcuts", fields: [el("dl", { class: "keys" }, ...SHORTCUTS.flatMap(
    ([keys, what]) => [el("dt", {}, ...keys.split("  ").map((key) => el("kbd", {}, key))), el("dd", {}, what)]))] });
}

function walk(step) {
  const places = [...main.querySelectorAll("[data-stop]")].filter((place) => place.offsetParent !== null);
  const here = places.indexOf(document.activeElement);
  const next = here < 0 ? (step > 0 ? 0 : places.length - 1) : here + step;
  places[Math.max(0, Math.min(places.length - 1, next))]?.focus();
}

const KEYS = {
  n: () => fresh.click(),
  r: () => { location.hash = "#/"; },
  q: () => { location.hash = "#/queues"; },
  h: () => { location.hash = "#/schedules"; },
  l: () => { location.hash = "#/limits"; },
  d: () => { location.hash = "#/dead-letters"; },
  s: () => { location.hash = "#/system"; },
  "/": () => main.querySelector("[data-filter]")?.focus(),
  j: () => walk(1),
  k: () => walk(-1),
  "?": help,
};

document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, textarea, select, dialog");
  if (event.ctrlKey || event.metaKey || event.altKey || typing) return;
  const action = page.keys[event.key] ?? KEYS[event.key];
  if (!action) return;
  event.preventDefault();
  action();
});
document.getElementById("skip").addEventListener("click", (event) => { event.preventDefault(); main.focus(); });
fresh.addEventListener("click", () => startRun());
document.getElementById("help").addEventListener("click", help);
window.addEventListener("hashchange", route);
route();
