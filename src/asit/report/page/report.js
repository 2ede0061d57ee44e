// One player at a time.
document.addEventListener("play", (event) => {
  for (const audio of document.querySelectorAll("audio")) if (audio !== event.target) audio.pause();
}, true);

// A click on a column's title sorts its table; cells without a value come last.
document.addEventListener("click", (event) => {
  const head = event.target.closest(".sort th");
  if (!head) return;
  const table = head.closest("table"), body = table.tBodies[0], column = head.cellIndex;
  const ascending = head.getAttribute("aria-sort") !== "ascending";
  const value = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent;
  const compare = (one, other) => {
    const x = value(one), y = value(other);
    if (x === "" || y === "") return (x === "") - (y === "");
    return (isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y) * (ascending ? 1 : -1);
  };
  for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  body.append(...[...body.rows].sort(compare));
});

// A link to a folded part opens it.
document.addEventListener("click", (event) => {
  const link = event.target.closest("nav a");
  const part = link && document.querySelector(link.getAttribute("href"));
  if (part instanceof HTMLDetailsElement) part.open = true;
});
