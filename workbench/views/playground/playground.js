// Playground: a prompt to edit and run, heads by a number, the chosen head's pattern, and what the model says next, before
// and after heads, rows and edges are ablated. The kernel runs the model and gives the view another spec.

import { colourAt, divergingAt, gradient, rgbOf } from "workbench/shared/colour.js";
import { axes, button, checkbox, exactly, legend, make, named, roughly, roving } from "workbench/shared/dom.js";
import { open } from "workbench/shared/frame.js";
import { ceiling, greatest } from "workbench/shared/scales.js";
import { NextTokens } from "./next.js";
import { Pressed } from "./pressed.js";

const PATIENCE = 15_000; // milliseconds after which a view says that it is still waiting
const PARTS = ["site", "head", "query", "key"];

/** Byte 0: a place that no query sees. Byte b: weight ((b - 1) / 254) squared. */
const weightOf = (byte) => (byte ? ((byte - 1) / 254) ** 2 : NaN);
/** The least weight that a byte stands for: of the largest one it makes no scale go further than the weights do. */
const leastOf = (byte) => (Math.max(0, byte - 1.5) / 254) ** 2;
const same = (one, other) => PARTS.every((part) => one[part] === other[part]);
const bare = (edits) => edits.map((edit) => Object.fromEntries(PARTS.map((part) => [part, edit[part]])));

export async function render({ model, el }) {
  const frame = await open({ model, el });
  new Playground(frame);
  return () => frame.close();
}

class Playground {
  constructor(frame) {
    this.frame = frame;
    this.turn = 0;
    this.held = null; // the cells that were asked for: {wanted, cells} or {wanted, said}
    this.busy = false;
    this.asked = null; // the run that was asked for last, until the spec is that of another one
    this.queued = null;
    this.wanted = bare(this.facts.edits);
    this.begin();
    this.buildControls();
    this.buildBody();
    frame.offerKeys([
      ["← → ↑ ↓, Home, End", "move over the heads, or over the pattern"], ["Enter", "choose the head, or the query and the key"], ["Esc", "choose none"],
      ["x", "ablate the head, or put it back"], ["r", "in the pattern: ablate the row"], ["e", "in the pattern: cut the edge"],
      ["Ctrl + Enter", "in the prompt: run"], ["+ − 0", "zoom in, out, all"],
    ]);
    this.ready = false;
    frame.onSelect((selection) => this.follow(selection));
    this.ready = true;
    frame.onSpec(() => this.take());
    frame.onRedraw(() => this.draw());
  }

  get facts() {
    return this.frame.facts;
  }

  get sites() {
    return this.facts.groups.flatMap(({ sites }) => sites);
  }

  get map() {
    return this.facts.maps[this.site];
  }

  /** The number of the chosen head among all. */
  get number() {
    return this.sites[this.site].start + this.head;
  }

  /** Whether heads are shown as they are after the edits. */
  get late() {
    return this.after && this.facts.edits.length > 0 ? 1 : 0;
  }

  /** The head whose pattern came with the spec is the first one that is shown. */
  begin() {
    const { kept } = this.facts;
    this.site = Math.max(0, this.sites.findIndex(({ start, heads }) => kept >= start && kept < start + heads));
    this.head = kept - this.sites[this.site].start;
  }

  nameOf(site, head) {
    const { layer, name } = this.sites[site];
    const alone = this.sites.filter((each) => each.layer === layer).length === 1;
    return alone || name === null ? `L${layer}H${head}` : `${name} head ${head}`;
  }

  wordsOf({ site, head, query, key }) {
    if (query === null) return this.nameOf(site, head);
    const at = (table, i) => named(this.token(this.facts.maps[site][table], i), i, 12);
    const row = `${this.nameOf(site, head)}, ${key === null ? "row" : "edge"} ${at("queryTokens", query)}`;
    return key === null ? row : `${row} → ${at("keyTokens", key)}`;
  }

  token(table, at) {
    return table === null ? null : (this.facts.tokens[table]?.[at] ?? null);
  }

  // What one sets.

  buildControls() {
    const { controls, settings, live } = this.frame;
    const { metrics } = this.facts;
    if (live) controls.append(this.form());
    if (metrics.length) {
      const metric = settings.pick("metric", "Colour heads by", metrics.map(({ label, unit }) => [label, unit ? `${label} (${unit})` : label]), metrics[0].label, (label) => this.set({ metric: metrics.findIndex((each) => each.label === label) }));
      this.metric = metrics.findIndex(({ label }) => label === metric.value);
      controls.append(metric.field);
    }
    const after = settings.mark("after", "Heads after the ablations", false, (on) => this.set({ after: on }));
    this.after = after.value;
    this.later = after.field;
    controls.append(after.field);
    if (!live) return;
    const press = settings.mark("press", "Pressing ablates", false, (on) => this.set({ press: on }));
    this.press = press.value;
    this.renormalise = checkbox("Renormalise rows with a cut edge", this.facts.renormalise, (on) => this.run({ renormalise: on }));
    controls.append(press.field, this.renormalise.field);
  }

  form() {
    this.prompt = make("textarea", { rows: 2, spellcheck: "false", autocomplete: "off", dir: "auto" });
    this.written = make("input", { type: "text", autocomplete: "off", spellcheck: "false", dir: "auto" });
    this.go = make("button", { type: "submit" }, "Run");
    const prompt = make("label", { class: "field prompt" }, make("span", {}, "Prompt"), this.prompt);
    const written = make("label", { class: "field prompt", hidden: !this.facts.decodes }, make("span", {}, "Written so far"), this.written);
    const form = make("form", { class: "ask" }, prompt, written, this.go);
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit();
    });
    this.prompt.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
      event.preventDefault();
      event.stopPropagation();
      this.submit();
    });
    this.fill();
    return form;
  }

  /** Put what was run into the fields, unless someone has written something else there meanwhile. */
  fill() {
    for (const [name, field] of [["prompt", this.prompt], ["written", this.written]]) {
      if (field.given !== undefined && field.value !== field.given) continue;
      field.value = this.facts[name];
      field.given = field.value; // which is not to the letter what it was given: line breaks are joined
    }
  }

  submit() {
    const text = (name, field) => (field.value === field.given ? this.facts[name] : field.value);
    this.run({ prompt: text("prompt", this.prompt), written: text("written", this.written) });
  }

  set(change) {
    Object.assign(this, change);
    this.draw();
  }

  // Running.

  /** Ask the kernel for a run with this changed; while one is on its way, the last one that is asked for waits. */
  async run(change) {
    const { prompt, written, renormalise } = this.facts;
    const asked = { prompt, written, renormalise, ...this.asked, ...this.queued, ...change };
    if (change.edits) this.wanted = change.edits;
    asked.edits = this.wanted;
    if (this.busy) {
      this.queued = asked;
      return;
    }
    this.asked = asked;
    this.wait(true);
    const slow = setTimeout(() => this.tell("The kernel has not answered yet: the model is slow, the kernel is busy, or it is gone."), PATIENCE);
    try {
      await this.frame.ask({ ask: "run", ...asked });
      for (const [name, field] of [["prompt", this.prompt], ["written", this.written]]) if (field.value === asked[name]) field.given = field.value;
      this.tell("");
    } catch (error) {
      this.asked = this.queued = null;
      this.wanted = bare(this.facts.edits);
      this.renormalise.box.checked = this.facts.renormalise;
      this.tell(error.message);
    } finally {
      clearTimeout(slow);
      this.wait(false);
    }
    const { queued } = this;
    this.queued = null;
    if (queued) this.run(queued);
  }

  wait(busy) {
    this.busy = busy;
    this.go.disabled = busy;
    this.go.textContent = busy ? "Running …" : "Run";
    this.frame.body.setAttribute("aria-busy", `${busy}`);
  }

  tell(text) {
    this.message.textContent = text;
    this.message.hidden = !text;
  }

  /** The kernel has given another spec. */
  take() {
    this.held = null;
    if (!this.busy) this.asked = null;
    if (!this.busy || !this.queued) this.wanted = bare(this.facts.edits);
    if (this.frame.live) {
      this.fill();
      this.renormalise.box.checked = this.facts.renormalise;
    }
    if (this.site >= this.sites.length || this.head >= this.sites[this.site].heads) this.begin();
    this.follow(this.frame.selection);
    this.frame.say(this.next.summary());
  }

  /** Take something out, or put it back. */
  toggle(edit) {
    if (!this.frame.live) return this.tell("A page cannot run the model: to ablate, open the playground in a notebook.");
    const there = this.wanted.some((each) => same(each, edit));
    this.run({ edits: there ? this.wanted.filter((each) => !same(each, edit)) : [...this.wanted, edit] });
  }

  // What one sees.

  buildBody() {
    const { frame } = this;
    this.message = make("p", { class: "about warning", role: "alert", hidden: true });
    this.still = make("p", { class: "where screen", hidden: frame.live }, "The last state of a playground, which stands still here: to run prompts and to ablate it needs a notebook with a running kernel.");
    this.list = make("ul", { class: "edits", "aria-label": "What is ablated" });
    roving(this.list);
    this.atlases = this.facts.groups.map((_, i) => this.atlas(i));
    this.meaning = make("p", { class: "where" });
    this.scale = make("div");
    this.next = new NextTokens(frame);
    this.title = make("h3");
    this.missing = make("p", { class: "where", hidden: true });
    this.acts = make("div", { class: "tools acts screen", role: "toolbar", "aria-label": "Ablate" });
    this.act = [this.actOf(() => this.edit()), this.actOf(() => this.edit(this.query)), this.actOf(() => this.edit(this.query, this.key))];
    this.acts.append(...this.act);
    this.acts.hidden = !frame.live;
    roving(this.acts);
    this.pattern = this.patternMap();
    this.weights = make("div");
    const heads = make("section", { class: "heads" }, make("h3", {}, "Heads"), ...this.atlases.map(({ element }, i) => make("figure", { class: "panel" }, make("figcaption", {}, this.facts.groups[i].label), axes("layers", "heads"), element)), this.scale, this.meaning);
    const pattern = make("section", { class: "pattern" }, this.title, this.acts, this.missing, axes("queries", "keys"), this.pattern.element, this.weights);
    frame.body.append(this.message, this.still, this.list, make("div", { class: "columns" }, make("div", {}, this.next.element, heads), pattern));
  }

  actOf(edit) {
    return button("", () => this.toggle(edit()));
  }

  edit(query = null, key = null) {
    return { site: this.site, head: this.head, query, key };
  }

  atlas(group) {
    const sites = () => this.facts.groups[group].sites;
    const first = () => this.facts.groups.slice(0, group).reduce((n, each) => n + each.sites.length, 0);
    const unique = new Set(sites().map(({ layer }) => layer)).size === sites().length;
    const choose = (row, column) => {
      const { layer, name, heads } = sites()[row];
      if (column >= heads) return;
      if (this.press) this.toggle({ site: first() + row, head: column, query: null, key: null });
      this.frame.select({ layer, site: name, heads: [column] });
    };
    const cells = (edits) => edits.filter(({ site }) => site >= first() && site < first() + sites().length).map(({ site, head }) => [site - first(), head]);
    const map = new Pressed(this.frame, {
      label: () => `${this.facts.groups[group].label}: layers down, heads across. Arrow keys move, Enter chooses a head, x ablates it.`,
      rowName: (row) => (unique ? `L${sites()[row].layer}` : `${row}`),
      columnName: (column) => `${column}`,
      read: (row, column) => [this.headSentence(first() + row, column)],
      choose,
      clear: () => this.frame.select({ layer: null, heads: [], site: null }),
      more: (event) => {
        const [row, column] = map.cursor ?? [map.chosen.row ?? 0, map.chosen.column ?? 0];
        if (event.key !== "x" || column >= sites()[row].heads) return;
        event.preventDefault();
        this.toggle({ site: first() + row, head: column, query: null, key: null });
      },
      ablated: () => ({ cells: cells(this.facts.edits.filter(({ query }) => query === null)), touched: cells(this.facts.edits.filter(({ query }) => query !== null)), rows: [] }),
    });
    return map;
  }

  patternMap() {
    const map = new Pressed(this.frame, {
      label: () => `${this.nameOf(this.site, this.head)}: ${this.map.queries} queries down, ${this.map.keys} keys across. Arrow keys move, Enter chooses, r ablates a row, e cuts an edge.`,
      rowName: (i) => this.token(this.map.queryTokens, i) ?? `${i}`,
      columnName: (i) => this.token(this.map.keyTokens, i) ?? `${i}`,
      read: (row, column) => this.edgeSentence(row, column),
      choose: (query, key) => {
        if (this.press) this.toggle(this.edit(query, key));
        this.frame.select({ query, key });
      },
      pressRow: (query) => {
        if (this.press) this.toggle(this.edit(query));
        this.frame.select({ query });
      },
      clear: () => this.frame.select({ query: null, key: null }),
      more: (event) => {
        const [query, key] = map.cursor ?? [this.query, this.key];
        const edit = { x: () => this.edit(), r: () => this.edit(query), e: () => (key === null ? null : this.edit(query, key)) }[event.key]?.();
        if (!edit || (event.key !== "x" && query === null)) return;
        event.preventDefault();
        this.toggle(edit);
      },
      ablated: () => {
        const own = this.facts.edits.filter(({ site, head, query }) => site === this.site && head === this.head && query !== null);
        return { cells: own.filter(({ key }) => key !== null).map(({ query, key }) => [query, key]), touched: [], rows: own.filter(({ key }) => key === null).map(({ query }) => query) };
      },
    });
    return map;
  }

  follow({ layer, heads, site, query, key }) {
    const found = this.sites.findIndex((each) => each.layer === layer && heads.length > 0 && heads[0] < each.heads && (site === null || each.name === null || each.name === site));
    if (found >= 0) [this.site, this.head] = [found, heads[0]];
    this.query = query !== null && query < this.map.queries ? query : null;
    this.key = key !== null && key < this.map.keys ? key : null;
    if (this.ready) this.draw();
  }

  draw() {
    this.later.hidden = !this.facts.edits.length;
    this.drawEdits();
    this.next.draw();
    this.drawHeads();
    this.drawActs();
    return this.drawPattern();
  }

  drawEdits() {
    const { live } = this.frame;
    const { edits } = this.facts;
    const items = edits.map((edit) => {
      const text = `${this.wordsOf(edit)}${edit.weight === null ? "" : `, weight ${roughly(edit.weight)}`}`;
      const about = live ? button("", () => this.toggle(bare([edit])[0]), { title: `Put back ${text}`, "aria-label": `Put back ${text}` }) : make("span", { class: "edit" });
      about.append(make("bdi", {}, text), ...(live ? [make("span", { class: "screen", "aria-hidden": "true" }, " ×")] : []));
      return make("li", {}, about);
    });
    if (live && edits.length > 1) items.push(make("li", { class: "screen" }, button("Clear all", () => this.run({ edits: [] }))));
    this.list.replaceChildren(...(items.length ? [make("li", { class: "name" }, "Ablated:"), ...items] : []));
    this.list.hidden = !items.length;
  }

  drawActs() {
    const texts = [this.edit(), ...(this.query === null ? [] : [this.edit(this.query)]), ...(this.query === null || this.key === null ? [] : [this.edit(this.query, this.key)])];
    const names = ["Ablate the head", "Ablate a row: choose a query", "Cut an edge: choose a query and a key"];
    this.act.forEach((act, i) => {
      const edit = texts[i];
      const at = (table, position) => named(this.token(this.map[table], position), position, 10);
      const said = [() => `Ablate ${this.nameOf(this.site, this.head)}`, () => `Ablate row ${at("queryTokens", this.query)}`, () => `Cut edge ${at("queryTokens", this.query)} → ${at("keyTokens", this.key)}`];
      act.textContent = edit ? said[i]() : names[i];
      act.disabled = !edit;
      act.setAttribute("aria-pressed", `${Boolean(edit) && this.facts.edits.some((each) => same(each, edit))}`);
    });
  }

  // Heads.

  value(index, late = this.late) {
    const { data, shape } = this.frame.blocks.values;
    return this.facts.metrics.length ? data[(late * shape[1] + this.metric) * shape[2] + index] : NaN;
  }

  headSentence(site, head) {
    const { start, heads } = this.sites[site];
    if (head >= heads) return `Layer ${this.sites[site].layer} has ${heads} heads`;
    const about = this.facts.metrics[this.metric];
    const change = this.facts.edits.length ? `, ${exactly(this.value(start + head, 1))} after the ablations` : "";
    const gone = this.facts.edits.some((edit) => same(edit, { site, head, query: null, key: null })) ? " (ablated)" : "";
    return `${this.nameOf(site, head)}${gone}${about ? `: ${about.label.toLowerCase()} ${exactly(this.value(start + head, 0))}${change}` : ""}`;
  }

  drawHeads() {
    const { theme } = this.frame;
    const about = this.facts.metrics[this.metric];
    const all = Array.from({ length: this.frame.blocks.values.shape[2] }, (_, i) => this.value(i));
    const top = about?.unit === "mass" ? Math.min(1, ceiling(greatest(all))) : ceiling(greatest(all));
    const colour = (t) => (about?.signed ? divergingAt(2 * t - 1, theme) : colourAt(t, theme));
    const byteOf = (value) => (Number.isNaN(value) ? 0 : 1 + Math.round(254 * Math.min(1, Math.max(0, about?.signed ? 0.5 + value / top / 2 : value / top))));
    const table = [rgbOf(this.frame.colour("unseen")), ...Array.from({ length: 255 }, (_, i) => colour(i / 254))];
    let first = 0;
    this.facts.groups.forEach(({ sites }, i) => {
      const map = this.atlases[i];
      const columns = Math.max(1, ...sites.map(({ heads }) => heads));
      const cells = new Uint8Array(sites.length * columns);
      sites.forEach(({ start, heads }, row) => {
        for (let head = 0; head < heads; head++) cells[row * columns + head] = byteOf(this.value(start + head));
      });
      const here = this.site >= first && this.site < first + sites.length;
      map.chosen = here ? { row: this.site - first, column: this.head } : { row: null, column: null };
      map.setCells(cells, sites.length, columns, 1, sites.length, columns);
      map.setColours(table);
      map.draw();
      first += sites.length;
    });
    const ends = about?.signed ? [[0, -top], [0.5, 0], [1, top]] : [[0, 0], [0.5, top / 2], [1, top]];
    const ticks = ends.map(([at, value]) => [at, roughly(value)]);
    this.scale.replaceChildren(...(about ? [legend(gradient(colour), ticks, make("span", {}, `${about.label}${this.late ? ", after" : ""}`))] : []));
    this.meaning.textContent = about ? `${about.label}: ${about.meaning}.` : "No statistic was asked for.";
  }

  // The pattern.

  edgeSentence(query, key) {
    const arrow = `${named(this.token(this.map.queryTokens, query), query)} → ${named(this.token(this.map.keyTokens, key), key)}`;
    const weight = weightOf(this.held?.cells?.[query * this.map.keys + key] ?? 0);
    return [arrow, Number.isNaN(weight) ? "not visible to this query" : `weight ≈ ${roughly(weight)}`];
  }

  /** What is known without asking: cells, or why there are none; null: the kernel has to be asked. */
  known(late) {
    const { kept } = this.facts;
    const block = this.frame.blocks[`cells:${late}`];
    if (this.number === kept && block) return { cells: block.data };
    if (this.map.missing) return { said: `No pattern is known: ${this.map.missing}` };
    if (this.frame.live) return null;
    const site = this.sites.findIndex(({ start, heads }) => kept >= start && kept < start + heads);
    return { said: block ? `Kept here is the pattern of ${this.nameOf(site, kept - this.sites[site].start)}: those of other heads need a running kernel.` : "No pattern is kept here." };
  }

  async drawPattern() {
    const { late, number } = this;
    const wanted = `${number} ${late}`;
    const turn = ++this.turn;
    this.title.textContent = `${this.nameOf(this.site, this.head)}: what each query looks at${late ? ", after the ablations" : ""}`;
    if (this.held?.wanted !== wanted) {
      let found = this.known(late);
      if (!found) {
        found = await this.frame.ask({ ask: "pattern", at: number, after: late === 1 }).then(({ buffers }) => ({ cells: new Uint8Array(buffers[0].buffer, buffers[0].byteOffset, buffers[0].byteLength) }), (error) => ({ said: error.message }));
        if (turn !== this.turn) return; // something else is to be shown by now
      }
      this.held = { wanted, ...found };
    }
    const { cells, said } = this.held;
    this.missing.textContent = said ?? "";
    this.missing.hidden = !said;
    this.pattern.element.hidden = this.weights.hidden = Boolean(said);
    if (cells) this.drawCells(cells);
  }

  drawCells(cells) {
    const { queries, keys } = this.map;
    const { theme } = this.frame;
    const top = Math.min(1, ceiling(leastOf(cells.reduce((a, b) => Math.max(a, b), 0)) || 1));
    const table = Array.from({ length: 256 }, (_, byte) => (byte ? colourAt(Math.sqrt(weightOf(byte) / top), theme) : rgbOf(this.frame.colour("unseen"))));
    this.pattern.chosen = { row: this.query, column: this.key };
    this.pattern.setCells(cells, queries, keys, 1, queries, keys);
    this.pattern.setColours(table);
    this.pattern.draw();
    const ticks = [0, 0.05, 0.2, 0.5, 1].map((share) => [Math.sqrt(share), roughly(share * top)]);
    this.weights.replaceChildren(legend(gradient((t) => colourAt(t, theme)), ticks, make("span", {}, "weight, square-root scale"), make("span", { class: "swatch" }, "not visible to the query")));
  }
}
