"""The joint benchmark against the numbers of the published code (gstoica27/KnOTS, `evaluate_cliphead_joint`).

One head of twelve classes, four of which are the scored task's; features are normalised, rows have norm 100. The other
eight are given to two more tasks here, so that there is a head for each of the ensemble's three models.
"""

import numpy as np
import pytest
import torch
from cases import described, tensors
from torch import nn

from merganser.evaluate.ensemble import ensembles
from merganser.evaluate.joint import FORMS, Union, hits
from merganser.evaluate.run import Labelled
from merganser.models.heads import Head


def union(inputs: dict[str, torch.Tensor]) -> Union:
    """Return the union in which the task's classes are the rows of ``local2joint``."""
    own, rows = inputs["local2joint"].tolist(), inputs["joint_head"]
    rest = [k for k in range(len(rows)) if k not in own]
    parts = {"t0": own, "t1": rest[:3], "t2": rest[3:]}
    heads = {name: Head(rows[torch.tensor(part)], normalize=True) for name, part in parts.items()}
    return Union(heads, {name: [f"class {k}" for k in part] for name, part in parts.items()})


def check(case: str, ranks: dict[str, np.ndarray]) -> None:
    told = hits(ranks)
    for k, value in described("knots")[case]["params"]["hits"].items():
        assert told[k]["micro"] == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_hits_of_one_model(form: str) -> None:
    inputs, outputs = tensors("knots", "knots/joint_eval")
    joint = union(inputs)
    assert joint.size(form) == len(outputs["confusion"])
    labels = inputs["local_labels"].numpy()
    check("knots/joint_eval", {"t0": joint.ranks(inputs["features"], "t0", labels, form)})


def test_hits_of_an_ensemble_under_all_heads() -> None:
    inputs, _ = tensors("knots", "knots/joint_eval_ensemble")
    experts = {f"t{k}": {"weight": inputs[f"w{k}"].T.contiguous()} for k in range(3)}
    width = inputs["features"].shape[1]
    tasks = {"t0": Labelled(inputs["features"], inputs["local_labels"].numpy())}
    found = ensembles(nn.Linear(width, width, bias=False), experts, tasks, union(inputs), kind="fp32")["all"]
    for form in FORMS:
        assert found.hits(form) is not None
    check("knots/joint_eval_ensemble", {"t0": found["t0"].published})
    check("knots/joint_eval_ensemble", {"t0": found["t0"].ranks})
