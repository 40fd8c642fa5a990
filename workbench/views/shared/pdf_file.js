// A PDF file: objects that name each other by number, and fonts with the text that their glyphs stand for.

import { trueType } from "./truetype.js";

/** @param {string} text */
export const bytesOf = (text) => new TextEncoder().encode(text);

/** A text as hexadecimal digits, as PDF takes all of Unicode. @param {string} text */
export const utf16 = (text) => Array.from({ length: text.length }, (_, i) => text.charCodeAt(i).toString(16).padStart(4, "0")).join("");

/** @param {Uint8Array} bytes */
async function deflated(bytes) {
  const stream = new Blob([/** @type {BlobPart} */ (bytes)]).stream().pipeThrough(new CompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** The objects of a file. */
export class PdfFile {
  /** @type {{ words: string, stream: Uint8Array | null }[]} */
  objects = [];

  /** Keep a place, for what others name before it is there. */
  place() {
    return this.objects.push({ words: "null", stream: null });
  }

  /** @param {string} words @param {number} [number] */
  put(words, number = this.place()) {
    this.objects[number - 1] = { words, stream: null };
    return number;
  }

  /** @param {string} words of its dictionary @param {Uint8Array} bytes @param {number} [number] */
  async stream(words, bytes, number = this.place()) {
    const stream = await deflated(bytes);
    this.objects[number - 1] = { words: `<< ${words} /Filter /FlateDecode /Length ${stream.length} >>`, stream };
    return number;
  }

  /** @param {string} trailer */
  whole(trailer) {
    /** @type {Uint8Array[]} */
    const parts = [bytesOf("%PDF-1.7\n%\u00e2\u00e3\n")];
    let length = parts[0].length;
    const add = (/** @type {Uint8Array} */ part) => {
      parts.push(part);
      length += part.length;
    };
    const starts = this.objects.map(({ words, stream }, i) => {
      const start = length;
      add(bytesOf(`${i + 1} 0 obj\n${words}\n`));
      if (stream) for (const part of [bytesOf("stream\n"), stream, bytesOf("\nendstream\n")]) add(part);
      add(bytesOf("endobj\n"));
      return start;
    });
    const table = starts.map((start) => `${`${start}`.padStart(10, "0")} 00000 n \n`).join("");
    const n = starts.length + 1;
    const end = length;
    add(bytesOf(`xref\n0 ${n}\n0000000000 65535 f \n${table}trailer\n<< /Size ${n} ${trailer} >>\nstartxref\n${end}\n%%EOF\n`));
    return new Blob(/** @type {BlobPart[]} */ (parts), { type: "application/pdf" });
  }
}

/**
 * Put a font into the file; the number of its object.
 * @param {PdfFile} file
 * @param {{ glyphs: (import("./truetype.js").Glyph & { text: string })[] }} face
 * @param {number} number which of the fonts of the file
 */
export async function embedded(file, { glyphs }, number) {
  const name = `/WORKBN+Figure${number}`;
  const bytes = trueType(glyphs);
  const own = await file.stream(`/Length1 ${bytes.length}`, bytes);
  const places = glyphs.flatMap(({ outlines }) => outlines.flat());
  const ends = [0, 1].map((axis) => places.reduce(([low, high], place) => [Math.min(low, place[axis]), Math.max(high, place[axis])], [0, 0]));
  const box = [ends[0][0], ends[1][0], ends[0][1], ends[1][1]];
  const about = file.put(`<< /Type /FontDescriptor /FontName ${name} /Flags 4 /FontBBox [${box.join(" ")}] /ItalicAngle 0 /Ascent ${box[3]} /Descent ${box[1]} /CapHeight ${box[3]} /StemV 80 /FontFile2 ${own} 0 R >>`);
  const widths = `[0 [${glyphs.map(({ advance }) => advance).join(" ")}]]`;
  const inner = file.put(`<< /Type /Font /Subtype /CIDFontType2 /BaseFont ${name} /CIDSystemInfo << /Registry (Adobe) /Ordering (Identity) /Supplement 0 >> /FontDescriptor ${about} 0 R /W ${widths} /CIDToGIDMap /Identity >>`);
  const pairs = glyphs.map(({ text }, i) => `<${i.toString(16).padStart(4, "0")}> <${utf16(text)}>`).slice(1);
  const blocks = Array.from({ length: Math.ceil(pairs.length / 100) }, (_, i) => pairs.slice(100 * i, 100 * i + 100)).map((some) => `${some.length} beginbfchar\n${some.join("\n")}\nendbfchar\n`);
  const map = `/CIDInit /ProcSet findresource begin 12 dict begin begincmap\n/CIDSystemInfo << /Registry (Adobe) /Ordering (UCS) /Supplement 0 >> def\n/CMapName /Adobe-Identity-UCS def /CMapType 2 def\n1 begincodespacerange\n<0000> <ffff>\nendcodespacerange\n${blocks.join("")}endcmap CMapName currentdict /CMap defineresource pop end end\n`;
  const texts = await file.stream("", bytesOf(map));
  return file.put(`<< /Type /Font /Subtype /Type0 /BaseFont ${name} /Encoding /Identity-H /DescendantFonts [${inner} 0 R] /ToUnicode ${texts} 0 R >>`);
}
