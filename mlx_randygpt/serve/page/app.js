// The page: a client of the same API as all others, with one stream at a time.

const LOST = "the connection was lost before the end of the text";
const $ = (id) => document.getElementById(id);
const SHADES = [0.05, 0.2, 0.5, 0.8]; // upper limits of the shades, as probabilities
const SLIDERS = [ // setting, label, minimum, maximum, step, command-line option
  ["max_tokens", "Max tokens", 1, 1000, 1, "--max-tokens"],
  ["temperature", "Temperature", 0, 2, 0.05, "--temperature"],
  ["top_p", "Top-p", 0, 1, 0.01, "--top-p"],
  ["top_k", "Top-k (0: off)", 0, 100, 1, "--top-k"],
  ["min_p", "Min-p (0: off)", 0, 1, 0.01, "--min-p"],
  ["typical_p", "Typical-p (1: off)", 0, 1, 0.01, "--typical-p"],
  ["repetition_penalty", "Repetition penalty", 0.5, 2, 0.05, "--repetition-penalty"],
];
let running = null; // the AbortController of the current stream
let beganBy = $("write"); // the button that is focused again after it
let model = null; // the response of /run
let written = ""; // prompt and text so far, which "Continue" continues; in a dialogue the answer
let given = ""; // the prompt of that text
let place = null; // the node to which tokens are appended
let talk = []; // the dialogue so far: { role, content, node }, with notices in between

async function request(path, body, signal) {
  const headers = { "content-type": "application/json" };
  const key = sessionStorage.getItem("key");
  if (key) headers.authorization = `Bearer ${key}`;
  const init = body ? { method: "POST", headers, body: JSON.stringify(body), signal } : { headers, signal };
  const response = await fetch(path, init);
  if (response.ok) return response;
  const details = await response.json().catch(() => null);
  $("key-row").hidden = response.status !== 401;
  throw new Error(details?.error?.message ?? `the server responded with status ${response.status}`);
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error(LOST);
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part === "data: [DONE]") return;
      const event = JSON.parse(part.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

// Writing

function settings() {
  const values = { seed: Number($("seed").value) };
  for (const [name] of SLIDERS) values[name] = Number($(name).value);
  return values;
}

async function write(prompt) {
  if (running) return;
  const body = () => ({ prompt, ...settings(), stream: true, logprobs: 5, truncate_prompt: true });
  await stream("/v1/completions", body, (values) => show(prompt, values), ({ logprobs, text }) => append(logprobs, text));
  refresh();
}

// The three lists in which completions have the log-probabilities of a chat's tokens
function asLists(content) {
  const pairs = (entry) => Object.fromEntries(entry.top_logprobs.map(({ token, logprob }) => [token, logprob]));
  return { tokens: content.map((entry) => entry.token), token_logprobs: content.map((entry) => entry.logprob), top_logprobs: content.map(pairs) };
}

async function say(prompt, before = talk) {
  if (running) return;
  const asked = [...before, turn("user", prompt)], answer = turn("assistant", "");
  const body = () => ({ messages: messages(asked), ...settings(), stream: true, logprobs: true, top_logprobs: 5 });
  const begin = (values) => {
    written = given = "";
    $("prompt").value = "";
    place = answer.node;
    $("text").replaceChildren(...[...asked, answer].map(({ node }) => node));
    $("text").scrollTop = $("text").scrollHeight;
    $("passages").replaceChildren();
    $("copied").textContent = $("choice").textContent = "";
    showCommand(prompt, values);
  };
  const take = ({ logprobs, delta }) => (logprobs ? append(asLists(logprobs.content), delta.content ?? "") : 0);
  const notice = (text) => {
    asked.push(turn("notice", text));
    answer.node.before(asked.at(-1).node);
    $("text").scrollTop = $("text").scrollHeight;
  };
  if (await stream("/v1/chat/completions", body, begin, take, notice)) {
    talk = [...asked, { ...answer, content: written }];
  } else {
    $("prompt").value = prompt;
    $("text").replaceChildren(...talk.map(({ node }) => node));
  }
  setBusy(false);
  refresh();
}

function turn(role, content) {
  const node = document.createElement("div");
  node.className = `turn ${role}`;
  node.textContent = content;
  return { role, content, node };
}

function messages(turns) {
  const system = $("system").value;
  const spoken = turns.filter(({ role }) => role !== "notice").map(({ role, content }) => ({ role, content }));
  return system ? [{ role: "system", content: system }, ...spoken] : spoken;
}

function answerAgain() {
  const at = talk.findLastIndex(({ role }) => role === "user");
  if (at >= 0) say(talk[at].content, talk.slice(0, at));
}

function forget() {
  talk = [];
  written = "";
  $("text").replaceChildren();
  $("choice").textContent = $("status").textContent = "";
  setBusy(false);
}

// Send a request and take its text as it comes; return whether there is one, stopped or not
async function stream(path, makeBody, begin, take, notice = null) {
  if (!$("keep-seed").checked) newSeed();
  const control = (running = new AbortController()), body = makeBody();
  begin(body);
  setBusy(true);
  const started = performance.now();
  let n = 0, reason = "", warnings = null;
  try {
    for await (const event of events(await request(path, body, control.signal))) {
      if (!warnings && notice) event.warnings?.forEach(notice);
      warnings = (!notice && event.warnings) || [];
      const [choice] = event.choices;
      if (!choice) continue;
      n += take(choice);
      reason = choice.finish_reason ?? "";
      const rate = Math.round(n / ((performance.now() - started) / 1000));
      const parts = [`${n} tokens`, `${rate}/s`, ...(reason === "stop" ? ["ended on its own"] : [])];
      showStatus([parts.join(", "), ...warnings].join("; "));
    }
    return true;
  } catch (error) {
    if (error.name !== "AbortError") showError(error);
    else showStatus(`stopped after ${n} tokens`);
    return error.name === "AbortError";
  } finally {
    running = null;
    setBusy(false);
  }
}

function refresh() {
  if ($("attention").open) showAttention();
  if ($("copies").open) showCopies();
}

function show(prompt, body) {
  written = given = prompt;
  $("passages").replaceChildren();
  $("copied").textContent = "";
  const span = document.createElement("span");
  span.className = "given";
  span.textContent = prompt;
  place = $("text");
  place.replaceChildren(span);
  $("choice").textContent = "";
  showCommand(prompt, body);
}

function append(logprobs, text) {
  const view = $("text");
  const atBottom = view.scrollHeight - view.scrollTop - view.clientHeight < 40;
  written += text;
  let left = text; // the tokens include a stop text, the text does not
  logprobs.tokens.forEach((token, i) => {
    const shown = left.startsWith(token) ? token : left;
    left = left.slice(shown.length);
    if (shown) place.append(tokenSpan(shown, logprobs.token_logprobs[i], logprobs.top_logprobs[i]));
  });
  if (atBottom) view.scrollTop = view.scrollHeight;
  return logprobs.tokens.length;
}

function tokenSpan(token, logprob, likeliest) {
  const span = document.createElement("span");
  const p = Math.exp(logprob);
  const shade = SHADES.findIndex((limit) => p <= limit);
  span.className = `token t${shade < 0 ? SHADES.length : shade}${token === "\n" ? " line" : ""}`;
  span.textContent = token;
  span.describe = () => {
    const others = Object.entries(likeliest).filter(([other]) => other !== token);
    const listed = others.map(([other, q]) => `${quoted(other)} ${percent(Math.exp(q))}`);
    describe($("choice"), `${quoted(token)} ${percent(p)}`, ` instead of ${listed.join(" · ")}`);
  };
  return span;
}

// Selecting a token with the mouse, by touch, or with the arrow keys

function makeSelectable(view) {
  let current = null;
  const select = (span) => {
    if (!span?.describe) return;
    current?.classList.remove("on");
    (current = span).classList.add("on");
    span.describe();
  };
  view.addEventListener("mouseover", (event) => select(event.target));
  view.addEventListener("click", (event) => select(event.target));
  view.addEventListener("keydown", (event) => {
    const spans = [...view.querySelectorAll(".token")];
    const at = spans.indexOf(current);
    const to = { ArrowRight: at + 1, ArrowLeft: at < 0 ? spans.length - 1 : at - 1, Home: 0, End: spans.length - 1 }[event.key];
    if (to === undefined || !spans[to]) return;
    event.preventDefault();
    select(spans[to]);
    spans[to].scrollIntoView({ block: "nearest" });
  });
}

// Attention

async function showAttention() {
  if (model.dialogue ? !talk.length : !written) return;
  const subject = model.dialogue ? { messages: messages(talk) } : { text: written };
  const body = { ...subject, layer: Number($("layer").value), head: Number($("head").value) };
  try {
    const { tokens, weights } = await (await request("/attention", body)).json();
    const spans = tokens.map((token) => {
      const span = document.createElement("span");
      span.className = "token";
      span.textContent = token;
      return span;
    });
    spans.forEach((span, i) => (span.describe = () => tintShares(spans, weights[i], i, tokens)));
    $("map").replaceChildren(...spans);
    spans.at(-1)?.describe();
  } catch (error) {
    showError(error);
  }
}

function tintShares(spans, row, at, tokens) {
  const largest = Math.max(...row, 0.01);
  spans.forEach((span, j) => {
    span.classList.toggle("on", j === at);
    span.style.background = j < row.length ? `rgba(var(--share), ${(0.75 * row[j]) / largest})` : "";
  });
  const best = row.map((share, j) => [share, j]).sort((a, b) => b[0] - a[0]).slice(0, 4);
  const listed = best.map(([share, j]) => `${quoted(tokens[j])} ${at - j ? `${at - j} back` : "itself"} ${percent(share)}`);
  describe($("shares"), quoted(tokens[at]), ` attends to ${listed.join(" · ")}`);
}

// Copies

async function showCopies() {
  const text = written.slice(given.length);
  if (!text || running) return;
  try {
    const { share, longest, passages, text_changed } = await (await request("/copies", { text })).json();
    const changed = text_changed ? "; the training text has changed since" : "";
    describe($("copied"), percent(share), ` in runs of 30 or more characters; the longest run has ${longest.stop - longest.start}: ${quoted(longest.text)}${changed}`);
    const characters = [...text]; // places count characters, not the halves of JavaScript
    const copied = characters.map((_, i) => passages.some(({ start, stop }) => start <= i && i < stop));
    const parts = characters.map((character, i) => {
      const node = document.createElement(copied[i] ? "u" : "span");
      node.textContent = character;
      return node;
    });
    $("passages").replaceChildren(...parts);
  } catch (error) {
    showError(error);
  }
}

function drawCurve(curve) {
  const { loss = [], val_loss: val = [] } = curve;
  if (!loss.length) return $("curve").replaceChildren("There is no metrics.jsonl next to the checkpoint.");
  const [w, h, edge] = [$("curve").clientWidth || 640, 260, 40];
  const all = [...loss, ...val];
  const last = Math.max(...all.map(([step]) => step), 1);
  const values = all.map(([, y]) => y), low = Math.min(...values), high = Math.max(...values);
  const x = (step) => edge + ((w - edge - 10) * step) / last;
  const y = (v) => 12 + ((h - edge - 12) * (high - v)) / (high - low || 1);
  const svg = make("svg", { viewBox: `0 0 ${w} ${h}`, role: "img", "aria-label":
    `Loss from ${values[0].toFixed(2)} down to ${low.toFixed(2)} in ${last} steps` });
  for (const v of [low, (low + high) / 2, high]) {
    svg.append(make("line", { x1: edge, x2: w - 10, y1: y(v), y2: y(v) }));
    svg.append(make("text", { x: edge - 6, y: y(v) + 4, "text-anchor": "end" }, v.toFixed(2)));
  }
  svg.append(make("text", { x: edge, y: h - 18 }, "step 0"));
  svg.append(make("text", { x: w - 10, y: h - 18, "text-anchor": "end" }, last.toLocaleString("en")));
  for (const [points, kind, at] of [[loss, "train", w / 2 - 70], [val, "val", w / 2 + 30]]) {
    svg.append(make("polyline", { class: kind, points: points.map(([s, v]) => `${x(s)},${y(v)}`).join(" ") }));
    svg.append(make("text", { class: kind, x: at, y: h - 18 }, kind === "val" ? "validation" : "training"));
  }
  $("curve").replaceChildren(svg);
  browseCurve(svg, loss, val, x);
}

function browseCurve(svg, loss, val, x) {
  const line = svg.appendChild(make("line", { y1: 0, y2: 230 }));
  let at = loss.length - 1;
  const count = (step) => Math.round(step).toLocaleString("en");
  const select = (i) => {
    if (!loss[i]) return;
    const [step, value] = loss[(at = i)], evaluated = val.filter(([s]) => s <= step).at(-1);
    line.setAttribute("x1", x(step));
    line.setAttribute("x2", x(step));
    const validation = evaluated ? ` · validation ${evaluated[1].toFixed(4)} at step ${count(evaluated[0])}` : "";
    describe($("curve-values"), `step ${count(step)}`, ` training ${value.toFixed(4)}${validation}`);
  };
  $("curve").onkeydown = (event) => {
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: loss.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    select(to);
  };
  $("curve").onpointermove = $("curve").onclick = (event) => {
    const box = svg.getBoundingClientRect(), place = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const distance = (i) => Math.abs(x(loss[i][0]) - place);
    select(loss.reduce((best, _, i) => (distance(i) < distance(best) ? i : best), 0));
  };
  select(at);
}

async function copyCommand() {
  try {
    await navigator.clipboard.writeText($("command").textContent);
    showStatus("The command is copied.");
  } catch { // not allowed: select it, for the keyboard
    getSelection().selectAllChildren($("command"));
  }
}

function make(name, attributes, text = "") {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  return node;
}

const percent = (p) => `${(100 * p).toFixed(p < 0.0995 ? 1 : 0)} %`;
const quoted = (text) => JSON.stringify(text);
const newSeed = () => ($("seed").value = crypto.getRandomValues(new Uint32Array(1))[0]);

function describe(place, strong, rest) {
  const name = document.createElement("b");
  name.textContent = strong;
  place.replaceChildren(name, rest);
}

function showCommand(prompt, values) {
  const word = (text) => `'${String(text).replaceAll("'", "'\\''")}'`;
  const options = SLIDERS.filter(([name]) => values[name] !== model.plain[name]);
  const named = options.map(([name, , , , , option]) => ` ${option} ${values[name]}`).join("");
  const program = model.dialogue ? "chat" : `sample --prompt ${word(prompt)}`;
  const line = `mlxgpt ${program}${named}${model.options} --seed ${values.seed}`;
  const words = line.match(/\S+\s*/g).map((text) => Object.assign(document.createElement("span"), { textContent: text }));
  $("command").replaceChildren(...words); // each on one line: no break inside --option
}

function showStatus(text, wrong = false) {
  $("status").textContent = text;
  $("status").classList.toggle("wrong", wrong);
}

// The button that begins a text is disabled until its end; the keyboard waits on Stop
function setBusy(on) {
  const at = document.activeElement;
  const leaves = on ? at === $("write") || at === $("onward") : at === $("stop");
  if (on && leaves) beganBy = at;
  $("write").disabled = on;
  $("stop").disabled = !on;
  $("onward").disabled = on || !(model?.dialogue ? talk.length : written);
  $("again").disabled = on || !talk.length;
  if (leaves) (on ? $("stop") : beganBy).focus();
  if (on) showStatus("…");
}

async function showError(error) {
  const gone = error instanceof TypeError || error.message === LOST;
  if (!gone) return showStatus(error.message, true);
  showStatus("The server does not respond; waiting for it.", true);
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, 1000));
    if (await fetch("/health").then((response) => response.ok, () => false)) break;
  }
  await loadModel().then(() => showStatus("The server is back."), showError);
}

function build() {
  for (const [name, label, low, high, step] of SLIDERS) {
    const line = document.createElement("label"), value = document.createElement("output");
    const slider = Object.assign(document.createElement("input"), { type: "range", id: name, min: low, max: high, step });
    value.className = "value";
    value.htmlFor = line.htmlFor = name;
    slider.show = () => (value.textContent = slider.value);
    slider.addEventListener("input", slider.show);
    line.append(label, value);
    $("sliders").append(line, slider);
  }
  const send = () => (model?.dialogue ? say : write)($("prompt").value);
  $("write").onclick = send;
  $("onward").onclick = () => (model.dialogue ? answerAgain() : write(written));
  $("again").onclick = forget;
  $("stop").onclick = () => running?.abort();
  $("dice").onclick = newSeed;
  $("layer").onchange = $("head").onchange = showAttention;
  $("attention").ontoggle = () => $("attention").open && showAttention();
  $("copies").ontoggle = () => $("copies").open && showCopies();
  $("key-row").onsubmit = (event) => { event.preventDefault(); sessionStorage.setItem("key", $("key").value); loadModel().then(() => showStatus(""), showError); };
  $("copy").onclick = copyCommand;
  $("run").ontoggle = () => drawCurve(model?.curve ?? {});
  $("settings").onsubmit = (event) => event.preventDefault();
  $("theme").onclick = toggleTheme;
  addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) send();
    if (event.key === "Escape") running?.abort();
  });
  makeSelectable($("text"));
  makeSelectable($("map"));
}

function toggleTheme() {
  const root = document.documentElement.dataset;
  const dark = root.theme ? root.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  localStorage.setItem("theme", (root.theme = dark ? "light" : "dark"));
}

async function loadModel() {
  const first = !model;
  model = await (await request("/run")).json();
  $("key-row").hidden = true;
  $("name").textContent = document.title = model.name;
  $("facts").textContent = `${model.parameters.toLocaleString("en")} parameters, step ${model.step.toLocaleString("en")}, context ${model.block_size}, ${model.backend}`;
  $("copies").hidden = !model.check;
  $("system-row").hidden = $("again").hidden = !model.dialogue;
  if (!first) return;
  for (const [name] of SLIDERS) { $(name).value = model.defaults[name]; $(name).show(); }
  $("seed").value = model.defaults.seed;
  $("prompt").value = model.prompt;
  if (model.dialogue) {
    for (const [id, name] of [["prompt-name", "Your message"], ["write-name", "Send"], ["onward", "Answer again"], ["command-name", "On the command line"]]) $(id).textContent = name;
    $("text").setAttribute("aria-label", "The conversation; the arrow keys move from token to token");
  }
  for (const [id, n] of [["layer", model.n_layer], ["head", model.n_head]])
    $(id).replaceChildren(...Array.from({ length: n }, (_, i) => new Option(i + 1, i)));
}

const theme = localStorage.getItem("theme");
if (theme) document.documentElement.dataset.theme = theme;
build();
loadModel().catch(showError);
