// Overlap matrix: several circuits against each other; the chosen pair is a graph below.

import { CircuitView } from "workbench/circuit_graph/view.js";
import { colourAt, css, inkOn } from "workbench/shared/colour.js";
import { button, exactly, make, moved, selector } from "workbench/shared/dom.js";
import { open } from "workbench/shared/frame.js";

export async function render({ model, el }) {
  const frame = await open({ model, el });
  new OverlapMatrix(frame);
  return () => frame.close();
}

class OverlapMatrix {
  constructor(frame) {
    this.frame = frame;
    this.names = frame.facts.circuits;
    this.measures = frame.facts.measures;
    this.n = this.names.length;
    this.about = make("p", { class: "about" });
    this.picker = selector("Measure", this.measures.map(({ name, label }) => [name, label]), (measure) => frame.keep({ measure }));
    frame.controls.append(this.picker.field);
    frame.body.append(this.about, make("div", { class: "wide" }, this.table()));
    this.read();
    // Before the graph is, so that it is told of a new pair first.
    frame.onState(() => this.update());
    this.view = new CircuitView(frame, this.pair);
    frame.onRedraw(() => this.draw());
  }

  table() {
    const head = make("tr", {}, make("td"), ...this.names.map((name) => make("th", { scope: "col" }, name)));
    this.cells = this.names.map((_, i) => this.names.map((_, j) => (i === j ? null : button("", () => this.frame.keep({ pair: [i, j] }), { "data-pair": `${i},${j}`, tabindex: "-1" }))));
    const rows = this.cells.map((row, i) => make("tr", {}, make("th", { scope: "row" }, this.names[i]), ...row.map((cell) => make("td", {}, cell ?? "–"))));
    const table = make("table", { class: "overlaps" }, make("thead", {}, head), make("tbody", {}, ...rows));
    table.addEventListener("keydown", (event) => this.key(event));
    table.addEventListener("focusin", ({ target }) => this.frame.say(target.getAttribute("aria-label")));
    return table;
  }

  key(event) {
    const row = this.cells.findIndex((cells) => cells.includes(event.target));
    let to = moved(event.key, [row, this.cells[row]?.indexOf(event.target)], [this.n, this.n]);
    if (!to) return;
    event.preventDefault();
    // On over the diagonal, which has no cell.
    if (to[0] === to[1]) to = moved(event.key, to, [this.n, this.n]);
    this.cells[to[0]][to[1]]?.focus();
  }

  /** The pair and the measure that the state asks for, if there are such. */
  read() {
    const { pair, measure } = this.frame.state;
    const [i, j] = Array.isArray(pair) ? pair : [];
    const there = (at) => Number.isInteger(at) && at >= 0 && at < this.n;
    this.pair = there(i) && there(j) && i !== j ? [i, j] : [0, 1];
    this.measure = Math.max(0, this.measures.findIndex(({ name }) => name === measure));
  }

  update() {
    this.read();
    this.view.circuit.circuits = this.pair;
    this.draw();
  }

  draw() {
    const { label, about, name } = this.measures[this.measure];
    this.about.textContent = `${label}: ${about}.`;
    this.picker.select.value = name;
    this.cells.flat().forEach((cell, at) => {
      if (!cell) return;
      const [i, j] = [Math.floor(at / this.n), at % this.n];
      const value = this.frame.blocks.measures.data[this.measure * this.n ** 2 + at];
      const chosen = i === this.pair[0] && j === this.pair[1];
      cell.textContent = value.toFixed(2);
      cell.setAttribute("aria-label", `${this.names[i]} and ${this.names[j]}: ${label} ${exactly(value)}`);
      cell.setAttribute("aria-pressed", chosen);
      cell.tabIndex = chosen ? 0 : -1;
      Object.assign(cell.style, { background: css(colourAt(value, this.frame.theme)), color: inkOn(colourAt(value, this.frame.theme)) });
    });
  }
}
