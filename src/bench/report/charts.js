// Roofline, memory-bound ops, time against T: one figure for each card.

const SHAPES = [
  (r) => `M${-r},0a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0z`,
  (r) => `M${-r * .9},${-r * .9}h${r * 1.8}v${r * 1.8}h${-r * 1.8}z`,
  (r) => `M0,${-r * 1.2}L${r * 1.15},${r * .8}H${-r * 1.15}z`,
  (r) => `M0,${-r * 1.25}L${r * 1.25},0L0,${r * 1.25}L${-r * 1.25},0z`,
  (r) => `M0,${r * 1.2}L${r * 1.15},${-r * .8}H${-r * 1.15}z`,
];

// The place of each series of the rows drawn, the same for all cards: eight have colours of their own.
let seriesAt = new Map();
function assignSigns(rows) {
  const drawn = new Set(rows.map((r) => r.series));
  seriesAt = new Map(seriesNames.filter((n) => drawn.has(n)).map((name, i) => [name, i]));
}

/** A series' sign: colour and shape together tell 40 apart. */
function mark(name, x, y, r, text) {
  const i = seriesAt.get(name);
  const node = svg("path", { class: `mark f${i % 8}`, d: SHAPES[i % 5](r), transform: `translate(${x.toFixed(1)},${y.toFixed(1)})` });
  if (text) node.append(svg("title", {}, text));
  return node;
}

function legend(names, extra = []) {
  const item = (name) => el("li", {}, svg("svg", { viewBox: "-7 -7 14 14", "aria-hidden": "true" }, mark(name, 0, 0, 5)), name);
  const dash = (text) => el("li", {}, svg("svg", { viewBox: "0 0 14 14", "aria-hidden": "true" }, svg("path", { class: "floor", d: "M0,7H14" })), text);
  return el("ul", { class: "legend" }, ...seriesNames.filter((n) => names.has(n)).map(item), ...extra.map(dash));
}

const median = (values) => {
  const sorted = values.filter((v) => v > 0).sort((a, b) => a - b);
  return sorted.length ? sorted[sorted.length >> 1] : 0;
};

/** Powers of ten within, with 2 and 5 if these are few. */
function logTicks(low, high) {
  const few = Math.log10(high / low) < 2.5;
  const ticks = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++) {
    for (const m of few ? [1, 2, 5] : [1]) ticks.push(Number((m * 10 ** e).toPrecision(3)));
  }
  return ticks.filter((t) => t >= low * .999 && t <= high * 1.001);
}

const tickText = (v) => (v >= 1e6 ? v / 1e6 + "M" : v >= 1e4 ? v / 1e3 + "k" : String(v));

/** An SVG with two axes. `x`, `y`: {low, high, label, log, ticks}. */
function frame(width, height, label, x, y, left = 52) {
  const box = { left, right: width - 14, top: 10, bottom: height - 38 };
  const scale = (axis, from, to) => {
    const f = axis.log ? Math.log10 : (v) => v;
    return (v) => from + ((f(v) - f(axis.low)) / (f(axis.high) - f(axis.low) || 1)) * (to - from);
  };
  const px = scale(x, box.left, box.right);
  const py = scale(y, box.bottom, box.top);
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  let last = -Infinity;
  for (const t of x.ticks) {
    root.append(svg("path", { class: "grid", d: `M${px(t)},${box.top}V${box.bottom}` }));
    const text = (x.text || tickText)(t);
    // A text that would lie on its neighbour is left out.
    if (px(t) - last < text.length * 7 + 6) continue;
    last = px(t);
    root.append(svg("text", { x: px(t), y: box.bottom + 14, "text-anchor": "middle" }, text));
  }
  for (const t of y.ticks) {
    root.append(svg("path", { class: "grid", d: `M${box.left},${py(t)}H${box.right}` }));
    root.append(svg("text", { x: box.left - 5, y: py(t) + 4, "text-anchor": "end" }, (y.text || tickText)(t)));
  }
  root.append(svg("text", { x: (box.left + box.right) / 2, y: height - 6, "text-anchor": "middle" }, x.label));
  if (y.label) root.append(svg("text", { transform: `translate(11,${(box.top + box.bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, y.label));
  return { root, px, py, box };
}

/** A figure whose marks tell their row below it too, where a finger or a pointer is. */
function figure(title, chart, names, extra) {
  const said = el("p", { class: "hover" }, "Point at a mark for its row.");
  const tell = (event) => {
    const text = event.target.closest && event.target.closest(".mark, .whisker");
    if (text && text.querySelector("title")) said.textContent = text.querySelector("title").textContent;
  };
  chart.addEventListener("pointerover", tell);
  chart.addEventListener("click", tell);
  return el("figure", {}, el("figcaption", {}, title), legend(names, extra), chart, said);
}

const chartWidth = (parent) => Math.max(300, Math.min(1200, parent.clientWidth || 900));

// ---- Roofline

const roofOp = select(byId("roof-controls"), "Op", drawRoof);
const roofModel = select(byId("roof-controls"), "Model", drawRoof);
roofOp.offer(unique(kernels.map((r) => r.op)).sort(byName), "all ops");
roofModel.offer(unique(kernels.map((r) => r.model)).sort(byName), "all models");

function drawRoof() {
  const parent = byId("roof");
  const chosen = kernels.filter((r) => (!roofOp.value || r.op === roofOp.value) && (!roofModel.value || r.model === roofModel.value));
  parent.replaceChildren();
  assignSigns(chosen);
  for (const card of cards) {
    const rows = chosen.filter((r) => r.card === card && r.median_us > 0);
    const products = rows.filter((r) => r.flops > 0 && r.bytes > 0);
    const moves = rows.filter((r) => !(r.flops > 0) && r.bytes > 0);
    const all = kernels.filter((r) => r.card === card);
    const copy = median(all.map((r) => r.copy_gb_per_s));
    const product = median(all.map((r) => r.product_tflop_per_s));
    if (products.length) parent.append(roofFigure(card, products, copy, product, chartWidth(parent)));
    if (moves.length) parent.append(moveFigure(card, moves, copy, chartWidth(parent)));
  }
  if (!parent.childNodes.length) parent.append(el("p", { class: "about" }, "No rows of this op and model."));
}

function roofFigure(card, rows, copy, product, width) {
  const xs = rows.map((r) => r.flops / r.bytes);
  const speed = (r) => (r.tflop_per_s > 0 ? r.tflop_per_s : r.flops / r.median_us / 1e6);
  const ys = rows.map(speed);
  const ridge = copy && product ? (product * 1000) / copy : 0;
  const x = { low: Math.min(...xs, ridge || Infinity) / 1.5, high: Math.max(...xs, ridge) * 1.5, log: true, label: "operations for each byte" };
  const y = { low: Math.min(...ys) / 1.5, high: Math.max(...ys, product) * 1.4, log: true, label: "TFLOP/s" };
  x.ticks = logTicks(x.low, x.high);
  y.ticks = logTicks(y.low, y.high);
  const { root, px, py, box } = frame(width, width < 600 ? 320 : 440, `Roofline of ${card}`, x, y);
  if (ridge) {
    // The slanted ceiling enters the frame at its left or its lower edge.
    const start = Math.max(x.low, (y.low * 1000) / copy);
    root.append(svg("path", { class: "ceiling", d: `M${px(start)},${py((start * copy) / 1000)}L${px(ridge)},${py(product)}H${box.right}` }));
    root.append(svg("text", { x: box.right - 4, y: py(product) - 5, "text-anchor": "end" }, `product ${show(product)} TFLOP/s`));
    const [ax, ay, bx, by] = [px(start), py((start * copy) / 1000), px(ridge), py(product)];
    const angle = (Math.atan2(by - ay, bx - ax) * 180) / Math.PI;
    root.append(svg("text", { transform: `translate(${(ax + bx) / 2},${(ay + by) / 2}) rotate(${angle}) translate(0,-6)`, "text-anchor": "middle" }, `copy ${show(copy)} GB/s`));
  }
  rows.forEach((row, i) => root.append(mark(row.series, px(xs[i]), py(ys[i]), rows.length > 500 ? 3 : 4.5, describe(row))));
  return figure(`${card || "unknown card"}: ${rows.length} rows with matrix products`, root, new Set(rows.map((r) => r.series)));
}

/** Ops that only move bytes: a line of dots for each op, or for each shape of one op. */
function moveFigure(card, rows, copy, width) {
  const line = (r) => (roofOp.value ? `${r.shape} ${r.model}` : r.op);
  const every = unique(rows.map(line)).sort(byName);
  const lines = every.slice(0, 60);
  const speed = (r) => (r.gb_per_s > 0 ? r.gb_per_s : r.bytes / r.median_us / 1e3);
  const high = Math.max(copy, ...rows.map(speed)) * 1.05;
  const step = [100, 200, 250, 500, 1000, 2000, 5000].find((s) => high / s <= (width < 600 ? 5 : 9)) || 10000;
  const x = { low: 0, high, label: "GB/s, bytes that must move at least once", ticks: [], text: (t) => t.toLocaleString("en") };
  for (let t = 0; t <= high; t += step) x.ticks.push(t);
  const narrow = width < 600;
  const at = new Map(lines.map((name, i) => [name, i]));
  const y = { low: lines.length - .4, high: -.7, ticks: [...at.values()], text: (i) => (narrow ? "" : lines[i].slice(0, 40)) };
  const left = narrow ? 10 : 30 + Math.max(...lines.map((n) => Math.min(40, n.length))) * 6.6;
  const { root, px, py, box } = frame(width, 60 + lines.length * (narrow ? 34 : 24), `Bytes a second of ${card}`, x, y, left);
  if (narrow) lines.forEach((name, i) => root.append(svg("text", { x: left + 2, y: py(i) - 8 }, name)));
  if (copy) {
    root.append(svg("path", { class: "ceiling", d: `M${px(copy)},${box.top}V${box.bottom}` }));
    root.append(svg("text", { x: px(copy) - 4, y: box.top + 8, "text-anchor": "end" }, `copy ${show(copy)} GB/s`));
  }
  for (const row of rows) if (at.has(line(row))) root.append(mark(row.series, px(speed(row)), py(at.get(line(row))), 4, describe(row)));
  const rest = every.length > lines.length ? `, ${every.length - lines.length} lines more: choose a model` : "";
  return figure(`${card || "unknown card"}: ${rows.length} rows that move bytes${rest}`, root, new Set(rows.map((r) => r.series)));
}

// ---- Time against T

// Curves need two numbers of tokens at least.
const timed = kernels.filter((r) => r.tokens > 0 && r.median_us > 0);
const keyOf = (r) => [r.op, r.model, r.group].join("\n");
const counts = new Map();
for (const r of timed) counts.set(keyOf(r), (counts.get(keyOf(r)) || new Set()).add(r.tokens));
const curved = timed.filter((r) => counts.get(keyOf(r)).size > 1);

const curveOp = select(byId("curve-controls"), "Op", drawCurves);
const curveModel = select(byId("curve-controls"), "Model", drawCurves);
const curveGroup = select(byId("curve-controls"), "Shape", drawCurves);
curveOp.offer(unique(curved.map((r) => r.op)).sort(byName));
curveModel.offer(unique(curved.map((r) => r.model)).sort(byName));
// At first the curves with the most rows: those with the most to compare.
const sizes = new Map();
for (const r of curved) sizes.set(keyOf(r), (sizes.get(keyOf(r)) || 0) + 1);
const widest = curved.reduce((best, r) => (!best || sizes.get(keyOf(r)) > sizes.get(keyOf(best)) ? r : best), null);
if (widest) {
  curveOp.value = widest.op;
  curveModel.value = widest.model;
}

function drawCurves() {
  const parent = byId("curve");
  parent.replaceChildren();
  const ofOp = curved.filter((r) => r.op === curveOp.value);
  curveModel.offer(unique(ofOp.map((r) => r.model)).sort(byName));
  const ofModel = ofOp.filter((r) => r.model === curveModel.value);
  curveGroup.offer(unique(ofModel.map((r) => r.group)).sort(byName));
  const chosen = ofModel.filter((r) => r.group === curveGroup.value);
  assignSigns(chosen);
  for (const card of cards) {
    const rows = chosen.filter((r) => r.card === card);
    if (rows.length) parent.append(curveFigure(card, rows, chartWidth(parent)));
  }
  if (!curved.length) parent.append(el("p", { class: "about" }, "No op was measured at two numbers of tokens."));
}

function curveFigure(card, rows, width) {
  const least = (r) => (r.least_us > 0 ? r.least_us : r.median_us);
  const most = (r) => (r.most_us > 0 ? r.most_us : r.median_us);
  const floors = new Map();
  for (const r of rows) if (r.floor_us > 0) floors.set(r.tokens, Math.min(r.floor_us, floors.get(r.tokens) || Infinity));
  const ts = unique(rows.map((r) => r.tokens)).sort((a, b) => a - b);
  const x = { low: ts[0] / 1.15, high: ts[ts.length - 1] * 1.15, log: true, ticks: ts, text: (t) => t.toLocaleString("en"), label: "tokens T" };
  const y = { low: Math.min(...rows.map(least), ...floors.values()) / 1.3, high: Math.max(...rows.map(most)) * 1.3, log: true, label: "µs" };
  y.ticks = logTicks(y.low, y.high);
  const { root, px, py } = frame(width, width < 600 ? 320 : 420, `Time against tokens on ${card}`, x, y);
  const path = (points) => points.map(([t, v], i) => `${i ? "L" : "M"}${px(t).toFixed(1)},${py(v).toFixed(1)}`).join("");
  if (floors.size) root.append(svg("path", { class: "floor", d: path(ts.filter((t) => floors.has(t)).map((t) => [t, floors.get(t)])) }));
  const names = new Set(rows.map((r) => r.series));
  for (const name of seriesNames.filter((n) => names.has(n))) {
    const colour = seriesAt.get(name) % 8;
    const of = rows.filter((r) => r.series === name).sort((a, b) => a.tokens - b.tokens);
    const band = path([...of.map((r) => [r.tokens, most(r)]), ...of.map((r) => [r.tokens, least(r)]).reverse()]);
    root.append(svg("path", { class: `band f${colour}`, d: band + "z" }));
    root.append(svg("path", { class: `curve s${colour}`, d: path(of.map((r) => [r.tokens, r.median_us])) }));
    for (const r of of) {
      root.append(svg("path", { class: `s${colour}`, d: `M${px(r.tokens)},${py(least(r))}V${py(most(r))}` }));
      root.append(mark(name, px(r.tokens), py(r.median_us), 4.5, describe(r)));
    }
  }
  return figure(card || "unknown card", root, names, floors.size ? ["floor"] : []);
}
