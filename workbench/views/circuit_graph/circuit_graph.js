// Circuit graph: the nodes of a circuit by layer and the edges between them; or of two circuits, what they share.

import { CircuitView } from "./view.js";
import { open } from "workbench/shared/frame.js";

export async function render({ model, el }) {
  const frame = await open({ model, el });
  new CircuitView(frame, frame.facts.circuits.length > 1 ? [0, 1] : [0]);
  return () => frame.close();
}
