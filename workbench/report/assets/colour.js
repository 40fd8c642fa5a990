// Colour: viridis from seventeen of its colours, readable ink on it, and round ends for scales.

const TABLE = (() => {
  const stops =
    "440154 48186a 472d7b 424086 3b528b 33638d 2c728e 26828e 21918c 1f9f88 27ad81 3dbc74 5cc863 81d34d aadc32 d5e21a fde725"
      .split(" ")
      .map((hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)));
  return Array.from({ length: 256 }, (_, i) => {
    const at = (i / 255) * (stops.length - 1);
    const low = Math.min(Math.floor(at), stops.length - 2);
    return stops[low].map((c, k) => Math.round(c + (stops[low + 1][k] - c) * (at - low)));
  });
})();

/** [red, green, blue] for a place on the scale, 0 to 1. */
const colourAt = (t) => TABLE[Math.round(255 * Math.min(1, Math.max(0, t)))];

const css = (t) => `rgb(${colourAt(t).join(" ")})`;

/** Black or white, whichever is easier to read on the colour at t. */
function inkOn(t) {
  const [r, g, b] = colourAt(t).map((c) => (c / 255) ** 2.2);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.18 ? "#000" : "#fff";
}

/** The least round number that is not below the value. */
function ceiling(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10].find((step) => step * power >= value * 0.9999);
}

const gradient = () =>
  `linear-gradient(to right, ${Array.from({ length: 33 }, (_, i) => css(i / 32)).join(", ")})`;
