"""What else could help under TSV-M and Iso-C: other unlabeled texts, training inside the merger itself, a guard.

    python bench/spectral.py --data TEXT_TASKS --to OUT --out docs/results/text-spectral.json --seeds 3
    python bench/spectral.py ... --ways near mixed          some ways; those measured before stay in the JSON
    python bench/spectral.py ... --ways none usual --mergers dc iso_cts esm --scales 0.5 1 1.5 2 2.5 3 3.5 4 5

Each way is `ri` and `coadapt` of 100 steps an expert on the text suite's experts; scales are chosen on 300 rows a
task for validation, scores are those of 800 for the test. What `esm` needs to know of each expert's layers is learned on 256
rows of its own task's validation split, without labels.

    usual     the suite's 12,000 sentences, evenly of all files
    near      12,000 of all 58,388: for every class of every head the sentences that the base puts nearest to it (1,000
              a task, at least 8 a class), the rest at random
    mixed     6,000 texts made of pieces of sentences and the words of a class, in any order, and 6,000 sentences
    own       1,500 texts of each task's training split, without labels: what can be had at most
    within    usual texts; task vectors held at the rank that TSV-M keeps, coadapted inside TSV-M's own merges
    aware     usual texts; coadapted inside TSV-M's own merges
    quick     usual texts; three times the learning rate
    low       usual texts; changes of rank 16
    guard     usual texts; guard=2 in both steps

``experts themselves`` is what the adapted experts score on their own tasks; the others are means over seeds, the gain over
the same merger without adapting with its 95 % interval (paired, seeds averaged first), and the share of the loss that it is.
"""

import json
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from options import options

import merganser
from merganser.adapt import adapt, slug
from merganser.evaluate.table import Row
from merganser.evaluate.unlabeled import read_unlabeled
from merganser.learn.entering import entering
from merganser.models.encoder import features
from merganser.models.inputs import Subset
from merganser.prepare import Prepared, prepare
from merganser.progress import bars
from merganser.recipe import LimitPart
from merganser.sentence import parse
from merganser.suites import text
from merganser.suites.studies import _Found
from merganser.suites.suite import recipe_for, shortened
from merganser.sweep import score_experts, score_sentence

COUNT, A_TASK = 12_000, 1000
MERGERS = ("tsv", "iso_c")
PLAIN = "ri(steps=100) | coadapt(steps=100)"
HELD = "steps=100, lr=0.0003, within='tsv'"
WAYS = {  # texts, adapt words
    "none": ("usual", ""),
    "usual": ("usual", PLAIN),
    "near": ("near", PLAIN),
    "mixed": ("mixed", PLAIN),
    "own": ("own", PLAIN),
    "within": ("usual", f"ri({HELD}) | coadapt({HELD}, merger='tsv', low=1.0, high=2.0)"),
    "aware": ("usual", "ri(steps=100) | coadapt(steps=100, merger='tsv', low=1.0, high=2.0)"),
    "quick": ("usual", "ri(steps=100, lr=0.00015) | coadapt(steps=100, lr=0.00015)"),
    "low": ("usual", "ri(steps=100, rank=16, lr=0.0005) | coadapt(steps=100, rank=16, lr=0.0005)"),
    "guard": ("usual", "ri(steps=100, guard=2.0) | coadapt(steps=100, guard=2.0)"),
}
SCALES = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5)


def near(texts: list[str], ready: Prepared) -> list[str]:
    """Return the texts nearest to the classes, and others at random."""
    x = F.normalize(features(ready.encoder, ready.base, ready.encoder.prepare(texts), kind=ready.kind).float(), dim=1)
    chosen: set[int] = set()
    for task in ready.tasks.values():
        rows = F.normalize(ready.encoder.prompts([prompts[0] for prompts in task.prompts()]).float(), dim=1)
        p = (20 * x @ rows.mT).log_softmax(dim=1)
        chosen |= set(p.topk(max(8, A_TASK // len(rows)), dim=0).indices.flatten().tolist())
    rng = random.Random(0)
    rest = [k for k in range(len(texts)) if k not in chosen]
    rng.shuffle(rest)
    return [texts[k] for k in (*sorted(chosen), *rest)][:COUNT]


def mixed(texts: list[str], ready: Prepared) -> list[str]:
    """Return texts with the words of classes in them, and plain ones, in turn."""
    rng, classes = random.Random(0), [list(task.classes) for task in ready.tasks.values()]

    def piece(most: int) -> list[str]:
        words = rng.choice(texts).split()
        k = rng.randint(2, most)
        start = rng.randrange(max(1, len(words) - k + 1))
        return words[start : start + k]

    def one() -> str:
        parts = [piece(12), rng.choice(rng.choice(classes)).split(), *([piece(8)] if rng.random() < 0.5 else [])]
        rng.shuffle(parts)
        return " ".join(word for part in parts for word in part)

    return [made for plain in rng.sample(texts, COUNT // 2) for made in (one(), plain)]


def own(_texts: list[str], ready: Prepared) -> list[str]:
    """Return texts of the tasks' training splits, 1,500 of each, in any order."""
    rng = random.Random(0)
    some = [
        text
        for task in ready.tasks.values()
        for text in rng.sample(list(task.split("train").raw), COUNT // len(ready.tasks))
    ]
    rng.shuffle(some)
    return some


def row(name: str, how: str, themselves: float, found: dict[str, _Found], top: float, seconds: float) -> list[str]:
    """Return a line: experts' own mean, and of every merger the mean, the gain, what is recovered, and the scales."""
    cells = []
    for one in found.values():
        told = one.told([top])
        gain, scales = told["gain"], ", ".join(f"{with_:g}" for _, with_ in told["scales"])
        cell = f"{100 * told['with']:.1f} (scale {scales})"
        if how:
            cell += f", {100 * gain['score']:+.1f} [{100 * gain['low']:+.1f}, {100 * gain['high']:+.1f}]"
            cell += f", {100 * told['recovered']:.0f} %"
            cell += f" ({', '.join(f'{100 * g:+.1f}' for g in told['by_seed'])})" if len(told["by_seed"]) > 1 else ""
        cells.append(cell)
    return [name, f"`{how}`" if how else "–", f"{100 * themselves:.1f}", *cells, f"{seconds:.0f}"]


def best(ready: Prepared, experts: Any, mergers: list[str], place: Path) -> dict[str, Row]:
    """Return each merger's row at its best scale; ``place``: where what they need of the experts is kept."""
    found = {}
    for m in mergers:
        known = ready
        if needed := {name for step in parse(m).steps for name in step.ingredients}:
            assert needed == {"inputs"}, f"{m} needs {needed}"
            for name, weights in experts.items():
                if not (place / name).exists():
                    few = Subset(ready.val[name].inputs, torch.arange(min(256, len(ready.val[name]))))
                    merganser.save(entering(ready.encoder, weights, few, kind=ready.kind), place / name)
            known = replace(ready, recipe=ready.recipe.model_copy(update={"ingredients": {"inputs": place}}))
        found[m] = score_sentence(known, parse(m), experts, progress=bars)[-1]
    return found


def main() -> None:
    parser = options(__doc__, seeds=1)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--mergers", nargs="+", default=list(MERGERS))
    parser.add_argument("--scales", nargs="+", type=float, default=list(SCALES))
    args = parser.parse_args()
    suite = shortened(text.SUITE, scales=tuple(args.scales), limits=LimitPart(val=300, test=800, diagnose=0))
    recipe = recipe_for(suite, args.data, ["tsv"], progress=bars)
    readies = [prepare(recipe.model_copy(update={"seed": seed})) for seed in range(args.seeds)]
    usual = readies[0]
    assert recipe.inputs is not None, "the suite has inputs"
    told: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {"rows": []}
    told |= {
        "head": ["way", "adapt words", "experts themselves", *(f"`{m}`" for m in args.mergers), "seconds an expert"]
    }
    top = score_experts(usual, usual.experts)[0].mean
    plain = best(usual, usual.experts, args.mergers, args.to / "inputs")
    for name in args.ways:
        source, how = WAYS[name]
        found, themselves, started = {m: _Found() for m in args.mergers}, [], time.monotonic()
        for seed, ready in enumerate(readies if how else readies[:1]):
            inputs, experts = ready.inputs, ready.experts
            if source != "usual":
                texts = read_unlabeled(recipe.inputs.files)
                inputs = usual.encoder.prepare({"near": near, "mixed": mixed, "own": own}[source](texts, usual))
            if how:
                place = args.to / f"seed-{seed}" / source
                experts = adapt(
                    ready.base, experts, encoder=ready.encoder, heads=ready.heads, inputs=inputs, how=how, seed=seed,
                    into=place / slug(how), kind=ready.kind, heads_key=ready.heads_key, progress=bars,
                    _place=lambda part, place=place: place / slug(part),
                )  # fmt: skip
            themselves.append(score_experts(ready, experts)[0].mean)
            held = args.to / f"seed-{seed}" / "inputs" / source / slug(how)
            for m, made in (best(ready, experts, args.mergers, held) if how else plain).items():
                found[m].pairs.append((plain[m], made))
                print(
                    name,
                    seed,
                    m,
                    made.scale,
                    f"{100 * made.val:.2f}" if made.val else "",
                    f"{100 * made.scores.mean:.2f}",
                    flush=True,
                )
        seconds = (time.monotonic() - started) / len(themselves) / len(usual.experts)
        line = row(name, how, sum(themselves) / len(themselves), found, top, seconds)
        told["rows"] = [r for r in told["rows"] if r[0] != name] + [line]
        told |= {"date": time.strftime("%Y-%m-%d"), "threads": torch.get_num_threads(), "seeds": args.seeds}
        args.out.write_text(json.dumps(told, indent=1) + "\n")
        print(line, flush=True)


if __name__ == "__main__":
    main()
