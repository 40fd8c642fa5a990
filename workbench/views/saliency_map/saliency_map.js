// Saliency map: attention of the chosen heads, saliency and their difference, one row per output token, under a
// spectrogram with the chosen token's saliency; tokens and sound below.

import { ceiling, colourAt, css, divergingAt, gradient, inkOn } from "workbench/shared/colour.js";
import { button, cut, exactly, legend, make, named, roughly, selector } from "workbench/shared/dom.js";
import { open } from "workbench/shared/frame.js";
import { rgbOf, sound, standardise, correlated } from "./speech.js";

const PICTURE = 190; // height of the spectrogram
const TITLE = 22;
const AXIS = 28;
const LANE = 19; // above the spectrogram, for what was said when
const RIGHT = 58;

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
    Object.assign(this, { frame, facts: frame.facts, map: 0, over: 0, scale: "row", mode: null, cursor: null, at: 0 });
    this.n = this.facts.tokens.length;
    this.over = Math.max(0, this.facts.maps.findIndex(({ cells }) => cells));
    this.canvas = make("canvas", { tabindex: "0", role: "application", "aria-roledescription": "map of tokens by positions" });
    this.head = make("div", { class: "playhead", hidden: true });
    this.box = make("div", { class: "strip", role: "listbox", "aria-label": `${frame.spec.title}: output tokens` });
    this.scales = make("div", { class: "scales" });
    const stage = make("div", { class: "stage" }, this.canvas, this.head);
    frame.body.append(stage, this.box);
    if (this.facts.rate) this.addSound();
    frame.body.append(this.scales);
    // Spans of no panel stand above the spectrogram.
    const panels = ["attention", ...this.facts.maps.map(({ label }) => label)];
    this.lane = this.facts.spans.map((name, s) => (panels.includes(name) ? -1 : s)).filter((s) => s >= 0);
    this.box.append(...this.facts.tokens.map((_, at) => make("span", { role: "option", class: "token", "data-at": at })));
    this.buildControls();
    this.listen();
    const keys = [["← → ↑ ↓, Home, End", "move over positions and tokens, and up into the spectrogram"], ["Enter", "choose the token in every view"], ["Esc", "choose none: the spectrogram shows the mean over tokens"]];
    frame.offerKeys(this.facts.rate ? [...keys, ["p", "play the chosen token, or everything"]] : keys);
    frame.offerPicture(() => this.canvas);
    frame.onSelect((selection) => this.follow(selection));
    frame.onRedraw(() => this.draw());
  }

  // Controls.

  buildControls() {
    const { controls } = this.frame;
    const { maps, attention, picture } = this.facts;
    if (attention) {
      this.picker = selector("Attention", this.choices(), (value) => this.pick(value));
      controls.append(this.picker.field);
    }
    const names = maps.map(({ label }, i) => [i, label]);
    if (maps.length > 1) {
      const compared = selector(attention ? "Compared with" : "Show", names, (i) => {
        this.map = Number(i);
        this.draw();
      });
      controls.append(compared.field);
    }
    const scaled = selector("Colours", [["row", "each token, least to largest"], ["all", "one scale for all tokens"], ["z", "standardised per token"]], (scale) => {
      this.scale = scale;
      this.draw();
    });
    controls.append(scaled.field);
    if (picture) {
      const more = attention ? [["attention", "attention"]] : [];
      const over = selector("Over the spectrogram", [...names, ...more, ["", "nothing"]], (value) => {
        this.over = value === "" ? null : value === "attention" ? value : Number(value);
        this.draw();
      });
      over.select.value = `${this.over}`;
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
    const [layer, head] = value.split(":").map(Number);
    if (Number.isNaN(layer)) this.frame.select({ layer: null, heads: [], site: null });
    else this.frame.select({ layer, heads: head === undefined ? [] : [head], site: null });
    this.draw();
  }

  /** [layer index, head] pairs that are averaged, and what they are called. */
  chosen() {
    const { layers, heads, alignment } = this.facts.attention;
    const several = Array.from({ length: Math.max(1, heads) }, (_, i) => i);
    const { layer, heads: some, site } = this.frame.selection;
    const at = site === null ? layers.indexOf(layer) : -1;
    if (at >= 0) {
      const fit = some.filter((head) => head < heads);
      if (some.length && fit.length) return { value: fit.length === 1 ? `${layer}:${fit[0]}` : `${layer}`, name: `L${layer}H${fit.join("+")}`, pairs: fit.map((head) => [at, head]) };
      if (!some.length) return { value: `${layer}`, name: `mean of layer ${layer}`, pairs: several.map((head) => [at, head]) };
    }
    if (this.mode === "alignment") return { value: "alignment", name: "mean of the alignment heads", pairs: alignment.map(([a, b]) => [layers.indexOf(a), b]).filter(([a, b]) => a >= 0 && b < heads) };
    return { value: "all", name: "mean of all heads", pairs: layers.flatMap((_, i) => several.map((head) => [i, head])) };
  }

  // Numbers.

  /** [token x position] of the chosen heads. */
  attention() {
    const { data, shape } = this.frame.blocks.attention;
    const { pairs } = this.heads;
    const size = shape[2] * shape[3];
    const rows = new Float64Array(size);
    for (const [layer, head] of pairs) {
      const start = (layer * shape[1] + head) * size;
      for (let i = 0; i < size; i++) rows[i] += data[start + i] / pairs.length;
    }
    return rows;
  }

  compute() {
    const { blocks, facts } = this.frame;
    const saliency = Float64Array.from(blocks[`strip${this.map}`].data);
    const about = facts.maps[this.map];
    const standard = standardise(saliency, this.n);
    this.panels = [];
    this.r = null;
    if (facts.attention) {
      this.heads = this.chosen();
      if (this.picker) this.picker.select.value = this.heads.value;
      const attention = this.attention();
      const own = standardise(attention, this.n);
      const difference = own.map((value, i) => value - standard[i]);
      this.r = correlated(own, standard, this.n, facts.special);
      const r = this.r.all === null ? "a map is constant: no correlation" : `r ${this.r.all.toFixed(2)}${facts.special.some(Boolean) ? " without special tokens" : ""}`;
      this.panels.push(this.panel("attention", `Cross-attention, ${this.heads.name}`, "weight", attention, own, facts.attention.signed));
      this.panels.push(this.panel(about.label, about.label, about.unit, saliency, standard, about.signed));
      this.panels.push({ name: "difference", title: `Attention − ${about.label}, rows standardised; ${r}`, label: "difference", unit: "sd", values: difference, signed: true, tops: null, top: this.largest(difference) });
    } else this.panels.push(this.panel(about.label, about.label, about.unit, saliency, standard, about.signed));
  }

  panel(name, label, unit, raw, standard, signed) {
    const z = this.scale === "z";
    const values = z ? standard : raw;
    const columns = raw.length / this.n;
    const rows = Array.from({ length: this.n }, (_, row) => values.subarray(row * columns, (row + 1) * columns));
    // Scores of masking have a floor: a row is coloured from its least to its largest, as SPES scales them.
    const tops = this.scale !== "row" ? null : signed ? rows.map((part) => [0, this.largest(part) || 1]) : rows.map((part) => [Math.min(...part), Math.max(...part)]);
    return { name, title: `${label[0].toUpperCase()}${label.slice(1)}${z ? ", standardised per token" : ""}`, label, unit, raw, values, signed: signed || z, tops, top: z ? this.largest(values) : ceiling(this.largest(values)) };
  }

  largest(values) {
    let top = 0;
    for (const value of values) top = Math.max(top, Math.abs(value));
    return top;
  }

  /** What lies over the spectrogram: [frame x bin] standard deviations above the mean, of the token or the mean over tokens. */
  overlay() {
    if (this.over === null || !this.frame.blocks.picture) return null;
    const { blocks, facts } = this.frame;
    const rows = this.token === null ? facts.special.map((odd, i) => (odd ? -1 : i)).filter((i) => i >= 0) : [this.token];
    const about = this.over === "attention" ? { label: "attention", cells: null } : facts.maps[this.over];
    const [data, shape] = this.over === "attention" ? [this.panels[0].raw, null] : [blocks[`${about.cells ? "cells" : "strip"}${this.over}`].data, null];
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

  // Drawing.

  layout() {
    const { facts, frame } = this;
    const ink = this.canvas.getContext("2d");
    const font = `11px ${frame.colour("mono")}`;
    ink.font = font;
    const longest = Math.max(...facts.tokens.map((token) => ink.measureText(cut(token, 14)).width));
    const left = Math.round(Math.min(118, Math.max(46, longest + 14)));
    const width = Math.max(120, (frame.body.clientWidth || 800) - left - (facts.attention ? RIGHT : 12));
    const row = Math.max(8, Math.min(24, Math.floor(168 / this.n)));
    let y = 2;
    const places = [];
    const lane = this.lane.length ? LANE : 0;
    if (facts.picture) {
      places.push({ top: y + TITLE + lane, height: PICTURE });
      y += TITLE + lane + PICTURE + 8;
    }
    for (let i = 0; i < this.panels.length; i++) {
      places.push({ top: y + TITLE, height: row * this.n });
      y += TITLE + row * this.n + 8;
    }
    const names = facts.names.length ? Math.min(96, 12 + Math.max(...facts.names.map((name) => ink.measureText(cut(name, 14)).width))) : AXIS;
    return { left, width, row, places, height: y + names, axis: y - 4, font };
  }

  get end() {
    return this.facts.positions * this.facts.step;
  }

  draw() {
    if (!this.canvas.isConnected) return;
    this.compute();
    this.lay = this.layout();
    this.above = this.overlay();
    this.images = null;
    this.compose();
    this.drawTokens();
    this.drawScales();
  }

  compose() {
    const { canvas, lay, frame } = this;
    if (!lay) return;
    const dpr = window.devicePixelRatio || 1;
    const right = this.facts.attention ? RIGHT : 12;
    canvas.width = Math.ceil((lay.left + lay.width + right) * dpr);
    canvas.height = Math.ceil(lay.height * dpr);
    canvas.style.width = `${canvas.width / dpr}px`;
    canvas.style.height = `${canvas.height / dpr}px`;
    canvas.dataset.left = lay.left;
    canvas.dataset.width = lay.width;
    canvas.dataset.rows = JSON.stringify(lay.places.map(({ top }) => top));
    canvas.dataset.row = lay.row;
    const said = this.token === null ? "mean over tokens" : this.facts.tokens[this.token];
    canvas.setAttribute("aria-label", `${this.panels.map(({ title }) => title).join("; ")}; over the spectrogram: ${said}. Arrow keys move.`);
    const ink = canvas.getContext("2d");
    ink.setTransform(dpr, 0, 0, dpr, 0, 0);
    ink.fillStyle = frame.colour("paper");
    ink.fillRect(0, 0, canvas.width, canvas.height);
    this.images ??= this.paint(dpr);
    let at = 0;
    if (this.facts.picture) this.drawPicture(ink, lay.places[at], this.images[at++]);
    for (const panel of this.panels) this.drawStrip(ink, panel, lay.places[at], this.images[at++]);
    this.drawAxis(ink);
    this.drawCursor(ink);
  }

  /** Every panel as an image. */
  paint(dpr) {
    const { facts, frame, lay } = this;
    const found = [];
    if (facts.picture) {
      const { data, shape } = frame.blocks.picture;
      const [frames, bins] = shape;
      const [paper, dark, warm] = ["paper", "ink", "cursor"].map((name) => rgbOf(frame.colour(name)));
      const mixed = [0, 0, 0]; // one for all pixels: there are many
      found.push(image(frames, bins, (x, y) => {
        const bin = bins - 1 - y;
        const grey = (0.8 * data[x * bins + bin]) / 255;
        const z = this.above ? this.aboveAt(x, bin) : 0;
        const alpha = z > 0 ? 0.92 * Math.min(1, z / this.above.top) : 0;
        for (let k = 0; k < 3; k++) mixed[k] = (paper[k] + (dark[k] - paper[k]) * grey) * (1 - alpha) + warm[k] * alpha;
        return mixed;
      }));
    }
    const columns = facts.positions;
    const wide = Math.min(columns, Math.round(lay.width * dpr)); // the largest of each pixel's positions where there are more
    for (const { values, tops, top, signed } of this.panels) {
      found.push(image(wide, this.n, (x, row) => {
        const [from, to] = [Math.floor((x * columns) / wide), Math.max(Math.floor((x * columns) / wide) + 1, Math.floor(((x + 1) * columns) / wide))];
        let best = values[row * columns + from];
        for (let i = from + 1; i < to; i++) if (Math.abs(values[row * columns + i]) > Math.abs(best)) best = values[row * columns + i];
        const [low, high] = tops ? tops[row] : [0, top];
        const t = (best - low) / (high - low || 1);
        return signed ? divergingAt(t, frame.theme) : colourAt(t);
      }));
    }
    return found;
  }

  aboveAt(frame, bin) {
    const { values, bins, step } = this.above;
    const at = Math.min(values.length / bins - 1, Math.floor(((frame + 0.5) * this.facts.picture.step) / step));
    return values[at * bins + (bins === 1 ? 0 : bin)];
  }

  title(ink, text, top) {
    const { lay, frame } = this;
    ink.font = `600 12.5px ${frame.colour("sans")}`;
    ink.fillStyle = frame.colour("ink");
    ink.textAlign = "left";
    ink.textBaseline = "alphabetic";
    let shown = text;
    while (shown.length > 8 && ink.measureText(shown).width > lay.width + 40) shown = `${shown.replace(/…$/, "").slice(0, -1).trimEnd()}…`;
    ink.fillText(shown, lay.left, top - 7);
  }

  drawPicture(ink, { top, height }, picture) {
    const { lay, frame, facts } = this;
    const { step, label } = facts.picture;
    const [frames, bins] = frame.blocks.picture.shape;
    const who = this.token === null ? "mean over tokens" : `“${cut(facts.tokens[this.token])}”`;
    const title = this.above ? `Spectrogram; coloured where ${this.above.label} is above its mean, ${who}` : "Spectrogram";
    this.title(ink, title, top - (this.lane.length ? LANE : 0));
    const width = (lay.width * frames * step) / this.end;
    ink.imageSmoothingEnabled = frames > lay.width;
    ink.drawImage(picture, lay.left, top, width, height);
    ink.font = lay.font;
    ink.fillStyle = ink.strokeStyle = frame.colour("muted");
    ink.textAlign = "right";
    ink.textBaseline = "middle";
    const every = Math.max(1, Math.ceil(bins / 4 / 5) * 5);
    for (let bin = 0; bin < bins; bin += every) ink.fillText(`${bin}`, lay.left - 6, Math.min(top + height - 5, top + height * (1 - (bin + 0.5) / bins)));
    ink.save();
    ink.translate(Math.max(9, lay.left - 36), top + height / 2);
    ink.rotate(-Math.PI / 2);
    ink.textAlign = "center";
    ink.fillText(label, 0, 0);
    ink.restore();
    ink.strokeStyle = frame.colour("line");
    ink.strokeRect(lay.left - 0.5, top - 0.5, width + 1, height + 1);
    this.drawSpans(ink, top);
  }

  /** Brackets above the spectrogram: where tokens were said. */
  drawSpans(ink, top) {
    const { lay, frame, facts } = this;
    for (const s of this.lane) {
      const { data } = frame.blocks.spans;
      for (let token = 0; token < this.n; token++) {
        const [from, to] = [0, 1].map((end) => data[(s * this.n + token) * 2 + end]);
        if (!(to > from)) continue;
        const [left, right] = [Math.round(this.x(from)) + 0.5, Math.round(this.x(to)) - 0.5];
        const chosen = token === this.token;
        ink.fillStyle = ink.strokeStyle = frame.colour(chosen ? "accent" : "muted");
        ink.lineWidth = chosen ? 2 : 1;
        ink.beginPath();
        ink.moveTo(left, top - 1);
        ink.lineTo(left, top - 5);
        ink.lineTo(right, top - 5);
        ink.lineTo(right, top - 1);
        ink.stroke();
        ink.font = `${chosen ? "600 " : ""}${lay.font}`;
        ink.fillStyle = frame.colour(chosen ? "accent" : "ink");
        ink.textAlign = "center";
        ink.textBaseline = "alphabetic";
        const text = cut(facts.tokens[token], 12);
        if (ink.measureText(text).width < right - left + 16) ink.fillText(text, (left + right) / 2, top - 8);
      }
    }
    ink.lineWidth = 1;
  }

  drawStrip(ink, panel, { top, height }, picture) {
    const { lay, frame, facts } = this;
    this.title(ink, panel.title, top);
    ink.imageSmoothingEnabled = false;
    ink.drawImage(picture, lay.left, top, lay.width, height);
    const span = facts.spans.indexOf(panel.name);
    const every = Math.max(1, Math.ceil(11 / lay.row));
    ink.textBaseline = "middle";
    for (let token = 0; token < this.n; token++) {
      const chosen = token === this.token;
      const y = top + token * lay.row;
      if (span >= 0) this.outline(ink, span, token, y);
      if (token % every && !chosen) continue;
      ink.font = `${chosen ? "600 " : ""}${lay.font}`;
      ink.fillStyle = frame.colour(chosen ? "accent" : facts.special[token] ? "muted" : "ink");
      ink.textAlign = "right";
      ink.fillText(cut(facts.tokens[token], 14), lay.left - 6, y + lay.row / 2);
      if (panel.name !== "difference" || this.r === null) continue;
      const r = this.r.rows[token];
      ink.textAlign = "left";
      ink.fillText(r === null ? "r –" : `r ${r.toFixed(2)}`, lay.left + lay.width + 6, y + lay.row / 2);
    }
    ink.strokeStyle = frame.colour("line");
    ink.strokeRect(lay.left - 0.5, top - 0.5, lay.width + 1, height + 1);
    if (this.token === null) return;
    ink.strokeStyle = frame.colour("accent");
    ink.lineWidth = 1.5;
    ink.strokeRect(lay.left - 1, top + this.token * lay.row - 0.5, lay.width + 2, lay.row + 1);
    ink.lineWidth = 1;
  }

  outline(ink, span, token, y) {
    const { data } = this.frame.blocks.spans;
    const [from, to] = [0, 1].map((end) => data[(span * this.n + token) * 2 + end]);
    if (!(to > from)) return;
    const box = [this.x(from) + 1, y + 1, Math.max(2, this.x(to) - this.x(from) - 2), this.lay.row - 2];
    for (const [colour, width] of [["rgb(0 0 0 / 0.55)", 3], ["#ffffff", 1]]) {
      ink.strokeStyle = colour;
      ink.lineWidth = width;
      ink.strokeRect(...box);
    }
  }

  x(at) {
    return this.lay.left + (this.lay.width * Math.min(at, this.end)) / this.end;
  }

  drawAxis(ink) {
    const { lay, frame, facts } = this;
    ink.strokeStyle = ink.fillStyle = frame.colour("ink");
    ink.font = lay.font;
    if (facts.names.length) {
      const pitch = lay.width / facts.positions;
      const every = Math.max(1, Math.ceil(12 / pitch));
      ink.textAlign = "right";
      ink.textBaseline = "middle";
      for (let i = 0; i < facts.positions; i += every) {
        ink.save();
        ink.translate(this.x((i + 0.5) * facts.step), lay.axis + 4);
        ink.rotate(-Math.PI / 2);
        ink.fillText(cut(facts.names[i], 14), 0, 0);
        ink.restore();
      }
      return;
    }
    const least = (this.end * 60) / lay.width;
    const power = 10 ** Math.floor(Math.log10(least));
    const step = power * [1, 2, 5, 10].find((times) => times * power >= least);
    ink.textAlign = "center";
    ink.textBaseline = "top";
    const whole = Math.floor(this.end / step + 1e-9);
    for (let i = 0; i <= whole; i++) {
      const x = Math.round(this.x(i * step)) + 0.5;
      ink.beginPath();
      ink.moveTo(x, lay.axis);
      ink.lineTo(x, lay.axis + 4);
      ink.stroke();
      ink.fillText(`${Number((i * step).toPrecision(6))}${i === whole ? ` ${facts.unit}` : ""}`, x, lay.axis + 7);
    }
  }

  drawCursor(ink) {
    const { cursor, lay, facts, frame } = this;
    if (!cursor) return;
    ink.strokeStyle = frame.colour("cursor");
    ink.lineWidth = 1.5;
    const x = this.x((cursor.column + 0.5) * facts.step);
    for (const { top, height } of lay.places) {
      ink.beginPath();
      ink.moveTo(x, top);
      ink.lineTo(x, top + height);
      ink.stroke();
    }
    const strips = facts.picture ? lay.places.slice(1) : lay.places;
    const pitch = Math.max(4, lay.width / facts.positions);
    if (cursor.bin === null) for (const { top } of strips) ink.strokeRect(x - pitch / 2, top + cursor.row * lay.row, pitch, lay.row);
    else {
      const { top, height } = lay.places[0];
      const y = top + height * (1 - (cursor.bin + 0.5) / frame.blocks.picture.shape[1]);
      ink.strokeRect(x - 4, y - 4, 8, 8);
    }
    ink.lineWidth = 1;
  }

  drawTokens() {
    const { facts, frame } = this;
    const table = this.r?.rows;
    [...this.box.children].forEach((span, at) => {
      const r = table ? table[at] : null;
      const rgb = r === null ? null : divergingAt(r, frame.theme);
      span.textContent = cut(facts.tokens[at]);
      span.style.backgroundColor = rgb ? css(rgb) : frame.colour("unseen");
      span.style.color = rgb ? inkOn(rgb) : frame.colour("ink");
      span.setAttribute("aria-selected", `${at === this.token}`);
      span.setAttribute("aria-label", this.tokenSentence(at));
      span.tabIndex = at === this.at ? 0 : -1;
    });
  }

  drawScales() {
    const { theme } = this.frame;
    const found = [];
    const both = (top, text) => legend(gradient((t) => divergingAt(2 * t - 1, theme)), [[0, roughly(-top)], [0.5, "0"], [1, roughly(top)]], make("span", {}, text));
    const one = (top, text) => legend(gradient(colourAt), top === null ? [[0, "the token's least"], [1, "its largest"]] : [[0, "0"], [0.5, roughly(top / 2)], [1, roughly(top)]], make("span", {}, text));
    const rows = this.panels.filter(({ tops }) => tops);
    if (rows.length) found.push(rows.some(({ signed }) => !signed) ? one(null, rows.filter(({ signed }) => !signed).map(({ label }) => label.split(", ")[0]).join(" and ")) : both(1, "share of the token's largest"));
    for (const { tops, signed, top, title, unit } of this.panels) {
      if (tops) continue;
      const name = unit === "sd" ? title.split(",")[0] : title.split(/[,;]/)[0];
      const what = this.scale === "z" || unit === "sd" ? `${name}, standard deviations` : `${name}${unit ? `, ${unit}` : ""}`;
      found.push(signed ? both(top, what) : one(top, what));
    }
    if (this.r) found.push(both(1, "tokens: r of attention and saliency"));
    if (this.above) {
      const warm = rgbOf(this.frame.colour("cursor"));
      const bar = `linear-gradient(to right, rgb(${warm.join(" ")} / 0), rgb(${warm.join(" ")} / 0.92))`;
      found.push(legend(bar, [[0, "mean"], [1, `+${roughly(this.above.top)} sd`]], make("span", {}, "over the spectrogram")));
    }
    this.scales.replaceChildren(...found);
  }

  // Words.

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
      const about = typeof this.over === "number" ? facts.maps[this.over] : null;
      const bins = frame.blocks.picture.shape[1];
      const at = Math.min(frame.blocks.picture.shape[0] - 1, Math.floor(((column + 0.5) * facts.step) / facts.picture.step));
      if (about?.cells && this.token !== null) {
        const { data, shape } = frame.blocks[`cells${this.over}`];
        const { low, high, block } = about.cells;
        const value = low + ((high - low) * data[(this.token * shape[1] + Math.floor(at / block)) * bins + bin]) / 65535;
        parts.push(`${about.label} of “${cut(facts.tokens[this.token])}” ${exactly(value)}${about.unit ? ` ${about.unit}` : ""}`);
      }
      if (this.above) parts.push(`${roughly(this.aboveAt(at, bin))} sd from its mean`);
      return parts.join(": ");
    }
    const at = row * facts.positions + column;
    const parts = this.panels.map(({ label, raw, values, unit }) => `${label.replace(/^Cross-attention/, "attention")} ${exactly((raw ?? values)[at])}${unit && unit !== "weight" ? ` ${unit}` : ""}${label === facts.maps[this.map].label ? this.error(at) : ""}`);
    return `${named(facts.tokens[row], row)}, ${this.when(column)}: ${parts.join(", ")}`;
  }

  error(at) {
    const block = this.frame.blocks[`error${this.map}`];
    return block ? ` ± ${roughly(block.data[at])}` : "";
  }

  tokenSentence(token) {
    const { facts, frame } = this;
    const parts = [];
    if (this.r) parts.push(this.r.rows[token] === null ? "no correlation, a row is constant" : `r of attention and ${facts.maps[this.map].label} ${this.r.rows[token].toFixed(3)}`);
    facts.spans.forEach((name, s) => {
      const [from, to] = [0, 1].map((end) => frame.blocks.spans.data[(s * this.n + token) * 2 + end]);
      if (to > from) parts.push(`${name} ${roughly(from)} to ${roughly(to)} ${facts.unit}`);
    });
    return `${named(facts.tokens[token], token)}${parts.length ? `: ${parts.join("; ")}` : ""}`;
  }

  // Sound.

  addSound() {
    this.player = sound(this.frame.blocks.audio.data, this.facts.rate, (seconds) => this.playing(seconds));
    this.said = button("Play the token", () => this.play());
    this.frame.body.append(make("div", { class: "sound" }, this.player.element, this.said));
  }

  /** The span of the chosen token, or everything. */
  play() {
    const { facts, frame } = this;
    const known = (s) => frame.blocks.spans.data[(s * this.n + this.token) * 2 + 1] > 0;
    const span = this.token === null ? -1 : ([...this.lane, ...facts.spans.keys()].find(known) ?? -1); // as it was said, where that is known
    const ends = span < 0 ? [0, Infinity] : [0, 1].map((end) => frame.blocks.spans.data[(span * this.n + this.token) * 2 + end]);
    this.player.play(...ends);
  }

  playing(seconds) {
    this.head.hidden = seconds === null || !this.lay;
    if (this.head.hidden) return;
    this.head.style.left = `${this.x(seconds)}px`;
    this.head.style.top = `${this.lay.places[0].top}px`;
    this.head.style.height = `${this.lay.axis - this.lay.places[0].top}px`;
  }

  // Pointer, keys, selection.

  listen() {
    const { canvas, box, frame } = this;
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
      if (span) frame.showTip(event, [this.tokenSentence(Number(span.dataset.at))]);
      else frame.hideTip();
    });
    box.addEventListener("pointerleave", () => frame.hideTip());
    box.addEventListener("keydown", (event) => this.tokenKey(event));
  }

  cellAt(event) {
    const { lay, facts } = this;
    const bounds = this.canvas.getBoundingClientRect();
    const [x, y] = [event.clientX - bounds.left - lay.left, event.clientY - bounds.top];
    const panel = lay.places.findIndex(({ top, height }) => y >= top && y < top + height);
    if (panel < 0 || x < 0 || x >= lay.width) return null;
    const column = Math.min(facts.positions - 1, Math.floor((x / lay.width) * facts.positions));
    const { top, height } = lay.places[panel];
    if (facts.picture && panel === 0) return { row: this.token ?? 0, column, bin: Math.floor((1 - (y - top) / height) * this.frame.blocks.picture.shape[1] - 1e-9) };
    return { row: Math.min(this.n - 1, Math.floor((y - top) / lay.row)), column, bin: null };
  }

  hover(event) {
    const cell = this.cellAt(event);
    this.point(cell);
    if (cell) this.frame.showTip(event, this.sentence(cell).split(/(?<=:) /));
    else this.frame.hideTip();
  }

  leave() {
    this.frame.hideTip();
    this.point(null);
  }

  point(cell) {
    if (JSON.stringify(cell) === JSON.stringify(this.cursor)) return;
    this.cursor = cell;
    if (cell) this.frame.say(this.sentence(cell));
    requestAnimationFrame(() => this.compose());
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const start = this.cursor ?? { row: this.token ?? 0, column: 0, bin: null };
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
    else to.row = Math.max(0, Math.min(this.n - 1, to.row + by));
  }

  tokenKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const steps = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1, Home: -Infinity, End: Infinity };
    if (event.key === "Enter" || event.key === " ") this.choose(this.at);
    else if (event.key === "Escape") this.frame.select({ token: null });
    else if (event.key === "p" && this.player) this.play();
    else if (event.key in steps) {
      this.at = Math.max(0, Math.min(this.n - 1, this.at + steps[event.key]));
      this.drawTokens();
      this.box.children[this.at].focus();
      this.frame.say(this.tokenSentence(this.at));
    } else return;
    event.preventDefault();
  }

  choose(token) {
    this.frame.select({ token: this.token === token ? null : token });
  }

  follow({ token }) {
    this.token = token !== null && token < this.n ? token : null;
    if (this.token !== null) this.at = this.token;
    if (this.said) this.said.textContent = this.token === null ? "Play everything" : `Play “${cut(this.facts.tokens[this.token], 14)}”`;
    if (!this.lay) return;
    this.draw();
    if (this.token !== null) this.frame.say(this.tokenSentence(this.token));
  }
}

/** A canvas of width x height, coloured by a function of place. */
function image(width, height, colour) {
  const made = make("canvas", { width, height });
  const ink = made.getContext("2d");
  const pixels = ink.createImageData(width, height);
  for (let y = 0, i = 0; y < height; y++) {
    for (let x = 0; x < width; x++, i += 4) {
      const rgb = colour(x, y);
      for (let k = 0; k < 3; k++) pixels.data[i + k] = rgb[k];
      pixels.data[i + 3] = 255;
    }
  }
  ink.putImageData(pixels, 0, 0);
  return made;
}
