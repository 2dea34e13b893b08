"""Torch's shape rules left out until asked for: our merges do not see it, and whoever asks has them."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file

from merganser import late
from merganser.sentence import known_steps

known = pytest.mark.skipif(not torch.__version__.startswith(late.KNOWN), reason="this torch is imported whole")

START = """
import sys
from merganser import late
if sys.argv[1] == "late":
    late.import_torch()
import torch
def missing():
    return type(sys.modules[late.RULES]).__name__ == "_StandIn"
"""
MERGES = """
import hashlib, json
import merganser
torch.manual_seed(3)
base = {f"layers.{k}.linear.weight": torch.randn(8, 6) for k in range(2)}
base |= {"norm.bias": torch.randn(6).bfloat16()}
def near(): return {n: (t + 0.1 * torch.randn(t.shape)).to(t.dtype) for n, t in base.items()}
experts = {name: near() for name in "abc"}
def extra(name, t):
    square = t.ndim == 2 and name == "gram"
    return torch.eye(t.shape[1]) * 0.5 if square else torch.rand(t.shape)
def result(how, wanted, count):
    some = dict(list(experts.items())[:count])
    given = {name: {e: {n: extra(name, t) for n, t in base.items()} for e in some} for name in wanted}
    merged = merganser.merge(base, some, how, ingredients=given)
    return hashlib.sha256(b"".join(t.float().numpy().tobytes() for t in merged.values())).hexdigest()
from merganser.sentence import parse
counts = {"slerp": 2, "nuslerp": 2, "arcee_fusion": 1, "nearswap": 1}
found = {}
for how in json.loads(sys.argv[2]):
    found[how] = [result(how, {n for s in parse(how).steps for n in s.ingredients}, counts.get(how, 3)), missing()]
print(json.dumps(found))
"""
STEP = """
import torch
RULES_ARE_THERE = type(__import__("sys").modules["torch._meta_registrations"]).__name__ == "module"
def halved(delta):
    assert RULES_ARE_THERE
    compiled = torch.compile(lambda x: torch.special.i0e(x) * 0 + x / 2, backend="aot_eager")
    assert torch.linalg.vector_norm(torch.ones(3, 4, device="meta"), dim=1).shape == (3,)
    assert torch.linalg.cholesky_ex(torch.ones(3, 3, device="meta")).L.shape == (3, 3)
    return torch.func.vmap(torch.func.grad(lambda x: 0.5 * x * x))(compiled(delta).reshape(-1)).reshape(delta.shape)
"""


def python(script: str, *args: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", START + textwrap.dedent(script), *args], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@known
def test_every_step_of_ours_gives_the_same_bytes():
    # scipy, which permute imports, brings the rules
    kinds = {name: kind for name, kind in known_steps().items() if kind != "adapt" and name != "permute"}
    hows = [name if kind == "combine" else f"{name} | average" for name, kind in kinds.items()]
    late_ones, plain = (json.loads(python(MERGES, how, json.dumps(hows)).splitlines()[-1]) for how in ("late", "plain"))
    assert {how: digest for how, (digest, _) in late_ones.items()} == {
        how: digest for how, (digest, _) in plain.items()
    }
    assert all(missing for _, missing in late_ones.values())
    assert not any(missing for _, missing in plain.values())


@known
@pytest.mark.parametrize(
    "ask",
    [
        "import torch._refs",
        "import torch._dynamo",
        "import pytest",
        f"getattr(sys.modules['{late.RULES}'], 'meta_bmm')",
    ],
)
def test_whoever_asks_has_the_rules(ask):
    python(f"""
    assert missing()
    {ask}
    assert not missing()
    assert sys.modules[late.RULES].meta_bmm
    assert torch.linalg.cholesky_ex(torch.ones(3, 3, device="meta")).L.shape == (3, 3)
    """, "late")  # fmt: skip


def test_a_torch_that_is_not_known_is_imported_whole():
    python("assert not missing()", "plain")
    done = subprocess.run(
        [sys.executable, "-c", START.replace("late.import_torch()", "late.KNOWN = ('0.',); late.import_torch()")
         + "assert not missing()\nassert late._hook not in sys.meta_path", "late"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_merging_with_a_step_of_your_own_that_compiles(tmp_path):
    (tmp_path / "mine.py").write_text(STEP)
    script = """
    from merganser.weights.save import save
    base = {"weight": torch.arange(12.0).reshape(3, 4)}
    save(base, sys.argv[2] + "/base"), save({"weight": base["weight"] + 2}, sys.argv[2] + "/expert")
    """
    python(script, "plain", str(tmp_path))
    how = f"{tmp_path}/mine.py:halved | average"
    where = [str(tmp_path / name) for name in ("base", "expert", "merged")]
    done = subprocess.run(
        [sys.executable, "-m", "merganser", "merge", *where[:2], "--how", how, "--to", where[2]],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    from merganser.weights.stored import Stored

    assert torch.equal(Stored(where[2])["weight"], torch.arange(12.0).reshape(3, 4) + 1)


def test_merging_adapters_into_one_without_the_rules(tmp_path):
    rng = torch.Generator().manual_seed(0)
    for name in ("a", "b"):
        tensors = {  # large enough for a Krylov space
            f"base_model.model.layer.{part}.weight": torch.randn(shape, generator=rng)
            for part, shape in (("lora_A", (4, 520)), ("lora_B", (512, 4)))
        }
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["layer"]}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
    given = ["none", str(tmp_path / "a"), str(tmp_path / "b"), "--how", "ties(scope='tensor')", "--as-adapter"]
    done = subprocess.run(
        [sys.executable, "-m", "merganser", "merge", *given, "--rank", "4", "--to", str(tmp_path / "one")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert load_file(tmp_path / "one" / "adapter_model.safetensors")
