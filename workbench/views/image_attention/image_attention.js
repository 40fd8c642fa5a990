// Image attention: all heads on the chosen image, the chosen head on all images, and one of them large.

import { prepare } from "workbench/shared/canvas.js";
import { colourAt, css, gradient } from "workbench/shared/colour.js";
import { exactly, legend, make, roughly, selector } from "workbench/shared/dom.js";
import { open } from "workbench/shared/frame.js";
import { largestOf, outline, tileWidth } from "workbench/shared/maps.js";
import { ceiling } from "workbench/shared/scales.js";
import { Tiles, Visited } from "workbench/shared/tiles.js";

const LARGE = 320;
const DIMMED = "rgb(20 22 26 / 0.45)"; // over the image, so that weights are brighter than anything in it
const GLOW = [255, 150, 40];
const SEAM = "rgb(255 255 255 / 0.75)";

export async function render({ model, el }) {
  const frame = await open({ model, el });
  new Images(frame);
  return () => frame.close();
}

class Images {
  rows = 0;
  columns = 0;
  height = 0;
  width = 0;
  channels = 0;

  constructor(frame) {
    this.frame = frame;
    this.facts = frame.facts;
    [this.rows, this.columns] = this.facts.grid;
    this.keys = this.facts.prefix + this.rows * this.columns;
    [, this.height, this.width, this.channels] = frame.blocks.pixels.shape;
    this.head = this.facts.first;
    this.image = 0;
    this.origin = [this.rows >> 1, this.columns >> 1];
    this.source = this.facts.prefix && !frame.state.received ? "cls" : "received";
    this.sheets = this.facts.images.map((_, i) => this.sheet(i));
    this.build();
    frame.offerKeys([["← → ↑ ↓, Home, End", "move over the patches, the heads or the images"], ["Enter", "look from this patch; choose the head or image in every view"], ["c", "look from CLS"], ["r", "what patches receive"], ["Esc", "choose none"]]);
    this.ready = false;
    if (frame.spec.selection.heads?.length) this.follow(frame.spec.selection); // where what is chosen is not here
    frame.onSelect((selection) => this.follow(selection));
    this.ready = true;
    frame.onRedraw(() => this.draw());
  }

  /** An image as a canvas of its own pixels. */
  sheet(i) {
    const canvas = make("canvas", {});
    Object.assign(canvas, { width: this.width, height: this.height });
    const ink = canvas.getContext("2d");
    const made = ink.createImageData(this.width, this.height);
    const { data } = this.frame.blocks.pixels;
    const n = this.width * this.height;
    for (let at = 0; at < n; at++) {
      for (let c = 0; c < 3; c++) made.data[4 * at + c] = data[(i * n + at) * this.channels + Math.min(c, this.channels - 1)];
      made.data[4 * at + 3] = 255;
    }
    ink.putImageData(made, 0, 0);
    return canvas;
  }

  build() {
    const { frame, facts } = this;
    this.name = make("h3");
    this.large = make("canvas", { tabindex: "0", role: "application", "aria-roledescription": "image", "aria-label": "The chosen image, patch by patch. Arrow keys move over the patches, Enter looks from one." });
    this.scale = make("div");
    const other = (event) => this.turn(event.key);
    this.visited = new Visited(frame, this.large, [this.rows, this.columns], { sentence: () => this.sentence(), draw: () => this.drawLarge(), press: (cell) => this.choosePatch(cell), enter: () => this.choosePatch(this.visited.cell), other });
    this.headBox = make("div", { class: "heads" });
    this.headTiles = new Tiles(frame, this.headBox, { words: (i) => this.headWords(i), choose: (i) => this.chooseHead(i), other });
    const pressed = facts.heads.map(({ layer, head }) => this.headTiles.add(`L${layer}H${head}`));
    for (const layer of new Set(facts.heads.map((head) => head.layer))) {
      this.headBox.append(make("div", { class: "tiles" }, ...pressed.filter((_, i) => facts.heads[i].layer === layer)));
    }
    this.imageBox = make("div", { class: "tiles" });
    this.imageTiles = new Tiles(frame, this.imageBox, { words: (i) => this.imageWords(i), choose: (i) => this.chooseImage(i), other });
    this.imageBox.append(...facts.images.map((label) => this.imageTiles.add(label)));
    this.headsTitle = make("h3");
    this.imagesTitle = make("h3");
    const detail = make("div", { class: "detail" }, this.name, this.large, this.scale);
    const heads = make("section", { class: "group" }, this.headsTitle, this.headBox);
    const images = make("section", { class: "group" }, this.imagesTitle, this.imageBox);
    frame.body.append(make("div", { class: "split" }, detail, make("div", {}, heads, images)));
    const sources = [...(facts.prefix ? [["cls", "CLS"]] : []), ...(facts.every ? [["patch", "the chosen patch"]] : []), ["received", "all patches, on average"]];
    this.picker = selector("Weights from", sources, (source) => this.look(source));
    const over = frame.settings.pick("show", "Show", [["both", "weights over the image"], ["weights", "weights"], ["image", "image"]], "both", (shown) => {
      this.over = shown;
      this.draw();
    });
    this.over = over.value;
    const shared = frame.settings.mark("shared", "One scale for all", false, (on) => {
      this.shared = on;
      this.draw();
    });
    this.shared = shared.value;
    frame.controls.append(this.picker.field, over.field, shared.field);
  }

  // Weights.

  /** Weights on all keys, from what is looked from. */
  weights(image, head) {
    const at = image * this.facts.heads.length + head;
    if (this.source === "received") return this.frame.blocks.received.data.subarray(at * this.keys, (at + 1) * this.keys);
    const row = this.source === "cls" ? 0 : this.queryOf(this.origin);
    const [, , queries] = this.frame.blocks.weights.shape;
    const start = (at * queries + row) * this.keys;
    return Float32Array.from(this.frame.blocks.weights.data.subarray(start, start + this.keys), (v) => (v / 255) ** 2);
  }

  onPatches(image, head) {
    return this.weights(image, head).subarray(this.facts.prefix);
  }

  queryOf(/** @type {number[]} */ [row, column]) {
    return this.facts.prefix + row * this.columns + column;
  }

  get from() {
    const [row, column] = this.origin;
    return { cls: "from CLS", received: "from all patches on average", patch: `from the patch in row ${row}, column ${column}` }[this.source];
  }

  sentence() {
    const [row, column] = this.visited.cell;
    const value = this.onPatches(this.image, this.head)[row * this.columns + column];
    return `${this.facts.heads[this.head].label}, image ${this.facts.images[this.image]}: weight ${this.from} on row ${row}, column ${column}: ${exactly(value)}`;
  }

  headWords(i) {
    const weights = this.onPatches(this.image, i);
    const sum = weights.reduce((a, b) => a + b, 0);
    return `${this.facts.heads[i].label}: largest weight ${roughly(largestOf(weights))}, on all patches ${roughly(sum)}`;
  }

  imageWords(i) {
    return `Image ${this.facts.images[i]}, ${this.facts.heads[this.head].label}: largest weight ${roughly(largestOf(this.onPatches(i, this.head)))}`;
  }

  // Choosing.

  look(source) {
    this.source = source;
    this.draw();
    this.frame.select({ query: source === "cls" ? 0 : source === "patch" ? this.queryOf(this.origin) : null });
    if (source === "received" || this.frame.state.received) this.frame.keep({ received: source === "received" });
    this.frame.say(this.sentence());
  }

  choosePatch(cell) {
    this.visited.cell = cell;
    if (!this.facts.every) return this.frame.say("Only the weights from CLS are in this view.");
    this.origin = cell;
    this.look("patch");
  }

  chooseHead(i) {
    const { layer, head, site } = this.facts.heads[i];
    this.head = i;
    this.draw();
    this.frame.select({ layer, heads: [head], site });
    this.frame.say(this.headWords(i));
  }

  chooseImage(i) {
    this.image = i;
    this.draw();
    this.frame.select({ example: i });
    this.frame.say(this.imageWords(i));
  }

  follow({ layer, heads, site, query, example }) {
    const at = this.facts.heads.findIndex((each) => each.layer === layer && each.head === heads[0] && (site === null || each.site === null || each.site === site));
    if (at >= 0) this.head = at;
    if (example !== null && example < this.facts.images.length) this.image = example;
    if (query !== null && query < this.facts.prefix) this.source = "cls";
    else if (query !== null && query < this.keys && this.facts.every) {
      this.source = "patch";
      this.origin = [Math.floor((query - this.facts.prefix) / this.columns), (query - this.facts.prefix) % this.columns];
    }
    if (this.ready) this.draw();
  }

  /** Keys that mean the same everywhere in the view. */
  turn(key) {
    if (key === "Escape") this.frame.select({ layer: null, heads: [], site: null, query: null, example: null });
    else if (key === "c" && this.facts.prefix) this.look("cls");
    else if (key === "r") this.look("received");
    else return false;
    return true;
  }

  // Drawing.

  /** The round end of the scale that all maps share. */
  get top() {
    let top = 0;
    for (let i = 0; i < this.facts.heads.length; i++) top = Math.max(top, largestOf(this.onPatches(this.image, i)));
    for (let i = 0; i < this.facts.images.length; i++) top = Math.max(top, largestOf(this.onPatches(i, this.head)));
    return ceiling(top);
  }

  draw() {
    this.most = this.shared ? this.top : null;
    this.picker.select.value = this.source;
    const { heads, images } = this.facts;
    const chosen = this.frame.selection;
    const rows = [...this.headBox.children].map((row) => row.children.length);
    this.small = tileWidth(this.headBox.clientWidth, Math.max(...rows));
    this.headTiles.all.forEach((tile, i) => this.drawTile(tile, this.image, i, this.headWords(i)));
    this.headTiles.mark(this.head, (i) => {
      const { layer, head, site } = heads[i];
      return i === this.head || (layer === chosen.layer && chosen.heads.includes(head) && (chosen.site === null || site === null || site === chosen.site));
    });
    this.imageTiles.all.forEach((tile, i) => this.drawTile(tile, i, this.head, this.imageWords(i)));
    this.imageTiles.mark(this.image, (i) => i === this.image);
    this.name.textContent = `${heads[this.head].label} on image ${images[this.image]}, ${this.from}`;
    this.headsTitle.textContent = `All heads on image ${images[this.image]}`;
    this.imagesTitle.textContent = `${heads[this.head].label} on all images`;
    this.drawLarge();
    this.drawLegend();
  }

  drawTile({ canvas, pressed }, image, head, words) {
    const height = Math.round((this.small * this.height) / this.width);
    this.paint(prepare(canvas, this.small, height), image, head, this.small, height);
    pressed.setAttribute("aria-label", words);
  }

  paint(ink, image, head, width, height) {
    ink.imageSmoothingEnabled = false;
    ink.fillStyle = this.frame.colour("unseen");
    ink.fillRect(0, 0, width, height);
    if (this.over !== "weights") ink.drawImage(this.sheets[image], 0, 0, width, height);
    if (this.over !== "image") this.paintWeights(ink, image, head, width, height);
    const [across, down] = this.facts.heads[head].seams ?? [[], []];
    ink.fillStyle = this.over === "weights" ? this.frame.colour("ink") : SEAM;
    for (const row of across) ink.fillRect(0, Math.round((row * height) / this.rows), width, 1);
    for (const column of down) ink.fillRect(Math.round((column * width) / this.columns), 0, 1, height);
  }

  paintWeights(ink, image, head, width, height) {
    if (this.over === "both") {
      ink.fillStyle = DIMMED;
      ink.fillRect(0, 0, width, height);
    }
    const weights = this.onPatches(image, head);
    const top = this.most ?? ceiling(largestOf(weights));
    for (let row = 0; row < this.rows; row++) {
      for (let column = 0; column < this.columns; column++) {
        const share = Math.min(1, weights[row * this.columns + column] / top);
        const [left, right] = [Math.round((column * width) / this.columns), Math.round(((column + 1) * width) / this.columns)];
        const [above, below] = [Math.round((row * height) / this.rows), Math.round(((row + 1) * height) / this.rows)];
        ink.fillStyle = this.colour(share);
        ink.fillRect(left, above, right - left, below - above);
      }
    }
  }

  /** Over an image a weight is a glow that grows denser with it; alone it is a colour. */
  colour(share) {
    return this.over === "weights" ? css(colourAt(share, this.frame.theme)) : `rgb(${GLOW.join(" ")} / ${(0.92 * share).toFixed(3)})`;
  }

  drawLarge() {
    const width = Math.min(LARGE, Math.max(160, (this.large.parentElement.clientWidth || LARGE) - 4));
    const height = Math.round((width * this.height) / this.width);
    const ink = prepare(this.large, width, height);
    this.paint(ink, this.image, this.head, width, height);
    this.visited.box = { x: 0, y: 0, width, height };
    if (this.source === "patch") outline(ink, this.frame, this.visited.boxOf(this.origin), "cursor");
    if (this.visited.shown) outline(ink, this.frame, this.visited.boxOf(), "ink", 1);
  }

  drawLegend() {
    if (this.over === "image") return this.scale.replaceChildren();
    const top = this.most ?? ceiling(largestOf(this.onPatches(this.image, this.head)));
    const said = make("span", {}, this.shared ? "weight; one scale for all" : "weight; each small map goes to its own largest");
    const glow = (share) => GLOW.map((c) => Math.round(70 + (c - 70) * 0.92 * share));
    this.scale.replaceChildren(legend(gradient(this.over === "both" ? glow : colourAt, this.frame.theme), [[0, "0"], [0.5, roughly(top / 2)], [1, roughly(top)]], said));
  }
}
