// What runs on the page of an Explorer: the weights, what is chosen and pointed at, the drawing, the input.
// Text that comes from outside (tokens, titles, paths) only ever reaches the document as textContent.
"use strict";

(async () => {
  const $ = (id) => document.getElementById(id);
  const page = JSON.parse($("page").textContent);
  const QUERIES = 0, KEYS = 1;

  // ---- Weights ------------------------------------------------------------------------------------------------------

  function bytesOf(id) {
    const text = $(id).textContent;
    if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
    const raw = atob(text), bytes = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
    return bytes;
  }

  function joinPlanes(bytes, start, count, size) {
    const joined = new Uint8Array(count * size);
    for (let plane = 0; plane < size; plane++) {
      for (let i = 0; i < count; i++) joined[i * size + plane] = bytes[start + plane * count + i];
    }
    return joined.buffer;
  }

  const table = Float32Array.from({ length: 256 }, (_, code) => (code === page.nothing ? 0 : Math.exp(-page.step * code)));

  class Maps {
    // The weights of one example: a byte each, and of each row the largest exactly.
    static async load(number) {
      const stream = new Blob([bytesOf(`weights${number}`)]).stream().pipeThrough(new DecompressionStream("gzip"));
      return new Maps(page.examples[number], new Uint8Array(await new Response(stream).arrayBuffer()));
    }

    constructor(example, bytes) {
      [this.layers, this.heads, this.queries, this.keys] = example.shape;
      this.count = example.top;
      this.special = example.sides.map((side) => side.special);
      this.sizes = [this.queries, this.keys];
      const rows = this.layers * this.heads * this.queries, exact = rows * this.count;
      this.values = new Float32Array(joinPlanes(bytes, 0, exact, 4));
      this.places = new Uint16Array(joinPlanes(bytes, exact * 4, exact, 2));
      this.codes = bytes.subarray(exact * 6);
      this.mixed = [];
    }

    row(layer, head, query) {
      return (layer * this.heads + head) * this.queries + query;
    }

    // Whether a weight is sent exactly, not as one of 255 steps.
    isExact(layer, head, query, key) {
      const first = this.row(layer, head, query) * this.count;
      return this.places.subarray(first, first + this.count).includes(key);
    }

    at(row, key) {
      const first = row * this.count;
      for (let i = first; i < first + this.count; i++) if (this.places[i] === key) return this.values[i];
      return this.values[first] * table[this.codes[row * this.keys + key]];
    }

    // What is left of each row without its special keys. Where these are hidden, the row is divided by it.
    get rest() {
      if (!this._rest) {
        const rows = this.codes.length / this.keys, words = new Float32Array(this.keys);
        this._rest = new Float32Array(rows);
        for (let row = 0; row < rows; row++) {
          words.fill(0);
          this.addRow(words, row, 1);
          for (const key of this.special[KEYS]) words[key] = 0;
          this._rest[row] = words.reduce((sum, weight) => sum + weight, 0) || 1;
        }
      }
      return this._rest;
    }

    addRow(out, row, share) {
      const { codes, keys, count } = this, start = row * keys, first = row * count, most = this.values[first] * share;
      for (let key = 0; key < keys; key++) out[key] += most * table[codes[start + key]];
      for (let i = first; i < first + count; i++) out[this.places[i]] += share * this.values[i];
    }

    add(out, layer, head, side, token, share, hidden) {
      if (side === QUERIES) {
        const row = this.row(layer, head, token);
        this.addRow(out, row, hidden ? share / this.rest[row] : share);
        return;
      }
      for (let query = 0, row = this.row(layer, head, 0); query < this.queries; query++, row++) {
        out[query] += (hidden ? share / this.rest[row] : share) * this.at(row, token);
      }
    }

    // Rows of (mean of the heads + identity) / 2, scaled to sum to one.
    mix(layer) {
      if (!this.mixed[layer]) {
        const size = this.queries, mixed = new Float32Array(size * size);
        for (let query = 0; query < size; query++) {
          const row = mixed.subarray(query * size, (query + 1) * size);
          for (let head = 0; head < this.heads; head++) this.addRow(row, this.row(layer, head, query), 0.5 / this.heads);
          row[query] += 0.5;
          const sum = row.reduce((total, weight) => total + weight, 0);
          for (let key = 0; key < size; key++) row[key] /= sum;
        }
        this.mixed[layer] = mixed;
      }
      return this.mixed[layer];
    }

    rollout(layer, side, tokens) {
      let flow = new Float32Array(this.queries);
      for (const token of tokens) flow[token] += 1 / tokens.length;
      for (let step = 0; step <= layer; step++) {
        const mixed = this.mix(side === QUERIES ? layer - step : step), size = this.queries, next = new Float32Array(size);
        for (let query = 0; query < size; query++) {
          const start = query * size;
          if (side === QUERIES) {
            const share = flow[query];
            if (share) for (let key = 0; key < size; key++) next[key] += share * mixed[start + key];
          } else {
            let sum = 0;
            for (let key = 0; key < size; key++) sum += mixed[start + key] * flow[key];
            next[query] = sum;
          }
        }
        flow = next;
      }
      return flow;
    }

    // All rows of a head or of the mean, those of hidden queries zero.
    map(layer, head, hidden) {
      const all = new Float32Array(this.queries * this.keys);
      const heads = head === "mean" ? Array.from({ length: this.heads }, (_, each) => each) : [head];
      for (let query = 0; query < this.queries; query++) {
        if (hidden && this.special[QUERIES].includes(query)) continue;
        const out = all.subarray(query * this.keys, (query + 1) * this.keys);
        for (const each of heads) this.add(out, layer, each, QUERIES, query, 1 / heads.length, hidden);
        if (hidden) for (const key of this.special[KEYS]) out[key] = 0;
      }
      return all;
    }

    // What queries attend to, or who attends to keys: the mean over the tokens, one weight for each token opposite.
    weights(layer, head, side, tokens, hidden) {
      const opposite = 1 - side, isOut = (at, token) => hidden && this.special[at].includes(token);
      if (head === "rollout") {
        const flow = this.rollout(layer, side, tokens);
        if (hidden) {
          for (const token of this.special[opposite]) flow[token] = 0;
          const sum = flow.reduce((total, weight) => total + weight, 0);
          if (side === QUERIES && sum) flow.forEach((weight, token) => (flow[token] = weight / sum));
        }
        return flow;
      }
      const out = new Float32Array(this.sizes[opposite]);
      const heads = head === "mean" ? Array.from({ length: this.heads }, (_, each) => each) : [head];
      for (const token of tokens) {
        if (side === KEYS && isOut(KEYS, token)) continue;
        for (const each of heads) this.add(out, layer, each, side, token, 1 / tokens.length / heads.length, hidden);
      }
      if (hidden) for (const token of this.special[opposite]) out[token] = 0;
      return out;
    }
  }

  // ---- What is chosen, and what is pointed at -----------------------------------------------------------------------

  const state = { example: 0, layer: 0, head: 0, side: QUERIES, tokens: [0], hidden: false, whole: false };
  let hover = {}; // {side, tokens} or {layer, head}, shown instead while the pointer is there
  let example, maps, panels;
  let isAdding = false, before = 0;
  const current = () => ({ ...state, ...hover });

  function choose(change) {
    Object.assign(state, change);
    hover = {};
    draw();
    remember();
    const [best] = $("top").children;
    $("said").textContent = $("readout").textContent + (best.hidden ? "" : `. Most: ${best.textContent}`);
  }

  function pin(side, token, isAdded) {
    let tokens = [token];
    if ((isAdded || isAdding) && side === state.side) {
      const others = state.tokens.filter((other) => other !== token);
      tokens = others.length === state.tokens.length || !others.length ? [...others, token] : others;
    }
    choose({ side, tokens });
  }

  // In cross-attention each side has its own panel; else one panel shows both.
  const panelOf = (side) => panels[example.same ? 0 : side];
  const sideOf = (panel) => (example.same ? state.side : panel.number);

  function point(change) {
    if (JSON.stringify(change) === JSON.stringify(hover)) return;
    hover = change;
    schedule();
  }

  let waiting = 0;
  function schedule() {
    if (!waiting) waiting = requestAnimationFrame(() => { waiting = 0; draw(); });
  }

  let asked = 0;
  async function open(number) { // false where another example was asked for meanwhile
    const own = ++asked, next = await Maps.load(number);
    const pictures = await Promise.all(page.examples[number].sides.map((side) => pictureOf(side.picture)));
    if (own !== asked) return false;
    // No await from here on, so that all that is drawn belongs to one example.
    const isOfOthers = example !== undefined && maps.sizes[state.side] !== next.sizes[state.side];
    maps = next;
    example = page.examples[number];
    state.example = number;
    state.layer = Math.min(state.layer, maps.layers - 1);
    if (typeof state.head === "number") state.head = Math.min(state.head, maps.heads - 1);
    if (state.head === "rollout" && !example.multiplies) state.head = "mean";
    state.tokens = isOfOthers ? [0] : state.tokens.filter((token) => token < maps.sizes[state.side]);
    if (!state.tokens.length) state.tokens = [0];
    panels = (example.same ? [KEYS] : [QUERIES, KEYS]).map((side) => {
      const title = example.same ? (example.sides[side].grid ? "Picture" : "Text") : side === QUERIES ? "Queries" : "Keys";
      return new (example.sides[side].grid ? Patches : Words)(side, title, example.sides[side], pictures[side]);
    });
    $("sides").replaceChildren(...panels.map((panel) => panel.element));
    fillControls();
    return true;
  }

  async function pictureOf(number) {
    if (number === null) return null;
    return createImageBitmap(new Blob([bytesOf(`picture${number}`)], { type: "image/jpeg" }));
  }

  function fillControls() {
    const option = (value, text) => Object.assign(document.createElement("option"), { value, textContent: text });
    $("layer").replaceChildren(...example.layers.map((_, layer) => option(layer, String(layer))));
    const heads = Array.from({ length: maps.heads }, (_, head) => option(head, String(head)));
    heads.push(option("mean", "mean"));
    if (example.multiplies) heads.push(option("rollout", "rollout"));
    $("head").replaceChildren(...heads);
    $("example").replaceChildren(...page.examples.map((one, i) => option(i, one.title || `example ${i + 1}`)));
    if (page.examples.length === 1 && example.title) $("title").textContent = document.title = example.title;
    $("example-label").hidden = page.examples.length === 1;
    $("hide").hidden = !example.sides.some((side) => side.special.length);
    $("search").hidden = example.sides.every((side) => side.grid);
    $("rollout-key").hidden = $("rollout-help").hidden = !example.multiplies;
    $("notes").replaceChildren(...example.notes.map((note) => element("p", "", note)));
  }

  // Keeps what is shown in the address, where the page has one, so that a reload or a copied link shows the same.
  function remember() {
    const words = new URLSearchParams({ example: state.example, layer: state.layer, head: state.head });
    words.set(state.side === QUERIES ? "query" : "key", state.tokens.join(" "));
    for (const name of ["hidden", "whole"]) if (state[name]) words.set(name, 1);
    try { history.replaceState(null, "", `#${words}`); } catch { /* a frame without an address */ }
  }

  function recall() {
    const words = new URLSearchParams(location.hash.slice(1));
    const number = (name, size) => Math.max(0, Math.min(size - 1, parseInt(words.get(name), 10) || 0));
    state.example = number("example", page.examples.length);
    const one = page.examples[state.example], [layers, heads, queries, keys] = one.shape;
    state.layer = words.has("layer") ? number("layer", layers) : layers - 1;
    state.head = ["mean", "rollout"].includes(words.get("head")) ? words.get("head") : number("head", heads);
    state.side = words.has("key") ? KEYS : QUERIES;
    const tokens = (words.get(state.side === KEYS ? "key" : "query") || "0").split(" ").map(Number);
    state.tokens = [...new Set(tokens)].filter((token) => Number.isInteger(token) && token >= 0 && token < (state.side === KEYS ? keys : queries));
    state.whole = words.has("whole");
    state.hidden = words.has("hidden") && one.sides.some((side) => side.special.length);
  }

  // ---- Drawing ------------------------------------------------------------------------------------------------------

  const bytesOfHex = (text) => Uint8ClampedArray.from(text.match(/../g), (pair) => parseInt(pair, 16));
  const viridis = bytesOfHex(page.viridis), inferno = bytesOfHex(page.inferno);
  let zoom = 0; // canvas pixels for each CSS pixel; 0: as many as the screen has
  const SHADES = 20; // of a word's background
  const theme = {}; // the style sheet's colours, read again with each layout: reading them while drawing is slow
  function readTheme() {
    const style = getComputedStyle(document.documentElement);
    for (const name of ["ground", "panel", "ink", "soft", "accent", "mark", "on-mark"]) theme[name] = style.getPropertyValue(`--${name}`).trim();
    const [from, to] = [theme.panel, theme.mark].map((text) => bytesOfHex(text.slice(1)));
    theme.shades = Array.from({ length: SHADES + 1 }, (_, shade) => `rgb(${[0, 1, 2].map((i) => Math.round(from[i] + ((to[i] - from[i]) * shade) / SHADES)).join(" ")})`);
  }
  const FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Noto Sans CJK SC", sans-serif';

  function element(tag, className, text) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function label(side, token) {
    const about = example.sides[side];
    if (token < about.labels.length || !about.grid) return about.labels[token];
    const place = token - about.labels.length, columns = about.grid[1];
    return `${about.pooled > 1 ? "block" : "patch"} (${Math.floor(place / columns)}, ${place % columns})`;
  }

  function number(weight, isExact) {
    if (!weight) return "0";
    const text = weight < 1e-4 ? weight.toExponential(isExact ? 3 : 1) : weight.toPrecision(isExact ? 4 : 2);
    return isExact ? text : `≈ ${weight < 1e-4 ? text : weight.toFixed(Math.min(6, Math.max(2, 1 - Math.floor(Math.log10(weight)))))}`;
  }

  // The context of a canvas of that size in CSS pixels, as sharp as the screen.
  function sheet(canvas, width, height) {
    const ratio = zoom || window.devicePixelRatio || 1, wide = Math.round(width * ratio), high = Math.round(height * ratio);
    if (canvas.width !== wide || canvas.height !== high) {
      canvas.width = wide;
      canvas.height = high;
      canvas.style.width = `${width}px`;
      canvas.style.height = `${height}px`;
    }
    const context = canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    return context;
  }

  function pixels(width, height) {
    const canvas = new OffscreenCanvas(width, height), context = canvas.getContext("2d", { willReadFrequently: true });
    return { canvas, context, image: context.createImageData(width, height) };
  }

  function paintPixel(data, at, colours, share, alpha) {
    const index = 3 * Math.max(0, Math.min(255, Math.round(255 * share)));
    data[at] = colours[index];
    data[at + 1] = colours[index + 1];
    data[at + 2] = colours[index + 2];
    data[at + 3] = alpha;
  }

  // The weight that gets the last colour: the largest, but no less than four times an even share. Otherwise even
  // attention would have the solid colour of a peak.
  function topOf(weights, first) {
    let top = Math.min(1, 4 / weights.length);
    for (let i = first; i < weights.length; i++) if (weights[i] > top) top = weights[i];
    return top;
  }

  function box(context, x, y, width, height) {
    context.lineWidth = 3;
    context.strokeStyle = "#000";
    context.strokeRect(x, y, width, height);
    context.lineWidth = 1.5;
    context.strokeStyle = "#fff";
    context.strokeRect(x, y, width, height);
  }

  class Patches {
    constructor(number, title, about, picture) {
      [this.rows, this.columns] = about.grid;
      Object.assign(this, { number, about, picture, first: about.labels.length });
      this.element = element("div", "side");
      this.prefix = element("div", "prefix");
      this.canvas = element("canvas", "patches");
      this.canvas.tabIndex = 0;
      this.canvas.setAttribute("role", "img");
      this.legend = scaleBar(picture ? inferno : viridis);
      this.swatches = about.labels.map((name, token) => {
        const button = element("button"), swatch = element("canvas"), value = element("span");
        button.append(swatch, element("span", "", name), value);
        button.dataset.token = token;
        this.prefix.append(button);
        return { button, swatch, value };
      });
      this.prefix.hidden = !this.first;
      this.element.append(element("h2", "", title), this.prefix, this.canvas, this.legend.element);
      this.layer = pixels(this.columns, this.rows);
      listen(this, this.canvas, (event) => {
        const frame = this.canvas.getBoundingClientRect();
        const column = Math.floor(((event.clientX - frame.left) / frame.width) * this.columns);
        const row = Math.floor(((event.clientY - frame.top) / frame.height) * this.rows);
        if (row < 0 || column < 0 || row >= this.rows || column >= this.columns) return null;
        return this.first + row * this.columns + column;
      });
      listen(this, this.prefix, tokenUnder);
    }

    layout() {
      const room = this.element.clientWidth, high = Math.max(240, window.innerHeight * 0.62);
      this.width = Math.min(room, 640, (high * this.columns) / this.rows);
      this.height = (this.width * this.rows) / this.columns;
      this.legend.layout();
      this.grey = null;
      if (this.picture) {
        const ratio = zoom || window.devicePixelRatio || 1;
        const canvas = new OffscreenCanvas(Math.round(this.width * ratio), Math.round(this.height * ratio));
        const context = canvas.getContext("2d");
        context.drawImage(this.picture, 0, 0, canvas.width, canvas.height);
        const image = context.getImageData(0, 0, canvas.width, canvas.height), data = image.data;
        for (let i = 0; i < data.length; i += 4) {
          data[i] = data[i + 1] = data[i + 2] = 0.299 * data[i] + 0.587 * data[i + 1] + 0.114 * data[i + 2];
        }
        context.putImageData(image, 0, 0);
        this.grey = canvas;
      }
    }

    // `weights` null: only the chosen tokens are marked.
    paint(weights, chosen) {
      const context = sheet(this.canvas, this.width, this.height);
      if (this.grey) context.drawImage(this.grey, 0, 0, this.width, this.height);
      else {
        context.fillStyle = theme.panel;
        context.fillRect(0, 0, this.width, this.height);
      }
      const colours = this.grey ? inferno : viridis, top = weights ? topOf(weights, this.first) : 1;
      if (weights) {
        const data = this.layer.image.data;
        for (let i = 0; i < this.rows * this.columns; i++) {
          const share = Math.min(1, weights[this.first + i] / top);
          paintPixel(data, 4 * i, colours, share, this.grey ? 235 * Math.min(1, 0.12 + share ** 0.6) : 255);
        }
        this.layer.context.putImageData(this.layer.image, 0, 0);
        context.imageSmoothingEnabled = false;
        context.drawImage(this.layer.canvas, 0, 0, this.width, this.height);
      }
      this.swatches.forEach(({ button, swatch, value }, token) => {
        const inner = swatch.getContext("2d"), index = 3 * Math.min(255, Math.round((255 * (weights ? weights[token] : 0)) / top));
        inner.fillStyle = `rgb(${colours[index]} ${colours[index + 1]} ${colours[index + 2]})`;
        inner.fillRect(0, 0, swatch.width, swatch.height);
        swatch.hidden = value.hidden = !weights;
        value.textContent = weights ? weights[token].toFixed(3) : "";
        button.classList.toggle("chosen", chosen.includes(token));
      });
      const side = this.width / this.columns;
      for (const token of chosen) {
        const place = token - this.first;
        if (place >= 0) box(context, (place % this.columns) * side, Math.floor(place / this.columns) * side, side, side);
      }
      this.legend.show(weights ? top : null);
      this.canvas.setAttribute("aria-label", `${this.rows} by ${this.columns} patches; the arrow keys move among them. ${$("readout").textContent}`);
    }

    step(token, key) {
      const move = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -this.columns, ArrowDown: this.columns }[key];
      const next = token < this.first ? token + Math.sign(move) : token + move;
      if (next < this.first && token >= this.first) return key === "ArrowLeft" && this.first ? this.first - 1 : token;
      return next >= 0 && next < this.first + this.rows * this.columns ? next : token;
    }

    picturePart(context, x, y, width) {
      let top = y;
      context.font = `12px ${FONT}`;
      this.swatches.forEach(({ button, swatch, value }, token) => {
        if (!value.hidden) context.drawImage(swatch, x, top, 12, 12);
        context.fillStyle = theme.ink;
        context.fillText(`${this.about.labels[token]}  ${value.textContent}`, x + 18, top + 10, width - 18);
        top += 18;
      });
      context.drawImage(this.canvas, x, top, this.width, this.height);
      return top + this.height;
    }
  }

  class Words {
    constructor(number, title, about) {
      Object.assign(this, { number, about });
      this.element = element("div", "side");
      this.words = element("div", about.labels.length > 160 ? "words many" : "words");
      this.words.tabIndex = 0;
      this.words.setAttribute("role", "group");
      this.spans = about.labels.map((text, token) => {
        const span = element("span", "", text);
        span.dataset.token = token;
        return span;
      });
      this.shades = new Uint8Array(this.spans.length);
      this.chosen = [];
      this.words.append(...this.spans);
      this.legend = scaleBar(null);
      this.element.append(element("h2", "", title), this.words, this.legend.element);
      listen(this, this.words, tokenUnder);
    }

    layout() {
      this.legend.layout();
      this.shades.fill(255);
    }

    paint(weights, chosen) {
      const top = weights ? topOf(weights, 0) : 1;
      this.spans.forEach((span, token) => {
        const shade = weights ? Math.round((SHADES * weights[token]) / top) : 0;
        if (shade === this.shades[token]) return;
        this.shades[token] = shade;
        span.style.backgroundColor = theme.shades[shade];
        span.style.color = shade > 11 ? theme["on-mark"] : "";
      });
      for (const token of this.chosen) this.spans[token].classList.remove("chosen");
      for (const token of chosen) this.spans[token].classList.add("chosen");
      this.chosen = chosen;
      if (this.isHidden !== state.hidden) {
        for (const token of this.about.special) this.spans[token].classList.toggle("out", state.hidden);
        this.isHidden = state.hidden;
      }
      this.legend.show(weights ? top : null);
      this.words.setAttribute("aria-label", `${this.spans.length} tokens; the arrow keys move among them`);
    }

    step(token, key) {
      if (key === "ArrowLeft" || key === "ArrowRight") {
        const next = token + (key === "ArrowLeft" ? -1 : 1);
        return next >= 0 && next < this.spans.length ? next : token;
      }
      // The nearest token in the next line, as in an editor.
      const here = this.spans[token], middle = here.offsetLeft + here.offsetWidth / 2, way = key === "ArrowUp" ? -1 : 1;
      let best = token, line = null, least = Infinity;
      for (let other = token + way; other >= 0 && other < this.spans.length; other += way) {
        const span = this.spans[other];
        if (Math.abs(span.offsetTop - here.offsetTop) < 4) continue;
        if (line === null) line = span.offsetTop;
        if (Math.abs(span.offsetTop - line) > 4) break;
        const apart = Math.abs(span.offsetLeft + span.offsetWidth / 2 - middle);
        if (apart < least) [best, least] = [other, apart];
      }
      return best;
    }

    picturePart(context, x, y, width) {
      let left = x, top = y;
      context.font = `13px ${FONT}`;
      for (const [token, span] of this.spans.entries()) {
        const text = span.textContent.length > 40 ? `${span.textContent.slice(0, 40)}…` : span.textContent;
        const wide = Math.min(width, context.measureText(text).width + 10);
        if (left + wide > x + width) [left, top] = [x, top + 26];
        const style = getComputedStyle(span);
        context.fillStyle = style.backgroundColor;
        context.fillRect(left, top, wide, 22);
        if (this.chosen.includes(token)) {
          context.lineWidth = 2;
          context.strokeStyle = theme.ink;
          context.strokeRect(left + 1, top + 1, wide - 2, 20);
        }
        context.fillStyle = style.color;
        context.fillText(text, left + 5, top + 15.5, wide - 10);
        left += wide + 4;
      }
      return top + 22;
    }
  }

  function scaleBar(colours) {
    const host = element("div", "scale"), bar = element("canvas"), most = element("span");
    host.append(element("span", "", "0"), bar, most);
    const show = (top) => {
      host.hidden = top === null;
      if (top !== null) most.textContent = top.toPrecision(3);
    };
    const layout = () => {
      const context = sheet(bar, 120, 8);
      for (let x = 0; x < 120; x++) {
        const index = 3 * Math.round((255 * x) / 119);
        context.fillStyle = colours ? `rgb(${colours[index]} ${colours[index + 1]} ${colours[index + 2]})` : theme.shades[Math.round((SHADES * x) / 119)];
        context.fillRect(x, 0, 1.5, 8);
      }
    };
    return { element: host, show, layout };
  }

  // Every head in a cell, their mean in the last column: the chosen tokens' row (or column), or the whole map.
  const mosaic = { canvas: $("mosaic"), key: "" };

  // Weights as the pixels of a cell. Where several share a pixel, the largest counts.
  function shrink(weights, rows, columns, lines, bins, out) {
    if (rows === lines && columns === bins) return out.set(weights);
    out.fill(0);
    for (let row = 0, i = 0; row < rows; row++) {
      const line = Math.floor((row * lines) / rows) * bins;
      for (let column = 0; column < columns; column++, i++) {
        const at = line + Math.floor((column * bins) / columns);
        if (weights[i] > out[at]) out[at] = weights[i];
      }
    }
  }

  function drawMosaic(now) {
    const opposite = 1 - now.side, about = example.sides[opposite], count = maps.sizes[opposite];
    const first = about.grid && !state.whole ? about.labels.length : 0;
    const { room } = mosaic, columns = maps.heads + 1, left = 24, top = 20, gap = 2, between = 6;
    const [down, across] = state.whole ? maps.sizes : about.grid || [0, count];
    const wide = Math.max(4, Math.min(down ? 52 : 90, (room - left - between) / columns - gap));
    const high = down ? Math.max(4, Math.min(60, (wide * down) / across)) : Math.max(12, Math.min(26, 520 / maps.layers));
    const x = (head) => left + head * (wide + gap) + (head === maps.heads ? between : 0), y = (layer) => top + layer * (high + gap);
    Object.assign(mosaic, { x, y, wide, high });
    const key = JSON.stringify([state.example, state.whole || [now.side, now.tokens], now.hidden, room, zoom]);
    if (mosaic.key !== key) {
      mosaic.key = key;
      const most = (size) => Math.ceil(size * (zoom || window.devicePixelRatio || 1));
      const isPicture = down && !state.whole;
      const bins = isPicture ? across : Math.min(across, most(wide)), lines = isPicture ? down : Math.min(down || 1, most(high));
      const size = `${bins} ${lines} ${columns} ${maps.layers}`;
      if (mosaic.size !== size) [mosaic.size, mosaic.atlas] = [size, pixels(bins * columns, lines * maps.layers)];
      Object.assign(mosaic, { bins, lines });
      const { image, context } = mosaic.atlas, cell = new Float32Array(bins * lines);
      for (let layer = 0; layer < maps.layers; layer++) {
        const mean = new Float32Array(state.whole ? maps.queries * maps.keys : count);
        for (let head = 0; head < columns; head++) {
          let weights = mean;
          if (head < maps.heads) {
            weights = state.whole ? maps.map(layer, head, now.hidden) : maps.weights(layer, head, now.side, now.tokens, now.hidden);
            for (let i = 0; i < mean.length; i++) mean[i] += weights[i] / maps.heads;
          }
          shrink(weights.subarray(first), down || 1, across, lines, bins, cell);
          const largest = state.whole ? cell.reduce((a, b) => Math.max(a, b), 1e-9) : topOf(weights, first);
          for (let i = 0; i < cell.length; i++) {
            const at = (layer * lines + Math.floor(i / bins)) * bins * columns + head * bins + (i % bins);
            const share = cell[i] / largest;
            paintPixel(image.data, 4 * at, viridis, state.whole ? Math.sqrt(share) : share, 255);
          }
        }
      }
      context.putImageData(image, 0, 0);
    }
    const context = sheet(mosaic.canvas, Math.min(room, x(maps.heads) + wide + 2), y(maps.layers - 1) + high + 2);
    context.imageSmoothingEnabled = mosaic.bins > wide * 2;
    context.font = `11px ${FONT}`;
    context.fillStyle = theme.soft;
    context.textBaseline = "middle";
    const every = (step) => Math.max(1, Math.ceil(step));
    context.textAlign = "center";
    for (let head = 0; head < maps.heads; head += every(18 / (wide + gap))) context.fillText(head, x(head) + wide / 2, 9);
    context.fillText("mean", Math.min(x(maps.heads) + wide / 2, x(maps.heads) + wide - 13), 9);
    context.textAlign = "right";
    for (let layer = 0; layer < maps.layers; layer += every(12 / (high + gap))) context.fillText(layer, left - 6, y(layer) + high / 2);
    for (let layer = 0; layer < maps.layers; layer++) {
      for (let head = 0; head < columns; head++) {
        const { bins, lines } = mosaic;
        context.drawImage(mosaic.atlas.canvas, head * bins, layer * lines, bins, lines, x(head), y(layer), wide, high);
      }
    }
    context.strokeStyle = theme.accent;
    context.lineWidth = 2.5;
    const marked = typeof now.head === "number" ? now.head : maps.heads; // a rollout is of the means up to its layer
    for (let layer = now.head === "rollout" ? 0 : now.layer; layer <= now.layer; layer++) {
      context.strokeRect(x(marked) - 1, y(layer) - 1, wide + 2, high + 2);
    }
    const what = state.whole ? "Whole maps, queries down and keys across" : sentence(now).join("");
    mosaic.canvas.setAttribute("aria-label", `${what}, in ${maps.layers} layers and ${maps.heads} heads; choose one by the lists above`);
    $("mosaic-caption").textContent = `${what}; ${state.whole ? "the root of the weights, " : ""}each cell from 0 to its largest.`;
  }

  // The whole map of the chosen head, the root of its weights in colours.
  const matrix = { canvas: $("matrix"), key: "" };

  function drawMatrix(now) {
    const [queries, keys] = maps.sizes, isRollout = now.head === "rollout";
    $("matrix-title").textContent = isRollout ? "Matrix" : `Matrix of ${headName(now)}`;
    matrix.canvas.hidden = isRollout;
    if (isRollout) {
      $("matrix-caption").textContent = "A rollout is computed for the chosen tokens only.";
      return;
    }
    const { room } = matrix, isLabelled = Math.max(queries, keys) <= 32 && example.sides.every((side) => !side.grid);
    const left = isLabelled ? widest(QUERIES, room / 4) : 0, above = isLabelled ? widest(KEYS, room / 4) : 0;
    // Square cells, unless they would leave a strip.
    const side = Math.min((room - left) / keys, (window.innerHeight * 0.6) / queries);
    const across = Math.max(side, Math.min(18, 140 / keys)), down = Math.max(side, Math.min(18, 140 / queries));
    const wide = across * keys, high = down * queries;
    Object.assign(matrix, { left, above, across, down });
    const key = JSON.stringify([state.example, now.layer, now.head, now.hidden]);
    if (matrix.key !== key) {
      matrix.key = key;
      if (!matrix.pixels || matrix.pixels.canvas.width !== keys || matrix.pixels.canvas.height !== queries) matrix.pixels = pixels(keys, queries);
      const all = maps.map(now.layer, now.head, now.hidden), top = all.reduce((a, b) => Math.max(a, b), 1e-9);
      const data = matrix.pixels.image.data;
      for (let i = 0; i < all.length; i++) paintPixel(data, 4 * i, viridis, Math.sqrt(all[i] / top), 255);
      matrix.pixels.context.putImageData(matrix.pixels.image, 0, 0);
      matrix.top = top;
    }
    const context = sheet(matrix.canvas, left + wide, above + high);
    context.imageSmoothingEnabled = side < 1;
    context.drawImage(matrix.pixels.canvas, left, above, wide, high);
    if (isLabelled) {
      context.font = LABEL_FONT;
      context.fillStyle = theme.ink;
      context.textBaseline = "middle";
      context.textAlign = "right";
      for (let query = 0; query < queries; query += Math.ceil(12 / down)) {
        context.fillText(short(QUERIES, query), left - 6, above + (query + 0.5) * down, left - 6);
      }
      context.textAlign = "left";
      for (let each = 0; each < keys; each += Math.ceil(12 / across)) {
        context.save();
        context.translate(left + (each + 0.5) * across, above - 6);
        context.rotate(-Math.PI / 2);
        context.fillText(short(KEYS, each), 0, 0, above - 6);
        context.restore();
      }
    }
    for (const token of now.tokens) {
      if (now.side === QUERIES) box(context, left, above + token * down, wide, Math.max(down, 2));
      else box(context, left + token * across, above, Math.max(across, 2), high);
    }
    const pair = now.pair;
    const row = pair && maps.row(now.layer, now.head, pair[0]);
    $("matrix-caption").textContent = pair
      ? `${label(QUERIES, pair[0])} → ${label(KEYS, pair[1])}: ${
          now.head === "mean" || now.hidden
            ? number(maps.weights(now.layer, now.head, QUERIES, [pair[0]], now.hidden)[pair[1]], false)
            : number(maps.at(row, pair[1]), maps.isExact(now.layer, now.head, ...pair))
        }`
      : `Queries down, keys across; the root of the weights, 0 to ${matrix.top.toPrecision(3)}.`;
    matrix.canvas.setAttribute("aria-label", `All weights of ${headName(now)}, queries down, keys across`);
  }

  const LABEL_FONT = `12px ${FONT}`;
  function widest(side, most) {
    const { context } = mosaic.atlas;
    context.font = LABEL_FONT;
    let width = 0;
    for (let token = 0; token < maps.sizes[side]; token++) width = Math.max(width, context.measureText(short(side, token)).width);
    return Math.ceil(Math.min(most, width + 8));
  }

  const short = (side, token) => [...label(side, token)].slice(0, 14).join("");
  const headName = (now) => {
    if (now.head === "rollout") return now.layer ? `rollout of layers 0 to ${now.layer}` : "rollout of layer 0";
    return now.head === "mean" ? `layer ${now.layer}, mean of ${maps.heads} heads` : `layer ${now.layer}, head ${now.head}`;
  };
  const names = (now) => {
    const few = now.tokens.slice(0, 3).map((token) => label(now.side, token).slice(0, 40)).join(" + ");
    return now.tokens.length > 3 ? `${few} + ${now.tokens.length - 3} more` : few;
  };

  const sentence = (now) => {
    const isOne = now.tokens.length === 1, isQuery = now.side === QUERIES;
    return [isQuery ? "What " : "Who attends to ", names(now), (isQuery ? (isOne ? " attends to" : " attend to") : "") + (isOne ? "" : ", in the mean")];
  };

  function largest(weights) {
    const order = [];
    for (let token = 0; token < weights.length; token++) {
      if (!(weights[token] > 0) || (order.length === 6 && weights[token] <= weights[order[5]])) continue;
      let place = order.length;
      while (place && weights[order[place - 1]] < weights[token]) place--;
      order.splice(place, 0, token);
      order.length = Math.min(order.length, 6);
    }
    return order;
  }

  function drawTop(now, weights) {
    const opposite = 1 - now.side, order = largest(weights);
    const isPlain = typeof now.head === "number" && now.tokens.length === 1 && !now.hidden;
    $("top-title").textContent = opposite === KEYS ? "Top keys" : "Top queries";
    while ($("top").children.length < 6) {
      const item = element("li"), button = element("button");
      button.append(element("span", "bar"), element("span", "name"), element("span", "value"));
      item.append(button);
      $("top").append(item);
    }
    [...$("top").children].forEach((item, place) => {
      item.hidden = place >= order.length;
      if (item.hidden) return;
      const token = order[place], [button] = item.children, [bar, name, value] = button.children;
      const pair = now.side === QUERIES ? [now.tokens[0], token] : [token, now.tokens[0]];
      const isExact = isPlain && maps.isExact(now.layer, now.head, ...pair);
      button.dataset.token = token;
      bar.style.width = `${(100 * weights[token]) / Math.max(weights[order[0]], 1e-9)}%`;
      name.textContent = label(opposite, token);
      value.textContent = number(weights[token], isExact);
      value.title = isExact ? String(weights[token]) : "within about 1.5 %";
    });
  }

  function drawReadout(now, weights) {
    const [before, who, behind] = sentence(now);
    const facts = [headName(now) + (example.layers[now.layer] && now.head !== "rollout" ? ` (${example.layers[now.layer]})` : "")];
    let sum = 0, entropy = 0;
    for (const weight of weights) {
      sum += weight;
      if (weight > 0) entropy -= weight * Math.log(weight);
    }
    if (now.side === QUERIES) facts.push(`entropy ${entropy.toFixed(2)} of at most ${Math.log(weights.length).toFixed(2)} nats`);
    else facts.push(`${((100 * sum) / weights.length).toPrecision(3)} % of all attention`);
    $("readout").replaceChildren(before, element("b", "", who), behind, element("span", "", ` · ${facts.join(" · ")}`));
  }

  function draw() {
    const now = current(), weights = maps.weights(now.layer, now.head, now.side, now.tokens, now.hidden);
    // Canvases first: setting the font of a canvas makes the browser style all words that have changed until then.
    drawMosaic(now);
    drawMatrix(now);
    drawReadout(now, weights);
    if (example.same) panels[0].paint(weights, now.tokens);
    else {
      panelOf(now.side).paint(null, now.tokens);
      panelOf(1 - now.side).paint(weights, []);
    }
    drawTop(now, weights);
    $("example").value = state.example;
    $("layer").value = now.layer;
    $("head").value = now.head;
    $("view").setAttribute("aria-pressed", state.side === KEYS);
    $("add").setAttribute("aria-pressed", isAdding);
    $("hide").setAttribute("aria-pressed", state.hidden);
    $("whole").setAttribute("aria-pressed", state.whole);
  }

  function lay() {
    readTheme();
    for (const panel of panels) panel.layout();
    // Read here and not in draw(), where it would make the browser lay out the words while they are painted.
    mosaic.room = $("heads").clientWidth;
    matrix.room = Math.min($("numbers").clientWidth, 560);
    draw();
  }

  // ---- Input --------------------------------------------------------------------------------------------------------

  const tokenUnder = (event) => {
    const found = event.target.closest("[data-token]");
    return found ? Number(found.dataset.token) : null;
  };
  const isTouch = (event) => event.pointerType === "touch";

  function listen(panel, target, tokenAt) {
    target.addEventListener("pointermove", (event) => {
      const token = isTouch(event) ? null : tokenAt(event);
      point(token === null ? {} : { side: sideOf(panel), tokens: [token] });
    });
    target.addEventListener("pointerleave", () => point({}));
    target.addEventListener("click", (event) => {
      const token = tokenAt(event);
      if (token !== null) pin(sideOf(panel), token, event.shiftKey || event.ctrlKey || event.metaKey);
    });
  }

  function cellUnder(event) {
    const frame = mosaic.canvas.getBoundingClientRect(), left = event.clientX - frame.left, top = event.clientY - frame.top;
    for (let layer = 0; layer < maps.layers; layer++) {
      if (top < mosaic.y(layer) || top >= mosaic.y(layer) + mosaic.high + 2) continue;
      for (let head = 0; head <= maps.heads; head++) {
        if (left >= mosaic.x(head) && left < mosaic.x(head) + mosaic.wide + 2) return { layer, head: head === maps.heads ? "mean" : head };
      }
    }
    return null;
  }
  mosaic.canvas.addEventListener("pointermove", (event) => point((!isTouch(event) && cellUnder(event)) || {}));
  mosaic.canvas.addEventListener("pointerleave", () => point({}));
  mosaic.canvas.addEventListener("click", (event) => {
    const cell = cellUnder(event);
    if (cell) choose(cell);
  });

  function pairUnder(event) {
    const frame = matrix.canvas.getBoundingClientRect();
    const query = Math.floor((event.clientY - frame.top - matrix.above) / matrix.down);
    const key = Math.floor((event.clientX - frame.left - matrix.left) / matrix.across);
    return query < 0 || key < 0 || query >= maps.queries || key >= maps.keys ? null : [query, key];
  }
  matrix.canvas.addEventListener("pointermove", (event) => {
    const pair = isTouch(event) ? null : pairUnder(event);
    point(pair ? { side: state.side, tokens: [pair[state.side]], pair } : {});
  });
  matrix.canvas.addEventListener("pointerleave", () => point({}));
  matrix.canvas.addEventListener("click", (event) => {
    const pair = pairUnder(event);
    if (pair) pin(state.side, pair[state.side], event.shiftKey || event.ctrlKey || event.metaKey);
  });

  $("top").addEventListener("click", (event) => {
    const token = tokenUnder(event);
    if (token !== null) choose({ side: example.same ? state.side : 1 - state.side, tokens: [token] });
  });

  const actions = {
    layer: (by) => choose({ layer: Math.max(0, Math.min(maps.layers - 1, state.layer + by)) }),
    head: (by) => {
      const all = [...$("head").options].map((option) => option.value);
      const next = all[Math.max(0, Math.min(all.length - 1, all.indexOf(String(state.head)) + by))];
      choose({ head: next === "mean" || next === "rollout" ? next : Number(next) });
    },
    toggleHead: (name) => {
      if (name === "rollout" && !example.multiplies) return;
      if (typeof state.head === "number") before = state.head;
      choose({ head: state.head === name ? Math.min(before, maps.heads - 1) : name });
    },
    first: () => choose({ tokens: [0] }),
    last: () => choose({ tokens: state.tokens.slice(-1) }),
    view: () => {
      const now = current(), [best] = largest(maps.weights(now.layer, now.head, now.side, now.tokens, now.hidden));
      choose({ side: 1 - state.side, tokens: example.same ? state.tokens : [best ?? 0] });
    },
    add: () => { isAdding = !isAdding; draw(); },
    hide: () => { if (!$("hide").hidden) choose({ hidden: !state.hidden }); },
    whole: () => choose({ whole: !state.whole }),
    help: () => $("help-text").showModal(),
    arrow: (key, isAdded) => {
      const from = state.tokens[state.tokens.length - 1], to = panelOf(state.side).step(from, key);
      choose({ tokens: isAdded ? [...state.tokens.filter((token) => token !== to), to] : [...state.tokens.slice(0, isAdding ? -1 : 0), to] });
    },
    find: (isNext) => {
      const wanted = $("search").value.trim().toLowerCase();
      let found = null;
      for (const panel of panels.filter((one) => one instanceof Words)) {
        const hits = panel.spans.map((span) => wanted !== "" && span.textContent.toLowerCase().includes(wanted));
        panel.spans.forEach((span, token) => span.classList.toggle("found", hits[token]));
        const side = sideOf(panel), after = side === state.side ? state.tokens[0] : -1;
        const ahead = hits.indexOf(true, after + 1), at = ahead >= 0 ? ahead : hits.indexOf(true);
        if (at >= 0 && !found) found = { side, token: at, span: panel.spans[at] };
      }
      if (isNext && found) {
        pin(found.side, found.token);
        found.span.scrollIntoView({ block: "nearest" });
      }
    },
  };

  for (const [id, action] of [["view", actions.view], ["add", actions.add], ["hide", actions.hide], ["whole", actions.whole], ["help", actions.help]]) $(id).addEventListener("click", () => action());
  $("layer").addEventListener("change", (event) => choose({ layer: Number(event.target.value) }));
  $("head").addEventListener("change", ({ target: { value } }) => choose({ head: value === "mean" || value === "rollout" ? value : Number(value) }));
  $("example").addEventListener("change", async (event) => {
    if (!(await open(Number(event.target.value)))) return;
    matrix.key = "";
    lay();
    choose({ hidden: state.hidden && !$("hide").hidden });
  });
  $("search").addEventListener("input", () => actions.find(false));
  $("search").addEventListener("keydown", (event) => {
    if (event.key === "Enter") actions.find(true);
    if (event.key === "Escape") event.target.blur();
  });

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || $("help-text").open || event.target.closest("input")) return;
    const { key } = event;
    if (key.startsWith("Arrow") && event.target.closest("select")) return;
    const action = {
      "[": () => actions.layer(-1),
      "]": () => actions.layer(1),
      ",": () => actions.head(-1),
      ".": () => actions.head(1),
      m: () => actions.toggleHead("mean"),
      r: () => actions.toggleHead("rollout"),
      c: actions.first,
      w: actions.view,
      a: actions.add,
      s: actions.hide,
      h: actions.whole,
      "/": () => $("search").focus(),
      "?": actions.help,
      Escape: actions.last,
      ArrowLeft: () => actions.arrow(key, event.shiftKey),
      ArrowRight: () => actions.arrow(key, event.shiftKey),
      ArrowUp: () => actions.arrow(key, event.shiftKey),
      ArrowDown: () => actions.arrow(key, event.shiftKey),
    }[key];
    if (!action) return;
    event.preventDefault();
    action();
  });

  // ---- Downloads ----------------------------------------------------------------------------------------------------

  function download(blob, name) {
    const link = element("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  }

  $("png").addEventListener("click", () => {
    hover = {};
    const scale = (zoom = 2 * Math.ceil(window.devicePixelRatio || 1));
    lay();
    const gap = 28, wide = Math.max(320, panels[0].width || 420);
    const mosaicSize = [parseFloat(mosaic.canvas.style.width), parseFloat(mosaic.canvas.style.height)];
    const matrixSize = matrix.canvas.hidden ? [0, 0] : [parseFloat(matrix.canvas.style.width), parseFloat(matrix.canvas.style.height)];
    const measure = new OffscreenCanvas(1, 1).getContext("2d"), drawSides = (context) => panels.reduce((y, panel) => panel.picturePart(context, 24, y, wide) + 20, 60);
    const width = 48 + wide + gap + mosaicSize[0] + (matrixSize[0] ? gap + matrixSize[0] : 0);
    const height = Math.max(drawSides(measure), 80 + mosaicSize[1], 80 + matrixSize[1]) + 12;
    const canvas = element("canvas");
    canvas.width = width * scale;
    canvas.height = height * scale;
    const context = canvas.getContext("2d");
    context.scale(scale, scale);
    context.fillStyle = theme.ground;
    context.fillRect(0, 0, width, height);
    context.fillStyle = theme.ink;
    context.font = `600 14px ${FONT}`;
    context.fillText($("readout").textContent, 24, 34, width - 48);
    drawSides(context);
    context.drawImage(mosaic.canvas, 24 + wide + gap, 60, ...mosaicSize);
    if (matrixSize[0]) context.drawImage(matrix.canvas, 24 + wide + gap + mosaicSize[0] + gap, 60, ...matrixSize);
    canvas.toBlob((blob) => download(blob, `attention-layer${state.layer}-head${state.head}.png`));
    zoom = 0;
    lay();
  });

  // A token that begins like a formula would run as one in a spreadsheet.
  const field = (text) => `"${(/^[=+\-@]/.test(text) ? `'${text}` : text).replaceAll('"', '""')}"`;

  $("csv").addEventListener("click", () => {
    const opposite = 1 - state.side, columns = [];
    for (let layer = 0; layer < maps.layers; layer++) {
      for (let head = 0; head < maps.heads; head++) {
        columns.push([`layer ${layer} head ${head}`, maps.weights(layer, head, state.side, state.tokens, state.hidden)]);
      }
    }
    const lines = [["index", opposite === KEYS ? "key" : "query", ...columns.map(([name]) => name)].join(",")];
    for (let token = 0; token < maps.sizes[opposite]; token++) {
      lines.push([token, field(label(opposite, token)), ...columns.map(([, weights]) => weights[token])].join(","));
    }
    download(new Blob([lines.join("\r\n") + "\r\n"], { type: "text/csv" }), "attention.csv");
  });

  // ---- Begin --------------------------------------------------------------------------------------------------------

  try {
    recall();
    await open(state.example);
  } catch (error) {
    $("trouble").textContent = `The page could not be shown (${error.message}). A current Chrome, Edge, Firefox or Safari can show it.`;
    throw error;
  }
  $("still").hidden = true;
  $("app").hidden = false;
  $("accuracy").textContent = "The six largest weights of each row are exact. The others are marked ≈ and are within 1.5 % of the true value; those below 1/2000 of the row's largest count as zero.";
  lay();
  performance.mark("attention drawn");
  new ResizeObserver(() => lay()).observe($("sides"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => lay());
  // For the browser's console: the weights of a query, or of a key (side 1), as the page shows them.
  window.explorer = { state, weights: (layer, head, token, side = QUERIES) => maps.weights(layer, head, side, [token], false) };
})();
