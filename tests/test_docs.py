"""README and pages are short, their links and commands work, and the reference is complete."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pydantic
import pytest

import medrlvr_jax
from medrlvr_jax.cli import app, main
from medrlvr_jax.cli.app import split_settings
from medrlvr_jax.config import check
from medrlvr_jax.config.schema import Config

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "pages"
LINK = re.compile(r"\]\(([^)\s]+)\)")
SHELL = re.compile(r"^```bash\n(.*?)^```$", re.M | re.S)
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.M | re.S)


def load_reference():
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = load_reference()
NAMES = ("settings", "commands", "metrics", "api", "modules")
GENERATED = {(PAGES / "reference" / f"{name}.md").resolve() for name in NAMES}


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(PAGES.rglob("*.md"))], ids=lambda p: p.name)
def test_relative_links_lead_somewhere(page):
    links = LINK.findall(CODE.sub("", page.read_text(encoding="utf-8")))
    relative = [link.partition("#")[0] for link in links if not link.startswith(("https://", "#"))]
    targets = [(page.parent / link).resolve() for link in relative]
    assert [str(t) for t in targets if not t.exists() and t not in GENERATED] == []


def test_the_reference_explains_every_setting():
    rows = [line.split(" | ") for line in reference.settings().splitlines() if line.startswith("| `")]
    explained = {row[0].strip("|` "): row[-1].rstrip("| ") for row in rows}
    schema = pydantic.TypeAdapter(Config).json_schema()
    sections = (schema, *schema["$defs"].values())  # the kind of a section is in its name
    names = [{k for k, v in s["properties"].items() if (k, "const" in v) != ("kind", True)} for s in sections]
    listed: dict[str, set[str]] = {}
    for path in explained:
        section, _, name = path.rpartition(".")
        listed.setdefault(section, set()).add(name)
    assert sorted(map(sorted, names)) == sorted(map(sorted, listed.values()))
    assert [name for name, text in explained.items() if not text] == []


def test_commands_and_settings_in_the_pages_exist():
    settings = set(re.findall(r"^\| `([\w.]+)`", reference.settings(), re.M))
    pages = [ROOT / "README.md", *PAGES.rglob("*.md")]
    blocks = [block for page in pages for block in SHELL.findall(page.read_text(encoding="utf-8"))]
    lines = "\n".join(blocks).splitlines()
    lines = [line.partition(" #")[0] for line in lines if line.startswith("medrlvr ")]
    assert len(lines) > 30
    for line in lines:
        words = shlex.split(re.sub(r"\[.*\]|…", "", line).replace("--step S --row I", "--step 1 --row 0"))[1:]
        _, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
        for item in bound.arguments.get("settings", ()):
            name = re.sub(r"^eval\.sets\.\w+", "data", item.partition("=")[0])
            assert name in settings, f"{line}: {name}"


def test_a_setting_is_shown_with_type_default_and_comment():
    page = reference.settings()
    assert "| `kl.coef` | number ≥ 0 | `0.01` | Coefficient β. 0: no reference model is loaded. |" in page
    note = "Maximum tokens of an answer. null: sample.max_new_tokens."
    assert f"| `eval.max_new_tokens` | integer > 0 \\| `null` | `null` | {note} |" in page
    note = "clip: PPO's clipped surrogate; cispo: clipped importance weights (arXiv 2506.13585)."
    assert rf"| `loss.surrogate` | `clip` \| `cispo` | `clip` | {note} |" in page
    assert "before &lt;think>" in page  # a tag in a comment is text


def options(command: str) -> list[str]:
    arguments = app[command].assemble_argument_collection()
    return [name for argument in arguments for name in argument.names if name.startswith("--")]


def test_the_reference_has_every_command_and_option():
    page = reference.commands()
    commands = [name for name in app if not name.startswith("-")]
    assert commands
    for name in commands:
        section = page.partition(f"## medrlvr {name}\n")[2].partition("\n## ")[0]
        missing = [option for option in options(name) if option not in section]
        assert section and not missing, (name, missing)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| `medrlvr (\w+)", readme, re.M)) == sorted(commands)


def test_the_reference_has_every_name_of_the_api():
    page = reference.api()
    assert "train" in medrlvr_jax.__all__
    for name in medrlvr_jax.__all__:
        section = page.partition(f"\n## {name}\n\n")[2].partition("\n## ")[0]
        assert section.strip(), name
    assert "```python\ntrain(\n    config: Config,\n    rewards: " in page


def test_the_reference_has_every_module():
    page = reference.modules()
    files = [p.relative_to(ROOT) for p in (ROOT / "medrlvr_jax").rglob("*.py")]
    titles = {f"## {f.parent}\n" for f in files if f.name == "__init__.py"}
    titles |= {f"### {f.relative_to('medrlvr_jax')}\n" for f in files if f.name != "__init__.py"}
    assert len(titles) > 50 and [title for title in titles if title not in page] == []
    assert page.count("```text\n\n```") == 0  # each says what it holds


def test_equations_become_mathml():
    pytest.importorskip("latex2mathml")
    page = reference.on_page_markdown("before\n\n```math\n\\frac{x_t}{2}\n```\n\nafter")
    assert "<mfrac><mrow><msub><mi>x</mi><mi>t</mi></msub></mrow><mrow><mn>2</mn></mrow></mfrac>" in page
    assert "```" not in page
    assert page.startswith("before\n\n<div") and page.endswith("</div>\n\nafter")


def run(*args: str, columns: int = 80) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"COLUMNS": str(columns)}
    command = [sys.executable, "-m", "medrlvr_jax", *args]
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("command", "sections"),
    [("train", "kl loss learn.policy"), ("sft", "sft learn.policy"), ("eval", "eval"), ("doctor", "sft")],
)
def test_help_lists_every_setting_that_a_command_reads_in_80_columns(command, sections):
    done = run(command, "--help")
    assert done.returncode == 0 and max(map(len, done.stdout.splitlines())) == 80
    names = re.findall(r"^\| `([\w.]+)` \| (?!section \|)", reference.settings(), re.M)
    assert len(names) > 100
    listed = [name for name in names if re.search(rf"^│ {re.escape(name)} ", done.stdout, re.M)]
    assert listed == [name for name in names if check.reads(command, name)]
    assert all(f"─ {section} " in done.stdout for section in sections.split())


def test_help_needs_no_jax():
    code = "import sys; from medrlvr_jax.cli import main; main(['train', '--help'])"
    code += "; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["trian", "c.yaml"], 'Did you mean "train"?'),
        (["train", "c.yaml", "--distribute"], "Did you mean --distributed?"),
        (["train"], "requires an argument"),
        (["plan", "c.yaml"], "--topology requires"),
        (["score", "a.jsonl", "--out", "b.jsonl", "--leak-penalty", "-1"], "Must be >= 0"),
        (["plan", "quickstart", "--topology", "v5e:1x1", "--sweep", "x"], "--sweep: x must be one integer"),
        (["eval", "no.yaml", "--step", "bst"], "--step"),
        (["watch", "runs/a", "--port", "65536"], "Must be <= 65535"),
        (["data", "quickstart", "--prompts", "-1"], "Must be >= 0"),
        (["difficulty", "quickstart", "--samples", "0"], "Must be >= 1"),
        (["reproduce", "reproduce_tiny", "--jobs", "0"], "Must be >= 1"),
        (["init", "nowhere/a.yaml", "--data", "a.jsonl"], "create nowhere first"),
    ],
)
def test_invalid_arguments_are_refused_with_status_2(args, message, capfd):
    try:
        status = main(args)
    except SystemExit as e:
        status = e.code
    assert status == 2 and message in " ".join(capfd.readouterr().err.replace("│", " ").split())


def test_settings_may_be_before_and_after_options():
    d = "--distributed"
    for words in (f"c.yaml a=1 {d} b=-2", f"{d} c.yaml a=1 b=-2", f"c.yaml a=1 b=-2 {d}"):
        _, bound, _ = app.parse_args(["train", *words.split()])
        assert bound.arguments == {"config": "c.yaml", "settings": ("a=1", "b=-2"), "distributed": True}
    assert split_settings(["ppo", "seeds=[0]", "grpo"], ["name=x"]) == (
        ["ppo", "grpo"],
        ["name=x", "seeds=[0]"],
    )


def test_settings_are_checked_before_jax_is_imported(tmp_path):
    code = "import sys; from medrlvr_jax.cli import main; status = main(sys.argv[1:])"
    code += "; sys.exit('jax' in sys.modules or status != 2)"
    for command in ("train", "sft", "eval", "plan"):
        topology = ["--topology", "v5e:2x4"] if command == "plan" else []
        words = [command, "quickstart", "reward.mod=strict", *topology]
        assert subprocess.run([sys.executable, "-c", code, *words], capture_output=True).returncode == 0, (
            command
        )
