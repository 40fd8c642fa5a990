// Head gallery: a small map for each head, in groups, and the chosen head's large with its numbers.

import { prepare } from "workbench/shared/canvas.js";
import { colourAt, gradient } from "workbench/shared/colour.js";
import { button, exactly, legend, make, moved, roughly } from "workbench/shared/dom.js";
import { open } from "workbench/shared/frame.js";
import { beside, drawMap, largestOf, outline, tileWidth } from "workbench/shared/maps.js";
import { ceiling } from "workbench/shared/scales.js";

const LARGE = 320;

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
    this.head = 0;
    this.cell = [Math.floor(this.rows / 2), Math.floor(this.columns / 2)];
    this.tiles = [];
    this.small = make("div", { class: "gallery", role: "group", "aria-label": "Heads" });
    this.name = make("h3");
    this.said = make("p", { class: "where" });
    this.large = make("canvas", { tabindex: "0", role: "application", "aria-roledescription": "map of a head" });
    this.scale = make("div");
    this.list = make("dl", { class: "numbers" });
    frame.body.append(make("div", { class: "split" }, this.small, make("div", { class: "detail" }, this.name, this.said, this.large, this.scale, this.list)));
    this.addTiles();
    const shared = frame.settings.mark("shared", "One scale for all heads", false, (on) => {
      this.shared = on;
      this.draw();
    });
    this.shared = shared.value;
    frame.controls.append(shared.field);
    this.listen();
    frame.offerPicture(() => this.large);
    frame.offerKeys([["← → ↑ ↓, Home, End", "move over the heads, or over the large map"], ["Enter", "choose the head in every view"], ["[ ]", "the head before or after"], ["Esc", "choose none"]]);
    this.ready = false;
    frame.onSelect((selection) => this.follow(selection));
    this.ready = true;
    frame.onRedraw(() => this.draw());
  }

  addTiles() {
    for (const group of this.facts.groups) {
      const box = make("div", { class: "tiles" });
      if (group.mean !== null) {
        const canvas = make("canvas", { "aria-hidden": "true" });
        box.append(make("figure", { class: "tile mean" }, canvas, make("figcaption", {}, "mean")));
        this.tiles.push({ canvas, values: this.part("means", group.mean), mean: true });
      }
      for (const head of group.members) {
        const about = this.facts.heads[head];
        const canvas = make("canvas", { "aria-hidden": "true" });
        const pressed = button("", () => this.choose(head), { class: "tile", tabindex: "-1", "aria-label": `${about.label}${about.said ? `, ${about.said}` : ""}` });
        pressed.append(canvas, make("span", {}, about.site === null ? about.label : `L${about.layer}H${about.head}`));
        box.append(pressed);
        this.tiles.push({ canvas, pressed, head, values: this.part("maps", head) });
      }
      this.small.append(make("section", { class: "group" }, make("h3", {}, group.label), box));
    }
    this.pressable = this.tiles.filter(({ pressed }) => pressed);
    this.head = this.pressable[0]?.head ?? 0;
  }

  part(block, at) {
    const size = this.rows * this.columns;
    return this.frame.blocks[block].data.subarray(at * size, (at + 1) * size);
  }

  listen() {
    this.small.addEventListener("keydown", (event) => this.smallKey(event));
    this.small.addEventListener("pointermove", (event) => this.over(event));
    this.small.addEventListener("pointerleave", () => this.frame.hideTip());
    this.large.addEventListener("pointermove", (event) => this.hover(event));
    this.large.addEventListener("pointerleave", () => this.leave());
    this.large.addEventListener("keydown", (event) => this.largeKey(event));
    this.large.addEventListener("focus", () => this.point(this.cell));
    this.large.addEventListener("blur", () => this.drawLarge());
  }

  // Choosing.

  choose(head) {
    const { layer, head: number, site } = this.facts.heads[head];
    this.show(head);
    this.frame.select({ layer, heads: [number], site });
  }

  show(head) {
    this.head = head;
    this.draw();
    this.frame.say(this.words(head));
  }

  words(head) {
    const { label, said } = this.facts.heads[head];
    return `${label}${said ? `, ${said}` : ""}: largest ${this.facts.axes.value} ${exactly(largestOf(this.part("maps", head)))}`;
  }

  follow({ layer, heads, site }) {
    const chosen = this.facts.heads.findIndex((each) => each.layer === layer && heads[0] === each.head && (site === null || each.site === null || each.site === site));
    if (chosen >= 0) this.head = chosen;
    if (this.ready) this.draw();
  }

  isChosen(head) {
    const { layer, heads, site } = this.frame.selection;
    const each = this.facts.heads[head];
    return each.layer === layer && heads.includes(each.head) && (site === null || each.site === null || each.site === site);
  }

  step(by) {
    const at = this.pressable.findIndex(({ head }) => head === this.head);
    this.choose(this.pressable[Math.min(this.pressable.length - 1, Math.max(0, at + by))].head);
  }

  common(event) {
    if (event.key === "Escape") this.frame.select({ layer: null, heads: [], site: null });
    else if (event.key === "[") this.step(-1);
    else if (event.key === "]") this.step(1);
    else return false;
    return true;
  }

  smallKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const buttons = this.pressable.map(({ pressed }) => pressed);
    const to = beside(buttons, buttons.indexOf(event.target), event.key);
    if (to !== null && buttons.includes(event.target)) {
      this.show(this.pressable[to].head);
      buttons[to].focus();
    } else if (!this.common(event)) return;
    event.preventDefault();
  }

  over(event) {
    const tile = this.pressable.find(({ pressed }) => pressed.contains(event.target));
    if (tile) this.frame.showTip(event, [this.words(tile.head)]);
    else this.frame.hideTip();
  }

  // The large map.

  largeKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const to = moved(event.key, this.cell, [this.rows, this.columns]);
    if (to) this.point(to);
    else if (event.key === "Enter" || event.key === " ") this.choose(this.head);
    else if (!this.common(event)) return;
    event.preventDefault();
  }

  hover(event) {
    const bounds = this.large.getBoundingClientRect();
    const { x, y, width, height } = this.box;
    const column = Math.floor(((event.clientX - bounds.left - x) / width) * this.columns);
    const row = Math.floor(((event.clientY - bounds.top - y) / height) * this.rows);
    if (row < 0 || column < 0 || row >= this.rows || column >= this.columns) return this.leave();
    this.pointed = true;
    this.point([row, column]);
    this.frame.showTip(event, [this.sentence()]);
  }

  leave() {
    this.pointed = false;
    this.frame.hideTip();
    this.drawLarge();
  }

  point(cell) {
    this.cell = cell;
    this.frame.say(this.sentence());
    this.drawLarge();
  }

  sentence() {
    const { rows, columns, row0, column0, value } = this.facts.axes;
    const [row, column] = this.cell;
    const where = `${this.rows > 1 ? `${rows} ${row0 + row}, ` : ""}${columns} ${column0 + column}`;
    return `${this.facts.heads[this.head].label}, ${where}: ${value} ${exactly(this.part("maps", this.head)[row * this.columns + column])}`;
  }

  // Drawing.

  draw() {
    this.top = ceiling(largestOf(this.frame.blocks.maps.data));
    const most = Math.max(...this.facts.groups.map(({ members, mean }) => members.length + (mean === null ? 0 : 1)));
    const room = this.frame.body.clientWidth - (matchMedia("(max-width: 760px)").matches ? 0 : 358);
    const width = tileWidth(room, Math.min(most, 16));
    const height = this.rows === 1 ? Math.round(width / 2) : Math.round(Math.min(width * 1.4, (width * this.rows) / this.columns));
    for (const { canvas, pressed, head, values } of this.tiles) {
      const ink = prepare(canvas, width, height);
      const box = { x: 0, y: 0, width, height };
      drawMap(ink, values, this.rows, this.columns, this.shared ? this.top : ceiling(largestOf(values)), box, this.frame);
      if (!pressed) continue;
      pressed.setAttribute("aria-pressed", `${this.isChosen(head)}`);
      pressed.tabIndex = head === this.head ? 0 : -1;
    }
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
    this.box = { x: left, y: top, width, height };
    const values = this.part("maps", this.head);
    const most = this.shared ? this.top : ceiling(largestOf(values));
    drawMap(ink, values, this.rows, this.columns, most, this.box, this.frame);
    this.large.setAttribute("aria-label", `Map of ${this.facts.heads[this.head].label}: ${this.facts.axes.rows} down, ${this.facts.axes.columns} across. Arrow keys move.`);
    Object.assign(this.large.dataset, { ...this.box });
    this.labels(ink, most);
    if (this.pointed || document.activeElement === this.large || this.large.getRootNode().activeElement === this.large) {
      const [row, column] = this.cell;
      const cell = { x: left + (column * width) / this.columns, y: top + (row * height) / this.rows, width: width / this.columns, height: height / this.rows };
      outline(ink, this.frame, cell, "cursor", 1.5);
    }
  }

  labels(ink, most) {
    const { x, y, width, height } = this.box;
    const { rows, columns, row0, column0, value } = this.facts.axes;
    ink.fillStyle = this.frame.colour("muted");
    ink.font = `11px ${this.frame.colour("sans")}`;
    ink.textBaseline = "middle";
    /** @type {(n: number, first: number) => [number, string][]} */
    const ticks = (n, first) => [...new Set(first < 0 ? [0, (n - 1) / 2, n - 1] : [0, n - 1])].map((i) => [i, `${first + i}`.replace("-", "−")]);
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
    const top = this.shared ? this.top : ceiling(largestOf(this.part("maps", this.head)));
    const ticks = [[0, "0"], [0.5, roughly(top / 2)], [1, roughly(top)]];
    this.scale.replaceChildren(legend(gradient(colourAt, this.frame.theme), ticks, make("span", {}, this.facts.axes.value)));
  }

  drawNumbers() {
    const n = this.facts.heads.length;
    const rows = this.facts.numbers.map((name, i) => {
      const all = this.frame.blocks.numbers.data.subarray(i * n, (i + 1) * n);
      const bar = make("i");
      bar.style.width = `${Math.max(0, (100 * all[this.head]) / largestOf(all)) || 0}%`;
      return make("div", {}, make("dt", {}, name), make("dd", {}, make("span", { class: "length", "aria-hidden": "true" }, bar), make("span", { class: "n" }, roughly(all[this.head]))));
    });
    this.list.replaceChildren(...rows);
    this.list.hidden = !rows.length;
  }
}
