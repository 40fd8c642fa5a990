// Grounding: the chosen row of the chosen head over the chosen picture, beside all tiles and all heads.

import { prepare } from "workbench/shared/canvas.js";
import { colourAt, css, gradient } from "workbench/shared/colour.js";
import { exactly, legend, make, roughly, selector } from "workbench/shared/dom.js";
import { open } from "workbench/shared/frame.js";
import { largestOf, outline, tileWidth } from "workbench/shared/maps.js";
import { Tiles, Visited } from "workbench/shared/tiles.js";

const LARGE = 420;
const FINE = 96; // cells along the longer edge of a map
const DIMMED = "rgb(20 22 26 / 0.5)"; // over the picture, so that weights are brighter than anything in it
const GLOW = [255, 150, 40];

export async function render({ model, el }) {
  const frame = await open({ model, el });
  new Grounding(frame);
  return () => frame.close();
}

class Grounding {
  constructor(frame) {
    this.frame = frame;
    this.facts = frame.facts;
    this.row = this.facts.rows.length - 1;
    this.map = 0;
    this.tile = 0;
    this.patches = frame.blocks.tile.shape[0];
    /** @type {Map<string, number>} patch by tile, row and column */
    this.found = new Map();
    const { tile, cells } = { tile: frame.blocks.tile.data, cells: frame.blocks.cells.data };
    for (let i = 0; i < this.patches; i++) this.found.set(`${tile[i]} ${cells[2 * i]} ${cells[2 * i + 1]}`, i);
    this.sheets = this.facts.pictures.map((one) => this.sheet(one));
    this.build();
    this.tile = this.brightest();
    frame.offerKeys([["← → ↑ ↓, Home, End", "move over the patches, the tiles or the heads"], ["Enter", "choose the patch, the tile or the head in every view"], ["[ ]", "the row before, the row after"], ["m", "the mean of all heads"], ["Esc", "choose none"]]);
    this.ready = false;
    this.follow(frame.selection ?? frame.spec.selection);
    frame.onSelect((selection) => this.follow(selection));
    this.ready = true;
    frame.onRedraw(() => this.draw());
  }

  /** A picture as a canvas of its own pixels. */
  sheet({ height, width, start }) {
    const canvas = make("canvas", {});
    Object.assign(canvas, { width, height });
    const ink = canvas.getContext("2d");
    const made = ink.createImageData(width, height);
    const { data } = this.frame.blocks.pixels;
    for (let at = 0; at < height * width; at++) {
      for (let c = 0; c < 3; c++) made.data[4 * at + c] = data[start + 3 * at + c];
      made.data[4 * at + 3] = 255;
    }
    ink.putImageData(made, 0, 0);
    return canvas;
  }

  build() {
    const { frame, facts } = this;
    this.name = make("h3");
    this.large = make("canvas", { tabindex: "0", role: "application", "aria-roledescription": "image", "aria-label": "The chosen picture, patch by patch. Arrow keys move over the patches of the chosen tile, Enter chooses one." });
    this.scale = make("div");
    this.shares = make("p", { class: "shares" });
    const other = (event) => this.turn(event.key);
    this.visited = new Visited(frame, this.large, [1, 1], { sentence: () => this.sentence(), draw: () => this.drawLarge(), press: (cell) => this.choosePatch(cell), enter: () => this.choosePatch(this.visited.cell), other });
    this.tileBox = make("div", { class: "tiles" });
    this.tileTiles = new Tiles(frame, this.tileBox, { words: (i) => this.tileWords(i), choose: (i) => this.chooseTile(i), other });
    this.tileBox.append(...facts.tiles.map((tile) => this.tileTiles.add(tile.name)));
    this.headBox = make("div", { class: "tiles" });
    this.headTiles = new Tiles(frame, this.headBox, { words: (i) => this.headWords(i), choose: (i) => this.chooseMap(i), other });
    this.headBox.append(...facts.maps.map((map) => this.headTiles.add(map.layer === null ? "mean" : `L${map.layer}H${map.head}`)));
    this.tilesTitle = make("h3");
    this.headsTitle = make("h3");
    const detail = make("div", { class: "detail" }, this.name, this.large, this.scale, this.shares);
    const tiles = make("section", { class: "group" }, this.tilesTitle, this.tileBox);
    const heads = make("section", { class: "group" }, this.headsTitle, this.headBox);
    frame.body.append(make("div", { class: "split" }, detail, make("div", {}, tiles, heads)));
    this.picker = selector("At", facts.rows.map((row, i) => [`${i}`, this.rowName(row)]), (i) => this.chooseRow(Number(i)));
    const over = frame.settings.pick("show", "Show", [["both", "weights over the picture"], ["weights", "weights"], ["image", "picture"]], "both", (shown) => {
      this.over = shown;
      this.draw();
    });
    this.over = over.value;
    const which = frame.settings.pick("tiles", "Tiles", [["all", "all of a picture, added up"], ["one", "the chosen tile alone"]], "all", (tilesShown) => {
      this.which = tilesShown;
      this.draw();
    });
    this.which = which.value;
    const shared = frame.settings.mark("shared", "One scale for all", false, (on) => {
      this.shared = on;
      this.draw();
    });
    this.shared = shared.value;
    frame.controls.append(this.picker.field, over.field, ...(facts.tiles.length > facts.pictures.length ? [which.field] : []), shared.field);
  }

  rowName({ position, token, writes }) {
    return `${position} ${token}${writes ? ` → ${writes}` : ""}`;
  }

  // Weights.

  weight(patch, map = this.map) {
    const [, maps] = this.frame.blocks.weights.shape;
    const share = this.frame.blocks.weights.data[(this.row * maps + map) * this.patches + patch] / 255;
    return share * share * this.frame.blocks.tops.data[this.row * maps + map];
  }

  onTile(tile, map = this.map) {
    let sum = 0;
    for (let i = 0; i < this.patches; i++) if (this.frame.blocks.tile.data[i] === tile) sum += this.weight(i, map);
    return sum;
  }

  /** The tile that is read most. */
  brightest() {
    const sums = this.facts.tiles.map((_, t) => this.onTile(t));
    return sums.indexOf(Math.max(...sums));
  }

  massesOf(map) {
    const [, maps, parts] = this.frame.blocks.masses.shape;
    const start = (this.row * maps + map) * parts;
    return this.frame.blocks.masses.data.subarray(start, start + parts);
  }

  /** A map of a picture, or of one tile of it: the weight on each fine cell. */
  fine(picture, map, tile = null) {
    const { full } = this.facts.pictures[picture];
    const scale = FINE / Math.max(...full);
    const [rows, columns] = full.map((n) => Math.max(1, Math.round(n * scale)));
    const [high, wide] = [rows / full[0], columns / full[1]];
    const made = new Float32Array(rows * columns);
    const { boxes, tile: tiles } = { boxes: this.frame.blocks.boxes.data, tile: this.frame.blocks.tile.data };
    for (let i = 0; i < this.patches; i++) {
      if (this.facts.tiles[tiles[i]].picture !== picture || (tile !== null && tiles[i] !== tile)) continue;
      const [x0, y0, x1, y1] = [boxes[4 * i] * wide, boxes[4 * i + 1] * high, boxes[4 * i + 2] * wide, boxes[4 * i + 3] * high];
      if (!(x1 > x0)) continue;
      const dense = this.weight(i, map) / ((x1 - x0) * (y1 - y0));
      for (let y = Math.max(0, Math.floor(y0)); y < Math.min(rows, y1); y++) {
        const tall = (Math.min(y + 1, y1) - Math.max(y, y0)) * dense;
        for (let x = Math.max(0, Math.floor(x0)); x < Math.min(columns, x1); x++) made[y * columns + x] += tall * (Math.min(x + 1, x1) - Math.max(x, x0));
      }
    }
    return { made, rows, columns };
  }

  get patch() {
    const [row, column] = this.visited.cell;
    return this.found.get(`${this.tile} ${row} ${column}`);
  }

  sentence() {
    const [row, column] = this.visited.cell;
    const where = `${this.facts.tiles[this.tile].name}, row ${row}, column ${column}`;
    const i = this.patch;
    if (i === undefined) return `${where}: no token of the prompt`;
    const [, patches] = this.frame.blocks.sinks.shape;
    const sink = this.frame.blocks.sinks.data[this.map * patches + i] ? (this.map ? ", a sink" : ", a sink of some head") : "";
    return `${where}, position ${this.frame.blocks.positions.data[i]}: ${exactly(this.weight(i))} of the weight of ${this.facts.maps[this.map].label}${sink}`;
  }

  tileWords(i) {
    return `${this.facts.tiles[i].name}: ${roughly(this.onTile(i))} of the weight of ${this.facts.maps[this.map].label}`;
  }

  headWords(i) {
    return `${this.facts.maps[i].label}: ${roughly(this.massesOf(i)[0])} of its weight is on ${this.facts.masses[0]}, ${roughly(this.onTile(this.tile, i))} on ${this.facts.tiles[this.tile].name}`;
  }

  // Choosing.

  chooseRow(i) {
    this.row = i;
    this.draw();
    this.frame.select({ query: this.facts.rows[i].position });
    this.frame.say(this.headWords(this.map));
  }

  chooseMap(i) {
    this.map = i;
    this.draw();
    const { layer, head, site } = this.facts.maps[i];
    this.frame.select({ layer, heads: head === null ? [] : [head], site });
    this.frame.say(this.headWords(i));
  }

  chooseTile(i) {
    this.tile = i;
    this.draw();
    this.frame.select({ example: this.facts.tiles[i].picture });
    this.frame.say(this.tileWords(i));
  }

  choosePatch(cell) {
    this.visited.cell = cell;
    if (this.patch !== undefined) this.frame.select({ key: this.frame.blocks.positions.data[this.patch] });
    this.frame.say(this.sentence());
    this.drawLarge();
  }

  follow({ layer, heads, site, query, key, example }) {
    const at = this.facts.maps.findIndex((each) => each.layer !== null && each.layer === layer && each.head === heads?.[0] && (site === null || each.site === null || each.site === site));
    this.map = at >= 0 ? at : heads?.length ? this.map : 0;
    const row = this.facts.rows.findIndex(({ position }) => position === query);
    if (row >= 0) this.row = row;
    if (example !== null && example !== undefined && example < this.facts.pictures.length && this.facts.tiles[this.tile].picture !== example) {
      this.tile = this.facts.tiles.findIndex(({ picture }) => picture === example);
    }
    const patch = key === null || key === undefined ? -1 : this.frame.blocks.positions.data.indexOf(key);
    if (patch >= 0) {
      this.tile = this.frame.blocks.tile.data[patch];
      this.visited.cell = [this.frame.blocks.cells.data[2 * patch], this.frame.blocks.cells.data[2 * patch + 1]];
    }
    if (this.ready) this.draw();
  }

  /** Keys that mean the same everywhere in the view. */
  turn(key) {
    if (key === "Escape") this.frame.select({ layer: null, heads: [], site: null, query: null, key: null, example: null });
    else if (key === "m") this.chooseMap(0);
    else if (key === "[" && this.row > 0) this.chooseRow(this.row - 1);
    else if (key === "]" && this.row < this.facts.rows.length - 1) this.chooseRow(this.row + 1);
    else return false;
    return true;
  }

  // Drawing.

  draw() {
    const { facts } = this;
    const picture = facts.tiles[this.tile].picture;
    this.picker.select.value = `${this.row}`;
    this.visited.shape = facts.tiles[this.tile].grid;
    this.visited.cell = this.visited.cell.map((at, axis) => Math.min(at, this.visited.shape[axis] - 1));
    this.small = tileWidth(this.headBox.clientWidth, 10);
    const ofTiles = facts.tiles.map((tile, t) => this.fine(tile.picture, this.map, t));
    const shownTile = this.which === "one" ? this.tile : null;
    const ofHeads = facts.maps.map((_, m) => this.fine(picture, m, shownTile));
    const most = (several) => largestOf(several.map(({ made }) => largestOf(made)));
    const [topTiles, topHeads] = [most(ofTiles), this.shared ? most(ofHeads) : null];
    this.tileTiles.all.forEach((small, t) => this.drawTile(small, facts.tiles[t].picture, ofTiles[t], topTiles, this.tileWords(t)));
    this.tileTiles.mark(this.tile, (t) => t === this.tile);
    this.headTiles.all.forEach((small, m) => this.drawTile(small, picture, ofHeads[m], topHeads, this.headWords(m)));
    this.headTiles.mark(this.map, (m) => m === this.map);
    this.shown = ofHeads[this.map];
    this.top = topHeads ?? largestOf(this.shown.made);
    const row = facts.rows[this.row];
    this.name.textContent = `${facts.maps[this.map].label} at ${this.rowName(row)}, ${facts.pictures[picture].name}`;
    this.tilesTitle.textContent = `${facts.maps[this.map].label} on every ${facts.tiles.length > facts.pictures.length ? "tile" : "picture"}, one scale`;
    this.headsTitle.textContent = `Every head on ${this.which === "one" ? facts.tiles[this.tile].name : facts.pictures[picture].name}`;
    this.shares.textContent = `Of its weight: ${[...this.massesOf(this.map)].map((mass, i) => `${roughly(mass)} on ${facts.masses[i]}`).join(", ")}.`;
    this.drawLarge();
    this.drawLegend();
  }

  sizeOf(picture, most) {
    const { height, width } = this.facts.pictures[picture];
    const scale = most / Math.max(height, width);
    return [Math.max(1, Math.round(width * scale)), Math.max(1, Math.round(height * scale))];
  }

  drawTile({ canvas, pressed }, picture, fine, top, words) {
    const [width, height] = this.sizeOf(picture, this.small);
    this.paint(prepare(canvas, width, height), picture, fine, top ?? largestOf(fine.made), width, height);
    pressed.setAttribute("aria-label", words);
  }

  paint(ink, picture, { made, rows, columns }, top, width, height) {
    ink.fillStyle = this.frame.colour("unseen");
    ink.fillRect(0, 0, width, height);
    ink.imageSmoothingEnabled = true;
    if (this.over !== "weights") ink.drawImage(this.sheets[picture], 0, 0, width, height);
    if (this.over === "image") return;
    if (this.over === "both") {
      ink.fillStyle = DIMMED;
      ink.fillRect(0, 0, width, height);
    }
    const at = (/** @type {number} */ y, /** @type {number} */ x) => made[y * columns + x];
    const alike = (/** @type {number} */ y, /** @type {number} */ z) => Array.from({ length: columns }, (_, x) => x).every((x) => at(y, x) === at(z, x));
    // What has one value is painted as one: the parts of a picture are finer than the cells of its tiles.
    for (let y = 0, under = 0; y < rows; y = under) {
      for (under = y + 1; under < rows && alike(y, under); ) under++;
      const [above, below] = [y, under].map((each) => Math.round((each * height) / rows));
      for (let x = 0, next = 0; x < columns; x = next) {
        for (next = x + 1; next < columns && at(y, next) === at(y, x); ) next++;
        const share = Math.min(1, at(y, x) / top);
        const [left, right] = [x, next].map((each) => Math.round((each * width) / columns));
        if ((this.over === "both" && share < 0.01) || left === right || above === below) continue;
        ink.fillStyle = this.over === "weights" ? css(colourAt(share, this.frame.theme)) : `rgb(${GLOW.join(" ")} / ${(0.92 * share).toFixed(3)})`;
        ink.fillRect(left, above, right - left, below - above);
      }
    }
  }

  drawLarge() {
    if (!this.shown) return;
    const picture = this.facts.tiles[this.tile].picture;
    const [width, height] = this.sizeOf(picture, Math.min(LARGE, Math.max(160, (this.large.parentElement.clientWidth || LARGE) - 4)));
    const ink = prepare(this.large, width, height);
    this.paint(ink, picture, this.shown, this.top, width, height);
    const corners = this.cornersOf(this.tile);
    if (!corners) return;
    const [x0, y0, x1, y1] = corners;
    const { full } = this.facts.pictures[picture];
    const [wide, high] = [width / full[1], height / full[0]];
    this.visited.box = { x: x0 * wide, y: y0 * high, width: (x1 - x0) * wide, height: (y1 - y0) * high };
    if (this.facts.tiles.length > this.facts.pictures.length) outline(ink, this.frame, this.visited.box, "ink", 1);
    const chosen = this.frame.selection?.key;
    const at = chosen === null || chosen === undefined ? -1 : this.frame.blocks.positions.data.indexOf(chosen);
    if (at >= 0 && this.frame.blocks.tile.data[at] === this.tile) {
      const { data } = this.frame.blocks.cells;
      outline(ink, this.frame, this.visited.boxOf([data[2 * at], data[2 * at + 1]]), "cursor");
    }
    if (this.visited.shown) outline(ink, this.frame, this.visited.boxOf(), "ink", 1);
  }

  /** The box of a whole tile, from that of one of its patches. */
  cornersOf(tile) {
    const { boxes, tile: tiles, cells } = this.frame.blocks;
    const [rows, columns] = this.facts.tiles[tile].grid;
    for (let i = 0; i < this.patches; i++) {
      if (tiles.data[i] !== tile || !(boxes.data[4 * i + 2] > boxes.data[4 * i])) continue;
      const [x0, y0, x1, y1] = boxes.data.subarray(4 * i, 4 * i + 4);
      const [row, column] = cells.data.subarray(2 * i, 2 * i + 2);
      const [wide, high] = [x1 - x0, y1 - y0];
      return [x0 - column * wide, y0 - row * high, x0 + (columns - column) * wide, y0 + (rows - row) * high];
    }
    return null;
  }

  drawLegend() {
    if (this.over === "image") return this.scale.replaceChildren();
    const { full } = this.facts.pictures[this.facts.tiles[this.tile].picture];
    const cells = this.shown.made.length;
    const top = (this.top * cells) / (full[0] * full[1]);
    const said = make("span", {}, this.shared ? "weight per pixel; one scale for all heads" : "weight per pixel; each small map of a head goes to its own largest");
    const glow = (share) => GLOW.map((c) => Math.round(70 + (c - 70) * 0.92 * share));
    this.scale.replaceChildren(legend(gradient(this.over === "both" ? glow : colourAt, this.frame.theme), [[0, "0"], [0.5, roughly(top / 2)], [1, roughly(top)]], said));
  }
}
