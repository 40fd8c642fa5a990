// What a saliency map says of a place or a token.

import { cut, exactly, named, roughly } from "workbench/shared/dom.js";
import { aboveAt } from "./drawing.js";

export class Words {
  constructor(frame, numbers, state) {
    this.frame = frame;
    this.facts = frame.facts;
    this.numbers = numbers;
    this.state = state;
  }

  when(column) {
    const { facts } = this;
    if (facts.names.length) return named(facts.names[column], column);
    const at = (i) => Number((i * facts.step).toPrecision(5));
    return facts.unit === "s" ? `${at(column)} to ${at(column + 1)} s` : `${facts.unit} ${at(column)}`;
  }

  sentence({ row, column, bin }) {
    const { facts, frame } = this;
    if (bin !== null) {
      const parts = [`${this.when(column)}, ${facts.picture.label} ${bin}`];
      const about = typeof this.state.over === "number" ? facts.maps[this.state.over] : null;
      const bins = frame.blocks.picture.shape[1];
      const at = Math.min(frame.blocks.picture.shape[0] - 1, Math.floor(((column + 0.5) * facts.step) / facts.picture.step));
      if (about?.cells && this.state.token !== null) {
        const { data, shape } = frame.blocks[`cells${this.state.over}`];
        const { low, high, block } = about.cells;
        const value = low + ((high - low) * data[(this.state.token * shape[1] + Math.floor(at / block)) * bins + bin]) / 65535;
        parts.push(`${about.label} of “${cut(facts.tokens[this.state.token])}” ${exactly(value)}${about.unit ? ` ${about.unit}` : ""}`);
      }
      if (this.state.above) parts.push(`${roughly(aboveAt(facts, this.state.above, at, bin))} sd from its mean`);
      return parts.join(": ");
    }
    const at = row * facts.positions + column;
    if (this.state.panels.every(({ raw, values }) => Number.isNaN((raw ?? values)[at]))) return `${named(facts.tokens[row], row)}, ${this.when(column)}: not before this token`;
    const parts = this.state.panels.map(({ label, raw, values, unit }) => `${label.replace(/^Cross-attention/, "attention")} ${exactly((raw ?? values)[at])}${unit && unit !== "weight" ? ` ${unit}` : ""}${label === facts.maps[this.state.map].label ? this.error(at) : ""}`);
    return `${named(facts.tokens[row], row)}, ${this.when(column)}: ${parts.join(", ")}`;
  }

  error(at) {
    const block = this.frame.blocks[`error${this.state.map}`];
    return block ? ` ± ${roughly(block.data[at])}` : "";
  }

  tokenSentence(token) {
    const { facts } = this;
    const parts = [];
    if (this.state.r) parts.push(this.state.r.rows[token] === null ? "no correlation, a row is constant" : `r of attention and ${facts.maps[this.state.map].label} ${this.state.r.rows[token].toFixed(3)}`);
    facts.spans.forEach((name, s) => {
      const [from, to] = this.numbers.span(s, token);
      if (to > from) parts.push(`${name} ${roughly(from)} to ${roughly(to)} ${facts.unit}`);
    });
    return `${named(facts.tokens[token], token)}${parts.length ? `: ${parts.join("; ")}` : ""}`;
  }
}
