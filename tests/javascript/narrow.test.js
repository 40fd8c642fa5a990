import assert from "node:assert/strict";
import { test } from "node:test";
import { fitted } from "workbench/figure/narrow.js";

const pair = (width, more = {}) => ({
  width,
  height: 300,
  xaxis: { domain: [0, 0.4], anchor: "y" },
  xaxis2: { domain: [0.6, 1], anchor: "y2" },
  yaxis: { domain: [0, 1], anchor: "x" },
  yaxis2: { domain: [0, 1], anchor: "x2", showticklabels: false },
  annotations: [
    { text: "first", x: 0.2, y: 1, xref: "paper", yref: "paper" },
    { text: "second", x: 0.8, y: 1, xref: "paper", yref: "paper" },
    { text: "elsewhere", x: 0.8, y: 3, xref: "x2", yref: "y2" },
  ],
  ...more,
});

test("charts side by side stand below each other where they would have too little room, with their titles", () => {
  const { xaxis2, yaxis, yaxis2, annotations, height } = fitted(pair(390));
  assert.equal(height, 600);
  assert.deepEqual(xaxis2.domain, [0, 1]);
  assert.equal(yaxis.domain[1], 1);
  assert.equal(yaxis2.domain[0], 0);
  assert.ok(yaxis.domain[0] - yaxis2.domain[1] > 0.1 && yaxis2.showticklabels);
  assert.ok(Math.abs((yaxis.domain[1] - yaxis.domain[0]) / (yaxis2.domain[1] - yaxis2.domain[0]) - 1) < 1e-9);
  assert.deepEqual(annotations.map(({ x, y }) => [x, y]), [[0.5, 1], [0.5, yaxis2.domain[1]], [0.8, 3]]);
});

test("figures with room, and those of one column, stay as they are", () => {
  assert.deepEqual(fitted(pair(800)), pair(800));
  const column = { width: 390, height: 300, xaxis: {}, yaxis: { domain: [0, 0.4] }, yaxis2: { domain: [0.6, 1] }, legend: { x: 0.1 } };
  assert.deepEqual(fitted(column), column);
});

test("a legend goes below a narrow figure, unless the figure says where it stands", () => {
  assert.equal(fitted({ width: 390, height: 300, xaxis: {}, yaxis: {} }).legend.orientation, "h");
  assert.equal(fitted(pair(390, { legend: { y: 1.2 } })).legend.orientation, undefined);
});
