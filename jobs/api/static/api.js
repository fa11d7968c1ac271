// Calls of the HTTP API, with the token that the person gave for this tab.

import { ask, el } from "./dom.js";

// Where the API is: it may be mounted in another app, or be served below a path by a proxy.
const BASE = new URL("../", import.meta.url);
const TOKEN = "beatless-token"; // the origin may be another app's too
let skew = 0;
let asked = null;
let held = null;

export function address(path) { return new URL(`.${path}`, BASE); }

export function token() { return sessionStorage.getItem(TOKEN); }

// Milliseconds since 1970 by the server's clock: ages are right on a machine whose clock is not.
export function now() { return Date.now() + skew; }

// The text of the answer, or null if it has none.
export async function callText(path, options = {}) {
  const headers = { ...options.headers };
  if (token()) headers.Authorization = `Bearer ${token()}`;
  if (options.body) headers["Content-Type"] = "application/json";
  const answer = await fetch(address(path), { ...options, headers });
  const told = Date.parse(answer.headers.get("date"));
  if (told) skew = Math.abs(told - Date.now()) > 2000 ? told - Date.now() : 0;
  const text = answer.status === 204 ? null : await answer.text();
  if (answer.status === 401) { await login(refusal(answer, text)); return callText(path, options); }
  if (!answer.ok) throw Object.assign(new Error(refusal(answer, text)), { status: answer.status });
  return text;
}

export async function call(path, options) {
  const text = await callText(path, options);
  return text === null ? null : JSON.parse(text);
}

function refusal(answer, text) {
  let detail;
  try { ({ detail } = JSON.parse(text)); } catch { /* a proxy's own page */ }
  return typeof detail === "string" ? detail : JSON.stringify(detail) ?? (answer.statusText || `The server answers ${answer.status}`);
}

export function post(path, body = {}) { return postText(path, JSON.stringify(body)); }

export function put(path, body) { return call(path, { method: "PUT", body: JSON.stringify(body) }); }

export function postText(path, body) { return call(path, { method: "POST", body }); }

// The scopes of the token. The server decides: this is to say beforehand what it would refuse.
export function scopes() {
  held ??= call("/v1/token").then((found) => found.scopes).catch((error) => { held = null; throw error; });
  return held;
}

// Why something that needs a scope cannot be done, or null.
export async function lacks(scope) {
  return (await scopes()).includes(scope) ? null : `This token lacks the scope ${scope}`;
}

function login(reason) {
  asked ??= ask({
    title: "A token is needed",
    fields: [
      el("p", {}, `The server says: ${reason}.`),
      el("p", {}, "Make one with ", el("code", {}, "beatless token create --scope runs:read --scope runs:write --scope queues"),
        ". It is kept until this tab is closed."),
      el("label", {}, "Token", el("input", { name: "token", type: "password", autocomplete: "off", required: true })),
    ],
    verb: "Use it",
    check: async (data) => { sessionStorage.setItem(TOKEN, data.get("token").trim()); held = null; },
  }).finally(() => { asked = null; });
  return asked;
}
