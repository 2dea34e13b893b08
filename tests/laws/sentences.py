"""Sentences with every step that a merge of any model takes, and stand-ins for the ingredients that they need."""

import torch

from merganser.sentence import known_steps, parse

COMBINE, EDIT, ALIGN = ([n for n, kind in known_steps().items() if kind == k] for k in ("combine", "edit", "align"))
SENTENCES = [
    *COMBINE,
    *(f"{edit} | {combine}" for edit in EDIT for combine in ("task_arithmetic", "ties")),
    *(
        f"{align} | {combine}" for align in ALIGN if align != "permute" for combine in ("average", "ties")
    ),  # it has its own
    *(f"task_arithmetic | {edit}" for edit in EDIT if edit != "mask"),
    "dare(keep=0.5) | task_arithmetic | scale(by=0.3)",
    "dare(keep=0.1) | ties(density=0.5)",  # the dice tell that nothing is trimmed
    "dare(keep=0.7) | scale(by=2.0) | ties(density=0.5)",
    "ties(scope='tensor')",
    "trim(density=0.3) | mask | task_arithmetic",
    "knots | ties(density=0.5)",
    "ties(density=0.5) | trim(density=0.5) | scale(by=0.5)",
]


COUNT = {"slerp": 2, "nuslerp": 2, "arcee_fusion": 1, "nearswap": 1}  # the experts a step takes, where not any number


def given_to(how, base, experts):
    """Return as many of the experts as a sentence takes, and ingredients for it."""
    taken = dict(list(experts.items())[: COUNT.get(how.split("(")[0], len(experts))])
    return taken, stand_ins(how, base, taken)


def stand_ins(how, base, experts):
    """Ingredients of the right shapes, drawn at random, for the steps of a sentence."""
    rng = torch.Generator().manual_seed(5)
    made = {}
    for word in [step.ingredients for step in parse(how).steps]:
        for name in word:
            made[name] = {
                e: {n: ingredient(name, t, rng) for n, t in base.items() if t.ndim == 2 and t.is_floating_point()}
                for e in experts
            }
    return made


def ingredient(name, tensor, rng):
    if name == "mask":
        return (torch.rand(tensor.shape, generator=rng) > 0.5).float()
    if name == "coefficients":
        return torch.rand((), generator=rng)
    if name == "fisher":
        return torch.rand(tensor.shape, generator=rng)
    rows = torch.randn(32, tensor.shape[1], generator=rng)
    return rows.mT @ rows / 32 if name == "gram" else rows
