// Run timeline: a lane per thread, a bar per attention call. Pan and zoom, sums over a stretch of time, a trace for Perfetto.

import { button, count, download, exactly, make } from "workbench/shared/dom.js";
import { open } from "workbench/shared/frame.js";
import { prepare } from "workbench/shared/canvas.js";
import { roundUp } from "workbench/shared/scales.js";

const LANE = { top: 24, height: 74, forward: [2, 12], call: [18, 26], ours: [48, 14] };
const LEFT = 64;

export async function render({ model, el }) {
  const frame = await open({ model, el });
  const line = new Timeline(frame);
  return () => line.frame.close();
}

const duration = (seconds) => (Math.abs(seconds) >= 1 ? `${exactly(seconds)} s` : Math.abs(seconds) >= 1e-3 ? `${exactly(1e3 * seconds)} ms` : `${exactly(1e6 * seconds)} µs`);
const size = (bytes) => (bytes < 1024 ? `${bytes} bytes` : bytes < 2 ** 20 ? `${(bytes / 1024).toFixed(1)} KiB` : `${(bytes / 2 ** 20).toFixed(1)} MiB`);

const NONE = new Float64Array(0);

class Timeline {
  /** In seconds, for each call: when its module began, when it was seen to return, how long recording took. */
  entered = NONE;
  seen = NONE;
  took = NONE;
  /** In seconds, for each forward. */
  begun = NONE;
  ended = NONE;

  constructor(frame) {
    this.frame = frame;
    const { times, spans, site } = frame.blocks;
    this.n = site.data.length;
    const row = (block, i) => block.data.subarray(i * block.shape[1], (i + 1) * block.shape[1]);
    [this.entered, this.seen, this.took] = [0, 1, 2].map((i) => row(times, i));
    [this.begun, this.ended] = [0, 1].map((i) => row(spans, i));
    this.lanes = Math.max(...frame.blocks.threads.data) + 1;
    this.whole = [Math.min(...this.begun), Math.max(...this.ended)];
    this.view = [...this.whole];
    this.range = null;
    this.order = Array.from({ length: this.n }, (_, i) => i).sort((a, b) => this.lane(a) - this.lane(b) || this.start(a) - this.start(b));
    this.at = this.order[0];
    this.canvas = make("canvas", { tabindex: "0", role: "application", "aria-roledescription": "timeline", "aria-label": `${frame.spec.title}: ${count(this.n, "call")}. Arrow keys move over the calls, W and S zoom, A and D pan.` });
    this.sums = make("p", { class: "sums", hidden: true });
    frame.body.append(this.legend(), this.canvas, this.sums);
    this.tools();
    this.listen();
    frame.onSelect(({ site: name }) => {
      this.chosen = frame.facts.sites.findIndex((one) => one.name === name);
      this.draw();
    });
    frame.onRedraw(() => this.draw());
  }

  legend() {
    const { kernels, colours } = this.frame.facts;
    const chip = (text, colour) => {
      const mark = make("span", { class: "chip" });
      mark.style.background = colour;
      return make("span", { class: "kernel" }, mark, text);
    };
    const ours = make("span", { class: "kernel" }, make("span", { class: "chip ours" }), "our statistics");
    return make("div", { class: "legend" }, ...kernels.map((name, i) => chip(name, colours[i])), ours);
  }

  tools() {
    const { frame } = this;
    frame.controls.append(button("Zoom in", () => this.zoom(0.5)), button("Zoom out", () => this.zoom(2)), button("Show all", () => this.look(...this.whole)));
    frame.tools.append(button("Chrome trace", () => download(`${frame.fileName()}.trace.json`, "application/json", [JSON.stringify(this.trace())]), { title: "Download for Perfetto or chrome://tracing" }));
    frame.offerKeys([
      ["← →, Home, End", "move from call to call"],
      ["↑ ↓", "move to the next thread"],
      ["W S, wheel", "zoom; the wheel once the timeline has been clicked"],
      ["A D, Shift ← →", "pan"],
      ["drag, [ and ]", "mark a stretch of time and sum over it"],
      ["Enter", "choose the site in every view"],
      ["Esc", "choose none, unmark"],
    ]);
  }

  lane(call) {
    return this.frame.blocks.threads.data[this.frame.blocks.forward.data[call]];
  }

  start(call) {
    return Number.isNaN(this.entered[call]) ? this.seen[call] : this.entered[call];
  }

  end(call) {
    return this.seen[call] + this.took[call];
  }

  // Time and pixels.

  get width() {
    return Math.max(120, this.frame.body.clientWidth);
  }

  x(time) {
    return LEFT + ((time - this.view[0]) / (this.view[1] - this.view[0])) * (this.width - LEFT - 8);
  }

  time(x) {
    return this.view[0] + ((x - LEFT) / (this.width - LEFT - 8)) * (this.view[1] - this.view[0]);
  }

  look(from, to) {
    const [first, last] = this.whole;
    const span = Math.min(last - first, Math.max(1e-6, to - from));
    const start = Math.min(last - span, Math.max(first, from));
    this.view = [start, start + span];
    this.draw();
  }

  zoom(by, around = this.middle()) {
    this.look(around - (around - this.view[0]) * by, around + (this.view[1] - around) * by);
  }

  /** The cursor's call where it is in view, else the middle. */
  middle() {
    const [from, to] = this.view;
    const at = this.start(this.at);
    return at > from && at < to ? at : (from + to) / 2;
  }

  pan(share) {
    const by = share * (this.view[1] - this.view[0]);
    this.look(this.view[0] + by, this.view[1] + by);
  }

  // Drawing.

  draw() {
    const height = LANE.top + this.lanes * LANE.height;
    const pen = prepare(this.canvas, this.width, height);
    pen.fillStyle = this.frame.colour("paper");
    pen.fillRect(0, 0, this.width, height);
    pen.font = `12px ${getComputedStyle(this.frame.root).fontFamily}`;
    pen.textBaseline = "middle";
    this.drawTicks(pen, height);
    pen.save();
    pen.beginPath();
    pen.rect(LEFT, 0, this.width - LEFT, height);
    pen.clip();
    this.drawForwards(pen);
    this.drawCalls(pen);
    this.drawRange(pen, height);
    pen.restore();
    pen.fillStyle = this.frame.colour("ink");
    for (let lane = 0; lane < this.lanes; lane++) pen.fillText(`thread ${lane}`, 2, LANE.top + lane * LANE.height + LANE.call[0] + LANE.call[1] / 2);
  }

  drawTicks(pen, height) {
    const span = this.view[1] - this.view[0];
    const step = roundUp((span * 110) / this.width);
    const [times, unit] = step >= 1 ? /** @type {const} */ ([1, "s"]) : step >= 1e-3 ? /** @type {const} */ ([1e3, "ms"]) : /** @type {const} */ ([1e6, "µs"]);
    for (let tick = Math.ceil(this.view[0] / step); tick * step <= this.view[1]; tick++) {
      const x = this.x(tick * step);
      pen.fillStyle = this.frame.colour("line");
      pen.fillRect(Math.round(x), LANE.top - 4, 1, height);
      const text = `${Number((tick * step * times).toPrecision(7))} ${unit}`;
      pen.fillStyle = this.frame.colour("muted");
      if (x + pen.measureText(text).width / 2 < this.width && x - pen.measureText(text).width / 2 > LEFT - 20) {
        pen.textAlign = "center";
        pen.fillText(text, x, 10);
      }
    }
    pen.textAlign = "left";
  }

  place(lane, /** @type {number[]} */ [top, height]) {
    return [LANE.top + lane * LANE.height + top, height];
  }

  drawForwards(pen) {
    const { threads } = this.frame.blocks;
    pen.strokeStyle = this.frame.colour("edge");
    pen.fillStyle = this.frame.colour("muted");
    for (let i = 0; i < this.begun.length; i++) {
      const [y, height] = this.place(threads.data[i], LANE.forward);
      const [from, to] = [Math.max(LEFT - 2, this.x(this.begun[i])), Math.min(this.width + 2, this.x(this.ended[i]))];
      if (to < LEFT || from > this.width) continue;
      pen.strokeRect(from + 0.5, y + 0.5, Math.max(1, to - from - 1), height);
      const text = `forward ${this.frame.facts.forwards[i]}`;
      if (to - from > pen.measureText(text).width + 8) pen.fillText(text, from + 4, y + height / 2 + 1);
    }
  }

  drawCalls(pen) {
    const { kernel, site } = this.frame.blocks;
    const { colours } = this.frame.facts;
    const muted = this.frame.colour("muted");
    for (const call of this.order) {
      const [from, seen, to] = [this.start(call), this.seen[call], this.end(call)].map((time) => this.x(time));
      if (to < LEFT || from > this.width) continue;
      const lane = this.lane(call);
      const [y, height] = this.place(lane, LANE.call);
      const chosen = site.data[call] === this.chosen;
      pen.globalAlpha = this.chosen >= 0 && !chosen ? 0.45 : 1;
      pen.fillStyle = colours[kernel.data[call]];
      pen.fillRect(from, y, Math.max(1, seen - from - 0.5), height);
      pen.globalAlpha *= 0.55;
      pen.fillStyle = muted;
      const [top, deep] = this.place(lane, LANE.ours);
      pen.fillRect(seen, top, Math.max(1, to - seen - 0.5), deep);
      pen.globalAlpha = 1;
      this.drawName(pen, call, from, seen, y, height);
      if (call === this.at && document.activeElement === this.canvas) {
        pen.strokeStyle = this.frame.colour("cursor");
        pen.lineWidth = 2;
        pen.strokeRect(from - 1, y - 1, Math.max(3, seen - from + 2), height + 2);
        pen.lineWidth = 1;
      }
    }
  }

  drawName(pen, call, from, to, y, height) {
    const { layer } = this.frame.facts.sites[this.frame.blocks.site.data[call]];
    const text = `L${layer}`;
    if (to - from < pen.measureText(text).width + 6) return;
    pen.fillStyle = "#fff";
    pen.fillText(text, Math.max(LEFT, from) + 3, y + height / 2 + 1);
  }

  drawRange(pen, height) {
    if (!this.range) return;
    const [from, to] = this.range.map((time) => this.x(time));
    pen.fillStyle = this.frame.colour("accent");
    pen.globalAlpha = 0.14;
    pen.fillRect(from, LANE.top - 4, to - from, height);
    pen.globalAlpha = 1;
    for (const x of [from, to]) pen.fillRect(x, LANE.top - 4, 1, height);
  }

  // What is under the pointer or the cursor.

  sentence(call) {
    const { facts, blocks } = this.frame;
    const { name } = facts.sites[blocks.site.data[call]];
    const entered = Number.isNaN(this.entered[call]) ? "beginning not seen" : `${duration(this.seen[call] - this.entered[call])} until seen`;
    return `${name}, forward ${facts.forwards[blocks.forward.data[call]]}: ${entered} at ${duration(this.seen[call])}, statistics took ${duration(this.took[call])}, ${size(blocks.bytes.data[call])} kept, ${facts.kernels[blocks.kernel.data[call]]}`;
  }

  found(event) {
    const box = this.canvas.getBoundingClientRect();
    const lane = Math.floor((event.clientY - box.top - LANE.top) / LANE.height);
    const x = event.clientX - box.left;
    let best = null;
    let nearest = 4; // pixels
    for (const call of this.order) {
      if (this.lane(call) !== lane) continue;
      const off = Math.max(this.x(this.start(call)) - x, x - this.x(this.end(call)), 0);
      if (off < nearest) [best, nearest] = [call, off];
    }
    return best;
  }

  listen() {
    const { canvas, frame } = this;
    const inside = (event) => event.clientX - canvas.getBoundingClientRect().left;
    canvas.addEventListener("pointerdown", (event) => {
      this.down = inside(event);
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (this.down !== undefined && Math.abs(inside(event) - this.down) > 4) return this.mark(this.time(this.down), this.time(inside(event)));
      const call = this.found(event);
      if (call === null) return frame.hideTip();
      frame.showTip(event, this.sentence(call).split(/(?<=:|,) /));
    });
    canvas.addEventListener("pointerup", (event) => {
      const dragged = Math.abs(inside(event) - this.down) > 4;
      this.down = undefined;
      const call = this.found(event);
      if (!dragged && call !== null) this.choose(call);
    });
    canvas.addEventListener("pointerleave", () => frame.hideTip());
    canvas.addEventListener("wheel", (event) => this.wheel(event, inside(event)), { passive: false });
    canvas.addEventListener("keydown", (event) => this.key(event));
    for (const kind of ["focus", "blur"]) canvas.addEventListener(kind, () => this.draw());
  }

  wheel(event, x) {
    if (document.activeElement !== this.canvas) return; // the page scrolls
    event.preventDefault();
    if (Math.abs(event.deltaX) > Math.abs(event.deltaY)) this.pan(event.deltaX / this.width);
    else this.zoom(1.0015 ** event.deltaY, this.time(x));
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    const place = this.order.indexOf(this.at);
    const actions = {
      w: () => this.zoom(0.5),
      s: () => this.zoom(2),
      a: () => this.pan(-0.25),
      d: () => this.pan(0.25),
      "[": () => this.mark(this.start(this.at), Math.max(this.start(this.at), this.range?.[1] ?? this.end(this.at))),
      "]": () => this.mark(Math.min(this.end(this.at), this.range?.[0] ?? this.start(this.at)), this.end(this.at)),
      Enter: () => this.choose(this.at),
      Escape: () => this.clear(),
      ArrowLeft: () => (event.shiftKey ? this.pan(-0.25) : this.go(place - 1)),
      ArrowRight: () => (event.shiftKey ? this.pan(0.25) : this.go(place + 1)),
      Home: () => this.go(0),
      End: () => this.go(this.n - 1),
      ArrowUp: () => this.turn(-1),
      ArrowDown: () => this.turn(1),
    };
    if (!(key in actions)) return;
    event.preventDefault();
    actions[key]();
  }

  go(place) {
    this.at = this.order[Math.min(this.n - 1, Math.max(0, place))];
    const [from, to] = [this.start(this.at), this.end(this.at)];
    const span = this.view[1] - this.view[0];
    if (from < this.view[0] || to > this.view[1]) this.look((from + to - span) / 2, (from + to + span) / 2);
    this.draw();
    this.frame.say(this.sentence(this.at));
  }

  /** To the call of another thread that is nearest in time. */
  turn(by) {
    const lane = this.lane(this.at) + by;
    const off = (call) => Math.abs(this.start(call) - this.start(this.at));
    const there = this.order.filter((call) => this.lane(call) === lane);
    if (there.length) this.go(this.order.indexOf(there.reduce((best, call) => (off(call) < off(best) ? call : best))));
  }

  choose(call) {
    this.at = call;
    const { name, layer } = this.frame.facts.sites[this.frame.blocks.site.data[call]];
    this.frame.select({ site: name, layer, heads: [] });
    this.frame.say(this.sentence(call));
  }

  clear() {
    this.range = null;
    this.sums.hidden = true;
    this.frame.select({ site: null });
    this.draw();
  }

  // Sums.

  mark(one, other) {
    this.range = [Math.min(one, other), Math.max(one, other)];
    const [from, to] = this.range;
    const calls = this.order.filter((call) => this.end(call) >= from && this.start(call) <= to);
    const sum = (value) => calls.reduce((total, call) => total + (value(call) || 0), 0);
    const sites = new Set(calls.map((call) => this.frame.blocks.site.data[call])).size;
    const model = sum((call) => this.seen[call] - this.entered[call]);
    const text = `${duration(to - from)} marked: ${count(calls.length, "call")} of ${count(sites, "site")} in it or reaching into it, ${duration(model)} until seen, statistics took ${duration(sum((call) => this.took[call]))}, ${size(sum((call) => this.frame.blocks.bytes.data[call]))} kept.`;
    this.sums.textContent = text;
    this.sums.hidden = false;
    this.frame.say(text);
    this.draw();
  }

  /** The run in the Trace Event Format; `chrome_trace` in Python gives the same. */
  trace() {
    const { facts, blocks } = this.frame;
    const rounded = (seconds) => Number((1e6 * seconds).toFixed(3));
    const event = (name, cat, tid, start, end, args) => ({ ph: "X", pid: 1, tid, name, cat, ts: rounded(start), dur: rounded(end - start), args });
    const events = Array.from({ length: this.lanes }, (_, tid) => ({ ph: "M", pid: 1, tid, name: "thread_name", args: { name: `thread ${tid}` } }));
    this.begun.forEach((start, i) => events.push(event(`forward ${facts.forwards[i]}`, "forward", blocks.threads.data[i], start, this.ended[i], {})));
    for (let call = 0; call < this.n; call++) {
      const { name } = facts.sites[blocks.site.data[call]];
      const kernel = facts.kernels[blocks.kernel.data[call]];
      const about = { kernel, bytes: blocks.bytes.data[call], entered: Number.isNaN(this.entered[call]) ? "not known" : "seen" };
      events.push(event(name, kernel, this.lane(call), this.start(call), this.seen[call], about));
      events.push(event(`${name}: statistics`, "statistics", this.lane(call), this.seen[call], this.end(call), {}));
    }
    return { displayTimeUnit: "ms", otherData: { clock: "host", note: facts.note }, traceEvents: events };
  }
}
