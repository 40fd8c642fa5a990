// Capacity curves: what one head holds as more pairs are stored, beside the theory, and the spectrum of its keys.

import { LineChart } from "workbench/shared/chart.js";
import { make, roughly, selector } from "workbench/shared/dom.js";
import { open } from "workbench/shared/frame.js";

const COLOURS = ["#2f6fb7", "#d1662b", "#3a8f5c", "#b03a78", "#7a6bc9", "#8a6d1f"];
const THEORY = [[6, 4], [2, 3], [8, 3, 2, 3], [1, 4], [10, 5]];

const TOLD = "Dots on the threshold are the measured n*; a curve without one does not cross it. Dashed and dotted: what the theory expects of Hebb's rule, for d_k and for the effective dimension.";

export async function render({ model, el }) {
  const frame = await open({ model, el });
  new Curves(frame);
  return () => frame.close();
}

class Curves {
  constructor(frame) {
    this.frame = frame;
    this.facts = frame.facts;
    this.measure = 0;
    this.query = 0;
    this.row = this.facts.first;
    this.words = make("p", { class: "sums" });
    this.silent = make("p", { class: "about" });
    this.charts = [new LineChart(frame, "Retrieval against the number of pairs"), new LineChart(frame, "Spectrum of the keys")];
    frame.body.append(this.words, make("div", { class: "charts two" }, ...this.charts.map(({ element }) => element)), this.silent);
    this.build();
    frame.offerKeys([["← →, Home, End", "move over the values of a line"], ["↑ ↓", "change the line"], ["[ ]", "change the head"], ["Esc", "leave the line"]]);
    frame.root.addEventListener("keydown", (event) => this.key(event));
    this.show();
    frame.onSelect((selection) => this.follow(selection));
    frame.onRedraw(() => this.show()); // some lines have the theme's colours
  }

  build() {
    const { heads, measures, queries } = this.facts;
    this.picker = selector("Head", heads.map(({ label }, i) => [i, label]), (row) => this.choose(Number(row)));
    const named = (names) => names.map((name) => [name, name]);
    const { settings } = this.frame;
    const first = measures[Math.max(0, measures.indexOf(this.facts.criterion.measure))];
    const measure = settings.pick("measure", "Measure", named(measures), first, (name) => this.set({ measure: measures.indexOf(name) }));
    const query = settings.pick("query", "Asked with", named(queries), queries[0], (name) => this.set({ query: queries.indexOf(name) }));
    this.measure = measures.indexOf(measure.value);
    this.query = queries.indexOf(query.value);
    this.frame.controls.append(this.picker.field, measure.field, query.field);
  }

  set(change) {
    Object.assign(this, change);
    this.show();
  }

  choose(row) {
    const { layer, head, site } = this.facts.heads[row];
    this.set({ row });
    this.frame.select({ layer, heads: [head], site });
  }

  follow({ layer, heads, site }) {
    const fits = (one) => one.layer === layer && heads.includes(one.head) && (site === null || one.site === site);
    const row = this.facts.heads.findIndex(fits);
    if (row >= 0 && !fits(this.facts.heads[this.row])) this.set({ row });
  }

  key(event) {
    const by = { "[": -1, "]": 1 }[event.key];
    if (!by || /^(INPUT|SELECT)$/.test(event.target.tagName)) return;
    event.preventDefault();
    this.choose((this.row + by + this.facts.heads.length) % this.facts.heads.length);
    this.frame.say(this.words.textContent);
  }

  /** A part of a block: the last axis where all before it are given, or one number. */
  part(block, ...at) {
    const { data, shape } = this.frame.blocks[block];
    const index = shape.slice(0, at.length).reduce((sum, n, i) => sum * n + at[i], 0);
    const size = shape.slice(at.length).reduce((a, b) => a * b, 1);
    return at.length === shape.length ? data[index] : data.subarray(index * size, (index + 1) * size);
  }

  show() {
    this.picker.select.value = this.row;
    this.drawRetrieval();
    this.drawSpectrum();
    this.describe();
  }

  /** What the head's numbers are, in a line. */
  describe() {
    const { row } = this;
    const { heads, dimensions } = this.facts;
    const [width, load, excess] = this.part("about", row);
    const each = dimensions.map((name, i) => `${roughly(this.part("dimension", row, i))} ${name}`).join(", ");
    this.words.textContent = `${heads[row].label}: d_k ${width}; effective dimension ${each}; keys overlap ${roughly(excess)} times as much as random ones; load ${roughly(load)} keys.`;
  }

  drawRetrieval() {
    const { row, measure, query, facts } = this;
    const xs = facts.sizes;
    const name = facts.measures[measure];
    const decisive = name === facts.criterion.measure;
    const series = facts.rules.map((rule, r) => {
      const [ys, low, high] = ["curves", "low", "high"].map((block) => this.part(block, measure, row, r, query));
      return { name: rule, xs, ys, low, high, colour: COLOURS[r % COLOURS.length] };
    });
    const asked = facts.queries[query];
    const told = name === facts.snr && asked === facts.stored && facts.rules.includes("hebb");
    if (told) {
      facts.theories.forEach((theory, t) => {
        if (t < 2) series.push({ name: `theory for Hebb, ${theory}`, xs, ys: this.part("theory", row, t), colour: this.frame.colour("muted"), dash: THEORY[t] });
      });
    }
    const load = this.part("about", row)[1];
    const marks = [{ x: load, text: `load ${roughly(load)}` }];
    const values = [];
    facts.rules.forEach((rule, r) => {
      const [n, , , censored] = this.part("knees", row, r, query);
      values.push(`${rule} ${censored ? "at least " : ""}${roughly(n)}`);
      if (n > 0 && !censored) marks.push({ x: n, y: decisive ? facts.criterion.at : undefined, text: "", colour: COLOURS[r % COLOURS.length] });
    });
    const levels = decisive ? [{ y: facts.criterion.at, text: "" }] : [];
    const range = name === facts.snr ? this.decibels(series) : undefined;
    this.charts[0].show({ title: `${facts.heads[row].label}, asked with ${asked}: n* ${values.join(", ")}`, x: "stored pairs n", y: name, series, marks, levels, range, doubling: true });
    const away = name !== facts.snr ? name : asked !== facts.stored ? asked : "these rules";
    this.silent.textContent = told ? TOLD : `The theory is silent here: it speaks of the SNR of Hebb's rule asked with the stored keys, not of ${away}.`;
  }

  /** Beyond ± 60 dB there is only exact recall, or nothing: such values would flatten all others. */
  decibels(series) {
    const known = series.flatMap(({ ys }) => Array.from(ys)).filter((y) => Math.abs(y) <= 60).concat(this.facts.criterion.measure === this.facts.snr ? [this.facts.criterion.at] : []);
    const [low, high] = known.length ? [Math.min(...known), Math.max(...known)] : [-1, 1];
    const room = 0.08 * (high - low) + 1;
    return [low - room, high + 2 * room];
  }

  drawSpectrum() {
    const width = this.part("about", this.row)[0];
    const ys = this.part("spectrum", this.row).subarray(0, width);
    const xs = Array.from({ length: width }, (_, i) => i + 1);
    const keys = { name: "this head's keys", xs, ys, colour: COLOURS[0], dots: width < 40 };
    const random = { name: "random keys, 1/d_k", xs, ys: xs.map(() => 1 / width), colour: this.frame.colour("muted"), dash: [6, 4] };
    this.charts[1].show({ title: "Where the keys overlap: shares of their second moment", x: "direction, strongest first", y: "share of power", series: width > 1 ? [keys, random] : [{ ...keys, dots: true }, random], logarithmic: true, range: this.shares(ys, width), whole: true });
  }

  /** Down to a thousandth of what random keys have, in powers of ten. */
  shares(ys, width) {
    const least = Math.max(1e-3 / width, Math.min(...Array.from(ys).filter((y) => y > 0), 1 / width));
    return [Math.floor(Math.log10(least)), 0.1];
  }
}
