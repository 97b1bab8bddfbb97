"use strict";
/* Everything shown goes through text nodes or attributes set by name: nothing from the data is ever parsed as HTML. */

const TOP = 6;         // clusters of a document that have a colour
const MORE = 10;       // documents, words shown at once
const AROUND = 12;     // tokens before and after a hit in a snippet
const SVG = "http://www.w3.org/2000/svg";
const VIEWS = [["clusters", "Clusters"], ["documents", "Documents"], ["tokens", "Tokens"], ["experts", "Experts"], ["comparison", "Comparison"]];
const $ = (id) => document.getElementById(id);
let data, models, docs, at = {};
const memory = { sort: "size", find: "", kind: "", label: "", order: "position", metric: "load", keep: 0 };

/* ---------- building blocks ---------- */

function put(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(node.style, value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  for (const child of children.flat(Infinity)) if (child != null) node.append(child);
  return node;
}
const el = (tag, attributes, ...children) => put(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => put(document.createElementNS(SVG, tag), attributes, children);
const percent = (value, digits = 1) => (value == null ? "–" : `${(100 * value).toFixed(digits)} %`);
const number = (value, digits = 3) => (value == null ? "–" : value.toFixed(digits));
const whole = (value) => value.toLocaleString("en");
const letter = (i) => String.fromCharCode(65 + i);
const tint = (i) => `m${"abcde"[i % 5]}`;
const lift = (value) => (value == null ? "" : `×${value < 10 ? value.toFixed(1) : Math.round(value)}`);

function bars(rows, most) {
  const top = most ?? Math.max(...rows.map((row) => row[1]), 1e-9);
  return el("div", { class: "bars" }, rows.map(([name, share, text]) => [
    el("span", { title: name }, name || "(none)"),
    el("span", { class: "track" }, el("i", { style: { width: `${Math.min(100, (100 * share) / top)}%` } })),
    el("span", { class: "value soft" }, text)]));
}

function shortened(make, items, count = MORE) {
  const box = el("div"), more = el("button", { type: "button" });
  let shown = 0;
  const extend = () => {
    box.append(...items.slice(shown, shown + count).map(make));
    shown += count;
    more.hidden = shown >= items.length;
    more.textContent = `Show more (${whole(Math.max(0, items.length - shown))} left)`;
  };
  more.addEventListener("click", extend);
  extend();
  return [box, more];
}

/* ---------- data ---------- */

async function decode() {
  const packed = Uint8Array.from(atob($("data").textContent.trim()), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
  const size = bytes[0] | (bytes[1] << 8) | (bytes[2] << 16) | (bytes[3] << 24);
  data = JSON.parse(new TextDecoder().decode(bytes.subarray(4, 4 + size)));
  let offset = 4 + size;
  const planes = new Map();
  for (const [name, length] of Object.entries(data.arrays)) {
    const [own, byte] = name.split(".");
    if (!planes.has(own)) planes.set(own, []);
    planes.get(own)[byte] = bytes.subarray(offset, offset + length);
    offset += length;
  }
  const numbers = (name) => {
    const [low, ...higher] = planes.get(name), found = new Int32Array(low.length);
    for (let i = 0; i < low.length; i++) found[i] = low[i] - 1;
    higher.forEach((plane, j) => { const shift = 8 * (j + 1); for (let i = 0; i < plane.length; i++) found[i] += plane[i] << shift; });
    return found;
  };
  const lengths = numbers("lengths");
  docs = { count: lengths.length, start: new Int32Array(lengths.length + 1), label: numbers("labels"), piece: numbers("pieces") };
  for (let i = 0; i < docs.count; i++) docs.start[i + 1] = docs.start[i] + lengths[i];
  models = data.models.map((model, i) => {
    const own = numbers(`clusters${i}`), sizes = new Int32Array(model.k);
    for (const c of own) if (c >= 0) sizes[c]++;
    return { ...model, index: i, of: own, sizes, expertsByPlace: new Map(model.experts.map((e) => [`${e.layer}.${e.expert}`, e])) };
  });
}

const once = (make) => { const known = new Map(); return (key, ...rest) => { if (!known.has(key)) known.set(key, make(key, ...rest)); return known.get(key); }; };
const clean = (piece) => piece.trim().toLowerCase();
const lengthOf = (doc) => docs.start[doc + 1] - docs.start[doc];
const docName = (doc) => `no. ${doc}${data.labels[docs.label[doc]] ? `, ${data.labels[docs.label[doc]]}` : ""}`;
const docOf = (token) => { let low = 0, high = docs.count; while (high - low > 1) { const mid = (low + high) >> 1; if (docs.start[mid] <= token) low = mid; else high = mid; } return low; };
const clusterName = (model, id) => (id < 0 ? "not clustered" : model.clusters[id].name || `Cluster ${id}`);
const total = once((i) => models[i].sizes.reduce((a, b) => a + b, 0));
const shareOf = (model, id) => model.sizes[id] / Math.max(1, total(model.index));

/* (docs, k) tokens of each document in each cluster, and the document's largest share */
const perDocument = once((i) => {
  const { of, k } = models[i], counts = new Uint16Array(docs.count * k);
  for (let doc = 0; doc < docs.count; doc++) for (let t = docs.start[doc]; t < docs.start[doc + 1]; t++) if (of[t] >= 0) counts[doc * k + of[t]]++;
  return counts;
});
function ranked(model, doc) {
  const counts = perDocument(model.index).subarray(doc * model.k, (doc + 1) * model.k);
  return [...counts.keys()].filter((c) => counts[c]).sort((a, b) => counts[b] - counts[a] || a - b).map((id) => ({ id, count: counts[id] }));
}
const topShare = (model, doc) => (ranked(model, doc)[0]?.count ?? 0) / Math.max(1, lengthOf(doc));

/* words: pieces without white space and case */
const vocabulary = once(() => {
  const place = new Map(), of = new Int32Array(data.pieces.length), names = [];
  data.pieces.forEach((piece, i) => {
    const word = clean(piece);
    if (!place.has(word)) { place.set(word, names.length); names.push(word); }
    of[i] = place.get(word);
  });
  const counts = new Int32Array(names.length);
  for (const piece of docs.piece) counts[of[piece]]++;
  return { place, of, names, counts, order: [...names.keys()].filter((w) => names[w]).sort((a, b) => counts[b] - counts[a]) };
});
const placesOf = once((word) => {
  const { of, place } = vocabulary(0), wanted = place.get(word), found = [];
  if (wanted !== undefined) for (let t = 0; t < docs.piece.length; t++) if (of[docs.piece[t]] === wanted) found.push(t);
  return found;
});

/* ---------- address ---------- */

const address = (change) => `#${new URLSearchParams(Object.entries({ ...change }).filter(([, v]) => v !== undefined && v !== null && v !== ""))}`;
const go = (change) => { location.hash = address(change); };
const link = (change, ...children) => el("a", { href: address(change) }, children);

function readAddress() {
  const given = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  const wanted = models.findIndex((m, i) => letter(i) === (given.model ?? "").toUpperCase() || m.name === given.model);
  const model = wanted < 0 ? 0 : wanted;
  const inside = (text, count) => { const n = Number.parseInt(text, 10); return n >= 0 && n < count ? n : undefined; };
  at = { model, cluster: inside(given.cluster, models[model].k), doc: inside(given.doc, docs.count), word: given.word,
    layer: inside(given.layer, 1e6), expert: inside(given.expert, 1e6), other: inside(given.other, models.length) };
  const guess = given.doc !== undefined ? "documents" : given.word !== undefined ? "tokens" : given.expert !== undefined ? "experts" : "clusters";
  at.view = VIEWS.some(([name]) => name === given.view) ? given.view : guess;
}
const here = (change = {}) => ({ view: at.view, model: letter(at.model), ...change });

function drawTabs() {
  const now = { model: letter(at.model) };
  $("tabs").replaceChildren(
    ...VIEWS.filter(([name]) => name !== "experts" || models.some((m) => m.layers.length)).map(([name, text]) =>
      el("a", { href: address({ view: name, ...now }), "aria-current": name === at.view ? "page" : null }, text)),
    el("span", { class: "models", role: "group", "aria-label": "Model" }, models.length > 1 ? models.map((model, i) =>
      el("button", { type: "button", class: tint(i), "aria-pressed": String(i === at.model), title: model.name,
        onclick: () => go({ view: at.view, model: letter(i), doc: at.doc, word: at.word }) }, `${letter(i)} ${shortName(model)}`)) : null));
}
const shortName = (model) => model.name.split("/").pop();
const heading = (model) => el("span", { class: tint(model.index) }, el("i", { class: "dot" }), models.length > 1 ? `${letter(model.index)} · ${model.name}` : model.name);

function draw() {
  readAddress();
  drawTabs();
  hideTip();
  const main = $("main");
  main.replaceChildren(...{ clusters: clustersView, documents: documentsView, tokens: tokensView, experts: expertsView, comparison: comparisonView }[at.view]());
  document.documentElement.dataset.ready = "true";
}

/* ---------- texts ---------- */

/* colour by rank in the document; `only`: one cluster alone */
function colours(model, doc, only) {
  const rank = new Map(ranked(model, doc).slice(0, TOP).map(({ id }, i) => [id, i]));
  return (t) => {
    const c = model.of[t];
    if (only !== undefined) return c === only ? `r${rank.get(c) ?? 0}` : "dim";
    return c < 0 ? "none" : rank.has(c) ? `r${rank.get(c)}` : "rest";
  };
}

/* line ends as a sign and one break, so that they have a colour and long gaps do not tear the text apart */
const visible = (text) => text.replace(/\n+/g, (ends) => `${"↵".repeat(Math.min(3, ends.length))}\n`);

function tokenSpans(model, from, to, look, here) {
  const spans = [];
  for (let t = from; t < to; t++) {
    const text = data.pieces[docs.piece[t]];
    if (text === "") continue;  // part of a character that its last token shows
    spans.push(el("span", { class: `t ${look(t)}${t === here ? " here" : ""}`, "data-t": t, "data-m": model.index }, visible(text)));
  }
  return spans;
}

function snippet(model, doc, cluster, middle) {
  const start = docs.start[doc], end = docs.start[doc + 1];
  const from = middle === undefined ? start : Math.max(start, middle - AROUND), to = middle === undefined ? Math.min(end, start + 70) : Math.min(end, middle + AROUND + 1);
  return el("p", { class: "text snippet" }, from > start ? "… " : null, tokenSpans(model, from, to, (t) => (model.of[t] === cluster ? "hit" : ""), middle), to < end ? " …" : null);
}

function tokenTip(span) {
  const model = models[span.dataset.m], t = Number(span.dataset.t);
  return `${clusterName(model, model.of[t])} · token ${t - docs.start[docOf(t)]}`;
}
function showTip(target, text) {
  const tip = $("tip"), box = target.getBoundingClientRect();
  tip.textContent = text;
  tip.hidden = false;
  const left = Math.max(6, Math.min(innerWidth - tip.offsetWidth - 6, box.left)), above = box.top - tip.offsetHeight - 6;
  Object.assign(tip.style, { left: `${left}px`, top: `${above > 6 ? above : box.bottom + 6}px` });
}
const hideTip = () => { $("tip").hidden = true; };

/* ---------- clusters ---------- */

const stability = (cluster) => (cluster.survival == null ? "" : ` · stable ${percent(cluster.survival, 0)}`);

function clustersView() {
  const model = models[at.model];
  const list = el("div", { class: "list", id: "list" }), count = el("span", { class: "soft small", "aria-live": "polite" });
  const kinds = [...new Set(model.clusters.map((c) => c.kind))].sort();
  const fill = () => {
    const words = memory.find.toLowerCase().split(/\s+/).filter(Boolean);
    const about = (c) => [c.id, clusterName(model, c.id), c.category, c.kind, ...[...c.token_words, ...c.document_words].map((w) => w.word), ...c.labels.slice(0, 2).map((l) => l.name)].join(" ").toLowerCase();
    const chosen = model.clusters.filter((c) => (!memory.kind || c.kind === memory.kind) && words.every((w) => about(c).includes(w)));
    const by = { size: (a, b) => model.sizes[b.id] - model.sizes[a.id], stability: (a, b) => (b.survival ?? -1) - (a.survival ?? -1), name: (a, b) => clusterName(model, a.id).localeCompare(clusterName(model, b.id)) };
    chosen.sort(by[memory.sort]);
    const most = Math.max(...model.sizes, 1);
    list.replaceChildren(...chosen.map((c) => el("button", { type: "button", class: "item", "aria-current": c.id === at.cluster ? "true" : null, onclick: () => go(here({ cluster: c.id })) },
      el("span", { class: "row" }, el("b", {}, clusterName(model, c.id)), el("span", { class: "soft" }, percent(shareOf(model, c.id)))),
      el("span", { class: "row small soft" }, el("span", {}, `${c.kind}${stability(c)}`), c.labels[0] ? el("span", {}, `${c.labels[0].name} ${lift(c.labels[0].lift)}`) : null),
      el("div", { class: "meter" }, el("i", { style: { width: `${(100 * model.sizes[c.id]) / most}%` } })))));
    count.textContent = `${chosen.length} of ${model.k} clusters`;
  };
  if (at.cluster === undefined && model.k) at.cluster = model.sizes.indexOf(Math.max(...model.sizes));
  fill();
  const search = el("input", { type: "search", id: "search", placeholder: "Search names, words, labels ( / )", "aria-label": "Search clusters", oninput: () => { memory.find = search.value; fill(); } });
  search.value = memory.find;
  const controls = el("div", {}, search, el("div", { class: "bar" },
    choice("Sort by", "sort", [["size", "size"], ["stability", "stability"], ["name", "name"]], fill),
    kinds.length > 1 ? choice("Kind", "kind", [["", "all kinds"], ...kinds.map((k) => [k, k])], fill) : null, count));
  return [el("div", { class: "two" }, el("div", {}, controls, list), el("section", { id: "detail", "aria-label": "Cluster" }, at.cluster === undefined ? null : clusterDetail(model, model.clusters[at.cluster])))];
}

function choice(label, key, options, change) {
  const select = el("select", { "aria-label": label, onchange: () => { memory[key] = select.value; change(); } }, options.map(([value, text]) => el("option", { value }, text)));
  select.value = memory[key];
  return select;
}

function wordList(title, words, strong, score) {
  if (!words.length) return null;
  return el("div", {}, el("h3", {}, title, strong ? el("span", {}, " · tells better") : null, score == null ? null : ` (AUC ${number(score, 2)})`),
    el("div", { class: "words" }, words.map((w) => el("a", { class: `word${strong ? " strong" : ""}`, href: address({ view: "tokens", model: letter(at.model), word: w.word }), title: `${whole(w.count)} times` }, w.word))));
}

function clusterDetail(model, c) {
  const explained = Object.entries(c.explained).map(([name, value]) => [name, value, percent(value, 0)]);
  const lost = model.keep_sets.filter((k) => k.lost[c.id] != null).map((k) => [k.name, k.lost[c.id], percent(k.lost[c.id], 0)]);
  const counts = perDocument(model.index), k = model.k;
  const best = [...Array(docs.count).keys()].filter((d) => counts[d * k + c.id]).sort((a, b) => counts[b * k + c.id] / lengthOf(b) - counts[a * k + c.id] / lengthOf(a) || a - b);
  return [
    el("p", { class: "soft small" }, heading(model), ` · cluster ${c.id}`),
    el("h2", {}, clusterName(model, c.id)),
    el("p", { class: "facts" }, el("span", {}, el("b", {}, percent(shareOf(model, c.id))), ` of tokens (${whole(model.sizes[c.id])})`),
      c.survival == null ? null : el("span", {}, "survives restarts ", el("b", {}, percent(c.survival, 0))),
      el("span", {}, el("b", {}, c.kind)), c.category && c.category !== c.kind ? el("span", {}, c.category) : null,
      el("span", {}, "in ", el("b", {}, whole(best.length)), " documents")),
    el("div", { class: "cols" },
      el("div", {}, wordList("Words of its tokens", c.token_words, c.better === "tokens", c.scores.tokens),
        wordList("Words of its documents", c.document_words, c.better === "documents", c.scores.documents),
        explained.length ? [el("h3", {}, "Membership explained by"), bars(explained, 1)] : null),
      el("div", {}, c.labels.length ? [el("h3", {}, `${data.label_key} (share, lift)`), bars(c.labels.slice(0, 10).map((l) => [l.name, l.share, `${percent(l.share, 0)} ${lift(l.lift)}`]))] : null,
        lost.length ? [el("h3", {}, "Router mass lost with kept experts"), bars(lost, 1)] : null)),
    c.experts.length ? [el("h3", {}, "Experts per layer (lift over all tokens)"), el("div", { class: "scroll" }, el("table", {}, c.experts.map((layer) =>
      el("tr", {}, el("th", { scope: "row", class: "soft" }, `layer ${layer.layer}`), el("td", { class: "words" }, layer.experts.map((e) =>
        el("a", { class: "word small", href: address({ view: "experts", model: letter(at.model), layer: layer.layer, expert: e.name }), title: `${percent(e.share)} of its probability` }, `E${e.name} ${lift(e.lift)}`)))))))] : null,
    c.neighbours.length ? [el("h3", {}, "Nearest clusters (cosine)"), el("div", { class: "words" }, c.neighbours.map((n) => el("a", { class: "word", href: address(here({ cluster: n.cluster })) }, `${clusterName(model, n.cluster)} ${number(n.cosine, 2)}`)))] : null,
    c.contexts.length ? [el("h3", {}, "Tokens nearest to its centre"), shortened((t) => el("div", { class: "small" }, link({ doc: docOf(t), cluster: c.id, model: letter(at.model) }, docName(docOf(t))), snippet(model, docOf(t), c.id, t)), c.contexts, 5)] : null,
    el("h3", {}, "Documents by share of their tokens"),
    shortened((d) => el("div", {}, el("p", { class: "small" }, link({ doc: d, cluster: c.id, model: letter(at.model) }, docName(d)), el("span", { class: "soft" }, ` · ${percent(counts[d * k + c.id] / lengthOf(d), 0)} of ${lengthOf(d)} tokens`)), snippet(model, d, c.id)), best, 6),
  ];
}

/* ---------- documents ---------- */

const documentOrder = (label, order, m) => {
  const chosen = [...Array(docs.count).keys()].filter((d) => !label || data.labels[docs.label[d]] === label);
  if (order === "concentrated" || order === "spread") {
    const share = new Map(chosen.map((d) => [d, topShare(models[m], d)]));
    chosen.sort((a, b) => (order === "spread" ? share.get(a) - share.get(b) : share.get(b) - share.get(a)) || a - b);
  }
  return chosen;
};

function documentsView() {
  const order = documentOrder(memory.label, memory.order, at.model);
  if (at.doc === undefined) at.doc = order[0];
  const place = order.indexOf(at.doc);
  const step = (by) => { const next = order[(Math.max(0, place) + by + order.length) % order.length]; if (next !== undefined) go({ view: "documents", doc: next, model: letter(at.model) }); };
  documentsView.step = step;
  const jump = el("input", { type: "number", min: 0, max: docs.count - 1, value: at.doc ?? "", "aria-label": "Document number", onchange: () => go({ view: "documents", doc: jump.value, model: letter(at.model) }) });
  const first = () => go({ view: "documents", model: letter(at.model), doc: documentOrder(memory.label, memory.order, at.model)[0] });
  const controls = el("div", { class: "bar" },
    el("button", { type: "button", id: "back", onclick: () => step(-1), title: "←" }, "‹ Previous"),
    el("button", { type: "button", id: "next", onclick: () => step(1), title: "→" }, "Next ›"), jump,
    data.labels.length > 1 ? choice(data.label_key, "label", [["", `every ${data.label_key}`], ...data.labels.map((l) => [l, l || "(none)"])], first) : null,
    choice("Order", "order", [["position", "in order"], ["concentrated", "most concentrated first"], ["spread", "most spread first"]], first),
    el("span", { class: "soft small" }, place < 0 ? `${whole(order.length)} documents` : `${whole(place + 1)} of ${whole(order.length)}`));
  if (at.doc === undefined) return [controls];
  return [controls, el("h2", {}, `Document ${docName(at.doc)}`),
    el("p", { class: "soft small" }, [data.names[at.doc], `${lengthOf(at.doc)} tokens`].filter(Boolean).join(" · ")),
    el("div", { class: "cards", id: "readers" }, models.map((model) => reader(model, at.doc)))];
}

function reader(model, doc) {
  let only = model.index === at.model ? at.cluster : undefined;
  const text = el("div", { class: "text" }), legend = el("div", { class: "words legend" }), tokens = Math.max(1, lengthOf(doc)), rows = ranked(model, doc);
  const fill = () => {
    text.replaceChildren(...tokenSpans(model, docs.start[doc], docs.start[doc + 1], colours(model, doc, only)));
    legend.replaceChildren(...rows.slice(0, TOP).map(({ id, count }, i) => key(id, `r${i}`, `${clusterName(model, id)} ${percent(count / tokens, 0)}`)),
      ...(rows.length > TOP ? [el("span", { class: "key soft" }, el("i", { class: "rest" }), `${rows.length - TOP} more ${percent(rows.slice(TOP).reduce((s, r) => s + r.count, 0) / tokens, 0)}`)] : []),
      ...(only !== undefined && !rows.slice(0, TOP).some((r) => r.id === only) ? [key(only, "r0", clusterName(model, only))] : []));
  };
  const key = (id, look, label) => el("button", { type: "button", class: "key", "aria-pressed": String(only === id), onclick: () => { only = only === id ? undefined : id; fill(); } }, el("i", { class: look }), label);
  fill();
  reader.clear = () => { only = undefined; fill(); };
  return el("section", { class: "card", "aria-label": model.name },
    el("h3", { class: "model" }, heading(model)), el("p", { class: "small soft" }, `${rows.length} clusters · top cluster ${percent((rows[0]?.count ?? 0) / tokens, 0)}`),
    el("div", { class: "stack" }, rows.map(({ count }, i) => el("i", { class: i < TOP ? `r${i}` : "rest", style: { width: `${(100 * count) / tokens}%` } }))), legend, text);
}

/* ---------- tokens ---------- */

const spreadOf = (model, places) => {
  const counts = new Map();
  for (const t of places) if (model.of[t] >= 0) counts.set(model.of[t], (counts.get(model.of[t]) ?? 0) + 1);
  const rows = [...counts].sort((a, b) => b[1] - a[1]), all = rows.reduce((s, r) => s + r[1], 0);
  return { rows, all, entropy: rows.reduce((s, [, n]) => s - (n / all) * Math.log2(n / all), 0) };
};

function tokensView() {
  const { names, counts, order } = vocabulary(0), list = el("div", { class: "list", id: "list" });
  const fill = () => {
    const wanted = memory.find.trim().toLowerCase(), found = [];
    for (const w of order) { if (!wanted || names[w].includes(wanted)) found.push(w); if (found.length >= 200) break; }
    if (wanted) found.sort((a, b) => (names[b] === wanted) - (names[a] === wanted) || names[b].startsWith(wanted) - names[a].startsWith(wanted));
    list.replaceChildren(...found.map((w) => el("button", { type: "button", class: "item", "aria-current": names[w] === at.word ? "true" : null, onclick: () => go(here({ word: names[w] })) },
      el("span", { class: "row" }, el("b", {}, names[w]), el("span", { class: "soft" }, whole(counts[w]))))));
    if (!found.length) list.append(el("p", { class: "soft" }, "No token contains this."));
  };
  const search = el("input", { type: "search", id: "search", placeholder: "Search tokens ( / )", "aria-label": "Search tokens", oninput: () => { memory.find = search.value; fill(); } });
  search.value = memory.find;
  if (at.word === undefined) at.word = names[order[0]];
  fill();
  return [el("div", { class: "two" }, el("div", {}, search, el("p", { class: "soft small" }, "Pieces of text as the tokenizer cuts them, without case."), list), el("section", { id: "detail", "aria-label": "Token" }, wordDetail(at.word)))];
}

function wordDetail(word) {
  const places = placesOf(clean(word ?? ""));
  if (!places.length) return el("p", {}, `No token is “${word ?? ""}”.`);
  return [el("h2", {}, `“${clean(word)}”`), el("p", { class: "soft" }, `${whole(places.length)} times in ${whole(new Set(places.map(docOf)).size)} documents`),
    el("div", { class: "cards" }, models.map((model) => {
      const { rows, all, entropy } = spreadOf(model, places);
      return el("section", { class: "card" }, el("h3", { class: "model" }, heading(model)),
        el("p", { class: "small soft" }, `${rows.length} of ${model.k} clusters · ${number(entropy, 2)} of ${number(Math.log2(Math.max(2, model.k)), 2)} bits`),
        shortened(([id, n]) => el("details", { ontoggle: (event) => { if (event.target.childElementCount === 1) event.target.append(...examples(model, id, places)); } },
          el("summary", {}, el("span", { class: "inline" }, `${clusterName(model, id)} `, el("span", { class: "soft" }, `${percent(n / all, 0)} (${whole(n)})`)), el("div", { class: "meter" }, el("i", { style: { width: `${(100 * n) / all}%` } })))), rows, 8));
    }))];
}
const examples = (model, id, places) => [link({ cluster: id, model: letter(model.index) }, "open the cluster"),
  ...places.filter((t) => model.of[t] === id).slice(0, 5).map((t) => el("div", { class: "small" }, link({ doc: docOf(t), cluster: id, model: letter(model.index) }, docName(docOf(t))), snippet(model, docOf(t), id, t)))];

/* ---------- experts ---------- */

const METRICS = [["load", "load"], ["mass", "probability"], ["specialisation", "specialisation (bits)"]];

function expertsView() {
  const model = models[at.model];
  if (!model.experts.length) return [el("p", {}, "This analysis has no experts described; run “emo-select clusters label”.")];
  const wanted = at.expert === undefined ? model.experts[0] : model.expertsByPlace.get(`${at.layer ?? 0}.${at.expert}`) ?? model.experts[0];
  const keep = model.keep_sets[memory.keep - 1];
  const shown = el("div"), redraw = () => shown.replaceChildren(expertGrid(model, wanted, model.keep_sets[memory.keep - 1]), lostTable(model, model.keep_sets[memory.keep - 1]));
  shown.append(expertGrid(model, wanted, keep), lostTable(model, keep));
  return [el("div", { class: "bar" }, el("span", {}, heading(model)), choice("Shade by", "metric", METRICS, redraw),
    model.keep_sets.length ? choice("Kept experts", "keep", [["0", "no keep set"], ...model.keep_sets.map((k, i) => [String(i + 1), k.name])], redraw) : null,
    el("span", { class: "soft small" }, "Rows are layers, columns experts; hatched: never chosen.")), shown, expertDetail(model, wanted)];
}

function expertGrid(model, selected, keep) {
  const most = Math.max(...model.experts.map((e) => e[memory.metric] ?? 0), 1e-9), width = Math.max(...model.layers.map((l) => l.experts));
  const cells = model.layers.map((layer) => [el("span", { class: "head" }, `layer ${layer.layer}`), [...Array(width).keys()].map((e) => {
    const view = model.expertsByPlace.get(`${layer.layer}.${e}`);
    if (!view) return el("span");
    const value = view[memory.metric] ?? 0, kept = keep?.kept[layer.layer]?.includes(e);
    return el("button", { type: "button", class: `cell${view.dead ? " dead" : ""}${kept ? " kept" : ""}`, role: "gridcell", tabindex: view === selected ? 0 : -1, "aria-selected": String(view === selected),
      "data-layer": layer.layer, "data-expert": e, "aria-label": `layer ${layer.layer} expert ${e}`, style: { background: `color-mix(in srgb, var(--shade) ${Math.round(8 + 92 * Math.sqrt(value / most))}%, var(--rest))` },
      onclick: () => go({ view: "experts", model: letter(at.model), layer: layer.layer, expert: e }) });
  })]);
  const grid = el("div", { class: "grid", role: "grid", id: "experts", "aria-label": "Experts", style: { gridTemplateColumns: `max-content repeat(${width}, 1rem)` } }, cells);
  grid.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key], cell = event.target;
    if (!move || cell.dataset.layer === undefined) return;
    const rows = model.layers.map((l) => l.layer), row = rows[rows.indexOf(Number(cell.dataset.layer)) + move[0]];
    grid.querySelector(`[data-layer="${row}"][data-expert="${Number(cell.dataset.expert) + move[1]}"]`)?.focus();
    event.preventDefault();
    event.stopPropagation();
  });
  return el("div", { class: "scroll" }, grid);
}

function lostTable(model, keep) {
  if (!keep) return "";
  const rows = model.clusters.filter((c) => keep.lost[c.id] != null).sort((a, b) => keep.lost[b.id] - keep.lost[a.id]);
  return el("div", {}, el("h3", {}, `Router mass that clusters lose with ${keep.name}`), shortened((c) => el("div", { class: "small" }, link({ cluster: c.id, model: letter(at.model) }, clusterName(model, c.id)), el("span", { class: "soft" }, ` ${percent(keep.lost[c.id], 0)}`),
    el("div", { class: "meter" }, el("i", { style: { width: `${100 * keep.lost[c.id]}%` } }))), rows, 12));
}

function expertDetail(model, view) {
  const users = model.clusters.map((c) => [c, c.experts.find((l) => l.layer === view.layer)?.experts.find((e) => Number(e.name) === view.expert)]).filter(([, e]) => e).sort((a, b) => b[1].lift - a[1].lift);
  const layer = model.layers.find((l) => l.layer === view.layer);
  return el("section", { id: "detail", "aria-label": "Expert" }, el("h2", {}, `Layer ${view.layer}, expert ${view.expert}`),
    el("p", { class: "facts" }, view.dead ? el("span", {}, el("b", {}, "never chosen")) : null, el("span", {}, "chosen by ", el("b", {}, percent(view.load)), ` of tokens (even: ${percent(layer.chosen / layer.experts)})`),
      el("span", {}, "mean probability ", el("b", {}, number(view.mass, 4))), view.specialisation == null ? null : el("span", {}, "specialisation ", el("b", {}, `${number(view.specialisation, 2)} bits`))),
    el("div", { class: "cols" },
      el("div", {}, wordList("Words", view.words, false), users.length ? [el("h3", {}, "Clusters that use it most"), el("div", { class: "words" }, users.slice(0, 8).map(([c, e]) => el("a", { class: "word", href: address({ cluster: c.id, model: letter(at.model) }) }, `${clusterName(model, c.id)} ${lift(e.lift)}`)))] : null),
      el("div", {}, view.labels.length ? [el("h3", {}, `${data.label_key} (share, lift)`), bars(view.labels.map((l) => [l.name, l.share, `${percent(l.share, 0)} ${lift(l.lift)}`]))] : null)),
    view.documents.length ? [el("h3", {}, "Documents"), el("div", { class: "words" }, view.documents.map((d) => el("a", { class: "word", href: address({ doc: d, model: letter(at.model) }) }, docName(d))))] : null);
}

/* ---------- comparison ---------- */

const measureKey = (m) => `${m.name}|${m.layer ?? ""}`;
const interval = (m) => (m.low == null ? "" : ` [${number(m.low)}, ${number(m.high)}]`);

function comparisonView() {
  return [largest(), measureTable(), layerCharts(), contingency()];
}

function largest() {
  return el("section", {}, el("h2", {}, "Largest clusters"), el("div", { class: "cards" }, models.map((model) => el("div", { class: "card" }, el("h3", { class: "model" }, heading(model)),
    el("p", { class: "small soft" }, [`${model.k} clusters`, `mean cosine ${number(model.objective)}`, model.stability == null ? "" : `restarts agree ${number(model.stability, 2)} (adjusted Rand)`].filter(Boolean).join(" · ")),
    shortened((c) => el("div", { class: "small" }, el("div", { class: "row" }, link({ cluster: c.id, model: letter(model.index) }, clusterName(model, c.id)), el("span", { class: "soft" }, ` ${percent(shareOf(model, c.id))} · ${c.kind}`)),
      el("div", { class: "meter" }, el("i", { style: { width: `${(100 * model.sizes[c.id]) / Math.max(...model.sizes)}%` } }))), [...model.clusters].sort((a, b) => model.sizes[b.id] - model.sizes[a.id]), 18)))));
}

function measureTable() {
  const known = models.map((model) => new Map(model.measures.map((m) => [measureKey(m), m])));
  const rows = [...new Map(models.flatMap((model) => model.measures.filter((m) => m.layer == null).map((m) => [measureKey(m), m]))).entries()];
  if (!rows.length) return null;
  return el("section", {}, el("h2", {}, "Measures"), el("p", { class: "soft small" }, "Value, 95 % interval over documents; below it the same number on shuffled data."),
    el("div", { class: "scroll" }, el("table", { id: "measures" }, el("tr", {}, el("th", {}, "measure"), models.map((m) => el("th", { class: "n" }, heading(m)))),
      rows.map(([key, first]) => el("tr", {}, el("th", { scope: "row" }, first.about || first.name), known.map((one) => { const m = one.get(key); return el("td", { class: "n" }, m ? [el("b", {}, number(m.value)), el("span", { class: "soft small" }, interval(m)), m.null == null ? null : el("div", { class: "soft small" }, `shuffled ${number(m.null)}`)] : "–"); }))))));
}

function layerCharts() {
  const names = [...new Map(models.flatMap((model) => model.measures.filter((m) => m.layer != null).map((m) => [m.name, m.about || m.name])))];
  if (!names.length) return null;
  return el("section", {}, el("h2", {}, "Per layer"), el("div", { class: "cols" }, names.map(([name, about]) => el("figure", { style: { margin: "0 0 1rem" } }, el("figcaption", { class: "small" }, about), layerChart(name)))));
}

function layerChart(name) {
  const rows = models.map((model) => model.measures.filter((m) => m.name === name && m.layer != null).sort((a, b) => a.layer - b.layer));
  const all = rows.flat(), layers = all.map((m) => m.layer), low = Math.min(0, ...all.map((m) => m.low ?? m.value)), high = Math.max(...all.map((m) => m.high ?? m.value), 1e-9);
  const x = (layer) => 40 + (330 * (layer - Math.min(...layers))) / Math.max(1, Math.max(...layers) - Math.min(...layers)), y = (v) => 120 - (105 * (v - low)) / (high - low || 1);
  return svg("svg", { viewBox: "0 0 390 150", role: "img", "aria-label": name }, svg("path", { class: "axis", d: `M40 ${y(0)}H375M40 15V120` }),
    svg("text", { x: 36, y: 20, "text-anchor": "end" }, number(high, 2)), svg("text", { x: 36, y: y(0) + 4, "text-anchor": "end" }, "0"),
    [...new Set(layers)].filter((l, i, every) => every.length <= 12 || i % Math.ceil(every.length / 12) === 0).map((l) => svg("text", { x: x(l), y: 136, "text-anchor": "middle" }, String(l))), svg("text", { x: 205, y: 149, "text-anchor": "middle" }, "layer"),
    rows.map((own, i) => svg("g", { class: tint(i) }, own.length > 1 && own.every((m) => m.low != null) ? svg("path", { class: "band", d: `M${own.map((m) => `${x(m.layer)} ${y(m.high)}`).join("L")}L${[...own].reverse().map((m) => `${x(m.layer)} ${y(m.low)}`).join("L")}Z` }) : null,
      own.length ? svg("path", { class: "line", d: `M${own.map((m) => `${x(m.layer)} ${y(m.value)}`).join("L")}` }) : null, own.map((m) => svg("circle", { class: "point", cx: x(m.layer), cy: y(m.value), r: 3 }, svg("title", {}, `${shortName(models[i])}, layer ${m.layer}: ${number(m.value)}${interval(m)}`))))));
}

function contingency() {
  if (models.length < 2) return null;
  const a = models[at.model], b = models[at.other !== undefined && at.other !== at.model ? at.other : (at.model + 1) % models.length];
  const table = new Float64Array(a.k * b.k), rows = new Float64Array(a.k), columns = new Float64Array(b.k);
  let all = 0;
  for (let t = 0; t < a.of.length; t++) if (a.of[t] >= 0 && b.of[t] >= 0) { table[a.of[t] * b.k + b.of[t]]++; rows[a.of[t]]++; columns[b.of[t]]++; all++; }
  const order = (sizes) => [...sizes.keys()].filter((i) => sizes[i]).sort((i, j) => sizes[j] - sizes[i]), left = order(rows), free = order(columns), top = [];
  for (const r of left) { const best = free.reduce((m, c) => (table[r * b.k + c] > table[r * b.k + (m ?? c)] || m === undefined ? c : m), undefined); if (best !== undefined) { top.push(best); free.splice(free.indexOf(best), 1); } }
  top.push(...free);
  const entropy = (sizes) => sizes.reduce((s, n) => (n ? s - (n / all) * Math.log2(n / all) : s), 0);
  let shared = 0;
  for (const r of left) for (const c of top) { const n = table[r * b.k + c]; if (n) shared += (n / all) * Math.log2((n * all) / (rows[r] * columns[c])); }
  const both = (entropy(rows) + entropy(columns)) / 2;
  const cell = (r, c) => { const n = table[r * b.k + c], share = n / rows[r];
    return el("td", { class: "c", title: `${clusterName(a, r)} → ${clusterName(b, c)}: ${whole(n)} tokens, ${percent(share)} of the row`, style: { background: `color-mix(in srgb, var(--shade) ${Math.round(100 * Math.sqrt(share))}%, var(--rest))` } }); };
  return el("section", {}, el("h2", {}, "Where the clusters of one model lie in the other"),
    models.length > 2 ? el("div", { class: "bar" }, models.map((m, i) => (i === at.model ? null : el("button", { type: "button", "aria-pressed": String(m === b), onclick: () => go(here({ other: i })) }, `with ${letter(i)} ${shortName(m)}`)))) : null,
    el("p", { class: "soft small" }, `Rows: ${letter(a.index)} ${a.name}; columns: ${letter(b.index)} ${b.name}, numbered below. A cell is the share of the row's tokens. Normalised mutual information ${number(both ? shared / both : 0, 3)}.`),
    el("div", { class: "scroll" }, el("table", { class: "heat", id: "contingency" }, el("tr", {}, el("th"), top.map((c) => el("th", { class: "num", title: clusterName(b, c) }, String(c)))),
      left.map((r) => el("tr", {}, el("th", { class: "name", scope: "row", title: clusterName(a, r) }, link({ cluster: r, model: letter(a.index) }, clusterName(a, r))), top.map((c) => cell(r, c)))))),
    el("details", { class: "small" }, el("summary", {}, "Columns"), el("div", { class: "words" }, top.map((c) => el("a", { class: "word", href: address({ cluster: c, model: letter(b.index) }) }, `${c} ${clusterName(b, c)}`)))));
}

/* ---------- start ---------- */

document.addEventListener("pointerover", (event) => { const span = event.target.closest?.(".t[data-t]"); if (span) showTip(span, tokenTip(span)); else hideTip(); });
document.addEventListener("click", (event) => {
  const span = event.target.closest?.(".t[data-t]");
  if (!span) return;
  const model = models[span.dataset.m], c = model.of[span.dataset.t];
  showTip(span, tokenTip(span));
  if (event.detail === 2 && c >= 0) go({ cluster: c, model: letter(model.index) });
});
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
  if (event.key === "Escape") { hideTip(); if (typing) event.target.blur(); else if (at.view === "documents" && at.cluster !== undefined) go({ view: "documents", doc: at.doc, model: letter(at.model) }); return; }
  if (typing) return;
  const tab = VIEWS[Number(event.key) - 1];
  if (tab) go({ view: tab[0], model: letter(at.model) });
  else if (event.key === "/" && $("search")) { event.preventDefault(); $("search").focus(); $("search").select(); }
  else if (at.view === "documents" && (event.key === "ArrowLeft" || event.key === "ArrowRight")) documentsView.step(event.key === "ArrowLeft" ? -1 : 1);
});
addEventListener("hashchange", () => { const top = at.view; draw(); if (top !== at.view) scrollTo(0, 0); });
addEventListener("scroll", hideTip, { passive: true });

decode().then(() => {
  $("about").textContent = `${models.map((m) => m.name).join(" · ")} — ${whole(docs.count)} documents, ${whole(docs.piece.length)} tokens, written ${data.written} by emo-select ${data.version}`;
  draw();
}).catch((error) => {
  $("about").textContent = `This page could not be read: ${error.message}. It needs a browser of 2023 or later.`;
  throw error;
});
