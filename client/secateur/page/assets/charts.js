// Charts by Observable Plot, in the page's colours. A caption says in words what a chart shows.
const heat = d3.interpolateYlGnBu;

const WIDE = 900; // Pixels.
// Room for the labels of the axes.
const MARGINS = { marginLeft: 52, marginRight: 30, marginTop: 32, marginBottom: 44 };
const STYLE = { background: "transparent", color: "var(--ink)", fontSize: "12px", overflow: "visible" };

function figure(options, caption, className = "") {
  const chart = Plot.plot({ style: STYLE, ...options });
  const svg = chart.matches("svg") ? chart : chart.querySelector(":scope > svg");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", caption);
  // Plot labels its marks, which are parts of one image here.
  for (const mark of svg.querySelectorAll("[aria-label]")) mark.removeAttribute("aria-label");
  return make("figure", { className }, chart, make("figcaption", {}, caption));
}

const widthOf = (place) => Math.max(280, Math.min(WIDE, place.clientWidth || WIDE));

function drawHistogram(place, found) {
  if (!found.largest) return;
  const width = found.largest / found.kept.length;
  const bins = ["kept", "pruned"].flatMap((part) =>
    found[part].map((count, bin) => ({ part, count, low: bin * width, high: (bin + 1) * width })),
  );
  const hasPruned = found.pruned.some(Boolean);
  const marks = [
    Plot.rectY(bins, { x1: "low", x2: "high", y: "count", fill: "part", insetLeft: 0.5, insetRight: 0 }),
    Plot.ruleY([0], { stroke: "var(--line)" }),
  ];
  if (found.threshold !== null) {
    marks.push(
      Plot.ruleX([found.threshold], { stroke: "var(--mark)", strokeWidth: 2 }),
      Plot.text([found.threshold], {
        ...{ x: (at) => at, frameAnchor: "top", text: () => "threshold", dx: 5, dy: 2 },
        ...{ textAnchor: "start", fill: "var(--mark)", stroke: "var(--paper)", strokeWidth: 4 },
      }),
    );
  }
  const color = { domain: ["kept", "pruned"], range: ["var(--bar0)", "var(--bar1)"], legend: hasPruned };
  const options = { width: widthOf(place), height: 230, ...MARGINS, color, marks };
  const axes = { x: { label: "|w|" }, y: { label: "weights", tickFormat: "~s", grid: true } };
  place.append(figure({ ...options, ...axes }, histogramCaption(found)));
}

function histogramCaption(found) {
  const parts = [`Magnitudes of the weights, up to ${shown(found.largest, "")}`];
  if (found.threshold !== null) parts.push(`threshold ${shown(found.threshold, "")}`);
  if (found.zeros) parts.push(`${counts.format(found.zeros)} zeros are not drawn`);
  if (found.nonFinite) parts.push(`${counts.format(found.nonFinite)} infinite or NaN`);
  return `${parts.join("; ")}.`;
}

// A plan: what each amount removes; the chosen one is marked.
function drawCurve(place, { points, title }) {
  const section = make("section", {}, make("h2", {}, title));
  const box = make("div");
  section.append(box);
  place.append(section);
  const draw = (chosen) => {
    const point = points[chosen];
    const axis = { percent: true, grid: true, tickFormat: (tick) => `${tick}%` };
    const options = {
      ...{ width: widthOf(box), height: 320, ...MARGINS },
      x: { ...axis, label: "sparsity", zero: true },
      y: { ...axis, label: "norm removed", zero: true },
      marks: [
        Plot.lineY(points, { x: "sparsity", y: "norm", stroke: "var(--bar0)", strokeWidth: 2 }),
        Plot.dot(points, { x: "sparsity", y: "norm", fill: "var(--bar0)", r: 3 }),
        Plot.ruleX([point], { x: "sparsity", y2: "norm", y1: 0, stroke: "var(--mark)" }),
        Plot.dot([point], { x: "sparsity", y: "norm", stroke: "var(--mark)", strokeWidth: 3, r: 7 }),
        Plot.tip(points, Plot.pointer({ x: "sparsity", y: "norm", title: said, fill: "var(--paper)" })),
      ],
    };
    const others = `${points.length} amounts from ${percent(points[0].sparsity)} to ${percent(points.at(-1).sparsity)} sparsity.`;
    box.replaceChildren(figure(options, `Marked: ${said(point)} The line joins ${others}`));
  };
  const said = (point) =>
    `amount ${point.amount}: ${percent(point.sparsity)} sparse, ${percent(point.norm)} of the norm removed.`;
  const first = points.findIndex((point) => point.chosen);
  draw(Math.max(0, first));
  document.addEventListener("amount", ({ detail }) => {
    draw(points.findIndex((point) => point.amount === detail));
  });
}

// Two reports: a dot for each tensor.
function drawScatter(place, { points, labels, title, note }) {
  const axis = { percent: true, grid: true, domain: [0, 100], tickFormat: (tick) => `${tick}%` };
  const section = make("section", {}, make("h2", {}, title));
  place.append(section);
  const said = (point) =>
    `${point.name}\n${labels[0]}: ${percent(point.a)}\n${labels[1]}: ${percent(point.b)}`;
  const options = {
    ...{ width: widthOf(section), height: 400, ...MARGINS, inset: 14 }, // so that no dot covers a label
    x: { ...axis, label: labels[0] },
    y: { ...axis, label: labels[1] },
    r: { range: [2, 14] },
    marks: [
      Plot.link([0], { x1: 0, y1: 0, x2: 1, y2: 1, stroke: "var(--line)", strokeWidth: 2 }),
      Plot.dot(points, {
        ...{ x: "a", y: "b", r: "total", fill: "var(--bar0)", fillOpacity: 0.5 },
        stroke: "var(--bar0)",
      }),
      Plot.tip(points, Plot.pointer({ x: "a", y: "b", title: said, fill: "var(--paper)" })),
    ],
  };
  section.append(figure(options, note));
}

// Sensitivity: how much the tensors lose, as one line each.
function drawLines(place, { lines, title, note }) {
  const points = lines.flatMap(({ name, group, shares }) =>
    shares.map(([amount, share]) => ({ name, group, amount, share })),
  );
  const section = make("section", {}, make("h2", {}, title));
  place.append(section);
  const options = {
    ...{ width: widthOf(section), height: 340, ...MARGINS },
    x: { label: "amount", grid: true },
    y: { label: "norm removed", percent: true, grid: true, zero: true, tickFormat: (tick) => `${tick}%` },
    color: {
      ...{ domain: ["most sensitive", "least sensitive"], range: ["var(--bar1)", "var(--bar0)"] },
      legend: true,
    },
    marks: [
      Plot.line(points, { x: "amount", y: "share", z: "name", stroke: "group", strokeWidth: 2 }),
      Plot.tip(points, Plot.pointer({ x: "amount", y: "share", title: "name", fill: "var(--paper)" })),
    ],
  };
  section.append(figure(options, note));
}

const CHARTS = { curve: drawCurve, scatter: drawScatter, lines: drawLines };
