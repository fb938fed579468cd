// The picture under the hand: tells Python of clicks and pulls as shares of its width and height, and shows what it sends.
const frame = element.querySelector(".dd-frame");
const picture = element.querySelector("img");
const rubber = element.querySelector("line");
const cross = element.querySelector("path");
const STEP = 5; // screen pixels of movement that make a pull of a click
let value = {}, from = null, cursor = null;

function show() {
  const begins = !value.busy && props.value && props.value.busy;
  value = props.value || {};
  frame.classList.toggle("dd-empty", !value.src);
  frame.classList.toggle("dd-busy", !!value.busy);
  frame.setAttribute("aria-busy", value.busy ? "true" : "false");
  if (value.ratio) frame.style.setProperty("--ratio", value.ratio);
  picture.alt = value.alt || "";
  picture.hidden = !value.src;
  if (value.src && picture.src !== value.src) picture.src = value.src;
  if (begins) [200, 800].forEach((wait) => setTimeout(look, wait)); // when the page has taken in all that changed
}
// On a telephone the button that runs is below the picture: where there is room for both and how far the edit is, all are shown.
function look() {
  const go = document.querySelector("#dd-go");
  if (!go) return;
  const box = frame.getBoundingClientRect();
  const bottom = Math.max(box.bottom, go.getBoundingClientRect().bottom + 64);
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  if (bottom - box.top + 12 <= innerHeight && (box.top < 0 || bottom > innerHeight))
    frame.scrollIntoView({ behavior: calm ? "auto" : "smooth" });
}
watch("value", show);
show();

const ready = () => value.src && !value.busy;
function share(event) {
  const box = picture.getBoundingClientRect();
  const at = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  return at.map((part) => Math.min(1, Math.max(0, part)));
}
const far = (a, b) => Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY) >= STEP;
// Fingers are less exact than a mouse.
const near = (kind) => (kind === "touch" ? 24 : 12) / picture.getBoundingClientRect().width;
function place(node, a, b) {
  Object.entries({ x1: a[0], y1: a[1], x2: b[0], y2: b[1] }).forEach(([name, part]) => node.setAttribute(name, part * 100 + "%"));
}

frame.addEventListener("pointerdown", (event) => {
  if (!ready() || event.button !== 0 || !event.isPrimary) return;
  from = event;
  hideCross();
});
frame.addEventListener("pointermove", (event) => {
  if (!from || event.pointerType === "touch" || !far(from, event)) return;
  if (!frame.hasPointerCapture(event.pointerId)) frame.setPointerCapture(event.pointerId);
  place(rubber, share(from), share(event));
  rubber.setAttribute("visibility", "visible");
});
function end() {
  from = null;
  rubber.setAttribute("visibility", "hidden");
}
frame.addEventListener("pointercancel", end);
frame.addEventListener("pointerup", (event) => {
  if (!from) return;
  const begin = from;
  end();
  if (!ready()) return;
  if (far(begin, event)) trigger("pull", { from: share(begin), to: share(event), near: near(event.pointerType) });
  else trigger("press", { at: share(event), near: near(event.pointerType) });
});
picture.addEventListener("dragstart", (event) => event.preventDefault());

// The same with the keyboard: arrow keys move a cross, Enter clicks there.
function hideCross() {
  cross.setAttribute("visibility", "hidden");
}
function drawCross() {
  const [x, y] = [cursor[0] * 1000, cursor[1] * 1000];
  cross.setAttribute("d", `M${x - 30} ${y}H${x + 30}M${x} ${y - 30}V${y + 30}`);
  cross.setAttribute("visibility", "visible");
}
frame.addEventListener("keydown", (event) => {
  if (!ready()) return;
  const size = value.size;
  const middle = size.map((side) => (Math.floor(side / 2) + 0.5) / side); // of a whole pixel
  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (moves) {
    const far = event.shiftKey ? 10 : 1;
    cursor = (cursor || middle).map((part, axis) => Math.min(1, Math.max(0, part + (moves[axis] * far) / size[axis])));
    drawCross();
  } else if (event.key === "Enter" || event.key === " ") {
    cursor = cursor || middle;
    drawCross();
    trigger("press", { at: cursor, near: 0.01 });
  } else if (event.key === "Backspace" || (event.key === "z" && (event.ctrlKey || event.metaKey))) {
    trigger("back", {});
  } else return;
  event.preventDefault();
});
frame.addEventListener("blur", hideCross);

// A file dropped on the picture goes where the button's own would.
["dragover", "drop"].forEach((name) => frame.addEventListener(name, (event) => {
  event.preventDefault();
  const input = document.querySelector("#dd-pictures input[type=file]");
  if (name !== "drop" || !input || !event.dataTransfer.files.length) return;
  input.files = event.dataTransfer.files;
  input.dispatchEvent(new Event("change", { bubbles: true }));
}));
