(() => {
  "use strict";
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const leaderboard = document.querySelector(".leaderboard");
  const body = leaderboard.tBodies[0];
  const rows = Array.from(body.rows);
  const heads = Array.from(leaderboard.tHead.rows[0].cells);
  const indicator = byId("indicator"), metric = byId("metric");
  const fixed = (value) => value.toFixed(3);
  let column = 0, down = true;

  const cellOf = (row, index) => data.cells[row.dataset.row][index][data.metrics.indexOf(metric.value)];
  const nameOf = (row) => row.cells[0].textContent;
  const bestFirst = () => (column < 0 ? false : !data.lower.includes(metric.value));

  function fill(target, cell) {
    target.textContent = cell ? "" : "–";
    target.parentElement.style.setProperty("--v", cell ? 100 * cell[0] : 0);
    if (!cell) return;
    target.append(Object.assign(document.createElement("b"), { textContent: fixed(cell[0]) }));
    if (cell[1]) target.append(Object.assign(document.createElement("small"), { textContent: cell[1] }));
  }

  function compare(one, other) {
    if (column < 0) return nameOf(one).localeCompare(nameOf(other)) * (down ? -1 : 1);
    const [a, b] = [cellOf(one, column), cellOf(other, column)];
    if (!a || !b) return (a ? 0 : 1) - (b ? 0 : 1);
    return (a[0] - b[0]) * (down ? -1 : 1);
  }

  function drawLeaderboard() {
    for (const row of rows) {
      row.classList.toggle("other", row.dataset.indicator !== indicator.value);
      Array.from(row.cells).slice(1).forEach((target, index) => fill(target.querySelector(".value"), cellOf(row, index)));
    }
    body.append(...rows.sort(compare));
    heads.forEach((head, index) => {
      if (index - 1 === column) head.setAttribute("aria-sort", down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    const title = heads[column + 1].querySelector("button").textContent;
    byId("sorted").textContent = `Sorted by ${title}, ${down ? "descending" : "ascending"}.`;
  }

  leaderboard.tHead.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const chosen = Number(button.dataset.column), same = chosen === column;
    column = chosen;
    down = same ? !down : bestFirst();
    drawLeaderboard();
  });
  indicator.addEventListener("change", drawLeaderboard);
  metric.addEventListener("change", () => { down = bestFirst(); drawLeaderboard(); });

  drawLeaderboard(); // a browser may have kept choices of an earlier visit
})();
