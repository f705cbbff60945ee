"""The settings of the data: sets of questions, and how a question becomes a prompt."""

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from medrlvr_jax.config.section import section

Format = Literal[
    "auto", "plain", "open", "vqa", "text", "medqa", "mmlu_pro", "mmlu", "medmcqa", "pubmedqa", "medcalc",
    "trec", "omnimedvqa", "med_r1", "pmc_vqa", "vqa_rad", "slake", "medxpertqa", "medvlthinker",
]  # fmt: skip


@section
class PassCountConfig:
    """Select or order questions by the number of samples that a model got right (MedVLThinker, arXiv
    2508.02669, keeps 1 to 7 of 16), or by how this number changed in an earlier run (1-shot RLVR, LIMR)."""

    # The file that `medrlvr difficulty` wrote. The orders variance and impact need one made with --history.
    file: str
    # Use only questions with at least and at most this many right samples: [1, 7]. null: use all.
    keep: tuple[NonNegativeInt, NonNegativeInt] | None = None
    # Order of the questions in each pass. variance, impact: largest first. null: random.
    order: Literal["easy_first", "hard_first", "variance", "impact"] | None = None
    top: PositiveInt | None = None  # Use only the first N questions in this order. null: all.


@section
class SetConfig:
    """A set of questions: a file, a hub name, or `embedded:{train,in_distribution,out_of_distribution}`."""

    path: str  # A file (JSONL, JSON, CSV, parquet), a hub name, or embedded:NAME.
    # Fields of the records. auto: recognise the format by the first record; plain: your own multiple-choice
    # questions; open: your own questions whose answers are numbers, dates, durations, labels or texts; text:
    # prompt and response, for sft; vqa: image, question, answer; the others are published data sets.
    format: Format = "auto"
    subset: str | None = None  # Configuration name on the hub. Files have none.
    split: str | None = None  # Split on the hub. Files have none.
    # Commit, branch or tag on the hub. null: the newest commit. A run prints the commit that it read.
    revision: str | None = None
    # Which field of the file holds each field of the format: {question: q, options: [op1, op2], answer:
    # gold}. `a.b` is field b inside the object a. null: do not read this field.
    fields: dict[str, str | list[str] | None] = Field(default_factory=dict)
    # Fields with the same value in every record, such as {kind: number, tolerance: 0.05}.
    constants: dict[str, Any] = Field(default_factory=dict)
    # Split a field into new fields by a regular expression with named groups, which must match the whole
    # field: {solution: "<answer> (?P<answer>.) </answer>"}. This happens before `fields`.
    patterns: dict[str, str] = Field(default_factory=dict)
    # Folder of the image files, relative to the folder of the data file. null: the same folder.
    image_folder: str | None = None
    # Use only records whose fields have these values: {split: test, type: [decimal, date]}.
    where: dict[str, Any] = Field(default_factory=dict)
    # What to do with invalid records. refuse: stop and list them; skip: leave them out and count them.
    on_bad: Literal["refuse", "skip"] = "refuse"
    limit: PositiveInt | None = None  # Use only the first N questions. null: all.
    # Shuffle the answer options again in each epoch, and for each sample of an evaluation.
    shuffle_options: bool = False
    pass_count: PassCountConfig | None = None  # Select or order questions by difficulty. null: do neither.


@section
class PromptConfig:
    """How a question becomes the tokens of a prompt."""

    # think: ask for reasoning and an answer; direct: ask for the answer only; none: add no instruction. Or
    # your own text, in which {question} stands for the question with its lettered options, {answer} for what
    # to give ("the letter of the one best option") and {form} for its short name ("letter").
    template: str = "think"
    chat: bool = False  # Apply the tokenizer's chat template to the prompt.
    system: str | None = None  # With chat: the system message. null: the chat template's default, if any.
    # With chat: variables of the chat template, such as {enable_thinking: false}.
    template_args: dict[str, Any] = Field(default_factory=dict)
    # Text that every response starts with, such as "<answer>". The model does not sample it. The reward sees
    # it in front of the completion.
    prefill: str = ""
    # Maximum length of a prompt, image tokens included. Longer prompts are dropped and counted.
    max_tokens: PositiveInt = 512
    # Images with more pixels are scaled down to this number; an image token covers 28 × 28. null: the limit
    # in the model's preprocessor_config.json.
    max_pixels: Annotated[int, Field(ge=28 * 28)] | None = None
