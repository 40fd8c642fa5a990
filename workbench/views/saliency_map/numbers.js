// The numbers of a saliency map: which heads are averaged, what each strip shows, what lies over the spectrogram.

import { ceiling, greatest } from "workbench/shared/scales.js";
import { correlated, standardise } from "./rows.js";

/** The least and the largest number of a row. */
function ends(part) {
  const known = part.filter((value) => !Number.isNaN(value));
  return [Math.min(...known), Math.max(...known)];
}

export class Numbers {
  constructor({ facts, blocks }) {
    this.facts = facts;
    this.blocks = blocks;
    this.n = facts.tokens.length;
    // Spans of no strip stand above the spectrogram.
    const strips = ["attention", ...facts.maps.map(({ label }) => label)];
    this.lane = facts.spans.map((name, s) => (strips.includes(name) ? -1 : s)).filter((s) => s >= 0);
  }

  /** How far the input reaches, in its unit. */
  get end() {
    return this.facts.positions * this.facts.step;
  }

  /** [layer index, head] pairs that are averaged, and what they are called. */
  chosen(selection, mode) {
    const { layers, heads, alignment } = this.facts.attention;
    const several = Array.from({ length: Math.max(1, heads) }, (_, i) => i);
    const { layer, heads: some, site } = selection;
    const at = site === null ? layers.indexOf(layer) : -1;
    if (at >= 0) {
      const fit = some.filter((head) => head < heads);
      if (some.length && fit.length) return { value: fit.length === 1 ? `${layer}:${fit[0]}` : `${layer}`, name: `L${layer}H${fit.join("+")}`, pairs: fit.map((head) => [at, head]) };
      if (!some.length) return { value: `${layer}`, name: `mean of layer ${layer}`, pairs: several.map((head) => [at, head]) };
    }
    if (mode === "alignment") return { value: "alignment", name: "mean of the alignment heads", pairs: alignment.map(([a, b]) => [layers.indexOf(a), b]).filter(([a, b]) => a >= 0 && b < heads) };
    return { value: "all", name: "mean of all heads", pairs: layers.flatMap((_, i) => several.map((head) => [i, head])) };
  }

  /** [token x position] of the chosen heads. */
  attention(pairs) {
    const { data, shape } = this.blocks.attention;
    const size = shape[2] * shape[3];
    const rows = new Float64Array(size);
    for (const [layer, head] of pairs) {
      const start = (layer * shape[1] + head) * size;
      for (let i = 0; i < size; i++) rows[i] += data[start + i] / pairs.length;
    }
    return rows;
  }

  panel(name, label, unit, raw, standard, signed, scale) {
    const z = scale === "z";
    const values = z ? standard : raw;
    const columns = raw.length / this.n;
    const rows = Array.from({ length: this.n }, (_, row) => values.subarray(row * columns, (row + 1) * columns));
    // Scores of masking have a floor: a row is coloured from its least to its largest, as SPES scales them.
    const tops = scale !== "row" ? null : signed ? rows.map((part) => [0, greatest(part) || 1]) : rows.map(ends);
    return { name, title: `${label[0].toUpperCase()}${label.slice(1)}${z ? ", standardised per token" : ""}`, label, unit, raw, values, signed: signed || z, tops, top: z ? greatest(values) : ceiling(greatest(values)) };
  }

  /**
   * What the strips show: attention of the heads, the map and their difference, or the map alone.
   * `r` is their correlation, of each row and of all; null where there is no attention.
   */
  panels({ map, scale, heads }) {
    const { blocks, facts, n } = this;
    const saliency = Float64Array.from(blocks[`strip${map}`].data);
    const about = facts.maps[map];
    const standard = standardise(saliency, n);
    const own = this.panel(about.label, about.label, about.unit, saliency, standard, about.signed, scale);
    if (!heads) return { panels: [own], r: null };
    const attention = this.attention(heads.pairs);
    const rows = standardise(attention, n);
    const difference = rows.map((value, i) => value - standard[i]);
    const r = correlated(rows, standard, n, facts.special);
    const said = r.all === null ? "a map is constant: no correlation" : `r ${r.all.toFixed(2)}${facts.special.some(Boolean) ? " without special tokens" : ""}`;
    const between = { name: "difference", title: `Attention − ${about.label}, rows standardised; ${said}`, label: "difference", unit: "sd", raw: null, values: difference, signed: true, tops: null, top: greatest(difference) };
    const looked = this.panel("attention", `Cross-attention, ${heads.name}`, "weight", attention, rows, facts.attention.signed, scale);
    return { panels: [looked, own, between], r };
  }

  /** What lies over the spectrogram: [frame x bin] standard deviations above the mean, of the token or the mean over tokens. */
  overlay(over, token, panels) {
    if (over === null || !this.blocks.picture) return null;
    const { blocks, facts } = this;
    const rows = token === null ? facts.special.map((odd, i) => (odd ? -1 : i)).filter((i) => i >= 0) : [token];
    const about = over === "attention" ? { label: "attention", cells: null } : facts.maps[over];
    const data = over === "attention" ? panels[0].raw : blocks[`${about.cells ? "cells" : "strip"}${over}`].data;
    const size = data.length / this.n;
    const mean = new Float64Array(size);
    for (const row of rows) {
      const z = standardise(Float64Array.from(data.subarray(row * size, (row + 1) * size)), 1);
      for (let i = 0; i < size; i++) mean[i] += z[i] / rows.length;
    }
    const bins = about.cells ? blocks.picture.shape[1] : 1;
    const step = about.cells ? about.cells.block * facts.picture.step : facts.step;
    return { values: mean, bins, step, top: mean.reduce((a, b) => Math.max(a, b), 0) || 1, label: about.label };
  }

  /** Begin and end of a token in a list of spans; NaN where it has none. */
  span(list, token) {
    return [0, 1].map((end) => this.blocks.spans.data[(list * this.n + token) * 2 + end]);
  }
}
