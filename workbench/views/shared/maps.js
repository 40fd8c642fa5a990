// Maps on canvases: heat maps of a few cells, or bars where there is one row.

import { colourAt, css } from "./colour.js";

/** The largest known value; 1 where there is none above 0. */
export function largestOf(values) {
  let top = 0;
  for (const value of values) if (value > top) top = value;
  return top || 1;
}

/** Draw values [rows x columns], from 0 to `top`, into a box of a canvas. One row is drawn as bars. */
export function drawMap(ink, values, rows, columns, top, { x, y, width, height }, frame) {
  ink.fillStyle = frame.colour("unseen");
  ink.fillRect(x, y, width, height);
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      const value = values[row * columns + column];
      if (!Number.isFinite(value)) continue;
      const [left, right] = [Math.floor((column * width) / columns), Math.floor(((column + 1) * width) / columns)];
      const [above, below] = [Math.floor((row * height) / rows), Math.floor(((row + 1) * height) / rows)];
      ink.fillStyle = css(colourAt(rows === 1 ? 0.6 : value / top, frame.theme));
      if (rows > 1) ink.fillRect(x + left, y + above, right - left, below - above);
      else ink.fillRect(x + left, y + height * (1 - value / top), Math.max(1, right - left), (height * value) / top);
    }
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
