// Saving a figure: a copy of the SVG whose styles stand in it, in the colours of paper, so that it needs no style sheet.
const FIGURE_STYLES = ["fill", "fill-opacity", "stroke", "stroke-opacity", "stroke-width", "stroke-dasharray", "stroke-linecap",
  "font-family", "font-size", "font-weight"];
function standalone(chart) {
  const copy = chart.cloneNode(true), root = document.documentElement;
  root.classList.add("paper");
  const originals = [chart, ...chart.querySelectorAll("*")], copies = [copy, ...copy.querySelectorAll("*")];
  originals.forEach((original, i) => {
    copies[i].removeAttribute("class");
    if (original.tagName === "title") return;
    const style = getComputedStyle(original);
    FIGURE_STYLES.forEach((name) => copies[i].setAttribute(name, style.getPropertyValue(name)));
  });
  root.classList.remove("paper");
  const { width, height } = chart.viewBox.baseVal;
  Object.entries({ width, height }).forEach(([name, value]) => copy.setAttribute(name, value));
  const ground = document.createElementNS(chart.namespaceURI, "rect");
  Object.entries({ width, height, fill: "#fff" }).forEach(([name, value]) => ground.setAttribute(name, value));
  copy.prepend(ground);
  return new XMLSerializer().serializeToString(copy);
}

document.querySelectorAll("figure > svg.chart").forEach((chart) => {
  const button = document.createElement("button"), title = chart.getAttribute("aria-label");
  Object.assign(button, { type: "button", className: "save", textContent: "Save as SVG", title: `Save the figure: ${title}` });
  button.setAttribute("aria-label", `Save as SVG: ${title}`);
  button.addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([standalone(chart)], { type: "image/svg+xml" }));
    link.download = `${title.replace(/[^\p{L}\p{N}.+-]+/gu, "_").slice(0, 80)}.svg`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  });
  chart.after(button);
});
