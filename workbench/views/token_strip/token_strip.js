// Token strip: a text whose tokens are coloured by a value each. Click or Enter chooses a token for all views.

import { colourAt, css, divergingAt, gradient, inkOn } from "workbench/shared/colour.js";
import { button, cut, exactly, legend, make, named, roughly } from "workbench/shared/dom.js";
import { open } from "workbench/shared/frame.js";
import { ceiling, greatest } from "workbench/shared/scales.js";

const WINDOW = 1500; // tokens that are on the page at once

export async function render({ model, el }) {
  const frame = await open({ model, el });
  const strip = new Strip(frame);
  return () => strip.frame.close();
}

class Strip {
  constructor(frame) {
    this.frame = frame;
    this.tokens = frame.facts.tokens;
    this.start = 0;
    this.at = 0;
    this.box = make("div", { class: "strip", role: "listbox", "aria-label": `${frame.spec.title}: tokens` });
    this.scale = make("div");
    this.pager = make("div", { class: "tools" });
    frame.body.append(this.box, this.pager, this.scale);
    this.buildControls();
    this.box.addEventListener("pointermove", (event) => this.hover(event));
    this.box.addEventListener("pointerleave", () => frame.hideTip());
    this.box.addEventListener("click", (event) => this.choose(event.target.closest("[data-at]")));
    this.box.addEventListener("keydown", (event) => this.key(event));
    frame.offerKeys([["← →, Home, End", "move over the tokens"], ["Enter", "choose the token in every view"], ["Esc", "choose none"]]);
    frame.onSelect(({ token }) => this.follow(token));
    frame.onRedraw(() => this.draw());
  }

  buildControls() {
    const { controls, facts, settings } = this.frame;
    const at = (name) => facts.channels.findIndex(({ label }) => label === name);
    const choices = facts.channels.map(({ label, unit }) => [label, unit ? `${label} (${unit})` : label]);
    const channel = settings.pick("channel", "Show", choices, choices[0][0], (name) => this.setChannel(at(name)));
    this.channel = at(channel.value);
    if (choices.length > 1) controls.append(channel.field);
    const search = make("input", { type: "search", size: 14, autocomplete: "off" });
    search.addEventListener("keydown", (event) => event.key === "Enter" && this.find(search.value));
    controls.append(make("label", { class: "field" }, make("span", {}, "Find"), search));
    controls.append(button("Go to the largest", () => this.goTo(this.largest())));
  }

  value(at) {
    return this.frame.blocks.values.data[this.channel * this.tokens.length + at];
  }

  get about() {
    return this.frame.facts.channels[this.channel];
  }

  setChannel(channel) {
    this.channel = channel;
    this.draw();
  }

  largest() {
    let best = 0;
    const size = (at) => (Number.isNaN(this.value(at)) ? -1 : Math.abs(this.value(at)));
    for (let at = 1; at < this.tokens.length; at++) if (size(at) > size(best)) best = at;
    return best;
  }

  find(text) {
    if (!text) return;
    const n = this.tokens.length;
    for (let step = 1; step <= n; step++) {
      const at = (this.at + step) % n;
      if (this.tokens[at].includes(text)) return this.goTo(at);
    }
    this.frame.say(`No token contains “${cut(text)}”.`);
  }

  goTo(at) {
    this.at = at;
    if (at < this.start || at >= this.start + WINDOW) this.start = Math.max(0, at - WINDOW / 2);
    this.draw();
    this.span(at)?.focus();
    this.frame.say(this.sentence(at));
  }

  span(at) {
    return this.box.children[at - this.start];
  }

  colour(value) {
    if (this.about.signed) return divergingAt(value / this.top, this.frame.theme);
    return colourAt(value / this.top, this.frame.theme);
  }

  draw() {
    const n = Math.min(WINDOW, this.tokens.length - this.start);
    this.top = ceiling(greatest(this.tokens.map((_, at) => this.value(at))));
    if (this.box.children.length !== n || this.drawn !== this.start) {
      this.box.replaceChildren(...Array.from({ length: n }, () => make("span", { role: "option", class: "token" })));
      this.drawn = this.start;
    }
    for (let i = 0; i < n; i++) this.paint(this.box.children[i], this.start + i);
    this.drawPager(n);
    this.drawLegend();
  }

  paint(span, at) {
    const value = this.value(at);
    const chosen = this.frame.selection.token === at;
    const known = !Number.isNaN(value);
    const rgb = known ? this.colour(value) : null;
    span.textContent = cut(this.tokens[at]);
    span.dataset.at = at;
    span.style.backgroundColor = known ? css(rgb) : this.frame.colour("unseen");
    span.style.color = known ? inkOn(rgb) : this.frame.colour("ink");
    span.setAttribute("aria-label", this.sentence(at));
    span.setAttribute("aria-selected", `${chosen}`);
    span.tabIndex = at === this.at ? 0 : -1;
  }

  drawPager(n) {
    const { length } = this.tokens;
    this.pager.hidden = length <= WINDOW;
    if (this.pager.hidden) return;
    const go = (start) => () => this.goTo(Math.max(0, Math.min(length - 1, start)));
    const said = `Tokens ${this.start.toLocaleString("en")} to ${(this.start + n - 1).toLocaleString("en")} of ${length.toLocaleString("en")}`;
    this.pager.replaceChildren(button("Earlier", go(this.start - WINDOW / 2)), make("span", {}, said), button("Later", go(this.start + n + WINDOW / 2)));
  }

  drawLegend() {
    const { label, unit, signed } = this.about;
    const ticks = signed ? [[0, -this.top], [0.5, 0], [1, this.top]] : [[0, 0], [0.5, this.top / 2], [1, this.top]];
    const at = signed ? (t) => divergingAt(2 * t - 1, this.frame.theme) : (t) => colourAt(t, this.frame.theme);
    this.scale.replaceChildren(legend(gradient(at), ticks.map(([place, value]) => [place, roughly(value)]), make("span", {}, unit ? `${label}, ${unit}` : label)));
  }

  sentence(at) {
    const { label, unit } = this.about;
    return `${named(this.tokens[at], at)}: ${label} ${exactly(this.value(at))}${unit ? ` ${unit}` : ""}`;
  }

  hover(event) {
    const span = event.target.closest("[data-at]");
    if (!span) return this.frame.hideTip();
    this.frame.showTip(event, [this.sentence(Number(span.dataset.at))]);
  }

  choose(span) {
    if (!span) return;
    this.at = Number(span.dataset.at);
    this.frame.select({ token: this.at, query: this.at });
  }

  follow(token) {
    if (token !== null && token < this.tokens.length && token !== this.at) this.at = token;
    if (this.at < this.start || this.at >= this.start + WINDOW) this.start = Math.max(0, this.at - WINDOW / 2);
    if (this.top === undefined) return;
    this.draw();
    if (token !== null && token < this.tokens.length) this.frame.say(this.sentence(token));
  }

  key(event) {
    const steps = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1, Home: -Infinity, End: Infinity };
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Enter" || event.key === " ") this.frame.select({ token: this.at, query: this.at });
    else if (event.key === "Escape") this.frame.select({ token: null });
    else if (event.key in steps) this.goTo(Math.max(0, Math.min(this.tokens.length - 1, this.at + steps[event.key])));
    else return;
    event.preventDefault();
  }
}
