// JSON as text. JSON.parse rounds numbers above 2^53, merges keys that stand twice and moves those
// that look like numbers to the front: what users stored is shown, and sent, as it is written.
// Each text given here is valid JSON.

const SPACE = /\s/;
const ENDS = /[,\]}\s]/g;

function afterString(text, start) {
  for (let at = start + 1; ; at += 1) {
    at = text.indexOf('"', at);
    let slashes = 0;
    while (text[at - 1 - slashes] === "\\") slashes += 1;
    if (slashes % 2 === 0) return at + 1;
  }
}

function afterValue(text, start) {
  if (text[start] === '"') return afterString(text, start);
  if (text[start] !== "{" && text[start] !== "[") {
    ENDS.lastIndex = start;
    return ENDS.exec(text)?.index ?? text.length;
  }
  let depth = 0;
  for (let at = start; ; at += 1) {
    const sign = text[at];
    if (sign === '"') at = afterString(text, at) - 1;
    else if (sign === "{" || sign === "[") depth += 1;
    else if ((sign === "}" || sign === "]") && (depth -= 1) === 0) return at + 1;
  }
}

function afterSpace(text, start) {
  let at = start;
  while (SPACE.test(text[at] ?? "")) at += 1;
  return at;
}

// [name, text] of each member of an object, [place, text] of each item of a list, in their order.
export function* parts(text) {
  let at = afterSpace(text, 0);
  const named = text[at] === "{";
  if (!named && text[at] !== "[") return;
  at = afterSpace(text, at + 1);
  for (let place = 0; text[at] !== "}" && text[at] !== "]"; place += 1) {
    let name = place;
    if (named) {
      const end = afterString(text, at);
      name = JSON.parse(text.slice(at, end));
      at = afterSpace(text, afterSpace(text, end) + 1);
    }
    const end = afterValue(text, at);
    yield [name, text.slice(at, end)];
    at = afterSpace(text, end);
    if (text[at] === ",") at = afterSpace(text, at + 1);
  }
}

// The text of what stands under these names, or undefined.
export function member(text, ...names) {
  let found = text;
  for (const wanted of names) {
    let inner;
    for (const [name, part] of parts(found)) if (name === wanted) inner = part;
    if (inner === undefined) return undefined;
    found = inner;
  }
  return found;
}

// An object again, of some of the parts of one.
export function object(members) {
  return `{${[...members].map(([name, text]) => `${JSON.stringify(name)}:${text}`).join(",")}}`;
}

// With line breaks and indents, and otherwise as it is.
export function pretty(text) {
  let shown = "";
  let depth = 0;
  const line = () => `\n${"  ".repeat(depth)}`;
  for (let at = 0; at < text.length;) {
    const sign = text[at];
    let end = at + 1;
    if (sign === '"') { end = afterString(text, at); shown += text.slice(at, end); }
    else if (sign === "{" || sign === "[") {
      end = afterSpace(text, end);
      if (text[end] === "}" || text[end] === "]") { shown += sign + text[end]; end += 1; }
      else { depth += 1; shown += sign + line(); }
    } else if (sign === "}" || sign === "]") { depth -= 1; shown += line() + sign; }
    else if (sign === ",") shown += sign + line();
    else if (sign === ":") shown += ": ";
    else if (!SPACE.test(sign)) { end = afterValue(text, at); shown += text.slice(at, end); }
    at = end;
  }
  return shown;
}

// Why this could not be stored as it is written, or null.
function offence(text) {
  const sign = text.trimStart()[0];
  if (sign !== "{" && sign !== "[") return exact(text.trim()) ? null : `the number ${text.trim()} has more digits than a float holds`;
  const seen = new Set();
  for (const [name, part] of parts(text)) {
    if (seen.has(name)) return `the key ${JSON.stringify(name)} stands twice in one object`;
    seen.add(name);
    const inner = offence(part);
    if (inner !== null) return inner;
  }
  return null;
}

// The text of a value that a person has typed, to be sent as it is. Throws an Error that says what of it is wrong.
export function typed(text, what) {
  try { JSON.parse(text); } catch (error) { throw new Error(`${what} is not JSON: ${error.message}`); }
  const wrong = offence(text);
  if (wrong !== null) throw new Error(`${what} cannot be stored as it is: ${wrong}`);
  return text;
}

// Integers are of any size where they are stored; what has a fraction or an exponent is a float.
function exact(text) {
  return !/^-?\d.*[.eE]/.test(text) || decimal(text) === decimal(String(Number(text)));
}

// A number's digits and the place of its point, which are the same however it is written.
function decimal(text) {
  const [mantissa, exponent = "0"] = text.toLowerCase().replace(/^-/, "").split("e");
  const [whole, fraction = ""] = mantissa.split(".");
  const digits = (whole + fraction).replace(/^0+/, "");
  const kept = digits.replace(/0+$/, "");
  return kept && `${kept} ${Number(exponent) - fraction.length + digits.length - kept.length}`;
}
