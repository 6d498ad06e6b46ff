"use strict";
/* The page of attention weights; runs after page.js, whose helpers it uses.

   The weights arrive as bytes q = round(255 sqrt(w)), rows of the lower triangles one after the
   other: the row of query t begins at t (t + 1) / 2 and has t + 1 entries. */

class Weights {
  constructor({ tokens, layers, heads }, bytes) {
    Object.assign(this, { length: tokens.length, layers, heads, bytes });
    this.triangle = (this.length * (this.length + 1)) / 2;
  }

  static async read(data) {
    const packed = Uint8Array.from(atob(data.weights), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Weights(data, new Uint8Array(await new Response(stream).arrayBuffer()));
  }

  /** The weight of key s for query t; `head` may be "mean". */
  at(layer, head, t, s) {
    if (s > t) return 0;
    if (head === "mean") {
      let total = 0;
      for (let n = 0; n < this.heads; n++) total += this.at(layer, n, t, s);
      return total / this.heads;
    }
    const start = (layer * this.heads + head) * this.triangle + (t * (t + 1)) / 2;
    return (this.bytes[start + s] / 255) ** 2;
  }
}

/* The square root makes weights of a few per cent look different from zero. */
const weightLevel = (weight) => level(Math.sqrt(weight), SEQUENTIAL_LEVELS);
const weightText = (weight) => (weight ? percent(Math.log(weight)) : "0 %");

class AttentionPage {
  constructor(data, weights) {
    this.tokens = data.tokens;
    this.weights = weights;
    this.spans = [];
    this.starts = [];
    this.drawTokens();
    this.layer = weights.layers - 1;
    this.head = 0;
    this.shown = Math.min(this.tokens.length - 1, Math.ceil(this.tokens.length / 2));
    this.pinned = false;
    // A panel that covers the text opens when somebody asks for a token.
    this.open = !coversText(byId("panel"));
    this.hint = [...byId("panel").childNodes];
    byId("layer").value = this.layer;
    byId("head").value = this.head;
    this.makeHeads();
    this.listen();
    this.recolour();
  }

  /** Tokens that share a character stand under it, as on the page of probabilities. */
  drawTokens() {
    while (this.starts.length < this.tokens.length) {
      const start = cellStart(this.tokens, this.starts);
      this.starts.fill(start, start).push(start);
    }
    const makeNode = (index, inner, named) => {
      const span = el("span", named ? "t name" : "t", ...inner);
      span.id = `t${index}`;
      return (this.spans[index] = span);
    };
    for (let start = 0, end; start < this.tokens.length; start = end) {
      end = start + this.cellOf(start).length;
      byId("attended").append(...cellNodes(this.tokens.slice(start, end),
        (i, inner, named) => makeNode(start + i, inner, named), ""));
    }
  }

  /** The tokens that share a character with this one, itself included. */
  cellOf(index) {
    const start = this.starts[index];
    let end = index + 1;
    while (this.starts[end] === start) end++;
    return this.tokens.slice(start, end);
  }

  /** A token as it is named in lists: its text, or its share of a character. */
  nameOf(index) {
    const cell = this.cellOf(index), text = textOf(cell);
    if (cell.length === 1 || !text) return visible(this.tokens[index].token);
    return [...visible(text), el("small", "", ` ${index - this.starts[index] + 1}/${cell.length}`)];
  }

  get looking() { return byId("way-to").checked; }

  /** The weight between the shown token and another, in the chosen direction. */
  weightOf(other) {
    const [t, s] = this.looking ? [this.shown, other] : [other, this.shown];
    return this.weights.at(this.layer, this.head, t, s);
  }

  show(index) {
    this.shown = index;
    const weights = this.tokens.map((_, other) => this.weightOf(other));
    this.spans.forEach((span, other) => {
      const { classList } = span, levelClass = `w${weightLevel(weights[other])}`;
      classList.remove(...[...classList].filter((name) => /^w\d+$/.test(name)));
      classList.add(levelClass);
      classList.toggle("on", other === index);
    });
    // A shared character has the largest weight of its tokens, as a pixel of the map has.
    for (const cell of byId("attended").querySelectorAll(".cell")) {
      const own = [...cell.querySelectorAll(".t")].map((span) => Number(span.id.slice(1)));
      cell.classList.toggle("on", own.includes(index));
      cell.firstChild.className = `w${weightLevel(Math.max(...own.map((one) => weights[one])))}`;
    }
    if (this.open) this.fillPanel(index, weights);
    this.moveMark();
  }

  fillPanel(index, weights) {
    const order = weights.map((weight, other) => [weight, other])
      .filter(([weight]) => weight > 0).sort((a, b) => b[0] - a[0]).slice(0, 12);
    const rows = order.map(([weight]) => ({ logprob: Math.log(weight), second: null }));
    const full = axisFor(rows);
    const list = el("ol", "alternatives", ...order.map(([weight, other], i) =>
      el("li", other === index ? "chosen" : "", el("span", "rank", String(other)),
        el("span", "token", ...this.nameOf(other)),
        bars(rows[i], full),
        el("span", "value", weightText(weight)))));
    const direction = this.looking ? "it looks at" : "looked at by";
    const said = `layer ${this.layer}, head ${this.head}: ${direction}`;
    byId("panel").replaceChildren(
      el("header", "", el("code", "big", ...this.nameOf(index)),
        el("p", "", `position ${index}, from 0 to ${this.tokens.length - 1}`), closeButton()),
      el("h3", "", said),
      el("p", "axis", el("span", "", "0"), el("span", "", `${100 * full} %`)), list);
    byId("panel").classList.add("filled");
  }

  pin(index) {
    this.pinned = this.open = true;
    this.show(index);
    this.spans[index].scrollIntoView({ block: "nearest" });
    const weights = this.tokens.map((_, other) => this.weightOf(other));
    const most = weights.indexOf(Math.max(...weights));
    byId("say").textContent = `${escaped(this.tokens[index].token)}: most with `
      + `${escaped(this.tokens[most].token)}, ${weightText(weights[most])}`;
  }

  /** The panel follows the pointer again, or is closed if it covers the text. */
  letGo() {
    this.pinned = false;
    this.open = !coversText(byId("panel"));
    if (this.open) return;
    byId("panel").replaceChildren(...this.hint);
    byId("panel").classList.remove("filled");
  }

  choose(layer, head) {
    this.layer = layer;
    this.head = head;
    byId("layer").value = layer;
    byId("head").value = head;
    for (const button of document.querySelectorAll("#heads button")) {
      button.setAttribute("aria-pressed", String(button.value === `${layer},${head}`));
    }
    this.draw(byId("map"), this.tokens.length, layer, head);
    this.show(this.shown);
  }

  /** Outlines the shown token's row in the map, or its column. */
  moveMark() {
    const [start, size] = [(100 * this.shown) / this.tokens.length, 100 / this.tokens.length];
    Object.assign(byId("mark").style, this.looking
      ? { top: `${start}%`, height: `${size}%`, left: 0, width: "100%" }
      : { left: `${start}%`, width: `${size}%`, top: 0, height: "100%" });
  }

  /** Reads the colours of the chosen theme, for the canvases. */
  recolour() {
    const probe = el("span");
    document.body.append(probe);
    this.colours = Array.from({ length: SEQUENTIAL_LEVELS }, (_, one) => {
      probe.className = `w${one}`;
      return getComputedStyle(probe).backgroundColor.match(/[\d.]+/g).slice(0, 3).map(Number);
    });
    probe.remove();
    for (const button of document.querySelectorAll("#heads button")) {
      const [layer, head] = button.value.split(",").map(Number);
      this.draw(button.querySelector("canvas"), Math.min(this.tokens.length, 32), layer, head);
    }
    this.choose(this.layer, this.head);
  }

  makeHeads() {
    const grid = el("div", "grid");
    grid.style.gridTemplateColumns = `auto repeat(${this.weights.heads}, minmax(1.2rem, 3rem))`;
    for (let layer = 0; layer < this.weights.layers; layer++) {
      grid.append(el("span", "label", `layer ${layer}`));
      for (let head = 0; head < this.weights.heads; head++) {
        const button = el("button", "", el("canvas"));
        button.type = "button";
        button.value = `${layer},${head}`;
        button.title = `layer ${layer}, head ${head}`;
        button.setAttribute("aria-label", button.title);
        button.addEventListener("click", () => this.choose(layer, head));
        grid.append(button);
      }
    }
    byId("heads").append(grid);
  }

  /** Queries downwards, keys to the right; a pixel that stands for several weights shows the
      largest of them. */
  draw(canvas, size, layer, head) {
    canvas.width = canvas.height = size;
    const context = canvas.getContext("2d"), image = context.createImageData(size, size);
    const bounds = Array.from({ length: size + 1 },
      (_, i) => Math.floor((i * this.tokens.length) / size));
    for (let y = 0; y < size; y++) {
      for (let x = 0; x <= y; x++) {
        let most = 0;
        for (let t = bounds[y]; t < bounds[y + 1]; t++) {
          for (let s = bounds[x]; s < bounds[x + 1] && s <= t; s++) {
            most = Math.max(most, this.weights.at(layer, head, t, s));
          }
        }
        const pixel = 4 * (y * size + x);
        image.data.set(this.colours[weightLevel(most)], pixel);
        image.data[pixel + 3] = 255;
      }
    }
    context.putImageData(image, 0, 0);
  }

  listen() {
    const text = byId("attended"), map = byId("map");
    const indexOf = (target) => {
      const id = tokenElement(target)?.id;
      return id ? Number(id.slice(1)) : null;
    };
    text.addEventListener("pointerover", (event) => {
      const index = indexOf(event.target);
      if (index !== null && !this.pinned && event.pointerType !== "touch") this.show(index);
    });
    byId("panel").addEventListener("click", (event) => {
      if (event.target.closest(".close")) this.letGo();
    });
    text.addEventListener("click", (event) => {
      const index = indexOf(event.target);
      if (index === null) return;
      if (this.pinned && index === this.shown) this.letGo();
      else this.pin(index);
    });
    map.addEventListener("click", (event) => {
      const box = map.getBoundingClientRect();
      const [across, down] = [event.clientX - box.left, event.clientY - box.top];
      const place = this.looking ? down / box.height : across / box.width;
      this.pin(Math.min(Math.floor(place * this.tokens.length), this.tokens.length - 1));
    });
    document.addEventListener("keydown", (event) => this.key(event));
    const headOf = () => (byId("head").value === "mean" ? "mean" : Number(byId("head").value));
    const chosen = () => this.choose(Number(byId("layer").value), headOf());
    byId("layer").addEventListener("change", chosen);
    byId("head").addEventListener("change", chosen);
    for (const way of document.querySelectorAll("[name=way]")) {
      way.addEventListener("change", chosen);
    }
    for (const theme of document.querySelectorAll("[name=theme]")) {
      theme.addEventListener("change", () => this.recolour());
    }
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.recolour());
  }

  key(event) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key === "Escape") return this.letGo();
    if (event.target.closest?.("input, button, select, summary")) return;
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    this.pin(Math.min(Math.max(this.shown + step, 0), this.tokens.length - 1));
  }
}

if (byId("attended")) {
  for (const [name, count] of [["layer", pageData.layers], ["head", pageData.heads]]) {
    for (let index = 0; index < count; index++) byId(name).append(new Option(index, index));
  }
  Weights.read(pageData).then((weights) => {
    globalThis.attentionPage = new AttentionPage(pageData, weights);
  });
}
