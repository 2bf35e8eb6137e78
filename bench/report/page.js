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

  // sorting: numbers by value, other text by name, cells without a number last; ties keep the order of the page
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
  const placed = [...document.querySelectorAll("figure[data-dataset]")];
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
    for (const figure of placed) figure.hidden = !here(figure);
    byId("f-count").textContent = shown + " of " + all + " rows";
  };
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(apply));
  form.hidden = false;
  apply();

  // a link to a check opens it
  const open = () => {
    const target = location.hash.length > 1 && byId(location.hash.slice(1));
    if (target && target.tagName === "DETAILS") target.open = true;
  };
  window.addEventListener("hashchange", open);
  open();
})();
