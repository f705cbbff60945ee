"""The command line: `medrlvr …`, and the same as `python -m medrlvr_jax …`."""

import argparse
import io
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path

EPILOG = """\
a first run:       medrlvr train configs/quickstart.yaml
change a setting:  medrlvr train configs/quickstart.yaml sample.temperature=0.8 name=cooler
go on with a run:  the same command again; it resumes from its newest checkpoint
"""

PLAN = """Compiles every program of the training step from shapes alone, with the machine's own compiler; no accelerator, weights or hub.
Exit status: 0 it fits, 3 it does not, 2 unusable input."""

REPRODUCE = """\
Runs every arm of the file with every seed, each as an ordinary run in runs/<name>/<arm>-<seed>/, evaluates them all the same way, and
writes table.md, table.json and curves.png into runs/<name>/. The same command again goes on: finished cells are not run again, stopped
ones resume, and a cell whose settings have changed is refused. Exit status: 0 done, 1 a cell failed, 2 unusable input, 130 stopped.

  on two cores:     medrlvr reproduce configs/reproduce_tiny.yaml --jobs 2
  some of it:       medrlvr reproduce configs/reproduce_tiny.yaml --only sft_answer grpo seeds=[0]
  on another model: medrlvr reproduce configs/reproduce_tiny.yaml name=mine model.path=DIR"""

REPORT = """One self-contained HTML file, and its pictures as PNG in <name>_pictures beside it. Runs that differ in their seed alone are one
curve with a band. It can be made while runs are going on."""


REPLAY = """Seed, step, question and sample say what noise a completion was drawn with, so it can be drawn again from the policy
before its step: checkpoint S-1, or the start for step 1. Where checkpoint S-1 is not kept (checkpoint.keep), the steps from the newest
earlier checkpoint, or from the start, are trained again first, which takes as long as it took then. Nothing is written.
Exit status: 0 it is what was logged, or was not logged; 1 it is not. Equal to the bit on the machine and mesh of the run; elsewhere
rounding may choose another token now and then. Only mesh.* is meant to be set otherwise here."""

EVAL = """Answers the config's eval.sets with a run's checkpoint, or with the config's own model. Prints accuracy and format with 95 %
intervals over questions (several samples of one are not several questions), entropy per token, subjects, and how often each letter is
answered and is the key; with eval.samples above 1 also pass@k, with chance taken out too, and maj@k. A set that holds
exact repeats is also given without them. eval.json has all of it, for every k, and how it was made: settings, the prompt's
wording, hashes of questions and prompts."""

PROBE = """Lets the model answer the config's eval.sets greedily, then forces an answer (the most probable letter) at once, after the
first 0, 25, 50, 75 and 100 % of its thought, and after another question's thought: if none of it changes the accuracy, the thought does
no work. Also how much more probable each sentence makes the key (InfoGain, arXiv 2506.02126), as the model itself has it or, with
--scorer, a fixed other one: only then may two models be compared by it."""

COMPARE = """Refused where questions, wording of the prompt, number of samples, decoding or the rule that judges are not the same in both:
then it would not be the models alone that are compared. Each set's questions are paired by id and hash. p: McNemar's exact test of one
answer a question, else a t test over the questions."""

CONTAMINATION = """Compares the stems of each test set with those of the training set, and the training set with itself: the same words, or
more than half of the shorter one's 8-grams in the other. 8-grams that over 1 % of the stems have do not count, and questions with short
stems must also have an option in common. With one CONFIG.yaml: its data against its eval.sets."""

DIFFICULTY = """Samples K answers to each question of the config's data, as a rollout would, and writes how many are right. Then
data.pass_count={file: FILE, keep: [1, 7]} trains on those with 1 to 7 right answers; order: easy_first goes through them from easy to
hard. The same command again goes on where it was cut off.

With --history nothing is asked: a run's own questions.jsonl says how often each question was right in each pass, and so its variance and
impact; data.pass_count={file: FILE, order: variance, top: 16} trains on the first by them."""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="medrlvr",
        description="Reinforcement learning from verifiable rewards on medical questions, in JAX.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str, description: str = "") -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=description or help)

    def distributed(c: argparse.ArgumentParser) -> None:
        c.add_argument("--distributed", action="store_true", help="one of several processes that run this command as one program")

    def settings(c: argparse.ArgumentParser) -> None:
        c.add_argument("settings", nargs="*", metavar="a.b=value", help="settings that replace those of the file; values are YAML")

    def at_step(c: argparse.ArgumentParser) -> None:
        c.add_argument("--step", type=step, metavar="N|best", help="the run's checkpoint to take; the newest unless given")

    for name, help in (("train", "PPO, GRPO and kin on questions with keys"), ("sft", "supervised fine-tuning, or pretraining on text")):
        c = command(name, help, f"{help}. Writes runs/<name>/; the same command again resumes it.")
        c.add_argument("config", metavar="CONFIG.yaml")
        settings(c)
        distributed(c)
    c = command("eval", "answer the config's eval.sets with a run's checkpoint, or with the config's own model", EVAL)
    c.add_argument("source", metavar="RUN|CONFIG.yaml", help="a run's folder, or a config: then its model.path is evaluated")
    settings(c)
    at_step(c)
    c.add_argument("--out", type=Path, help="folder for one JSONL of answers per set and eval.json; default RUN/eval-<step>")
    distributed(c)
    c = command("reproduce", "a file of arms: base, SFT, PPO, GRPO and controls over seeds, and one table of them", REPRODUCE)
    c.formatter_class = argparse.RawDescriptionHelpFormatter
    c.add_argument("config", metavar="FILE.yaml", help="such as configs/reproduce_tiny.yaml")
    c.add_argument("settings", nargs="*", metavar="a.b=value", help="settings of every cell, or fields of the file: seeds=[0] name=short")
    c.add_argument("--jobs", type=int, default=1, metavar="N", help="cells at a time, each on its share of the cores; default 1")
    c.add_argument("--only", nargs="+", default=[], metavar="ARM", help="these arms, and those that they start from")
    c.add_argument("--dry-run", action="store_true", help="check every cell's settings, say where each stands, run nothing")
    c = command("probe", "does the reasoning do any work: answers forced after parts of the model's own thoughts", PROBE)
    c.add_argument("source", metavar="RUN|CONFIG.yaml", help="a run's folder, or a config: then its model.path is probed")
    settings(c)
    at_step(c)
    c.add_argument("--out", type=Path, help="folder for one JSONL per set and probe.json; default RUN/probe-<step>")
    c.add_argument("--scorer", metavar="MODEL", help="a model directory or hub name by which InfoGain is scored; default: itself")
    distributed(c)
    c = command("compare", "two evaluations of the same questions: paired tests, what one solves and the other does not", COMPARE)
    c.add_argument("a", type=Path, metavar="EVAL_A", help="a folder that `medrlvr eval` wrote, such as RUN/eval-32, or a run: its newest")
    c.add_argument("b", type=Path, metavar="EVAL_B")
    c.add_argument("--anyway", action="store_true", help="compare what was asked in both, although they differ in more than the model")
    c.add_argument("--json", action="store_true", help="everything, as one JSON object: also pass@k, majority, letters")
    c = command("contamination", "which test questions stand in the training set, nearly or wholly", CONTAMINATION)
    c.add_argument("sets", nargs="+", metavar="TRAIN TEST …", help="files of questions, the training set first; or one CONFIG.yaml")
    c.add_argument("--eval", type=Path, metavar="EVAL", help="a folder that `medrlvr eval` wrote: accuracies with and without them")
    c.add_argument("--out", type=Path, metavar="OUT.json", help="every question that is found, and the training question it is like")
    c = command("difficulty", "count how many of k samples are right, for each training question", DIFFICULTY)
    c.add_argument("source", metavar="RUN|CONFIG.yaml", help="a run's folder, or a config: then its model.path is asked")
    settings(c)
    at_step(c)
    c.add_argument("--samples", type=int, default=16, metavar="K", help="answers to each question; default 16")
    c.add_argument("--history", action="store_true", help="variance and impact (1-shot RLVR, LIMR) from the run's own log")
    c.add_argument("--out", type=Path, metavar="OUT.jsonl", help="default RUN/difficulty-<step>.jsonl, RUN/history.jsonl")
    distributed(c)
    c = command("export", "write a run's policy as a Hugging Face directory")
    c.add_argument("run", type=Path, metavar="RUN")
    c.add_argument("out", type=Path, metavar="OUT_DIR")
    at_step(c)
    c.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights written; the run's own unless given")
    c.add_argument("--adapter", action="store_true", help="of a run with model.lora: the adapters alone, as PEFT reads them")
    distributed(c)
    c = command("replay", "draw a completion of a run again, exactly, and compare it with the log", REPLAY)
    c.add_argument("run", type=Path, metavar="RUN")
    settings(c)
    c.add_argument("--step", type=int, required=True, metavar="S", help="the step, as in samples.jsonl: 1, 2, …")
    c.add_argument("--row", type=int, required=True, metavar="I", help="the row, as in samples.jsonl; those not logged can be drawn too")
    c = command("score", "dry-run of the reward on text", 'Lines {"completion", "answer": "C", "options": [...]} in, verdicts out.')
    c.add_argument("file", type=Path, metavar="IN.jsonl")
    c.add_argument("--mode", choices=("paper", "strict", "direct"), default="strict", help="the rule; default strict; direct: no thought")
    c.add_argument("--prefill", default="", metavar="TEXT", help="what the prompts gave of each completion, such as '<think>'")
    c.add_argument("--leak-penalty", type=weight, default=0.0, metavar="X", help="taken off where the thought states the answer; usual 0.5")
    c.add_argument("--before-penalty", type=weight, default=0.0, metavar="X", help="… where over 15 words stand before <think>; usual 0.3")
    c.add_argument("--out", type=Path, required=True, metavar="OUT.jsonl")
    c = command("doctor", "versions, devices, mesh, memory, tokenizer traps")
    c.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="also check what this config needs")
    settings(c)
    c = command("plan", "would a config fit a machine, and how fast at best: compiled for it, without it", PLAN)
    c.add_argument("config", metavar="CONFIG.yaml")
    settings(c)
    shapes = "v5e:4x4, v5p:4x4x4, v6e:8x8, l4:1, h200:8, h100:2x8 (nodes x GPUs)"
    c.add_argument("--topology", required=True, metavar="CHIP:SHAPE", help=shapes)
    c.add_argument("--sweep", type=int, nargs="?", const=8, default=0, metavar="N", help="try up to N (8) meshes x micro-batches x remat")
    c.add_argument("--quick", action="store_true", help="with the compiler's least effort: minutes less, memory near, times too high")
    c.add_argument("--questions", type=int, help="in the training set, where it is not known here: for the length of the training")
    c.add_argument("--json", action="store_true", help="figures for machines")
    c = command("report", "one or several runs as a page: accuracies, stages, curves, alarms, samples, run card", REPORT)
    c.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or one that `medrlvr eval` wrote: a bar beside the runs"
    )
    c.add_argument(
        "--out", type=Path, default=Path("report.html"), metavar="OUT", help="report.html unless given; OUT.png: the curves alone"
    )
    return top


def weight(text: str) -> float:
    if not 0 <= (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be a number from 0")
    return value


def step(text: str) -> int | str:
    return text if text == "best" else int(text)


def main(argv: list[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):  # of a terminal without … or β, which then shows \\u2026: no command ends for that
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    args, rest = parser().parse_known_args(argv)
    if any(item.startswith("-") or not hasattr(args, "settings") for item in rest):
        parser().error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # argparse leaves settings that stand after an option
        args.settings += rest
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from medrlvr_jax.host.errors import ConfigError, Diverged, Unwritable
    from medrlvr_jax.rewards.user import RewardError
    from medrlvr_jax.runs.checkpoint import CheckpointError

    expected = (ConfigError, CheckpointError, Diverged, RewardError, Unwritable)
    together = nullcontext()
    if getattr(args, "distributed", False):
        from medrlvr_jax.host import processes

        together = processes.together(expected)
    try:
        with together:
            return globals()[f"run_{args.command}"](args)
    except expected as e:
        print(f"medrlvr {args.command}: {e}", file=sys.stderr)
        return 2 if isinstance(e, ConfigError) else 1


def run_train(args: argparse.Namespace) -> int:
    from medrlvr_jax.config.load import load
    from medrlvr_jax.rl.train import train

    return finish(train(load(args.config, args.settings)))


def run_sft(args: argparse.Namespace) -> int:
    from medrlvr_jax.config.load import load
    from medrlvr_jax.rl.sft import sft

    return finish(sft(load(args.config, args.settings)))


def finish(summary: dict) -> int:
    """The table of a finished run; a run that was asked to stop says so with the signal's usual status."""
    from medrlvr_jax.report.pictures import table

    if summary.get("eval"):
        print(table(summary))
    return int(summary.get("exit_status", 0))


def run_eval(args: argparse.Namespace) -> int:
    from medrlvr_jax.evaluation.evaluate import evaluate_source

    return evaluate_source(Path(args.source), args.settings, args.step, args.out)


def run_reproduce(args: argparse.Namespace) -> int:
    from medrlvr_jax.studies.reproduce import reproduce

    only = [name for name in args.only if "=" not in name]  # argparse leaves settings that stand after them among them
    return reproduce(args.config, args.settings + [item for item in args.only if "=" in item], only, args.jobs, args.dry_run)


def run_probe(args: argparse.Namespace) -> int:
    from medrlvr_jax.evaluation.probe import probe_source

    return probe_source(Path(args.source), args.settings, args.step, args.out, args.scorer)


def run_compare(args: argparse.Namespace) -> int:
    from medrlvr_jax.evaluation.compare import compare, evaluation, show

    a, b = evaluation(args.a), evaluation(args.b)
    found = compare(a, b, args.anyway)
    print(json.dumps(found) if args.json else f"A: {a}\nB: {b}\n{show(found)}")
    return 0


def run_contamination(args: argparse.Namespace) -> int:
    from medrlvr_jax.evaluation.contamination import contamination, show
    from medrlvr_jax.host.files import write_json

    found = contamination(args.sets, args.eval)
    print(show(found))
    if args.out:
        write_json(args.out, found)
        print(f"questions: {args.out}")
    return 0


def run_difficulty(args: argparse.Namespace) -> int:
    from medrlvr_jax.evaluation.difficulty import difficulty_source, from_history

    if args.history:
        return from_history(Path(args.source), args.out)
    return difficulty_source(Path(args.source), args.settings, args.step, args.samples, args.out)


def run_export(args: argparse.Namespace) -> int:
    from medrlvr_jax.tools.export import export

    export(args.run, args.out, args.step, args.dtype, args.adapter)
    return 0


def run_replay(args: argparse.Namespace) -> int:
    from medrlvr_jax.tools.replay import replay, show

    found = replay(args.run, args.step, args.row, args.settings)
    print(show(found))
    return 1 if found["differ"] else 0


def run_score(args: argparse.Namespace) -> int:
    from medrlvr_jax.config.schema import RewardConfig
    from medrlvr_jax.host import tables
    from medrlvr_jax.rewards.rule import judged_beginning
    from medrlvr_jax.tools.score_file import score_file

    rule = RewardConfig(mode=args.mode, leak_penalty=args.leak_penalty, before_penalty=args.before_penalty)
    reasons = score_file(args.file, args.out, rule, prefill=judged_beginning(args.prefill, args.mode))
    rows = [(reason, f"{n:,}", f"{100 * n / reasons.total():.1f} %") for reason, n in reasons.most_common()]
    print(tables.plain(("reason", "completions", "share"), rows))
    print(f"{reasons.total():,} completions scored by the rule {args.mode}: {args.out}")
    return 0


def run_doctor(args: argparse.Namespace) -> int:
    from medrlvr_jax.config.load import load
    from medrlvr_jax.tools.doctor import report

    lines, ok = report(load(args.config, args.settings) if args.config else None)
    print("\n".join(lines))
    return 0 if ok else 1


def run_plan(args: argparse.Namespace) -> int:
    from medrlvr_jax.config.load import load
    from medrlvr_jax.plan.plan import run

    return run(load(args.config, args.settings), args.topology, args.sweep, args.json, args.questions, args.quick)


def run_report(args: argparse.Namespace) -> int:
    from medrlvr_jax.host.errors import ConfigError

    if args.out.suffix not in (".html", ".png"):
        raise ConfigError(f"--out: {args.out} must end in .html, a page with all, or in .png, the curves alone")
    if not args.out.resolve().parent.is_dir():
        raise ConfigError(f"--out: the folder of {args.out} does not exist; make it first")
    if args.out.suffix == ".png":
        from medrlvr_jax.report.pictures import curves as write
    else:
        from medrlvr_jax.report.page import write_page as write
    write(args.runs, args.out)
    print(args.out)
    return 0
