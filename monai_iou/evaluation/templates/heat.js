// A heat map of cases and labels: one small cell each, dark for low IoU; pointing at a cell names it.
const heat = document.getElementById("heat");
if (heat) {
  const data = JSON.parse(document.getElementById("heat-data").textContent);
  const note = document.getElementById("heat-note"), context = heat.getContext("2d");
  const wide = Math.max(6, Math.min(22, Math.floor(1100 / data.labels.length)));
  const high = Math.max(3, Math.min(14, Math.floor(1400 / data.cases.length)));
  const means = data.values.map((line) => {
    const known = line.filter((value) => value !== null);
    return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : 101;
  });
  const order = means.map((_, i) => i).sort((a, b) => means[a] - means[b]);
  heat.width = wide * data.labels.length;
  heat.height = high * data.cases.length;
  // From dark blue over teal to light yellow: in order of lightness, so that it reads without colour too.
  const stops = [[38, 20, 80], [44, 90, 140], [60, 170, 140], [250, 235, 120]];
  const colour = (value) => {
    const place = Math.min(2.999, value / 100 * 3), i = Math.floor(place), share = place - i;
    return `rgb(${stops[i].map((low, c) => Math.round(low + share * (stops[i + 1][c] - low))).join(",")})`;
  };
  order.forEach((row, y) => data.values[row].forEach((value, x) => {
    context.fillStyle = value === null ? "#9aa3b255" : colour(value);
    context.fillRect(x * wide, y * high, wide - (wide > 8 ? 1 : 0), high - (high > 5 ? 1 : 0));
  }));
  const cell = (event) => {
    const box = heat.getBoundingClientRect();
    const x = Math.floor((event.clientX - box.left) / box.width * data.labels.length);
    const y = Math.floor((event.clientY - box.top) / box.height * data.cases.length);
    return [order[Math.min(Math.max(y, 0), order.length - 1)], Math.min(Math.max(x, 0), data.labels.length - 1)];
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
