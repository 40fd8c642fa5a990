// One explorer per capture: what is chosen, kept in the address after the # so that a link shows the same again.

class Explorer {
  constructor(element, index) {
    this.index = index;
    this.section = DATA.sections[index];
    const start = Math.max(0, this.section.sites.findIndex((site) => site.map));
    this.state = { site: start, head: 0, query: this.section.sites[start].queries - 1, metric: this.section.metrics[0]?.name, scale: "sqrt", range: "head", hide: false };
    this.heads = new HeadMaps(this);
    this.pattern = new PatternView(this);
    this.row = new RowView(this);
    const { title, numbers, missing, body } = this.pattern;
    const panel = make("section", { class: "panel pattern" }, title, numbers, this.row.strips, missing, body);
    element.append(this.heads.element, panel, this.row.element);
    element.hidden = false;
    element.nextElementSibling.remove(); // it says that scripts do not run; noscript says so only where they are off, not where they are blocked
    new ResizeObserver(() => this.resized()).observe(this.pattern.scroller);
    this.update();
  }

  get site() {
    return this.section.sites[this.state.site];
  }

  set(change) {
    Object.assign(this.state, change);
    this.state.query = Math.max(0, Math.min(this.state.query, this.site.queries - 1));
    this.update();
    history.replaceState(null, "", `#${this.address()}`);
  }

  update() {
    this.heads.update();
    this.pattern.update();
    this.row.update();
  }

  resized() {
    const { pattern } = this;
    if (pattern.map && this.width !== pattern.scroller.clientWidth) pattern.draw();
    this.width = pattern.scroller.clientWidth;
  }

  address() {
    const { state } = this;
    const words = { capture: this.index, site: this.site.name, head: state.head, query: state.query };
    if (state.metric) words.metric = state.metric;
    if (state.scale !== "sqrt") words.scale = state.scale;
    if (state.range !== "head") words.range = state.range;
    if (state.hide) words.hide = "first";
    return new URLSearchParams(words).toString();
  }

  /** Take up what an address says; what it does not say or says wrongly stays as it is. */
  restore(words) {
    const whole = (name, end) => (/^\d+$/.test(words.get(name) ?? "") && Number(words.get(name)) < end ? Number(words.get(name)) : null);
    const site = this.section.sites.findIndex((each) => each.name === words.get("site"));
    if (site >= 0) this.state.site = site;
    this.state.head = whole("head", this.site.heads) ?? Math.min(this.state.head, this.site.heads - 1);
    this.state.query = whole("query", this.site.queries) ?? Math.min(this.state.query, this.site.queries - 1);
    if (this.section.metrics.some(({ name }) => name === words.get("metric"))) this.state.metric = words.get("metric");
    if (["sqrt", "linear"].includes(words.get("scale"))) this.state.scale = words.get("scale");
    if (["head", "one"].includes(words.get("range"))) this.state.range = words.get("range");
    this.state.hide = words.get("hide") === "first";
    this.update();
  }
}

const explorers = [...document.querySelectorAll(".explorer")].map((element, index) => new Explorer(element, index));

function restore(scroll) {
  const words = new URLSearchParams(location.hash.slice(1));
  const index = Number(words.get("capture") ?? NaN);
  if (!explorers[index]) return;
  explorers[index].restore(words);
  if (scroll && index > 0) document.getElementById(`capture-${index}`).scrollIntoView();
}

restore(true);
addEventListener("hashchange", () => restore(true));
// The canvas takes its colours from the style sheet, which changes with the theme and on paper.
for (const query of ["(prefers-color-scheme: dark)", "print"]) {
  matchMedia(query).addEventListener("change", () => explorers.forEach((explorer) => explorer.update()));
}
document.documentElement.dataset.ready = "true";
