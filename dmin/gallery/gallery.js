const { queries, examples, timesteps, groups } = data;
const byId = (id) => document.getElementById(id);
const state = { query: 0, rank: -1, terms: [] };

/* The frame of the page */

const key = (name) => make("kbd", {}, name);
const KEYS = [
  ["j ↓ →", "next query, or next example when one is open"],
  ["k ↑ ←", "previous query, or previous example"],
  ["Tab Enter", "walk through the training examples, open one"],
  ["Esc", "close what is open, leave the filter"],
  ["/", "filter: part of an id or label; label:7 for exactly this label"],
  ["?", "this help"],
];

document.body.append(
  make("header", {},
    make("div", { class: "bar" }, make("h1", {}, data.title),
      make("div", { class: "tools", role: "search" },
        make("input", { id: "filter", type: "search", placeholder: "Filter by id or label", "aria-label": "Filter by id or label", autocomplete: "off", spellcheck: "false" }),
        make("button", { id: "help-button", class: "round", type: "button", "aria-label": "Keyboard help" }, "?")))),
  make("div", { class: "columns" },
    make("nav", { "aria-label": "Queries" }, make("p", { class: "muted", id: "status", role: "status" }), make("ol", { id: "queries" })),
    make("main", { id: "main", tabindex: "-1" })),
  make("dialog", { id: "detail", "aria-labelledby": "detail-title" }),
  make("dialog", { id: "help", "aria-labelledby": "help-title" },
    make("div", { class: "panel" },
      make("div", { class: "bar" }, make("h2", { id: "help-title" }, "Keys"), make("button", { class: "round", type: "button", "data-close": true, "aria-label": "Close" }, "✕")),
      make("dl", { class: "keys" }, ...KEYS.flatMap(([names, text]) => [make("dt", {}, ...names.split(" ").map(key)), make("dd", {}, text)])))));

function picture(entry, alt, scale) {
  return make("img", { src: entry.image, alt, class: entry.tiny ? "tiny" : null, loading: scale ?? null });
}

function pairs(entries, name = "pairs") {
  const list = make("dl", { class: name });
  for (const [key, value] of entries) list.append(make("dt", {}, key), make("dd", {}, value));
  return list;
}

// Ids differ at their ends; the whole of it stands in the tooltip.
function shortId(id) {
  const letters = [...id];
  return letters.length > 24 ? "…" + letters.slice(-23).join("") : id;
}

function signed(value) {
  const size = Math.abs(value);
  const text = size === 0 || (size >= 0.0005 && size < 1e4) ? size.toFixed(4) : size.toExponential(2).replace(/([+-])(\d)$/, (_, sign, digit) => `${sign}0${digit}`);
  return (value < 0 ? "−" : "+") + text;
}

/* Charts */

function reach(rows) {
  const values = rows.flat();
  const range = { above: Math.max(0, ...values), below: Math.max(0, ...values.map((v) => -v)) };
  return range.above + range.below > 0 ? range : { above: 1, below: 0 };
}

// One bar a timestep; `range` is shared, so that bars compare between charts.
function bars(values, { above, below }, hidden) {
  const root = svg("svg", { viewBox: `0 0 ${values.length} 1`, preserveAspectRatio: "none" });
  const zero = above / (above + below);
  values.forEach((value, step) => {
    const height = Math.abs(value) / (above + below);
    const rect = svg("rect", {
      x: step + 0.11, width: 0.78, y: value < 0 ? zero : zero - height, height,
      class: value < 0 ? "against" : "for",
    });
    const tip = svg("title", {});
    tip.textContent = `t ${timesteps[step]}: ${signed(value)}`;
    rect.append(tip);
    root.append(rect);
  });
  root.append(svg("line", { x1: 0, x2: values.length, y1: zero, y2: zero }));
  if (hidden) root.setAttribute("aria-hidden", "true");
  else {
    root.setAttribute("role", "img");
    root.setAttribute("aria-label", values.map((v, step) => `t ${timesteps[step]}: ${signed(v)}`).join(", "));
  }
  return root;
}

function flatBar(value, { above, below }) {
  const root = svg("svg", { viewBox: "0 0 1 1", preserveAspectRatio: "none", "aria-hidden": "true" });
  const zero = below / (above + below), width = Math.abs(value) / (above + below);
  root.append(svg("rect", { x: value < 0 ? zero - width : zero, y: 0.1, width, height: 0.8, class: value < 0 ? "against" : "for" }));
  root.append(svg("line", { x1: zero, x2: zero, y1: 0, y2: 1 }));
  return root;
}

// Of many groups the largest, and the sum of the others.
function groupTable(values, total) {
  const most = 12;
  if (groups.length <= most + 2) return partsTable("group", groups, values, total);
  const order = values.map((_, group) => group).sort((a, b) => Math.abs(values[b]) - Math.abs(values[a]));
  const kept = order.slice(0, most).sort((a, b) => a - b), rest = order.slice(most);
  return partsTable("group", [...kept.map((group) => groups[group]), `${rest.length} others`],
    [...kept.map((group) => values[group]), rest.reduce((sum, group) => sum + values[group], 0)], total);
}

function groupMeans(query) {
  const count = query.top.length;
  const means = groups.map((_, group) => query.groupParts.reduce((sum, part) => sum + part[group], 0) / count);
  return make("div", { class: "groups" }, make("h3", {}, "Mean contribution of each group of parameters"),
    groupTable(means, signed(means.reduce((sum, mean) => sum + mean, 0))));
}

function queryChart(query) {
  const count = query.top.length;
  const means = timesteps.map((_, step) => query.parts.reduce((sum, part) => sum + part[step], 0) / count);
  const every = Math.ceil(timesteps.length / 10);
  const ticks = timesteps.map((t, step) => make("span", {}, step % every ? "" : t));
  return make("div", { class: "chart" },
    make("h3", {}, `Mean contribution of each timestep to the ${count} scores`),
    bars(means, reach([means]), false), make("div", { class: "ticks number", "aria-hidden": "true" }, ...ticks),
    query.groupParts ? groupMeans(query) : null);
}

/* One query and its training examples */

function labelOf(entry, same) {
  if (entry.label === null) return null;
  const mark = same === null ? "" : same ? "● " : "○ ";
  return make("span", { class: same ? "label same" : "label", title: same === null ? null : same ? "the query's label" : "another label" }, mark + entry.label);
}

function card(query, rank, range) {
  const entry = examples[query.top[rank]], same = query.same[rank];
  const spoken = [`Rank ${rank + 1}`, `example ${entry.id}`, `score ${query.scores[rank]}`];
  if (entry.label !== null) spoken.push(`label ${entry.label}` + (same === null ? "" : same ? ", as the query" : ", unlike the query"));
  return make("li", {}, make("button", { class: "card", type: "button", "aria-label": spoken.join(", "), onclick: () => openDetail(rank) },
    picture(entry, "", "lazy"),
    make("span", { class: "line" }, make("span", { class: "score number" }, query.scores[rank]), make("span", { class: "muted number" }, `#${rank + 1}`)),
    query.sure[rank] ? make("span", { class: "line" }, make("span", { class: "muted number", title: "error of the score · how surely it is among these" }, query.sure[rank])) : null,
    make("span", { class: "line" }, labelOf(entry, same) ?? make("span", { class: "id", title: entry.id }, shortId(entry.id))),
    entry.label === null ? null : make("span", { class: "id", title: entry.id }, shortId(entry.id)),
    query.parts ? bars(query.parts[rank], range, true) : null));
}

function drawQuery() {
  const query = queries[state.query];
  const known = query.same.filter((same) => same !== null);
  const about = make("div", { class: "about" },
    make("p", { class: "eyebrow number" }, `Query ${state.query + 1} of ${queries.length}`),
    make("h2", {}, query.id), pairs(Object.entries(query.meta)));
  if (known.length) about.append(make("p", { class: "muted number agreement" },
    `${known.filter(Boolean).length} of ${known.length} examples share its label`));
  const range = query.parts ? reach(query.parts) : null;
  byId("main").replaceChildren(
    make("section", { class: "query", "aria-label": `Query ${query.id}` }, picture(query, `Query ${query.id}`), about, query.parts ? queryChart(query) : null),
    make("ol", { class: "cards", "aria-label": "Training examples, best first" }, ...query.top.map((_, rank) => card(query, rank, range))));
  document.querySelectorAll("nav button").forEach((button, index) => {
    // One stop for Tab in the list, so that the examples are near; the arrows walk the list.
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

function openDetail(rank) {
  const query = queries[state.query], entry = examples[query.top[rank]], dialog = byId("detail");
  state.rank = rank;
  const facts = [["score", query.scores[rank]], ...(query.sure[rank] ? [["error of the score, and how surely it is among these", query.sure[rank]]] : []), ["rank", `${rank + 1} of ${query.top.length}`], ["row of the store", String(entry.row)], ...Object.entries(entry.meta)];
  const words = query.same[rank] === null ? null : query.same[rank] ? "● the query's label" : "○ another label";
  const size = entry.size.join(" × ") + " pixels";
  dialog.replaceChildren(make("div", { class: "panel" },
    make("div", { class: "bar" },
      make("div", {}, make("p", { class: "eyebrow number" }, `Training example ${rank + 1} of ${query.top.length}`), make("h2", { id: "detail-title", tabindex: "-1", autofocus: true }, entry.id)),
      make("div", { class: "tools" },
        make("button", { class: "round", type: "button", "aria-label": "Previous example", onclick: () => stepDetail(-1) }, "←"),
        make("button", { class: "round", type: "button", "aria-label": "Next example", onclick: () => stepDetail(1) }, "→"),
        make("button", { class: "round", type: "button", "aria-label": "Close", onclick: () => dialog.close() }, "✕"))),
    make("div", { class: "split" },
      make("div", {},
        make("figure", {}, picture(entry, `Training example ${entry.id}`), make("figcaption", {}, size)),
        make("figure", { class: "origin" }, picture(query, `Query ${query.id}`), make("figcaption", {}, `query ${query.id}`))),
      make("div", {}, pairs(facts), words ? make("p", { class: query.same[rank] ? "label same" : "label" }, words) : null,
        query.parts ? partsTable("timestep", timesteps, query.parts[rank], query.scores[rank]) : null,
        query.groupParts ? groupTable(query.groupParts[rank], query.scores[rank]) : null))));
  if (!dialog.open) dialog.showModal();
}

function partsTable(what, names, values, total) {
  const range = reach([values]);
  const rows = values.map((value, step) => make("tr", {}, make("th", { scope: "row", class: "number" }, names[step]),
    make("td", { class: "bars" }, flatBar(value, range)), make("td", { class: "number" }, signed(value))));
  return make("table", { class: "steps" },
    make("caption", { class: "visually-hidden" }, `What each ${what} contributed to the score`),
    make("thead", {}, make("tr", {}, make("th", { scope: "col" }, what), make("td", {}), make("th", { scope: "col" }, "contribution"))),
    make("tbody", {}, ...rows),
    make("tfoot", {}, make("tr", {}, make("th", { scope: "row" }, "score"), make("td", {}), make("td", { class: "number" }, total))));
}

function stepDetail(by) {
  const rank = state.rank + by;
  if (rank < 0 || rank >= queries[state.query].top.length) return;
  // The panel is drawn anew: who presses its arrows goes on pressing them.
  const pressed = document.activeElement.getAttribute("aria-label");
  openDetail(rank);
  const again = [...byId("detail").querySelectorAll("button")].find((button) => button.getAttribute("aria-label") === pressed);
  (again ?? byId("detail-title")).focus();
}

/* The filter */

function matches(entry) {
  const id = entry.id.toLowerCase(), label = (entry.label ?? "").toLowerCase();
  return state.terms.every((term) => {
    if (term.startsWith("label:")) return label === term.slice(6);
    if (term.startsWith("id:")) return id.includes(term.slice(3));
    return id.includes(term) || label.includes(term);
  });
}

function dimCards() {
  const query = queries[state.query], found = query.top.map((index) => matches(examples[index]));
  // A query that is here on its own account keeps all its examples.
  const all = !found.some(Boolean);
  document.querySelectorAll(".card").forEach((node, rank) => node.classList.toggle("dimmed", !all && !found[rank]));
}

function applyFilter() {
  state.terms = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const good = examples.map(matches);
  let shown = 0;
  queries.forEach((query, index) => {
    const keep = matches(query) || query.top.some((example) => good[example]);
    byId("queries").children[index].hidden = !keep;
    shown += keep;
  });
  const hits = good.filter(Boolean).length;
  byId("status").textContent = state.terms.length
    ? `${shown} of ${queries.length} queries, ${hits} of ${examples.length} examples match`
    : `${queries.length} queries, ${examples.length} examples`;
  const first = queries.findIndex((_, index) => !byId("queries").children[index].hidden);
  if (first < 0) byId("main").replaceChildren(make("p", { class: "empty" }, "No id or label matches this filter."));
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

byId("detail").addEventListener("close", () => document.querySelectorAll(".card")[state.rank]?.focus());
byId("filter").addEventListener("input", applyFilter);
byId("help-button").addEventListener("click", () => byId("help").showModal());
for (const dialog of document.querySelectorAll("dialog")) {
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog || event.target.closest("[data-close]")) dialog.close();
  });
}

/* Begin */

const facts = [["method", data.method], ["queries", String(queries.length)], ["top", String(queries[0].top.length)]];
if (timesteps.length) facts.push(["timesteps", timesteps.length > 1 ? `${timesteps.length} (${timesteps[0]} to ${timesteps.at(-1)})` : timesteps[0]]);
document.querySelector("header").append(factList([...facts, ...Object.entries(data.notes)]));
queries.forEach((query, index) => byId("queries").append(make("li", {},
  make("button", { type: "button", onclick: () => openQuery(index) }, picture(query, "", "lazy"),
    make("span", {}, make("b", { title: query.id }, shortId(query.id)), query.label === null ? null : make("small", { class: "muted" }, `label ${query.label}`))))));
const asked = Number.parseInt(location.hash.slice(1), 10) - 1;
applyFilter();
openQuery(asked >= 0 && asked < queries.length ? asked : 0);
