// What steps emit, as text that grows.

import { el, setText } from "./dom.js";
import { member, parts } from "./json.js";

const MOST_CHARS = 20000; // of one step's output that are kept here: the last ones

export class Output {
  constructor() {
    this.steps = new Map();
    this.latest = null; // the step that has emitted last
    this.title = el("h2", {});
    this.text = el("pre", { tabindex: "0", id: "output", "aria-label": "Output of the step" });
    this.node = el("section", { class: "card padded output", hidden: true, "aria-label": "Output" }, this.title, this.text);
  }

  add(event) {
    if (event.type !== "StepOutput") return;
    this.latest = event.step;
    // Its first piece has the number 0: an attempt begins, and so does the text.
    if (event.data.first === 0 || !this.steps.has(event.step)) this.steps.set(event.step, { attempt: event.attempt, text: "", cut: false });
    const found = this.steps.get(event.step);
    const raw = Array.from(parts(member(event.text, "data", "pieces")), ([, text]) => text);
    found.text += event.data.pieces.map((piece, place) => (typeof piece === "string" ? piece : `${raw[place]}\n`)).join("");
    if (found.text.length > MOST_CHARS) Object.assign(found, { text: found.text.slice(-MOST_CHARS), cut: true });
  }

  of(step) {
    const found = this.steps.get(step);
    return found ? `${found.cut ? "…" : ""}${found.text}` : null;
  }

  clear() {
    this.steps.clear();
    this.latest = null;
    this.node.hidden = true;
  }

  draw() {
    if (this.latest === null) return;
    const { attempt } = this.steps.get(this.latest);
    const following = this.text.scrollHeight - this.text.scrollTop - this.text.clientHeight < 8;
    setText(this.title, `Output of ${this.latest}${attempt > 1 ? ` (attempt ${attempt})` : ""}`);
    setText(this.text, this.of(this.latest));
    this.node.hidden = false;
    if (following) this.text.scrollTop = this.text.scrollHeight;
  }
}
