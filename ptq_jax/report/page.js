// Headings sort, chips filter. Without this the tables stand whole, in their order.
document.documentElement.classList.add("js");

for (const table of document.querySelectorAll("table.data")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
  const controls = table.closest(".sheet").querySelector(".controls");

  // A thicker line where the method changes, among the rows that are shown in their first order.
  const separate = () => {
    const sorted = heads.some(head => head.getAttribute("aria-sort") !== "none");
    let before = null;
    for (const row of body.rows) {
      if (row.hidden) continue;
      const name = row.cells[0].textContent;
      row.classList.toggle("first", !sorted && before !== null && before !== name);
      before = name;
    }
  };

  heads.forEach((head, index) => head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
    const key = row => row.cells[index].dataset.sort;
    const rows = [...body.rows].sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
      return up * (isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y);
    });
    heads.forEach(other => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", up === 1 ? "ascending" : "descending");
    body.append(...rows);
    separate();
  }));

  const filters = [...controls.querySelectorAll("fieldset")].map(field => {
    const boxes = [...field.querySelectorAll("input")];
    return { column: field.dataset.column, boxes, offered: boxes.map(box => box.value) };
  });
  // A row stays if it is chosen, if nothing is, or if it is none of those that can be chosen.
  const stays = row => filters.every(({ column, boxes, offered }) => {
    const value = row.cells[column].textContent.trim();
    const chosen = boxes.filter(box => box.checked).map(box => box.value);
    return !chosen.length || chosen.includes(value) || !offered.includes(value);
  });
  controls.addEventListener("change", () => {
    const rows = [...body.rows];
    rows.forEach(row => { row.hidden = !stays(row); });
    const shown = rows.filter(row => !row.hidden).length;
    controls.querySelector("output").value =
      shown < rows.length ? `${shown} of ${rows.length} rows` : "";
    separate();
  });
  controls.hidden = false;

  const scroll = table.parentElement;
  new ResizeObserver(() => {
    controls.querySelector(".wide").hidden = scroll.scrollWidth <= scroll.clientWidth;
  }).observe(scroll);
}
