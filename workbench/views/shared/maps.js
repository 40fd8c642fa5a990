// Maps on canvases: heat maps of a few cells, or bars where there is one row.

import { prepare } from "./canvas.js";
import { colourAt, css, rgbOf } from "./colour.js";
import { make } from "./dom.js";

/** The largest value that a scale can end at; 1 where there is none above 0. */
export function largestOf(values) {
  let top = 0;
  for (const value of values) if (value > top && value < Infinity) top = value;
  return top || 1;
}

/**
 * What maps are painted with: a colour for each of 256 places of the scale, and that of cells where nothing is known.
 * @param {any} frame
 */
export function paletteOf(frame) {
  const packed = (/** @type {number[]} */ [r, g, b]) => ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;
  const table = Uint32Array.from({ length: 256 }, (_, i) => packed(colourAt(i / 255, frame.theme)));
  return { table, unseen: packed(rgbOf(frame.colour("unseen"))), bars: css(colourAt(0.6, frame.theme)), paper: frame.colour("unseen") };
}

/** Values [rows x columns], from 0 to `top`, as a picture with a pixel per cell. `roots`: colours go by square roots. */
function pixelsOf(values, rows, columns, top, roots, { table, unseen }) {
  const image = new ImageData(columns, rows);
  const pixels = new Uint32Array(image.data.buffer);
  for (let i = 0; i < pixels.length; i++) {
    const share = values[i] / top;
    pixels[i] = Number.isNaN(share) ? unseen : table[Math.round(255 * Math.min(1, Math.max(0, roots ? Math.sqrt(share) : share)))];
  }
  return image;
}

function drawBars(ink, values, top, { x, y, width, height }, { bars, paper }) {
  ink.fillStyle = paper;
  ink.fillRect(x, y, width, height);
  ink.fillStyle = bars;
  values.forEach((value, column) => {
    const [left, right] = [Math.floor((column * width) / values.length), Math.floor(((column + 1) * width) / values.length)];
    if (Number.isFinite(value)) ink.fillRect(x + left, y + height * (1 - value / top), Math.max(1, right - left), (height * value) / top);
  });
}

/** A small map on a canvas of its own: a pixel per cell, which the browser makes larger. One row is drawn as bars. */
export function paintMap(canvas, values, [rows, columns], { top, roots, width, height }, palette) {
  if (rows === 1) return drawBars(prepare(canvas, width, height), values, top, { x: 0, y: 0, width, height }, palette);
  if (canvas.width !== columns || canvas.height !== rows) Object.assign(canvas, { width: columns, height: rows });
  Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
  // Made smaller, single cells would be left out; made larger, they stay sharp.
  canvas.style.imageRendering = columns <= width * (window.devicePixelRatio || 1) ? "pixelated" : "auto";
  canvas.getContext("2d").putImageData(pixelsOf(values, rows, columns, top, roots, palette), 0, 0);
}

/** Draw a map into a box of a canvas. One row is drawn as bars. */
export function drawMap(ink, values, [rows, columns], { top, roots }, box, palette) {
  if (rows === 1) return drawBars(ink, values, top, box, palette);
  const sheet = make("canvas", { width: columns, height: rows });
  sheet.getContext("2d").putImageData(pixelsOf(values, rows, columns, top, roots, palette), 0, 0);
  ink.imageSmoothingEnabled = columns > box.width * (window.devicePixelRatio || 1);
  ink.drawImage(sheet, box.x, box.y, box.width, box.height);
}

const TURN = 40; // milliseconds: shorter turns cost more frames, longer ones are felt

/**
 * Act on each of many things, in turns between which whoever reads the page gets on with it.
 * @template Thing
 * @param {Iterable<Thing>} things
 * @param {(thing: Thing) => void} act
 * @param {() => boolean} wanted whether it is still
 */
export async function inTurns(things, act, wanted) {
  let until = performance.now() + TURN;
  for (const thing of things) {
    if (performance.now() > until) {
      await new Promise((next) => setTimeout(next));
      if (!wanted()) return;
      until = performance.now() + TURN;
    }
    act(thing);
  }
}

/** A frame around a box, on paper so that it shows on every colour. */
export function outline(ink, frame, box, colour, width = 2) {
  ink.lineWidth = width + 2;
  ink.strokeStyle = frame.colour("paper");
  ink.strokeRect(box.x, box.y, box.width, box.height);
  ink.lineWidth = width;
  ink.strokeStyle = frame.colour(colour);
  ink.strokeRect(box.x, box.y, box.width, box.height);
}

/** Width of small maps of which `most` stand in a row of so many pixels. */
export const tileWidth = (room, most) => Math.max(44, Math.min(92, Math.floor((room || 600) / Math.max(1, most)) - 14));

/** Arrow keys over buttons that stand in rows: the button beside, above or below on the page; null for other keys. */
export function beside(buttons, at, key) {
  if (key === "Home") return 0;
  if (key === "End") return buttons.length - 1;
  if (key === "ArrowLeft") return Math.max(0, at - 1);
  if (key === "ArrowRight") return Math.min(buttons.length - 1, at + 1);
  if (key !== "ArrowUp" && key !== "ArrowDown") return null;
  const boxes = buttons.map((each) => each.getBoundingClientRect());
  const here = boxes[at];
  const ahead = (box) => (key === "ArrowDown" ? box.top - here.top : here.top - box.top);
  let best = at;
  for (let i = 0; i < boxes.length; i++) {
    if (ahead(boxes[i]) < 4) continue;
    const far = (box) => 4 * ahead(box) + Math.abs(box.left - here.left);
    if (best === at || far(boxes[i]) < far(boxes[best])) best = i;
  }
  return best;
}
