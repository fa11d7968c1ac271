// The fields of a decision, made from its JSON Schema. The page behind a link has the same, without
// scripts: form_fields.py.

import { el } from "./dom.js";

const WHOLE = "decision"; // the only field of a schema without members: its JSON
const INPUTS = { date: "date", time: "time", email: "email", uri: "url", password: "password" };
const SCALARS = ["boolean", "integer", "number", "string"];

export class Form {
  constructor(schema) {
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

  // The JSON of what is filled in; `approved` is that of the button which was pressed.
  read(data, approved) {
    const found = {};
    for (const each of this.fields) {
      if (each === this.verdict) { found[each.name] = approved; continue; }
      const text = data.get(each.name);
      if (text === null || (!text.trim() && !(each.required && each.kind === "string"))) continue;
      found[each.name] = value(each, text);
    }
    return this.whole ? found[WHOLE] ?? null : found;
  }
}

function field(name, member, required) {
  const choices = member.enum ?? ("const" in member ? [member.const] : []);
  const kind = choices.length ? "choice" : SCALARS.includes(member.type) ? member.type : "json";
  const title = [String(member.title ?? name), required ? null : el("span", { class: "soft" }, " (optional)")];
  const about = member.description ? el("small", { class: "soft" }, String(member.description)) : null;
  const given = member.default === undefined || member.default === null || member.default === "" ? ""
    : kind === "string" ? String(member.default) : JSON.stringify(member.default);
  if (kind === "boolean") {
    const choice = (text, words) => el("label", { class: "check" }, el("input", { type: "radio", name, value: text, required, checked: given === text }), words);
    return { name, kind, required, node: el("fieldset", {}, el("legend", {}, ...title), choice("true", "Yes"), choice("false", "No"), about) };
  }
  const common = { name, required };
  let input;
  if (kind === "choice") {
    input = el("select", common, required && given ? null : el("option", { value: "" }),
      ...choices.map((each) => el("option", { value: JSON.stringify(each), selected: JSON.stringify(each) === given }, String(each))));
  } else {
    const type = ["integer", "number"].includes(kind) ? "number" : INPUTS[member.format] ?? "text";
    const limits = { minlength: member.minLength, maxlength: member.maxLength, min: member.minimum, max: member.maximum, step: kind === "number" ? "any" : null };
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

// What is no number is left as text, which the form refuses.
function value({ kind, name }, text) {
  if (kind === "boolean") return text === "true";
  if (kind === "integer" || kind === "number") return Number.isFinite(Number(text)) ? Number(text) : text;
  if (kind === "string") return text;
  try { return JSON.parse(text); } catch (error) { throw new Error(`${name} is not JSON: ${error.message}`); }
}
