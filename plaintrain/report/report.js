"use strict";

// Theme: light, dark or system; stored if the browser allows localStorage for files.
const root = document.documentElement, toggle = document.getElementById("theme");
const themes = { "": "system", light: "light", dark: "dark" };
function show(theme) {
  if (theme) root.dataset.theme = theme;
  else delete root.dataset.theme;
  toggle.textContent = "Theme: " + themes[theme];
  toggle.setAttribute("aria-label", "Theme: " + themes[theme] + "; press to change");
}
let theme = "";
try { theme = localStorage.getItem("plaintrain-theme") || ""; } catch (e) { /* localStorage is not allowed */ }
show(theme in themes ? theme : "");
toggle.addEventListener("click", () => {
  const isDark = matchMedia("(prefers-color-scheme: dark)").matches;
  const order = isDark ? ["", "light", "dark"] : ["", "dark", "light"];
  const next = order[(order.indexOf(root.dataset.theme || "") + 1) % 3];
  show(next);
  try { localStorage.setItem("plaintrain-theme", next); } catch (e) { /* localStorage is not allowed */ }
});

// Tables sort by a click on a column: numbers descending first, a second click reverses.
const compare = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" }).compare;
function sort(table, column, head) {
  const isNumber = head.classList.contains("number"), was = head.getAttribute("aria-sort");
  const down = was === "none" ? isNumber : was === "ascending";
  for (const other of head.parentNode.children) other.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const key = (row) => {
    const cell = row.children[column];
    return isNumber ? ("value" in cell.dataset ? Number(cell.dataset.value) : NaN) : cell.textContent;
  };
  const rows = [...table.tBodies[0].rows].map((row) => [key(row), row]);
  rows.sort(([a], [b]) => {
    if (!isNumber) return (down ? -1 : 1) * compare(a, b);
    // Empty cells stay at the end.
    if (isNaN(a) || isNaN(b)) return isNaN(a) - isNaN(b);
    return (down ? -1 : 1) * (a - b);
  });
  table.tBodies[0].append(...rows.map(([, row]) => row));
}
for (const table of document.querySelectorAll("table.sortable"))
  [...table.tHead.rows[0].cells].forEach((head, column) =>
    head.querySelector("button").addEventListener("click", () => sort(table, column, head)));

// A click on an image enlarges it and its pair.
const dialog = document.createElement("dialog");
document.body.append(dialog);
dialog.addEventListener("click", (event) => { if (event.target.tagName !== "IMG") dialog.close(); });
for (const button of document.querySelectorAll(".zoom"))
  button.addEventListener("click", () => {
    const pair = button.closest(".pair"), close = document.createElement("button");
    const images = document.createElement("div");
    close.textContent = "Close";
    images.append(...[...pair.querySelectorAll("img")].map((image) => image.cloneNode()));
    dialog.replaceChildren(close, pair.querySelector("p").cloneNode(true), images);
    dialog.showModal();
  });

// Highlight the section in view in the navigation.
const links = new Map([...document.querySelectorAll("nav a")].map((a) => [a.hash.slice(1), a]));
const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    for (const link of links.values()) link.removeAttribute("aria-current");
    const link = links.get(entry.target.id);
    link.setAttribute("aria-current", "true");
    const nav = link.parentNode;
    if (nav.scrollWidth > nav.clientWidth) nav.scrollLeft = link.offsetLeft - nav.clientWidth / 2;
  }
}, { rootMargin: "-12% 0px -80% 0px" });
document.querySelectorAll("main section").forEach((section) => seen.observe(section));
