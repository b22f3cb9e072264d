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
const HEAD_HEIGHT = 66; // pixels of a head's lane, and what is kept free above and below its curve
const HEAD_INSET = 5;
const AXIS_STEPS = [0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14400]; // seconds between ticks

let clip; // the one that is shown
let takes; // the clip as each checkpoint streamed it: itself, and those beside it
let events; // of all takes, in order of time: {take, row, lane, text, status, note}
let rows; // its number of frames
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

function fourDigits(value) {
  return value === null ? "–" : value.toFixed(4);
}

function stateAt(runs, row) {
  return runs.find(([first, last]) => first <= row && row <= last)[2];
}

/* A step's state at a row as predicted, and as it should be. */
function statesAt(step, row) {
  const now = stateAt(step.predicted, row);
  return [now, step.reference ? stateAt(step.reference, row) : now];
}

function stateName(state) {
  return data.states[state].replace("_", " ");
}

function eventsOf(lane, take) {
  return events.filter((event) => event.lane === lane && event.take === take);
}

/* "wrong_words" -> "s wrong words" with the mark that stands for it, "" where nothing is judged. */
function verdict(event) {
  return event.status ? `${data.marks[event.status]} ${event.status.replace("_", " ")}` : "";
}

/* "A · speak score" where several checkpoints are shown, of which this is the first. */
function ofTake(take, text) {
  return takes.length > 1 ? `${String.fromCharCode(65 + take)} · ${text}` : text;
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

/* A curve of one value a frame, 0 at the bottom, `top` at the upper edge. Where there is no value there is no line.
   behind: values of a second curve, thin and muted. */
function curve(values, top, colour, behind = []) {
  const place = (value, row) => (value === null ? null : [row + 0.5, (1 - value / top).toFixed(4)]);
  const line = (of) => pathThrough(of.map(place)) || "M0 1";
  const filled = pathThrough(values.map((value, row) => place(value || 0, row)));
  return el(
    "svg",
    { viewBox: `0 0 ${rows} 1`, preserveAspectRatio: "none", "aria-hidden": "true" },
    el("path", { class: "area " + colour, d: `${filled}L${rows - 0.5} 1L0.5 1Z` }),
    el("path", { class: "raw", d: line(behind) }),
    el("path", { class: colour, d: line(values) }),
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

/* A head's probability and score, the evidence it needs (or the band that lies in), where it fired and where the
   reference acts. */
function headLane(name, head, key, references, colour, take) {
  const [low, high] = takes[take].evidence;
  const exact = low === high;
  const inner = HEAD_HEIGHT - 2 * HEAD_INSET;
  const y = (p) => HEAD_INSET + (1 - p) * inner;
  const curves = curve(head.score, 1, colour + "-curve", head.probability);
  const track = el("div", { class: "lane head", "data-lane": key }, curves);
  if (head.even_odds !== null) track.append(el("div", { class: "odds", style: `top:${y(head.even_odds)}px` }));
  const band = `top:${y(high)}px;height:${(high - low) * inner}px`;
  track.append(el("div", { class: "evidence" + (exact ? " exact" : ""), style: band }));
  for (const event of references) {
    track.append(el("i", { class: "reference", style: `left:${percent(event.row)}%` }));
  }
  for (const row of head.fired) {
    const style = `left:${percent(row)}%;top:${y(head.score[row])}px;color:var(--${colour})`;
    track.append(el("i", { class: "fired", style }));
  }
  const rule = "Fires where the score reaches the dashed line, or comes close to it as the other head fires.";
  const within = "The records tell only that the line is within the band.";
  const label = ofTake(take, name);
  if (exact) addLane(label, `fires from ${low.toFixed(3)}`, HEAD_HEIGHT, track, rule);
  else addLane(label, `fires from ${low.toFixed(2)}–${high.toFixed(2)}`, HEAD_HEIGHT, track, `${rule} ${within}`);
}

/* Marks with their text, each as wide as the room up to the next one. */
function textLane(lane, take) {
  const shownHere = eventsOf(lane, take);
  const track = el("div", { class: "lane texts", "data-lane": lane });
  shownHere.forEach((event, i) => {
    const next = shownHere.slice(i + 1).find((other) => other.row > event.row);
    const left = percent(event.row);
    const right = next ? percent(next.row) : 100;
    const style = `left:${left}%;width:max(3px, calc(${right - left}% - 1px))`;
    const properties = { class: "chip " + tone(event), style, "data-event": events.indexOf(event) };
    const mark = event.status ? el("i", {}, data.marks[event.status]) : null;
    const text = words(event.text || event.note); // its own direction decides where it is cut
    track.append(el("div", properties, mark, text));
  });
  addLane(lane === "user" ? LANES.user : ofTake(take, LANES[lane]), String(shownHere.length), 34, track);
}

/* A step's state over time: predicted above, as it should be below. */
function stepLane(step, key, take) {
  const track = el("div", { class: "lane step", "data-lane": key });
  const add = ([first, last, state], place, who) => {
    const style = `left:${(first / rows) * 100}%;width:${((last - first + 1) / rows) * 100}%`;
    const title = `${who}: ${stateName(state)}, frames ${clip.first + first}–${clip.first + last}`;
    track.append(el("i", { class: `run ${place} state${state}`, style, title }));
  };
  for (const run of step.predicted) add(run, "above", "predicted");
  for (const run of step.reference || []) add(run, "below", "reference");
  addLane(ofTake(take, (step.id + " " + step.name).trim()), "", 26, track);
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

/* All lanes of the clip, from top to bottom; of several takes, the lanes of one kind below each other. */
function drawLanes() {
  const corner = el("span", { class: "soft" }, "time in the video");
  names.replaceChildren(el("div", { class: "name axis", style: "height:26px" }, corner));
  time.replaceChildren(axis);
  if (clip.pictures.length) pictureLane();
  const speak = capitalised(data.lossNames.speaking_binary);
  const update = capitalised(data.lossNames.dst_binary);
  const ofAll = (draw) => takes.forEach(draw);
  ofAll((take, t) => headLane(speak, take.speaking, "speaking", eventsOf("wanted", t), "speak", t));
  if (clip.has_reference) ofAll((take, t) => textLane("wanted", t));
  ofAll((take, t) => textLane("said", t));
  if (clip.update) {
    ofAll((take, t) => headLane(update, take.update, "dst", eventsOf("update_wanted", t), "update", t));
    if (clip.has_reference) ofAll((take, t) => textLane("update_wanted", t));
    ofAll((take, t) => textLane("update", t));
  }
  ofAll((take, t) => take.step_state && stepLane(take.step_state, "step_state", t));
  clip.steps.forEach((step, i) => ofAll((take, t) => stepLane(take.steps[i], step.id, t)));
  textLane("user", 0);
  contextLane();
  ofAll((take, t) => textLane("context", t));
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
  parts.push(...events.filter((event) => event.row === row).map(spokenNode));
  for (const take of takes) {
    if (takes.length > 1) parts.push(el("p", { class: "soft take" }, words(ofTake(takes.indexOf(take), take.made_by))));
    if (take.steps.length) parts.push(el("ul", { class: "steps" }, ...take.steps.map((step) => stepNode(step, row))));
  }
  frame.replaceChildren(...parts);
}

/* What the heads read and decided, and the tokens held. */
function frameNumbers(row) {
  const numbers = el("dl", {});
  const add = (name, value, id) => numbers.append(el("dt", {}, name), el("dd", { id }, value));
  const addHead = (name, head, t) => {
    const fired = head.fired.includes(row) ? "  fired" : "";
    add(ofTake(t, `${name} probability`), fourDigits(head.probability[row]), `frame-${name}-probability`);
    add(ofTake(t, `${name} score`), fourDigits(head.score[row]) + fired, "frame-" + name);
  };
  takes.forEach((take, t) => addHead("speak", take.speaking, t));
  takes.forEach((take, t) => take.update && addHead("update", take.update, t));
  if (clip.step_state) {
    const [now, due] = statesAt(clip.step_state, row);
    const correction = now === due ? "" : el("span", { class: "wrong" }, "≠ " + stateName(due));
    add("step state", el("span", {}, stateName(now) + " ", correction), "frame-step-state");
  }
  add("context", clip.tokens[row] + " tokens", "frame-tokens");
  return numbers;
}

/* Something said at the frame, with what there is to know about it. */
function spokenNode(event) {
  const who = [ofTake(event.take, LANES[event.lane]), verdict(event)].filter(Boolean).join(" · ");
  const note = event.note && event.text ? el("div", { class: "soft" }, words(event.note)) : null;
  const text = words(event.text || event.note);
  return el("div", { class: "spoken " + tone(event) }, el("b", {}, who), el("br"), text, note);
}

/* A step's state at the frame; where it is wrong, also what it should be. */
function stepNode(step, row) {
  const [now, due] = statesAt(step, row);
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
  const speak = fourDigits(clip.speaking.score[pinned]);
  if (linked) history.replaceState(null, "", linkTo(clip, number));
  time.setAttribute("aria-valuenow", number);
  time.setAttribute("aria-valuetext", `frame ${number}, ${clock(timeOf(pinned))}, speak score ${speak}`);
  selectEvents();
  if (scroll) scrollToCursor();
}

/* Mark the events of the pinned frame, in their lanes and in the list. */
function selectEvents() {
  for (const chip of document.querySelectorAll(".chip.on")) chip.classList.remove("on");
  let first = null;
  events.forEach((event, i) => {
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
  const found = events.map((event) => event.row).filter((row) => direction * (row - pinned) > 0);
  if (!found.length) return pinned;
  return direction > 0 ? Math.min(...found) : Math.max(...found);
}

/* The keys of the time line. */
function onKey(event) {
  if (keyIsTaken(event)) return;
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

/* The list's own keys; the others are those of the time line. */
function onListKey(event) {
  if (event.key !== "ArrowDown" && event.key !== "ArrowUp") return;
  go(neighbour(event.key === "ArrowDown" ? 1 : -1));
  event.preventDefault();
}

/* The link to a frame; of several clips it names the clip. */
function linkTo(one, frameNumber) {
  const parts = data.clips.length > 1 ? { clip: one.id, frame: frameNumber } : { frame: frameNumber };
  return "#" + new URLSearchParams(parts);
}

/* Go where the address says: #frame=2397, or #clip=ID&frame=2397. */
function followLink() {
  const parts = new URLSearchParams(location.hash.slice(1));
  const index = data.clips.findIndex((one) => one.id === parts.get("clip"));
  if (index >= 0 && data.clips[index] !== clip) openClip(index);
  if (parts.has("frame")) go(Math.round(Number(parts.get("frame")) || 0) - clip.first);
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
const slider = { tabindex: "0", role: "slider", "aria-label": "frame" };
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
let linked = false; // whether the address follows the cursor: once a reader has moved it

function zoomButton(text, action, label) {
  return el("button", { type: "button", title: label, "aria-label": label, onclick: action }, text);
}

/* What is known about the clip as a whole. */
function drawTitle() {
  const last = clip.first + rows - 1;
  const long = clock(rows / clip.fps);
  const unjudged = clip.has_reference ? "" : " · no reference was given, so nothing is judged";
  title.replaceChildren(words(clip.goal || clip.id));
  const facts = ` · frames ${clip.first}–${last} · ${+clip.fps.toFixed(3)} per second · ${long} long`;
  about.replaceChildren(words(clip.id), facts + unjudged);
  about.append(...takes.map((take, t) => (take.made_by ? el("div", {}, words(ofTake(t, take.made_by))) : "")));
  const values = (at) => takes.map((take) => take.metrics[at]?.[1] ?? "–").join(" | ");
  numbers.replaceChildren(...clip.metrics.map(([name], at) => namedNumber(name, values(at))));
}

/* What the marks and colours mean, as far as this clip has them. */
function drawLegend() {
  const entries = [];
  const add = (mark, style, text) => entries.push(legendEntry(mark, style, text));
  if (clip.has_reference) add("mark", "", "where the reference acts");
  add("dot", "", "the head fired");
  add("thin", "", "probability");
  add("thick", "", "score, the mean that decides");
  add("dashed", "", "evidence that a score has to reach");
  if (takes.some((take) => take.speaking.even_odds !== null)) add("dotted", "", "probability of even odds");
  for (const status of Object.keys(data.marks)) {
    if (!events.some((event) => event.status === status)) continue;
    const letter = el("i", { class: "letter" }, data.marks[status]);
    entries.push(el("span", { class: "tone-" + status }, letter, status.replace("_", " ")));
  }
  if (clip.steps.length) {
    const bars = clip.has_reference ? " (upper bar predicted, lower bar reference)" : "";
    add("state1", "", "step in progress");
    add("state2", "", "completed" + bars);
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
    el("b", {}, event.lane === "user" ? LANES.user : ofTake(event.take, LANES[event.lane])),
    words(event.text || event.note, { class: "what" }),
    el("span", { class: "verdict" }, verdict(event), note),
  );
}

/* How often a head is right when it says p: on the diagonal it means what it says. Larger dots are more frames. */
function reliabilityChart(one) {
  const speaks = one.head === "speaking";
  const y = (share) => 1 - share;
  const svg = el("svg", { viewBox: "0 0 1 1", preserveAspectRatio: "none", "aria-hidden": "true" });
  const plot = el("div", { class: "plot still" }, svg);
  svg.append(el("line", { class: "grid", x1: 0, x2: 1, y1: y(0), y2: y(1) }));
  for (const tick of [0, 0.5, 1]) {
    svg.append(el("line", { class: "grid", x1: 0, x2: 1, y1: y(tick), y2: y(tick) }));
    plot.append(el("span", { class: "tick", style: `top:${y(tick) * 100}%` }, String(tick)));
    plot.append(el("span", { class: "xtick", style: `left:${tick * 100}%` }, String(tick)));
  }
  const colour = speaks ? "run0" : "run2";
  const points = one.curve.map(([p, share]) => [p.toFixed(4), y(share).toFixed(4)]);
  svg.append(el("path", { class: colour, d: pathThrough(points) || "M0 1" }));
  for (const [p, share, frames] of one.curve) {
    const place = `left:${p * 100}%;top:${y(share) * 100}%;transform:scale(${1 + Math.log10(frames) / 2})`;
    const title = `says ${p.toFixed(3)}, due ${share.toFixed(3)}, of ${frames} frames`;
    plot.append(el("i", { class: "point " + colour, style: place, title }));
  }
  const name = capitalised(data.lossNames[speaks ? "speaking_binary" : "dst_binary"]);
  const figureName = "reliability-" + one.head;
  const button = svgButton(() => figureName, () => data.figures[figureName]);
  const error = el("p", {}, "calibration error " + one.error.toFixed(4));
  const caption = el("figcaption", {}, button, el("b", {}, name), error);
  return el("figure", { class: "chart", "data-reliability": one.head }, caption, plot);
}

/* A clip in the list of all: the share of its texts that is right, and its time line, small. */
function clipNode(one, index) {
  const count = one.tokens.length;
  const strip = (kinds) => {
    const found = one.events.filter((event) => kinds.includes(event.lane) && event.status);
    const place = (event) => `left:${((event.row + 0.5) / count) * 100}%`;
    const mark = (event) => el("i", { class: tone(event), style: place(event) }, data.marks[event.status]);
    // What is due and found is marked where it was written.
    const marked = found.filter((event) => !event.lane.endsWith("wanted") || event.status === "missed");
    return el("span", { class: "strip" }, ...marked.map(mark));
  };
  const share = one.share_right === null ? "–" : one.share_right.toFixed(3);
  const strips = el("span", {}, strip(["wanted", "said"]), one.update ? strip(["update_wanted", "update"]) : null);
  const onclick = () => openClip(index);
  const row = el("button", { type: "button", onclick, class: "row" }, el("b", {}, share), strips, words(one.id));
  return el("li", {}, row);
}

/* Show one of the clips, from its first frame. */
function openClip(index) {
  clip = data.clips[index];
  takes = [clip, ...clip.beside];
  events = takes.flatMap((take, t) => take.events.map((event) => ({ ...event, take: t })));
  events = events.filter((event) => event.take === 0 || event.lane !== "user").sort((a, b) => a.row - b.row);
  chooser.value = index;
  rows = clip.tokens.length;
  shown = null;
  drawTitle();
  drawLanes();
  time.setAttribute("aria-valuemin", clip.first);
  time.setAttribute("aria-valuemax", clip.first + rows - 1);
  drawLegend();
  list.replaceChildren(...events.map(eventNode));
  pinned = 0;
  setZoom(1);
  go(0);
}

time.addEventListener("mousemove", (event) => showCursor(rowUnder(event), true));
time.addEventListener("mouseleave", () => showCursor(pinned, false));
time.addEventListener("click", (event) => go(rowUnder(event), false));
new ResizeObserver(drawAxis).observe(scroller);

const ofAllClips = data.clips.length > 1 ? `, in all ${data.clips.length} clips` : "";

document.body.append(
  pageHeader(
    title,
    about,
    data.clips.length > 1 ? chooser : null,
    zoomButton("−", () => setZoom(zoom / 2), "zoom out"),
    zoomButton("Fit", () => setZoom(1), "the whole clip"),
    zoomButton("+", () => setZoom(zoom * 2), "zoom in"),
    svgButton(() => clip.id, () => clip.svg),
    themeButton(),
  ),
  numbers,
  el("div", { class: "stage" }, el("div", {}, el("div", { class: "lanes" }, names, scroller), legend), frame),
  el("h2", {}, "Everything that was said"),
  list,
  data.clips.length > 1 ? el("h2", {}, "All clips, the worst first: the share of texts that is right") : "",
  data.clips.length > 1 ? el("ol", { id: "clips" }, ...data.clips.map(clipNode)) : "",
  settingsTable([data.clips[0], ...data.clips[0].beside].map((take) => take.made_by)),
  data.reliability.length ? el("h2", {}, "Of frames with a probability, the share that is due" + ofAllClips) : "",
  el("div", { class: "charts" }, ...data.reliability.map(reliabilityChart)),
  keyHelp(
    ["← →", "frame"],
    ["PgUp PgDn", "ten seconds"],
    ["n p", "next, previous event"],
    ["Home End", "first, last frame"],
    ["+ - 0", "zoom"],
    ["Tab", "time line, list, buttons"],
  ),
  writtenNote(),
);
openClip(0);
followLink();
linked = true;
window.addEventListener("hashchange", followLink);
document.addEventListener("keydown", onKey); // wherever the focus is
