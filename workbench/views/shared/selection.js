// What is selected, which all views of a document share that show the same model or the same inputs: on a page through
// this store, in a notebook through the kernel too.

const NOTHING = { layer: null, heads: [], query: null, key: null, token: null, site: null, example: null };
/** @type {[string, string[]][]} what is chosen in a model, and what in its inputs */
const PARTS = [["model", ["layer", "heads", "site"]], ["inputs", ["query", "key", "token", "example"]]];

const STORE = Symbol.for("workbench.selection");

/** One store per document, however many modules ask for it. */
export function sharedSelection() {
  globalThis[STORE] ??= new Store();
  return globalThis[STORE];
}

/** A selection's values of one part, or nothing where none of them is set. */
function partOf(selection, names) {
  const set = names.some((name) => name in selection && JSON.stringify(selection[name]) !== JSON.stringify(NOTHING[name]));
  return set ? Object.fromEntries(names.filter((name) => name in selection).map((name) => [name, selection[name]])) : undefined;
}

/** A scope says which model's heads and which inputs' positions are chosen; null: those of the only one there is. */
class Store {
  constructor() {
    this.chosen = { model: new Map(), inputs: new Map() };
    this.begun = { model: new Map(), inputs: new Map() };
    this.known = { model: [], inputs: [] };
    this.followers = new Set();
    /** @type {() => void} called after every change of what is selected anywhere */
    this.changed = () => {};
    this.last = "";
  }

  /** Make a scope known, in order of appearance. */
  join(scope) {
    for (const [part] of PARTS) if (scope[part] !== null && !this.known[part].includes(scope[part])) this.known[part].push(scope[part]);
    this.tell();
  }

  /** Make known what a view begins with: views of its scope that begin with nothing show that, of several the first. */
  begin(scope, first) {
    for (const [part, names] of PARTS) {
      const own = partOf(first, names);
      const name = this.name(part, scope);
      if (own && !this.begun[part].has(name)) this.begun[part].set(name, own);
    }
    this.join(scope);
  }

  /** What a view selects from and follows; `first` is what it begins with. */
  of(scope, first = {}) {
    this.begin(scope, first);
    return new Scoped(this, scope, first);
  }

  name(part, scope) {
    return scope[part] ?? (this.known[part].length === 1 ? this.known[part][0] : "");
  }

  /** All names of scopes, the last one for views that do not know theirs. */
  names(part) {
    return this.known[part].length === 1 ? this.known[part] : [...this.known[part], ""];
  }

  /** What is shown in a scope: of each part what was chosen, else what the view begins with, else what another one does. */
  value(scope, first = {}) {
    const parts = PARTS.map(([part, names]) => {
      const name = this.name(part, scope);
      return this.chosen[part].get(name) ?? partOf(first, names) ?? this.begun[part].get(name);
    });
    return Object.assign({ ...NOTHING }, ...parts);
  }

  /** Change some of what is shown in a scope. */
  select(scope, change, first = {}) {
    const shown = this.value(scope, first);
    for (const [part, names] of PARTS) {
      if (!names.some((name) => name in change)) continue;
      this.chosen[part].set(this.name(part, scope), Object.fromEntries(names.map((name) => [name, name in change ? change[name] : shown[name]])));
    }
    this.tell();
  }

  /** Tell everyone for whom something changed. */
  tell() {
    for (const follower of [...this.followers]) {
      const value = this.value(follower.scope, follower.first);
      if (JSON.stringify(value) === JSON.stringify(follower.value)) continue;
      follower.value = value;
      follower.told(value);
    }
    const address = this.address();
    if (address === this.last) return;
    this.last = address;
    this.changed();
  }

  /** What is selected as the part of an address after #: L5H1+3,q=12 of the first scopes, 2.L0H3 of the second model. */
  address() {
    const most = Math.max(...PARTS.map(([part]) => this.names(part).length));
    const parts = Array.from({ length: most }, (_, at) => {
      const chosen = { ...NOTHING, ...this.chosen.model.get(this.names("model")[at]), ...this.chosen.inputs.get(this.names("inputs")[at]) };
      return toAddress(chosen).map((each) => (at ? `${at + 1}.${each}` : each));
    });
    return parts.flat().join(",");
  }

  /** Take the selections that an address gives; what it says wrongly is left out. */
  read(text) {
    const changes = new Map();
    for (const part of text.replace(/^#/, "").split(",")) {
      const [, number, rest] = /^(?:(\d{1,3})\.)?(.*)$/s.exec(part);
      const at = number ? Number(number) - 1 : 0;
      const said = fromAddress(rest);
      // A head without a site is meant wherever it is, not at the site that was chosen before.
      const anywhere = "layer" in said ? { site: null } : {};
      changes.set(at, { ...anywhere, ...changes.get(at), ...said });
    }
    for (const [at, said] of changes) {
      const scope = Object.fromEntries(PARTS.map(([of]) => [of, this.names(of)[at]]));
      const change = Object.fromEntries(Object.entries(said).filter(([name]) => scope[PARTS.find(([, names]) => names.includes(name))[0]] !== undefined));
      if (Object.keys(change).length) this.select({ model: scope.model ?? null, inputs: scope.inputs ?? null }, change);
    }
  }
}

/** The selection of one scope, as a view sees it. */
class Scoped {
  constructor(store, scope, first) {
    this.store = store;
    this.scope = scope;
    this.first = first;
  }

  get value() {
    return this.store.value(this.scope, this.first);
  }

  /** Change some of the selection; everyone who follows is told, unless nothing changed. */
  select(change) {
    this.store.select(this.scope, change, this.first);
  }

  /** Take what the kernel has; a part of which it has nothing stays as it is until someone chooses in it. */
  take(selection) {
    const { store, scope } = this;
    const parts = PARTS.filter(([part, names]) => partOf(selection, names) || store.chosen[part].has(store.name(part, scope)));
    const names = parts.flatMap(([, each]) => each).filter((name) => name in selection);
    if (names.length) this.select(Object.fromEntries(names.map((name) => [name, selection[name]])));
  }

  /** Be told of every change; returns what ends that. */
  follow(told) {
    const follower = { scope: this.scope, first: this.first, told, value: this.value };
    this.store.followers.add(follower);
    return () => this.store.followers.delete(follower);
  }
}

/** A selection as parts of an address: L5H1+3, q=12, k=4, t=7, s=site, x=2. */
function toAddress({ layer, heads, query, key, token, site, example }) {
  const where = layer === null ? [] : [`L${layer}${heads.length ? `H${heads.join("+")}` : ""}`];
  const pairs = [["q", query], ["k", key], ["t", token], ["s", site], ["x", example]].filter(([, value]) => value !== null);
  return [...where, ...pairs.map(([name, value]) => `${name}=${encodeURIComponent(value)}`)];
}

/** The change of selection that a part of an address asks for. */
function fromAddress(part) {
  const where = /^L(\d{1,6})(?:H(\d{1,6}(?:\+\d{1,6})*))?$/.exec(part);
  const pair = /^([qktx])=(\d{1,9})$/.exec(part);
  if (where) return { layer: Number(where[1]), heads: where[2] ? where[2].split("+").map(Number) : [] };
  if (pair) return { [{ q: "query", k: "key", t: "token", x: "example" }[pair[1]]]: Number(pair[2]) };
  try {
    return part.startsWith("s=") ? { site: decodeURIComponent(part.slice(2)) } : {};
  } catch {
    return {}; // not an address that we wrote
  }
}
