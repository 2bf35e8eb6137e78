"use strict";
(() => {
  const byId = (id) => document.getElementById(id);

  // theme: system -> light -> dark; a page opened as a file may have no storage
  const themes = ["system", "light", "dark"];
  const button = byId("theme");
  const read = () => { try { return localStorage.getItem("theme"); } catch { return null; } };
  const show = (theme) => {
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    button.textContent = "Theme: " + theme;
  };
  let theme = themes.includes(read()) ? read() : "system";
  button.addEventListener("click", () => {
    theme = themes[(themes.indexOf(theme) + 1) % themes.length];
    try { localStorage.setItem("theme", theme); } catch { /* stays until the page is closed */ }
    show(theme);
  });
  show(theme);
  button.hidden = false;

  // sorting: numbers by value, other text by name, cells without a number last; ties in the order of the page
  const collator = new Intl.Collator("en", { numeric: true });
  const own = (cell) => (cell.querySelector("summary") || cell).textContent.trim();
  const value = (text) => /^[-+]?\d/.test(text) ? parseFloat(text) : NaN;
  const compare = (a, b, sign) => {
    if (!Number.isNaN(a.n) && !Number.isNaN(b.n)) return sign * (a.n - b.n) || a.place - b.place;
    if (Number.isNaN(a.n) !== Number.isNaN(b.n)) return Number.isNaN(a.n) ? 1 : -1;
    return sign * collator.compare(a.text, b.text) || a.place - b.place;
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    const body = table.tBodies[0];
    const order = [...body.rows];
    heads.forEach((head, column) => {
      const press = document.createElement("button");
      press.type = "button";
      press.textContent = head.textContent;
      head.replaceChildren(press);
      press.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const lines = order.map((row, place) => {
          const text = own(row.cells[column]);
          // the order of the page is the order of ranks: 1, 2, then the provisional 1†, 2†
          return { row, place, text, n: column === 0 ? place : value(text) };
        });
        lines.sort((a, b) => compare(a, b, down ? -1 : 1));
        body.append(...lines.map((line) => line.row));
      });
    });
  }

  // filtering
  const form = byId("filters");
  const boards = [...document.querySelectorAll(".board")];
  const figures = [...document.querySelectorAll("figure[data-dataset]")];
  const apply = () => {
    const text = byId("f-text").value.trim().toLowerCase();
    const [dataset, threat, verdict] = ["dataset", "threat", "verdict"].map((name) => byId("f-" + name).value);
    const here = (part) => (!dataset || part.dataset.dataset === dataset)
      && (!threat || !part.dataset.threat || part.dataset.threat === threat);
    let shown = 0, all = 0;
    for (const board of boards) {
      let left = 0;
      for (const row of board.querySelector("tbody").rows) {
        const fits = here(board) && (!verdict || row.dataset.verdict === verdict)
          && (!text || row.textContent.toLowerCase().includes(text));
        row.hidden = !fits;
        left += fits;
        all += 1;
      }
      board.hidden = left === 0;
      shown += left;
    }
    for (const figure of figures) figure.hidden = !here(figure);
    byId("f-count").textContent = shown + " of " + all + " rows";
  };
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(apply));
  form.hidden = false;
  apply();

  // every cell with records behind it is a button that shows them; Tab stops once in a row
  const where = byId("where");
  const records = byId("records");
  const showRecords = (cell, press) => {
    const table = cell.closest("table");
    const row = cell.parentElement;
    const column = table.tHead.rows[0].cells[cell.cellIndex].textContent;
    const method = (row.querySelector("th") || row.cells[0]).textContent;
    byId("where-h").textContent = cell === row.cells[0] ? method : method + ", " + column + ": " + press.textContent;
    const positions = cell.dataset.k.split(" ");
    byId("where-n").textContent = positions.length === 1 ? "Computed from one record." : "Computed from " + positions.length + " records.";
    const shown = where.querySelector("table");
    shown.tHead.replaceChildren(records.tHead.rows[0].cloneNode(true));
    shown.tBodies[0].replaceChildren(...positions.map((position) => {
      const record = records.tBodies[0].rows[position];
      const copy = record.cloneNode(true);
      copy.removeAttribute("id");
      const link = document.createElement("a");
      link.href = "#" + record.id;
      link.append(...copy.cells[0].childNodes);
      copy.cells[0].append(link);
      return copy;
    }));
    where.showModal();
  };
  for (const cell of document.querySelectorAll("td[data-k]")) {
    if (cell.textContent === "–") continue;
    const press = document.createElement("button");
    press.type = "button";
    press.className = "n";
    press.setAttribute("aria-haspopup", "dialog");
    press.append(...cell.childNodes);
    cell.append(press);
    press.tabIndex = cell.parentElement.querySelector("button.n") === press ? 0 : -1;
    press.addEventListener("click", () => showRecords(cell, press));
  }
  document.addEventListener("keydown", (event) => {
    const press = event.target.closest && event.target.closest("button.n");
    if (!press || event.altKey || event.ctrlKey || event.metaKey) return;
    const row = press.closest("tr");
    const line = [...row.querySelectorAll("button.n")];
    const rows = [...row.parentElement.rows].filter((other) => !other.hidden && other.querySelector("button.n"));
    const at = line.indexOf(press);
    const beside = (step) => {
      const other = rows[rows.indexOf(row) + step];
      return other && (other.cells[press.parentElement.cellIndex].querySelector("button.n") || other.querySelector("button.n"));
    };
    const next = { ArrowLeft: () => line[at - 1], ArrowRight: () => line[at + 1], Home: () => line[0],
      End: () => line[line.length - 1], ArrowUp: () => beside(-1), ArrowDown: () => beside(1) }[event.key];
    if (!next) return;
    event.preventDefault();
    const target = next();
    if (!target) return;
    for (const other of target.closest("tr").querySelectorAll("button.n")) other.tabIndex = -1;
    target.tabIndex = 0;
    target.focus();
  });
  byId("how").hidden = false;
  byId("where-close").addEventListener("click", () => where.close());
  where.addEventListener("click", (event) => { if (event.target === where || event.target.closest("a")) where.close(); });

  // a link to a check opens it; a link to a record moves the keyboard focus there too
  const open = () => {
    const target = location.hash.length > 1 && byId(location.hash.slice(1));
    if (!target) return;
    if (target.tagName === "DETAILS") target.open = true;
    if (target.tagName === "TR") {
      target.tabIndex = -1;
      target.focus();
    }
  };
  window.addEventListener("hashchange", open);
  open();
})();
