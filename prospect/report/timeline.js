// A streamed clip: lanes over time, the frame under the pointer, everything that was said.
// All places in time are percentages of the track's width, so that zooming only changes that width.

const LANES = { user: "User", wanted: "Should have said", said: "Assistant said", update_wanted: "Update due", update: "Update written", context: "Context refreshed" };
const VERDICTS = { matched: "matched", mismatched: "other words", missed: "missed", redundant: "redundant", refused: "refused" };

let clip, rows, pinned, zoom, shown; // shown: the row that the frame panel tells about

const tone = (event) => "tone-" + (event.status || (event.lane === "user" || event.lane === "context" ? event.lane : "plain"));
const middle = (row) => ((row + 0.5) / rows) * 100 + "%";
const timeOf = (row) => clip.seconds + row / clip.fps;
const probability = (p) => (p === null ? "–" : p.toFixed(4));
const stateAt = (runs, row) => runs.find(([first, last]) => first <= row && row <= last)[2];

// ---------------------------------------------------------------------------------------------------- lanes

/* One row: its name on the left, its track on the right, of equal height. */
function addLane(name, small, height, track, title) {
  const style = `height:${height}px`;
  names.append(el("div", { class: "name" + (height > 40 ? " tall" : ""), style, title: title || name }, el("span", {}, words(name)), small ? el("small", {}, words(small)) : null));
  track.style.height = height + "px";
  time.append(track);
}

/* A curve of one value a frame, 0 at the bottom, `top` at the upper edge. Where there is no value there is no line. */
function curve(values, top, colour) {
  let line = "", area = "", open = false;
  values.forEach((value, row) => {
    if (value === null) { open = false; return; }
    const point = `${row + 0.5} ${(1 - value / top).toFixed(4)}`;
    line += (open ? "L" : "M") + point;
    open = true;
  });
  const first = values.findIndex((value) => value !== null);
  if (first >= 0) area = `M${first + 0.5} 1` + line.replace(/M/g, "L") + `L${values.length - 0.5} 1Z`;
  return el("svg", { viewBox: `0 0 ${rows} 1`, preserveAspectRatio: "none", "aria-hidden": "true" },
    el("path", { class: "area " + colour, d: area }), el("path", { class: colour, d: line || "M0 1" }));
}

function headLane(name, values, head, fired, references, colour) {
  const [low, high] = clip.thresholds[head];
  const exact = low === high;
  const height = 66, inset = 5, inner = height - 2 * inset;
  const y = (p) => inset + (1 - p) * inner;
  const track = el("div", { class: "lane head", "data-lane": head }, curve(values, 1, colour));
  track.append(el("div", { class: "threshold" + (exact ? " exact" : ""), style: `top:${y(high)}px;height:${(high - low) * inner}px` }));
  for (const row of references) track.append(el("i", { class: "reference", style: "left:" + middle(row) }));
  for (const row of fired) track.append(el("i", { class: "fired", style: `left:${middle(row)};top:${y(values[row])}px;color:var(--${head === "speaking" ? "speak" : "update"})` }));
  addLane(name, exact ? `fires from ${low.toFixed(3)}` : `fires from ${low.toFixed(2)}–${high.toFixed(2)}`, height, track,
    exact ? "The head fires where its probability reaches the dashed line." : "The records tell the threshold only within the band: nothing below it fired, everything above it did.");
}

/* Marks with their text, each as wide as the room up to the next one. */
function textLane(lane) {
  const events = clip.events.filter((event) => event.lane === lane);
  const track = el("div", { class: "lane texts", "data-lane": lane });
  events.forEach((event, i) => {
    const next = events.slice(i + 1).find((other) => other.row > event.row);
    const left = ((event.row + 0.5) / rows) * 100, right = next ? ((next.row + 0.5) / rows) * 100 : 100;
    const label = event.text || event.note;
    track.append(el("div", { class: "chip " + tone(event), style: `left:${left}%;width:max(3px, calc(${right - left}% - 1px))`, "data-event": clip.events.indexOf(event) },
      words(label))); // its own direction decides at which end a long text is cut
  });
  addLane(LANES[lane], String(events.length), 34, track);
}

function stepLane(step) {
  const track = el("div", { class: "lane step", "data-lane": step.id });
  for (const [runs, place] of [[step.predicted, "above"], [step.reference || [], "below"]])
    for (const [first, last, state] of runs)
      track.append(el("i", { class: `run ${place} state${state}`, style: `left:${(first / rows) * 100}%;width:${((last - first + 1) / rows) * 100}%` }));
  addLane((step.id + " " + step.name).trim(), "", 26, track);
}

function drawAxis() {
  const pixels = time.clientWidth / (rows / clip.fps); // a second
  const step = [0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600, 7200].find((s) => s * pixels >= 62) || 14400;
  const ticks = [];
  for (let t = Math.ceil(timeOf(0) / step) * step; t < timeOf(rows - 1); t += step) {
    const left = (((t - timeOf(0)) * clip.fps + 0.5) / rows) * 100;
    if (left < 100 - 4000 / time.clientWidth) ticks.push(el("span", { style: `left:${left}%` }, clock(t))); // not cut at the end
  }
  axis.replaceChildren(...ticks);
}

// ---------------------------------------------------------------------------------------------- the frame beside

function showFrame(row) {
  shown = row;
  const here = clip.events.filter((event) => event.row === row);
  const parts = [
    el("h2", { id: "frame-number" }, "Frame " + (clip.first + row)),
    el("p", { class: "soft" }, `${clock(timeOf(row))} in the video · ${row + 1} of ${rows}`),
  ];
  const picture = clip.pictures.filter(([at]) => at <= row).pop();
  if (picture) parts.push(el("img", { src: picture[1], alt: "frame " + (clip.first + picture[0]) }));
  const fact = (name, value, id) => [el("dt", {}, name), el("dd", { id }, value)];
  parts.push(el("dl", {},
    ...fact("speak", probability(clip.speaking[row]) + (spoke.has(row) ? "  fired" : ""), "frame-speaking"),
    ...(clip.update ? fact("update", probability(clip.update[row]) + (updated.has(row) ? "  fired" : ""), "frame-update") : []),
    ...fact("context", clip.tokens[row] + " tokens", "frame-tokens")));
  for (const event of here)
    parts.push(el("div", { class: "spoken " + tone(event) }, el("b", {}, LANES[event.lane] + (event.status ? " · " + VERDICTS[event.status] : "")), el("br"),
      words(event.text || event.note), event.note && event.text ? el("div", { class: "soft" }, words(event.note)) : null));
  if (clip.steps.length) {
    parts.push(el("ul", { class: "steps" }, ...clip.steps.map((step) => {
      const now = stateAt(step.predicted, row), due = step.reference && stateAt(step.reference, row);
      const wrong = due !== null && due !== now;
      const told = data.states[now].replace("_", " ") + (wrong ? ", should be " + data.states[due].replace("_", " ") : "");
      return el("li", { class: wrong ? "wrong" : null, title: told }, el("i", { class: "state" + now }), words(step.id + " " + step.name), el("small", {}, wrong ? "≠ " + data.states[due].replace("_", " ") : ""));
    })));
  }
  frame.replaceChildren(...parts);
}

function showCursor(row, hovering) {
  cursor.style.left = middle(row);
  cursor.classList.toggle("hover", hovering);
  if (row !== shown) showFrame(row);
}

/* Jump to a frame: the cursor, the panel, the list of events and what a screen reader is told. */
function go(row, scroll = true) {
  pinned = clamp(row, 0, rows - 1);
  showCursor(pinned, false);
  time.setAttribute("aria-valuenow", clip.first + pinned);
  time.setAttribute("aria-valuetext", `frame ${clip.first + pinned}, ${clock(timeOf(pinned))}, speak ${probability(clip.speaking[pinned])}`);
  for (const node of document.querySelectorAll(".chip.on")) node.classList.remove("on");
  let current = null;
  clip.events.forEach((event, i) => {
    const here = event.row === pinned;
    list.children[i].setAttribute("aria-selected", here);
    if (here) { current = current || list.children[i]; time.querySelector(`[data-event="${i}"]`)?.classList.add("on"); }
  });
  if (current) list.scrollTop = clamp(list.scrollTop, current.offsetTop + current.offsetHeight - list.clientHeight, current.offsetTop);
  const x = ((pinned + 0.5) / rows) * time.clientWidth;
  if (scroll && (x < scroller.scrollLeft + 20 || x > scroller.scrollLeft + scroller.clientWidth - 20)) scroller.scrollLeft = x - scroller.clientWidth / 2;
}

function setZoom(value) {
  zoom = clamp(value, 1, Math.max(1, (rows * 24) / scroller.clientWidth));
  time.style.width = zoom * 100 + "%";
  scroller.scrollLeft = ((pinned + 0.5) / rows) * time.clientWidth - scroller.clientWidth / 2;
  drawAxis();
}

/* The next or previous row at which anything is said. */
function neighbour(direction) {
  const at = clip.events.map((event) => event.row).filter((row) => direction * (row - pinned) > 0);
  return at.length ? (direction > 0 ? Math.min(...at) : Math.max(...at)) : pinned;
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const far = Math.max(1, Math.round(10 * clip.fps));
  const moves = { ArrowLeft: -1, ArrowRight: 1, PageUp: -far, PageDown: far };
  if (event.key in moves) go(pinned + moves[event.key]);
  else if (event.key === "Home") go(0);
  else if (event.key === "End") go(rows - 1);
  else if (event.key === "n" || event.key === "p") go(neighbour(event.key === "n" ? 1 : -1));
  else if (event.key === "+" || event.key === "=") setZoom(zoom * 2);
  else if (event.key === "-") setZoom(zoom / 2);
  else if (event.key === "0") setZoom(1);
  else return;
  event.preventDefault();
}

// ------------------------------------------------------------------------------------------------------ the page

const title = el("h1"), about = el("p", { class: "soft" }), numbers = el("dl", { class: "numbers" });
const names = el("div", { class: "names" }), axis = el("div", { class: "axis" }), cursor = el("div", { class: "cursor" });
const time = el("div", { class: "time", id: "time", tabindex: "0", role: "slider", "aria-label": "frame", onkeydown: onKey });
const scroller = el("div", { class: "scroll" }, time);
const frame = el("aside", { class: "frame", id: "frame", "aria-live": "off" });
const list = el("ol", { class: "events", id: "events", tabindex: "0", role: "listbox", "aria-label": "everything that was said", onkeydown: (event) => {
  if (event.key !== "ArrowDown" && event.key !== "ArrowUp") return onKey(event);
  go(neighbour(event.key === "ArrowDown" ? 1 : -1));
  event.preventDefault();
} });
const chooser = el("select", { id: "clip", "aria-label": "clip", onchange: () => open_(Number(chooser.value)) },
  ...data.clips.map((one, i) => el("option", { value: i }, one.id)));
const zoomButton = (text, does, label) => el("button", { type: "button", title: label, "aria-label": label, onclick: does }, text);
const key = (mark, style, text) => el("span", {}, el("i", { class: mark, style }), text);
const legend = el("div", { class: "legend" });

let spoke, updated;

function open_(index) {
  clip = data.clips[index];
  rows = clip.speaking.length;
  spoke = new Set(clip.spoke);
  updated = new Set(clip.updated);
  shown = null;
  title.replaceChildren(words(clip.goal || clip.id));
  about.replaceChildren(words(clip.id), ` · frames ${clip.first}–${clip.first + rows - 1} · ${+clip.fps.toFixed(3)} a second · ${clock(rows / clip.fps)} long`
    + (clip.has_reference ? "" : " · no reference was given, so nothing is judged"));
  numbers.replaceChildren(...clip.metrics.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));

  names.replaceChildren(el("div", { class: "name axis", style: "height:26px" }, el("span", { class: "soft" }, "time in the video")));
  time.replaceChildren(axis);
  const at = (lane) => clip.events.filter((event) => event.lane === lane).map((event) => event.row);
  if (clip.pictures.length) {
    const track = el("div", { class: "lane", "data-lane": "pictures" });
    for (const [row, source] of clip.pictures) track.append(el("img", { class: "picture", src: source, alt: "", style: "left:" + middle(row) }));
    addLane("Pictures", String(clip.pictures.length), 52, track);
  }
  headLane("Speak?", clip.speaking, "speaking", clip.spoke, at("wanted"), "speak-curve");
  if (clip.has_reference) textLane("wanted");
  textLane("said");
  if (clip.update) {
    headLane("Update?", clip.update, "dst", clip.updated, at("update_wanted"), "update-curve");
    if (clip.has_reference) textLane("update_wanted");
    textLane("update");
    clip.steps.forEach(stepLane);
  }
  textLane("user");
  const most = Math.max(1, ...clip.tokens);
  addLane("Context", `up to ${most} tokens`, 46, el("div", { class: "lane", "data-lane": "tokens" }, curve(clip.tokens, most, "tokens-curve")));
  textLane("context");
  time.append(cursor);
  time.setAttribute("aria-valuemin", clip.first);
  time.setAttribute("aria-valuemax", clip.first + rows - 1);

  legend.replaceChildren(
    ...(clip.has_reference ? [key("mark", "", "where the reference acts")] : []), key("dot", "", "the head fired"), key("dashed", "", "threshold"),
    ...(clip.has_reference ? [key("", "background:var(--good)", "matched"), key("", "background:var(--warn)", "other words"), key("", "background:var(--bad)", "missed, redundant or refused")] : []),
    ...(clip.steps.length ? [key("", "background:var(--going)", "step in progress"), key("", "background:var(--done)", "completed" + (clip.has_reference ? " (upper bar predicted, lower bar reference)" : ""))] : []));
  list.replaceChildren(...clip.events.map((event) => el("li", { role: "option", class: tone(event), "aria-selected": "false", onclick: () => go(event.row) },
    el("span", { class: "when" }, clock(timeOf(event.row))), el("b", {}, LANES[event.lane]), words(event.text || event.note, { class: "what" }),
    el("span", { class: "verdict" }, VERDICTS[event.status] || "", event.note && event.text ? el("small", {}, event.status ? " · " : "", words(event.note)) : null))));
  pinned = 0;
  setZoom(1);
  go(0);
}

const rowUnder = (event) => clamp(Math.floor(((event.clientX - time.getBoundingClientRect().left) / time.clientWidth) * rows), 0, rows - 1);
time.addEventListener("mousemove", (event) => showCursor(rowUnder(event), true));
time.addEventListener("mouseleave", () => showCursor(pinned, false));
time.addEventListener("click", (event) => go(rowUnder(event), false));
new ResizeObserver(drawAxis).observe(scroller);

document.body.append(
  el("header", { class: "top" }, el("div", {}, title, about), el("div", { class: "tools" }, data.clips.length > 1 ? chooser : null,
    zoomButton("−", () => setZoom(zoom / 2), "zoom out"), zoomButton("Fit", () => setZoom(1), "the whole clip"), zoomButton("+", () => setZoom(zoom * 2), "zoom in"), themeButton())),
  numbers,
  el("div", { class: "stage" }, el("div", {}, el("div", { class: "lanes" }, names, scroller), legend), frame),
  el("h2", {}, "Everything that was said"), list,
  keyHelp(["← →", "frame"], ["PgUp PgDn", "ten seconds"], ["n p", "next, previous event"], ["Home End", "first, last frame"], ["+ - 0", "zoom"], ["Tab", "time line, list, buttons"]));
open_(0);
