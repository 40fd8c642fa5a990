// One query: the tokens shaded by its weights, and its largest weights as exact numbers.

const LONGEST_STRIP = 4000;

class RowView {
  constructor(explorer) {
    this.explorer = explorer;
    this.queries = make("div", { class: "strip", role: "listbox", "aria-label": "Tokens: choose the query" });
    this.keys = make("div", { class: "strip", role: "group", "aria-label": "Keys, shaded by weight" });
    this.keysTitle = make("p", { class: "small" }, "Keys, shaded by this query’s weights");
    this.about = make("p", { class: "small" });
    this.number = make("input", { type: "number", min: "0", step: "1" });
    this.number.addEventListener("change", () => {
      const { site } = explorer;
      explorer.set({ query: Math.min(site.queries - 1, Math.max(0, Math.round(Number(this.number.value) || 0))) });
    });
    const field = make("label", { class: "field" }, make("span", {}, "Query"), this.number);
    this.strips = make("div", { class: "strips" }, make("div", { class: "controls" }, field, this.about), this.queries, this.keysTitle, this.keys);
    this.title = make("h3");
    this.table = make("table", { class: "top" });
    this.rest = make("p", { class: "small" });
    this.element = make("section", { class: "panel row" }, this.title, this.table, this.rest);
    this.queries.addEventListener("click", (event) => this.choose(event.target.closest("[data-at]")));
    this.queries.addEventListener("keydown", (event) => this.key(event));
    for (const strip of [this.queries, this.keys]) {
      strip.addEventListener("pointermove", (event) => this.hover(event));
      strip.addEventListener("pointerleave", () => tooltip.hide());
    }
  }

  choose(token) {
    if (token) this.explorer.set({ query: Number(token.dataset.at) });
  }

  key(event) {
    const { site, state } = this.explorer;
    const steps = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1, Home: -Infinity, End: Infinity };
    if (!(event.key in steps) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    const query = Math.min(site.queries - 1, Math.max(0, state.query + steps[event.key]));
    this.explorer.set({ query });
    this.queries.querySelector('[tabindex="0"]')?.focus();
  }

  hover(event) {
    const token = event.target.closest("[data-at]");
    if (token) tooltip.show(event.clientX, event.clientY, [token.getAttribute("aria-label")]);
    else tooltip.hide();
  }

  /** Fill the strips anew when the site has other tokens than the one before. */
  build() {
    const { site } = this.explorer;
    const made = `${site.queryTokens} ${site.keyTokens} ${site.queries} ${site.keys}`;
    if (made === this.made) return;
    this.made = made;
    const fill = (strip, n, token, role) => {
      const shown = n <= LONGEST_STRIP ? n : 0;
      strip.hidden = !shown;
      strip.replaceChildren(...Array.from({ length: shown }, (_, at) => {
        const attributes = role ? { role, "data-at": `${at}`, tabindex: "-1" } : { role: "img", "data-at": `${at}` };
        return make("span", attributes, make("bdi", {}, cut(token(site, at) ?? `${at}`)));
      }));
    };
    fill(this.queries, site.queries, queryToken, "option");
    const same = sameTokens(site);
    this.keysTitle.hidden = same;
    if (same) this.keys.hidden = true;
    else fill(this.keys, site.keys, keyToken, null);
    this.number.max = `${site.queries - 1}`;
  }

  update() {
    const { site, state } = this.explorer;
    const map = patternsOf(site);
    this.element.hidden = this.strips.hidden = !map;
    if (!map) return;
    this.build();
    this.number.value = `${state.query}`;
    this.about.replaceChildren(make("b", {}, named(queryToken(site, state.query), state.query)), map.block > 1 ? " and its block: tokens are shaded by the largest weight in theirs" : " shades the tokens by the weights it gives");
    const exact = new Map(map.largest(state.head, state.query).map(({ key, weight }) => [key, weight]));
    this.shade(map, exact);
    this.list(map, exact);
    this.reveal(this.queries, this.queries.children[state.query]);
    if (!sameTokens(site)) this.reveal(this.keys, this.keys.children[exact.keys().next().value]);
  }

  /** Scroll the strip, not the page, to a token outside its view. */
  reveal(strip, token) {
    if (!token) return;
    const at = token.offsetTop - strip.offsetTop;
    const outside = at < strip.scrollTop || at + token.offsetHeight > strip.scrollTop + strip.clientHeight;
    if (outside) strip.scrollTop = at - strip.clientHeight / 2;
  }

  shade(map, exact) {
    const { site, state, pattern } = this.explorer;
    const same = sameTokens(site);
    if (!same) for (const span of this.queries.children) this.mark(span, `query ${named(queryToken(site, span.dataset.at), span.dataset.at)}`);
    for (const span of (same ? this.queries : this.keys).children) {
      const key = Number(span.dataset.at);
      const rough = map.weight(state.head, state.query, key);
      const weight = exact.get(key) ?? rough;
      const hidden = pattern.hidden(Math.floor(key / map.block));
      span.style.setProperty("--w", weight === null || hidden ? 0 : pattern.place(weight).toFixed(3));
      span.classList.toggle("unseen", weight === null);
      span.classList.toggle("put-away", hidden);
      const about = map.block > 1 ? "in a block with largest weight" : "weight";
      const said = weight === null ? "not visible" : exact.has(key) ? `weight ${exactly(weight)}` : `${about} ${roughly(weight)}`;
      this.mark(span, `${named(keyToken(site, key), key)}: ${said}`);
    }
  }

  mark(span, label) {
    span.setAttribute("aria-label", label);
    if (span.getAttribute("role") !== "option") return;
    const chosen = Number(span.dataset.at) === this.explorer.state.query;
    span.setAttribute("aria-selected", `${chosen}`);
    span.setAttribute("tabindex", chosen ? "0" : "-1");
  }

  list(map, exact) {
    const { site, state, pattern } = this.explorer;
    this.title.textContent = `Query ${named(queryToken(site, state.query), state.query, 24)}`;
    const rows = [...exact].map(([key, weight]) => {
      const bar = make("i");
      bar.style.width = `${(100 * weight).toFixed(2)}%`;
      const token = make("bdi", {}, cut(keyToken(site, key) ?? "–"));
      const row = make("tr", {}, make("td", { class: "n" }, `${key}`), make("td", { class: "token" }, token), make("td", { class: "n" }, exactly(weight)), make("td", { class: "length" }, bar));
      row.classList.toggle("put-away", pattern.hidden(Math.floor(key / map.block)));
      return row;
    });
    const titles = [["n", "Position"], ["", "Key"], ["n", "Weight"], ["", ""]];
    const head = make("tr", {}, ...titles.map(([kind, text]) => (text ? make("th", { scope: "col", class: kind }, text) : make("td"))));
    this.table.replaceChildren(make("caption", {}, "Largest weights of this row, exact"), make("thead", {}, head), make("tbody", {}, ...rows));
    const sum = [...exact.values()].reduce((a, b) => a + b, 0);
    const rest = Math.max(0, 1 - sum);
    const lines = [exact.size ? `Together ${sum.toFixed(4)}; all other keys ${rest < 5e-5 ? "less than 0.0001" : rest.toFixed(4)}.` : "The page keeps no exact weights for a capture of this size."];
    const onFirst = map.onFirst(state.head, state.query);
    if (state.hide && onFirst !== null) lines.push(` The hidden first key holds ${exactly(onFirst)} of this row.`);
    this.rest.textContent = lines.join("");
  }
}
