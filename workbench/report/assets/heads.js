// The head maps: one cell per layer and head, coloured by a metric; one map per kind of attention.

class HeadMaps {
  constructor(explorer) {
    this.explorer = explorer;
    const { section } = explorer;
    this.element = make("section", { class: "panel heads" }, make("h3", {}, "Heads"));
    this.meaning = make("p", { class: "small" });
    this.legend = make("div", { class: "legend" });
    this.maps = make("div", { class: "maps" });
    this.ranking = make("div", { class: "ranking small" });
    if (section.metrics.length) {
      const choices = section.metrics.map((metric) => [metric.name, `${metric.label} (${metric.unit})`]);
      this.metric = selector("Metric", choices, (metric) => explorer.set({ metric }));
      this.element.append(this.metric.field, this.meaning);
    }
    this.element.append(this.maps, this.legend, this.ranking);
    this.cells = new Map();
    section.groups.forEach((group) => this.maps.append(this.table(group)));
  }

  table(group) {
    const { section } = this.explorer;
    const columns = Math.max(...group.sites.map((site) => section.sites[site].heads));
    const layers = group.sites.map((site) => section.sites[site].layer);
    const unique = new Set(layers).size === layers.length;
    const head = make("tr", {}, make("td"), ...Array.from({ length: columns }, (_, h) => make("th", { scope: "col" }, `${h}`)));
    const body = make("tbody");
    group.sites.forEach((index, row) => {
      const site = section.sites[index];
      const cells = Array.from({ length: columns }, (_, h) => this.cell(index, h, row, site));
      const name = unique ? `L${site.layer}` : `${row}`;
      body.append(make("tr", {}, make("th", { scope: "row", title: site.name }, name), ...cells));
    });
    const table = make("table", { role: "grid", class: "map", "aria-label": `${group.label}: layers down, heads across` });
    table.style.setProperty("--columns", columns);
    table.classList.toggle("dense", columns > 12);
    table.append(make("caption", {}, group.label), make("thead", {}, head), body);
    const rows = [...body.rows].map((row) => [...row.cells].slice(1).filter((cell) => cell.dataset.site));
    table.addEventListener("keydown", (event) => this.key(event, rows));
    table.addEventListener("click", (event) => this.choose(event.target.closest("[data-site]")));
    table.addEventListener("pointermove", (event) => this.hover(event));
    table.addEventListener("pointerleave", () => tooltip.hide());
    table.addEventListener("focusin", (event) => this.stop(table, event.target));
    this.stop(table, rows[0][0]);
    return table;
  }

  cell(index, head, row, site) {
    if (head >= site.heads) return make("td");
    const cell = make("td", { role: "gridcell", tabindex: "-1", "data-site": `${index}`, "data-head": `${head}` });
    this.cells.set(`${index}/${head}`, cell);
    return cell;
  }

  /** One tab stop per map: the cell that had the focus last. */
  stop(table, cell) {
    if (!cell?.dataset.site) return;
    table.querySelector('[tabindex="0"]')?.setAttribute("tabindex", "-1");
    cell.setAttribute("tabindex", "0");
  }

  key(event, rows) {
    const cell = event.target.closest("[data-site]");
    if (!cell || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      this.choose(cell);
      return;
    }
    const row = rows.findIndex((each) => each.includes(cell));
    const to = moved(event.key, row, rows[row].indexOf(cell), rows.length, rows[row].length);
    if (!to) return;
    event.preventDefault();
    const line = rows[to[0]];
    line[Math.min(to[1], line.length - 1)].focus();
  }

  choose(cell) {
    if (cell) this.explorer.set({ site: Number(cell.dataset.site), head: Number(cell.dataset.head) });
  }

  hover(event) {
    const cell = event.target.closest("[data-site]");
    if (cell) tooltip.show(event.clientX, event.clientY, [cell.getAttribute("aria-label"), this.nameOf(cell)]);
    else tooltip.hide();
  }

  nameOf(cell) {
    return this.explorer.section.sites[cell.dataset.site].name;
  }

  update() {
    const { section, state } = this.explorer;
    const metric = section.metrics.find((each) => each.name === state.metric);
    const values = section.sites.map((site) => (metric && site.means[metric.name]) || []);
    const known = values.flat().filter(Number.isFinite);
    const largest = known.length ? Math.max(...known) : 0;
    const top = metric?.unit === "mass" ? Math.min(1, ceiling(largest)) : ceiling(largest);
    for (const [key, cell] of this.cells) {
      const [index, head] = key.split("/").map(Number);
      this.paint(cell, index, head, metric, values[index][head], top);
    }
    if (!metric) return;
    this.metric.select.value = metric.name;
    this.meaning.textContent = `${metric.label}: ${metric.meaning}; mean over the queries.`;
    const digits = (value) => `${Number(value.toPrecision(3))}`;
    const unit = metric.unit === "mass" ? "mass, out of 1" : metric.unit;
    fillLegend(this.legend, [0, 0.5, 1].map((at) => [at, digits(at * top)]), make("span", { class: "unit" }, unit));
    this.rank(metric, values);
  }

  paint(cell, index, head, metric, value, top) {
    const { state } = this.explorer;
    const site = this.explorer.section.sites[index];
    const finite = Number.isFinite(value);
    const chosen = index === state.site && head === state.head;
    cell.style.backgroundColor = finite ? css(value / top) : "";
    cell.style.color = finite ? inkOn(value / top) : "";
    const short = metric?.unit === "mass" ? value?.toFixed(2).replace(/^0/, "") : value?.toFixed(value < 10 ? 1 : 0);
    cell.replaceChildren(make("span", {}, finite ? short : ""));
    cell.classList.toggle("chosen", chosen);
    cell.setAttribute("aria-selected", `${chosen}`);
    const said = !metric ? "" : finite ? `, ${metric.label.toLowerCase()} ${Number(value.toPrecision(6))} ${metric.unit}` : `, ${metric.label.toLowerCase()} not captured`;
    cell.setAttribute("aria-label", `${site.group}, layer ${site.layer} head ${head}${said}`);
    if (chosen) this.stop(cell.closest("table"), cell);
  }

  rank(metric, values) {
    const { section } = this.explorer;
    const all = values.flatMap((row, site) => row.map((value, head) => ({ site, head, value })));
    const best = all.filter(({ value }) => Number.isFinite(value)).sort((a, b) => b.value - a.value).slice(0, 5);
    const buttons = best.map(({ site, head, value }) => {
      const { layer, group } = section.sites[site];
      const where = section.groups.length > 1 ? `${group.split(/[\s-]/)[0].toLowerCase()} ` : "";
      const button = make("button", { type: "button" }, make("b", {}, `${where}L${layer}H${head}`), ` ${Number(value.toPrecision(3))}`);
      button.addEventListener("click", () => this.explorer.set({ site, head }));
      return button;
    });
    this.ranking.replaceChildren(make("span", {}, "Highest "), ...buttons);
  }
}
