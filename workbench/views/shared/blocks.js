// Arrays of a spec: bytes from a kernel, or base64 in a page, as typed arrays with a shape.

const ARRAYS = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, i1: Int8Array, i2: Int16Array, i4: Int32Array, f4: Float32Array, f8: Float64Array };

async function bytesOf(block) {
  if (block.data) return block.data.buffer.slice(block.data.byteOffset, block.data.byteOffset + block.data.byteLength);
  const raw = atob(block.base64);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  if (!block.deflate) return bytes.buffer;
  const plain = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(plain).arrayBuffer();
}

/** {data, shape} of a block. */
export async function decode(block) {
  return { data: new ARRAYS[block.dtype](await bytesOf(block)), shape: block.shape };
}

/** A typed array over the bytes of an answer's buffer. */
export function arrayOf(dtype, view) {
  return new ARRAYS[dtype](view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
}
