"use strict";
// Curves, answers and samples of the page. Text from runs is set as textContent, never as markup.
// The reader's choices are kept when the page is loaded again or receives new data.

const make = (tag, text = "", name = "") => {
  const element = document.createElement(tag);
  element.textContent = text;
  if (name) element.className = name;
  return element;
};
const byId = (id) => document.getElementById(id);
const dataOf = (id) => JSON.parse(byId(id).textContent);
const prompt = (text) => {
  const box = make("details");
  box.append(make("summary", "prompt"), make("pre", text));
  return box;
};
const images = (of) => (of.images ?? []).filter((source) => source.startsWith("data:image/jpeg;base64,"))
  .map((src) => Object.assign(make("img"), { src, alt: `image of question ${of.id}` }));
const choose = (select, values, show = String) => {
  for (const value of values) {
    const option = make("option", show(value));
    option.value = String(value);
    select.append(option);
  }
};
// Show the first items of a list, and a button for more.
const PAGE = 5;
const pages = (list, more, card) => {
  let items = [], shown = PAGE;
  const draw = () => {
    list.replaceChildren(...items.slice(0, shown).map(card));
    more.hidden = shown >= items.length;
  };
  more.addEventListener("click", () => { shown += PAGE; draw(); });
  return (given) => { items = given; shown = PAGE; draw(); };
};

// --- curves: a chart for each chosen metric, with a line for each group of runs or for each run ---

const charts = new Map(); // by the metric's name
const zoom = () => {
  for (const { chart } of charts.values()) {
    const { min, max } = chart.scales.x, steps = chart.data[0];
    // The limits are null before the chart is drawn.
    if (min !== null && (min > steps[0] || max < steps.at(-1))) return { min, max };
  }
  return null;
};
const zoomTo = (range) => range && charts.forEach(({ chart }) => chart.setScale("x", range));

const curves = () => {
  const data = dataOf("explore-data"), hidden = new Set();
  const START = /^(reward|accuracy|format_ok|response_length|kl|entropy|nll|eval\..*\.accuracy)$/;
  const style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--soft"), line = style.getPropertyValue("--line");
  const single = byId("single");
  const summary = (rows, f) => rows[0].map((_, i) => {
    const values = rows.map((row) => row[i]).filter((x) => x !== null);
    return values.length ? f(values) : null;
  });
  const mean = (values) => values.reduce((sum, x) => sum + x, 0) / values.length;
  const four = (_, x) => (x === null || x === undefined ? "–" : String(Number(x.toPrecision(4))));
  // Return uPlot's series, bands and columns of a metric.
  const lines = (metric) => {
    const tables = [], series = [{ label: "step" }], bands = [];
    metric.curves.forEach(([steps, ...rows], i) => {
      const group = data.groups[i];
      if (!steps) return;
      const add = (label, values, look) => {
        tables.push([steps, values]);
        series.push({ label, group: i, show: !hidden.has(i), spanGaps: true, value: four, ...look });
      };
      const look = { stroke: group.color, width: 1.5, dash: group.dash };
      if (single.checked || rows.length === 1) rows.forEach((row, j) => add(group.runs[j], row, look));
      else {
        const edge = { stroke: "transparent", width: 0, class: "edge", points: { show: false } };
        add("", summary(rows, (x) => Math.max(...x)), edge);
        add("", summary(rows, (x) => Math.min(...x)), edge);
        bands.push({ series: [series.length - 2, series.length - 1], fill: `${group.color}30` });
        add(group.name, summary(rows, mean), look);
      }
    });
    return { series, bands, table: uPlot.join(tables) };
  };
  const draw = (metric) => {
    const box = make("div", "", "chart"), { series, bands, table } = lines(metric);
    box.append(make("h3", metric.unit ? `${metric.name} (${metric.unit})` : metric.name));
    box.append(make("p", metric.meaning, "soft"));
    byId("charts").append(box);
    const axis = { stroke: ink, grid: { stroke: line, width: 1 }, ticks: { stroke: line } };
    const size = () => ({ width: Math.max(240, box.clientWidth), height: 220 });
    const chart = new uPlot({
      ...size(), scales: { x: { time: false } }, axes: [axis, { ...axis, size: 64 }], series, bands,
      cursor: { sync: { key: "step" }, drag: { x: true, y: false } },
    }, table, box);
    const observer = new ResizeObserver(() => chart.setSize(size()));
    observer.observe(box);
    charts.set(metric.name, { chart, end: () => { observer.disconnect(); chart.destroy(); box.remove(); } });
  };
  const remove = (name) => { charts.get(name).end(); charts.delete(name); };
  [...charts.keys()].forEach(remove);
  for (const metric of data.metrics) {
    const label = make("label"), box = make("input");
    box.type = "checkbox";
    box.checked = START.test(metric.name);
    box.addEventListener("change", () => {
      const range = zoom();
      if (box.checked) draw(metric); else remove(metric.name);
      zoomTo(range);
    });
    label.append(box, make("span", metric.name));
    label.title = metric.meaning;
    byId("metrics").append(label);
    if (box.checked) draw(metric);
  }
  const redraw = () => {
    const names = [...charts.keys()], range = zoom();
    names.forEach(remove);
    data.metrics.filter((metric) => names.includes(metric.name)).forEach(draw);
    zoomTo(range);
  };
  single.addEventListener("change", redraw);
  document.querySelectorAll("[data-group]").forEach((box) => box.addEventListener("change", () => {
    const group = Number(box.dataset.group);
    if (box.checked) hidden.delete(group); else hidden.add(group);
    for (const { chart } of charts.values()) {
      chart.series.forEach((s, i) => { if (s.group === group) chart.setSeries(i, { show: box.checked }); });
    }
  }));
  byId("metric-search").addEventListener("input", (event) => {
    const wanted = event.target.value.toLowerCase();
    data.metrics.forEach((metric, i) => {
      byId("metrics").children[i].hidden = !`${metric.name} ${metric.meaning}`.toLowerCase().includes(wanted);
    });
  });
};

// --- answers: two evaluations side by side, and one question over time ---

const answers = () => {
  const data = dataOf("answer-data"), form = byId("pair");
  const KINDS = new Map([["01", "gained"], ["10", "lost"], ["11", "right in both"], ["00", "wrong in both"]]);
  const named = (e) => `${e.run}, ${e.step ? `step ${e.step}` : "before training"}`;
  const of = (name) => form.elements[name].value;
  const given = (evaluation, i) => {
    const box = make("div");
    const verdict = { 1: "right", 0: "wrong", "-": "not asked" }[evaluation.right[i]];
    box.append(make("h4", `${named(evaluation)}: ${verdict}`, verdict.replace(" ", "-")));
    box.append(make("pre", evaluation.texts[i] ?? ""));
    return box;
  };
  const card = (i) => {
    const set = data[of("set")], question = set.questions[i];
    const pair = [set.evaluations[of("a")], set.evaluations[of("b")]];
    const box = make("article", "", "sample"), sides = make("div", "", "grid"), all = make("details");
    box.append(make("h3", `${question.id}: ${KINDS.get(pair.map((e) => e.right[i]).join(""))}, key ${question.key}`));
    sides.append(...pair.map((evaluation) => given(evaluation, i)));
    box.append(...images(question));
    if (question.text) box.append(make("pre", question.text));
    box.append(sides);
    if (set.evaluations.length > 2) {
      all.append(make("summary", "in every evaluation"));
      all.addEventListener("toggle", () => {
        if (all.children.length < 2) all.append(...set.evaluations.map((evaluation) => given(evaluation, i)));
      });
      box.append(all);
    }
    return box;
  };
  const show = pages(byId("pairs"), byId("more-pairs"), card);
  const draw = () => {
    const set = data[of("set")], [a, b] = [set.evaluations[of("a")], set.evaluations[of("b")]];
    const places = Object.fromEntries([...KINDS.keys()].map((kind) => [kind, []]));
    [...a.right].forEach((x, i) => places[x + b.right[i]]?.push(i));
    const counts = [...KINDS].map(([kind, name]) => `${places[kind].length} ${name}`);
    const asked = Object.values(places).reduce((sum, x) => sum + x.length, 0);
    const listed = places[of("kind")].filter((i) => i < set.questions.length);
    const less = listed.length < places[of("kind")].length ? `; ${listed.length} of these are on this page` : "";
    byId("pair-count").textContent = `Of ${asked} questions: ${counts.join(", ")}${less}.`;
    show(listed);
  };
  const fill = () => {
    const { evaluations } = data[of("set")];
    for (const side of ["a", "b"]) {
      form.elements[side].replaceChildren();
      choose(form.elements[side], evaluations.keys(), (i) => named(evaluations[i]));
    }
    form.elements.b.value = String(evaluations.findLastIndex((e) => e.run === evaluations[0].run));
    draw();
  };
  choose(form.elements.set, Object.keys(data));
  choose(form.elements.kind, KINDS.keys(), (kind) => KINDS.get(kind));
  form.addEventListener("change", (event) => (event.target.name === "set" ? fill() : draw()));
  form.addEventListener("submit", (event) => event.preventDefault());
  fill();
};

// --- samples ---

const samples = () => {
  const all = dataOf("sample-data"), form = byId("filter");
  const spaced = (name) => (name === null ? "no stage: no thought was asked for" : name.replaceAll("_", " "));
  const fill = (field, show = String) => {
    const values = [...new Set(all.map((s) => s[field]))].sort((a, b) => (a < b ? -1 : a > b ? 1 : 0));
    choose(form.elements[field], values, show);
  };
  fill("run");
  fill("stage", spaced);
  fill("reward");

  const within = (x, low, high) => (low === "" || x >= Number(low)) && (high === "" || x <= Number(high));
  const fits = (s) => {
    const of = (name) => form.elements[name].value;
    return ["run", "stage", "reward"].every((field) => of(field) === "" || String(s[field]) === of(field))
      && within(s.step, of("step_low"), of("step_high"))
      && within(s.length, of("length_low"), of("length_high"))
      && [s.id, s.prompt, s.completion].join("\n").toLowerCase().includes(of("text").toLowerCase());
  };
  const card = (s) => {
    const box = make("article", "", "sample");
    const answer = s.answer === null ? "none" : s.answer;
    box.append(make("h3", `${s.run}, step ${s.step}: reward ${s.reward}, ${spaced(s.stage)}`));
    const cut = s.stopped ? "" : ", cut off";
    const scored = `answer ${answer}, key ${s.key}, ${spaced(s.reason)}, ${s.length} tokens${cut}`;
    box.append(make("div", `${scored}; question ${s.id}, row ${s.row}`, "soft"));
    box.append(...images(s), prompt(s.prompt), make("pre", s.completion));
    return box;
  };
  const show = pages(byId("list"), byId("more"), card);
  const draw = () => {
    const fitting = all.filter(fits);
    byId("count").textContent = `${fitting.length} of ${all.length} samples`;
    show(fitting);
  };
  form.addEventListener("input", draw);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(draw));
  draw();
};

// --- the reader's choices ---

const LISTS = [["pairs", "more-pairs"], ["list", "more"]], defaults = new WeakMap();
const idOf = (section) => section.getAttribute("aria-labelledby");
const fields = () => [...document.querySelectorAll("main input, main select")];
const nameOf = (e) => `${idOf(e.closest("section"))} ${e.name || e.id || e.closest("label").textContent}`;
const valueOf = (e) => (e.type === "checkbox" ? e.checked : e.options ? e.selectedOptions[0]?.text : e.value);
const boxes = () => [...document.querySelectorAll("main details")].map((box) => {
  const head = [...(box.closest("article")?.children ?? [])].slice(0, 2);
  return [box, [...head, box.firstElementChild].map((e) => e.textContent).join("\n")];
});
const begin = (sections) => {
  for (const section of sections) ({ curves, answers, samples })[idOf(section)]?.();
  for (const e of fields()) if (!defaults.has(e)) defaults.set(e, valueOf(e));
};
const state = () => ({
  fields: Object.fromEntries(fields().filter((e) => valueOf(e) !== defaults.get(e)).map((e) => [nameOf(e), valueOf(e)])),
  open: boxes().filter(([box]) => box.open).map(([, name]) => name),
  shown: LISTS.map(([list]) => byId(list)?.children.length),
  zoom: zoom(),
  focus: document.activeElement.closest("main label") && nameOf(document.activeElement),
});
const restore = (set) => {
  for (const e of fields()) {
    const value = set.fields[nameOf(e)];
    if (value !== undefined && value !== valueOf(e)) {
      if (e.type === "checkbox") e.checked = value;
      else e.value = e.options ? [...e.options].find((option) => option.text === value)?.value ?? e.value : value;
      for (const kind of ["input", "change"]) e.dispatchEvent(new Event(kind, { bubbles: true }));
    }
    if (nameOf(e) === set.focus) e.focus({ preventScroll: true });
  }
  LISTS.forEach(([list, more], i) => {
    while (byId(list)?.children.length < set.shown[i] && !byId(more).hidden) byId(more).click();
  });
  for (const [box, name] of boxes()) if (set.open.includes(name)) box.open = true;
  zoomTo(set.zoom);
};

// --- a served page replaces changed sections, and is loaded again if the list of sections has changed ---

const sectionsOf = (page) => [...page.querySelectorAll("main > section")];
const sources = new Map(sectionsOf(document).map((section) => [idOf(section), section.outerHTML]));
const replaceSections = (text) => {
  const page = new DOMParser().parseFromString(text, "text/html"), old = sectionsOf(document);
  const changed = sectionsOf(page).filter((section) => sources.get(idOf(section)) !== section.outerHTML);
  if (sectionsOf(page).map(idOf).join() !== old.map(idOf).join()) return location.reload();
  const set = state(), seen = old.find((section) => section.getBoundingClientRect().bottom > 0);
  const place = () => seen && byId(idOf(seen)).getBoundingClientRect().top, before = place();
  document.title = page.title;
  document.querySelector("header").replaceWith(page.querySelector("header"));
  for (const section of changed) {
    sources.set(idOf(section), section.outerHTML);
    byId(idOf(section)).closest("section").replaceWith(section);
  }
  begin(changed);
  restore(set);
  scrollBy(0, place() - before);
};
const follow = (version) => setInterval(async () => {
  const read = (path) => fetch(path).then((answer) => (answer.ok ? answer.text() : null), () => null);
  const now = await read("/version"), text = now !== null && now !== version ? await read("/") : null;
  byId("lost").hidden = now !== null;
  if (text === null) return;
  version = now;
  replaceSections(text);
}, 5000);

begin(sectionsOf(document));
const KEY = "medrlvr page";
const stored = () => { try { return JSON.parse(sessionStorage.getItem(KEY)); } catch { return null; } };
if (stored()) restore(stored());
addEventListener("pagehide", () => {
  try { sessionStorage.setItem(KEY, JSON.stringify(state())); } catch { /* a file without storage */ }
});
