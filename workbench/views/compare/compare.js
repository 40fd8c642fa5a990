// Compare: two matrices and their difference, with one cursor and one zoom for all three.

import { colourAt, divergingAt, gradient, rgbOf } from "workbench/shared/colour.js";
import { button, exactly, legend, make, roughly } from "workbench/shared/dom.js";
import { open } from "workbench/shared/frame.js";
import { Matrix } from "workbench/shared/matrix.js";
import { ceiling, greatest } from "workbench/shared/scales.js";

export async function render({ model, el }) {
  const frame = await open({ model, el });
  new Compare(frame);
  return () => frame.close();
}

class Compare {
  rows = 0;
  columns = 0;

  constructor(frame) {
    this.frame = frame;
    this.facts = frame.facts;
    const { a, b } = frame.blocks;
    [this.rows, this.columns] = a.shape;
    this.values = [a.data, b.data, Float32Array.from(a.data, (value, i) => value - b.data[i])];
    this.names = [...this.facts.labels, `${this.facts.labels[0]} − ${this.facts.labels[1]}`];
    this.legends = [make("div"), make("div"), make("div")];
    this.maps = this.names.map((name) => this.map(name));
    const panels = this.maps.map((map, i) => make("figure", { class: "panel" }, make("figcaption", {}, this.names[i]), map.element, this.legends[i]));
    frame.body.append(make("div", { class: "panels", "data-count": "3" }, ...panels));
    const scale = frame.settings.pick("scale", "Scale", [["sqrt", "square root"], ["linear", "linear"]], "sqrt", (name) => this.set(name));
    this.scale = scale.value;
    frame.controls.append(scale.field);
    const zoom = (factor) => () => (factor ? this.maps[0].zoom(factor) : this.maps[0].show({ ...this.maps[0].view, top: 0, left: 0, rows: this.maps[0].height, columns: this.maps[0].width }));
    frame.controls.append(make("span", { class: "tools" }, button("+", zoom(0.5), { "aria-label": "Zoom in" }), button("−", zoom(2), { "aria-label": "Zoom out" }), button("All", zoom(0), { "aria-label": "Show everything" })));
    frame.offerKeys([["← → ↑ ↓, Home, End", "move over the cells of all three"], ["Enter", "choose in every view"], ["Esc", "choose none"], ["+ − 0", "zoom in, out, all"]]);
    frame.onSelect((selection) => this.follow(selection));
    frame.onRedraw(() => this.draw());
  }

  map(name) {
    const { block, size, rows, columns } = this.facts;
    const map = new Matrix(this.frame, {
      label: () => `${name}: ${this.facts.rowTitle} down, ${this.facts.columnTitle} across. Arrow keys move, Enter chooses.`,
      rowName: (i) => rows[i] ?? `${i}`,
      columnName: (i) => columns[i] ?? `${i}`,
      read: (row, column) => this.sentence(row, column),
      choose: (row, column) => this.choose(row, column),
      clear: () => this.frame.select(this.facts.selects === "head" ? { layer: null, heads: [], site: null } : { query: null, key: null }),
      moved: (from) => this.locked(from),
      pointed: (cell) => this.point(map, cell),
    });
    map.setCells(new Uint8Array(this.rows * this.columns), this.rows, this.columns, block, ...size);
    return map;
  }

  set(scale) {
    this.scale = scale;
    this.draw();
  }

  draw() {
    const shared = ceiling(Math.max(greatest(this.values[0]), greatest(this.values[1])));
    const tops = [shared, shared, ceiling(greatest(this.values[2]))];
    const unseen = rgbOf(this.frame.colour("unseen"));
    const bend = (share) => (this.scale === "sqrt" ? Math.sign(share) * Math.sqrt(Math.abs(share)) : share);
    this.maps.forEach((map, i) => {
      const signed = this.facts.signed || i === 2;
      const code = (value) => (Number.isNaN(value) ? 0 : signed ? 128 + Math.round(127 * bend(value / tops[i])) : 1 + Math.round(254 * bend(value / tops[i])));
      map.size = signed ? (byte) => (byte ? Math.abs(byte - 128) : -1) : (byte) => byte;
      map.levels = [{ cells: Uint8Array.from(this.values[i], code), rows: this.rows, columns: this.columns }];
      const at = signed ? (t) => divergingAt(2 * t - 1, this.frame.theme) : (t) => colourAt(t, this.frame.theme);
      map.setColours(Array.from({ length: 256 }, (_, byte) => (byte === 0 ? unseen : signed ? divergingAt((byte - 128) / 127, this.frame.theme) : colourAt((byte - 1) / 254, this.frame.theme))));
      map.draw();
      const back = (t) => (this.scale === "sqrt" ? Math.sign(t) * t * t : t) * tops[i];
      const ticks = signed ? [0, 0.5, 1].map((t) => [t, roughly(back(2 * t - 1))]) : [0, 0.5, 1].map((t) => [t, roughly(back(t))]);
      this.legends[i].replaceChildren(legend(gradient(at), ticks, make("span", {}, this.facts.unit)));
    });
  }

  sentence(row, column) {
    const { block, rows, columns, rowTitle, columnTitle } = this.facts;
    const index = Math.floor(row / block) * this.columns + Math.floor(column / block);
    const name = (title, names, i) => (block > 1 ? `${title} ${i}–${i + block - 1}` : `${title} ${names[i] ? `“${names[i]}” (${i})` : i}`);
    const [at, to] = [row, column].map((i) => Math.floor(i / block) * block);
    const figures = this.values.map((values, i) => `${this.names[i]} ${Number.isNaN(values[index]) ? "nothing" : exactly(values[index])}`);
    return [`${name(rowTitle, rows, at)}, ${name(columnTitle, columns, to)}`, figures.join(" · ")];
  }

  choose(row, column) {
    if (this.facts.selects === "pattern") this.frame.select({ query: row, key: column });
    else if (this.facts.selects === "head") this.frame.select({ layer: row, heads: [column] });
    this.maps.forEach((map) => this.mark(map, row, column));
  }

  mark(map, row, column) {
    map.chosen = { row, column };
    map.compose();
  }

  follow({ query, key, layer, heads }) {
    const [row, column] = { pattern: [query, key], head: [layer, heads[0] ?? null], none: [null, null] }[this.facts.selects];
    if (this.facts.selects !== "none") this.maps.forEach((map) => this.mark(map, row, column));
  }

  locked(from) {
    for (const map of this.maps) {
      if (map === from) continue;
      map.view = { ...from.view };
      map.draw();
    }
  }

  point(from, cell) {
    for (const map of this.maps) {
      if (map === from) continue;
      map.cursor = cell;
      map.compose();
    }
  }
}
