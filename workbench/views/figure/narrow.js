// A figure where there is little room: charts that stood side by side below each other, the legend below all of them.

const CHART = 240; // pixels that a chart needs
const PHONE = 560; // of the whole figure, below which a legend takes no room beside it
const GAP = 86; // between charts below each other, for ticks and titles

const axes = (layout, which) => Object.keys(layout).filter((name) => new RegExp(`^${which}axis\\d*$`).test(name));
const domain = (axis) => axis.domain ?? [0, 1];

/** The layout, or one that is taller where charts or a legend would have too little room beside each other. */
export function fitted(layout) {
  const placed = layout.width < PHONE ? below(layout) : layout;
  const charts = chartsOf(placed);
  const columns = new Set(charts.map(({ across }) => across[0])).size;
  return columns > 1 && layout.width / columns < CHART ? stacked(placed, charts) : placed;
}

/** The legend under the charts, unless the figure says where it stands. */
function below(layout) {
  const { x, y, orientation } = layout.legend ?? {};
  if (x !== undefined || y !== undefined || orientation !== undefined) return layout;
  return { ...layout, legend: { ...layout.legend, orientation: "h", x: 0, xanchor: "left", y: 0, yanchor: "bottom", yref: "container" } };
}

/** Each pair of axes with its place on the paper, row by row. */
function chartsOf(layout) {
  const found = axes(layout, "y").map((y) => {
    const x = `xaxis${(layout[y].anchor ?? "x").slice(1)}`;
    return { x, y, across: domain(layout[x] ?? {}), up: domain(layout[y]) };
  });
  return found.filter(({ x, y }) => layout[x] && !layout[y].overlaying).sort((a, b) => b.up[1] - a.up[1] || a.across[0] - b.across[0]);
}

function stacked(layout, charts) {
  const rows = new Set(charts.map(({ up }) => up[1])).size;
  const each = layout.height / rows;
  const height = charts.length * each;
  const share = (each - GAP) / (height - GAP);
  const step = (1 - share) / (charts.length - 1);
  const made = { ...layout, height };
  const places = charts.map((chart, i) => ({ ...chart, now: [1 - share - i * step, 1 - i * step] }));
  for (const { x, y, now } of places) {
    made[x] = { ...layout[x], domain: [0, 1], showticklabels: true };
    made[y] = { ...layout[y], domain: now.map((end) => Math.min(1, Math.max(0, end))), showticklabels: true };
  }
  made.annotations = layout.annotations?.map((note) => {
    const own = note.xref === "paper" && note.yref === "paper" ? places.find((place) => heads(note, place)) : undefined;
    return own ? { ...note, x: 0.5, y: own.now[1] } : note;
  });
  return made;
}

/** Whether a note stands above the middle of a chart, as its title. */
const heads = ({ x, y }, { across, up }) => Math.abs(x - (across[0] + across[1]) / 2) < 1e-6 && Math.abs(y - up[1]) < 1e-6;
