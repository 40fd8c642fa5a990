// A view as a figure for a paper: its title, what it shows, legends, caption and origin as one SVG, on white, or a PNG.
// `pdf.js` makes a PDF of the same drawing, and reads what is written here: what it has to know stands in attributes.

import { escaped, Recording } from "./recording.js";

const GAP = 8;
const INK = "#1c2127";
const MUTED = "#59636e";
const n = (/** @type {number} */ value) => `${Number(value.toFixed(2))}`;
/** @type {CanvasRenderingContext2D | null} */
let ruler = null;

/** Words around a figure: text, size, weight, colour. */
function lines(text, width, size, weight = 400) {
  ruler ??= /** @type {CanvasRenderingContext2D} */ (document.createElement("canvas").getContext("2d"));
  ruler.font = `${weight} ${size}px sans-serif`;
  const found = [""];
  for (const word of text.split(/\s+/)) {
    const longer = found.at(-1) ? `${found.at(-1)} ${word}` : word;
    if (found.at(-1) && ruler.measureText(longer).width > width) found.push(word);
    else found[found.length - 1] = longer;
  }
  return found.filter(Boolean);
}

/**
 * The figure as SVG text, and its size in pixels. The view is drawn once more, in light colours, on recorded canvases.
 * @param {any} frame
 */
export async function figureOf(frame) {
  const { root, body, spec } = frame;
  const theme = frame.theme;
  const canvases = [...body.querySelectorAll("canvas")];
  const tables = [...body.querySelectorAll(".wide")].map((element) => ({ element, left: element.scrollLeft, top: element.scrollTop }));
  root.dataset.theme = "light";
  root.dataset.whole = ""; // nothing scrolls on paper
  root.style.setProperty("--paper", "#ffffff");
  frame.theme = "light";
  const recordings = new Map(canvases.map((canvas) => [canvas, new Recording(canvas)]));
  try {
    await frame.redraw();
    const drawn = new Map([...recordings].map(([canvas, recording]) => [canvas, recording.take()]));
    return composed(spec, body, drawn);
  } finally {
    for (const recording of recordings.values()) recording.take();
    root.style.removeProperty("--paper");
    root.dataset.theme = theme;
    delete root.dataset.whole;
    for (const { element, left, top } of tables) element.scrollTo(left, top);
    frame.theme = theme;
    await frame.redraw();
  }
}

function composed(spec, body, drawn) {
  const { left, top: above, right } = body.getBoundingClientRect();
  const ends = Array.from(body.querySelectorAll(".wide > *"), (each) => each.getBoundingClientRect().right);
  const around = { left, top: above, width: Math.max(right, ...ends) - left };
  const extent = { right: 0, bottom: 0 };
  const inside = walk(body, around, drawn, extent);
  const width = Math.max(360, Math.ceil(extent.right) + 1);
  const height = Math.ceil(extent.bottom) + 1;
  const words = [];
  let y = 0;
  const say = (text, size, colour, weight) => {
    for (const line of lines(text, width, size, weight)) {
      y += size * 1.35;
      words.push(`<text x="0" y="${n(y)}" fill="${colour}" style="font:${weight} ${size}px sans-serif">${escaped(line)}</text>`);
    }
  };
  say(spec.title, 16, INK, 650);
  const top = y + GAP;
  y = top + height + GAP;
  say([spec.caption, ...spec.notes].join(" "), 12, INK, 400);
  say(spec.origin, 10, MUTED, 400);
  const [w, h] = [width + 2 * GAP, Math.ceil(y) + 2 * GAP];
  const svg = `<svg xmlns="http://www.w3.org/2000/svg" width="${w}" height="${h}" viewBox="${-GAP} ${-GAP} ${w} ${h}"><title>${escaped(spec.title)}</title><rect x="${-GAP}" y="${-GAP}" width="${w}" height="${h}" fill="#fff"/>${words.join("")}<g transform="translate(0 ${n(top)})">${inside}</g></svg>`;
  return { svg, width: w, height: h };
}

/** Elements with what stands in them, from the back to the front. */
function walk(element, around, drawn, extent) {
  if (!(element instanceof HTMLElement || element instanceof SVGSVGElement)) return "";
  const style = getComputedStyle(element);
  if (style.display === "none" || style.visibility === "hidden" || element.matches(".spoken, .skip, .tip, .sound")) return "";
  const bounds = element.getBoundingClientRect();
  const box = { x: bounds.left - around.left, y: bounds.top - around.top, width: bounds.width, height: bounds.height };
  const parts = [];
  const seen = (part) => {
    if (!part) return;
    parts.push(part);
    extent.right = Math.max(extent.right, Math.min(box.x + box.width, around.width));
    extent.bottom = Math.max(extent.bottom, box.y + box.height);
  };
  if (box.width && box.height) {
    seen(background(style, box));
    seen(borders(style, box));
    seen(before(element, box));
  }
  if (element instanceof HTMLCanvasElement) seen(canvasOf(element, box, drawn.get(element) ?? null));
  else if (element instanceof SVGSVGElement) seen(svgOf(element, box));
  else if (element instanceof HTMLSelectElement) seen(textAt(element.selectedOptions[0]?.text ?? "", style, box.x + 4, box));
  else if (element instanceof HTMLInputElement) seen(/^(text|number|search)$/.test(element.type) ? textAt(element.value, style, box.x + 4, box) : "");
  else {
    const clipped = /hidden|auto|scroll|clip/.test(`${style.overflowX} ${style.overflowY}`) && (element.scrollWidth > element.clientWidth + 1 || element.scrollHeight > element.clientHeight + 1);
    const own = { right: 0, bottom: 0 };
    const inside = Array.from(element.childNodes, (child) => {
      if (child.nodeType === Node.TEXT_NODE) return textOf(/** @type {Text} */ (child), style, around, own);
      return child instanceof Element ? walk(child, around, drawn, own) : "";
    }).join("");
    if (inside && clipped) seen(`<svg x="${n(box.x)}" y="${n(box.y)}" width="${n(box.width)}" height="${n(box.height)}" viewBox="${n(box.x)} ${n(box.y)} ${n(box.width)} ${n(box.height)}">${inside}</svg>`);
    else if (inside) {
      parts.push(inside);
      extent.right = Math.max(extent.right, own.right);
      extent.bottom = Math.max(extent.bottom, own.bottom);
    }
  }
  const made = parts.join("");
  return made && style.opacity !== "1" ? `<g opacity="${style.opacity}">${made}</g>` : made;
}

const clear = (colour) => colour === "transparent" || /[,/]\s*0\)$/.test(colour);

function rectOf({ x, y, width, height }, radius, more) {
  return `<rect x="${n(x)}" y="${n(y)}" width="${n(width)}" height="${n(height)}"${radius ? ` rx="${n(Math.min(radius, height / 2))}"` : ""} ${more}/>`;
}

let gradients = 0;

function background(style, box) {
  const radius = Number.parseFloat(style.borderTopLeftRadius) || 0;
  const found = [];
  if (!clear(style.backgroundColor)) found.push(rectOf(box, radius, `fill="${style.backgroundColor}"`));
  const stops = /^linear-gradient\(to right, (.*)\)$/s.exec(style.backgroundImage)?.[1].match(/rgba?\([^)]*\)/g);
  if (stops) {
    const name = `scale-${++gradients}`;
    const made = stops.map((colour, i) => `<stop offset="${n(i / Math.max(1, stops.length - 1))}" stop-color="${colour}"/>`).join("");
    found.push(`<linearGradient id="${name}">${made}</linearGradient>`, rectOf(box, radius, `fill="url(#${name})"`));
  }
  return found.join("");
}

function borders(style, box) {
  const sides = ["Top", "Right", "Bottom", "Left"].map((side) => ({ width: Number.parseFloat(style[`border${side}Width`]), colour: style[`border${side}Color`], kind: style[`border${side}Style`] }));
  const shown = sides.map(({ width, colour, kind }) => width > 0 && kind !== "none" && !clear(colour));
  if (!shown.some(Boolean)) return "";
  const { x, y, width, height } = box;
  const [{ width: thick, colour }] = sides;
  if (shown.every(Boolean) && sides.every((side) => side.width === thick && side.colour === colour)) {
    const inner = { x: x + thick / 2, y: y + thick / 2, width: width - thick, height: height - thick };
    return rectOf(inner, Number.parseFloat(style.borderTopLeftRadius) || 0, `fill="none" stroke="${colour}" stroke-width="${thick}"${dashed(sides[0])}`);
  }
  const ends = [[x, y, x + width, y], [x + width, y, x + width, y + height], [x, y + height, x + width, y + height], [x, y, x, y + height]];
  return sides.map((side, i) => (shown[i] ? `<path d="M${n(ends[i][0])} ${n(ends[i][1])}L${n(ends[i][2])} ${n(ends[i][3])}" fill="none" stroke="${side.colour}" stroke-width="${side.width}"${dashed(side)}/>` : "")).join("");
}

/** The dashes of a border. */
function dashed({ kind, width }) {
  const parts = { dashed: [3, 2], dotted: [1, 1] }[kind];
  return parts ? ` stroke-dasharray="${parts.map((each) => n(each * width)).join(" ")}"` : "";
}

/** The square before a word of a legend. */
function before(element, box) {
  const style = getComputedStyle(element, "::before");
  if (style.content === "none") return "";
  const [width, height] = [Number.parseFloat(style.width) || 0, Number.parseFloat(style.height) || 0];
  if (!width || !height) return "";
  const square = { x: box.x, y: box.y + (box.height - height) / 2, width, height };
  return background(style, square) + borders(style, square);
}

function canvasOf(canvas, box, recorded) {
  if (!canvas.width || !canvas.height || !box.width) return "";
  const { x, y, width, height } = box;
  const sharp = getComputedStyle(canvas).imageRendering === "pixelated" ? ' style="image-rendering:pixelated"' : "";
  if (recorded === null) return `<image x="${n(x)}" y="${n(y)}" width="${n(width)}" height="${n(height)}"${sharp} href="${canvas.toDataURL()}"/>`;
  return `<svg x="${n(x)}" y="${n(y)}" width="${n(width)}" height="${n(height)}" viewBox="0 0 ${canvas.width} ${canvas.height}" preserveAspectRatio="none"${sharp}>${recorded}</svg>`;
}

const KEPT = ["fill", "fill-opacity", "fill-rule", "stroke", "stroke-width", "stroke-opacity", "stroke-dasharray", "stroke-linecap", "stroke-linejoin", "opacity", "display", "visibility", "overflow", "clip-path", "font-family", "font-size", "font-style", "font-weight", "text-anchor", "dominant-baseline"];

function svgOf(element, { x, y, width, height }) {
  const copy = /** @type {SVGSVGElement} */ (element.cloneNode(true));
  const [from, to] = [element, copy].map((each) => [each, ...each.querySelectorAll("*")]);
  from.forEach((each, i) => {
    const style = getComputedStyle(each);
    for (const name of KEPT) to[i].setAttribute(name, style.getPropertyValue(name));
  });
  for (const [name, value] of Object.entries({ x, y, width, height })) copy.setAttribute(name, n(value));
  return new XMLSerializer().serializeToString(copy);
}

function ascent(style) {
  ruler ??= /** @type {CanvasRenderingContext2D} */ (document.createElement("canvas").getContext("2d"));
  ruler.font = `${style.fontWeight} ${style.fontSize} ${style.fontFamily}`;
  const { fontBoundingBoxAscent: above, fontBoundingBoxDescent: below } = ruler.measureText("x");
  return { above, below };
}

function textAt(text, style, x, { y, height }, width = 0) {
  if (!text.trim()) return "";
  const { above, below } = ascent(style);
  const font = `font:${style.fontStyle} ${style.fontWeight} ${style.fontSize} ${style.fontFamily}`;
  const spread = width ? ` textLength="${n(width)}"` : "";
  return `<text x="${n(x)}" y="${n(y + (height - above - below) / 2 + above)}"${spread} fill="${style.color}" style="${escaped(font)};white-space:pre">${escaped(text)}</text>`;
}

/** A text, line by line as it is broken on the page. */
function textOf(node, style, around, extent) {
  const range = document.createRange();
  /** @type {{text: string, left: number, right: number, top: number, height: number}[]} */
  const found = [];
  const boxesOf = (at, length) => {
    range.setStart(node, at);
    range.setEnd(node, at + length);
    return [...range.getClientRects()].filter((box) => box.width);
  };
  const add = (text, { left, right, top, height }, between) => {
    const last = found.at(-1);
    if (last && Math.abs(last.top - top) < 2 && left >= last.right - 1) Object.assign(last, { text: `${last.text}${between}${text}`, right });
    else found.push({ text, left, right, top, height });
  };
  for (const { 0: word, index } of node.data.matchAll(/\S+/g)) {
    const boxes = boxesOf(index, word.length);
    if (boxes.length === 1) add(word, boxes[0], " ");
    else if (boxes.length) {
      // A long word that is broken: letter by letter, a line is what has one height.
      let at = index;
      for (const letter of new Intl.Segmenter().segment(word)) {
        const [box] = boxesOf(at, letter.segment.length);
        if (box) add(letter.segment, box, at === index ? " " : "");
        at += letter.segment.length;
      }
    }
  }
  return found.map(({ text, left, right, top, height }) => {
    extent.right = Math.max(extent.right, right - around.left);
    extent.bottom = Math.max(extent.bottom, top + height - around.top);
    return textAt(text, style, left - around.left, { y: top - around.top, height }, right - left);
  }).join("");
}

/**
 * The figure as a PNG, `scale` pixels for each of the page's.
 * @returns {Promise<Blob | null>}
 */
export async function pictureOf({ svg, width, height }, scale = 2) {
  const url = URL.createObjectURL(new Blob([svg], { type: "image/svg+xml" }));
  try {
    const image = new Image();
    await new Promise((done, failed) => {
      image.onload = done;
      image.onerror = () => failed(new Error("the drawing could not be read"));
      image.src = url;
    });
    const canvas = document.createElement("canvas");
    Object.assign(canvas, { width: width * scale, height: height * scale });
    canvas.getContext("2d")?.drawImage(image, 0, 0, canvas.width, canvas.height);
    return await new Promise((done) => canvas.toBlob(done));
  } finally {
    URL.revokeObjectURL(url);
  }
}
