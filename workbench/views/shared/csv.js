// Tables as files that a spreadsheet reads.

/** @param {string} text */
const quoted = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);

/**
 * Text that a spreadsheet would take for a formula begins with an apostrophe instead.
 * @param {string} text
 */
const harmless = (text) => quoted(/^[=+\-@\t\r]/.test(text) ? `'${text}` : text);

/**
 * Rows of texts and numbers as CSV; a number that is not known is left empty.
 * @param {Iterable<(string | number)[]>} rows
 */
export function csvOf(rows) {
  const cell = (/** @type {string | number} */ value) => (typeof value === "string" ? harmless(value) : Number.isNaN(value) ? "" : `${value}`);
  return [...Array.from(rows, (row) => row.map(cell).join(",")), ""].join("\r\n");
}
