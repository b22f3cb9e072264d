// A clip as it is trained on: every token, coloured by the loss it carries, under one setting or two side by side.

const LABEL_KEYS = Object.keys(data.labelNames);
const [REPLY, SPEAK, UPDATE_TEXT, UPDATE, STATE] = LABEL_KEYS;
const UNPRINTABLE = /[\u0000-\u001f\u007f\u200b-\u200f\u202a-\u202e\u2066-\u2069]/g;

let selected = null; // {node, position}: the token that the inspector describes

/* Line breaks and other invisible characters as marks. */
function visible(text) {
  const escape = (character) => "\\u" + character.charCodeAt(0).toString(16).padStart(4, "0");
  return text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(UNPRINTABLE, escape);
}

// ---- tokens -------------------------------------------------------------------------------------

/* One token: a box for a frame, its text for any other. */
function tokenNode(sequence, position) {
  return sequence.frames[position] !== null ? frameToken(sequence, position) : textToken(sequence, position);
}

/* A box whose left half shows the label of "speak now?", its right half that of "update now?". */
function frameToken(sequence, position) {
  const label = (key) => sequence.labels[key][position];
  const classes = ["tok image"];
  if (label(SPEAK) !== null) classes.push("s" + label(SPEAK));
  if (label(UPDATE) !== null) classes.push("d" + label(UPDATE));
  if (label(REPLY) !== null) classes.push("silence");
  return el("i", { class: classes.join(" "), "data-at": position });
}

/* A piece of text, coloured where it is learned, underlined where a head decides at it. */
function textToken(sequence, position) {
  const label = (key) => sequence.labels[key][position];
  const classes = ["tok"];
  if (label(REPLY) !== null) classes.push("speaking_gen");
  if (label(UPDATE_TEXT) !== null) classes.push("dst_gen");
  const decisions = [label(SPEAK), label(UPDATE)];
  if (decisions.includes(1)) classes.push("yes");
  else if (decisions.includes(0)) classes.push("no");
  return el("span", { class: classes.join(" "), "data-at": position }, visible(sequence.texts[position]));
}

// ---- sequences ----------------------------------------------------------------------------------

/* Frames in a row, then the text that follows them, and so on; a text's line ends with its turn. */
function blocks(sequence) {
  const found = [];
  sequence.ids.forEach((_, position) => {
    const kind = sequence.frames[position] !== null ? "frames" : "text";
    const last = found[found.length - 1];
    const continues = last && last.kind === kind && !(kind === "text" && turnBegins(sequence, position));
    if (continues) last.positions.push(position);
    else found.push({ kind, positions: [position] });
  });
  return found;
}

/* Where the labelled loss changes, a turn begins: an update and the reply after it are on lines of their own. */
function turnBegins(sequence, position) {
  const loss = (at) => [REPLY, UPDATE_TEXT].filter((key) => sequence.labels[key][at] !== null).join();
  return loss(position) !== loss(position - 1) && loss(position) !== "";
}

/* One line of tokens; on its left the frames or the positions that it shows. */
function blockNode(sequence, block) {
  const first = block.positions[0];
  const last = block.positions[block.positions.length - 1];
  let where = `${first}–${last}`;
  if (block.kind === "frames") {
    where = "f" + sequence.frames[first];
    if (last > first) where += "–" + sequence.frames[last];
  }
  const tokens = block.positions.map((position) => tokenNode(sequence, position));
  return el("div", { class: "block " + block.kind }, el("small", {}, where), el("div", { class: "flow" }, ...tokens));
}

/* A training sequence: its heading and its lines of tokens, to be read by pointer and by keys. */
function sequenceNode(sequence, which) {
  const label = "tokens of " + sequence.clip_id;
  const node = el("div", { class: "sequence", tabindex: "0", role: "group", "aria-label": label });
  const frames = new Set(sequence.frames.filter((frame) => frame !== null)).size;
  const heading = ` · ${which} · ${sequence.ids.length} tokens, ${frames} frames`;
  node.append(el("h3", {}, words(sequence.clip_id), heading));
  for (const block of blocks(sequence)) node.append(blockNode(sequence, block));

  node.addEventListener("mouseover", (event) => {
    const token = event.target.closest(".tok");
    if (token) inspect(sequence, node, Number(token.dataset.at));
  });
  node.addEventListener("focus", () => {
    inspect(sequence, node, selected && selected.node === node ? selected.position : 0);
  });
  node.addEventListener("keydown", (event) => onKey(event, sequence, node));
  return node;
}

// ---- keys ---------------------------------------------------------------------------------------

/* Move to the token that the key leads to. */
function onKey(event, sequence, node) {
  if (keyIsTaken(event)) return;
  const to = target(event.key, sequence, selected.position);
  if (to === undefined) return;
  inspect(sequence, node, clamp(to, 0, sequence.ids.length - 1));
  node.querySelector(".tok.on").scrollIntoView({ block: "nearest" });
  event.preventDefault();
}

/* The position that a key leads to, possibly beyond an end; undefined for any other key. */
function target(key, sequence, at) {
  const moves = { ArrowLeft: at - 1, ArrowRight: at + 1, PageUp: at - 20, PageDown: at + 20 };
  if (key in moves) return moves[key];
  if (key === "Home") return 0;
  if (key === "End") return sequence.ids.length - 1;
  if (key === "n") return labelledRun(sequence, at, 1);
  if (key === "p") return labelledRun(sequence, at, -1);
  return undefined;
}

/* The next (direction 1) or previous (-1) position at which a run of labelled tokens begins; else the end. */
function labelledRun(sequence, at, direction) {
  const labelled = (position) => LABEL_KEYS.some((key) => key !== STATE && sequence.labels[key][position] !== null);
  let to = at + direction;
  while (to > 0 && to < sequence.ids.length && !(labelled(to) && !labelled(to - 1))) to += direction;
  return to;
}

// ---- the inspector ------------------------------------------------------------------------------

/* Mark a token and describe it at the bottom of the page. */
function inspect(sequence, node, position) {
  for (const other of document.querySelectorAll(".tok.on")) other.classList.remove("on");
  node.querySelector(`[data-at="${position}"]`).classList.add("on");
  selected = { node, position };
  inspector.replaceChildren(...tokenFacts(sequence, position), ...labelFacts(sequence, position));
}

function fact(name, value) {
  return el("div", {}, el("span", {}, name), value);
}

/* What the token is and where it is. */
function tokenFacts(sequence, position) {
  const facts = [
    fact("position", String(position)),
    fact("token", words(visible(sequence.texts[position]), { class: "mono" })),
    fact("id", String(sequence.ids[position])),
    fact("begins at character", String(sequence.starts[position])),
  ];
  if (sequence.frames[position] !== null) facts.push(fact("frame", String(sequence.frames[position])));
  return facts;
}

/* What is learned at the token. */
function labelFacts(sequence, position) {
  const learned = LABEL_KEYS.filter((key) => sequence.labels[key][position] !== null);
  if (!learned.length) return [fact("learned", "nothing (-100)")];
  return learned.map((key) => fact(data.labelNames[key], labelText(sequence, position, key)));
}

function labelText(sequence, position, key) {
  const value = sequence.labels[key][position];
  if (key === STATE) return data.states[value];
  if (key === SPEAK || key === UPDATE) return String(value);
  return value === sequence.ids[position] ? "this token" : "token " + value;
}

// ---- the page -----------------------------------------------------------------------------------

/* A clip under one configuration: its label counts, then its sequences. */
function settingNode(setting) {
  const counts = el("dl", { class: "numbers" });
  for (const [name, count] of Object.entries(setting.counts)) {
    if (count) counts.append(namedNumber(name.replace(/_/g, " "), count.toLocaleString("en")));
  }
  const total = setting.sequences.length;
  const sequences = setting.sequences.map((sequence, i) => sequenceNode(sequence, `sequence ${i + 1} of ${total}`));
  return el("section", { class: "setting" }, el("h2", {}, words(setting.title)), counts, ...sequences);
}

const hint = "Point at a token, or move to it with the keys.";
const inspector = el("div", { class: "inspect", id: "inspect" }, el("span", {}, hint));
const about = "What the model is shown, in order, and what it learns from each token.";

document.body.append(
  pageHeader(el("h1", {}, words(document.title)), el("p", { class: "soft" }, about), themeButton()),
  el(
    "div",
    { class: "legend" },
    legendEntry("swatch", "background:var(--speak-wash)", "words of a reply"),
    legendEntry("swatch", "background:var(--update-wash)", "words of an update"),
    legendEntry("image s1", "", "frame: speak"),
    legendEntry("image s0", "", "frame: stay silent"),
    legendEntry("image d1", "", "frame: update"),
    legendEntry("image d0", "", "frame: no update"),
    legendEntry("image", "", "frame: not learned from"),
  ),
  el("main", { class: "settings" }, ...data.settings.map(settingNode)),
  inspector,
  keyHelp(
    ["← →", "token"],
    ["n p", "next, previous label"],
    ["PgUp PgDn", "twenty tokens"],
    ["Home End", "first, last"],
    ["Tab", "next sequence, buttons"],
  ),
  writtenNote(),
);

/* Keys pressed while nothing has the focus are those of the first sequence. */
document.addEventListener("keydown", (event) => {
  const sequence = data.settings[0].sequences[0];
  if (event.target !== document.body || keyIsTaken(event) || target(event.key, sequence, 0) === undefined) return;
  const node = document.querySelector(".sequence");
  node.focus();
  onKey(event, sequence, node);
});
