(() => {
  "use strict";
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const board = document.querySelector(".board");
  const body = board.tBodies[0];
  const lines = Array.from(body.rows);
  const heads = Array.from(board.tHead.rows[0].cells);
  const indicator = byId("indicator"), metric = byId("metric");
  const fixed = (value) => value.toFixed(3);
  let column = 0, down = true;

  const cellOf = (line, place) => data.cells[line.dataset.row][place][data.metrics.indexOf(metric.value)];
  const nameOf = (line) => line.cells[0].textContent;
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

  function drawBoard() {
    for (const line of lines) {
      line.classList.toggle("other", line.dataset.indicator !== indicator.value);
      Array.from(line.cells).slice(1).forEach((target, place) => fill(target.querySelector(".value"), cellOf(line, place)));
    }
    body.append(...lines.sort(compare));
    heads.forEach((head, place) => {
      if (place - 1 === column) head.setAttribute("aria-sort", down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    const title = heads[column + 1].querySelector("button").textContent;
    byId("sorted").textContent = `Sorted by ${title}, ${down ? "descending" : "ascending"}.`;
  }

  board.tHead.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const chosen = Number(button.dataset.column), same = chosen === column;
    column = chosen;
    down = same ? !down : bestFirst();
    drawBoard();
  });
  indicator.addEventListener("change", drawBoard);
  metric.addEventListener("change", () => { down = bestFirst(); drawBoard(); });

  drawBoard(); // a browser may have kept choices of an earlier visit

  const run = byId("run"), pair = byId("pair");
  if (!run) return;

  function drawCurves() {
    const shown = data.curves[run.value][pair.value];
    const name = `${run.selectedOptions[0].text} on ${pair.selectedOptions[0].text}`;
    byId("curves").hidden = !shown;
    byId("told").textContent = `${name}: no scores of this detector were kept.`;
    if (!shown) return;
    const others = data.curves.filter((each, place) => String(place) !== run.value && each[pair.value]);
    byId("rest").setAttribute("d", others.map((each) => each[pair.value].roc).join(""));
    for (const id of ["roc", "id", "ood"]) byId(id).setAttribute("d", shown[id]);
    byId("mark").setAttribute("d", shown.mark === null ? "" : `M${shown.mark} 0V100`);
    byId("low").textContent = shown.low;
    byId("high").textContent = shown.high;
    byId("told").textContent = `${name}: AUROC ${fixed(shown.auroc)}, FPR95 ${fixed(shown.fpr95)}, ` +
      `${shown.counts[0]} in-distribution and ${shown.counts[1]} out-of-distribution images.`;
  }
  run.addEventListener("change", drawCurves);
  pair.addEventListener("change", drawCurves);
  drawCurves();
})();
