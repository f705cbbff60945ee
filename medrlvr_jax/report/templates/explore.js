"use strict";
// Interactive curves: a chart for each chosen metric, a line for each run. Names from runs become text, never markup.
(() => {
  const data = JSON.parse(document.getElementById("explore-data").textContent);
  const list = document.getElementById("metrics"), charts = document.getElementById("charts");
  const search = document.getElementById("metric-search"), KEY = "medrlvr metrics";
  const START = ["reward", "accuracy", "kl", "nll"];
  const style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--soft"), line = style.getPropertyValue("--line");
  const open = new Map();
  const make = (tag, text, name) => {
    const element = document.createElement(tag);
    element.textContent = text;
    if (name) element.className = name;
    return element;
  };
  const joined = (metric) => {
    const tables = metric.curves.map((curve) => (curve[0].length ? curve : [[], []]));
    return uPlot.join(tables);
  };
  const draw = (metric) => {
    const box = make("div", "", "chart");
    box.append(make("h3", metric.unit ? `${metric.name} (${metric.unit})` : metric.name));
    box.append(make("p", metric.meaning, "soft"));
    charts.append(box);
    const axis = { stroke: ink, grid: { stroke: line, width: 1 }, ticks: { stroke: line } };
    const series = data.runs.map((run) => ({ label: run.name, stroke: run.color, width: 1.5, spanGaps: true }));
    const width = () => Math.min(box.clientWidth, 540);
    const chart = new uPlot({
      width: width(), height: 240, scales: { x: { time: false } }, axes: [axis, { ...axis, size: 64 }],
      cursor: { sync: { key: "step" }, drag: { x: true, y: false } },
      series: [{ label: "step" }, ...series],
    }, joined(metric), box);
    const observer = new ResizeObserver(() => chart.setSize({ width: width(), height: 240 }));
    observer.observe(box);
    open.set(metric.name, () => { observer.disconnect(); chart.destroy(); box.remove(); });
  };
  const toggle = (metric, on) => {
    if (on) draw(metric);
    else { open.get(metric.name)(); open.delete(metric.name); }
    try { sessionStorage.setItem(KEY, JSON.stringify([...open.keys()])); } catch { /* a file without storage */ }
  };
  let chosen = START;
  try { chosen = JSON.parse(sessionStorage.getItem(KEY)) || START; } catch { /* as above */ }
  for (const metric of data.metrics) {
    const label = make("label", ""), box = make("input", "");
    box.type = "checkbox";
    box.checked = chosen.includes(metric.name);
    box.addEventListener("change", () => toggle(metric, box.checked));
    label.append(box, make("span", metric.name));
    label.title = metric.meaning;
    list.append(label);
    if (box.checked) draw(metric);
  }
  search.addEventListener("input", () => {
    const wanted = search.value.toLowerCase();
    data.metrics.forEach((metric, i) => {
      list.children[i].hidden = !`${metric.name} ${metric.meaning}`.toLowerCase().includes(wanted);
    });
  });
})();
