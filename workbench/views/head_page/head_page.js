// Head page: what is known of the chosen head: numbers beside those of all heads, rows that stand out, circuits.

import { button, cut, exactly, make, named, roughly, roving, selector } from "workbench/shared/dom.js";
import { open } from "workbench/shared/frame.js";
import { greatest } from "workbench/shared/scales.js";

const BEFORE = 4; // tokens of a prompt that stand around a query and a key

export async function render({ model, el }) {
  const frame = await open({ model, el });
  new HeadPage(frame);
  return () => frame.close();
}

class HeadPage {
  constructor(frame) {
    this.frame = frame;
    this.facts = frame.facts;
    this.n = this.facts.heads.length;
    this.head = 0;
    this.name = make("h3", { tabindex: "-1" });
    this.roles = make("p", { class: "roles" });
    this.numbers = make("div", { class: "numbers" });
    this.rows = make("ol", { class: "rows" });
    this.circuits = make("div", { class: "circuits" });
    roving(this.rows);
    roving(this.circuits);
    this.controls();
    this.body = make("div", { class: "page", tabindex: "0", role: "group", "aria-label": "The chosen head. [ and ] go to the head before or after." });
    const rows = make("section", {}, make("h4", {}, "Rows that stand out"), this.rows);
    this.body.append(make("header", {}, this.name, this.roles), this.numbers, make("div", {}, rows, this.circuits));
    frame.body.append(this.body);
    this.body.addEventListener("keydown", (event) => this.key(event));
    frame.offerKeys([["[ ], ← →, Home, End", "the head before or after, the first and the last"], ["Enter", "choose the row, or the head at the other end of an edge, in every view"]]);
    if (frame.spec.selection.heads?.length) this.follow(frame.spec.selection); // where what is chosen is not here
    frame.onSelect((selection) => this.follow(selection));
  }

  controls() {
    const options = this.facts.heads.map(({ label }, i) => [i, label]);
    const { select, field } = selector("Head", options, (i) => this.choose(Number(i)));
    this.select = select;
    this.frame.controls.append(field, button("Before", () => this.step(-1)), button("After", () => this.step(1)));
  }

  choose(i) {
    const { layer, head, site } = this.facts.heads[i];
    this.head = i;
    this.frame.select({ layer, heads: [head], site });
    this.draw();
    this.frame.say(this.words());
  }

  step(by) {
    this.choose(Math.max(0, Math.min(this.n - 1, this.head + by)));
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const inside = event.target !== this.body; // lists have arrow keys of their own
    if (event.key === "[" || (!inside && event.key === "ArrowLeft")) this.step(-1);
    else if (event.key === "]" || (!inside && event.key === "ArrowRight")) this.step(1);
    else if (!inside && event.key === "Home") this.choose(0);
    else if (!inside && event.key === "End") this.choose(this.n - 1);
    else return;
    event.preventDefault();
  }

  follow({ layer, heads, site }) {
    const at = this.facts.heads.findIndex((each) => each.layer === layer && each.head === heads[0] && (site === null || each.site === null || each.site === site));
    if (at >= 0) this.head = at;
    this.draw();
  }

  words() {
    const { label, roles } = this.facts.heads[this.head];
    const known = this.facts.numbers.map((each, i) => [each.name, this.at("values", i)]).filter(([, value]) => Number.isFinite(value));
    return `${label}${roles.length ? `, ${roles.join(", ")}` : ""}: ${known.slice(0, 3).map(([name, value]) => `${name} ${exactly(value)}`).join(", ") || "no numbers"}`;
  }

  at(block, i) {
    return this.frame.blocks[block].data[i * this.n + this.head];
  }

  draw() {
    const { label, roles } = this.facts.heads[this.head];
    this.select.value = `${this.head}`;
    this.name.textContent = label;
    this.roles.replaceChildren(...roles.map((role) => make("span", { class: "role" }, role)));
    this.roles.hidden = !roles.length;
    this.drawNumbers();
    this.drawRows();
    this.drawCircuits();
  }

  drawNumbers() {
    const groups = [...new Set(this.facts.numbers.map(({ group }) => group))];
    const sections = groups.map((group) => {
      const rows = this.facts.numbers.flatMap((each, i) => (each.group === group ? [this.number(each, i)] : []));
      const head = make("tr", {}, ...["", "", "value", "rank"].map((text) => make("th", { scope: "col" }, text)));
      return make("section", {}, make("h4", {}, `${group[0].toUpperCase()}${group.slice(1)}`), make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)));
    });
    this.numbers.replaceChildren(...sections);
  }

  /** A number of the head: a bar up to the largest of all heads, and its rank among those that have one. */
  number({ name, interval }, i) {
    const all = this.frame.blocks.values.data.subarray(i * this.n, (i + 1) * this.n);
    const value = all[this.head];
    const bar = make("i", { class: value < 0 ? "below" : null });
    bar.style.width = `${Number.isFinite(value) ? (100 * Math.abs(value)) / (greatest(all) || 1) : 0}%`;
    const known = all.filter((each) => !Number.isNaN(each));
    const rank = Number.isNaN(value) ? "–" : `${known.filter((each) => each > value).length + 1} of ${known.length}`;
    const range = interval && Number.isFinite(this.at("low", i)) ? `interval ${exactly(this.at("low", i))} to ${exactly(this.at("high", i))}` : null;
    return make("tr", { title: range }, make("th", { scope: "row" }, name), make("td", {}, make("span", { class: "length", "aria-hidden": "true" }, bar)), make("td", { class: "n" }, roughly(value), range ? make("span", { class: "spoken" }, `, ${range}`) : ""), make("td", { class: "n rank" }, rank));
  }

  drawRows() {
    const { prompt, query, key, weight } = this.frame.blocks;
    const each = prompt.shape[1];
    const found = [];
    for (let at = this.head * each; at < (this.head + 1) * each; at++) {
      if (prompt.data[at] < 0) continue;
      found.push(this.row(prompt.data[at], query.data[at], key.data[at], weight.data[at]));
    }
    const none = this.facts.rows ? "No row has a weight on another key than the first." : "No pattern was kept.";
    this.rows.replaceChildren(...(found.length ? found : [make("li", { class: "where" }, none)]));
  }

  row(prompt, query, key, weight) {
    const tokens = this.facts.prompts[prompt];
    const several = this.facts.prompts.length > 1;
    const where = several ? [make("small", {}, `prompt ${prompt + 1}`)] : [];
    const label = `${named(tokens?.[query], query)} looks at ${named(tokens?.[key], key)}: weight ${exactly(weight)}`;
    const press = button("", () => this.press(several, query, key, label), { title: label });
    press.append(...where, this.around(tokens, query, "query"), " → ", this.around(tokens, key, "key"), make("span", { class: "n" }, roughly(weight)));
    return make("li", {}, press);
  }

  press(several, query, key, label) {
    if (!several) this.frame.select({ query, key });
    this.frame.say(label);
  }

  /** A token among those before it. */
  around(tokens, at, what) {
    if (!tokens) return make("span", { class: "around" }, make("b", { class: what }, `${at}`));
    const before = tokens.slice(Math.max(0, at - BEFORE), at).map((text) => cut(text, 14)).join(" ");
    return make("span", { class: "around" }, make("bdi", {}, before), " ", make("b", { class: what }, make("bdi", {}, cut(tokens[at], 24))));
  }

  drawCircuits() {
    const { circuits, heads } = this.facts;
    const sections = circuits.map(({ name, about, heads: members }) => {
      const found = members[heads[this.head].label];
      const title = make("h4", {}, `Circuit: ${name}`);
      const said = make("p", { class: "where" }, found ? `In the circuit (${about})${found.score === null ? "" : `, score ${roughly(found.score)}`}.` : `Not in the circuit (${about}).`);
      if (!found) return make("section", {}, title, said);
      return make("section", {}, title, said, this.edges("Reads from", found.reads, found.n_reads, true), this.edges("Writes to", found.writes, found.n_writes, false));
    });
    this.circuits.replaceChildren(...sections);
  }

  edges(title, edges, n, reads) {
    if (!edges.length) return make("p", { class: "where" }, `${title}: no edge was scored.`);
    const items = edges.map(([other, part, score]) => {
      const text = `${other}${part ? (reads ? ` by its ${part}` : ` (its ${part})`) : ""}`;
      const at = this.facts.heads.findIndex(({ label }) => label === other);
      const end = at >= 0 ? button(text, () => this.choose(at)) : make("span", {}, text);
      return make("li", {}, end, make("span", { class: "n" }, score === null ? "" : roughly(score)));
    });
    const left = n > edges.length ? ` (the strongest ${edges.length} of ${n})` : "";
    return make("div", {}, make("h5", {}, `${title}${left}`), make("ul", { class: "edges" }, ...items));
  }
}
