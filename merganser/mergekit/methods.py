"""mergekit's methods: what each takes, and the sentence of ours that gives its numbers.

mergekit works tensor by tensor: a density is the share kept of each tensor, exactly that many entries, and where the
papers count signs, weights vote. Our own steps are named after the papers and have the papers' defaults.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .settings import Parameter

Values = Mapping[str, Any]
Words = Callable[[Values, Sequence[str]], str]
LEAST = 1e-8  # a sum of weights nearer to zero than this does not divide


@dataclass(frozen=True)
class Method:
    """A method: its parameters, its sentence, whether it has a base, and how many other models it takes.

    ``words``    makes the sentence of parameters and the names of the experts; parameters of models are by name, and
                 ``numel`` is the tensor's number of entries. The number of words is the same for all values
    ``base``     "required"; "optional": without one deltas are the weights themselves; "none": a base is an input
    ``least``, ``most``   how many models beside the base (with base "none": how many in all)
    ``differs``  how its numbers differ from the paper's, in one line
    """

    name: str
    words: Words
    parameters: Mapping[str, Parameter]
    base: str = "required"
    least: int = 0
    most: float = math.inf
    differs: str = ""
    one: bool = False  # one model alone is the result


def _call(word: str, **knobs: Any) -> str:
    return f"{word}({', '.join(f'{k}={v!r}' for k, v in knobs.items())})"


def _each(values: Values, experts: Sequence[str]) -> Any:
    """Return a model's parameter as a knob: one number where all are alike, else by the experts' names."""
    told = [values[name] for name in experts]
    return told[0] if len(set(told)) == 1 else dict(zip(experts, told, strict=True))


def _over(v: Values, experts: Sequence[str], edit: str = "", density: str = "density", **more: Any) -> str:
    """Return edits and weights of the methods that sum deltas, sum signs or not, and divide by weights or not.

    A model of density 0 gives nothing: it has weight 0 here, and counts in the divisor only where signs do not vote.
    So does one of which breadcrumbs keep less than one entry of a tensor; a trim keeps at least one.
    """
    least = 1 / v["numel"] if edit == "breadcrumbs" else 0.0
    gives = {n: v["density"][n] > 0 and v["density"][n] >= least for n in experts}
    weights = {n: v["weight"][n] if gives[n] or not edit else 0.0 for n in experts}
    shares = {n: v["density"][n] if gives[n] else 1.0 for n in experts}
    words = [_call(edit, **{density: _each(shares, experts)}, **more)] if edit else []
    by = v["lambda"]
    if v["vote"]:
        merge = "mean" if v["normalize"] else "sum"
        words.append(_call("ties", density=1.0, weights=weights, merge=merge))
    else:
        total = sum(v["weight"][n] for n in experts)
        by = by / total if v["normalize"] and abs(total) >= LEAST else by
        words.append(_call("task_arithmetic", weights=weights))
    return " | ".join([*words, _call("scale", by=by)])


def _summed(
    vote: bool, edit: str = "", density: str = "density", knobs: Callable[[Values, Sequence[str]], dict] | None = None
) -> Words:
    def words(v: Values, experts: Sequence[str]) -> str:
        return _over({**v, "vote": vote}, experts, edit, density, **(knobs(v, experts) if knobs else {}))

    return words


def _trim(v: Values, experts: Sequence[str]) -> dict[str, Any]:
    return {"scope": "tensor", "equal": "first"} | ({"rescale": "l1"} if v["rescale"] else {})


def _dare(v: Values, experts: Sequence[str]) -> dict[str, Any]:
    return {"rescale": "l1" if v["rescale"] else False}


def _breadcrumbs(v: Values, experts: Sequence[str]) -> dict[str, Any]:
    return {"gamma": _each(v["gamma"], experts)} | ({"rescale": "l1"} if v["rescale"] else {})


def _della(v: Values, experts: Sequence[str]) -> dict[str, Any]:
    widths = {n: v["epsilon"][n] if 0 < v["density"][n] < 1 else 0.0 for n in experts}
    return {"epsilon": _each(widths, experts), "rescale": "l1" if v["rescale"] else False}


def _linear(v: Values, experts: Sequence[str]) -> str:
    return _call("average" if v["normalize"] else "task_arithmetic", weights=dict(v["weight"]))


def _nuslerp(v: Values, experts: Sequence[str]) -> str:
    weights = dict(v["weight"])
    if abs(sum(weights.values())) < 1e-6:  # then mergekit goes halfway
        weights = dict.fromkeys(experts, 1.0)
    return _call("nuslerp", weights=weights, flatten=v["nuslerp_flatten"], row_wise=v["nuslerp_row_wise"])


def _multislerp(v: Values, experts: Sequence[str]) -> str:
    return _call("multislerp", weights=dict(v["weight"]), normalize=v["normalize_weights"])


def _ramplus(v: Values, experts: Sequence[str]) -> str:
    return _call("ram", plus=True, r=v["r"], alpha=v["alpha"], epsilon=v["epsilon"])


def _passthrough(v: Values, experts: Sequence[str]) -> str:
    (scale,) = v["scale"].values()
    return f"average | {_call('scale', by=1.0 if scale is None else scale)}"


def refused(method: Method, v: Values) -> str:
    """Return why these values cannot be used together, an empty string if they can."""
    if method.name in ("della", "della_linear"):
        for name, density in v["density"].items():
            epsilon = v["epsilon"][name]
            room = min(density, 1 - density)
            if 0 < density < 1 and not epsilon < room:
                return f"density {density:g} of '{name}' needs an epsilon below {room:g}, got {epsilon:g}"
    divides = v["normalize"] if method.name == "linear" else v.get("normalize_weights", False)
    if divides and abs(sum(v["weight"].values())) < LEAST:
        return f"weights {list(v['weight'].values())} sum to zero and cannot be normalised"
    return ""


INT8 = Parameter("int8_mask", False, kind=bool, used=False)


def _table(*parameters: Parameter) -> dict[str, Parameter]:
    return {p.name: p for p in parameters}


def _deltas(normalize: bool, rescale: bool, *more: Parameter) -> dict[str, Parameter]:
    """Return the parameters that all methods which sum deltas have."""
    return _table(
        Parameter("weight", each="expert", required=True),
        Parameter("density", 1.0, "expert", low=0, high=1),
        *more,
        Parameter("normalize", normalize, kind=bool),
        Parameter("rescale", rescale, kind=bool),
        Parameter("lambda", 1.0),
        INT8,
    )


WEIGHT = Parameter("weight", each="expert", required=True)
GAMMA = Parameter("gamma", 0.01, "expert", low=0, high=1)
EPSILON = Parameter("epsilon", 0.15, "expert", low=0, high=1)
TINY = Parameter("epsilon", 1e-5, low=0)
SHARES = "density is the share of each tensor (the paper: of the model), weights vote on signs and divide the sum"
L1 = "survivors are rescaled by the l1 norm that each tensor lost (the paper: by 1/density)"

METHODS = {
    m.name: m
    for m in (
        Method(
            "linear", _linear,
            _table(Parameter("weight", each="model", required=True), Parameter("normalize", True, kind=bool)),
            base="none", least=1,
        ),
        Method("slerp", lambda v, e: _call("slerp", t=v["t"]), _table(Parameter("t", low=0, high=1, required=True)),
               least=1, most=1),
        Method(
            "nuslerp", _nuslerp,
            _table(WEIGHT, Parameter("nuslerp_flatten", True, kind=bool), Parameter("nuslerp_row_wise", False, kind=bool)),
            base="optional", least=2, most=2,
        ),
        Method(
            "multislerp", _multislerp,
            _table(WEIGHT, Parameter("normalize_weights", True, kind=bool),
                   Parameter("eps", 1e-8, low=0, beyond=True, used=False)),
            base="optional", least=1, one=True,
        ),
        Method(
            "karcher", lambda v, e: _call("karcher", steps=v["max_iter"], tol=v["tol"]),
            _table(Parameter("max_iter", 10, kind=int, low=1), Parameter("tol", 1e-5, low=0, beyond=True)),
            base="none", least=1, one=True,
        ),
        Method("task_arithmetic", _summed(False), _deltas(False, False)),
        Method("ties", _summed(True, "trim", knobs=_trim), _deltas(True, False), differs=SHARES),
        Method("dare_linear", _summed(False, "dare", "keep", _dare), _deltas(False, True), differs=L1),
        Method("dare_ties", _summed(True, "dare", "keep", _dare), _deltas(False, True),
               differs=f"{L1}; weights vote on signs"),
        Method("breadcrumbs", _summed(False, "breadcrumbs", knobs=_breadcrumbs), _deltas(False, False, GAMMA),
               differs="the density is honoured first, and gamma gives way (the paper cuts both tails)"),
        Method("breadcrumbs_ties", _summed(True, "breadcrumbs", knobs=_breadcrumbs), _deltas(False, False, GAMMA),
               differs="the density is honoured first, and gamma gives way; weights vote on signs"),
        Method("della", _summed(True, "della", knobs=_della), _deltas(True, True, EPSILON),
               differs=f"{L1}; weights vote on signs and divide the sum"),
        Method("della_linear", _summed(False, "della", knobs=_della), _deltas(False, True, EPSILON), differs=L1),
        Method("model_stock", lambda v, e: _call("model_stock", filter_wise=v["filter_wise"], floor=1e-6),
               _table(Parameter("filter_wise", False, kind=bool)), least=2,
               differs="one ratio a tensor (the paper: a layer), and deltas shorter than 1e-3 are drawn to the base"),
        Method("sce", lambda v, e: _call("sce", density=v["select_topk"], floor=1e-6),
               _table(Parameter("select_topk", 1.0, low=0, high=1, beyond=True), INT8)),
        Method("nearswap", lambda v, e: _call("nearswap", t=v["t"]), _table(Parameter("t", low=0, required=True)),
               least=1, most=1),
        Method("ram", lambda v, e: _call("ram", epsilon=v["epsilon"]), _table(TINY)),
        Method("ramplus_tl", _ramplus, _table(Parameter("r", 0.1, low=0), Parameter("alpha", 0.2, low=0), TINY)),
        Method("arcee_fusion", lambda v, e: _call("arcee_fusion"), {}, least=1, most=1),
        Method("passthrough", _passthrough, _table(Parameter("scale", each="model")), base="none", least=1, most=1),
    )
}  # fmt: skip
