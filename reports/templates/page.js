"use strict";
// Heads of tables sort (once, the other way round, as it was), fields filter; both outlast a reload of the page.
const collator = new Intl.Collator("en", { numeric: true });

// What a cell is sorted by: null if it is empty, a dash, or holds no number where numbers stand.
function key(cell) {
  const text = cell.innerText.trim().replaceAll("−", "-").replace(/(\d),(?=\d{3})/g, "$1");
  if (text === "" || text === "–") return null;
  if (!cell.classList.contains("r")) return text;
  const time = text.match(/^(?:(\d+) h ?)?(?:(\d+) min ?)?(?:([\d.]+) s)?$/);
  if (time) return (time[1] || 0) * 3600 + (time[2] || 0) * 60 + Number(time[3] || 0);
  const number = text.match(/(?<![\w.])[-+]?\d+(\.\d+)?(e[-+]?\d+)?/);
  return number ? Number(number[0]) : null;
}

function compare(a, b) {
  return typeof a === "number" ? a - b : collator.compare(a, b);
}

// sessionStorage is refused to files in some browsers; the page then forgets on reload, which does no harm.
function remembered(name, value) {
  try {
    if (value === undefined) return JSON.parse(sessionStorage.getItem(location.pathname + name));
    sessionStorage.setItem(location.pathname + name, JSON.stringify(value));
  } catch {}
  return null;
}

document.querySelectorAll(".table").forEach((frame, index) => {
  const heads = [...frame.querySelectorAll("th")];
  const body = frame.querySelector("tbody");
  const rows = [...body.rows];
  const field = frame.previousElementSibling?.matches("input") ? frame.previousElementSibling : null;

  function sort(column, order) {
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    if (order === "none") return body.append(...rows);
    heads[column].setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    const keyed = rows.map((row) => [key(row.cells[column]), row]);
    const known = keyed.filter(([value]) => value !== null).sort(([a], [b]) => sign * compare(a, b));
    const missing = keyed.filter(([value]) => value === null);
    body.append(...[...known, ...missing].map(([, row]) => row));
  }

  function filter() {
    const words = field.value.toLowerCase().split(/\s+/);
    rows.forEach((row) => {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    });
  }

  heads.forEach((head, column) => {
    const orders = head.classList.contains("r") ? ["descending", "ascending", "none"] : ["ascending", "descending", "none"];
    head.querySelector("button").addEventListener("click", () => {
      const order = orders[orders.indexOf(head.getAttribute("aria-sort")) + 1];
      sort(column, order);
      remembered(`sort${index}`, [column, order]);
    });
  });
  const order = remembered(`sort${index}`);
  if (order && heads[order[0]]) sort(...order);

  if (field) {
    field.value = remembered(`filter${index}`) || "";
    field.addEventListener("input", () => {
      filter();
      remembered(`filter${index}`, field.value);
    });
    filter();
  }
});
