// Colour: sequential and diverging scales, and readable ink on them.

/** @param {string} stops */
function tableOf(stops) {
  const rgb = stops.split(" ").map((hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)));
  return Array.from({ length: 256 }, (_, i) => {
    const at = (i / 255) * (rgb.length - 1);
    const low = Math.min(Math.floor(at), rgb.length - 2);
    return rgb[low].map((c, k) => Math.round(c + (rgb[low + 1][k] - c) * (at - low)));
  });
}

/** @type {Record<string, number[][]>} */
const SEQUENTIAL = {
  light: tableOf("f7f7f4 e3eef0 c4e2e4 9bd1d4 6fbcc6 4aa3bb 3587ad 2f6a9e 324c8a 352f6d 2a1548 1a0a2e"),
  dark: tableOf("1c2029 29285a 38468a 33638d 2c728e 26828e 21918c 1f9f88 27ad81 3dbc74 5cc863 81d34d aadc32 d5e21a fde725"),
};
/** @type {Record<string, number[][]>} */
const DIVERGING = {
  light: tableOf("1b2f63 24509b 3b7cbf 7fb0d9 c2dcec f4f4f2 f6d0b4 e69b72 cc5f45 a12b33 681221"),
  dark: tableOf("a6d4ff 6fb0ea 3f86c6 275a8f 1d3856 24262b 52261f 8c3b2b c25c3d ec9165 ffcba4"),
};

/**
 * [red, green, blue] of the sequential scale, from 0 to 1; 0 is close to the background of the theme, where nothing is.
 * @param {number} t
 * @param {string} theme
 */
export const colourAt = (t, theme) => SEQUENTIAL[theme][Math.round(255 * Math.min(1, Math.max(0, t)))];

/**
 * [red, green, blue] of the diverging scale, from −1 to 1; the middle is the background of the theme.
 * @param {number} t
 * @param {string} theme
 */
export const divergingAt = (t, theme) => DIVERGING[theme][Math.round(127.5 + 127.5 * Math.min(1, Math.max(-1, t)))];

/** @type {Map<string, number[]>} */
const READ = new Map();
/** @type {CanvasRenderingContext2D | null} */
let pen = null;

/**
 * [red, green, blue] of a colour as a browser reads it: "white", "#111", "rgb(1 2 3)". What it cannot read is black.
 * @param {string} colour
 * @returns {number[]}
 */
export function rgbOf(colour) {
  if (!READ.has(colour)) {
    pen ??= /** @type {CanvasRenderingContext2D} */ (document.createElement("canvas").getContext("2d", { willReadFrequently: true }));
    pen.fillStyle = "#000";
    pen.fillStyle = colour;
    pen.fillRect(0, 0, 1, 1);
    READ.set(colour, [...pen.getImageData(0, 0, 1, 1).data.subarray(0, 3)]);
  }
  return READ.get(colour) ?? [0, 0, 0];
}

/** @param {number[]} rgb */
export const css = (rgb) => `rgb(${rgb.join(" ")})`;

/**
 * Black or white, whichever is easier to read on a colour.
 * @param {number[]} rgb
 */
export function inkOn(rgb) {
  const [r, g, b] = rgb.map((c) => (c <= 10.31 ? c / 3294.6 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
}

/**
 * A CSS gradient of a scale of the theme from `at(0, theme)` to `at(1, theme)`.
 * @param {(t: number, theme: string) => number[]} at
 * @param {string} [theme]
 */
export const gradient = (at, theme = "light") => `linear-gradient(to right, ${Array.from({ length: 33 }, (_, i) => css(at(i / 32, theme))).join(", ")})`;
