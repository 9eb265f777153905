const { queries, examples, methods } = data;
const several = methods.length > 1;
const byId = (id) => document.getElementById(id);
const state = { query: 0, method: 0, card: -1, terms: [] };

/* The frame of the page */

const READ = [
  ["8.9 of 10", "the score, and the largest possible score; the line below shows their ratio, its tick the median of all examples"],
  ["±.01 total · 97 %", "one standard error of the score (sketch: from sketching the gradients only; total: from the drawn noise as well), and the probability that the example is among those shown. Methods whose error bars were not validated show none"],
  ["≈ 1–4", "ranks 1 to 4 cannot be distinguished: their order may be chance"],
  ["attribution map", "where in both pictures the score comes from: blue raises it, red lowers it. The map sums to the score except for the error of sketching"],
  ["× 3", "three examples have the same pixels and share this card"],
  ["bars", "each timestep's contribution to this score minus the mean of those shown, from noise (coarse structure) to details; the method's colour raises the score, red lowers it"],
  ["● ○", "the query's label, another label"],
];
const KEYS = [
  ["j ↓ →", "next query, or next example when one is open"],
  ["k ↑ ←", "previous query, or previous example"],
  ["Tab Enter", "go through the training examples, open one"],
  ["Esc", "close what is open, leave the search"],
  ["/", "search ids, labels, captions and metadata; label:7 for exactly this label, artist:ann for a column"],
  ["?", "this help"],
];

const closeButton = () => make("button", { class: "round", type: "button", "data-close": true, "aria-label": "Close" }, "✕");
document.body.append(
  make("header", {},
    make("div", { class: "bar" }, make("h1", {}, data.title),
      make("div", { class: "tools", role: "search" },
        make("input", { id: "filter", type: "search", placeholder: "Search captions, metadata", "aria-label": "Search captions, metadata, ids and labels", autocomplete: "off", spellcheck: "false" }),
        make("button", { id: "help-button", class: "round", type: "button", "aria-label": "How to read this page, and its keys" }, "?")))),
  make("div", { class: "columns" },
    make("nav", { "aria-label": "Queries" }, make("p", { class: "muted", id: "status", role: "status" }), make("ol", { id: "queries" })),
    make("main", { id: "main", tabindex: "-1" })),
  make("dialog", { id: "detail", "aria-labelledby": "detail-title" }),
  make("dialog", { id: "help", "aria-labelledby": "help-title" },
    make("div", { class: "panel" },
      make("div", { class: "bar" }, make("h2", { id: "help-title" }, "How to read this page"), closeButton()),
      make("dl", { class: "keys" }, ...READ.flatMap(([sign, text]) => [make("dt", { class: "number" }, sign), make("dd", {}, text)])),
      make("h3", {}, "Keys"),
      make("dl", { class: "keys" }, ...KEYS.flatMap(([names, text]) => [make("dt", {}, ...names.split(" ").map((name) => make("kbd", {}, name))), make("dd", {}, text)])))));

function picture(entry, alt, loading = null) {
  return make("img", { src: entry.image, alt, class: entry.tiny ? "tiny" : null, loading });
}

// A clip moves, unless the reader wants less motion; other places show its middle frame.
function motion(entry, alt) {
  if (!entry.moving) return picture(entry, alt);
  return make("picture", {}, make("source", { srcset: entry.image, media: "(prefers-reduced-motion: reduce)" }),
    make("img", { src: entry.moving, alt, class: entry.tiny ? "tiny" : null }));
}

function pairs(entries) {
  return make("dl", { class: "pairs" }, ...entries.flatMap(([name, value, href]) => [make("dt", {}, name),
    make("dd", {}, href ? make("a", { href, target: "_blank", rel: "noopener noreferrer" }, value) : value)]));
}

// Ids differ at their ends; the whole id is in the tooltip.
function shortId(id) {
  const letters = [...id];
  return letters.length > 24 ? "…" + letters.slice(-23).join("") : id;
}

function signed(value) {
  const size = Math.abs(value);
  const text = size === 0 || (size >= 0.0005 && size < 1e4) ? size.toFixed(size < 10 ? 4 : size < 1000 ? 2 : 1) : size.toExponential(2).replace(/([+-])(\d)$/, (_, sign, digit) => `${sign}0${digit}`);
  return (value < 0 ? "−" : "+") + text;
}

const percent = (share) => `${share < 0 ? "−" : ""}${Math.round(100 * Math.abs(share))} %`;
const less = (values, means) => values.map((value, place) => value - means[place]);

/* Charts */

function reach(rows) {
  const values = rows.flat();
  const range = { above: Math.max(0, ...values), below: Math.max(0, ...values.map((v) => -v)) };
  return range.above + range.below > 0 ? range : { above: 1, below: 0 };
}

// One bar per timestep; `range` is shared, so that bars of different charts are comparable.
function bars(values, { above, below }, method, spoken = null) {
  const zero = above / (above + below);
  const root = svg("svg", { viewBox: `0 0 ${values.length} 1`, preserveAspectRatio: "none", "aria-hidden": spoken ? null : "true", role: spoken && "img", "aria-label": spoken });
  values.forEach((value, step) => {
    const height = Math.abs(value) / (above + below);
    root.append(svg("rect", { x: step + 0.11, width: 0.78, y: value < 0 ? zero : zero - height, height, class: (value < 0 ? "against" : "for") + (method.blind[step] ? " blind" : "") }));
  });
  root.append(svg("line", { x1: 0, x2: values.length, y1: zero, y2: zero }));
  return root;
}

function flatBar(value, { above, below }) {
  const zero = below / (above + below), width = Math.abs(value) / (above + below);
  return svg("svg", { viewBox: "0 0 1 1", preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("rect", { x: value < 0 ? zero - width : zero, y: 0.1, width, height: 0.8, class: value < 0 ? "against" : "for" }),
    svg("line", { x1: zero, x2: zero, y1: 0, y2: 1 }));
}

// From zero to the largest possible score; a tick at the median of all examples.
function scaleBar(share, typical) {
  if (share === undefined || share === null) return null;
  const bar = make("span", { class: "scale", "aria-hidden": "true" }, make("i"), typical === null ? null : make("b"));
  bar.firstChild.style.width = `${100 * share}%`;
  if (typical !== null) bar.lastChild.style.left = `${100 * typical}%`;
  return bar;
}

function sharesChart(answer, method) {
  if (!answer.shares || method.timesteps.length < 2) return null;
  const steps = method.timesteps, last = steps.length - 1, rough = Number(steps[0]) > Number(steps[last]);
  const spoken = "Share of each timestep in the order: " + steps.map((t, step) => `t ${t}: ${percent(answer.shares[step])}${method.blind[step] ? ", blind" : ""}`).join(", ");
  return make("div", { class: "shares" }, bars(answer.shares, reach([answer.shares]), method, spoken),
    make("p", { class: "ends number", "aria-hidden": "true" }, make("span", {}, `t ${steps[0]}, ${rough ? "noise" : "details"}`), make("span", {}, `${rough ? "details" : "noise"}, ${steps[last]}`)));
}

/* One query, and each method's answer */

function labelOf(entry, same) {
  if (entry.label === null) return null;
  const mark = same === null ? "" : same ? "● " : "○ ";
  return make("span", { class: same ? "label same" : "label", title: same === null ? null : same ? "the query's label" : "another label" }, mark + entry.label);
}

function answerList(answer, method) {
  const first = answer.cards[0];
  const more = [
    () => first && picture(examples[first.example], ""), () => null, () => first && scaleBar(first.share, answer.typical), () => null, () => sharesChart(answer, method),
  ];
  return make("dl", { class: "answers" }, ...answer.said.map(([question, text, note], place) => make("div", {},
    make("dt", {}, question), make("dd", { class: "said number", title: text }, place === 0 ? shortId(text) : text),
    ...[more[place]()].filter(Boolean).map((node) => make("dd", { class: "seen" }, node)), note ? make("dd", { class: "note number" }, note) : null)));
}

// Where other methods rank the same picture.
function elsewhere(query, own, card) {
  const found = query.answers.flatMap((answer, other) => {
    const twin = other === own ? undefined : answer.cards.find((one) => one.example === card.example);
    return twin ? [make("span", { title: `rank ${twin.rank} by ${methods[other].name}` }, swatch(methodColour(methods[other].name)), `#${twin.rank}`)] : [];
  });
  return found.length ? make("span", { class: "line chips number" }, ...found) : null;
}

function cardOf(query, own, place, range) {
  const answer = query.answers[own], card = answer.cards[place], entry = examples[card.example], method = methods[own];
  const spoken = [`Rank ${card.rank}`, several ? `by ${method.name}` : null, `example ${entry.id}`, `score ${card.scale}`, card.percentile,
    card.alike && `cannot be distinguished from ranks ${card.alike}`, card.copies && `${card.copyIds.length + 1} copies`, card.itself && "is the query itself",
    entry.label === null ? null : `label ${entry.label}` + (card.same === null ? "" : card.same ? ", as the query" : ", unlike the query")];
  const rights = entry.rights.filter(([, , href]) => !href).slice(0, 2).map(([, value]) => value).join(" · ");
  const small = (text, name, title) => text ? make("span", { class: name, title }, text) : null;
  return make("li", {}, make("button", { class: "card", type: "button", "aria-label": spoken.filter(Boolean).join(", "), onclick: () => openDetail(own, place) },
    picture(entry, "", "lazy"),
    make("span", { class: "line" }, make("span", { class: "score number" }, card.score), make("span", { class: "muted number" }, `#${card.rank}`)),
    scaleBar(card.share, answer.typical),
    small(card.sure?.replace(/ %/g, "\u00a0%"), "small number", "standard error of the score · probability of being among these"),
    card.alike || card.copies || card.itself ? make("span", { class: "line chips number" }, small(card.alike && `≈ ${card.alike}`, null, "cannot be distinguished"), small(card.copies, null, "the same pixels"), small(card.itself && "= query", "itself", "the query itself")) : null,
    elsewhere(query, own, card),
    labelOf(entry, card.same),
    small(shortId(entry.id), "id", entry.id), small(entry.caption, "clamp small", entry.caption), small(rights, "clamp small", "rights"),
    card.parts ? bars(less(card.parts, answer.means), range, method) : null));
}

function methodSection(query, own) {
  const answer = query.answers[own], method = methods[own];
  const rows = answer.cards.filter((card) => card.parts).map((card) => less(card.parts, answer.means));
  const section = make("section", { class: "method", "aria-label": several ? `By ${method.name}` : "Answer" },
    several ? make("h3", {}, swatch(methodColour(method.name)), method.name) : null,
    answerList(answer, method),
    make("div", {}, ...[method.blindText].filter(Boolean).map((text) => make("p", { class: "notice" }, text))),
    answer.groupMeans ? make("div", { class: "groups" }, make("h3", {}, "Mean contribution of each group of parameters"), groupTable(method, answer.groupMeans, signed(answer.groupMeans.reduce((sum, mean) => sum + mean, 0)))) : null,
    make("p", { class: "muted small" }, "Best first." + (rows.length ? " Bars: each timestep's contribution minus the mean of these." : "")),
    make("ol", { class: "cards", "aria-label": "Training examples, best first" }, ...answer.cards.map((_, place) => cardOf(query, own, place, reach(rows)))));
  section.style.setProperty("--own", methodColour(method.name));
  return section;
}

function drawQuery() {
  const query = queries[state.query], cards = query.answers.flatMap((answer) => answer.cards);
  const known = query.answers[0].cards.filter((card) => card.same !== null), meta = Object.entries(query.meta);
  const originals = query.file ? [["original", query.file.split("/").pop(), query.file]] : [];
  const facts = [...query.rights, ...meta, ...originals];
  const common = several ? query.answers[0].cards.filter((card) => query.answers.every((answer) => answer.cards.some((one) => one.example === card.example))).length : 0;
  const about = make("div", { class: "about" },
    make("p", { class: "eyebrow number" }, queries.length > 1 ? `Query ${state.query + 1} of ${queries.length}` : "Query"), make("h2", {}, query.id),
    query.caption ? make("p", { class: "caption" }, query.caption) : null,
    query.sameAs ? make("p", { class: "notice" }, query.sameAs) : null,
    several ? make("p", { class: "muted number" }, `${common} of ${Math.max(...query.answers.map((answer) => answer.cards.length))} pictures are found by all ${methods.length} methods`) : null,
    known.length && !several ? make("p", { class: "muted number" }, `${known.filter((card) => card.same).length} of ${known.length} examples share its label`) : null,
    facts.length ? make("details", { open: facts.length <= 6 }, make("summary", {}, "About the query"), pairs(facts)) : null);
  byId("main").replaceChildren(
    make("section", { class: "query", "aria-label": `Query ${query.id}` }, picture(query, `Query ${query.id}`), about),
    make("div", { class: several ? "methods several" : "methods" }, ...methods.map((_, own) => methodSection(query, own))),
    cards.length ? "" : make("p", { class: "empty" }, "No example was found."));
  document.querySelectorAll("nav button").forEach((button, index) => {
    // One Tab stop for the whole list, so that the examples are near; arrow keys move in the list.
    button.tabIndex = index === state.query ? 0 : -1;
    if (index === state.query) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  });
  dimCards();
}

function openQuery(index, scroll = true) {
  state.query = index;
  drawQuery();
  try { history.replaceState(null, "", `#${index + 1}`); } catch { /* a sandboxed page has no address to change */ }
  if (!scroll) return;
  byId("queries").children[index].scrollIntoView({ block: "nearest", inline: "nearest" });
  if (window.scrollY > byId("main").offsetTop) window.scrollTo(0, byId("main").offsetTop);
}

function stepQuery(by) {
  const shown = queries.map((_, index) => index).filter((index) => !byId("queries").children[index].hidden);
  const next = by > 0 ? shown.find((index) => index > state.query) : shown.findLast((index) => index < state.query);
  if (next === undefined) return;
  const inList = document.activeElement.closest?.("nav");
  openQuery(next);
  const focus = inList ? byId("queries").children[next].firstChild : byId("main");
  focus.focus({ preventScroll: true });
}

/* One training example */

function openDetail(own, place) {
  const query = queries[state.query], answer = query.answers[own], method = methods[own], card = answer.cards[place], dialog = byId("detail");
  const entry = examples[card.example], meta = Object.entries(entry.meta);
  Object.assign(state, { method: own, card: place });
  const scores = [
    ["score", card.scale], ["percentile", card.percentile], ["standard error", card.sure?.split(" · ")[0]], ["probability of being among these", card.sure?.split(" · ")[1]],
    ["cannot be distinguished", card.alike && `ranks ${card.alike}`], ["rank", `${card.rank} of ${answer.shown}${several ? ` by ${method.name}` : ""}`],
    ["label", entry.label === null ? null : entry.label + (card.same === null ? "" : card.same ? ", as the query" : ", unlike the query")],
    ["same pixels", card.copyIds && card.copyIds.slice(0, 20).join(", ") + (card.copyIds.length > 20 ? ` and ${card.copyIds.length - 20} more` : "")],
    ["the query", card.itself && "has the same pixels"], ["row of the store", String(entry.row)],
  ].filter(([, value]) => value);
  const rights = [...entry.rights, ...(entry.file ? [["original", entry.file.split("/").pop(), entry.file]] : [])];
  const part = (title, list, chart = null) => list.length ? make("section", {}, make("h3", {}, title), chart, pairs(list)) : null;
  dialog.style.setProperty("--own", methodColour(method.name));
  dialog.replaceChildren(make("div", { class: "panel" },
    make("div", { class: "bar" },
      make("div", {}, make("p", { class: "eyebrow number" }, `Training example ${place + 1} of ${answer.cards.length}`), make("h2", { id: "detail-title", tabindex: "-1", autofocus: true }, entry.id)),
      make("div", { class: "tools" },
        make("button", { class: "round", type: "button", "aria-label": "Previous example", onclick: () => stepDetail(-1) }, "←"),
        make("button", { class: "round", type: "button", "aria-label": "Next example", onclick: () => stepDetail(1) }, "→"), closeButton())),
    make("div", { class: "split" },
      make("div", { class: "pictures" },
        make("figure", {}, motion(entry, `Training example ${entry.id}`), make("figcaption", {}, `${entry.size.join(" × ")} pixels${entry.frames ? `, ${entry.frames} frames` : ""}`)),
        make("figure", { class: "origin" }, motion(query, `Query ${query.id}`), make("figcaption", {}, `query ${query.id}`)),
        ...placesFigures(answer.places?.[place])),
      make("div", {},
        part("Answer", scores, scaleBar(card.share, answer.typical)),
        entry.caption ? make("section", {}, make("h3", {}, "Caption"), make("p", { class: "caption" }, entry.caption)) : null,
        part("Rights and source", rights),
        card.parts ? partsTable(method.timesteps.length > 1 ? "timestep" : "the timestep", method.timesteps, less(card.parts, answer.means), card.score, card.parts) : null,
        card.groupParts ? groupTable(method, card.groupParts, card.score) : null,
        part("Metadata", meta)))));
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
}

// Where in both pictures the score comes from.
function placesFigures(places) {
  if (!places) return [];
  const figure = (src, alt, text) => src ? [make("figure", { class: "origin places" }, make("img", { src, alt }), make("figcaption", {}, text))] : [];
  return [...figure(places.train, "Where in the training picture the score comes from", `attribution map, ${places.said}`),
    ...figure(places.query, "Where in the query the score comes from", "attribution map of the query"),
    make("p", { class: "small" }, "blue raises the score, red lowers it")];
}

// With `whole`, `values` are contributions minus the mean of those shown; `whole` has the contributions.
function partsTable(what, names, values, total, whole = null) {
  const range = reach([values]);
  const rows = values.map((value, step) => make("tr", {}, make("th", { scope: "row", class: "number" }, names[step]),
    make("td", { class: "bars" }, flatBar(value, range)), make("td", { class: "number" }, signed(value)), whole ? make("td", { class: "number muted" }, signed(whole[step])) : null));
  const sum = whole ? signed(values.reduce((all, value) => all + value, 0)) : total;
  return make("table", { class: "steps" },
    make("caption", { class: "visually-hidden" }, `What each ${what} contributed to the score`),
    make("thead", {}, make("tr", {}, make("th", { scope: "col" }, what), make("td", {}), make("th", { scope: "col" }, whole ? "minus mean" : "contribution"), whole ? make("th", { scope: "col" }, "contribution") : null)),
    make("tbody", {}, ...rows),
    make("tfoot", {}, make("tr", {}, make("th", { scope: "row" }, "score"), make("td", {}), make("td", { class: "number" }, sum), whole ? make("td", { class: "number" }, total) : null)));
}

// Of many groups the largest, and the sum of the others.
function groupTable({ groups }, values, total) {
  const most = 12;
  if (groups.length <= most + 2) return partsTable("group", groups, values, total);
  const order = values.map((_, group) => group).sort((a, b) => Math.abs(values[b]) - Math.abs(values[a]));
  const kept = order.slice(0, most).sort((a, b) => a - b), rest = order.slice(most);
  return partsTable("group", [...kept.map((group) => groups[group]), `${rest.length} others`],
    [...kept.map((group) => values[group]), rest.reduce((sum, group) => sum + values[group], 0)], total);
}

function stepDetail(by) {
  const place = state.card + by;
  if (place < 0 || place >= queries[state.query].answers[state.method].cards.length) return;
  // The panel is redrawn: the focus returns to the arrow that was pressed.
  const pressed = document.activeElement.getAttribute("aria-label");
  openDetail(state.method, place);
  const again = [...byId("detail").querySelectorAll("button")].find((button) => button.getAttribute("aria-label") === pressed);
  (again ?? byId("detail-title")).focus();
}

/* The search */

for (const entry of [...queries, ...examples]) {
  const columns = [["id", entry.id], ["label", entry.label], ["caption", entry.caption], ...entry.rights, ...Object.entries(entry.meta)];
  entry.columns = columns.filter(([, value]) => value !== null).map(([name, value]) => [name.toLowerCase(), value.toLowerCase()]);
}

function matches({ columns }) {
  return state.terms.every((term) => {
    const [, name, value] = /^([^:]+):(.*)$/.exec(term) ?? [];
    if (columns.some(([column]) => column === name)) return columns.some(([column, text]) => column === name && (name === "label" ? text === value : text.includes(value)));
    return columns.some(([, text]) => text.includes(term));
  });
}

function dimCards() {
  const shown = queries[state.query].answers.flatMap((answer) => answer.cards.map((card) => matches(examples[card.example])));
  // If only the query itself matches, none of its examples is dimmed.
  const all = !shown.some(Boolean);
  document.querySelectorAll(".card").forEach((node, place) => node.classList.toggle("dimmed", !all && !shown[place]));
}

function applyFilter() {
  state.terms = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const good = examples.map(matches);
  let shown = 0;
  queries.forEach((query, index) => {
    const keep = matches(query) || query.answers.some((answer) => answer.cards.some((card) => good[card.example]));
    byId("queries").children[index].hidden = !keep;
    shown += keep;
  });
  const hits = good.filter(Boolean).length;
  byId("status").textContent = state.terms.length
    ? `${shown} of ${queries.length} queries, ${hits} of ${examples.length} examples match`
    : `${queries.length} queries, ${examples.length} examples`;
  const first = queries.findIndex((_, index) => !byId("queries").children[index].hidden);
  if (first < 0) byId("main").replaceChildren(make("p", { class: "empty" }, "No id, label, caption or metadata matches."));
  else if (byId("queries").children[state.query].hidden) openQuery(first, false);
  else drawQuery();
}

/* Keys */

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target === byId("filter"), modal = document.querySelector("dialog[open]");
  const by = { j: 1, ArrowDown: 1, ArrowRight: 1, k: -1, ArrowUp: -1, ArrowLeft: -1 }[event.key];
  if (typing) {
    if (event.key === "Escape") { byId("filter").value = ""; applyFilter(); byId("filter").blur(); }
    else if (event.key === "ArrowDown" || event.key === "ArrowUp" || event.key === "Enter") { byId("filter").blur(); if (event.key !== "Enter") stepQuery(by); }
    else return;
  } else if (modal === byId("detail") && by) stepDetail(by);
  else if (modal) return;
  else if (by) stepQuery(by);
  else if (event.key === "/") { byId("filter").focus(); byId("filter").select(); }
  else if (event.key === "?") byId("help").showModal();
  else return;
  event.preventDefault();
});

byId("detail").addEventListener("close", () => document.querySelectorAll(".method")[state.method]?.querySelectorAll(".card")[state.card]?.focus());
byId("filter").addEventListener("input", applyFilter);
byId("help-button").addEventListener("click", () => byId("help").showModal());
for (const dialog of document.querySelectorAll("dialog")) {
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog || event.target.closest("[data-close]")) dialog.close();
  });
}

/* Begin */

const steps = methods[0].timesteps;
document.querySelector("header").append(
  factList([
    [several ? "methods" : "method", methods.map((method) => method.name).join(", ")], ...Object.entries(data.about), ["queries", String(queries.length)], ["top", String(methods[0].k)],
    ...(steps.length ? [["timesteps", steps.length > 1 ? `${steps.length} (${steps[0]} to ${steps.at(-1)})` : steps[0]]] : [])]),
  ...methods.filter((method) => Object.keys(method.notes).length).map((method) => make("details", {}, make("summary", {}, several ? `Notes by ${method.name}` : "Notes"), factList(Object.entries(method.notes)))));
queries.forEach((query, index) => byId("queries").append(make("li", {},
  make("button", { type: "button", onclick: () => openQuery(index) }, picture(query, "", "lazy"),
    make("span", {}, make("b", { title: query.id }, shortId(query.id)), query.label === null ? null : make("small", { class: "muted" }, `label ${query.label}`))))));
const asked = Number.parseInt(location.hash.slice(1), 10) - 1;
applyFilter();
openQuery(asked >= 0 && asked < queries.length ? asked : 0);
