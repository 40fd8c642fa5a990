// Tensor peek: statistics, a histogram, and slices of tensors. Other slices come from the kernel where one lives.

import { arrayOf } from "workbench/shared/blocks.js";
import { colourAt, divergingAt, gradient, rgbOf } from "workbench/shared/colour.js";
import { axes, count, cut, exactly, legend, make, moved, roughly, selector } from "workbench/shared/dom.js";
import { open } from "workbench/shared/frame.js";
import { ceiling, greatest, roundTicks, shortNumber } from "workbench/shared/scales.js";
import { prepare } from "workbench/shared/canvas.js";

const CHOSEN = { layer: "layer", query: "query", key: "key", token: "token" }; // names of axes that are a selection's
const BARS = { width: 420, height: 130, left: 58, bottom: 38 };

export async function render({ model, el }) {
  const frame = await open({ model, el });
  const peek = new Peek(frame);
  return () => peek.frame.close();
}

class Peek {
  rows = 0;
  columns = 0;

  constructor(frame) {
    this.frame = frame;
    this.number = -1;
    this.about = null;
    this.cell = [0, 0];
    this.bin = 0;
    this.facts = make("dl", { class: "facts" });
    this.tile = make("canvas", { tabindex: "0", role: "application", "aria-roledescription": "tile", class: "tile" });
    this.where = make("p", { class: "where" });
    this.directions = make("div");
    this.scale = make("div");
    this.bars = make("canvas", { tabindex: "0", role: "application", "aria-roledescription": "histogram" });
    this.heading = make("p", { class: "where" });
    const left = make("div", { class: "slice" }, this.where, this.directions, this.tile, this.scale);
    frame.body.append(make("div", { class: "peek" }, left, make("div", { class: "side" }, this.heading, this.bars, this.facts)));
    this.listen();
    frame.offerKeys([
      ["← → ↑ ↓, Home, End", "move over the cells, or over the bars"],
      ["Enter", "choose the head, query, key, layer or token of the cell in every view"],
      ["Esc", "hide the cursor"],
    ]);
    this.read();
    frame.onState(() => this.read());
    frame.onRedraw(() => this.draw());
  }

  /** Show what the state says: which tensor, which slice of it, and how bars count. Where it says nothing, or wrongly, the first. */
  read() {
    const { state, facts } = this.frame;
    const number = facts.tensors[state.tensor] ? state.tensor : 0;
    const about = facts.tensors[number];
    const inside = (index) => index?.length === about.shape.length && index.every((at, axis) => Number.isInteger(at) && at >= 0 && at < about.shape[axis]);
    const two = (axes) => axes?.length === 2 && axes[0] !== axes[1] && axes.every((axis) => Number.isInteger(axis) && axis >= 0 && axis < about.shape.length);
    this.log = state.counts === "log";
    if (this.number !== number) Object.assign(this, { number, about, cell: [0, 0], bin: 0, entered: false });
    const before = JSON.stringify([this.index, this.controlled]);
    this.index = inside(state.index) ? [...state.index] : [...about.index];
    [this.rows, this.columns] = two(state.axes) ? state.axes : about.shown;
    const controlled = [number, this.rows, this.columns];
    // Made anew only where there are others: the one that has the focus stays.
    if (JSON.stringify(controlled) !== JSON.stringify(this.controlled)) {
      this.controlled = controlled;
      this.controls();
      this.describe();
    }
    for (const [axis, picker] of this.pickers) picker.value = this.index[axis];
    this.counter.value = this.log ? "log" : "linear";
    if (JSON.stringify([this.index, controlled]) === before) this.drawBars();
    else this.load();
  }

  controls() {
    const { tensors } = this.frame.facts;
    const { controls } = this.frame;
    controls.replaceChildren();
    /** @type {Map<number, HTMLInputElement>} */
    this.pickers = new Map();
    if (tensors.length > 1) {
      const choice = selector("Tensor", tensors.map(({ name }, i) => [i, name]), (i) => this.frame.keep({ tensor: Number(i), index: null, axes: null }));
      choice.select.value = this.number;
      controls.append(choice.field);
    }
    const { axes, shape } = this.about;
    if (this.frame.live && shape.length > 2) {
      for (const side of ["rows", "columns"]) {
        const choice = selector(side === "rows" ? "Rows" : "Columns", axes.map((name, i) => [i, name]), (i) => this.turn(side, Number(i)));
        choice.select.value = this[side];
        controls.append(choice.field);
      }
    }
    axes.forEach((name, axis) => {
      if (axis === this.rows || axis === this.columns || shape[axis] < 2) return;
      const picker = make("input", { type: "number", min: 0, max: shape[axis] - 1, value: this.index[axis] });
      picker.addEventListener("change", () => {
        const at = Math.min(shape[axis] - 1, Math.max(0, Math.round(Number(picker.value)) || 0));
        picker.value = at;
        this.frame.keep({ index: this.index.with(axis, at) });
      });
      this.pickers.set(axis, picker);
      controls.append(make("label", { class: "field" }, make("span", {}, `${name} (0 to ${shape[axis] - 1})`), picker));
    });
    const counts = selector("Counts", [["linear", "linear"], ["log", "log"]], (counts) => this.frame.keep({ counts }));
    this.counter = counts.select;
    controls.append(counts.field);
  }

  /** Show another axis; if it is the other side's, they change places. */
  turn(side, axis) {
    const axes = [this.rows, this.columns];
    const at = side === "rows" ? 0 : 1;
    if (axes[1 - at] === axis) axes[1 - at] = axes[at];
    axes[at] = axis;
    this.frame.keep({ axes });
  }

  describe() {
    const { shape, dtype, device, statistics } = this.about;
    const counts = new Set(["numbers", "NaN", "∞", "minus ∞", "zeros"]);
    const pairs = [["shape", shape.length ? shape.join(" × ") : "one number"], ["dtype", dtype], ["device", device]];
    for (const [name, value] of Object.entries(statistics)) {
      if (counts.has(name) && value === 0 && name !== "zeros") continue;
      pairs.push([name, value === null ? "–" : counts.has(name) ? value.toLocaleString("en") : exactly(value).replaceAll("-", "−")]);
    }
    this.facts.replaceChildren(...pairs.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
    this.heading.textContent = `Histogram of the finite values of ${cut(this.about.name, 60)}`;
  }

  // Slices.

  /** Number of the slice that is picked, where it is one of those on the page. */
  held() {
    const { shape, shown, held } = this.about;
    if (shown[0] !== this.rows || shown[1] !== this.columns) return null;
    const number = shape.slice(0, -2).reduce((sum, n, axis) => sum * n + this.index[axis], 0);
    return number < held ? number : null;
  }

  async load() {
    const { blocks, live } = this.frame;
    const asked = (this.asked ?? 0) + 1;
    this.asked = asked;
    const number = this.held();
    if (number !== null) {
      const { data, shape } = blocks[`slices:${this.number}`];
      const size = shape[1] * shape[2];
      this.slice = { data: data.subarray(number * size, (number + 1) * size), shape: shape.slice(1), pooled: this.about.pooled };
    } else if (!this.about.held) {
      this.slice = null;
    } else if (!live) {
      this.slice = null;
      this.frame.say(`This page holds the first ${this.about.held} slices; open the notebook for the others.`);
    } else {
      try {
        const { buffers, shape, pooled } = await this.frame.ask({ ask: "slice", tensor: this.number, index: this.index, rows: this.rows, columns: this.columns });
        if (asked !== this.asked) return; // another slice was picked meanwhile
        this.slice = { data: arrayOf("f8", buffers[0]), shape, pooled };
      } catch (error) {
        this.slice = null;
        this.frame.say(error.message);
      }
    }
    if (this.slice) this.cell = this.cell.map((at, side) => Math.min(at, this.slice.shape[side] - 1));
    this.draw();
  }

  value(row, column) {
    return this.slice.data[row * this.slice.shape[1] + column];
  }

  // Drawing.

  draw() {
    const { axes: names } = this.about;
    const fixed = names.map((name, axis) => [name, axis]).filter(([, axis]) => axis !== this.rows && axis !== this.columns);
    const rows = this.rows === null || this.rows === undefined ? "one row" : names[this.rows];
    const columns = this.columns === null || this.columns === undefined ? "" : ` × ${names[this.columns]}`;
    const at = fixed.map(([name, axis]) => `, ${name} ${this.index[axis]}`).join("");
    this.where.textContent = this.slice ? `${cut(this.about.name, 60)}: ${rows}${columns}${at}` : this.about.held ? "This slice is not on this page." : "There is nothing to show: the tensor is empty.";
    this.tile.setAttribute("aria-label", `${this.where.textContent}. Arrow keys move over the cells.`);
    this.tile.hidden = this.scale.hidden = this.directions.hidden = !this.slice;
    const down = Number.isInteger(this.rows) && Number.isInteger(this.columns);
    this.directions.replaceChildren(...(down ? [axes(names[this.rows], names[this.columns])] : []));
    this.drawTile();
    this.drawBars();
  }

  drawTile() {
    if (!this.slice) return;
    const [rows, columns] = this.slice.shape;
    const room = Math.max(160, Math.min(560, this.frame.body.clientWidth - 24));
    this.across = columns > room ? room / columns : Math.max(1, Math.min(28, Math.floor(room / columns)));
    this.down = rows > 512 ? 1 : Math.max(1, Math.min(28, Math.floor(room / Math.max(rows, columns)), Math.floor(420 / rows) || 1));
    if (rows === 1) this.down = 28;
    const [width, height] = [columns * this.across, rows * this.down];
    const pen = prepare(this.tile, width, height);
    pen.imageSmoothingEnabled = false;
    this.top = ceiling(greatest(this.slice.data));
    const image = this.image(rows, columns);
    pen.drawImage(image, 0, 0, width, height);
    if (this.entered) {
      pen.strokeStyle = this.frame.colour("cursor");
      pen.lineWidth = 2;
      const side = [Math.max(6, this.across), Math.max(6, this.down)];
      pen.strokeRect((this.cell[1] + 0.5) * this.across - side[0] / 2, (this.cell[0] + 0.5) * this.down - side[1] / 2, side[0], side[1]);
    }
    this.drawLegend();
  }

  colours() {
    return this.about.signed ? (t) => divergingAt(t, this.frame.theme) : (t) => colourAt(t, this.frame.theme);
  }

  image(rows, columns) {
    const canvas = make("canvas", { width: columns, height: rows });
    const pen = canvas.getContext("2d");
    const pixels = pen.createImageData(columns, rows);
    const unseen = rgbOf(this.frame.colour("unseen"));
    const at = this.colours();
    this.slice.data.forEach((value, i) => pixels.data.set([...(Number.isFinite(value) ? at(value / this.top) : unseen), 255], 4 * i));
    pen.putImageData(pixels, 0, 0);
    return canvas;
  }

  drawLegend() {
    const { signed } = this.about;
    const ticks = signed ? [[0, -this.top], [0.5, 0], [1, this.top]] : [[0, 0], [0.5, this.top / 2], [1, this.top]];
    const at = signed ? (t) => divergingAt(2 * t - 1, this.frame.theme) : (t) => colourAt(t, this.frame.theme);
    const odd = this.slice.data.some((value) => !Number.isFinite(value));
    const marks = odd ? [make("span", { class: "swatch" }, "NaN or infinite")] : [];
    this.scale.replaceChildren(legend(gradient(at), ticks.map(([place, value]) => [place, roughly(value)]), ...marks));
  }

  get counts() {
    return this.frame.blocks[`counts:${this.number}`].data;
  }

  get edges() {
    return this.frame.blocks[`edges:${this.number}`].data;
  }

  tall(count, top) {
    if (!count) return 0;
    return this.log ? (Math.log10(count) + 0.3) / (Math.log10(top) + 0.3) : count / top;
  }

  drawBars() {
    const { width, height, left, bottom } = BARS;
    const { counts, edges } = this;
    this.bars.hidden = this.heading.hidden = !counts.length;
    if (!counts.length) return;
    const pen = prepare(this.bars, width, height + bottom);
    this.bars.setAttribute("aria-label", `${this.heading.textContent}, ${counts.length} bars. Arrow keys move over them.`);
    pen.font = `11px ${getComputedStyle(this.frame.root).fontFamily}`;
    const top = Math.max(...counts);
    const step = (width - left - 4) / counts.length;
    counts.forEach((n, i) => {
      const tall = (height - 10) * this.tall(n, top);
      pen.fillStyle = this.onBars && i === this.bin ? this.frame.colour("cursor") : "#2f6fb7";
      if (n) pen.fillRect(left + i * step, height - Math.max(1, tall), Math.max(1, step - 0.5), Math.max(1, tall));
    });
    pen.fillStyle = this.frame.colour("edge");
    pen.fillRect(left, height, width - left - 4, 1);
    pen.fillStyle = this.frame.colour("muted");
    pen.textAlign = "right";
    pen.fillText(top.toLocaleString("en"), left - 4, 16);
    pen.fillText(this.log ? "1" : "0", left - 4, height - (this.log ? (height - 10) * this.tall(1, top) - 4 : 0));
    const [low, high] = [edges[0], edges.at(-1)];
    pen.textAlign = "center";
    for (const value of roundTicks(low, high, 4)) {
      const x = left + ((value - low) / (high - low || 1)) * (width - left - 4);
      pen.fillRect(x, height, 1, 4);
      pen.fillText(shortNumber(value), Math.min(x, width - 14), height + 15);
    }
    pen.fillText("value", (left + width) / 2, height + 31);
    pen.translate(11, height / 2);
    pen.rotate(-Math.PI / 2);
    pen.fillText("numbers", 0, 0);
  }

  // What the pointer or the cursor is on.

  place(row, column) {
    const { axes } = this.about;
    const span = (at, by, axis) => {
      const last = Math.min(this.about.shape[axis], (at + 1) * by) - 1;
      return `${axes[axis]} ${at * by}${last > at * by ? ` to ${last}` : ""}`;
    };
    const [down, across] = this.slice.pooled;
    const parts = [];
    if (Number.isInteger(this.rows)) parts.push(span(row, down, this.rows));
    if (Number.isInteger(this.columns)) parts.push(span(column, across, this.columns));
    return parts.join(", ") || this.about.name;
  }

  said(value) {
    return Number.isNaN(value) ? "NaN" : value === Infinity ? "∞" : value === -Infinity ? "−∞" : exactly(value);
  }

  sentence(row, column) {
    const several = this.slice.pooled.some((by) => by > 1);
    return `${this.place(row, column)}: ${several ? "farthest from 0 " : ""}${this.said(this.value(row, column))}`;
  }

  barSentence(i) {
    return `${exactly(this.edges[i])} to ${exactly(this.edges[i + 1])}: ${count(this.counts[i], "number")}`;
  }

  listen() {
    const { tile, bars, frame } = this;
    const inside = (event, canvas) => [event.clientX - canvas.getBoundingClientRect().left, event.clientY - canvas.getBoundingClientRect().top];
    const cellAt = (event) => {
      const [x, y] = inside(event, tile);
      const cell = [Math.floor(y / this.down), Math.floor(x / this.across)];
      return this.slice && cell.every((at, side) => at >= 0 && at < this.slice.shape[side]) ? cell : null;
    };
    const binAt = (event) => {
      const i = Math.floor((inside(event, bars)[0] - BARS.left) / ((BARS.width - BARS.left - 4) / this.counts.length));
      return i >= 0 && i < this.counts.length ? i : null;
    };
    tile.addEventListener("pointermove", (event) => {
      const cell = cellAt(event);
      if (cell) frame.showTip(event, [this.sentence(...cell)]);
      else frame.hideTip();
    });
    tile.addEventListener("click", (event) => {
      const cell = cellAt(event);
      if (cell) this.go(cell, true);
    });
    bars.addEventListener("pointermove", (event) => {
      const i = binAt(event);
      if (i === null) frame.hideTip();
      else frame.showTip(event, [this.barSentence(i)]);
    });
    for (const canvas of [tile, bars]) canvas.addEventListener("pointerleave", () => frame.hideTip());
    tile.addEventListener("keydown", (event) => this.key(event));
    bars.addEventListener("keydown", (event) => this.barKey(event));
    bars.addEventListener("blur", () => {
      this.onBars = false;
      this.drawBars();
    });
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || !this.slice) return;
    const next = moved(event.key, this.cell, this.slice.shape);
    if (next) this.go(this.entered ? next : this.cell, false);
    else if (event.key === "Enter" || event.key === " ") this.go(this.cell, true);
    else if (event.key === "Escape") {
      this.entered = false;
      this.drawTile();
    } else return;
    event.preventDefault();
  }

  go(cell, choose) {
    this.cell = cell;
    this.entered = true;
    this.drawTile();
    this.frame.say(this.sentence(...cell));
    if (choose) this.choose(cell);
  }

  /** Axes with a selection's name choose; a pooled cell stands for several positions and chooses none of them. */
  choose([row, column]) {
    const at = [...this.index];
    const [down, across] = this.slice.pooled;
    if (Number.isInteger(this.rows)) at[this.rows] = down > 1 ? null : row;
    if (Number.isInteger(this.columns)) at[this.columns] = across > 1 ? null : column;
    const change = {};
    this.about.axes.forEach((name, axis) => {
      if (at[axis] === null) return;
      if (name === "head") change.heads = [at[axis]];
      else if (name in CHOSEN) change[CHOSEN[name]] = at[axis];
    });
    if (Object.keys(change).length) this.frame.select(change);
  }

  barKey(event) {
    const next = moved(event.key, [0, this.bin], [1, this.counts.length]);
    if (!next || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    this.bin = this.onBars ? next[1] : this.bin;
    this.onBars = true;
    this.drawBars();
    this.frame.say(this.barSentence(this.bin));
  }
}
