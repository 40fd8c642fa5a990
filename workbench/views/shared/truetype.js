// A TrueType font of given outlines: what a PDF needs of one, and no more.

export const EM = 1000; // units of a font for the height of its letters

/**
 * @typedef {object} Glyph
 * @property {number[][][]} outlines places [x, y], whole units, y upwards; what is inside lies to the right
 * @property {number} advance in units
 */

/** Numbers of 1, 2 and 4 bytes, the high byte first. */
class Bytes {
  /** @type {number[]} */
  all = [];

  /** @param {number[]} values */
  one(...values) {
    for (const value of values) this.all.push(value & 255);
    return this;
  }

  /** @param {number[]} values */
  two(...values) {
    for (const value of values) this.all.push((value >> 8) & 255, value & 255);
    return this;
  }

  /** @param {number[]} values */
  four(...values) {
    for (const value of values) this.all.push((value >>> 24) & 255, (value >>> 16) & 255, (value >>> 8) & 255, value & 255);
    return this;
  }

  /** Fill up to whole words. */
  even() {
    while (this.all.length % 4) this.all.push(0);
    return this;
  }
}

const FLAGS = { onCurve: 1, shortX: 2, shortY: 4, sameX: 16, sameY: 32 };

/** @param {number[][]} places */
function boundsOf(places) {
  const bounds = [Infinity, Infinity, -Infinity, -Infinity];
  for (const [x, y] of places) {
    bounds[0] = Math.min(bounds[0], x);
    bounds[1] = Math.min(bounds[1], y);
    bounds[2] = Math.max(bounds[2], x);
    bounds[3] = Math.max(bounds[3], y);
  }
  return places.length ? bounds : [0, 0, 0, 0];
}

/** One entry of the table of glyphs. @param {number[][][]} outlines */
function shape(outlines) {
  const made = new Bytes();
  const places = outlines.flat();
  if (!places.length) return made;
  made.two(outlines.length, ...boundsOf(places));
  let last = -1;
  for (const outline of outlines) {
    last += outline.length;
    made.two(last);
  }
  made.two(0); // no instructions
  const [flags, across, up] = [new Bytes(), new Bytes(), new Bytes()];
  let [x, y] = [0, 0];
  for (const [toX, toY] of places) {
    let flag = FLAGS.onCurve;
    for (const [by, into, short, same] of /** @type {[number, Bytes, number, number][]} */ ([[toX - x, across, FLAGS.shortX, FLAGS.sameX], [toY - y, up, FLAGS.shortY, FLAGS.sameY]])) {
      if (by === 0) flag |= same;
      else if (Math.abs(by) < 256) {
        flag |= short | (by > 0 ? same : 0); // where a step is short, this one says its sign
        into.one(Math.abs(by));
      } else into.two(by);
    }
    flags.one(flag);
    [x, y] = [toX, toY];
  }
  for (const part of [flags, across, up]) for (const byte of part.all) made.all.push(byte);
  return made.even();
}

/** @param {number[]} bytes */
function sum(bytes) {
  let found = 0;
  for (let i = 0; i < bytes.length; i += 4) found = (found + ((bytes[i] << 24) | ((bytes[i + 1] ?? 0) << 16) | ((bytes[i + 2] ?? 0) << 8) | (bytes[i + 3] ?? 0))) >>> 0;
  return found;
}

/**
 * The font file. Glyph 0 is the one for what is missing.
 * @param {Glyph[]} glyphs
 */
export function trueType(glyphs) {
  const bounds = boundsOf(glyphs.flatMap(({ outlines }) => outlines.flat()));
  const [glyf, loca, hmtx] = [new Bytes(), new Bytes().four(0), new Bytes()];
  for (const { outlines, advance } of glyphs) {
    for (const byte of shape(outlines).all) glyf.all.push(byte);
    loca.four(glyf.all.length);
    hmtx.two(advance, boundsOf(outlines.flat())[0]);
  }
  const n = glyphs.length;
  const most = (/** @type {(glyph: Glyph) => number} */ of) => glyphs.reduce((top, glyph) => Math.max(top, of(glyph)), 0);
  const widest = most(({ advance }) => advance);
  const head = new Bytes().four(0x10000, 0x10000, 0, 0x5f0f3cf5).two(3, EM).four(0, 0, 0, 0).two(...bounds, 0, 8, 2, 1, 0);
  const tables = {
    glyf,
    head,
    hhea: new Bytes().four(0x10000).two(bounds[3], bounds[1], 0, widest, bounds[0], 0, bounds[2], 1, 0, 0, 0, 0, 0, 0, 0, n),
    hmtx,
    loca,
    maxp: new Bytes().four(0x10000).two(n, most(({ outlines }) => outlines.flat().length), most(({ outlines }) => outlines.length), 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0),
  };
  const names = /** @type {(keyof typeof tables)[]} */ (Object.keys(tables).sort());
  const power = Math.floor(Math.log2(names.length));
  const file = new Bytes().four(0x10000).two(names.length, 16 * 2 ** power, power, 16 * (names.length - 2 ** power));
  let at = 12 + 16 * names.length;
  for (const name of names) {
    const length = tables[name].all.length;
    file.one(...Array.from(name, (letter) => letter.charCodeAt(0))).four(sum(tables[name].all), at, length);
    at += tables[name].even().all.length;
  }
  const place = file.all.length + names.slice(0, names.indexOf("head")).reduce((before, name) => before + tables[name].all.length, 0) + 8;
  const whole = Uint8Array.from(names.reduce((all, name) => all.concat(tables[name].all), file.all));
  new DataView(whole.buffer).setUint32(place, 0xb1b0afba - sum(Array.from(whole)));
  return whole;
}
