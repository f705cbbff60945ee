"""Training and evaluation with images: from records to prompts, and what the tower sees as an input like
tokens.
"""

import base64
import io
import json
import math
import re
import subprocess
from dataclasses import replace

import jax
import numpy as np
import pytest
import yaml
from byte_tokenizer import byte_tokenizer
from invariance import launch
from make_vision import make_run
from PIL import Image
from safetensors.numpy import load_file

from medrlvr_jax import build, cli, evaluate, generate, load_model, sharding
from medrlvr_jax.config import load as configs
from medrlvr_jax.config.schema import SetConfig
from medrlvr_jax.data import images, load, patches
from medrlvr_jax.data.images import thumbnail
from medrlvr_jax.data.prompts import encode_questions
from medrlvr_jax.data.question import DataError, Question, fingerprint, question_hash
from medrlvr_jax.evaluation import look, probe
from medrlvr_jax.evaluation.evaluate import open_policy
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.model import decoder
from medrlvr_jax.model_rewards.policy import check_questions, make_policy_rewards
from medrlvr_jax.model_rewards.probability import start_scores
from medrlvr_jax.rl.sft import sft
from medrlvr_jax.rl.train import train
from medrlvr_jax.rollout.assess import assess, assess_alone, assess_settings
from medrlvr_jax.rollout.rollout import encode, place_prompts
from medrlvr_jax.rollout.see import see
from medrlvr_jax.sharding import place_rows
from medrlvr_jax.types import Frozen, Rollout

START, PAD, END = 258, 259, 260
TREE = {
    "name": "run",
    "steps": 2,
    "model": {"path": ""},
    "prompt": {"template": "none", "max_tokens": 128},
    "sample": {"questions": 8, "samples": 2, "max_new_tokens": 6},
    "learn": {"minibatch": 8, "policy": {"lr": 1e-3}},
    "eval": {"batch": 8},
    "checkpoint": {"every": 1},
    "mesh": {"data": 8},
}
METHOD = {"advantage": {"estimator": "group"}, "kl": {"coef": 0.05}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model that sees, 16 questions (every fourth without an image), and a config that trains on them."""
    root = tmp_path_factory.mktemp("see")
    tree = TREE | METHOD | {"runs": str(root / "runs")} | make_run(root)
    tree["eval"] |= {"sets": {"mine": {"path": str(root / "data.jsonl")}}}
    (root / "config.yaml").write_text(yaml.safe_dump(tree))
    return root


def characters(completions):
    return [float(sum(map(ord, text)) % 5) for text in completions]


def trained(folder, **changes):
    """Metrics of a run of the folder's config, step by step."""
    config = configs.load(folder / "config.yaml", changes)
    train(config, rewards=characters)
    return lines(folder / "runs" / config.name / "metrics.jsonl")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def metrics(folder):
    return trained(folder)


def test_the_trainer_sees_what_the_sampler_saw(metrics):
    for row in metrics[1:]:
        assert row["sampler_gap"] < 1e-5 and row["policy/grad_norm"] > 0, row


def test_samples_show_their_images(folder, metrics):
    rows = lines(folder / "runs" / "run" / "samples.jsonl")
    by_id = {row["id"]: row["images"] for row in lines(folder / "data.jsonl")}
    assert rows and all(len(row.get("images", ())) == len(by_id[row["id"]]) for row in rows)
    image = thumbnail(saved(Image.new("RGB", (900, 300), "red")))
    head, _, body = image.partition(",")
    shown = Image.open(io.BytesIO(base64.b64decode(body)))
    assert head == "data:image/jpeg;base64" and shown.size == (160, 53) and len(image) < 4000


def saved(image):
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def test_any_mesh_and_any_interruption(folder, metrics):
    """The same run on four shards of the weights, stopped after its first step and resumed."""
    changes = {"name": "sharded", "mesh": {"data": 2, "fsdp": 4}, "eval.sets": {}}
    config = configs.load(folder / "config.yaml", changes)
    train(config, rewards=characters, callbacks=lambda step, row: True)
    again = trained(folder, **changes)
    names = [name for name in metrics[1] if not name.startswith(("seconds", "tokens_per", "row/"))]
    for row, other in zip(metrics[1:], again, strict=True):
        for name in set(names) & set(other) - {"sampler_gap"}:
            assert other[name] == pytest.approx(row[name], rel=2e-4, abs=2e-5), name


def test_learning_from_text_and_asked_about_images(folder):
    """The same model and tower: MedVLThinker's recipe."""
    changes = {"name": "text", "steps": 1, "data.fields": {"images": None}, "checkpoint.every": 0}
    before, step = trained(folder, **changes)
    assert before["eval.mine.n"] == step["eval.mine.n"] == 16 and step["policy/grad_norm"] > 0
    samples = lines(folder / "runs" / "text" / "samples.jsonl")
    assert not any("<|image|>" in row["prompt"] or "images" in row for row in samples)


def test_two_processes_see_what_one_sees(folder):
    """Each process reads and places the images of its own questions; tokens and numbers are those of one."""
    settings = {"eval.sets": {}, "loss.entropy_coef": 0.5, "log.samples_every": 1, "checkpoint.every": 0}
    one = configs.load(folder / "config.yaml", settings | {"name": "one"})
    train(one)
    words = [f"{name}={json.dumps(value)}" for name, value in settings.items()]
    words = ["train", str(folder / "config.yaml"), "--distributed", *words, "name=two", "mesh={data: 4}"]
    started = launch(2, 2, ["-m", "medrlvr_jax", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    ended = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0], ended
    runs = [folder / "runs" / name for name in ("one", "two")]
    one, two = (lines(run / "samples.jsonl") for run in runs)
    assert one == two and any("images" in row for row in one)
    for row, other in zip(*(lines(run / "metrics.jsonl") for run in runs), strict=True):
        for name in ("entropy", "policy/grad_norm", "kl", "tokens"):
            assert other[name] == pytest.approx(row[name], rel=1e-4, abs=1e-6), name


def test_batches_prepared_ahead_change_nothing(folder, metrics, monkeypatch):
    """A run without prefetching has the same bits; and what is prefetched is what is needed next: the second
    step, and the second half of the set in two evaluations.
    """
    ahead = []
    monkeypatch.setattr(patches.ImageSet, "prefetch", lambda _, asked, index: ahead.append(list(index)))
    alone = trained(folder, name="alone")
    assert len(ahead) == 3 and ahead[0] == ahead[2] == [*range(8, 16)], ahead
    timing = ("seconds", "tokens_per_second")
    strip = lambda rows: [{k: v for k, v in row.items() if k not in timing} for row in rows]
    assert strip(alone) == strip(metrics)
    monkeypatch.undo()
    asked = load.load(SetConfig(path=str(folder / "data.jsonl")))
    seen = patches.measure_images(asked, build.build(configs.load(folder / "config.yaml")).cfg.vision)
    want = seen.prepare(asked, [3, 1])
    seen.prefetch(asked, [3, 1])
    seen.prefetched[3, 1].result()
    monkeypatch.setattr(patches, "arrange_windows", None)  # it is not computed again
    got = seen.prepare(asked, [3, 1])
    assert np.array_equal(got.pixels, want.pixels) and np.array_equal(got.slots, want.slots)


def test_other_images_give_another_run(folder, metrics, tmp_path):
    rows = lines(folder / "data.jsonl")
    for row in rows:
        row["images"] = [str(folder / name) for name in row["images"]]
    same, swapped = ([dict(row) for row in rows] for _ in "ab")
    swapped[1]["images"], swapped[3]["images"] = rows[3]["images"], rows[1]["images"]
    parts = build.build(configs.load(folder / "config.yaml"))
    with jax.set_mesh(parts.mesh):
        logits = []
        for given in (same, swapped):
            questions = load.read(SetConfig(path="python:data"), given)[0]
            encoded = encode(parts.tokenizer, questions, parts.config, vision=parts.cfg.vision)
            encoded = replace(encoded, width=96, images=replace(encoded.images, windows=8))
            params = build.load_params(parts, parts.cfg)
            prompts = place_prompts(params, parts, encoded, np.arange(8))
            states = jax.jit(lambda p, x: decoder.forward(p, parts.cfg, x)[0])(params, prompts)
            logits.append(np.asarray(states[:, -1]))
    moved = np.abs(logits[0] - logits[1]).max(-1)
    assert (moved[[1, 3]] > 1e-2).all() and (moved[[0, 2, 4, 5, 6, 7]] < 1e-5).all(), moved


def test_images_of_several_sizes_share_a_program(folder):
    """Two batches of a set, and another set whose largest question takes a window less: one compilation. What
    is seen is what room for just 9 windows gives.
    """
    parts = build.build(configs.load(folder / "config.yaml"))
    of = lambda tokens: saved(Image.effect_noise((28 * tokens, 28), 90))
    asked = lambda sizes: [Question(str(n), "?", ("a", "b"), 0, images=(of(n),)) for n in sizes]
    code = lambda sizes: encode(parts.tokenizer, asked(sizes), parts.config, vision=parts.cfg.vision)
    ten, nine = code((40, 1, 5, 9, 12, 20, 21, 30, 3, 4, 6, 7, 8, 10, 11, 13)), code(range(29, 37))
    assert (ten.windows, nine.windows, code([32]).windows) == (10, 10, 8)
    before, look = see._cache_size(), lambda encoded, index: place_prompts(params, parts, encoded, index)
    with jax.set_mesh(parts.mesh):
        params = build.load_params(parts, parts.cfg)
        look(ten, np.arange(8)), look(ten, np.arange(8, 16))
        roomy = look(nine, np.arange(8)).vision.features
        assert see._cache_size() == before + 1
        exact = replace(nine, images=replace(nine.images, windows=9))
        tight = np.asarray(look(exact, np.arange(8)).vision.features)
    slots = patches.token_slots(nine.images.grids[-1], parts.cfg.vision)
    want, got = tight[-1, slots], np.asarray(roomy)[-1, slots]
    assert len(want) == 36 and np.abs(got - want).max() < 1e-6 * np.abs(want).max()


def test_prompts_by_hand(folder):
    tok, config = byte_tokenizer(), configs.load(folder / "config.yaml").prompt
    one, two = ([START, *[PAD] * n, END] for n in (2, 3))
    asked = Question("q", "Is <image> like <image>?", ("a", "b"), 0, images=("x", "y"))
    spelt = lambda text: list(text.encode())
    [row] = encode_questions(tok, [asked], config, images=[[one, two]])
    tail = spelt("?\nA. a\nB. b\n")
    assert row == spelt("Question: Is ") + one + spelt(" like ") + two + tail
    [row] = encode_questions(tok, [replace(asked, question="Which?")], config, images=[[one, two]])
    assert row == one + two + spelt("Question: Which") + tail
    [row] = encode_questions(tok, [replace(asked, images=())], config, images=[[]])
    assert row == spelt("Question: Is <image> like <image>") + tail
    with pytest.raises(DataError, match="question q: its text has <image> 2 times, and it has 1"):
        encode_questions(tok, [asked], config, images=[[one]])
    with pytest.raises(DataError, match="question q: it has images, which this model cannot read"):
        encode_questions(tok, [asked], config)


def test_images_of_records(folder, tmp_path):
    import datasets

    image = Image.open(folder / "1-0.png")
    data = (folder / "1-0.png").read_bytes()
    row = {"question": "Which?", "options": ["a", "b"], "answer": "A"}
    table = datasets.Dataset.from_list([row | {"image": {"bytes": data, "path": None}}])
    table = table.cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "set.parquet")
    (tmp_path / "set.jsonl").write_text(json.dumps(row | {"image": str(folder / "1-0.png")}))
    given = [load.load(SetConfig(path=str(tmp_path / name)))[0] for name in ("set.parquet", "set.jsonl")]
    given += [load.read(SetConfig(path="python:data"), x)[0][0] for x in ([row | {"image": image}], table)]
    pixels = [np.asarray(images.read_image(question.images[0])) for question in given]
    assert all(np.array_equal(one, pixels[0]) for one in pixels)
    assert len({question_hash(question) for question in given[:2]}) == 1
    assert fingerprint(given[:1]) != fingerprint([replace(given[0], images=())])
    with pytest.raises(DataError, match="field images: the record also has image"):
        load.read(SetConfig(path="python:data"), [row | {"image": data, "images": [data]}])
    with pytest.raises(DataError, match="field image: 3 is not an image"):
        load.read(SetConfig(path="python:data"), [row | {"image": 3}])


def test_eval_asks_under_each_condition(folder, metrics, capsys):
    run = folder / "runs" / "run"
    assert cli.main(["eval", str(run), "eval.sets.mine.limit=8"]) == 0
    looks = json.loads((run / "eval-2" / "eval.json").read_text())["looks"]["mine"]
    assert list(looks) == ["n", "image", "blank", "shuffled", "none", "option_texts", "chance", "looks"]
    told = capsys.readouterr().out
    assert looks["looks"]["value"] == 0 and "another's" in told
    assert "warning: mine: the answers do not depend on the images: looks is 0.0 %" in told


def test_looks_is_the_models(folder):
    """The reward against log-probs of the same responses behind grey files; 0 without format or image."""
    changes = {"reward": [{"kind": "rule"}, {"kind": "looks", "clip": 0.5}]}
    parts = build.build(configs.load(folder / "config.yaml", changes))
    questions, index = load.load(parts.config.data), np.arange(8)
    encoded = encode(parts.tokenizer, questions, parts.config, vision=parts.cfg.vision)
    grey = {q.id: q for q in look.conditions(questions)["blank"]}
    blank = [grey.get(q.id, q) for q in questions]
    blank = encode(parts.tokenizer, blank, parts.config, vision=parts.cfg.vision)
    tokens = np.random.RandomState(1).randint(32, 120, (8, 2, 6)).astype(np.int32)
    mask = np.arange(6) < np.array([[6, 3]] * 8)[..., None]
    with jax.set_mesh(parts.mesh):
        params = build.load_params(parts, parts.cfg)
        drawn = Rollout(tokens, mask, np.zeros(tokens.shape, np.float32), None)
        place = lambda tree: sharding.place_rows(tree, 8, parts.mesh)
        prompts = place_prompts(params, parts, encoded, index, blank=True)
        seen, unseen = (
            np.asarray(assess_alone(params, parts, p, place(drawn)).logprobs)
            for p in (prompts, place_prompts(params, parts, blank, index))
        )
        rollout = place(replace(drawn, logprobs=seen))
        reward = make_policy_rewards(parts)["looks"]
        kept = np.arange(16).reshape(8, 2) % 5 > 0
        values = np.asarray(reward.program({}, params, prompts, rollout, place(kept)))
    mean = lambda x: np.where(mask, x, 0).sum(-1) / mask.sum(-1)
    gains = mean(seen) - mean(unseen)
    kept &= np.array([[bool(q.images)] for q in encoded.questions[:8]])
    np.testing.assert_allclose(values, np.where(kept, np.clip(gains, -0.5, 0.5), 0), atol=1e-5)
    assert (np.abs(values[kept]) < 0.4).any() and (np.abs(values) == 0.5).any(), gains
    with pytest.raises(ConfigError, match=r"looks: no question of data\.path has images"):
        check_questions(parts.config.reward, parts.tokenizer, [replace(questions[0], images=())])


@pytest.mark.parametrize("tower", ["freeze", "train"])
def test_what_is_asked_of_the_model_sees_the_images(tower, folder):
    """Probe's forced letters and the baseline of `probability`, against a pass over texts that end in them."""
    changes = {"reward": [{"kind": "probability"}], "model.vision": tower}
    parts = build.build(configs.load(folder / "config.yaml", changes))
    questions = load.load(parts.config.data)
    encoded = encode(parts.tokenizer, questions, parts.config, vision=parts.cfg.vision)
    which, thoughts = [3, 1, 2, 0, 2, 5, 7, 6], ["no", "", "red or blue", None, "no", "b", "", None]
    cases = [(i, probe.forced(t, "")) for i, t in zip(which, thoughts, strict=True)]
    with jax.set_mesh(parts.mesh):
        params = build.load_params(parts, parts.cfg)
        forced = probe.letter_logprobs(parts, params, encoded, cases, lambda done, n: None)
        section = parts.config.reward.components[0]
        scores = start_scores(parts, section, ({}, params), encoded, lambda done, n: None)

        def logprobs(which, ends):
            """Of the token after each end: [8, V]."""
            rows = [encoded.tokens[i] + list(end.encode()) for i, end in zip(which, ends, strict=True)]
            asked = replace(encoded, tokens=rows, ids=encoded.ids[which], width=max(map(len, rows)))
            asked = replace(
                asked, questions=[questions[i] for i in which], images=encoded.images.subset(which)
            )
            prompts = place_prompts(params, parts, asked, np.arange(8))
            states = jax.jit(lambda p, x: decoder.forward(p, parts.cfg, x)[0])(params, prompts)
            return np.asarray(jax.nn.log_softmax(decoder.logits(params, parts.cfg, states[:, -1])))

        after = logprobs(which, [end for _, end in cases])
        np.testing.assert_allclose([forced[case][0] for case in cases], after[:, [65, 66]], atol=1e-4)
        texts = [f" {q.right_text}" for q in questions[:8]]
        before = [logprobs(range(8), [text[:n] for text in texts]) for n in range(1, 5)]
    for i, text in enumerate(texts):  # of its letters, without the space
        letters = [math.exp(rows[i, ord(letter)]) for rows, letter in zip(before, text[1:], strict=False)]
        assert scores[question_hash(questions[i])] == pytest.approx(np.mean(letters), rel=1e-3), i


def test_a_run_that_is_paid_for_looking_resumes(folder):
    changes = {"reward": [{"kind": "format", "broken": -1}, {"kind": "looks"}], "eval.sets": {}}
    changes |= {"steps": 2, "log.stop_constant": 0, "loss.entropy_coef": 0.5}
    for name in ("whole", "cut"):
        config = configs.load(folder / "config.yaml", changes | {"name": name})
        if name == "cut":
            train(config, callbacks=lambda step, row: True)
        train(config)
    whole, cut = (lines(folder / "runs" / name / "metrics.jsonl") for name in ("whole", "cut"))
    timing = ("seconds", "tokens_per_second")
    strip = lambda rows: [{k: v for k, v in row.items() if k not in timing} for row in rows]
    assert strip(whole) == strip(cut) and whole[-1]["reward/looks"] == 0  # no response has the format


def test_data_shows_image_tokens(folder, capsys):
    assert cli.main(["data", str(folder / "config.yaml"), "eval.sets={}", "--prompts", "2"]) == 0
    assert re.search(r"<\|start\|><\|image\|> × \d+<\|end\|>Question: Which 1\?", capsys.readouterr().out)


def test_conditions_of_looking(folder):
    """Another's image is never the question's own, and is of its subject; a blank one has its size."""
    names = {0: ("1-0.png",), 1: ("3-0.png",), 2: ("1-0.png",), 3: ("5-0.png",), 4: ("7-0.png",)}
    asked = [
        Question(
            f"q{i}", "<image>?", ("a", "b"), i % 2, "ct" if i < 4 else "mr", images=(str(folder / n[0]),)
        )
        for i, n in names.items()
    ]
    under = look.conditions([*asked, Question("text", "?", ("a", "b"), 0)])
    assert [q.id for q in under["shuffled"]] == ["q0", "q1", "q2", "q3"]  # q4 is alone of its subject
    pictures = {q.images for q in asked[:4]}
    for question, before in zip(under["shuffled"], asked[:4], strict=True):
        assert question.images != before.images and question.images in pictures
    graded = look.conditions([replace(asked[0], task="grade"), *asked[1:]])  # nor with another task
    assert [q.id for q in graded["shuffled"]] == ["q1", "q2", "q3"]
    blank = images.read_image(under["blank"][1].images[0])
    assert blank.size == images.read_image(asked[1].images[0]).size and blank.getextrema()[0] == (122, 122)
    assert all(q.question == " ?" and not q.images for q in under["none"]) and len(under["none"]) == 5


def test_what_option_texts_give_away():
    """ "flu" is always right in both halves; where all options were right equally often, chance remains."""
    give = lambda i, options, answer: Question(f"q{i}", f"Which {i}?", options, answer)
    given_away = [give(i, ("flu", f"x{i}") if i % 2 else (f"x{i}", "flu"), 1 - i % 2) for i in range(40)]
    assert set(look.prior(given_away).values()) == {1.0}
    assert look.prior([give(0, ("a", "b", "c"), 0)]) == {"q0": pytest.approx(1 / 3)}


def test_looks_by_hand():
    asked = [Question(str(i), "?", ("a", "b"), 0, images=(b"x",)) for i in range(4)]
    rows = lambda *right: [{"id": str(i), "correct": bool(r)} for i, r in enumerate(right)]
    found = {"blank": rows(1, 0, 0, 0), "shuffled": rows(1, 1, 0, 0), "none": rows(1, 1, 1, 1)}
    image, unseen = rows(1, 1, 1, 0), {name: look.by_question(x) for name, x in found.items()}
    answers = look.add_unseen(image, unseen)
    assert answers[1]["correct"] and answers[1]["unseen"] == {"blank": 0, "shuffled": 1, "none": 1}
    result = look.describe(asked, look.by_question(image), unseen)
    assert result["image"].value == 0.75 and result["none"].value == 1
    assert result["looks"].value == 0.25 and result["looks"].low < 0.25 < result["looks"].high
    assert result["chance"] == 0.5 and "subjects" not in result
    asked = [replace(q, subject="ct" if q.id == "0" else "mr") for q in asked]
    result = look.describe(asked, look.by_question(image), unseen)
    mr = result["subjects"]["mr"]
    assert mr["n"] == 3 and mr["image"].value == pytest.approx(2 / 3) and mr["blank"].value == 0
    assert mr["looks"].value == pytest.approx(1 / 3)  # less another's image
    assert result["mean_over_subjects"]["image"].value == pytest.approx((1 + 2 / 3) / 2)
    lines = look.show({"films": result}).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["films", "ct", "mr", "mean"] and "50.0 %" in lines[2]


def test_broken_images_are_refused_together(folder):
    cfg = build.build(configs.load(folder / "config.yaml")).cfg.vision
    asked = [
        Question(f"q{i}", "?", ("a", "b"), 0, images=(image,)) for i, image in enumerate([b"x", "gone.png"])
    ]
    with pytest.raises(DataError) as refused:
        patches.measure_images(asked, cfg)
    first, second = str(refused.value).splitlines()
    assert first.startswith("question q0: image of 1 bytes: ") and "gone.png: no such image" in second
    assert patches.measure_images([Question("q", "?", ("a", "b"), 0)], cfg) is None


TOWER = {"name": "tower", "model.vision": "train", "kl.into": "loss", "kl.estimator": "k3", "eval.sets": {}}
TOWER |= {"mesh": {"data": 2, "fsdp": 4}}


def test_a_trained_tower_resumes_to_the_bit(folder):
    """The trainer sees what the sampler saw, and the reference by the start's tower; the tower is saved."""
    tower_run = trained(folder, **TOWER)
    assert tower_run[0]["sampler_gap"] < 1e-5 and abs(tower_run[0]["kl"]) < 1e-6, tower_run[0]
    parts, params, _ = open_policy(folder / "runs" / "tower", {}, None)
    with jax.set_mesh(parts.mesh):
        start = build.load_params(parts, parts.cfg)["vision"]["layers"]
    assert np.abs(np.asarray(params["vision"]["layers"]["qkv"]) - np.asarray(start["qkv"])).max() > 1e-4
    changes = TOWER | {"name": "resumed"}
    config = configs.load(folder / "config.yaml", changes)
    train(config, rewards=characters, callbacks=lambda step, row: True)
    again = trained(folder, **changes)
    timed = ("seconds", "tokens_per")
    for row, other in zip(tower_run, again, strict=True):
        assert {k: v for k, v in other.items() if not k.startswith(timed)} == {
            k: v for k, v in row.items() if not k.startswith(timed)
        }


def test_a_trained_merger_leaves_the_blocks(folder, capsys):
    """Beside adapters, in a fine-tuning; what is exported has the merger as it was learned."""
    changes = {"name": "merger", "model.vision": "merger", "model.lora": {"rank": 2}, "eval.sets": {}}
    sft(configs.load(folder / "config.yaml", changes | {"steps": 1, "sft.max_new_tokens": 32}, "sft"))
    assert cli.main(["export", str(folder / "runs" / "merger"), str(folder / "hf")]) == 0
    before, after = (load_file(folder / name / "model.safetensors") for name in ("model", "hf"))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    tower = {name for name in before if name.startswith("visual.")}
    assert changed & tower == {name for name in tower if name.startswith("visual.merger.")}
    assert cli.main(["export", str(folder / "runs" / "merger"), str(folder / "adapter"), "--adapter"]) == 2
    assert "model.vision merger: a part of the vision tower was trained, too" in capsys.readouterr().err


def test_texts_with_images_teach_a_random_model(folder):
    """Pretraining from nothing, as the embedded models are made: the loss falls below that of chance."""
    rows = [
        {"prompt": "<image>It is ", "response": "red" if i % 2 else "blue", "image": str(folder / "1-0.png")}
        for i in range(8)
    ]
    changes = {"name": "random", "model.vision": "train", "model.init": "random", "eval.sets": {}}
    changes |= {"sft.target": "text", "steps": 3}
    sft(configs.load(folder / "config.yaml", changes, "sft"), data=rows)
    nll = [row["nll"] for row in lines(folder / "runs" / "random" / "metrics.jsonl")]
    assert nll[-1] < nll[0]
    frozen = configs.load(folder / "config.yaml", changes | {"name": "r2", "model.vision": "freeze"}, "sft")
    with pytest.raises(ConfigError, match=r"model\.init: random: the vision tower would be random"):
        sft(frozen, data=rows)
    with pytest.raises(ConfigError, match=r"model\.vision: train: no question of data has an image"):
        config = configs.load(folder / "config.yaml", changes | {"name": "r3"}, "sft")
        sft(config, data=[{"prompt": "x", "response": "y"}] * 8)


def test_the_reference_sees_by_the_tower_of_the_start(folder):
    """Whatever the policy's tower has become since."""
    parts = build.build(configs.load(folder / "config.yaml", TOWER))
    questions = load.load(parts.config.data)[:8]
    with jax.set_mesh(parts.mesh):
        encoded = encode(parts.tokenizer, questions, parts.config, vision=parts.cfg.vision)
        start, index = build.load_params(parts, parts.cfg), np.arange(8)
        moved = start | {"vision": jax.tree.map(lambda x: x * 1.1, start["vision"])}
        tokens = np.random.RandomState(0).randint(5, 200, (8, 2, 6)).astype(np.int32)
        tokens = place_rows(tokens, 8, parts.mesh)
        rollout = Rollout(tokens, tokens > 0, logprobs=tokens, policy_logprobs=None)
        frozen, settings = Frozen({}, start), assess_settings(parts)
        of = {
            name: assess(
                frozen, params, None, place_prompts(params, parts, encoded, index), rollout, settings
            )
            for name, params in {"start": start, "moved": moved}.items()
        }
    close = lambda x, y: np.abs(np.asarray(x) - np.asarray(y)).max() < 1e-5
    assert close(of["start"].logprobs, of["start"].ref_logprobs)
    assert close(of["moved"].ref_logprobs, of["start"].ref_logprobs)
    assert not close(of["moved"].logprobs, of["start"].logprobs)


def test_completions_of_questions_with_images_are_an_evaluations(folder):
    model, rows = (
        load_model(folder / "model", settings={"prompt.template": "none"}),
        lines(folder / "data.jsonl")[:4],
    )
    for row in rows:
        row["images"] = [str(folder / name) for name in row["images"]]
    ask = lambda rows: generate(model, rows, temperature=0, max_new_tokens=6)
    asked, answers = ask(rows), evaluate(model, rows, max_new_tokens=6).answers
    assert [x.text for x in asked] == [x["completion"] for x in answers]
    rows[1]["images"] = rows[3]["images"]
    again = ask(rows)
    assert again[0].logprobs[0] == asked[0].logprobs[0] and again[1].logprobs[0] != asked[1].logprobs[0]
