"""`python -m medrlvr_jax.world`: the embedded world read, and its tokenizer made anew; world.py says how."""

import sys

from medrlvr_jax.data.question import LETTERS
from medrlvr_jax.world import corpus, radiograph, words, world


def main(arguments: list[str]) -> None:
    """`show [split] [n]`, `films FILE`, or `tokenizer`."""
    if arguments[:1] == ["tokenizer"]:
        for folder in words.MODELS:
            words.write(folder, folder)
    elif arguments[:1] == ["films"]:
        radiograph.show(arguments[1])
    elif arguments[:1] == ["show"]:
        name, n = (*arguments[1:], *("train", "8")[len(arguments) - 1 :])
        if name == "corpus":
            for e in corpus.corpus(int(n)):
                print(f"{e.prompt}→ {e.response}\n")
        else:
            for q in world.questions(name)[: int(n)]:
                text = "\n".join([q.question, *q.lettered_options])
                print(f"[{q.id} {q.subject}] {text}\n→ {q.rationale} ({LETTERS[q.answer]})\n")
    else:
        raise SystemExit(world.__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
