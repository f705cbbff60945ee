"""`python -m medrlvr_jax.world`: print the embedded world, or rewrite its tokenizers. See world.py."""

import sys

from medrlvr_jax.config.sources import SOURCES
from medrlvr_jax.world import corpus, radiograph, words, world


def main(arguments: list[str]) -> None:
    match arguments:
        case ["show", *rest] if len(rest) <= 2:
            show(*rest)
        case ["films", file]:
            radiograph.draw_examples(file)
        case ["tokenizer"]:
            for folder in words.MODELS:
                words.write(folder, folder)
        case _:
            raise SystemExit(world.__doc__)


def show(name: str = "train", n: str = "8") -> None:
    """Print the first questions of a set, or examples of the corpus."""
    sets = SOURCES["embedded"].questions
    if name == "corpus":
        for e in corpus.corpus(int(n)):
            print(f"{e.prompt}→ {e.response}\n")
    elif name in sets:
        for q in sets[name]()[: int(n)]:
            text = "\n".join([q.question, *q.lettered_options])
            print(f"[{q.id} {q.subject}] {text}\n→ {q.rationale}\n")
    else:
        raise SystemExit(f"{name}: there is no such set; choose one of corpus, {', '.join(sets)}")


if __name__ == "__main__":
    main(sys.argv[1:])
