// The small maps of a wall on a few large canvases: each canvas is a layer of its own to a browser, and a thousand layers
// do not scroll without a pause.

import { prepare } from "workbench/shared/canvas.js";
import { make } from "workbench/shared/dom.js";

const TALLEST = 1024; // pixels from the first tile of a sheet to its last

/** The nearest place where a pixel of the screen begins. @param {number} x */
const sharp = (x) => Math.round(x * (window.devicePixelRatio || 1)) / (window.devicePixelRatio || 1);

/** Sheets that lie over boxes of tiles; a tile keeps its map on a canvas that is not on the page, and a place for it. */
export class Sheets {
  /**
   * @param {HTMLElement} box in which boxes of tiles stand
   * @param {import("workbench/shared/tiles.js").Tiles} tiles
   */
  constructor(box, tiles) {
    this.box = box;
    this.tiles = tiles;
    this.places = tiles.all.map(() => make("i", { class: "place" }));
    /** @type {{ink: CanvasRenderingContext2D, x: number, y: number, width: number, height: number}[]} */
    this.at = [];
  }

  /** Whether maps lie on sheets, or each in its tile: for a print, which breaks between tiles. */
  use(sheets) {
    this.tiles.all.forEach(({ pressed, canvas }, i) => {
      const [from, to] = sheets ? [canvas, this.places[i]] : [this.places[i], canvas];
      if (from.parentElement === pressed) from.replaceWith(to);
    });
    if (!sheets) for (const sheet of this.box.querySelectorAll(".sheet")) sheet.remove();
  }

  /** Measure where the tiles stand and make sheets to fit; whether any of them is empty by now. */
  lay() {
    let empty = false;
    for (const box of this.box.querySelectorAll(".tiles")) {
      const { left, top, width } = box.getBoundingClientRect();
      /** @type {{i: number, x: number, y: number, width: number, height: number}[][]} */
      const slices = [];
      for (const tile of box.querySelectorAll("button.tile")) {
        const i = this.tiles.index.get(tile) ?? 0;
        const place = this.places[i].getBoundingClientRect();
        const y = place.top - top;
        const slice = Math.floor(y / TALLEST);
        slices[slice] ??= [];
        slices[slice].push({ i, x: sharp(place.left - left), y: sharp(y), width: place.width, height: place.height });
      }
      /** @type {HTMLCanvasElement[]} */
      const sheets = Array.from(box.querySelectorAll(".sheet"));
      const filled = slices.filter(Boolean);
      filled.forEach((slice, k) => {
        const sheet = sheets[k] ?? make("canvas", { class: "sheet", "aria-hidden": "true" });
        const from = Math.floor(slice[0].y);
        const end = Math.ceil(slice.reduce((most, { y, height }) => Math.max(most, y + height), 0));
        const size = `${from} ${Math.ceil(width)} ${end - from} ${window.devicePixelRatio}`;
        let ink = /** @type {CanvasRenderingContext2D} */ (sheet.getContext("2d"));
        if (sheet.dataset.size !== size) {
          ink = prepare(sheet, Math.ceil(width), end - from);
          sheet.style.top = `${from}px`;
          sheet.dataset.size = size;
          empty = true;
        }
        if (!sheets[k]) box.append(sheet);
        for (const { i, y, ...place } of slice) this.at[i] = { ink, y: y - from, ...place };
      });
      for (const more of sheets.slice(filled.length)) more.remove();
    }
    return empty;
  }

  /** Lay the map of a tile onto its sheet. */
  put(i) {
    const { canvas } = this.tiles.all[i];
    if (!this.at[i] || !canvas.width) return;
    const { ink, x, y, width, height } = this.at[i];
    ink.imageSmoothingEnabled = canvas.width > width * (window.devicePixelRatio || 1);
    ink.drawImage(canvas, x, y, width, height);
  }
}
