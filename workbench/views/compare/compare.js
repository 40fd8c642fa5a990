// Compare: two matrices and their difference, with one cursor and one zoom for all three; of several pairs the chosen one.

import { colourAt, divergingAt, gradient, rgbOf } from "workbench/shared/colour.js";
import { axes, button, exactly, legend, make, roughly, selector } from "workbench/shared/dom.js";
import { open } from "workbench/shared/frame.js";
import { Matrix } from "workbench/shared/matrix.js";
import { ceiling, greatest, rootTick } from "workbench/shared/scales.js";

export async function render({ model, el }) {
  const frame = await open({ model, el });
  new Compare(frame);
  return () => frame.close();
}

class Compare {
  rows = 0;
  columns = 0;
  pair = 0;
  /** @type {Float32Array[]} */
  values = [];
  /** @type {string[]} */
  names = [];

  constructor(frame) {
    this.frame = frame;
    this.facts = frame.facts;
    [, this.rows, this.columns] = frame.blocks.a.shape;
    this.take(0);
    this.legends = [make("div"), make("div"), make("div")];
    this.titles = this.names.map((name) => make("figcaption", {}, name));
    this.maps = this.names.map((_, i) => this.map(i));
    const panels = this.maps.map((map, i) => make("figure", { class: "panel" }, this.titles[i], axes(this.facts.rowTitle, this.facts.columnTitle), map.element, this.legends[i]));
    frame.body.append(make("div", { class: "panels", "data-count": "3" }, ...panels));
    const scale = frame.settings.pick("scale", "Scale", [["sqrt", "square root"], ["linear", "linear"]], "sqrt", (name) => this.set(name));
    this.scale = scale.value;
    const { pairs } = this.facts;
    const named = pairs.map((pair, i) => [`${i}`, this.pairWords(pair)]);
    this.picker = selector("Heads", named, (i) => this.pick(Number(i)));
    this.told = frame.state.pair;
    frame.onState(() => this.heard());
    this.show(this.picked);
    frame.controls.append(...(pairs.length > 1 ? [this.picker.field] : []), scale.field);
    const zoom = (factor) => () => (factor ? this.maps[0].zoom(factor) : this.maps[0].show({ ...this.maps[0].view, top: 0, left: 0, rows: this.maps[0].height, columns: this.maps[0].width }));
    frame.controls.append(make("span", { class: "tools" }, button("+", zoom(0.5), { "aria-label": "Zoom in" }), button("−", zoom(2), { "aria-label": "Zoom out" }), button("All", zoom(0), { "aria-label": "Show everything" })));
    frame.offerKeys([["← → ↑ ↓, Home, End", "move over the cells of all three"], ["Enter", "choose in every view"], ["Esc", "choose none"], ["+ − 0", "zoom in, out, all"]]);
    frame.onSelect((selection) => this.follow(selection));
    frame.onRedraw(() => this.draw());
  }

  pairWords({ of, cosine }) {
    const heads = of.map((head) => head?.label ?? "").filter(Boolean).join(" and ");
    return cosine === null ? heads : `${heads}, cosine ${roughly(cosine)}`;
  }

  /** Take the maps of a pair. */
  take(pair) {
    const { labels, pairs } = this.facts;
    const cells = this.rows * this.columns;
    const [a, b] = ["a", "b"].map((name) => this.frame.blocks[name].data.subarray(pair * cells, (pair + 1) * cells));
    this.pair = pair;
    this.values = [a, b, Float32Array.from(a, (value, i) => value - b[i])];
    const several = pairs.length > 1;
    const one = labels.map((label, i) => [label, several ? pairs[pair].of[i]?.label : ""].filter(Boolean).join(" "));
    this.names = [...one, `${one[0]} − ${one[1]}`];
  }

  /** The pair that was picked last, which is shown where no head of any pair is chosen. */
  get picked() {
    const { pair } = this.frame.state;
    return this.facts.pairs[pair] ? Number(pair) : 0;
  }

  /** Someone picks a pair: one of its heads becomes the chosen one, where they are heads of a model. */
  pick(pair) {
    this.told = `${pair}`;
    this.frame.keep({ pair: `${pair}` });
    this.show(pair);
    const { of } = this.facts.pairs[pair];
    const head = of.find((each) => each && each.layer !== null);
    if (head && !of.some((each) => this.chosen(each))) this.frame.select({ layer: head.layer, heads: [head.head], site: head.site });
  }

  /** A pair may also be picked in Python, or by an address. */
  heard() {
    const { pair } = this.frame.state;
    if (pair === this.told) return;
    this.told = pair;
    if (this.facts.pairs[pair]) this.pick(this.picked);
  }

  chosen(head, { layer, heads, site } = this.frame.selection) {
    return Boolean(head) && head.layer === layer && heads.includes(head.head) && (!site || !head.site || site === head.site);
  }

  show(pair) {
    this.picker.select.selectedIndex = pair;
    if (pair === this.pair) return;
    this.take(pair);
    this.entitle();
    this.draw();
  }

  entitle() {
    this.titles.forEach((title, i) => title.replaceChildren(this.names[i]));
  }

  map(number) {
    const { block, size, rows, columns } = this.facts;
    const map = new Matrix(this.frame, {
      label: () => `${this.names[number]}: ${this.facts.rowTitle} down, ${this.facts.columnTitle} across. Arrow keys move, Enter chooses.`,
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
      const middle = this.scale === "sqrt" ? rootTick(tops[i]) : tops[i] / 2;
      const ticks = signed ? [[0, -tops[i]], [0.5, 0], [1, tops[i]]] : [[0, 0], [bend(middle / tops[i]), middle], [1, tops[i]]];
      const said = [this.facts.unit, this.scale === "sqrt" ? "square-root scale" : ""].filter(Boolean).join(", ");
      this.legends[i].replaceChildren(legend(gradient(at), ticks.map(([place, value]) => [place, roughly(value)]), make("span", {}, said)));
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

  follow({ query, key, layer, heads, site }) {
    const pair = this.facts.pairs.findIndex(({ of }) => of.some((head) => this.chosen(head, { layer, heads, site })));
    this.show(pair >= 0 ? pair : this.picked);
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
