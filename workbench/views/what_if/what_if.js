// What if: sliders for a head's memory and for a stack of heads, and what the theory says of them. The formulas are those of
// workbench.analysis.conditioning.theory.

import { LineChart } from "workbench/shared/chart.js";
import { button, exactly, make, selector } from "workbench/shared/dom.js";
import { open } from "workbench/shared/frame.js";

const COLOURS = ["#2f6fb7", "#d1662b", "#3a8f5c"];

export async function render({ model, el }) {
  const frame = await open({ model, el });
  new WhatIf(frame);
  return () => frame.close();
}

const decibel = (ratio) => 10 * Math.log10(ratio);

function choices(n, k) {
  let found = 1;
  for (let i = 1; i <= k; i++) found = (found * (n - k + i)) / i;
  return Math.round(found);
}

/** Chance that a layer which needs `needed` of its heads has fewer. */
function worksAtLeast(p, heads, needed) {
  let works = 0;
  for (let k = needed; k <= heads; k++) works += choices(heads, k) * (1 - p) ** k * p ** (heads - k);
  return works;
}

const redundantFailure = (p, depth, heads, needed) => 1 - worksAtLeast(p, heads, needed) ** depth;

/** Signal and interference power of the pair that was stored n − 1 writes before the last; null where theory is silent. */
function powers({ rule, d_k, decay }, n) {
  if (rule === "hebb") return [1, (n - 1) / d_k];
  if (rule !== "decay") return null;
  const signal = (decay ** (n - 1)) ** 2;
  return [signal, (1 / (1 - decay ** 2) - decay ** (2 * (n - 1))) / d_k];
}

/** Number of pairs whose SNR is above a threshold. */
function held({ rule, d_k, decay, threshold }) {
  if (rule === "hebb") return 1 + d_k / threshold;
  return rule === "decay" ? Math.max(0, span({ d_k, decay, threshold }) + 1) : null;
}

const span = ({ d_k, decay, threshold }) => Math.log(threshold / ((1 - decay ** 2) * (d_k + threshold))) / (2 * Math.log(decay));

/** All numbers by name; null where the theory is silent. */
function outlook(s) {
  const found = powers(s, s.n);
  const [signal, interference] = found ?? [null, null];
  const hebb = s.rule === "hebb";
  const snr = found ? (interference === 0 ? Infinity : signal / interference) : null;
  const bound = found ? (interference === 0 ? 0 : interference / (s.delta * signal)) : null;
  const p = s.failure !== null ? s.failure : bound === null ? null : Math.min(1, bound);
  const stack = (formula) => (p === null ? null : formula(p));
  return {
    signal_power: signal,
    interference_power: interference,
    snr,
    snr_db: found ? decibel(snr) : null,
    average_capacity: held(s),
    worst_capacity: hebb ? (s.epsilon * s.delta * s.d_k) ** 0.5 : null,
    retained_signal: hebb ? 1 : found ? s.decay ** (s.n - 1) : null,
    memory_span: s.rule === "decay" ? span(s) : null,
    failure_bound: bound,
    union_bound: hebb ? s.n * bound : null,
    head_failure: p,
    stack_failure: stack(() => 1 - (1 - p ** s.heads) ** s.depth),
    stack_failure_linear: stack(() => s.depth * p ** s.heads),
    redundant_stack_failure: stack(() => redundantFailure(p, s.depth, s.heads, s.needed)),
    linear_range: hebb ? s.delta * s.d_k * s.depth ** (-1 / s.heads) : null,
  };
}

class WhatIf {
  constructor(frame) {
    this.frame = frame;
    this.facts = frame.facts;
    this.sliders = {};
    this.values = {};
    this.settings = this.stated();
    this.about = make("p", { class: "about" });
    this.warning = make("p", { class: "about warning" });
    this.charts = [new LineChart(frame, "Signal and interference"), new LineChart(frame, "Failure of a stack over its depth")];
    const right = make("div", { class: "outlook" }, this.numbers(), this.warning, make("div", { class: "charts" }, ...this.charts.map(({ element }) => element)));
    frame.body.append(make("div", { class: "columns" }, this.form(), right));
    frame.offerKeys([["Tab", "move from slider to slider, and to the charts"], ["← →, Page Up, Page Down, Home, End", "move a slider"], ["← → ↑ ↓, Home, End", "in a chart: move over its values, change the line"]]);
    this.update(false);
    frame.onState(() => {
      const stated = this.stated();
      if (JSON.stringify(stated) === JSON.stringify(this.settings)) return;
      this.settings = stated;
      this.update();
    });
    frame.onRedraw(() => this.charts.forEach((chart) => chart.draw()));
  }

  // Controls.

  form() {
    const { rules, sliders, groups } = this.facts;
    this.rule = selector("Learning rule", rules.map(({ name, label }) => [name, label]), (name) => this.set("rule", name));
    this.source = selector("A head fails", [["bound", "as the bound allows"], ["given", "at a rate of mine"]], (which) => this.set("failure", which === "given" ? Number(this.sliders.failure.input.value) : null));
    const made = groups.map((title) => {
      const inside = sliders.filter(({ group }) => group === title).map((about) => this.slider(about));
      const chosen = title === groups[0] ? [this.rule.field] : title === groups.at(-1) ? [this.source.field] : [];
      return make("fieldset", {}, make("legend", {}, title), ...chosen, ...(title === groups[0] ? [this.about] : []), ...inside);
    });
    const reset = button("Start again", () => {
      this.settings = { ...this.facts.start };
      this.keep();
    }, { class: "screen" });
    return make("form", { class: "sliders" }, ...made, reset);
  }

  slider({ name, label, unit, low, high, step }) {
    const value = make("output");
    const input = make("input", { type: "range", min: low, max: high, step, "aria-label": label, "data-name": name });
    input.addEventListener("input", () => this.set(name, Number(input.value)));
    const field = make("label", { class: "slider" }, make("span", {}, label), value, input);
    this.sliders[name] = { input, value, unit, field };
    return field;
  }

  set(name, value) {
    this.settings[name] = value;
    if (name === "heads") this.settings.needed = Math.min(this.settings.needed, value);
    this.keep();
  }

  /** Where the sliders stand by the state; what no slider can be set to is left out. */
  stated() {
    const { start, rules, sliders } = this.facts;
    const found = { ...start };
    for (const [name, value] of Object.entries(this.frame.state.settings ?? {})) {
      const about = sliders.find((each) => each.name === name);
      const fits = about && Number.isFinite(value) && value >= about.low && value <= about.high && (!Number.isInteger(about.step) || Number.isInteger(value));
      if (fits || (name === "rule" && rules.some((rule) => rule.name === value)) || (name === "failure" && value === null)) found[name] = value;
    }
    found.needed = Math.min(found.needed, found.heads);
    return found;
  }

  keep() {
    const { start } = this.facts;
    const changed = Object.entries(this.settings).filter(([name, value]) => value !== start[name]);
    this.frame.keep({ settings: changed.length ? Object.fromEntries(changed) : null });
    this.update();
  }

  numbers() {
    const tiles = this.facts.numbers.map(({ name, label, unit }) => {
      const value = make("b");
      const tile = make("dd", { "data-number": name }, value, make("span", { class: "unit" }, unit));
      this.values[name] = { value, tile };
      return make("div", {}, make("dt", {}, label), tile);
    });
    return make("dl", { class: "numbers" }, ...tiles);
  }

  // What follows from the settings.

  update(spoken = true) {
    const { settings, facts } = this;
    this.rule.select.value = settings.rule;
    this.source.select.value = settings.failure === null ? "bound" : "given";
    for (const [name, { input, value, unit, field }] of Object.entries(this.sliders)) {
      if (name === "needed") input.max = settings.heads;
      const now = settings[name];
      if (now !== null) input.value = now;
      value.textContent = now === null ? "from the bound" : `${exactly(now)} ${now === 1 ? unit.replace(/s$/, "") : unit}`.trim();
      input.setAttribute("aria-valuetext", value.textContent);
      field.hidden = (name === "decay" && settings.rule !== "decay") || (name === "failure" && now === null);
    }
    this.found = outlook(settings);
    for (const [name, { value, tile }] of Object.entries(this.values)) {
      const now = this.found[name];
      tile.dataset.value = now === null ? "" : `${now}`;
      tile.classList.toggle("silent", now === null);
      value.textContent = now === null ? "–" : now === Infinity ? "∞" : now === -Infinity ? "−∞" : `${Number(now.toPrecision(4))}`;
    }
    this.about.textContent = facts.rules.find(({ name }) => name === settings.rule).about;
    this.warn();
    const draw = () => {
      this.drawPowers();
      this.drawStack();
    };
    cancelAnimationFrame(this.drawing);
    if (spoken) this.drawing = requestAnimationFrame(draw); // once a frame, however many values a slider moves through
    else draw();
    if (spoken) this.frame.say(this.summary());
  }

  warn() {
    const { failure_bound: bound, union_bound: union, stack_failure_linear: linear, head_failure: p } = this.found;
    const said = [];
    if (p === null) said.push("The theory gives no failure rate for this rule: set one by hand to see how errors propagate.");
    if (Math.max(bound, union) > 1) said.push(`A bound above 1 says nothing${this.settings.failure === null && bound > 1 ? ": a head is taken to fail always" : ""}.`);
    if (linear > 0.1) said.push("The linear form holds only where it is far below 1.");
    this.warning.textContent = said.join(" ");
    this.warning.hidden = !said.length;
  }

  summary() {
    const { snr_db: snr, average_capacity: most, stack_failure: fails } = this.found;
    const memory = snr === null ? "The theory is silent about this rule's memory" : `SNR ${snr === Infinity ? "without limit" : `${exactly(snr)} dB`}, capacity ${exactly(most)} pairs`;
    return `${memory}; ${fails === null ? "no failure rate" : `the stack fails with chance ${exactly(fails)}`}.`;
  }

  drawPowers() {
    const { settings, found } = this;
    const [title, empty] = ["Power of signal and interference", "The theory has no formula for the interference under this rule."];
    const lag = settings.rule === "decay";
    const content = { title, x: lag ? "asked for: the n-th latest pair" : "stored pairs n", y: "power, dB", series: [], whole: true };
    if (found.snr === null) return this.charts[0].show({ ...content, empty });
    const most = Math.max(16, Math.ceil(1.25 * settings.n), Math.min(Math.ceil(1.5 * found.average_capacity), 4 * settings.n + 64));
    const step = Math.max(1, Math.floor(most / 160));
    const xs = Array.from({ length: Math.floor((most - 1) / step) + 1 }, (_, i) => 1 + i * step);
    const each = xs.map((n) => powers(settings, n).map(decibel));
    const allowed = each.map(([signal]) => signal - decibel(settings.threshold));
    const floor = Math.max(-60, Math.min(...each.flat().filter(Number.isFinite), ...allowed.filter(Number.isFinite)));
    const top = Math.max(...each.flat().filter(Number.isFinite), ...allowed.filter(Number.isFinite), 0);
    const room = 0.08 * (top - floor) + 1;
    this.charts[0].show({
      ...content,
      range: [floor - room, top + 2.5 * room],
      series: [
        { name: "signal", xs, ys: each.map(([signal]) => signal), colour: COLOURS[0] },
        { name: "interference", xs, ys: each.map(([, noise]) => noise), colour: COLOURS[1] },
        { name: "most interference at the threshold", xs, ys: allowed, colour: COLOURS[0], dash: [2, 3] },
      ],
      marks: [{ x: settings.n, text: `n = ${settings.n}` }, { x: found.average_capacity, text: `capacity ${Number(found.average_capacity.toPrecision(4))}`, y: this.knee(), colour: COLOURS[1] }],
    });
  }

  knee() {
    const found = powers(this.settings, Math.max(1, this.found.average_capacity));
    return decibel(found[1]);
  }

  drawStack() {
    const { settings, found } = this;
    const content = { title: "Chance that a stack fails, over its depth", x: "layers L", y: "chance of failure", series: [], whole: true };
    const { head_failure: p } = found;
    if (p === null) return this.charts[1].show({ ...content, empty: "No failure rate of a head is known." });
    const xs = Array.from({ length: Math.max(12, 2 * settings.depth) }, (_, i) => i + 1);
    const exact = xs.map((depth) => 1 - (1 - p ** settings.heads) ** depth);
    const redundant = xs.map((depth) => redundantFailure(p, depth, settings.heads, settings.needed));
    const linear = xs.map((depth) => depth * p ** settings.heads);
    const top = Math.max(...exact, ...redundant, Math.min(1, Math.max(...linear)), 1e-12);
    const series = [{ name: "one head is enough, exactly", xs, ys: exact, colour: COLOURS[0], dots: xs.length < 40 }, { name: "the same, linear: L p^H", xs, ys: linear, colour: COLOURS[0], dash: [2, 3] }];
    if (settings.needed > 1) series.push({ name: `${settings.needed} of ${settings.heads} heads needed`, xs, ys: redundant, colour: COLOURS[1], dots: xs.length < 40 });
    this.charts[1].show({ ...content, series, range: [0, 1.15 * top], marks: [{ x: settings.depth, text: `L = ${settings.depth}` }] });
  }
}
