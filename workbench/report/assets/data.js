// The data block: sites, tokens, and patterns that are decoded when a head is first looked at.

const DATA = JSON.parse(document.getElementById("data").textContent);

function bytesOf(text) {
  const raw = atob(text);
  return Uint8Array.from({ length: raw.length }, (_, i) => raw.charCodeAt(i));
}

const floatsOf = (text) => new Float32Array(bytesOf(text).buffer);

/** Byte 0: a key that the query may not see. Byte b: weight ((b - 1) / 254) squared. */
const weightOf = (byte) => (byte ? ((byte - 1) / 254) ** 2 : null);

/** The patterns of one site. `cells(head)` is rows x columns bytes; a cell is `block` x `block` tokens. */
class Patterns {
  constructor(site) {
    this.site = site;
    Object.assign(this, site.map);
  }

  lengthOf(row) {
    return this.packed ? row + 1 + this.columns - this.rows : this.columns;
  }

  cells(head) {
    if (this.cached?.head === head) return this.cached.cells;
    this.bytes ??= bytesOf(this.data);
    const size = this.bytes.length / this.site.heads;
    const cells = new Uint8Array(this.rows * this.columns);
    for (let row = 0, from = head * size; row < this.rows; row++) {
      const length = this.lengthOf(row);
      cells.set(this.bytes.subarray(from, from + length), row * this.columns);
      from += length;
    }
    this.cached = { head, cells };
    return cells;
  }

  /** Weight of the cell that holds this query and key, to 8 bits; null where the key may not be seen. */
  weight(head, query, key) {
    const [row, column] = [query, key].map((at) => Math.floor(at / this.block));
    return weightOf(this.cells(head)[row * this.columns + column]);
  }

  /** The largest weights of a row, exact: [{key, weight}], largest first. */
  largest(head, query) {
    this.keysOfTop ??= new (this.wide ? Uint32Array : Uint16Array)(bytesOf(this.topKeys).buffer);
    this.weightsOfTop ??= floatsOf(this.topWeights);
    const start = (head * this.site.queries + query) * this.top;
    return Array.from({ length: this.top }, (_, i) => ({
      key: this.keysOfTop[start + i],
      weight: this.weightsOfTop[start + i],
    })).filter(({ key, weight }) => key < this.site.keys && weight > 0);
  }

  /** Exact weight on the first key, or null when the page does not hold it. */
  onFirst(head, query) {
    if (!this.sink) return null;
    this.sinks ??= floatsOf(this.sink);
    return this.sinks[head * this.site.queries + query];
  }

  meanOnFirst(head) {
    const n = this.site.queries;
    const all = Array.from({ length: n }, (_, q) => this.onFirst(head, q)).filter(Number.isFinite);
    return all.length ? all.reduce((a, b) => a + b, 0) / all.length : null;
  }
}

const patternsOf = (site) => (site.map ? (site.patterns ??= new Patterns(site)) : null);

const tokenOf = (table, at) => (table === null ? null : DATA.tokens[table][at]);

const queryToken = (site, at) => tokenOf(site.queryTokens, at);
const keyToken = (site, at) => tokenOf(site.keyTokens, at);

/** Whether queries and keys are the same tokens, so that one strip shows both. */
const sameTokens = (site) => site.queries === site.keys && site.queryTokens === site.keyTokens;
