"use strict";
/* Everything shown goes through textContent or attributes set by name: nothing from the data is ever parsed as HTML. */

const PAGE = 50;        // rows per page of a table
const CHARTS = 24;      // charts drawn at once; the filters choose which
const Z = 1.96;         // error bands are 95 % intervals
const SVG = "http://www.w3.org/2000/svg";
const $ = (id) => document.getElementById(id);
const state = { chosen: {}, text: "", stage: "after", hidden: new Set() };
let data, tables = [];

/* ---------- building blocks ---------- */

function put(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  for (const child of children.flat()) if (child != null) node.append(child);
  return node;
}
const el = (tag, attributes, ...children) => put(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => put(document.createElementNS(SVG, tag), attributes, children);
const percent = (value, digits = 1) => (value == null ? "" : (100 * value).toFixed(digits));
const giga = (bytes) => (bytes == null ? "" : bytes >= 1e9 ? `${(bytes / 1e9).toFixed(2)} GB` : `${(bytes / 1e6).toFixed(1)} MB`);
const groupBy = (rows, key) => {
  const groups = new Map();
  for (const row of rows) {
    const name = key(row);
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(row);
  }
  return groups;
};
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const unique = (values) => [...new Set(values)];
const withError = (pair) => (pair ? percent(pair[0]) + (pair[1] == null ? "" : ` ± ${percent(pair[1])}`) : "");
const keepText = (row) => (row.full ? `full${row.keep == null ? "" : ` (${row.keep})`}` : String(row.keep ?? ""));
const duration = (s) => (s == null ? "" : s < 120 ? `${s.toFixed(1)} s` : s < 7200 ? `${(s / 60).toFixed(1)} min` : `${(s / 3600).toFixed(1)} h`);

function objects(table) {
  return table.rows.map((row) => Object.fromEntries(table.columns.map((name, i) => [name, row[i]])));
}

async function decode() {
  const bytes = Uint8Array.from(atob($("data").textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const content = await new Response(stream).json();
  for (const name of ["summary", "runs", "problems"]) content[name] = objects(content[name]);
  for (const name of ["models", "methods", "groups"]) content[name] = new Map(content[name]);
  content.runs.forEach((run, index) => { run.index = index; run.words = words(run); });
  content.settings = unique(content.summary.map(settingKey)).sort((a, b) => Number(!a.endsWith("|")) - Number(!b.endsWith("|")));
  content.notes = unique(content.settings.map((key) => key.slice(key.indexOf("|") + 1)));
  return content;
}

const settingKey = (row) => `${row.model}|${row.note}`;
const label = (kind, name) => data[kind].get(name) ?? name;
const words = (run) => [run.directory, run.model, run.task, run.method, run.note].join(" ").toLowerCase();

/* ---------- filters ---------- */

const FACETS = [
  ["model", "Model", (name) => label("models", name)],
  ["group", "Tasks", (name) => label("groups", name)],
  ["method", "Method", (name) => label("methods", name)],
  ["keep", "Keep-k", (value) => (value == null ? "as is" : String(value))],
  ["note", "Setting", (name) => name || "default"],
];

/* The order of a chip: known names as in the labels, keep-k by number with "as is" last. */
const place = (key, value) => (key === "keep" ? value ?? Infinity : data[`${key}s`] ? order(`${key}s`, value) : 0);

const passes = (row) => FACETS.every(([key]) => !state.chosen[key]?.size || state.chosen[key].has(row[key]));
const runPasses = (run) => passes(run) && state.text.split(/\s+/).every((word) => run.words.includes(word));

function drawFacets() {
  for (const [key, name, text] of FACETS) {
    const values = unique(data.runs.map((run) => run[key]));
    values.sort((a, b) => place(key, a) - place(key, b) || String(a).localeCompare(String(b), "en", { numeric: true }));
    if (values.length < 2) continue;
    state.chosen[key] = new Set();
    const chips = values.map((value) => chip(text(value), false, (on) => {
      state.chosen[key][on ? "add" : "delete"](value);
      refresh();
    }));
    $("facets").append(el("fieldset", { "data-facet": key }, el("legend", {}, name), chips));
  }
  const search = el("input", { type: "search", id: "search", placeholder: "Search runs ( / )", "aria-label": "Search runs",
    oninput: () => { state.text = search.value.trim().toLowerCase(); refreshRuns(); } });
  const clear = el("button", { type: "button", id: "clear", onclick: clearFilters }, "Clear all");
  $("facets").append(search, clear);
  $("filters").open = !matchMedia("(max-width: 40rem)").matches;
}

function chip(text, pressed, change) {
  const button = el("button", { type: "button", class: "chip", "aria-pressed": String(pressed), onclick: () => {
    const on = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(on));
    change(on);
  } }, text);
  return button;
}

function clearFilters() {
  for (const set of Object.values(state.chosen)) set.clear();
  for (const button of $("facets").querySelectorAll(".chip")) button.setAttribute("aria-pressed", "false");
  $("search").value = state.text = "";
  refresh();
}

/* ---------- tables ---------- */

class Table {
  /* columns: {name, value(row), show(row)?, number?, wide?}; show may return a node */
  constructor(title, columns, rows, sort) {
    Object.assign(this, { columns, all: rows, page: 0, sort: sort ?? [null, 1] });
    this.heads = columns.map((column, i) => el("th", { scope: "col", class: column.number ? "number" : null },
      el("button", { type: "button", onclick: () => this.order(i) }, column.name)));
    this.body = el("tbody");
    this.count = el("span", { class: "soft", "aria-live": "polite" });
    this.back = el("button", { type: "button", onclick: () => this.turn(-1) }, "‹ Back");
    this.next = el("button", { type: "button", onclick: () => this.turn(1) }, "More ›");
    this.node = el("div", {},
      el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": title },
        el("table", {}, el("thead", {}, el("tr", {}, this.heads)), this.body)),
      el("div", { class: "bar" }, this.count, this.back, this.next));
    tables.push(this);
  }

  order(index) {
    const first = this.columns[index].number ? -1 : 1;
    this.sort = this.sort[0] === index ? [index, -this.sort[1]] : [index, first];
    this.page = 0;
    this.draw();
  }

  turn(step) { this.page += step; this.draw(); }

  rows() {
    const [index, direction] = this.sort;
    const rows = this.all();
    if (index == null) return rows;
    const value = this.columns[index].value;
    const compare = (a, b) => (a == null) - (b == null) || direction * (typeof a === "number" && typeof b === "number"
      ? a - b : String(a).localeCompare(String(b), "en", { numeric: true }));
    return rows.map((row) => [value(row), row]).sort((x, y) => compare(x[0], y[0])).map((pair) => pair[1]);
  }

  draw() {
    const rows = this.rows(), pages = Math.max(1, Math.ceil(rows.length / PAGE));
    this.page = Math.min(Math.max(0, this.page), pages - 1);
    const shown = rows.slice(this.page * PAGE, (this.page + 1) * PAGE);
    this.heads.forEach((head, i) => head.setAttribute("aria-sort",
      this.sort[0] === i ? (this.sort[1] > 0 ? "ascending" : "descending") : "none"));
    this.body.replaceChildren(...shown.map((row) => el("tr", {}, this.columns.map((column) =>
      el("td", { class: [column.number && "number", column.wide && "wide"].filter(Boolean).join(" ") || null },
        (column.show ?? column.value)(row) ?? "")))));
    const from = rows.length ? this.page * PAGE + 1 : 0;
    this.count.textContent = `${from}–${this.page * PAGE + shown.length} of ${rows.length}`;
    this.back.disabled = this.page === 0;
    this.next.disabled = this.page >= pages - 1;
    this.back.hidden = this.next.hidden = pages === 1;
  }
}

function plainTable(heads, rows, wide) {
  return el("div", { class: "scroll" }, el("table", { class: "plain" },
    el("thead", {}, el("tr", {}, heads.map((head) => el("th", { scope: "col" }, head)))),
    el("tbody", {}, rows.map((row) => el("tr", {}, row.map((cell, i) =>
      el("td", { class: wide?.includes(i) ? "wide" : null }, cell == null ? "" : cell)))))));
}

const shared = [
  { name: "model", value: (row) => label("models", row.model) },
  { name: "keep-k", value: (row) => row.keep ?? Infinity, show: keepText, number: true },
  { name: "method", value: (row) => label("methods", row.method) },
  { name: "setting", value: (row) => row.note },
];

function summaryTable() {
  const stage = (name) => ({ name: `${name} %`, number: true, value: (row) => row[name]?.[0], show: (row) => withError(row[name]) });
  const drop = (name) => ({ name: `drop ${name}`, number: true, value: (row) => row[`drop_${name}`], show: (row) => percent(row[`drop_${name}`]) });
  return new Table("Summary", [...shared,
    { name: "tasks", value: (row) => label("groups", row.group) },
    { name: "metric", value: (row) => row.metric },
    { name: "found", value: (row) => `${row.found}/${row.tasks}`, number: true },
    { name: "seeds", value: (row) => row.seeds, number: true },
    { name: "n", value: (row) => row.documents, number: true },
    stage("before"), stage("after"), drop("before"), drop("after"),
    { name: "on disk", value: (row) => row.disk, show: (row) => giga(row.disk), number: true },
    { name: "in memory", value: (row) => row.memory, show: (row) => giga(row.memory), number: true },
  ], () => data.summary.filter((row) => passes(row)));
}

function runsTable() {
  const open = (run) => el("button", { type: "button", "data-run": run.index, title: run.directory, onclick: () => { location.hash = `run=${run.index}`; } }, run.task);
  return new Table("Runs", [
    { name: "run", value: (run) => run.task, show: open },
    ...shared,
    { name: "seed", value: (run) => run.seed, number: true },
    { name: "metric", value: (run) => run.metric },
    { name: "n", value: (run) => run.documents, number: true },
    { name: "before %", value: (run) => run.before?.[0], show: (run) => withError(run.before), number: true },
    { name: "after %", value: (run) => run.after?.[0], show: (run) => withError(run.after), number: true },
    { name: "time", value: (run) => run.seconds, show: (run) => duration(run.seconds), number: true },
    { name: "on disk", value: (run) => run.disk, show: (run) => giga(run.disk), number: true },
    { name: "problems", value: (run) => run.problems || null, number: true },
  ], () => data.runs.filter(runPasses));
}

function problemsTable() {
  return new Table("Problems", [
    { name: "kind", value: (row) => row.kind },
    { name: "where", value: (row) => row.where, wide: true },
    { name: "problem", value: (row) => row.problem, wide: true },
  ], () => data.problems);
}

/* ---------- plots ---------- */

const W = 420, H = 260, LEFT = 44, RIGHT = 12, TOP = 24, BOTTOM = 34;

function ticks(low, high, count = 5) {
  const raw = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= raw);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-6; value += step) found.push(value);
  return found;
}

function frame(xs, ys, { logX, xName, yName, xTicks }) {
  const scale = logX ? Math.log2 : (value) => value;
  const [x0, x1] = [scale(Math.min(...xs)), scale(Math.max(...xs))];
  const pad = (Math.max(...ys) - Math.min(...ys)) * 0.06 || 0.01;
  const [y0, y1] = [Math.min(...ys) - pad, Math.max(...ys) + pad];
  const x = (value) => LEFT + 10 + (W - LEFT - RIGHT - 20) * (x1 > x0 ? (scale(value) - x0) / (x1 - x0) : 0.5);
  const y = (value) => TOP + (H - TOP - BOTTOM) * (1 - (value - y0) / (y1 - y0));
  const parts = [svg("path", { class: "axis", d: `M${LEFT} ${TOP}V${H - BOTTOM}H${W - RIGHT}` })];
  const levels = ticks(y0, y1), digits = Math.min(4, Math.max(0, Math.ceil(-Math.log10(100 * (levels[1] - levels[0] || 1)))));
  for (const tick of levels) {
    parts.push(svg("path", { class: "axis", d: `M${LEFT} ${y(tick)}H${W - RIGHT}` }),
      svg("text", { x: LEFT - 6, y: y(tick) + 4, "text-anchor": "end" }, percent(tick, digits)));
  }
  for (const tick of xTicks ?? ticks(x0, x1)) {
    parts.push(svg("text", { x: x(tick), y: H - BOTTOM + 16, "text-anchor": "middle" }, String(Math.round(tick * 1000) / 1000)));
  }
  parts.push(svg("text", { x: W - RIGHT, y: H - 4, "text-anchor": "end" }, xName), svg("text", { x: 4, y: 12 }, yName));
  return { x, y, parts };
}

const SHAPES = [ // one per method, and a dash per method and setting, so that colour is never the only sign
  (x, y, r) => `M${x - r} ${y}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0`,
  (x, y, r) => `M${x - r} ${y - r}h${2 * r}v${2 * r}h${-2 * r}z`,
  (x, y, r) => `M${x} ${y - r * 1.2}l${r * 1.2} ${r * 2.1}h${-r * 2.4}z`,
  (x, y, r) => `M${x} ${y - r * 1.3}l${r * 1.3} ${r * 1.3}l${-r * 1.3} ${r * 1.3}l${-r * 1.3} ${-r * 1.3}z`,
  (x, y, r) => `M${x} ${y + r * 1.2}l${r * 1.2} ${-r * 2.1}h${-r * 2.4}z`,
];
const DASHES = ["", "6 3", "2 3", "9 3 2 3", "1 4"];
const order = (kind, name) => [...data[kind].keys()].indexOf(name);
const colour = (row) => `s${Math.max(0, data.settings.indexOf(settingKey(row))) % 7}`;
const methodIndex = (row) => Math.max(0, order("methods", row.method)) % SHAPES.length;
const dash = (row) => DASHES[(methodIndex(row) + Math.max(0, data.notes.indexOf(row.note))) % DASHES.length];

function point(at, row, text, open) {
  const node = svg("path", { class: `point ${colour(row)}`, d: SHAPES[methodIndex(row)](at[0], at[1], 4.5), tabindex: 0,
    role: "img", "aria-label": text.replaceAll("\n", ", "),
    onmouseenter: (event) => tip(text, event.clientX, event.clientY), onmouseleave: hideTip, onblur: hideTip,
    onfocus: () => { const box = node.getBoundingClientRect(); tip(text, box.x, box.y); },
    onclick: open ?? null, onkeydown: (event) => { if (event.key === "Enter" && open) open(); } });
  return node;
}

function tip(text, x, y) {
  const node = $("tip");
  node.textContent = text;
  node.hidden = false;
  node.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - node.offsetWidth - 8))}px`;
  node.style.top = `${Math.max(4, y - node.offsetHeight - 10)}px`;
}
const hideTip = () => { $("tip").hidden = true; };

const seriesName = (row) => [label("models", row.model), label("methods", row.method), row.note].filter(Boolean).join(" · ");
const estimate = (row) => row[state.stage];

function lineChart(group, rows) {
  const metric = rows[0].metric, limits = rows.flatMap((row) => [bound(row, -1), bound(row, 1)]), keeps = unique(rows.map((row) => row.keep).filter((keep) => keep)).sort((a, b) => a - b);
  const plot = frame(keeps.length ? keeps : [1], limits, { logX: true, xName: "experts kept per layer", yName: `${metric} %`, xTicks: keeps });
  for (const members of groupBy(rows, settingKey).values()) plot.parts.push(...fullLine(members, plot));
  for (const [name, members] of groupBy(rows, seriesName)) {
    plot.parts.push(...seriesLine(name, members.filter((row) => row.keep).sort((a, b) => a.keep - b.keep), plot));
  }
  const picture = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "group", "aria-label": `${metric} against experts kept, ${label("groups", group)}` }, plot.parts);
  return el("figure", {}, el("figcaption", {}, el("strong", {}, label("groups", group)), ` ${state.stage} finetuning`), picture);
}

/* One line per model and setting: keeping every expert is the same whatever the method. */
function fullLine(members, plot) {
  const full = members.find((row) => row.full);
  return full ? [svg("path", { class: `full ${colour(full)}`, d: `M${LEFT} ${plot.y(estimate(full)[0])}H${W - RIGHT}` })] : [];
}

/* The value, or an end of its 95 % interval (shift -1 or 1), never outside of what a share can be. */
const bound = (row, shift = 0) => Math.min(1, Math.max(0, estimate(row)[0] + shift * Z * (estimate(row)[1] ?? 0)));

function seriesLine(name, line, plot) {
  if (!line.length) return [];
  const at = (row, shift = 0) => `${plot.x(row.keep)} ${plot.y(bound(row, shift))}`;
  const upper = line.map((row) => at(row, 1)), lower = line.map((row) => at(row, -1)).reverse();
  const text = (row) => `${name}\nkeep-k ${row.keep}: ${withError(estimate(row))} %`;
  return [
    svg("path", { class: `band ${colour(line[0])}`, d: `M${[...upper, ...lower].join("L")}Z` }),
    svg("path", { class: `series ${colour(line[0])}`, "stroke-dasharray": dash(line[0]), d: `M${line.map((row) => at(row)).join("L")}` }),
    ...line.map((row) => point([plot.x(row.keep), plot.y(estimate(row)[0])], row, text(row))),
  ];
}

function paretoChart(rows) {
  /* Mean over groups against the size of the weights, one point per setting; groups that most settings lack are left out. */
  const settings = [...groupBy(rows, (row) => `${seriesName(row)}|${row.keep}`).values()], points = [];
  const usual = [...groupBy(rows, (row) => row.group)].filter(([, found]) => 2 * found.length >= settings.length).map(([group]) => group);
  for (const members of settings) {
    const found = members.filter((row) => usual.includes(row.group)), row = members[0];
    if (found.length === usual.length && row.disk) points.push({ row, x: row.disk, y: mean(found.map((one) => estimate(one)[0])) });
  }
  if (points.length < 2 || !usual.length) return null;
  const [unit, scale] = points.some((p) => p.x >= 1e8) ? ["GB", 1e9] : ["MB", 1e6];
  for (const p of points) p.x /= scale;
  const plot = frame(points.map((p) => p.x), points.map((p) => p.y), { xName: `weights on disk, ${unit}`, yName: `mean of ${usual.map((group) => label("groups", group)).join(", ")} %` });
  points.sort((a, b) => a.x - b.x || b.y - a.y);
  let best = -Infinity;
  const front = points.filter((p) => p.y > best && ((best = p.y), true));
  const steps = front.map((p) => `${plot.x(p.x)}V${plot.y(p.y)}`).join("H") + `H${plot.x(points.at(-1).x)}`;
  plot.parts.push(svg("path", { class: "front", d: `M${plot.x(front[0].x)} ${plot.y(front[0].y)}H${steps}` }),
    ...points.map((p) => point([plot.x(p.x), plot.y(p.y)], p.row, `${seriesName(p.row)}\nkeep-k ${keepText(p.row)}, ${p.x.toPrecision(3)} ${unit}: ${percent(p.y)} %`)));
  const missing = settings.length - points.length;
  return el("figure", {}, el("figcaption", {}, el("strong", {}, "Size against accuracy"), " dotted: nothing smaller is better",
    missing ? `; ${missing} of ${settings.length} settings lack one of these groups or a size` : ""),
    svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "group", "aria-label": "Size of the weights against accuracy" }, plot.parts));
}

function legend(rows, redraw) {
  const names = [...groupBy(rows, seriesName)];
  return el("div", { class: "bar legend", role: "group", "aria-label": "Shown series" }, names.map(([name, members]) => {
    const row = members[0];
    const key = svg("svg", { class: `key ${colour(row)}`, viewBox: "0 0 32 16", "aria-hidden": "true" },
      svg("path", { class: "series", d: "M0 8H32", "stroke-dasharray": dash(row) }),
      svg("path", { class: `point ${colour(row)}`, d: SHAPES[methodIndex(row)](16, 8, 4.5) }));
    const button = chip("", !state.hidden.has(name), (on) => { state.hidden[on ? "delete" : "add"](name); redraw(); });
    button.append(key, name);
    return button;
  }));
}

/* Every setting is a series of its own. */
const plotted = () => data.summary.filter((row) => passes(row) && estimate(row));

/* What the stage hides: settings with a value at the other one only. */
function hiddenByStage() {
  const other = state.stage === "before" ? "after" : "before", rows = data.summary.filter(passes);
  const without = unique(rows.filter((row) => !row[state.stage] && row[other]).map((row) => `${seriesName(row)}|${row.keep}`));
  return without.length ? el("p", { class: "soft" }, `Not drawn: ${without.length} ${without.length === 1 ? "setting" : "settings"} with an average ${other} finetuning only.`) : null;
}

function drawPlots() {
  $("plot-legend").replaceChildren(legend(plotted(), drawCharts));
  drawCharts();
}

function drawCharts() {
  hideTip();
  const rows = plotted().filter((row) => !state.hidden.has(seriesName(row)));
  const groups = [...groupBy(rows, (row) => row.group)];
  const left = groups.length > CHARTS ? el("p", { class: "soft" }, `${groups.length - CHARTS} more groups: choose with the filters.`) : null;
  const none = rows.length ? null : el("p", { class: "soft" }, `No complete averages ${state.stage} finetuning for these filters.`);
  $("hidden").replaceChildren(...[hiddenByStage()].filter(Boolean));
  $("charts").replaceChildren(...[none, ...groups.slice(0, CHARTS).map(([group, members]) => lineChart(group, members)), paretoChart(rows), left].filter(Boolean));
}

/* ---------- per-task drops ---------- */

function drawTasks() {
  /* Drop against the full model on the same task with the same evaluation, at the chosen stage. */
  const key = (run) => `${run.model}|${run.task}|${run.eval_shots}`, value = (run) => run[state.stage]?.[0];
  const full = new Map(data.runs.filter((run) => run.full && value(run) != null).map((run) => [key(run), value(run)]));
  const runs = data.runs.filter((run) => runPasses(run) && !run.full && value(run) != null && full.has(key(run)));
  const place = (run) => 100 * order("models", run.model) + methodIndex(run);
  const series = unique([...runs].sort((a, b) => place(a) - place(b)).map(seriesName)), wanted = series.includes($("series").value) ? $("series").value : series[0];
  $("series").replaceChildren(...series.map((name) => el("option", { value: name, selected: name === wanted }, name)));
  const members = runs.filter((run) => seriesName(run) === wanted), keeps = unique(members.map((run) => run.keep)).sort((a, b) => a - b);
  if (!members.length) { $("heat").replaceChildren(el("p", { class: "soft" }, "No pruned run with a full model to compare with.")); return; }
  const rows = [...groupBy(members, (run) => run.task)].map(([task, found]) => el("tr", {}, el("th", { scope: "row" }, task),
    keeps.map((keep) => dropCell(full.get(key(found[0])), found.filter((run) => run.keep === keep).map(value)))));
  $("heat").replaceChildren(el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Drop per task" },
    el("table", { class: "plain heat" },
      el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "task"), keeps.map((keep) => el("th", { scope: "col", class: "number" }, `keep-k ${keep}`)))),
      el("tbody", {}, rows))));
}

function dropCell(full, values) {
  if (!values.length) return el("td", {});
  const drop = full - mean(values), strength = Math.round(70 * Math.min(1, Math.abs(drop) / 0.4));
  const cell = el("td", { title: `full ${percent(full)} %, here ${percent(mean(values))} %` }, percent(drop));
  cell.style.background = `color-mix(in srgb, ${drop > 0 ? "#d55e00" : "#0072b2"} ${strength}%, var(--paper))`;
  return cell;
}

/* ---------- one run ---------- */

function keepMap(keep) {
  const total = keep.total, layers = keep.layers.length, size = 10, gap = 42;
  const bit = (layer, expert) => keep.layers[layer] != null && parseInt(keep.layers[layer][expert >> 2], 16) & (8 >> (expert & 3));
  let kept = "", empty = "";
  for (let layer = 0; layer < layers; layer++) for (let expert = 0; expert < total && keep.layers[layer] != null; expert++) {
    const square = `M${gap + expert * size} ${layer * size}h8v8h-8z`;
    if (bit(layer, expert)) kept += square; else empty += square;
  }
  const note = el("p", { class: "soft", "aria-live": "polite" }, "Point at a square to read its layer and expert.");
  const names = keep.layers.map((_, layer) => (layers <= 24 || layer % 4 === 0 ? svg("text", { x: gap - 6, y: layer * size + 8, "text-anchor": "end", style: null }, String(layer)) : null));
  const counts = keep.layers.map((_, layer) => Array.from({ length: total }, (_, expert) => bit(layer, expert)).filter(Boolean).length);
  const map = svg("svg", { viewBox: `0 0 ${gap + total * size} ${layers * size}`, role: "img", "aria-label": `Kept experts per layer: ${counts.join(", ")} of ${total}` },
    names, svg("path", { class: "empty", d: empty }), svg("path", { class: "kept", d: kept }));
  map.addEventListener("pointermove", (event) => {
    const box = map.getBoundingClientRect(), unit = box.width / (gap + total * size);
    const expert = Math.floor(((event.clientX - box.x) / unit - gap) / size), layer = Math.floor((event.clientY - box.y) / unit / size);
    if (expert >= 0 && expert < total && keep.layers[layer] != null) note.textContent = `Layer ${layer}, expert ${expert}: ${bit(layer, expert) ? "kept" : "dropped"}; ${counts[layer]} of ${total} kept in this layer.`;
  });
  map.style.maxWidth = `${gap + total * size * 1.6}px`;
  return [map, note];
}

function lossChart(losses) {
  const ys = losses.map((entry) => entry[1]), plot = frame(losses.map((entry) => entry[0]), ys.map((y) => y / 100), { xName: "step", yName: "loss" });
  const line = losses.map(([step, loss]) => `${plot.x(step)} ${plot.y(loss / 100)}`).join("L");
  return svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `Training loss from ${ys[0].toFixed(3)} to ${ys.at(-1).toFixed(3)}` }, plot.parts, svg("path", { class: "series s0", d: `M${line}` }));
}

function runParts(run, detail) {
  const parts = [], section = (title, ...nodes) => { if (nodes.flat().some((node) => node != null)) parts.push(el("h3", {}, title), ...nodes.flat().filter((node) => node != null)); };
  const own = data.problems.filter((row) => row.where === run.directory || row.where.startsWith(`${run.directory}/`));
  section("Problems", own.length ? plainTable(["kind", "where", "problem"], own.map((row) => [row.kind, row.where.slice(run.directory.length + 1), row.problem]), [1, 2]) : null);
  const steps = Object.keys(detail.metrics), names = unique(steps.flatMap((step) => Object.keys(detail.metrics[step])));
  section("Metrics", names.length ? plainTable(["metric", ...steps.map((step) => `checkpoint-${step}`)], names.map((name) => [name, ...steps.map((step) => detail.metrics[step][name]?.toPrecision(5))])) : null);
  section("Kept experts (rows: layers, columns: experts)", detail.keep ? keepMap(detail.keep) : null);
  section("Training loss", detail.losses.length > 1 ? lossChart(detail.losses) : null);
  section("Stages", detail.stages.length ? plainTable(["stage", "time", "peak memory", "GPU memory", "device", "host", "started", "commit"], detail.stages.map(([name, seconds, memory, gpu, ...rest]) => [name, duration(seconds), giga(memory), giga(gpu), ...rest])) : null);
  section("Predictions that changed, full model → pruned", detail.changed.length ? plainTable(["document", "id", "label", "full", "pruned", "score"], detail.changed.map(([doc, id, ...rest]) => [doc, id, ...rest]), [2, 3, 4]) : null);
  section("Specification", el("pre", { tabindex: 0 }, JSON.stringify(detail.spec, null, 1)));
  return parts;
}

function openRun(index) {
  const run = data.runs[index], dialog = $("run");
  if (!run) return;
  const row = tables.runs.rows(), place = row.indexOf(run), go = (step) => row[place + step] && (location.hash = `run=${row[place + step].index}`);
  dialog.replaceChildren(el("div", {},
    el("div", { class: "bar" },
      el("button", { type: "button", id: "close", onclick: () => dialog.close() }, "Close (Esc)"),
      el("button", { type: "button", disabled: place < 1, onclick: () => go(-1) }, "‹ Previous"),
      el("button", { type: "button", disabled: place < 0 || place >= row.length - 1, onclick: () => go(1) }, "Next ›")),
    el("h2", { id: "run-title" }, `${run.task}, keep-k ${keepText(run)}, ${label("methods", run.method)}`),
    el("p", { class: "soft" }, run.directory), runParts(run, data.details[index])));
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
  $("close").focus();
}

function followHash() {
  const match = /^#run=(\d+)$/.exec(location.hash);
  if (match) openRun(Number(match[1]));
  else if ($("run").open) $("run").close();
}

/* ---------- start ---------- */

function stageSelect() {
  const choose = el("select", { id: "stage", onchange: () => { state.stage = choose.value; refresh(); } },
    ["before", "after"].map((name) => el("option", { value: name, selected: name === state.stage }, `${name} finetuning`)));
  return el("label", {}, "Accuracy ", choose);
}

function refresh() {
  for (const table of tables) if (table !== tables.runs) { table.page = 0; table.draw(); }
  drawPlots();
  refreshRuns();
}

/* What the search changes too; the averages above stand for whole groups of runs. */
function refreshRuns() {
  tables.runs.page = 0;
  tables.runs.draw();
  drawTasks();
  const chosen = Object.values(state.chosen).reduce((sum, set) => sum + set.size, 0) + (state.text ? 1 : 0);
  $("active").textContent = chosen ? `(${chosen} active, ${data.runs.filter(runPasses).length} of ${data.runs.length} runs)` : "";
}

function build() {
  const { about } = data, section = (id, title, ...children) => el("section", { "aria-labelledby": `${id}-title` }, el("h2", { id, tabindex: -1 }, title), ...children);
  $("about").textContent = `${about.runs} runs of ${about.models} models on ${about.tasks} tasks · ${about.root} · written ${about.written} by emo-select ${about.version}`;
  const having = (stage) => data.summary.filter((row) => row[stage]).length;
  state.stage = having("after") && having("after") >= having("before") ? "after" : "before";
  const summary = summaryTable(), runs = runsTable(), problems = problemsTable();
  tables.runs = runs;
  $("main").append(
    section("summary", "Summary", el("p", { class: "soft" }, "Averages over each group's tasks, ± one standard error, seeds pooled. Drop: points lost against the full model."), summary.node),
    section("plots", "Plots", el("div", { class: "bar" }, stageSelect()), el("p", { class: "soft" }, "Dashed horizontal: the full model. Bands: 95 % intervals."), el("div", { id: "hidden" }), el("div", { id: "plot-legend" }), el("div", { id: "charts", class: "grid" })),
    section("tasks", "Drop per task", el("p", { class: "soft" }, "Points lost against the full model; orange is a loss, blue a gain."), el("div", { class: "bar" }, el("label", {}, "Of ", el("select", { id: "series", onchange: drawTasks }))), el("div", { id: "heat" })),
    section("runs", "Runs", runs.node),
    section("problems", `Problems (${data.problems.length})`, data.problems.length ? problems.node : el("p", {}, "None.")));
}

addEventListener("keydown", (event) => {
  if (event.key === "/" && !/^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName) && !$("run").open) {
    event.preventDefault();
    $("filters").open = true;
    $("search").focus();
  }
});
addEventListener("hashchange", followHash);
addEventListener("scroll", hideTip, { passive: true });
$("run").addEventListener("close", () => {
  const match = /^#run=(\d+)$/.exec(location.hash);
  if (match) history.replaceState(null, "", location.pathname + location.search + "#runs");
  document.querySelector(`[data-run="${match?.[1]}"]`)?.focus();
});

decode().then((content) => {
  data = content;
  build();
  drawFacets();
  refresh();
  followHash();
  document.documentElement.dataset.ready = "true";
}).catch((error) => {
  $("about").textContent = `The data of this page cannot be read: ${error.message}. A recent browser is needed.`;
  throw error;
});
