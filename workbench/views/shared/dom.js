// Small helpers. Text from a spec reaches the page through text nodes and attributes only.

/**
 * An element with attributes and children; strings become text nodes.
 * @template {keyof HTMLElementTagNameMap} Tag
 * @param {Tag} tag
 * @param {Record<string, unknown>} attributes null and false: not there; true: there without a value
 * @param {(Node | string)[]} children
 * @returns {any} the element, with whatever a view hangs on it
 */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : `${value}`);
  }
  element.append(...children);
  return element;
}

/**
 * The text, or its beginning and an ellipsis.
 * @param {string} text
 */
export function cut(text, longest = 24) {
  const letters = Array.from(text);
  return letters.length > longest ? `${letters.slice(0, longest - 1).join("")}…` : text;
}

/**
 * A token with its position, for sentences: “␣the” (4).
 * @param {string | null | undefined} token
 * @param {number} at
 */
export const named = (token, at, longest = 40) => (token === null || token === undefined ? `position ${at}` : `“${cut(token, longest)}” (${at})`);

/**
 * A number with six digits, in powers of ten when it is very small or large.
 * @param {number | null} value
 */
export function exactly(value) {
  if (value === null || Number.isNaN(value)) return "not known";
  const size = Math.abs(value);
  return size === 0 || (size >= 1e-4 && size < 1e6) ? `${Number(value.toPrecision(6))}` : value.toExponential(3);
}

/**
 * A number to read at a glance: three digits, in powers of ten when it is very small.
 * @param {number} value
 */
export function roughly(value) {
  if (!Number.isFinite(value)) return "–";
  const rounded = Number(value.toPrecision(3));
  return (rounded !== 0 && Math.abs(rounded) < 1e-4 ? rounded.toExponential() : `${rounded}`).replaceAll("-", "−");
}

/**
 * A number and what it counts: 1 row, 1,200 rows.
 * @param {number} number
 * @param {string} noun
 */
export const count = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;

/**
 * What goes down and what across in a map.
 * @param {string} rows
 * @param {string} columns
 */
export const axes = (rows, columns) => make("div", { class: "axes" }, `${rows} ↓, ${columns} →`);

/**
 * A labelled select; `choose` is called with the value.
 * @param {string} label
 * @param {(string | number)[][]} options values and their texts
 * @param {(value: string) => void} choose
 */
export function selector(label, options, choose) {
  const select = make("select", {}, ...options.map(([value, text]) => make("option", { value }, `${text}`)));
  select.addEventListener("change", () => choose(select.value));
  return { select, field: make("label", { class: "field" }, make("span", {}, label), select) };
}

/**
 * A labelled check box; `choose` is called with true or false.
 * @param {string} label
 * @param {boolean} checked
 * @param {(checked: boolean) => void} choose
 */
export function checkbox(label, checked, choose) {
  const box = make("input", { type: "checkbox", checked });
  const text = make("span", {}, label);
  box.addEventListener("change", () => choose(box.checked));
  return { box, text, field: make("label", { class: "field check" }, box, text) };
}

/** @param {string} text @param {(event: MouseEvent) => void} press @param {Record<string, unknown>} attributes */
export function button(text, press, attributes = {}) {
  const made = make("button", { type: "button", ...attributes }, text);
  made.addEventListener("click", press);
  return made;
}

/**
 * A colour bar. `ticks` are [place 0 to 1, text]; `at` gives the colour of a place.
 * @param {string} gradient
 * @param {(number | string)[][]} ticks
 * @param {(Node | string)[]} more
 */
export function legend(gradient, ticks, ...more) {
  const bar = make("div", { class: "bar" });
  bar.style.backgroundImage = gradient;
  const marks = ticks.map(([at, text]) => {
    const mark = make("span", {}, `${text}`);
    mark.style.left = `${100 * Number(at)}%`;
    return mark;
  });
  return make("div", { class: "legend" }, make("div", { class: "scale" }, bar, make("div", { class: "ticks" }, ...marks)), ...more);
}

/**
 * Move by arrow keys, Home and End within rows x columns; null for other keys.
 * @param {string} key
 * @param {number[]} from row and column
 * @param {number[]} shape rows and columns
 */
export function moved(key, [row, column], [rows, columns]) {
  /** @type {Record<string, number[]>} */
  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  if (key === "Home") return [row, 0];
  if (key === "End") return [row, columns - 1];
  if (!(key in steps)) return null;
  const [down, right] = steps[key];
  return [Math.min(rows - 1, Math.max(0, row + down)), Math.min(columns - 1, Math.max(0, column + right))];
}

/**
 * One tab stop for all buttons in a box: arrow keys, Home and End move among them. Buttons may come and go.
 * @param {HTMLElement} box
 */
export function roving(box) {
  let at = 0;
  let inside = false;
  /** @returns {HTMLButtonElement[]} */
  const all = () => Array.from(box.querySelectorAll("button:not(:disabled)"));
  const focused = () => /** @type {Document | ShadowRoot} */ (box.getRootNode()).activeElement;
  const set = () => {
    const buttons = all();
    at = Math.max(0, Math.min(at, buttons.length - 1));
    buttons.forEach((each, i) => (each.tabIndex = i === at ? 0 : -1));
    // Whoever was on a button that was made anew stays at its place; whoever has gone elsewhere stays there.
    const now = focused();
    if (inside && (now === null || now === document.body)) buttons[at]?.focus();
  };
  box.addEventListener("focusin", ({ target }) => {
    const found = all().indexOf(/** @type {HTMLButtonElement} */ (target));
    if (found < 0) return;
    inside = true;
    at = found;
    set();
  });
  // A button that is taken away loses the focus too: whether it has gone elsewhere is seen after those that follow.
  box.addEventListener("focusout", () => {
    setTimeout(() => {
      inside &&= box.contains(focused());
    });
  });
  box.addEventListener("keydown", (event) => {
    const buttons = all();
    const steps = { ArrowUp: at - 1, ArrowLeft: at - 1, ArrowDown: at + 1, ArrowRight: at + 1, Home: 0, End: buttons.length - 1 };
    if (!(event.key in steps) || !buttons.some((each) => each === event.target)) return;
    event.preventDefault();
    buttons[Math.max(0, Math.min(buttons.length - 1, steps[/** @type {keyof typeof steps} */ (event.key)]))]?.focus();
  });
  new MutationObserver(set).observe(box, { childList: true, subtree: true });
  set();
}

/**
 * Hand a file to the person who asked for it.
 * @param {string} name
 * @param {string} type
 * @param {BlobPart[]} parts
 */
export function download(name, type, parts) {
  const url = URL.createObjectURL(new Blob(parts, { type }));
  const link = make("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 60_000); // a busy browser may begin late
}
