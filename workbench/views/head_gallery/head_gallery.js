// Head gallery: a small map for each head, in groups or in the order of a number, and the chosen head's large.

import { prepare } from "workbench/shared/canvas.js";
import { colourAt, gradient } from "workbench/shared/colour.js";
import { exactly, legend, make, named, roughly } from "workbench/shared/dom.js";
import { open } from "workbench/shared/frame.js";
import { drawMap, inTurns, largestOf, outline, paintMap, paletteOf, tileWidth } from "workbench/shared/maps.js";
import { ceiling, rootTick } from "workbench/shared/scales.js";
import { Tiles, Visited } from "workbench/shared/tiles.js";
import { Sheets } from "./sheets.js";

const LARGE = 320;
const MANY = 200; // heads from which on a gallery is a wall, which is painted in turns
const AS_GROUPED = "";
/** What a byte of a map stands for; 0 is a place that is not seen. */
const WEIGHTS = Float32Array.from({ length: 256 }, (_, byte) => (byte ? ((byte - 1) / 254) ** 2 : NaN));

export async function render({ model, el }) {
  const frame = await open({ model, el });
  new Gallery(frame);
  return () => frame.close();
}

class Gallery {
  rows = 0;
  columns = 0;

  constructor(frame) {
    this.frame = frame;
    this.facts = frame.facts;
    [, this.rows, this.columns] = frame.blocks.maps.shape;
    this.head = this.facts.groups.find(({ members }) => members.length)?.members[0] ?? 0;
    const { data } = frame.blocks.maps;
    this.maps = data instanceof Uint8Array ? Float32Array.from(data, (byte) => WEIGHTS[byte]) : data;
    this.largest = this.facts.heads.map((_, i) => largestOf(this.map(i)));
    this.build();
    this.settings();
    frame.offerKeys([["← → ↑ ↓, Home, End", "move over the heads, or over the large map"], ["Enter", "choose the head in every view"], ["[ ]", "the head before or after"], ["Esc", "choose none"]]);
    this.ready = false;
    if (frame.spec.selection.heads?.length) this.follow(frame.spec.selection); // where what is chosen is not here
    frame.onSelect((selection) => this.follow(selection));
    this.ready = true;
    frame.onRedraw(() => this.draw());
  }

  map(head) {
    const size = this.rows * this.columns;
    return this.maps.subarray(head * size, (head + 1) * size);
  }

  build() {
    this.many = this.facts.heads.length > MANY;
    this.turn = 0;
    /** @type {Promise<void>} */
    this.painted = Promise.resolve();
    this.small = make("div", { class: "gallery", role: "group", "aria-label": "Heads" });
    this.name = make("h3");
    this.said = make("p", { class: "where" });
    this.large = make("canvas", { tabindex: "0", role: "application", "aria-roledescription": "map of a head" });
    this.scale = make("div");
    this.list = make("dl", { class: "numbers" });
    this.frame.body.append(make("div", { class: `split${this.many ? " many" : ""}` }, this.small, make("div", { class: "detail" }, this.name, this.said, this.large, this.scale, this.list, this.frame.pageOfHead())));
    const other = (event) => this.common(event);
    this.tiles = new Tiles(this.frame, this.small, { words: (i) => this.words(i), choose: (i) => this.choose(i), visit: (i) => this.show(i), other });
    this.visited = new Visited(this.frame, this.large, [this.rows, this.columns], { sentence: () => this.sentence(), draw: () => this.drawLarge(), press: () => this.choose(this.head), enter: () => this.choose(this.head), other });
    for (const { label, layer, head, site, said } of this.facts.heads) {
      this.tiles.add(site === null ? label : `L${layer}H${head}`).setAttribute("aria-label", `${label}${said ? `, ${said}` : ""}`);
    }
    this.sheets = this.many ? new Sheets(this.small, this.tiles) : null;
    this.means = this.facts.groups.map(({ mean }) => (mean === null ? null : make("canvas", { "aria-hidden": "true" })));
  }

  settings() {
    const { controls, settings } = this.frame;
    const { numbers, saying } = this.facts;
    const orders = [[AS_GROUPED, "groups"], ...(saying ? [[saying, saying]] : []), ...numbers.map((name) => [name, name])];
    this.order = AS_GROUPED;
    if (orders.length > 1) {
      const order = settings.pick("order", "Order by", orders, AS_GROUPED, (name) => {
        this.order = name;
        this.arrange();
      });
      this.order = order.value;
      controls.append(order.field);
    }
    const shared = settings.mark("shared", "One scale for all heads", false, (on) => {
      this.shared = on;
      this.draw();
    });
    this.shared = shared.value;
    controls.append(shared.field);
    this.roots = false;
    if (this.rows > 1) {
      const roots = settings.mark("roots", "Square-root scale", this.facts.roots, (on) => {
        this.roots = on;
        this.draw();
      });
      this.roots = roots.value;
      controls.append(roots.field);
    }
    this.arrange();
  }

  /** Heads in groups, by what is said of them, or from the highest of a number down. */
  arranged() {
    const { groups, heads, numbers, saying } = this.facts;
    if (this.order === AS_GROUPED) return groups.map((group, i) => ({ ...group, canvas: this.means[i] }));
    const all = heads.map((_, i) => i);
    if (this.order === saying) {
      const said = [...new Set(heads.map((head) => head.said))].sort((a, b) => Number(!a) - Number(!b));
      return said.map((each) => ({ label: each || `no ${saying}`, members: all.filter((i) => heads[i].said === each), canvas: null }));
    }
    const values = this.numbersOf(numbers.indexOf(this.order));
    const rank = (i) => (Number.isNaN(values[i]) ? -Infinity : values[i]);
    return [{ label: `By ${this.order}, highest first`, members: all.sort((a, b) => rank(b) - rank(a) || a - b), canvas: null, values }];
  }

  arrange() {
    this.tiles.order = [];
    const sections = this.arranged().map(({ label, members, canvas, values }) => {
      const box = make("div", { class: "tiles" });
      if (canvas) box.append(make("figure", { class: "tile mean" }, canvas, make("figcaption", {}, "mean")));
      for (const head of members) {
        const { pressed, text } = this.tiles.all[head];
        const { site, label: name, layer, head: number } = this.facts.heads[head];
        text.textContent = `${site === null ? name : `L${layer}H${number}`}${values ? `\n${roughly(values[head])}` : ""}`;
        box.append(pressed);
        this.tiles.order.push(head);
      }
      return make("section", { class: "group" }, make("h3", {}, label), box);
    });
    this.small.replaceChildren(...sections);
    this.lay();
  }

  /** Sheets for the maps of a wall as its tiles stand now. */
  lay() {
    if (!this.sheets || this.frame.printing || !this.small.clientWidth) return;
    const whole = "whole" in this.frame.root.dataset; // which is drawn anew
    if (this.sheets.lay() && !whole) for (const head of this.tiles.order) this.sheets.put(head);
  }

  numbersOf(at) {
    const n = this.facts.heads.length;
    return this.frame.blocks.numbers.data.subarray(at * n, (at + 1) * n);
  }

  // Choosing.

  choose(head) {
    const { layer, head: number, site } = this.facts.heads[head];
    this.show(head);
    this.frame.select({ layer, heads: [number], site });
  }

  show(head) {
    this.head = head;
    this.mark();
    this.frame.say(this.words(head));
  }

  words(head) {
    const { label, said } = this.facts.heads[head];
    return `${label}${said ? `, ${said}` : ""}: largest ${this.facts.axes.value} ${exactly(this.largest[head])}`;
  }

  follow({ layer, heads, site }) {
    const chosen = this.facts.heads.findIndex((each) => each.layer === layer && heads[0] === each.head && (site === null || each.site === null || each.site === site));
    if (chosen >= 0) this.head = chosen;
    if (this.ready) this.mark();
  }

  isChosen(head) {
    const { layer, heads, site } = this.frame.selection;
    const each = this.facts.heads[head];
    return each.layer === layer && heads.includes(each.head) && (site === null || each.site === null || each.site === site);
  }

  step(by) {
    const { order } = this.tiles;
    this.choose(order[Math.min(order.length - 1, Math.max(0, order.indexOf(this.head) + by))]);
  }

  common(event) {
    if (event.key === "Escape") this.frame.select({ layer: null, heads: [], site: null });
    else if (event.key === "[") this.step(-1);
    else if (event.key === "]") this.step(1);
    else return false;
    return true;
  }

  sentence() {
    const { rows, columns, value } = this.facts.axes;
    const [row, column] = this.visited.cell;
    const where = [...(this.rows > 1 ? [this.place(rows, "row", row, 0)] : []), this.place(columns, "column", column, 1)];
    return `${this.facts.heads[this.head].label}, ${where.join(", ")}: ${value} ${exactly(this.map(this.head)[row * this.columns + column])}`;
  }

  /** A row or column in words: its number, its text, or from where to where it goes. */
  place(name, axis, at, side) {
    const { axes } = this.facts;
    const texts = axes[`${axis}_texts`];
    const first = axes[`${axis}0`] + axes.step * at;
    if (texts) return `${name} ${named(texts[at], first)}`;
    const last = Math.min(first + axes.step, axes.shape?.[side] ?? Infinity) - 1;
    return axes.step > 1 && last > first ? `${name} ${first} to ${last}` : `${name} ${first}`;
  }

  // Drawing.

  topOf(values) {
    return this.shared ? this.top : ceiling(largestOf(values));
  }

  /** Paint every small map, many in turns; what only a choice changes is `mark`. A promise of the last one. */
  draw() {
    this.palette = paletteOf(this.frame);
    this.top = ceiling(this.largest.reduce((a, b) => Math.max(a, b), 0));
    const most = Math.max(...this.facts.groups.map(({ members, mean }) => members.length + (mean === null ? 0 : 1)));
    const room = this.frame.body.clientWidth - (matchMedia("(max-width: 760px)").matches ? 0 : 358);
    const width = tileWidth(room, Math.min(most, 16));
    const height = this.rows === 1 ? Math.round(width / 2) : Math.round(Math.min(width * 1.4, (width * this.rows) / this.columns));
    const { palette } = this;
    const paint = (canvas, values) => paintMap(canvas, values, [this.rows, this.columns], { top: this.topOf(values), roots: this.roots, width, height }, palette);
    const size = this.rows * this.columns;
    this.facts.groups.forEach(({ mean }, i) => {
      if (mean !== null) paint(this.means[i], this.frame.blocks.means.data.subarray(mean * size, (mean + 1) * size));
    });
    this.mark();
    this.small.style.setProperty("--map-width", `${width}px`);
    this.small.style.setProperty("--map-height", `${height}px`);
    this.sheets?.use(!this.frame.printing);
    this.lay();
    const one = (head) => {
      paint(this.tiles.all[head].canvas, this.map(head));
      if (!this.frame.printing) this.sheets?.put(head);
    };
    const heads = new Set([...this.tiles.order, ...this.tiles.all.keys()]);
    this.painted = this.paintAll(heads, one);
    return this.painted;
  }

  async paintAll(heads, one) {
    const turn = ++this.turn; // a later drawing ends this one
    if (this.many && !this.frame.printing) {
      this.small.setAttribute("aria-busy", "true");
      await inTurns(heads, one, () => this.turn === turn);
      if (this.turn !== turn) return this.painted;
    } else heads.forEach(one); // a print waits for nobody
    this.small.removeAttribute("aria-busy");
  }

  mark() {
    this.tiles.mark(this.head, (i) => this.isChosen(i));
    const about = this.facts.heads[this.head];
    this.name.textContent = about.label;
    this.said.textContent = about.said;
    this.said.hidden = !about.said;
    this.drawLarge();
    this.drawLegend();
    this.drawNumbers();
  }

  drawLarge() {
    const room = Math.min(LARGE, Math.max(160, (this.large.parentElement.clientWidth || LARGE) - 4));
    const [left, bottom, top, right] = [this.rows > 1 ? 46 : 40, 36, 4, 10];
    const width = room - left - right;
    const height = this.rows === 1 ? 120 : Math.round(Math.min(width * 1.2, (width * this.rows) / this.columns));
    const ink = prepare(this.large, room, height + top + bottom);
    const box = { x: left, y: top, width, height };
    this.visited.box = box;
    const values = this.map(this.head);
    const most = this.topOf(values);
    drawMap(ink, values, [this.rows, this.columns], { top: most, roots: this.roots }, box, this.palette);
    this.large.setAttribute("aria-label", `Map of ${this.facts.heads[this.head].label}: ${this.facts.axes.rows} down, ${this.facts.axes.columns} across. Arrow keys move.`);
    Object.assign(this.large.dataset, { ...box });
    this.labels(ink, box, most);
    if (this.visited.shown) outline(ink, this.frame, this.visited.boxOf(), "cursor", 1.5);
  }

  labels(ink, { x, y, width, height }, most) {
    const { rows, columns, row0, column0, value, step } = this.facts.axes;
    ink.fillStyle = this.frame.colour("muted");
    ink.font = `11px ${this.frame.colour("sans")}`;
    ink.textBaseline = "middle";
    /** @type {(n: number, first: number) => [number, string][]} */
    const ticks = (n, first) => [...new Set(first < 0 ? [0, (n - 1) / 2, n - 1] : [0, n - 1])].map((i) => [i, `${first + step * i}`.replace("-", "−")]);
    ink.textAlign = "center";
    for (const [i, text] of ticks(this.columns, column0)) ink.fillText(text, x + ((i + 0.5) * width) / this.columns, y + height + 10);
    ink.fillText(columns, x + width / 2, y + height + 26);
    ink.textAlign = "right";
    if (this.rows > 1) for (const [i, text] of ticks(this.rows, row0)) ink.fillText(text, x - 5, y + ((i + 0.5) * height) / this.rows);
    else for (const at of [0, 1]) ink.fillText(roughly(at * most), x - 5, y + (1 - at) * (height - 6) + 3);
    ink.save();
    ink.translate(this.rows > 1 ? 8 : 7, y + height / 2);
    ink.rotate(-Math.PI / 2);
    ink.textAlign = "center";
    ink.fillText(this.rows > 1 ? rows : value, 0, 0);
    ink.restore();
  }

  drawLegend() {
    if (this.rows === 1) return this.scale.replaceChildren();
    const top = this.topOf(this.map(this.head));
    const middle = this.roots ? rootTick(top) : top / 2;
    const ticks = [[0, "0"], [this.roots ? Math.sqrt(middle / top) : 0.5, roughly(middle)], [1, roughly(top)]];
    this.scale.replaceChildren(legend(gradient(colourAt, this.frame.theme), ticks, make("span", {}, `${this.facts.axes.value}${this.roots ? ", square-root scale" : ""}`)));
  }

  drawNumbers() {
    const rows = this.facts.numbers.map((name, i) => {
      const all = this.numbersOf(i);
      const bar = make("i");
      bar.style.width = `${Math.max(0, (100 * all[this.head]) / largestOf(all)) || 0}%`;
      return make("div", {}, make("dt", {}, name), make("dd", {}, make("span", { class: "length", "aria-hidden": "true" }, bar), make("span", { class: "n" }, roughly(all[this.head]))));
    });
    this.list.replaceChildren(...rows);
    this.list.hidden = !rows.length;
  }
}
