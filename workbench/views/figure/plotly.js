// plotly, once per document: on a page its script stands before ours, in a notebook the kernel hands it over.

const PLOTLY_KEY = Symbol.for("workbench.plotly");

/** plotly; every view of the document shares one promise. */
export async function plotlyFor(frame) {
  for (;;) {
    const asked = globalThis[PLOTLY_KEY] === undefined;
    globalThis[PLOTLY_KEY] ??= loadPlotly(frame);
    const shared = globalThis[PLOTLY_KEY];
    try {
      return await shared;
    } catch (error) {
      if (globalThis[PLOTLY_KEY] === shared) delete globalThis[PLOTLY_KEY];
      if (asked) throw error; // the view that asked is gone, or its kernel is: any other asks for itself
    }
  }
}

async function loadPlotly(frame) {
  if (!frame.live) {
    if (!globalThis.Plotly) throw new Error("the page holds no plotly");
    return globalThis.Plotly;
  }
  const { buffers } = await frame.ask({ ask: "plotly" });
  const source = new TextDecoder().decode(buffers[0]);
  // As a CommonJS module, so that no AMD loader takes it; it sets a global of its own all the same.
  const before = Object.getOwnPropertyDescriptor(globalThis, "Plotly");
  const module = { exports: {} };
  new Function("module", "exports", "define", source)(module, module.exports, undefined);
  if (before) Object.defineProperty(globalThis, "Plotly", before);
  else delete globalThis.Plotly;
  return module.exports;
}
