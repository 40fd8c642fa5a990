// A circuit's numbers: which edges and nodes a threshold keeps, what goes in and out of a node, what is kept of the effect.

/** What a choice shows: `nodes` and `edges` of the graph, and how many nodes were `chosen`. */
class Shown {
  constructor(circuit, nodes, edges, chosen = nodes.size) {
    this.circuit = circuit;
    this.nodes = nodes;
    this.edges = edges;
    this.chosen = chosen;
    this.ends = [new Map(), new Map()];
    const add = (map, node, edge) => (map.has(node) ? map.get(node).push(edge) : map.set(node, [edge]));
    for (const edge of edges) {
      add(this.ends[0], circuit.start(edge), edge);
      add(this.ends[1], circuit.end(edge), edge);
    }
  }

  sorted(map, nodes) {
    return nodes.flatMap((node) => map.get(node) ?? []).sort((x, y) => this.circuit.strength(y) - this.circuit.strength(x) || x - y);
  }

  /** Edges into a node, strongest first; of a head also those into the keys and values of its group. */
  into(node) {
    return this.sorted(this.ends[1], [node, ...this.circuit.groups(node)]);
  }

  out(node) {
    return this.sorted(this.ends[0], [node]);
  }

  /** The node that a step along the strongest edge leads to, towards the logits or the input; null where there is none. */
  step(node, up) {
    const { circuit } = this;
    const [edge] = up ? this.out(node) : this.into(node);
    if (edge !== undefined) return up ? circuit.end(edge) : circuit.start(edge);
    // A kv group sends nothing itself: on to the strongest of its heads.
    return up ? circuit.strongest(circuit.nodes[node].feeds.filter((head) => this.nodes.has(head))) : null;
  }
}

const NONE = new Uint32Array(0);

export class Circuit {
  // The blocks of a spec, by their names.
  senders = NONE;
  receivers = NONE;
  feeds = NONE;
  rank = NONE;
  signed_rank = NONE;
  members = NONE;
  node_members = NONE;
  shared = NONE;
  scores = new Float64Array(0);
  node_scores = new Float64Array(0);

  /** circuits: which of them are looked at, one or two. */
  constructor({ facts, blocks }, circuits) {
    this.facts = facts;
    this.circuits = circuits;
    this.nodes = facts.nodes;
    this.several = facts.circuits.length > 1;
    for (const [name, { data }] of Object.entries(blocks)) this[name] = data;
    this.edges = Array.from(this.senders, (_, edge) => edge);
    this.fed = facts.receivers.map(() => []);
    for (let i = 0; i < this.feeds.length; i += 2) this.fed[this.feeds[i]].push(this.feeds[i + 1]);
    this.largest = facts.circuits.map((_, i) => this.edges.reduce((most, edge) => Math.max(most, Math.abs(this.score(edge, i)) || 0), 0));
    this.scored = this.largest.some((size) => size > 0);
  }

  kind(node) {
    return this.nodes[node].kind;
  }

  start(edge) {
    return this.senders[edge];
  }

  receiver(edge) {
    return this.facts.receivers[this.receivers[edge]];
  }

  end(edge) {
    return this.receiver(edge).node;
  }

  score(edge, circuit = 0) {
    return this.scores[circuit * this.senders.length + edge];
  }

  nodeScore(node, circuit = 0) {
    return this.node_scores[circuit * this.nodes.length + node];
  }

  /** |score| as a share of the largest one of its circuit, the larger one of two circuits. */
  strength(edge) {
    return Math.max(...this.circuits.map((i) => Math.abs(this.score(edge, i)) / this.largest[i] || 0));
  }

  strongest(nodes) {
    const size = (node) => Math.max(...this.circuits.map((i) => Math.abs(this.nodeScore(node, i)) || 0));
    return nodes.reduce((best, node) => (best === null || size(node) > size(best) ? node : best), null);
  }

  /** The kv groups that a head computes with. */
  groups(head) {
    return this.nodes.flatMap(({ feeds }, node) => (feeds.includes(head) ? [node] : []));
  }

  where(test) {
    return new Set(this.nodes.flatMap((_, node) => (test(node) ? [node] : [])));
  }

  ends(edges) {
    return new Set(edges.flatMap((edge) => [this.start(edge), this.end(edge)]));
  }

  /** Edges or nodes, highest first. */
  rankBy(by) {
    return by === "signed" ? this.signed_rank : this.rank;
  }

  /** The circuit as it was found, or the n highest by magnitude ("absolute") or signed score. */
  choose(by, n) {
    if (by === "found") return new Shown(this, this.where((node) => this.node_members[node]), this.edges.filter((edge) => this.members[edge]));
    const first = Array.from(this.rankBy(by).subarray(0, n));
    if (this.facts.level === "edge") {
      const edges = this.pruned(first);
      return new Shown(this, this.ends(edges), edges);
    }
    const chosen = new Set(first);
    const reads = (node) => chosen.has(node) || this.kind(node) === "logits" || this.nodes[node].feeds.some((head) => chosen.has(head));
    const edges = this.edges.filter((edge) => !Number.isNaN(this.score(edge)) && chosen.has(this.start(edge)) && reads(this.end(edge)));
    return new Shown(this, new Set([...chosen, ...this.ends(edges)]), edges, chosen.size);
  }

  /** Without the edges that lead nowhere or come from nowhere: what remains lies on a path from an input to the logits. */
  pruned(edges) {
    for (;;) {
      const into = this.where((node) => this.kind(node) === "input");
      for (const edge of edges) for (const node of this.fed[this.receivers[edge]]) into.add(node);
      const alive = new Set(edges.map((edge) => this.start(edge)).filter((node) => into.has(node)));
      const read = this.facts.receivers.map(({ node }, i) => this.kind(node) === "logits" || this.fed[i].some((each) => alive.has(each)));
      const kept = edges.filter((edge) => alive.has(this.start(edge)) && read[this.receivers[edge]]);
      if (kept.length === edges.length) return kept;
      edges = kept;
    }
  }

  // Two circuits: an edge or node is "shared", only in "a", only in "b", or in neither (null).

  kindIn(members, width, item) {
    const [inA, inB] = this.circuits.map((i) => members[i * width + item]);
    return inA && inB ? "shared" : inA ? "a" : inB ? "b" : null;
  }

  edgeKind(edge) {
    return this.kindIn(this.members, this.senders.length, edge);
  }

  nodeKind(node) {
    return this.kindIn(this.node_members, this.nodes.length, node);
  }

  /** Edges that are in one of the two, strongest first. */
  union() {
    const edges = this.edges.filter((edge) => this.edgeKind(edge));
    return this.scored ? edges.sort((x, y) => this.strength(y) - this.strength(x)) : edges;
  }

  /** What is in one of the two, less the hidden kinds; of edges the first n, and the nodes at their ends. */
  compare(union, n, hidden) {
    const edges = union.slice(0, n).filter((edge) => !hidden.has(this.edgeKind(edge)));
    const items = this.where((node) => this.nodeKind(node) && !hidden.has(this.nodeKind(node)));
    return new Shown(this, this.facts.unit === "edges" ? this.ends(edges) : items, edges);
  }

  /** How many items are shared, only in A, only in B. */
  counts() {
    const [a, b] = this.circuits;
    const at = (x, y) => this.shared[x * this.largest.length + y];
    return { shared: at(a, b), a: at(a, a) - at(a, b), b: at(b, b) - at(a, b) };
  }

  /**
   * What the n highest keep of the effect: {at: "measured", share, low, high}; {at: "between", share, sizes}, on a straight
   * line over the logarithm of the size; {at: "outside", sizes}; {at: "unknown"} of a choice that has no size; or {at: "undefined"}, {at: "never"}.
   */
  kept(by, n) {
    const { curve, found } = this.facts;
    if (!curve) return { at: "never" };
    if (by === "found") return found.n === null ? { at: "unknown" } : this.kept(found.by, found.n);
    if (curve.undefined) return { at: "undefined" };
    const { sizes, shares, low, high } = curve[by];
    const i = sizes.findIndex((size) => size >= n);
    if (sizes[i] === n) return { at: "measured", share: shares[i], low: low[i], high: high[i] };
    if (i <= 0) return { at: "outside", sizes: [sizes[0], sizes.at(-1)] };
    const way = Math.log(n / sizes[i - 1]) / Math.log(sizes[i] / sizes[i - 1]);
    return { at: "between", share: shares[i - 1] + way * (shares[i] - shares[i - 1]), sizes: [sizes[i - 1], sizes[i]] };
  }
}
