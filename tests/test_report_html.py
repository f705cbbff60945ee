"""The page: whole, well-formed, all of a run's text as text, and made of what is there. In a browser where
one is found.
"""

import http.client
import io
import json
import os
import re
import shutil
import subprocess
import threading
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from PIL import Image

from medrlvr_jax import cli
from medrlvr_jax.data.images import thumbnail
from medrlvr_jax.host import files
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.report import answers, ending, explore, watch
from medrlvr_jax.report import page as report_html
from medrlvr_jax.rewards import stages

EVIL = '<think>"&lt;</script><script>console.error("broken out")</script><img src=x onerror=console.error(1)>\u2028</think><answer>A</answer>'
RED = io.BytesIO()
Image.new("RGB", (400, 200), "red").save(RED, "PNG")
RED = RED.getvalue()
VOID = {"meta", "link", "input", "br", "img", "hr"}
NODE, CHROMIUM = (
    shutil.which("node"),
    os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome"),
)


class Page(HTMLParser):
    """Refuses wrongly nested markup; collects ids, links and the text in each kind of element."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.text, self.attributes = [], [], [], {}, []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [attrs[k] for k in ("href", "src") if k in attrs and "svg" not in self.open]
        self.attributes += [(tag, k) for k in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, k) for k, _ in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        tag = self.open[-1] if self.open else ""
        self.text[tag] = self.text.get(tag, "") + data


def write_run(path, seed, steps=12, **changes):
    random = np.random.default_rng(seed)
    path.mkdir()
    tree = {"name": path.name, "seed": seed, "kl": {"coef": 0.01}, "data": {"path": "<b>train</b>.jsonl"}}
    (path / "config.yaml").write_text(yaml.safe_dump(tree | changes))
    shares = {f"stage/{s}": 1 / 6 for s in stages.STAGES}
    step = {
        "accuracy": 0.3,
        "response_length": 80,
        "kl": None,
        "policy/clip_low": 0.01,
        "policy/clip_high": 0.02,
        "monitor/leak": 0.1,
    } | shares
    records = [{"step": k, "reward": random.normal(), "seconds": 2.0} | step for k in range(1, steps + 1)]
    records[3]["alarm/leak"] = 6
    records[5]["alarm/hacks"] = 1  # did not last
    evals = [
        {f"eval.dev.{k}": v for k, v in {"n": 50, "correct": c, "format_ok": 50}.items()}
        for c in (10, 30 + seed)
    ]
    files.append(path / "metrics.jsonl", [{"step": 0} | evals[0], *records[:-1], records[-1] | evals[1]])
    sample = {
        "row": 0,
        "id": "q<1>",
        "prompt": "?",
        "completion": EVIL,
        "images": [thumbnail(RED), "https://example.org/x.png"],
        "key": "A",
        "answer": None,
        "reward": -1.0,
        "stopped": True,
    }
    rows = [
        sample | {"step": k, "reason": "no_think", "stage": stages.STAGES[k % 6], "length": 3 * k}
        for k in range(1, steps + 1)
    ]
    files.append(path / "samples.jsonl", rows)
    answers_of(path, 0, "1001")
    answers_of(path, steps, "1100")
    data = {"train": {"n": 12, "sha256": "beef"}}
    versions = {
        "git": {"revision": "cafe", "dirty": True},
        "devices": 8,
        "device_kind": "H100",
        "processes": 1,
        "platform": "Linux",
    }
    files.write_json(
        path / "summary.json",
        {"name": path.name, "steps": steps, "seconds": 9.0, "versions": versions, "data": data},
    )
    return path


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    root = tmp_path_factory.mktemp("page")
    runs = [write_run(root / f"ppo-seed{s}", s) for s in (0, 1)] + [
        write_run(root / "a&b", 2, kl={"coef": 0.5})
    ]
    (root / "sft").mkdir()
    files.write_json(
        root / "sft" / "eval.json",
        {"eval": {"dev": {"n": 50, "correct": 25, "format_ok": 50}}, "step": 7, "versions": {}},
    )
    assert cli.main(["report", *map(str, runs), str(root / "sft"), "--out", str(root / "report.html")]) == 0
    return root / "report.html"


def test_the_page_is_complete_and_escapes_all_text(page):
    text = page.read_text(encoding="utf-8")
    parsed = Page(text)
    assert len(set(parsed.ids)) == len(parsed.ids) and set(
        re.findall(r'getElementById\("([^"]+)"', text)
    ) <= set(parsed.ids)
    # nothing is fetched
    assert all(link[1:] in parsed.ids if link.startswith("#") else link == "data:," for link in parsed.links)
    assert not any(name.startswith("on") for _, name in parsed.attributes)
    assert "<b>train" not in text and "&lt;b&gt;train" in text and "a&amp;b" in text
    data = re.search(r'<script type="application/json" id="sample-data">(.*?)</script>', text, re.S)[1]
    assert "<" not in data and [s["completion"] for s in json.loads(data)] == [EVIL] * 36
    for fact in (
        "cafe with changes",
        "8 × H100",
        "12 rows, sha256 beef",
        "12 of 12",
        "0:00:24 in steps",
        "30 of 50: 60.0 % (46.2–72.4)",
    ):
        assert fact in text, fact
    for section in ("accuracy", "curves", "stages", "alarms", "answers", "samples", "run-card"):
        assert section in parsed.ids


def test_intervals_are_over_questions_and_name_their_number(tmp_path):
    """16 answers to each of 100 questions: Wilson's interval of 1,600 answers would be 49.9 to 54.8."""
    counts = {"n": 1600, "questions": 100, "correct": 838, "format_ok": 1600, "accuracy": 0.52375}
    counts |= {
        "accuracy_low": 0.452,
        "accuracy_high": 0.598,
        "format_rate": 1.0,
        "format_low": 0.963,
        "format_high": 1.0,
    }
    (tmp_path / "eval").mkdir()
    files.write_json(tmp_path / "eval" / "eval.json", {"eval": {"dev": counts}, "versions": {}})
    report_html.write_page([tmp_path / "eval"], tmp_path / "page.html")
    assert "838 of 1,600 answers to 100 questions: 52.4 % (45.2–59.8)" in (tmp_path / "page.html").read_text()
    assert "52.4 % (45.2–59.8)" in "".join(ending.changes("dev", None, counts))


def test_experiments_of_one_name_are_separate_groups(tmp_path):
    """An arm in three folders, with equal or other settings; one folder is given twice; evaluations, too."""
    for folder, changes in (("one", {}), ("two", {}), ("three", {"kl": {"coef": 0.5}})):
        (tmp_path / folder).mkdir()
        for seed in (0, 1):
            write_run(tmp_path / folder / f"ppo-seed{seed}", seed, **changes)
        (tmp_path / folder / "ppo-seed0" / "eval").mkdir()
        files.write_json(tmp_path / folder / "ppo-seed0" / "eval" / "eval.json", {"eval": {}, "versions": {}})
    folders = [
        tmp_path / folder / run
        for folder in ("one", "two", "three")
        for run in ("ppo-seed0", "ppo-seed1", "ppo-seed0/eval")
    ]
    report_html.write_page([*folders, folders[0]], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    parsed = Page(text)
    assert len(set(parsed.ids)) == len(parsed.ids)
    data = json.loads(
        re.search(r'<script type="application/json" id="sample-data">(.*?)</script>', text, re.S)[1]
    )
    assert {s["run"] for s in data} == {
        f"{folder}/ppo-seed{seed}" for folder in ("one", "two", "three") for seed in (0, 1)
    }
    assert len(data) == 6 * 12
    runs = report_html.with_unique_names([report_html.read_run(f) for f in folders])
    groups = [[run.name for run in g.runs] for g in report_html.group(runs)]
    assert sorted(groups) == sorted(
        [[f"{folder}/ppo-seed0", f"{folder}/ppo-seed1"] for folder in ("one", "two", "three")]
        + [[f"{folder}/ppo-seed0/eval"] for folder in ("one", "two", "three")]
    )


def test_a_run_that_asks_for_no_thought_has_no_stages(tmp_path):
    """Logs of older versions count all completions of such a run as format failures."""
    direct, other = (write_run(tmp_path / name, 0, reward={"mode": name}) for name in ("direct", "strict"))
    groups = report_html.group([report_html.read_run(direct), report_html.read_run(other)])
    (name, first, last, areas), *rest = report_html.stages(groups)
    assert (name, first, last, rest) == ("strict", 1, 12, [])
    assert areas[5] == (explore.FILLS["reintegrated_reasoning"], areas[5][1]) and areas[5][1].startswith(
        "0.0,0.0 9.1,"
    )
    assert tuple(explore.FILLS) == stages.STAGES


def test_a_long_answer_is_cut_with_a_note(tmp_path):
    write_run(tmp_path / "long", 0)
    sample = json.loads((tmp_path / "long" / "samples.jsonl").read_text().split("\n")[0])
    files.append(tmp_path / "long" / "samples.jsonl", [sample | {"completion": "x" * 9000}])
    report_html.write_page([tmp_path / "long"], tmp_path / "page.html")
    assert (
        "xxx\\u2026 [the first 6,000 of 9,000 characters; samples.jsonl has all]"
        in (tmp_path / "page.html").read_text()
    )


def test_runs_that_differ_by_seed_alone_are_one_group(page):
    runs = [report_html.read_run(page.parent / name) for name in ("ppo-seed1", "a&b", "ppo-seed0", "sft")]
    groups = report_html.group(runs)
    assert [(g.name, len(g.runs)) for g in groups] == [("ppo", 2), ("a&b", 1), (f"{page.parent.name}/sft", 1)]
    assert len({g.color for g in groups}) == 3
    assert [g.differs for g in groups] == ["kl.coef 0.01", "kl.coef 0.5", ""]


def test_a_run_from_before_a_setting_existed_is_in_the_group_of_its_default(tmp_path):
    for seed, changes in enumerate(({}, {"sample": {"max_batches": 1}}, {"sample": {"max_batches": 2}})):
        write_run(tmp_path / f"ppo-seed{seed}", seed, **changes)
    groups = report_html.group([report_html.read_run(tmp_path / f"ppo-seed{seed}") for seed in range(3)])
    assert [len(g.runs) for g in groups] == [2, 1]


def test_groups_of_one_name_are_named_by_the_settings_that_distinguish_them(tmp_path):
    """A value that most configs have distinguishes none; settings beyond `MAX_NAMED` are counted."""
    many = {f"learn.x{i}": i for i in range(5)}
    configs = [{"kl.coef": 0.1, "steps": 8}, {"kl.coef": 0.1, "steps": 9}, {"kl.coef": 0.5, "steps": 7}]
    assert report_html.distinguishing(configs) == ["steps 8", "steps 9", "kl.coef 0.5, steps 7"]
    named = report_html.distinguishing([many, {k: -1 for k in many}])[0]
    assert named == "learn.x0 0, learn.x1 1, learn.x2 2 and 2 more"
    for seed, coef in enumerate((0.1, 0.1, 0.2, 0.2)):
        write_run(tmp_path / f"ppo-seed{seed}", seed, kl={"coef": coef})
    runs = [report_html.read_run(tmp_path / f"ppo-seed{seed}") for seed in range(4)]
    groups = report_html.group(runs)
    assert [(g.name, len(g.runs)) for g in groups] == [("ppo, kl.coef 0.1", 2), ("ppo, kl.coef 0.2", 2)]
    table = report_html.differing([(g.name, g.runs[0].config) for g in groups])
    assert table == [["setting", "ppo, kl.coef 0.1", "ppo, kl.coef 0.2"], ["kl.coef", "0.1", "0.2"]]


def test_curves_have_the_styles_of_their_legend(page, tmp_path):
    """Also if a group before them has no curve, because it is an evaluation."""
    folders = [page.parent / name for name in ("sft", "a&b", "ppo-seed0")]
    groups = report_html.group([report_html.read_run(folder) for folder in folders])
    report_html.write_page(folders, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    section = re.search(r'<h2 id="curves">.*?</section>', text, re.S)[0]
    data = json.loads(re.search(r'id="explore-data">(.*?)</script>', section, re.S)[1])
    colors = [g.color for g in groups[1:]]
    assert re.findall(r'stroke="(#\w{6})"', section) == [g["color"] for g in data["groups"]] == colors


def test_a_run_without_steps_has_a_page(tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.yaml").write_text("name: new\n")
    report_html.write_page([tmp_path / "new"], tmp_path / "p.html")  # it compiles: no step yet
    text = (tmp_path / "p.html").read_text()
    assert "<title>new" in text and "none so far: it reads, compiles" in text
    files.append(
        tmp_path / "new" / "metrics.jsonl",
        [{"step": 1, "reward": 0.5} | {f"stage/{s}": 1 / 6 for s in stages.STAGES}],
    )
    report_html.write_page([tmp_path / "new"], tmp_path / "p.html")
    text = (tmp_path / "p.html").read_text()
    Page(text)
    assert "1 so far" in text and 'id="sample-data"' not in text and 'id="samples"' not in text


@pytest.mark.parametrize(
    ("out", "said"), [("report.pdf", "must end in .html"), ("nowhere/report.html", "does not exist")]
)
def test_paths_that_cannot_be_written_are_refused(page, tmp_path, capsys, out, said):
    assert cli.main(["report", str(page.parent / "a&b"), "--out", str(tmp_path / out)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(NODE is None, reason="no node")
def test_the_script_parses(page):
    subprocess.run([NODE, "--check", report_html.FOLDER / "report.js"], check=True, timeout=60)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: set CHROMIUM to one")
def test_a_browser_shows_the_page_without_errors(page, tmp_path):
    """Filters are set, and what the page then holds is looked at; any line on the console fails. As a served
    page, it takes in changed sections, and what was set stays."""
    text = page.read_text(encoding="utf-8")
    later = text.replace("Point at a curve", "NEW curves").replace("Two evaluations", "NEW answers")
    later = json.dumps(later.replace("Real completions", "NEW samples")).replace("<", "\\u003c")
    probe = """<script>(async () => {
    await null; // uPlot draws then
    const { min, max } = charts.get("accuracy").chart.scales.x;
    const set = (name, value) => {
      const form = document.getElementById("filter");
      form.elements[name].value = value;
      form.dispatchEvent(new Event("input"));
      return document.getElementById("count").textContent;
    };
    const told = [["run", "ppo-seed0"], ["stage", "verbose_formatter"], ["step_low", 2], ["length_high", 21], ["text", "nothing like it"]]
      .map((pair) => set(...pair));
    set("text", "BROKEN");
    const pair = document.getElementById("pair"), counts = [document.getElementById("pair-count").textContent];
    pair.elements.kind.value = "10";
    pair.elements.b.value = "0";
    pair.elements.a.value = "1";
    pair.elements.kind.dispatchEvent(new Event("change", { bubbles: true }));
    counts.push(document.querySelector("#pairs h3").textContent, document.querySelectorAll("#pairs .wrong").length);
    counts.push(document.querySelectorAll("#pairs img").length);
    counts.push(document.querySelectorAll("#charts canvas").length);
    counts.push(document.querySelectorAll("#list article:first-child img").length);
    const shown = document.querySelector("#list article > pre").textContent, click = (e) => e.click();
    ["stage", "step_low", "length_high"].forEach((name) => set(name, ""));
    document.querySelectorAll("#more, #single").forEach(click);
    document.querySelectorAll("#list summary, #pairs summary").forEach(click);
    document.querySelectorAll("#metrics input")[3].click();
    document.querySelector("[data-group]").click();
    zoomTo({ min: 3, max: 7 });
    await null; // uPlot draws then
    const before = state();
    counts.push(min, max, before.shown[1], before.open.length, before.zoom);
    replaceSections(LATER);
    await null;
    const same = JSON.stringify(state()) === JSON.stringify(before);
    document.title = JSON.stringify([told, shown, counts, same, document.querySelector("main").innerText.match(/NEW \\w+/g)]);
    })();</script></body>""".replace("LATER", later)
    path = tmp_path / "probe.html"
    path.write_text(text.replace("</body>", probe), encoding="utf-8")
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}/profile",
        "--enable-logging=stderr",
    ]
    done = subprocess.run(
        [*command, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert "CONSOLE" not in done.stderr
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.S)[1]
    counts, shown, pair, same, new = json.loads(
        title.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    )
    assert counts == [f"{n} of 36 samples" for n in (12, 2, 1, 1, 0)]
    assert shown.split() == EVIL.split()  # a title keeps no line ends
    assert pair[0] == "Of 4 questions: 1 gained, 1 lost, 1 right in both, 1 wrong in both."
    assert pair[1:6] == ["q1: lost, key A", 1, 1, 3, 1]  # of the images, only what the run itself made
    assert same and pair[6:] == [1, 12, 10, 11, {"min": 3, "max": 7}]
    assert new == ["NEW curves", "NEW answers", "NEW samples"]


def test_every_metric_is_a_curve_and_long_ones_are_thinned():
    records = [{"step": k, "kl": k / 7, "row/kl_high": 3, "p": None, "new": 1.0} for k in range(1, 4001)]
    one, two = explore.columns(records), explore.columns([{"step": 1, "reward": 0.5}])
    metrics = explore.curves([[one], [two, one]])
    assert [m["name"] for m in metrics] == ["kl", "new", "reward"]
    kl, _, reward = metrics
    assert kl["unit"] == "nats / token" and reward["curves"] == [[], [[1], [0.5], [None]]]
    steps, values = kl["curves"][0]
    assert (
        len(steps) == explore.MAX_POINTS and steps[0] == 8 and values[0] == pytest.approx(4.5 / 7, rel=1e-3)
    )
    many = explore.columns([r | {f"m{j}": j for j in range(70)} for r in records])
    assert len(json.dumps(explore.curves([[many]] * 20))) < 3e6


def test_all_evaluations_and_alarms_of_long_runs_are_read(tmp_path):
    records = [{"step": k, "x": 1.0} for k in range(1000)]
    records[0] |= {"eval.dev.n": 50, "eval.dev.correct": 10}
    records[333] |= {"eval.dev.n": 50, "eval.dev.correct": 20, "alarm/leak": 6}
    files.append(tmp_path / "metrics.jsonl", records)
    run = report_html.read_run(tmp_path, report_html.STEPS // 10)
    assert run.evals["dev"]["after"]["correct"] == 20
    assert run.metrics["step"].values.tolist() == [*range(0, 301, 100), 333, *range(400, 901, 100), 999]


def answers_of(run, step, right, name="dev"):
    """Write the answers of an evaluation. `right` has a character for each question: q0, q1, …"""
    (run / "answers" / str(step)).mkdir(parents=True)
    rows = [
        {
            "id": f"q{i}",
            "question": "?",
            "key": "A",
            "completion": f"{EVIL}{step}",
            "correct": x == "1",
            "sample": s,
            **({} if step else {"images": [thumbnail(RED), "https://example.org/x.png"]}),
        }
        for i, x in enumerate(right)
        for s in (0, 1)
    ]
    files.append(run / "answers" / str(step) / f"{name}.jsonl", rows)


def test_two_evaluations_side_by_side(tmp_path, monkeypatch):
    """Changed questions come first, where there is not room for all; steps between the first and the last are
    left out where there are many."""
    run = tmp_path / "ppo"
    for step, right in ((0, "1001"), (6, "1101"), (9, "1111"), (12, "110")):
        answers_of(run, step, right)
    data = answers.answers({"ppo": run})["dev"]
    assert [q["id"] for q in data["questions"]] == ["q1", "q2", "q0", "q3"]
    assert [e["right"] for e in data["evaluations"]] == ["0011", "1011", "1111", "101-"]
    assert data["evaluations"][3]["texts"] == [f"{EVIL}12"] * 3 + [None]
    monkeypatch.setattr(answers, "EVALUATIONS", 3)
    image = len(thumbnail(RED)) + len("https://example.org/x.png")  # images have room, too
    monkeypatch.setattr(answers, "SIZE", 3 * len(EVIL) + image + 20)
    data = answers.answers({"ppo": run})["dev"]
    assert [e["step"] for e in data["evaluations"]] == [0, 9, 12]
    assert [q["id"] for q in data["questions"]] == ["q1"]
    assert len(data["evaluations"][0]["right"]) == 4


def test_the_page_is_served_and_follows_the_runs(tmp_path, monkeypatch):
    """Also with a run that does not exist yet. Only changed runs are read again."""
    write_run(tmp_path / "ppo", 0)
    with watch.server([tmp_path / "ppo", tmp_path / "<late>"], "127.0.0.1", 0) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()

        def get(path, host="localhost", method="GET"):
            connection = http.client.HTTPConnection("127.0.0.1", serving.server_port)
            connection.request(method, path, headers={"Host": host})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

        status, page = get("/")
        first = get("/version")[1]
        assert status == 200 and "<title>ppo" in page and first in page and "connect-src 'self'" in page
        assert [get(path)[0] for path in ("/config.yaml", "/../ppo/config.yaml", "/?x=1")] == [404, 404, 404]
        assert get("/", host="evil.example")[0] == 403 and get("/", method="POST")[0] == 501
        with open(tmp_path / "ppo" / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": 99, "reward": 0.25}) + "\n")
        assert get("/version")[1] != first and get("/")[1] != page
        assert f"{tmp_path}/&lt;late&gt;" in page and "have not started yet" in page
        write_run(tmp_path / "<late>", 1, kl={"coef": 0.5})
        page = get("/")[1]
        assert "have not started yet" not in page and "<title>ppo, &lt;late&gt;" in page
        read = []
        monkeypatch.setattr(watch, "read_run", lambda *of: read.append(of) or report_html.read_run(*of))
        files.append(tmp_path / "ppo" / "metrics.jsonl", [{"step": 100, "reward": 0.5}])
        assert get("/")[1] != page and read == [(tmp_path / "ppo", 2)]
        serving.shutdown()
    with pytest.raises(ConfigError, match=r"no metrics\.jsonl there"):
        watch.server([tmp_path], "127.0.0.1", 0)
