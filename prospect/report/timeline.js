// A streamed clip: lanes over time, the frame under the pointer, everything that was said.
// All places in time are percentages of the track's width, so that zooming only changes that width.

const LANES = {
  user: "User",
  wanted: "Should have said",
  said: "Assistant said",
  update_wanted: "Update due",
  update: "Update written",
  context: "Context refreshed",
};
const VERDICTS = {
  matched: "matched",
  mismatched: "other words",
  missed: "missed",
  redundant: "redundant",
  refused: "refused",
};
const HEAD_HEIGHT = 66; // pixels of a head's lane, and what is kept free above and below its curve
const HEAD_INSET = 5;
const AXIS_STEPS = [0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14400]; // seconds between ticks

let clip; // the one that is shown
let rows; // its number of frames
let spoke, updated; // the rows at which a head fired
let pinned; // the row of the cursor while nothing is pointed at
let shown; // the row that the frame panel describes
let zoom; // width of the track in widths of the window

/* The class that colours an event. */
function tone(event) {
  const ofLane = event.lane === "user" || event.lane === "context" ? event.lane : "plain";
  return "tone-" + (event.status || ofLane);
}

/* Where the middle of a frame is, in percent of the track. */
function percent(row) {
  return ((row + 0.5) / rows) * 100;
}

function timeOf(row) {
  return clip.seconds + row / clip.fps;
}

function probability(p) {
  return p === null ? "–" : p.toFixed(4);
}

function stateAt(runs, row) {
  return runs.find(([first, last]) => first <= row && row <= last)[2];
}

function stateName(state) {
  return data.states[state].replace("_", " ");
}

function eventsOf(lane) {
  return clip.events.filter((event) => event.lane === lane);
}

// ---- lanes --------------------------------------------------------------------------------------

/* One row: its name on the left, its track on the right, of equal height. */
function addLane(name, small, height, track, title = name) {
  const label = el("span", {}, words(name));
  const below = small ? el("small", {}, words(small)) : null;
  const tall = height > 40 ? " tall" : "";
  names.append(el("div", { class: "name" + tall, style: `height:${height}px`, title }, label, below));
  track.style.height = height + "px";
  time.append(track);
}

/* A curve of one value a frame, 0 at the bottom, `top` at the upper edge. Where there is no value there is no line. */
function curve(values, top, colour) {
  const place = (value, row) => (value === null ? null : [row + 0.5, (1 - value / top).toFixed(4)]);
  const line = pathThrough(values.map(place));
  const first = values.findIndex((value) => value !== null);
  const area = first < 0 ? "" : `M${first + 0.5} 1` + line.replace(/M/g, "L") + `L${values.length - 0.5} 1Z`;
  return el(
    "svg",
    { viewBox: `0 0 ${rows} 1`, preserveAspectRatio: "none", "aria-hidden": "true" },
    el("path", { class: "area " + colour, d: area }),
    el("path", { class: colour, d: line || "M0 1" }),
  );
}

/* The frames themselves, as far as there are pictures of them. */
function pictureLane() {
  const track = el("div", { class: "lane", "data-lane": "pictures" });
  for (const [row, source] of clip.pictures) {
    track.append(el("img", { class: "picture", src: source, alt: "", style: `left:${percent(row)}%` }));
  }
  addLane("Pictures", String(clip.pictures.length), 52, track);
}

/* A head's probability, its threshold (or the band it lies in), where it fired and where the reference acts. */
function headLane(name, values, head, fired, references, colour) {
  const [low, high] = clip.thresholds[head];
  const exact = low === high;
  const inner = HEAD_HEIGHT - 2 * HEAD_INSET;
  const y = (p) => HEAD_INSET + (1 - p) * inner;
  const track = el("div", { class: "lane head", "data-lane": head }, curve(values, 1, colour + "-curve"));
  const band = `top:${y(high)}px;height:${(high - low) * inner}px`;
  track.append(el("div", { class: "threshold" + (exact ? " exact" : ""), style: band }));
  for (const event of references) {
    track.append(el("i", { class: "reference", style: `left:${percent(event.row)}%` }));
  }
  for (const row of fired) {
    const style = `left:${percent(row)}%;top:${y(values[row])}px;color:var(--${colour})`;
    track.append(el("i", { class: "fired", style }));
  }
  if (exact) {
    const title = "The head fires where its probability reaches the dashed line.";
    addLane(name, `fires from ${low.toFixed(3)}`, HEAD_HEIGHT, track, title);
  } else {
    const title =
      "The records tell the threshold only within the band: nothing below it fired, everything above it did.";
    addLane(name, `fires from ${low.toFixed(2)}–${high.toFixed(2)}`, HEAD_HEIGHT, track, title);
  }
}

/* Marks with their text, each as wide as the room up to the next one. */
function textLane(lane) {
  const events = eventsOf(lane);
  const track = el("div", { class: "lane texts", "data-lane": lane });
  events.forEach((event, i) => {
    const next = events.slice(i + 1).find((other) => other.row > event.row);
    const left = percent(event.row);
    const right = next ? percent(next.row) : 100;
    const style = `left:${left}%;width:max(3px, calc(${right - left}% - 1px))`;
    const properties = { class: "chip " + tone(event), style, "data-event": clip.events.indexOf(event) };
    track.append(el("div", properties, words(event.text || event.note))); // its own direction decides where it is cut
  });
  addLane(LANES[lane], String(events.length), 34, track);
}

/* A step's state over time: predicted above, as it should be below. */
function stepLane(step) {
  const track = el("div", { class: "lane step", "data-lane": step.id });
  const add = ([first, last, state], place) => {
    const style = `left:${(first / rows) * 100}%;width:${((last - first + 1) / rows) * 100}%`;
    track.append(el("i", { class: `run ${place} state${state}`, style }));
  };
  for (const run of step.predicted) add(run, "above");
  for (const run of step.reference || []) add(run, "below");
  addLane((step.id + " " + step.name).trim(), "", 26, track);
}

/* How many tokens the context holds. */
function contextLane() {
  const most = Math.max(1, ...clip.tokens);
  const track = el("div", { class: "lane", "data-lane": "tokens" }, curve(clip.tokens, most, "tokens-curve"));
  addLane("Context", `up to ${most} tokens`, 46, track);
}

/* Times along the top, as close as they can be read. */
function drawAxis() {
  const pixels = time.clientWidth / (rows / clip.fps); // a second
  const step = AXIS_STEPS.find((seconds) => seconds * pixels >= 62) || AXIS_STEPS[AXIS_STEPS.length - 1];
  const ticks = [];
  for (let t = Math.ceil(timeOf(0) / step) * step; t < timeOf(rows - 1); t += step) {
    const left = percent((t - timeOf(0)) * clip.fps);
    const cut = left >= 100 - 4000 / time.clientWidth; // at the end of the track
    if (!cut) ticks.push(el("span", { style: `left:${left}%` }, clock(t)));
  }
  axis.replaceChildren(...ticks);
}

/* All lanes of the clip, from top to bottom. */
function drawLanes() {
  const corner = el("span", { class: "soft" }, "time in the video");
  names.replaceChildren(el("div", { class: "name axis", style: "height:26px" }, corner));
  time.replaceChildren(axis);
  if (clip.pictures.length) pictureLane();
  const speak = capitalised(data.lossNames.speaking_binary);
  headLane(speak, clip.speaking, "speaking", clip.spoke, eventsOf("wanted"), "speak");
  if (clip.has_reference) textLane("wanted");
  textLane("said");
  if (clip.update) {
    const update = capitalised(data.lossNames.dst_binary);
    headLane(update, clip.update, "dst", clip.updated, eventsOf("update_wanted"), "update");
    if (clip.has_reference) textLane("update_wanted");
    textLane("update");
    clip.steps.forEach(stepLane);
  }
  textLane("user");
  contextLane();
  textLane("context");
  time.append(cursor);
}

// ---- the frame beside ---------------------------------------------------------------------------

/* Everything that is known about a frame. */
function showFrame(row) {
  shown = row;
  const where = `${clock(timeOf(row))} in the video · ${row + 1} of ${rows}`;
  const parts = [el("h2", { id: "frame-number" }, "Frame " + (clip.first + row)), el("p", { class: "soft" }, where)];
  const picture = clip.pictures.filter(([at]) => at <= row).pop();
  if (picture) parts.push(el("img", { src: picture[1], alt: "frame " + (clip.first + picture[0]) }));
  parts.push(frameNumbers(row));
  parts.push(...clip.events.filter((event) => event.row === row).map(spokenNode));
  if (clip.steps.length) {
    parts.push(el("ul", { class: "steps" }, ...clip.steps.map((step) => stepNode(step, row))));
  }
  frame.replaceChildren(...parts);
}

/* The heads' probabilities and the tokens held. */
function frameNumbers(row) {
  const numbers = el("dl", {});
  const add = (name, value, id) => numbers.append(el("dt", {}, name), el("dd", { id }, value));
  const decision = (p, fired) => probability(p) + (fired ? "  fired" : "");
  add("speak", decision(clip.speaking[row], spoke.has(row)), "frame-speaking");
  if (clip.update) add("update", decision(clip.update[row], updated.has(row)), "frame-update");
  add("context", clip.tokens[row] + " tokens", "frame-tokens");
  return numbers;
}

/* Something said at the frame, with what there is to know about it. */
function spokenNode(event) {
  const who = LANES[event.lane] + (event.status ? " · " + VERDICTS[event.status] : "");
  const note = event.note && event.text ? el("div", { class: "soft" }, words(event.note)) : null;
  const text = words(event.text || event.note);
  return el("div", { class: "spoken " + tone(event) }, el("b", {}, who), el("br"), text, note);
}

/* A step's state at the frame; where it is wrong, also what it should be. */
function stepNode(step, row) {
  const now = stateAt(step.predicted, row);
  const due = step.reference ? stateAt(step.reference, row) : now;
  const wrong = due !== now;
  const title = stateName(now) + (wrong ? ", should be " + stateName(due) : "");
  const mark = el("i", { class: "state" + now });
  const correction = el("small", {}, wrong ? "≠ " + stateName(due) : "");
  return el("li", { class: wrong ? "wrong" : null, title }, mark, words(step.id + " " + step.name), correction);
}

// ---- moving -------------------------------------------------------------------------------------

/* Put the cursor at a frame, faintly while it follows the pointer. */
function showCursor(row, hovering) {
  cursor.style.left = percent(row) + "%";
  cursor.classList.toggle("hover", hovering);
  if (row !== shown) showFrame(row);
}

/* Jump to a frame: the cursor, the panel, the list of events and what a screen reader announces. */
function go(row, scroll = true) {
  pinned = clamp(row, 0, rows - 1);
  showCursor(pinned, false);
  const number = clip.first + pinned;
  const speak = probability(clip.speaking[pinned]);
  time.setAttribute("aria-valuenow", number);
  time.setAttribute("aria-valuetext", `frame ${number}, ${clock(timeOf(pinned))}, speak ${speak}`);
  selectEvents();
  if (scroll) scrollToCursor();
}

/* Mark the events of the pinned frame, in their lanes and in the list. */
function selectEvents() {
  for (const chip of document.querySelectorAll(".chip.on")) chip.classList.remove("on");
  let first = null;
  clip.events.forEach((event, i) => {
    const here = event.row === pinned;
    list.children[i].setAttribute("aria-selected", here);
    if (!here) return;
    first = first || list.children[i];
    time.querySelector(`[data-event="${i}"]`)?.classList.add("on");
  });
  if (!first) return;
  const lowest = first.offsetTop + first.offsetHeight - list.clientHeight;
  list.scrollTop = clamp(list.scrollTop, lowest, first.offsetTop);
}

/* Bring the cursor into sight, when it is out of it or close to an edge. */
function scrollToCursor() {
  const left = scroller.scrollLeft + 20;
  const right = scroller.scrollLeft + scroller.clientWidth - 20;
  const at = (percent(pinned) / 100) * time.clientWidth;
  if (at < left || at > right) centreCursor();
}

function centreCursor() {
  scroller.scrollLeft = (percent(pinned) / 100) * time.clientWidth - scroller.clientWidth / 2;
}

/* Zoom to 1, the whole clip, or closer, up to 24 pixels a frame. */
function setZoom(value) {
  zoom = clamp(value, 1, Math.max(1, (rows * 24) / scroller.clientWidth));
  time.style.width = zoom * 100 + "%";
  centreCursor();
  drawAxis();
}

/* The next (direction 1) or previous (-1) row at which anything is said. */
function neighbour(direction) {
  const found = clip.events.map((event) => event.row).filter((row) => direction * (row - pinned) > 0);
  if (!found.length) return pinned;
  return direction > 0 ? Math.min(...found) : Math.max(...found);
}

/* The keys of the time line. */
function onKey(event) {
  if (hasModifier(event)) return;
  const tenSeconds = Math.max(1, Math.round(10 * clip.fps));
  const actions = {
    ArrowLeft: () => go(pinned - 1),
    ArrowRight: () => go(pinned + 1),
    PageUp: () => go(pinned - tenSeconds),
    PageDown: () => go(pinned + tenSeconds),
    Home: () => go(0),
    End: () => go(rows - 1),
    n: () => go(neighbour(1)),
    p: () => go(neighbour(-1)),
    "+": () => setZoom(zoom * 2),
    "=": () => setZoom(zoom * 2),
    "-": () => setZoom(zoom / 2),
    0: () => setZoom(1),
  };
  if (!(event.key in actions)) return;
  actions[event.key]();
  event.preventDefault();
}

/* The list's own keys, and those of the time line. */
function onListKey(event) {
  if (event.key !== "ArrowDown" && event.key !== "ArrowUp") {
    onKey(event);
    return;
  }
  go(neighbour(event.key === "ArrowDown" ? 1 : -1));
  event.preventDefault();
}

/* The frame that the pointer is at. */
function rowUnder(event) {
  const left = event.clientX - time.getBoundingClientRect().left;
  return clamp(Math.floor((left / time.clientWidth) * rows), 0, rows - 1);
}

// ---- the page -----------------------------------------------------------------------------------

const title = el("h1");
const about = el("p", { class: "soft" });
const numbers = el("dl", { class: "numbers" });
const names = el("div", { class: "names" });
const axis = el("div", { class: "axis" });
const cursor = el("div", { class: "cursor" });
const slider = { tabindex: "0", role: "slider", "aria-label": "frame", onkeydown: onKey };
const time = el("div", { class: "time", id: "time", ...slider });
const scroller = el("div", { class: "scroll" }, time);
const frame = el("aside", { class: "frame", id: "frame", "aria-live": "off" });
const legend = el("div", { class: "legend" });
const listbox = { tabindex: "0", role: "listbox", "aria-label": "everything that was said", onkeydown: onListKey };
const list = el("ol", { class: "events", id: "events", ...listbox });
const chooser = el(
  "select",
  { id: "clip", "aria-label": "clip", onchange: () => openClip(Number(chooser.value)) },
  ...data.clips.map((one, i) => el("option", { value: i }, one.id)),
);

function zoomButton(text, action, label) {
  return el("button", { type: "button", title: label, "aria-label": label, onclick: action }, text);
}

/* What is known about the clip as a whole. */
function drawTitle() {
  const last = clip.first + rows - 1;
  const long = clock(rows / clip.fps);
  const unjudged = clip.has_reference ? "" : " · no reference was given, so nothing is judged";
  title.replaceChildren(words(clip.goal || clip.id));
  const facts = ` · frames ${clip.first}–${last} · ${+clip.fps.toFixed(3)} a second · ${long} long`;
  about.replaceChildren(words(clip.id), facts + unjudged);
  numbers.replaceChildren(...clip.metrics.map(([name, value]) => namedNumber(name, value)));
}

/* What the marks and colours mean, as far as this clip has them. */
function drawLegend() {
  const entries = [];
  const add = (mark, style, text) => entries.push(legendEntry(mark, style, text));
  if (clip.has_reference) add("mark", "", "where the reference acts");
  add("dot", "", "the head fired");
  add("dashed", "", "threshold");
  if (clip.has_reference) {
    add("", "background:var(--good)", "matched");
    add("", "background:var(--warn)", "other words");
    add("", "background:var(--bad)", "missed, redundant or refused");
  }
  if (clip.steps.length) {
    const bars = clip.has_reference ? " (upper bar predicted, lower bar reference)" : "";
    add("", "background:var(--going)", "step in progress");
    add("", "background:var(--done)", "completed" + bars);
  }
  legend.replaceChildren(...entries);
}

/* One line of the list: when, who, what, and how it was judged. */
function eventNode(event) {
  const noteAside = event.note && event.text;
  const note = noteAside ? el("small", {}, event.status ? " · " : "", words(event.note)) : null;
  return el(
    "li",
    { role: "option", class: tone(event), "aria-selected": "false", onclick: () => go(event.row) },
    el("span", { class: "when" }, clock(timeOf(event.row))),
    el("b", {}, LANES[event.lane]),
    words(event.text || event.note, { class: "what" }),
    el("span", { class: "verdict" }, VERDICTS[event.status] || "", note),
  );
}

/* Show one of the clips, from its first frame. */
function openClip(index) {
  clip = data.clips[index];
  rows = clip.speaking.length;
  spoke = new Set(clip.spoke);
  updated = new Set(clip.updated);
  shown = null;
  drawTitle();
  drawLanes();
  time.setAttribute("aria-valuemin", clip.first);
  time.setAttribute("aria-valuemax", clip.first + rows - 1);
  drawLegend();
  list.replaceChildren(...clip.events.map(eventNode));
  pinned = 0;
  setZoom(1);
  go(0);
}

time.addEventListener("mousemove", (event) => showCursor(rowUnder(event), true));
time.addEventListener("mouseleave", () => showCursor(pinned, false));
time.addEventListener("click", (event) => go(rowUnder(event), false));
new ResizeObserver(drawAxis).observe(scroller);

document.body.append(
  pageHeader(
    title,
    about,
    data.clips.length > 1 ? chooser : null,
    zoomButton("−", () => setZoom(zoom / 2), "zoom out"),
    zoomButton("Fit", () => setZoom(1), "the whole clip"),
    zoomButton("+", () => setZoom(zoom * 2), "zoom in"),
    themeButton(),
  ),
  numbers,
  el("div", { class: "stage" }, el("div", {}, el("div", { class: "lanes" }, names, scroller), legend), frame),
  el("h2", {}, "Everything that was said"),
  list,
  keyHelp(
    ["← →", "frame"],
    ["PgUp PgDn", "ten seconds"],
    ["n p", "next, previous event"],
    ["Home End", "first, last frame"],
    ["+ - 0", "zoom"],
    ["Tab", "time line, list, buttons"],
  ),
);
openClip(0);
