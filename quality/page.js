"use strict";

// Tables: rows are data until they are shown, a few hundred at a time.
const AT_ONCE = 200;

function cellNodes(value, column) {
  if (value === null) return ["–"];
  if (column.digits !== null) return [value.toFixed(column.digits)];
  // Names may be broken after their dots.
  return value.split(/(?<=\.)(?=\w)/).flatMap((part) => [part, document.createElement("wbr")]);
}

function compare(left, right) {
  return typeof left === "number" ? left - right : left.localeCompare(right, "en", { numeric: true });
}

function startTable(box) {
  const { columns, rows } = JSON.parse(box.querySelector("script").textContent);
  const [input, output, more] = ["input", "output", ".more"].map((name) => box.querySelector(name));
  const [head, body] = ["thead", "tbody"].map((name) => box.querySelector(name));
  const words = rows.map((row) => row.filter((value) => typeof value === "string").join(" ").toLowerCase());
  let order = rows.map((_, place) => place);
  let all = false;

  function classes(column) {
    return [column.digits === null ? "" : "number", column.wide ? "wide" : ""].join(" ").trim();
  }

  function show() {
    const wanted = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = order.filter((place) => wanted.every((word) => words[place].includes(word)));
    const shown = all ? found : found.slice(0, AT_ONCE);
    body.replaceChildren(
      ...shown.map((place) => {
        const line = document.createElement("tr");
        rows[place].forEach((value, index) => {
          const cell = line.insertCell();
          cell.append(...cellNodes(value, columns[index]));
          cell.className = classes(columns[index]);
        });
        return line;
      }),
    );
    output.textContent = found.length === rows.length ? `${rows.length}` : `${found.length} of ${rows.length}`;
    more.hidden = shown.length === found.length;
    more.textContent = `Show all ${found.length}`;
  }

  function sort(index, heading) {
    const up = heading.getAttribute("aria-sort") !== "ascending";
    for (const other of head.querySelectorAll("th")) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = (place) => rows[place][index];
    const [known, missing] = [order.filter((place) => key(place) !== null), order.filter((place) => key(place) === null)];
    known.sort((left, right) => (up ? 1 : -1) * compare(key(left), key(right)));
    order = [...known, ...missing];
    show();
  }

  const line = head.insertRow();
  columns.forEach((column, index) => {
    const heading = document.createElement("th");
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = column.title;
    button.addEventListener("click", () => sort(index, heading));
    heading.className = classes(column);
    heading.scope = "col";
    heading.append(button);
    line.append(heading);
  });
  input.addEventListener("input", show);
  function showAll() {
    all = true;
    show();
  }

  more.addEventListener("click", showAll);
  addEventListener("beforeprint", showAll); // paper has no button for the rest
  show();
}

// Copy buttons: files that are opened from a disk may have no clipboard, so there is the old way.
async function copy(button) {
  const code = button.parentElement.querySelector("code");
  let done = true;
  try {
    await navigator.clipboard.writeText(code.textContent);
  } catch {
    getSelection().selectAllChildren(code);
    done = document.execCommand("copy");
  }
  button.textContent = done ? "Copied" : "Press Ctrl+C";
  setTimeout(() => (button.textContent = "Copy"), 1500);
}

// Tips: what lies under the pointer or the finger, if it has data-tip.
function startTips() {
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  document.body.append(tip);

  function move(event) {
    const target = event.target.closest?.("[data-tip]");
    tip.hidden = !target;
    if (!target) return;
    tip.textContent = target.dataset.tip;
    const place = target.getBoundingClientRect();
    const left = place.left + place.width / 2 - tip.offsetWidth / 2;
    tip.style.left = `${Math.max(8, Math.min(left, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${place.top > tip.offsetHeight + 8 ? place.top - tip.offsetHeight - 6 : place.bottom + 6}px`;
  }

  document.addEventListener("pointerover", move);
  document.addEventListener("pointerdown", move);
  document.addEventListener("scroll", () => (tip.hidden = true), { passive: true });
}

document.querySelectorAll(".table").forEach(startTable);
document.querySelectorAll(".copy button").forEach((button) => button.addEventListener("click", () => copy(button)));
startTips();
