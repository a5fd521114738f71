(() => {
  "use strict";
  const all = (root, what) => [...root.querySelectorAll(what)];

  const compare = (a, b) => {
    if (a === "" || b === "") return (a === "") - (b === "");
    const x = Number(a), y = Number(b);
    return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b) : x - y;
  };

  function sortBy(table, head, column) {
    const up = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    for (const other of all(table, "th[aria-sort]")) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", up > 0 ? "ascending" : "descending");
    const rows = [...table.tBodies[0].rows], value = (row) => row.cells[column].dataset.value;
    rows.sort((a, b) => value(a) === "" || value(b) === "" ? compare(value(a), value(b)) : up * compare(value(a), value(b)));
    table.tBodies[0].append(...rows);
  }

  for (const table of all(document, "table.sortable")) {
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      if (!head.hasAttribute("data-sort")) return;
      const button = document.createElement("button");
      button.type = "button";
      button.className = "sort";
      button.append(...head.childNodes);
      head.append(button);
      if (!head.hasAttribute("aria-sort")) head.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => sortBy(table, head, column));
    });
  }

  function wanted(form, item) {
    return all(form, "[name]").every((field) => {
      if (field.type === "checkbox") return !field.checked || item.hasAttribute("data-" + field.name);
      const has = item.getAttribute("data-" + field.name), sought = field.value.trim().toLowerCase();
      return sought === "" || (field.type === "search" ? has.includes(sought) : has.split("|").includes(sought));
    });
  }

  function filter(form) {
    const place = document.getElementById(form.dataset.of), items = all(place, "[data-item]");
    let shown = 0;
    for (const item of items) {
      item.hidden = !wanted(form, item);
      shown += !item.hidden;
    }
    for (const group of all(place, "[data-group]")) group.hidden = !all(group, "[data-item]").some((item) => !item.hidden);
    if (shown < items.length) for (const more of all(place, "details[data-more]")) more.open = true;
    form.querySelector("output").textContent = `${shown} of ${items.length} shown`;
  }

  for (const form of all(document, "form.filter")) {
    form.hidden = false;
    form.addEventListener("input", () => filter(form));
    form.addEventListener("submit", (event) => event.preventDefault());
  }

  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    const open = document.activeElement.closest("details.pair[open]") || document.querySelector("details.pair[open]");
    if (!open) return;
    open.open = false;
    open.querySelector("summary").focus();
  });
})();
