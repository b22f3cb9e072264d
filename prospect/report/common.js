// What all pages share: reading the data, making elements, the theme.
// Text from the data reaches the page only as text nodes and attributes, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);

/* An element with properties ("class", "style", "on…" and attributes) and children; a string becomes a text node. */
function el(name, properties = {}, ...children) {
  const svg = ["svg", "path", "line", "circle", "rect"].includes(name);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "style") node.style.cssText = value; // set by script, so no style attribute is parsed
    else node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/* Text written by people and models: shown in its own direction, whatever stands around it. */
const words = (text, properties = {}) => el("bdi", { dir: "auto", ...properties }, text);

/* 1047.5 -> 17:27.5 */
function clock(seconds) {
  const tenths = Math.round(seconds * 10);
  const rest = (tenths % 600) / 10;
  return Math.floor(tenths / 600) + ":" + (rest < 10 ? "0" : "") + (tenths % 10 ? rest.toFixed(1) : rest.toFixed(0));
}

const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

/* Follows the system until pressed; then dark and light in turn. */
function themeButton() {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
  const button = el("button", { class: "quiet", id: "theme", type: "button" });
  const name = () => { button.textContent = isDark() ? "Light" : "Dark"; button.title = "Switch to the " + (isDark() ? "light" : "dark") + " theme"; };
  button.addEventListener("click", () => { document.documentElement.dataset.theme = isDark() ? "light" : "dark"; name(); });
  system.addEventListener("change", name);
  name();
  return button;
}

/* Keys and what they do, as a line of help. */
const keyHelp = (...pairs) => el("p", { class: "keys" }, ...pairs.map(([keys, does]) => el("span", {}, ...keys.split(" ").map((key) => el("kbd", {}, key)), does)));

/* Ticks at round values: about `count` of them from low to high. */
function niceTicks(low, high, count) {
  const rough = (high - low) / Math.max(1, count) || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const ticks = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) ticks.push(k * step);
  return ticks;
}
