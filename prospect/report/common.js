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

/* Text written by people and models: shown in its own direction, whatever is around it. */
function words(text, properties = {}) {
  return el("bdi", { dir: "auto", ...properties }, text);
}

/* 1047.5 -> 17:27.5, 7200 -> 2:00:00 */
function clock(seconds) {
  const tenths = Math.round(seconds * 10);
  const rest = (tenths % 600) / 10;
  const two = (value, text) => (value < 10 ? "0" : "") + text;
  const minutes = Math.floor(tenths / 600);
  const hours = Math.floor(minutes / 60);
  const whole = hours ? `${hours}:${two(minutes % 60, minutes % 60)}` : String(minutes);
  return whole + ":" + two(rest, tenths % 10 ? rest.toFixed(1) : rest.toFixed(0));
}

function clamp(value, low, high) {
  return Math.min(high, Math.max(low, value));
}

/* "speak now?" -> "Speak now?" */
function capitalised(text) {
  return text[0].toUpperCase() + text.slice(1);
}

/* Whether a key pressed belongs to the browser: with one of these, or where it works a box or a list. */
function keyIsTaken(event) {
  const box = event.target.closest?.("select, input");
  return event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented || Boolean(box);
}

/* A button that hands out a figure as a file. svg: its text, asked for when it is pressed. */
function svgButton(name, svg) {
  const onclick = () => {
    const link = el("a", { href: URL.createObjectURL(new Blob([svg()], { type: "image/svg+xml" })) });
    link.download = name().replace(/[^\w.-]+/g, "_") + ".svg";
    link.click();
    URL.revokeObjectURL(link.href);
  };
  return el("button", { type: "button", class: "svg", title: "download as a figure for a paper", onclick }, "SVG");
}

/* The settings that differ between runs or checkpoints, one a row. */
function settingsTable(names) {
  if (!data.differing.length) return "";
  const cell = (text) => el("td", {}, words(text));
  const head = el("tr", {}, el("th", {}, "setting"), ...names.map((name) => el("th", {}, words(name))));
  const rows = data.differing.map(([name, values]) => el("tr", {}, el("th", {}, name), ...values.map(cell)));
  const table = el("table", { id: "differing" }, head, ...rows);
  return el("div", {}, el("h2", {}, "Settings that differ"), el("div", { class: "wide" }, table));
}

/* Where and when the page was written. */
function writtenNote() {
  return el("p", { class: "soft written" }, "Written to ", words(data.written.path), ", " + data.written.time);
}

/* The button that switches between dark and light. Until it is pressed, the page follows the system. */
function themeButton() {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const button = el("button", { class: "quiet", id: "theme", type: "button" });

  function otherTheme() {
    const now = document.documentElement.dataset.theme || (system.matches ? "dark" : "light");
    return now === "dark" ? "light" : "dark";
  }

  function label() {
    button.textContent = capitalised(otherTheme());
    button.title = `Switch to the ${otherTheme()} theme`;
  }

  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = otherTheme();
    label();
  });
  system.addEventListener("change", label);
  label();
  return button;
}

/* The top of a page: a title with a line below it, and the tools at the right. */
function pageHeader(title, about, ...tools) {
  return el("header", { class: "top" }, el("div", {}, title, about), el("div", { class: "tools" }, ...tools));
}

/* Keys and what they do, as a line of help: pairs like ["← →", "frame"]. */
function keyHelp(...pairs) {
  const help = el("p", { class: "keys" });
  for (const [keys, does] of pairs) {
    help.append(el("span", {}, ...keys.split(" ").map((key) => el("kbd", {}, key)), does));
  }
  return help;
}

/* A number with its name, as it is shown under a page's title. */
function namedNumber(name, value) {
  return el("div", {}, el("dt", {}, name), el("dd", {}, value));
}

/* A coloured mark and what it means, for a legend. */
function legendEntry(mark, style, text) {
  return el("span", {}, el("i", { class: mark, style }), text);
}

/* Ticks at round values: about `count` of them from low to high. */
function niceTicks(low, high, count) {
  const rough = (high - low) / Math.max(1, count) || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const ticks = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) ticks.push(k * step);
  return ticks;
}

/* The d of an SVG path through the points [x, y] (as text); at a null the line is interrupted. */
function pathThrough(points) {
  let path = "";
  let penDown = false;
  for (const point of points) {
    if (point !== null) path += (penDown ? "L" : "M") + point[0] + " " + point[1];
    penDown = point !== null;
  }
  return path;
}
