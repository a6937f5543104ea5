// Tables inside <div class="searchable">: a search field above, and a click on a heading sorts.
document$.subscribe(() => {
  for (const box of document.querySelectorAll("div.searchable")) {
    const body = box.querySelector("tbody");
    if (!body || box.querySelector("input")) continue;
    const rows = [...body.rows];
    const field = document.createElement("input");
    const count = document.createElement("span");
    Object.assign(field, { type: "search", placeholder: "Search: llama, vision, causal, none ...", className: "searchable-field" });
    field.setAttribute("aria-label", "Search the table");
    box.prepend(field, count);
    const search = () => {
      const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
      const shown = rows.filter((row) => {
        const text = row.textContent.toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
        return !row.hidden;
      });
      count.textContent = ` ${shown.length} of ${rows.length} models`;
    };
    field.addEventListener("input", search);
    search();
    box.querySelectorAll("thead th").forEach((head, column) => {
      head.tabIndex = 0;
      head.title = "Click to sort";
      const sort = () => {
        const up = head.dataset.order !== "up";
        head.dataset.order = up ? "up" : "down";
        const text = (row) => row.cells[column].textContent.trim();
        const sorted = rows.sort((a, b) => text(a).localeCompare(text(b), "en", { numeric: true }));
        body.append(...(up ? sorted : [...sorted].reverse()));
      };
      head.addEventListener("click", sort);
      head.addEventListener("keydown", (event) => event.key === "Enter" && sort());
    });
  }
});
