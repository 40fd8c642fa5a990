// The frame around every view: title, caption, controls, what the pointer or cursor is on, notes, downloads, data table.

import { decode } from "./blocks.js";
import { csvOf } from "./csv.js";
import { button, count, download, make, roving } from "./dom.js";
import { Kernel } from "./kernel.js";
import { sharedSelection } from "./selection.js";
import { Settings } from "./settings.js";

const TABLE_ROWS = 50;
/** Files that hold the figure: their types, and what they are. */
const FORMS = {
  svg: { type: "image/svg+xml", what: "a drawing" },
  pdf: { type: "application/pdf", what: "a page for a paper" },
  png: { type: "image/png", what: "a picture" },
};

/** Decode a view's spec and build its frame in `el`; what a view's module works with. */
export async function open({ model, el }) {
  const spec = model.get("spec");
  return new Frame(model, el, spec, await blocksOf(spec));
}

async function blocksOf({ blocks }) {
  return Object.fromEntries(await Promise.all(Object.keys(blocks).map(async (name) => [name, await decode(blocks[name])])));
}

export class Frame {
  /**
   * facts, blocks {name: {data, shape}}, selection: what to draw. controls, body: where to draw it.
   * live: whether a kernel answers. theme: "light" or "dark".
   */
  constructor(model, el, spec, blocks) {
    this.model = model;
    this.el = el;
    this.spec = spec;
    this.blocks = blocks;
    this.facts = spec.facts;
    this.live = Boolean(model.get("live"));
    this.kernel = this.live ? new Kernel(model) : null;
    this.endings = [];
    this.redraws = new Set();
    this.settings = new Settings(this);
    this.store = sharedSelection().of(spec.scope, spec.selection);
    this.build();
    this.watchTheme();
    this.watchSelection();
    if (this.live) this.replaceStill();
  }

  build() {
    const { spec } = this;
    this.controls = make("div", { class: "controls" });
    this.body = make("div", { class: "body" });
    this.status = make("p", { class: "status" });
    this.spoken = make("p", { class: "spoken", "aria-live": "polite" });
    this.notes = make("ul", { class: "notes" });
    this.tools = make("div", { class: "tools", role: "toolbar", "aria-label": "Files" });
    roving(this.tools);
    const end = make("span", { class: "spoken", tabindex: "-1" });
    const skip = button("Skip this view", () => end.focus(), { class: "skip" });
    const title = make("h2", { class: "title" }, spec.title);
    this.caption = make("p", { class: "caption" });
    // JupyterLab's own keys rest while the view has the focus: a typed "d d" would delete the cell.
    this.root = make("section", { class: `workbench ${spec.kind}`, "aria-label": spec.title, "data-lm-suppress-shortcuts": true }, skip, title, this.caption, this.controls, this.body, this.status, this.spoken, this.notes, this.tools);
    if (spec.table.length) this.addTable();
    this.describe();
    this.tools.prepend(...Object.entries(FORMS).map(([form, { what }]) => button(form.toUpperCase(), () => this.save(form), { title: `Download the figure as ${what}, with its title and caption` })));
    this.tools.append(button("JSON", () => download(`${this.fileName()}.json`, "application/json", [JSON.stringify(this.plain(), null, 1)]), { title: "Download everything this view shows" }));
    this.tip = make("div", { class: "tip", role: "tooltip", hidden: true });
    this.root.append(this.tip, end);
    this.el.replaceChildren(this.root);
  }

  /** The words around the view, and its table, as the spec has them. */
  describe() {
    const { caption, notes, table } = this.spec;
    this.caption.textContent = caption;
    this.notes.replaceChildren(...notes.map((note) => make("li", {}, note)));
    this.notes.hidden = !notes.length;
    if (table.length) this.describeTable();
  }

  /** Be told when the kernel has given the view another spec; what stands around the view follows by itself. */
  onSpec(told) {
    const heard = async () => {
      const spec = this.model.get("spec");
      const blocks = await blocksOf(spec);
      if (spec !== this.model.get("spec")) return; // yet another one has come meanwhile
      Object.assign(this, { spec, blocks, facts: spec.facts });
      this.describe();
      told();
    };
    this.model.on("change:spec", heard);
    this.endings.push(() => this.model.off("change:spec", heard));
  }

  /** Hand the figure out, with its words around it: `form` is one of `FORMS`. */
  async save(form) {
    const slow = setTimeout(() => this.say("Waiting for the kernel, which has what draws figures."), 600);
    try {
      const { figureOf, pictureOf } = await import("./paper.js");
      const { pdfOf } = form === "pdf" ? await import("./pdf.js") : { pdfOf: null };
      clearTimeout(slow);
      const figure = await figureOf(this);
      const file = form === "svg" ? figure.svg : await (pdfOf ? pdfOf(figure, this.spec.title) : pictureOf(figure));
      const name = `${this.fileName()}.${form}`;
      download(name, FORMS[form].type, [file]);
      this.say(`The figure is in ${name}.`);
    } catch (error) {
      this.say(`The figure could not be made: ${error.message}`);
    } finally {
      clearTimeout(slow);
    }
  }

  /** A list of keys, shown on demand and by "?": pairs of keys and what they do. */
  offerKeys(pairs) {
    const list = pairs.flatMap(([keys, does]) => [make("dt", {}, keys), make("dd", {}, does)]);
    const keys = make("details", { class: "keys" }, make("summary", {}, "Keys"), make("dl", {}, ...list));
    this.tip.before(keys);
    // JupyterLab asks the focused element itself first whether its shortcuts are to be left alone.
    this.root.addEventListener("focusin", ({ target }) => {
      if (target instanceof Element) target.setAttribute("data-lm-suppress-shortcuts", "true");
    });
    this.root.addEventListener("keydown", (event) => {
      if (event.key !== "?" || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
      event.preventDefault();
      keys.open = !keys.open;
    });
  }

  /** A button that leads to the page of the chosen head, where there is one in the document. */
  pageOfHead() {
    const page = () => /** @type {HTMLElement | null} */ (document.querySelector(".workbench.head_page .page"));
    const go = button("Its page", () => {
      page()?.scrollIntoView({ block: "center" });
      page()?.focus({ preventScroll: true });
    }, { class: "screen", title: "Go to what is known of the chosen head" });
    const show = () => {
      go.hidden = !this.selection.heads.length || !page();
    };
    this.onSelect(show);
    for (const event of ["pointerenter", "focusin"]) this.root.addEventListener(event, show); // it may be drawn later
    return go;
  }

  /** Offer more numbers as a file: `rows()` gives texts and numbers, or a promise of them. */
  offerRows(text, name, title, rows) {
    const save = async () => {
      try {
        download(`${this.fileName()}-${name()}.csv`, "text/csv", ["\ufeff", csvOf(await rows())]);
      } catch (error) {
        this.say(`The file could not be made: ${error.message}`);
      }
    };
    this.tools.append(button(text, save, { title }));
  }

  fileName() {
    return this.spec.title.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "").slice(0, 60) || this.spec.kind;
  }

  // The data table and its file.

  column({ text, block }) {
    return text ?? this.blocks[block].data;
  }

  addTable() {
    this.details = make("details", { class: "data" });
    this.details.addEventListener("toggle", () => {
      if (this.details.open && this.details.children.length === 1) this.details.append(this.table());
    });
    this.root.append(this.details);
    this.file = button("CSV", () => download(`${this.fileName()}.csv`, "text/csv", ["\ufeff", this.csv()]));
    this.tools.append(this.file);
  }

  describeTable() {
    const n = this.column(this.spec.table[0]).length;
    const left = this.spec.left_out;
    const cut = left ? ` (${left.toLocaleString("en")} more ${left === 1 ? "is" : "are"} left out)` : "";
    const said = n > TABLE_ROWS ? `Table: the first ${TABLE_ROWS} of ${count(n, "row")}${cut}` : `Table: ${count(n, "row")}${cut}`;
    this.details.replaceChildren(make("summary", {}, said), ...(this.details.open ? [this.table()] : []));
    this.file.title = `Download the table, ${count(n, "row")}${cut}`;
  }

  table() {
    const columns = this.spec.table;
    const shown = Math.min(this.column(columns[0]).length, TABLE_ROWS);
    const head = make("tr", {}, ...columns.map(({ name, text }) => make("th", { scope: "col", class: text ? null : "n" }, name)));
    const cell = (column, i) => {
      const value = this.column(column)[i];
      return column.text ? make("td", {}, make("bdi", {}, value)) : make("td", { class: "n" }, Number.isNaN(value) ? "–" : `${Number(value.toPrecision(6))}`);
    };
    const rows = Array.from({ length: shown }, (_, i) => make("tr", {}, ...columns.map((column) => cell(column, i))));
    return make("div", { class: "wide", tabindex: "0", role: "region", "aria-label": `Table of ${this.spec.title}` }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)));
  }

  csv() {
    const columns = this.spec.table;
    const n = this.column(columns[0]).length;
    return csvOf([columns.map(({ name }) => name), ...Array.from({ length: n }, (_, i) => columns.map((column) => this.column(column)[i]))]);
  }

  plain() {
    const { blocks, ...rest } = this.spec;
    const arrays = Object.fromEntries(Object.keys(blocks).map((name) => [name, { shape: blocks[name].shape, values: Array.from(this.blocks[name].data) }]));
    return { ...rest, state: this.state, blocks: arrays };
  }

  // What the pointer or the cursor is on.

  /** A line below the view that is also spoken, after a pause so that a moving pointer does not chatter. */
  say(text) {
    this.status.textContent = text;
    clearTimeout(this.speaking);
    this.speaking = setTimeout(() => {
      this.spoken.textContent = text;
    }, 400);
  }

  /** A tip near the pointer; `lines` are text. */
  showTip(event, lines) {
    this.tip.replaceChildren(...lines.map((line) => make("div", {}, line)));
    this.tip.hidden = false;
    const { width, height } = this.tip.getBoundingClientRect();
    // Beside the pointer and inside the window, in the root's own coordinates: a notebook may move its cells about.
    const root = this.root.getBoundingClientRect();
    const left = Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 8));
    const top = event.clientY + 18 + height > innerHeight ? Math.max(4, event.clientY - height - 12) : event.clientY + 18;
    this.tip.style.left = `${left - root.left}px`;
    this.tip.style.top = `${top - root.top}px`;
  }

  hideTip() {
    this.tip.hidden = true;
  }

  // The shared selection.

  get selection() {
    return this.store.value;
  }

  select(change) {
    this.store.select(change);
    if (JSON.stringify(this.model.get("selection")) === JSON.stringify(this.store.value)) return;
    this.model.set("selection", this.store.value);
    this.model.save_changes();
  }

  /** Be told of every change of the selection, and once now. */
  onSelect(told) {
    this.endings.push(this.store.follow(told));
    told(this.selection);
  }

  watchSelection() {
    this.onKernel = () => this.store.take(this.model.get("selection"));
    if (this.live) this.onKernel();
    this.model.on("change:selection", this.onKernel);
  }

  // What is set in this view alone: it reaches Python, or stands in the page's address.

  get state() {
    return this.model.get("state") ?? {};
  }

  /** Change some of the state; written after a pause, so that a slider does not chatter. */
  keep(change) {
    this.model.set("state", { ...this.state, ...change });
    clearTimeout(this.keeping);
    this.keeping = setTimeout(() => this.model.save_changes(), 150);
  }

  /** Be told of every change of the state, also of one's own. */
  onState(told) {
    const heard = () => told(this.state);
    this.model.on("change:state", heard);
    this.endings.push(() => this.model.off("change:state", heard));
  }

  // Theme and size.

  /** Draw again when the theme or the width changes, and once now. */
  onRedraw(draw) {
    this.redraws.add(draw);
    this.width = this.body.clientWidth || undefined; // where it is on the page already, it is drawn for this width
    draw();
  }

  /** Draw again; a promise where what draws takes its time. */
  redraw() {
    return Promise.all([...this.redraws].map((draw) => draw()));
  }

  watchTheme() {
    const sizes = new ResizeObserver(() => {
      if (this.width === this.body.clientWidth) return;
      this.width = this.body.clientWidth;
      this.redraw();
    });
    sizes.observe(this.body);
    const read = () => {
      const forced = document.documentElement.dataset.theme ?? { true: "light", false: "dark" }[document.body.dataset.jpThemeLight];
      const printing = matchMedia("print").matches;
      const theme = printing ? "light" : (forced ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
      if (theme === this.theme && printing === this.printing) return;
      this.theme = theme;
      this.printing = printing;
      this.root.dataset.theme = theme;
      if (this.body.clientWidth || printing) this.redraw();
      else {
        this.width = 0; // JupyterLab hides everything for a frame as it changes its theme: observed anew, the width is told
        sizes.unobserve(this.body);
        sizes.observe(this.body);
      }
    };
    read();
    const watcher = new MutationObserver(read);
    watcher.observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });
    watcher.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light"] });
    const media = ["(prefers-color-scheme: dark)", "print"].map((query) => matchMedia(query));
    for (const one of media) one.addEventListener("change", read);
    this.endings.push(() => watcher.disconnect(), () => sizes.disconnect(), () => media.forEach((one) => one.removeEventListener("change", read)));
  }

  /** A colour of the style sheet by name: paper, ink, muted, line, accent, cursor, unseen. */
  colour(name) {
    return getComputedStyle(this.root).getPropertyValue(`--${name}`).trim();
  }

  // The kernel.

  /** Ask the kernel; the answer has `buffers`. Rejects with the kernel's words, or at once where no kernel lives. */
  ask(question) {
    return this.kernel ? this.kernel.ask(question) : Promise.reject(new Error("no kernel is connected"));
  }

  /** Hide the picture that stands for this view where nothing lives behind it; it comes after the view, and anew with it. */
  replaceStill() {
    const hide = () => this.model.get("still").forEach((id) => document.getElementById(id)?.setAttribute("hidden", ""));
    hide();
    const watcher = new MutationObserver(hide);
    watcher.observe(document.body, { childList: true, subtree: true });
    this.model.on("change:still", hide);
    this.endings.push(() => watcher.disconnect());
  }

  close() {
    clearTimeout(this.speaking);
    this.kernel?.close();
    this.model.off("change:selection", this.onKernel);
    for (const end of this.endings) end();
  }
}
