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
  const filter = () => {
    const text = byId("f-text").value.trim().toLowerCase();
    const verdict = byId("f-verdict").value;
    const rows = [...document.querySelectorAll(".board > .scroll > table > tbody > tr")];
    for (const row of rows) {
      row.hidden = Boolean(verdict && row.dataset.verdict !== verdict) || !row.textContent.toLowerCase().includes(text);
    }
    const here = rows.filter((row) => !row.closest("section[hidden]"));
    byId("f-count").textContent = here.filter((row) => !row.hidden).length + " of " + here.length + " rows";
  };
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(filter));

  // tabs: the links of the navigation show one data set and one threat at a time; the address names what is shown
  const lists = [...document.querySelectorAll("#tabs ul:not(#jump)")];
  const panel = (link) => byId(link.hash.slice(1));
  const links = lists.flatMap((list) => [...list.querySelectorAll("a")]);
  const select = (tab) => {
    const data = tab.closest(".data");
    for (const link of links) {
      const part = panel(link);
      const on = part === tab || part === data;
      const own = on || (part.closest(".data") !== data && part === part.closest(".data").querySelector(".tab"));
      part.hidden = !on;
      link.setAttribute("aria-selected", on);
      link.tabIndex = own ? 0 : -1;
    }
    for (const list of lists) list.hidden = Boolean(list.dataset.of) && list.dataset.of !== data.id;
    tab.querySelector(".board .toggle")?.before(form);
    const groups = [...tab.querySelectorAll(".group"), ...data.querySelectorAll(":scope > .group")];
    byId("jump").replaceChildren(...groups.map((group) => {
      const item = document.createElement("li");
      const link = document.createElement("a");
      link.href = "#" + group.id;
      link.textContent = group.querySelector("h4").textContent;
      item.append(link);
      return item;
    }));
    byId("jump").hidden = !groups.length;
    filter();
  };
  for (const list of lists) {
    list.setAttribute("role", "tablist");
    list.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return;
      const own = [...list.querySelectorAll("a")];
      const next = own[(own.indexOf(event.target) + step + own.length) % own.length];
      event.preventDefault();
      next.focus();
      next.click();
    });
  }
  for (const link of links) {
    link.parentElement.setAttribute("role", "presentation");
    link.setAttribute("role", "tab");
    panel(link).setAttribute("role", "tabpanel");
    link.addEventListener("click", (event) => {
      event.preventDefault();
      history.replaceState(null, "", link.hash);
      const part = panel(link);
      select(part.matches(".tab") ? part : part.querySelector(".tab"));
    });
  }
  const tabs = [...document.querySelectorAll(".tab")];
  const size = (tab) => tab.querySelectorAll("tr[data-verdict]").length;
  if (tabs.length) {
    document.body.classList.add("tabbed");
    select(tabs.reduce((a, b) => size(b) > size(a) ? b : a));
    form.hidden = false;
  }

  // one model is highlighted in all tables and figures: under the pointer, or kept by a click on its name
  const main = byId("main");
  const tip = document.createElement("div");
  tip.id = "tip";
  document.body.append(tip);
  let kept = "";
  const names = {};
  for (const part of document.querySelectorAll("tr[data-m] > th, li[data-m]")) names[part.parentElement.dataset.m || part.dataset.m] ||= part.textContent.trim();
  const light = (mark) => {
    for (const part of document.querySelectorAll(".on")) part.classList.remove("on");
    main.classList.toggle("lit", Boolean(mark));
    if (mark) for (const part of document.querySelectorAll(`[data-m="${mark}"]`)) part.classList.add("on");
  };
  const keep = (mark) => {
    kept = mark === kept ? "" : mark;
    light(kept);
    for (const press of document.querySelectorAll("button.pin")) {
      press.setAttribute("aria-pressed", press.closest("[data-m]").dataset.m === kept);
    }
    byId("lit").hidden = !kept;
    byId("lit").textContent = kept && "✕ " + names[kept];
  };
  for (const part of document.querySelectorAll(".board tr[data-m] > th, .key li[data-m]")) {
    const press = document.createElement("button");
    press.type = "button";
    press.className = "pin";
    press.setAttribute("aria-pressed", "false");
    press.append(...part.childNodes);
    part.append(press);
  }
  byId("lit").addEventListener("click", () => keep(kept));
  main.addEventListener("click", (event) => {
    const press = event.target.closest("button.pin, .plot svg [data-m]");
    if (press) keep(press.closest("[data-m]").dataset.m);
  });
  main.addEventListener("pointerover", (event) => {
    const part = event.target.closest(".plot [data-m]");
    light(part ? part.dataset.m : kept);
    tip.hidden = !part || part.matches("li") || !names[part.dataset.m];
    tip.textContent = part ? names[part.dataset.m] : "";
    tip.style.left = Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 4) + "px";
    tip.style.top = event.clientY + 14 + "px";
  });
  main.addEventListener("pointerleave", () => { tip.hidden = true; light(kept); });
  tip.hidden = true;

  // images: beside each attacked one its difference from the clean one, times ten
  document.addEventListener("beforetoggle", ({ target }) => {
    if (!target.matches("[popover]") || target.querySelector(".diff")) return;
    const cell = target.closest("td");
    const clean = cell.closest("table").tHead.rows[0].cells[cell.cellIndex].querySelector("img");
    for (const image of target.querySelectorAll("img")) {
      const diff = document.createElement("span");
      diff.className = "diff";
      diff.title = "difference from the clean image, times 10";
      diff.append(clean.cloneNode(), image.cloneNode());
      image.after(diff);
    }
  }, true);

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
  byId("keys").hidden = false;
  byId("where-close").addEventListener("click", () => where.close());
  where.addEventListener("click", (event) => { if (event.target === where || event.target.closest("a")) where.close(); });

  // a link to a check opens it; a link to a record moves the keyboard focus there too
  const open = () => {
    const target = location.hash.length > 1 && byId(location.hash.slice(1));
    if (!target) return;
    const tab = target.matches(".data") ? target.querySelector(".tab") : target.closest(".tab");
    if (tab || target.closest(".data")) select(tab || target.closest(".data").querySelector(".tab:not([hidden])") || target.closest(".data").querySelector(".tab"));
    if (tab && tab !== target) target.scrollIntoView();
    if (target.tagName === "DETAILS") target.open = true;
    if (target.tagName === "TR") {
      target.tabIndex = -1;
      target.focus();
    }
  };
  window.addEventListener("hashchange", open);
  open();
})();
