// The table of all cases: its rows are data, and only those near what is in sight are made, as thousands of them would
// take seconds to open. A search in the page therefore finds the rows in sight; the filter finds all.
const ROWS_AT_ONCE = 100;
const caseTable = document.getElementById("case-table");
if (caseTable) {
  const rows = JSON.parse(document.getElementById("case-data").textContent);
  const body = caseTable.tBodies[0], box = caseTable.closest(".scroll"), heads = Array.from(caseTable.tHead.rows[0].cells);
  const name = document.getElementById("filter-text"), label = document.getElementById("filter-label");
  const titles = new Map(Array.from(label.options, (option) => [option.value, option.text]));
  let sorted = rows, shown = rows;

  const text = (value, head) => {
    if (head.dataset.digits === undefined) return head === heads[1] ? titles.get(value) : value;
    if (value === null) return "-";
    return typeof value === "string" ? value.replace("Infinity", "∞") : value.toFixed(Number(head.dataset.digits));
  };
  const line = ([viewer, ...values]) => {
    const row = document.createElement("tr");
    values.forEach((value, column) => {
      const cell = row.insertCell();
      let place = cell;
      if (column < 2) cell.className = "left";
      if (column === 0 && viewer !== null) {
        place = document.createElement("button");
        Object.assign(place, { type: "button", className: "link" });
        place.dataset.viewer = `view-${viewer}`;
        cell.append(place);
      }
      place.textContent = text(value, heads[column]);
    });
    return row;
  };
  const more = (count) => {
    const made = body.rows.length;
    if (made < shown.length) body.append(...shown.slice(made, made + count).map(line));
  };
  const show = () => {
    const wanted = name.value.toLowerCase();
    shown = sorted.filter((row) => row[1].toLowerCase().includes(wanted) && (label.value === "" || row[2] === label.value));
    body.replaceChildren();
    box.scrollTop = 0;
    more(ROWS_AT_ONCE);
    document.getElementById("shown").textContent = `${shown.length} of ${rows.length} rows`;
  };
  box.addEventListener("scroll", () => {
    if (box.scrollTop + 2 * box.clientHeight > box.scrollHeight) more(ROWS_AT_ONCE);
  });
  name.addEventListener("input", show);
  label.addEventListener("change", show);

  // Sorting: a click on a column's button sorts by it; numbers by value, undefined ones last.
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const direction = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
    const names = new Intl.Collator("en", { numeric: true });
    sorted = rows.slice().sort((a, b) => {
      const x = a[column + 1], y = b[column + 1];
      if (x === null || y === null) return (x === null) - (y === null);
      return direction * (head.dataset.digits === undefined ? names.compare(x, y) : Number(x) - Number(y));
    });
    show();
  }));

  // On paper every row is there.
  let before = 0;
  addEventListener("beforeprint", () => { before = body.rows.length; more(shown.length); });
  addEventListener("afterprint", () => { while (body.rows.length > before) body.lastElementChild.remove(); });
  show();
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
