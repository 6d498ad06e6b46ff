"use strict";
/* The report of runs; runs after uPlot and page.js, whose helpers it uses.

   uPlot draws axes and curves. Here stands what ties points to tokens: which rows a chart shows, the
   marks of restarts and skipped updates, and a text at each step. */

const AGAINST = { step: "steps", tokens: "tokens", seconds: "time", flops: "FLOPs" };
const RUN_COLOURS = 6, SOURCE_DASHES = [[2, 3], [7, 3], [7, 3, 2, 3], [1, 2]];
const MOST_LINES = 20, MOST_LABELLED = 8, GROWS_EACH_MS = 2000, SHARE_OF_ASKING = 20;
const CHARTS = [
  ["loss", "Loss", "nats per token", "loss"],
  ["bits", "Bits per byte", "validation", null, "bits_per_byte"],
  ["grad_norm", "Gradient norm", "before clipping", "grad_norm"],
  ["learning_rate", "Learning rate", "", "learning_rate"],
  ["tokens_per_second", "Tokens per second", "", "tokens_per_second"],
  ["memory_bytes", "Memory", "", "memory_bytes"],
  ["mfu", "MFU", "share of the devices' peak FLOP/s", "mfu"],
  ["load_balancing_loss", "Load-balancing loss", "experts", "load_balancing_loss"],
  ["router_z_loss", "Router z-loss", "experts", "router_z_loss"],
  ["router_load_max", "Most used expert", "as a multiple of an even share", "router_load_max"],
];

// Steps between the marks of an axis of bytes, so that they are whole in their units.
const POWERS_OF_TWO = Array.from({ length: 52 }, (_, power) => 2 ** power);
const inWords = new Intl.NumberFormat("en-US", { notation: "compact", maximumSignificantDigits: 4 });
const compact = (value) => (Math.abs(value) < 1e15 ? inWords.format(value)
  : value.toExponential(3).replace(/\.?0*e\+/, "e"));

function spelledSeconds(value) {
  if (value < 120) return `${Number(value.toPrecision(3))} s`;
  const minutes = value / 60;
  return minutes < 120 ? `${Number(minutes.toPrecision(3))} min`
    : `${Number((minutes / 60).toPrecision(3))} h`;
}
function spelledBytes(value) {
  if (value === null || value === undefined) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < 4) { value /= 1024; unit++; }
  return `${Number(value.toPrecision(4))} ${units[unit]}`;
}
const spelledNumber = (value) => (value === null || value === undefined ? "–"
  : Math.abs(value) >= 1e6 ? compact(value) : String(Number(value.toPrecision(6))));

/** What a variable of the stylesheet is in the theme of the moment. */
function colour(name) {
  const swatch = byId("say");
  swatch.style.color = `var(--${name})`;
  const found = getComputedStyle(swatch).color;
  swatch.style.color = "";
  return found;
}
const faded = (name) => colour(name).replace(/^rgb\((.*)\)$/, "rgba($1, 0.28)");
const chosen = (name) => document.querySelector(`input[name=${name}]:checked`)?.id.slice(name.length + 1);

/* ---- curves ---- */

class Curves {
  constructor() {
    this.plots = [];
    this.zoom = null;
    const rules = [];
    this.scaling = false;
    const reset = el("button", "", "Show all");
    Object.assign(reset, { type: "button", id: "unzoom", hidden: true });
    reset.addEventListener("click", () => this.zoomTo(null));
    document.querySelector(".controls").append(
      choice("against", "Against", AGAINST, rules),
      choice("scale", "Axes", { linear: "linear", y: "log y", x: "log x", both: "log both" }, rules),
      choice("curve", "Training", { smooth: "smoothed", raw: "each step" }, rules), reset);
    const sheet = new CSSStyleSheet();
    sheet.replaceSync(rules.join("\n"));
    document.adoptedStyleSheets = [...document.adoptedStyleSheets, sheet];
    for (const input of document.querySelectorAll("[name=against], [name=scale], [name=curve]")) {
      input.addEventListener("change", () => { this.zoom = null; this.draw(); });
    }
    new ResizeObserver(() => this.fit()).observe(document.querySelector(".charts"));
  }

  /** Draws the charts, after other numbers or another choice. A chart that has the curves it had
      takes the numbers, and keeps what a person zoomed, hid and points at. */
  draw(runs = this.runs) {
    this.runs = runs;
    const drawn = CHARTS.map((chart) =>
      [chart, runs.flatMap((run, number) => this.seriesOf(chart, run, number))])
      .filter(([, series]) => series.some(({ y }) => y.some((value) => value !== null)));
    const logX = ["x", "both"].includes(chosen("scale"));
    let [min, max] = [Infinity, -Infinity];
    for (const at of drawn.flatMap(([, series]) => series.flatMap(({ x }) => x))) {
      if (Number.isFinite(at) && (!logX || at > 0)) [min, max] = [Math.min(min, at), Math.max(max, at)];
    }
    this.whole = min < max ? { min, max } : null;
    const ways = ["against", "scale", "curve"].map(chosen);
    const shape = JSON.stringify([ways, drawn.map(([[id], series]) => [id, series.map(({ label }) => label)])]);
    if (shape === this.shape) {
      drawn.forEach(([, series], i) => this.plots[i].setData(this.table(series), false));
    } else this.addAll(drawn);
    this.shape = shape;
    this.zoomTo(this.zoom);
    byId("curves").hidden = !this.plots.length;
    this.sayMarks();
  }

  /** Where something of a run lies on the axis. */
  x(run, of) {
    const against = chosen("against");
    if (against !== "flops") return of[against];
    return of.tokens.map((tokens) => tokens * (run.flops_per_token ?? NaN));
  }

  seriesOf([, , , trained, evaluated = trained], run, number) {
    const alone = this.runs.length === 1, name = alone ? "" : `${escaped(run.name)}, `;
    const own = `run${number % RUN_COLOURS}`, found = [];
    if (trained && run.train[trained]) {
      const x = this.x(run, run.train), smooth = chosen("curve") === "smooth" && run.rows > 2;
      found.push({ label: `${name}training`, x, y: run.train[trained], width: 1, ink: own,
                   faint: smooth });
      if (smooth) found.push({ label: `${name}smoothed`, x, y: run.smoothed[trained], width: 2, ink: own });
    }
    if (evaluated === "loss" || evaluated === "bits_per_byte") {
      run.evaluations.forEach((of, i) => found.push({
        label: `${name}validation${of.source ? ` of ${escaped(of.source)}` : ""}`,
        x: this.x(run, of), y: of[evaluated], width: 2, points: true,
        dash: of.source ? SOURCE_DASHES[i % SOURCE_DASHES.length] : alone ? undefined : [7, 4],
        ink: alone ? (of.source ? `run${2 + (i % 4)}` : "run1") : own }));
    }
    return found;
  }

  addAll(drawn) {
    const box = document.querySelector(".charts"), focused = document.activeElement?.closest?.(".chart")?.id;
    box.style.minHeight = `${box.offsetHeight}px`;  // the page stays where it was scrolled to
    this.plots.forEach((plot) => plot.destroy());
    this.plots = [];
    box.replaceChildren();
    for (const [chart, series] of drawn) this.add(box, chart, series);
    box.style.minHeight = "";
    if (focused) byId(focused)?.focus({ preventScroll: true });
  }

  /** Which axes are logarithmic: x, and y where a chart has a positive number. */
  logarithmic(series) {
    const scale = chosen("scale"), positive = series.some(({ y }) => y.some((value) => value > 0));
    return [["x", "both"].includes(scale), ["y", "both"].includes(scale) && positive];
  }

  /** The numbers of a chart as uPlot takes them. */
  table(series) {
    const [logX, logY] = this.logarithmic(series);
    return uPlot.join(series.map(({ x, y }) => {
      const rows = x.map((at, i) => [at, logY && y[i] <= 0 ? null : y[i]])
        .filter(([at]) => Number.isFinite(at) && (!logX || at > 0));
      return [rows.map(([at]) => at), rows.map(([, value]) => value)];
    }));
  }

  add(box, [id, title, unit], series) {
    const against = chosen("against"), [logX, logY] = this.logarithmic(series);
    const heading = el("h3", "", title, el("small", "", unit));
    const figure = el("figure", id === "loss" ? "chart wide" : "chart", heading);
    Object.assign(figure, { id: `chart-${id}`, tabIndex: 0 });
    figure.setAttribute("role", "group");
    figure.setAttribute("aria-label", `${title}: arrow keys read the values, + and - zoom, Escape shows all`);
    box.append(figure);
    const spell = id === "memory_bytes" ? spelledBytes : spelledNumber;
    const spellX = against === "seconds" ? spelledSeconds : spelledNumber;
    const axis = (values, size, label) => ({
      stroke: () => colour("muted"), size, label, labelSize: 18, labelGap: 0,
      font: "11px system-ui, sans-serif", labelFont: "11px system-ui, sans-serif",
      grid: { stroke: () => colour("line"), width: 1 }, ticks: { stroke: () => colour("line"), width: 1 },
      values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : values(tick))),
    });
    const tick = id === "memory_bytes" ? spelledBytes : (v) => (Math.abs(v) >= 1e4
      ? compact(v) : v !== 0 && Math.abs(v) < 1e-3 ? v.toExponential(0) : String(Number(v.toPrecision(4))));
    const ticksX = against === "seconds" ? spelledSeconds : compact;
    const plot = new uPlot({
      width: figure.clientWidth || 600, height: id === "loss" ? 320 : 190,
      // uPlot would end a logarithmic axis at powers of ten, and so each zoom of it.
      scales: { x: { time: false, ...(logX ? { distr: 3, range: (_, min, max) => (min < max ? [min, max] : [min / 2, 2 * max]) } : {}) }, y: { distr: logY ? 3 : 1 } },
      axes: [axis(ticksX, 44, AGAINST[against]),
        { ...axis(tick, 62), ...(id === "memory_bytes" ? { incrs: POWERS_OF_TWO } : {}) }],
      series: [{ label: AGAINST[against], value: (_, v) => (v === null || v === undefined ? "–" : spellX(v)) },
        ...series.map(({ label, ink, faint, width, dash, points, y }) => {
          const stroke = () => (faint ? faded(ink) : colour(ink));
          return { label, stroke, width, dash, spanGaps: false, value: (_, v) => spell(v),
            points: { show: (points && y.length < 80) || y.length < 3, size: points ? 6 : 8, fill: stroke, stroke } };
        })],
      // Unlike a picture, a style follows the theme by itself.
      legend: { markers: { stroke: (_, i) => (!i ? "" : series[i - 1].faint
        ? `color-mix(in srgb, var(--${series[i - 1].ink}) 28%, transparent)` : `var(--${series[i - 1].ink})`) } },
      cursor: { sync: { key: "report" }, drag: { x: true, y: false },
                dataIdx: (u, i, at) => this.nearest(u, i, at) },
      hooks: { draw: [(u) => this.drawMarks(u, id)],
               setScale: [(u, key) => this.scaled(u, key)] },
    }, this.table(series), figure);
    for (const name of figure.querySelectorAll(".u-legend .u-series ~ .u-series th")) {
      name.tabIndex = 0;
      name.setAttribute("role", "button");
      name.addEventListener("keydown", (event) => {
        if (!["Enter", " "].includes(event.key)) return;
        event.preventDefault();
        name.click();
      });
    }
    figure.addEventListener("keydown", (event) => this.key(event, plot, title));
    this.plots.push(plot);
  }

  /** The point of a curve next to the pointer: rows of validation are far apart. */
  nearest(plot, series, at) {
    const values = plot.data[series], xs = plot.data[0];
    if (!series || (values[at] !== null && values[at] !== undefined)) return at;
    let best = null;
    for (const step of [-1, 1]) {
      for (let i = at; i >= 0 && i < values.length; i += step) {
        if (values[i] === null || values[i] === undefined) continue;
        if (best === null || Math.abs(xs[i] - xs[at]) < Math.abs(xs[best] - xs[at])) best = i;
        break;
      }
    }
    return best ?? at;
  }

  /** All charts show the same part of the run. */
  scaled(plot, key) {
    if (key !== "x" || this.scaling || !plot.status) return;
    const { min, max } = plot.scales.x, { whole } = this;
    this.zoomTo(!whole || (min <= whole.min && max >= whole.max) ? null : { min, max }, plot);
  }

  zoomTo(range, from = null) {
    this.scaling = true;
    this.zoom = range;
    for (const plot of this.plots) {
      if ((plot !== from || !range) && this.whole) plot.setScale("x", range ?? this.whole);
    }
    byId("unzoom").hidden = range === null;
    this.scaling = false;
  }

  /** Zooms around the value that is read, or the middle. */
  zoomBy(plot, factor) {
    if (!this.whole) return;
    const { min, max } = plot.scales.x, at = plot.data[0][plot.cursor.idx] ?? (min + max) / 2;
    const range = { min: Math.max(this.whole.min, at - (at - min) * factor),
                    max: Math.min(this.whole.max, at + (max - at) * factor) };
    this.zoomTo(range.min === this.whole.min && range.max === this.whole.max ? null : range);
  }

  key(event, plot, title) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const { idx } = plot.cursor, last = plot.data[0].length - 1;
    const to = { ArrowRight: (idx ?? -1) + 1, ArrowLeft: (idx ?? last + 1) - 1, Home: 0, End: last }[event.key];
    if (event.key === "Escape") this.zoomTo(null);
    else if (event.key === "+" || event.key === "-") this.zoomBy(plot, event.key === "+" ? 0.5 : 2);
    else if (to === undefined || event.target.closest(".u-legend")) return;
    else {
      const at = Math.min(Math.max(to, 0), last);
      plot.setCursor({ left: plot.valToPos(plot.data[0][at], "x"), top: 20 });
      byId("say").textContent = `${title}: ` + [...plot.root.querySelectorAll(".u-legend .u-series")]
        .map((row) => row.textContent.trim()).join(", ");
    }
    event.preventDefault();
  }

  drawMarks(plot, id) {
    const alone = this.runs.length === 1;
    const { ctx, bbox } = plot, marks = this.runs.flatMap((run, i) => run.marks.map((mark) => ({
      ...mark, own: `run${i % RUN_COLOURS}`, at: this.x(run, { step: [mark.step], tokens: [mark.tokens], seconds: [mark.seconds] })[0] })));
    const labelled = marks.filter(({ what }) => what === "restart").length <= MOST_LABELLED;
    ctx.save();
    ctx.font = `${11 * devicePixelRatio}px system-ui, sans-serif`;
    for (const { what, at, own } of marks) {
      const x = Math.round(plot.valToPos(at, "x", true));
      if (!(x >= bbox.left && x <= bbox.left + bbox.width)) continue;
      ctx.beginPath();
      if (what === "restart") {
        ctx.strokeStyle = ctx.fillStyle = colour(alone ? "muted" : own);
        ctx.setLineDash([4 * devicePixelRatio, 3 * devicePixelRatio]);
        ctx.moveTo(x, bbox.top);
        ctx.lineTo(x, bbox.top + bbox.height);
        ctx.stroke();
        const left = x < bbox.left + bbox.width / 2;
        ctx.textAlign = left ? "left" : "right";
        if (labelled && id === "loss") ctx.fillText("restart", x + (left ? 5 : -5), bbox.top + 12 * devicePixelRatio);
      } else {
        const size = 5 * devicePixelRatio, bottom = bbox.top + bbox.height;
        ctx.fillStyle = colour(alone ? "accent" : own);
        ctx.moveTo(x - size, bottom);
        ctx.lineTo(x + size, bottom);
        ctx.lineTo(x, bottom - 2 * size);
        ctx.fill();
      }
    }
    ctx.restore();
  }

  sayMarks() {
    const parts = this.runs.flatMap((run) => {
      const of = (what) => run.marks.filter((mark) => mark.what === what);
      const name = this.runs.length > 1 ? `${escaped(run.name)}: ` : "";
      const list = (found) => found.slice(0, 12).map((mark) => grouped(mark.step)).join(", ")
        + (found.length > 12 ? ", ..." : "");
      const restarts = of("restart"), skipped = of("skipped"), said = [];
      if (restarts.length) said.push(`${name}${counted(restarts.length, "restart")} (dashed lines), from step ${list(restarts)}.`);
      if (skipped.length) said.push(`${name}${counted(skipped.length, "skipped update")} (triangles), at step ${list(skipped)}.`);
      if (run.rows > run.train.step.length) {
        said.push(`${name}${grouped(run.train.step.length)} of ${grouped(run.rows)} rows are drawn; the highest and lowest values are among them.`);
      }
      return said;
    });
    byId("marked").textContent = parts.join(" ");
  }

  fit() {
    for (const plot of this.plots) {
      const width = plot.root.parentElement.clientWidth;
      if (width && Math.abs(width - plot.width) > 1) plot.setSize({ width, height: plot.height });
    }
  }
}

/* ---- a text being learnt ---- */

class Learnt {
  constructor() {
    this.at = this.chosen = null;
    this.plot = null;
    byId("which").addEventListener("change", () => { this.chosen = null; this.draw(); });
    new ResizeObserver(() => this.fit()).observe(byId("token"));
    const lines = byId("lines");
    lines.addEventListener("click", (event) => {
      const [, row, token] = /^l(\d+)t(\d+)$/.exec(tokenElement(event.target)?.id ?? "") ?? [];
      if (row) this.choose(Number(row), Number(token));
    });
    lines.addEventListener("keydown", (event) => this.key(event));
  }

  fill(runs) {
    const before = byId("which").value;
    this.texts = runs.flatMap((run) => run.texts.map((text) => ({ ...text, size: run.vocab_size,
      title: runs.length > 1 ? `${run.name}: ${text.name}` : text.name })));
    const titles = this.texts.map(({ title }) => title);
    if (String(titles) !== this.titles) {  // a list that a person has opened stays open
      this.titles = String(titles);
      byId("which").replaceChildren(...titles.map((title, i) => {
        const option = el("option", "", escaped(title));
        option.value = String(i);
        return option;
      }));
    }
    byId("learnt").hidden = !this.texts.length;
    if (!this.texts.length) return;
    byId("which").value = this.texts[before] ? before : "0";
    this.draw();
  }

  get text() { return this.texts[Number(byId("which").value)]; }

  /** [logprob, rank, entropy, the likeliest token, its logprob]; null for a first token. */
  said(step, token) { return this.text.said[step][token] ?? [null, null, null, null, null]; }

  levels(step, token) {
    const { size } = this.text, [logprob, rank, entropy] = this.said(step, token);
    return `p${probabilityLevel(logprob)} r${rankLevel(rank)} `
      + `s${natsLevel(negative(logprob), size)} e${natsLevel(entropy, size)} m-`;
  }

  draw() {
    const { tokens, steps } = this.text, starts = [];
    while (starts.length < tokens.length) {
      const start = cellStart(tokens, starts);
      starts.fill(start, start).push(start);
    }
    const count = Math.min(MOST_LINES, steps.length);
    this.rows = Array.from({ length: count }, (_, i) =>
      Math.round((i * (steps.length - 1)) / Math.max(count - 1, 1)));
    byId("lines").replaceChildren(...this.rows.flatMap((row) => {
      const line = el("span");
      for (let start = 0, end; start < tokens.length; start = end) {
        end = start + 1;
        while (end < tokens.length && starts[end] === start) end++;
        const worst = Array.from({ length: end - start }, (_, i) => start + i)
          .reduce((a, b) => ((this.said(row, b)[0] ?? 0) < (this.said(row, a)[0] ?? 0) ? b : a));
        line.append(...cellNodes(tokens.slice(start, end), (i, inner, named) => {
          const span = el("span", `t${named ? " name" : ""} ${this.levels(row, start + i)}`, ...inner);
          span.id = `l${row}t${start + i}`;
          return span;
        }, this.levels(row, worst)));
      }
      return [el("span", "", `step ${grouped(steps[row])}`), line];
    }));
    const [row, token] = this.chosen ?? [this.rows.at(-1), this.mostTelling()];
    this.show(Math.min(row, steps.length - 1), token);
  }

  /** The token that became likeliest, from the first step to the last. */
  mostTelling() {
    const { said, tokens } = this.text;
    const gain = (i) => (said.at(-1)[i] && said[0][i] ? said.at(-1)[i][0] - said[0][i][0] : -Infinity);
    return tokens.map((_, i) => i).reduce((best, i) => (gain(i) > gain(best) ? i : best), 0);
  }

  /** A person's choice stays while the page grows; without one, the newest step is shown. */
  choose(row, token) {
    this.chosen = [row, token];
    this.show(row, token);
  }

  show(row, token) {
    this.at = [row, token];
    for (const old of document.querySelectorAll("#lines .here, #lines .same")) old.classList.remove("here", "same");
    for (const one of this.rows) byId(`l${one}t${token}`)?.classList.add(one === row ? "here" : "same");
    const { tokens, steps, spelled } = this.text;
    const name = tokens[token];
    const line = (i) => {
      const [logprob, rank, , other, most] = this.said(i, token);
      const cells = [grouped(steps[i]), logprob === null ? "–" : percent(logprob), rankText(rank)]
        .map((text) => el("td", "", text));
      const instead = el("td", "", ...(other === null || other === undefined ? ["–"]
        : [el("code", "", ...visible(spelled[other] ?? "")), ` ${percent(most)}`]));
      const whole = el("tr", i === row ? "on" : "", ...cells, instead);
      whole.addEventListener("click", () => this.choose(i, token));
      return whole;
    };
    const head = el("thead", "", el("tr", "", ...["step", "probability", "rank", "likeliest then"]
      .map((title) => el("th", "", title))));
    const table = el("table", "", head, el("tbody", "", ...steps.map((_, i) => line(i))));
    const chart = el("div", "growth");
    byId("token").replaceChildren(
      el("header", "", el("code", `big ${this.levels(row, token)}`, ...visible(name.token)),
        el("p", "", `token ${grouped(token + 1)} of ${grouped(tokens.length)}, id ${name.id}`)),
      chart, el("div", "scroll", table));
    // Within its box alone: the page itself stays where it is.
    const scroll = table.parentElement, own = table.querySelector("tr.on");
    scroll.scrollTop = own.offsetTop - scroll.clientHeight / 2;
    const logprobs = steps.map((_, i) => this.said(i, token)[0]);
    this.drawCurve(chart, steps, logprobs.map((logprob) => (logprob === null ? null : 100 * Math.exp(logprob))));
    byId("say").textContent = `step ${steps[row]}, ${escaped(name.token)}: ${percent(logprobs[row])}`;
  }

  drawCurve(box, steps, values) {
    this.plot?.destroy();
    this.plot = null;
    if (steps.length < 2 || values.every((value) => value === null)) return;
    const ink = () => colour("muted"), line = () => colour("run0");
    const axis = { stroke: ink, font: "11px system-ui, sans-serif", grid: { stroke: () => colour("line"), width: 1 },
                   ticks: { stroke: () => colour("line"), width: 1 } };
    this.plot = new uPlot({ width: box.clientWidth || 300, height: 150,
      scales: { x: { time: false }, y: { range: [0, 100] } }, legend: { show: false },
      axes: [{ ...axis, size: 28, values: (_, ticks) => ticks.map(compact) },
        { ...axis, size: 46, values: (_, ticks) => ticks.map((tick) => `${tick} %`) }],
      series: [{}, { stroke: line, width: 2, points: { show: steps.length < 40, size: 5, fill: line } }],
      cursor: { drag: { x: false, y: false } } }, [steps, values], box);
  }

  fit() {
    const width = this.plot?.root.parentElement.clientWidth;
    if (width && width !== this.plot.width) this.plot.setSize({ width, height: this.plot.height });
  }

  key(event) {
    if (event.altKey || event.ctrlKey || event.metaKey || !this.at) return;
    const [row, token] = this.at, last = this.text.tokens.length - 1;
    const place = this.rows.indexOf(row), line = (i) => this.rows[Math.min(Math.max(i, 0), this.rows.length - 1)];
    const to = { ArrowRight: [row, Math.min(token + 1, last)], ArrowLeft: [row, Math.max(token - 1, 0)],
                 ArrowDown: [line(place + 1), token], ArrowUp: [line(place - 1), token],
                 Home: [row, 0], End: [row, last] }[event.key];
    if (!to) return;
    event.preventDefault();
    this.choose(...to);
  }
}

/* ---- what was trained, where the time went, what to do next ---- */

// What the page of a text alone does not have.
const NOTHING = { facts: [], settings: {}, notes: [], next: [], train: { step: [] }, rows: 0, marks: [],
                  evaluations: [], samples: [], time: { seconds: {}, unsaid: 0 } };
const PARTS = { text: "text", compiling: "compiling", steps: "steps", evaluation: "evaluation",
                saves: "saves", restarts: "restarts", other: "other" };

function timeOf(run, alone) {
  const { seconds, unsaid } = run.time, total = Object.values(seconds).reduce((a, b) => a + b, 0);
  if (!total) return null;
  const rows = Object.entries(PARTS).filter(([part]) => seconds[part] > 0).flatMap(([part, name]) => {
    const bar = el("span");
    bar.style.width = `${(100 * seconds[part]) / total}%`;
    return [el("dt", "", name), el("dd", "bar-of", bar),
      el("dd", "said", `${spelledSeconds(seconds[part])}, ${(100 * seconds[part] / total).toFixed(1)} %`)];
  });
  const note = unsaid ? el("p", "about", `${counted(unsaid, "start")} did not say where the time went, as after a kill: only the steps of it are counted.`) : "";
  return el("div", "", alone ? "" : el("h3", "", escaped(run.name)), el("dl", "", ...rows), note);
}

function tableOf(title, names, rows) {
  const spelled = (value) => escaped(value === null || value === undefined ? "–"
    : typeof value === "object" ? JSON.stringify(value) : value === "" ? "\"\"" : String(value));
  const head = el("tr", "", ...["setting", ...names].map((name) => el("th", "", escaped(name))));
  const body = rows.map(([name, ...values]) =>
    el("tr", "", ...[name, ...values.map(spelled)].map((text) => el("td", "", text))));
  return el("details", "", el("summary", "", title),
    el("div", "scroll", el("table", "", el("thead", "", head), el("tbody", "", ...body))));
}

function settingsOf(runs, { differences, parting }) {
  if (runs.length === 1) {
    const rows = Object.entries(runs[0].settings);
    return !rows.length ? [] : [tableOf(`${counted(rows.length, "setting")} other than the default`, [""], rows)];
  }
  const rows = Object.entries(differences).map(([name, values]) => [name, ...values]);
  const table = tableOf(`${counted(rows.length, "setting")} in which they differ`,
    runs.map((run) => run.name), rows);
  table.open = rows.length < 30;
  const said = parting.map(({ common, step }, i) => el("p", "about",
    `${escaped(runs[0].name)} and ${escaped(runs[i + 1].name)}: ` + (!common ? "no step is recorded in both."
      : step === null ? `equal losses, bit for bit, at each of the ${grouped(common)} steps in both.`
        : `their losses part at step ${grouped(step)}.`)));
  return [...said, table];
}

class Report {
  constructor() {
    this.curves = new Curves();
    this.learnt = new Learnt();
    this.texts = null;
    // Pictures have the colours of the moment; paper is light, and does not wait for a frame.
    const redraw = () => [...this.curves.plots, this.learnt.plot].forEach((plot) => plot?.redraw(false));
    const later = () => requestAnimationFrame(redraw);
    for (const input of document.querySelectorAll("[name=theme]")) input.addEventListener("change", later);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", later);
    matchMedia("print").addEventListener("change", redraw);
  }

  show(report) {
    this.report = report;
    const runs = report.runs.map((run) => ({ ...NOTHING, ...run })), alone = runs.length === 1;
    this.state = runs.map((run) => `${alone ? "" : `${escaped(run.name)}: `}${escaped(run.state)}`).join("; ");
    byId("state").textContent = this.state;
    byId("notes").replaceChildren(...runs.flatMap((run) =>
      run.notes.map((note) => el("p", "", `${alone ? "" : `${escaped(run.name)}: `}${escaped(note)}`))));
    byId("facts").replaceChildren(...(alone ? this.factsOf(runs[0]) : []));
    const open = byId("settings").querySelector("details")?.open;
    byId("settings").replaceChildren(...settingsOf(runs, report));
    if (open !== undefined) byId("settings").querySelector("details").open = open;
    this.curves.draw(runs);
    const times = runs.map((run) => timeOf(run, alone)).filter(Boolean);
    document.querySelector(".spent").replaceChildren(...times);
    byId("time").hidden = !times.length;
    this.learnt.fill(runs);
    this.showSamples(runs);
    const advice = runs.slice(0, 1).flatMap((run) => run.next);
    document.querySelector("#next ul").replaceChildren(...advice.map(([sentence, words]) =>
      el("li", "", escaped(sentence), words ? el("code", "", escaped(words)) : "")));
    byId("next").hidden = !advice.length;
  }

  factsOf(run) {
    const evaluated = run.evaluations.find(({ source }) => !source), at = evaluated?.loss.length - 1;
    const loss = evaluated?.loss[at], bits = evaluated?.bits_per_byte[at];
    const first = [];
    if (loss !== undefined) first.push(["validation loss", loss === null ? "not finite" : `${loss.toFixed(4)} nats per token`]);
    if (bits !== undefined && bits !== null) first.push(["bits per byte", bits.toFixed(4)]);
    return [...first, ...run.facts].map(([term, value]) =>
      el("div", "", el("dt", "", term), el("dd", "", escaped(value))));
  }

  showSamples(runs) {
    const found = runs.flatMap((run) => run.samples.map((sample) => ({
      label: runs.length > 1 ? `${run.name}: ${sample.label}` : sample.label, records: sample.records })));
    const key = JSON.stringify(found.map(({ label }) => label));
    if (key === this.texts) return;
    this.texts = key;
    tokenPage.reset();
    tokenPage.labels = new Map(found.map(({ label }, i) => [i, escaped(label)]));
    tokenPage.run = { tokenizer: { vocab_size: runs[0].vocab_size ?? 2 }, top: 1 };
    tokenPage.sayBlind();
    found.forEach(({ records }, i) => records.forEach((record) => tokenPage.addRecord({ ...record, sample: i })));
    byId("read").hidden = !found.length;
  }

  /** Asks the server for newer numbers, ever again; a run of millions of steps is asked less often. */
  async grow() {
    const asked = performance.now(), said = byId("state");
    try {
      const answer = await fetch("data.json", { cache: "no-store" }), text = await answer.text();
      if (!answer.ok) throw new Error(text);
      if (text !== this.newest) this.show(JSON.parse(text));
      else if (said.textContent !== this.state) said.textContent = this.state;
      this.newest = text;
    } catch (error) {
      const why = error instanceof TypeError ? "the server does not answer" : error.message;
      said.textContent = `${this.state} (as of ${this.report.written}; ${escaped(why)})`;
    }
    const took = performance.now() - asked;
    setTimeout(() => this.grow(), Math.max(GROWS_EACH_MS, SHARE_OF_ASKING * took));
  }
}

globalThis.reportPage = new Report();
(async () => {
  reportPage.show(await readRecords(pageData.report));
  document.documentElement.dataset.filled = "";
  if (pageData.growing) reportPage.grow();
})();
