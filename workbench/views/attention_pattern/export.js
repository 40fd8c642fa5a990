// The numbers of an attention pattern as rows of a file: one query's, or a head's whole map.

import { arrayOf } from "workbench/shared/blocks.js";

const TILE = 512; // queries and keys that a kernel is asked for at once
const MOST = 2048 * 2048; // cells of a map that a kernel is asked for; of larger ones the pooled cells are given

/** Weights of queries `from` to `to` over all keys, as a kernel computes them: [query x key]. */
async function computed(view, head, from, to) {
  const { site, frame, facts } = view;
  const found = new Float32Array((to - from) * site.keys);
  for (let left = 0; left < site.keys; left += TILE) {
    const right = Math.min(site.keys, left + TILE);
    const question = { ask: "tile", site: view.index, head, variant: facts.variants[view.variant], rows: [from, to], columns: [left, right] };
    const tile = arrayOf("f4", (await frame.ask(question)).buffers[0]);
    for (let row = 0; row < to - from; row++) found.set(tile.subarray(row * (right - left), (row + 1) * (right - left)), row * site.keys + left);
  }
  return found;
}

/** All keys of one query, with their weights, and whether each is exact. */
export async function rowOf(view, head, query) {
  const { site, frame } = view;
  const asked = frame.live && !view.block("exact") ? await computed(view, head, query, query + 1) : null;
  const named = site.keyTokens !== null;
  const rows = Array.from({ length: site.keys }, (_, key) => {
    const { weight, exact } = asked ? { weight: asked[key], exact: true } : view.cell(head, query, key);
    return [key, ...(named ? [view.keyToken(key)] : []), weight, exact ? "yes" : "no"];
  });
  return [["key", ...(named ? ["token"] : []), "weight", "exact"], ...rows];
}

/** A head's whole map: a row for each query, a column for each key; where it is pooled, for each block of them. */
export async function mapOf(view, head) {
  const { site, frame } = view;
  const live = frame.live && !view.block("exact") && site.queries * site.keys <= MOST;
  const step = live ? 1 : site.block;
  const what = live || view.block("exact") ? "weight" : step > 1 ? `largest weight in ${step} x ${step} tokens` : `weight in 8 bits, off by at most ${site.error}`;
  const name = (token, at) => (token === null || token === undefined ? `${at}` : `${at} ${token}`);
  const places = (from, to) => Array.from({ length: Math.ceil((to - from) / step) }, (_, i) => from + i * step);
  const keys = places(0, site.keys);
  const rows = [[`query by key: ${what}`, ...keys.map((key) => name(view.keyToken(key), key))]];
  for (let from = 0; from < site.queries; from += TILE * step) {
    const to = Math.min(site.queries, from + TILE * step);
    const asked = live ? await computed(view, head, from, to) : null;
    for (const query of places(from, to)) {
      const weights = keys.map((key) => (asked ? asked[(query - from) * site.keys + key] : view.cell(head, query, key).weight));
      rows.push([name(view.queryToken(query), query), ...weights]);
    }
  }
  return rows;
}
