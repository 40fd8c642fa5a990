// The selection that all views of a document share: on a page through this store, in a notebook through the kernel too.

const NOTHING = { layer: null, heads: [], query: null, key: null, token: null, site: null, example: null };

const STORE = Symbol.for("workbench.selection");

/** One store per document, however many modules ask for it. */
export function sharedSelection() {
  globalThis[STORE] ??= new Store();
  return globalThis[STORE];
}

class Store {
  constructor() {
    this.value = NOTHING;
    this.followers = new Set();
  }

  /** Change some of the selection; everyone who follows is told, unless nothing changed. */
  select(change) {
    const value = { ...this.value, ...change };
    if (JSON.stringify(value) === JSON.stringify(this.value)) return;
    this.value = value;
    for (const follower of [...this.followers]) follower(value);
  }

  /** Be told of every change; returns what ends that. */
  follow(told) {
    this.followers.add(told);
    return () => this.followers.delete(told);
  }
}

/** The selection as the part of an address after #: L5H1+3,q=12,k=4,t=7,s=site,x=2. */
export function toAddress({ layer, heads, query, key, token, site, example }) {
  const where = layer === null ? [] : [`L${layer}${heads.length ? `H${heads.join("+")}` : ""}`];
  const pairs = [["q", query], ["k", key], ["t", token], ["s", site], ["x", example]].filter(([, value]) => value !== null);
  return [...where, ...pairs.map(([name, value]) => `${name}=${encodeURIComponent(value)}`)].join(",");
}

/** The change of selection that an address asks for; what it says wrongly is left out. */
export function fromAddress(text) {
  const change = {};
  for (const part of text.replace(/^#/, "").split(",")) {
    const where = /^L(\d{1,6})(?:H(\d{1,6}(?:\+\d{1,6})*))?$/.exec(part);
    const pair = /^([qktx])=(\d{1,9})$/.exec(part);
    if (where) Object.assign(change, { layer: Number(where[1]), heads: where[2] ? where[2].split("+").map(Number) : [] });
    else if (pair) change[{ q: "query", k: "key", t: "token", x: "example" }[pair[1]]] = Number(pair[2]);
    else if (part.startsWith("s=")) {
      try {
        change.site = decodeURIComponent(part.slice(2));
      } catch {
        // not an address that we wrote
      }
    }
  }
  return change;
}
