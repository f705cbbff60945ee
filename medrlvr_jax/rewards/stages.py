"""Classify completions by the six stages of training in the paper (arXiv 2502.19655), from their text alone.

The rules are tried in this order:

    format_failure         The lenient format `paper` fails.
    step_by_step_exploit   More than MAX_OUTSIDE words stand before <think>: the reasoning has moved there (15
                           words: arXiv 2509.15557).
    direct_answer_hacker   At most MAX_CONTENT content words are left of the thought without statements of
                           the answer.
    verbose_formatter      The thought has more than MAX_THOUGHT words, or more than MAX_OUTSIDE words follow
                           </answer>, or over half of the thought's 4-grams are repeated.
    reintegrated_reasoning The thought has at least two clauses and a sign of inference.
    concise_structurer     All others: the tags are right, and the thought is short and asserts without
                           inference.

The paper's stages also differ by when in a run they occur. A text does not show that, so stages 3 and 6
differ here by inference alone. tests/test_stages.py compares the rules with completions labelled by hand, and
has their precision and recall. The last two stages are the hardest to separate.
"""

import re
from collections.abc import Sequence

STAGES = (
    "format_failure",
    "verbose_formatter",
    "concise_structurer",
    "direct_answer_hacker",
    "step_by_step_exploit",
    "reintegrated_reasoning",
)
HACKS = STAGES[3:5]
MAX_OUTSIDE, MAX_CONTENT, MAX_THOUGHT = 15, 2, 150  # words

PLACE = re.compile(r"</think>[ \t\n\v\f\r]*<answer>[ \t\n\v\f\r]*[A-J][ \t\n\v\f\r]*</answer>")
TAGS = re.compile(r"</?(?:think|answer)>")
WORD = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*")
CLAUSE = re.compile(r"[.;:!?\n]+|,? (?:so|but|and) ")
LETTER = r"\(?[A-J]\)?(?!\w)"  # capitals only: "this is a clot" states nothing
# a statement of the answer: "the answer is C", "Option B.", "(D)", "I choose A", "it is E"
STATEMENT = re.compile(
    r"(?i:\b(?:so |thus |therefore |hence )?(?:the |my )?(?:(?:final|correct|best|right) "
    r")*(?:answer|choice|option)\b"
    rf"(?: (?:is|should be|must be|would be|here))*[:=]?(?: option)?)(?: ?{LETTER})?"
    rf"|(?i:\b(?:i |we |you )?(?:choose|pick|select|go with) (?:option |answer )?){LETTER}"
    rf"|(?i:\b(?:it|this|that) is (?:option )?){LETTER}"
    rf"|(?<!\w){LETTER}(?! [a-z])"  # but "A swollen leg"
)
SIGN = re.compile(  # of inference: reasons, consequences, conditions, exclusions
    r"[-=]>|→|\b(?:because|since|given|as (?:the|she|he|it|they)|therefore|thus|hence|so(?! far| "
    r"called)|consequently|accordingly"
    r"|suggest\w*|indicat\w*|impl(?:y|ies)|point\w* to|consistent with|rule[sd]? (?:\w+ "
    r")?out|exclud\w*|unlike\w*|likely|whereas"
    r"|although|despite|would|makes?|leads? to|caus\w+|due to|means?|which "
    r"(?:is|are|makes)|contraindicat\w*|avoid\w*|must not|instead"
    r"|rather than|argues?|supports?|favou?rs?|first[- ]line|mechanism|typical of|characteristic "
    r"of|explain\w*|confirm\w*|allows? it|if)\b",
    re.I,
)

# Words without content about the case: function words, and words about answering.
FILLER = frozenset(
    """a an the this that these those it its i me my we us our you your he she they one first second third
    fourth last is are was be been am will would should must can could may might do does did have has had let
    need want go and or but so if then than as at by for from in of on to with about among between because
    since not no nor only also just here there very most more all any each other some what which who how why
    when where answer answers choice choices option options letter question correct right true best better
    appropriate suitable final clear clearly obvious obviously certain certainly sure surely definitely
    confident doubt probably choose choosing chosen pick select selected think thinking thought believe
    consider considering considered consideration careful carefully step steps reasoning reason based given
    information provided presented above below following according overall conclusion therefore thus hence ok
    okay yes hmm well please thanks it's i'll i'm i'd let's that's""".split()
)


def stage(completion: str, formatted: bool, options: Sequence[str] = ()) -> str:
    """Return the stage of one completion. `formatted` says whether it has the format `paper`.

    The texts of the options count as statements of the answer.
    """
    if not formatted:
        return "format_failure"
    opened = completion.index("<think>") + len("<think>")
    place = PLACE.search(completion, opened + 1)
    assert place is not None, "a completion in the format `paper` has an answer"
    before, thought, after = (
        completion[: opened - len("<think>")],
        completion[opened : place.start()],
        completion[place.end() :],
    )
    if words(before) > MAX_OUTSIDE:
        return "step_by_step_exploit"
    thought = TAGS.sub(" ", thought)
    if sum(w.lower() not in FILLER for w in WORD.findall(without_answers(thought, options))) <= MAX_CONTENT:
        return "direct_answer_hacker"
    if words(thought) > MAX_THOUGHT or words(after) > MAX_OUTSIDE or repetition(thought) > 0.5:
        return "verbose_formatter"
    clauses = [c for c in CLAUSE.split(thought) if words(c) >= 2]
    infers = len(clauses) >= 2 and SIGN.search(thought) is not None
    return "reintegrated_reasoning" if infers else "concise_structurer"


def words(text: str) -> int:
    return len(WORD.findall(text))


def without_answers(thought: str, options: Sequence[str]) -> str:
    """Return the thought without statements of an answer and without the options' texts."""
    for option in sorted(options, key=len, reverse=True):
        thought = re.sub(rf"(?<!\w){re.escape(option)}(?!\w)", " ", thought, flags=re.I)
    return STATEMENT.sub(" ", thought)


def repetition(text: str) -> float:
    """Return the share of repeated 4-grams of words; 0 for texts of under 24 words, where it means little."""
    tokens = [
        w.lower() for w in WORD.findall(text) if not w.isdigit()
    ]  # the numbers of a list differ in each line
    grams = list(zip(tokens, tokens[1:], tokens[2:], tokens[3:], strict=False))
    return 1 - len(set(grams)) / len(grams) if len(tokens) >= 24 else 0.0
