// What a circuit graph and a matrix of overlaps have in common: thresholds, layouts, colours, pins and the way along edges.

import { Circuit } from "./circuit.js";
import { GraphDrawing } from "./drawing.js";
import { markOf, NodePanel, readable } from "./panel.js";
import { colourAt, css, divergingAt, gradient, inkOn } from "workbench/shared/colour.js";
import { checkbox, exactly, legend, make, roughly, selector } from "workbench/shared/dom.js";
import { ceiling, greatest } from "workbench/shared/scales.js";

const PAIR = { light: { shared: [28, 33, 39], a: [47, 111, 183], b: [209, 102, 43] }, dark: { shared: [228, 232, 236], a: [111, 176, 234], b: [236, 145, 101] } };
const DASHES = { shared: [], a: [7, 4], b: [1.5, 3] };
const LAYOUTS = { heads: "by head", compact: "compact", positions: "by position" };
const CHOICES = { found: "the circuit as found", absolute: "strongest by magnitude", signed: "highest signed score" };
const STOPS = 90;
const percent = (share) => `${Math.round(1000 * share) / 10} %`;
const grouped = (n) => n.toLocaleString("en");
const counted = (n, word) => `${grouped(n)} ${word}${n === 1 ? "" : "s"}`;

/** Places of a slider from 1 to `most`: closer together at the beginning, with all of `marks`. */
function stopsTo(most, marks) {
  const steps = Array.from({ length: STOPS }, (_, i) => Math.round(most ** (i / STOPS)));
  return [...new Set([most, ...steps, ...marks.filter((mark) => mark <= most)])].sort((x, y) => x - y);
}

export class CircuitView {
  /** circuits: two to compare, or the only one. */
  constructor(frame, circuits) {
    this.frame = frame;
    this.facts = frame.facts;
    this.circuit = new Circuit(frame, circuits);
    this.current = null;
    this.held = null;
    this.panel = new NodePanel(this);
    this.drawing = new GraphDrawing(this);
    this.summary = make("p", { class: "summary" });
    this.legend = make("div");
    this.build();
    frame.body.append(this.summary, make("div", { class: "columns" }, make("div", { class: "stage" }, this.drawing.element, this.legend), this.panel.element));
    frame.offerKeys([["↑ ↓", "walk along the strongest edge, towards the logits or the input"], ["← →, Home, End", "next, first or last node of the layer"], ["Enter", "choose the head in every view"], ["p", "pin the node, or unpin it"], ["n", "name it"], ["Esc", "let go of it, choose no head"]]);
    this.read();
    frame.onState(() => this.update());
    frame.onSelect(() => this.drawing.made && this.drawing.label());
    frame.onRedraw(() => this.draw());
  }

  // Controls.

  build() {
    const { facts, frame, circuit } = this;
    const word = circuit.several || facts.level === "edge" ? "edges" : "nodes";
    this.slider = make("input", { type: "range", min: 0, "aria-label": `Number of ${word}` });
    this.number = make("input", { type: "number", min: 1, "aria-label": `Number of ${word}, exactly` });
    this.marks = make("div", { class: "marks", "aria-hidden": "true" });
    this.threshold = make("div", { class: "field threshold" }, make("span", {}, `Strongest ${word}`), make("div", { class: "track" }, this.slider, this.marks), this.number);
    this.slider.addEventListener("input", () => this.setNumber(this.stops[this.slider.value]));
    this.number.addEventListener("change", () => this.setNumber(Math.round(this.number.value)));
    const choices = Object.entries(CHOICES).filter(([by]) => by !== "signed" || circuit.signed_rank.length);
    this.choice = selector("Show", choices, (by) => frame.keep({ by, n: this.n }));
    const layouts = Object.entries(LAYOUTS).filter(([name]) => name !== "positions" || facts.positions.length);
    this.picker = selector("Layout", layouts, (layout) => frame.keep({ layout }));
    this.toggles = Object.keys(circuit.several ? DASHES : {}).map((kind) => ({ kind, mark: make("span"), ...checkbox("", true, (on) => frame.keep({ hidden: Object.keys(DASHES).filter((each) => (each === kind ? !on : this.hidden.has(each))) })) }));
    for (const { field, text, mark } of this.toggles) field.insertBefore(mark, text);
    frame.controls.append(...(circuit.several ? this.toggles.map(({ field }) => field) : [this.choice.field]), this.threshold, this.picker.field);
  }

  setNumber(n) {
    const by = this.by === "found" ? (this.facts.found.by ?? "absolute") : this.by;
    const most = this.circuit.several ? this.most : this.circuit.rankBy(by).length;
    this.frame.keep({ ...(this.circuit.several ? {} : { by }), n: Math.max(1, Math.min(most, n || 1)) });
  }

  /** What the state says, as far as it makes sense: it may come from an address that anyone wrote. */
  read() {
    const { circuit, facts } = this;
    const { pins, by, n, layout, hidden } = this.frame.state;
    this.pins = new Map();
    circuit.nodes.forEach(({ name }, node) => {
      if (typeof pins === "object" && pins && Object.hasOwn(pins, name)) this.pins.set(node, readable(`${pins[name]}`));
    });
    this.layout = Array.from(this.picker.select.options, (option) => option.value).includes(layout) ? layout : "heads";
    this.by = !circuit.several && by !== "found" && Object.hasOwn(CHOICES, by) && circuit.rankBy(by).length ? by : "found";
    this.hidden = new Set(Array.isArray(hidden) ? hidden : []);
    const union = circuit.several ? circuit.union() : [];
    this.most = circuit.several ? union.length : circuit.rankBy(this.by).length;
    const own = circuit.several ? this.most : (facts.found.n ?? facts.totals[0]);
    this.n = Number.isInteger(n) && (circuit.several || this.by !== "found") ? Math.max(1, Math.min(this.most, n)) : own;
    this.shown = circuit.several ? circuit.compare(union, this.n, this.hidden) : circuit.choose(this.by, this.n);
    this.heaviest = this.shown.edges.reduce((most, edge) => Math.max(most, circuit.strength(edge)), 0) || 1;
    if (!this.shown.nodes.has(this.current)) this.current = null;
    if (!this.shown.nodes.has(this.held)) this.held = null;
  }

  update() {
    this.read();
    this.draw();
  }

  draw() {
    const sizes = this.circuit.nodes.map(({ kind }, node) => (kind === "input" ? 0 : Math.abs(this.circuit.nodeScore(node)) || 0));
    this.top = ceiling(greatest(sizes));
    this.showControls();
    this.showSummary();
    this.showLegend();
    this.drawing.draw();
    this.panel.show();
  }

  showControls() {
    const { circuit, facts, n } = this;
    const sizes = facts.curve?.[this.by === "found" ? (facts.found.by ?? "absolute") : this.by].sizes ?? [];
    this.stops = stopsTo(Math.max(1, this.most), [...sizes, circuit.several ? 1 : (facts.found.n ?? 1)]);
    this.threshold.hidden = this.most < 2 || (circuit.several && !circuit.scored);
    this.slider.max = this.stops.length - 1;
    this.slider.value = this.stops.reduce((best, stop, i) => (Math.abs(stop - n) < Math.abs(this.stops[best] - n) ? i : best), 0);
    this.slider.setAttribute("aria-valuetext", grouped(n) + (sizes.includes(n) ? ", measured" : ""));
    this.number.max = this.most;
    this.number.value = n;
    const places = sizes.map((size) => this.stops.indexOf(size)).filter((at) => at >= 0);
    this.marks.replaceChildren(...places.map((at) => {
      const mark = make("i", { title: `${grouped(this.stops[at])}: measured` });
      mark.style.left = `calc(8px + ${at / (this.stops.length - 1)} * (100% - 16px))`;
      return mark;
    }));
    this.picker.select.value = this.layout;
    this.choice.select.value = this.by;
    for (const { kind, box, text, mark } of this.toggles) {
      box.checked = !this.hidden.has(kind);
      text.textContent = this.kindWords(kind);
      mark.replaceChildren(markOf({ colour: css(PAIR[this.frame.theme][kind]), dash: DASHES[kind] }));
    }
  }

  kindWords(kind) {
    return kind === "shared" ? kind : `only ${this.facts.circuits[this.circuit.circuits[kind === "a" ? 0 : 1]]}`;
  }

  showSummary() {
    const { circuit, facts, summary, shown, by, n } = this;
    if (circuit.several) {
      const counts = circuit.counts();
      Object.assign(summary.dataset, counts);
      const drawn = facts.unit === "edges" && shown.edges.length < this.most ? ` ${counted(shown.edges.length, "edge")} drawn.` : "";
      summary.textContent = `${Object.keys(counts).map((kind) => `${grouped(counts[kind])} ${facts.unit} ${this.kindWords(kind)}`).join(", ")}.${drawn}`;
      return;
    }
    const kept = circuit.kept(by, n);
    Object.assign(summary.dataset, { edges: shown.edges.length, nodes: shown.chosen, kept: kept.share ?? "", at: kept.at });
    const how = by === "found" ? facts.found.by : by;
    const pruned = facts.level === "edge" && shown.edges.length < n ? " (without those that lead nowhere)" : "";
    const size = how ? `the ${grouped(n)} ${how === "signed" ? "highest" : "strongest"} of ${counted(facts.scored, facts.level)}${pruned}` : "";
    summary.textContent = `${[by === "found" ? "the circuit as found" : "", size].filter(Boolean).join(", ").replace("t", "T")}: ${counted(shown.edges.length, "edge")}, ${counted(shown.chosen, "node")}; ${this.keptWords(kept)}`;
  }

  keptWords({ at, share, low, high, sizes = [] }) {
    const { curve, level } = this.facts;
    const [from, to] = sizes.map(grouped);
    const of = `of the effect (${curve?.ablation} ablation${level === "node" ? ", MLPs and input kept" : ""})`;
    return {
      measured: `keeps ${percent(share)} ${of}, measured: 95 % interval ${percent(low)} to ${percent(high)}.`,
      between: `keeps about ${percent(share)} ${of}: not measured, but between the measured sizes ${from} and ${to}.`,
      outside: `what it keeps of the effect was not measured; measured are ${from} to ${to}.`,
      unknown: "what it keeps of the effect was not measured: the curve is of the strongest only.",
      undefined: `what it keeps of the effect is undefined as a share: ${curve?.undefined}.`,
      never: "what it keeps of the effect was not measured: curve=workbench.faithfulness_curve(wb, circuit, task) does it.",
    }[at];
  }

  // Colours.

  paint(node) {
    const { circuit, frame } = this;
    const score = circuit.nodeScore(node);
    const kind = circuit.several ? (circuit.nodeKind(node) ?? this.kindOfEnds(node)) : null;
    if (circuit.several ? !kind : Number.isNaN(score)) return { background: frame.colour("paper"), ink: frame.colour("ink"), shape: "dashed" };
    const rgb = kind ? PAIR[frame.theme][kind] : this.scaleAt(score / this.top);
    return { background: css(rgb), ink: inkOn(rgb), shape: kind ? `is-${kind}` : "" };
  }

  scaleAt(share) {
    return this.facts.signed ? divergingAt(share, this.frame.theme) : colourAt(share, this.frame.theme);
  }

  /** Of a node that is at the end of edges but no item itself. */
  kindOfEnds(node) {
    const kinds = new Set([...this.shown.into(node), ...this.shown.out(node)].map((edge) => this.circuit.edgeKind(edge)));
    return kinds.size > 1 ? "shared" : [...kinds][0];
  }

  stroke(edge) {
    const { circuit, frame } = this;
    const weight = circuit.scored ? circuit.strength(edge) / this.heaviest : 0.15;
    if (circuit.several) return { colour: css(PAIR[frame.theme][circuit.edgeKind(edge)]), dash: DASHES[circuit.edgeKind(edge)], weight };
    const score = circuit.score(edge);
    return Number.isNaN(score) ? { colour: frame.colour("edge"), dash: [1.5, 3], weight: 0.05 } : { ...this.signOf(score), weight };
  }

  signOf(score) {
    return { colour: css(divergingAt(score < 0 ? -0.62 : 0.62, this.frame.theme)), dash: score < 0 ? [5, 3.5] : [] };
  }

  showLegend() {
    const { facts, circuit, top, frame } = this;
    const sign = (mark, words) => make("span", { class: "sign" }, mark, words);
    const wide = circuit.scored ? [make("span", {}, `wider: stronger${circuit.several ? ", as a share of its circuit's largest score" : ""}`)] : [];
    if (circuit.several) {
      const marks = Object.keys(DASHES).map((kind) => {
        const mark = make("i", { class: `shape is-${kind}` });
        mark.style.background = css(PAIR[frame.theme][kind]);
        return sign(mark, `node ${this.kindWords(kind)}`);
      });
      return this.legend.replaceChildren(make("p", { class: "signs" }, ...marks, ...wide));
    }
    const ticks = [[0, facts.signed ? -top : 0], [0.5, facts.signed ? 0 : top / 2], [1, top]].map(([at, value]) => [at, roughly(value)]);
    const beyond = circuit.nodes.some((_, node) => Math.abs(circuit.nodeScore(node)) > top) ? "; the input lies beyond the scale" : "";
    const nodes = legend(gradient((t) => this.scaleAt(facts.signed ? 2 * t - 1 : t)), ticks, make("span", {}, facts.meaning + beyond), make("span", { class: "unscored" }, "not scored"));
    const lines = circuit.scored ? [sign(markOf(this.signOf(1)), "positive edge"), sign(markOf(this.signOf(-1)), "negative edge"), ...wide] : [];
    this.legend.replaceChildren(nodes, make("p", { class: "signs" }, ...lines));
  }

  // Words.

  tag(node) {
    return this.pins.get(node) || this.circuit.nodes[node].role;
  }

  scoreWords(node) {
    const { circuit, facts } = this;
    const kind = circuit.several && circuit.nodeKind(node);
    const known = circuit.circuits.filter((i) => !Number.isNaN(circuit.nodeScore(node, i)));
    const scores = known.map((i) => `${circuit.several ? `${facts.circuits[i]}: ` : ""}score ${exactly(circuit.nodeScore(node, i))}`);
    const { role } = circuit.nodes[node];
    return [...(scores.length ? scores : ["not scored"]), kind ? this.kindWords(kind) : "", role && `suggested: ${role}`].filter(Boolean).join("; ");
  }

  edgeWords(edge) {
    return this.circuit.several ? this.kindWords(this.circuit.edgeKind(edge)) : "";
  }

  sentence(node) {
    const { circuit, shown } = this;
    const name = this.pins.get(node);
    return [circuit.nodes[node].label, name && `named ${name}`, this.scoreWords(node), `${shown.into(node).length} in, ${shown.out(node).length} out`].filter(Boolean).join("; ");
  }

  // The pointer, the keys and the pins.

  /** A node under the pointer, or held by focus. */
  point(node, held) {
    if (held) this.held = node;
    if (held || !this.panel.busy) this.show(node);
  }

  leave() {
    if (!this.panel.busy) this.show(this.held);
  }

  show(node) {
    this.current = node;
    if (node !== null) this.frame.say(this.sentence(node));
    this.drawing.light();
    this.panel.show();
  }

  go(node) {
    if (this.shown.nodes.has(node)) this.drawing.focus(node);
  }

  choose(node) {
    const { head, site } = this.circuit.nodes[node];
    if (head) this.frame.select({ layer: head[0], heads: [head[1]], site });
  }

  /** Whether a key on a node was one of ours. */
  keys(key, node) {
    if (key === "ArrowUp" || key === "ArrowDown") {
      const to = this.shown.step(node, key === "ArrowUp");
      if (to === null) this.frame.say(`${this.circuit.nodes[node].label}: no edge goes on from here`);
      else this.go(to);
    } else if (/^(Arrow|Home|End)/.test(key)) this.go(this.drawing.beside(node, key));
    else if (key === "Enter" || key === " ") this.choose(node);
    else if (key === "p") this.toggle(node);
    else if (key === "n") this.panel.name.focus();
    else if (key === "Escape") {
      this.held = null;
      this.show(null);
      this.frame.select({ layer: null, heads: [], site: null });
    } else return false;
    return true;
  }

  toggle(node) {
    if (this.pins.has(node)) this.savePins([...this.pins].filter(([each]) => each !== node));
    else this.pin(node, "");
    this.frame.say(`${this.circuit.nodes[node].label} ${this.pins.has(node) ? "pinned" : "no longer pinned"}`);
  }

  pin(node, name) {
    this.savePins(new Map(this.pins).set(node, readable(name)));
  }

  savePins(pins) {
    this.frame.keep({ pins: Object.fromEntries(Array.from(pins, ([node, name]) => [this.circuit.nodes[node].name, name])) });
  }
}
