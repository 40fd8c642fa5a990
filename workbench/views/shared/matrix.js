// A matrix on a canvas: rows down, columns across, names along two edges, a cursor, chosen rows and columns, and a zoom.
// Cells are bytes that a table turns into colours; where cells are smaller than a pixel, the largest of them is drawn.

import { cut, make, moved } from "./dom.js";

const EDGE = { least: 44, most: 104 };
const FONT = { least: 10, most: 12 };
const TALLEST = 720;

/** The largest of each 2 x 2 block by `size` of a byte. */
function halved({ cells, rows, columns }, size) {
  const [h, w] = [Math.ceil(rows / 2), Math.ceil(columns / 2)];
  const found = new Uint8Array(h * w);
  for (let row = 0; row < rows; row++) {
    for (let column = 0, at = row * columns; column < columns; column++, at++) {
      const to = (row >> 1) * w + (column >> 1);
      if (size(cells[at]) > size(found[to])) found[to] = cells[at];
    }
  }
  return { cells: found, rows: h, columns: w };
}

/**
 * @typedef {object} Options
 * @property {() => string} label
 * @property {(i: number) => string} rowName
 * @property {(i: number) => string} columnName
 * @property {(row: number, column: number) => string[]} read lines of text
 * @property {(row: number, column: number) => void} choose
 * @property {() => void} clear
 * @property {(byte: number) => number} [size] for pooling: the byte itself where there is none
 * @property {(event: KeyboardEvent) => void} [more] keys that the matrix does not know
 * @property {(map: Matrix) => void} [moved] after a zoom
 * @property {(cell: number[] | null) => void} [pointed]
 */

export class Matrix {
  /** @param {import("./frame.js").Frame} frame @param {Options} options */
  constructor(frame, options) {
    this.frame = frame;
    this.options = options;
    /** @type {(byte: number) => number} */
    this.size = options.size ?? ((byte) => byte);
    this.head = 0;
    this.canvas = make("canvas", { tabindex: "0", role: "application", "aria-roledescription": "matrix" });
    this.element = make("div", { class: "matrix" }, this.canvas);
    this.cursor = null;
    this.chosen = { row: null, column: null };
    this.view = null;
    const listen = (name, act) => this.canvas.addEventListener(name, act);
    listen("pointermove", (event) => this.hover(event));
    listen("pointerleave", () => this.leave());
    listen("pointerdown", (event) => this.press(event));
    listen("pointerup", (event) => this.release(event));
    listen("keydown", (event) => this.key(event));
    listen("blur", () => this.point(null));
    listen("wheel", (event) => this.wheel(event));
  }

  /** New cells: bytes rows x columns, each `block` x `block` positions of `height` x `width`; byte 0 stands for nothing. */
  setCells(cells, rows, columns, block, height, width) {
    this.levels = [{ cells, rows, columns }];
    this.rows = rows;
    this.columns = columns;
    this.block = block;
    this.height = height;
    this.width = width;
    if (!this.view || this.view.height !== height || this.view.width !== width) this.whole();
  }

  /** Colours of bytes: 256 [red, green, blue]. `hiddenColumn` is drawn as nothing. */
  setColours(table, hiddenColumn = -1) {
    this.table = table;
    this.hiddenColumn = hiddenColumn;
    this.images = [];
    this.overlay = null;
  }

  whole() {
    this.view = { top: 0, left: 0, rows: this.height, columns: this.width, height: this.height, width: this.width };
  }

  get zoomed() {
    return this.view.rows < this.height || this.view.columns < this.width;
  }

  /** Show `factor` times as many positions, around a place of the canvas or the cursor. */
  zoom(factor, at = this.cursor ?? [this.view.top + this.view.rows / 2, this.view.left + this.view.columns / 2]) {
    const old = this.view;
    const clamp = (n, most) => Math.max(Math.min(8, most), Math.min(most, Math.round(n)));
    const [rows, columns] = [clamp(old.rows * factor, this.height), clamp(old.columns * factor, this.width)];
    const top = at[0] - ((at[0] - old.top) * rows) / old.rows;
    const left = at[1] - ((at[1] - old.left) * columns) / old.columns;
    this.show({ ...old, rows, columns, top, left });
  }

  show(view) {
    view.top = Math.round(Math.max(0, Math.min(this.height - view.rows, view.top)));
    view.left = Math.round(Math.max(0, Math.min(this.width - view.columns, view.left)));
    this.view = view;
    this.overlay = null;
    this.draw();
    this.options.moved?.(this);
  }

  // Drawing.

  level(l) {
    while (this.levels.length <= l) this.levels.push(halved(this.levels.at(-1), this.size));
    return this.levels[l];
  }

  image(l) {
    if (this.images[l]) return this.images[l];
    const { cells, rows, columns } = this.level(l);
    const made = make("canvas", { width: columns, height: rows });
    const ink = made.getContext("2d");
    const image = ink.createImageData(columns, rows);
    const packed = new Uint32Array(image.data.buffer);
    const colours = Uint32Array.from(this.table, ([r, g, b]) => (255 << 24) | (b << 16) | (g << 8) | r);
    for (let i = 0; i < cells.length; i++) packed[i] = colours[cells[i]];
    const hidden = this.hiddenColumn < 0 ? -1 : this.hiddenColumn >> l;
    if (hidden >= 0 && l === 0) for (let row = 0; row < rows; row++) packed[row * columns + hidden] = colours[0];
    ink.putImageData(image, 0, 0);
    this.images[l] = made;
    return made;
  }

  edgeWidth(ink, names) {
    ink.font = `${FONT.most}px ${this.frame.colour("mono")}`;
    const longest = names.reduce((a, b) => (b.length > a.length ? b : a), "");
    return Math.round(Math.min(EDGE.most, Math.max(EDGE.least, ink.measureText(longest).width + 12)));
  }

  layout() {
    const dpr = window.devicePixelRatio || 1;
    const room = this.element.clientWidth || 600;
    const ink = this.canvas.getContext("2d");
    const { rows, columns, top, left } = this.view;
    const some = (n, start, name) => Array.from({ length: Math.min(n, 200) }, (_, i) => cut(name(start + Math.floor((i * n) / Math.min(n, 200))), 14));
    const leftEdge = this.edgeWidth(ink, some(rows, top, this.options.rowName));
    const topEdge = this.edgeWidth(ink, some(columns, left, this.options.columnName));
    let w = (room - leftEdge - 4) / columns;
    let h = Math.min(TALLEST, room) / rows;
    const square = rows / columns > 0.34 && rows / columns < 3;
    if (square) w = h = Math.min(w, TALLEST / rows, 26);
    else [w, h] = [Math.min(w, 26), Math.min(h, 22, Math.max(w, 10))];
    // Whole device pixels per cell keep cells equal; with less than two of them there is no such choice.
    const whole = (x) => (x * dpr >= 2 ? Math.floor(x * dpr) / dpr : x);
    return { dpr, left: leftEdge, top: topEdge, w: whole(w), h: whole(h) };
  }

  draw() {
    if (!this.table || !this.element.isConnected) return;
    const at = this.layout();
    this.at = at;
    const { rows, columns } = this.view;
    this.canvas.width = Math.ceil((at.left + at.w * columns + 3) * at.dpr);
    this.canvas.height = Math.ceil((at.top + at.h * rows + 3) * at.dpr);
    this.canvas.style.width = `${this.canvas.width / at.dpr}px`;
    this.canvas.style.height = `${this.canvas.height / at.dpr}px`;
    Object.assign(this.canvas.dataset, { left: at.left, top: at.top, cell: at.w, height: at.h });
    this.canvas.setAttribute("aria-label", this.options.label());
    this.compose();
  }

  compose() {
    const { at, view, block } = this;
    if (!at) return;
    const ink = this.canvas.getContext("2d");
    ink.setTransform(at.dpr, 0, 0, at.dpr, 0, 0);
    ink.clearRect(0, 0, this.canvas.width, this.canvas.height);
    let l = 0;
    while (at.w * block * 2 ** (l + 1) <= 1.01 && this.level(l).rows > 1) l++;
    const cell = block * 2 ** l;
    ink.imageSmoothingEnabled = false;
    ink.save();
    ink.beginPath();
    ink.rect(at.left, at.top, at.w * view.columns, at.h * view.rows);
    ink.clip();
    const { rows, columns } = this.level(l);
    ink.drawImage(this.image(l), at.left - view.left * at.w, at.top - view.top * at.h, columns * cell * at.w, rows * cell * at.h);
    if (this.overlay) {
      const { image, top, left, height, width } = this.overlay;
      ink.drawImage(image, at.left + (left - view.left) * at.w, at.top + (top - view.top) * at.h, width * at.w, height * at.h);
    }
    ink.restore();
    this.names(ink, false);
    this.names(ink, true);
    this.marks(ink);
  }

  names(ink, across) {
    const { at, view, frame } = this;
    const [pitch, n, start] = across ? [at.w, view.columns, view.left] : [at.h, view.rows, view.top];
    const font = Math.min(FONT.most, Math.max(FONT.least, pitch - 1));
    const every = Math.max(1, Math.ceil((font * 1.1) / pitch - 0.05));
    const strong = [this.cursor?.[across ? 1 : 0] ?? -1, (across ? this.chosen.column : this.chosen.row) ?? -1].map((i) => i - start).filter((i) => i >= 0 && i < n);
    ink.save();
    ink.textBaseline = "middle";
    ink.textAlign = across ? "left" : "right";
    ink.direction = "ltr";
    for (const i of [...Array.from({ length: Math.ceil(n / every) }, (_, k) => k * every), ...strong]) {
      const loud = strong.includes(i);
      if (!loud && strong.some((k) => Math.abs(i - k) * pitch < font * 1.1)) continue;
      ink.save();
      const [edge, centre] = across ? [at.top - 5, at.left + (i + 0.5) * pitch] : [at.left - 5, at.top + (i + 0.5) * pitch];
      if (across) ink.translate(centre, edge);
      else ink.translate(edge, centre);
      if (across) ink.rotate(-Math.PI / 2);
      ink.font = `${loud ? "600 " : ""}${font}px ${frame.colour("mono")}`;
      ink.fillStyle = frame.colour(loud ? "accent" : "ink");
      ink.fillText(this.fitted(ink, (across ? this.options.columnName : this.options.rowName)(start + i), edge - 3), 0, 0);
      ink.restore();
    }
    ink.restore();
  }

  fitted(ink, text, room) {
    let longest = 24;
    let shown = cut(text, longest);
    while (longest > 3 && ink.measureText(shown).width > room) shown = cut(text, --longest);
    return shown;
  }

  marks(ink) {
    const { at, view, frame, block } = this;
    const [wide, high] = [at.w * view.columns, at.h * view.rows];
    const span = (i, start, n) => {
      const first = Math.floor(i / block) * block;
      return [Math.max(0, first - start), Math.min(n, first + block - start)];
    };
    const line = (i, across, colour, dash) => {
      const [from, to] = span(i, across ? view.left : view.top, across ? view.columns : view.rows);
      if (to <= 0 || from >= to) return;
      const pitch = across ? at.w : at.h;
      ink.lineWidth = 1.5;
      ink.strokeStyle = ink.fillStyle = frame.colour(colour);
      ink.setLineDash(dash);
      const thick = Math.max(1, (to - from) * pitch);
      if (across) ink.strokeRect(at.left + from * pitch - 0.5, at.top - 0.5, thick + 1, high + 1);
      else ink.strokeRect(at.left - 0.5, at.top + from * pitch - 0.5, wide + 1, thick + 1);
      ink.setLineDash([]);
    };
    if (this.chosen.row !== null && this.chosen.row < this.height) line(this.chosen.row, false, "accent", []);
    if (this.chosen.column !== null && this.chosen.column < this.width) line(this.chosen.column, true, "accent", [4, 3]);
    if (!this.cursor) return;
    const [top, bottom] = span(this.cursor[0], view.top, view.rows);
    const [left, right] = span(this.cursor[1], view.left, view.columns);
    ink.lineWidth = 2;
    ink.strokeStyle = frame.colour("cursor");
    ink.strokeRect(at.left + left * at.w - 1, at.top + top * at.h - 1, Math.max(3, (right - left) * at.w) + 1, Math.max(3, (bottom - top) * at.h) + 1);
  }

  /** Lay finer cells over a part of the matrix: bytes height x width at a place. */
  lay(cells, top, left, height, width) {
    const made = make("canvas", { width, height });
    const ink = made.getContext("2d");
    const image = ink.createImageData(width, height);
    for (let i = 0; i < cells.length; i++) image.data.set([...this.table[cells[i]], 255], 4 * i);
    ink.putImageData(image, 0, 0);
    this.overlay = { image: made, top, left, height, width };
    this.compose();
  }

  // Pointer and keys.

  cellAt(event) {
    const bounds = this.canvas.getBoundingClientRect();
    const { at, view } = this;
    const column = Math.floor((event.clientX - bounds.left - at.left) / at.w) + view.left;
    const row = Math.floor((event.clientY - bounds.top - at.top) / at.h) + view.top;
    const inside = row >= view.top && row < view.top + view.rows && column >= view.left && column < view.left + view.columns;
    return inside ? [row, column] : null;
  }

  hover(event) {
    if (this.grip && this.zoomed) return this.drag(event);
    const cell = this.cellAt(event);
    this.point(cell);
    if (cell) this.frame.showTip(event, this.options.read(cell[0], cell[1]));
    else this.frame.hideTip();
  }

  leave() {
    this.grip = null;
    this.frame.hideTip();
    this.point(null);
  }

  press(event) {
    this.grip = { x: event.clientX, y: event.clientY, view: { ...this.view }, far: false };
  }

  drag(event) {
    const { x, y, view } = this.grip;
    if (Math.hypot(event.clientX - x, event.clientY - y) < 4) return;
    this.grip.far = true;
    this.show({ ...view, top: view.top - (event.clientY - y) / this.at.h, left: view.left - (event.clientX - x) / this.at.w });
  }

  release(event) {
    const { grip } = this;
    this.grip = null;
    const cell = this.cellAt(event);
    if (grip && !grip.far && cell) this.options.choose(cell[0], cell[1]);
  }

  wheel(event) {
    if (!event.ctrlKey && !event.metaKey) return; // the wheel alone scrolls the page
    event.preventDefault();
    this.zoom(event.deltaY > 0 ? 1.25 : 0.8, this.cellAt(event) ?? undefined);
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const { view, block } = this;
    const start = this.cursor ?? [Math.max(view.top, Math.min(this.chosen.row ?? view.top, view.top + view.rows - 1)), Math.max(view.left, Math.min(this.chosen.column ?? view.left, view.left + view.columns - 1))];
    if (event.key === "Enter" || event.key === " ") this.options.choose(start[0], start[1]);
    else if (event.key === "Escape") this.options.clear();
    else if (event.key === "+" || event.key === "=") this.zoom(0.5, start);
    else if (event.key === "-") this.zoom(2, start);
    else if (event.key === "0") this.show({ ...view, top: 0, left: 0, rows: this.height, columns: this.width });
    else {
      const [row, column] = start.map((i) => Math.floor(i / block));
      const to = moved(event.key, [row, column], [this.rows, this.columns])?.map((i) => i * block);
      if (!to) return this.options.more?.(event);
      const into = (i, first, n, most) => (i < first ? i : i >= first + n ? Math.min(most - n, i - n + block) : first);
      const [top, left] = [into(to[0], view.top, view.rows, this.height), into(to[1], view.left, view.columns, this.width)];
      if (top !== view.top || left !== view.left) this.show({ ...view, top, left });
      this.point([Math.min(to[0], this.height - 1), Math.min(to[1], this.width - 1)]);
    }
    event.preventDefault();
  }

  point(cell) {
    if (`${cell}` === `${this.cursor}`) return;
    this.cursor = cell;
    if (cell) this.frame.say(this.options.read(cell[0], cell[1]).join(" · "));
    this.options.pointed?.(cell);
    requestAnimationFrame(() => this.compose());
  }
}
