// What speech views need: rows made comparable, and a player of samples.

import { make } from "workbench/shared/dom.js";

/** [red, green, blue] of "#rrggbb". */
export const rgbOf = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));

/** Rows of a flat map less their mean, over their deviation; a constant row becomes zeros. */
export function standardise(values, rows) {
  const columns = values.length / rows;
  const found = new Float64Array(values.length);
  for (let row = 0; row < rows; row++) {
    const part = values.subarray(row * columns, (row + 1) * columns);
    let [sum, squares, largest] = [0, 0, 0];
    for (const value of part) {
      sum += value;
      largest = Math.max(largest, Math.abs(value));
    }
    const mean = sum / columns;
    for (const value of part) squares += (value - mean) ** 2;
    const spread = Math.sqrt(squares / Math.max(1, columns - 1));
    if (spread <= 1e-7 * largest) continue; // no more than rounding
    for (let i = 0; i < columns; i++) found[row * columns + i] = (part[i] - mean) / spread;
  }
  return found;
}

/** Pearson's r of two maps with standardised rows: of each row, and of all rows that are not special. null: constant. */
export function correlated(a, b, rows, special) {
  const columns = a.length / rows;
  const over = (from, to) => {
    let [ab, aa, bb] = [0, 0, 0];
    for (let i = from; i < to; i++) {
      ab += a[i] * b[i];
      aa += a[i] * a[i];
      bb += b[i] * b[i];
    }
    return [ab, aa, bb];
  };
  const r = ([ab, aa, bb]) => (aa > 0 && bb > 0 ? ab / Math.sqrt(aa * bb) : null);
  const each = Array.from({ length: rows }, (_, row) => over(row * columns, (row + 1) * columns));
  const kept = each.filter((_, row) => !special[row]);
  return { rows: each.map(r), all: r(kept.reduce((sums, one) => sums.map((sum, k) => sum + one[k]), [0, 0, 0])) };
}

/** A player of 16-bit samples; `tell` gets the second that plays, and null when nothing does. */
export function sound(samples, rate, tell) {
  const url = URL.createObjectURL(new Blob([header(samples.length, rate), samples], { type: "audio/wav" }));
  const element = make("audio", { controls: true, preload: "auto", src: url, "aria-label": "The audio" });
  let stop = Infinity;
  const follow = () => {
    if (element.currentTime >= stop) element.pause();
    if (element.paused) return tell(null);
    tell(element.currentTime);
    requestAnimationFrame(follow);
  };
  element.addEventListener("play", follow);
  element.addEventListener("seeked", () => tell(element.paused ? null : element.currentTime));
  return {
    element,
    play(from, to) {
      element.currentTime = from;
      stop = to;
      element.play();
    },
    close() {
      element.pause();
      URL.revokeObjectURL(url);
    },
  };
}

/** The 44 bytes before the samples of a WAV file: one channel, 16 bits. */
function header(count, rate) {
  const view = new DataView(new ArrayBuffer(44));
  const text = (at, word) => [...word].forEach((letter, i) => view.setUint8(at + i, letter.charCodeAt(0)));
  const numbers = [[4, 36 + 2 * count], [16, 16], [24, rate], [28, 2 * rate], [40, 2 * count]];
  for (const [at, value] of numbers) view.setUint32(at, value, true);
  for (const [at, value] of [[20, 1], [22, 1], [32, 2], [34, 16]]) view.setUint16(at, value, true);
  for (const [at, word] of [[0, "RIFF"], [8, "WAVE"], [12, "fmt "], [36, "data"]]) text(at, word);
  return view;
}
