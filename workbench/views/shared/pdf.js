// A figure as a PDF of one page: texts are text, in fonts that are made of what the browser draws, lines are lines.

import { Face, widthOf } from "./lettering.js";
import { segmentsOf } from "./paths.js";
import { bytesOf, embedded, PdfFile, utf16 } from "./pdf_file.js";

const POINT = 0.75; // points of a pixel
const SHARP = 256; // pixels that a picture has at least whose own are told apart: many readers smooth what is enlarged
const UNSEEN = new Set(["title", "desc", "defs", "clipPath", "linearGradient", "style", "metadata"]);
const SHAPES = new Set(["path", "rect", "circle", "ellipse", "line", "polyline", "polygon"]);
const CAPS = { butt: 0, round: 1, square: 2 };
const JOINS = { miter: 0, round: 1, bevel: 2 };
const short = (/** @type {number} */ value) => `${Number(value.toFixed(4))}`;

/** @type {Map<string, number[]>} */
const READ = new Map();
/** @type {CanvasRenderingContext2D | null} */
let pixel = null;

/** [red, green, blue, opacity] of a colour as the browser reads it, each from 0 to 1. @param {string} colour */
function colourOf(colour) {
  let found = READ.get(colour);
  if (!found) {
    pixel ??= /** @type {CanvasRenderingContext2D} */ (document.createElement("canvas").getContext("2d", { willReadFrequently: true }));
    pixel.clearRect(0, 0, 1, 1);
    pixel.fillStyle = "#000";
    pixel.fillStyle = colour;
    pixel.fillRect(0, 0, 1, 1);
    found = Array.from(pixel.getImageData(0, 0, 1, 1).data, (part) => part / 255);
    READ.set(colour, found);
  }
  return found;
}

/** What a colour looks like on white. @param {number[]} colour */
const onPaper = ([r, g, b, opacity]) => [r, g, b].map((part) => part * opacity + 1 - opacity);

/** An attribute, or what the style says of it. @param {Element} element @param {string} name */
function said(element, name) {
  const style = element.getAttribute("data-style") ?? "";
  const own = style.split(";").find((each) => each.trim().startsWith(`${name}:`));
  return own ? own.slice(own.indexOf(":") + 1).trim() : element.getAttribute(name);
}

/** @param {Element} element @param {string} name @param {number} [otherwise] */
const number = (element, name, otherwise = 0) => {
  const found = Number.parseFloat(said(element, name) ?? "");
  return Number.isFinite(found) ? found : otherwise;
};

/** Whether the pixels of a picture are told apart: as it says itself, or what it stands in. @param {Element | null} element @returns {boolean} */
const isSharp = (element) => element !== null && (said(element, "image-rendering") ?? (isSharp(element.parentElement) ? "pixelated" : "auto")) === "pixelated";

/** @param {Element} element */
const unknown = (element) => new Error(`a PDF has no form for <${element.localName}> of the drawing; take the SVG`);

/** Any shape as the data of a path. @param {Element} element */
function pathOf(element) {
  const [x, y, width, height] = ["x", "y", "width", "height"].map((name) => number(element, name));
  const round = (/** @type {number} */ cx, /** @type {number} */ cy, /** @type {number} */ rx, /** @type {number} */ ry) => `M${cx - rx} ${cy}A${rx} ${ry} 0 0 1 ${cx + rx} ${cy}A${rx} ${ry} 0 0 1 ${cx - rx} ${cy}Z`;
  const points = element.getAttribute("points") ?? "";
  switch (element.localName) {
    case "path":
      return element.getAttribute("d") ?? "";
    case "rect": {
      const r = Math.min(number(element, "rx"), width / 2, height / 2);
      if (!(width > 0 && height > 0)) return "";
      if (!r) return `M${x} ${y}h${width}v${height}h${-width}Z`;
      return `M${x + r} ${y}h${width - 2 * r}a${r} ${r} 0 0 1 ${r} ${r}v${height - 2 * r}a${r} ${r} 0 0 1 ${-r} ${r}h${2 * r - width}a${r} ${r} 0 0 1 ${-r} ${-r}v${2 * r - height}a${r} ${r} 0 0 1 ${r} ${-r}Z`;
    }
    case "circle":
      return round(number(element, "cx"), number(element, "cy"), number(element, "r"), number(element, "r"));
    case "ellipse":
      return round(number(element, "cx"), number(element, "cy"), number(element, "rx"), number(element, "ry"));
    case "line":
      return `M${number(element, "x1")} ${number(element, "y1")}L${number(element, "x2")} ${number(element, "y2")}`;
    default:
      return points ? `M${points}${element.localName === "polygon" ? "Z" : ""}` : "";
  }
}

/** The operators of a path. @param {string} d */
const traced = (d) => segmentsOf(d).map(({ name, at }) => `${at.map(short).join(" ")} ${{ M: "m", L: "l", C: "c", Z: "h" }[name]}`.trim()).join("\n");

class Sheet {
  /** @param {PdfFile} file @param {Document} drawing */
  constructor(file, drawing) {
    this.file = file;
    this.drawing = drawing;
    /** @type {string[]} */
    this.lines = [];
    /** @type {Map<string, Face>} */
    this.faces = new Map();
    /** @type {Map<string, number>} what a page may name: "/Font /F0" -> number of its object */
    this.named = new Map();
    /** @type {Map<string, string>} pictures and shadings that are there -> their names */
    this.known = new Map();
  }

  /** @param {string[]} lines */
  write(...lines) {
    this.lines.push(...lines);
  }

  /** @param {Element} element @param {number} opacity */
  async walk(element, opacity) {
    const kind = element.localName;
    if (UNSEEN.has(kind) || said(element, "display") === "none") return;
    const shown = opacity * number(element, "opacity", 1);
    if (shown === 0) return;
    this.write("q");
    const moved = /** @type {SVGGraphicsElement} */ (element).transform?.baseVal.consolidate()?.matrix;
    if (moved && kind !== "svg") this.turn(moved.a, moved.b, moved.c, moved.d, moved.e, moved.f);
    this.clip(said(element, "clip-path"));
    if (kind === "svg") this.frame(element);
    if (kind === "svg" || kind === "g") for (const child of element.children) await this.walk(child, shown);
    else if (/^(hidden|collapse)$/.test(said(element, "visibility") ?? "")) this.write("% hidden");
    else if (kind === "text") await this.text(element, shown);
    else if (kind === "image") await this.image(element, shown);
    else if (SHAPES.has(kind)) this.shape(element, shown);
    else throw unknown(element);
    this.write("Q");
  }

  /** @param {number[]} by */
  turn(...by) {
    this.write(`${by.map(short).join(" ")} cm`);
  }

  /** What a drawing within the drawing shows, in its own places. @param {Element} element */
  frame(element) {
    const [x, y, width, height] = ["x", "y", "width", "height"].map((name) => number(element, name));
    const view = (element.getAttribute("viewBox") ?? `0 0 ${width} ${height}`).split(/[\s,]+/).map(Number);
    let [across, down] = [width / view[2], height / view[3]];
    const uniform = element.getAttribute("preserveAspectRatio") !== "none";
    if (uniform) across = down = Math.min(across, down);
    const middle = uniform ? [(width - across * view[2]) / 2, (height - down * view[3]) / 2] : [0, 0];
    if (said(element, "overflow") !== "visible") this.write(`${[x, y, width, height].map(short).join(" ")} re W n`);
    this.turn(across, 0, 0, down, x + middle[0] - across * view[0], y + middle[1] - down * view[1]);
  }

  /** The element that `url(#name)` means. @param {string | null} text */
  meant(text) {
    const name = /url\(["']?[^"')#]*#([^"')]+)["']?\)/.exec(text ?? "")?.[1];
    return name === undefined ? null : this.drawing.getElementById(name);
  }

  /** @param {string | null} text */
  clip(text) {
    const found = this.meant(text);
    if (!found) return;
    this.clip(said(found, "clip-path"));
    const paths = Array.from(found.children, (child) => {
      const moved = /** @type {SVGGraphicsElement} */ (child).transform?.baseVal.consolidate()?.matrix;
      const at = ([x, y]) => (moved ? [moved.a * x + moved.c * y + moved.e, moved.b * x + moved.d * y + moved.f] : [x, y]);
      return segmentsOf(pathOf(child)).map(({ name, at: p }) => {
        const places = Array.from({ length: p.length / 2 }, (_, i) => at([p[2 * i], p[2 * i + 1]])).flat();
        return `${places.map(short).join(" ")} ${{ M: "m", L: "l", C: "c", Z: "h" }[name]}`.trim();
      });
    });
    this.write(...(paths.flat().length ? paths.flat() : ["0 0 0 0 re"]), "W n");
  }

  /** @param {number} fill @param {number} stroke */
  opacity(fill, stroke) {
    if (fill >= 1 && stroke >= 1) return;
    const words = `<< /ca ${short(fill)} /CA ${short(stroke)} >>`;
    this.write(`${this.name("ExtGState", words, () => this.file.put(words))} gs`);
  }

  /** The name by which the page knows an object, which is made when it is wanted first. */
  name(kind, what, made) {
    const key = `${kind} ${what}`;
    let name = this.known.get(key);
    if (name === undefined) {
      name = `/${kind.slice(0, 2)}${this.known.size}`;
      this.known.set(key, name);
      this.named.set(`${kind} ${name}`, made());
    }
    return name;
  }

  /** @param {Element} element @param {number} opacity */
  shape(element, opacity) {
    const d = pathOf(element);
    if (!d) return;
    const paints = ["fill", "stroke"].map((way) => {
      const text = said(element, way) ?? (way === "fill" ? "#000" : "none");
      const server = this.meant(text);
      const colour = text === "none" || server ? [0, 0, 0, 0] : colourOf(text);
      return { server, colour, opacity: opacity * colour[3] * number(element, `${way}-opacity`, 1) };
    });
    const [fill, stroke] = paints;
    const width = number(element, "stroke-width", 1);
    const even = said(element, "fill-rule") === "evenodd" ? "*" : "";
    const path = traced(d);
    if (fill.server) this.gradient(fill.server, element, path);
    const ways = { fill: fill.opacity > 0, stroke: stroke.opacity > 0 && width > 0 };
    if (!ways.fill && !ways.stroke) return;
    this.opacity(ways.fill ? fill.opacity : 1, ways.stroke ? stroke.opacity : 1);
    if (ways.fill) this.write(`${fill.colour.slice(0, 3).map(short).join(" ")} rg`);
    if (ways.stroke) {
      const dashes = (said(element, "stroke-dasharray") ?? "none").split(/[\s,]+/).map(Number.parseFloat).filter((each) => each >= 0);
      const [cap, join] = [CAPS[said(element, "stroke-linecap")] ?? 0, JOINS[said(element, "stroke-linejoin")] ?? 0];
      this.write(`${stroke.colour.slice(0, 3).map(short).join(" ")} RG ${short(width)} w ${cap} J ${join} j 4 M [${dashes.map(short).join(" ")}] 0 d`);
    }
    this.write(path, ways.fill ? (ways.stroke ? `B${even}` : `f${even}`) : "S");
  }

  /** Fill a path with a linear gradient. */
  gradient(server, element, path) {
    if (server.localName !== "linearGradient") throw unknown(server);
    const own = server.getAttribute("gradientUnits") === "userSpaceOnUse";
    const end = (name, otherwise) => {
      const text = server.getAttribute(name);
      return text === null ? otherwise : Number.parseFloat(text) / (text.endsWith("%") ? 100 : 1);
    };
    const ends = [end("x1", 0), end("y1", 0), end("x2", 1), end("y2", 0)];
    const stops = Array.from(server.querySelectorAll("stop"), (stop) => {
      const at = stop.getAttribute("offset") ?? "0";
      return { at: Number.parseFloat(at) / (at.endsWith("%") ? 100 : 1), colour: onPaper(colourOf(said(stop, "stop-color") ?? "#000")) };
    });
    if (!stops.length) return;
    const between = (t) => {
      const after = stops.findIndex(({ at }) => at >= t);
      if (after <= 0) return stops.at(after).colour;
      const [a, b] = [stops[after - 1], stops[after]];
      return a.colour.map((part, i) => part + ((b.colour[i] - part) * (t - a.at)) / (b.at - a.at || 1));
    };
    const n = 128;
    const samples = Array.from({ length: n }, (_, i) => between(i / (n - 1)).map((part) => Math.round(255 * part).toString(16).padStart(2, "0")).join("")).join("");
    const words = `<< /ShadingType 2 /ColorSpace /DeviceRGB /Coords [${ends.map(short).join(" ")}] /Extend [true true]`;
    const name = this.name("Shading", words + samples, () => {
      const text = `${samples}>`;
      const of = this.file.objects.push({ words: `<< /FunctionType 0 /Domain [0 1] /Range [0 1 0 1 0 1] /Size [${n}] /BitsPerSample 8 /Filter /ASCIIHexDecode /Length ${text.length} >>`, stream: bytesOf(text) });
      return this.file.put(`${words} /Function ${of} 0 R >>`);
    });
    this.write("q", path, "W n");
    if (!own) {
      const places = segmentsOf(pathOf(element)).flatMap(({ at }) => at);
      const [xs, ys] = [places.filter((_, i) => i % 2 === 0), places.filter((_, i) => i % 2)];
      const [left, top] = [Math.min(...xs), Math.min(...ys)];
      this.turn(Math.max(...xs) - left, 0, 0, Math.max(...ys) - top, left, top);
    }
    this.write(`${name} sh`, "Q");
  }

  /** @param {Element} element @param {number} opacity */
  async text(element, opacity) {
    const font = said(element, "font") ?? ["font-style", "font-weight", "font-size", "font-family"].map((name) => said(element, name) ?? "").join(" ");
    const [, style, weight, size, family] = /^(?:(normal|italic|oblique)\s)?\s*(?:(?:normal\s)?(\d+|normal|bold)\s)?\s*([\d.]+)px(?:\/\S+)?\s+(.+)$/.exec(font.trim()) ?? [];
    if (!size) throw new Error(`the font ${font} of the drawing is not read`);
    const colour = colourOf(said(element, "fill") ?? "#000");
    const face = this.face(style ?? "normal", weight ?? "400", family);
    const set = { size: Number(size), face, font, colour, opacity: opacity * colour[3] * number(element, "fill-opacity", 1), anchor: said(element, "text-anchor") ?? "start" };
    const width = element.hasAttribute("textLength") ? number(element, "textLength") : undefined;
    const drop = { middle: 0.35, central: 0.35, hanging: 0.8 }[said(element, "dominant-baseline") ?? ""] ?? 0;
    let [x, y] = [number(element, "x"), number(element, "y") + drop * set.size];
    for (const node of element.childNodes) {
      const part = node instanceof Element ? node : null;
      if (part) {
        if (part.hasAttribute("x")) x = number(part, "x");
        if (part.hasAttribute("y")) y = number(part, "y");
        const dy = part.getAttribute("dy") ?? "0";
        y += Number.parseFloat(dy) * (dy.endsWith("em") ? set.size : 1);
      }
      const text = (node.textContent ?? "").replace(/\p{Cc}/gu, "");
      if (text.trim()) x += await this.line(text, x, y, set, width);
    }
  }

  /** @param {string} style @param {string} weight @param {string} family */
  face(style, weight, family) {
    const key = `${style} ${weight} ${family}`;
    const found = this.faces.get(key) ?? new Face(style, weight, family);
    this.faces.set(key, found);
    return found;
  }

  /** Write a line of text; how wide it is. */
  async line(text, x, y, { size, face, font, colour, opacity, anchor }, width) {
    const wide = width ?? widthOf(text, font);
    const left = x - wide * ({ middle: 0.5, end: 1 }[anchor] ?? 0);
    const glyphs = face.set(text, wide / size);
    let pen = 0; // thousandths of the size
    const codes = glyphs.map(({ number: of, at }) => {
      const by = Math.round(pen - 1000 * at);
      pen += face.glyphs[of].advance - by;
      return `${by ? `${by} ` : ""}<${of.toString(16).padStart(4, "0")}>`;
    });
    this.write("q");
    this.opacity(opacity, 1);
    const name = `/F${[...this.faces.values()].indexOf(face)}`;
    this.write(`BT ${name} ${short(size)} Tf ${colour.slice(0, 3).map(short).join(" ")} rg 1 0 0 -1 ${short(left)} ${short(y)} Tm [${codes.join(" ")}] TJ ET`);
    for (const { number: of, at } of glyphs) {
      const { picture, box } = face.glyphs[of];
      if (picture) await this.picture(picture, [left + size * (at + box[0]), y + size * box[1], size * box[2], size * box[3]], true);
    }
    this.write("Q");
    return wide;
  }

  /** @param {Element} element @param {number} opacity */
  async image(element, opacity) {
    const address = element.getAttribute("href") ?? element.getAttribute("xlink:href") ?? "";
    const box = ["x", "y", "width", "height"].map((name) => number(element, name));
    if (!address.startsWith("data:") || !(box[2] > 0 && box[3] > 0)) return;
    const image = new Image();
    image.src = address;
    await image.decode();
    const sharp = isSharp(element);
    const { naturalWidth: width, naturalHeight: height } = image;
    const times = sharp ? Math.ceil(SHARP / Math.max(width, height)) : 1;
    const sheet = document.createElement("canvas");
    Object.assign(sheet, { width: times * width, height: times * height });
    const ink = /** @type {CanvasRenderingContext2D} */ (sheet.getContext("2d", { willReadFrequently: true }));
    ink.imageSmoothingEnabled = !sharp;
    ink.drawImage(image, 0, 0, sheet.width, sheet.height);
    this.opacity(opacity, 1);
    await this.picture(sheet, box, !sharp, address);
  }

  /** @param {HTMLCanvasElement} sheet @param {number[]} box @param {boolean} smooth @param {string} [address] */
  async picture(sheet, [x, y, width, height], smooth, address = sheet.toDataURL()) {
    const { data } = /** @type {CanvasRenderingContext2D} */ (sheet.getContext("2d")).getImageData(0, 0, sheet.width, sheet.height);
    const n = sheet.width * sheet.height;
    const name = this.name("XObject", `${smooth} ${address}`, () => this.file.place());
    const object = /** @type {number} */ (this.named.get(`XObject ${name}`));
    if (this.file.objects[object - 1].words === "null") {
      const [colours, cover] = [new Uint8Array(3 * n), new Uint8Array(n)];
      for (let i = 0; i < n; i++) {
        colours.set(data.subarray(4 * i, 4 * i + 3), 3 * i);
        cover[i] = data[4 * i + 3];
      }
      const size = `/Type /XObject /Subtype /Image /Width ${sheet.width} /Height ${sheet.height} /BitsPerComponent 8 /Interpolate ${smooth}`;
      const mask = cover.some((each) => each < 255) ? ` /SMask ${await this.file.stream(`${size} /ColorSpace /DeviceGray`, cover)} 0 R` : "";
      await this.file.stream(`${size} /ColorSpace /DeviceRGB${mask}`, colours, object);
    }
    this.write("q");
    this.turn(width, 0, 0, -height, x, y + height);
    this.write(`${name} Do`, "Q");
  }

  /** Put the fonts into the file, and say what the page may name. */
  async resources() {
    for (const [i, face] of [...this.faces.values()].entries()) this.named.set(`Font /F${i}`, await embedded(this.file, face, i));
    const kinds = [...new Set([...this.named.keys()].map((key) => key.split(" ")[0]))];
    const of = (kind) => [...this.named].filter(([key]) => key.startsWith(`${kind} `)).map(([key, object]) => `${key.split(" ")[1]} ${object} 0 R`);
    return `<< ${kinds.map((kind) => `/${kind} << ${of(kind).join(" ")} >>`).join(" ")} >>`;
  }
}

/**
 * A figure that `paper.js` has made as a PDF, as large as on the page.
 * @param {{ svg: string, width: number, height: number }} figure
 * @param {string} title
 */
export async function pdfOf({ svg, width, height }, title) {
  // A page's policy lets no styles into attributes, also of what is only read.
  const text = svg.replace(/<[a-z][^<>]*>/gi, (tag) => tag.replaceAll(' style="', ' data-style="'));
  const drawing = new DOMParser().parseFromString(text, "image/svg+xml");
  const file = new PdfFile();
  const [catalog, pages, page, content] = Array.from({ length: 4 }, () => file.place());
  const sheet = new Sheet(file, drawing);
  const [wide, high] = [width * POINT, height * POINT];
  sheet.turn(POINT, 0, 0, -POINT, 0, high);
  await sheet.walk(drawing.documentElement, 1);
  const resources = await sheet.resources();
  file.put(`<< /Type /Catalog /Pages ${pages} 0 R /ViewerPreferences << /DisplayDocTitle true >> >>`, catalog);
  file.put(`<< /Type /Pages /Kids [${page} 0 R] /Count 1 >>`, pages);
  file.put(`<< /Type /Page /Parent ${pages} 0 R /MediaBox [0 0 ${short(wide)} ${short(high)}] /Group << /S /Transparency /CS /DeviceRGB >> /Contents ${content} 0 R /Resources ${resources} >>`, page);
  await file.stream("", bytesOf(sheet.lines.join("\n")), content);
  const about = file.put(`<< /Title <feff${utf16(title)}> /Creator (attention-workbench) >>`);
  return file.whole(`/Root ${catalog} 0 R /Info ${about} 0 R`);
}
