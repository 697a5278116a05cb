// A button below each table that copies it as CSV: what stands small gets a column.
const copyButton = (() => {
  const parts = (cell) => {
    const copy = cell.cloneNode(true);
    const small = [...copy.querySelectorAll("small")];
    small.forEach((one) => one.remove());
    return [copy, ...small].map((one) => one.textContent.trim().replace(/\s+/g, " "));
  };

  const rowsOf = (table) => {
    const rows = [...table.rows].map((row) => [...row.cells].map(parts));
    const widths = [];
    for (const row of rows)
      row.forEach((cell, i) => (widths[i] = Math.max(widths[i] ?? 1, cell.length)));
    const filled = (cell, i) => [...cell, ...Array(widths[i] - cell.length).fill("")];
    return rows.map((row) => row.flatMap(filled));
  };

  const field = (value) => {
    let text = String(value ?? "").replace(/^−/, "-");
    // No spreadsheet takes what a model wrote for a formula.
    if (/^([=+@]|-(?![\d.]))/.test(text)) text = `'${text}`;
    return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };

  const copied = async (text) => {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const area = document.body.appendChild(document.createElement("textarea"));
      area.value = text;
      area.select();
      document.execCommand("copy");
      area.remove();
    }
  };

  const button = (after, rows) => {
    const button = document.createElement("button");
    button.className = "csv";
    button.textContent = "Copy as CSV";
    button.addEventListener("click", async () => {
      await copied(rows().map((row) => row.map(field).join(",")).join("\n"));
      button.textContent = "Copied";
    });
    after.after(button);
  };

  for (const table of document.querySelectorAll("table"))
    button(table.closest(".scroll, .heat") ?? table, () => rowsOf(table));
  return button;
})();
