// Rows of maps made comparable, and how alike they are.

/**
 * Rows of a flat map less their mean, over their deviation; a constant row becomes zeros. NaN stays, and does not count.
 * @param {Float64Array} values
 * @param {number} rows
 */
export function standardise(values, rows) {
  const columns = values.length / rows;
  const found = new Float64Array(values.length);
  for (let row = 0; row < rows; row++) {
    const part = values.subarray(row * columns, (row + 1) * columns);
    const known = part.filter((value) => !Number.isNaN(value));
    let [sum, squares, largest] = [0, 0, 0];
    for (const value of known) {
      sum += value;
      largest = Math.max(largest, Math.abs(value));
    }
    const mean = sum / known.length;
    for (const value of known) squares += (value - mean) ** 2;
    const spread = Math.sqrt(squares / Math.max(1, known.length - 1));
    const varies = spread > 1e-7 * largest; // by more than rounding
    for (let i = 0; i < columns; i++) found[row * columns + i] = Number.isNaN(part[i]) ? NaN : varies ? (part[i] - mean) / spread : 0;
  }
  return found;
}

/**
 * Pearson's r of two maps with standardised rows: of each row, and of all rows that are not special. null: constant.
 * @param {Float64Array} a
 * @param {Float64Array} b
 * @param {number} rows
 * @param {boolean[]} special
 */
export function correlated(a, b, rows, special) {
  const columns = a.length / rows;
  const over = (/** @type {number} */ from, /** @type {number} */ to) => {
    let [ab, aa, bb] = [0, 0, 0];
    for (let i = from; i < to; i++) {
      ab += a[i] * b[i];
      aa += a[i] * a[i];
      bb += b[i] * b[i];
    }
    return { ab, aa, bb };
  };
  const r = (/** @type {{ ab: number, aa: number, bb: number }} */ { ab, aa, bb }) => (aa > 0 && bb > 0 ? ab / Math.sqrt(aa * bb) : null);
  const each = Array.from({ length: rows }, (_, row) => over(row * columns, (row + 1) * columns));
  const kept = each.filter((_, row) => !special[row]);
  return { rows: each.map(r), all: r(kept.reduce((sum, one) => ({ ab: sum.ab + one.ab, aa: sum.aa + one.aa, bb: sum.bb + one.bb }), { ab: 0, aa: 0, bb: 0 })) };
}
