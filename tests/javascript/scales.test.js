import assert from "node:assert/strict";
import { test } from "node:test";
import { ceiling, greatest, nearestTo, rootTick, roundTicks, roundUp, shortNumber } from "workbench/shared/scales.js";

test("a round number is the least that is not below the value", () => {
  for (const [value, round] of [[0.137, 0.15], [42, 50], [1, 1], [0.0021, 0.0025], [9.9, 10], [1.2e6, 1.5e6]]) {
    assert.ok(Math.abs(ceiling(value) - round) < 1e-12 * round, `${value}: ${ceiling(value)}`);
  }
  for (const none of [0, -3, NaN]) assert.equal(ceiling(none), 1);
  assert.deepEqual([3, 10, 11, 0.6].map((value) => roundUp(value)), [5, 10, 20, 1]);
});

test("ticks are round, within the range, and about as many as wanted", () => {
  assert.deepEqual(roundTicks(0, 1), [0, 0.2, 0.4, 0.6, 0.8, 1]);
  assert.deepEqual(roundTicks(-3, 3, 6), [-3, -2, -1, 0, 1, 2, 3]);
  assert.deepEqual(roundTicks(0.1, 0.35, 5), [0.1, 0.15, 0.2, 0.25, 0.3, 0.35]);
  for (const [low, high] of [[0, 7], [-1e-5, 2e-5], [123456, 654321], [0.99, 1.01], [2, 2]]) {
    for (const wanted of [2, 5, 8]) {
      const ticks = roundTicks(low, high, wanted);
      assert.ok(ticks.length <= wanted + 1, `${low} to ${high}: ${ticks}`);
      assert.ok(ticks.every((tick) => tick >= low - 1e-9 * Math.abs(low) && tick <= high + 1e-9 * Math.abs(high)), `${ticks}`);
    }
  }
});

test("the middle tick of a scale of square roots is round", () => {
  for (const [top, tick] of [[1, 0.2], [1.5, 0.5], [2, 0.5], [3, 1], [5, 1], [0.5, 0.1], [80, 20]]) {
    assert.ok(Math.abs(rootTick(top) - tick) < 1e-9, `${top}: ${rootTick(top)}`);
    assert.ok(Math.abs(Math.sqrt(rootTick(top) / top) - 0.5) < 0.1);
  }
});

test("numbers beside ticks are short", () => {
  assert.deepEqual([0, 0.25, 12345.6, 1e5, 2e-4, -3e7].map(shortNumber), ["0", "0.25", "12350", "1e+5", "2e−4", "−3e+7"]);
});

test("the nearest value is found, the first of equal ones", () => {
  assert.equal(nearestTo([1, 2, 4, 8], 5.5), 2);
  assert.equal(nearestTo([1, 3], 2), 0);
  assert.equal(nearestTo([7], -1), 0);
});

test("what is not finite does not make a scale", () => {
  assert.equal(greatest([1, NaN, -3, Infinity, -Infinity]), 3);
  assert.equal(greatest([NaN, Infinity]), 0);
  assert.equal(greatest([]), 0);
});
