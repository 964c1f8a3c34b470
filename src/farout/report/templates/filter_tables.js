// A search box above every sortable table. Rows are compared as text and hidden, never rewritten.
for (const table of document.querySelectorAll("table.sortable")) {
  const box = Object.assign(document.createElement("input"), { type: "search", placeholder: "filter rows" });
  box.setAttribute("aria-label", "Filter the rows of the table below");
  box.addEventListener("input", () => {
    const words = box.value.toLowerCase().split(/\s+/);
    for (const row of table.querySelectorAll("tbody tr"))
      row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
  });
  table.before(box);
}
