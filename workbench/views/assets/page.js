// A page: every view is drawn from its data block, the selection stands in the address, the theme can be chosen.

import { fromAddress, sharedSelection, toAddress } from "./selection.js";

/** What a view's module sees in place of a widget's model. */
function still(spec) {
  const values = { spec, selection: {}, live: false, still: [] };
  return { get: (name) => values[name], set: (name, value) => (values[name] = value), save_changes() {}, on() {}, off() {}, send() {} };
}

// An address is a place on the page, a selection, or both: #fig-2-head-atlas,L5H1,q=12.
const selected = sharedSelection();
selected.select(fromAddress(location.hash));
let place = null;

function go() {
  const [name] = location.hash.slice(1).split(",");
  const found = /^[a-z][a-z0-9-]*$/.test(name) ? document.getElementById(name) : null;
  if (found) place = name;
  found?.scrollIntoView();
}

addEventListener("hashchange", () => {
  selected.select(fromAddress(location.hash));
  go();
});

// The figure that someone works with is the place that the address names.
for (const event of ["pointerdown", "focusin"]) {
  addEventListener(event, ({ target }) => (place = target.closest?.("figure[id]")?.id ?? place));
}

const themes = document.querySelector("#theme");
themes?.addEventListener("change", () => {
  if (themes.value === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = themes.value;
});

async function draw() {
  for (const el of document.querySelectorAll(".workbench-view")) {
    const spec = JSON.parse(document.getElementById(el.dataset.view).textContent);
    try {
      await VIEWS[spec.kind]({ model: still(spec), el });
    } catch (error) {
      el.textContent = `This view could not be drawn: ${error.message}`;
      console.error(error);
    }
  }
  selected.follow((value) => history.replaceState(null, "", `#${[place, toAddress(value)].filter(Boolean).join(",")}`));
  go();
  performance.mark("workbench:ready");
  document.documentElement.dataset.ready = "true";
}

draw();
