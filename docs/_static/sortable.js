// Lets a click on a column's head sort the table's rows by the numbers that its cells hold; a second click turns the order round.
// Tables whose rows name experiments can be narrowed to one. What is folded opens where an address leads into it.
// Buttons that show words are called by these words. What scrolls in its place can be reached by the keyboard.
addEventListener("DOMContentLoaded", () => {
  for (const e of document.querySelectorAll("details > summary[aria-label], button.search-button-field")) e.removeAttribute("aria-label");
  for (const cell of document.querySelectorAll("table.table td")) {
    if (/^[-+]?\d[^a-z]*( to [^a-z]*)?$/.test(cell.textContent)) cell.classList.add("number");
  }
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0], first = [...body.rows];
    const around = document.createElement("div");
    around.className = "scrolls";
    around.tabIndex = 0;
    around.setAttribute("role", "region");
    around.setAttribute("aria-label", "Table");
    table.before(around);
    around.append(table);
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") !== "descending" && column > 0, sign = down ? -1 : 1;
        const value = row => column ? parseFloat(row.cells[column].dataset.value) : first.indexOf(row);
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        body.append(...[...body.rows].sort((a, b) => {
          const x = value(a), y = value(b);
          return Number.isNaN(x) ? 1 : Number.isNaN(y) ? -1 : sign * (x - y) || first.indexOf(a) - first.indexOf(b);
        }));
      });
    });
    const names = new Set(first.flatMap(row => (row.dataset.experiments || "").split(" ").filter(Boolean)));
    if (names.size < 2) continue;
    const label = document.createElement("label"), choice = document.createElement("select");
    label.className = "filter";
    label.append("Experiment: ", choice);
    for (const name of ["all", ...names]) choice.append(new Option(name.replaceAll("_", " "), name));
    choice.addEventListener("change", () => {
      for (const row of first) row.hidden = choice.value !== "all" && !row.dataset.experiments.split(" ").includes(choice.value);
    });
    around.before(label);
  }
  const mark = () => {
    for (const e of document.querySelectorAll(".cell_output pre, .pst-scrollable-table-container, .scrolls")) {
      if (e.scrollHeight > e.clientHeight + 1 || e.scrollWidth > e.clientWidth) e.tabIndex = 0;
      if (e.scrollHeight > e.clientHeight + 1) e.classList.add("goes-on");
    }
  };
  addEventListener("toggle", mark, true); // what is folded has no height until it is opened
  mark();
  const unfold = () => {
    const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!target) return;
    for (let e = target; e; e = e.parentElement) if (e.tagName === "DETAILS") e.open = true;
    target.scrollIntoView();
  };
  addEventListener("hashchange", unfold);
  unfold();
});
