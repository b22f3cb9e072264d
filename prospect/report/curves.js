// Training curves of one or several runs, laid over each other, with one cursor in all charts.

const LINES = { curves: "steps", evaluation: "evaluated" }; // where the steps of a run's numbers are
const lastStep = Math.max(1, ...data.runs.flatMap((run) => [...run.steps, ...run.evaluated]));
const runShown = data.runs.map(() => true);
const charts = []; // {draw, read} of each
let logarithmic = false;
let cursorStep = null; // the step under the cursor

// ---- numbers ------------------------------------------------------------------------------------

/* A number as it is read off: a dash where there is none. */
function figure(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  if (Number.isInteger(value)) return String(value);
  return size < 0.001 ? value.toExponential(2) : value.toPrecision(4);
}

/* A number as it is written at an axis: 20000 -> 20k, 0.00015 -> 1.5e-4. */
function tickText(value) {
  const size = Math.abs(value);
  if (size >= 10000) return Number((value / 1000).toPrecision(6)) + "k";
  if (size > 0 && size < 0.001) return value.toExponential().replace(/(\.\d)\d+/, "$1");
  return String(Number(value.toPrecision(6)));
}

/* Each value with those around it: the mean over a fiftieth of the curve. */
function smoothed(values) {
  const reach = Math.floor(values.length / 100);
  return values.map((value, i) => {
    if (value === null) return null;
    const near = values.slice(Math.max(0, i - reach), i + reach + 1).filter((v) => v !== null);
    return near.reduce((sum, v) => sum + v, 0) / near.length;
  });
}

/* The index of the step nearest to `step`, in increasing `steps`. */
function nearest(steps, step) {
  let low = 0;
  let high = steps.length - 1;
  while (low < high) {
    const half = (low + high) >> 1;
    if (steps[half] < step) low = half + 1;
    else high = half;
  }
  return low > 0 && step - steps[low - 1] < steps[low] - step ? low - 1 : low;
}

// ---- scales -------------------------------------------------------------------------------------

/* Where a step is in a chart, from 0 at the left to 1. */
function x(step) {
  return step / lastStep;
}

/* The vertical scale for these values: {y, ticks}, y from 1 at the bottom to 0. falls: whether they may be shown
   logarithmically, and else only those in `late`, behind the first tenth of the steps, count as highest. */
function verticalScale(values, late, falls) {
  const useLog = logarithmic && falls && values.length > 0 && values.every((v) => v > 0);
  let low = Math.min(...values);
  let high = Math.max(...(late.length && falls && !useLog ? late : values));
  if (!useLog && low >= 0 && low < 0.6 * high) low = 0; // unless starting from zero would flatten the curve
  if (low === high) {
    low -= Math.abs(low) * 0.1 || 0.5;
    high += Math.abs(high) * 0.1 || 0.5;
  }
  const scale = useLog ? Math.log10 : (v) => v;
  const y = (v) => 1 - (scale(v) - scale(low)) / (scale(high) - scale(low));
  return { y, ticks: useLog ? logTicks(low, high) : niceTicks(low, high, 4) };
}

/* Ticks at powers of ten, and where those would be few, also at their doubles and fivefolds. */
function logTicks(low, high) {
  const multiples = high / low > 50 ? [1] : [1, 2, 5];
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    ticks.push(...multiples.map((m) => m * 10 ** power).filter((tick) => tick >= low && tick <= high));
  }
  return ticks.length ? ticks : [low, high];
}

// ---- charts -------------------------------------------------------------------------------------

/* One chart. series: for each run {steps, values, counts} or null. points: of evaluations, one mark each. */
function chart(title, figureName, series, { points = false, falls = false, marksSkipped = false }) {
  const readout = el("p", {});
  const svg = el("svg", { viewBox: "0 0 1 1", preserveAspectRatio: "none", "aria-hidden": "true" });
  const plot = el("div", { class: "plot" }, svg);
  const cursor = el("div", { class: "cursor", hidden: true });

  /* Everything but the numbers: grid, curves, marks. */
  function draw() {
    const drawn = series.map((one, r) => (runShown[r] ? one : null));
    const shown = drawn.filter(Boolean);
    const present = shown.flatMap((one) => one.values).filter((v) => v !== null);
    const late = shown.flatMap((one) => one.values.filter((v, i) => v !== null && one.steps[i] > lastStep / 10));
    const { y, ticks } = verticalScale(present, late, falls);
    svg.replaceChildren();
    plot.replaceChildren(svg, cursor);
    drawGrid(svg, plot, y, ticks);
    drawn.forEach((one, r) => {
      if (!one) return;
      drawCurve(svg, one, r, y, points);
      if (points) drawPoints(plot, one, r, y);
      if (marksSkipped) drawSkipped(plot, data.runs[r]);
    });
    read();
  }

  /* The numbers at the cursor. */
  function read() {
    const texts = series.map((one, r) => (one && runShown[r] ? readOff(one, r, points) : null));
    readout.replaceChildren(...texts.filter(Boolean));
    cursor.hidden = cursorStep === null;
    if (cursorStep !== null) cursor.style.left = x(cursorStep) * 100 + "%";
  }

  plot.addEventListener("mousemove", (event) => {
    const box = plot.getBoundingClientRect();
    moveTo(Math.round(clamp((event.clientX - box.left) / box.width, 0, 1) * lastStep));
  });
  plot.addEventListener("mouseleave", () => moveTo(null));
  charts.push({ draw, read });
  const button = svgButton(() => figureName, () => data.figures[figureName]);
  const caption = el("figcaption", {}, button, el("b", {}, title), readout);
  return el("figure", { class: "chart", "data-chart": title }, caption, plot);
}

/* Lines across at the ticks of the vertical axis, and the names of both axes' ticks. */
function drawGrid(svg, plot, y, ticks) {
  for (const tick of ticks) {
    svg.append(el("line", { class: "grid", x1: 0, x2: 1, y1: y(tick), y2: y(tick) }));
    plot.append(el("span", { class: "tick", style: `top:${y(tick) * 100}%` }, tickText(tick)));
  }
  for (const tick of niceTicks(0, lastStep, 4)) {
    plot.append(el("span", { class: "xtick", style: `left:${x(tick) * 100}%` }, tickText(tick)));
  }
}

/* One run's curve: of training, the logged values thin and their mean thick. */
function drawCurve(svg, one, r, y, points) {
  const path = (values) => {
    const hidden = (value) => value === null || y(value) < -0.02; // above the scale
    const place = (value, i) => (hidden(value) ? null : [x(one.steps[i]).toFixed(5), y(value).toFixed(5)]);
    return pathThrough(values.map(place)) || "M0 0";
  };
  const colour = "run" + (r % 6);
  if (!points) svg.append(el("path", { class: "raw " + colour, d: path(one.values) }));
  svg.append(el("path", { class: colour, d: path(points ? one.values : smoothed(one.values)) }));
}

/* A dot at each evaluation of a run, a ring at its best checkpoint. */
function drawPoints(plot, one, r, y) {
  one.steps.forEach((step, i) => {
    if (one.values[i] === null || y(one.values[i]) < -0.02) return;
    const best = step === data.runs[r].best_step;
    const name = (best ? "best" : "point") + " run" + (r % 6);
    const style = `left:${x(step) * 100}%;top:${y(one.values[i]) * 100}%`;
    plot.append(el("i", { class: name, style, title: best ? `best checkpoint, step ${step}` : null }));
  });
}

/* A mark at the bottom for each step that was not taken. */
function drawSkipped(plot, run) {
  for (const step of run.skipped) {
    plot.append(el("i", { class: "skipped", style: `left:${x(step) * 100}%`, title: `step ${step} was skipped` }));
  }
}

/* A run's number at the cursor, with its label count. */
function readOff(one, r, points) {
  const i = indexAtCursor(one.steps, points ? data.runs[r].best_step : null);
  let text = figure(one.values[i]);
  if (one.counts) text += ` · ${figure(one.counts[i] === null ? null : Math.round(one.counts[i]))} labels`;
  return el("span", { class: data.runs.length > 1 ? "run" + (r % 6) : null }, text);
}

/* The step nearest to the cursor; without a cursor the preferred one, else the last. */
function indexAtCursor(steps, preferred) {
  if (cursorStep !== null) return nearest(steps, cursorStep);
  const best = steps.indexOf(preferred);
  return best >= 0 ? best : steps.length - 1;
}

/* Every number of this kind ("curves" or "evaluation") that some run has. */
function namesOf(kind) {
  return [...new Set(data.runs.flatMap((run) => Object.keys(run[kind])))];
}

/* A number's curve in each run; null for a run without it. */
function seriesOf(kind, name) {
  return data.runs.map((run) => {
    if (!run[kind][name]) return null;
    return { steps: run[LINES[kind]], values: run[kind][name], counts: kind === "curves" ? run.counts[name] : null };
  });
}

function trainingChart(name) {
  const falls = ["loss", "grad_norm"].includes(name) || namesOf("counts").includes(name);
  const options = { falls, marksSkipped: name === "loss" };
  return chart(data.curveTitles[name], name, seriesOf("curves", name), options);
}

function evaluationChart(name) {
  const options = { points: true, falls: name.startsWith("loss") };
  return chart(data.evaluationTitles[name], "validation-" + name, seriesOf("evaluation", name), options);
}

// ---- the cursor ---------------------------------------------------------------------------------

/* Put the cursor of all charts at a step; null takes it away. */
function moveTo(step) {
  cursorStep = step;
  const nowhere = "last step, and for evaluations the best checkpoint";
  stepShown.textContent = step === null ? nowhere : "step " + step;
  for (const one of charts) one.read();
}

/* All steps of these lists, once each, in order. */
function ordered(lists) {
  return [...new Set(lists.flat())].sort((a, b) => a - b);
}

/* The step that a key leads to, undefined where there is none. */
function target(key) {
  const steps = ordered(data.runs.filter((_, r) => runShown[r]).map((run) => [...run.steps, ...run.evaluated]));
  const last = steps.length - 1;
  const i = cursorStep === null ? last : nearest(steps, cursorStep);
  const far = Math.ceil(steps.length / 20);
  if (key === "ArrowLeft") return steps[i - 1];
  if (key === "ArrowRight") return steps[i + 1];
  if (key === "PageUp") return steps[Math.max(0, i - far)];
  if (key === "PageDown") return steps[Math.min(last, i + far)];
  if (key === "Home") return steps[0];
  if (key === "End") return steps[last];
  return neighbouringEvaluation(key === "n");
}

/* The next or previous evaluation; from the end on, the first or the last. */
function neighbouringEvaluation(forward) {
  const evaluated = ordered(data.runs.map((run) => run.evaluated));
  if (forward) return evaluated.find((step) => cursorStep !== null && step > cursorStep) ?? evaluated[0];
  return evaluated.findLast((step) => cursorStep === null || step < cursorStep) ?? evaluated[evaluated.length - 1];
}

function onKey(event) {
  if (keyIsTaken(event)) return;
  if (event.key === "Escape") moveTo(null);
  if (!["ArrowLeft", "ArrowRight", "PageUp", "PageDown", "Home", "End", "n", "p"].includes(event.key)) return;
  const step = target(event.key);
  if (step !== undefined) {
    moveTo(step);
    region.setAttribute("aria-valuenow", step);
  }
  event.preventDefault();
}

// ---- the page -----------------------------------------------------------------------------------

/* A box to tick; after each change the charts are drawn anew. */
function checkbox(checked, change) {
  const onchange = (event) => {
    change(event.target.checked);
    for (const one of charts) one.draw();
  };
  return el("input", { type: "checkbox", checked: checked ? "" : null, onchange });
}

/* A run's colour, name and best step, with a box that hides its curves. */
function runLabel(run, r) {
  const best = run.best_step === null ? "" : ` best at step ${run.best_step}`;
  const name = el("span", { style: "color:var(--ink)" }, words(run.name), el("span", { class: "soft" }, best));
  const box = checkbox(true, (on) => {
    runShown[r] = on;
  });
  const line = el("svg", { viewBox: "0 0 26 4", "aria-hidden": "true" }, el("path", { d: "M0 2L26 2" }));
  return el("label", { class: "run" + (r % 6) }, box, line, name);
}

/* Charts under their heading. */
function chartGroup(heading, nodes) {
  return [nodes.length ? el("h2", {}, heading) : null, el("div", { class: "charts" }, ...nodes)];
}

const stepShown = el("b", { id: "step" });
const slider = { role: "slider", "aria-label": "step", "aria-valuemin": 0, "aria-valuemax": lastStep };
const validation = "Validation, teacher-forced where not streamed; the ring is the best checkpoint";
const region = el(
  "div",
  { id: "charts", tabindex: "0", ...slider },
  ...chartGroup("Training", namesOf("curves").map(trainingChart)),
  ...chartGroup(validation, namesOf("evaluation").map(evaluationChart)),
);
const logarithmicBox = checkbox(false, (on) => {
  logarithmic = on;
});
const about = "Thin lines are the logged values, thick ones their mean over a fiftieth of the run.";

document.body.append(
  pageHeader(el("h1", {}, "Training curves"), el("p", { class: "soft" }, about), themeButton()),
  el("div", { class: "runs" }, ...data.runs.map(runLabel), el("label", {}, logarithmicBox, "logarithmic losses")),
  settingsTable(data.runs.map((run) => run.name)),
  el("div", { class: "readout" }, stepShown),
  region,
  keyHelp(
    ["← →", "step"],
    ["PgUp PgDn", "a twentieth"],
    ["n p", "next, previous evaluation"],
    ["Home End", "first, last"],
    ["Esc", "no cursor"],
  ),
  writtenNote(),
);
document.addEventListener("keydown", onKey); // wherever the focus is
for (const one of charts) one.draw();
moveTo(null);
