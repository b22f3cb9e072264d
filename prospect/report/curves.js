// Training curves of one or several runs, laid over each other, with one cursor in all charts.

const TITLES = {
  loss: "loss", speaking_gen: "reply words", speaking_binary: "speak or not", dst_gen: "update words", dst_binary: "update or not", dst_state: "step state",
  lr: "learning rate", grad_norm: "gradient norm", tokens_per_second: "tokens a second", padding: "padding share",
};
const shownRuns = data.runs.map(() => true);
let logarithmic = false, at = null; // at: the step under the cursor
const charts = [];

const figure = (value) => (value === null || value === undefined ? "–" : Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : Number.isInteger(value) ? String(value) : Math.abs(value) < 0.001 ? value.toExponential(2) : value.toPrecision(4));
const tickText = (value) => (Math.abs(value) >= 10000 ? Number((value / 1000).toPrecision(6)) + "k" : Math.abs(value) > 0 && Math.abs(value) < 0.001 ? value.toExponential().replace(/(\.\d)\d+/, "$1") : String(Number(value.toPrecision(6))));
const evaluationTitle = (name) => name === "loss" ? "validation loss" : name.startsWith("loss_") ? "validation: " + (TITLES[name.slice(5)] || name.slice(5)) : name.replace(/^dst_/, "update ").replace(/_/g, " ").replace("f1", "F1").replace("auroc", "AUROC");

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
  let low = 0, high = steps.length - 1;
  while (low < high) {
    const half = (low + high) >> 1;
    if (steps[half] < step) low = half + 1; else high = half;
  }
  return low > 0 && step - steps[low - 1] < steps[low] - step ? low - 1 : low;
}

/* One chart. series: for each run, {steps, values, counts} or null. */
function chart(title, series, { points = false, isLoss = false }) {
  const readout = el("p", {}), svg = el("svg", { viewBox: "0 0 1 1", preserveAspectRatio: "none", "aria-hidden": "true" });
  const plot = el("div", { class: "plot" }, svg), line = el("div", { class: "cursor", hidden: true });
  const node = el("figure", { class: "chart", "data-chart": title }, el("figcaption", {}, el("b", {}, title), readout), plot);

  function draw() {
    const drawn = series.map((one, r) => (shownRuns[r] ? one : null));
    const present = drawn.filter(Boolean).flatMap((one) => one.values).filter((v) => v !== null);
    const useLog = logarithmic && isLoss && present.every((v) => v > 0);
    const scale = useLog ? Math.log10 : (v) => v;
    let low = Math.min(...present), high = Math.max(...present);
    if (!useLog) low = Math.min(low, 0) === 0 && low < 0.6 * high ? 0 : low; // from zero, unless that would flatten the curve
    if (low === high) { low -= Math.abs(low) * 0.1 || 0.5; high += Math.abs(high) * 0.1 || 0.5; }
    const y = (v) => 1 - (scale(v) - scale(low)) / (scale(high) - scale(low));
    svg.replaceChildren();
    plot.replaceChildren(svg, line);
    const ticks = useLog ? logTicks(low, high) : niceTicks(low, high, 4);
    for (const tick of ticks) {
      svg.append(el("line", { class: "grid", x1: 0, x2: 1, y1: y(tick), y2: y(tick) }));
      plot.append(el("span", { class: "tick", style: `top:${y(tick) * 100}%` }, tickText(tick)));
    }
    for (const tick of niceTicks(0, lastStep, 4)) plot.append(el("span", { class: "xtick", style: `left:${x(tick) * 100}%` }, tickText(tick)));
    const path = (steps, values) => {
      let d = "", open = false;
      values.forEach((value, i) => {
        if (value === null) { open = false; return; }
        d += (open ? "L" : "M") + x(steps[i]).toFixed(5) + " " + y(value).toFixed(5);
        open = true;
      });
      return d || "M0 0";
    };
    drawn.forEach((one, r) => {
      if (!one) return;
      const colour = "run" + (r % 6);
      if (!points) svg.append(el("path", { class: "raw " + colour, d: path(one.steps, one.values) }));
      svg.append(el("path", { class: colour, d: path(one.steps, points ? one.values : smoothed(one.values)) }));
      const place = (i) => `left:${x(one.steps[i]) * 100}%;top:${y(one.values[i]) * 100}%`;
      if (points) one.steps.forEach((step, i) => {
        if (one.values[i] === null) return;
        const best = step === data.runs[r].best_step;
        plot.append(el("i", { class: (best ? "best " : "point ") + colour, style: place(i), title: best ? `best checkpoint, step ${step}` : null }));
      });
      if (isLoss && title === TITLES.loss) for (const step of data.runs[r].skipped) plot.append(el("i", { class: "skipped", style: `left:${x(step) * 100}%`, title: `step ${step} was skipped` }));
    });
    read();
  }

  /* The numbers at the cursor; without one, those of the last step, or of the best evaluation. */
  function read() {
    const told = series.map((one, r) => {
      if (!one || !shownRuns[r]) return null;
      const best = points && at === null ? one.steps.indexOf(data.runs[r].best_step) : -1;
      const i = best >= 0 ? best : at === null ? one.steps.length - 1 : nearest(one.steps, at);
      const count = one.counts ? ` · ${figure(one.counts[i] === null ? null : Math.round(one.counts[i]))} labels` : "";
      return el("span", { class: data.runs.length > 1 ? "run" + (r % 6) : null }, figure(one.values[i]) + count);
    }).filter(Boolean);
    readout.replaceChildren(...told);
    line.hidden = at === null;
    if (at !== null) line.style.left = x(at) * 100 + "%";
  }

  plot.addEventListener("mousemove", (event) => {
    const box = plot.getBoundingClientRect();
    moveTo(Math.round(clamp((event.clientX - box.left) / box.width, 0, 1) * lastStep));
  });
  plot.addEventListener("mouseleave", () => moveTo(null));
  charts.push({ draw, read });
  return node;
}

function logTicks(low, high) {
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
    for (const m of high / low > 50 ? [1] : [1, 2, 5]) if (m * 10 ** power >= low && m * 10 ** power <= high) ticks.push(m * 10 ** power);
  return ticks.length ? ticks : [low, high];
}

const lastStep = Math.max(1, ...data.runs.flatMap((run) => [...run.steps, ...run.evaluated]));
const x = (step) => step / lastStep;

function moveTo(step) {
  at = step;
  stepShown.textContent = at === null ? "last step, and for evaluations the best checkpoint" : "step " + at;
  for (const one of charts) one.read();
}

const every = (kind) => [...new Set(data.runs.flatMap((run) => Object.keys(run[kind])))];
const seriesOf = (make) => data.runs.map((run) => make(run) || null);
const training = every("curves").map((name) => chart(TITLES[name] || name,
  seriesOf((run) => run.curves[name] && { steps: run.steps, values: run.curves[name], counts: run.counts[name] }), { isLoss: name === "loss" || every("counts").includes(name) }));
const evaluation = every("evaluation").map((name) => chart(evaluationTitle(name),
  seriesOf((run) => run.evaluation[name] && { steps: run.evaluated, values: run.evaluation[name] }), { points: true, isLoss: name.startsWith("loss") }));

const stepShown = el("b", { id: "step" });
const region = el("div", { id: "charts", tabindex: "0", role: "slider", "aria-label": "step", "aria-valuemin": 0, "aria-valuemax": lastStep, onkeydown: (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const steps = [...new Set(data.runs.flatMap((run, r) => (shownRuns[r] ? [...run.steps, ...run.evaluated] : [])))].sort((a, b) => a - b);
  const evaluated = [...new Set(data.runs.flatMap((run) => run.evaluated))].sort((a, b) => a - b);
  const i = at === null ? steps.length - 1 : nearest(steps, at);
  const far = Math.ceil(steps.length / 20);
  let to = { ArrowLeft: steps[i - 1], ArrowRight: steps[i + 1], PageUp: steps[Math.max(0, i - far)], PageDown: steps[Math.min(steps.length - 1, i + far)], Home: steps[0], End: steps[steps.length - 1] }[event.key];
  if (event.key === "n") to = evaluated.find((step) => at !== null && step > at) ?? evaluated[0];
  if (event.key === "p") to = evaluated.findLast((step) => at === null || step < at) ?? evaluated[evaluated.length - 1];
  if (event.key === "Escape") { moveTo(null); return; }
  if (!["ArrowLeft", "ArrowRight", "PageUp", "PageDown", "Home", "End", "n", "p"].includes(event.key)) return;
  if (to !== undefined) { moveTo(to); region.setAttribute("aria-valuenow", to); }
  event.preventDefault();
} },
  training.length ? el("h2", {}, "Training") : null, el("div", { class: "charts" }, ...training),
  evaluation.length ? el("h2", {}, "Validation, teacher-forced; the ring is the best checkpoint") : null, el("div", { class: "charts" }, ...evaluation));

const box = (checked, does) => el("input", { type: "checkbox", checked: checked ? "" : null, onchange: (event) => { does(event.target.checked); for (const one of charts) one.draw(); } });
document.body.append(
  el("header", { class: "top" }, el("div", {}, el("h1", {}, "Training curves"), el("p", { class: "soft" }, "Thin lines are the logged values, thick ones their mean over a fiftieth of the run.")), el("div", { class: "tools" }, themeButton())),
  el("div", { class: "runs" }, ...data.runs.map((run, r) => el("label", { class: "run" + (r % 6) }, box(true, (on) => { shownRuns[r] = on; }), el("i", {}),
    el("span", { style: "color:var(--ink)" }, words(run.name), el("span", { class: "soft" }, run.best_step === null ? "" : ` best at step ${run.best_step}`)))),
    el("label", {}, box(false, (on) => { logarithmic = on; }), "logarithmic losses")),
  el("div", { class: "readout" }, stepShown),
  region,
  keyHelp(["← →", "step"], ["PgUp PgDn", "a twentieth"], ["n p", "next, previous evaluation"], ["Home End", "first, last"], ["Esc", "no cursor"]));
for (const one of charts) one.draw();
moveTo(null);
