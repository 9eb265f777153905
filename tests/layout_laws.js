// Run in a page: returns what breaks a law, in words. What is looked at is an open dialog, else the page.
() => {
  const NARROWEST = 60, CONTRAST = 4.5, broken = [];
  const root = document.querySelector("dialog[open]") ?? document.body;
  const name = (node) => `<${node.tagName.toLowerCase()} ${node.id || node.getAttribute("class") || ""}> “${(node.textContent || node.ariaLabel || "").trim().slice(0, 40)}”`;
  const line = (node) => getComputedStyle(node);
  const chain = (node) => { const found = []; for (let at = node; at && at.nodeType === 1; at = at.parentElement) found.push(at); return found; };

  // Nothing is wider than the window.
  const wide = document.documentElement;
  if (wide.scrollWidth > innerWidth) broken.push(`the page is ${wide.scrollWidth} px wide in a window of ${innerWidth}`);
  for (const box of document.querySelectorAll("dialog[open]")) {
    const { left, right } = box.getBoundingClientRect();
    if (left < 0 || right > innerWidth) broken.push(`a dialog goes from ${left} to ${right} px`);
    if (box.scrollWidth > box.clientWidth) broken.push(`a dialog of ${box.clientWidth} px holds ${box.scrollWidth}`);
  }

  // All text that is drawn, as far as its boxes let one see it.
  const texts = [], walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, parent = node.parentElement;
    if (!node.data.trim() || parent.closest("script, style, noscript, title, option, .visually-hidden")) continue;
    if (!parent.checkVisibility({ visibilityProperty: true })) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const rects = [...range.getClientRects()].filter((rect) => rect.width > 0 && rect.height > 0);
    if (!rects.length) { broken.push(`${name(parent)} has no room for its text`); continue; }
    const parents = chain(parent), clips = parents.filter((at) => line(at).overflowX !== "visible" && !(at instanceof SVGElement));
    const seen = rects.map((rect) => clips.reduce((box, at) => {
      const edge = at.getBoundingClientRect();
      return { left: Math.max(box.left, edge.left), right: Math.min(box.right, edge.right), top: Math.max(box.top, edge.top), bottom: Math.min(box.bottom, edge.bottom) };
    }, rect)).filter((box) => box.right > box.left && box.bottom > box.top);
    const lifted = parents.find((at) => /sticky|fixed/.test(line(at).position)) ?? null;
    texts.push({ node, parent, parents, rects, seen, lifted });
    const scrolls = parents.some((at) => /auto|scroll/.test(line(at).overflowX));
    const last = Math.max(...seen.map((box) => box.right));
    if (!scrolls && last > innerWidth + 1) broken.push(`${name(parent)} ends at ${Math.round(last)} px`);
  }

  // Text that needs several lines has a column to stand in.
  for (const { parent, parents, rects } of texts) {
    if (parent instanceof SVGElement) continue;
    const column = parents.find((at) => line(at).display !== "inline"), style = line(column);
    const width = column.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
    const lines = new Set(rects.map((rect) => Math.round(rect.top))).size;
    if (lines > 1 && width < NARROWEST) broken.push(`${name(parent)} has ${lines} lines in a column of ${width} px`);
    const shown = column.clientWidth;
    if (style.overflowX === "hidden" && shown < NARROWEST && column.scrollWidth > shown) broken.push(`${name(parent)} is cut to ${shown} px`);
  }

  // No text lies on another, unless it stands in a bar that stays while the rest scrolls.
  const boxes = texts.flatMap(({ seen, parent, lifted }) => seen.map((box) => ({ ...box, parent, lifted }))).sort((a, b) => a.top - b.top);
  boxes.forEach((a, i) => {
    for (let j = i + 1; j < boxes.length && boxes[j].top < a.bottom; j++) {
      const b = boxes[j];
      if (a.parent === b.parent || a.lifted !== b.lifted) continue;
      const across = Math.min(a.right, b.right) - Math.max(a.left, b.left), down = Math.min(a.bottom, b.bottom) - b.top;
      // The boxes of lines are taller than their letters.
      if (across > 1 && down > 0.3 * Math.min(a.bottom - a.top, b.bottom - b.top)) broken.push(`${name(a.parent)} lies on ${name(b.parent)}`);
    }
  });

  // Ink stands out from its paper.
  const pen = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d", { willReadFrequently: true });
  const known = new Map();
  const pixel = (css) => {
    if (!known.has(css)) {
      pen.clearRect(0, 0, 1, 1);
      pen.fillStyle = css;
      pen.fillRect(0, 0, 1, 1);
      known.set(css, [...pen.getImageData(0, 0, 1, 1).data].map((part) => part / 255));
    }
    return known.get(css);
  };
  const over = ([r, g, b, a], [R, G, B]) => [r * a + R * (1 - a), g * a + G * (1 - a), b * a + B * (1 - a)];
  const bright = (rgb) => rgb.map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4).reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const said = new Set();
  for (const { parent, parents } of texts) {
    const style = line(parent);
    const paper = [...parents].reverse().reduce((under, at) => over(pixel(line(at).backgroundColor), under), [1, 1, 1]);
    const [r, g, b, a] = pixel(parent instanceof SVGElement ? style.fill : style.color);
    const opacity = parents.reduce((all, at) => all * parseFloat(line(at).opacity), a);
    const [low, high] = [bright(over([r, g, b, opacity], paper)), bright(paper)].sort((x, y) => x - y);
    const contrast = (high + 0.05) / (low + 0.05), kind = parent.tagName + parent.getAttribute("class");
    if (contrast < CONTRAST && !said.has(kind)) broken.push(`${name(parent)} has a contrast of ${contrast.toFixed(2)}`);
    if (contrast < CONTRAST) said.add(kind);
  }

  // Who hears the page is told what everything is.
  for (const node of root.querySelectorAll("button, a, input, select, summary, [role=img], [role=region], nav, dialog[open]")) {
    if (!node.checkVisibility()) continue;
    const labelled = document.getElementById(node.getAttribute("aria-labelledby") ?? "") ?? node.closest("label");
    if (!(node.ariaLabel || labelled?.textContent.trim() || (!/^(INPUT|SELECT|NAV|DIALOG)$/.test(node.tagName) && node.textContent.trim()))) broken.push(`${name(node)} has no name`);
  }
  for (const image of root.querySelectorAll("img")) if (!image.hasAttribute("alt")) broken.push(`a picture has no alternative text: ${image.src.slice(0, 40)}`);
  for (const chart of root.querySelectorAll("svg")) if (!chart.ariaLabel && !chart.ariaHidden && !chart.closest("[aria-hidden=true]")) broken.push(`${name(chart.parentElement)} has a chart without a name`);
  return broken;
}
