// The chosen query of an attention pattern: lines to the keys that it looks at, and its largest weights as numbers.

import { prepare } from "workbench/shared/canvas.js";
import { colourAt, css } from "workbench/shared/colour.js";
import { cut, exactly, make, named, roughly } from "workbench/shared/dom.js";

const EDGES = 10;

export class QueryRow {
  constructor(view) {
    this.view = view;
    this.element = make("div", { class: "row" });
    this.canvas = make("canvas", { class: "edges", role: "img" }); // one for all queries, which a figure records
    this.drawEdges = () => {};
  }

  /** Show a query; one of its keys may be chosen. */
  show(query, key) {
    const { view } = this;
    const top = view.topOf(view.head, query);
    const title = make("h3", {}, `Query ${named(view.queryToken(query), query, 20)}`);
    const shown = top.filter((each) => !(view.hide && each.key === view.site.firstKey)).slice(0, EDGES);
    const rows = shown.map((each) => {
      const bar = make("i");
      bar.style.width = `${(100 * each.weight).toFixed(2)}%`;
      bar.style.backgroundColor = css(colourAt(view.place(each.weight, view.top), view.frame.theme));
      const name = make("bdi", {}, cut(view.keyToken(each.key) ?? "–", 16));
      const line = make("tr", { class: each.key === key ? "chosen" : null }, make("td", { class: "n" }, `${each.key}`), make("td", {}, name), make("td", { class: "n" }, exactly(each.weight)), make("td", { class: "length" }, bar));
      return line;
    });
    const head = make("tr", {}, make("th", { scope: "col", class: "n" }, "Key"), make("th", { scope: "col" }, "Token"), make("th", { scope: "col", class: "n" }, "Weight"), make("td"));
    const sum = top.reduce((a, { weight }) => a + weight, 0);
    const onFirst = view.block("first").data[view.site.heads.indexOf(view.head) * view.site.queries + query];
    const rest = top.length ? `Together ${roughly(sum)}; all other keys ${roughly(Math.max(0, 1 - sum))}.` : "No exact weights are kept for so many rows.";
    const hidden = view.hide && !Number.isNaN(onFirst) ? ` The hidden first key holds ${exactly(onFirst)} of this row.` : "";
    this.element.replaceChildren(title, this.edges(query, shown), make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)), make("p", { class: "caption" }, rest + hidden));
    this.drawEdges();
  }

  /** Lines from the query to the keys it looks at, thicker with weight; only of this query. */
  edges(query, shown) {
    const { view, canvas } = this;
    canvas.setAttribute("aria-label", `Lines from query ${query} to ${shown.length} keys; the table below has the numbers`);
    const keys = [...shown].sort((a, b) => a.key - b.key);
    this.drawEdges = () => {
      const [width, height] = [Math.max(180, this.element.clientWidth - 4), 18 * Math.max(keys.length, 1) + 10];
      const ink = prepare(canvas, width, height);
      ink.font = `12px ${view.frame.colour("mono")}`;
      ink.textBaseline = "middle";
      ink.direction = "ltr";
      const name = (token, at) => cut(token ?? `${at}`, 12);
      const [from, to] = [100, width - 100];
      keys.forEach(({ key, weight }, i) => {
        const y = 14 + 18 * i;
        ink.lineWidth = 0.5 + 8 * weight;
        ink.strokeStyle = css(colourAt(view.place(weight, view.top), view.frame.theme));
        ink.beginPath();
        ink.moveTo(from, y);
        ink.bezierCurveTo((from + to) / 2, y, (from + to) / 2, height / 2, to, height / 2);
        ink.stroke();
        ink.fillStyle = view.frame.colour(key === view.key ? "accent" : "ink");
        ink.textAlign = "right";
        ink.fillText(name(view.keyToken(key), key), from - 5, y);
      });
      ink.fillStyle = view.frame.colour("accent");
      ink.textAlign = "left";
      ink.fillText(name(view.queryToken(query), query), to + 5, height / 2);
    };
    return canvas;
  }
}
