/* The live page: asks the server for tokens, shows them as they come, takes other branches.

   The page shows one of a list of branches. A branch is the token records of a text, drawn by
   page.js. It shares its beginning, record by record, with the branch that it left. The server is
   asked for it by token ids, so it goes on from exactly these tokens. Each branch also keeps the
   records as the server sent them last, and these can be saved: in them all that the model was given
   is prompt, while the page still shows with what probability each token was once drawn.

   Runs after page.js, in one script with it. live_view.py describes requests and answers. */

/* ---- the wire ---- */

/** An error whose message is written for people. */
class Failure extends Error {}

/** Reads Server-Sent Events from pieces of text, which may be cut anywhere.
    https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation */
class EventParser {
  constructor() {
    this.rest = "";
    this.data = [];
  }

  /** The data of each event that this piece completes. */
  push(piece) {
    // A carriage return at the very end may be the first half of a line's end.
    const lines = (this.rest + piece).split(/\r\n|\n|\r(?!$)/), events = [];
    this.rest = lines.pop();
    for (const line of lines) {
      const [, field, value] = /^([^:]*):? ?([^]*)$/.exec(line);
      if (field === "data") this.data.push(value);
      if (line || !this.data.length) continue;
      events.push(this.data.join("\n"));
      this.data = [];
    }
    return events;
  }
}

const UNREACHABLE = "The server cannot be reached. Is it still running?";
const WENT_AWAY = "The server went away before the text was finished. What had come is kept.";

/** The records of one answer, as an array each time that some have come.
    Throws a Failure, or the signal's AbortError. */
async function* answers(request, signal) {
  const response = await orFailure(UNREACHABLE, signal, fetch("v1/completions", {
    method: "POST", headers: { "Content-Type": "application/json" },
    body: JSON.stringify(request), signal }));
  if (!response.ok) throw new Failure(await orFailure(WENT_AWAY, signal, refusal(response)));
  const reader = response.body.getReader();
  const decoder = new TextDecoder(), parser = new EventParser();
  for (;;) {
    const { done, value } = await orFailure(WENT_AWAY, signal, reader.read());
    for (const data of parser.push(decoder.decode(value, { stream: !done }))) {
      if (data === "[DONE]") return;
      const { records, error } = JSON.parse(data);
      if (error) throw new Failure(error.message);
      if (records?.length) yield records;
    }
    if (done) throw new Failure(WENT_AWAY);
  }
}

/** Awaits a promise; if the network breaks it, throws a Failure with this message. */
async function orFailure(message, signal, promise) {
  try {
    return await promise;
  } catch (error) {
    throw signal.aborted ? error : new Failure(message);
  }
}

/** Why a request was refused: the server's message, or the answer of a proxy before it. */
async function refusal(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `The server answered ${response.status} ${response.statusText}: ${text.slice(0, 300)}`;
  }
}

/* ---- one text ---- */

class Branch {
  /** `left` says which branch it leaves and where: {branch, index, alternative}. Without `left` it
      begins with the text `label`. */
  constructor({ label = "", left = null }) {
    this.label = label;
    this.left = left;
    this.tokens = left ? left.branch.tokens.slice(0, left.index) : [];
    this.run = left ? left.branch.run : null;
    this.received = [];
    this.end = null;
    this.number = 0;
    this.wait();
  }

  wait() {
    this.state = "waiting";
    this.clock = { asked: performance.now(), last: 0, drawn: 0 };
  }

  hear(records) {
    this.state = "writing";
    for (const record of records) {
      if (record.type === "run") this.begin(record);
      else this.received.push(record);
      if (record.type === "token") this.place(record);
      if (record.type === "end") this.end = record;
    }
    this.clock.drawn += records.filter((record) => record.phase === "generated").length;
    this.clock.last = performance.now();
  }

  begin(run) {
    // Another checkpoint's numbers for the same tokens do not hold for this one.
    const another = this.run?.checkpoint.params_sha256 !== run.checkpoint.params_sha256;
    if (another) this.tokens = [];
    this.run = run;
    this.received = [run];
    this.end = null;
  }

  place(record) {
    const { position, text, utf8 } = record, known = this.tokens[position];
    if (known?.text === text && known.utf8 === utf8) return;
    // A text may have ended inside a character, which is open again now that more follows.
    this.tokens[position] = known ? { ...known, text, utf8 } : { ...record, run: this.run };
  }

  get ids() { return this.tokens.map((token) => token.id); }

  /** Measured from the request on: tokens that come in one piece say nothing about their pace. */
  get tokensPerSecond() {
    const { asked, last, drawn } = this.clock;
    return drawn && last > asked ? (1000 * drawn) / (last - asked) : null;
  }

  /** The sums over the tokens that the model wrote, or over all predicted tokens if the text was only
      scored. */
  get sums() {
    const predicted = this.tokens.filter((token) => token.logprob !== null);
    const written = predicted.filter((token) => token.phase === "generated");
    const counted = written.length ? written : predicted;
    const total = 0 - counted.reduce((most, token) => most + token.logprob, 0);
    const size = counted.reduce((bytes, token) => bytes + token.bytes.length, 0);
    return { written: written.length > 0, tokens: counted.length, nats: total,
      perplexity: counted.length ? Math.exp(total / counted.length) : null,
      bitsPerByte: size ? total / (Math.LN2 * size) : null };
  }

  /** The records as a file of `--probs` has them: JSON lines in ASCII. */
  get jsonLines() {
    const escape = (unit) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, "0")}`;
    return this.received.map((record) =>
      `${JSON.stringify(record).replace(/[\u007f-\uffff]/g, escape)}\n`).join("");
  }
}

/* ---- the page ---- */

class LivePage {
  constructor(page, live) {
    this.page = page;
    this.live = live;
    this.branches = [];
    this.visited = [];
    this.current = this.running = null;
    page.branching = true;
    this.form = byId("compose");
    this.form.hidden = false;
    this.invitation = byId("progress").textContent;
    this.prompt = byId("prompt");
    this.prompt.value ||= live.prompt;  // after a reload the browser may have put back a text
    this.listen();
  }

  listen() {
    const on = (id, action) => byId(id).addEventListener("click", action);
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.write();
    });
    this.form.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey) || event.repeat) return;
      event.preventDefault();
      this.form.requestSubmit();
    });
    on("stop", () => { this.stop(); byId("write").focus(); });
    on("score", () => { if (this.form.reportValidity()) this.score(); });
    on("go-on", () => { if (this.form.reportValidity()) this.goOn(); });
    on("save", () => this.save());
    on("back", () => this.show(this.visited.pop(), { back: true }));
    document.addEventListener("alternative", ({ detail }) => {
      if (this.form.reportValidity()) this.take(detail);
    });
  }

  /* The actions of a person */

  write() { this.ask(new Branch({ label: this.prompt.value }), this.prompt.value); }

  score() {
    if (!this.prompt.value) return this.complain("There is no text to score: the box is empty.");
    this.ask(new Branch({ label: this.prompt.value }), this.prompt.value, { max_tokens: 0 });
  }

  goOn() { this.ask(this.current, this.current.ids); }

  take({ index, alternative }) {
    const branch = new Branch({ left: { branch: this.current, index, alternative } });
    this.pinNext = { branch, index, focus: this.page.panel.contains(document.activeElement) };
    this.ask(branch, [...branch.ids, alternative.id]);
  }

  stop() { this.running?.controller.abort(); }

  /** The settings of the form, as a request has them. */
  settings() {
    const inputs = [...this.form.querySelectorAll("input[type=number]")];
    const anySeed = Math.floor(Math.random() * 2 ** 31);
    return Object.fromEntries(inputs.map((input) =>
      [input.name, input.value === "" ? anySeed : input.valueAsNumber]));
  }

  /** Asks for the continuation of a prompt (a text or ids), and puts the answer into a branch. */
  async ask(branch, prompt, settings = {}) {
    this.stop();
    const controller = new AbortController(), running = { branch, controller };
    const request = { model: this.live.model, prompt, echo: true, stream: true,
      ...this.settings(), ...settings };
    const stateBefore = branch.state;
    this.running = running;
    branch.wait();
    this.complain("");
    this.drawSoon();
    try {
      await this.listenTo(branch, answers(request, controller.signal));
      branch.state = "done";
    } catch (error) {
      const { aborted } = controller.signal, began = branch.state === "writing";
      branch.state = began ? (aborted ? "stopped" : "failed") : stateBefore;
      if (!aborted) this.complain(error.message);
    }
    if (this.running === running) this.running = null;
    this.tellEnd(branch);
    this.drawSoon();
  }

  /** A new branch is shown when its first new token comes: until then the text before it stays. */
  async listenTo(branch, answers) {
    const kept = branch.tokens.length;
    for await (const records of answers) {
      branch.hear(records);
      if (!branch.number && branch.tokens.length > kept) this.add(branch);
      this.drawSoon();
    }
  }

  add(branch) {
    branch.number = this.branches.push(branch);
    this.show(branch);
    // Where the settings fill the window, as on a phone, the text would begin below it.
    const { top } = byId("progress").getBoundingClientRect();
    if (top < 0 || this.floor - top < innerHeight / 3) byId("progress").scrollIntoView();
  }

  show(branch, { back = false } = {}) {
    if (branch === this.current) return;
    if (this.current && !back) this.visited.push(this.current);
    this.current = branch;
    this.drawSoon();
  }

  complain(message) {
    const line = byId("error");
    line.hidden = !message;
    line.textContent = message;
  }

  tellEnd(branch) {
    if (!branch.number) return;
    byId("say").textContent = statusParts(branch).map((part) => part.join("")).join(", ");
  }

  save() {
    const link = el("a");
    link.href = URL.createObjectURL(new Blob([this.current.jsonLines]));
    link.download = `${this.live.model.replace(/[^\w.-]+/g, "-")}-${this.current.number}.jsonl`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  }

  /* Drawing, once a frame, however many tokens came */

  drawSoon() {
    if (this.drawing) return;
    this.drawing = true;
    requestAnimationFrame(() => {
      this.drawing = false;
      this.draw();
    });
  }

  draw() {
    const { current, running } = this;
    byId("stop").disabled = !running;
    byId("samples").setAttribute("aria-busy", Boolean(running));
    this.drawProgress();
    if (!current) return;
    const follows = this.endIsInSight();
    this.drawTokens();
    this.drawBranches();
    byId("after").hidden = !current.tokens.length;
    byId("go-on").disabled = Boolean(running) || current.tokens.length >= this.live.context_length;
    this.pinWhatWasTaken();
    if (follows && running?.branch === current) this.bringEndInSight();
  }

  /** The shown tokens and the branch have a beginning in common, which is left alone. */
  drawTokens() {
    const { page, current } = this;
    const shown = page.samples.get(0)?.tokens ?? [], wanted = current.tokens;
    let same = 0;
    while (same < shown.length && shown[same] === wanted[same]) same++;
    if (page.run !== current.run) {
      byId("run").replaceChildren();
      page.addRecord(current.run);
    }
    if (same < shown.length) page.truncate(0, same);
    for (const token of wanted.slice(same)) page.addRecord(token);
  }

  drawProgress() {
    const { current, running } = this, line = byId("progress");
    if (running?.branch.state === "waiting") return line.replaceChildren("Waiting for the model …");
    if (!current) return line.replaceChildren(this.invitation);
    line.replaceChildren(...statusParts(current).map(([before, value, after]) =>
      el("span", "", before, el("b", "", value), after)));
  }

  drawBranches() {
    const nav = byId("branches"), list = nav.querySelector("ol");
    nav.hidden = this.branches.length < 2;
    byId("back").disabled = !this.visited.length;
    for (const branch of this.branches.slice(list.children.length)) {
      const button = el("button", "", ...nameOf(branch));
      button.type = "button";
      button.addEventListener("click", () => this.show(branch));
      list.append(el("li", "", button));
    }
    for (const [i, item] of [...list.children].entries()) {
      const button = item.firstElementChild, here = this.branches[i] === this.current;
      if (here) button.setAttribute("aria-current", "true");
      else button.removeAttribute("aria-current");
    }
  }

  /** The chosen token stays in the panel, so that another one can be tried in its place. */
  pinWhatWasTaken() {
    const { branch, index, focus } = this.pinNext ?? {};
    if (branch !== this.current || !branch.tokens[index]) return;
    this.pinNext = null;
    this.page.pin(this.page.samples.get(0), index, null);
    if (focus) this.page.panel.querySelector(".chosen button")?.focus({ preventScroll: true });
  }

  /** How far down the window shows text; on a phone the panel covers the rest. */
  get floor() {
    const { panel } = this.page, covers = getComputedStyle(panel).position === "fixed";
    return covers ? panel.getBoundingClientRect().top : innerHeight;
  }

  endIsInSight() { return byId("after").getBoundingClientRect().bottom <= this.floor; }

  bringEndInSight() {
    const below = byId("after").getBoundingClientRect().bottom - this.floor;
    if (below > 0 && !this.page.pinned) scrollBy(0, below + 8);
  }
}

/** How far a branch has come, as [before, number, after]. */
function statusParts(branch) {
  const { written, tokens, nats: total, perplexity, bitsPerByte } = branch.sums;
  const rate = branch.tokensPerSecond;
  const parts = [["", grouped(tokens),
    ` token${tokens === 1 ? "" : "s"} ${written ? "written" : "predicted"}`]];
  if (rate !== null) parts.push(["", grouped(rate, rate < 10 ? 1 : 0), " tokens/s"]);
  parts.push({ writing: ["", "writing", ""], stopped: ["", "stopped", ""],
    failed: ["", "broken off", ""], waiting: ["", "waiting", ""],
    done: ["finish: ", branch.end?.finish ?? "unknown", ""] }[branch.state]);
  if (tokens) parts.push(["", grouped(total, 2), " nats"]);
  if (perplexity !== null) parts.push(["perplexity ", grouped(perplexity, 2), ""]);
  if (bitsPerByte !== null) parts.push(["", grouped(bitsPerByte, 2), " bits per byte"]);
  return parts;
}

/** The name of a branch in the list. */
function nameOf({ number, label, left }) {
  const begin = Array.from(escaped(label.slice(0, 60))).slice(0, 22).join("");
  const name = el("b", "", String(number));
  if (!left) return [name, label ? el("code", "", ...visible(begin)) : " from an empty text"];
  return [name, ` from ${left.branch.number}, token ${grouped(left.index + 1)}: `,
    el("code", "", ...visible(left.alternative.token))];
}

globalThis.livePage = new LivePage(tokenPage, pageData.live);
