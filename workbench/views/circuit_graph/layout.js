// Where nodes stand: by head, compact, or by position. Layers go upwards, from the input to the logits.

export const CHIP = 24; // height of a node
const LEAST = 26; // between the middles of nodes beside each other
const SWEEPS = 8;

/**
 * Places of nodes: {spots: Map node -> {x, y}, step between neighbours, width, height, rows [{y, label}],
 * columns [{from, to, label}]}. name: "heads" (all nodes), "compact" or "positions" (the shown ones).
 */
export function arrange(shown, name, width, left) {
  return name === "heads" ? byHead(shown.circuit, width, left) : inRows(shown, name === "positions", width, left);
}

const between = (low, value, high) => Math.max(low, Math.min(high, value));

function byHead({ nodes, facts }, width, left) {
  const heads = 1 + Math.max(0, ...nodes.map(({ kind, number }) => (kind === "head" ? number : 0)));
  const columns = heads + (nodes.some(({ kind }) => kind === "mlp") ? 1.2 : 0);
  const step = between(LEAST, (width - left - 8) / columns, 96);
  const groups = nodes.some(({ kind }) => kind === "kv") ? 24 : 0;
  const tall = (facts.rows.length > 14 ? 48 : 58) + groups;
  const height = tall * (facts.rows.length + 2) + 8;
  const y = (layer) => height - tall * (layer + 1.5) - 4 - groups / 3;
  const spots = new Map();
  nodes.forEach(({ kind, number, layer, raised }, i) => {
    const alike = nodes.filter((node) => node.kind === kind && node.layer === layer);
    const column = kind === "mlp" ? heads + 0.2 : kind === "input" || kind === "logits" ? (heads * (alike.indexOf(nodes[i]) + 1)) / (alike.length + 1) - 0.5 : number;
    spots.set(i, { x: left + step * (column + 0.5), y: y(layer) + (kind === "kv" ? CHIP + 8 : raised ? -14 : 0) });
  });
  return { spots, step, width: left + step * columns + 8, height, rows: facts.rows.map((label, i) => ({ y: y(i), label })), columns: [] };
}

/** Rows of shown nodes, the lowest first: in a layer the kv groups, then the others. */
function rowsOf({ circuit, nodes }) {
  const found = new Map();
  for (const node of [...nodes].sort((x, y) => x - y)) {
    const { layer, kind } = circuit.nodes[node];
    const at = 2 * layer + (kind === "kv" ? 0 : 1);
    found.set(at, [...(found.get(at) ?? []), node]);
  }
  return [...found].sort(([x], [y]) => x - y).map(([, members]) => members);
}

/** Rows in blocks beside each other: one for all heads, or one for each position at which path patching patched; and MLPs. */
function inRows(shown, positions, width, left) {
  const { circuit } = shown;
  const { facts, nodes } = circuit;
  const names = [...(positions ? [...facts.positions, "no position"] : [""]), ""];
  const columnOf = (node) => (nodes[node].kind === "mlp" ? names.length - 1 : positions ? (nodes[node].position ?? names.length - 2) : 0);
  const rows = rowsOf(shown);
  const blocks = names.map((label, i) => ({ label, size: 0, from: 0, to: 0, place() {}, rows: rows.map((members) => members.filter((node) => columnOf(node) === i)) }));
  const used = blocks.filter((block) => block.rows.some(({ length }) => length));
  for (const block of used) block.size = Math.max(...block.rows.map(({ length }) => length)) + (positions ? 0.5 : 0);
  const total = used.reduce((sum, { size }) => sum + size, 0);
  const step = between(LEAST, (width - left - 8) / total, positions ? 120 : 96);
  const tall = between(46, 520 / rows.length, 72);
  const head = positions ? 24 : 0;
  const height = tall * rows.length + head + 8;
  const y = (row) => height - tall * (row + 0.5) - 4;
  const spots = new Map();
  let from = left;
  for (const block of used) {
    Object.assign(block, { from, to: from + step * block.size });
    const middle = (block.from + block.to) / 2;
    block.place = () => block.rows.forEach((members, row) => members.forEach((node, i) => spots.set(node, { x: middle + step * (i - (members.length - 1) / 2), y: y(row) - (nodes[node].raised ? 14 : 0) })));
    block.place();
    from = block.to;
  }
  uncross(shown, used, spots);
  const labels = rows.map(([first], i) => ({ y: y(i), label: facts.rows[nodes[first].layer] !== facts.rows[nodes[rows[i - 1]?.[0]]?.layer] ? (facts.rows[nodes[first].layer] ?? "") : "" }));
  return { spots, step, width: Math.max(from + 8, 240), height, rows: labels, columns: positions ? used : [] };
}

/** Put the nodes of each row in the order of the middles of their neighbours, which leaves fewer crossings. */
function uncross({ circuit, nodes, edges }, blocks, spots) {
  const near = new Map([...nodes].map((node) => [node, []]));
  const join = (x, y, weight) => {
    near.get(x)?.push([y, weight]);
    near.get(y)?.push([x, weight]);
  };
  for (const edge of edges) join(circuit.start(edge), circuit.end(edge), 0.05 + circuit.strength(edge));
  for (const group of nodes) for (const head of circuit.nodes[group].feeds) if (nodes.has(head)) join(group, head, 0.5);
  const pull = (node) => {
    const joined = near.get(node);
    const total = joined.reduce((sum, [, weight]) => sum + weight, 0);
    return total ? joined.reduce((sum, [other, weight]) => sum + weight * spots.get(other).x, 0) / total : spots.get(node).x;
  };
  for (let sweep = 0; sweep < SWEEPS; sweep++) {
    for (const block of blocks) {
      for (const members of sweep % 2 ? [...block.rows].reverse() : block.rows) {
        const to = new Map(members.map((node) => [node, pull(node)]));
        members.sort((x, y) => to.get(x) - to.get(y) || x - y);
        block.place();
      }
    }
  }
}
