// The outlines of what is drawn on a canvas: how characters of any script come into a PDF as characters.

/** @typedef {number[][]} Outline places [x, y] along a closed line; what is inside lies to the right */

// For each of the 16 ways in which the corners of a square lie inside: the sides where a line comes in and goes out.
const [T, R, B, L] = [0, 1, 2, 3];
const WAYS = [[], [[T, L]], [[R, T]], [[R, L]], [[B, R]], [[T, L], [B, R]], [[B, T]], [[B, L]], [[L, B]], [[T, B]], [[R, T], [L, B]], [[R, B]], [[L, R]], [[T, R]], [[L, T]], []];

/**
 * Lines along which a picture is half covered, by marching squares; between pixels they are interpolated.
 * @param {ArrayLike<number>} cover [height x width], from 0 to 255, with nothing along its edges
 * @param {number} width
 * @param {number} height
 * @param {number} tolerance how far a line may be from its outline, in pixels
 * @returns {Outline[]} in pixels from the left upper corner
 */
export function outlinesOf(cover, width, height, tolerance = 0.3) {
  /** @type {Map<number, number>} a crossing of the grid -> the next one */
  const next = new Map();
  for (let y = 0; y + 1 < height; y++) {
    for (let x = 0; x + 1 < width; x++) {
      const at = y * width + x;
      const way = (cover[at] > 127 ? 1 : 0) | (cover[at + 1] > 127 ? 2 : 0) | (cover[at + width + 1] > 127 ? 4 : 0) | (cover[at + width] > 127 ? 8 : 0);
      if (way === 0 || way === 15) continue;
      // Sides are known by the pixel to their left or above: across are even, down are odd.
      const sides = [2 * at, 2 * (at + 1) + 1, 2 * (at + width), 2 * at + 1];
      for (const [from, to] of WAYS[way]) next.set(sides[from], sides[to]);
    }
  }
  const place = (/** @type {number} */ side) => {
    const at = side >> 1;
    const [x, y] = [(at % width) + 0.5, Math.floor(at / width) + 0.5];
    const [here, there] = [cover[at], cover[at + (side & 1 ? width : 1)]];
    const share = (127.5 - here) / (there - here);
    return side & 1 ? [x, y + share] : [x + share, y];
  };
  const found = [];
  for (const start of next.keys()) {
    const line = [];
    for (let side = /** @type {number | undefined} */ (start); side !== undefined && next.has(side); ) {
      line.push(place(side));
      const to = next.get(side);
      next.delete(side);
      side = to;
    }
    const shape = fewer(line, tolerance);
    if (shape.length > 2) found.push(shape);
  }
  return found;
}

/** A closed line with fewer places, none of those left out farther from it than the tolerance (Douglas and Peucker). */
function fewer(/** @type {Outline} */ line, /** @type {number} */ tolerance) {
  if (line.length < 4) return line;
  const kept = new Set([0]);
  let far = 0;
  for (let i = 1; i < line.length; i++) if (distance(line[i], line[0]) > distance(line[far], line[0])) far = i;
  kept.add(far);
  const closed = [...line, line[0]];
  const spans = [[0, far], [far, line.length]];
  for (let span = spans.pop(); span; span = spans.pop()) {
    const [from, to] = span;
    let [worst, at] = [tolerance, -1];
    for (let i = from + 1; i < to; i++) {
      const off = away(closed[i], closed[from], closed[to]);
      if (off > worst) [worst, at] = [off, i];
    }
    if (at < 0) continue;
    kept.add(at);
    spans.push([from, at], [at, to]);
  }
  return line.filter((_, i) => kept.has(i));
}

const distance = (/** @type {number[]} */ a, /** @type {number[]} */ b) => Math.hypot(a[0] - b[0], a[1] - b[1]);

/** How far a place is from the line between two others. */
function away(/** @type {number[]} */ [x, y], /** @type {number[]} */ a, /** @type {number[]} */ b) {
  const long = distance(a, b);
  return long ? Math.abs((b[0] - a[0]) * (a[1] - y) - (a[0] - x) * (b[1] - a[1])) / long : Math.hypot(x - a[0], y - a[1]);
}
