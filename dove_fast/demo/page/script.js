"use strict";

const byId = (id) => document.getElementById(id);
const tokens = (n) => (n === 1 ? "1 token" : `${n} tokens`);
// A probability with two digits, or more where it has them.
const exact = (p) => (Number(p.toFixed(2)) === p ? p.toFixed(2) : String(p));
// Reconstructions asked for ahead at a time, the milliseconds that they are to take, and those of one that is too slow.
const AHEAD = 8, TARGET = 400, SLOW = 4000;

let model = null; // What /api/model says.
let content = null; // The picture's bytes as they were given, to read them again with another query.
let shown = null; // What is looked at: {reading, made: Map from length to reconstruction, threshold, kept, chosen}.
let latest = 0; // Counts the pictures given; what belongs to an earlier one is dropped when it arrives.

async function call(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("The demo does not answer. Is it still running?");
  }
  const found = await response.json();
  if (!response.ok) throw new Error(found.error);
  return found;
}

function say(status, error = "") {
  byId("status").textContent = status;
  byId("error").textContent = error;
  byId("error").hidden = !error;
  document.body.classList.toggle("waiting", Boolean(status));
}

// Giving a picture

async function give(blob) {
  const mine = ++latest;
  if (blob.size > model.max_bytes) {
    const size = (blob.size / 2 ** 20).toFixed(1);
    return say("", `This file has ${size} MiB, more than the ${model.max_bytes >> 20} that are taken.`);
  }
  say("Reading the picture …");
  try {
    const picture = await blob.arrayBuffer().then((bytes) => new Blob([bytes]), () => {
      throw new Error("This file cannot be read. Is it a folder?");
    });
    if (mine !== latest) return;
    content = picture;
    byId("ask").disabled = false;
    const query = byId("query").value.trim();
    const path = query ? `api/tokenize?query=${encodeURIComponent(query)}` : "api/tokenize";
    const reading = await call(path, { method: "POST", body: picture, headers: { "X-Dove-Fast": "page" } });
    const first = await reconstruct(reading.id, [reading.length]);
    if (mine !== latest) return;
    const { threshold, length } = reading;
    shown = { reading, made: new Map(first), threshold, kept: length, chosen: length };
    say("");
    showReading();
    fetchAhead(shown);
  } catch (error) {
    if (mine === latest) say("", error.message);
  }
}

async function reconstruct(id, lengths) {
  const found = await call(`api/reconstructions/${id}/${lengths.join(",")}`);
  return found.reconstructions.map((one) => [one.length, one]);
}

// From coarse to fine, so that what is near the slider is there soon.
function coarseToFine(count) {
  const order = new Set([1, count]);
  for (let step = 2 ** Math.ceil(Math.log2(count)); step >= 1; step /= 2) {
    for (let n = step; n <= count; n += step) order.add(n);
  }
  return [...order];
}

async function fetchAhead(mine) {
  const order = coarseToFine(model.num_tokens);
  let ahead = 1;
  try {
    while (mine === shown) {
      const missing = order.filter((n) => !mine.made.has(n)).slice(0, ahead);
      if (!missing.length) return;
      const start = performance.now();
      await keep(mine, missing);
      const each = (performance.now() - start) / missing.length;
      // A large model on a slow device computes only what the slider asks for.
      if (each > SLOW) return;
      ahead = Math.max(1, Math.min(AHEAD, model.batch_size, Math.floor(TARGET / each)));
    }
  } catch (error) {
    if (mine === shown) say("", error.message);
  }
}

async function keep(mine, lengths) {
  for (const [n, one] of await reconstruct(mine.reading.id, lengths)) mine.made.set(n, one);
  if (mine === shown) showChosen();
}

// What the slider stands on is fetched at once, one at a time: the last one of a movement, not every one.
let fetching = false;
async function fetchChosen() {
  if (fetching) return;
  fetching = true;
  let mine;
  try {
    while (!shown.made.has(shown.chosen)) await keep((mine = shown), [shown.chosen]);
  } catch (error) {
    if (mine === shown) say("", error.message);
  } finally {
    fetching = false;
  }
}

// Showing

function showReading() {
  const { reading } = shown, count = reading.eos.length;
  byId("result").hidden = false;
  byId("slider").max = count;
  // The slider stands on the nearest of its steps; the threshold is the model's until it is moved.
  byId("threshold").value = reading.threshold;
  byId("original").src = reading.original;
  byId("about-original").title = "Complexity: the variance of the Laplacian of the grey picture";
  byId("about-original").textContent =
    `from ${reading.width} × ${reading.height}; complexity ${Math.round(reading.complexity)}`;
  byId("vqgan").src = reading.vqgan;
  byId("vqgan-psnr").textContent = `all ${model.num_features} features, ${reading.vqgan_psnr.toFixed(1)} dB`;
  document.documentElement.style.setProperty("--count", count);
  drawTokens(reading, count);
  showKept(reading.length);
}

function showKept(length) {
  const { threshold, reading: { eos } } = shown;
  const stopped = eos[length - 1] > threshold;
  shown.kept = length;
  byId("count").textContent = `${length} of ${tokens(eos.length)}.`;
  byId("why").textContent = stopped
    ? `The model stopped here: the probability of EOS, the end, rose above ${exact(threshold)}.`
    : `The model did not stop by itself: the probability of EOS, the end, stays at ${exact(threshold)} or below.`;
  byId("to-kept").textContent = `Back to ${length}`;
  byId("threshold-value").textContent = exact(threshold);
  document.documentElement.style.setProperty("--kept", length);
  choose(length);
}

function choose(n) {
  shown.chosen = n;
  showChosen();
  fetchChosen();
}

function showChosen() {
  const { reading, made, threshold, kept, chosen } = shown, one = made.get(chosen);
  byId("slider").value = chosen;
  byId("slider").setAttribute("aria-valuetext", `${chosen} of ${tokens(reading.eos.length)}`);
  byId("slider-value").textContent = chosen;
  byId("made-figure").setAttribute("aria-busy", String(!one));
  byId("about-made").textContent = `From ${tokens(chosen)}`;
  byId("made").alt = `From ${tokens(chosen)}`;
  byId("made-psnr").textContent = one ? `${one.psnr.toFixed(1)} dB` : "…";
  if (one && byId("made").src !== one.picture) byId("made").src = one.picture;
  document.documentElement.style.setProperty("--chosen", chosen);
  drawLooks();
  const count = reading.eos.length, marks = { count, kept, chosen };
  const ends = reading.eos.map((p, i) => [i + 1, p]);
  plot(byId("eos-plot"), "EOS probability", ends, threshold,
    { ...marks, digits: 2, least: 0.1, within: [0, 1], levelText: exact(threshold) });
  const quality = [...made.values()].sort((a, b) => a.length - b.length).map((m) => [m.length, m.psnr]);
  // Where the tokens show more, the VQGAN alone is no bound that would help to read the curve.
  const isBound = reading.vqgan_psnr >= Math.max(...quality.map(([, y]) => y));
  byId("no-bound").hidden = isBound;
  byId("psnr-legend").hidden = !isBound;
  plot(byId("psnr-plot"), "PSNR", quality, isBound ? reading.vqgan_psnr : null, { ...marks, digits: 1, least: 1 });
}

// Draws points [n, y] in a range of y that holds them and the level, if there is one.
function plot(box, name, points, level, options) {
  const { count, kept, chosen, digits, least, within = [-Infinity, Infinity], levelText } = options;
  const values = points.map(([, y]) => y).concat(level ?? []);
  let low = Math.min(...values), high = Math.max(...values);
  const room = Math.max(least - (high - low), (high - low) * 0.2) / 2;
  [low, high] = [Math.max(within[0], low - room), Math.min(within[1], high + room)];
  const x = (n) => ((n - 0.5) / count) * 100, y = (v) => 100 - ((v - low) / (high - low)) * 100;
  const places = points.map(([n, v]) => `${x(n).toFixed(3)},${y(v).toFixed(3)}`);
  const upright = (kind, n) => `<line class="${kind}" x1="${x(n)}" x2="${x(n)}" y1="0" y2="100"/>`;
  const number = (v) => v.toFixed(digits), here = points.find(([n]) => n === chosen);
  const label = `${name} at ${tokens(chosen)}: ${here ? number(here[1]) : "not known yet"}`;
  box.innerHTML = `<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="${label}">
    <rect class="frame" width="100" height="100"/>
    ${upright("kept", kept)}${upright("here", chosen)}
    ${level === null ? "" : `<line class="level" x1="0" x2="100" y1="${y(level)}" y2="${y(level)}"/>`}
    <polyline class="curve" points="${places.join(" ")}"/>
    <path class="dots" d="${places.length < 33 ? places.map((place) => `M${place}h0`).join("") : ""}"/></svg>`;
  const mark = (kind, text, top) => {
    const span = document.createElement("span");
    [span.className, span.textContent] = [kind, text];
    if (top !== undefined) span.style.top = `${top}%`;
    box.append(span);
  };
  // The ends of the range, where the level's number leaves room for them.
  if (level === null || y(level) > 15) mark("top", number(high));
  if (level === null || y(level) < 85) mark("bottom", number(low));
  if (level !== null) mark("of-level", levelText ?? number(level), y(level));
}

const bytes = (encoded) => Uint8Array.from(atob(encoded), (c) => c.charCodeAt(0));

// Darkens the original where the chosen tokens' last one does not look.
function drawLooks() {
  const canvas = byId("looks"), side = Math.sqrt(model.num_features);
  canvas.hidden = !byId("looking").checked;
  if (canvas.hidden) return;
  const start = (shown.chosen - 1) * model.num_features, picture = new ImageData(side, side);
  bytes(shown.reading.attention).slice(start, start + model.num_features).forEach((weight, i) => {
    picture.data[4 * i + 3] = 0.85 * (255 - weight);
  });
  [canvas.width, canvas.height] = [side, side];
  canvas.getContext("2d").putImageData(picture, 0, 0);
}

function drawTokens({ tokens: encoded, width_of_token: width }, count) {
  const values = bytes(encoded);
  const canvas = byId("tokens");
  [canvas.width, canvas.height] = [count, width];
  canvas.setAttribute("aria-label", `${tokens(count)} of ${width} numbers each`);
  const picture = new ImageData(count, width);
  for (let n = 0; n < count; n++) {
    for (let i = 0; i < width; i++) {
      // The further from the mean, the less transparent.
      const away = values[n * width + i] - 128;
      const colour = away < 0 ? [50, 110, 220] : [230, 120, 20];
      picture.data.set([...colour, Math.min(255, 2 * Math.abs(away))], 4 * (i * count + n));
    }
  }
  canvas.getContext("2d").putImageData(picture, 0, 0);
}

// Drawn pictures

const SAMPLES = {
  Flat: (draw, size) => {
    draw.fillStyle = "#4a8fd0";
    draw.fillRect(0, 0, size, size);
  },
  Gradient: (draw, size) => {
    const fill = draw.createLinearGradient(0, 0, size, size);
    fill.addColorStop(0, "#20306a");
    fill.addColorStop(1, "#f6b26b");
    draw.fillStyle = fill;
    draw.fillRect(0, 0, size, size);
  },
  Checks: (draw, size) => {
    for (let i = 0; i < 64; i++) {
      draw.fillStyle = (i + (i >> 3)) % 2 ? "#222" : "#e8e4d8";
      draw.fillRect(((i % 8) * size) / 8, ((i >> 3) * size) / 8, size / 8, size / 8);
    }
  },
  Noise: (draw, size) => {
    const picture = draw.createImageData(size, size);
    // The same noise every time.
    let state = 1;
    for (let i = 0; i < picture.data.length; i++) {
      state = (state * 48271) % 2147483647;
      picture.data[i] = i % 4 === 3 ? 255 : state >> 23;
    }
    draw.putImageData(picture, 0, 0);
  },
};

function addSamples() {
  for (const [name, paint] of Object.entries(SAMPLES)) {
    const canvas = document.createElement("canvas"), button = document.createElement("button");
    canvas.width = canvas.height = model.image_size;
    paint(canvas.getContext("2d"), model.image_size);
    button.type = "button";
    button.title = name;
    button.setAttribute("aria-label", name);
    button.append(canvas);
    button.addEventListener("click", () => canvas.toBlob(give));
    byId("samples").append(button);
  }
}

// What people do

function listen() {
  byId("file").addEventListener("change", ({ target }) => {
    if (target.files.length) give(target.files[0]);
    // So that the same file may be chosen again.
    target.value = "";
  });
  document.addEventListener("paste", ({ clipboardData }) => {
    if (clipboardData.files.length) give(clipboardData.files[0]);
  });
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    document.body.classList.add("dropping");
  });
  document.addEventListener("dragleave", ({ relatedTarget }) => {
    if (!relatedTarget) document.body.classList.remove("dropping");
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("dropping");
    if (event.dataTransfer.files.length) give(event.dataTransfer.files[0]);
    else say("", "That was no file. Save the picture first, then drop the file.");
  });
  byId("slider").addEventListener("input", ({ target }) => choose(Number(target.value)));
  byId("to-kept").addEventListener("click", () => choose(shown.kept));
  byId("looking").addEventListener("change", drawLooks);
  byId("threshold").addEventListener("input", ({ target }) => {
    shown.threshold = Number(target.value);
    const first = shown.reading.eos.findIndex((p) => p > shown.threshold);
    showKept(first < 0 ? shown.reading.eos.length : first + 1);
  });
  byId("tokens").addEventListener("click", ({ offsetX, target }) => {
    choose(Math.min(model.num_tokens, Math.floor((offsetX / target.clientWidth) * model.num_tokens) + 1));
  });
  byId("query-form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (content) give(content);
  });
}

async function start() {
  try {
    model = await call("api/model");
  } catch (error) {
    return say("", error.message);
  }
  byId("model").textContent =
    `${model.name}: ${model.image_size} × ${model.image_size} pixels, at most ${tokens(model.num_tokens)}; ` +
    `${model.device}, ${model.dtype}; dove_fast ${model.version}. ` +
    "Pictures stay in the memory of the machine that serves this page.";
  byId("query-form").hidden = !model.reads_queries;
  addSamples();
  listen();
  document.body.dataset.ready = "true";
}

start();
