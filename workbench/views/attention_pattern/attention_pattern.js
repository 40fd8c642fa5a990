// Attention pattern: one or several heads side by side, tokens on both edges, and what the chosen query looks at.

import { arrayOf } from "workbench/shared/blocks.js";
import { colourAt, gradient, rgbOf } from "workbench/shared/colour.js";
import { axes, button, exactly, legend, make, named, roughly, selector } from "workbench/shared/dom.js";
import { open } from "workbench/shared/frame.js";
import { Matrix } from "workbench/shared/matrix.js";
import { ceiling } from "workbench/shared/scales.js";
import { mapOf, rowOf } from "./export.js";
import { QueryRow } from "./row.js";
import { Strips } from "./strips.js";

const AT_ONCE = 6; // heads side by side
const LOWEST = 1e-4; // where the logarithmic scale begins

/** Byte 0: a place that no query sees. Byte b: weight ((b - 1) / 254) squared. */
const weightOf = (byte) => (byte ? ((byte - 1) / 254) ** 2 : NaN);
/** The least weight that a byte stands for: of the largest one it makes no scale go further than the weights do. */
const leastOf = (byte) => (Math.max(0, byte - 1.5) / 254) ** 2;
const byteOf = (weight) => (Number.isNaN(weight) ? 0 : 1 + Math.round(254 * Math.sqrt(Math.min(1, Math.max(0, weight)))));

export async function render({ model, el }) {
  const frame = await open({ model, el });
  new Patterns(frame);
  return () => frame.close();
}

class Patterns {
  constructor(frame) {
    this.frame = frame;
    this.facts = frame.facts;
    this.tiles = new Map();
    [this.index, this.head] = this.facts.first;
    this.heads = [this.head];
    this.panels = make("div", { class: "panels" });
    this.missing = make("p", { class: "caption", hidden: true });
    this.scaleBox = make("div");
    this.row = new QueryRow(this);
    this.strips = new Strips(this);
    frame.body.append(this.missing, this.strips.element, make("div", { class: "columns" }, make("div", {}, this.panels, this.scaleBox), this.row.element));
    this.buildControls();
    const chosen = () => this.query ?? this.site.queries - 1;
    frame.offerRows("Row CSV", () => `${this.label()}-query-${chosen()}`, "Download all weights of the chosen query", () => rowOf(this, this.head, chosen()));
    frame.offerRows("Map CSV", () => this.label(), "Download the whole map of the chosen head", () => mapOf(this, this.head));
    frame.offerKeys([
      ["← → ↑ ↓, Home, End", "move over the cells"], ["Enter", "choose the query and the key in every view"], ["Esc", "choose none"],
      ["[ ] , .", "layer and head up or down"], ["+ − 0", "zoom in, out, all"], ["Ctrl + wheel, drag", "zoom, and move when zoomed"],
    ]);
    this.maps = [];
    this.built = false;
    if (frame.spec.selection.heads?.length) this.follow(frame.spec.selection); // where what is chosen is not here
    frame.onSelect((selection) => this.follow(selection));
    this.built = true;
    this.show();
    frame.onRedraw(() => this.draw());
  }

  get site() {
    return this.facts.sites[this.index];
  }

  /** The head, for the name of a file. */
  label() {
    return this.site.name === null ? `head-${this.head}` : `L${this.site.layer}H${this.head}`;
  }

  block(name) {
    return this.frame.blocks[`${name}:${this.variant}:${this.index}`];
  }

  buildControls() {
    const { controls, settings } = this.frame;
    const { sites, variants } = this.facts;
    if (sites.length > 1) {
      this.sitePicker = selector("Site", sites.map((site, i) => [i, `${site.label}, layer ${site.layer}${site.mode === "missing" ? " (no pattern)" : ""}`]), (i) => this.go(Number(i), this.head));
      controls.append(this.sitePicker.field);
    }
    if (sites.some(({ heads }) => heads.length > 1)) {
      this.headPicker = selector("Head", [], (head) => this.go(this.index, Number(head)));
      controls.append(this.headPicker.field);
    }
    const weights = settings.pick("weights", "Weights", variants.map((name) => [name, name]), variants[0], (name) => this.set({ variant: variants.indexOf(name) }));
    this.variant = variants.indexOf(weights.value);
    const scales = [["sqrt", "square root"], ["linear", "linear"], ["log", "logarithmic"]];
    const scale = settings.pick("scale", "Scale", scales, "sqrt", (name) => this.set({ scale: name }));
    this.scale = scale.value;
    const ranges = [["shared", "to the largest shown"], ["own", "each head its own"], ["one", "0 to 1"]];
    const range = settings.pick("range", "Colours run", ranges, "shared", (name) => this.set({ range: name }));
    this.range = range.value;
    this.hider = settings.mark("hide", "", false, (hide) => this.set({ hide }));
    this.hide = this.hider.value;
    controls.append(...(variants.length > 1 ? [weights.field] : []), scale.field, range.field, this.hider.field);
    const zoom = (factor) => () => this.maps.forEach((map) => (factor ? map.zoom(factor) : map.show({ ...map.view, top: 0, left: 0, rows: map.height, columns: map.width })));
    controls.append(make("span", { class: "tools" }, button("+", zoom(0.5), { "aria-label": "Zoom in" }), button("−", zoom(2), { "aria-label": "Zoom out" }), button("All", zoom(0), { "aria-label": "Show everything" })));
  }

  set(change) {
    Object.assign(this, change);
    this.show();
  }

  /** Choose a site and a head, for all views. */
  go(index, head) {
    const { name, layer, heads } = this.facts.sites[index];
    const nearest = heads.includes(head) ? head : heads[0];
    this.frame.select({ site: name, layer, heads: [nearest] });
    if (this.index !== index || this.head !== nearest) this.adopt(index, [nearest]);
  }

  adopt(index, heads) {
    this.index = index;
    this.heads = heads;
    this.head = heads[0];
    this.show();
  }

  follow({ layer, heads, site, query, key }) {
    const found = this.facts.sites.findIndex((each) => (site ? each.name === site : each.layer === layer) && heads.some((head) => each.heads.includes(head)));
    this.query = query;
    this.key = key;
    if (!this.built) {
      if (found >= 0) Object.assign(this, { index: found, heads: heads.filter((head) => this.facts.sites[found].heads.includes(head)) });
      this.head = this.heads[0];
      return;
    }
    const wanted = found < 0 ? [] : heads.filter((head) => this.facts.sites[found].heads.includes(head));
    if (found >= 0 && (found !== this.index || `${wanted}` !== `${this.heads}`)) return this.adopt(found, wanted);
    this.mark();
  }

  // What is shown.

  show() {
    const { site } = this;
    this.missing.hidden = site.mode !== "missing";
    this.missing.textContent = `No pattern of this site is here. ${site.missing ?? ""}`;
    const there = site.mode !== "missing";
    for (const part of [this.panels, this.row.element, this.strips.element, this.scaleBox]) part.hidden = !there;
    if (this.sitePicker) this.sitePicker.select.value = this.index;
    if (this.headPicker) {
      this.headPicker.select.replaceChildren(...site.heads.map((head) => make("option", { value: head }, `${head}`)));
      this.headPicker.select.value = this.head;
    }
    if (!there) return;
    const shown = this.heads.slice(0, AT_ONCE);
    this.maps = shown.map((head) => this.mapOf(head));
    this.panels.replaceChildren(...this.maps.map((map, i) => make("figure", { class: "panel" }, make("figcaption", {}, this.nameOf(shown[i])), axes("queries", "keys"), map.element)));
    this.panels.dataset.count = this.maps.length;
    this.strips.build();
    this.colour();
    this.mark();
  }

  nameOf(head) {
    const { site } = this;
    const marks = site.weights === "normalised" ? "" : `, ${site.weights}: |A| / Σ|A|`;
    return site.name === null ? `Head ${head}${marks}` : `L${site.layer}H${head}, ${site.name}${marks}`;
  }

  mapOf(head) {
    const { site } = this;
    const block = this.block("cells");
    const [, rows, columns] = block.shape;
    const at = site.heads.indexOf(head);
    const cells = block.data.subarray(at * rows * columns, (at + 1) * rows * columns);
    const map = new Matrix(this.frame, {
      label: () => `${this.nameOf(head)}: ${site.queries} queries down, ${site.keys} keys across. Arrow keys move, Enter chooses.`,
      rowName: (i) => this.queryToken(i) ?? `${i}`,
      columnName: (i) => this.keyToken(i) ?? `${i}`,
      read: (row, column) => this.sentence(head, row, column),
      choose: (row, column) => this.choose(map, row, column),
      clear: () => this.frame.select({ query: null, key: null }),
      more: (event) => this.step(event),
      moved: (moved) => this.zoomed(moved),
    });
    map.head = head;
    map.setCells(cells, rows, columns, site.block, site.queries, site.keys);
    if (this.view && this.view.height === site.queries && this.view.width === site.keys) map.view = { ...this.view };
    return map;
  }

  token(table, at) {
    return table === null ? null : (this.facts.tokens[table][at] ?? null);
  }

  queryToken(at) {
    return this.token(this.site.queryTokens, at);
  }

  keyToken(at) {
    return this.token(this.site.keyTokens, at);
  }

  get same() {
    return this.site.queries === this.site.keys && this.site.queryTokens === this.site.keyTokens;
  }

  // Colours.

  largest(map) {
    if (this.range === "one") return 1;
    const hidden = this.hide ? Math.floor(this.site.firstKey / this.site.block) : -1;
    let top = 0;
    const { cells, columns } = map.levels[0];
    for (let i = 0; i < cells.length; i++) if (cells[i] > top && i % columns !== hidden) top = cells[i];
    return ceiling(leastOf(top) || 1);
  }

  place(weight, top) {
    const share = Math.min(1, weight / top);
    if (this.scale === "linear") return share;
    if (this.scale === "sqrt") return Math.sqrt(share);
    return weight <= LOWEST ? 0 : Math.log(weight / LOWEST) / Math.log(top / LOWEST);
  }

  colour() {
    const tops = this.maps.map((map) => this.largest(map));
    if (this.range !== "own") tops.fill(Math.min(1, Math.max(...tops)));
    this.top = tops[0];
    const unseen = rgbOf(this.frame.colour("unseen"));
    this.maps.forEach((map, i) => {
      const table = Array.from({ length: 256 }, (_, byte) => (byte ? colourAt(this.place(weightOf(byte), tops[i]), this.frame.theme) : unseen));
      map.setColours(table, this.hide ? Math.floor(this.site.firstKey / this.site.block) : -1);
      map.draw();
    });
    this.describe(tops);
  }

  draw() {
    if (this.site.mode === "missing") return;
    this.colour();
    this.mark();
  }

  /** Weights to stand below the colours, which are round where the top is. */
  ticks(top) {
    if (this.scale === "log") return [LOWEST, 0.001, 0.01, 0.1].filter((weight) => weight < 0.7 * top).concat(top);
    return (this.scale === "sqrt" ? [0, 0.05, 0.2, 0.5, 1] : [0, 0.2, 0.4, 0.6, 0.8, 1]).map((share) => share * top);
  }

  describe(tops) {
    const { site } = this;
    const own = this.range === "own" && new Set(tops).size > 1;
    const ticks = this.ticks(own ? 1 : this.top).map((weight) => [this.place(weight, own ? 1 : this.top), own ? `${roughly(100 * weight)} %` : roughly(weight)]);
    const variant = this.facts.variants[this.variant];
    const alone = /content|decay/.test(variant) ? `, by ${variant} alone` : "";
    const what = site.weights === "normalised" ? (variant === "raw" ? "weight" : "weight × ‖v‖, per row") : `|A| / Σ|A|${alone}`;
    const scaled = { linear: "", sqrt: ", square-root scale", log: `, logarithmic from ${LOWEST}` }[this.scale];
    const notes = [make("span", {}, `${what}${scaled}${own ? ", of each head's own largest" : ""}`), make("span", { class: "swatch" }, "not visible to the query")];
    this.scaleBox.replaceChildren(legend(gradient(colourAt, this.frame.theme), ticks, ...notes));
    const { firstKey, keys } = site;
    const mass = this.meanOnFirst();
    const who = named(this.keyToken(firstKey), firstKey, 14);
    this.hider.text.textContent = `${this.hide ? "Hidden" : "Hide"}: first key ${keys > firstKey ? who : ""}${mass === null ? "" : `, ${roughly(mass)} of the weight`}`;
  }

  meanOnFirst() {
    const { data, shape } = this.block("first");
    const at = this.site.heads.indexOf(this.head);
    const known = Array.from(data.subarray(at * shape[1], (at + 1) * shape[1])).filter((value) => !Number.isNaN(value));
    return known.length ? known.reduce((a, b) => a + b, 0) / known.length : null;
  }

  // Values.

  /** The exact largest weights of a row: [{key, weight}], largest first. */
  topOf(head, query) {
    const keys = this.block("top_keys");
    const [, queries, n] = keys.shape;
    const start = (this.site.heads.indexOf(head) * queries + query) * n;
    return Array.from({ length: n }, (_, i) => ({ key: keys.data[start + i], weight: this.block("top").data[start + i] })).filter(({ key }) => key >= 0);
  }

  /** The weight of a cell: {weight, exact, query, key}; of a pooled cell the largest in it and where that is. */
  cell(head, query, key) {
    const { site } = this;
    const at = site.heads.indexOf(head);
    const tile = this.tiles.get(head);
    if (tile && query >= tile.top && query < tile.top + tile.height && key >= tile.left && key < tile.left + tile.width) {
      return { weight: tile.weights[(query - tile.top) * tile.width + key - tile.left], exact: true, query, key };
    }
    const exact = this.block("exact");
    if (exact) return { weight: exact.data[(at * site.queries + query) * site.keys + key], exact: true, query, key };
    const cells = this.block("cells");
    const [, rows, columns] = cells.shape;
    const [row, column] = [query, key].map((i) => Math.floor(i / site.block));
    const index = (at * rows + row) * columns + column;
    const found = { weight: weightOf(cells.data[index]), exact: false, query, key };
    if (site.block > 1) {
      const place = this.block("places").data[index];
      found.query = row * site.block + Math.floor(place / site.block);
      found.key = column * site.block + (place % site.block);
    }
    if (Number.isNaN(found.weight)) return { ...found, query, key };
    const known = this.topOf(head, found.query).find((each) => each.key === found.key);
    return known ? { ...found, weight: known.weight, exact: true } : found;
  }

  sentence(head, query, key) {
    const found = this.cell(head, query, key);
    const arrow = `${named(this.queryToken(found.query), found.query)} → ${named(this.keyToken(found.key), found.key)}`;
    const who = this.maps.length > 1 ? `head ${head}: ` : "";
    if (Number.isNaN(found.weight)) return [arrow, `${who}not visible to this query`];
    const pooled = this.site.block > 1 && !this.tiles.has(head) ? `, largest of its ${this.site.block} × ${this.site.block} block` : "";
    return [arrow, `${who}weight ${found.exact ? exactly(found.weight) : `≈ ${roughly(found.weight)}`}${pooled}`];
  }

  // Selection.

  choose(map, row, column) {
    const { query, key } = this.cell(map.head, row, column);
    const change = { query, key, site: this.site.name, layer: this.site.layer };
    if (this.same) change.token = query;
    if (!this.frame.selection.heads.includes(map.head)) change.heads = [map.head];
    this.frame.select(change);
  }

  step(event) {
    const moves = { "[": [-1, 0], "]": [1, 0], ",": [0, -1], ".": [0, 1] };
    if (!(event.key in moves)) return;
    event.preventDefault();
    const [down, right] = moves[event.key];
    const index = Math.max(0, Math.min(this.facts.sites.length - 1, this.index + down));
    const { heads } = this.facts.sites[index];
    const at = Math.max(0, Math.min(heads.length - 1, Math.max(0, heads.indexOf(this.head)) + right));
    this.go(index, heads[at]);
    this.maps[0]?.canvas.focus();
  }

  mark() {
    if (this.site.mode === "missing") return;
    const query = this.query !== null && this.query < this.site.queries ? this.query : null;
    const key = this.key !== null && this.key < this.site.keys ? this.key : null;
    for (const map of this.maps) {
      map.chosen = { row: query, column: key };
      map.compose();
    }
    this.strips.shade(query ?? this.site.queries - 1);
    this.row.show(query ?? this.site.queries - 1, key);
  }

  // Zoom: all heads alike, and finer cells from the kernel where there is one.

  zoomed(map) {
    this.view = { ...map.view };
    for (const other of this.maps) {
      if (other === map) continue;
      other.view = { ...map.view };
      other.overlay = null;
      other.draw();
    }
    this.tiles.clear();
    clearTimeout(this.asking);
    const { rows, columns, top, left } = map.view;
    if (!this.frame.live || this.site.block === 1 || rows > 512 || columns > 512) return;
    this.asking = setTimeout(() => this.maps.forEach((each) => this.fetchTile(each, top, left, rows, columns)), 120);
  }

  async fetchTile(map, top, left, rows, columns) {
    const question = { ask: "tile", site: this.index, head: map.head, variant: this.facts.variants[this.variant], rows: [top, top + rows], columns: [left, left + columns] };
    try {
      const { shape, buffers } = await this.frame.ask(question);
      if (map.view.top !== top || map.view.left !== left || map.view.rows !== rows) return; // moved on since
      const weights = arrayOf("f4", buffers[0]);
      this.tiles.set(map.head, { weights, top, left, height: shape[0], width: shape[1] });
      map.lay(Uint8Array.from(weights, byteOf), top, left, shape[0], shape[1]);
    } catch (error) {
      this.frame.say(`Finer cells could not be computed: ${error.message}`);
    }
  }
}
