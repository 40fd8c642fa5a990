import assert from "node:assert/strict";
import { test } from "node:test";
import { count, cut, exactly, moved, named, roughly } from "workbench/shared/dom.js";

test("a text is cut between letters, not within them", () => {
  assert.equal(cut("abcdef", 4), "abc…");
  assert.equal(cut("abcd", 4), "abcd");
  assert.equal(cut("😀😀😀😀", 3), "😀😀…");
});

test("a token is named with its place", () => {
  assert.equal(named("the", 4), "“the” (4)");
  assert.equal(named(null, 4), "position 4");
  assert.equal(named(undefined, 0), "position 0");
});

test("numbers are said exactly or roughly, and what is not known is said so", () => {
  assert.deepEqual([0, 0.123456789, 1234567, 1e-7, NaN, null].map(exactly), ["0", "0.123457", "1.235e+6", "1.000e-7", "not known", "not known"]);
  assert.deepEqual([0.123456, 1234, Infinity, NaN].map(roughly), ["0.123", "1230", "–", "–"]);
  assert.deepEqual([0, 8.1512e-6, -1e-5, 0.00012345, 1e-300].map(roughly), ["0", "8.15e−6", "−1e−5", "0.000123", "1e−300"]);
});

test("what is counted is one or several", () => {
  assert.deepEqual([0, 1, 1200].map((n) => count(n, "row")), ["0 rows", "1 row", "1,200 rows"]);
});

test("keys move within the rows and columns, and other keys are left alone", () => {
  assert.deepEqual(moved("ArrowUp", [0, 2], [3, 4]), [0, 2]);
  assert.deepEqual(moved("ArrowDown", [1, 2], [3, 4]), [2, 2]);
  assert.deepEqual(moved("ArrowRight", [1, 3], [3, 4]), [1, 3]);
  assert.deepEqual(moved("Home", [1, 3], [3, 4]), [1, 0]);
  assert.deepEqual(moved("End", [1, 0], [3, 4]), [1, 3]);
  assert.equal(moved("Enter", [0, 0], [3, 4]), null);
});
