"""From a recipe to things that run: encoder, weights, heads, tasks and inputs, all checked before any long work."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .adapt import adapt_steps, check_fit, heads_digest, how_text
from .card import digest, file_digest, key_of
from .errors import DataError, HeadError, RecipeError, WeightsError, did_you_mean
from .evaluate.joint import Union
from .evaluate.pictures import Pictures
from .evaluate.run import Labelled, Model, Scores, evaluate
from .evaluate.task import Split, Task, read_task
from .evaluate.unlabeled import read_unlabeled
from .examine import asked_by, open_ingredients, try_out
from .loop import is_float
from .models.encoder import features
from .models.heads import AnyHead, Head, class_mean_head, linear_head, zero_shot_head
from .models.inputs import Subset, digest_parts, inputs_digest
from .models.open import open_encoder
from .models.split import encoder_weights, split_head
from .models.statistics import norms, reset_statistics
from .progress import Progress, Tick, silent
from .recipe import Recipe
from .sentence import Sentence, parse
from .synthetic import split_sources, token_texts
from .weights.delta import over
from .weights.match import match
from .weights.open import matches, open_weights
from .weights.renamed import Renamed
from .weights.stored import Stored
from .where import Where, for_sentence

RESET_ON = 512  # inputs that batch norms are measured on after a merge
JUDGED_ON = 1000  # and those that a scale is chosen on where no label is asked


@dataclass(frozen=True)
class Prepared:
    """Everything a recipe names, opened and checked.

    ``base`` and ``experts`` hold the encoder's tensors under the base's names; ``whole`` is the base's checkpoint as it
    lies on disk, and ``left_out`` those of its tensors that are not merged.
    """

    recipe: Recipe
    sentences: list[Sentence]
    encoder: Any
    whole: Mapping[str, Tensor]
    left_out: list[str]
    base: Mapping[str, Tensor]
    experts: dict[str, Mapping[str, Tensor]]
    tasks: dict[str, Task]
    heads: dict[str, AnyHead]
    val: dict[str, Labelled]
    test: dict[str, Labelled]
    inputs: Any
    domains: dict[str, Labelled] = field(default_factory=dict)
    parents: dict[str, str] = field(default_factory=dict)  # of a domain: the task whose head it is scored with

    @property
    def kind(self) -> str:
        return self.recipe.model.precision

    @cached_property
    def resets(self) -> bool:
        """Tell whether batch norms are measured anew after a merge."""
        told = self.recipe.model.statistics
        return told == "reset" or (told == "auto" and self.inputs is not None and bool(norms(self.encoder)))

    @cached_property
    def some_inputs(self) -> Any:
        """The unlabeled inputs that they are measured on, a random few."""
        at = torch.randperm(len(self.inputs), generator=torch.Generator().manual_seed(self.recipe.seed))
        return Subset(self.inputs, at[:RESET_ON])

    @cached_property
    def judged_on(self) -> Any:
        """Some of the unlabeled inputs, a random few."""
        at = torch.randperm(len(self.inputs), generator=torch.Generator().manual_seed(0))
        return Subset(self.inputs, at[:JUDGED_ON])

    @cached_property
    def said(self) -> dict[str, Tensor]:
        """The class that each expert says of each of them under its own head."""
        found = {n: features(self.encoder, w, self.judged_on, kind=self.kind) for n, w in self.experts.items()}
        return {n: self.heads[n](x).argmax(dim=1) for n, x in found.items()}

    def judged(self, weights: Mapping[str, Tensor]) -> float:
        """Return what scales are chosen by: the mean score on the validation splits, or the agreement with the experts.

        That is the share of some unlabeled inputs of which a model says, under a head, the class that this head's expert
        says; the mean over heads.
        """
        if self.recipe.choose == "labels":
            return evaluate(Model(self.encoder, weights, self.heads, self.kind), self.val).mean
        x = features(self.encoder, weights, self.judged_on, kind=self.kind)
        same = [(self.heads[n](x).argmax(dim=1) == mine).double().mean() for n, mine in self.said.items()]
        return float(torch.stack(same).mean())

    @cached_property
    def judged_by(self) -> list[str]:
        """What the choice of a scale depends on, beside what a score does; nothing where labels choose."""
        return [] if self.recipe.choose == "labels" else [self.recipe.choose, inputs_digest(self.judged_on)]

    @cached_property
    def union(self) -> Union | None:
        """The classes of all tasks; None where a head has other rows than its task has classes."""
        classes = {name: task.classes for name, task in self.tasks.items()}
        rows = {name: len(head.weight) for name, head in self.heads.items() if isinstance(head, Head)}
        return Union(self.heads, classes) if rows == {name: len(c) for name, c in classes.items()} else None

    def only(self, names: Sequence[str]) -> "Prepared":
        """Return the same with the experts and tasks of these names alone; nothing is opened again."""
        parents = {domain: task for domain, task in self.parents.items() if task in names}
        parts = {
            part: {n: getattr(self, part)[n] for n in names if n in getattr(self, part)}
            for part in ("experts", "tasks", "heads", "val", "test")
        }
        changed: dict[str, Any] = {**parts, "domains": {d: self.domains[d] for d in parents}, "parents": parents}
        some = replace(self, recipe=self.recipe.only(names), **changed)
        some.__dict__["digests"] = {name: self.digests[name] for name in ("base", *names)}
        return some

    def given(self, ingredients: Mapping[str, Path]) -> "Prepared":
        """Return the same with more ingredients; nothing is opened again."""
        recipe = self.recipe.model_copy(update={"ingredients": {**self.recipe.ingredients, **ingredients}})
        more = replace(self, recipe=recipe)
        opened = {name for name in vars(self) if name not in vars(more)}
        vars(more).update({name: vars(self)[name] for name in opened})  # what was worked out once
        return more

    def opened(self, path: str | Path) -> Mapping[str, Tensor]:
        """Return the tensors of a model (a merged one) that the encoder uses, under the base's names, as an expert's are.

        Raises WeightsError if it is no model of this base.
        """
        weights = _taken(f"model '{path}'", over(self.whole, open_weights(path)), self.encoder, self.recipe.own)
        match(self.base, {str(path): weights})
        return weights

    def scored(self, weights: Mapping[str, Tensor], only: str | None = None) -> tuple[Scores, Scores | None]:
        """Return the scores of weights on the test splits and in other domains; of ``only`` one task, if it is named."""
        heads = {**self.heads, **{domain: self.heads[task] for domain, task in self.parents.items()}}
        model = Model(self.encoder, weights, heads, self.kind)
        test = {n: t for n, t in self.test.items() if only in (None, n)}
        domains = {n: t for n, t in self.domains.items() if only in (None, self.parents[n])}
        return evaluate(model, test, union=self.union), evaluate(model, domains) if domains else None

    def finished(self, merged: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return merged weights as they are scored: with batch norms measured anew, where that is asked for."""
        if not self.resets:
            return merged
        return reset_statistics(self.encoder, merged, self.some_inputs, kind=self.kind)

    @cached_property
    def digests(self) -> dict[str, str]:
        """Fingerprints (`card.digest`) of base and experts."""
        return {"base": digest(self.base), **{name: digest(w) for name, w in self.experts.items()}}

    @cached_property
    def scored_on(self) -> str:
        """A key of everything but the weights that a score depends on: heads, encoder, labelled inputs, precision."""
        data = {}
        for split, tasks in (("val", self.val), ("test", self.test), ("domain", self.domains)):
            for name, task in tasks.items():
                parts = {str(k): p for k, p in enumerate(digest_parts(task.inputs))}
                data[f"{split}/{name}"] = [digest({**parts, "y": torch.from_numpy(task.labels)}), task.metric]
        model: list[Any] = [encoder_key(self.recipe.model.encoder), self.recipe.model.options, self.kind]
        if self.resets:
            parts = {str(k): part for k, part in enumerate(digest_parts(self.some_inputs))}
            model.append({"statistics": digest(parts)})
        return key_of({"heads": self.heads_key, "data": data, "model": model})

    @cached_property
    def heads_key(self) -> str:
        """A key of what the heads are made from (not of their numbers, which differ in the last bit between machines)."""
        part = self.recipe.heads
        made: dict[str, Any] = {"kind": part.kind, "scale": part.scale}
        if part.kind == "linear" and part.file is not None:
            made["file"] = file_digest(part.file)
        elif part.kind == "expert":
            made["experts"] = heads_digest(self.heads)
        else:
            made["base"] = self.digests["base"]
            made["encoder"] = [encoder_key(self.recipe.model.encoder), self.recipe.model.options]
            made["classes"] = {name: task.prompts() for name, task in self.tasks.items()}
        if part.kind == "class-mean":
            limit = self.recipe.limits.train
            made["train"] = {n: raw_digest(t.split("train").first(limit)) for n, t in self.tasks.items()}
        return key_of(made)


def prepare(recipe: Recipe, *, progress: Progress = silent) -> Prepared:
    """Open and check all that ``recipe`` names.

    Raises the error of whatever is wrong first: sentences and knobs, then paths, checkpoints, tasks, inputs, heads.
    """
    with progress("open and check", 5) as tick:
        return _prepare(recipe, tick)


def _prepare(recipe: Recipe, tick: Tick) -> Prepared:
    if recipe.model.encoder in ("causal", "seq2seq"):
        raise RecipeError("a recipe scores tasks through heads, which a language model has not: docs/ri.md says how")
    sentences = check_sentences(recipe)
    tick(1)
    whole = open_weights(recipe.model.base)
    sources = {name: over(whole, open_weights(path)) for name, path in recipe.experts.items()}
    tasks = open_tasks(recipe)
    files, tokens = split_sources(recipe.inputs.files) if recipe.inputs else ([], [])
    raw = read_unlabeled(files, recipe.inputs.limit) if recipe.inputs and files else None
    check_choice(recipe)
    splits = read_splits(recipe, tasks)
    domains = open_domains(recipe)
    tick(1)
    encoder, base, experts, heads = open_models(recipe, whole, sources)
    if tokens:
        raw = [*([] if raw is None else raw), *random_texts(encoder, tokens)]
    experts = match(base, experts).experts
    for sentence in sentences:
        patterns = for_sentence(recipe.where, sentence.merging)
        Where(patterns, base).check(sentence.merging, [name for name in base if is_float(base, name)])
    for name, weights in {"base": base, **experts}.items():
        check_finite(name, weights)
    tick(1)
    heads = heads or make_heads(recipe, encoder, base, tasks)
    tick(1)
    inputs = encoder.prepare(raw) if raw is not None else None
    ready = {
        which: {n: Labelled(encoder.prepare(s.raw), s.labels, tasks[n].metric) for n, s in rows.items()}
        for which, rows in splits.items()
    }
    check_fit(encoder, base, heads, next(iter(ready["test"].values())).inputs)
    shifted = {n: t.split("test").first(recipe.limits.test) for n, t in domains.items()}
    elsewhere = {n: Labelled(encoder.prepare(s.raw), s.labels, domains[n].metric) for n, s in shifted.items()}
    parents = {name: str(task.shift_of) for name, task in domains.items()}
    left_out = [name for name in whole if name not in base]
    return Prepared(
        recipe,
        sentences,
        encoder,
        whole,
        left_out,
        base,
        experts,
        tasks,
        heads,
        ready["val"],
        ready["test"],
        inputs,
        elsewhere,
        parents,
    )


def random_texts(encoder: Any, sources: Sequence[str]) -> list[str]:
    """Return texts of random tokens of the encoder's tokenizer. Raises RecipeError if it has none."""
    if not hasattr(encoder, "tokenizer"):
        raise RecipeError(f"[inputs] files: '{sources[0]}' needs a text encoder, whose tokenizer the tokens are of")
    return [text for source in sources for text in token_texts(source, encoder.tokenizer)]


def raw_digest(split: Split) -> str:
    """Return a digest of a split's raw rows and labels."""
    if isinstance(split.raw, np.ndarray):
        rows = split.raw
    else:
        joined = b"".join(split.raw.raw()) if isinstance(split.raw, Pictures) else "\0".join(split.raw).encode()
        rows = np.frombuffer(joined, np.uint8)
    return digest({"x": torch.from_numpy(np.ascontiguousarray(rows).copy()), "y": torch.from_numpy(split.labels)})


def encoder_key(kind: str) -> list[str]:
    """Return what tells encoders apart: the kind, or a user's file by its content, wherever it lies."""
    place, _, function = kind.rpartition(":")
    return [file_digest(Path(place)), function] if place.endswith(".py") else [kind]


def open_tasks(recipe: Recipe) -> dict[str, Task]:
    """Return the task of every expert, in the experts' order. Raises RecipeError where one has none."""
    if missing := [name for name in recipe.experts if name not in recipe.tasks]:
        raise RecipeError(
            f"expert '{missing[0]}' has no task of that name{did_you_mean(missing[0], recipe.tasks)}: "
            f"name it under [tasks]"
        )
    return {name: read_task(recipe.tasks[name]) for name in recipe.experts}


def open_domains(recipe: Recipe) -> dict[str, Task]:
    """Return the tasks of other domains. Raises RecipeError where one has another name, or is of no task of the recipe."""
    domains = {name: read_task(folder) for name, folder in recipe.domains.items()}
    for name, task in domains.items():
        if task.shift_of not in recipe.experts:
            raise RecipeError(
                f"domain '{name}' is a shift of {task.shift_of!r}, which is no task here: set shift_of in "
                f"{recipe.domains[name] / 'task.toml'} to one of {', '.join(recipe.experts)}"
            )
        if "test" not in task.splits:
            raise DataError(f"domain '{name}' has no test split; add {recipe.domains[name] / 'test'}.jsonl.gz or .npz")
        if name in recipe.experts:
            raise RecipeError(f"'{name}' is both a task and a domain; give the domain another name")
    return domains


def check_choice(recipe: Recipe) -> None:
    """Raise RecipeError where scales are to be chosen by the experts on unlabeled inputs and there are none."""
    if recipe.choose == "experts" and recipe.inputs is None:
        raise RecipeError('choose = "experts" needs unlabeled inputs: add [inputs] files = [...]')


def read_splits(recipe: Recipe, tasks: Mapping[str, Task]) -> dict[str, dict[str, Split]]:
    """Return the val and test rows of every task, cut to the recipe's limits. Raises DataError at one that is missing."""
    limits = {"val": recipe.limits.val, "test": recipe.limits.test}
    if (
        recipe.scales
        and recipe.choose == "labels"
        and (lacking := [name for name, task in tasks.items() if "val" not in task.splits])
    ):
        raise DataError(
            f"task '{lacking[0]}' has no val split to choose a scale on: add one, set choose = \"experts\" (which needs no "
            f"label), or scales = [] to take every sentence as it is written"
        )
    return {
        which: {n: t.split(which).first(limit) for n, t in tasks.items() if which == "test" or which in t.splits}
        for which, limit in limits.items()
    }


def open_models(
    recipe: Recipe, whole: Mapping[str, Tensor], sources: Mapping[str, Mapping[str, Tensor]]
) -> tuple[Any, Mapping[str, Tensor], dict[str, Mapping[str, Tensor]], dict[str, AnyHead]]:
    """Return the encoder, the base's and the experts' tensors that it uses, and heads where experts bring their own."""
    options = dict(recipe.model.options)
    heads: dict[str, AnyHead] = {}
    if recipe.heads.kind == "expert":
        split = {name: split_head(path, base=recipe.model.base) for name, path in recipe.experts.items()}
        sources, heads = {n: s.weights for n, s in split.items()}, {n: s.head for n, s in split.items()}
        options.setdefault("pooling", next(iter(split.values())).pooling)
    encoder = open_encoder(recipe.model.encoder, recipe.model.base, **options)
    if not hasattr(encoder, "prepare"):
        raise RecipeError(
            f"encoder '{recipe.model.encoder}' needs a method prepare(raw) that turns a task's rows into inputs"
        )
    taken = {n: _taken(f"expert '{n}'", w, encoder, recipe.own) for n, w in sources.items()}
    return encoder, _taken("the base", whole, encoder, recipe.own), taken, heads


def _taken(who: str, weights: Mapping[str, Tensor], encoder: Any, own: Sequence[str]) -> Mapping[str, Tensor]:
    """Return what an encoder uses of a model, under its own names; without ``own`` where it does not tell its names."""
    if hasattr(encoder, "roots"):
        try:
            return encoder_weights(weights, encoder)
        except WeightsError as error:
            raise WeightsError(f"{who}: {error}") from None
    kept = [name for name in weights if not matches(name, own)]
    return weights if len(kept) == len(weights) else Renamed(weights, {n: n for n in kept})


def check_sentences(recipe: Recipe) -> list[Sentence]:
    """Return the recipe's sentences, parsed and tried out with as many experts as it has."""
    sentences = [parse(text) for text in recipe.sentences]
    check_statistics(recipe)
    for sentence in sentences:
        if sentence.adapt:
            adapt_steps(how_text(sentence.adapt))
            if recipe.inputs is None:
                raise RecipeError(f"'{sentence}' adapts on unlabeled inputs, but the recipe has no [inputs] files")
        try_out(sentence.merging, list(recipe.experts))
        check_ingredients(recipe, sentence)
    check_where(recipe, sentences)
    return sentences


def check_ingredients(recipe: Recipe, sentence: Sentence) -> None:
    """Raise SentenceError where a step lacks what the recipe does not give and a run cannot measure."""
    from .learn.supply import lacking

    given = asked_by(sentence, recipe.ingredients)
    later = lacking(sentence, given)
    open_ingredients(given, sentence.merging, list(recipe.experts), later=later)


def check_statistics(recipe: Recipe) -> None:
    """Raise RecipeError where batch norm is to be measured anew, but there is nothing to measure it on."""
    if recipe.model.statistics == "reset" and recipe.inputs is None:
        raise RecipeError(
            '[model] statistics = "reset" measures on unlabeled inputs, but the recipe has no [inputs] files'
        )


def check_where(recipe: Recipe, sentences: Sequence[Sentence]) -> None:
    """Raise RecipeError if a pattern speaks of a word that no sentence has."""
    words = {step.name for sentence in sentences for step in sentence.merging.steps}
    for pattern, steps in recipe.where.items():
        if unknown := sorted(steps.keys() - words):
            raise RecipeError(
                f"[where.\"{pattern}\"]: no sentence has a step '{unknown[0]}'{did_you_mean(unknown[0], words)}"
            )


def check_finite(name: str, weights: Mapping[str, Tensor]) -> None:
    """Raise WeightsError at the first tensor with NaN or inf."""
    for tensor in weights:
        value = weights[tensor]
        if value.is_floating_point() and not torch.isfinite(value).all():
            who = "the base" if name == "base" else f"expert '{name}'"
            raise WeightsError(f"{who} has NaN or inf in tensor '{tensor}': repair or leave out that checkpoint")


def make_heads(
    recipe: Recipe, encoder: Any, base: Mapping[str, Tensor], tasks: Mapping[str, Task]
) -> dict[str, AnyHead]:
    """Return a head for every task, of the recipe's kind. Raises HeadError where the kind cannot be had."""
    part = recipe.heads
    scale = {} if part.scale is None else {"scale": part.scale}
    if part.kind == "linear":
        return linear_heads(part.file, tasks)
    heads: dict[str, AnyHead] = {}
    for name, task in tasks.items():
        if part.kind == "class-mean":
            train = task.split("train").first(recipe.limits.train)
            x = features(encoder, base, encoder.prepare(train.raw), kind=recipe.model.precision)
            heads[name] = class_mean_head(x, torch.from_numpy(train.labels), len(task.classes), **scale)
        else:
            heads[name] = prompt_head(encoder, task, scale)
    return heads


def prompt_head(encoder: Any, task: Task, scale: Mapping[str, float]) -> AnyHead:
    """Return the zero-shot head of ``task`` from its prompts as the encoder embeds them."""
    if not hasattr(encoder, "prompts"):
        raise HeadError(f"task '{task.name}': this encoder cannot embed prompts; choose another [heads] kind")
    prompts = task.prompts()
    embedded = encoder.prompts([prompt for per_class in prompts for prompt in per_class])
    default = {"scale": encoder.logit_scale} if hasattr(encoder, "logit_scale") else {"scale": 20.0}
    return zero_shot_head(embedded.reshape(len(prompts), len(prompts[0]), -1), **{**default, **scale})


def linear_heads(file: Path | None, tasks: Mapping[str, Task]) -> dict[str, AnyHead]:
    """Return the heads stored in a safetensors ``file`` as TASK.weight and, if there is one, TASK.bias."""
    if file is None:
        raise HeadError('[heads] kind = "linear" needs file = "heads.safetensors" with TASK.weight and TASK.bias')
    stored = Stored(file)
    if missing := [name for name in tasks if f"{name}.weight" not in stored]:
        raise HeadError(f"{file}: has no '{missing[0]}.weight' for task '{missing[0]}'")
    return {name: linear_head(stored[f"{name}.weight"], stored.get(f"{name}.bias")) for name in tasks}
