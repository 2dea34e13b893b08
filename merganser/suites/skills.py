"""Skills for small language models: short questions about strings, drawn at random, with one right answer.

    reverse: bdca = acdb        sort: bdca = abcd        next: bdca = cedb        upper: bdca = BDCA

A prompt ends with "=", the answer follows up to the end of the text. Which strings are in train, val and test is
decided by the string itself (a digest), so none is in two of them.
"""

import hashlib
from collections.abc import Callable

import numpy as np

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SHARES = {"val": (0, 10), "test": (10, 25), "train": (25, 100)}  # of 100 buckets of strings
Pairs = list[tuple[str, str]]


def _after(text: str) -> str:
    return "".join(LETTERS[(LETTERS.index(c) + 1) % 26] for c in text)


SKILLS: dict[str, Callable[[str], str]] = {
    "reverse": lambda text: text[::-1],
    "sort": lambda text: "".join(sorted(text)),
    "next": _after,
    "upper": str.upper,
}


def pairs(skill: str, split: str, n: int, seed: int = 0) -> Pairs:
    """Return ``n`` different (prompt, answer) pairs of one skill and split."""
    rng = np.random.default_rng([seed, *map(ord, f"{skill}/{split}")])
    low, high = SHARES[split]
    seen: dict[str, None] = {}
    while len(seen) < n:
        text = _word(rng)
        bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little") % 100
        if low <= bucket < high:
            seen.setdefault(text)
    return [(f"{skill}: {text} =", f" {SKILLS[skill](text)}") for text in seen]


def _word(rng: np.random.Generator) -> str:
    return "".join(LETTERS[k] for k in rng.integers(0, 26, rng.integers(3, 6)))


def _numbers(rng: np.random.Generator) -> str:
    return f"{rng.integers(0, 100)}+{rng.integers(0, 100)}"


def copies(n: int, seed: int = 0) -> list[str]:
    """Return texts that say a string twice, which no skill does: what a base learns looking back from."""
    rng = np.random.default_rng([seed, 1])
    drawn = [_word(rng) if k % 4 else _numbers(rng) for k in range(n)]
    return [f"copy: {text} = {text}" for text in drawn]


def reading(end: str, seed: int = 0) -> list[str]:
    """Return what a base is pretrained on: English, copies, and some training pairs of every skill, ended by ``end``.

    Fine-tuning then brings out what the base has met. Experts of skills that it has never seen lie too far apart: their
    merges answer nothing (under 2 % where the experts score 81).
    """
    met = [prompt + answer + end for skill in SKILLS for prompt, answer in pairs(skill, "train", 2000, seed + 5)]
    return [*passages(48)[:3000], *copies(1000, seed), *met]


def passages(length: int = 96) -> list[str]:
    """Return pieces of English text of about ``length`` characters: the help texts of the Python language."""
    from pydoc_data.topics import topics

    words = " ".join(" ".join(text.split()) for _, text in sorted(topics.items())).split(" ")
    words = [word for word in words if word.isascii()]
    found: list[str] = []
    line = ""
    for word in words:
        if len(line) + len(word) + 1 > length:
            found.append(line)
            line = ""
        line = f"{line} {word}".strip()
    return found
