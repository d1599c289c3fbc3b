"use strict";
(function () {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const data = document.getElementById("figures");
  const figures = data ? JSON.parse(data.textContent) : {};
  const config = { displayModeBar: false, responsive: true };

  function colourAxis(axis, ink, grid) {
    return Object.assign({}, axis, { color: ink, gridcolor: grid, zerolinecolor: grid, linecolor: grid });
  }

  // The figures only have colours for data. Axes and backgrounds follow the colour scheme of the browser.
  function applyTheme(figure) {
    const ink = dark.matches ? "#c9d2dd" : "#3a4452";
    const grid = dark.matches ? "#303946" : "#e3e7ec";
    const card = dark.matches ? "#1b212a" : "#ffffff";
    const heat = dark.matches ? [[0, "#1e2630"], [0.5, "#2a6ba6"], [1, "#9fd3ff"]] : [[0, "#f3f6f9"], [0.5, "#6aaede"], [1, "#0b3f73"]];
    const original = figure.layout;
    const isHeat = figure.data.some((trace) => trace.type === "heatmap");
    const line = isHeat ? "rgba(0,0,0,0)" : grid;
    const layout = Object.assign({}, original, {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: Object.assign({}, original.font, { color: ink, family: "system-ui, -apple-system, 'Segoe UI', Roboto, Arial, sans-serif" }),
      hoverlabel: { namelength: -1, bgcolor: card, bordercolor: grid, font: { color: ink } },
      xaxis: colourAxis(original.xaxis, ink, line),
      yaxis: colourAxis(original.yaxis, ink, line),
    });
    const traces = figure.data.map((trace) => (trace.type === "heatmap" ? Object.assign({}, trace, { colorscale: heat }) : trace));
    return { traces, layout };
  }

  function draw() {
    for (const place of document.querySelectorAll("[data-figure]")) {
      const figure = applyTheme(figures[place.dataset.figure]);
      Plotly.react(place, figure.traces, figure.layout, config);
    }
  }

  function value(row, column) {
    const cell = row.cells[column];
    return "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent.trim().toLowerCase();
  }

  function sort(header) {
    const table = header.closest("table");
    const column = header.cellIndex;
    const isDescending = header.getAttribute("aria-sort") === "ascending";
    const rows = Array.from(table.tBodies[0].rows);
    rows.sort((left, right) => {
      const [a, b] = [value(left, column), value(right, column)];
      const order = typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true });
      return isDescending ? -order : order;
    });
    table.tBodies[0].append(...rows);
    for (const other of header.parentElement.cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", isDescending ? "descending" : "ascending");
  }

  for (const header of document.querySelectorAll("table.sortable th")) {
    header.querySelector("button").addEventListener("click", () => sort(header));
  }
  draw();
  dark.addEventListener("change", draw);
})();
