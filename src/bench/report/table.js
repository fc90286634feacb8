// The table of all kernels: filtered and sorted whole, rows made as they scroll into view.

const COLUMNS = [
  ["op", "op"], ["shape", "shape"], ["model", "model"], ["T", "tokens", whole], ["tool", "tool"], ["implementation", "implementation"],
  ["µs", "median_us", show], ["least", "least_us", measured], ["most", "most_us", measured], ["floor, µs", "floor_us", measured],
  ["% of floor", "percent_of_floor", measured], ["GB/s", "gb_per_s", measured], ["TFLOP/s", "tflop_per_s", measured],
  ["kernels", "launches", whole], ["registers", "registers", whole], ["local, B", "local_bytes", whole], ["shared, B", "shared_bytes", whole],
  ["occupancy", "occupancy", percent], ["SM MHz", "sm_mhz", whole], ["checked", "checked", (count) => (count > 0 ? whole(count) : "–")], ["card", "card"], ["commit", "commit"], ["date", "date"],
];
const CHUNK = 150;

const text = el("input", { type: "search", placeholder: "words, all must occur", oninput: debounced(filter, 120) });
byId("table-controls").append(el("label", {}, "Text", text));
const filters = [["Op", "op", "all ops"], ["Model", "model", "all models"], ["Implementation", "series", "all"]].map(([label, key, any]) => {
  const box = select(byId("table-controls"), label, filter);
  box.offer(unique(kernels.map((r) => r[key])).sort(byName), any);
  return [box, key];
});

// Made once: searching 3,000 rows must not join their cells at each key.
for (const row of kernels) row.words = COLUMNS.map(([, key]) => row[key] ?? "").join(" ").toLowerCase();

let sorted = { column: null, down: false };
let visible = [];
const body = el("tbody");
const heads = COLUMNS.map(([name, key, number]) =>
  el("th", { scope: "col", class: number ? "n" : null, "aria-sort": "none" }, el("button", { type: "button", onclick: () => sort(key, number) }, name)));
byId("table").append(el("table", {}, el("thead", {}, el("tr", {}, ...heads)), body));
byId("table").addEventListener("scroll", () => {
  const box = byId("table");
  if (box.scrollTop + box.clientHeight > box.scrollHeight - 600) more();
});

function sort(key, number) {
  // Numbers begin with the largest, of times the worst.
  const down = sorted.column === key ? !sorted.down : Boolean(number);
  sorted = { column: key, down };
  heads.forEach((head, i) => head.setAttribute("aria-sort", COLUMNS[i][1] !== key ? "none" : down ? "descending" : "ascending"));
  filter();
}

function filter() {
  const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
  const fits = (row) => words.every((w) => row.words.includes(w)) && filters.every(([box, key]) => !box.value || row[key] === box.value);
  visible = kernels.filter(fits);
  if (sorted.column) {
    const key = sorted.column;
    const sign = sorted.down ? -1 : 1;
    const known = (v) => v !== null && v !== undefined;
    // What was not measured lies last either way.
    visible.sort((a, b) => known(b[key]) - known(a[key]) || sign * (typeof a[key] === "number" ? a[key] - b[key] : byName(a[key], b[key])));
  }
  body.replaceChildren();
  byId("table").scrollTop = 0;
  more();
}

function more() {
  const from = body.childElementCount;
  body.append(...visible.slice(from, from + CHUNK).map(tableRow));
  const shown = body.childElementCount;
  const rest = shown < visible.length ? `; the first ${shown.toLocaleString("en")} are laid out, more as you scroll` : "";
  byId("table-count").textContent = `${visible.length.toLocaleString("en")} of ${kernels.length.toLocaleString("en")} rows${rest}`;
}

function tableRow(row) {
  return el("tr", {}, ...COLUMNS.map(([, key, number]) => {
    const cell = el("td", { class: number ? "n" : null }, number ? number(row[key]) : row[key] || "–");
    if (key === "percent_of_floor" && row[key] > 0) {
      cell.classList.add("share");
      cell.style.setProperty("--share", Math.min(100, row[key]) + "%");
    }
    return cell;
  }));
}

// ---- Start

filter();
drawRoof();
drawCurves();
let laidOut = window.innerWidth;
window.addEventListener("resize", debounced(() => {
  // On a phone the height changes with the address bar; charts only follow the width.
  if (window.innerWidth === laidOut) return;
  laidOut = window.innerWidth;
  drawRoof();
  drawCurves();
}, 200));
