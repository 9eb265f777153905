element.addEventListener("click", ({ target }) => {
  const button = target.closest("button"), { srcdoc } = element.querySelector("iframe") ?? {};
  if (button?.dataset.open) window.open(URL.createObjectURL(new Blob([srcdoc], { type: "text/html" })));
  else if (button) navigator.clipboard?.writeText(element.querySelector("code").textContent).then(() => { button.textContent = "Copied"; });
});
const AWAY = "The server is away: it was stopped, or the connection is lost. The answer shown stays. When dmin serve runs again, reload this page.";
setInterval(async () => {
  const there = await fetch("favicon.ico", { cache: "no-store" }).then(() => true, () => false), told = document.getElementById("away");
  if (there || told) return there && told?.remove();
  document.getElementById("head").append(Object.assign(document.createElement("p"), { id: "away", className: "notice", role: "alert", textContent: AWAY }));
}, 2000);
