import assert from "node:assert/strict";
import { test } from "node:test";
import { Numbers } from "workbench/saliency_map/numbers.js";
import { correlated, standardise } from "workbench/saliency_map/rows.js";

const near = (a, b) => assert.ok(Math.abs(a - b) < 1e-9, `${a} is not ${b}`);

test("rows are standardised by themselves, and a constant row becomes zeros", () => {
  const found = standardise(Float64Array.of(1, 2, 3, 5, 5, 5), 2);
  near(found[0], -1);
  near(found[2], 1);
  assert.deepEqual([...found.subarray(3)], [0, 0, 0]);
});

test("correlations are Pearson's, over rows that are not special, and null where a row is constant", () => {
  const [a, b] = [Float64Array.of(1, 2, 4, 3, 2, 1, 7, 7, 7), Float64Array.of(2, 4, 8, 1, 2, 3, 1, 2, 3)].map((rows) => standardise(rows, 3));
  const { rows, all } = correlated(a, b, 3, [false, true, false]);
  near(rows[0], 1);
  near(rows[1], -1);
  assert.equal(rows[2], null);
  near(all, 2 / Math.sqrt(2 * 4)); // the constant row is zeros in one map alone
});

const facts = {
  tokens: ["a", "b"], special: [false, false], positions: 2, step: 1, spans: ["said", "saliency"],
  maps: [{ label: "saliency", unit: "", signed: false, cells: null }],
  attention: { layers: [3, 5], heads: 2, alignment: [[5, 1], [9, 0]], signed: false },
};
const attention = { data: Float32Array.from({ length: 16 }, (_, i) => i), shape: [2, 2, 2, 2] };
const numbers = new Numbers({ facts, blocks: { attention, strip0: { data: Float32Array.of(1, 2, 4, 3) }, spans: { data: Float32Array.of(0, 1, 2, 3, NaN, NaN, 4, 5) } } });
const nothing = { layer: null, heads: [], site: null };

test("the heads that are averaged follow the selection", () => {
  const pairs = (selection, mode = null) => numbers.chosen({ ...nothing, ...selection }, mode).pairs;
  assert.deepEqual(pairs({}), [[0, 0], [0, 1], [1, 0], [1, 1]]);
  assert.deepEqual(pairs({ layer: 5 }), [[1, 0], [1, 1]]);
  assert.deepEqual(pairs({ layer: 5, heads: [1, 7] }), [[1, 1]]);
  assert.deepEqual(pairs({ layer: 5, site: "encoder" }).length, 4); // of another site
  assert.deepEqual(pairs({}, "alignment"), [[1, 1]]); // the other one is of a layer that is not here
  assert.deepEqual([...numbers.attention([[0, 0], [1, 1]])], [6, 7, 8, 9]);
});

test("attention stands beside the map and their difference", () => {
  const { panels, r } = numbers.panels({ map: 0, scale: "row", heads: numbers.chosen(nothing, null) });
  assert.deepEqual(panels.map(({ name }) => name), ["attention", "saliency", "difference"]);
  near(r.rows[0], 1);
  near(r.rows[1], -1);
  assert.deepEqual(panels[1].tops, [[1, 2], [3, 4]]);
  assert.equal(numbers.panels({ map: 0, scale: "all", heads: null }).panels.length, 1);
});

test("spans of no strip stand above the spectrogram", () => {
  assert.deepEqual(numbers.lane, [0]);
  assert.deepEqual(numbers.span(0, 1), [2, 3]);
  assert.deepEqual(numbers.span(1, 0), [NaN, NaN]);
});
