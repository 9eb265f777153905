// Rows are lists with a common order of columns; a text is stored as [its index].
const unpack = ({ columns, texts, lines }) => lines.map((line) =>
  Object.fromEntries(columns.map((name, i) => [name, Array.isArray(line[i]) ? texts[line[i][0]] : line[i] ?? undefined])));
const rows = unpack(data.rows).map((r) => ({ ...r, diff: [r.difference ?? null, r.differenceLow, r.differenceHigh] }));
const tried = unpack(data.path);
const wide = (r) => r.dim ? `${r.name}, k = ${r.dim.toLocaleString("en")}` : r.name;
const percent = (metric) => metric.endsWith("%");

function spell(value, metric = "") {
  if (value === null || value === undefined) return "";
  const text = percent(metric) ? value.toFixed(1) : Math.abs(value) < 1 ? value.toFixed(2).replace("0.", ".") : value.toFixed(2);
  return text.replace("-", "−");
}

const spellHalf = (r) => `${spell(r.mean, r.metric)} ±${spell((r.high - r.low) / 2, r.metric)}`;

function describe(r) {
  return [
    wide(r),
    `${spell(r.mean, r.metric)} (95 %: ${spell(r.low, r.metric)} to ${spell(r.high, r.metric)}), ${r.n} queries`,
    r.ofCeiling !== undefined ? `${Math.round(100 * r.ofCeiling)} % of the ceiling` : null,
    r.diff[0] !== null ? `against ${data.reference}: ${spell(r.diff[0], r.metric)} (${spell(r.diff[1], r.metric)} to ${spell(r.diff[2], r.metric)})` : null,
    r.settings ? `chosen: ${r.settings}` : null,
    r.kib ? `${r.kib} KiB an example, ${r.fit} s to fit, ${r.ms} ms a query` : null,
  ].filter(Boolean);
}

/* What the pointer is over */
const tip = make("div", { id: "tip", "aria-hidden": "true" });

function hover(node, lines) {
  node.addEventListener("pointermove", (event) => {
    tip.replaceChildren(...lines().flatMap((line, i) => i ? [make("br"), line] : [make("b", {}, line)]));
    tip.style.left = Math.max(4, Math.min(event.clientX + 16, innerWidth - tip.offsetWidth - 4)) + "px";
    tip.style.top = Math.max(4, Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8)) + "px";
    tip.style.visibility = "visible";
  });
  node.addEventListener("pointerleave", () => { tip.style.visibility = "hidden"; });
  return node;
}

/* Charts are drawn for the width they have, so that their type keeps its size */
const pen = document.createElement("canvas").getContext("2d");

function textWidth(text, strong = false) {
  pen.font = `${strong ? 700 : 400} 12px ${getComputedStyle(document.documentElement).fontFamily}`;
  return pen.measureText(text).width;
}

function clipped(text, width, strong = false) {
  if (textWidth(text, strong) <= width) return text;
  let length = text.length;
  while (length > 1 && textWidth(text.slice(0, length) + "…", strong) > width) length--;
  return text.slice(0, length) + "…";
}

function fitted(paint) {
  const host = make("div");
  let drawn = 0;
  host.again = () => { if (host.clientWidth) host.replaceChildren(paint(drawn = host.clientWidth)); };
  new ResizeObserver(() => { if (host.clientWidth !== drawn) host.again(); }).observe(host);
  return host;
}

const say = (attributes, text) => svg("text", attributes, text);

function ticksOf(low, high, most) {
  const raw = (high - low) / Math.max(1, most), size = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * size).find((v) => v >= raw) ?? 10 * size;
  const found = [];
  for (let v = Math.ceil(low / step) * step; v <= high + 1e-9; v += step) found.push(Math.abs(v) < 1e-12 ? 0 : +v.toFixed(9));
  return found;
}

// Labels along a horizontal axis; those that would touch the previous one are omitted.
function ticksBelow(root, values, x, y, width) {
  let end = -Infinity;
  for (const v of values) {
    const text = String(v), half = textWidth(text) / 2, at = Math.min(Math.max(x(v), half), width - half);
    if (at - half < end + 7) continue;
    end = at + half;
    root.append(say({ class: "tick", x: at, y, "text-anchor": "middle" }, text));
  }
}

function frame(width, { left = 46, right = 12, top = 10, bottom = 36, height = 300 }, scale, metric, xlabel, spoken) {
  const root = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": spoken });
  const x = (v) => left + (width - left - right) * scale.x(v);
  const y = (v) => height - bottom - (height - top - bottom) * (v - scale.low) / (scale.high - scale.low || 1);
  for (const t of ticksOf(scale.low, scale.high, 5)) {
    root.append(svg("line", { class: "grid", x1: left, x2: width - right, y1: y(t), y2: y(t) }),
      say({ class: "tick", x: left - 6, y: y(t) + 4, "text-anchor": "end" }, percent(metric) ? String(t) : String(t).replace(/^(-?)0\./, "$1.").replace("-", "−")));
  }
  root.append(say({ class: "tick", x: width - right, y: height - 3, "text-anchor": "end" }, clipped(xlabel, width - right)));
  return { root, x, y, right: width - right, base: height - bottom };
}

/* One measure: a row a method, with intervals */
const keys = unique(rows.map((r) => r.key));
const state = { key: data.conclusions[0]?.key ?? keys[0], controls: false, tuned: true, order: "value", find: "" };

function shownRows() {
  const found = rows.filter((r) => r.key === state.key && r.control !== "reference" && (state.controls || !r.control)
    && (state.tuned || !r.tuned) && wide(r).toLowerCase().includes(state.find.toLowerCase()));
  return state.order === "value" ? found.sort((a, b) => b.mean - a.mean) : found;
}

function forest(width) {
  const here = rows.filter((r) => r.key === state.key), metric = here[0].metric, shown = shownRows();
  if (!shown.length) return make("p", { class: "muted" }, "No method has this name.");
  const references = here.filter((r) => r.control === "reference").sort((a, b) => a.mean - b.mean);
  // On a phone the name is above its interval.
  const narrow = width < 620, high = narrow ? 40 : 23, top = 26;
  const values = shown.map((r) => spellHalf(r) + (r.diff[1] > 0 || r.diff[2] < 0 ? " *" : ""));
  const right = narrow ? 8 : 16 + Math.max(...values.map((text) => textWidth(text, true)));
  const left = narrow ? 8 : Math.min(width * .36, 22 + Math.max(...shown.map((r) => textWidth(wide(r), true))));
  const every = [...shown, ...references];
  let low = Math.min(0, ...every.map((r) => r.low)), most = Math.max(...every.map((r) => r.high));
  if (most - low < 1e-9) most = low + 1;
  const pad = (most - low) * .03;
  low -= low < 0 ? pad : 0; most += pad;
  const x = (v) => left + (width - left - right) * (v - low) / (most - low), bottom = top + high * shown.length;
  const spoken = shown.map((r) => `${wide(r)} ${spellHalf(r)}`).join("; ");
  const root = svg("svg", { role: "img", "aria-label": spoken });
  shown.forEach((_, i) => { if (i % 2) root.append(svg("rect", { class: "zebra", x: 0, y: top + high * i, width, height: high })); });
  const ticks = ticksOf(low, most, (width - left - right) / 70);
  for (const t of ticks) root.append(svg("line", { class: "grid", x1: x(t), x2: x(t), y1: top - 4, y2: bottom }));
  ticksBelow(root, ticks, x, 14, width);
  const base = here.find((r) => r.name === data.reference);
  if (base) root.append(svg("line", { class: "reference", x1: x(base.mean), x2: x(base.mean), y1: top - 4, y2: bottom }));
  const ends = [];  // for each row of labels, the end of the last one
  for (const r of references) {
    root.append(svg("line", { class: "ceiling", "stroke-dasharray": r.method === "ceiling" ? "" : "3 3", x1: x(r.mean), x2: x(r.mean), y1: top - 6, y2: bottom + 2 }));
    const text = clipped(`${r.method} ${spell(r.mean, metric)}`, width - 8), long = textWidth(text);
    const at = Math.min(Math.max(x(r.mean) - long / 2, 2), width - long - 2);
    let row = ends.findIndex((end) => end + 8 < at);
    if (row < 0) row = ends.push(0) - 1;
    ends[row] = at + long;
    root.append(say({ x: at, y: bottom + 15 + 15 * row, class: "dim" }, text));
  }
  shown.forEach((r, i) => {
    const y = top + high * i, middle = y + (narrow ? 29 : high / 2), line = y + (narrow ? 16 : high / 2 + 4);
    const colour = r.control ? "var(--ink)" : methodColour(r.method), strong = r.best ? "strong" : r.control ? "dim" : "";
    const room = narrow ? width - textWidth(values[i], true) - 24 : left - 16;
    root.append(say({ x: 6, y: line, class: strong }, clipped(wide(r), room, true)),
      svg("line", { x1: x(r.low), x2: x(r.high), y1: middle, y2: middle, stroke: colour, "stroke-width": 2.4, "stroke-linecap": "round", opacity: .75 }),
      svg("circle", { cx: x(r.mean), cy: middle, r: r.best ? 5.5 : 4, fill: r.control ? "var(--surface)" : colour, stroke: colour, "stroke-width": 1.6 }),
      say({ x: width - 6, y: line, "text-anchor": "end", class: r.best ? "strong" : "" }, values[i]),
      hover(svg("rect", { class: "hit", x: 0, y, width, height: high }), () => describe(r)));
  });
  const height = bottom + 8 + 15 * ends.length;
  return furnish(root, { width, height, viewBox: `0 0 ${width} ${height}` }, []);
}

const where = (key) => { const [task, truth, ...metric] = key.split("/"); return { task, truth, metric: metric.join("/") }; };
const chart = fitted(forest);
const view = make("div", { class: "view" });
const nav = make("nav", { "aria-label": "Measures" });

function drawMeasure() {
  const { task, truth, metric } = where(state.key), n = rows.find((r) => r.key === state.key).n;
  const box = (name, text) => make("label", {}, make("input", { type: "checkbox", checked: state[name], onchange: (event) => { state[name] = event.target.checked; chart.again(); } }), text);
  const find = make("input", { type: "search", placeholder: "method…", value: state.find, "aria-label": "Show only methods named", oninput: (event) => { state.find = event.target.value; chart.again(); } });
  const order = make("select", { onchange: (event) => { state.order = event.target.value; chart.again(); } },
    make("option", { value: "value", selected: state.order === "value" }, "by value"), make("option", { value: "table", selected: state.order === "table" }, "as in the tables"));
  const sample = (family, text) => data.families[family] ? make("span", {}, ...data.families[family].slice(0, 3).map((name) => swatch(methodColour(name))), text) : null;
  view.replaceChildren(
    make("h3", {}, `${metric}, ${task}`), make("p", { class: "muted" }, `ground truth “${truth}”, mean over ${n}; the interval is 95 %`),
    make("div", { class: "tools" }, find, box("tuned", "with tuned settings"), box("controls", "with controls"), make("label", {}, "order ", order)),
    chart,
    make("div", { class: "legend" }, sample("none", "without gradients"), sample("gradient", "plain gradients"), sample("curvature", "with a curvature"),
      make("span", {}, swatch(null, "ring"), "control"),
      make("span", {}, `bold: no method is better beyond chance; *: differs from ${data.reference} (dashed) beyond chance`)));
  chart.again();
  for (const button of nav.querySelectorAll("button")) button.ariaCurrent = button.dataset.key === state.key ? "true" : null;
}

for (const task of unique(rows.map((r) => r.task))) {
  nav.append(make("p", {}, task));
  const own = keys.filter((key) => where(key).task === task);
  for (const key of own) {
    const { truth, metric } = where(key), several = own.filter((other) => where(other).metric === metric).length > 1;
    nav.append(make("button", { type: "button", "data-key": key, onclick: () => { state.key = key; drawMeasure(); } }, (several ? truth + ": " : "") + metric));
  }
}

/* Which method for what */
const cards = make("div", { class: "cards" });
for (const wish of unique(data.conclusions.map((c) => c.wish))) {
  const card = make("div", { class: "wish" }, make("h3", {}, wish));
  for (const c of data.conclusions.filter((one) => one.wish === wish)) {
    const share = make("i");
    share.style.width = Math.min(100, 100 * c.ofCeiling) + "%";
    share.style.background = methodColour(c.method);
    card.append(make("button", { class: "finding", type: "button", title: "show all methods", onclick: () => { state.key = c.key; drawMeasure(); document.getElementById("measures").scrollIntoView({ behavior: "smooth" }); } },
      make("span", { class: "where" }, c.where),
      make("span", { class: "who" }, make("b", {}, swatch(methodColour(c.method)), c.best + (c.tied ? ` (+ ${c.tied} tied)` : "")), make("span", { class: "value" }, c.value)),
      c.ofCeiling ? make("span", { class: "gauge" }, share) : null,
      make("small", {}, c.text)));
  }
  cards.append(card);
}

/* All at a glance */
function glance() {
  const plain = rows.filter((r) => !r.control);
  const columns = unique(rows.filter((r) => data.main.includes(r.metric) || /^(removal|union)@/.test(r.metric) || r.metric === "precision@10").map((r) => r.key));
  const names = unique(plain.map(wide)), cell = new Map(plain.map((r) => [wide(r) + "|" + r.key, r]));
  const span = new Map(columns.map((key) => { const values = plain.filter((r) => r.key === key).map((r) => r.mean); return [key, [Math.min(...values), Math.max(...values)]]; }));
  const table = make("table");
  const paint = (by) => {
    const value = (name) => cell.get(name + "|" + by)?.mean ?? -Infinity;
    const order = by ? [...names].sort((a, b) => value(b) - value(a)) : names;
    const head = (key, ...text) => make("th", { scope: "col", "aria-sort": by && by === key ? "descending" : null },
      make("button", { type: "button", onclick: () => { paint(key); table.querySelectorAll("thead button")[columns.indexOf(key) + 1].focus(); } }, ...text));
    const body = order.map((name) => make("tr", {}, make("th", { scope: "row" }, name), ...columns.map((key) => {
      const r = cell.get(name + "|" + key);
      if (!r) return make("td");
      const [low, high] = span.get(key), share = high > low ? (r.mean - low) / (high - low) : 0;
      const td = make("td", { class: r.best ? "best" : "" }, spell(r.mean, r.metric), make("span", { class: "half" }, " ±" + spell((r.high - r.low) / 2, r.metric)));
      td.style.background = `color-mix(in srgb, var(--accent) ${Math.round(34 * share)}%, transparent)`;
      return hover(td, () => describe(r));
    })));
    table.replaceChildren(make("thead", {}, make("tr", {}, head(null, "method"), ...columns.map((key) => head(key, where(key).metric, make("small", {}, where(key).task))))), make("tbody", {}, ...body));
  };
  paint(null);
  return make("div", { class: "panel" }, make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "All methods by all measures" }, table));
}

/* Lines: of a method's variants in one panel each has a dash of its own */
const DASHES = ["", "7 4", "2 4", "9 3 2 3"];

function lineChart(series, { metric, xlabel, reference = null }) {
  const variants = new Map();
  for (const q of series) {
    const nth = variants.get(q.method) ?? 0;
    variants.set(q.method, nth + 1);
    Object.assign(q, { colour: methodColour(q.method), dash: DASHES[nth % DASHES.length] });
  }
  const points = series.flatMap((q) => q.points), xs = unique(points.map((p) => p.x)).sort((a, b) => a - b);
  const low = Math.min(...points.map((p) => p.low ?? p.y), reference ?? Infinity), high = Math.max(...points.map((p) => p.high ?? p.y), reference ?? -Infinity);
  const pad = (high - low) * .05 || .1, span = Math.log10(xs.at(-1) / xs[0]);
  const scale = { low: low - pad, high: high + pad, x: (v) => span ? Math.log10(v / xs[0]) / span : .5 };
  const paint = (width) => {
    const spoken = series.map((q) => `${q.name}: ${q.points.map((p) => `${p.x}: ${spell(p.y, metric)}`).join(", ")}`).join("; ");
    const { root, x, y, right, base } = frame(width, {}, scale, metric, xlabel, spoken);
    ticksBelow(root, xs, x, base + 15, width);
    if (reference !== null) root.append(svg("line", { class: "reference", x1: 46, x2: right, y1: y(reference), y2: y(reference) }));
    for (const q of series) {
      const at = (p, value) => `${x(p.x)},${y(value)}`;
      if (q.points[0].low !== undefined) root.append(svg("polygon", { points: [...q.points.map((p) => at(p, p.high)), ...[...q.points].reverse().map((p) => at(p, p.low))].join(" "), fill: q.colour, opacity: .09 }));
      root.append(svg("polyline", { points: q.points.map((p) => at(p, p.y)).join(" "), fill: "none", stroke: q.colour, "stroke-width": q.name === data.reference ? 3 : 2, "stroke-dasharray": q.dash, "stroke-linejoin": "round" }));
      for (const p of q.points) root.append(hover(svg("circle", { cx: x(p.x), cy: y(p.y), r: 3.6, fill: q.colour }), () => [q.name, `${xlabel.split(",")[0]} = ${p.x}`, spell(p.y, metric) + (p.low !== undefined ? ` (${spell(p.low, metric)} to ${spell(p.high, metric)})` : "")]));
    }
    return root;
  };
  const entry = (q) => make("span", {}, svg("svg", { viewBox: "0 0 26 8", "aria-hidden": "true" }, svg("line", { x1: 0, x2: 26, y1: 4, y2: 4, stroke: q.colour, "stroke-width": 2.4, "stroke-dasharray": q.dash })), q.name);
  const ordered = [...series].sort((a, b) => b.points.at(-1).y - a.points.at(-1).y);
  return make("div", {}, fitted(paint), make("div", { class: "legend" }, ...ordered.map(entry)));
}

function curves(pattern) {
  const found = rows.filter((r) => pattern.test(r.metric) && !r.control), place = (r) => `${r.task}/${r.truth}/${r.metric.split("@")[0]}`;
  return unique(found.map(place)).flatMap((key) => {
    const here = found.filter((r) => place(r) === key), sum = new Map();
    if (unique(here.map((r) => r.metric)).length < 2) return [];
    for (const r of here) sum.set(wide(r), (sum.get(wide(r)) ?? 0) + r.mean);
    const must = [data.reference, "pixel_l2", "random"].filter((name) => sum.has(name));
    const names = [...[...sum.keys()].filter((name) => !must.includes(name)).sort((a, b) => sum.get(b) - sum.get(a)).slice(0, 5), ...must];
    const series = names.map((name) => {
      const own = here.filter((r) => wide(r) === name);
      return { name, method: own[0].method, points: own.map((r) => ({ x: parseInt(r.metric.split("@")[1]), y: r.mean, low: r.low, high: r.high })).sort((a, b) => a.x - b.x) };
    });
    const { task, metric } = where(key);
    return [make("div", { class: "panel" }, make("h3", {}, `${task}: ${metric} at k` + (metric === "union" ? ", rise of the loss in %" : "")), lineChart(series, { metric: here[0].metric, xlabel: "k, log scale" }))];
  });
}

function paths() {
  const columns = unique(tried.flatMap((r) => Object.keys(r))).filter((key) => key.includes("/") && data.main.includes(key.split("/").pop()));
  return columns.flatMap((key) => {
    const base = rows.find((r) => r.name === data.reference && r.key === key), here = tried.filter((r) => r[key] !== undefined);
    const series = unique(here.map((r) => r.method)).flatMap((method) => unique(here.filter((r) => r.method === method).map((r) => r.p ?? 1)).map((p) => ({
      method, name: p === 1 ? method : `${method}, p = ${p}`,
      points: here.filter((r) => r.method === method && (r.p ?? 1) === p).map((r) => ({ x: r.alpha, y: r[key] })) })));
    return series.length ? [make("div", { class: "panel" }, make("h3", {}, key.replaceAll("/", ", ")), lineChart(series, { metric: key, xlabel: "α, damping in mean eigenvalues", reference: base ? base.mean : null }))] : [];
  });
}

/* Quality against cost */
const touch = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;

function costChart(key) {
  const here = rows.filter((r) => r.key === key && !r.control), metric = here[0].metric;
  const ms = (r) => Math.max(r.ms || 0, 1e-3), size = (r) => 4 + 3.2 * Math.log10(1 + (r.kib || 0));
  const first = Math.log10(Math.min(...here.map(ms))) - .1, last = Math.log10(Math.max(...here.map(ms))) + .1;
  const scale = { low: Math.min(...here.map((r) => r.low)), high: Math.max(...here.map((r) => r.high)), x: (v) => (Math.log10(v) - first) / (last - first) };
  const powers = Array.from({ length: Math.max(0, Math.floor(last) - Math.ceil(first) + 1) }, (_, i) => +(10 ** (Math.ceil(first) + i)).toPrecision(1));
  const rank = (r) => r.name === data.reference ? Infinity : r.mean;
  const paint = (width) => {
    const { root, x, y, right, base } = frame(width, { height: 320 }, scale, metric, "ms a query, log scale", here.map((r) => `${wide(r)} ${spellHalf(r)}, ${r.ms} ms`).join("; "));
    ticksBelow(root, powers, x, base + 15, width);
    const discs = here.map((r) => ({ r, cx: x(ms(r)), cy: y(r.mean), radius: size(r) }));
    for (const { r, cx, cy, radius } of discs) {
      root.append(svg("line", { x1: cx, x2: cx, y1: y(r.low), y2: y(r.high), stroke: methodColour(r.method), opacity: .35 }),
        hover(svg("circle", { cx, cy, r: radius, fill: methodColour(r.method), opacity: .8, stroke: "var(--surface)" }), () => describe(r)));
    }
    // Names where there is room: first the reference, then from the best method down.
    const taken = discs.map(({ cx, cy, radius }) => ({ left: cx - radius, right: cx + radius, top: cy - radius, bottom: cy + radius }));
    for (const { r, cx, cy, radius } of discs.sort((a, b) => rank(b.r) - rank(a.r))) {
      const text = wide(r), long = textWidth(text), gap = radius + 4;
      const places = [[cx + gap, cy + 4], [cx - gap - long, cy + 4], [cx - long / 2, cy - gap - 2], [cx - long / 2, cy + gap + 10]];
      const boxes = places.map(([left, line]) => ({ left, line, right: left + long, top: line - 12, bottom: line + 4 }));
      const free = boxes.find((box) => box.left > 46 && box.right < right && box.top > 0 && box.bottom < base && !taken.some((other) => touch(box, other)));
      if (!free) continue;
      taken.push(free);
      root.append(say({ x: free.left, y: free.line }, text));
    }
    return root;
  };
  return make("div", { class: "panel" }, make("h3", {}, `${metric}, ${where(key).task}`), fitted(paint));
}

/* The page */
const section = (id, title, text, ...parts) => parts.length ? make("section", { id }, make("h2", {}, title), text ? make("p", {}, text) : null, ...parts) : null;
const charts = (list) => list.length ? [make("div", { class: "charts" }, ...list)] : [];
const notes = make("ul", { class: "notes" }, ...[
  "Class detection rewards similarity of images: pixel distances score well, and on a class-conditional model an untrained network can reach 1.",
  "A square or a soft-max of any score raises LDS without further information: switch the controls on.",
  "The ceiling of LDS is estimated from the agreement between retrained models that differ only in their seeds.",
  "Intervals are over queries (for LDS also over subsets of the data), not over models, datasets or noise schedules. With many rows in a table, one in twenty differs by chance.",
  "Settings of tuned rows were chosen by the criterion that they name, on queries that are in no number here. Tuning by retraining needs retrained models, which are rarely available.",
  "Seconds are those of one run on one machine: compare them only with each other.",
  ...Object.entries(data.fits).map(([name, text]) => `What fitting found: ${name}: ${text}`),
  ...Object.entries(data.leftOut).map(([name, text]) => `Left out: ${name}. ${text}`),
].map((text) => make("li", {}, text)));
document.body.append(
  make("header", {}, make("h1", {}, data.title), make("p", { class: "lead" }, data.summary[0]),
    data.summary.length > 1 ? make("details", {}, make("summary", {}, "For each purpose, in words"), make("ul", {}, ...data.summary.slice(1).map((text) => make("li", {}, text)))) : null, factList(Object.entries(data.notes))),
  make("main", {}, ...[
    data.conclusions.length ? section("which", "Which method for what", "The best method by each ground truth, with its controls. Click one to see all methods.", cards) : null,
    section("measures", "Every measure", "All methods by one measure, with intervals.", make("div", { class: "panel explore" }, nav, view)),
    section("glance", "All at a glance", "Darker: closer to the best of the column; bold: no method is better beyond chance. Click a header to sort by it.", glance()),
    section("removal", "Loss without the top examples", "Rise of the loss of a group of queries when its top examples are removed, minus the rise for the other queries.", ...charts(curves(/^union@/))),
    section("byk", "Detection by k", "How many of the first k examples are relevant.", ...charts(curves(/^(precision|recall)@/))),
    section("path", "How damping and power were chosen", `All settings that were tried. They are chosen on tasks that no table reports; dashed grey: ${data.reference}.`, ...charts(tried.length ? paths() : [])),
    section("cost", "Quality against cost", "Seconds of one run; a larger disc needs more bytes of the store. Names are shown where there is room, the others under the pointer.", ...charts(unique(data.conclusions.map((c) => c.key)).slice(0, 6).map(costChart))),
    section("distrust", "What to distrust", "", notes)].filter(Boolean)), tip);
drawMeasure();
