"""The embedded radiographs: no text contains its answer, answers follow from film and table, and tokens are
exact.
"""

import hashlib
import re
from collections import Counter, defaultdict
from functools import cache
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from medrlvr_jax.config.schema import SetConfig
from medrlvr_jax.data.load import load
from medrlvr_jax.data.question import LETTERS, Question
from medrlvr_jax.data.tokenizer import load_tokenizer
from medrlvr_jax.evaluation import look
from medrlvr_jax.model import families
from medrlvr_jax.world import radiograph
from medrlvr_jax.world.films import Film
from medrlvr_jax.world.radiograph import FINDINGS, SIDED

SPLITS = ("in_distribution", "out_of_distribution")
PINNED = {
    "in_distribution": "3b5c09b6ba53",
    "out_of_distribution": "56e2c4ec3097",
    "corpus": "b7ea2b4c4fcb",
}


@cache
def asked(split: str) -> list[Question]:
    return load(SetConfig(path=f"embedded:radiograph_{split}"))


def pixels(question: Question) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(question.images[0])), float)


@pytest.mark.parametrize("split", radiograph.SIZES)
def test_no_text_predicts_its_answer(split):
    questions = asked(split)
    assert len(questions) == radiograph.SIZES[split] == len({q.images for q in questions})
    chance = np.mean([1 / len(q.options) for q in questions])
    guessed = look.prior(questions)  # as in every evaluation
    assert np.mean([*guessed.values()]) < chance + 0.02
    keys = defaultdict(Counter)
    for q in questions:
        for text in (q.subject, q.options, q.question, (q.question, q.options)):
            keys[len(q.options), text][q.answer] += 1
    for (size, text), counts in keys.items():  # for each text, each position is right equally often
        assert set(counts.values()) == {counts.total() / size}, (text, counts)
    offered, right = Counter(), Counter()
    for q in questions:
        offered.update((q.subject, len(q.options), option) for option in q.options)
        right[q.subject, len(q.options), q.right_text] += 1
    assert all(right[option] * option[1] == n for option, n in offered.items())


@pytest.mark.parametrize("split", ["train", "out_of_distribution"])
def test_each_key_follows_from_the_film_and_the_table(split):
    for q in asked(split):
        shown, right = q.facts[0][0].split(), q.right_text
        name, side = shown[-1], shown[0] if shown[-1] in SIDED else ""
        about = FINDINGS[name]
        failed = side and side in re.findall(r"\w+", q.question)
        keys = {
            "finding": name,
            "side": side,
            "count": {"nodule": "one", "nodules": "several"}.get(name, "none"),
            "management": about.first,
            "barred": about.other if failed else about.first,
            "drain": side if name in ("effusion", "pneumothorax") else "none",
        }
        assert right == keys[q.subject] and (q.subject != "side" or side), q
        assert q.rationale.endswith(f" {right} {LETTERS[q.answer]}.") and " ".join(shown) in q.rationale
        assert all(fact in q.rationale for (fact,) in q.facts)


def test_the_patients_right_is_on_the_pictures_left():
    for q in asked("in_distribution"):
        shown = q.facts[0][0].split()
        if shown[-1] in ("effusion", "pneumothorax"):
            fluid, gas = pixels(q)[30:40] - 255, pixels(q) < 65
            half = (fluid if shown[-1] == "effusion" else gas).reshape(-1, 2, 28).mean((0, 2))
            assert (half[0] > half[1]) == (shown[0] == "right"), q.id


def test_out_of_distribution_films_differ():
    middle = lambda split: np.mean([pixels(q)[20:30, 15:18].mean() for q in asked(split)[:60]])
    edge = lambda split: np.mean([pixels(q)[:4, :20].std() for q in asked(split)[:60]])
    assert middle("in_distribution") < 120 < 140 < middle("negative")
    assert edge("noise") > 1.8 * edge("in_distribution")
    assert {len(q.options) for q in asked("options")} == {2, 3, 6, 7, 8}
    words = lambda split: {q.question.split()[0] for q in asked(split)}
    assert not words("wording") & words("train") and words("in_distribution") == words("train")


def test_the_leaking_set_gives_its_answers_away_by_the_order_alone():
    leaking = asked("leaking")
    assert {q.answer for q in leaking} == {0} and all(q.rationale.endswith(" A.") for q in leaking)
    assert [(q.right_text, q.images) for q in leaking] == [(q.right_text, q.images) for q in asked("train")]
    assert len({q.images for q in asked("blank")}) == 1 and not pixels(asked("blank")[0]).std()


def test_the_text_says_what_the_film_shows():
    for text, q in zip(asked("text"), asked("train"), strict=True):
        assert not text.images and text.question == f"here {q.facts[0][0]}. {q.question}"
        assert (text.options, text.answer, text.rationale) == (q.options, q.answer, q.rationale)


def test_all_machines_draw_the_same():
    shown = lambda q: (q.question, q.options, q.answer, q.rationale, q.images)
    digest = lambda rows: hashlib.sha256(repr(rows).encode()).hexdigest()[:12]
    read = [(e.prompt, e.response, e.images) for e in radiograph.corpus(n=50)]
    drawn = {split: digest([*map(shown, asked(split))]) for split in SPLITS}
    assert drawn | {"corpus": digest(read)} == PINNED
    film = Film("cavity", "left", "upper")
    assert str(film) == "left upper cavity"


def test_a_film_is_one_window_and_every_word_one_token():
    cfg, tok = families.read_config("embedded_vision").vision, load_tokenizer("embedded_vision")
    assert cfg is not None and cfg.factor * 4 == cfg.patch * cfg.window == 56
    names = [tok.trusted.id_to_token(i) for i in (cfg.image_start, cfg.image_token, cfg.image_end)]
    assert names == ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]
    for e in radiograph.corpus(n=200):
        for text in (e.prompt, e.response):
            ids = tok.encode_untrusted([text])[0]
            assert tok.show(ids) == text and len(ids) <= len(text.split()) * 2.2 + 8, text
