import assert from "node:assert/strict";
import { test } from "node:test";
import { outlinesOf } from "workbench/shared/outlines.js";

const area = (line) => line.reduce((sum, [x, y], i) => {
  const [u, v] = line[(i + 1) % line.length];
  return sum + (x * v - u * y) / 2;
}, 0);

/** How much of each pixel lies within `inside`, by 8 x 8 samples. */
function covered(width, height, inside) {
  return Uint8Array.from({ length: width * height }, (_, at) => {
    let n = 0;
    for (let i = 0; i < 64; i++) n += inside((at % width) + ((i % 8) + 0.5) / 8, Math.floor(at / width) + (Math.floor(i / 8) + 0.5) / 8) ? 1 : 0;
    return Math.round((255 * n) / 64);
  });
}

test("the outline of a disc lies on its circle, and has few places", () => {
  const inside = (x, y) => Math.hypot(x - 30.3, y - 25.8) < 20;
  const found = outlinesOf(covered(60, 50, inside), 60, 50, 0.1);
  assert.equal(found.length, 1);
  for (const [x, y] of found[0]) assert.ok(Math.abs(Math.hypot(x - 30.3, y - 25.8) - 20) < 0.15);
  assert.ok(found[0].length < 60);
  assert.ok(Math.abs(area(found[0]) / (Math.PI * 400) - 1) < 0.01);
});

test("a hole turns the other way, and two that touch by a corner are two", () => {
  const ring = outlinesOf(covered(40, 40, (x, y) => Math.abs(Math.hypot(x - 20, y - 20) - 10) < 4), 40, 40);
  assert.equal(ring.length, 2);
  const [outer, inner] = ring.map(area).sort((a, b) => b - a);
  assert.ok(outer > 0); // with y downwards: what is inside lies to the right
  assert.ok(inner < 0);
  assert.ok(Math.abs((outer + inner) / (Math.PI * (14 ** 2 - 6 ** 2)) - 1) < 0.02);
  const corners = covered(12, 12, (x, y) => (x > 2 && x < 6 && y > 2 && y < 6) || (x > 6 && x < 10 && y > 6 && y < 10));
  assert.deepEqual(outlinesOf(corners, 12, 12).map((line) => Math.round(area(line))), [16, 16]);
  assert.deepEqual(outlinesOf(new Uint8Array(25), 5, 5), []);
});
