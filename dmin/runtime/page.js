"use strict";
const data = JSON.parse(document.getElementById("data").textContent);

// Every string reaches the page through these, as text or attribute: never as markup.
function make(tag, attributes = {}, ...children) {
  return furnish(document.createElement(tag), attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  return furnish(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function furnish(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function factList(pairs, name = "facts") {
  return make("dl", { class: name }, ...pairs.map(([key, value]) => make("div", {}, make("dt", {}, key), make("dd", {}, value))));
}

const unique = (list) => [...new Set(list)];

/* A method has one colour on the whole page, lighter on a dark one. */
const darkness = matchMedia("(prefers-color-scheme: dark)");
const colourNames = new Map(Object.keys(data.colours).map((name, place) => [name, `--method-${place}`]));
const methodColour = (name) => colourNames.has(name) ? `var(${colourNames.get(name)})` : "var(--accent)";

function setColours() {
  for (const [name, pair] of Object.entries(data.colours)) document.documentElement.style.setProperty(colourNames.get(name), pair[darkness.matches ? 1 : 0]);
}

function swatch(colour, shape = "dot") {
  const mark = make("i", { class: shape, "aria-hidden": "true" });
  mark.style.background = colour;
  return mark;
}

setColours();
darkness.addEventListener("change", setColours);
