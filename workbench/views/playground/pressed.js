// A matrix in which what is ablated is crossed out, and whose rows can be pressed by their names.

import { Matrix } from "workbench/shared/matrix.js";

/**
 * @typedef {object} Marks
 * @property {number[][]} cells row and column of what is crossed out
 * @property {number[][]} touched cells of which a part is ablated
 * @property {number[]} rows that are struck through
 */

export class Pressed extends Matrix {
  /**
   * @param {import("workbench/shared/frame.js").Frame} frame
   * @param {import("workbench/shared/matrix.js").Options & {ablated: () => Marks, pressRow?: (row: number) => void}} options
   */
  constructor(frame, options) {
    super(frame, options);
    this.doing = options;
  }

  marks(ink) {
    super.marks(ink);
    const { at, view, frame } = this;
    const { cells, touched, rows } = this.doing.ablated();
    /** @type {(cell: number[]) => number[]} */
    const place = ([row, column]) => [at.left + (column - view.left) * at.w, at.top + (row - view.top) * at.h];
    const lines = cells.flatMap((cell) => {
      const [x, y] = place(cell);
      const [inX, inY] = [Math.min(3, at.w / 5), Math.min(3, at.h / 5)];
      return [[x + inX, y + inY, x + at.w - inX, y + at.h - inY], [x + at.w - inX, y + inY, x + inX, y + at.h - inY]];
    });
    for (const row of rows) {
      const [, y] = place([row, 0]);
      lines.push([at.left, y + at.h / 2, at.left + at.w * view.columns, y + at.h / 2]);
    }
    ink.save();
    ink.beginPath();
    ink.rect(at.left, at.top, at.w * view.columns, at.h * view.rows);
    ink.clip();
    ink.lineCap = "round";
    for (const [width, colour] of [[4, "paper"], [2, "cursor"]]) {
      ink.lineWidth = width;
      ink.strokeStyle = frame.colour(colour);
      ink.beginPath();
      for (const [x0, y0, x1, y1] of lines) {
        ink.moveTo(x0, y0);
        ink.lineTo(x1, y1);
      }
      ink.stroke();
    }
    for (const cell of touched) {
      const [x, y] = place(cell);
      ink.fillStyle = frame.colour("cursor");
      ink.strokeStyle = frame.colour("paper");
      ink.lineWidth = 1.5;
      ink.beginPath();
      ink.arc(x + at.w - Math.min(6, at.w / 3), y + Math.min(6, at.h / 3), Math.min(4, at.w / 4), 0, 2 * Math.PI);
      ink.fill();
      ink.stroke();
    }
    ink.restore();
  }

  /** The row whose name the pointer is on, left of the cells. */
  rowAt(event) {
    const bounds = this.canvas.getBoundingClientRect();
    const { at, view } = this;
    const row = Math.floor((event.clientY - bounds.top - at.top) / at.h) + view.top;
    return event.clientX - bounds.left < at.left && row >= view.top && row < view.top + view.rows ? row : null;
  }

  release(event) {
    const row = this.grip && !this.grip.far ? this.rowAt(event) : null;
    super.release(event);
    if (row !== null) this.doing.pressRow?.(row);
  }
}
