// Figure: the host of a plotly chart. A click or Enter on a point reaches Python; arrow keys walk over the points.

import { colourAt, css, divergingAt } from "workbench/shared/colour.js";
import { exactly, make } from "workbench/shared/dom.js";
import { open } from "workbench/shared/frame.js";
import { fitted } from "./narrow.js";
import { plotlyFor } from "./plotly.js";

const COLOURS = ["#2f6fb7", "#d1662b", "#3a8f5c", "#b03a78", "#7a6bc9", "#8a6d1f"];
const CONFIG = { showSendToCloud: false, displaylogo: false, typesetMath: false, responsive: false, modeBarButtonsToRemove: ["toImage"] };
const GRIDS = ["heatmap", "contour", "histogram2d", "histogram2dcontour"];
const ENTITIES = { lt: "<", gt: ">", amp: "&", nbsp: " ", quot: '"' };

export async function render({ model, el }) {
  const frame = await open({ model, el });
  const chart = new Chart(frame);
  await chart.start();
  return () => chart.close();
}

/** Text of plotly without its little HTML. */
const plain = (text) =>
  `${text}`
    .replace(/<br\s*\/?>/g, " ")
    .replace(/<\/?[A-Za-z][^<>]*>/g, "")
    .replace(/&(lt|gt|amp|nbsp|quot);/g, (_, name) => ENTITIES[name]);

const titleOf = (part) => plain(part?.title?.text ?? (typeof part?.title === "string" ? part.title : ""));

class Chart {
  constructor(frame) {
    this.frame = frame;
    this.trace = 0;
    this.point = 0;
    this.plot = make("div", { class: "plot" });
    this.ring = make("div", { class: "ring", hidden: true });
    this.box = make("div", { class: "chart", tabindex: "0", role: "application", "aria-roledescription": "chart", "aria-label": this.name() }, this.plot, this.ring);
    frame.body.append(this.box);
    this.box.style.minHeight = `${frame.facts.height}px`;
  }

  name() {
    const traces = this.frame.facts.figure.data.length;
    return `${this.frame.spec.title}. ${traces === 1 ? "One trace" : `${traces} traces`}. Arrow keys move over the points, Enter chooses.`;
  }

  async start() {
    try {
      this.plotly = await plotlyFor(this.frame);
    } catch (error) {
      this.box.replaceChildren(make("p", {}, `This chart could not be drawn: ${error.message}`));
      return;
    }
    const { frame } = this;
    frame.offerKeys([
      ["← →, Home, End", "move over the points of a trace"],
      ["↑ ↓", "change the trace; move in a heatmap"],
      ["[ ]", "change the trace"],
      ["Enter", "choose the point"],
      ["Esc", "leave the points"],
    ]);
    this.box.addEventListener("keydown", (event) => this.key(event));
    this.box.addEventListener("blur", () => this.leave());
    this.drawn = new Promise((resolve) => (this.finished = resolve));
    frame.onRedraw(() => this.draw());
    if (frame.body.clientWidth) await this.drawn;
    frame.onSelect((selection) => this.follow(selection));
  }

  close() {
    clearTimeout(this.pointing);
    if (this.plotly) this.plotly.purge(this.plot);
    this.frame.close();
  }

  // Drawing.

  array({ data, shape }) {
    if (shape.length < 2) return data;
    const step = shape.slice(1).reduce((a, b) => a * b, 1);
    return Array.from({ length: shape[0] }, (_, i) => this.array({ data: data.subarray(i * step, (i + 1) * step), shape: shape.slice(1) }));
  }

  /** The figure with its arrays in their places; plotly may write into all but the arrays. */
  whole(value = this.frame.facts.figure) {
    if (Array.isArray(value)) return value.map((item) => this.whole(item));
    if (value === null || typeof value !== "object") return value;
    if (typeof value.block === "string" && Object.keys(value).length === 1) return this.array(this.frame.blocks[value.block]);
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, this.whole(item)]));
  }

  template(data) {
    const { frame } = this;
    const [ink, muted, line, edge, paper] = ["ink", "muted", "line", "edge", "paper"].map((name) => frame.colour(name));
    const axis = { gridcolor: line, linecolor: edge, zerolinecolor: edge, zerolinewidth: 1, tickcolor: edge, ticks: "outside", ticklen: 4, automargin: true, title: { standoff: 8, font: { size: 13 } } };
    const bar = { outlinewidth: 0, ticks: "outside", ticklen: 3, tickcolor: edge, thickness: 14, title: { side: "right" } };
    const grids = data.every(({ type }) => GRIDS.includes(type));
    const flat = grids ? { showgrid: false, zeroline: false } : {};
    return {
      layout: {
        paper_bgcolor: "rgba(0,0,0,0)",
        plot_bgcolor: grids ? frame.colour("unseen") : "rgba(0,0,0,0)",
        font: { family: getComputedStyle(frame.root).fontFamily, size: 12, color: ink },
        colorway: COLOURS,
        xaxis: { ...axis, ...flat },
        yaxis: { ...axis, ...flat },
        margin: { l: 56, r: 16, t: 20, b: 44 },
        hoverlabel: { bgcolor: paper, bordercolor: edge, align: "left", font: { color: ink, family: getComputedStyle(frame.root).fontFamily } },
        modebar: { bgcolor: "rgba(0,0,0,0)", color: muted, activecolor: ink },
        shapedefaults: { line: { color: muted, width: 1.5 } },
        annotationdefaults: { font: { color: ink }, arrowcolor: muted },
        coloraxis: { colorbar: bar },
        legend: { bgcolor: "rgba(0,0,0,0)", traceorder: "normal" },
      },
      data: { heatmap: [{ colorbar: bar, hoverongaps: false }], contour: [{ colorbar: bar }], bar: [{ error_x: { color: ink }, error_y: { color: ink } }] },
    };
  }

  scale(kind) {
    const at = kind === "diverging" ? (t) => divergingAt(2 * t - 1, this.frame.theme) : (t) => colourAt(t, this.frame.theme);
    return Array.from({ length: 33 }, (_, i) => [i / 32, css(at(i / 32)).replaceAll(" ", ",")]);
  }

  parts() {
    const { data, layout } = this.whole();
    this.frame.facts.scales.forEach((kind, i) => {
      if (kind) data[i].colorscale = this.scale(kind);
    });
    const [width, height] = [this.frame.body.clientWidth, this.frame.facts.height];
    const made = { ...layout, template: this.template(data), width, height, uirevision: "same" };
    return { data, layout: fitted(made) };
  }

  async draw() {
    if (!this.frame.body.clientWidth) return; // not on the page yet; told again when it is
    const { data, layout } = this.parts();
    const first = !this.data;
    this.data = data;
    this.ring.hidden = true;
    this.box.style.minHeight = `${layout.height}px`;
    await this.plotly.react(this.plot, data, layout, CONFIG);
    for (const svg of this.plot.querySelectorAll("svg")) svg.setAttribute("aria-hidden", "true"); // the table says it all
    if (first) {
      this.plot.on("plotly_click", ({ points }) => this.clicked(points[0]));
      this.plot.on("plotly_hover", () => (this.ring.hidden = true));
      this.finished();
    }
  }

  // Points. `stops` are indices into a trace: numbers, or [row, column] in a heatmap.

  full(trace) {
    return this.plot._fullData.find(({ index }) => index === trace) ?? {};
  }

  traces() {
    return this.data.map((_, i) => i).filter((i) => this.full(i).visible === true && this.data[i].hoverinfo !== "skip" && this.stops(i).length);
  }

  stops(trace) {
    const given = this.data[trace];
    const type = given.type ?? "scatter";
    if (type === "heatmap" || type === "contour") return given.z.flatMap((row, r) => Array.from(row, (_, c) => [r, c]));
    if (type === "histogram") return this.calculated(trace).map((_, i) => i);
    if (type !== "scatter" && type !== "bar") return [];
    const n = Math.max(given.x?.length ?? 0, given.y?.length ?? 0);
    const there = (values, i) => !values || typeof values[i] === "string" || Number.isFinite(values[i] ?? NaN);
    return Array.from({ length: n }, (_, i) => i).filter((i) => there(given.x, i) && there(given.y, i));
  }

  calculated(trace) {
    return this.plot.calcdata.find((points) => points[0]?.trace?.index === trace) ?? [];
  }

  /** x, y, value and error of a point, for a sentence. */
  about(trace, index) {
    const given = this.data[trace];
    const at = (values, i, start = 0, step = 1) => (values ? values[i] : start + step * i);
    if (Array.isArray(index)) return { x: at(given.x, index[1], given.x0, given.dx), y: at(given.y, index[0], given.y0, given.dy), z: given.z[index[0]][index[1]] };
    if (given.type === "histogram") {
      const { p, s } = this.calculated(trace)[index];
      return given.orientation === "h" ? { x: s, y: p } : { x: p, y: s };
    }
    return { x: at(given.x, index, given.x0, given.dx), y: at(given.y, index, given.y0, given.dy), error: this.error(given, index) };
  }

  error(given, index) {
    const { array, arrayminus, visible } = (given.orientation === "h" ? given.error_x : given.error_y) ?? {};
    if (!array || visible === false || !Number.isFinite(array[index])) return "";
    return arrayminus ? ` (−${exactly(arrayminus[index])}, +${exactly(array[index])})` : ` ± ${exactly(array[index])}`;
  }

  sentence(trace, index) {
    const { x, y, z, error = "" } = this.about(trace, index);
    const full = this.full(trace);
    const { layout } = this.frame.facts.figure;
    const axis = (name) => layout[`${name[0]}axis${name.slice(1)}`];
    const said = (value) => (typeof value === "string" ? plain(value) : exactly(value ?? NaN));
    const shown = (name, value) => `${titleOf(axis(name)) || name[0]} ${said(value)}`;
    const where = `${shown(full.xaxis ?? "x", x)}, ${shown(full.yaxis ?? "y", y)}`;
    const which = this.data.length > 1 ? `${plain(this.data[trace].name ?? `trace ${trace}`)}: ` : "";
    return which + where + error + (z === undefined ? "" : `: ${titleOf(this.data[trace].colorbar) || "value"} ${said(z)}`);
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const traces = this.traces();
    if (!traces.length) return;
    if (!traces.includes(this.trace)) [this.trace, this.point] = [traces[0], 0];
    const stops = this.stops(this.trace);
    const grid = Array.isArray(stops[0]);
    const across = grid ? this.data[this.trace].z[0].length : 1;
    const steps = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity, ...(grid ? { ArrowUp: this.upwards() * across, ArrowDown: -this.upwards() * across } : {}) };
    const turns = { "[": -1, "]": 1, ...(grid ? {} : { ArrowUp: -1, ArrowDown: 1 }) };
    if (event.key === "Enter" || event.key === " ") this.choose(this.trace, stops[this.point]);
    else if (event.key === "Escape") this.leave();
    else if (event.key in turns) this.turn(traces, turns[event.key]);
    else if (event.key in steps) this.step(stops, steps[event.key]);
    else return;
    event.preventDefault();
  }

  /** How rows follow each other on the screen: 1 when they run upwards. */
  upwards() {
    const axis = this.plot._fullLayout[`yaxis${(this.full(this.trace).yaxis ?? "y").slice(1)}`];
    return axis.range[0] < axis.range[1] ? 1 : -1;
  }

  turn(traces, by) {
    const next = traces[Math.min(traces.length - 1, Math.max(0, traces.indexOf(this.trace) + by))];
    this.point = Math.min(this.point, this.stops(next).length - 1);
    this.show(next, this.stops(next)[this.point]);
  }

  step(stops, by) {
    const jump = Math.abs(by) > 1 && Number.isFinite(by); // to another row: not beyond the first or last
    const next = this.entered ? this.point + by : this.point;
    if (jump && (next < 0 || next >= stops.length)) return;
    this.point = Math.min(stops.length - 1, Math.max(0, next));
    this.show(this.trace, stops[this.point]);
  }

  /** Put the cursor on a point: plotly's own hover label, a ring, and the value in words. */
  show(trace, index) {
    this.trace = trace;
    this.entered = true;
    const full = this.full(trace);
    this.plotly.Fx.hover(this.plot, [{ curveNumber: trace, pointNumber: index }], `${full.xaxis ?? "x"}${full.yaxis ?? "y"}`);
    this.frame.say(this.sentence(trace, index));
    clearTimeout(this.pointing);
    this.pointing = setTimeout(() => this.encircle(), 80); // plotly shows no label sooner than 50 ms after the last
  }

  encircle() {
    const bbox = this.plot._hoverdata?.[0]?.bbox;
    this.ring.hidden = !bbox || !this.entered;
    if (this.ring.hidden) return;
    const [width, height] = [Math.max(14, bbox.x1 - bbox.x0 + 6), Math.max(14, bbox.y1 - bbox.y0 + 6)];
    Object.assign(this.ring.style, { width: `${width}px`, height: `${height}px`, left: `${(bbox.x0 + bbox.x1 - width) / 2}px`, top: `${(bbox.y0 + bbox.y1 - height) / 2}px` });
  }

  leave() {
    this.ring.hidden = true;
    this.entered = false;
    if (this.data) this.plotly.Fx.unhover(this.plot);
  }

  // Choosing.

  clicked({ curveNumber, pointNumber, pointIndex }) {
    this.choose(curveNumber, pointIndex ?? pointNumber);
  }

  /** What a point chooses in the shared selection: columns of customdata, named by meta.select. */
  selects(trace, index) {
    const { meta, customdata } = this.data[trace];
    if (!meta?.select || !customdata) return {};
    let row = customdata;
    for (const at of [index].flat()) row = row?.[at];
    const values = row === null || typeof row !== "object" ? [row] : row;
    const one = (value) => (typeof value === "string" || value >= 0 ? value : null);
    const several = (value) => (value !== null && typeof value === "object" ? Array.from(value) : [one(value)].filter((head) => head !== null));
    return Object.fromEntries(meta.select.map((name, i) => [name, name === "heads" ? several(values[i]) : one(values[i] ?? null)]));
  }

  choose(trace, index) {
    if (index === undefined) return;
    const change = this.selects(trace, index);
    this.chosen = JSON.stringify(change);
    if (Object.keys(change).length) this.frame.select(change);
    this.frame.say(this.sentence(trace, index));
    if (!this.frame.live) return;
    const { x, y } = this.about(trace, index);
    const sent = (value) => (typeof value === "string" || Number.isFinite(value) ? value : null);
    this.frame.ask({ ask: "clicked", trace, index, x: sent(x), y: sent(y) }).catch((error) => this.frame.say(error.message));
  }

  /** Someone chose elsewhere: the cursor goes to the first point that stands for it. */
  follow(selection) {
    if (!this.data) return;
    for (const trace of this.traces()) {
      const { meta, customdata } = this.data[trace];
      if (!meta?.select || !customdata || meta.select.every((name) => [selection[name]].flat().every((value) => value === null))) continue;
      const stops = this.stops(trace);
      const at = stops.findIndex((index) => Object.entries(this.selects(trace, index)).every(([name, value]) => JSON.stringify(value) === JSON.stringify(selection[name])));
      if (at < 0) continue;
      this.point = at;
      this.trace = trace;
      if (this.chosen !== JSON.stringify(this.selects(trace, stops[at]))) this.show(trace, stops[at]);
      this.chosen = null;
      return;
    }
  }
}
