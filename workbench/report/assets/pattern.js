// The pattern of one head on a canvas: queries down, keys across, whole device pixels per cell.

class PatternView {
  constructor(explorer) {
    this.explorer = explorer;
    this.title = make("h3");
    this.numbers = make("dl", { class: "numbers" });
    this.missing = make("p", { class: "note", hidden: true });
    this.canvas = make("canvas", { tabindex: "0", role: "application", "aria-roledescription": "attention pattern" });
    this.scroller = make("div", { class: "scroller" }, this.canvas);
    this.legend = make("div", { class: "legend" });
    this.note = make("p", { class: "small precision" });
    this.live = make("p", { class: "readout", "aria-live": "polite" });
    const scales = [["sqrt", "square root"], ["linear", "linear"]];
    const ranges = [["head", "to the largest weight"], ["one", "0 to 1"]];
    this.scale = selector("Scale", scales, (scale) => explorer.set({ scale }));
    this.range = selector("Colours run", ranges, (range) => explorer.set({ range }));
    this.first = make("input", { type: "checkbox" });
    this.firstLabel = make("span");
    this.first.addEventListener("change", () => explorer.set({ hide: this.first.checked }));
    const hide = make("label", { class: "field check" }, this.first, this.firstLabel);
    this.controls = make("div", { class: "controls" }, this.scale.field, this.range.field, hide);
    this.body = make("div", {}, this.controls, this.scroller, this.live, this.legend, this.note);
    this.cursor = null;
    this.canvas.addEventListener("pointermove", (event) => this.hover(event));
    this.canvas.addEventListener("pointerleave", () => this.point(null));
    this.canvas.addEventListener("click", (event) => this.click(event));
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    this.canvas.addEventListener("blur", () => this.point(null));
  }

  update() {
    const { site, state } = this.explorer;
    this.map = patternsOf(site);
    this.cursor = null;
    this.title.replaceChildren(`L${site.layer}H${state.head}`, make("span", { class: "site" }, `${site.group} · ${site.name} · ${this.marks()}`));
    this.numbers.replaceChildren(...this.explorer.section.metrics.filter(({ name }) => site.means[name]).map((metric) => {
      const value = site.means[metric.name][state.head];
      const text = !Number.isFinite(value) ? "–" : metric.unit === "mass" ? value.toFixed(3) : `${Number(value.toPrecision(4))}`;
      return make("div", {}, make("dt", {}, metric.label), make("dd", {}, text, make("small", {}, ` ${metric.unit}`)));
    }));
    this.body.hidden = !this.map;
    this.missing.hidden = Boolean(this.map);
    this.missing.textContent = `No pattern of this site is on the page. ${site.missing ?? ""}`;
    if (!this.map) return;
    this.scale.select.value = state.scale;
    this.range.select.value = state.range;
    this.first.checked = state.hide;
    this.cells = this.map.cells(state.head);
    this.top = this.largestShown();
    this.describe();
    this.draw();
  }

  /** What the model's own weights are, and what is shown of those that are no distributions. */
  marks() {
    const { weights } = this.explorer.site;
    return weights === "normalised" ? weights : `${weights}, shown as |A| / Σ|A| per row`;
  }

  hidden(column) {
    return this.explorer.state.hide && column === this.map.first;
  }

  largestShown() {
    if (this.explorer.state.range === "one") return 1;
    let top = 0;
    this.cells.forEach((byte, at) => {
      if (byte > top && !this.hidden(at % this.map.columns)) top = byte;
    });
    return weightOf(top) || 1;
  }

  /** Place of a weight on the colour scale, 0 to 1. */
  place(weight) {
    const share = Math.min(1, weight / this.top);
    return this.explorer.state.scale === "sqrt" ? Math.sqrt(share) : share;
  }

  describe() {
    const { site, state } = this.explorer;
    const { block, error, top, first } = this.map;
    const key = first * block;
    const what = block > 1 ? `the first ${block} keys` : named(keyToken(site, key), key, 16);
    const mean = this.map.meanOnFirst(state.head);
    const holds = mean === null ? "" : `holds ${mean < 0.0005 ? "less than 0.001" : mean.toFixed(3)} of the weight on average`;
    const mass = mean === null ? "" : ` (${block > 1 ? "the first " : ""}${holds})`;
    this.firstLabel.textContent = `${state.hide ? "Hidden" : "Hide"}: ${what}${mass}`;
    const value = (at) => (state.scale === "sqrt" ? at * at : at) * this.top;
    const digits = (number) => `${Number(number.toPrecision(2))}`;
    const unseen = make("span", { class: "unseen-key" }, make("i"), "not visible to the query");
    fillLegend(this.legend, [0, 0.25, 0.5, 0.75, 1].map((at) => [at, digits(value(at))]), make("span", { class: "unit" }, `${site.weights === "normalised" ? "weight" : "|A| / Σ|A|"}${state.scale === "sqrt" ? ", square-root scale " : " "}`, unseen));
    const exact = top ? ` The ${top} largest weights of each row are exact.` : "";
    const cell = block > 1
      ? `Max-pooled to keep this file small: each cell is the largest weight in a block of ${block} × ${block} tokens`
      : "Exact cells: each is one query and one key";
    this.note.textContent = `${cell}, stored in 8 bits and off by at most ${error}.${exact}`;
    this.canvas.setAttribute("aria-label", `Attention pattern of layer ${site.layer} head ${state.head}, ${site.queries} queries by ${site.keys} keys. Arrow keys move, Enter chooses the query.`);
  }

  /** Room for the labels: what the longest takes, within limits. */
  edge(most) {
    const ink = this.canvas.getContext("2d");
    ink.font = `11px ${this.paint("mono")}`;
    const all = [false, true].flatMap((across) => {
      const n = across ? this.map.columns : this.map.rows;
      return Array.from({ length: n }, (_, i) => cut(this.label(i, across)));
    });
    const longest = all.reduce((a, b) => (b.length > a.length ? b : a), "");
    return Math.round(Math.min(most, Math.max(54, ink.measureText(longest).width + 12)));
  }

  layout() {
    const { rows, columns } = this.map;
    const dpr = window.devicePixelRatio || 1;
    const width = this.scroller.clientWidth || 600;
    const edge = this.edge(width < 520 ? 66 : 96);
    const cell = (room, n, most) => Math.max(1, Math.min(Math.round(most * dpr), Math.floor((room * dpr) / n)));
    const w = cell(width - edge - 6, columns, 26);
    const h = rows === columns ? w : cell(440, rows, 22);
    return { dpr, edge, w, h, columns, rows, width: edge * dpr + w * columns + 5 * dpr, height: edge * dpr + h * rows + 2 };
  }

  draw() {
    const style = getComputedStyle(document.documentElement);
    this.paint = (name) => style.getPropertyValue(`--${name}`).trim();
    const at = (this.at = this.layout());
    const { canvas } = this;
    canvas.width = at.width;
    canvas.height = at.height;
    canvas.style.width = `${at.width / at.dpr}px`;
    canvas.style.height = `${at.height / at.dpr}px`;
    Object.assign(canvas.dataset, { edge: at.edge, cell: at.w / at.dpr });
    this.image = this.render(at);
    this.compose();
  }

  /** The cells as an image of one pixel each. */
  render({ rows, columns }) {
    const image = new ImageData(columns, rows);
    const hex = this.paint("unseen");
    const unseen = [1, 3, 5].map((from) => parseInt(hex.slice(from, from + 2), 16));
    const colours = Array.from({ length: 256 }, (_, byte) => (byte ? colourAt(this.place(weightOf(byte))) : unseen));
    this.cells.forEach((byte, i) => {
      const colour = this.hidden(i % columns) ? unseen : colours[byte];
      image.data.set([...colour, 255], 4 * i);
    });
    const canvas = make("canvas", { width: columns, height: rows });
    canvas.getContext("2d").putImageData(image, 0, 0);
    return canvas;
  }

  compose() {
    const { edge, dpr, w, h, rows, columns } = this.at;
    const left = edge * dpr;
    const ink = this.canvas.getContext("2d");
    ink.clearRect(0, 0, this.canvas.width, this.canvas.height);
    ink.imageSmoothingEnabled = false;
    ink.drawImage(this.image, left, left, w * columns, h * rows);
    const chosen = Math.floor(this.explorer.state.query / this.map.block);
    this.labels(ink, false, chosen);
    this.labels(ink, true, -1);
    ink.lineWidth = Math.max(1, Math.round(1.5 * dpr));
    ink.strokeStyle = ink.fillStyle = this.paint("accent");
    if (h >= 6 * dpr) ink.strokeRect(left - 0.5, left + chosen * h - 0.5, w * columns + 1, h + 1);
    // A frame would cover rows this thin: a mark on either side points at the row instead.
    else for (const side of [-1, 1]) this.mark(ink, side < 0 ? left : left + w * columns, left + (chosen + 0.5) * h, side);
    if (!this.cursor) return;
    const [row, column] = this.cursor;
    ink.strokeStyle = this.paint("cursor");
    ink.strokeRect(left + column * w - 0.5, left + row * h - 0.5, w + 1, h + 1);
  }

  mark(ink, x, y, side) {
    const size = 4 * this.at.dpr;
    ink.beginPath();
    ink.moveTo(x, y);
    ink.lineTo(x + side * size, y - size);
    ink.lineTo(x + side * size, y + size);
    ink.fill();
  }

  /** Token names along one edge, as many as fit, and always the one pointed at and the one chosen. */
  labels(ink, across, chosen) {
    const { edge, dpr, w, h, rows, columns } = this.at;
    const [pitch, n] = across ? [w, columns] : [h, rows];
    const size = Math.min(12, Math.max(9.5, pitch / dpr - 1)) * dpr;
    const line = size * 1.04;
    const every = Math.max(1, Math.ceil(line / pitch - 0.12));
    const pointed = this.cursor ? this.cursor[across ? 1 : 0] : -1;
    const kept = [pointed, chosen].filter((i) => i >= 0);
    ink.save();
    ink.textBaseline = "middle";
    ink.textAlign = across ? "left" : "right";
    ink.direction = "ltr";
    for (let i = 0; i < n; i++) {
      const strong = kept.includes(i);
      const crowded = kept.some((k) => i !== k && Math.abs(i - k) * pitch < line * 0.98);
      if (!strong && (i % every || crowded)) continue;
      ink.save();
      const centre = edge * dpr + (i + 0.5) * pitch;
      const gap = (edge - 5) * dpr;
      if (across) ink.translate(centre, gap);
      else ink.translate(gap, centre);
      if (across) ink.rotate(-Math.PI / 2);
      ink.font = `${strong ? "600 " : ""}${size}px ${this.paint("mono")}`;
      ink.fillStyle = this.paint(strong ? "accent" : "ink");
      ink.fillText(this.fitted(ink, this.label(i, across), gap - 2 * dpr), 0, 0);
      ink.restore();
    }
    ink.font = `${10.5 * dpr}px ${this.paint("sans")}`;
    ink.fillStyle = this.paint("muted");
    ink.textAlign = "right";
    ink.fillText(across ? "key →" : "query ↓", (edge - 6) * dpr, (edge - (across ? 24 : 10)) * dpr);
    ink.restore();
  }

  fitted(ink, text, room) {
    let longest = 24;
    let shown = cut(text, longest);
    while (longest > 3 && ink.measureText(shown).width > room) shown = cut(text, --longest);
    return shown;
  }

  label(i, across) {
    const { site, state } = this.explorer;
    const { block } = this.map;
    const at = !across && i === Math.floor(state.query / block) ? state.query : i * block;
    return (across ? keyToken(site, at) : queryToken(site, at)) ?? `${at}`;
  }

  cellAt(event) {
    const box = this.canvas.getBoundingClientRect();
    const { edge, dpr, w, h, rows, columns } = this.at;
    const column = Math.floor(((event.clientX - box.left - edge) * dpr) / w);
    const row = Math.floor(((event.clientY - box.top - edge) * dpr) / h);
    return { row, column, inside: row >= 0 && row < rows && column >= 0 && column < columns };
  }

  hover(event) {
    const { row, column, inside } = this.cellAt(event);
    this.point(inside ? [row, column] : null);
    if (inside) tooltip.show(event.clientX, event.clientY, this.sentence(row, column));
  }

  click(event) {
    const { row } = this.cellAt(event);
    if (row >= 0 && row < this.at.rows) this.choose(row);
  }

  choose(row) {
    this.explorer.set({ query: Math.min(row * this.map.block, this.explorer.site.queries - 1) });
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const start = this.cursor ?? [Math.floor(this.explorer.state.query / this.map.block), this.map.first];
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      this.choose(start[0]);
      this.point(start);
      return;
    }
    if (event.key === "Escape") this.point(null);
    const to = moved(event.key, ...start, this.at.rows, this.at.columns);
    if (!to) return;
    event.preventDefault();
    this.point(to);
  }

  point(cursor) {
    if (`${cursor}` === `${this.cursor}`) return;
    this.cursor = cursor;
    if (!cursor) tooltip.hide();
    this.live.textContent = cursor ? this.sentence(...cursor).join("  ") : "";
    requestAnimationFrame(() => this.map && this.compose());
  }

  /** Query → key, and the weight: exact when it is among the kept ones, else as precise as the bytes are. */
  sentence(row, column) {
    const { site, state } = this.explorer;
    const { block } = this.map;
    const span = (token, at, end) => (block > 1 ? `${at}–${Math.min(at + block, end) - 1}` : named(token, at));
    const [query, key] = [row * block, column * block];
    const arrow = `${span(queryToken(site, query), query, site.queries)} → ${span(keyToken(site, key), key, site.keys)}`;
    const weight = weightOf(this.cells[row * this.map.columns + column]);
    const known = block === 1 && this.map.largest(state.head, query).find((each) => each.key === key);
    if (weight === null) return [arrow, "not visible to this query"];
    if (known) return [arrow, `weight ${exactly(known.weight)}`];
    return [arrow, `${block > 1 ? "largest weight in the block" : "weight"} ${roughly(weight)}`];
  }
}
