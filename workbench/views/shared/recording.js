// What is drawn on a canvas, as SVG: the canvas's context is wrapped while a view draws itself once more.

/** @param {string} text */
export const escaped = (text) => text.replace(/(?![\t\n\r])[\p{Cc}\p{Cs}\ufffe\uffff]/gu, "").replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;").replaceAll('"', "&quot;");

const short = (/** @type {number} */ n) => `${Number(n.toFixed(2))}`;
const ANCHORS = { left: "start", start: "start", center: "middle", right: "end", end: "end" };
let clips = 0;

/** Records one canvas. `take()` gives its drawing as SVG elements in pixels of the canvas, or null where it cannot. */
export class Recording {
  /** @param {HTMLCanvasElement} canvas */
  constructor(canvas) {
    this.canvas = canvas;
    /** @type {string[]} */
    this.drawn = [];
    this.path = "";
    /** @type {(string | null)[]} */
    this.stack = [];
    /** @type {string | null} */
    this.clip = null;
    this.failed = false;
    this.ink = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
    const wrapped = new Proxy(this.ink, {
      get: (ink, name) => {
        const value = Reflect.get(ink, name, ink);
        if (typeof value !== "function") return value;
        return (/** @type {any[]} */ ...given) => {
          const own = /** @type {any} */ (this)[`on_${String(name)}`];
          if (own) own.apply(this, given);
          return value.apply(ink, given);
        };
      },
      set: (ink, name, value) => Reflect.set(ink, name, value, ink),
    });
    this.watchSize();
    Object.defineProperty(canvas, "getContext", { configurable: true, value: (/** @type {string} */ kind) => (kind === "2d" ? wrapped : null) });
  }

  /** A canvas whose size is set is empty again. */
  watchSize() {
    for (const name of ["width", "height"]) {
      const own = /** @type {PropertyDescriptor} */ (Object.getOwnPropertyDescriptor(HTMLCanvasElement.prototype, name));
      const set = (/** @type {number} */ value) => {
        Object.assign(this, { drawn: [], stack: [], clip: null, path: "" });
        own.set?.call(this.canvas, value);
      };
      Object.defineProperty(this.canvas, name, { configurable: true, get: () => own.get?.call(this.canvas), set });
    }
  }

  take() {
    for (const name of ["getContext", "width", "height"]) Reflect.deleteProperty(this.canvas, name);
    return this.failed || !this.drawn.length ? null : this.drawn.join("");
  }

  /** @param {number} x @param {number} y */
  at(x, y) {
    const { a, b, c, d, e, f } = this.ink.getTransform();
    return `${short(a * x + c * y + e)} ${short(b * x + d * y + f)}`;
  }

  get scale() {
    const { a, b } = this.ink.getTransform();
    return Math.hypot(a, b);
  }

  /** @param {string} element what it is, without its end @param {string} [inside] */
  add(element, inside) {
    const alpha = this.ink.globalAlpha === 1 ? "" : ` opacity="${this.ink.globalAlpha}"`;
    const clip = this.clip ? ` clip-path="url(#${this.clip})"` : "";
    if (this.ink.globalCompositeOperation !== "source-over") this.failed = true;
    const made = `${element}${alpha}${inside === undefined ? "/>" : `>${inside}</${element.slice(1, element.indexOf(" "))}>`}`;
    this.drawn.push(clip ? `<g${clip}>${made}</g>` : made);
  }

  /** @param {string | CanvasGradient | CanvasPattern} style */
  paint(style) {
    if (typeof style !== "string") this.failed = true;
    return escaped(`${style}`);
  }

  strokes() {
    const { ink } = this;
    const dashes = ink.getLineDash().map((each) => short(each * this.scale));
    const dashed = dashes.length ? ` stroke-dasharray="${dashes.join(" ")}"` : "";
    return `fill="none" stroke="${this.paint(ink.strokeStyle)}" stroke-width="${short(ink.lineWidth * this.scale)}" stroke-linecap="${ink.lineCap}" stroke-linejoin="${ink.lineJoin}"${dashed}`;
  }

  /** @param {number} x @param {number} y @param {number} width @param {number} height */
  box(x, y, width, height) {
    return `M${this.at(x, y)}L${this.at(x + width, y)}L${this.at(x + width, y + height)}L${this.at(x, y + height)}Z`;
  }

  on_save() {
    this.stack.push(this.clip);
  }

  on_restore() {
    if (this.stack.length) this.clip = this.stack.pop() ?? null;
  }

  on_clip() {
    const name = `clip-${++clips}`;
    const outer = this.clip ? ` clip-path="url(#${this.clip})"` : "";
    this.drawn.push(`<clipPath id="${name}"${outer}><path d="${this.path}"/></clipPath>`);
    this.clip = name;
  }

  on_clearRect(/** @type {number} */ x, /** @type {number} */ y, /** @type {number} */ width, /** @type {number} */ height) {
    const { a, d, e, f } = this.ink.getTransform();
    const all = a * x + e <= 0 && d * y + f <= 0 && a * width >= this.canvas.width - 1 && d * height >= this.canvas.height - 1;
    if (all) this.drawn = [];
    else if (this.drawn.length) this.failed = true; // a drawing has nothing that takes ink away
  }

  on_beginPath() {
    this.path = "";
  }

  on_moveTo(/** @type {number} */ x, /** @type {number} */ y) {
    this.path += `M${this.at(x, y)}`;
  }

  on_lineTo(/** @type {number} */ x, /** @type {number} */ y) {
    this.path += `${this.path ? "L" : "M"}${this.at(x, y)}`;
  }

  on_bezierCurveTo(/** @type {number[]} */ ...p) {
    this.path += `C${this.at(p[0], p[1])} ${this.at(p[2], p[3])} ${this.at(p[4], p[5])}`;
  }

  on_quadraticCurveTo(/** @type {number[]} */ ...p) {
    this.path += `Q${this.at(p[0], p[1])} ${this.at(p[2], p[3])}`;
  }

  on_closePath() {
    this.path += "Z";
  }

  on_rect(/** @type {number} */ x, /** @type {number} */ y, /** @type {number} */ width, /** @type {number} */ height) {
    this.path += this.box(x, y, width, height);
  }

  on_roundRect(/** @type {number} */ x, /** @type {number} */ y, /** @type {number} */ width, /** @type {number} */ height, /** @type {number} */ radius) {
    const r = Math.min(Number(radius), width / 2, height / 2);
    const turn = (/** @type {number} */ u, /** @type {number} */ v) => `A${short(r * this.scale)} ${short(r * this.scale)} 0 0 1 ${this.at(u, v)}`;
    this.path += `M${this.at(x + r, y)}L${this.at(x + width - r, y)}${turn(x + width, y + r)}L${this.at(x + width, y + height - r)}${turn(x + width - r, y + height)}L${this.at(x + r, y + height)}${turn(x, y + height - r)}L${this.at(x, y + r)}${turn(x + r, y)}Z`;
  }

  on_arc(/** @type {number} */ x, /** @type {number} */ y, /** @type {number} */ r, /** @type {number} */ from, /** @type {number} */ to, back = false) {
    const steps = 24; // as a line of many short ones, whatever the transform is
    const round = 2 * Math.PI;
    let sweep = to - from;
    if (Math.abs(sweep) >= round) sweep = back ? -round : round;
    else if (!back && sweep < 0) sweep += round;
    else if (back && sweep > 0) sweep -= round;
    for (let i = 0; i <= steps; i++) {
      const angle = from + (sweep * i) / steps;
      this.path += `${i || this.path ? "L" : "M"}${this.at(x + r * Math.cos(angle), y + r * Math.sin(angle))}`;
    }
  }

  on_ellipse() {
    this.failed = true;
  }

  on_fill(/** @type {unknown} */ shape) {
    if (shape instanceof Path2D) this.failed = true;
    if (this.path) this.add(`<path d="${this.path}" fill="${this.paint(this.ink.fillStyle)}"${shape === "evenodd" ? ' fill-rule="evenodd"' : ""}`);
  }

  on_stroke(/** @type {unknown} */ shape) {
    if (shape instanceof Path2D) this.failed = true;
    if (this.path) this.add(`<path d="${this.path}" ${this.strokes()}`);
  }

  on_fillRect(/** @type {number} */ x, /** @type {number} */ y, /** @type {number} */ width, /** @type {number} */ height) {
    this.add(`<path d="${this.box(x, y, width, height)}" fill="${this.paint(this.ink.fillStyle)}"`);
  }

  on_strokeRect(/** @type {number} */ x, /** @type {number} */ y, /** @type {number} */ width, /** @type {number} */ height) {
    this.add(`<path d="${this.box(x, y, width, height)}" ${this.strokes()}`);
  }

  on_fillText(/** @type {string} */ text, /** @type {number} */ x, /** @type {number} */ y) {
    const { ink } = this;
    const metrics = ink.measureText(text);
    const size = Number(/([\d.]+)px/.exec(ink.font)?.[1] ?? 10);
    const drop = { middle: 0.35, top: 0.8, hanging: 0.8, bottom: -0.2, ideographic: -0.2, alphabetic: 0 }[ink.textBaseline] ?? 0;
    const down = "alphabeticBaseline" in metrics ? -Number(metrics.alphabeticBaseline) : drop * size;
    const { a, b, c, d, e, f } = ink.getTransform();
    const where = `transform="matrix(${[a, b, c, d, e, f].map((n) => Number(n.toFixed(4))).join(" ")})" x="${short(x)}" y="${short(y + down)}"`;
    const anchor = ANCHORS[ink.textAlign] ?? "start";
    this.add(`<text ${where} text-anchor="${anchor}" fill="${this.paint(ink.fillStyle)}" style="font:${escaped(ink.font)};white-space:pre"`, escaped(`${text}`));
  }

  on_strokeText() {} // a halo around a text, which stands below it

  on_drawImage(/** @type {CanvasImageSource} */ source, /** @type {number[]} */ ...p) {
    const whole = /** @type {HTMLCanvasElement} */ (source);
    const [sx, sy, sw, sh, x, y, w, h] = p.length === 8 ? p : [0, 0, whole.width, whole.height, p[0], p[1], p[2] ?? whole.width, p[3] ?? whole.height];
    if (!(sw > 0 && sh > 0)) return;
    this.image(part(source, sx, sy, sw, sh), x, y, w, h, this.ink.getTransform());
  }

  on_putImageData(/** @type {ImageData} */ image, /** @type {number} */ x, /** @type {number} */ y) {
    const sheet = document.createElement("canvas");
    Object.assign(sheet, { width: image.width, height: image.height });
    sheet.getContext("2d")?.putImageData(image, 0, 0);
    this.image(sheet, x, y, image.width, image.height, new DOMMatrix());
  }

  /** @param {HTMLCanvasElement} sheet @param {number} x @param {number} y @param {number} w @param {number} h @param {DOMMatrix} by */
  image(sheet, x, y, w, h, { a, b, c, d, e, f }) {
    const sharp = this.ink.imageSmoothingEnabled ? "" : ' style="image-rendering:pixelated"';
    this.add(`<image transform="matrix(${[a, b, c, d, e, f].map((n) => Number(n.toFixed(4))).join(" ")})" x="${short(x)}" y="${short(y)}" width="${short(w)}" height="${short(h)}" preserveAspectRatio="none" href="${sheet.toDataURL()}"${sharp}`);
  }
}

/** @param {CanvasImageSource} source @param {number} x @param {number} y @param {number} width @param {number} height */
function part(source, x, y, width, height) {
  const sheet = document.createElement("canvas");
  Object.assign(sheet, { width: Math.max(1, Math.round(width)), height: Math.max(1, Math.round(height)) });
  sheet.getContext("2d")?.drawImage(source, x, y, width, height, 0, 0, sheet.width, sheet.height);
  return sheet;
}
