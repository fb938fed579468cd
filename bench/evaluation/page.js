"use strict";
// Which row is shown, in what order, and pictures in large. The page reads as well without: its main row, worst first.
const page = document.body, list = document.querySelector(".cards"), cards = [...list.children];
const row = document.getElementById("row"), order = document.getElementById("order"), find = document.getElementById("find");
const count = document.querySelector(".count"), box = document.querySelector("dialog"), better = JSON.parse(list.dataset.better);
const values = new Map(cards.map(card => [card, JSON.parse(card.dataset.values)]));
let shown = cards, at = 0;

function arrange() {
  const one = row.value === "all" ? list.dataset.main : row.value;
  page.classList.toggle("all", row.value === "all");
  for (const shot of list.querySelectorAll("[data-row]")) shot.hidden = row.value !== "all" && shot.dataset.row !== row.value;
  const [figure, way] = order.value.split("|");
  const sign = (better[figure] === "higher") === (way === "worst") ? 1 : -1;
  const key = card => figure === "name" ? null : values.get(card)[one]?.[figure];
  const sorted = [...cards].sort((a, b) => {
    const x = key(a), y = key(b), names = a.dataset.name < b.dataset.name ? -1 : 1;
    if (x == null || y == null) return x == null && y == null ? names : (x == null ? -1 : 1) * (way === "best" ? -1 : 1);
    return sign * (x - y) || names;
  });
  const words = find.value.trim().toLowerCase();
  shown = sorted.filter(card => card.dataset.words.includes(words));
  list.replaceChildren(...shown);
  shown.forEach((card, number) => { card.querySelector(".rank").textContent = number + 1; });
  count.textContent = shown.length === cards.length ? `${cards.length} samples` : `${shown.length} of ${cards.length}`;
}

function open(card, edit) {
  at = shown.indexOf(card);
  const name = edit?.dataset.row ?? (row.value === "all" ? list.dataset.main : row.value);
  const right = edit ?? [...card.querySelectorAll("figure[data-row]")].find(each => each.dataset.row === name);
  const pair = box.querySelector(".pair");
  pair.replaceChildren(...[card.querySelector(".drag"), right].filter(Boolean).map(figure => {
    const side = document.createElement("div"), says = document.createElement("p"), link = figure.querySelector("a.shot");
    const picture = (link ?? figure.querySelector(".none")).cloneNode(true);
    picture.removeAttribute("href");
    for (const image of picture.querySelectorAll("img")) image.loading = "eager";
    const words = figure.querySelector("figcaption");
    says.textContent = [...(words.children.length ? words.children : [words])].map(part => part.textContent).join(" \u00b7 ");
    side.append(picture, says);
    return side;
  }));
  box.querySelector("h3").textContent = card.dataset.name;
  box.dataset.row = name;
  if (!box.open) box.showModal();
}

function step(by) {
  const card = shown[(at + by + shown.length) % shown.length];
  open(card, [...card.querySelectorAll("figure[data-row]")].find(each => each.dataset.row === box.dataset.row));
}

for (const control of [row, order]) control.addEventListener("change", arrange);
find.addEventListener("input", arrange);
list.addEventListener("click", event => {
  const shot = event.target.closest("a.shot");
  if (!shot || event.metaKey || event.ctrlKey || event.shiftKey) return;
  event.preventDefault();
  const figure = shot.closest("figure");
  open(shot.closest(".card"), figure.dataset.row === undefined ? undefined : figure);
});
box.querySelector(".close").addEventListener("click", () => box.close());
box.querySelector(".next").addEventListener("click", () => step(1));
box.querySelector(".back").addEventListener("click", () => step(-1));
box.addEventListener("click", event => { if (event.target === box) box.close(); });
box.addEventListener("keydown", event => {
  if (event.key === "ArrowRight") step(1);
  if (event.key === "ArrowLeft") step(-1);
});
document.querySelector(".bar").hidden = false;
arrange();
