// The drawing of a circuit graph: links on a canvas, a focusable element per shown node, names beside them, highlights.

import { arrange, CHIP } from "./layout.js";
import { cut, make } from "workbench/shared/dom.js";

const BESIDE = 16; // letters beside a node
const FADED = 0.28; // how strong edges are beside those of a node that is pointed at
const SPREAD = { q: -5, k: 0, v: 5 }; // where on a head an edge arrives

export class GraphDrawing {
  /**
   * view: frame, circuit, shown, layout (a name), current, pins; paint(node) -> {background, ink, shape},
   * stroke(edge) -> {colour, dash, weight}, tag(node), sentence(node); point(node, held), leave(), choose(node), keys(key, node).
   */
  constructor(view) {
    this.view = view;
    this.frame = view.frame;
    this.base = make("canvas", { "aria-hidden": "true" });
    this.over = make("canvas", { "aria-hidden": "true" });
    this.plane = make("div", { class: "plane", role: "application", "aria-roledescription": "graph", "aria-label": "Circuit graph. Up and down walk along the strongest edge; ? lists all keys." }, this.base, this.over);
    this.element = make("div", { class: "graph" }, this.plane);
    this.elements = new Map();
    this.listen();
  }

  listen() {
    const { view } = this;
    const on = (name, told) => this.plane.addEventListener(name, (event) => {
      const found = event.target.closest(".node");
      if (found) told(Number(found.dataset.at), event);
    });
    on("pointerover", (node) => view.point(node, false));
    on("pointerout", () => view.leave());
    on("focusin", (node) => view.point(node, true));
    on("click", (node) => {
      this.focus(node);
      view.choose(node);
    });
    on("keydown", (node, event) => {
      if (!event.ctrlKey && !event.metaKey && !event.altKey && view.keys(event.key, node)) event.preventDefault();
    });
  }

  /** Lay out and draw what is shown. */
  draw() {
    const { view, frame } = this;
    const ink = this.base.getContext("2d");
    ink.font = `11px ${frame.colour("sans")}`;
    const longest = Math.max(0, ...view.circuit.facts.rows.map((label) => ink.measureText(label).width));
    this.left = Math.min(140, longest + 14);
    this.made = arrange(view.shown, view.layout, Math.max(260, this.element.clientWidth || 800), this.left);
    this.dpr = window.devicePixelRatio || 1;
    const { width, height } = this.made;
    for (const each of [this.plane, this.base, this.over]) Object.assign(each.style, { width: `${width}px`, height: `${height}px` });
    for (const canvas of [this.base, this.over]) Object.assign(canvas, { width: width * this.dpr, height: height * this.dpr });
    this.paintBase();
    this.placeNodes();
    this.light();
  }

  pen(canvas) {
    const ink = canvas.getContext("2d");
    ink.setTransform(this.dpr, 0, 0, this.dpr, 0, 0);
    ink.clearRect(0, 0, this.made.width, this.made.height);
    ink.font = `11px ${this.frame.colour("sans")}`;
    ink.textBaseline = "middle";
    return ink;
  }

  paintBase() {
    const { view, frame, made } = this;
    const { nodes } = view.shown;
    const ink = this.pen(this.base);
    for (const { from, to, label } of made.columns) {
      ink.fillStyle = frame.colour(label ? "panel" : "paper");
      ink.fillRect(from + 4, 18, to - from - 8, made.height);
    }
    ink.fillStyle = frame.colour("line");
    for (const { y, label } of made.rows) if (label) ink.fillRect(this.left - 6, y - 0.5, made.width - this.left, 1);
    ink.fillStyle = frame.colour("edge");
    for (const [node, { x, y }] of made.spots) if (!nodes.has(node)) ink.fillRect(x - 1.5, y - 1.5, 3, 3);
    // From the keys and values of a group to its heads.
    ink.strokeStyle = frame.colour("edge");
    ink.beginPath();
    for (const group of nodes) {
      for (const head of view.circuit.nodes[group].feeds.filter((each) => nodes.has(each))) {
        ink.moveTo(made.spots.get(group).x, made.spots.get(group).y - CHIP / 2);
        ink.lineTo(made.spots.get(head).x, made.spots.get(head).y + CHIP / 2);
      }
    }
    ink.stroke();
    const faint = frame.printing && this.lit().length ? FADED : 1;
    this.lines(ink, view.shown.edges, 0.1 * faint, 0.75 * faint);
  }

  /** Draw edges, faint ones first; the weakest and the strongest are so opaque. */
  lines(ink, edges, weakest, more) {
    const { circuit } = this.view;
    const strokes = edges.map((edge) => [edge, this.view.stroke(edge)]).sort(([, x], [, y]) => x.weight - y.weight);
    for (const [edge, { colour, dash, weight }] of strokes) {
      const [from, to] = [circuit.start(edge), circuit.end(edge)].map((node) => this.made.spots.get(node));
      const x = to.x + (SPREAD[circuit.receiver(edge).part] ?? 0);
      const [low, high] = [from.y - CHIP / 2, to.y + CHIP / 2];
      const bend = Math.max(16, Math.abs(high - low) * 0.45);
      // Around the nodes between two that stand above each other.
      const bow = Math.abs(x - from.x) < 8 && low - high > 60 ? CHIP + 0.1 * (low - high) : 0;
      ink.globalAlpha = weakest + more * weight ** 0.6;
      ink.strokeStyle = colour;
      ink.lineWidth = 0.7 + 4.3 * weight ** 0.7;
      ink.setLineDash(dash);
      ink.beginPath();
      ink.moveTo(from.x, low);
      ink.bezierCurveTo(from.x + bow, low - bend, x + bow, high + bend, x, high);
      ink.stroke();
    }
  }

  // Nodes.

  placeNodes() {
    const { view, made } = this;
    const { circuit, shown } = view;
    for (const [node, { element, tag }] of this.elements) {
      if (shown.nodes.has(node)) continue;
      element.remove();
      tag.remove();
      this.elements.delete(node);
    }
    for (const node of [...shown.nodes].sort((x, y) => x - y)) {
      const { element, tag } = this.elementsOf(node);
      const { x, y } = made.spots.get(node);
      const { background, ink, shape } = view.paint(node);
      element.className = `node ${circuit.kind(node)} ${shape}`;
      Object.assign(element.style, { left: `${x}px`, top: `${y}px`, width: `${this.wide(node)}px`, background, color: ink });
      element.textContent = this.text(node);
      Object.assign(tag.style, { left: `${x}px`, top: `${y + CHIP / 2 + 1}px` });
    }
    const heads = [...shown.nodes].filter((node) => circuit.kind(node) === "head");
    this.setTab(shown.nodes.has(this.tab) ? this.tab : circuit.strongest(heads.length ? heads : [...shown.nodes]));
    this.label();
  }

  elementsOf(node) {
    if (!this.elements.has(node)) {
      const element = make("div", { role: "button", "data-at": node, "data-node": this.view.circuit.nodes[node].name });
      const tag = make("bdi", { class: "tag", "aria-hidden": "true" });
      this.elements.set(node, { element, tag });
      this.plane.append(element, tag);
    }
    return this.elements.get(node);
  }

  wide(node) {
    return /input|logits/.test(this.view.circuit.kind(node)) ? 52 : Math.max(20, Math.min(54, this.made.step - 6));
  }

  text(node) {
    const { kind, short, number } = this.view.circuit.nodes[node];
    return this.wide(node) >= 36 ? short : { head: number, mlp: "M", kv: short.includes("KV") ? "kv" : short }[kind];
  }

  setTab(node) {
    this.tab = node;
    for (const [each, { element }] of this.elements) element.tabIndex = each === node ? 0 : -1;
  }

  focus(node) {
    this.setTab(node);
    this.elements.get(node)?.element.focus();
  }

  /** Names beside nodes, what is said of them, what is pinned and chosen. */
  label() {
    const { view, frame } = this;
    const { layer, heads, site: chosenSite } = frame.selection;
    for (const [node, { element, tag }] of this.elements) {
      const { head, site } = view.circuit.nodes[node];
      const here = site === null || chosenSite === null || site === chosenSite;
      const chosen = Boolean(head) && head[0] === layer && heads.includes(head[1]) && here;
      element.setAttribute("aria-label", view.sentence(node) + (chosen ? "; chosen" : ""));
      element.setAttribute("aria-pressed", view.pins.has(node));
      element.classList.toggle("chosen", chosen);
      tag.textContent = cut(view.tag(node), BESIDE);
      tag.classList.toggle("pinned", view.pins.has(node));
    }
  }

  /** Edges in and out of the node that is pointed at, and of the pinned ones. */
  lit() {
    const { shown, pins, current } = this.view;
    const nodes = [...pins.keys(), current].filter((node) => shown.nodes.has(node));
    return [...new Set(nodes.flatMap((node) => [...shown.into(node), ...shown.out(node)]))];
  }

  /** Show what goes in and out of the node that is pointed at, and of the pinned ones. */
  light() {
    const { view } = this;
    const { circuit } = view;
    // On paper a canvas hides what lies below it: there is one then.
    const { printing } = this.frame;
    const ink = printing ? this.base.getContext("2d") : this.pen(this.over);
    ink.fillStyle = this.frame.colour("muted");
    for (const { y, label } of this.made.rows) ink.fillText(label, 4, y);
    for (const { from, to, label } of this.made.columns) ink.fillText(cut(label, Math.max(4, Math.floor((to - from) / 7))), from + 6, 8);
    const edges = this.lit();
    this.base.classList.toggle("faded", edges.length > 0 && !printing);
    this.lines(ink, edges, 0.45, 0.5);
    const near = circuit.ends(edges);
    for (const [node, { element }] of this.elements) element.classList.toggle("near", near.has(node) || node === view.current);
  }

  /** The next node of the layer to the left or right, or the first or last; undefined where there is none. */
  beside(node, key) {
    const { nodes } = this.view.circuit;
    const spot = (each) => this.made.spots.get(each);
    const row = [...this.view.shown.nodes].filter((each) => nodes[each].layer === nodes[node].layer).sort((x, y) => spot(x).x - spot(y).x || spot(y).y - spot(x).y);
    const at = row.indexOf(node);
    return { ArrowLeft: row[at - 1], ArrowRight: row[at + 1], Home: row[0], End: row.at(-1) }[key];
  }
}
