"use strict";
/* The page of token probabilities, from records that may come one at a time.

   tokenPage.addRecord(record)     a run, token or end record, as in the JSONL file
                                   (if a token was drawn under another run record than the last,
                                   it may carry that record as `run`)
   tokenPage.truncate(name, n)     keep the first n tokens of a sample, to take another branch
   tokenPage.reset()               forget everything, for a new run record
   tokenPage.branching = true      alternatives become buttons; a click on one dispatches the event
                                   "alternative" on document, detail: {sample, index, token,
                                   alternative}

   Class names: t token, i space, nl newline, tab, esc spelled-out character, name token without
   text, cell tokens that share a character; p3, r6, s2, e9, m8, x4, q1, a2 the levels of each way
   of colouring (scales.py), "-" for no value. */

const SEQUENTIAL_LEVELS = 25, DIVERGING_LEVELS = 17, CHANGE_LIMIT_NATS = 3;
const RANK_BOUNDS = [1, 10, 100, 1000];
const STRIP_HEIGHT = 48, THIN_BARS = 400, ROWS_AT_ONCE = 300;
const SVG = "http://www.w3.org/2000/svg";
const byId = (id) => document.getElementById(id);

/** An element with a class, and children that are nodes or strings. */
function el(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children.filter((child) => child !== null && child !== ""));
  return element;
}

/* ---- what can be chosen: how tokens are coloured, how spaces look, the theme ---- */

const FACTOR = Math.round(Math.exp(CHANGE_LIMIT_NATS));
const CERTAIN = ["certain", "25 %", "0 %"], CHANGE = [`÷ ${FACTOR}`, "same", `× ${FACTOR}`];
const NATS = ["0", "", null];  // up to ln V, which is filled in when the vocabulary is known
const RANKS = ["1", "2–10", "11–100", "101–1000", "beyond"];

/* On each kind of page the ways of colouring: the letter of their levels' classes, their name and
   what their legend says. */
const WAYS = {
  tokens: { p: ["probability", CERTAIN], r: ["rank", RANKS], s: ["surprisal", NATS],
            e: ["entropy", NATS], m: ["effect of sampling", CHANGE] },
  diff: { x: ["change", CHANGE], q: ["before", CERTAIN], a: ["after", CERTAIN] },
  attention: { w: ["weight", ["0 %", "25 %", "100 %"]] },
};

/** Fills the bar, and writes the rules by which the stylesheet acts on it. */
function fillBar(kind) {
  const ways = Object.entries(WAYS[kind]), rules = ways.flatMap(colourRules);
  const keys = el("div", "keys", ...ways.map(legend));
  keys.setAttribute("role", "group");
  keys.setAttribute("aria-label", "Colour scale");
  const names = Object.fromEntries(ways.map(([letter, [name]]) => [letter, name]));
  const choices = kind === "attention"
    ? [choice("way", "Show", { to: "where it looks", from: "who looks at it" }, rules), keys]
    : [choice("by", "Colour by", names, rules), keys,
       choice("spaces", "Spaces", { on: "marked", off: "plain" }, rules)];
  const theme = choice("theme", "Theme", { auto: "auto", light: "light", dark: "dark" }, rules);
  document.querySelector(".bar").append(...choices, theme);
  const sheet = new CSSStyleSheet();
  sheet.replaceSync(rules.join("\n"));
  document.adoptedStyleSheets = [sheet];
}

/** A group of radio buttons, and the look of the chosen and of the focused label.

    The buttons stand before everything else in the body, so that a rule can reach from a checked
    one to the text (`#by-p:checked ~ .page`). `:root:has()` could reach as far, but would make the
    browser look at ten thousand tokens again whenever anything on the page changes. */
function choice(name, title, options, rules) {
  const labels = Object.entries(options).map(([key, text], index) => {
    const id = `${name}-${key}`, input = el("input", "unseen");
    Object.assign(input, { type: "radio", name, id, defaultChecked: index === 0 });
    input.setAttribute("aria-label", `${title}: ${text}`);
    document.querySelector(".page").before(input);
    rules.push(`#${id}:checked ~ .page [for=${id}] { background: var(--ink);
      border-color: var(--ink); color: var(--paper); }
      #${id}:focus-visible ~ .page [for=${id}] { outline: 2px solid var(--first);
      outline-offset: 2px; }`);
    return Object.assign(el("label", "", text), { htmlFor: id });
  });
  return el("div", `choice ${name}`, el("span", "", title), ...labels);
}

/** Which level has which colour while its way of colouring is the chosen or the only one. */
function colourRules([letter, [, ends]]) {
  const [scale, levels] = ends === CHANGE ? ["d", DIVERGING_LEVELS] : ["c", SEQUENTIAL_LEVELS];
  const chosen = letter === "w" ? "" : `#by-${letter}:checked ~ .page`;
  return [`${chosen} .${letter}- { color: var(--faint); }`,
    `${chosen} .key-${letter} { display: flex; }`,
    ...Array.from({ length: levels }, (_, one) => `${chosen} .${letter}${one} {
      background: var(--${scale}${one}); color: var(--${scale}k${one}); }`)];
}

function legend([letter, [, ends]]) {
  if (ends === RANKS) {
    return el("div", "key key-r swatches", ...RANKS.map((name, i) => el("span", `r${6 * i}`, name)));
  }
  const named = ends.map((end) => (end !== null ? el("span", "", end)
    : el("span", "", "ln V = ", el("span", "blind"), " nats")));
  return el("div", `key key-${letter}`, el("div", ends === CHANGE ? "diverging" : "sequential"),
    el("div", "", ...named));
}

/* ---- numbers as levels and as words ---- */

const level = (fraction, levels) =>
  Math.floor(Math.min(Math.max(fraction, 0), 1) * (levels - 1) + 0.5);
const probabilityLevel = (logprob) =>
  logprob === null ? "-" : level(1 - Math.exp(Math.min(logprob, 0) / 2), SEQUENTIAL_LEVELS);
const rankLevel = (rank) =>
  rank === null ? "-" : 6 * RANK_BOUNDS.filter((bound) => rank > bound).length;
const natsLevel = (nats, vocabSize) =>
  nats === null ? "-" : level(nats / Math.log(Math.max(vocabSize, 2)), SEQUENTIAL_LEVELS);
const changeLevel = (nats) =>
  nats === null ? "-" : level((nats / CHANGE_LIMIT_NATS + 1) / 2, DIVERGING_LEVELS);

const difference = (one, other) => (one === null || other === null ? null : one - other);
const negative = (value) => (value === null ? null : 0 - value);
const effectOfSampling = (token) => difference(token.sampling_logprob, token.logprob);
const changeOf = (token) => difference(token.logprob, token.before.logprob);

function levelsOf(token, kind, vocabSize) {
  const levels = kind === "diff"
    ? { x: changeLevel(changeOf(token)), q: probabilityLevel(token.before.logprob),
        a: probabilityLevel(token.logprob) }
    : { p: probabilityLevel(token.logprob), r: rankLevel(token.rank),
        s: natsLevel(negative(token.logprob), vocabSize), e: natsLevel(token.entropy, vocabSize),
        m: changeLevel(effectOfSampling(token)) };
  return Object.entries(levels).map(([key, value]) => key + value).join(" ");
}

const sum = (values) => (values.includes(null) ? null : values.reduce((a, b) => a + b, 0));

/** Tokens that share a character as if they were one: their probabilities multiply. */
function joint(tokens) {
  const sumOf = (key) => sum(tokens.map((token) => token[key]));
  const ranks = tokens.map((token) => token.rank);
  const one = { logprob: sumOf("logprob"), entropy: sumOf("entropy"),
                sampling_logprob: sumOf("sampling_logprob"),
                rank: ranks.includes(null) ? null : Math.max(...ranks) };
  if (tokens[0].before) one.before = { logprob: sum(tokens.map((token) => token.before.logprob)) };
  return one;
}

function percent(logprob) {
  if (logprob === null) return "no probability";
  const value = 100 * Math.exp(logprob);
  if (value >= 1) return `${value.toFixed(value >= 10 ? 1 : 2)} %`;
  return value >= 0.001 ? `${value.toFixed(3)} %` : "< 0.001 %";
}

/* Adding zero makes 0 of -0, which would be shown as such. */
const grouped = (value, digits = 0) => (Number(value.toFixed(digits)) + 0).toLocaleString("en-US",
  { minimumFractionDigits: digits, maximumFractionDigits: digits });
const counted = (number, noun) => `${grouped(number)} ${noun}${number === 1 ? "" : "s"}`;
const nats = (value) => (value === null ? "–" : (Number(value.toFixed(2)) + 0).toFixed(2));
const signed = (value) =>
  value === null ? "–" : (value < 0 ? "−" : "+") + Math.abs(value).toFixed(2);
const rankText = (rank) => (rank === null ? "–" : grouped(rank));
const hex = (bytes) => bytes.map((byte) => byte.toString(16).padStart(2, "0")).join(" ");

/** "1.1", "23", "4,500", "1.2 million": the n of "one in n". */
function oneIn(logprob) {
  const n = Math.exp(-logprob);
  if (n < 9.95) return n.toFixed(1);
  if (n < 1e6) return grouped(Number(n.toPrecision(2)));
  for (const [size, name] of [[1e12, "trillion"], [1e9, "billion"], [1e6, "million"]]) {
    const digits = n < 9.95 * size ? 1 : 0;
    if (n >= size) return `${grouped(Number((n / size).toPrecision(2)), digits)} ${name}`;
  }
}

/* ---- text, spelled as llm/console.py spells it in a terminal ---- */

const UNSAFE = /[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/u;
const JOINERS = "\u200c\u200d";
const LETTERS = { "\n": "\\n", "\r": "\\r", "\t": "\\t" };

function escapeCharacter(character) {
  if (LETTERS[character]) return LETTERS[character];
  const code = character.codePointAt(0);
  const [mark, digits] = code < 0x100 ? ["x", 2] : code < 0x10000 ? ["u", 4] : ["U", 8];
  return `\\${mark}${code.toString(16).padStart(digits, "0")}`;
}

const isEscaped = (character) => UNSAFE.test(character) && !JOINERS.includes(character);
const escaped = (text) =>
  Array.from(text, (c) => (isEscaped(c) ? escapeCharacter(c) : c)).join("");

/** A token's text as nodes that keep every character and mark the invisible ones. */
function visible(text) {
  if (text && Array.from(text).every((c) => JOINERS.includes(c))) {
    return [el("i", text.includes("\u200d") ? "zw" : "zw non", text)];
  }
  const nodes = [];
  let plain = "";
  const flush = () => { if (plain) nodes.push(plain); plain = ""; };
  for (const part of text.match(/ +|[^]/gu) ?? []) {
    const kind = part[0] === " " ? "" : part === "\n" ? "nl" : part === "\t" ? "tab"
      : isEscaped(part) ? "esc" : null;
    if (kind === null) { plain += part; continue; }
    flush();
    nodes.push(el("i", kind, kind === "esc" ? escapeCharacter(part) : part));
  }
  flush();
  return nodes;
}

/** How many bytes a character has that begins with this byte; 0 for a byte that cannot. */
function sequenceLength(lead) {
  if (lead < 0xc2 || lead >= 0xf5) return 0;
  return lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
}

function endsInsideCharacter(token) {
  if (token.utf8 !== "bad") return token.utf8 === "open" || token.utf8 === "continue";
  const tail = token.bytes.slice(-3).reverse();
  for (const [index, byte] of tail.entries()) {
    if (byte < 0x80) return false;
    if (byte >= 0xc0) return index + 1 < sequenceLength(byte);
  }
  return false;
}

const graphemes = globalThis.Intl?.Segmenter && new Intl.Segmenter("en");
const MOST_SHARED = 32;  // tokens, or characters before a mark; a family of four is 25 bytes

/** Whether the text of a token goes on with the last character that a person sees of the text before:
    a vowel sign or an accent on its letter, the next part of a joined emoji, the second half of a
    flag. */
function goesOn(before, text) {
  if (!graphemes || !text || text.charCodeAt(0) < 0x300) return false;
  const { length } = before;
  if (!length || length > MOST_SHARED) return false;
  return graphemes.segment(before + text.slice(0, 8)).containing(length).index < length;
}

const textOf = (tokens) => tokens.map((token) => token.text).join("");

/** Where the cell of the next token begins: the tokens that share a character with it. `starts` has
    where the cells of the tokens before it begin. Cells stay short enough to be looked at. */
function cellStart(tokens, starts) {
  const last = starts.length;
  const start = last && endsInsideCharacter(tokens[last - 1]) ? starts[last - 1] : last;
  const fits = (one) => last - one < MOST_SHARED, before = starts[start - 1];
  if (start && fits(before) && goesOn(textOf(tokens.slice(before, start)),
    textOf(tokens.slice(start, last + 1)))) return before;
  return fits(start) ? start : last;
}

/** The tokens of a cell: one by itself, or their common text with a bar for each under it.
    `makeNode(i, inner, named)` makes the element of the token at `start + i`. */
function cellNodes(tokens, makeNode, levels) {
  const closed = !["open", "continue"].includes(tokens.at(-1).utf8);
  const text = closed ? textOf(tokens) : "", alone = tokens.length === 1;
  const inner = (token) => (!text ? visible(token.token) : alone ? visible(text) : []);
  const nodes = tokens.map((token, i) => makeNode(i, inner(token), !text));
  if (!text || alone) return nodes;
  // Lines break at the spaces around a character, never between it and its bars.
  // A joiner that joins nothing is marked.
  const [, lead, rest, joiner, tail] = /^(\s*)([^]*?)(\u200d*)(\s*)$/u.exec(text);
  const over = el("span", rest.length > 12 ? "" : "whole", ...visible(rest), ...visible(joiner),
    el("span", "parts", ...nodes));
  return [el("span", "cell", el("b", levels, ...visible(lead), over, ...visible(tail)))];
}

/** The token under an element; a shared character belongs to the token that closes it. */
const tokenElement = (target) => target.closest?.(".t")
  ?? [...(target.closest?.(".cell")?.querySelectorAll(".t") ?? [])].at(-1);

/* ---- one sample: its tokens as text, its strip ---- */

class Sample {
  constructor(page, name) {
    this.page = page;
    this.name = name;
    this.tokens = [];
    this.starts = [];
    this.stale = false;
    this.section = this.makeSection();
    this.text = this.section.querySelector(".text");
  }

  makeSection() {
    const label = this.page.labels?.get(this.name) ?? `Sample ${this.name}`;
    const text = el("div", "text");
    text.setAttribute("tabindex", 0);
    text.setAttribute("role", "group");
    text.setAttribute("aria-label", `${label}, text`);
    const strip = document.createElementNS(SVG, "svg");
    strip.setAttribute("class", "strip");
    strip.setAttribute("aria-hidden", "true");
    const section = el("section", "sample", el("h2", "unseen", label), el("p", "end"),
      el("p", "note"), strip, text);
    section.id = `s${this.name}`;
    byId("samples").append(section);
    const headings = byId("samples").querySelectorAll("h2");
    if (headings.length > 1 || this.page.labels) headings.forEach((heading) => heading.removeAttribute("class"));
    return section;
  }

  element(index) { return byId(`s${this.name}t${index}`); }

  add(record) {
    const index = this.tokens.push(record) - 1, start = cellStart(this.tokens, this.starts);
    for (let i = start; i < index; i++) this.erase(i);
    this.starts.fill(start, start).push(start);
    this.appendCell(start);
    this.stale = true;
  }

  /** Removes a token, or its whole cell if it shares a character. */
  erase(index) {
    const element = this.element(index);
    (element?.closest(".cell") ?? element)?.remove();
  }

  appendCell(start) {
    const tokens = this.tokens.slice(start), phase = tokens[0].phase;
    let part = this.text.lastElementChild;
    if (part?.className !== phase) {
      part = el("span", phase);
      this.text.append(part);
      this.markMixed();
    }
    part.append(...this.cellNodes(start, tokens));
  }

  markMixed() { this.section.classList.toggle("mixed", this.text.children.length > 1); }

  cellNodes(start, tokens) {
    const levels = tokens.length > 1
      ? levelsOf(joint(tokens), this.page.kind, this.page.vocabSize) : "";
    return cellNodes(tokens, (i, inner, named) =>
      this.tokenNode(start + i, tokens[i], inner, named), levels);
  }

  tokenNode(index, token, inner, named) {
    const levels = levelsOf(token, this.page.kind, this.page.vocabSize);
    const span = el("span", `t${named ? " name" : ""} ${levels}`, ...inner);
    span.id = `s${this.name}t${index}`;
    span.title = tooltip(token, this.page.kind);
    return span;
  }

  truncate(count) {
    // If the cut goes through a character, the tokens that are left of it are drawn again.
    const start = this.starts[count] ?? this.tokens.length;
    const kept = this.tokens.slice(start, count);
    for (let i = this.tokens.length - 1; i >= start; i--) {
      this.erase(i);
      this.tokens.pop();
      this.starts.pop();
    }
    for (const part of [...this.text.children]) if (!part.hasChildNodes()) part.remove();
    this.markMixed();
    this.section.querySelector(".end").replaceChildren();
    for (const record of kept) this.add(record);
    this.stale = true;
  }

  end(record) {
    const line = this.section.querySelector(".end");
    if (line.hasChildNodes()) return;
    // A diff counts all tokens, whoever wrote them.
    const generated = !record.before && this.tokens.some((token) => token.phase === "generated");
    line.append(...endLine(record, generated ? "generated" : "predicted"));
  }

  /** Surprisal by position, or in a diff the change, as one upright stroke a token. */
  drawStrip() {
    const strip = this.section.querySelector(".strip"), diff = this.page.kind === "diff";
    const values = this.tokens.map((t) => (diff ? changeOf(t) : negative(t.logprob)) ?? 0);
    strip.replaceChildren();
    const largest = values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
    if (!largest) return;
    const name = diff ? "Change" : "Surprisal", ground = diff ? STRIP_HEIGHT / 2 : STRIP_HEIGHT;
    const attributes = { class: values.length > THIN_BARS ? "strip thin" : "strip",
      viewBox: `0 0 ${values.length} ${STRIP_HEIGHT}`, preserveAspectRatio: "none", role: "slider",
      tabindex: 0, "aria-label": `${name} by position`, "aria-valuemin": 0,
      "aria-valuemax": values.length - 1, "aria-valuenow": 0 };
    strip.removeAttribute("aria-hidden");
    for (const [key, value] of Object.entries(attributes)) strip.setAttribute(key, value);
    this.section.querySelector(".note").textContent =
      `${name} by position, up to ${largest.toFixed(2)} nats`;
    for (const phase of ["prompt", "generated"]) {
      const path = document.createElementNS(SVG, "path");
      path.setAttribute("class", phase);
      path.setAttribute("d", values.map((value, i) => (!value || this.tokens[i].phase !== phase ? ""
        : `M${i}.5 ${ground}V${(ground - (value / largest) * ground).toFixed(1)}`)).join(""));
      strip.append(path);
    }
  }

  moveCursor(index) {
    const strip = this.section.querySelector(".strip");
    if (strip.hasAttribute("aria-hidden")) return;
    let cursor = strip.querySelector(".cursor");
    if (!cursor) {
      cursor = document.createElementNS(SVG, "path");
      cursor.setAttribute("class", "cursor");
      strip.append(cursor);
    }
    cursor.setAttribute("d", `M${index}.5 0V${STRIP_HEIGHT}`);
    strip.setAttribute("aria-valuenow", index);
    strip.setAttribute("aria-valuetext", summary(this.tokens[index]));
  }
}

function tooltip(token, kind) {
  const parts = [`id ${token.id}`, percent(token.logprob)];
  if (kind === "diff") parts[1] = `${percent(token.before.logprob)} → ${parts[1]}`;
  if (token.rank !== null) parts.push(`rank ${token.rank}`);
  if (token.utf8 !== "ok") parts.push(`bytes ${hex(token.bytes)}`);
  return parts.join(" · ");
}

const summary = (token) => `${escaped(token.token)}, ${percent(token.logprob)}`
  + (token.rank === null ? "" : `, rank ${token.rank}`);

/** The sums of an end record; in a diff, before and after with their difference in brackets. */
function endLine(end, doing) {
  const decimal = (value) => value === null || value === undefined ? "–"
    : (Math.abs(value) < 1e6 ? grouped(value, 2) : value.toExponential(2)).replace("-", "−");
  const { before, after = end, difference } = end;
  const sign = (value) => (value > 0 ? "+" : "") + decimal(value);
  const number = (key) => (!before ? decimal(after[key])
    : `${decimal(before[key])} → ${decimal(after[key])} (${sign(difference[key])})`);
  const parts = [["", ...counted(end.tokens, "token").split(/(?= )/), ` ${doing}`]];
  if (end.finish) parts.push(["finish: ", escaped(end.finish), ""]);
  if (after.perplexity !== null) parts.push(["perplexity ", number("perplexity"), ""]);
  if (after.bits_per_byte !== null) parts.push(["bits per byte ", number("bits_per_byte"), ""]);
  parts.push(["sum of log-probabilities ", number("sum_logprob"), " nats"]);
  return parts.map(([before, value, ...after]) =>
    el("span", "", before, el("b", "", value), ...after));
}

/** The run record as pairs of term and value. */
function facts(run) {
  const { checkpoint = {}, tokenizer = {}, numerics = {}, sampling } = run;
  const short = (value) => (typeof value === "object" ? JSON.stringify(value)
    : typeof value !== "number" || Number.isInteger(value) ? value : Number(value.toPrecision(6)));
  const settings = Object.entries(sampling ?? {}).filter(([, value]) => value !== null)
    .map(([key, value]) => `${key.replaceAll("_", "-")} ${short(value)}`);
  const computed = { teacher_forced: "in one teacher-forced pass", cached: "by cached decoding" };
  return [
    ["run", checkpoint?.run],
    ["step", checkpoint?.step == null ? null : grouped(checkpoint.step)],
    ["parameters' sha256", checkpoint?.params_sha256?.slice(0, 10)],
    ["tokenizer", tokenizer?.name && `${tokenizer.name}, ${counted(tokenizer.vocab_size, "token")}`],
    ["sampling", settings.join(", ") || "none, the text was given"],
    ["computed", computed[numerics?.path] ?? numerics?.path],
    ["on", numerics?.platform
      && `${numerics.platform}, ${numerics.compute_dtype}, JAX ${numerics.jax}`],
    ["off a full pass by", numerics?.cached_minus_full_nats == null ? null
      : `${numerics.cached_minus_full_nats.toFixed(4)} nats, on a probe`],
  ].filter(([, value]) => value).map(([term, value]) => [term, escaped(value)]);
}

/** The facts as elements; in a diff, a value that differs is shown with the one before. */
function factNodes(run, before = null) {
  const old = before && new Map(facts(before));
  return facts(run).map(([term, value]) => el("div", "", el("dt", "", term), el("dd", "",
    old && old.get(term) !== value ? `${old.get(term) ?? ""} → ${value}` : value)));
}

/* ---- the panel: everything about one token ---- */

const coversText = (panel) => Boolean(getComputedStyle(panel).getPropertyValue("--covers-text"));

function closeButton() {
  const close = el("button", "close", "×");
  close.type = "button";
  close.setAttribute("aria-label", "Close");
  return close;
}

function panelFor(page, sample, index) {
  const token = sample.tokens[index], diff = page.kind === "diff";
  const levels = levelsOf(token, page.kind, page.vocabSize);
  return [
    el("header", "", el("code", `big ${levels}`, ...visible(token.token)),
      el("p", "place", placeOf(sample, index)), closeButton()),
    diff ? scoresOfBoth(token) : scores(token),
    details(page, sample, index),
    ...(token.top.length ? [alternatives(page, sample, index)] : []),
  ];
}

const placeOf = ({ tokens }, index) =>
  `${tokens[index].phase}, token ${grouped(index + 1)} of ${grouped(tokens.length)}`;

function scores(token) {
  if (token.logprob === null) {
    return el("p", "score", el("span", "", "The first token of a text has nothing before it that "
      + "could predict it: it has no probability."));
  }
  return el("p", "score", el("b", "", percent(token.logprob)),
    token.rank === null ? "" : el("span", "", `rank ${grouped(token.rank)}`), el("span", "", `one in ${oneIn(token.logprob)}`));
}

function scoresOfBoth(token) {
  const change = changeOf(token), { before } = token;
  if (change === null) return scores(token);
  return el("p", "score", el("b", "", `${percent(before.logprob)} → ${percent(token.logprob)}`),
    el("span", "", `rank ${grouped(before.rank)} → ${grouped(token.rank)}`),
    el("span", "", `${signed(change)} nats: ${change < 0 ? "÷" : "×"} ${oneIn(-Math.abs(change))}`));
}

function details(page, sample, index) {
  const token = sample.tokens[index], rows = [["id", String(token.id)]];
  rows.push(["bytes", token.bytes.length ? hex(token.bytes) : "none"]);
  const cell = sharedCell(sample, index);
  if (cell) {
    const nth = index - cell.start + 1;
    rows.push(["shares", el("span", "", el("code", "", ...visible(cell.text)),
      ` with ${cell.tokens.length - 1} more: part ${nth} of ${cell.tokens.length}, together `
      + percent(joint(cell.tokens).logprob))]);
  } else if (token.utf8 !== "ok") rows.push(["UTF-8", token.utf8]);
  if (token.logprob !== null) {
    const was = token.before ? (value) => `${nats(value)} → ` : () => "";
    rows.push(["surprisal", was(negative(token.before?.logprob ?? null))
      + `${nats(negative(token.logprob))} nats, ${nats(negative(token.logprob) / Math.LN2)} bits`]);
    if (token.entropy !== null) rows.push(["entropy", was(token.before?.entropy) + `${nats(token.entropy)} nats`
      + (token.before ? "" : `, as ${oneIn(-token.entropy)} equal choices`)]);
  }
  if (token.kept_mass !== null && token.kept_tokens < page.vocabSize) {
    rows.push(["kept mass",
      `${percent(Math.log(token.kept_mass))} in ${counted(token.kept_tokens, "token")}`]);
  }
  if (token.sampling_logprob !== null) {
    const effect = effectOfSampling(token);
    rows.push(["drawn with", `${percent(token.sampling_logprob)}, ${effect < 0 ? "÷" : "×"} `
      + oneIn(-Math.abs(effect))]);
  }
  rows.push(["begins at",
    `character ${grouped(token.text_offset)}, byte ${grouped(token.byte_offset)}`]);
  return el("dl", "", ...rows.map(([term, value]) =>
    el("div", "", el("dt", "", term), el("dd", "", value))));
}

/** The tokens that share a character with this one, or null. */
function sharedCell({ tokens, starts }, index) {
  const start = starts[index], next = starts.findIndex((one, i) => i > index && one !== start);
  const shared = tokens.slice(start, next < 0 ? tokens.length : next), text = textOf(shared);
  return shared.length > 1 && text ? { start, tokens: shared, text } : null;
}

/** Bars of what the model gave to the likeliest tokens, and under them what they were drawn with
    (or, in a diff, what they had before). */
function alternatives(page, sample, index) {
  const token = sample.tokens[index], diff = page.kind === "diff";
  const run = token.run ?? page.run;
  const rows = diff ? rowsOfBoth(token, run) : rowsOf(token, run);
  const full = axisFor(rows);
  const list = el("ol", "alternatives", ...rows.map((row) => {
    const name = el(page.branching ? "button" : "span", "token", ...visible(row.token));
    if (page.branching) {
      name.type = "button";
      name.title = "Go on from here with this token";
      name.addEventListener("click", () => document.dispatchEvent(new CustomEvent("alternative",
        { detail: { sample: sample.name, index, token, alternative: row } })));
    }
    const item = el("li", `${row.chosen ? "chosen " : ""}${row.cut ? "cut" : ""}`.trim(),
      el("span", "rank", row.rank === null ? "" : grouped(row.rank)), name, bars(row, full),
      el("span", "value", percent(row.logprob)));
    item.title = [`id ${row.id}`, row.chosen && "chosen", row.cut && "cut by sampling",
      row.second !== null && `${diff ? "before" : "drawn with"} ${percent(row.second)}`]
      .filter(Boolean).join(" · ");
    return item;
  }));
  const drawn = rows.some((row) => row.second !== null), cut = rows.some((row) => row.cut);
  return el("section", "", el("h3", "", "What else it considered"),
    el("p", "axis", el("span", "", "0"), el("span", "", `${100 * full} %`)), list,
    rest(rows, page),
    el("p", "marks", el("span", "key-first", diff ? "after" : "model"),
      drawn ? el("span", "key-second", diff ? "before" : "drawn with") : "",
      cut ? el("span", "key-cut", "cut by sampling") : "",
      el("span", "key-chosen", token.phase === "generated" ? "chosen" : "in the text")));
}

/** Up to which probability the bars go: few steps, so that bars of neighbours can be compared. */
function axisFor(rows) {
  const largest = Math.max(...rows.flatMap((row) => [row.logprob, row.second ?? -Infinity]));
  return [0.02, 0.05, 0.1, 0.2, 0.5].find((step) => Math.exp(largest) <= step) ?? 1;
}

function bars(row, full) {
  const bar = (className, logprob) => {
    const fill = el("span", className);
    fill.style.width = `${(100 * Math.exp(logprob)) / full}%`;
    return fill;
  };
  const both = [bar("first", row.logprob)];
  if (row.second !== null) both.push(bar("second", row.second));
  const box = el("span", "bars", ...both);
  box.setAttribute("aria-hidden", "true");
  return box;
}

/** The listed tokens, and among them the token itself, by rank. Older records do not say the rank of
    a listed token; there the watched ones come after the likeliest, at unknown ranks. */
function rowsOf(token, run) {
  const row = (entry, rank) => {
    const chosen = entry.id === token.id;
    return { ...entry, rank: chosen ? token.rank : entry.rank ?? rank, chosen,
             cut: entry.kept === false, second: drawnWith(entry, token, run) };
  };
  const rows = token.top.map((entry, i) => row(entry, i < (run?.top ?? Infinity) ? i + 1 : null));
  if (!rows.some((entry) => entry.chosen) && token.logprob !== null) {
    const { id, bytes, logprob, rank, kept_tokens, sampling_logprob } = token;
    const { logit_bias, min_tokens } = run?.sampling ?? {};
    const kept = sampling_logprob !== null ? true  // it was drawn
      : kept_tokens === null || logit_bias || min_tokens ? null : rank <= kept_tokens;
    const own = row({ id, token: token.token, bytes, logprob, kept }, rank);
    const behind = rows.findIndex((one) =>
      one.rank === null ? one.logprob < logprob : one.rank > rank);
    rows.splice(behind < 0 ? rows.length : behind, 0, own);
  }
  return rows;
}

/** The log-probability that an alternative was drawn with: it has the same temperature and the same
    normaliser as the token that was drawn. null if it is not known. */
function drawnWith(entry, token, run) {
  const { temperature, logit_bias = {} } = run?.sampling ?? {};
  if (token.sampling_logprob === null || !entry.kept) return null;
  if (entry.id === token.id) return token.sampling_logprob;
  if (!temperature) return null;
  const score = ({ id, logprob }) => (logprob + (logit_bias[id] ?? 0)) / temperature;
  return Math.min(0, token.sampling_logprob + score(entry) - score(token));
}

function rowsOfBoth(token, run) {
  const before = new Map(token.before.top.map((entry) => [entry.id, entry]));
  if (token.before.logprob !== null) before.set(token.id, token.before);
  return rowsOf(token, run).map((row) => ({ ...row, cut: false,
    second: before.get(row.id)?.logprob ?? null }));
}

function rest(rows, page) {
  const mass = 1 - rows.reduce((total, row) => total + Math.exp(row.logprob), 0);
  const count = page.vocabSize - rows.length;
  if (count < 1) return "";
  return el("p", "rest", `${count === 1 ? "1 other has" : `${grouped(count)} others share`} ${percent(Math.log(Math.max(mass, 1e-9)))}`);
}

/* ---- the table ---- */

const COLUMNS = {
  tokens: [
    ["probability", (t) => t.logprob, (t) => (t.logprob === null ? "–" : percent(t.logprob)), "p"],
    ["surprisal", (t) => negative(t.logprob), (t) => nats(negative(t.logprob)), "s"],
    ["rank", (t) => t.rank, (t) => rankText(t.rank), "r"],
    ["entropy", (t) => t.entropy, (t) => nats(t.entropy), "e"],
    ["effect of sampling", effectOfSampling, (t) => signed(effectOfSampling(t)), "m"],
  ],
  diff: [
    ["change", (t) => changeOf(t), (t) => signed(changeOf(t)), "x"],
    ["before", (t) => t.before.logprob, (t) => percent(t.before.logprob), "q"],
    ["after", (t) => t.logprob, (t) => percent(t.logprob), "a"],
    ["rank before", (t) => t.before.rank, (t) => rankText(t.before.rank)],
    ["rank after", (t) => t.rank, (t) => rankText(t.rank)],
  ],
};

class Table {
  constructor(page) {
    this.page = page;
    this.box = byId("all");
    this.order = { column: 0, down: false };
    this.box.addEventListener("toggle", () => { if (this.box.open) this.build(); });
  }

  columns() {
    const columns = [
      ["position", (t, s, i) => i, (t, s, i) => String(i)],
      ["token", (t) => t.token, null],
      ["id", (t) => t.id, (t) => String(t.id)],
      ...COLUMNS[this.page.kind],
    ];
    if (this.page.samples.size === 1) return columns;
    return [["sample", (t, s) => s.name, (t, s) => String(s.name)], ...columns];
  }

  build() {
    const columns = this.columns();
    const head = el("tr", "", ...columns.map(([name], column) => {
      const button = el("button", "", name);
      button.type = "button";
      button.addEventListener("click", () => this.sortBy(column));
      const cell = el("th", name === "token" ? "text-column" : "", button);
      cell.scope = "col";
      return cell;
    }));
    this.body = el("tbody");
    this.more = el("button", "more");
    this.more.type = "button";
    this.more.addEventListener("click", () => this.appendRows());
    new IntersectionObserver(([seen]) => { if (seen.isIntersecting) this.appendRows(); })
      .observe(this.more);
    const table = el("table", "", el("thead", "", head), this.body);
    const scroll = el("div", "scroll", table, this.more);
    this.box.replaceChildren(this.box.querySelector("summary"), scroll);
    this.head = head;
    this.rows = [...this.page.samples.values()].flatMap((sample) =>
      sample.tokens.map((token, index) => ({ sample, token, index })));
    this.sort();
  }

  sortBy(column) {
    // Most telling first: the least probable tokens, or the largest values of other columns.
    const upwards = ["sample", "position", "token", "id", "probability", "before", "after"];
    const again = column === this.order.column;
    const down = again ? !this.order.down : !upwards.includes(this.columns()[column][0]);
    this.order = { column, down };
    this.sort();
  }

  sort() {
    const { column, down } = this.order, [, key] = this.columns()[column];
    const direction = down ? -1 : 1;
    for (const row of this.rows) row.key = key(row.token, row.sample, row.index);
    this.rows.sort((a, b) => {
      if (a.key === null || b.key === null) return (a.key === null) - (b.key === null);
      return a.key < b.key ? -direction : a.key > b.key ? direction : 0;
    });
    [...this.head.children].forEach((cell, i) => {
      if (i === column) cell.setAttribute("aria-sort", down ? "descending" : "ascending");
      else cell.removeAttribute("aria-sort");
    });
    this.shown = 0;
    this.body.replaceChildren();
    this.appendRows();
  }

  appendRows() {
    const columns = this.columns(), until = Math.min(this.shown + ROWS_AT_ONCE, this.rows.length);
    const rows = this.rows.slice(this.shown, until).map((row) => this.rowElement(row, columns));
    this.body.append(...rows);
    this.shown = until;
    this.more.hidden = until >= this.rows.length;
    this.more.textContent = counted(this.rows.length - until, "more row");
  }

  rowElement({ sample, token, index }, columns) {
    const levels = levelsOf(token, this.page.kind, this.page.vocabSize).split(" ");
    return el("tr", "", ...columns.map(([name, , show, letter]) => {
      if (name === "token") {
        const link = el("a", "", ...visible(token.token));
        link.href = `#s${sample.name}t${index}`;
        return el("td", "text-column", link);
      }
      const own = levels.find((one) => one[0] === letter);
      return el("td", own ? `own ${own}` : "", show(token, sample, index));
    }));
  }
}

/* ---- the page ---- */

class TokenPage {
  constructor(kind) {
    this.kind = kind;
    this.run = null;
    this.samples = new Map();
    this.shown = this.pinned = null;
    this.branching = false;
    this.panel = byId("panel");
    this.hint = [...this.panel.childNodes];
    this.table = new Table(this);
    this.sayBlind();
    this.listen();
  }

  /** The size of the records' vocabulary; before records come, a server's page says it. */
  get vocabSize() {
    return this.run?.tokenizer?.vocab_size ?? pageData.live?.vocab_size ?? 2;
  }

  addRecord(record) {
    if (record.type === "run") return this.setRun(record);
    if (record.sample === null) return this.endAll(record);
    let sample = this.samples.get(record.sample);
    if (!sample) this.samples.set(record.sample, (sample = new Sample(this, record.sample)));
    if (record.type === "token") sample.add(record);
    if (record.type === "end") sample.end(record);
    if (sample.stale) this.drawSoon();
  }

  setRun(run) {
    this.run = run;
    if (!byId("run").hasChildNodes()) byId("run").append(...factNodes(run, pageData.before));
    this.sayBlind();
  }

  /** The sums over all samples, if there are several. */
  endAll(record) {
    if (this.samples.size < 2) return;
    byId("samples").prepend(el("p", "end all", el("span", "", `${this.samples.size} samples`),
      ...endLine(record, "predicted")));
  }

  /** What a blind guess costs, in the legends. */
  sayBlind() {
    for (const span of document.querySelectorAll(".blind")) {
      span.textContent = Math.log(this.vocabSize).toFixed(1);
    }
  }

  truncate(name, count) {
    const { sample, index } = this.shown ?? {};
    if (sample?.name === name && index >= count) this.let_go();
    this.samples.get(name)?.truncate(count);
    // The shown token may share a character that was drawn again.
    if (this.shown && !sample.element(index).classList.contains("on")) this.show(sample, index);
    this.drawSoon();
  }

  reset() {
    this.let_go();
    this.samples.clear();
    byId("samples").replaceChildren();
    byId("run").replaceChildren();
    this.drawSoon();
  }

  /** Strips and table follow new tokens once a frame, however many came. */
  drawSoon() {
    if (this.drawing) return;
    this.drawing = true;
    requestAnimationFrame(() => {
      this.drawing = false;
      for (const sample of this.samples.values()) {
        if (sample.stale) sample.drawStrip();
        sample.stale = false;
      }
      if (this.table.box.open) this.table.build();
      if (this.shown) this.followShown(this.shown);
    });
  }

  followShown({ sample, index }) {
    sample.moveCursor(index);
    const place = this.panel.querySelector(".place");
    if (place) place.textContent = placeOf(sample, index);
  }

  show(sample, index) {
    this.unmark();
    this.shown = { sample, index };
    sample.element(index).classList.add("on");
    sample.element(index).closest(".cell")?.classList.add("on");
    sample.moveCursor(index);
    this.panel.replaceChildren(...panelFor(this, sample, index));
    this.panel.classList.add("filled");
  }

  pin(sample, index, scroll = "nearest") {
    this.show(sample, index);
    this.pinned = this.shown;
    this.panel.classList.add("pinned");
    byId("say").textContent = summary(sample.tokens[index]);
    if (scroll) sample.element(index).scrollIntoView({ block: scroll });
  }

  unmark() {
    for (const element of document.querySelectorAll(".on")) element.classList.remove("on");
    if (this.shown) this.shown.sample.section.querySelector(".cursor")?.remove();
  }

  let_go() {
    this.unmark();
    this.shown = this.pinned = null;
    this.panel.classList.remove("pinned", "filled");
    this.panel.replaceChildren(...this.hint);
  }

  tokenAt(target) {
    const element = tokenElement(target);
    return element && this.byElementId(element.id);
  }

  byElementId(id) {
    const [, name, index] = /^s(\d+)t(\d+)$/.exec(id) ?? [];
    const sample = this.samples.get(Number(name));
    return sample?.tokens[index] ? { sample, index: Number(index) } : null;
  }

  stripAt(event) {
    const strip = event.target.closest?.(".strip[role]");
    if (!strip) return null;
    const box = strip.getBoundingClientRect(), id = strip.closest(".sample").id;
    const sample = this.samples.get(Number(id.slice(1)));
    const place = Math.floor(((event.clientX - box.left) / box.width) * sample.tokens.length);
    return { sample, index: Math.min(Math.max(place, 0), sample.tokens.length - 1) };
  }

  listen() {
    const samples = byId("samples");
    samples.addEventListener("pointerover", (event) => {
      const at = this.tokenAt(event.target);
      if (!at) return;
      // The panel says the same; the browser's own tooltip would cover the text.
      at.sample.element(at.index).removeAttribute("title");
      if (this.followsPointer(event)) this.show(at.sample, at.index);
    });
    samples.addEventListener("pointermove", (event) => {
      const at = this.followsPointer(event) ? this.stripAt(event) : null;
      if (at) this.show(at.sample, at.index);
    });
    samples.addEventListener("click", (event) => {
      const inText = this.tokenAt(event.target), at = inText ?? this.stripAt(event);
      if (!at || !getSelection().isCollapsed) return;
      if (this.isPinned(at)) return this.let_go();
      this.pin(at.sample, at.index, inText ? "nearest" : "center");
    });
    this.panel.addEventListener("click", (event) => {
      if (event.target.closest(".close")) this.let_go();
    });
    document.addEventListener("keydown", (event) => this.key(event));
    addEventListener("hashchange", () => this.followHash());
  }

  /** Whether pointing at a token shows it. It does not if the panel would open over the text: the
      panel could come between the pointer and the token that is about to be clicked. */
  followsPointer(event) {
    return !this.pinned && !coversText(this.panel) && event.pointerType !== "touch";
  }

  isPinned({ sample, index }) {
    return this.pinned?.sample === sample && this.pinned.index === index;
  }

  key(event) {
    if (event.altKey || event.ctrlKey || event.metaKey || event.defaultPrevented) return;
    if (event.key === "Escape") return this.let_go();
    if (event.target.closest?.("input, button, select, textarea, summary, a")) return;
    const section = event.target.closest?.(".sample");
    const focused = section && this.samples.get(Number(section.id.slice(1)));
    const sample = focused ?? this.shown?.sample ?? this.samples.values().next().value;
    if (!sample?.tokens.length) return;
    const from = this.shown?.sample === sample ? this.shown.index : null;
    const to = this.destination(event.key, sample, from, Boolean(focused));
    if (to === null) return;
    event.preventDefault();
    this.pin(sample, to);
  }

  /** The token that a key leads to; null for keys that this page does not use. Up, Down, Home and
      End scroll the page unless a text has the focus. */
  destination(key, sample, from, focused) {
    const last = sample.tokens.length - 1;
    const bounded = (index) => Math.min(Math.max(index, 0), last);
    if (key === "ArrowRight") return from === null ? 0 : bounded(from + 1);
    if (key === "ArrowLeft") return from === null ? last : bounded(from - 1);
    if (!focused) return null;
    if (key === "Home") return 0;
    if (key === "End") return last;
    if (key === "ArrowDown") return from === null ? 0 : this.onNextLine(sample, from, 1);
    if (key === "ArrowUp") return from === null ? last : this.onNextLine(sample, from, -1);
    return null;
  }

  /** The token above or below: on the next line of the screen, nearest in x. */
  onNextLine(sample, from, step) {
    // The first rectangle: a token that holds a line break has one on each line.
    const boxOf = (index) => sample.element(index).getClientRects()[0];
    const start = boxOf(from), middle = (start.left + start.right) / 2;
    let best = from, bestDistance = Infinity, line = null;
    for (let i = from + step; i >= 0 && i < sample.tokens.length; i += step) {
      const box = boxOf(i);
      if (!box || Math.abs(box.bottom - start.bottom) < start.height) continue;
      line ??= box;
      if (Math.abs(box.bottom - line.bottom) > line.height) break;
      const distance = Math.abs((box.left + box.right) / 2 - middle);
      if (distance < bestDistance) [best, bestDistance] = [i, distance];
    }
    return best;
  }

  followHash() {
    const at = this.byElementId(location.hash.slice(1));
    if (at) this.pin(at.sample, at.index, "center");
    return Boolean(at);
  }

  /** If there is room for the panel, it opens on the most telling token. */
  showMostTelling() {
    const size = (token) => (this.kind === "diff" ? changeOf(token) : token.logprob) ?? 0;
    const weight = (token) => Math.abs(size(token)) + (token.phase === "generated" ? 1e6 : 0);
    let best = null;
    for (const sample of this.samples.values()) {
      for (const [index, token] of sample.tokens.entries()) {
        if (!best || weight(token) > best.weight) best = { sample, index, weight: weight(token) };
      }
    }
    if (best) this.show(best.sample, best.index);
  }
}

/* ---- the records that the page carries ---- */

/** The records of the JSONL file: a JSON array, gzipped, in base64. */
async function readRecords(base64) {
  const packed = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

async function fill(page) {
  for (const record of await readRecords(pageData.records)) page.addRecord(record);
  const hasRoom = matchMedia("(min-width: 62rem)").matches;
  if (!page.followHash() && hasRoom) page.showMostTelling();
  document.documentElement.dataset.filled = "";
}

const pageData = JSON.parse(byId("data").textContent);
const { kind } = document.documentElement.dataset;
fillBar(kind);
let tokenPage = null;
if (byId("samples")) {
  tokenPage = globalThis.tokenPage = new TokenPage(kind);
  if (pageData.records) fill(tokenPage);
  // A server's page shows the facts that hold for every text at once.
  else if (pageData.run) {
    const nodes = factNodes(pageData.run);
    byId("run").append(...nodes.filter((node) => node.firstChild.textContent !== "sampling"));
  }
}
