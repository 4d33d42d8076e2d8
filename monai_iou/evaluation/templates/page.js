"use strict";

// Sorting: a click on a column's button sorts by its cells' data-value; numbers by value, empty cells last.
document.querySelectorAll("table.sortable").forEach((table) => {
  const body = table.tBodies[0];
  table.querySelectorAll("th button").forEach((button) => {
    button.addEventListener("click", () => {
      const head = button.closest("th");
      const column = head.cellIndex;
      const direction = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
      const value = (row) => row.cells[column].dataset.value;
      const rows = Array.from(body.rows);
      rows.sort((a, b) => {
        const x = value(a), y = value(b);
        if (x === "" || y === "") return x === y ? 0 : x === "" ? 1 : -1;
        return direction * (head.dataset.kind === "text" ? x.localeCompare(y, "en", { numeric: true }) : Number(x) - Number(y));
      });
      rows.forEach((row) => body.append(row));
    });
  });
});

// Filtering: rows whose case holds the text and whose label is the chosen one.
const cases = document.getElementById("case-table");
if (cases) {
  const text = document.getElementById("filter-text"), label = document.getElementById("filter-label");
  const filter = () => {
    let shown = 0;
    Array.from(cases.tBodies[0].rows).forEach((row) => {
      const fits = row.cells[0].dataset.value.toLowerCase().includes(text.value.toLowerCase());
      row.hidden = !(fits && (label.value === "" || row.cells[1].dataset.value === label.value));
      shown += row.hidden ? 0 : 1;
    });
    document.getElementById("shown").textContent = `${shown} of ${cases.tBodies[0].rows.length} rows`;
  };
  text.addEventListener("input", filter);
  label.addEventListener("change", filter);
  filter();
}

// Slices: a mosaic of axial slices is decoded once into a volume indexed [k][j][i] (superior, anterior, right).
async function decode(uri, [nx, ny, nz], columns) {
  const picture = new Image();
  picture.src = uri;
  await picture.decode();
  const canvas = document.createElement("canvas");
  canvas.width = picture.width;
  canvas.height = picture.height;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(picture, 0, 0);
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
  const volume = new Uint8Array(nx * ny * nz);
  for (let k = 0; k < nz; k++) {
    const left = (k % columns) * nx, top = Math.floor(k / columns) * ny;
    for (let j = 0; j < ny; j++)
      for (let i = 0; i < nx; i++) volume[(k * ny + j) * nx + i] = pixels[4 * ((top + j) * canvas.width + left + i)];
  }
  return volume;
}

// Each plane shows anterior or superior upwards and the patient's right on the left of the picture.
const PLANES = {
  axial: { axes: [0, 1, 2], sides: ["R", "L", "A", "P"] },
  coronal: { axes: [0, 2, 1], sides: ["R", "L", "S", "I"] },
  sagittal: { axes: [1, 2, 0], sides: ["A", "P", "S", "I"] },
};

function section(volume, shape, axes, at) {
  const [u, v, w] = axes, stride = [1, shape[0], shape[0] * shape[1]];
  const flat = new Uint8Array(shape[u] * shape[v]);
  for (let y = 0; y < shape[v]; y++)
    for (let x = 0; x < shape[u]; x++) {
      const i = shape[u] - 1 - x, j = shape[v] - 1 - y;
      flat[y * shape[u] + x] = volume[i * stride[u] + j * stride[v] + at * stride[w]];
    }
  return flat;
}

function outline(context, codes, bit, width, height, sx, sy) {
  const inside = (x, y) => x >= 0 && y >= 0 && x < width && y < height && (codes[y * width + x] & bit) !== 0;
  context.beginPath();
  // Edges that continue each other are joined, so that dashes are not restarted at every voxel.
  for (let y = 0; y <= height; y++)
    for (let x = 0, start = -1; x <= width; x++) {
      const edge = x < width && inside(x, y) !== inside(x, y - 1);
      if (edge && start < 0) start = x;
      if (!edge && start >= 0) { context.moveTo(start * sx, y * sy); context.lineTo(x * sx, y * sy); start = -1; }
    }
  for (let x = 0; x <= width; x++)
    for (let y = 0, start = -1; y <= height; y++) {
      const edge = y < height && inside(x, y) !== inside(x - 1, y);
      if (edge && start < 0) start = y;
      if (!edge && start >= 0) { context.moveTo(x * sx, start * sy); context.lineTo(x * sx, y * sy); start = -1; }
    }
  context.stroke();
}

function draw(canvas, crop, plane, at) {
  const { axes, sides } = PLANES[plane], [u, v] = axes, width = crop.shape[u], height = crop.shape[v];
  const codes = section(crop.codes, crop.shape, axes, at);
  const grey = crop.picture ? section(crop.picture, crop.shape, axes, at) : null;
  const small = document.createElement("canvas");
  small.width = width;
  small.height = height;
  const image = new ImageData(width, height);
  for (let i = 0; i < codes.length; i++) {
    const value = grey ? grey[i] : 40 + 50 * (codes[i] & 1) + 25 * (codes[i] >> 1);
    image.data.set([value, value, value, 255], 4 * i);
  }
  small.getContext("2d").putImageData(image, 0, 0);
  const scale = 640 / Math.max(width * crop.spacing[u], height * crop.spacing[v]);
  canvas.width = Math.max(1, Math.round(width * crop.spacing[u] * scale));
  canvas.height = Math.max(1, Math.round(height * crop.spacing[v] * scale));
  const context = canvas.getContext("2d"), sx = canvas.width / width, sy = canvas.height / height;
  context.imageSmoothingEnabled = false;
  context.drawImage(small, 0, 0, canvas.width, canvas.height);
  context.lineWidth = 3.2;
  context.strokeStyle = "#ffb000";
  outline(context, codes, 1, width, height, sx, sy);
  context.lineWidth = 2.6;
  context.strokeStyle = "#4aa3ff";
  context.setLineDash([9, 6]);
  outline(context, codes, 2, width, height, sx, sy);
  context.setLineDash([]);
  context.font = "600 22px system-ui, sans-serif";
  context.textBaseline = "middle";
  const write = (text, x, y, align) => {
    context.textAlign = align;
    context.lineWidth = 4;
    context.strokeStyle = "#000";
    context.strokeText(text, x, y);
    context.fillStyle = "#fff";
    context.fillText(text, x, y);
  };
  write(sides[0], 8, canvas.height / 2, "left");
  write(sides[1], canvas.width - 8, canvas.height / 2, "right");
  write(sides[2], canvas.width / 2, 16, "center");
  write(sides[3], canvas.width / 2, canvas.height - 16, "center");
}

function worstSlice(crop, axis) {
  // The slice with the most voxels in one mask only; where there is none, the one with the largest structure.
  const wrong = new Float64Array(crop.shape[axis]), any = new Float64Array(crop.shape[axis]);
  const [nx, ny] = crop.shape;
  crop.codes.forEach((code, index) => {
    if (code === 0) return;
    const place = [index % nx, Math.floor(index / nx) % ny, Math.floor(index / (nx * ny))][axis];
    any[place] += 1;
    wrong[place] += code === 3 ? 0 : 1;
  });
  const counts = wrong.some((count) => count > 0) ? wrong : any;
  return counts.indexOf(Math.max(...counts));
}

async function open(viewer) {
  if (viewer.dataset.opened) return;
  viewer.dataset.opened = "yes";
  const crop = JSON.parse(viewer.querySelector("script").textContent);
  crop.codes = await decode(crop.masks, crop.shape, crop.columns);
  crop.picture = crop.image ? await decode(crop.image, crop.shape, crop.columns) : null;
  viewer.querySelectorAll(".plane").forEach((plane) => {
    const name = plane.dataset.plane, axis = PLANES[name].axes[2];
    const canvas = plane.querySelector("canvas"), slider = plane.querySelector("input"), place = plane.querySelector("output");
    slider.max = crop.shape[axis] - 1;
    slider.value = worstSlice(crop, axis);
    const show = () => {
      draw(canvas, crop, name, Number(slider.value));
      place.textContent = `slice ${Number(slider.value) + 1} of ${crop.shape[axis]}`;
      slider.setAttribute("aria-valuetext", place.textContent);
    };
    slider.addEventListener("input", show);
    canvas.addEventListener("wheel", (event) => {
      const next = Number(slider.value) + (event.deltaY > 0 ? 1 : -1);
      if (next < 0 || next > Number(slider.max)) return;
      event.preventDefault();
      slider.value = next;
      show();
    }, { passive: false });
    show();
  });
  viewer.dataset.ready = "yes";
}

document.querySelectorAll("details.viewer").forEach((viewer) => {
  viewer.addEventListener("toggle", () => { if (viewer.open) open(viewer); });
  if (viewer.open) open(viewer);
});
