// A clip as it is trained on: every token, coloured by the loss it carries, under one setting or two side by side.

const LABELS = { speaking_gen_labels: "says (LM)", speaking_labels: "speak?", dst_gen_labels: "writes update (LM)", dst_update_labels: "update?", dst_state_labels: "step state" };
let selected = null; // {sequence, position}

/* Line breaks and other invisible characters as marks. */
const visible = (text) => text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/[\u0000-\u001f\u007f\u200b-\u200f\u202a-\u202e\u2066-\u2069]/g, (c) => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0"));

function tokenNode(sequence, position) {
  const label = (key) => sequence.labels[key][position];
  const [says, speak, writes, update] = data.labelKeys.map(label);
  const frame = sequence.frames[position];
  if (frame !== null) {
    const classes = ["tok image", speak !== null ? "s" + speak : "", update !== null ? "d" + update : "", says !== null ? "silence" : ""];
    return el("i", { class: classes.filter(Boolean).join(" "), "data-at": position });
  }
  const classes = ["tok", says !== null ? "speaking_gen" : "", writes !== null ? "dst_gen" : ""];
  if (speak === 1 || update === 1) classes.push("yes");
  else if (speak === 0 || update === 0) classes.push("no");
  return el("span", { class: classes.filter(Boolean).join(" "), "data-at": position }, visible(sequence.texts[position]));
}

/* Frames in a row, then the text that follows them, and so on; a text's line ends with its turn. */
function blocks(sequence) {
  const found = [];
  sequence.ids.forEach((_, position) => {
    const kind = sequence.frames[position] !== null ? "frames" : "text";
    const turnEnds = kind === "text" && found.length && position > 0 && turnBegins(sequence, position);
    if (!found.length || found[found.length - 1].kind !== kind || turnEnds) found.push({ kind, positions: [] });
    found[found.length - 1].positions.push(position);
  });
  return found;
}

/* Where the labelled loss changes, a turn begins: an update and the reply after it stand on lines of their own. */
function turnBegins(sequence, position) {
  const loss = (at) => data.labelKeys.slice(0, 3).filter((key, i) => i !== 1 && sequence.labels[key][at] !== null).join();
  return loss(position) !== loss(position - 1) && loss(position) !== "";
}

function sequenceNode(sequence, index) {
  const node = el("div", { class: "sequence", tabindex: "0", role: "group", "aria-label": "tokens of " + sequence.clip_id });
  node.append(el("h3", {}, words(sequence.clip_id), ` · ${index} · ${sequence.ids.length} tokens, ${new Set(sequence.frames.filter((f) => f !== null)).size} frames`));
  for (const block of blocks(sequence)) {
    const [first, last] = [block.positions[0], block.positions[block.positions.length - 1]];
    const where = block.kind === "frames" ? `f${sequence.frames[first]}` + (last > first ? `–${sequence.frames[last]}` : "") : `${first}–${last}`;
    node.append(el("div", { class: "block " + block.kind }, el("small", {}, where), el("div", { class: "flow" }, ...block.positions.map((p) => tokenNode(sequence, p)))));
  }
  const under = (event) => event.target.closest(".tok");
  node.addEventListener("mouseover", (event) => under(event) && inspect(sequence, node, Number(under(event).dataset.at)));
  node.addEventListener("focus", () => inspect(sequence, node, selected && selected.node === node ? selected.position : 0));
  node.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const at = selected.position, T = sequence.ids.length;
    const labelled = (p) => data.labelKeys.slice(0, 4).some((key) => sequence.labels[key][p] !== null);
    let to = { ArrowLeft: at - 1, ArrowRight: at + 1, PageUp: at - 20, PageDown: at + 20, Home: 0, End: T - 1 }[event.key];
    if (event.key === "n") for (to = at + 1; to < T && !(labelled(to) && !labelled(to - 1)); to++);
    if (event.key === "p") for (to = at - 1; to > 0 && !(labelled(to) && !labelled(to - 1)); to--);
    if (to === undefined) return;
    inspect(sequence, node, clamp(to, 0, T - 1));
    node.querySelector(".tok.on").scrollIntoView({ block: "nearest" });
    event.preventDefault();
  });
  return node;
}

function inspect(sequence, node, position) {
  for (const other of document.querySelectorAll(".tok.on")) other.classList.remove("on");
  node.querySelector(`[data-at="${position}"]`).classList.add("on");
  selected = { node, position };
  const fact = (name, value) => el("div", {}, el("span", {}, name), value);
  const written = data.labelKeys.filter((key) => sequence.labels[key][position] !== null).map((key) => {
    const value = sequence.labels[key][position];
    const shown = key.endsWith("gen_labels") ? (value === sequence.ids[position] ? "this token" : "token " + value) : key === "dst_state_labels" ? data.states[value] : String(value);
    return fact(LABELS[key], shown);
  });
  const frame = sequence.frames[position];
  inspector.replaceChildren(
    fact("position", String(position)), fact("token", words(visible(sequence.texts[position]), { class: "mono" })), fact("id", String(sequence.ids[position])),
    fact("begins at character", String(sequence.starts[position])), ...(frame !== null ? [fact("frame", String(frame))] : []),
    ...(written.length ? written : [fact("learned", "nothing (-100)")]));
}

const inspector = el("div", { class: "inspect", id: "inspect" }, el("span", {}, "Point at a token, or move to it with the keys."));
const counted = (setting) => Object.entries(setting.counts).filter(([, count]) => count).map(([name, count]) => el("div", {}, el("dt", {}, name.replace(/_/g, " ")), el("dd", {}, count.toLocaleString("en"))));
const swatch = (name, style, text) => el("span", {}, el("i", { class: name, style }), text);

document.body.append(
  el("header", { class: "top" }, el("div", {}, el("h1", {}, words(document.title)), el("p", { class: "soft" }, "What the model is shown, in order, and what it learns from each token.")), el("div", { class: "tools" }, themeButton())),
  el("div", { class: "legend" },
    swatch("swatch", "background:var(--speak-wash)", "words of a reply"), swatch("swatch", "background:var(--update-wash)", "words of an update"),
    swatch("image s1", "", "frame: speak"), swatch("image s0", "", "frame: stay silent"), swatch("image d1", "", "frame: update"), swatch("image d0", "", "frame: no update"), swatch("image", "", "frame: not learned from")),
  el("main", { class: "settings" }, ...data.settings.map((setting) => el("section", { class: "setting" }, el("h2", {}, words(setting.title)), el("dl", { class: "numbers" }, ...counted(setting)),
    ...setting.sequences.map((sequence, i) => sequenceNode(sequence, `sequence ${i + 1} of ${setting.sequences.length}`))))),
  inspector,
  keyHelp(["← →", "token"], ["n p", "next, previous label"], ["PgUp PgDn", "twenty tokens"], ["Home End", "first, last"], ["Tab", "next sequence, buttons"]));
