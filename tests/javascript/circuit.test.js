import assert from "node:assert/strict";
import { test } from "node:test";
import { Circuit } from "workbench/circuit_graph/circuit.js";
import { arrange } from "workbench/circuit_graph/layout.js";

// input → two heads of layer 0 → one head of layer 1 → logits, and input → logits
const nodes = [
  { name: "input", kind: "input", layer: -1, number: 0, feeds: [] },
  { name: "a0.h0", kind: "head", layer: 0, number: 0, feeds: [] },
  { name: "a0.h1", kind: "head", layer: 0, number: 1, feeds: [] },
  { name: "a1.h0", kind: "head", layer: 1, number: 0, feeds: [] },
  { name: "logits", kind: "logits", layer: 2, number: 0, feeds: [] },
];
const facts = {
  nodes, circuits: ["one"], rows: ["L0", "L1"], level: "edge", positions: [],
  receivers: [1, 2, 3, 4].map((node) => ({ node, part: "" })),
};
const block = (data, ...shape) => ({ data, shape: shape.length ? shape : [data.length] });
const blocks = {
  senders: block(Uint32Array.of(0, 0, 1, 2, 3, 0)), receivers: block(Uint32Array.of(0, 1, 2, 2, 3, 3)),
  scores: block(Float64Array.of(0.5, -3, 1, 2, 4, 0.1), 1, 6), feeds: block(new Uint32Array(0), 0, 2),
  members: block(Uint8Array.of(1, 1, 1, 1, 1, 1), 1, 6), node_members: block(Uint8Array.of(1, 1, 1, 1, 1), 1, 5),
  node_scores: block(new Float64Array(5).fill(NaN), 1, 5), rank: block(new Uint32Array(0)), signed_rank: block(new Uint32Array(0)),
  shared: block(Uint32Array.of(6), 1, 1),
};
const circuit = new Circuit({ facts, blocks }, [0]);

test("edges start and end at nodes, and are as strong as their scores", () => {
  assert.deepEqual(circuit.edges.map((edge) => [circuit.start(edge), circuit.end(edge)]), [[0, 1], [0, 2], [1, 3], [2, 3], [3, 4], [0, 4]]);
  assert.deepEqual(circuit.largest, [4]);
  assert.equal(circuit.scored, true);
  assert.ok(circuit.strength(1) > circuit.strength(3));
});

test("no two nodes stand in one place, and layers go upwards", () => {
  const shown = { circuit, nodes: new Set([0, 1, 2, 3, 4]), edges: circuit.edges, into: () => [], out: () => [] };
  for (const name of ["heads", "compact"]) {
    for (const width of [120, 800, 2000]) {
      const { spots, height, width: wide } = arrange(shown, name, width, 40);
      const places = [...spots.values()];
      assert.equal(places.length, 5);
      assert.equal(new Set(places.map(({ x, y }) => `${x} ${y}`)).size, 5, name);
      assert.ok(places.every(({ x, y }) => x >= 0 && x <= wide && y >= 0 && y <= height), name);
      const [input, low, , high, logits] = [0, 1, 2, 3, 4].map((node) => spots.get(node).y);
      assert.ok(input > low && low > high && high > logits, name);
    }
  }
});

test("what is kept is measured, lies between what was measured, or is undefined", () => {
  const sizes = { sizes: [2, 8], shares: [0.25, 0.75], low: [0.2, 0.7], high: [0.3, 0.8] };
  const of = (curve) => new Circuit({ facts: { ...facts, curve, found: { n: null, by: null } }, blocks }, [0]);
  const known = of({ undefined: "", absolute: sizes });
  assert.deepEqual(known.kept("absolute", 8), { at: "measured", share: 0.75, low: 0.7, high: 0.8 });
  assert.deepEqual(known.kept("absolute", 4), { at: "between", share: 0.5, sizes: [2, 8] });
  assert.deepEqual(known.kept("absolute", 1), { at: "outside", sizes: [2, 8] });
  assert.deepEqual(of({ undefined: "m(model) is 0", absolute: { ...sizes, shares: [] } }).kept("absolute", 8), { at: "undefined" });
  assert.deepEqual(of(null).kept("absolute", 8), { at: "never" });
});
