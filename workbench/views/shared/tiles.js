// Small maps that one can press, beside a large one whose cells one can visit: what the views of many heads share.

import { button, make, moved } from "./dom.js";
import { beside } from "./maps.js";

/** Small maps in a box: one tab stop, arrow keys move among them, the pointer hears what each is. */
export class Tiles {
  /**
   * @param {any} frame
   * @param {HTMLElement} box
   * @param {{words: (i: number) => string, choose: (i: number) => void, visit?: (i: number) => void, other: (event: KeyboardEvent) => boolean}} does
   *   words: of a tile, for the tip and the status. visit: arrow keys came to a tile. other: a key that no tile knows.
   */
  constructor(frame, box, does) {
    this.frame = frame;
    this.does = does;
    /** @type {{canvas: HTMLCanvasElement, pressed: HTMLButtonElement, text: HTMLElement}[]} */
    this.all = [];
    /** @type {Map<Element, number>} */
    this.index = new Map();
    /** tiles in the order in which they stand */
    this.order = [];
    box.addEventListener("pointermove", (event) => {
      const i = this.at(event);
      if (i === null) frame.hideTip();
      else frame.showTip(event, [does.words(i)]);
    });
    box.addEventListener("pointerleave", () => frame.hideTip());
    box.addEventListener("keydown", (event) => this.key(event));
  }

  /** A new tile, the next by number. */
  add(label) {
    const i = this.all.length;
    const canvas = make("canvas", { "aria-hidden": "true" });
    const text = make("span", {}, label);
    const pressed = button("", () => this.does.choose(i), { class: "tile", tabindex: "-1" });
    pressed.append(canvas, text);
    this.all.push({ canvas, pressed, text });
    this.index.set(pressed, i);
    this.order.push(i);
    return pressed;
  }

  at({ target }) {
    return this.index.get(target instanceof Element ? target.closest("button.tile") : null) ?? null;
  }

  key(event) {
    const i = this.at(event);
    if (event.ctrlKey || event.metaKey || event.altKey || i === null) return;
    const buttons = this.order.map((each) => this.all[each].pressed);
    const to = beside(buttons, this.order.indexOf(i), event.key);
    if (to !== null) {
      this.does.visit?.(this.order[to]);
      for (const each of buttons) each.tabIndex = each === buttons[to] ? 0 : -1;
      buttons[to].focus();
      this.frame.say(this.does.words(this.order[to]));
    } else if (!this.does.other(event)) return;
    event.preventDefault();
  }

  /** Which tile is the tab stop, and which are chosen. */
  mark(stop, isChosen) {
    this.all.forEach(({ pressed }, i) => {
      const [at, chosen] = [i === stop ? 0 : -1, `${isChosen(i)}`];
      if (pressed.tabIndex !== at) pressed.tabIndex = at; // of many tiles few change
      if (pressed.getAttribute("aria-pressed") !== chosen) pressed.setAttribute("aria-pressed", chosen);
    });
  }
}

/** A large map whose cells the pointer and the arrow keys visit. `box` is where on the canvas the map lies. */
export class Visited {
  /**
   * @param {any} frame
   * @param {HTMLCanvasElement} canvas
   * @param {number[]} shape rows and columns
   * @param {{sentence: () => string, draw: () => void, press: (cell: number[]) => void, enter: () => void, other: (event: KeyboardEvent) => boolean}} does
   */
  constructor(frame, canvas, shape, does) {
    this.frame = frame;
    this.canvas = canvas;
    this.shape = shape;
    this.does = does;
    this.cell = shape.map((n) => Math.floor(n / 2));
    this.pointed = false;
    this.box = { x: 0, y: 0, width: 0, height: 0 };
    canvas.addEventListener("pointermove", (event) => this.hover(event));
    canvas.addEventListener("pointerleave", () => this.leave());
    canvas.addEventListener("click", (event) => {
      const cell = this.cellAt(event);
      if (cell) does.press(cell);
    });
    canvas.addEventListener("keydown", (event) => this.key(event));
    canvas.addEventListener("focus", () => this.point(this.cell));
    canvas.addEventListener("blur", () => does.draw());
  }

  /** Whether the visited cell is to be seen. */
  get shown() {
    const root = /** @type {Document | ShadowRoot} */ (this.canvas.getRootNode());
    return this.pointed || root.activeElement === this.canvas;
  }

  /** Where a cell lies on the canvas. */
  boxOf([row, column] = this.cell) {
    const [rows, columns] = this.shape;
    const { x, y, width, height } = this.box;
    return { x: x + (column * width) / columns, y: y + (row * height) / rows, width: width / columns, height: height / rows };
  }

  cellAt(event) {
    const bounds = this.canvas.getBoundingClientRect();
    const { x, y, width, height } = this.box;
    const column = Math.floor(((event.clientX - bounds.left - x) / width) * this.shape[1]);
    const row = Math.floor(((event.clientY - bounds.top - y) / height) * this.shape[0]);
    return row >= 0 && column >= 0 && row < this.shape[0] && column < this.shape[1] ? [row, column] : null;
  }

  hover(event) {
    const cell = this.cellAt(event);
    if (!cell) return this.leave();
    this.pointed = true;
    this.point(cell);
    this.frame.showTip(event, [this.does.sentence()]);
  }

  leave() {
    this.pointed = false;
    this.frame.hideTip();
    this.does.draw();
  }

  point(cell) {
    this.cell = cell;
    this.frame.say(this.does.sentence());
    this.does.draw();
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const to = moved(event.key, this.cell, this.shape);
    if (to) this.point(to);
    else if (event.key === "Enter" || event.key === " ") this.does.enter();
    else if (!this.does.other(event)) return;
    event.preventDefault();
  }
}
