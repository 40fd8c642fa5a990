// Saliency map: attention of the chosen heads, saliency and their difference, one row per output token, under a
// spectrogram with the chosen token's saliency; tokens and sound below.

import { colourAt, css, divergingAt, gradient, inkOn, rgbOf } from "workbench/shared/colour.js";
import { button, cut, legend, make, roughly, selector } from "workbench/shared/dom.js";
import { open } from "workbench/shared/frame.js";
import { colourOf, Drawing } from "./drawing.js";
import { Numbers } from "./numbers.js";
import { sound } from "./player.js";
import { Words } from "./words.js";

export async function render({ model, el }) {
  const frame = await open({ model, el });
  const view = new SaliencyMap(frame);
  return () => {
    view.player?.close();
    frame.close();
  };
}

class SaliencyMap {
  constructor(frame) {
    this.frame = frame;
    this.facts = frame.facts;
    this.numbers = new Numbers(frame);
    this.state = {
      map: 0, // which map attention is compared with
      /** @type {number | "attention" | null} what lies over the spectrogram */
      over: Math.max(0, this.facts.maps.findIndex(({ cells }) => cells)),
      /** @type {number | null} */
      token: null,
      cursor: null,
      heads: null,
      panels: [],
      r: null,
      above: null,
    };
    this.mode = frame.state.heads === "alignment" ? "alignment" : null; // those heads are averaged
    this.at = 0; // the token that Tab reaches
    this.drawing = new Drawing(frame, this.numbers, this.state);
    this.words = new Words(frame, this.numbers, this.state);
    this.head = make("div", { class: "playhead", hidden: true });
    this.box = make("div", { class: "strip", role: "listbox", "aria-label": `${frame.spec.title}: output tokens` });
    this.scales = make("div", { class: "scales" });
    this.text = make("div", { class: "strip text", role: "list", "aria-label": `${frame.spec.title}: input tokens` });
    this.text.hidden = !this.facts.names.length;
    this.over = make("p", { class: "caption" });
    this.over.hidden = this.text.hidden;
    frame.body.append(make("div", { class: "stage" }, this.drawing.canvas, this.head), this.over, this.text, this.box);
    this.text.append(...this.facts.names.map((name, at) => make("span", { role: "listitem", class: "token", "data-at": at }, cut(name))));
    if (this.facts.rate) this.addSound();
    frame.body.append(this.scales);
    this.box.append(...this.facts.tokens.map((_, at) => make("span", { role: "option", class: "token", "data-at": at })));
    this.buildControls();
    this.listen();
    const keys = [["← → ↑ ↓, Home, End", "move over positions and tokens, and up into the spectrogram"], ["Enter", "choose the token in every view"], ["Esc", "choose none: the spectrogram shows the mean over tokens"]];
    frame.offerKeys(this.facts.rate ? [...keys, ["p", "play the chosen token, or everything"]] : keys);
    frame.onSelect((selection) => this.follow(selection));
    frame.onRedraw(() => this.draw());
  }

  buildControls() {
    const { controls, settings } = this.frame;
    const { maps, attention, picture } = this.facts;
    if (attention) {
      this.picker = selector("Attention", this.choices(), (value) => this.pick(value));
      controls.append(this.picker.field);
    }
    const names = maps.map(({ label }) => [label, label]);
    const at = (name) => maps.findIndex(({ label }) => label === name);
    const compared = settings.pick("map", attention ? "Compared with" : "Show", names, names[0][0], (name) => {
      this.state.map = at(name);
      this.draw();
    });
    this.state.map = at(compared.value);
    if (maps.length > 1) controls.append(compared.field);
    const scales = [["row", "each token, least to largest"], ["all", "one scale for all tokens"], ["z", "standardised per token"]];
    const scaled = settings.pick("scale", "Colours", scales, "row", (scale) => {
      this.scale = scale;
      this.draw();
    });
    this.scale = scaled.value;
    controls.append(scaled.field);
    if (picture) {
      const more = attention ? [["attention", "attention"]] : [];
      const meant = (name) => (name === "" ? null : at(name) < 0 ? name : at(name));
      const over = settings.pick("over", "Over the spectrogram", [...names, ...more, ["", "nothing"]], maps[this.state.over].label, (name) => {
        this.state.over = meant(name);
        this.draw();
      });
      this.state.over = meant(over.value);
      controls.append(over.field);
    }
  }

  choices() {
    const { layers, heads, alignment } = this.facts.attention;
    const marked = (layer, head) => alignment.some(([a, b]) => a === layer && b === head);
    const found = [["all", "all heads, mean"]];
    if (alignment.length) found.push(["alignment", "alignment heads, mean"]);
    for (const layer of layers) found.push([`${layer}`, `layer ${layer}, mean`]);
    for (const layer of layers) for (let head = 0; head < heads; head++) found.push([`${layer}:${head}`, `L${layer}H${head}${marked(layer, head) ? " (alignment head)" : ""}`]);
    return found;
  }

  /** A choice of heads: those of a layer are chosen in every view. */
  pick(value) {
    this.mode = value === "alignment" ? value : null;
    this.frame.keep({ heads: this.mode });
    const [layer, head] = value.split(":").map(Number);
    if (Number.isNaN(layer)) this.frame.select({ layer: null, heads: [], site: null });
    else this.frame.select({ layer, heads: head === undefined ? [] : [head], site: null });
    this.draw();
  }

  draw() {
    const { state, numbers, drawing, scale } = this;
    if (!drawing.canvas.isConnected) return;
    state.heads = this.facts.attention ? numbers.chosen(this.frame.selection, this.mode) : null;
    if (this.picker) this.picker.select.value = state.heads.value;
    Object.assign(state, numbers.panels({ map: state.map, scale, heads: state.heads }));
    state.above = numbers.overlay(state.over, state.token, state.panels);
    drawing.draw();
    this.drawTokens();
    this.drawText();
    this.drawScales();
  }

  /** The input's tokens in the colours of the chosen output's row; grey while none is chosen. */
  drawText() {
    const { facts, frame, state } = this;
    if (this.text.hidden) return;
    const panel = state.panels.find(({ name }) => name === facts.maps[state.map].label);
    const { token } = state;
    for (const part of [this.over, this.text]) part.classList.toggle("screen", token === null); // paper cannot be pressed
    this.over.textContent = token === null ? "Choose an output token below, and the input's tokens take the colours of its row." : `Input tokens in the colours of “${cut(facts.tokens[token])}”, whose row is chosen:`;
    [...this.text.children].forEach((span, at) => {
      const value = token === null ? NaN : panel.values[token * facts.positions + at];
      const rgb = colourOf(value, token ?? 0, panel, frame);
      span.style.backgroundColor = css(rgb);
      span.style.color = inkOn(rgb);
      span.setAttribute("aria-label", token === null ? facts.names[at] : this.words.sentence({ row: token, column: at, bin: null }));
    });
  }

  drawTokens() {
    const { facts, frame } = this;
    const table = this.state.r?.rows;
    [...this.box.children].forEach((span, at) => {
      const r = table ? table[at] : null;
      const rgb = r === null ? null : divergingAt(r, frame.theme);
      span.textContent = cut(facts.tokens[at]);
      span.style.backgroundColor = rgb ? css(rgb) : frame.colour("unseen");
      span.style.color = rgb ? inkOn(rgb) : frame.colour("ink");
      span.setAttribute("aria-selected", `${at === this.state.token}`);
      span.setAttribute("aria-label", this.words.tokenSentence(at));
      span.tabIndex = at === this.at ? 0 : -1;
    });
  }

  drawScales() {
    const { theme } = this.frame;
    const found = [];
    const both = (top, text) => legend(gradient((t) => divergingAt(2 * t - 1, theme)), [[0, roughly(-top)], [0.5, "0"], [1, roughly(top)]], make("span", {}, text));
    const one = (top, text) => legend(gradient(colourAt, this.frame.theme), top === null ? [[0, "the token's least"], [1, "its largest"]] : [[0, "0"], [0.5, roughly(top / 2)], [1, roughly(top)]], make("span", {}, text));
    const rows = this.state.panels.filter(({ tops }) => tops);
    if (rows.length) found.push(rows.some(({ signed }) => !signed) ? one(null, rows.filter(({ signed }) => !signed).map(({ label }) => label.split(", ")[0]).join(" and ")) : both(1, "share of the token's largest"));
    for (const { tops, signed, top, title, unit } of this.state.panels) {
      if (tops) continue;
      const name = unit === "sd" ? title.split(",")[0] : title.split(/[,;]/)[0];
      const what = this.scale === "z" || unit === "sd" ? `${name}, standard deviations` : `${name}${unit ? `, ${unit}` : ""}`;
      found.push(signed ? both(top, what) : one(top, what));
    }
    if (this.state.r) found.push(both(1, "tokens: r of attention and saliency"));
    if (this.state.above) {
      const warm = rgbOf(this.frame.colour("cursor"));
      const bar = `linear-gradient(to right, rgb(${warm.join(" ")} / 0), rgb(${warm.join(" ")} / 0.92))`;
      found.push(legend(bar, [[0, "mean"], [1, `+${roughly(this.state.above.top)} sd`]], make("span", {}, "over the spectrogram")));
    }
    this.scales.replaceChildren(...found);
  }

  addSound() {
    this.player = sound(this.frame.blocks.audio.data, this.facts.rate, (seconds) => this.playing(seconds));
    this.said = button("Play the token", () => this.play());
    this.frame.body.append(make("div", { class: "sound" }, this.player.element, this.said));
  }

  /** The span of the chosen token, as it was said where that is known, or everything. */
  play() {
    const { numbers, facts } = this;
    const { token } = this.state;
    const known = (list) => numbers.span(list, token)[1] > 0;
    const list = token === null ? undefined : [...numbers.lane, ...facts.spans.keys()].find(known);
    const [from, to] = list === undefined ? [0, Infinity] : numbers.span(list, token);
    this.player.play(from, to);
  }

  playing(seconds) {
    this.head.hidden = seconds === null || !this.drawing.lay;
    if (this.head.hidden) return;
    this.head.style.left = `${this.drawing.x(seconds)}px`;
    this.head.style.top = `${this.drawing.lay.places[0].top}px`;
    this.head.style.height = `${this.drawing.lay.axis - this.drawing.lay.places[0].top}px`;
  }

  listen() {
    const { box, frame } = this;
    const { canvas } = this.drawing;
    canvas.addEventListener("pointermove", (event) => this.hover(event));
    canvas.addEventListener("pointerleave", () => this.leave());
    canvas.addEventListener("click", (event) => {
      const cell = this.cellAt(event);
      if (cell && cell.bin === null) this.choose(cell.row);
    });
    canvas.addEventListener("keydown", (event) => this.key(event));
    canvas.addEventListener("blur", () => this.point(null));
    box.addEventListener("click", (event) => {
      const span = event.target.closest("[data-at]");
      if (span) this.choose(Number(span.dataset.at));
    });
    box.addEventListener("pointermove", (event) => {
      const span = event.target.closest("[data-at]");
      if (span) frame.showTip(event, [this.words.tokenSentence(Number(span.dataset.at))]);
      else frame.hideTip();
    });
    box.addEventListener("pointerleave", () => frame.hideTip());
    this.text.addEventListener("pointermove", (event) => {
      const span = event.target.closest("[data-at]");
      if (!span || this.state.token === null) return frame.hideTip();
      const cell = { row: this.state.token, column: Number(span.dataset.at), bin: null };
      frame.showTip(event, this.words.sentence(cell).split(/(?<=:) /));
      this.point(cell);
    });
    this.text.addEventListener("pointerleave", () => this.leave());
    box.addEventListener("keydown", (event) => this.tokenKey(event));
  }

  cellAt(event) {
    const { facts } = this;
    const { lay } = this.drawing;
    const bounds = this.drawing.canvas.getBoundingClientRect();
    const [x, y] = [event.clientX - bounds.left - lay.left, event.clientY - bounds.top];
    const panel = lay.places.findIndex(({ top, height }) => y >= top && y < top + height);
    if (panel < 0 || x < 0 || x >= lay.width) return null;
    const column = Math.min(facts.positions - 1, Math.floor((x / lay.width) * facts.positions));
    const { top, height } = lay.places[panel];
    if (facts.picture && panel === 0) return { row: this.state.token ?? 0, column, bin: Math.floor((1 - (y - top) / height) * this.frame.blocks.picture.shape[1] - 1e-9) };
    return { row: Math.min(this.numbers.n - 1, Math.floor((y - top) / lay.row)), column, bin: null };
  }

  hover(event) {
    const cell = this.cellAt(event);
    this.point(cell);
    if (cell) this.frame.showTip(event, this.words.sentence(cell).split(/(?<=:) /));
    else this.frame.hideTip();
  }

  leave() {
    this.frame.hideTip();
    this.point(null);
  }

  point(cell) {
    if (JSON.stringify(cell) === JSON.stringify(this.state.cursor)) return;
    this.state.cursor = cell;
    if (cell) this.frame.say(this.words.sentence(cell));
    requestAnimationFrame(() => this.drawing.compose());
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const start = this.state.cursor ?? { row: this.state.token ?? 0, column: 0, bin: null };
    const bins = this.facts.picture ? this.frame.blocks.picture.shape[1] : 0;
    const to = { ...start };
    if (event.key === "ArrowLeft") to.column--;
    else if (event.key === "ArrowRight") to.column++;
    else if (event.key === "Home") to.column = 0;
    else if (event.key === "End") to.column = this.facts.positions - 1;
    else if (event.key === "ArrowUp" || event.key === "ArrowDown") this.step(to, event.key === "ArrowUp" ? -1 : 1, bins);
    else if (event.key === "Enter" || event.key === " ") this.choose(start.row);
    else if (event.key === "Escape") this.frame.select({ token: null });
    else if (event.key === "p" && this.player) this.play();
    else return;
    event.preventDefault();
    to.column = Math.max(0, Math.min(this.facts.positions - 1, to.column));
    this.point(to);
  }

  /** Down over tokens; up from the first one into the spectrogram, whose low frequencies come first. */
  step(to, by, bins) {
    if (to.bin !== null) {
      to.bin -= by;
      if (to.bin < 0) Object.assign(to, { bin: null, row: 0 });
      else to.bin = Math.min(bins - 1, to.bin);
    } else if (to.row + by < 0 && bins) to.bin = 0;
    else to.row = Math.max(0, Math.min(this.numbers.n - 1, to.row + by));
  }

  tokenKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const steps = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1, Home: -Infinity, End: Infinity };
    if (event.key === "Enter" || event.key === " ") this.choose(this.at);
    else if (event.key === "Escape") this.frame.select({ token: null });
    else if (event.key === "p" && this.player) this.play();
    else if (event.key in steps) {
      this.at = Math.max(0, Math.min(this.numbers.n - 1, this.at + steps[event.key]));
      this.drawTokens();
      this.box.children[this.at].focus();
      this.frame.say(this.words.tokenSentence(this.at));
    } else return;
    event.preventDefault();
  }

  choose(token) {
    this.frame.select({ token: this.state.token === token ? null : token });
  }

  follow({ token }) {
    this.state.token = token !== null && token < this.numbers.n ? token : null;
    if (this.state.token !== null) this.at = this.state.token;
    if (this.said) this.said.textContent = this.state.token === null ? "Play everything" : `Play “${cut(this.facts.tokens[this.state.token], 14)}”`;
    if (!this.drawing.lay) return;
    this.draw();
    if (this.state.token !== null) this.frame.say(this.words.tokenSentence(this.state.token));
  }
}
