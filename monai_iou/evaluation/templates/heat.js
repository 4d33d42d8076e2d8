// A heat map of cases and labels: one small cell each, dark for low IoU; pointing at a cell names it.
// The cases come in the order of their rows.
const heat = document.getElementById("heat");
if (heat) {
  const data = JSON.parse(document.getElementById("heat-data").textContent);
  const note = document.getElementById("heat-note"), context = heat.getContext("2d");
  // A canvas of more pixels in one direction, or in all, stays empty in some browsers.
  const side = (least, most, wanted, cells) =>
    Math.max(1, Math.min(Math.floor(16384 / cells), Math.max(least, Math.min(most, Math.floor(wanted / cells)))));
  const wide = side(6, 22, 1100, data.labels.length), room = Math.floor(16777216 / wide / data.labels.length);
  const high = Math.max(1, Math.min(side(3, 14, 1400, data.cases.length), Math.floor(room / data.cases.length)));
  heat.width = wide * data.labels.length;
  heat.height = high * data.cases.length;
  // From dark blue over teal to light yellow: in order of lightness, so that it reads without colour too.
  const stops = [[38, 20, 80], [44, 90, 140], [60, 170, 140], [250, 235, 120]];
  const colour = (value) => {
    const place = Math.min(2.999, value / 100 * 3), i = Math.floor(place), share = place - i;
    return `rgb(${stops[i].map((low, c) => Math.round(low + share * (stops[i + 1][c] - low))).join(",")})`;
  };
  data.values.forEach((line, y) => line.forEach((value, x) => {
    context.fillStyle = value === null ? "#9aa3b255" : colour(value);
    context.fillRect(x * wide, y * high, wide - (wide > 8 ? 1 : 0), high - (high > 5 ? 1 : 0));
  }));
  const cell = (event) => {
    const box = heat.getBoundingClientRect();
    const x = Math.floor((event.clientX - box.left) / box.width * data.labels.length);
    const y = Math.floor((event.clientY - box.top) / box.height * data.cases.length);
    return [Math.min(Math.max(y, 0), data.cases.length - 1), Math.min(Math.max(x, 0), data.labels.length - 1)];
  };
  heat.addEventListener("pointermove", (event) => {
    const [row, column] = cell(event), value = data.values[row][column];
    note.textContent = `${data.cases[row]}, label ${data.labels[column]}: ${value === null ? "undefined" : `IoU ${(value / 100).toFixed(2)}`}`;
  });
  heat.addEventListener("click", (event) => {
    const text = document.getElementById("filter-text");
    text.value = data.cases[cell(event)[0]];
    text.dispatchEvent(new Event("input"));
    document.getElementById("cases").scrollIntoView();
  });
}
