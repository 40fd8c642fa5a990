import assert from "node:assert/strict";
import { test } from "node:test";
import { segmentsOf } from "workbench/shared/paths.js";

const told = (d) => segmentsOf(d).map(({ name, at }) => [name, ...at.map((value) => Number(value.toFixed(6)))]);

test("relative and short commands become absolute moves and lines", () => {
  const square = [["M", 1, 2], ["L", 4, 2], ["L", 4, 6], ["L", 1, 6], ["Z"]];
  for (const d of ["M1 2L4 2L4 6L1 6Z", "m1,2l3,0l0,4l-3,0z", "M1 2H4V6H1Z", "m1 2h3v4h-3z", "M1 2 4 2 4 6 1 6z", "M1-.5e1m0 7h3v4H1Z"]) {
    const found = told(d);
    assert.deepEqual(d.includes("e") ? found.slice(1) : found, square, d);
  }
  assert.deepEqual(told("M1 1l1 1zl2 0"), [["M", 1, 1], ["L", 2, 2], ["Z"], ["L", 3, 1]]); // from where it was closed
  assert.deepEqual(told(""), []);
});

test("curves keep their handles, and mirror those of the curve before", () => {
  assert.deepEqual(told("M0 0C1 0 2 1 2 2S3 4 4 4"), [["M", 0, 0], ["C", 1, 0, 2, 1, 2, 2], ["C", 2, 3, 3, 4, 4, 4]]);
  assert.deepEqual(told("M0 0c1 0 2 1 2 2s1 2 2 2"), told("M0 0C1 0 2 1 2 2S3 4 4 4"));
  assert.deepEqual(told("M0 0S3 4 4 4"), [["M", 0, 0], ["C", 0, 0, 3, 4, 4, 4]]);
  assert.deepEqual(told("M0 0Q3 3 6 0"), [["M", 0, 0], ["C", 2, 2, 4, 2, 6, 0]]);
  assert.deepEqual(told("M0 0Q3 3 6 0T12 0").at(-1), ["C", 8, -2, 10, -2, 12, 0]);
});

test("arcs lie on their ellipse, and their flags may stand without spaces", () => {
  const spaced = segmentsOf("M10 0A10 5 0 1 1 0 -5");
  assert.deepEqual(told("M10 0A10 5 0 110-5"), told("M10 0A10 5 0 1 1 0 -5"));
  assert.equal(spaced.length, 4); // three quarters
  let from = spaced[0].at;
  for (const { at } of spaced.slice(1)) {
    for (const t of [0.25, 0.5, 0.75, 1]) {
      const p = [0, 1].map((i) => (1 - t) ** 3 * from[i] + 3 * t * (1 - t) ** 2 * at[i] + 3 * t * t * (1 - t) * at[2 + i] + t ** 3 * at[4 + i]);
      assert.ok(Math.abs((p[0] / 10) ** 2 + (p[1] / 5) ** 2 - 1) < 1e-3, `${p}`);
    }
    from = at.slice(4);
  }
  assert.deepEqual(from, [0, -5]);
  assert.deepEqual(told("M0 0A0 5 0 0 1 3 3"), [["M", 0, 0], ["C", 0, 0, 3, 3, 3, 3]]);
  const [, first] = segmentsOf("M0 0A1 1 0 0 1 10 0"); // radii that do not reach
  assert.ok(Math.abs(first.at[4] - 5) < 1e-9);
  assert.ok(Math.abs(Math.abs(first.at[5]) - 5) < 1e-9);
});
