// Draws the map of layers by kinds when its figure comes near the window.
(() => {
  const figure = document.getElementById("fig-map");
  const chart = figure.querySelector(".chart");
  const output = figure.querySelector("output");

  const number = (value) => (value === null ? "–" : Number(value.toPrecision(3)).toString());

  function rows({ names, columns }) {
    const keys = Object.keys(columns);
    return columns.value.map((value, i) => {
      const row = {};
      for (const key of keys) row[key] = names[key] ? names[key][columns[key][i]] : columns[key][i];
      row.ratio = row.noise ? value / row.noise : null;
      row.text = number(value);
      row.times = number(row.ratio);
      row.place = `layer ${row.layer}, ${row.kind}`;
      row.said = `${row.stage}, ${row.place}: ${row.figure} ${row.text}`;
      if (row.noise !== null) {
        const band = `${number(row.noise)} (${number(row.low)} to ${number(row.high)})`;
        row.said += `; noise ${band}, ratio ${row.times}`;
      }
      return row;
    });
  }

  async function draw() {
    // Each library's hash is in the page's policy; nothing is fetched or evaluated.
    for (const library of document.querySelectorAll("script[data-library]")) {
      const script = document.createElement("script");
      script.textContent = library.textContent;
      document.head.append(script);
    }
    const data = JSON.parse(document.getElementById("map-data").textContent);
    const values = rows(data);
    chart.hidden = false;
    const bind = figure.querySelector(".choices");
    const options = { renderer: "svg", ast: true, actions: false, bind };
    const { view } = await vegaEmbed(chart, { ...data.spec, data: { values } }, options);
    chart.tabIndex = 0;
    chart.setAttribute("role", "application");
    chart.setAttribute("aria-label", "Layers by kinds: arrow keys go from cell to cell");

    const shown = () =>
      values.filter((r) => r.figure === view.signal("figure") && r.stage === view.signal("stage"));
    const say = (row) => {
      output.textContent = row.said;
      view.signal("at", row.place).runAsync();
    };
    const columns = ["figure", "stage", "layer", "kind", "value", "noise", "low", "high", "ratio"];
    copyButton(output, () => [columns, ...shown().map((row) => columns.map((key) => row[key]))]);
    view.addEventListener("mouseover", (_, item) => item?.datum?.said && say(item.datum));
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    chart.addEventListener("keydown", (event) => {
      const move = moves[event.key];
      if (!move) return;
      event.preventDefault();
      const cells = shown();
      const at = cells.find((row) => row.place === view.signal("at"));
      if (!at) return say(cells[0]);
      const kinds = [...new Set(cells.map((row) => row.kind))];
      const kind = kinds[kinds.indexOf(at.kind) + move[1]];
      const next = cells.find((row) => row.layer === at.layer + move[0] && row.kind === kind);
      if (next) say(next);
    });
  }

  const near = new IntersectionObserver((entries) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    near.disconnect();
    draw();
  }, { rootMargin: "400px" });
  near.observe(figure);
})();
