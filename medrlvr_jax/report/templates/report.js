"use strict";
// The browser of samples. All text from the runs goes into the page as textContent, never as markup.
(() => {
  const all = JSON.parse(document.getElementById("sample-data").textContent);
  const form = document.getElementById("filter"), list = document.getElementById("list");
  const count = document.getElementById("count"), more = document.getElementById("more");
  const PAGE = 10;
  let shown = PAGE;

  const make = (tag, text, name) => {
    const element = document.createElement(tag);
    element.textContent = text;
    if (name) element.className = name;
    return element;
  };
  const spaced = (name) => (name === null ? "no stage: no thought was asked for" : name.replaceAll("_", " "));
  const fill = (field, show = String) => {
    const values = [...new Set(all.map((s) => s[field]))].sort((a, b) => (a < b ? -1 : a > b ? 1 : 0));
    for (const value of values) {
      const option = make("option", show(value));
      option.value = String(value);
      form.elements[field].append(option);
    }
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
      && (s.prompt + "\n" + s.completion).toLowerCase().includes(of("text").toLowerCase());
  };
  const card = (s) => {
    const box = make("article", "", "sample");
    const answer = s.answer === null ? "none" : s.answer;
    box.append(make("h3", `${s.run}, step ${s.step}: reward ${s.reward}, ${spaced(s.stage)}`));
    const cut = s.stopped ? "" : ", cut off";
    const scored = `answer ${answer}, key ${s.key}, ${spaced(s.reason)}, ${s.length} tokens${cut}`;
    box.append(make("div", `${scored}; question ${s.id}, row ${s.row}`, "soft"));
    const question = make("details", "");
    question.append(make("summary", "prompt"), make("pre", s.prompt));
    box.append(question, make("pre", s.completion));
    return box;
  };
  const draw = () => {
    const found = all.filter(fits);
    list.replaceChildren(...found.slice(0, shown).map(card));
    count.textContent = `${found.length} of ${all.length} samples, ${Math.min(shown, found.length)} shown`;
    more.hidden = shown >= found.length;
  };
  form.addEventListener("input", () => { shown = PAGE; draw(); });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(() => { shown = PAGE; draw(); }));
  more.addEventListener("click", () => { shown += PAGE; draw(); });
  draw();
})();
