import assert from "node:assert/strict";
import { test } from "node:test";
import { sharedSelection } from "workbench/shared/selection.js";

const NOTHING = { layer: null, heads: [], query: null, key: null, token: null, site: null, example: null };
const UNKNOWN = { model: null, inputs: null };

/** A store of its own, as a document has one. */
function fresh() {
  delete globalThis[Symbol.for("workbench.selection")];
  return sharedSelection();
}

test("an address gives back the selection that it was made of", () => {
  const all = { layer: 5, heads: [1, 3], query: 12, key: 4, token: 7, site: "decoder.0,1#=+", example: 2 };
  for (const selection of [all, { ...NOTHING, layer: 0 }, { ...NOTHING, site: "ü ☃" }, { ...NOTHING, query: 0 }]) {
    const made = fresh();
    made.select(UNKNOWN, selection);
    const address = made.address();
    const read = fresh();
    read.read(`#${address}`);
    assert.deepEqual(read.of(UNKNOWN).value, selection, address);
  }
  assert.equal(fresh().address(), "");
});

test("a head without a site is meant wherever it is", () => {
  const store = fresh();
  store.read("#L0H1,s=encoder.0");
  assert.equal(store.of(UNKNOWN).value.site, "encoder.0");
  store.read("#q=2");
  assert.equal(store.of(UNKNOWN).value.site, "encoder.0");
  store.read("#L1H3");
  assert.deepEqual(store.of(UNKNOWN).value, { ...NOTHING, layer: 1, heads: [3], query: 2 });
  store.read("#s=decoder.1,L1H0"); // in any order
  assert.equal(store.of(UNKNOWN).value.site, "decoder.1");
});

test("what views begin with is known before they are drawn", () => {
  const store = fresh();
  store.begin(UNKNOWN, {});
  store.begin(UNKNOWN, { layer: 2, heads: [5] });
  store.begin(UNKNOWN, { layer: 3, heads: [1] });
  assert.deepEqual(store.of(UNKNOWN).value, { ...NOTHING, layer: 2, heads: [5] });
  assert.deepEqual(store.of(UNKNOWN, { layer: 3, heads: [1] }).value, { ...NOTHING, layer: 3, heads: [1] });
});

test("what an address says wrongly is left out", () => {
  for (const wrong of ["#L1H", "#t=-1,q=x", "#s=%E0%A4", "#<script>", "#q=1e9", "#__proto__=1", "#t=9999999999", "#9.q=1", "#0.q=1", "#2.L1"]) {
    const store = fresh();
    store.read(wrong);
    assert.deepEqual(store.of(UNKNOWN).value, NOTHING, wrong);
  }
  const store = fresh();
  store.read("#nonsense,q=3");
  assert.equal(store.of(UNKNOWN).value.query, 3);
});

test("all views share one store, and are told of changes alone", () => {
  const store = fresh();
  assert.equal(sharedSelection(), store);
  const told = [];
  const shared = store.of(UNKNOWN);
  const end = shared.follow((value) => told.push(value.token));
  shared.select({ token: 3 });
  shared.select({ token: 3 });
  shared.select({ token: null });
  end();
  shared.select({ token: 4 });
  assert.deepEqual(told, [3, null]);
});

test("heads are chosen in a model, positions in its inputs", () => {
  const store = fresh();
  const [one, other, same] = [store.of({ model: "a", inputs: "x" }), store.of({ model: "b", inputs: "y" }), store.of({ model: "b", inputs: "x" })];
  one.select({ layer: 1, heads: [2], query: 3 });
  other.select({ layer: 5, heads: [0] });
  assert.deepEqual(one.value, { ...NOTHING, layer: 1, heads: [2], query: 3 });
  assert.deepEqual(other.value, { ...NOTHING, layer: 5, heads: [0] });
  assert.deepEqual(same.value, { ...NOTHING, layer: 5, heads: [0], query: 3 });
  const address = store.address();
  assert.equal(address, "L1H2,q=3,2.L5H0");
  const again = fresh();
  for (const scope of [one.scope, other.scope]) again.join(scope);
  again.read(address);
  assert.deepEqual(again.value(other.scope), other.value);
  assert.deepEqual(again.value(one.scope), one.value);
});

test("a view that does not know its model follows the only one", () => {
  const store = fresh();
  const unknown = store.of(UNKNOWN);
  const known = store.of({ model: "a", inputs: null });
  known.select({ layer: 1 });
  assert.equal(unknown.value.layer, 1);
  const told = [];
  unknown.follow(({ layer }) => told.push(layer));
  store.join({ model: "b", inputs: null });
  assert.deepEqual(told, [null]);
});

test("what a view begins with gives way to what is chosen", () => {
  const store = fresh();
  const scope = { model: "a", inputs: "x" };
  const first = store.of(scope, { layer: 3, heads: [1], query: 7, key: null });
  const second = store.of(scope, { layer: 0, heads: [4] });
  const plain = store.of(scope); // begins with nothing of its own: as another view of the same
  const other = store.of({ model: "a", inputs: "y" });
  assert.deepEqual(first.value, { ...NOTHING, layer: 3, heads: [1], query: 7 });
  assert.deepEqual(second.value, { ...NOTHING, layer: 0, heads: [4], query: 7 });
  assert.deepEqual(plain.value, first.value);
  assert.deepEqual(other.value, { ...NOTHING, layer: 3, heads: [1] });
  assert.equal(store.address(), ""); // nobody has chosen
  second.select({ query: 2, key: 1 });
  assert.deepEqual(first.value, { ...NOTHING, layer: 3, heads: [1], query: 2, key: 1 });
  plain.select({ layer: null, heads: [], site: null });
  assert.deepEqual([first, second, plain].map(({ value }) => value.heads), [[], [], []]);
});

test("views are told when another one begins with what they lack", () => {
  const store = fresh();
  const told = [];
  store.of({ model: "a", inputs: null }).follow(({ layer }) => told.push(layer));
  store.of({ model: "a", inputs: null }, { layer: 2, heads: [0] });
  assert.deepEqual(told, [2]);
});

test("what the kernel has is taken; of what it has nothing, only once someone chose", () => {
  const store = fresh();
  const view = store.of({ model: "a", inputs: "x" }, { layer: 3, heads: [1] });
  view.take({ ...NOTHING, query: 5 });
  assert.deepEqual(view.value, { ...NOTHING, layer: 3, heads: [1], query: 5 });
  view.take({ ...NOTHING, layer: 2, heads: [0], query: 5 });
  assert.deepEqual(view.value, { ...NOTHING, layer: 2, heads: [0], query: 5 });
  view.take({ ...NOTHING });
  assert.deepEqual(view.value, NOTHING);
});
