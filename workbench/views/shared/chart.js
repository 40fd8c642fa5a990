// Line charts on a canvas: bands, marks, levels, a legend, a cursor for pointer and keys.

import { prepare } from "./canvas.js";
import { exactly, make } from "./dom.js";
import { nearestTo, roundTicks, shortNumber } from "./scales.js";

const CHART_HEIGHT = 280;
const CHART_LEFT = 66;
const CHART_BOTTOM = 40;

/**
 * One chart. `show` takes {title, x, y, series, marks, levels, range, logarithmic, empty}: labels of the axes; series of
 * {name, xs, ys, low, high, colour, dash, dots, round}; marks {x, text, y, colour} (a line down, and a dot where y is known);
 * levels {y, text}; range [low, high] of y, or found; doubling: x in powers of two; empty: words that stand there instead.
 */
export class LineChart {
  constructor(frame, label) {
    this.frame = frame;
    this.label = label;
    this.at = null;
    this.heading = make("figcaption");
    this.legend = make("div", { class: "legend lines" });
    this.canvas = make("canvas", { tabindex: "0", role: "application", "aria-roledescription": "chart", "aria-label": `${label}. Arrow keys move over the values.` });
    this.element = make("figure", { class: "lines" }, this.heading, this.canvas, this.legend);
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    this.canvas.addEventListener("pointermove", (event) => this.hover(event));
    this.canvas.addEventListener("pointerleave", () => this.leave());
    this.canvas.addEventListener("blur", () => this.leave());
  }

  show(content) {
    this.content = { marks: [], levels: [], ...content };
    this.heading.textContent = content.title;
    this.legend.replaceChildren(...content.series.map(({ name, colour, dash }) => {
      const line = make("i");
      line.style.borderTop = `2.5px ${dash ? (dash[0] < 3 ? "dotted" : "dashed") : "solid"} ${colour}`;
      return make("span", {}, line, name);
    }));
    this.at = null;
    this.draw();
  }

  // Scales.

  shown(y) {
    return this.content.logarithmic ? Math.log10(y) : y;
  }

  across(x) {
    return this.content.doubling ? Math.log2(Math.max(x, this.box.from)) : x;
  }

  xTicks() {
    const { from, to } = this.box;
    const room = Math.max(2, Math.min(8, (this.width - CHART_LEFT) / 60));
    if (!this.content.doubling) return roundTicks(from, to, room).filter((tick) => !this.content.whole || tick % 1 === 0);
    const powers = Array.from({ length: 40 }, (_, i) => 2 ** i).filter((tick) => tick >= from && tick <= to);
    return powers.filter((_, i) => i % Math.ceil(powers.length / (room + 2)) === 0);
  }

  scale() {
    const { series, range, levels, logarithmic } = this.content;
    const xs = series.flatMap((one) => Array.from(one.xs));
    const found = series.flatMap(({ ys, low, high }) => [ys, low ?? [], high ?? []].flatMap((each) => Array.from(each))).concat(levels.map(({ y }) => y));
    const ys = found.filter((y) => Number.isFinite(y) && (!logarithmic || y > 0)).map((y) => this.shown(y));
    let [low, high] = range ?? [Math.min(...ys), Math.max(...ys)];
    if (!range) {
      const room = 0.06 * (high - low) || 0.5;
      [low, high] = [low === 0 ? 0 : low - room, high + room];
    }
    this.box = { low, high, from: Math.min(...xs), to: Math.max(...xs) };
    if (this.box.from === this.box.to) this.box.to += 1;
  }

  x(value) {
    const [from, to, at] = [this.box.from, this.box.to, value].map((one) => this.across(one));
    return CHART_LEFT + ((at - from) / (to - from)) * (this.width - CHART_LEFT - 12);
  }

  y(value) {
    const { low, high } = this.box;
    const share = (this.shown(value) - low) / (high - low);
    return 14 + (1 - share) * (CHART_HEIGHT - CHART_BOTTOM - 14);
  }

  // Drawing.

  draw() {
    const width = this.element.clientWidth;
    if (!this.content || !width) return;
    this.width = width;
    const pen = prepare(this.canvas, width, CHART_HEIGHT);
    pen.fillStyle = this.frame.colour("paper");
    pen.fillRect(0, 0, width, CHART_HEIGHT);
    pen.font = `12px ${this.frame.colour("sans")}`;
    if (this.content.empty) return this.drawWords(pen, this.content.empty);
    this.scale();
    this.axes(pen);
    pen.save();
    pen.beginPath();
    pen.rect(CHART_LEFT - 1, 8, width - CHART_LEFT - 4, CHART_HEIGHT - CHART_BOTTOM - 6);
    pen.clip();
    for (const one of this.content.series) this.band(pen, one);
    this.drawLevels(pen);
    for (const one of this.content.series) this.line(pen, one);
    pen.restore();
    this.drawMarks(pen);
    if (this.at) this.cursor(pen);
  }

  drawWords(pen, words) {
    pen.fillStyle = this.frame.colour("muted");
    const [lines, room] = [[""], this.width - 40];
    for (const word of words.split(" ")) {
      const longer = `${lines.at(-1)} ${word}`.trim();
      if (pen.measureText(longer).width > room) lines.push(word);
      else lines[lines.length - 1] = longer;
    }
    pen.textAlign = "center";
    lines.forEach((line, i) => pen.fillText(line, this.width / 2, CHART_HEIGHT / 2 + 18 * (i - lines.length / 2)));
  }

  axes(pen) {
    const { frame, content, width } = this;
    const { low, high } = this.box;
    const foot = CHART_HEIGHT - CHART_BOTTOM;
    pen.lineWidth = 1;
    pen.strokeStyle = frame.colour("line");
    pen.fillStyle = frame.colour("ink");
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    const exponents = Array.from({ length: Math.floor(high) - Math.ceil(low) + 1 }, (_, i) => Math.ceil(low) + i);
    const powers = content.logarithmic && exponents.length > 1;
    const every = Math.ceil(exponents.length / 6);
    for (const tick of powers ? exponents.filter((_, i) => i % every === 0) : roundTicks(low, high)) {
      const value = content.logarithmic ? 10 ** tick : tick;
      const y = Math.round(this.y(value)) + 0.5;
      pen.beginPath();
      pen.moveTo(CHART_LEFT, y);
      pen.lineTo(width - 8, y);
      pen.stroke();
      pen.fillText(shortNumber(Number(value.toPrecision(3))), CHART_LEFT - 6, y);
    }
    pen.textAlign = "center";
    pen.textBaseline = "top";
    for (const tick of this.xTicks()) {
      const x = Math.round(this.x(tick)) + 0.5;
      pen.strokeStyle = frame.colour("edge");
      pen.beginPath();
      pen.moveTo(x, foot);
      pen.lineTo(x, foot + 4);
      pen.stroke();
      pen.fillText(shortNumber(tick), x, foot + 6);
    }
    pen.beginPath();
    pen.moveTo(CHART_LEFT - 0.5, 10);
    pen.lineTo(CHART_LEFT - 0.5, foot + 0.5);
    pen.lineTo(width - 8, foot + 0.5);
    pen.stroke();
    pen.fillStyle = frame.colour("muted");
    pen.fillText(content.x, CHART_LEFT + (width - CHART_LEFT - 8) / 2, foot + 22);
    pen.save();
    pen.translate(9, 10 + (foot - 10) / 2);
    pen.rotate(-Math.PI / 2);
    pen.textBaseline = "middle";
    pen.fillText(content.y, 0, 0);
    pen.restore();
  }

  trace(pen, xs, ys) {
    let open = false;
    pen.beginPath();
    for (let i = 0; i < xs.length; i++) {
      const place = Number.isFinite(ys[i]) ? this.y(ys[i]) : NaN;
      if (!Number.isFinite(place)) open = false;
      else if (open) pen.lineTo(this.x(xs[i]), Math.max(-900, Math.min(900, place)));
      else {
        pen.moveTo(this.x(xs[i]), Math.max(-900, Math.min(900, place)));
        open = true;
      }
    }
  }

  band(pen, { xs, low, high, colour }) {
    if (!low) return;
    const there = Array.from(xs.keys()).filter((i) => Number.isFinite(this.y(low[i])) && Number.isFinite(this.y(high[i])));
    if (there.length < 2) return;
    pen.beginPath();
    for (const i of there) pen.lineTo(this.x(xs[i]), this.y(high[i]));
    for (const i of there.toReversed()) pen.lineTo(this.x(xs[i]), this.y(low[i]));
    pen.closePath();
    pen.globalAlpha = 0.2;
    pen.fillStyle = colour;
    pen.fill();
    pen.globalAlpha = 1;
  }

  line(pen, { xs, ys, colour, dash, dots }) {
    pen.strokeStyle = colour;
    pen.lineWidth = dash ? 1.75 : 2.25;
    pen.setLineDash(dash ?? []);
    this.trace(pen, xs, ys);
    pen.stroke();
    pen.setLineDash([]);
    if (!dots) return;
    pen.fillStyle = colour;
    for (let i = 0; i < xs.length; i++) {
      if (!Number.isFinite(this.y(ys[i]))) continue;
      pen.beginPath();
      pen.arc(this.x(xs[i]), this.y(ys[i]), 2.5, 0, 7);
      pen.fill();
    }
  }

  drawLevels(pen) {
    pen.textAlign = "right";
    pen.textBaseline = "bottom";
    for (const { y, text } of this.content.levels) {
      pen.strokeStyle = pen.fillStyle = this.frame.colour("muted");
      pen.lineWidth = 1;
      pen.setLineDash([4, 4]);
      pen.beginPath();
      pen.moveTo(CHART_LEFT, this.y(y));
      pen.lineTo(this.width - 8, this.y(y));
      pen.stroke();
      pen.setLineDash([]);
      pen.fillText(text, this.width - 10, this.y(y) - 2);
    }
  }

  drawMarks(pen) {
    const foot = CHART_HEIGHT - CHART_BOTTOM;
    const ends = []; // of the words in each line at the top
    pen.textBaseline = "middle";
    for (const { x, y, text, colour } of this.content.marks.filter((mark) => mark.x <= this.box.to && mark.x >= this.box.from).sort((a, b) => a.x - b.x)) {
      const place = this.x(x);
      pen.strokeStyle = pen.fillStyle = colour ?? this.frame.colour("ink");
      pen.lineWidth = 1.25;
      pen.setLineDash(colour ? [2, 3] : []);
      pen.beginPath();
      pen.moveTo(place, y === undefined ? 10 : this.y(y));
      pen.lineTo(place, foot);
      pen.stroke();
      pen.setLineDash([]);
      if (y !== undefined) {
        pen.beginPath();
        pen.arc(place, this.y(y), 4.5, 0, 7);
        pen.fill();
        pen.strokeStyle = this.frame.colour("paper");
        pen.stroke();
      }
      if (!text) continue;
      const long = pen.measureText(text).width;
      const left = place + 6 + long < this.width - 4 ? place + 6 : place - 6 - long;
      let row = 0;
      while (ends[row] > left) row += 1;
      ends[row] = left + long + 8;
      const down = 16 + 15 * row;
      pen.fillStyle = this.frame.colour("paper");
      pen.globalAlpha = 0.85;
      pen.fillRect(left - 2, down - 7, long + 4, 14);
      pen.globalAlpha = 1;
      pen.fillStyle = this.frame.colour("ink");
      pen.textAlign = "left";
      pen.fillText(text, left, down);
    }
  }

  cursor(pen) {
    const { xs, ys } = this.content.series[this.at.series];
    const [x, y] = [this.x(xs[this.at.point]), this.y(ys[this.at.point])];
    if (!Number.isFinite(y)) return;
    pen.lineWidth = 2.5;
    pen.strokeStyle = this.frame.colour("cursor");
    pen.beginPath();
    pen.arc(x, Math.max(10, Math.min(CHART_HEIGHT - CHART_BOTTOM, y)), 6, 0, 7);
    pen.stroke();
  }

  // Pointer and keys.

  sentence(series, point) {
    const { name, xs, ys, low, high } = this.content.series[series];
    const around = low && Number.isFinite(low[point]) ? ` (${exactly(low[point])} to ${exactly(high[point])})` : "";
    return `${name}: ${this.content.x} ${exactly(xs[point])}, ${this.content.y} ${Number.isFinite(ys[point]) ? exactly(ys[point]) : "not finite"}${around}`;
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || this.content.empty) return;
    const { series } = this.content;
    const at = this.at ?? { series: 0, point: -1 };
    const last = series[at.series].xs.length - 1;
    const to = { ArrowLeft: Math.max(0, at.point - 1), ArrowRight: Math.min(last, at.point + 1), Home: 0, End: last }[event.key];
    const turn = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (to !== undefined) this.at = { ...at, point: to };
    else if (turn) {
      const next = (at.series + turn + series.length) % series.length;
      const x = series[at.series].xs[Math.max(0, at.point)];
      this.at = { series: next, point: nearestTo(series[next].xs, x) };
    } else if (event.key === "Escape") this.at = null;
    else return;
    event.preventDefault();
    this.draw();
    if (this.at) this.frame.say(this.sentence(this.at.series, this.at.point));
  }

  hover(event) {
    if (this.content?.empty || !this.box) return;
    const bounds = this.canvas.getBoundingClientRect();
    const [from, to] = [this.box.from, this.box.to].map((one) => this.across(one));
    const share = (event.clientX - bounds.left - CHART_LEFT) / (this.width - CHART_LEFT - 12);
    if (share < -0.05) return this.leave();
    const x = this.content.doubling ? 2 ** (from + share * (to - from)) : from + share * (to - from);
    const points = this.content.series.map(({ xs }) => nearestTo(xs, x));
    const far = this.content.series.map(({ ys }, i) => Math.abs(this.y(ys[points[i]]) - (event.clientY - bounds.top)));
    const series = far.indexOf(Math.min(...far.filter(Number.isFinite)));
    if (series < 0) return;
    this.at = { series, point: points[series] };
    this.draw();
    this.frame.say(this.sentence(series, points[series]));
    this.frame.showTip(event, [`${this.content.x} ${exactly(this.content.series[series].xs[points[series]])}`, ...this.content.series.map(({ name, ys }, i) => `${name}: ${exactly(ys[points[i]])}`)]);
  }

  leave() {
    this.frame.hideTip();
    if (!this.at) return;
    this.at = null;
    this.draw();
  }
}
