const find = (selector) => element.querySelector(selector);
const canvas = find("canvas"), pen = canvas.getContext("2d"), file = find("[type=file]"), numbers = find(".numbers input"), SIDE = 768;
const paint = Object.assign(document.createElement("canvas")), brush = paint.getContext("2d");
let sent = null, image = null, region = null, painted = false, last = null;
const part = () => find("[name=part]:checked").value;
const scale = () => image.naturalWidth / canvas.width;

function say(text) { find(".notice").textContent = text; find(".notice").hidden = !text; }

function show() {
  const there = Boolean(image);
  find(".drop").hidden = Boolean(sent); canvas.hidden = !there; find(".tools").hidden = !sent; find(".numbers").hidden = !there || part() !== "region";
  for (const each of element.querySelectorAll("[name=part]")) each.disabled = !there;
  if (!there) return;
  canvas.style.touchAction = part() ? "none" : "auto"; canvas.style.cursor = part() ? "crosshair" : "default";
  pen.imageSmoothingEnabled = Math.max(image.naturalWidth, image.naturalHeight) > 64;
  pen.globalCompositeOperation = "source-over";
  const whole = () => pen.drawImage(image, 0, 0, canvas.width, canvas.height);
  pen.clearRect(0, 0, canvas.width, canvas.height);
  if (!part() || (part() === "region" ? !region : !painted)) return whole();
  // As in the answer: the part that is not asked about is pale.
  if (part() === "mask") { pen.drawImage(paint, 0, 0); pen.globalCompositeOperation = "source-in"; whole(); }
  else { const [x, y, w, h] = region.map((n) => n / scale()); pen.save(); pen.beginPath(); pen.rect(x, y, w, h); pen.clip(); whole(); pen.restore(); pen.strokeStyle = getComputedStyle(element).getPropertyValue("--accent"); pen.lineWidth = 5; pen.strokeRect(x, y, w, h); }
  pen.globalCompositeOperation = "destination-over"; pen.globalAlpha = 0.25; whole();
  pen.globalAlpha = 1; pen.fillStyle = "#fff"; pen.fillRect(0, 0, canvas.width, canvas.height);
}

function clear() { sent = image = region = null; painted = false; numbers.value = file.value = ""; find("[name=part]").checked = true; say(""); show(); }

function take(files) {
  if (!files.length) return;
  clear();
  const [one] = files, limit = Number(find(".pad").dataset.limit);
  if (files.length > 1) return say(`${files.length} pictures: drop one at a time.`);
  if (one.size > limit * 1e6) return say(`${one.name} has ${(one.size / 1e6).toFixed(1)} MB, of at most ${limit}.`);
  const reader = new FileReader();
  reader.onload = () => {
    sent = { name: one.name, data: reader.result.split(",")[1] ?? "" };
    const picture = new Image();
    picture.onload = () => {
      image = picture;
      const most = SIDE / Math.max(image.naturalWidth, image.naturalHeight);
      for (const each of [canvas, paint]) Object.assign(each, { width: Math.max(1, Math.round(image.naturalWidth * most)), height: Math.max(1, Math.round(image.naturalHeight * most)) });
      show();
    };
    picture.onerror = () => { show(); say(`This browser cannot show ${one.name}. It can be asked about as a whole, if it is a picture.`); };
    picture.src = URL.createObjectURL(one);
  };
  reader.readAsDataURL(one);
}

const at = (event) => [event.offsetX * canvas.width / canvas.clientWidth, event.offsetY * canvas.height / canvas.clientHeight];
function draw(event) {
  if (!last || !part()) return;
  const [x, y] = at(event);
  if (part() === "mask") {
    Object.assign(brush, { lineWidth: SIDE / 12, lineCap: "round", strokeStyle: "#fff" });
    brush.beginPath(); brush.moveTo(...last); brush.lineTo(x, y + 0.01); brush.stroke();
    last = [x, y]; painted = true;
  } else {
    const sides = [image.naturalWidth, image.naturalHeight], inside = (n, axis) => Math.min(Math.max(n * scale(), 0), sides[axis]);
    const ends = [[last[0], x], [last[1], y]].map((pair, axis) => { const [low, high] = pair.map((n) => inside(n, axis)).sort((a, b) => a - b); return [Math.floor(low), Math.ceil(high)]; });
    const [[left, right], [top, bottom]] = ends;
    region = right > left && bottom > top ? [left, top, right - left, bottom - top] : null;
    numbers.value = region ? region.join(", ") : "";
  }
  show();
}
canvas.addEventListener("pointerdown", (event) => { if (part()) { last = at(event); canvas.setPointerCapture(event.pointerId); draw(event); } });
canvas.addEventListener("pointermove", draw);
for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { last = null; });
numbers.addEventListener("input", () => { const typed = numbers.value.split(/[\s,]+/).filter(Boolean).map(Number); region = typed.length === 4 && typed.every(Number.isFinite) ? typed : null; show(); });
for (const each of element.querySelectorAll("[name=part]")) each.addEventListener("change", () => { brush.clearRect(0, 0, paint.width, paint.height); region = null; painted = false; numbers.value = ""; show(); });
find(".clear").addEventListener("click", clear);
file.addEventListener("change", () => take([...file.files]));
document.addEventListener("paste", (event) => { if (element.checkVisibility()) take([...event.clipboardData.files]); });
for (const name of ["dragover", "drop"]) document.addEventListener(name, (event) => event.preventDefault());
element.addEventListener("drop", (event) => take([...event.dataTransfer.files]));

function mask() {
  const whole = Object.assign(document.createElement("canvas"), { width: paint.width, height: paint.height }), flat = whole.getContext("2d");
  flat.fillRect(0, 0, whole.width, whole.height); flat.drawImage(paint, 0, 0);
  return whole.toDataURL("image/png").split(",")[1];
}

// The picture and its part, for the event that sends the question; null on the "Generate one" tab.
window.dminAsked = () => {
  [...document.querySelectorAll("[role=tab]")].find((tab) => tab.textContent.trim() === "Answer")?.click();
  if (innerWidth <= 760) document.getElementById("answer")?.scrollIntoView({ behavior: "smooth" });
  return element.checkVisibility() ? { picture: sent, part: part() || null, region: part() === "region" ? region : null, mask: part() === "mask" && painted ? mask() : null } : null;
};
