// Small helpers for the page. Text from the data block reaches it through textContent and text nodes only.

/** An element with attributes and children; strings become text nodes. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

const cut = (text, longest = 24) => {
  const letters = Array.from(text);
  return letters.length > longest ? letters.slice(0, longest - 1).join("") + "…" : text;
};

/** A token with its position, for sentences: "␣the" (4). */
const named = (token, at, longest = 40) => (token === null ? `position ${at}` : `“${cut(token, longest)}” (${at})`);

/** A number with six digits after the point, or in powers of ten when it is too small for that. */
const exactly = (value) => (value === 0 || value >= 1e-4 ? value.toFixed(6) : value.toExponential(3));

const roughly = (value) => (value >= 0.001 ? `≈ ${value.toFixed(3)}` : "< 0.001");

const tooltip = {
  box: document.getElementById("tooltip"),
  show(x, y, lines) {
    this.box.replaceChildren(...lines.map((line) => make("div", {}, line)));
    this.box.hidden = false;
    const { width, height } = this.box.getBoundingClientRect();
    this.box.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - width - 8))}px`;
    this.box.style.top = `${y + 18 + height > innerHeight ? Math.max(4, y - height - 12) : y + 18}px`;
  },
  hide() {
    this.box.hidden = true;
  },
};

/** A labelled select; `choose` is called with the value. */
function selector(label, options, choose) {
  const select = make("select", {}, ...options.map(([value, text]) => make("option", { value }, text)));
  select.addEventListener("change", () => choose(select.value));
  return { select, field: make("label", { class: "field" }, make("span", {}, label), select) };
}

/** A colour bar; `ticks` are [place 0 to 1, text]. */
function fillLegend(legend, ticks, unit) {
  const bar = make("div", { class: "bar" });
  bar.style.backgroundImage = gradient();
  const marks = ticks.map(([at, text]) => {
    const mark = make("span", {}, text);
    mark.style.left = `${100 * at}%`;
    return mark;
  });
  legend.replaceChildren(make("div", { class: "scale" }, bar, make("div", { class: "ticks" }, ...marks)), unit);
}

/** Move by arrow keys, Home and End within rows x columns; null for other keys. */
function moved(key, row, column, rows, columns) {
  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  if (key === "Home") return [row, 0];
  if (key === "End") return [row, columns - 1];
  if (!(key in steps)) return null;
  const [down, right] = steps[key];
  return [Math.min(rows - 1, Math.max(0, row + down)), Math.min(columns - 1, Math.max(0, column + right))];
}
