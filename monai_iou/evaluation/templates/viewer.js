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

// The masks' codes are this many grey values apart: browsers that hide their fingerprint change the lowest bits of pixels.
const CODE_STEP = 85;

// Each plane shows anterior or superior upwards and the patient's right on the left of the picture.
const PLANES = {
  axial: { axes: [0, 1, 2], sides: ["R", "L", "A", "P"] },
  coronal: { axes: [0, 2, 1], sides: ["R", "L", "S", "I"] },
  sagittal: { axes: [1, 2, 0], sides: ["A", "P", "S", "I"] },
};
const LETTERS = [["R", "L"], ["A", "P"], ["S", "I"]];

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

class Viewer {
  constructor(element) {
    this.element = element;
    this.planes = Array.from(element.querySelectorAll(".plane"), (plane) => ({
      name: plane.dataset.plane,
      axes: PLANES[plane.dataset.plane].axes,
      canvas: plane.querySelector("canvas"),
      slider: plane.querySelector("input"),
      place: plane.querySelector("output"),
    }));
  }

  async open() {
    if (this.opened) return this.opened;
    this.opened = this.load();
    return this.opened;
  }

  async load() {
    const crop = JSON.parse(this.element.querySelector("script").textContent);
    const greys = await decode(crop.masks, crop.shape, crop.columns);
    crop.codes = greys.map((grey) => Math.round(grey / CODE_STEP));
    crop.picture = crop.image ? await decode(crop.image, crop.shape, crop.columns) : null;
    this.crop = crop;
    this.at = [0, 1, 2].map((axis) => worstSlice(crop, axis));
    this.planes.forEach((plane) => this.connect(plane));
    this.connectWindow();
    this.show();
    this.element.dataset.ready = "yes";
  }

  // The planes are linked: a click in one moves the other two to that point.
  connect(plane) {
    const [u, v, w] = plane.axes;
    plane.slider.max = this.crop.shape[w] - 1;
    plane.slider.addEventListener("input", () => { this.at[w] = Number(plane.slider.value); this.show(); });
    plane.canvas.addEventListener("wheel", (event) => {
      event.preventDefault();  // at the ends too: the page must not move under the pointer
      const next = this.at[w] + (event.deltaY > 0 ? 1 : -1);
      this.at[w] = Math.min(Math.max(next, 0), this.crop.shape[w] - 1);
      this.show();
    }, { passive: false });
    plane.canvas.addEventListener("click", (event) => {
      const box = plane.canvas.getBoundingClientRect();
      const x = Math.floor((event.clientX - box.left) / box.width * this.crop.shape[u]);
      const y = Math.floor((event.clientY - box.top) / box.height * this.crop.shape[v]);
      this.at[u] = Math.min(Math.max(this.crop.shape[u] - 1 - x, 0), this.crop.shape[u] - 1);
      this.at[v] = Math.min(Math.max(this.crop.shape[v] - 1 - y, 0), this.crop.shape[v] - 1);
      this.show();
    });
  }

  connectWindow() {
    const controls = this.element.querySelector(".window");
    if (!controls) return;
    if (!this.crop.picture) { controls.hidden = true; return; }
    const [preset, level, width] = ["preset", "level", "width"].map((name) => controls.querySelector(`.${name}`));
    const [low, high] = this.crop.window;
    const set = (l, w) => { this.level = l; this.width = Math.max(w, 1e-6); this.show(); };
    const automatic = () => {
      level.value = Number(((low + high) / 2).toPrecision(4));
      width.value = Number((high - low).toPrecision(4));
      this.level = (low + high) / 2;
      this.width = high - low;
    };
    automatic();
    preset.addEventListener("change", () => {
      if (preset.value === "auto") automatic();
      else if (preset.value !== "own") [level.value, width.value] = preset.value.split(",");
      set(preset.value === "auto" ? this.level : Number(level.value), preset.value === "auto" ? this.width : Number(width.value));
    });
    [level, width].forEach((input) => input.addEventListener("input", () => {
      preset.value = "own";
      set(Number(level.value), Number(width.value));
    }));
  }

  // Position of the slice `at` of a patient axis: the file's own slice number, counted from 1, and millimetres.
  place(axis) {
    const [, size, start, step] = this.crop.file[axis];
    const point = this.at.map((value, other) => (other === axis ? value : (this.crop.shape[other] - 1) / 2));
    const row = this.crop.affine[axis];
    const mm = row[0] * point[0] + row[1] * point[1] + row[2] * point[2] + row[3];
    return `slice ${start + step * this.at[axis] + 1} of ${size}, ${LETTERS[axis][mm < 0 ? 1 : 0]} ${Math.abs(mm).toFixed(1)} mm`;
  }

  // Move all planes to a point in RAS millimetres, solved by Cramer's rule.
  moveTo(mm) {
    const m = this.crop.affine, d = mm.map((value, i) => value - m[i][3]);
    const det = (a, b, c) => a[0] * (b[1] * c[2] - b[2] * c[1]) - b[0] * (a[1] * c[2] - a[2] * c[1]) + c[0] * (a[1] * b[2] - a[2] * b[1]);
    const column = (j) => [m[0][j], m[1][j], m[2][j]], columns = [column(0), column(1), column(2)];
    const whole = det(...columns);
    this.at = [0, 1, 2].map((axis) => {
      const changed = columns.map((c, j) => (j === axis ? d : c));
      return Math.min(Math.max(Math.round(det(...changed) / whole), 0), this.crop.shape[axis] - 1);
    });
    this.show();
  }

  show() { this.planes.forEach((plane) => this.draw(plane)); }

  draw(plane) {
    const crop = this.crop, [u, v, w] = plane.axes, { sides } = PLANES[plane.name];
    const width = crop.shape[u], height = crop.shape[v], canvas = plane.canvas;
    const codes = section(crop.codes, crop.shape, plane.axes, this.at[w]);
    const grey = crop.picture ? section(crop.picture, crop.shape, plane.axes, this.at[w]) : null;
    const small = document.createElement("canvas");
    small.width = width;
    small.height = height;
    const image = new ImageData(width, height);
    const [low, high] = crop.window || [0, 255], bottom = this.level - this.width / 2;
    for (let i = 0; i < codes.length; i++) {
      const value = grey
        ? 255 * ((low + grey[i] / 255 * (high - low)) - bottom) / this.width
        : 40 + 50 * (codes[i] & 1) + 25 * (codes[i] >> 1);
      image.data.set([value, value, value, 255], 4 * i);
    }
    small.getContext("2d").putImageData(image, 0, 0);
    const scale = 640 / Math.max(width * crop.spacing[u], height * crop.spacing[v]);
    canvas.width = Math.max(1, Math.round(width * crop.spacing[u] * scale));
    canvas.height = Math.max(1, Math.round(height * crop.spacing[v] * scale));
    const context = canvas.getContext("2d"), sx = canvas.width / width, sy = canvas.height / height;
    context.imageSmoothingEnabled = false;
    context.drawImage(small, 0, 0, canvas.width, canvas.height);
    this.cross(context, (width - 1 - this.at[u] + 0.5) * sx, (height - 1 - this.at[v] + 0.5) * sy);
    context.lineWidth = 3.2;
    context.strokeStyle = "#ffb000";
    outline(context, codes, 1, width, height, sx, sy);
    context.lineWidth = 2.6;
    context.strokeStyle = "#4aa3ff";
    context.setLineDash([9, 6]);
    outline(context, codes, 2, width, height, sx, sy);
    context.setLineDash([]);
    this.letters(context, sides);
    plane.slider.value = this.at[w];
    plane.place.textContent = this.place(w);
    plane.slider.setAttribute("aria-valuetext", plane.place.textContent);
  }

  // Where the other planes cut this one, left open around the point itself.
  cross(context, x, y) {
    const { width, height } = context.canvas, gap = 16;
    context.strokeStyle = "#ffffff90";
    context.lineWidth = 1.2;
    context.beginPath();
    [[0, y, x - gap, y], [x + gap, y, width, y], [x, 0, x, y - gap], [x, y + gap, x, height]].forEach(([a, b, c, d]) => {
      context.moveTo(a, b);
      context.lineTo(c, d);
    });
    context.stroke();
  }

  letters(context, sides) {
    const { width, height } = context.canvas;
    context.font = "600 22px system-ui, sans-serif";
    context.textBaseline = "middle";
    const places = [[8, height / 2, "left"], [width - 8, height / 2, "right"], [width / 2, 16, "center"], [width / 2, height - 16, "center"]];
    sides.forEach((text, i) => {
      const [x, y, align] = places[i];
      context.textAlign = align;
      context.lineWidth = 4;
      context.strokeStyle = "#000";
      context.strokeText(text, x, y);
      context.fillStyle = "#fff";
      context.fillText(text, x, y);
    });
  }
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

const viewers = new Map(Array.from(document.querySelectorAll(".viewer"), (element) => [element.id, new Viewer(element)]));
// A few are drawn at once, and more one after the other as the page is read: when it is printed, it is too late for that.
// Each takes some megabytes of memory, so that of very many the others are drawn only when they are opened.
const DRAWN_AT_ONCE = 30, DRAWN_FOR_PAPER = 200;
const inOrder = Array.from(viewers.values());
inOrder.forEach((viewer, i) => {
  const fold = viewer.element.closest("details");
  if (i < DRAWN_AT_ONCE || !fold || fold.open) viewer.open();
  if (fold) fold.addEventListener("toggle", () => { if (fold.open) viewer.open(); });
});
function drawOnwards(i) {
  if (i < Math.min(inOrder.length, DRAWN_FOR_PAPER)) setTimeout(() => inOrder[i].open().finally(() => drawOnwards(i + 1)), 20);
}
drawOnwards(DRAWN_AT_ONCE);

// A table's row opens its picture, and a missed lesion moves the planes to it. Rows are made as they come into sight.
document.addEventListener("click", async (event) => {
  const button = event.target.closest("button[data-viewer]");
  if (!button) return;
  const viewer = viewers.get(button.dataset.viewer), fold = viewer.element.closest("details");
  if (fold) fold.open = true;
  await viewer.open();
  if (button.dataset.mm) viewer.moveTo(JSON.parse(button.dataset.mm));
  viewer.element.scrollIntoView({ block: "start" });
  viewer.planes[0].slider.focus({ preventScroll: true });
});
