// The arithmetic of axes and colour bars: round numbers, ticks, the nearest value.

/**
 * The least of `steps` times a power of ten that is not below the value; both above 0.
 * @param {number} value
 * @param {number[]} [steps]
 */
export function roundUp(value, steps = [1, 2, 5, 10]) {
  const power = 10 ** Math.floor(Math.log10(value));
  return power * (steps.find((step) => step * power >= value * 0.9999) ?? steps[steps.length - 1]);
}

/**
 * The least round number that is not below the value; 1 where there is none above 0.
 * @param {number} value
 */
export const ceiling = (value) => (value > 0 ? roundUp(value, [1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10]) : 1);

/**
 * The round number that stands near the middle of a scale of square roots that ends at `top`.
 * @param {number} top
 */
export function rootTick(top) {
  const power = 10 ** Math.floor(Math.log10(top / 4));
  const far = (/** @type {number} */ value) => Math.abs(Math.log((4 * value) / top));
  return [1, 2, 5, 10].map((step) => step * power).reduce((best, value) => (far(value) < far(best) ? value : best));
}

/**
 * The largest magnitude that a scale can end at: values that are not finite lie beyond its ends.
 * @param {Iterable<number>} values
 */
export function greatest(values) {
  let top = 0;
  for (const value of values) if (Number.isFinite(value)) top = Math.max(top, Math.abs(value));
  return top;
}

/**
 * Round numbers from low to high, about `wanted` of them.
 * @param {number} low
 * @param {number} high
 */
export function roundTicks(low, high, wanted = 5) {
  const step = roundUp((high - low || 1) / wanted, [1, 2, 2.5, 5, 10]);
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

/**
 * A number beside a tick: four digits, in powers of ten when it is very small or large.
 * @param {number} value
 */
export const shortNumber = (value) => (Math.abs(value) >= 1e5 || (value !== 0 && Math.abs(value) < 1e-3) ? value.toExponential(0) : `${Number(value.toPrecision(4))}`).replaceAll("-", "−");

/**
 * The index of the number that is nearest to x.
 * @param {ArrayLike<number>} xs
 * @param {number} x
 */
export function nearestTo(xs, x) {
  let best = 0;
  for (let i = 1; i < xs.length; i++) if (Math.abs(xs[i] - x) < Math.abs(xs[best] - x)) best = i;
  return best;
}
