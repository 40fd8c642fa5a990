import assert from "node:assert/strict";
import { test } from "node:test";
import { fromAddress, sharedSelection, toAddress } from "workbench/shared/selection.js";

const NOTHING = { layer: null, heads: [], query: null, key: null, token: null, site: null, example: null };

test("an address gives back the selection that it was made of", () => {
  const all = { layer: 5, heads: [1, 3], query: 12, key: 4, token: 7, site: "decoder.0,1#=+", example: 2 };
  for (const selection of [all, { ...NOTHING, layer: 0 }, { ...NOTHING, site: "ü ☃" }, { ...NOTHING, query: 0 }]) {
    assert.deepEqual({ ...NOTHING, ...fromAddress(`#${toAddress(selection)}`) }, selection);
  }
  assert.equal(toAddress(NOTHING), "");
});

test("what an address says wrongly is left out", () => {
  for (const wrong of ["#L1H", "#t=-1,q=x", "#s=%E0%A4", "#<script>", "#q=1e9", "#__proto__=1", "#t=9999999999"]) {
    assert.deepEqual(fromAddress(wrong), {}, wrong);
  }
  assert.deepEqual(fromAddress("#nonsense,q=3"), { query: 3 });
});

test("all views share one store, and are told of changes alone", () => {
  const store = sharedSelection();
  assert.equal(sharedSelection(), store);
  const told = [];
  const end = store.follow((value) => told.push(value.token));
  store.select({ token: 3 });
  store.select({ token: 3 });
  store.select({ token: null });
  end();
  store.select({ token: 4 });
  assert.deepEqual(told, [3, null]);
});
