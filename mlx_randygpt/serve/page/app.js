// The page: asks the same API as everybody else, one stream at a time.

const $ = (id) => document.getElementById(id);
const SHADES = [0.05, 0.2, 0.5, 0.8]; // where one shade ends and the next begins
const SLIDERS = [ // setting, its name, least, most, step, option of the command
  ["max_tokens", "Tokens at most", 1, 1000, 1, "--max-tokens"],
  ["temperature", "Temperature", 0, 2, 0.05, "--temperature"],
  ["top_p", "Top-p", 0, 1, 0.01, "--top-p"],
  ["top_k", "Top-k (0: off)", 0, 100, 1, "--top-k"],
  ["min_p", "Min-p (0: off)", 0, 1, 0.01, "--min-p"],
  ["typical_p", "Typical (1: off)", 0, 1, 0.01, "--typical-p"],
  ["repetition_penalty", "Repetition penalty", 0.5, 2, 0.05, "--repetition-penalty"],
];
let writing = null; // the AbortController of the stream at hand
let model = null; // what /run tells
let said = ""; // prompt and text, for what goes on from there

async function ask(path, body, signal) {
  const headers = { "content-type": "application/json" };
  const key = sessionStorage.getItem("key");
  if (key) headers.authorization = `Bearer ${key}`;
  const init = body ? { method: "POST", headers, body: JSON.stringify(body), signal } : { headers, signal };
  const answer = await fetch(path, init);
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => null);
  $("key-row").hidden = answer.status !== 401;
  throw new Error(told?.error?.message ?? `the server answered ${answer.status}`);
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the server left in the middle of the text");
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
  if (writing) return;
  if (!$("keep-seed").checked) newSeed();
  const control = (writing = new AbortController());
  const body = { prompt, ...settings(), stream: true, logprobs: 5, truncate_prompt: true };
  show(prompt, body);
  busy(true);
  const started = performance.now();
  let n = 0, reason = "";
  try {
    for await (const event of events(await ask("/v1/completions", body, control.signal))) {
      const [choice] = event.choices;
      if (!choice) continue;
      n += append(choice.logprobs, choice.text);
      reason = choice.finish_reason ?? "";
      const rate = Math.round(n / ((performance.now() - started) / 1000));
      tell(`${n} tokens, ${rate}/s${reason === "stop" ? ", ended by itself" : ""}`);
    }
  } catch (error) {
    if (error.name === "AbortError") tell(`stopped after ${n} tokens`);
    else failed(error);
  } finally {
    writing = null;
    busy(false);
    if ($("attention").open) attend();
  }
}

function show(prompt, body) {
  said = prompt;
  const given = document.createElement("span");
  given.className = "given";
  given.textContent = prompt;
  $("text").replaceChildren(given);
  $("choice").textContent = "";
  $("command").textContent = command(prompt, body);
}

function append(logprobs, text) {
  const view = $("text");
  const below = view.scrollHeight - view.scrollTop - view.clientHeight < 40;
  said += text;
  let left = text; // a stop text is among the tokens and not in the text
  logprobs.tokens.forEach((token, i) => {
    const shown = left.startsWith(token) ? token : left;
    left = left.slice(shown.length);
    if (shown) view.append(tokenSpan(shown, logprobs.token_logprobs[i], logprobs.top_logprobs[i]));
  });
  if (below) view.scrollTop = view.scrollHeight;
  return logprobs.tokens.length;
}

function tokenSpan(token, logprob, likeliest) {
  const span = document.createElement("span");
  const p = Math.exp(logprob);
  const shade = SHADES.findIndex((most) => p <= most);
  span.className = `token t${shade < 0 ? SHADES.length : shade}${token === "\n" ? " line" : ""}`;
  span.textContent = token;
  span.tell = () => {
    const others = Object.entries(likeliest).filter(([other]) => other !== token);
    const listed = others.map(([other, q]) => `${quoted(other)} ${percent(Math.exp(q))}`);
    describe($("choice"), `${quoted(token)} ${percent(p)}`, ` instead of ${listed.join(" · ")}`);
  };
  return span;
}

// Choosing a token: by pointing, by touch, by the arrow keys

function choosable(view) {
  let current = null;
  const choose = (span) => {
    if (!span?.tell) return;
    current?.classList.remove("on");
    (current = span).classList.add("on");
    span.tell();
  };
  view.addEventListener("mouseover", (event) => choose(event.target));
  view.addEventListener("click", (event) => choose(event.target));
  view.addEventListener("keydown", (event) => {
    const spans = [...view.querySelectorAll(".token")];
    const at = spans.indexOf(current);
    const to = { ArrowRight: at + 1, ArrowLeft: at < 0 ? spans.length - 1 : at - 1, Home: 0, End: spans.length - 1 }[event.key];
    if (to === undefined || !spans[to]) return;
    event.preventDefault();
    choose(spans[to]);
    spans[to].scrollIntoView({ block: "nearest" });
  });
}

// Attention

async function attend() {
  if (!said) return;
  const body = { text: said, layer: Number($("layer").value), head: Number($("head").value) };
  try {
    const { tokens, weights } = await (await ask("/attention", body)).json();
    const spans = tokens.map((token) => {
      const span = document.createElement("span");
      span.className = "token";
      span.textContent = token;
      return span;
    });
    spans.forEach((span, i) => (span.tell = () => tintShares(spans, weights[i], i, tokens)));
    $("map").replaceChildren(...spans);
    spans.at(-1)?.tell();
  } catch (error) {
    failed(error);
  }
}

function tintShares(spans, row, at, tokens) {
  const most = Math.max(...row, 0.01);
  spans.forEach((span, j) => {
    span.classList.toggle("on", j === at);
    span.style.background = j < row.length ? `rgba(var(--share), ${(0.75 * row[j]) / most})` : "";
  });
  const best = row.map((share, j) => [share, j]).sort((a, b) => b[0] - a[0]).slice(0, 4);
  const listed = best.map(([share, j]) => `${quoted(tokens[j])} ${at - j ? `${at - j} back` : "itself"} ${percent(share)}`);
  describe($("shares"), quoted(tokens[at]), ` looks at ${listed.join(" · ")}`);
}

function drawCurve(curve) {
  const { loss = [], val_loss: val = [] } = curve;
  if (!loss.length) return $("curve").replaceChildren("No metrics.jsonl beside the checkpoint.");
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

function command(prompt, values) {
  const word = (text) => `'${String(text).replaceAll("'", "'\\''")}'`;
  const options = SLIDERS.filter(([name]) => values[name] !== model.plain[name]);
  const named = options.map(([name, , , , , option]) => ` ${option} ${values[name]}`).join("");
  return `mlxgpt sample --prompt ${word(prompt)}${named}${model.options} --seed ${values.seed}`;
}

function tell(text, wrong = false) {
  $("status").textContent = text;
  $("status").classList.toggle("wrong", wrong);
}

function busy(on) {
  $("write").disabled = on;
  $("stop").disabled = !on;
  $("onward").disabled = on || !said;
  if (on) tell("…");
}

async function failed(error) {
  const gone = error instanceof TypeError || /left in the middle/.test(error.message);
  if (!gone) return tell(error.message, true);
  tell("The server is gone; waiting for it.", true);
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, 1000));
    if (await fetch("/health").then((a) => a.ok, () => false)) break;
  }
  await begin().then(() => tell("The server is back."), failed);
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
  $("write").onclick = () => write($("prompt").value);
  $("onward").onclick = () => write(said);
  $("stop").onclick = () => writing?.abort();
  $("dice").onclick = newSeed;
  $("layer").onchange = $("head").onchange = attend;
  $("attention").ontoggle = () => $("attention").open && attend();
  $("key-row").onsubmit = (event) => { event.preventDefault(); sessionStorage.setItem("key", $("key").value); begin().then(() => tell(""), failed); };
  $("run").ontoggle = () => drawCurve(model?.curve ?? {});
  $("settings").onsubmit = (event) => event.preventDefault();
  $("theme").onclick = toggleTheme;
  addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) write($("prompt").value);
    if (event.key === "Escape") writing?.abort();
  });
  choosable($("text"));
  choosable($("map"));
}

function toggleTheme() {
  const root = document.documentElement.dataset;
  const dark = root.theme ? root.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  localStorage.setItem("theme", (root.theme = dark ? "light" : "dark"));
}

async function begin() {
  const first = !model;
  model = await (await ask("/run")).json();
  $("key-row").hidden = true;
  $("name").textContent = document.title = model.name;
  $("facts").textContent = `${model.parameters.toLocaleString("en")} parameters, step ${model.step.toLocaleString("en")}, context ${model.block_size}, ${model.backend}`;
  if (!first) return;
  for (const [name] of SLIDERS) { $(name).value = model.defaults[name]; $(name).show(); }
  $("seed").value = model.defaults.seed;
  $("prompt").value = model.prompt;
  for (const [id, n] of [["layer", model.n_layer], ["head", model.n_head]])
    $(id).replaceChildren(...Array.from({ length: n }, (_, i) => new Option(i, i)));
}

const theme = localStorage.getItem("theme");
if (theme) document.documentElement.dataset.theme = theme;
build();
begin().catch(failed);
