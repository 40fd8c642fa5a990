// The path of an SVG element as moves, lines and curves between absolute places.

/** @typedef {{ name: "M" | "L" | "C" | "Z", at: number[] }} Segment */

const TAKES = { M: 2, L: 2, H: 1, V: 1, C: 6, S: 4, Q: 4, T: 2, A: 7, Z: 0 };
const NUMBER = /[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?/gi;

/** Commands with as many numbers as each takes; a command that is given more goes on. @param {string} d */
function* commandsOf(d) {
  for (const [, letter, rest] of d.matchAll(/([MLHVCSQTAZ])([^MLHVCSQTAZ]*)/gi)) {
    const name = /** @type {keyof typeof TAKES} */ (letter.toUpperCase());
    const given = Array.from(name === "A" ? arcs(rest) : rest.matchAll(NUMBER), (found) => Number(found[0]));
    const takes = TAKES[name];
    if (!takes) yield { name, relative: false, given: [] };
    for (let i = 0; takes && i + takes <= given.length; i += takes) {
      yield { name: name === "M" && i ? /** @type {const} */ ("L") : name, relative: letter !== name, given: given.slice(i, i + takes) };
    }
  }
}

/** The numbers of arcs, whose two flags may stand without a space: "a1 1 0 013 4". @param {string} text */
function* arcs(text) {
  let from = 0;
  for (let i = 0; ; i++) {
    const flag = i % 7 === 3 || i % 7 === 4;
    const pattern = flag ? /[01]/g : new RegExp(NUMBER);
    pattern.lastIndex = from;
    const found = pattern.exec(text);
    if (!found) return;
    from = found.index + found[0].length;
    yield found;
  }
}

/**
 * @param {string} d
 * @returns {Segment[]}
 */
export function segmentsOf(d) {
  /** @type {Segment[]} */
  const found = [];
  let [x, y] = [0, 0]; // where the pen is
  let start = [0, 0];
  let handle = [0, 0]; // the last handle of the curve before, which S and T mirror
  let before = "";
  const curve = (/** @type {number[]} */ ...at) => found.push({ name: "C", at });
  for (const { name, relative, given } of commandsOf(d)) {
    const [dx, dy] = relative ? [x, y] : [0, 0];
    const p = name === "A" || name === "H" || name === "V" ? given : given.map((value, i) => value + (i % 2 ? dy : dx));
    const mirrored = (/** @type {string} */ of) => (of.includes(before) && before ? [2 * x - handle[0], 2 * y - handle[1]] : [x, y]);
    /** @type {number[]} */
    let to = p.slice(-2);
    if (name === "Z") {
      found.push({ name, at: [] });
      to = start;
    } else if (name === "M") {
      found.push({ name, at: to });
      start = to;
    } else if (name === "C" || name === "S") {
      const [first, second] = name === "C" ? [p.slice(0, 2), p.slice(2, 4)] : [mirrored("CS"), p.slice(0, 2)];
      curve(...first, ...second, ...to);
      handle = second;
    } else if (name === "Q" || name === "T") {
      handle = name === "Q" ? p.slice(0, 2) : mirrored("QT");
      const third = (/** @type {number} */ from, /** @type {number} */ by) => from + (2 / 3) * (by - from);
      curve(third(x, handle[0]), third(y, handle[1]), third(to[0], handle[0]), third(to[1], handle[1]), ...to);
    } else if (name === "A") {
      to = [p[5] + dx, p[6] + dy];
      for (const part of arcOf([x, y], to, p)) curve(...part);
    } else {
      if (name === "H") to = [p[0] + dx, y];
      else if (name === "V") to = [x, p[0] + dy];
      found.push({ name: "L", at: to });
    }
    [x, y] = to;
    before = name;
  }
  return found;
}

/**
 * An elliptical arc as Bézier curves of at most a quarter turn (SVG 1.1, appendix F.6).
 * @param {number[]} from
 * @param {number[]} to
 * @param {number[]} given radii, turn in degrees, and two flags
 */
function arcOf([x1, y1], [x2, y2], [rx, ry, turn, large, sweep]) {
  if (!rx || !ry || (x1 === x2 && y1 === y2)) return [[x1, y1, x2, y2, x2, y2]];
  const [sin, cos] = [Math.sin((turn * Math.PI) / 180), Math.cos((turn * Math.PI) / 180)];
  const [hx, hy] = [(x1 - x2) / 2, (y1 - y2) / 2];
  const [px, py] = [cos * hx + sin * hy, cos * hy - sin * hx];
  const grow = Math.max(1, Math.sqrt((px / rx) ** 2 + (py / ry) ** 2)); // radii that do not reach are made larger
  const [a, b] = [Math.abs(rx) * grow, Math.abs(ry) * grow];
  const rest = Math.max(0, (a * b) ** 2 - (a * py) ** 2 - (b * px) ** 2);
  const root = Math.sqrt(rest / ((a * py) ** 2 + (b * px) ** 2)) * (large === sweep ? -1 : 1);
  const [qx, qy] = [(root * a * py) / b, (-root * b * px) / a];
  const [cx, cy] = [cos * qx - sin * qy + (x1 + x2) / 2, sin * qx + cos * qy + (y1 + y2) / 2];
  const begin = Math.atan2((py - qy) / b, (px - qx) / a);
  let round = Math.atan2((-py - qy) / b, (-px - qx) / a) - begin;
  if (sweep && round < 0) round += 2 * Math.PI;
  if (!sweep && round > 0) round -= 2 * Math.PI;
  const n = Math.max(1, Math.ceil(Math.abs(round) / (Math.PI / 2) - 1e-9));
  const reach = (4 / 3) * Math.tan(round / n / 4);
  const place = (/** @type {number} */ u, /** @type {number} */ v) => [cx + cos * a * u - sin * b * v, cy + sin * a * u + cos * b * v];
  return Array.from({ length: n }, (_, i) => {
    const [s, t] = [begin + (round * i) / n, begin + (round * (i + 1)) / n];
    const first = place(Math.cos(s) - reach * Math.sin(s), Math.sin(s) + reach * Math.cos(s));
    const second = place(Math.cos(t) + reach * Math.sin(t), Math.sin(t) - reach * Math.cos(t));
    return [...first, ...second, ...(i === n - 1 ? [x2, y2] : place(Math.cos(t), Math.sin(t)))];
  });
}
