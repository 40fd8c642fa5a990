// The texts of an attention pattern as strips: queries and keys, or both in one, shaded by what the chosen query looks at.

import { colourAt, css, inkOn } from "workbench/shared/colour.js";
import { cut, make } from "workbench/shared/dom.js";

const STRIP = 1200; // tokens in a strip

export class Strips {
  constructor(view) {
    this.view = view;
    this.element = make("div", { class: "strips" });
    this.made = null;
    this.queryStrip = [];
    this.keyStrip = [];
  }

  /** Make the strips of a site, unless they are there. */
  build() {
    const { view } = this;
    const { site } = view;
    const made = `${site.queryTokens} ${site.keyTokens} ${site.keys} ${site.queries}`;
    if (this.made === made) return;
    this.made = made;
    const fill = (n, token, label, choose) => {
      if (n > STRIP) return [];
      const box = make("div", { class: "strip", role: "listbox", "aria-label": label });
      box.append(...Array.from({ length: n }, (_, i) => make("span", { class: "token", role: "option", "data-at": i, tabindex: -1 }, cut(token(i) ?? `${i}`, 18))));
      box.addEventListener("click", (event) => event.target.dataset.at && choose(Number(event.target.dataset.at)));
      box.addEventListener("keydown", (event) => this.press(event, box, n, choose));
      box.addEventListener("pointermove", (event) => (event.target.dataset.at ? view.frame.showTip(event, view.sentence(view.head, view.query ?? site.queries - 1, Number(event.target.dataset.at))) : view.frame.hideTip()));
      box.addEventListener("pointerleave", () => view.frame.hideTip());
      return [box];
    };
    const query = (at) => view.frame.select(view.same ? { query: at, token: at } : { query: at });
    this.queryStrip = view.same ? [] : fill(site.queries, (i) => view.queryToken(i), "Queries: choose one", query);
    this.keyStrip = fill(site.keys, (i) => view.keyToken(i), view.same ? "Tokens: choose the query" : "Keys", view.same ? query : (at) => view.frame.select({ key: at }));
    this.element.replaceChildren(...this.queryStrip, ...this.keyStrip);
  }

  press(event, box, n, choose) {
    const steps = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1, Home: -Infinity, End: Infinity };
    if (event.key === "Escape") return this.view.frame.select({ query: null, key: null });
    const from = Number(event.target.dataset.at ?? 0);
    if (event.key === "Enter" || event.key === " ") choose(from);
    else if (event.key in steps) {
      const at = Math.max(0, Math.min(n - 1, from + steps[event.key]));
      choose(at);
      box.children[at].focus();
    } else return;
    event.preventDefault();
  }

  /** Shade the keys by what a query looks at. */
  shade(query) {
    const { view } = this;
    const [box] = this.keyStrip ?? [];
    const chosen = view.same ? query : view.key;
    if (box) {
      const exact = new Map(view.topOf(view.head, query).map(({ key, weight }) => [key, weight]));
      for (const span of box.children) {
        const key = Number(span.dataset.at);
        const weight = exact.get(key) ?? (view.site.block > 1 ? 0 : view.cell(view.head, query, key).weight);
        const put = view.hide && key === view.site.firstKey;
        const rgb = Number.isNaN(weight) || put ? null : colourAt(view.place(weight, view.top), view.frame.theme);
        span.style.backgroundColor = rgb ? css(rgb) : view.frame.colour("unseen");
        span.style.color = rgb ? inkOn(rgb) : view.frame.colour("ink");
        span.setAttribute("aria-selected", `${key === chosen}`);
        span.tabIndex = key === (chosen ?? 0) ? 0 : -1;
      }
      this.reveal(box, box.children[chosen ?? 0]);
    }
    for (const span of this.queryStrip?.[0]?.children ?? []) {
      const at = Number(span.dataset.at);
      span.setAttribute("aria-selected", `${at === query}`);
      span.tabIndex = at === query ? 0 : -1;
    }
    this.reveal(this.queryStrip?.[0], this.queryStrip?.[0]?.children[query]);
  }

  /** Scroll the strip, not the page. */
  reveal(box, span) {
    if (!box || !span) return;
    const at = span.offsetTop - box.offsetTop;
    if (at < box.scrollTop || at + span.offsetHeight > box.scrollTop + box.clientHeight) box.scrollTop = at - box.clientHeight / 2;
  }
}
