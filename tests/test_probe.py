"""Thoughts cut and answers forced, by hand; log-probs of letters against the model applied token by token."""

import math

import jax
import numpy as np
import pytest
import tokenizers
from byte_tokenizer import byte_tokenizer
from test_text import make

from medrlvr_jax import build
from medrlvr_jax.config import load as configs
from medrlvr_jax.data import load as data
from medrlvr_jax.data import prompts as text
from medrlvr_jax.data.tokenizer import wrap
from medrlvr_jax.evaluation import probe
from medrlvr_jax.model import decoder
from medrlvr_jax.rollout.rollout import before_response, encode

EMBEDDED = {
    "name": "probed",
    "steps": 1,
    "model": {"path": "embedded", "remat": "none"},
    "data": {"path": "embedded:in_distribution", "limit": 3},
    "prompt": {"template": "none"},
    "sample": {"questions": 8},
    "learn": {"minibatch": 8, "policy": {"lr": 1e-3}, "critic": {"lr": 1e-3}},
    "eval": {"batch": 8},
}


@pytest.mark.parametrize(
    ("completion", "found"),
    [
        ("<think>a b.</think>\n<answer>C</answer>", ("a b.", "\n")),
        ("so <think>a</think> then</think><answer>C</answer>", ("a", "")),
        ("<think>cut off by the bud", ("cut off by the bud", "")),
        ("no tags. the answer is C.", ("no tags. the answer is C.", "")),
        ("<answer>C</answer>", ("", "")),
        ("", ("", "")),
    ],
)
def test_the_thought_of_a_completion(completion, found):
    assert probe.thought(completion) == found


def test_cuts_and_sentences():
    four = " one two\nthree four."
    assert [probe.cut(four, s / 100) for s in (0, 25, 50, 75, 100)] == [
        "",
        " one",
        " one two",
        " one two\nthree",
        four,
    ]
    assert probe.cut("", 0.5) == "" == probe.cut("one", 0.25)
    assert probe.thought_prefixes("It is 2.3 mg. So B; or\nC") == [
        "It is 2.3 mg.",
        "It is 2.3 mg. So B;",
        "It is 2.3 mg. So B; or\n",
        "It is 2.3 mg. So B; or\nC",
    ]
    assert probe.thought_prefixes("One. ") == ["One. "] and probe.thought_prefixes(" . ") == []


def test_letter_tokens_are_the_tokens_in_which_the_texts_differ():
    [(common, letters)] = probe.letter_tokens(byte_tokenizer(), ["<answer>"], [3])
    assert bytes(common) == b"<answer>" and letters == [[65], [66], [67]]
    # one letter is joined to what stands before it, one to what follows
    hf = make(merges=[(">", "A"), ("B", "<")])
    hf.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    joined = wrap(hf)
    [(common, letters), (_, two)] = probe.letter_tokens(
        joined, ["<answer>", "<think>x</think><answer>"], [3, 2]
    )
    assert (
        bytes(common) == b"<answer"
        and [joined.show(ids) for ids in letters] == [">A<", ">B<", ">C<"]
        and len(letters[0]) == 2
    )
    assert [joined.show(ids) for ids in two] == [">A<", ">B<"]


def test_letter_logprobs_equal_those_of_the_model():
    parts = build.build(configs.from_tree(EMBEDDED))
    encoded = encode(parts.tokenizer, data.load(parts.config.data), parts.config)
    with jax.set_mesh(parts.mesh):
        params = build.load_params(parts, parts.cfg)
        cases = [(0, probe.forced("here", "")), (2, probe.forced(None, "")), (1, probe.forced("", "\n"))]
        scored = probe.letter_logprobs(parts, params, encoded, cases, lambda done, n: None)
        found, sizes = ([scored[case][i] for case in cases] for i in (0, 1))
        assert [len(row) for row in found] == [len(encoded.questions[i].options) for i, _ in cases]
        assert sizes == [[1] * len(row) for row in found]
        split = probe.letter_tokens(
            parts.tokenizer, [before for _, before in cases], [len(row) for row in found]
        )
        rows = [encoded.tokens[i] + common for (i, _), (common, _) in zip(cases, split, strict=True)]
        whole = text.pad_prompts(rows, np.arange(3), max(map(len, rows)), 0)

        @jax.jit
        def last(params):
            states, _ = decoder.forward(params, parts.cfg, whole)
            return jax.nn.log_softmax(decoder.logits(params, parts.cfg, states[:, -1]))

        for row, scores, (_, letters) in zip(found, last(params), split, strict=True):
            np.testing.assert_allclose(row, [scores[ids[0]] for ids in letters], atol=1e-4)


def test_the_prefill_is_not_in_the_prompt_twice():
    parts = build.build(configs.from_tree(EMBEDDED | {"prompt": {"template": "none", "prefill": "<think>"}}))
    questions = data.load(parts.config.data)
    bare = encode(parts.tokenizer, questions, configs.from_tree(EMBEDDED))
    given = encode(parts.tokenizer, questions, parts.config)
    assert given.tokens != bare.tokens == before_response(parts, given).tokens


def test_the_figures_of_a_probe_by_hand():
    names = ["at once", "0 %", "25 %", "50 %", "75 %", "100 %", "another's"]

    def row(i, late, early):
        answers = dict.fromkeys(names, early) | {"100 %": late}
        return {
            "id": str(i),
            "key": "A",
            "generated": late,
            "answers": answers,
            "key_logprob": [-math.log(x) for x in ((4, 2, 1) if late == "A" else (2,))],
        }

    found = probe.summarise([row(i, "A", "B") for i in range(6)] + [row(7, "B", "B"), row(8, "A", "A")])
    c = found["conditions"]
    assert c["100 %"]["accuracy"].value == 7 / 8 == found["generated"].value and c["100 %"]["p_holm"] is None
    assert (
        c["0 %"]["accuracy"].value == 1 / 8
        and c["0 %"]["difference"].value == -6 / 8
        and c["0 %"]["same_answer"] == 2 / 8
    )
    assert c["another's"]["p_holm"] == pytest.approx(6 * 2 / 2**6)
    gain = found["info_gain"]
    assert (gain["questions"], gain["sentences"], gain["positive"], gain["scorer"]) == (7, 14, 1.0, None)
    assert gain["nats"].value == gain["median_nats"] == pytest.approx(math.log(2)) and gain[
        "median_perplexity"
    ] == pytest.approx(1.5)
    shown = probe.show({"set": found})
    assert (
        "-75.0 % (-100.0 to -16.0)" in shown
        and "InfoGain per sentence +0.693 (+0.693 to +0.693) nats" in shown
        and "by the model itself" in shown
    )


def test_few_improbable_keys_do_not_dominate_the_gain():
    """One sentence halves the probability of an improbable key: +10,000 in perplexity, but −0.7 nats."""
    names = dict.fromkeys(("at once", "0 %", "100 %"), "A")
    row = {"key": "A", "generated": "A", "answers": names}
    rows = [row | {"key_logprob": [-2.0, -1.0]} for _ in range(19)] + [
        row | {"key_logprob": [-math.log(1e4), -math.log(2e4)]}
    ]
    gain = probe.summarise(rows, "models/other")["info_gain"]
    assert gain["nats"].value == pytest.approx((19 - math.log(2)) / 20) and gain["nats"].low > 0.6
    assert gain["median_perplexity"] == pytest.approx(math.e**2 - math.e) and gain["scorer"] == "models/other"
