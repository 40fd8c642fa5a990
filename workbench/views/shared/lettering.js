// Texts as glyphs of fonts that are made of what the browser draws: any script, with the shapes seen on the page.

import { outlinesOf } from "./outlines.js";
import { EM } from "./truetype.js";

const SIZE = 264; // pixels for the height of letters, above which a browser draws outlines without hints
const MOST = 30 * EM; // of a glyph's width, which a font has 16 bits for
const EDGE = 2; // pixels without ink around what is drawn
const RIGHT_TO_LEFT = /[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc\u{10800}-\u{10fff}\u{1e800}-\u{1efff}\u200f\u202a-\u202e\u2066-\u2069]/u;
// Scripts whose letters look the same whatever stands beside them.
const SINGLE = /^[\p{Script=Latin}\p{Script=Greek}\p{Script=Cyrillic}\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Hangul}\p{Script=Common}\p{Script=Inherited}]+$/u;

const LETTERS = new Intl.Segmenter("en", { granularity: "grapheme" });

/** @type {CanvasRenderingContext2D | null} */
let pen = null;

function ready() {
  pen ??= /** @type {CanvasRenderingContext2D} */ (document.createElement("canvas").getContext("2d", { willReadFrequently: true }));
  return pen;
}

/** How wide a text is in a font as CSS writes one. @param {string} text @param {string} font */
export function widthOf(text, font) {
  const ink = ready();
  ink.font = font;
  return ink.measureText(text).width;
}

/** What of a text is drawn as one: letters, and words of scripts whose letters join. @param {string} text */
export function unitsOf(text) {
  if (RIGHT_TO_LEFT.test(text)) return [text];
  /** @type {string[]} */
  const found = [];
  let joins = false;
  for (const { segment } of LETTERS.segment(text)) {
    const joined = !SINGLE.test(segment);
    if (joined && joins) found[found.length - 1] += segment;
    else found.push(segment);
    joins = joined;
  }
  return found;
}

/** @typedef {import("./truetype.js").Glyph & { text: string, picture: HTMLCanvasElement | null, box: number[] }} Letter */

/** @type {Map<string, Letter>} font and text -> what has been drawn of it: the figures of a page share most letters */
const DRAWN = new Map();

/** A font of one family, weight and style, with the glyphs that have been asked for. */
export class Face {
  /** @param {string} style @param {string} weight @param {string} family */
  constructor(style, weight, family) {
    this.font = `${style} ${weight} ${SIZE}px ${family}`;
    /** @type {Map<string, number>} */
    this.numbers = new Map();
    /** @type {Letter[]} */
    this.glyphs = [{ text: "", outlines: [], advance: EM / 2, picture: null, box: [0, 0, 0, 0] }];
  }

  /** The number of a glyph. @param {string} text */
  glyph(text) {
    let number = this.numbers.get(text);
    if (number === undefined) {
      number = this.glyphs.length;
      this.numbers.set(text, number);
      const key = `${this.font} ${text}`;
      const letter = DRAWN.get(key) ?? this.drawn(text);
      DRAWN.set(key, letter);
      this.glyphs.push(letter);
    }
    return number;
  }

  /**
   * A text as glyphs with the places where they begin, in ems; it is `width` ems wide where that is given.
   * @param {string} text
   * @param {number} [width]
   */
  set(text, width) {
    const natural = widthOf(text, this.font) / SIZE;
    const stretch = width !== undefined && natural > 0 ? width / natural : 1;
    let until = "";
    return unitsOf(text).map((unit) => {
      until += unit; // with it, since letters stand closer before some than before others
      const at = (widthOf(until, this.font) - widthOf(unit, this.font)) / SIZE;
      return { number: this.glyph(unit), at: stretch * at };
    });
  }

  /**
   * Draw what is one glyph, and follow its outlines; colours, and what is too wide for a font, stay a picture.
   * @param {string} text
   * @returns {Letter}
   */
  drawn(text) {
    const ink = ready();
    ink.font = this.font;
    const size = ink.measureText(text);
    const advance = Math.round((size.width * EM) / SIZE);
    const [left, above] = [size.actualBoundingBoxLeft, size.actualBoundingBoxAscent].map((far) => Math.ceil(far) + EDGE);
    const [right, below] = [size.actualBoundingBoxRight, size.actualBoundingBoxDescent].map((far) => Math.ceil(far) + EDGE);
    const [width, height] = [left + right, above + below];
    const nothing = { text, outlines: [], advance: Math.min(advance, MOST), picture: null, box: [0, 0, 0, 0] };
    if (!text.trim() || width <= 2 * EDGE || height <= 2 * EDGE) return nothing;
    const sheet = document.createElement("canvas");
    Object.assign(sheet, { width, height });
    const own = /** @type {CanvasRenderingContext2D} */ (sheet.getContext("2d", { willReadFrequently: true }));
    own.font = this.font;
    own.fillText(text, left, above);
    const { data } = own.getImageData(0, 0, width, height);
    const cover = new Uint8Array(width * height);
    let colours = false;
    for (let i = 0; i < cover.length; i++) {
      cover[i] = data[4 * i + 3];
      colours ||= cover[i] > 40 && Math.max(data[4 * i], data[4 * i + 1], data[4 * i + 2]) > 24;
    }
    const box = [-left / SIZE, -above / SIZE, width / SIZE, height / SIZE];
    if (colours || advance > MOST) return { ...nothing, picture: sheet, box };
    const unit = (/** @type {number[]} */ [x, y]) => [Math.round(((x - left) * EM) / SIZE), Math.round(((above - y) * EM) / SIZE)];
    return { ...nothing, outlines: outlinesOf(cover, width, height).map((line) => line.map(unit)) };
  }
}
