const find = (selector) => element.querySelector(selector), tag = (name, given = {}, ...inside) => { const node = Object.assign(document.createElement(name), given); node.append(...inside); return node; };
const canvas = find("canvas"), pen = canvas.getContext("2d"), choice = find("select"), pictures = new Map(), dark = matchMedia("(prefers-color-scheme: dark)");
let data = null, ranks = {}, spots = [], chosen = null, near = [], over = null;
const css = (name) => getComputedStyle(element).getPropertyValue(name);

async function ask(what, ...given) {
  const found = await server.map_of_store([what, ...given, null].slice(0, 2)).catch(() => ({ told: "The server did not answer." }));
  find(".notice").textContent = found.told ?? ""; find(".notice").hidden = !found.told;
  return found.told ? null : found.found;
}

async function picture(place) {
  if (!pictures.has(place)) pictures.set(place, ask("picture", place));
  return (await pictures.get(place)) ?? "";
}

// Tiny pictures are enlarged without smoothing, as in the gallery.
function sharpen({ target }) { target.style.imageRendering = Math.max(target.naturalWidth, target.naturalHeight) > 64 ? "auto" : "pixelated"; }
find(".tip img").onload = sharpen;

function colourOf(place) {
  const key = choice.value;
  if (data.columns[key]) return data.colours[key][data.columns[key][place]][dark.matches ? 1 : 0];
  return `color-mix(in oklab, ${css("--against")} ${Math.round(100 * ranks[key][place])}%, ${css("--accent")})`;
}

function draw() {
  const width = canvas.clientWidth, height = canvas.clientHeight, sharp = devicePixelRatio || 1, edge = 22;
  if (!data || !width) return;
  Object.assign(canvas, { width: width * sharp, height: height * sharp });
  pen.setTransform(sharp, 0, 0, sharp, 0, 0);
  const axes = [0, 1].map((axis) => data.points.map((point) => point[axis] ?? 0)), low = axes.map((a) => Math.min(...a)), span = axes.map((a, n) => Math.max(...a) - low[n] || 1);
  spots = data.points.map((_, n) => [edge + (axes[0][n] - low[0]) / span[0] * (width - 2 * edge), edge + (axes[1][n] - low[1]) / span[1] * (height - 2 * edge)]);
  const radius = Math.max(2.5, Math.min(6, 90 / Math.sqrt(spots.length))), close = new Set(near.map(([n]) => n));
  pen.strokeStyle = css("--muted");
  for (const n of close) { pen.beginPath(); pen.moveTo(...spots[chosen]); pen.lineTo(...spots[n]); pen.stroke(); }
  spots.forEach(([x, y], n) => {
    pen.globalAlpha = chosen === null || n === chosen || close.has(n) ? 0.9 : 0.3;
    pen.fillStyle = colourOf(n);
    pen.beginPath(); pen.arc(x, y, n === chosen ? 1.8 * radius : radius, 0, 7); pen.fill();
  });
  pen.globalAlpha = 1;
}

function legend() {
  const key = choice.value, kinds = data.columns[key] && Object.keys(data.colours[key]), sorted = kinds ? [] : [...data.numbers[key]].sort((a, b) => a - b);
  const dot = (colour, name) => { const mark = tag("i"); mark.style.background = colour; return tag("span", {}, mark, name); };
  const entries = kinds ? kinds.map((kind) => dot(data.colours[key][kind][dark.matches ? 1 : 0], kind)) : [dot(css("--accent"), `low, ${sorted[0].toPrecision(3)}`), dot(css("--against"), `high, ${sorted.at(-1).toPrecision(3)} (coloured by rank)`)];
  find(".legend").replaceChildren(...entries);
}

async function choose(place) {
  const found = await ask("near", place);
  if (!found) return;
  [chosen, near] = [place, found];
  draw();
  const card = ([n, cosine]) => {
    const image = tag("img", { alt: "", onload: sharpen }), label = data.columns.label?.[n];
    picture(n).then((source) => { image.src = source; });
    return tag("li", {}, tag("button", { type: "button", onclick: () => choose(n) }, image, tag("b", { textContent: cosine === null ? "chosen" : cosine.toFixed(3) }), tag("span", { textContent: `${data.ids[n]}${label ? `, ${label}` : ""}` })));
  };
  find(".by").hidden = false;
  find(".near").replaceChildren(...[[place, null], ...near].map(card));
}

function nearest(event) {
  const far = spots.map(([x, y]) => Math.hypot(x - event.offsetX, y - event.offsetY)), place = far.indexOf(Math.min(...far));
  return far[place] < 18 ? place : null;
}

canvas.addEventListener("pointermove", (event) => {
  const place = data && nearest(event), tip = find(".tip");
  canvas.style.cursor = place === null ? "default" : "pointer"; tip.hidden = place === null;
  if (place === null || place === over) { over = place; return; }
  over = place;
  Object.assign(tip.style, { left: `${spots[place][0] + (spots[place][0] + 164 > canvas.clientWidth ? -150 : 14)}px`, top: `${canvas.offsetTop + Math.min(spots[place][1], canvas.clientHeight - 150)}px` });
  find(".tip span").textContent = data.ids[place];
  picture(place).then((source) => { if (over === place) find(".tip img").src = source; });
});
canvas.addEventListener("pointerleave", () => { find(".tip").hidden = true; over = null; });
canvas.addEventListener("click", (event) => { const place = nearest(event); if (place !== null) choose(place); });
choice.addEventListener("change", () => { legend(); draw(); });
dark.addEventListener("change", () => { if (data) legend(); draw(); });
new ResizeObserver(async () => {
  if (!canvas.clientWidth || data === false) return;
  if (data) return draw();
  data = false; // requested once, when the map is first visible
  data = await ask("plane");
  if (!data) return;
  // Coloured by rank, so that a few large values do not give all others the same colour.
  for (const [key, values] of Object.entries(data.numbers)) {
    ranks[key] = [];
    values.map((_, place) => place).sort((a, b) => values[a] - values[b]).forEach((place, rank) => { ranks[key][place] = rank / values.length; });
  }
  choice.replaceChildren(...[...Object.keys(data.columns), ...Object.keys(data.numbers)].map((name) => tag("option", { textContent: name })));
  const shares = data.explained.map((share) => `${Math.round(100 * share)} %`).join(" and "), shown = data.points.length;
  find(".facts").textContent = `${shown === data.of ? `${shown}` : `${shown} of ${data.of}, evenly drawn`} training examples; two principal components of their sketched gradients, ${shares} of the variance`;
  legend(); draw();
}).observe(canvas);
