// Show nodes and runs, and follow them by server-sent events. Text of other parties gets in as text nodes only.
"use strict";

const SVG = "http://www.w3.org/2000/svg";
const RELOAD_MS = 10000; // after the server refused the events, e.g. because the session has ended
const byId = (id) => document.getElementById(id);
let events = null;
let detail = null; // the last event about the run that is shown

// ---------- elements ----------

function make(tag, className, ...content) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...content);
  return element;
}

function draw(tag, attributes, ...content) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, String(value));
  element.append(...content);
  return element;
}

function pill(state) {
  return make("span", "pill " + state.replace(/[^a-z]/g, "-"), state);
}

function keepRows(list, items, keyOf, fill) { // rows stay in place, so that the keyboard focus does
  const rows = new Map([...list.children].map((row) => [row.dataset.key, row]));
  const wanted = items.map((item) => {
    const key = keyOf(item);
    const row = rows.get(key) || make("li");
    const text = JSON.stringify(item);
    if (row.dataset.text !== text) fill(row, item);
    row.dataset.key = key;
    row.dataset.text = text;
    return row;
  });
  wanted.forEach((row, place) => {
    if (list.children[place] !== row) list.insertBefore(row, list.children[place] || null);
  });
  while (list.children.length > wanted.length) list.lastChild.remove();
}

// ---------- numbers ----------

const isNumber = (value) => typeof value === "number";

function plain(value) {
  if (value !== 0 && (Math.abs(value) >= 1e6 || Math.abs(value) < 1e-3)) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
}

function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let place = 0;
  while (value >= 1024 && place < units.length - 1) { value /= 1024; place += 1; }
  return `${Number(value.toPrecision(3))} ${units[place]}`;
}

function show(value, unit) {
  if (!isNumber(value)) return "–";
  if (unit === "%") return `${(100 * value).toFixed(1)} %`;
  if (unit === "bytes") return bytes(value);
  if (unit === "s") return `${Number(value.toPrecision(2))} s`;
  return plain(value);
}

function duration(seconds) {
  if (seconds < 90) return `${Math.max(1, Math.round(seconds))} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86400)} days`;
}

function moment(text) {
  const time = new Date(text.replace(" ", "T"));
  if (Number.isNaN(time.getTime())) return "";
  return time.toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
}

function experiment(run) {
  return [run.scenario, run.strategy].filter(Boolean).join(" · ") || run.key;
}

const progress = (run) => (run.rounds ? `${run.round} of ${run.rounds}` : String(run.round));
const metricUnit = (run) => (run.is_share ? "%" : "");
const epsilonText = (run) => (isNumber(run.epsilon) ? plain(run.epsilon) + (isNumber(run.epsilon_limit) ? ` of ${plain(run.epsilon_limit)}` : "") : "–");

function remaining(run) {
  if (run.state !== "running" || !isNumber(run.seconds) || run.rounds <= run.round) return "";
  return `about ${duration(run.seconds * (run.rounds - run.round))} left`;
}

// ---------- the list ----------

function fillRun(row, run) {
  const link = make("a", "row");
  link.href = `#run=${encodeURIComponent(run.key)}`;
  const bar = make("span", "progress", make("i"));
  bar.firstChild.style.width = run.rounds ? `${Math.min(100, (100 * run.round) / run.rounds)}%` : "0";
  const notes = [run.name, run.key, run.submitter && `submitted by ${run.submitter}`, moment(run.changed)].filter(Boolean).join(" · ");
  const round = make("span", "round", make("span", "", make("span", "word", "round "), progress(run)), bar);
  const metric = make("span", "metric", make("span", "", show(run.value, metricUnit(run))), make("small", "", run.metric || "no metric yet"));
  const epsilon = make("span", "epsilon metric", make("span", "", epsilonText(run)), make("small", "", isNumber(run.epsilon) ? "epsilon" : "no guarantee"));
  link.append(make("span", "state", pill(run.state)), make("span", "run-name", make("b", "", experiment(run)), make("small", "", notes)), round, metric, epsilon, trend(run.trend));
  row.replaceChildren(link);
}

function trend(values) {
  const picture = draw("svg", { class: "trend", viewBox: "0 0 132 34", "aria-hidden": "true" });
  const known = values.filter(isNumber);
  if (known.length < 2) return picture;
  const low = Math.min(...known), span = Math.max(...known) - low || 1;
  const place = (value, i) => `${(2 + (128 * i) / (known.length - 1)).toFixed(1)} ${(31 - (28 * (value - low)) / span).toFixed(1)}`;
  picture.append(draw("path", { d: "M" + known.map(place).join("L") }));
  return picture;
}

function fillNode(row, node) {
  const since = moment(node.since);
  const notes = [since && `${node.state === "online" ? "since" : "last seen"} ${since}`, node.version && `fedlearn ${node.version}`, node.framework];
  row.replaceChildren(make("span", "top", make("span", "name", node.name), pill(node.state)), make("small", "", notes.filter(Boolean).join(" · ") || "never connected"));
  if (node.problem) row.append(make("small", "warning", node.problem));
}

function showState(state) {
  byId("title").textContent = state.title;
  document.title = `${state.title} · fedlearn`;
  byId("problem").textContent = state.problem;
  byId("problem").hidden = !state.problem;
  byId("nodes").hidden = state.nodes === null;
  const nodes = state.nodes || [];
  byId("no-nodes").hidden = nodes.length > 0;
  const online = nodes.filter((node) => node.state === "online").length;
  byId("nodes-count").textContent = nodes.length ? `${online} of ${nodes.length} online` : "";
  keepRows(byId("node-rows"), nodes, (node) => node.name, fillNode);
  byId("no-runs").hidden = state.runs.length > 0;
  const more = state.num_runs > state.runs.length ? `newest ${state.runs.length} of ${state.num_runs}` : String(state.num_runs);
  byId("runs-count").textContent = state.runs.length ? more : "";
  keepRows(byId("run-rows"), state.runs, (run) => run.key, fillRun);
}

// ---------- one run ----------

function pairs(list, items) {
  list.replaceChildren(...items.map(([label, ...values]) => make("div", "", make("dt", "", label), ...values.map((value) => make("dd", "", value)))));
}

function showRun(shown) {
  const run = shown.run;
  detail = shown;
  byId("run-title").replaceChildren(experiment(run));
  byId("run-line").replaceChildren(pill(run.state), ` ${[run.name, run.key, run.submitter && `submitted by ${run.submitter}`, remaining(run)].filter(Boolean).join(" · ")}`);
  byId("run-reason").textContent = run.reason;
  byId("run-reason").hidden = !run.reason;
  byId("run-report").hidden = !run.has_report;
  byId("report-link").href = `/report?run=${encodeURIComponent(run.key)}`;
  pairs(byId("run-numbers"), [
    ["Round", progress(run)],
    [run.metric || "Metric", show(run.value, metricUnit(run))],
    ["Epsilon", epsilonText(run)],
    ["Last round", isNumber(run.seconds) ? show(run.seconds, "s") : "–"],
    ["Failures of clients", String(run.num_failures)],
    ["Sent by clients, to clients", `${bytes(run.bytes_up)}, ${bytes(run.bytes_down)}`],
    ["Last change", moment(run.changed) || "–"],
  ]);
  drawCharts();
  byId("failures").hidden = shown.failures.length === 0;
  byId("failure-rows").replaceChildren(...shown.failures.map((failure) => make("tr", "", ...[failure.round, failure.client, failure.stage, failure.reason].map((text) => make("td", "", String(text))))));
  byId("run-facts").replaceChildren(...shown.facts.flatMap(([label, text]) => [make("dt", "", label), make("dd", "", text)]));
}

function drawCharts() {
  const place = byId("charts"), height = place.offsetHeight;
  place.style.minHeight = `${height}px`; // the page does not jump while the charts are replaced
  const width = columnWidth(place);
  place.replaceChildren(...detail.charts.map((chart) => drawChart(chart, detail.rounds, width)));
  place.style.minHeight = "";
}

function columnWidth(place) {
  const columns = getComputedStyle(place).gridTemplateColumns.split(" ");
  return Math.max(240, Math.floor(parseFloat(columns[0]) || place.clientWidth));
}

function ticks(low, high, count, base = 10) {
  const raw = (high - low) / count, power = base ** Math.floor(Math.log(raw) / Math.log(base));
  const step = (base === 10 ? [1, 2, 5, 10] : [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]).map((times) => times * power).find((each) => each >= raw * 0.999);
  const found = [];
  for (let value = Math.ceil(low / step - 1e-9) * step; value <= high + step * 1e-9; value += step) found.push(Math.abs(value) < step * 1e-9 ? 0 : value);
  return found;
}

function range(chart) {
  const values = chart.curves.flatMap((curve) => curve.values.filter(isNumber));
  if (isNumber(chart.limit)) values.push(chart.limit);
  let low = Math.min(...values), high = Math.max(...values);
  if (chart.unit === "bytes" || chart.unit === "s" || isNumber(chart.limit)) low = Math.min(0, low);
  const margin = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
  return [low === 0 ? 0 : low - margin, high + margin];
}

function roundTicks(first, last, width) { // the last round, and round numbers that do not touch its label
  const between = first < last ? ticks(first, last, Math.max(2, Math.floor(width / 70))) : [];
  return [...between.filter((round) => Number.isInteger(round) && last - round > (last - first) * 0.1), last];
}

function drawChart(chart, rounds, width) {
  const height = 210, left = 62, right = 12, top = 12, bottom = 26;
  const [low, high] = range(chart);
  const first = rounds[0], last = Math.max(rounds[rounds.length - 1], first + 1);
  const x = (round) => left + ((width - left - right) * (round - first)) / (last - first);
  const y = (value) => top + ((height - top - bottom) * (high - value)) / (high - low);
  const picture = draw("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", tabindex: 0 });
  const label = `${chart.title}, ${chart.curves.map((curve) => `${curve.label} ${show(curve.values.findLast(isNumber), chart.unit)}`).join(", ")} at round ${rounds[rounds.length - 1]}`;
  picture.append(draw("title", {}, label));
  for (const value of ticks(low, high, 4, chart.unit === "bytes" ? 1024 : 10)) {
    picture.append(draw("line", { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }));
    picture.append(draw("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, chart.unit === "%" ? `${plain(100 * value)} %` : show(value, chart.unit)));
  }
  for (const round of roundTicks(first, rounds[rounds.length - 1], width)) {
    picture.append(draw("text", { x: x(round), y: height - 8, "text-anchor": "middle" }, String(round)));
  }
  if (isNumber(chart.limit)) picture.append(draw("line", { class: "limit", x1: left, x2: width - right, y1: y(chart.limit), y2: y(chart.limit) }));
  const legend = make("ul", "legend");
  chart.curves.forEach((curve, number) => {
    const kind = (number % 4) + 1;
    const places = curve.values.map((value, i) => [value, rounds[i]]).filter(([value]) => isNumber(value));
    picture.append(draw("path", { class: `curve curve-${kind}`, d: "M" + places.map(([value, round]) => `${x(round).toFixed(1)} ${y(value).toFixed(1)}`).join("L") }));
    if (places.length === 1) picture.append(draw("circle", { class: `dot-${kind}`, cx: x(places[0][1]), cy: y(places[0][0]), r: 3 }));
    const sample = draw("svg", { viewBox: "0 0 26 8", "aria-hidden": "true" }, draw("path", { class: `curve curve-${kind}`, d: "M1 4H25" }));
    legend.append(make("li", "", sample, `${curve.label} `, make("b", "", show(curve.values.findLast(isNumber), chart.unit))));
  });
  if (isNumber(chart.limit)) {
    const sample = draw("svg", { viewBox: "0 0 26 8", "aria-hidden": "true" }, draw("path", { class: "limit", d: "M1 4H25" }));
    legend.append(make("li", "", sample, `Limit ${show(chart.limit, chart.unit)}`));
  }
  const caption = make("figcaption", "", chart.title);
  addCursor(picture, chart, rounds, { x, y, top, bottom: height - bottom, caption, legend });
  return make("figure", "chart", caption, picture, legend);
}

function addCursor(picture, chart, rounds, place) { // values of a round under the pointer, or by the arrow keys
  const marks = draw("g", {});
  picture.append(marks);
  let chosen = rounds.length - 1;
  const values = [...place.legend.querySelectorAll("b")];
  const write = (i) => values.forEach((text, number) => { text.textContent = show(i === null ? chart.curves[number].values.findLast(isNumber) : chart.curves[number].values[i], chart.unit); });
  const choose = (i) => {
    chosen = i;
    const at = place.x(rounds[i]);
    marks.replaceChildren(draw("line", { class: "cursor", x1: at, x2: at, y1: place.top, y2: place.bottom }));
    chart.curves.forEach((curve, number) => {
      if (isNumber(curve.values[i])) marks.append(draw("circle", { class: `dot-${(number % 4) + 1}`, cx: at, cy: place.y(curve.values[i]), r: 3.5 }));
    });
    place.caption.textContent = `${chart.title}, round ${rounds[i]}`;
    write(i);
  };
  const leave = () => { marks.replaceChildren(); place.caption.textContent = chart.title; write(null); };
  picture.addEventListener("pointermove", (event) => {
    const at = event.clientX - picture.getBoundingClientRect().left;
    let near = 0;
    rounds.forEach((round, i) => { if (Math.abs(place.x(round) - at) < Math.abs(place.x(rounds[near]) - at)) near = i; });
    choose(near);
  });
  picture.addEventListener("pointerleave", leave);
  picture.addEventListener("blur", leave);
  picture.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step) { event.preventDefault(); choose(Math.min(rounds.length - 1, Math.max(0, chosen + step))); }
  });
}

// ---------- events ----------

function connect() {
  const match = /^#run=(.+)$/.exec(location.hash);
  let key = "";
  try { key = match ? decodeURIComponent(match[1]) : ""; } catch { key = ""; }
  byId("list").hidden = Boolean(key);
  byId("detail").hidden = !key;
  if (key) byId("run-title").textContent = key;
  if (events) events.close();
  events = new EventSource(`/events${key ? `?run=${encodeURIComponent(key)}` : ""}`);
  const connection = byId("connection");
  const live = (text, isLive) => { connection.textContent = text; connection.className = isLive ? "live" : "waiting"; };
  events.addEventListener("open", () => live("live", true));
  events.addEventListener("error", () => {
    live("no connection, trying again", false);
    if (events.readyState === EventSource.CLOSED) setTimeout(() => location.reload(), RELOAD_MS);
  });
  events.addEventListener("state", (event) => {
    const state = JSON.parse(event.data);
    showState(state);
    if (key && !state.runs.some((run) => run.key === key)) byId("run-line").textContent = "No run has this name here.";
  });
  events.addEventListener("run", (event) => showRun(JSON.parse(event.data)));
}

addEventListener("hashchange", () => { connect(); scrollTo(0, 0); if (!byId("detail").hidden) byId("run-title").focus(); });
addEventListener("resize", () => { if (detail && !byId("detail").hidden) drawCharts(); });
connect();
