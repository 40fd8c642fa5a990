import assert from "node:assert/strict";
import { test } from "node:test";
import { deflateSync } from "node:zlib";
import { arrayOf, decode } from "workbench/shared/blocks.js";

const bytes = Buffer.from(new Float32Array([1.5, -2, NaN, 4, 5, 6]).buffer);

test("arrays come back from base64, deflated and plain, and from a kernel's bytes", async () => {
  const plain = { dtype: "f4", shape: [2, 3], base64: bytes.toString("base64"), deflate: false };
  const deflated = { ...plain, base64: deflateSync(bytes).toString("base64"), deflate: true };
  const padded = new Uint8Array(4 + bytes.length); // a view into a larger buffer, as a widget gets it
  padded.set(bytes, 4);
  const live = { dtype: "f4", shape: [2, 3], data: new DataView(padded.buffer, 4) };
  for (const block of [plain, deflated, live]) {
    const { data, shape } = await decode(block);
    assert.deepEqual(shape, [2, 3]);
    assert.deepEqual([...data], [1.5, -2, NaN, 4, 5, 6]);
  }
  assert.deepEqual([...arrayOf("f4", live.data)], [1.5, -2, NaN, 4, 5, 6]);
});
