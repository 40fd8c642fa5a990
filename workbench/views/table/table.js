// Table: named rows, and columns of texts and of numbers, which are shaded column by column. A heading sorts.

import { colourAt, css, inkOn } from "workbench/shared/colour.js";
import { button, exactly, make, moved, roughly } from "workbench/shared/dom.js";
import { open } from "workbench/shared/frame.js";

const DEEPEST = 0.55; // of the colour scale: numbers stay easy to read, and chosen ones to see

export async function render({ model, el }) {
  const frame = await open({ model, el });
  new Table(frame);
  return () => frame.close();
}

class Table {
  constructor(frame) {
    this.frame = frame;
    this.facts = frame.facts;
    this.n = this.facts.rows.length;
    this.cell = [0, 0];
    this.build();
    frame.offerKeys([["← → ↑ ↓, Home, End", "move over the cells"], ...(this.leads ? [["Enter", `go to what is said of the ${this.facts.of}`]] : [])]);
    frame.onState(() => this.arrange());
    this.arrange();
    frame.onRedraw(() => this.paint());
  }

  /** Whether there is an order to ask for. */
  get sorts() {
    return this.n > 1 && this.facts.columns.some(({ block }) => block !== null);
  }

  get leads() {
    return this.facts.rows.some(({ place }) => place !== null);
  }

  build() {
    const { facts, frame } = this;
    this.headings = facts.columns.map(({ name, block }) => {
      const sort = button(name, () => this.sortBy(name), { title: `Sort by ${name}` });
      return make("th", { scope: "col", class: block === null ? null : "n" }, this.sorts ? sort : name);
    });
    const groups = [];
    for (const { group } of facts.columns) {
      if (groups.at(-1)?.group === group) groups.at(-1).span += 1;
      else groups.push({ group, span: 1 });
    }
    const heads = [make("tr", {}, make("th", { scope: "col", class: "name" }, facts.of), ...this.headings)];
    if (facts.columns.some(({ group }) => group)) {
      heads.unshift(make("tr", { class: "groups" }, make("td"), ...groups.map(({ group, span }) => (group ? make("th", { scope: "colgroup", colspan: span }, group) : make("td", { colspan: span })))));
    }
    this.rows = facts.rows.map(({ label, about, place }, row) => {
      const name = place === null ? label : button(label, () => this.go(row), { title: `Go to what is said of ${label}` });
      const cells = facts.columns.map((column) => make("td", { class: column.block === null ? "text" : "n", tabindex: "-1" }, this.short(column, row)));
      return { cells, element: make("tr", {}, make("th", { scope: "row", class: "name" }, name, ...(about ? [make("small", {}, about)] : [])), ...cells) };
    });
    this.inside = make("tbody");
    this.table = make("table", { class: "shaded" }, make("thead", { class: this.sorts ? null : "spoken" }, ...heads), this.inside);
    this.table.addEventListener("keydown", (event) => this.key(event));
    this.table.addEventListener("focusin", ({ target }) => this.visit(target));
    this.table.addEventListener("pointermove", (event) => this.hover(event));
    this.table.addEventListener("pointerleave", () => frame.hideTip());
    frame.body.append(make("div", { class: "wide" }, this.table));
  }

  value(column, row) {
    return this.frame.blocks.numbers.data[column.block * this.n + row];
  }

  short(column, row) {
    return column.block === null ? column.texts[row] : roughly(this.value(column, row));
  }

  sentence(row, at) {
    const column = this.facts.columns[at];
    const value = column.block === null ? column.texts[row] : exactly(this.value(column, row));
    const said = column.said?.[row];
    return `${this.facts.rows[row].label}, ${column.name}: ${value}${said ? `; ${said}` : ""}`;
  }

  // Order.

  sortBy(name) {
    const { sort, rising } = this.frame.state;
    const first = this.facts.columns.find((each) => each.name === name).better !== "high";
    if (sort !== name) this.frame.keep({ sort: name, rising: first });
    else if (rising === first) this.frame.keep({ sort: name, rising: !first });
    else this.frame.keep({ sort: null, rising: true });
  }

  /** Rows in the order that the state asks for; what is not known comes last. */
  arrange() {
    const { sort, rising } = this.frame.state;
    const column = this.facts.columns.find(({ name }) => name === sort);
    this.order = Array.from({ length: this.n }, (_, row) => row);
    if (column) {
      const sign = rising ? 1 : -1;
      const texts = column.block === null;
      const key = (row) => (texts ? column.texts[row] : this.value(column, row));
      const lost = (row) => (texts ? key(row) === "" : Number.isNaN(key(row)));
      const compare = (a, b) => (texts ? key(a).localeCompare(key(b), "en") : key(a) - key(b));
      this.order.sort((a, b) => Number(lost(a)) - Number(lost(b)) || (lost(a) ? 0 : sign * compare(a, b)) || a - b);
    }
    this.facts.columns.forEach(({ name }, at) => {
      if (name === sort) this.headings[at].setAttribute("aria-sort", rising ? "ascending" : "descending");
      else this.headings[at].removeAttribute("aria-sort");
    });
    this.inside.replaceChildren(...this.order.map((row) => this.rows[row].element));
    this.stop(this.cell[0], this.cell[1]);
  }

  // Moving about.

  stop(line, at) {
    for (const { cells } of this.rows) for (const cell of cells) cell.tabIndex = -1;
    this.cell = [Math.min(line, this.n - 1), at];
    this.rows[this.order[this.cell[0]]].cells[at].tabIndex = 0;
  }

  placeOf(target) {
    const row = this.rows.findIndex(({ cells }) => cells.includes(target));
    return row < 0 ? null : [this.order.indexOf(row), this.rows[row].cells.indexOf(target)];
  }

  visit(target) {
    const place = this.placeOf(target);
    if (!place) return;
    this.stop(place[0], place[1]);
    this.frame.say(this.sentence(this.order[place[0]], place[1]));
  }

  hover(event) {
    const place = this.placeOf(event.target.closest("td"));
    if (!place) return this.frame.hideTip();
    this.frame.showTip(event, [this.sentence(this.order[place[0]], place[1])]);
  }

  key(event) {
    const place = this.placeOf(event.target);
    if (!place || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Enter") return this.go(this.order[place[0]]);
    const to = moved(event.key, place, [this.n, this.facts.columns.length]);
    if (!to) return;
    event.preventDefault();
    this.rows[this.order[to[0]]].cells[to[1]].focus();
  }

  go(row) {
    const { place } = this.facts.rows[row];
    if (place === null) return;
    const there = document.getElementById(place);
    there?.scrollIntoView();
    /** @type {HTMLElement | null} */ (there?.querySelector("a, button"))?.focus({ preventScroll: true });
  }

  // Drawing.

  /** How far above the worst of its column a value is, as a share of the span; from zero up where neither end is good. */
  depth(column, known, value) {
    const [low, high] = [Math.min(...known), Math.max(...known)];
    if (column.better === null) return high > 0 ? Math.max(0, value) / high : 0;
    const span = Math.max(high - low, column.span ?? 0);
    if (!span) return 0;
    return (column.better === "high" ? value - low : high - value) / span;
  }

  paint() {
    this.facts.columns.forEach((column, at) => {
      if (column.block === null) return;
      const values = this.rows.map((_, row) => this.value(column, row));
      const known = values.filter((value) => Number.isFinite(value));
      this.rows.forEach(({ cells }, row) => {
        const there = Number.isFinite(values[row]);
        const rgb = there ? colourAt(DEEPEST * this.depth(column, known, values[row]), this.frame.theme) : null;
        cells[at].style.backgroundColor = there ? css(rgb) : this.frame.colour("unseen");
        cells[at].style.color = there ? inkOn(rgb) : this.frame.colour("muted");
      });
    });
  }
}
