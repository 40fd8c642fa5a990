// A page: every view is drawn from its data block, those that one sees first; the selection stands in the address, the
// theme can be chosen.

import { sharedSelection } from "./selection.js";

// From here on scripts do run here: nothing says otherwise while views are still being drawn.
document.documentElement.dataset.scripts = "run";

/** What a view's module sees in place of a widget's model. */
class Still {
  constructor(spec, name) {
    this.values = { spec, selection: {}, live: false, still: [] };
    this.name = name;
    this.followers = new Set();
    this.read();
  }

  get(name) {
    return this.values[name];
  }

  set(name, value) {
    this.values[name] = value;
    if (name === "state") for (const told of [...this.followers]) told();
  }

  on(event, told) {
    if (event === "change:state") this.followers.add(told);
  }

  off(_event, told) {
    this.followers.delete(told);
  }

  save_changes() {
    write();
  }

  send() {}

  /** Take the state that the address gives this view. */
  read(address = location.hash) {
    const state = { ...this.values.spec.state, ...stateIn(address, this.name) };
    if (JSON.stringify(state) !== JSON.stringify(this.values.state)) this.set("state", state);
  }

  /** What was set as a part of an address; "" while nothing was. */
  address() {
    const first = this.values.spec.state;
    const same = (a, b) => JSON.stringify(a ?? null) === JSON.stringify(b ?? null);
    const set = Object.entries(this.values.state).filter(([key, value]) => !same(value, first[key]));
    return set.length ? `${this.name}=${encodeURIComponent(JSON.stringify(Object.fromEntries(set)))}` : "";
  }
}

function stateIn(address, name) {
  const part = address.replace(/^#/, "").split(",").find((each) => each.startsWith(`${name}=`));
  try {
    const found = part ? JSON.parse(decodeURIComponent(part.slice(name.length + 1))) : {};
    return found && typeof found === "object" && !Array.isArray(found) ? found : {};
  } catch {
    return {}; // not an address that we wrote
  }
}

// An address is a place on the page, a selection, what was set in single views, or several of these:
// #fig-2-head-atlas,L5H1,q=12,view-0=%7B%7D.
const selected = sharedSelection();
const stills = [];
let place = null;
let reading = false; // views that follow what they read would write an address before the others have read it
let opening = true; // so would views that are drawn, until someone chooses

function write() {
  if (reading || opening) return;
  const parts = [place, selected.address(), ...stills.map((each) => each.address())];
  history.replaceState(null, "", `#${parts.filter(Boolean).join(",")}`);
}

function go(address = location.hash) {
  const [name] = address.slice(1).split(",");
  const found = /^[a-z][a-z0-9-]*$/.test(name) ? document.getElementById(name) : null;
  if (found) place = name;
  found?.scrollIntoView();
}

addEventListener("hashchange", () => {
  const address = location.hash;
  reading = true;
  selected.read(address);
  for (const each of stills) each.read(address);
  reading = false;
  go(address);
  write();
});

// The figure that someone works with is the place that the address names.
for (const event of ["pointerdown", "focusin"]) {
  addEventListener(event, ({ target }) => {
    opening = false;
    if (target instanceof Element) place = target.closest("figure[id]")?.id ?? place;
  });
}

/** @type {HTMLSelectElement | null} */
const themes = document.querySelector("#theme");
themes?.addEventListener("change", () => {
  if (themes.value === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = themes.value;
});

/** Whether a place is in the window, or not much farther than one window from it. On paper all are. */
function isNear(el) {
  const { top, bottom } = el.getBoundingClientRect();
  return (bottom > -innerHeight && top < 2 * innerHeight) || matchMedia("print").matches;
}

/** Return when the browser has done what it had to: painted what is new, heard who scrolls or presses. */
function pause(near) {
  if (document.hidden) return Promise.resolve(); // nobody is kept waiting, and browsers would make us wait long
  if (near || !("requestIdleCallback" in window)) return new Promise((done) => setTimeout(done));
  return new Promise((done) => requestIdleCallback(done, { timeout: 100 }));
}

async function drawOne(el, model, render) {
  const above = el.getBoundingClientRect().bottom <= 0;
  const height = el.offsetHeight;
  try {
    await render({ model, el });
  } catch (error) {
    el.textContent = `This view could not be drawn: ${error.message}`;
    console.error(error);
  }
  // What one reads stays where it is while views above it get their height: not every browser sees to that.
  if (above && !CSS.supports("overflow-anchor", "auto")) scrollBy(0, el.offsetHeight - height);
}

/**
 * Draw all views of the page: those near what one sees first, wherever one has scrolled to, the others while the browser
 * has nothing else to do. Until then a view's words and first numbers stand in its place.
 * @param views for each kind its `render`
 */
export async function draw(views) {
  /** @type {HTMLElement[]} */
  const places = Array.from(document.querySelectorAll(".workbench-view"));
  stills.push(...places.map((el) => new Still(JSON.parse(document.getElementById(el.dataset.view).textContent), el.dataset.view)));
  // Whose heads and positions an address names, and what views begin with, depends on all views of the page.
  for (const model of stills) selected.begin(model.get("spec").scope, model.get("spec").selection);
  selected.read(location.hash);
  selected.changed = write;
  go();
  const waiting = new Set(places.keys());
  let there = false; // the place that the address names, among views that have their heights
  while (waiting.size) {
    const next = Array.from(waiting).find((i) => isNear(places[i]));
    if (next === undefined && !there) {
      there = true;
      go();
      continue;
    }
    await pause(next !== undefined);
    const i = next ?? Array.from(waiting).find((each) => isNear(places[each])) ?? Math.min(...waiting);
    waiting.delete(i);
    await drawOne(places[i], stills[i], views[stills[i].get("spec").kind]);
  }
  if (!there) go();
  opening = false;
  performance.mark("workbench:ready");
  document.documentElement.dataset.ready = "true";
}
