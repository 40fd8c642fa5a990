// A page: every view is drawn from its data block, the selection stands in the address, the theme can be chosen.

import { fromAddress, sharedSelection, toAddress } from "./selection.js";

/** What a view's module sees in place of a widget's model. */
function still(spec) {
  const values = { spec, selection: {}, live: false, still: [] };
  return { get: (name) => values[name], set: (name, value) => (values[name] = value), save_changes() {}, on() {}, off() {}, send() {} };
}

const selected = sharedSelection();
selected.select(fromAddress(location.hash));
const anchors = new Set([...document.querySelectorAll("[id]")].map(({ id }) => `#${id}`));
addEventListener("hashchange", () => anchors.has(location.hash) || selected.select(fromAddress(location.hash)));

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
  selected.follow((value) => history.replaceState(null, "", `#${toAddress(value)}`));
  performance.mark("workbench:ready");
  document.documentElement.dataset.ready = "true";
}

draw();
