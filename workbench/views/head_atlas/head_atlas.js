// Head atlas: layers down, heads across, one canvas per kind of attention, coloured by a number per head.

import { colourAt, css, divergingAt, gradient, inkOn } from "workbench/shared/colour.js";
import { axes, button, exactly, legend, make, moved, roughly, roving } from "workbench/shared/dom.js";
import { open } from "workbench/shared/frame.js";
import { ceiling, greatest } from "workbench/shared/scales.js";

const RANKED = 40; // heads that are added to the list at a time

export async function render({ model, el }) {
  const frame = await open({ model, el });
  new Atlas(frame);
  return () => frame.close();
}

class Atlas {
  constructor(frame) {
    this.frame = frame;
    this.facts = frame.facts;
    this.count = frame.blocks.values.shape[1];
    this.layerNames();
    this.meaning = make("p", { class: "caption" });
    this.scale = make("div");
    this.ranking = make("ol", { class: "ranking", "aria-label": "Heads by value, highest first" });
    roving(this.ranking);
    this.ranked = RANKED;
    this.counted = make("span");
    this.grow = button("Show more", () => {
      this.ranked += RANKED;
      this.rank();
    }, { class: "screen" });
    const more = make("p", { class: "where" }, this.counted, " ", this.grow, " ", frame.pageOfHead());
    const maps = make("div", { class: "maps" });
    this.grids = this.facts.groups.map((group, i) => new Grid(this, group, maps, i));
    const left = make("div", {}, maps, this.scale);
    frame.body.append(this.meaning, make("div", { class: "columns" }, left, make("div", {}, this.ranking, more)));
    this.buildControls();
    frame.offerKeys([["← → ↑ ↓, Home, End", "move over the heads"], ["Enter", "choose the head in every view"], ["Shift + Enter", "add it, or take it away"], ["[ ] , .", "layer and head up or down"], ["Esc", "choose none"]]);
    this.ready = false;
    frame.onSelect((selection) => this.follow(selection));
    this.ready = true;
    frame.onRedraw(() => this.draw());
  }

  /** Whether each group has one site per layer, so that a layer names it. */
  layerNames() {
    for (const group of this.facts.groups) {
      const layers = group.sites.map(({ layer }) => layer);
      group.unique = new Set(layers).size === layers.length;
    }
  }

  buildControls() {
    const { controls, settings } = this.frame;
    const { metrics, first } = this.facts;
    this.metric = first;
    this.onlyCertain = false;
    if (metrics.length > 1) {
      const choices = metrics.map(({ label, unit }) => [label, unit ? `${label} (${unit})` : label]);
      const picked = settings.pick("metric", "Colour by", choices, metrics[this.metric].label, (label) => {
        this.metric = metrics.findIndex((each) => each.label === label);
        this.draw();
      });
      this.metric = metrics.findIndex(({ label }) => label === picked.value);
      controls.append(picked.field);
    }
    if (metrics.some(({ interval }) => interval)) {
      const hide = settings.mark("certain", "Hide heads whose interval crosses 0, or that have none", false, (on) => {
        this.onlyCertain = on;
        this.draw();
      });
      this.onlyCertain = hide.value;
      controls.append(hide.field);
    }
  }

  get about() {
    return this.facts.metrics[this.metric];
  }

  at(block, index) {
    return this.facts.metrics.length ? this.frame.blocks[block].data[this.metric * this.count + index] : NaN;
  }

  /** The value to draw; NaN where it is not known or hidden. */
  value(index) {
    const hidden = this.onlyCertain && this.about.interval && !(this.at("low", index) > 0 || this.at("high", index) < 0);
    return hidden ? NaN : this.at("values", index);
  }

  colour(value) {
    return this.about.signed ? divergingAt(value / this.top, this.frame.theme) : colourAt(value / this.top, this.frame.theme);
  }

  draw() {
    const top = greatest(Array.from({ length: this.count }, (_, i) => this.at("values", i)));
    this.top = this.about?.unit === "mass" ? Math.min(1, ceiling(top)) : ceiling(top);
    this.meaning.textContent = this.about ? `${this.about.label}: ${this.about.meaning || "one number per head"}.` : "No statistic was captured: the atlas shows where the heads are.";
    for (const grid of this.grids) grid.draw();
    this.drawLegend();
    this.rank();
  }

  drawLegend() {
    if (!this.about) return this.scale.replaceChildren();
    const { label, unit, signed } = this.about;
    const ticks = signed ? [[0, -this.top], [0.5, 0], [1, this.top]] : [[0, 0], [0.5, this.top / 2], [1, this.top]];
    const at = signed ? (t) => divergingAt(2 * t - 1, this.frame.theme) : (t) => colourAt(t, this.frame.theme);
    const said = make("span", {}, unit === "mass" ? `${label}, share of a row` : unit ? `${label}, ${unit}` : label);
    const unknown = make("span", { class: "swatch" }, "not known");
    this.scale.replaceChildren(legend(gradient(at), ticks.map(([place, value]) => [place, roughly(value)]), said, unknown));
  }

  rank() {
    const heads = this.grids.flatMap((grid) => grid.heads()).map((head) => ({ ...head, value: this.value(head.index) }));
    const known = heads.filter(({ value }) => Number.isFinite(value)).sort((a, b) => Math.abs(b.value) - Math.abs(a.value));
    const { layer, heads: chosen } = this.frame.selection;
    const rows = known.slice(0, this.ranked).map((head) => {
      const bar = make("i");
      bar.style.width = `${Math.min(100, (100 * Math.abs(head.value)) / this.top)}%`;
      bar.style.backgroundColor = css(this.colour(head.value));
      const choose = button("", () => this.choose(head.grid, head.row, head.column, false), { "aria-pressed": `${head.layer === layer && chosen.includes(head.column)}` });
      const group = this.grids.length > 1 ? [make("small", {}, head.grid.group.label.replace(/[ -]attention$/, "").toLowerCase())] : [];
      choose.append(make("b", {}, head.grid.nameOf(head.row, head.column), ...group), make("span", { class: "n" }, roughly(head.value)), make("span", { class: "length" }, bar));
      return make("li", {}, choose);
    });
    this.ranking.hidden = !rows.length;
    this.ranking.replaceChildren(...rows);
    const left = known.length - rows.length;
    this.counted.textContent = !rows.length ? "" : left ? `${rows.length} of ${known.length.toLocaleString("en")} heads` : known.length > 1 ? `all ${known.length.toLocaleString("en")} heads` : "";
    this.grow.hidden = left <= 0;
  }

  sentence(grid, row, column) {
    const index = grid.indexOf(row, column);
    const where = `${grid.group.label}, ${grid.nameOf(row, column)}`;
    if (!this.about) return where;
    const { label, unit, interval } = this.about;
    const ends = Number.isFinite(this.at("low", index)) ? `interval ${exactly(this.at("low", index))} to ${exactly(this.at("high", index))}` : "no interval";
    const range = interval ? `, ${ends}` : "";
    return `${where}: ${label.toLowerCase()} ${exactly(this.at("values", index))}${unit === "mass" ? "" : ` ${unit}`}${range}`;
  }

  choose(grid, row, column, add) {
    const { layer, name } = grid.group.sites[row];
    const old = this.frame.selection;
    const same = old.layer === layer && (old.site === null || name === null || old.site === name);
    let heads = [column];
    if (add && same) heads = old.heads.includes(column) ? old.heads.filter((head) => head !== column) : [...old.heads, column];
    this.frame.select({ layer, heads, site: name });
  }

  follow(selection) {
    if (!this.ready) return;
    for (const grid of this.grids) grid.follow(selection);
    this.rank();
  }
}

/** One group of sites on a canvas. */
class Grid {
  constructor(atlas, group, box, number) {
    this.atlas = atlas;
    this.group = group;
    this.frame = atlas.frame;
    this.rows = group.sites.length;
    this.columns = Math.max(...group.sites.map(({ heads }) => heads));
    this.cursor = [0, 0];
    this.canvas = make("canvas", { tabindex: "0", role: "application", "aria-roledescription": "head map", "aria-label": `${group.label}: layers down, heads across. Arrow keys move, Enter chooses a head.` });
    box.append(make("figure", { class: "map" }, make("figcaption", {}, group.label), axes(group.unique ? "layers" : "sites", "heads"), this.canvas));
    this.canvas.dataset.group = number;
    this.canvas.addEventListener("pointermove", (event) => this.hover(event));
    this.canvas.addEventListener("pointerleave", () => this.leave());
    this.canvas.addEventListener("pointerdown", (event) => this.press(event));
    this.canvas.addEventListener("pointerup", (event) => this.release(event));
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    this.canvas.addEventListener("focus", () => this.point(this.cursor));
    this.canvas.addEventListener("blur", () => this.compose());
  }

  indexOf(row, column) {
    return this.group.sites[row].start + column;
  }

  nameOf(row, column) {
    const { layer, name } = this.group.sites[row];
    return this.group.unique ? `L${layer}H${column}` : `${name} head ${column}`;
  }

  heads() {
    return this.group.sites.flatMap((site, row) => Array.from({ length: site.heads }, (_, column) => ({ grid: this, row, column, layer: site.layer, index: site.start + column })));
  }

  draw() {
    const dpr = window.devicePixelRatio || 1;
    const ranking = matchMedia("(max-width: 760px)").matches ? 0 : 270; // it stands beside the maps, or below them
    const room = Math.max(160, (this.frame.body.clientWidth || 860) - ranking);
    const left = 34;
    const width = Math.max(3, Math.min(46, Math.floor((room - left) / this.columns)));
    const height = Math.max(6, Math.min(26, width, Math.floor(560 / this.rows)));
    this.dpr = dpr;
    this.left = left;
    this.top = 18;
    this.width = width;
    this.height = Math.max(height, Math.min(width, 14));
    this.canvas.width = (left + width * this.columns + 2) * dpr;
    this.canvas.height = (this.top + this.height * this.rows + 2) * dpr;
    this.canvas.style.width = `${this.canvas.width / dpr}px`;
    this.canvas.style.height = `${this.canvas.height / dpr}px`;
    Object.assign(this.canvas.dataset, { left, top: this.top, width, height: this.height });
    this.compose();
  }

  compose() {
    const ink = this.canvas.getContext("2d");
    const { dpr, left, top, width, height, frame } = this;
    ink.setTransform(dpr, 0, 0, dpr, 0, 0);
    ink.clearRect(0, 0, this.canvas.width, this.canvas.height);
    const gap = width > 8 && height > 8 ? 1 : 0;
    ink.textAlign = "center";
    ink.textBaseline = "middle";
    for (const { row, column, index } of this.heads()) {
      const value = this.atlas.value(index);
      const rgb = Number.isFinite(value) ? this.atlas.colour(value) : null;
      ink.fillStyle = rgb ? css(rgb) : frame.colour("unseen");
      ink.fillRect(left + column * width, top + row * height, width - gap, height - gap);
      if (!rgb || width < 30 || height < 14) continue;
      ink.fillStyle = inkOn(rgb);
      ink.font = `11px ${frame.colour("sans")}`;
      const said = roughly(value).replace(/^(−?)0\./, "$1."); // as in the ranking
      const text = ink.measureText(said).width < width - 2 ? said : value.toExponential(0);
      ink.fillText(text, left + (column + 0.5) * width, top + (row + 0.5) * height);
    }
    this.labels(ink);
    this.outlines(ink);
  }

  labels(ink) {
    const { left, top, width, height, frame } = this;
    ink.fillStyle = frame.colour("muted");
    ink.font = `10.5px ${frame.colour("sans")}`;
    const everyColumn = Math.ceil(18 / width);
    for (let column = 0; column < this.columns; column += everyColumn) ink.fillText(`${column}`, left + (column + 0.5) * width, top - 9);
    ink.textAlign = "right";
    const everyRow = Math.ceil(12 / height);
    for (let row = 0; row < this.rows; row += everyRow) {
      ink.fillText(this.group.unique ? `L${this.group.sites[row].layer}` : `${row}`, left - 6, top + (row + 0.5) * height);
    }
  }

  outlines(ink) {
    const { left, top, width, height, frame } = this;
    const { layer, heads, site } = frame.selection;
    const box = (row, column, inset) => ink.strokeRect(left + column * width - 0.5 + inset, top + row * height - 0.5 + inset, width - 2 * inset, height - 2 * inset);
    this.group.sites.forEach((each, row) => {
      if (each.layer !== layer || (site !== null && each.name !== null && site !== each.name)) return;
      for (const column of heads.filter((head) => head < each.heads)) {
        ink.lineWidth = 3;
        ink.strokeStyle = frame.colour("paper");
        box(row, column, 0);
        ink.lineWidth = 2;
        ink.strokeStyle = frame.colour("cursor");
        box(row, column, 0);
      }
    });
    if (!this.pointed && document.activeElement !== this.canvas && this.canvas.getRootNode().activeElement !== this.canvas) return;
    ink.lineWidth = 1.5;
    ink.strokeStyle = frame.colour("ink");
    box(...this.cursor, 1);
  }

  cellAt(event) {
    const bounds = this.canvas.getBoundingClientRect();
    const column = Math.floor((event.clientX - bounds.left - this.left) / this.width);
    const row = Math.floor((event.clientY - bounds.top - this.top) / this.height);
    const inside = row >= 0 && row < this.rows && column >= 0 && column < this.group.sites[row].heads;
    return inside ? [row, column] : null;
  }

  hover(event) {
    const cell = this.cellAt(event);
    this.pointed = Boolean(cell);
    if (!cell) return this.leave();
    this.point(cell);
    const [row] = cell;
    this.frame.showTip(event, [this.atlas.sentence(this, ...cell), this.group.sites[row].name ?? ""].filter(Boolean));
  }

  leave() {
    this.pointed = false;
    this.frame.hideTip();
    this.compose();
  }

  point(cell) {
    this.cursor = cell;
    this.frame.say(this.atlas.sentence(this, ...cell));
    this.compose();
  }

  press(event) {
    this.pressed = this.cellAt(event);
  }

  /** A click chooses a head; a drag along a layer chooses all heads from its start to its end. */
  release(event) {
    const end = this.cellAt(event);
    if (!this.pressed || !end) return;
    const [row, from] = this.pressed;
    this.pressed = null;
    if (end[0] === row && end[1] !== from) {
      const [low, high] = [Math.min(from, end[1]), Math.max(from, end[1])];
      const { layer, name } = this.group.sites[row];
      this.frame.select({ layer, site: name, heads: Array.from({ length: high - low + 1 }, (_, i) => low + i) });
    } else if (end[0] === row) this.atlas.choose(this, row, from, event.shiftKey);
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const also = { "[": "ArrowUp", "]": "ArrowDown", ",": "ArrowLeft", ".": "ArrowRight" };
    const to = moved(also[event.key] ?? event.key, this.cursor, [this.rows, this.columns]);
    if (event.key === "Enter" || event.key === " ") this.atlas.choose(this, ...this.cursor, event.shiftKey);
    else if (event.key === "Escape") this.frame.select({ layer: null, heads: [], site: null });
    else if (to) this.point([to[0], Math.min(to[1], this.group.sites[to[0]].heads - 1)]);
    else return;
    event.preventDefault();
  }

  follow({ layer, heads, site }) {
    const row = this.group.sites.findIndex((each) => each.layer === layer && (site === null || each.name === null || each.name === site));
    if (row >= 0 && heads.length && heads[0] < this.group.sites[row].heads) this.cursor = [row, heads[0]];
    if (this.width) this.compose();
  }
}
