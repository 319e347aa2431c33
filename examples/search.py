"""Search the text files of a directory by meaning: every passage becomes a vector, once.

    python examples/search.py [QUESTION] [DIRECTORY] [MODEL]

MODEL is an embedding model; the default is downloaded and converted on first use. Vectors of passages are kept in
DIRECTORY/.vectors.npz, so a second question only reads what has changed.
"""

import hashlib
import sys
from pathlib import Path

import numpy as np

import npqwen

QUESTION = sys.argv[1] if len(sys.argv) > 1 else "How do I make the server require a password?"
FOLDER = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parents[1] / "docs"
MODEL = sys.argv[3] if len(sys.argv) > 3 else "Qwen/Qwen3-Embedding-0.6B"
KEPT = FOLDER / ".vectors.npz"


def passages() -> list[tuple[str, str]]:
    """(place, text) of the paragraphs of all files, short ones joined."""
    found = []
    for path in sorted([*FOLDER.rglob("*.md"), *FOLDER.rglob("*.txt")]):
        text = ""
        for paragraph in path.read_text(encoding="utf-8", errors="replace").split("\n\n"):
            text += paragraph + "\n\n"
            if len(text) > 600:
                found.append((path.name, text.strip()))
                text = ""
        found += [(path.name, text.strip())] if text.strip() else []
    return found


def main() -> None:
    places = passages()
    with npqwen.load(MODEL, bits=8) as model:
        name = model.name.rpartition("/")[2]
        keys = [f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:32]}" for _, text in places]
        known = dict(np.load(KEPT)) if KEPT.exists() else {}
        new = {key: text for key, (_, text) in zip(keys, places, strict=True) if key not in known}
        print(f"{len(places)} passages, {len(new)} of them new", file=sys.stderr)
        known |= zip(new, model.embed(list(new.values())), strict=True)
        np.savez(KEPT, **{key: known[key] for key in keys})
        similarity = np.stack([known[key] for key in keys]) @ model.embed(QUESTION, instruction=True)
    for best in np.argsort(-similarity)[:3]:
        place, text = places[best]
        print(f"{similarity[best]:.3f}  {place}: {' '.join(text.split())[:300]}")


if __name__ == "__main__":
    main()
