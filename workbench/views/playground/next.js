// What the model says next: the likeliest tokens with their probabilities before and after, side by side.

import { cut, exactly, make, named, selector } from "workbench/shared/dom.js";

/** A number of three digits, in powers of ten when it is small. */
function short(value) {
  if (Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  const said = size === Infinity ? "∞" : size > 0 && size < 1e-3 ? size.toExponential(1).replace("-", "−") : `${Number(size.toPrecision(3))}`;
  return value < 0 ? `−${said}` : said;
}

const signed = (value) => (value > 0 ? `+${short(value)}` : short(value));

export class NextTokens {
  /** @param {import("workbench/shared/frame.js").Frame} frame */
  constructor(frame) {
    this.frame = frame;
    this.pick = selector("At", [], (i) => frame.keep({ place: Number(i) }));
    this.wrong = make("p", { class: "about warning", hidden: true });
    this.far = make("p", { class: "where" });
    this.table = make("div", { class: "wide", tabindex: "0", role: "region", "aria-label": "Probabilities of the next token" });
    this.element = make("section", { class: "next" }, make("h3", {}, "Next token"), this.pick.field, this.wrong, this.table, this.far);
    frame.onState(() => this.draw());
  }

  /** Which of the places is looked at. */
  get at() {
    const { place } = this.frame.state;
    return Number.isInteger(place) && place >= 0 && place < this.frame.facts.places.length ? place : 0;
  }

  /** [before, after, difference of log-odds] of a row. */
  numbers(row) {
    const { data, shape } = this.frame.blocks.next;
    const start = (this.at * shape[1] + row) * shape[2];
    return data.subarray(start, start + 3);
  }

  draw() {
    const { places, edits } = this.frame.facts;
    const place = places[this.at];
    this.pick.field.hidden = places.length < 2;
    this.pick.select.replaceChildren(...places.map(({ position, token }, i) => make("option", { value: i }, named(token, position))));
    this.pick.select.value = `${this.at}`;
    const [before, after] = place.wrong;
    const said = before === after ? [before] : [before && `Before: ${before}`, after && `After: ${after}`];
    this.wrong.textContent = said.filter(Boolean).join(" ");
    this.wrong.hidden = !said.some(Boolean);
    const heads = edits.length ? ["Token", "Before", "After", "Δ p", "Δ log-odds"] : ["Token", "Probability"];
    const head = make("tr", {}, ...heads.map((text, i) => make("th", { scope: "col", class: i ? "n" : null }, text)));
    const rows = place.tokens.map((token, row) => this.row(token, row, edits.length > 0));
    this.table.replaceChildren(make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)));
    this.table.hidden = !rows.length;
    const far = this.frame.blocks.divergence.data[this.at];
    this.far.textContent = !edits.length ? "Nothing is ablated." : Number.isNaN(far) ? "" : `All tokens together: the distribution moved by ${short(far)} nats (KL divergence).`;
  }

  row(token, row, edited) {
    const [before, after, odds] = this.numbers(row);
    const name = make("th", { scope: "row" }, make("bdi", {}, cut(token, 18)));
    if (!edited) return make("tr", {}, name, this.share(before, "before"));
    const change = after - before;
    return make("tr", {}, name, this.share(before, "before"), this.share(after, "after"), make("td", { class: "n", title: exactly(change) }, signed(change)), make("td", { class: "n", title: exactly(odds) }, signed(odds)));
  }

  share(value, side) {
    const bar = make("i", { class: side });
    bar.style.width = `${Number.isNaN(value) ? 0 : 100 * value}%`;
    return make("td", { class: "share", title: exactly(value) }, make("span", { class: "length", "aria-hidden": "true" }, bar), make("span", { class: "n" }, short(value)));
  }

  /** In a sentence. */
  summary() {
    const { places, edits } = this.frame.facts;
    const place = places[this.at];
    if (!place.tokens.length) return this.wrong.textContent;
    const [before, after, odds] = this.numbers(0);
    const token = `“${cut(place.tokens[0], 24)}”`;
    return edits.length ? `${token}: ${short(before)} before, ${short(after)} after, log-odds ${signed(odds)}` : `Next token ${token}: probability ${exactly(before)}`;
  }
}
