// Lets a click on a column's head sort the table's rows by the numbers that its cells hold; a second click turns the order round.
addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0], first = [...body.rows];
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
  }
});
