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
      // A scale that has to reach the weights of sinks, such as a decoder's first token, shows nothing else.
      this.sinks = Array.from({ length: this.keys }, (_, key) => example.sinks.includes(key));
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

  class Difference {
    // The second example's weights minus the first's, read like Maps of one shape with both.
    constructor(first, second) {
      const { layers, heads, queries, keys, sizes } = first;
      Object.assign(this, { first, second, layers, heads, queries, keys, sizes, isSigned: true, sinks: [] });
    }

    map(...call) {
      return minus(this.second.map(...call), this.first.map(...call));
    }

    weights(...call) {
      return minus(this.second.weights(...call), this.first.weights(...call));
    }
  }
  const minus = (one, other) => one.map((weight, i) => weight - other[i]);

  // ---- What is chosen, and what is pointed at -----------------------------------------------------------------------

  // `with` is the number of an example to compare with, or null; `lines` the heads whose lines are drawn, null: all.
  const state = { example: 0, with: null, layer: 0, head: 0, side: QUERIES, tokens: [], hidden: false, whole: false, lines: null };
  let hover = {}; // {side, tokens} or {layer, head}, shown instead while the pointer is there
  let views = []; // what is shown: one example; or two and their difference
  let example, maps, panels; // those of the first view
  let isAdding = false, before = 0;
  const current = () => ({ ...state, ...hover });
  const isComparing = () => views.length > 1;

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

  // The token that a page opens on: the class token or the middle of a picture, the last word of a text. Never one whose
  // row is a single number, as that of a decoder's first token is.
  function opening() {
    const about = example.sides[state.side], all = Array.from({ length: maps.sizes[state.side] }, (_, token) => token);
    if (state.side === KEYS) return all.filter((token) => !about.special.includes(token)).pop() ?? 0;
    const order = about.grid
      ? [...all.slice(0, about.labels.length), about.labels.length + Math.floor(about.grid[0] / 2) * about.grid[1] + Math.floor(about.grid[1] / 2), ...all]
      : [...all.filter((token) => !about.special.includes(token)).reverse(), ...all.reverse()];
    return order.find((token) => {
      const row = token < maps.queries ? maps.weights(maps.layers - 1, "mean", QUERIES, [token], false) : [];
      const most = row.reduce((a, b) => Math.max(a, b), 0);
      return most && most < 0.99 * row.reduce((a, b) => a + b, 0);
    }) ?? order[0];
  }

  let asked = 0;
  // Show an example, or two; false where another was asked for meanwhile.
  async function open(number, other) {
    const own = ++asked, numbers = other === null || !fits(number, other) ? [number] : [number, other];
    const loaded = await Promise.all(numbers.map(Maps.load));
    const of = (one) => Promise.all(page.examples[one].sides.map((side) => pictureOf(side.picture)));
    const pictures = await Promise.all(numbers.map(of));
    if (own !== asked) return false;
    // No await from here on, so that all that is drawn belongs to one example.
    const isOfOthers = example !== undefined && maps.sizes[state.side] !== loaded[0].sizes[state.side];
    views = numbers.map((one, i) => new View(i, titleOf(one), page.examples[one], loaded[i], pictures[i]));
    if (loaded.length > 1) views.push(new View(2, `Difference: ${titleOf(other)} − ${titleOf(number)}`, differenceOf(...numbers), new Difference(...loaded), pictures[0]));
    [{ example, maps, panels }] = views;
    state.example = number;
    state.with = numbers[1] ?? null;
    state.layer = Math.min(state.layer, maps.layers - 1);
    if (typeof state.head === "number") state.head = Math.min(state.head, maps.heads - 1);
    if (state.head === "rollout" && !example.multiplies) state.head = "mean";
    if (state.head === "mean" && maps.heads === 1) state.head = 0;
    state.tokens = isOfOthers ? [] : state.tokens.filter((token) => token < maps.sizes[state.side]);
    if (!state.tokens.length) state.tokens = [opening()];
    fillControls();
    return true;
  }

  const shapeOf = (number) => String([page.examples[number].shape, page.examples[number].sides.map((side) => side.parts)]);
  const fits = (number, other) => other !== number && page.examples[other] !== undefined && shapeOf(number) === shapeOf(other);

  // The words of two texts, where they differ both.
  function differenceOf(number, other) {
    const [one, two] = [page.examples[number], page.examples[other]];
    const both = (label, i, side) => (label === two.sides[side].labels[i] ? label : `${label} / ${two.sides[side].labels[i]}`);
    const sides = one.sides.map((about, side) => ({ ...about, labels: about.labels.map((label, i) => both(label, i, side)) }));
    return { ...one, sides };
  }

  async function pictureOf(number) {
    if (number === null) return null;
    return createImageBitmap(new Blob([bytesOf(`picture${number}`)], { type: "image/jpeg" }));
  }

  const titleOf = (number) => page.examples[number].title || `example ${number + 1}`;

  function fillControls() {
    const option = (value, text) => Object.assign(document.createElement("option"), { value, textContent: text });
    $("layer").replaceChildren(...example.numbers.map((number, layer) => option(layer, String(number))));
    const heads = Array.from({ length: maps.heads }, (_, head) => option(head, String(head)));
    heads.push(option("mean", "mean"));
    if (example.multiplies) heads.push(option("rollout", "rollout"));
    $("head").replaceChildren(...heads);
    $("example").replaceChildren(...page.examples.map((_, i) => option(i, titleOf(i))));
    if (page.examples.length === 1 && example.title) $("title").textContent = document.title = example.title;
    const others = page.examples.map((_, i) => i).filter((i) => fits(state.example, i));
    $("with").replaceChildren(option("", "nothing"), ...others.map((i) => option(i, titleOf(i))));
    $("example-label").hidden = page.examples.length === 1;
    $("with-label").hidden = !others.length;
    $("hide").hidden = !example.sides.some((side) => side.special.length);
    $("search").hidden = example.sides.every((side) => side.grid);
    $("rollout-key").hidden = $("rollout-help").hidden = !example.multiplies;
    $("notes").replaceChildren(...example.notes.map((note) => element("p", "", note)));
    fillLines();
  }

  // Keeps what is shown in the address, where the page has one, so that a reload or a copied link shows the same.
  function remember() {
    const words = new URLSearchParams({ example: state.example, layer: example.numbers[state.layer], head: state.head });
    words.set(state.side === QUERIES ? "query" : "key", state.tokens.join(" "));
    if (state.with !== null) words.set("with", state.with);
    if (state.lines) words.set("lines", state.lines.join(" "));
    for (const name of ["hidden", "whole"]) if (state[name]) words.set(name, 1);
    try { history.replaceState(null, "", `#${words}`); } catch { /* a frame without an address */ }
  }

  function recall() {
    const words = new URLSearchParams(location.hash.slice(1));
    const numbers = (name, size) => {
      const found = (words.get(name) || "").split(" ").filter((word) => /^\d+$/.test(word)).map(Number);
      return [...new Set(found)].filter((one) => one < size);
    };
    state.example = numbers("example", page.examples.length)[0] ?? 0;
    state.with = numbers("with", page.examples.length)[0] ?? null;
    const one = page.examples[state.example], [layers, heads, queries, keys] = one.shape;
    const layer = words.has("layer") ? one.numbers.map(String).indexOf(words.get("layer")) : -1;
    state.layer = layer < 0 ? layers - 1 : layer;
    state.head = words.get("head") === "rollout" ? "rollout" : numbers("head", heads)[0] ?? "mean";
    state.side = words.has("key") ? KEYS : words.has("query") ? QUERIES : one.opens;
    state.tokens = state.side === KEYS ? numbers("key", keys) : numbers("query", queries);
    state.lines = words.has("lines") ? numbers("lines", heads) : null;
    state.whole = words.has("whole");
    state.hidden = words.has("hidden") && one.sides.some((side) => side.special.length);
  }

  // ---- Drawing ------------------------------------------------------------------------------------------------------

  const bytesOfHex = (text) => Uint8ClampedArray.from(text.match(/../g), (pair) => parseInt(pair, 16));
  const viridis = bytesOfHex(page.viridis), heat = bytesOfHex(page.heat), diverging = bytesOfHex(page.diverging);
  let zoom = 0; // canvas pixels for each CSS pixel; 0: as many as the screen has
  const SHADES = 20; // of a word's background
  const theme = {}; // the style sheet's colours, read again with each layout: reading them while drawing is slow
  function readTheme() {
    const style = getComputedStyle(document.documentElement);
    for (const name of ["ground", "panel", "ink", "soft", "accent", "mark", "on-mark"]) theme[name] = style.getPropertyValue(`--${name}`).trim();
    const ramp = (to, from = bytesOfHex(theme.panel.slice(1))) => Array.from({ length: SHADES + 1 }, (_, shade) => `rgb(${[0, 1, 2].map((i) => Math.round(from[i] + ((to[i] - from[i]) * shade) / SHADES)).join(" ")})`);
    theme.shades = ramp(bytesOfHex(theme.mark.slice(1)));
    theme.less = ramp(diverging.subarray(75, 78)); // of negative differences
    theme.more = ramp(diverging.subarray(690, 693));
    theme.isDark = bytesOfHex(theme.ground.slice(1))[1] < 128;
  }
  const FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Noto Sans CJK SC", sans-serif';
  const UPRIGHT = /^([⺀-鿿가-힯豈-﫿︰-﹏＀-￯][₁-₉]?)+$/u; // words of scripts that are set in columns

  function element(tag, className, text) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function label(side, token, of = example) {
    const about = of.sides[side], { parts } = about;
    if (token < about.labels.length || !about.grid) return about.labels[token];
    let place = token - about.labels.length, number = 0;
    while (place >= parts[number][2] * parts[number][3]) place -= parts[number][2] * parts[number++][3];
    const columns = parts[number][3], of_picture = parts.length > 1 ? `picture ${number}, ` : "";
    return `${of_picture}${about.pooled > 1 ? "block" : "patch"} (${Math.floor(place / columns)}, ${place % columns})`;
  }

  // The cell of the grid in which each patch lies: several pictures lie side by side on it.
  function cellsOf({ grid, parts }) {
    return Int32Array.from(parts.flatMap(([top, left, rows, columns]) => Array.from({ length: rows * columns }, (_, place) => (top + Math.floor(place / columns)) * grid[1] + left + (place % columns))));
  }

  // A token within a sentence.
  function quoted(side, token, of = example) {
    const name = label(side, token, of), about = of.sides[side];
    if (about.grid) return name;
    return about.numbered ? `token ${name}` : `“${name.slice(0, 40)}”`;
  }

  function number(weight, isExact) {
    if (!weight) return "0";
    const size = Math.abs(weight);
    if (isExact) return size < 1e-4 ? weight.toExponential(3) : weight.toPrecision(4);
    return `≈ ${size < 1e-4 ? weight.toExponential(1) : weight.toFixed(Math.min(6, Math.max(2, 1 - Math.floor(Math.log10(size)))))}`;
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

  // ---- Scales

  // The weight that gets the last colour: the largest but those of sinks, and no less than four times an even share, as
  // else even attention would have the solid colour of a peak. Of differences the largest, whatever its sign.
  function topOf(weights, first, { isSigned, sinks }, side) {
    let top = isSigned ? 1e-9 : Math.min(1, 4 / weights.length);
    for (let i = first; i < weights.length; i++) {
      const weight = isSigned ? Math.abs(weights[i]) : weights[i];
      if (weight > top && !(side === QUERIES && sinks[i])) top = weight;
    }
    return top;
  }

  // The same of a whole map: of its rows the mean, so that a few short rows of a causal map do not darken the others.
  function topOfMap(all, { queries, keys, isSigned, sinks }) {
    const least = isSigned ? 1e-9 : Math.min(1, 4 / keys);
    let sum = 0, rows = 0;
    for (let query = 0, i = 0; query < queries; query++) {
      let largest = 0;
      for (let key = 0; key < keys; key++, i++) {
        const weight = isSigned ? Math.abs(all[i]) : all[i];
        if (weight > largest && !sinks[key]) largest = weight;
      }
      if (largest) rows++;
      sum += largest;
    }
    return Math.max(least, sum / Math.max(1, rows));
  }

  // Of several views the one scale: the largest of the plain ones; differences have their own.
  function scaled(tops) {
    const plain = tops.filter((_, i) => !views[i].maps.isSigned);
    return tops.map((top, i) => (views[i].maps.isSigned ? top : Math.max(...plain)));
  }

  const rooted = (share) => (share < 0 ? -Math.sqrt(-share) : Math.sqrt(share));
  // The colour of a share of the scale; with less opacity, as it is on white.
  const colour = (colours, share, opacity = 1) => {
    const index = 3 * Math.max(0, Math.min(255, Math.round(255 * share)));
    const [red, green, blue] = [0, 1, 2].map((i) => Math.round(255 - opacity * (255 - colours[index + i])));
    return `rgb(${red} ${green} ${blue})`;
  };
  // The colour of a word's background, for a share of the scale from -1 to 1.
  const shadeOf = (shade, isSigned) => (isSigned ? (shade < 0 ? theme.less[-shade] : theme.more[shade]) : theme.shades[shade]);

  // The bar of a scale from 0 to `top`, or from -top to top. `paint` is the colour of a share of the bar, 0 to 1.
  function drawLegend(canvas, top, { isSigned, isRoot, isMore }, paint) {
    const wide = 150, context = sheet(canvas, 290, 26);
    for (let x = 0; x < wide; x++) {
      context.fillStyle = paint(isSigned ? (2 * x) / (wide - 1) - 1 : x / (wide - 1));
      context.fillRect(x, 0, 1.5, 8);
    }
    const text = (weight) => String(Number(weight.toPrecision(2)));
    const ticks = isSigned ? [-top, 0, top] : [0, isRoot ? top / 4 : top / 2, top];
    context.font = `11px ${FONT}`;
    context.fillStyle = theme.soft;
    context.textBaseline = "alphabetic";
    ticks.forEach((tick, i) => {
      context.textAlign = ["left", "center", "right"][i];
      context.fillText(text(tick), (i * wide) / 2, 22);
    });
    context.textAlign = "left";
    if (isMore) context.fillText("and more", wide + 4, 22);
    const what = isSigned ? "difference of weights" : "attention weight";
    context.fillText(what, wide + 10, 8);
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `Colours of the ${what}: ${text(ticks[0])} to ${text(top)}${isMore ? " and more" : ""}`);
  }

  // ---- Panels: what queries and keys are

  function box(context, x, y, width, height) {
    context.lineWidth = 3;
    context.strokeStyle = "#000";
    context.strokeRect(x, y, width, height);
    context.lineWidth = 1.5;
    context.strokeStyle = "#fff";
    context.strokeRect(x, y, width, height);
  }

  const painters = new WeakMap(); // of elements that a picture of the page has to draw: (context, x, y, width) => bottom

  class Patches {
    constructor(number, title, about, picture) {
      [this.rows, this.columns] = about.grid;
      this.cells = cellsOf(about);
      this.patches = new Int32Array(this.rows * this.columns).fill(-1); // of each cell; between pictures there is none
      this.cells.forEach((cell, patch) => (this.patches[cell] = patch));
      Object.assign(this, { number, about, picture, first: about.labels.length });
      this.element = element("div", "side");
      this.prefix = element("div", "prefix");
      this.canvas = element("canvas", "patches");
      this.canvas.tabIndex = 0;
      this.canvas.setAttribute("role", "img");
      this.legend = element("canvas", "legend");
      this.swatches = about.labels.map((name, token) => {
        const button = element("button"), swatch = element("canvas"), value = element("span");
        button.append(swatch, element("span", "", name), value);
        button.dataset.token = token;
        this.prefix.append(button);
        return { button, swatch, value };
      });
      this.prefix.hidden = !this.first;
      this.element.append(element("h2", "", title), this.prefix, this.canvas, this.legend);
      this.layer = pixels(this.columns, this.rows);
      painters.set(this.prefix, (...call) => this.paintPrefix(...call));
      listen(this, this.canvas, (event) => {
        const frame = this.canvas.getBoundingClientRect();
        const column = Math.floor(((event.clientX - frame.left) / frame.width) * this.columns);
        const row = Math.floor(((event.clientY - frame.top) / frame.height) * this.rows);
        if (row < 0 || column < 0 || row >= this.rows || column >= this.columns) return null;
        const patch = this.patches[row * this.columns + column];
        return patch < 0 ? null : this.first + patch;
      });
      listen(this, this.prefix, tokenUnder);
    }

    layout() {
      const room = this.element.clientWidth, high = Math.max(240, window.innerHeight * 0.62);
      this.width = Math.min(room, 640, (high * this.columns) / this.rows);
      this.height = (this.width * this.rows) / this.columns;
      this.legendKey = "";
      this.grey = null;
      if (this.picture) {
        const ratio = zoom || window.devicePixelRatio || 1;
        const canvas = new OffscreenCanvas(Math.round(this.width * ratio), Math.round(this.height * ratio));
        const context = canvas.getContext("2d");
        context.drawImage(this.picture, 0, 0, canvas.width, canvas.height);
        const image = context.getImageData(0, 0, canvas.width, canvas.height), data = image.data;
        for (let i = 0; i < data.length; i += 4) {
          const grey = 0.299 * data[i] + 0.587 * data[i + 1] + 0.114 * data[i + 2];
          data[i] = data[i + 1] = data[i + 2] = 0.35 * 255 + 0.65 * grey; // light, as in the plots: the colours end dark
        }
        context.putImageData(image, 0, 0);
        this.grey = canvas;
      }
    }

    // `weights` null: only the chosen tokens are marked.
    paint(weights, chosen, top, isSigned) {
      const context = sheet(this.canvas, this.width, this.height);
      if (this.grey) context.drawImage(this.grey, 0, 0, this.width, this.height);
      else {
        context.fillStyle = theme.panel;
        context.fillRect(0, 0, this.width, this.height);
      }
      const colours = isSigned ? diverging : this.grey ? heat : viridis;
      const place = (share) => (isSigned ? 0.5 + share / 2 : share);
      // Colours cover a picture the more, the larger the weight.
      const opacity = (share) => (this.grey ? 0.9 * Math.min(1, Math.abs(share)) ** 0.7 : 1);
      const shade = (share) => colour(colours, place(share), opacity(share));
      if (weights) {
        const data = this.layer.image.data;
        this.cells.forEach((cell, patch) => {
          const share = Math.max(-1, Math.min(1, weights[this.first + patch] / top));
          paintPixel(data, 4 * cell, colours, place(share), 255 * opacity(share));
        });
        this.layer.context.putImageData(this.layer.image, 0, 0);
        context.imageSmoothingEnabled = false;
        context.drawImage(this.layer.canvas, 0, 0, this.width, this.height);
      }
      this.swatches.forEach(({ button, swatch, value }, token) => {
        const inner = swatch.getContext("2d");
        inner.fillStyle = shade(weights ? weights[token] / top : 0);
        inner.fillRect(0, 0, swatch.width, swatch.height);
        swatch.hidden = value.hidden = !weights;
        value.textContent = weights ? weights[token].toFixed(3) : "";
        button.classList.toggle("chosen", chosen.includes(token));
      });
      const side = this.width / this.columns;
      this.patches.forEach((patch, cell) => {
        if (patch < 0) context.clearRect((cell % this.columns) * side, Math.floor(cell / this.columns) * side, side, side);
      });
      for (const token of chosen) {
        const place = this.cells[token - this.first];
        if (place !== undefined) box(context, (place % this.columns) * side, Math.floor(place / this.columns) * side, side, side);
      }
      showLegend(this, weights, top, isSigned, shade);
      this.canvas.setAttribute("aria-label", `${this.about.parts.map(([, , rows, columns]) => `${rows} by ${columns}`).join(" and ")} patches; the arrow keys move among them. ${$("readout").textContent}`);
    }

    step(token, key) {
      const move = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -this.columns, ArrowDown: this.columns }[key];
      if (token < this.first) return Math.max(0, token + Math.sign(move));
      let cell = this.cells[token - this.first] + move;
      while (this.patches[cell] === -1) cell += move; // between pictures
      if (this.patches[cell] !== undefined) return this.first + this.patches[cell];
      return key === "ArrowLeft" && this.first ? this.first - 1 : token;
    }

    paintPrefix(context, x, y, width) {
      context.font = `12px ${FONT}`;
      this.swatches.forEach(({ swatch, value }, token) => {
        if (!value.hidden) context.drawImage(swatch, x, y, 12, 12);
        context.fillStyle = theme.ink;
        context.fillText(`${this.about.labels[token]}  ${value.textContent}`, x + 18, y + 10, width - 18);
        y += 18;
      });
      return y + 4;
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
      this.shades = new Int8Array(this.spans.length);
      this.chosen = [];
      this.words.append(...this.spans);
      this.legend = element("canvas", "legend");
      this.element.append(element("h2", "", title), this.words, this.legend);
      painters.set(this.words, (...call) => this.paintWords(...call));
      listen(this, this.words, tokenUnder);
    }

    layout() {
      this.legendKey = "";
      this.shades.fill(127);
    }

    paint(weights, chosen, top, isSigned) {
      this.spans.forEach((span, token) => {
        const shade = weights ? Math.max(-SHADES, Math.min(SHADES, Math.round((SHADES * weights[token]) / top))) : 0;
        if (shade === this.shades[token]) return;
        this.shades[token] = shade;
        span.style.backgroundColor = shadeOf(shade, isSigned);
        span.style.color = isSigned ? (Math.abs(shade) > 9 ? "#fff" : "") : shade > 11 ? theme["on-mark"] : "";
      });
      for (const token of this.chosen) this.spans[token].classList.remove("chosen");
      for (const token of chosen) this.spans[token].classList.add("chosen");
      this.chosen = chosen;
      if (this.isHidden !== state.hidden) {
        for (const token of this.about.special) this.spans[token].classList.toggle("out", state.hidden);
        this.isHidden = state.hidden;
      }
      showLegend(this, weights, top, isSigned, (share) => shadeOf(Math.round(SHADES * share), isSigned));
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

    paintWords(context, x, y, width) {
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
      return top + 30;
    }
  }

  function showLegend(panel, weights, top, isSigned, paint) {
    // It keeps its place: a panel below it that moved would no longer be under the pointer.
    panel.legend.style.visibility = weights ? "visible" : "hidden";
    if (!weights && !panel.legendKey) sheet(panel.legend, 290, 26);
    const isMore = weights && weights.some((weight) => Math.abs(weight) > 1.001 * top), key = `${top} ${isMore} ${zoom}`;
    if (!weights || panel.legendKey === key) return;
    panel.legendKey = key;
    drawLegend(panel.legend, top, { isSigned, isMore }, paint);
  }

  // ---- A view: the panels, all heads, and the matrix of one example or of a difference

  const blank = { heads: $("heads"), map: $("map") };
  for (const section of Object.values(blank)) section.remove(); // each view has copies

  class View {
    constructor(number, title, about, maps, pictures) {
      Object.assign(this, { number, example: about, maps, colours: maps.isSigned ? diverging : viridis });
      const titleFor = (side) => (about.part || about.same ? (about.sides[side].grid ? (about.sides[side].parts.length > 1 ? "Pictures" : "Picture") : about.same ? "Text" : "Words") : side === QUERIES ? "Queries" : "Keys");
      this.panels = (about.same ? [KEYS] : [QUERIES, KEYS]).map((side) => {
        return new (about.sides[side].grid ? Patches : Words)(side, titleFor(side), about.sides[side], pictures[side]);
      });
      this.sides = element("section", "sides");
      this.sides.append(...this.panels.map((panel) => panel.element));
      this.title = element("h2", "view", title);
      const part = (name) => {
        const section = blank[name].cloneNode(true), find = (selector) => section.querySelector(selector);
        if (number) for (const each of [section, ...section.querySelectorAll("[id]")]) each.removeAttribute("id");
        return { section, canvas: find("canvas.drawn"), legend: find(".legend"), caption: find(".caption"), title: find("h2"), key: "" };
      };
      [this.mosaic, this.matrix] = [part("heads"), part("map")];
      const whole = this.mosaic.section.querySelector("button");
      if (number) whole.remove();
      else whole.addEventListener("click", actions.whole);
      listenMosaic(this);
      listenMatrix(this);
    }

    paint(now, weights, top) {
      const { isSigned } = this.maps, of = (side) => this.panels[this.example.same ? 0 : side];
      if (this.example.same) this.panels[0].paint(weights, now.tokens, top, isSigned);
      else {
        of(now.side).paint(null, now.tokens, 1, isSigned);
        of(1 - now.side).paint(weights, [], top, isSigned);
      }
    }

    first(side) {
      return this.example.sides[side].grid ? this.example.sides[side].labels.length : 0;
    }
  }

  // Weights as the pixels of a cell. Where several share a pixel, the largest counts.
  function shrink(weights, rows, columns, lines, bins, out) {
    if (rows === lines && columns === bins) return out.set(weights);
    out.fill(0);
    for (let row = 0, i = 0; row < rows; row++) {
      const line = Math.floor((row * lines) / rows) * bins;
      for (let column = 0; column < columns; column++, i++) {
        const at = line + Math.floor((column * bins) / columns);
        if (Math.abs(weights[i]) > Math.abs(out[at])) out[at] = weights[i];
      }
    }
  }

  // Every head in a cell, their mean in the last column: the chosen tokens' row (or column), or the whole map. Returns
  // the top of its own scale.
  function fillMosaic(view, now) {
    const { mosaic, maps } = view, opposite = 1 - now.side, about = view.example.sides[opposite], count = maps.sizes[opposite];
    const first = state.whole ? 0 : view.first(opposite);
    const { room } = mosaic, columns = maps.heads + 1, left = 24, top = 20, gap = 2, between = 6;
    const [down, across] = state.whole ? maps.sizes : about.grid || [0, count];
    const wide = Math.max(4, Math.min(down ? 52 : 90, (room - left - between) / columns - gap));
    const high = down ? Math.max(4, Math.min(60, (wide * down) / across)) : Math.max(12, Math.min(26, 520 / maps.layers));
    const x = (head) => left + head * (wide + gap) + (head === maps.heads ? between : 0), y = (layer) => top + layer * (high + gap);
    Object.assign(mosaic, { x, y, wide, high });
    const key = JSON.stringify([state.whole || [now.side, now.tokens], now.hidden, room, zoom]);
    if (mosaic.key === key) return mosaic.own;
    const most = (size) => Math.ceil(size * (zoom || window.devicePixelRatio || 1));
    const isPicture = down && !state.whole;
    const bins = isPicture ? across : Math.min(across, most(wide)), lines = isPicture ? down : Math.min(down || 1, most(high));
    const size = `${bins} ${lines} ${columns} ${maps.layers}`;
    if (mosaic.size !== size) [mosaic.size, mosaic.atlas] = [size, pixels(bins * columns, lines * maps.layers)];
    Object.assign(mosaic, { bins, lines, key, painted: null, cells: new Float32Array(bins * columns * lines * maps.layers) });
    const cell = new Float32Array(bins * lines), cells = isPicture && about.parts.length > 1 ? cellsOf(about) : null;
    let sum = 0;
    mosaic.most = 0;
    for (let layer = 0; layer < maps.layers; layer++) {
      const mean = new Float32Array(state.whole ? maps.queries * maps.keys : count);
      for (let head = 0; head < columns; head++) {
        let weights = mean;
        if (head < maps.heads) {
          weights = state.whole ? maps.map(layer, head, now.hidden) : maps.weights(layer, head, now.side, now.tokens, now.hidden);
          for (let i = 0; i < mean.length; i++) mean[i] += weights[i] / maps.heads;
          sum += state.whole ? topOfMap(weights, maps) : topOf(weights, first, maps, now.side);
        }
        let drawn = weights.subarray(first);
        if (cells) {
          drawn = new Float32Array(down * across);
          cells.forEach((at, patch) => (drawn[at] = weights[first + patch]));
        }
        shrink(drawn, down || 1, across, lines, bins, cell);
        for (let line = 0; line < lines; line++) {
          const part = cell.subarray(line * bins, (line + 1) * bins);
          for (const weight of part) if (Math.abs(weight) > mosaic.most) mosaic.most = Math.abs(weight);
          mosaic.cells.set(part, ((layer * lines + line) * columns + head) * bins);
        }
      }
    }
    mosaic.own = sum / (maps.layers * maps.heads);
    return mosaic.own;
  }

  function drawMosaic(view, now, top) {
    const { mosaic, maps, colours } = view, { x, y, wide, high, bins, lines, room } = mosaic, columns = maps.heads + 1;
    if (mosaic.painted !== top) {
      mosaic.painted = top;
      const { image, context } = mosaic.atlas;
      mosaic.cells.forEach((weight, i) => {
        const share = rooted(weight / top);
        paintPixel(image.data, 4 * i, colours, maps.isSigned ? 0.5 + share / 2 : share, 255);
      });
      context.putImageData(image, 0, 0);
      drawLegend(mosaic.legend, top, { isSigned: maps.isSigned, isRoot: true, isMore: mosaic.most > 1.001 * top }, (share) => colour(colours, maps.isSigned ? 0.5 + share / 2 : share));
    }
    const context = sheet(mosaic.canvas, Math.min(room, x(maps.heads) + wide + 2), y(maps.layers - 1) + high + 2);
    context.imageSmoothingEnabled = bins > wide * 2;
    context.font = `11px ${FONT}`;
    context.fillStyle = theme.soft;
    context.textBaseline = "middle";
    const every = (step) => Math.max(1, Math.ceil(step));
    context.textAlign = "center";
    const numbered = maps.heads - (wide < 24 && maps.heads > 9 ? 1 : 0); // there is no room for 11 beside "mean"
    for (let head = 0; head < numbered; head += every(18 / (wide + 2))) context.fillText(head, x(head) + wide / 2, 9);
    context.fillText("mean", Math.min(x(maps.heads) + wide / 2, x(maps.heads) + wide - 13), 9);
    context.textAlign = "right";
    for (let layer = 0; layer < maps.layers; layer += every(12 / (high + 2))) context.fillText(view.example.numbers[layer], 18, y(layer) + high / 2);
    for (let layer = 0; layer < maps.layers; layer++) {
      for (let head = 0; head < columns; head++) {
        context.drawImage(mosaic.atlas.canvas, head * bins, layer * lines, bins, lines, x(head), y(layer), wide, high);
      }
    }
    context.strokeStyle = theme.accent;
    context.lineWidth = 2.5;
    const marked = typeof now.head === "number" ? now.head : maps.heads; // a rollout is of the means up to its layer
    for (let layer = now.head === "rollout" ? 0 : now.layer; layer <= now.layer; layer++) {
      context.strokeRect(x(marked) - 1, y(layer) - 1, wide + 2, high + 2);
    }
    const what = state.whole ? "Whole maps, queries down and keys across" : sentence(now, view.example).join("");
    mosaic.canvas.setAttribute("aria-label", `${what}, in ${maps.layers} layers and ${maps.heads} heads; choose one by the lists above`);
    mosaic.caption.textContent = `${what}, in every head. Layers down, heads across.`;
  }

  // The whole map of the chosen head. Returns the top of its own scale.
  function fillMatrix(view, now) {
    const { matrix, maps } = view, [queries, keys] = maps.sizes;
    if (now.head === "rollout") return 1;
    const key = JSON.stringify([now.layer, now.head, now.hidden]);
    if (matrix.key !== key) {
      const all = maps.map(now.layer, now.head, now.hidden);
      if (!matrix.pixels) matrix.pixels = pixels(keys, queries);
      Object.assign(matrix, { key, all, painted: null, own: topOfMap(all, maps), most: all.reduce((a, b) => Math.max(a, Math.abs(b)), 0) });
    }
    return matrix.own;
  }

  function drawMatrix(view, now, top) {
    const { matrix, maps, colours, example: of } = view, [queries, keys] = maps.sizes, isRollout = now.head === "rollout";
    matrix.title.textContent = isRollout ? "Matrix" : `Matrix of ${headName(now)}`;
    matrix.canvas.hidden = matrix.legend.hidden = isRollout;
    if (isRollout) {
      matrix.caption.textContent = "A rollout is computed for the chosen tokens only.";
      return;
    }
    const { room } = matrix, isLabelled = Math.max(queries, keys) <= 32 && of.sides.every((side) => !side.grid);
    const left = isLabelled ? widest(of, QUERIES, room / 4) : 0, above = isLabelled ? widest(of, KEYS, room / 4) : 0;
    // Square cells, unless they would leave a strip.
    const side = Math.min((room - left) / keys, (window.innerHeight * 0.6) / queries);
    const across = Math.max(side, Math.min(18, 140 / keys)), down = Math.max(side, Math.min(18, 140 / queries));
    const wide = across * keys, high = down * queries;
    Object.assign(matrix, { left, above, across, down });
    if (matrix.painted !== top) {
      matrix.painted = top;
      const data = matrix.pixels.image.data, { isSigned } = maps;
      for (let i = 0; i < matrix.all.length; i++) {
        const share = rooted(matrix.all[i] / top);
        paintPixel(data, 4 * i, colours, isSigned ? 0.5 + share / 2 : share, 255);
      }
      matrix.pixels.context.putImageData(matrix.pixels.image, 0, 0);
      drawLegend(matrix.legend, top, { isSigned, isRoot: true, isMore: matrix.most > 1.001 * top }, (share) => colour(colours, isSigned ? 0.5 + share / 2 : share));
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
        context.fillText(short(of, QUERIES, query), left - 6, above + (query + 0.5) * down, left - 6);
      }
      context.textAlign = "left";
      for (let each = 0; each < keys; each += Math.ceil(12 / across)) {
        const word = short(of, KEYS, each), letters = UPRIGHT.test(word) ? word.match(/.[₁-₉]?/gu).reverse() : [];
        context.save();
        context.translate(left + (each + 0.5) * across, above - 6);
        letters.forEach((letter, place) => context.fillText(letter, -6, -6 - 13 * place));
        context.rotate(-Math.PI / 2);
        if (!letters.length) context.fillText(word, 0, 0, above - 6);
        context.restore();
      }
    }
    for (const token of now.tokens) {
      if (now.side === QUERIES) box(context, left, above + token * down, wide, Math.max(down, 2));
      else box(context, left + token * across, above, Math.max(across, 2), high);
    }
    const { pair } = now;
    matrix.caption.textContent = pair ? `${quoted(QUERIES, pair[0], of)} → ${quoted(KEYS, pair[1], of)}: ${weightOf(view, now, pair)}` : "Queries down, keys across.";
    matrix.canvas.setAttribute("aria-label", `All weights of ${headName(now)}, queries down, keys across`);
  }

  const isExact = (now, pair) => typeof now.head === "number" && !now.hidden && maps.isExact(now.layer, now.head, ...pair);

  function weightOf(view, now, pair) {
    if (!view.number && isExact(now, pair)) return number(maps.at(maps.row(now.layer, now.head, pair[0]), pair[1]), true);
    return number(view.maps.weights(now.layer, now.head, QUERIES, [pair[0]], now.hidden)[pair[1]], false);
  }

  const LABEL_FONT = `12px ${FONT}`;
  const ruler = new OffscreenCanvas(1, 1).getContext("2d");
  function widest(of, side, most) {
    ruler.font = LABEL_FONT;
    let width = 0;
    for (let token = 0; token < maps.sizes[side]; token++) width = Math.max(width, ruler.measureText(short(of, side, token)).width);
    return Math.ceil(Math.min(most, width + 8));
  }

  const short = (of, side, token) => [...label(side, token, of)].slice(0, 14).join("");
  const headName = (now) => {
    const number = example.numbers[now.layer], layer = number === "all" ? `mean of ${maps.layers - 1} layers` : `layer ${number}`;
    if (now.head === "rollout") return now.layer ? `rollout of layers ${example.numbers[0]} to ${number}` : `rollout of ${layer}`;
    if (maps.heads === 1) return layer;
    return now.head === "mean" ? `${layer}, mean of ${maps.heads} heads` : `${layer}, head ${now.head}`;
  };
  const names = (now, of = example) => {
    const few = now.tokens.slice(0, 3).map((token) => quoted(now.side, token, of)).join(" + ");
    return now.tokens.length > 3 ? `${few} + ${now.tokens.length - 3} more` : few;
  };

  const sentence = (now, of = example) => {
    const isOne = now.tokens.length === 1, isQuery = now.side === QUERIES;
    return [isQuery ? "What " : "Who attends to ", names(now, of), (isQuery ? (isOne ? " attends to" : " attend to") : "") + (isOne ? "" : ", in the mean")];
  };

  // ---- Lines between two columns of tokens, of short texts

  const lines = { canvas: $("lines-canvas"), key: "", most: 40, step: 20 };
  const isShort = () => !isComparing() && Math.max(...maps.sizes) <= lines.most && example.sides.every((side) => !side.grid);
  const hue = (head) => `hsl(${Math.round(head * 137.508 + 215) % 360} 70% ${theme.isDark ? 64 : 42}%)`;

  function fillLines() {
    lines.key = "";
    const toggle = (head) => {
      const on = state.lines ?? Array.from({ length: maps.heads }, (_, each) => each);
      const rest = on.filter((each) => each !== head);
      choose({ lines: rest.length === on.length ? [...on, head].sort((a, b) => a - b) : rest });
    };
    const button = (text, title, act) => {
      const made = element("button", "", text);
      made.title = title;
      made.addEventListener("click", act);
      return made;
    };
    lines.buttons = Array.from({ length: maps.heads }, (_, head) => {
      const made = button(String(head), `Head ${head}: click for on or off, twice for this head alone`, () => toggle(head));
      made.setAttribute("aria-label", `Lines of head ${head}`);
      made.addEventListener("dblclick", () => choose({ lines: [head] }));
      return made;
    });
    const all = () => choose({ lines: state.lines === null ? [] : null });
    $("line-heads").replaceChildren(...lines.buttons, button("All", "All heads, or none", all));
  }

  function drawLines(now) {
    if ($("lines").hidden) return;
    const { queries, keys } = maps, { room, step } = lines, on = now.lines ?? lines.buttons.map((_, head) => head);
    const key = JSON.stringify([now.layer, now.hidden]);
    if (lines.key !== key) {
      const all = lines.buttons.map((_, head) => maps.map(now.layer, head, now.hidden));
      Object.assign(lines, { key, all, top: all.reduce((sum, map) => sum + topOfMap(map, maps), 0) / all.length });
    }
    lines.buttons.forEach((button, head) => {
      const isOn = on.includes(head);
      button.setAttribute("aria-pressed", isOn);
      button.style.borderColor = hue(head);
      button.style.backgroundColor = isOn ? hue(head) : "";
      button.style.color = isOn ? theme.ground : "";
    });
    const height = Math.max(queries, keys) * step + 22;
    const context = sheet(lines.canvas, room, height), [left, right] = [QUERIES, KEYS].map((side) => Math.max(40, widest(example, side, room / 3))); // 40: the titles
    const [from, to] = [left + 6, room - right - 6], y = (token) => 20 + (token + 0.5) * step;
    const apart = Math.min(1.6, (step - 6) / on.length); // heads side by side, so that none hides another
    for (const isChosen of [false, true]) {
      on.forEach((head, place) => {
        const aside = (place - (on.length - 1) / 2) * apart, all = lines.all[head];
        context.strokeStyle = hue(head);
        context.lineWidth = 1.5;
        for (let query = 0, i = 0; query < queries; query++) {
          for (let each = 0; each < keys; each++, i++) {
            if (now.tokens.includes(now.side === QUERIES ? query : each) !== isChosen) continue;
            const share = Math.min(1, all[i] / lines.top);
            if (share < 0.1) continue;
            context.globalAlpha = isChosen ? share : (maps.sinks[each] ? 0.06 : 0.25) * share ** 2;
            context.beginPath();
            context.moveTo(from, y(query) + aside);
            context.lineTo(to, y(each) + aside);
            context.stroke();
          }
        }
      });
    }
    context.globalAlpha = 1;
    context.textBaseline = "middle";
    for (const [side, x, align, title] of [[QUERIES, left, "right", "queries"], [KEYS, room - right, "left", "keys"]]) {
      context.textAlign = align;
      context.font = `11px ${FONT}`;
      context.fillStyle = theme.soft;
      context.fillText(title, x, 8);
      for (let token = 0; token < maps.sizes[side]; token++) {
        const isChosen = side === now.side && now.tokens.includes(token);
        context.font = isChosen ? `600 ${LABEL_FONT}` : LABEL_FONT;
        context.fillStyle = isChosen ? theme.accent : theme.ink;
        context.fillText(short(example, side, token), x, y(token), room / 3);
      }
    }
    lines.canvas.setAttribute("aria-label", `Lines from queries on the left to keys on the right, for ${on.length} of ${maps.heads} heads`);
    $("lines-title").textContent = `Lines of layer ${example.numbers[now.layer]}`;
    $("lines-caption").textContent = `Colours are heads; the stronger a line, the larger the weight, up to ${Number(lines.top.toPrecision(2))}.`;
  }

  // ---- The list and the sentence

  function largest(weights) {
    const order = [], size = (token) => Math.abs(weights[token]);
    for (let token = 0; token < weights.length; token++) {
      if (!(size(token) > 0) || (order.length === 6 && size(token) <= size(order[5]))) continue;
      let place = order.length;
      while (place && size(order[place - 1]) < size(token)) place--;
      order.splice(place, 0, token);
      order.length = Math.min(order.length, 6);
    }
    return order;
  }

  function drawTop(now, all) {
    const opposite = 1 - now.side, [weights] = all, shown = all[all.length - 1], order = largest(shown);
    const tokens = opposite === KEYS ? "keys" : "queries";
    $("top-title").textContent = isComparing() ? `Largest differences: ${tokens}, both weights` : `Top ${tokens}`;
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
      const exact = now.tokens.length === 1 && isExact(now, pair);
      button.dataset.token = token;
      bar.style.width = `${(100 * Math.abs(shown[token])) / Math.max(Math.abs(shown[order[0]]), 1e-9)}%`;
      name.textContent = label(opposite, token, views[all.length - 1].example);
      value.textContent = isComparing() ? `${number(weights[token], false)} → ${number(all[1][token], false)}` : number(weights[token], exact);
      value.title = exact && !isComparing() ? String(weights[token]) : "within about 1.5 %";
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
    if (now.side === QUERIES && example.part) facts.push(`${sum ? `${(100 * sum).toPrecision(3)} %` : "none"} of its attention is ${example.part}`);
    else if (now.side === QUERIES && !sum) facts.push("attends to nothing");
    else if (now.side === QUERIES) facts.push(`entropy ${entropy.toFixed(2)} of at most ${Math.log(weights.length).toFixed(2)} nats`);
    else facts.push(`${((100 * sum) / weights.length).toPrecision(3)} % of all attention`);
    if (example.clean) facts.push("sinks removed");
    $("readout").replaceChildren(before, element("b", "", who), behind, element("span", "", ` · ${facts.join(" · ")}`));
  }

  function draw() {
    const now = current(), weights = views.map((view) => view.maps.weights(now.layer, now.head, now.side, now.tokens, now.hidden));
    // Canvases first: setting the font of a canvas makes the browser style all words that have changed until then.
    const tops = {
      mosaic: scaled(views.map((view) => fillMosaic(view, now))),
      matrix: scaled(views.map((view) => fillMatrix(view, now))),
      panel: scaled(views.map((view, i) => topOf(weights[i], view.first(1 - now.side), view.maps, now.side))),
    };
    views.forEach((view, i) => {
      drawMosaic(view, now, tops.mosaic[i]);
      drawMatrix(view, now, tops.matrix[i]);
    });
    drawLines(now);
    drawReadout(now, weights[0]);
    views.forEach((view, i) => view.paint(now, weights[i], tops.panel[i]));
    drawTop(now, weights);
    $("example").value = state.example;
    $("with").value = state.with ?? "";
    $("layer").value = now.layer;
    $("head").value = now.head;
    $("view").setAttribute("aria-pressed", state.side === KEYS);
    $("add").setAttribute("aria-pressed", isAdding);
    $("hide").setAttribute("aria-pressed", state.hidden);
    $("whole").setAttribute("aria-pressed", state.whole);
  }

  // The sections in as many columns as the window has room for, so that none stands beside a hole.
  function place() {
    const [view] = views, [list, between] = [$("list"), $("lines")], { sides, mosaic, matrix } = view;
    const [rows, across] = example.sides[KEYS].grid || [0, 1], cell = Math.min(52, (window.innerWidth / 2 - 70) / (maps.heads + 1));
    const isTall = (maps.layers * cell * rows) / across > 520; // the cells of many layers, which are as high as wide
    const isLow = isShort() && maps.layers > 9 && Math.max(...maps.sizes) < 22; // lines that are lower than the matrix
    let columns = [[sides, list, between], [mosaic.section, matrix.section]];
    if (isTall) columns = [[sides, matrix.section], [mosaic.section, list, between]];
    else if (isLow) columns = [[sides, list, matrix.section], [mosaic.section, between]];
    if (window.innerWidth <= 720) columns = [[sides, list, mosaic.section, between, matrix.section]];
    else if (window.innerWidth > 1080) columns = isShort() ? [[sides, list], [mosaic.section, between], [matrix.section]] : [[sides], [mosaic.section, between], [list, matrix.section]];
    if (isComparing()) {
      columns = views.map((one) => [one.title, one.sides, one.mosaic.section, one.matrix.section]);
      columns[0].push(between); // hidden
      columns.push([list]); // below the three
      if (window.innerWidth <= 720) columns = [columns.flat()];
    }
    const now = [...$("main").children].map((column) => [...column.children]);
    if (JSON.stringify(columns.map((column) => column.length)) === JSON.stringify(now.map((column) => column.length)) && columns.flat().every((section, i) => section === now.flat()[i])) return;
    $("main").className = isComparing() ? "columns3 even" : `columns${columns.length}`;
    $("main").replaceChildren(...columns.map((column, i) => {
      const made = element("div", i > 2 ? "column across" : "column");
      made.append(...column);
      return made;
    }));
  }

  function lay() {
    readTheme();
    place();
    for (const view of views) {
      for (const panel of view.panels) panel.layout();
      // Read here and not in draw(), where it would make the browser lay out the words while they are painted.
      view.mosaic.room = view.mosaic.section.clientWidth;
      view.matrix.room = Math.min(view.matrix.section.clientWidth, isShort() ? 440 : 560);
      view.mosaic.painted = view.matrix.painted = null; // the legends have the theme's colours
    }
    $("lines").hidden = !isShort();
    lines.room = Math.min($("lines").clientWidth, 560);
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

  function listenMosaic({ mosaic }) {
    const cellUnder = (event) => {
      const frame = mosaic.canvas.getBoundingClientRect(), left = event.clientX - frame.left, top = event.clientY - frame.top;
      for (let layer = 0; layer < maps.layers; layer++) {
        if (top < mosaic.y(layer) || top >= mosaic.y(layer) + mosaic.high + 2) continue;
        for (let head = 0; head <= maps.heads; head++) {
          if (left >= mosaic.x(head) && left < mosaic.x(head) + mosaic.wide + 2) return { layer, head: head === maps.heads ? "mean" : head };
        }
      }
      return null;
    };
    mosaic.canvas.addEventListener("pointermove", (event) => point((!isTouch(event) && cellUnder(event)) || {}));
    mosaic.canvas.addEventListener("pointerleave", () => point({}));
    mosaic.canvas.addEventListener("click", (event) => {
      const cell = cellUnder(event);
      if (cell) choose(cell);
    });
  }

  function listenMatrix({ matrix }) {
    const pairUnder = (event) => {
      const frame = matrix.canvas.getBoundingClientRect();
      const query = Math.floor((event.clientY - frame.top - matrix.above) / matrix.down);
      const key = Math.floor((event.clientX - frame.left - matrix.left) / matrix.across);
      return query < 0 || key < 0 || query >= maps.queries || key >= maps.keys ? null : [query, key];
    };
    matrix.canvas.addEventListener("pointermove", (event) => {
      const pair = isTouch(event) ? null : pairUnder(event);
      point(pair ? { side: state.side, tokens: [pair[state.side]], pair } : {});
    });
    matrix.canvas.addEventListener("pointerleave", () => point({}));
    matrix.canvas.addEventListener("click", (event) => {
      const pair = pairUnder(event);
      if (pair) pin(state.side, pair[state.side], event.shiftKey || event.ctrlKey || event.metaKey);
    });
  }

  // Of the lines each column names the tokens of its side.
  function lineUnder(event) {
    const frame = lines.canvas.getBoundingClientRect(), token = Math.floor((event.clientY - frame.top - 20) / lines.step);
    const side = event.clientX - frame.left < frame.width / 2 ? QUERIES : KEYS;
    return token < 0 || token >= maps.sizes[side] ? null : { side, tokens: [token] };
  }
  lines.canvas.addEventListener("pointermove", (event) => point((!isTouch(event) && lineUnder(event)) || {}));
  lines.canvas.addEventListener("pointerleave", () => point({}));
  lines.canvas.addEventListener("click", (event) => {
    const found = lineUnder(event);
    if (found) pin(found.side, found.tokens[0], event.shiftKey || event.ctrlKey || event.metaKey);
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

  for (const [id, action] of [["view", actions.view], ["add", actions.add], ["hide", actions.hide], ["help", actions.help]]) $(id).addEventListener("click", () => action());
  $("layer").addEventListener("change", (event) => choose({ layer: Number(event.target.value) }));
  $("head").addEventListener("change", ({ target: { value } }) => choose({ head: value === "mean" || value === "rollout" ? value : Number(value) }));
  async function show(number, other) {
    if (!(await open(number, other))) return;
    lay();
    choose({ hidden: state.hidden && !$("hide").hidden });
  }
  $("example").addEventListener("change", (event) => show(Number(event.target.value), state.with));
  $("with").addEventListener("change", (event) => show(state.example, event.target.value === "" ? null : Number(event.target.value)));
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

  // Text in as many lines as it takes; returns where it ends.
  function paintText(context, text, x, y, width) {
    let line = "";
    for (const word of text.split(" ")) {
      if (line && context.measureText(`${line} ${word}`).width > width) {
        context.fillText(line, x, y + 12);
        [line, y] = [word, y + 17];
      } else line = line ? `${line} ${word}` : word;
    }
    context.fillText(line, x, y + 12, width);
    return y + 20;
  }

  // A section of the page on the canvas, from its top to the bottom that is returned.
  function paintSection(context, host, x, y, width) {
    for (const part of host.tagName === "H2" ? [host] : host.children) {
      if (part.hidden || part.style.visibility === "hidden" || part.tagName === "BUTTON") continue;
      context.textAlign = "left";
      context.textBaseline = "alphabetic";
      context.fillStyle = part.tagName === "H2" ? theme.ink : theme.soft;
      context.font = part.tagName === "H2" ? `600 13px ${FONT}` : `12px ${FONT}`;
      if (painters.has(part)) y = painters.get(part)(context, x, y, width);
      else if (part.tagName === "CANVAS") {
        const [wide, high] = [parseFloat(part.style.width), parseFloat(part.style.height)];
        context.drawImage(part, x, y, wide, high);
        y += high + 8;
      } else if (part.tagName === "H2" || part.tagName === "P") y = paintText(context, part.textContent, x, y, width);
      else y = paintSection(context, part, x, y, width);
    }
    return y;
  }

  painters.set($("top"), (context, x, y, width) => {
    context.font = `13px ${FONT}`;
    for (const item of $("top").children) {
      if (item.hidden) continue;
      const [bar, name, value] = item.firstChild.children;
      context.fillStyle = theme.panel;
      context.fillRect(x, y, width, 22);
      context.globalAlpha = 0.24;
      context.fillStyle = theme.mark;
      context.fillRect(x, y, (width * parseFloat(bar.style.width)) / 100, 22);
      context.globalAlpha = 1;
      context.fillStyle = theme.ink;
      context.fillText([...name.textContent].slice(0, 40).join(""), x + 6, y + 15.5, width / 2);
      context.textAlign = "right";
      context.fillText(value.textContent, x + width - 6, y + 15.5);
      context.textAlign = "left";
      y += 25;
    }
    return y + 6;
  });
  painters.set($("line-heads"), (context, x, y) => {
    context.font = `600 12px ${FONT}`;
    for (const button of lines.buttons.filter((one) => one.getAttribute("aria-pressed") === "true")) {
      context.fillStyle = button.style.borderColor;
      context.fillText(button.textContent, x, y + 12);
      x += 22;
    }
    return y + 20;
  });

  $("png").addEventListener("click", () => {
    hover = {};
    const scale = (zoom = 2 * Math.ceil(window.devicePixelRatio || 1));
    lay();
    const columns = [...$("main").querySelectorAll(".column:not(.across)")], gap = 32, widths = columns.map((column) => column.clientWidth);
    const width = 48 + widths.reduce((sum, wide) => sum + wide + gap, -gap);
    const drawAll = (context) => {
      context.font = `600 14px ${FONT}`;
      context.fillStyle = theme.ink;
      const title = [$("title").textContent === "Attention" ? page.examples.length > 1 && !isComparing() ? titleOf(state.example) : "" : $("title").textContent, $("readout").textContent];
      const top = paintText(context, title.filter(Boolean).join(". "), 24, 20, width - 48) + 14;
      let x = 24, bottom = top;
      const paintColumn = (column, y, wide) => {
        for (const section of column.children) if (!section.hidden) y = paintSection(context, section, x, y, wide) + 16;
        bottom = Math.max(bottom, y);
        x += wide + gap;
      };
      columns.forEach((column, i) => paintColumn(column, top, widths[i]));
      x = 24;
      for (const column of $("main").querySelectorAll(".across")) paintColumn(column, bottom, Math.min(480, width - 48));
      return bottom;
    };
    const height = drawAll(new OffscreenCanvas(1, 1).getContext("2d"));
    const canvas = element("canvas");
    canvas.width = width * scale;
    canvas.height = height * scale;
    const context = canvas.getContext("2d");
    context.scale(scale, scale);
    context.fillStyle = theme.ground;
    context.fillRect(0, 0, width, height);
    drawAll(context);
    canvas.toBlob((blob) => download(blob, `attention-layer${example.numbers[state.layer]}-head${state.head}.png`));
    zoom = 0;
    lay();
  });

  // A token that begins like a formula would run as one in a spreadsheet.
  const field = (text) => `"${(/^[=+\-@]/.test(text) ? `'${text}` : text).replaceAll('"', '""')}"`;

  // A line for each layer, head and token opposite the chosen ones, so that each names its query and how exact it is.
  $("csv").addEventListener("click", () => {
    const opposite = 1 - state.side, isOne = state.tokens.length === 1;
    const chosen = [field(state.tokens.join(" ")), field(state.tokens.map((token) => label(state.side, token)).join(" + "))];
    const lines = [["layer", "head", "query_index", "query", "key_index", "key", "weight", "accuracy"].join(",")];
    for (let layer = 0; layer < maps.layers; layer++) {
      for (let head = 0; head < maps.heads; head++) {
        maps.weights(layer, head, state.side, state.tokens, state.hidden).forEach((weight, token) => {
          const other = [token, field(label(opposite, token))], pair = opposite === KEYS ? [state.tokens[0], token] : [token, state.tokens[0]];
          const accuracy = isOne && isExact({ ...state, layer, head }, pair) ? "exact" : "within 1.5 %";
          lines.push([example.numbers[layer], head, ...(opposite === KEYS ? [...chosen, ...other] : [...other, ...chosen]), weight, accuracy].join(","));
        });
      }
    }
    download(new Blob([lines.join("\r\n") + "\r\n"], { type: "text/csv" }), "attention.csv");
  });

  // ---- Begin --------------------------------------------------------------------------------------------------------

  try {
    recall();
    await open(state.example, state.with);
  } catch (error) {
    $("trouble").textContent = `The page could not be shown (${error.message}). A current Chrome, Edge, Firefox or Safari can show it.`;
    throw error;
  }
  $("still").hidden = true;
  $("app").hidden = false;
  $("accuracy").textContent = "The six largest weights of each row are exact. The others are marked ≈ and are within 1.5 % of the true value; those below 1/2000 of the row's largest count as zero.";
  lay();
  performance.mark("attention drawn");
  let seen = "";
  new ResizeObserver(() => {
    const size = [$("main").clientWidth, window.innerWidth, window.innerHeight, window.devicePixelRatio].join(" ");
    if (size !== seen) lay();
    seen = size;
  }).observe($("main"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => lay());
  // For the browser's console: the weights of a query, or of a key (side 1), as the page shows them.
  window.explorer = { state, weights: (layer, head, token, side = QUERIES) => maps.weights(layer, head, side, [token], false) };
})();
