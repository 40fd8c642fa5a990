// The drawing of a saliency map: the spectrogram and the strips below it, names, axis and cursor, on one canvas.

import { colourAt, divergingAt, rgbOf } from "workbench/shared/colour.js";
import { cut, make } from "workbench/shared/dom.js";
import { roundUp } from "workbench/shared/scales.js";

const PICTURE = 190; // height of the spectrogram
const TITLE = 22;
const AXIS = 28;
const LANE = 19; // above the spectrogram, for what was said when
const RIGHT = 58;

/** How far above its mean a cell of the spectrogram is, in standard deviations. */
export function aboveAt(facts, { values, bins, step }, frame, bin) {
  const at = Math.min(values.length / bins - 1, Math.floor(((frame + 0.5) * facts.picture.step) / step));
  return values[at * bins + (bins === 1 ? 0 : bin)];
}

/** The colour of a number in a row of a panel; that of the unseen where there is none. */
export function colourOf(value, row, { tops, top, signed }, frame) {
  if (Number.isNaN(value)) return rgbOf(frame.colour("unseen"));
  const [low, high] = tops ? tops[row] : [0, top];
  const t = (value - low) / (high - low || 1);
  return signed ? divergingAt(t, frame.theme) : colourAt(t, frame.theme);
}

export class Drawing {
  /** state: panels, r, above, token and cursor, as the view has them. */
  constructor(frame, numbers, state) {
    this.frame = frame;
    this.facts = frame.facts;
    this.numbers = numbers;
    this.state = state;
    this.canvas = make("canvas", { tabindex: "0", role: "application", "aria-roledescription": "map of tokens by positions" });
    this.lay = null;
    this.images = null;
  }

  /** Draw all anew. */
  draw() {
    this.lay = this.layout();
    this.images = null;
    this.compose();
  }

  layout() {
    const { facts, frame } = this;
    const ink = this.canvas.getContext("2d");
    const font = `11px ${frame.colour("mono")}`;
    ink.font = font;
    const longest = Math.max(...facts.tokens.map((token) => ink.measureText(cut(token, 14)).width));
    const left = Math.round(Math.min(118, Math.max(46, longest + 14)));
    const width = Math.max(120, (frame.body.clientWidth || 800) - left - (facts.attention ? RIGHT : 12));
    const row = Math.max(8, Math.min(24, Math.floor(168 / this.numbers.n)));
    let y = 2;
    const places = [];
    const lane = this.numbers.lane.length ? LANE : 0;
    if (facts.picture) {
      places.push({ top: y + TITLE + lane, height: PICTURE });
      y += TITLE + lane + PICTURE + 8;
    }
    for (let i = 0; i < this.state.panels.length; i++) {
      places.push({ top: y + TITLE, height: row * this.numbers.n });
      y += TITLE + row * this.numbers.n + 8;
    }
    const names = facts.names.length ? Math.min(96, 12 + Math.max(...facts.names.map((name) => ink.measureText(cut(name, 14)).width))) : AXIS;
    return { left, width, row, places, height: y + names, axis: y - 4, font };
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
    const said = this.state.token === null ? "mean over tokens" : this.facts.tokens[this.state.token];
    canvas.setAttribute("aria-label", `${this.state.panels.map(({ title }) => title).join("; ")}; over the spectrogram: ${said}. Arrow keys move.`);
    const ink = canvas.getContext("2d");
    ink.setTransform(dpr, 0, 0, dpr, 0, 0);
    ink.fillStyle = frame.colour("paper");
    ink.fillRect(0, 0, canvas.width, canvas.height);
    this.images ??= this.paint(dpr);
    let at = 0;
    if (this.facts.picture) this.drawPicture(ink, lay.places[at], this.images[at++]);
    for (const panel of this.state.panels) this.drawStrip(ink, panel, lay.places[at], this.images[at++]);
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
        const z = this.state.above ? aboveAt(facts, this.state.above, x, bin) : 0;
        const alpha = z > 0 ? 0.92 * Math.min(1, z / this.state.above.top) : 0;
        for (let k = 0; k < 3; k++) mixed[k] = (paper[k] + (dark[k] - paper[k]) * grey) * (1 - alpha) + warm[k] * alpha;
        return mixed;
      }));
    }
    const columns = facts.positions;
    const wide = Math.min(columns, Math.round(lay.width * dpr)); // the largest of each pixel's positions where there are more
    for (const { values, tops, top, signed } of this.state.panels) {
      found.push(image(wide, this.numbers.n, (x, row) => {
        const [from, to] = [Math.floor((x * columns) / wide), Math.max(Math.floor((x * columns) / wide) + 1, Math.floor(((x + 1) * columns) / wide))];
        let best = values[row * columns + from];
        for (let i = from + 1; i < to; i++) if (Math.abs(values[row * columns + i]) > Math.abs(best)) best = values[row * columns + i];
        return colourOf(best, row, { tops, top, signed }, frame);
      }));
    }
    return found;
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
    const who = this.state.token === null ? "mean over tokens" : `“${cut(facts.tokens[this.state.token])}”`;
    const title = this.state.above ? `Spectrogram; coloured where ${this.state.above.label} is above its mean, ${who}` : "Spectrogram";
    this.title(ink, title, top - (this.numbers.lane.length ? LANE : 0));
    const width = (lay.width * frames * step) / this.numbers.end;
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
    for (const s of this.numbers.lane) {
      for (let token = 0; token < this.numbers.n; token++) {
        const [from, to] = this.numbers.span(s, token);
        if (!(to > from)) continue;
        const [left, right] = [Math.round(this.x(from)) + 0.5, Math.round(this.x(to)) - 0.5];
        const chosen = token === this.state.token;
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
    for (let token = 0; token < this.numbers.n; token++) {
      const chosen = token === this.state.token;
      const y = top + token * lay.row;
      if (span >= 0) this.outline(ink, span, token, y);
      if (token % every && !chosen) continue;
      ink.font = `${chosen ? "600 " : ""}${lay.font}`;
      ink.fillStyle = frame.colour(chosen ? "accent" : facts.special[token] ? "muted" : "ink");
      ink.textAlign = "right";
      ink.fillText(cut(facts.tokens[token], 14), lay.left - 6, y + lay.row / 2);
      if (panel.name !== "difference" || this.state.r === null) continue;
      const r = this.state.r.rows[token];
      ink.textAlign = "left";
      ink.fillText(r === null ? "r –" : `r ${r.toFixed(2)}`, lay.left + lay.width + 6, y + lay.row / 2);
    }
    ink.strokeStyle = frame.colour("line");
    ink.strokeRect(lay.left - 0.5, top - 0.5, lay.width + 1, height + 1);
    if (this.state.token === null) return;
    ink.strokeStyle = frame.colour("accent");
    ink.lineWidth = 1.5;
    ink.strokeRect(lay.left - 1, top + this.state.token * lay.row - 0.5, lay.width + 2, lay.row + 1);
    ink.lineWidth = 1;
  }

  outline(ink, span, token, y) {
    const [from, to] = this.numbers.span(span, token);
    if (!(to > from)) return;
    const box = [this.x(from) + 1, y + 1, Math.max(2, this.x(to) - this.x(from) - 2), this.lay.row - 2];
    for (const [colour, width] of [["rgb(0 0 0 / 0.55)", 3], ["#ffffff", 1]]) {
      ink.strokeStyle = colour;
      ink.lineWidth = width;
      ink.strokeRect(...box);
    }
  }

  x(at) {
    return this.lay.left + (this.lay.width * Math.min(at, this.numbers.end)) / this.numbers.end;
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
    const step = roundUp((this.numbers.end * 60) / lay.width);
    ink.textAlign = "center";
    ink.textBaseline = "top";
    const whole = Math.floor(this.numbers.end / step + 1e-9);
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
    const { lay, facts, frame } = this;
    const { cursor } = this.state;
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
