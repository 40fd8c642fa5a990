// Beside a circuit graph: the node that is pointed at, its pin and its name, and what goes in and out, strongest first.

import { button, cut, exactly, make, roughly, roving } from "workbench/shared/dom.js";

const LISTED = 10;
const LONGEST = 60;
const KINDS = { head: "head", mlp: "MLP", kv: "what several heads read", input: "embeddings", logits: "" };

/** A name as it may be shown: characters that cannot be seen are spelled out, and there is an end. */
export function readable(text) {
  const spelled = (c) => `⟨U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`;
  return cut(text.trim().replace(/[\p{C}\p{Zl}\p{Zp}]/gu, spelled), LONGEST);
}

/** A short line in the colour and dashes of an edge. */
export function markOf({ colour, dash }) {
  const mark = make("i", { class: "mark", "aria-hidden": "true" });
  Object.assign(mark.style, { borderTopColor: colour, borderTopStyle: dash.length ? (dash[0] < 2 ? "dotted" : "dashed") : "solid" });
  return mark;
}

export class NodePanel {
  /** view: circuit, shown, pins, current; scoreWords(node), edgeWords(edge), stroke(edge); toggle(node), pin(node, name), go(node). */
  constructor(view) {
    this.view = view;
    this.title = make("h3");
    this.about = make("p", { class: "about" });
    this.pinning = button("Pin", () => view.toggle(this.node));
    this.name = make("input", { type: "text", maxlength: LONGEST, placeholder: "name", "aria-label": "Name of the node", autocomplete: "off", spellcheck: "false" });
    this.name.addEventListener("input", () => view.pin(this.node, this.name.value));
    this.name.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === "Escape") view.go(this.node);
    });
    this.controls = make("div", { class: "pinning" }, this.pinning, this.name);
    this.lists = make("div");
    roving(this.lists);
    this.element = make("div", { class: "side", role: "region", "aria-label": "The node that is pointed at" }, this.title, this.about, this.controls, this.lists);
  }

  /** Whether someone is writing here, so that a pointer that passes by must not change it. */
  get busy() {
    return this.element.getRootNode().activeElement === this.name;
  }

  show() {
    const { view } = this;
    const { shown, pins, circuit } = view;
    const node = view.current;
    this.node = node;
    this.controls.hidden = node === null;
    if (node === null) {
      this.title.textContent = pins.size ? "Pinned" : "";
      this.about.textContent = pins.size ? "" : "Point at a node, or go to one with Tab and the arrow keys, for its edges. ↑ and ↓ walk along the strongest.";
      const rows = [...pins].map(([each, name]) => this.row(each, make("b", {}, circuit.nodes[each].label), make("bdi", {}, name)));
      this.lists.replaceChildren(make("ul", { class: "links" }, ...rows));
      return;
    }
    this.title.replaceChildren(circuit.nodes[node].label, make("small", {}, KINDS[circuit.kind(node)]));
    this.about.textContent = view.scoreWords(node);
    this.pinning.textContent = pins.has(node) ? "Unpin" : "Pin";
    if (!this.busy) this.name.value = pins.get(node) ?? "";
    this.lists.replaceChildren(this.list("In", shown.into(node), true), this.list("Out", shown.out(node), false));
  }

  row(node, ...content) {
    const { circuit, shown } = this.view;
    const go = button("", () => this.view.go(node), { "data-to": circuit.nodes[node].name, disabled: !shown.nodes.has(node) });
    go.append(...content);
    return make("li", {}, go);
  }

  list(title, edges, into) {
    const { view } = this;
    const { circuit } = view;
    const rows = edges.slice(0, LISTED).map((edge) => {
      const [node, end] = into ? [circuit.start(edge), circuit.end(edge)] : [circuit.end(edge), this.node];
      const { part } = circuit.receiver(edge);
      const scores = circuit.circuits.map((i) => circuit.score(edge, i));
      // Into the keys and values of a head's group, which are a node of their own.
      const words = [end === this.node ? "" : circuit.nodes[end].label, part, view.edgeWords(edge)].filter(Boolean).join(" ");
      const known = scores.map((score) => roughly(score)).join(" / ");
      return this.row(node, markOf(view.stroke(edge)), make("b", {}, circuit.nodes[node].label), make("span", { class: "part" }, words), make("span", { class: "n", title: scores.map(exactly).join(" / ") }, known));
    });
    const rest = edges.length - rows.length;
    const said = rest ? `and ${rest.toLocaleString("en")} more` : edges.length ? "" : "none shown";
    return make("section", {}, make("h4", {}, `${title}, strongest first`), make("ul", { class: "links" }, ...rows), make("p", { class: "about" }, said));
  }
}
