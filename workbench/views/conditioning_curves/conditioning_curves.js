// Conditioning curves: one experiment at a time, trial by trial, for every learning rule and for the model.

import { LineChart } from "workbench/shared/chart.js";
import { checkbox, make, roughly } from "workbench/shared/dom.js";
import { open } from "workbench/shared/frame.js";

const COLOURS = ["#2f6fb7", "#d1662b", "#3a8f5c", "#b03a78", "#7a6bc9", "#8a6d1f"];
const [LEAST, MOST] = [-0.6, 1.6]; // of what the charts show

/** A difference of expectations, which are sums of numbers around 1: what rounding leaves of nothing is nothing. */
const share = (value) => roughly(Math.abs(value) < 1e-12 ? 0 : value);

export async function render({ model, el }) {
  const frame = await open({ model, el });
  new Experiments(frame);
  return () => frame.close();
}

class Experiments {
  constructor(frame) {
    this.frame = frame;
    this.facts = frame.facts;
    this.words = make("p", { class: "sums" });
    this.silent = make("p", { class: "about warning" });
    this.effects = make("div", { class: "wide effects", tabindex: "0", role: "region", "aria-label": "Effects" });
    this.charts = ["Experimental group", "Control group"].map((label) => new LineChart(frame, label));
    frame.body.append(this.words, this.silent, make("div", { class: "charts" }, ...this.charts.map(({ element }) => element)), this.effects);
    const { experiments, subjects } = this.facts;
    const named = (name) => experiments.findIndex((each) => each.name === name);
    const picker = frame.settings.pick("experiment", "Experiment", experiments.map(({ name }) => [name, name]), experiments[0].name, (name) => {
      this.at = named(name);
      this.show();
    });
    this.at = named(picker.value);
    const boxes = subjects.map((name) => checkbox(name, true, (on) => frame.keep({ off: on ? this.off.filter((each) => each !== name) : [...this.off, name] })));
    const offs = (off) => Array.isArray(off) && off.every((name) => subjects.includes(name));
    this.off = frame.settings.follow("off", offs, [], (off) => this.switch(off), (off) => boxes.forEach(({ box }, s) => (box.checked = !off.includes(subjects[s]))));
    frame.controls.append(picker.field, ...boxes.map(({ field }) => field));
    frame.offerKeys([["← →, Home, End", "move over the trials"], ["↑ ↓", "change the line"], ["[ ]", "change the experiment"], ["Esc", "leave the line"]]);
    frame.root.addEventListener("keydown", (event) => this.key(event));
    this.show();
    frame.onRedraw(() => this.show());
  }

  choose(at) {
    this.frame.keep({ experiment: this.facts.experiments[at].name });
  }

  switch(off) {
    this.off = off;
    this.show();
  }

  key(event) {
    const by = { "[": -1, "]": 1 }[event.key];
    if (!by || /^(INPUT|SELECT)$/.test(event.target.tagName)) return;
    event.preventDefault();
    this.choose((this.at + by + this.facts.experiments.length) % this.facts.experiments.length);
    this.frame.say(this.words.textContent);
  }

  isOn(subject) {
    return !this.off.includes(this.facts.subjects[subject]);
  }

  colour(subject) {
    return this.facts.subjects[subject] === this.facts.model ? this.frame.colour("ink") : COLOURS[subject % COLOURS.length];
  }

  line(block, subject, group) {
    const { data, shape } = this.frame.blocks[`${block} ${this.at}`];
    const at = (subject * shape[1] + group) * shape[2];
    return data.subarray(at, at + shape[2]);
  }

  show() {
    const { facts } = this;
    const about = facts.experiments[this.at];
    this.words.textContent = `${about.name}: ${about.what}. Asked for: cue ${about.test}, before the first trial and after each.${this.outside()}`;
    this.silent.textContent = `Where the theory is silent: ${about.silent}.`;
    this.silent.hidden = !about.silent;
    const subjects = Array.from(facts.subjects.keys()).filter((s) => this.isOn(s));
    const all = subjects.flatMap((s) => [0, 1].flatMap((group) => Array.from(this.line("curves", s, group))));
    const [low, high] = [Math.max(LEAST, Math.min(0, ...all)), Math.min(MOST, Math.max(1, ...all))];
    const room = 0.06 * (high - low);
    this.charts.forEach((chart, group) => {
      const words = about.phases[group];
      const series = subjects.map((s) => {
        const [ys, below, above] = ["curves", "low", "high"].map((block) => this.line(block, s, group).slice(0, words.length + 1));
        return { name: facts.subjects[s], xs: Array.from(ys.keys()), ys, low: below, high: above, colour: this.colour(s), dots: facts.subjects[s] === facts.model };
      });
      const content = { title: `${chart.label}: ${this.phases(words)}`, x: "trials seen", y: `outcome expected after ${about.test}`, series, marks: this.starts(words), range: [low - room, high + 3 * room], whole: true };
      chart.show(series.length ? content : { ...content, empty: "Every line is switched off." });
    });
    this.listEffects();
  }

  /** Lines that leave the charts, where an outcome that is fully expected stands at 1. */
  outside() {
    const far = this.facts.subjects.flatMap((name, s) => {
      const ys = [0, 1].flatMap((group) => Array.from(this.line("curves", s, group)));
      const most = Math.abs(Math.min(...ys)) > Math.max(...ys) ? Math.min(...ys) : Math.max(...ys);
      return this.isOn(s) && (most > MOST || most < LEAST) ? [`${name} (to ${roughly(most)})`] : [];
    });
    return far.length ? ` Beyond the charts: ${far.join(", ")}.` : "";
  }

  /** Words of the trials, each stretch of equal ones once: "A+, then AB+". */
  phases(words) {
    const seen = [];
    for (const word of words) if (!seen.includes(word)) seen.push(word);
    return seen.join(", then ");
  }

  starts(words) {
    const seen = new Set();
    return words.flatMap((word, i) => {
      if (seen.has(word)) return [];
      seen.add(word);
      return i && words[i - 1] !== words[i] && seen.size > 1 ? [{ x: i, text: word, colour: this.frame.colour("muted") }] : [];
    });
  }

  listEffects() {
    const { facts, frame } = this;
    const { data } = frame.blocks.contrast;
    const said = { 1: "shows it", 0: "none", "-1": "the reverse" };
    const row = (name, s) => {
      const [value, low, high, effect] = data.subarray(4 * (this.at * facts.subjects.length + s), 4 * (this.at * facts.subjects.length + s) + 4);
      const chip = make("i", { class: "chip" });
      chip.style.backgroundColor = this.colour(s);
      return make("tr", {}, make("th", { scope: "row" }, chip, name), make("td", { class: "n" }, share(value)), make("td", { class: "n" }, `${share(low)} to ${share(high)}`), make("td", {}, said[effect]));
    };
    const head = make("tr", {}, ...["", "difference of the groups", "95 % interval", "effect"].map((text) => make("th", { scope: "col" }, text)));
    this.effects.replaceChildren(make("table", {}, make("thead", {}, head), make("tbody", {}, ...facts.subjects.map(row))));
  }
}
