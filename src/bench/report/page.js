// The rows, and what charts and table share. Text of rows only ever becomes text nodes and attributes.

const byId = (id) => document.getElementById(id);

/** Rows as objects: see data.rs for the columns. */
function unpack({ rows, columns }) {
  const list = Array.from({ length: rows }, () => ({}));
  for (const [name, column] of Object.entries(columns)) {
    const at = column.names ? column.at.map((i) => column.names[i]) : column;
    at.forEach((value, i) => { list[i][name] = value; });
  }
  return list;
}

const kernels = unpack(JSON.parse(byId("data").textContent));
const unique = (list) => [...new Set(list)];
const collator = new Intl.Collator("en", { numeric: true });
const byName = (a, b) => collator.compare(String(a), String(b));

// A series is a tool and an implementation; of several commits of a tool, each is its own.
const commits = new Map();
for (const row of kernels) commits.set(row.tool, (commits.get(row.tool) || new Set()).add(row.commit));
for (const row of kernels) {
  const own = row.tool === "halfbyte";
  row.series = (own ? row.implementation : row.tool + " " + row.implementation) || "–";
  if (commits.get(row.tool).size > 1) row.series += " @ " + (row.commit || "unknown");
}
// halfbyte first: the first colours are the strongest.
const own = new Set(kernels.filter((r) => r.tool === "halfbyte").map((r) => r.series));
const seriesNames = unique(kernels.map((r) => r.series)).sort((a, b) => own.has(b) - own.has(a) || byName(a, b));
const cards = unique(kernels.map((r) => r.card)).sort(byName);

/** "13,490", "169.8", "3.72", "0.0124"; "–" for what was not measured. */
function show(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1000) return value.toLocaleString("en", { maximumFractionDigits: 0 });
  return size >= 100 ? value.toFixed(1) : String(Number(value.toPrecision(3)));
}
const measured = (value) => (value > 0 ? show(value) : "–");
const whole = (value) => (Number.isFinite(value) ? value.toLocaleString("en") : "–");
const percent = (value) => (Number.isFinite(value) ? `${Math.round(100 * value)} %` : "–");

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}
const el = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

/** A labelled select; `change` runs on every choice. */
function select(parent, label, change) {
  const box = el("select", { onchange: change });
  parent.append(el("label", {}, label, box));
  return {
    get value() { return box.value; },
    set value(choice) { box.value = choice; },
    /** Offers these; keeps the choice if it is among them. `any` is offered first as "". */
    offer(values, any) {
      const before = box.value;
      const options = any ? [["", any]] : [];
      for (const value of values) options.push([value, value || "–"]);
      box.replaceChildren(...options.map(([value, text]) => el("option", { value }, text)));
      if (options.some(([value]) => value === before)) box.value = before;
    },
  };
}

/** What is said of a row where the pointer is. */
function describe(row) {
  const parts = [
    `${row.op}, ${row.shape}, ${row.model || "–"}: ${row.series}`,
    `${show(row.median_us)} µs (${show(row.least_us)}–${show(row.most_us)})`,
  ];
  if (row.tflop_per_s > 0) parts.push(`${show(row.tflop_per_s)} TFLOP/s`);
  if (row.gb_per_s > 0) parts.push(`${show(row.gb_per_s)} GB/s`);
  if (row.percent_of_floor > 0) parts.push(`${show(row.percent_of_floor)} % of the floor`);
  if (row.registers > 0) parts.push(`${row.registers} registers, occupancy ${percent(row.occupancy)}`);
  return parts.join(" · ");
}

const debounced = (run, ms) => {
  let timer = 0;
  return () => { clearTimeout(timer); timer = setTimeout(run, ms); };
};

for (const section of document.querySelectorAll(".scripted")) section.hidden = false;
