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
      const text = head.dataset.kind === "text";
      const rows = Array.from(body.rows, (row) => ({ row, value: row.cells[column].dataset.value }));
      rows.sort((a, b) => {
        const x = a.value, y = b.value;
        if (x === "" || y === "") return x === y ? 0 : x === "" ? 1 : -1;
        return direction * (text ? x.localeCompare(y, "en", { numeric: true }) : Number(x) - Number(y));
      });
      body.append(...rows.map((item) => item.row));
    });
  });
});

// Filtering: rows whose case holds the text and whose label is the chosen one.
const cases = document.getElementById("case-table");
if (cases) {
  const text = document.getElementById("filter-text"), label = document.getElementById("filter-label");
  const filter = () => {
    let shown = 0;
    const wanted = text.value.toLowerCase();
    Array.from(cases.tBodies[0].rows).forEach((row) => {
      const fits = row.cells[0].dataset.value.toLowerCase().includes(wanted);
      row.hidden = !(fits && (label.value === "" || row.cells[1].dataset.value === label.value));
      shown += row.hidden ? 0 : 1;
    });
    document.getElementById("shown").textContent = `${shown} of ${cases.tBodies[0].rows.length} rows`;
  };
  text.addEventListener("input", filter);
  label.addEventListener("change", filter);
  filter();
}

// Finding one of many labels: rows and folded groups whose name holds the text.
const search = document.getElementById("filter-labels");
if (search) {
  const named = Array.from(document.querySelectorAll("[data-label-name]"));
  search.addEventListener("input", () => {
    const wanted = search.value.toLowerCase();
    named.forEach((item) => { item.hidden = !item.dataset.labelName.toLowerCase().includes(wanted); });
  });
}

// Everything folded is printed: paper cannot be opened.
let folded = [];
addEventListener("beforeprint", () => {
  folded = Array.from(document.querySelectorAll("details:not([open])"));
  folded.forEach((item) => { item.open = true; });
});
addEventListener("afterprint", () => folded.forEach((item) => { item.open = false; }));
