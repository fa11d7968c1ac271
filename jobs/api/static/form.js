// The fields of a decision, made from its JSON Schema. The page behind a link has the same, without
// scripts: form_fields.py.

import { el } from "./dom.js";
import { object, parts, typed } from "./json.js";

const WHOLE = "decision"; // the only field of a schema without members: its JSON
const INPUTS = { date: "date", time: "time", email: "email", uri: "url", password: "password" };
const SCALARS = ["boolean", "integer", "number", "string"];
const TEXTS = Object.fromEntries(["default", "enum", "const", "minimum", "maximum"].map((name) => [name, Symbol(name)])); // their members, as they are written

export class Form {
  constructor(text) {
    const schema = parsed(text);
    const whole = resolved(schema, schema);
    const given = whole.properties ?? {};
    const names = new Set([...(whole["x-order"] ?? []), ...Object.keys(given)]); // jsonb keeps no order
    const members = [...names].filter((name) => name in given).map((name) => [name, given[name]]);
    this.whole = members.length === 0;
    this.fields = this.whole ? [field(WHOLE, { title: "Decision (JSON)" }, true)]
      : members.map(([name, member]) => field(name, resolved(member, schema), (whole.required ?? []).includes(name)));
    this.verdict = this.fields.find(({ name, kind, required }) => kind === "boolean" && required && name === "approved");
    this.nodes = this.fields.filter((each) => each !== this.verdict).map(({ node }) => node);
  }

  // The JSON of what is filled in, as a text; `approved` is that of the button which was pressed.
  read(data, approved) {
    const found = [];
    for (const each of this.fields) {
      if (each === this.verdict) { found.push([each.name, String(approved)]); continue; }
      const text = data.get(each.name);
      if (text === null || (!text.trim() && !(each.required && each.kind === "string"))) continue;
      found.push([each.name, value(each, text)]);
    }
    return this.whole ? found[0]?.[1] ?? "null" : object(found);
  }
}

// A schema, whose numbers are kept as texts where a browser would round them.
function parsed(text) {
  const sign = text.trimStart()[0];
  if (sign === "[") return Array.from(parts(text), ([, part]) => parsed(part));
  if (sign !== "{") return JSON.parse(text);
  const found = {};
  for (const [name, part] of parts(text)) {
    found[name] = parsed(part);
    if (Object.hasOwn(TEXTS, name)) found[TEXTS[name]] = part;
  }
  return found;
}

function field(name, member, required) {
  const choices = member.enum ? Array.from(parts(member[TEXTS.enum]), ([, text]) => text) : "const" in member ? [member[TEXTS.const]] : [];
  const kind = choices.length ? "choice" : SCALARS.includes(member.type) ? member.type : "json";
  const title = [String(member.title ?? name), required ? null : el("span", { class: "soft" }, " (optional)")];
  const about = member.description ? el("small", { class: "soft" }, String(member.description)) : null;
  const given = member.default === undefined || member.default === null || member.default === "" ? ""
    : kind === "string" ? String(member.default) : member[TEXTS.default];
  if (kind === "boolean") {
    const choice = (text, words) => el("label", { class: "check" }, el("input", { type: "radio", name, value: text, required, checked: given === text }), words);
    return { name, kind, required, node: el("fieldset", {}, el("legend", {}, ...title), choice("true", "Yes"), choice("false", "No"), about) };
  }
  const common = { name, required };
  let input;
  if (kind === "choice") {
    input = el("select", common, required && given ? null : el("option", { value: "" }),
      ...choices.map((text) => el("option", { value: text, selected: text === given }, text[0] === '"' ? JSON.parse(text) : text)));
  } else {
    const type = ["integer", "number"].includes(kind) ? "number" : INPUTS[member.format] ?? "text";
    const limits = { minlength: member.minLength, maxlength: member.maxLength, min: member[TEXTS.minimum], max: member[TEXTS.maximum], step: kind === "number" ? "any" : null };
    const free = Object.values(limits).every((limit) => limit === undefined || limit === null);
    input = kind === "json" || (type === "text" && !required && free) ? el("textarea", { rows: "3", ...common }, given)
      : el("input", { type, value: given, autocomplete: "off", ...limits, ...common });
  }
  return { name, kind, required, node: el("label", {}, el("span", {}, ...title), input, about) };
}

// A schema without references at its top; of several that may be, the one that text can be.
function resolved(member, schema, most = 8) {
  for (let left = most - 1; left >= 0; left -= 1) {
    if (typeof member !== "object" || member === null) return {};
    const { $ref: reference, anyOf, oneOf, ...rest } = member;
    const ways = anyOf ?? oneOf;
    if (reference) member = { ...schema.$defs?.[reference.split("/").pop()], ...rest };
    else if (ways) {
      const all = ways.filter((each) => each.type !== "null").map((each) => resolved(each, schema, left));
      member = { ...(all.find((each) => each.type === "string") ?? (all.length === 1 ? all[0] : {})), ...rest };
    } else return member;
  }
  return {};
}

// The JSON of an answer. What is no number is left as text, which the form refuses.
function value({ kind, name }, text) {
  if (kind === "string") return JSON.stringify(text);
  if (kind === "boolean") return String(text === "true");
  if (kind !== "integer" && kind !== "number") return typed(text, name);
  const number = text.trim().replace(/^(-?)0+(?=\d)/, "$1");
  if (/^-?\d+(\.\d+)?(e[+-]?\d+)?$/i.test(number)) return typed(number, name);
  return Number.isFinite(Number(number)) ? String(Number(number)) : JSON.stringify(text);
}
