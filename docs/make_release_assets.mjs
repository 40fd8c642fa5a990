// What `make release-assets` runs: the views' modules, as Python joined them, in esbuild's smallest form.
//
//   python -c "from workbench.views.base import modules; modules.print_sources()" | node docs/make_release_assets.mjs
//
// Reads and writes JSON: for each module the digest of its file and its statement, see workbench/views/base/modules.py.

import { text } from "node:stream/consumers";
import { transform } from "esbuild";

const held = JSON.parse(await text(process.stdin));
for (const each of Object.values(held)) {
  each.code = (await transform(each.code, { minify: true, target: "es2022", charset: "utf8", legalComments: "none" })).code.trim();
}
process.stdout.write(`${JSON.stringify(held, null, 1)}\n`);
