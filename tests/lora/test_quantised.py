"""Adapters on a quantised base: dequantised as its own library does it, and merged into plain full weights."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from nets import by_hand, write
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import merganser
from merganser.card import read_card
from merganser.cli import app
from merganser.errors import WeightsError
from merganser.weights.header import Headers, header
from merganser.weights.packed import Blocks
from merganser.weights.quantised import Dequantised

GOLDEN = Path(__file__).parent / "golden"
HASHES = json.loads((GOLDEN / "dequantised.json").read_text())
NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
LLAMAS = ["nf4", "fp4", "int8"]
MODULES = {"model.layers.0.self_attn.q_proj": (64, 64), "model.layers.0.self_attn.v_proj": (16, 64)}


def hashed(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def adapters(folder: Path, modules: dict[str, tuple[int, int]] = MODULES) -> list[Path]:
    return [by_hand(folder / f"a{k}", modules, rank=2, seed=k) for k in range(2)]


def in_full(base: Path, folder: Path, dtype: str | None = None) -> Path:
    """Write the base dequantised, as a plain model."""
    merganser.save(Dequantised(merganser.open_weights(base), dtype), folder)
    return folder


def copied(kind: str, folder: Path, change: dict[str, Tensor | None] | None = None) -> Path:
    """Copy a checkpoint, some tensors changed or (None) left out."""
    shutil.copytree(GOLDEN / kind, folder)
    tensors = {**load_file(folder / "model.safetensors"), **(change or {})}
    save_file({n: t for n, t in tensors.items() if t is not None}, folder / "model.safetensors")
    return folder


# what stands for what


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("kind", HASHES)
def test_bit_for_bit_what_bitsandbytes_makes(kind: str, dtype: str) -> None:
    weights = Dequantised(merganser.open_weights(GOLDEN / kind), NAMES[dtype])
    assert set(weights.packed) == set(HASHES[kind])
    for name, told in HASHES[kind].items():
        tensor = weights[name]
        assert hashed(tensor) == told[dtype], name
        assert weights.header(name) == (NAMES[dtype], tuple(tensor.shape))
        for step in (1, 97, tensor.numel()):
            assert torch.equal(torch.cat(list(weights.pieces(name, step))), tensor.reshape(-1))


@pytest.mark.parametrize("kind", HASHES)
def test_bitsandbytes_itself(kind: str) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is the oracle here")
    from golden.quantise import dequantised

    weights = load_file(GOLDEN / kind / "model.safetensors")
    ours = Dequantised(weights, "F32")
    for name in ours.packed:
        assert torch.equal(ours[name], dequantised(weights, name, torch.float32))


def stream(values: np.ndarray, bits: int) -> np.ndarray:
    """Return rows of integers as 32-bit words along the first axis, the first value in the lowest bits."""
    each, (rows, columns) = 32 // bits, values.shape
    words = np.zeros((rows // each, columns), dtype=np.uint32)
    for row in range(rows):
        for column in range(columns):
            words[row // each, column] |= np.uint32(int(values[row, column]) << (bits * (row % each)))
    return words


def gptq(bits: int, *, add: int = 1, shuffled: bool = True) -> tuple[dict[str, Tensor], Tensor]:
    """Return a layer as GPTQ stores it, and its weight [out, in]: s (q - z), worked out number by number."""
    rng = np.random.default_rng(bits)
    inputs, out, groups = 64, 32, 4
    q = rng.integers(0, 2**bits, (inputs, out))
    z = rng.integers(1, 2**bits, (groups, out))
    s = rng.uniform(0.01, 0.1, (groups, out)).astype(np.float16)
    g = np.arange(inputs) // (inputs // groups)
    g = rng.permutation(g) if shuffled else g
    weight = np.zeros((out, inputs), dtype=np.float32)
    for o in range(out):
        for i in range(inputs):
            weight[o, i] = np.float32(s[g[i], o]) * np.float32(int(q[i, o]) - int(z[g[i], o]))
    tensors = {
        "qweight": torch.from_numpy(stream(q, bits).view(np.int32)),
        "qzeros": torch.from_numpy(np.ascontiguousarray(stream((z - add).T, bits).T).view(np.int32)),
        "scales": torch.from_numpy(s),
        "g_idx": torch.from_numpy(g.astype(np.int32)),
    }
    return tensors, torch.from_numpy(weight)


def awq() -> tuple[dict[str, Tensor], Tensor]:
    """Return a layer as AWQ's gemm order stores it: of eight values the even ones lie first in a word, then the odd."""
    rng = np.random.default_rng(0)
    inputs, out, groups = 32, 16, 4
    q, z = rng.integers(0, 16, (inputs, out)), rng.integers(0, 16, (groups, out))
    s = rng.uniform(0.01, 0.1, (groups, out)).astype(np.float16)
    packed = []
    for values in (q, z):
        words = np.zeros((len(values), out // 8), dtype=np.uint32)
        for row in range(len(values)):
            for word in range(out // 8):
                for place, value in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                    words[row, word] |= np.uint32(int(values[row, 8 * word + value]) << (4 * place))
        packed.append(torch.from_numpy(words.view(np.int32)))
    weight = np.zeros((out, inputs), dtype=np.float32)
    for o in range(out):
        for i in range(inputs):
            weight[o, i] = np.float32(s[i // 8, o]) * np.float32(int(q[i, o]) - int(z[i // 8, o]))
    return {"qweight": packed[0], "qzeros": packed[1], "scales": torch.from_numpy(s)}, torch.from_numpy(weight)


def stored(folder: Path, tensors: dict[str, Tensor], said: dict[str, object] | None = None) -> Path:
    """Write a model of one packed layer, a norm and a config."""
    folder.mkdir(parents=True)
    named = {f"layer.q_proj.{name}": tensor for name, tensor in tensors.items()}
    save_file({**named, "norm.weight": torch.ones(3)}, folder / "model.safetensors")
    config = {"model_type": "llama", "torch_dtype": "float16", **({"quantization_config": said} if said else {})}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("add", [0, 1], ids=["second format", "first format"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq_is_what_its_numbers_say(tmp_path: Path, bits: int, add: int, shuffled: bool) -> None:
    tensors, weight = gptq(bits, add=add, shuffled=shuffled)
    said = {"quant_method": "gptq", "bits": bits, "checkpoint_format": "gptq" if add else "gptq_v2"}
    base = Dequantised(merganser.open_weights(stored(tmp_path / "base", tensors, said)), "F32")
    assert set(base) == {"layer.q_proj.weight", "norm.weight"}
    assert torch.equal(base["layer.q_proj.weight"], weight)
    assert torch.equal(torch.cat(list(base.pieces("layer.q_proj.weight", 100))), weight.reshape(-1))
    assert base.header("layer.q_proj.weight") == ("F32", (32, 64))


def test_gptq_without_a_config_is_the_first_format(tmp_path: Path) -> None:
    tensors, weight = gptq(4)
    assert torch.equal(Dequantised({f"x.{n}": t for n, t in tensors.items()}, "F32")["x.weight"], weight)


def test_awq_is_what_its_numbers_say(tmp_path: Path) -> None:
    tensors, weight = awq()
    said = {"quant_method": "awq", "bits": 4, "version": "gemm"}
    base = Dequantised(merganser.open_weights(stored(tmp_path / "base", tensors, said)), "F32")
    assert torch.equal(base["layer.q_proj.weight"], weight)
    assert torch.equal(torch.cat(list(base.pieces("layer.q_proj.weight", 100))), weight.reshape(-1))


def test_bytes_kept_in_another_dtype_are_the_same_bytes() -> None:
    weights = load_file(GOLDEN / "llama-nf4" / "model.safetensors")
    names = [n for n in weights if f"{n}.absmax" in weights]
    other = {**weights, **{n: weights[n].reshape(-1).view(torch.bfloat16)[:, None] for n in names}}
    for name in names:
        assert torch.equal(Dequantised(other)[name], Dequantised(weights)[name])


def test_a_conv1d_lies_as_the_plain_model_has_it(tmp_path: Path) -> None:
    weights = {
        n.replace("wide", "h.0.attn.c_attn"): t for n, t in load_file(GOLDEN / "tensors/model.safetensors").items()
    }
    for family, shape in (("gpt2", (256, 5)), ("gpt_bigcode", (5, 256))):
        (tmp_path / family).mkdir()
        save_file(weights, tmp_path / family / "model.safetensors")
        (tmp_path / family / "config.json").write_text(json.dumps({"model_type": family}))
        base = Dequantised(merganser.open_weights(tmp_path / family), "F16")
        assert tuple(base["h.0.attn.c_attn.weight"].shape) == base.header("h.0.attn.c_attn.weight")[1] == shape
        lies = base["h.0.attn.c_attn.weight"].reshape(shape)
        assert hashed(lies.mT if family == "gpt2" else lies) == HASHES["tensors"]["wide.weight"]["float16"]
        assert torch.equal(torch.cat(list(base.pieces("h.0.attn.c_attn.weight", 10))), lies.reshape(-1))


# merging


@pytest.mark.parametrize("how", ["average", "ties(density=0.5)", "knots | tsv", "dare | task_arithmetic"])
@pytest.mark.parametrize("kind", LLAMAS)
def test_the_merge_is_that_on_the_dequantised_base(tmp_path: Path, kind: str, how: str) -> None:
    base, experts = GOLDEN / f"llama-{kind}", adapters(tmp_path)
    plain = merganser.merge(in_full(base, tmp_path / "plain"), experts, how)
    ours = merganser.merge(base, experts, how, into=tmp_path / "out")
    assert set(ours) == set(plain)
    for name in plain:
        assert ours[name].dtype == plain[name].dtype == torch.bfloat16
        assert torch.equal(ours[name], plain[name]), name


@pytest.mark.parametrize("how", ["ties(density=0.5)", "knots | tsv"])
@pytest.mark.parametrize("kind", ["llama-nf4", "llama-int8", "gptq"])
def test_memory_stream_and_parts_agree(tmp_path: Path, kind: str, how: str) -> None:
    if kind == "gptq":
        base, modules = stored(tmp_path / "base", gptq(4)[0]), {"layer.q_proj": (32, 64)}
    else:
        base, modules = GOLDEN / kind, MODULES
    experts = adapters(tmp_path, modules)
    memory = merganser.merge(base, experts, how)
    disk = merganser.merge(base, experts, how, into=tmp_path / "disk")
    for k in (2, 1):
        merganser.merge(base, experts, how, into=tmp_path / "parts", part=(k, 2))
    parts = merganser.join(tmp_path / "parts")
    assert set(memory) == set(disk) == set(parts)
    for name in memory:
        assert torch.equal(memory[name], disk[name])
        assert torch.equal(memory[name], parts[name])
    config = [json.loads((tmp_path / place / "config.json").read_text()) for place in ("disk", "parts")]
    assert config[0] == config[1]
    cards = [read_card(tmp_path / place) for place in ("disk", "parts")]
    assert cards[0]["inputs"] == cards[1]["inputs"]
    assert cards[0]["dequantised"] == cards[1]["dequantised"]


def test_in_fp32_nothing_is_rounded_on_the_way(tmp_path: Path) -> None:
    base, experts = GOLDEN / "llama-nf4", adapters(tmp_path)
    ours = merganser.merge(base, experts, "average", into=tmp_path / "out", dtype="float32")
    plain = Dequantised(merganser.open_weights(base), "F32")
    for name in plain.packed:
        delta = sum(_delta(path, name) for path in experts) / 2
        torch.testing.assert_close(ours[name], plain[name] + delta, rtol=1e-6, atol=1e-6)
    assert all(tensor.dtype == torch.float32 for tensor in ours.values())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def _delta(path: Path, name: str) -> Tensor | float:
    held = load_file(path / "adapter_model.safetensors")
    a, b = (held.get(f"base_model.model.{name.removesuffix('.weight')}.lora_{x}.weight") for x in "AB")
    return 0.0 if a is None else 2 * b @ a


def test_transformers_loads_what_is_written(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")
    for kind in LLAMAS:
        out = tmp_path / kind
        merged = merganser.merge(GOLDEN / f"llama-{kind}", adapters(tmp_path), "ties", into=out)
        assert "quantization_config" not in json.loads((out / "config.json").read_text())
        model, told = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        held = model.state_dict()
        assert set(held) == set(merged)
        assert all(torch.equal(held[name], merged[name]) for name in merged)


def test_card_and_model_card_say_what_was_done(tmp_path: Path) -> None:
    base = copied("llama-nf4", tmp_path / "base")
    (base / "quantize_config.json").write_text("{}")
    merganser.merge(base, adapters(tmp_path), "average", into=tmp_path / "out")
    card = read_card(tmp_path / "out")
    assert card["dequantised"] == {"tensors": {"bitsandbytes nf4": 7}, "dtype": "bfloat16"}
    assert card["inputs"]["base"] == merganser.fingerprint.fingerprint(merganser.open_weights(base))
    said = "The base is quantised (7 tensors of bitsandbytes nf4), dequantised to bfloat16."
    assert said in (tmp_path / "out" / "README.md").read_text()
    assert not (tmp_path / "out" / "quantize_config.json").exists()


@pytest.mark.parametrize("kind", LLAMAS)
def test_check_says_it_and_knows_the_shapes(tmp_path: Path, kind: str) -> None:
    base, experts = GOLDEN / f"llama-{kind}", adapters(tmp_path)
    found = merganser.check(base, experts, "ties", into=tmp_path / "out")
    assert found.ok
    assert any("the base is quantised (7 tensors of bitsandbytes" in str(one) for one in found.notes)
    out = merganser.merge(base, experts, "ties", into=tmp_path / "out")
    assert found.numbers["bytes_written"] == out.nbytes
    assert found.numbers["tensors"] == len(out)
    read = merganser.open_weights(base).nbytes + sum(merganser.open_weights(e).weights.nbytes for e in experts)
    assert found.numbers["bytes_read"] == read
    words = ["merge", str(base), *map(str, experts), "--how", "ties", "--to", str(tmp_path / "other"), "--dry-run"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "dequantised to bfloat16" in " ".join(done.stdout.split())


def test_before_a_download_the_adapters_tell_the_shapes(tmp_path: Path) -> None:
    stored = merganser.open_weights(GOLDEN / "llama-nf4")
    names_alone = Headers({name: header(stored, name) for name in stored}, "org/name", GOLDEN / "llama-nf4")
    found = merganser.check(names_alone, adapters(tmp_path), "ties", into=tmp_path / "out")
    assert found.ok, found.errors
    assert found.numbers["bytes_written"] == sum(t.nbytes for t in Dequantised(stored).values())
    assert any("org/name is on the Hub" in str(one) for one in found.notes)


def test_memory_does_not_grow_with_the_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    rows = Blocks.rows
    monkeypatch.setattr(Blocks, "rows", lambda s, w, a, b: made.append((b - a) * s.width) or rows(s, w, a, b))
    monkeypatch.setattr("merganser.loop.CUT", 256)
    merganser.merge(GOLDEN / "llama-nf4", adapters(tmp_path), "ties(scope='model')")
    assert 0 < max(made) <= 256 + 2 * 64


def test_tensors_in_full_and_dora_take_the_base_into_an_adapter(tmp_path: Path) -> None:
    base, experts = GOLDEN / "llama-nf4", adapters(tmp_path)
    told = load_file(experts[0] / "adapter_model.safetensors") | {"base_model.model.lm_head.weight": torch.ones(32, 64)}
    write(experts[0], told, json.loads((experts[0] / "adapter_config.json").read_text()))
    plain = in_full(base, tmp_path / "plain")
    ours, theirs = (merganser.merge(b, experts, "average", stored="adapter", rank="exact") for b in (base, plain))
    assert set(ours) == set(theirs)
    assert "base_model.model.lm_head.weight" in ours
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_delta_for_the_base_is_added_to_it(tmp_path: Path) -> None:
    base, experts = GOLDEN / "llama-nf4", adapters(tmp_path)
    merganser.merge(base, experts, "ties", into=tmp_path / "delta", stored="delta")
    once = merganser.merge(base, experts, "ties", dtype="float32")
    again = merganser.merge(base, [tmp_path / "delta"], "average", dtype="float32")
    for name in once:
        torch.testing.assert_close(again[name], once[name], rtol=0, atol=1e-6)


# what is wrong


Q = "model.layers.0.self_attn.q_proj"
NAN = float("nan")
WORDS = torch.zeros(64, 32, dtype=torch.int32)


@pytest.mark.parametrize(
    ("kind", "name", "value", "match"),
    [
        ("nf4", f"{Q}.weight.absmax", None, r"'{}' is missing"),
        ("nf4", f"{Q}.weight.quant_map", None, r"'{}' is missing"),
        ("nf4", f"{Q}.weight.nested_absmax", None, r"'{}' is missing"),
        ("nf4", f"{Q}.weight.nested_quant_map", None, r"'{}' is missing"),
        ("nf4", f"{Q}.weight.quant_state.bitsandbytes__nf4", None, f"'{Q}.weight' holds integers, and .* is missing"),
        ("nf4", f"{Q}.weight.quant_state.bitsandbytes__nf4", torch.zeros(9, dtype=torch.uint8), "'{}' is not what"),
        ("nf4", f"{Q}.weight.absmax", torch.zeros(63, dtype=torch.uint8), r"'{}' has 63 entries, and .* needs 64"),
        ("nf4", f"{Q}.weight", torch.zeros(100, 1, dtype=torch.uint8), r"'{}' has 100 entries, and .* needs 2048"),
        ("nf4", f"{Q}.weight.quant_map", torch.zeros(15), r"'{}' has 15 entries, and .* needs 16"),
        ("fp4", f"{Q}.weight.absmax", torch.full((64,), NAN), r"NaN or inf in tensor '{}'"),
        ("int8", f"{Q}.SCB", None, r"'{}' is missing"),
        ("int8", f"{Q}.SCB", torch.ones(63), r"'{}' is \[63\]"),
        ("int8", f"{Q}.SCB", torch.full((64,), NAN), r"NaN or inf in tensor '{}'"),
        ("int8", f"{Q}.weight_format", torch.tensor(2, dtype=torch.uint8), r"'{}': .* order of a certain GPU"),
    ],
)  # fmt: skip
def test_a_part_that_is_missing_or_damaged_is_one_clear_error(
    tmp_path: Path, kind: str, name: str, value: Tensor | None, match: str
) -> None:
    base = copied(f"llama-{kind}", tmp_path / "base", {name: value})
    said = match.replace("{}", re.escape(name))
    with pytest.raises(WeightsError, match=said) as raised:
        merganser.merge(base, adapters(tmp_path), "ties", into=tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()
    in_headers = "NaN" not in match and "GPU" not in match
    found = merganser.check(base, adapters(tmp_path), "ties", into=tmp_path / "out")
    assert len(found.errors) == in_headers


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"qzeros": None}, r"'layer.q_proj.qzeros' is missing"),
        ({"scales": None}, r"'layer.q_proj.scales' is missing"),
        ({"g_idx": None}, r"'layer.q_proj.g_idx' is missing"),
        ({"g_idx": torch.full((64,), 4, dtype=torch.int32)}, "'layer.q_proj.g_idx' names groups beyond the 4"),
        ({"qzeros": WORDS[:4, :3].clone()}, "shapes that do not belong together"),
        ({"scales": torch.full((4, 32), NAN)}, "NaN or inf in tensor 'layer.q_proj.scales'"),
        ({"qweight": WORDS[:6].clone(), "qzeros": WORDS[:4, :3].clone()}, "GPTQ with 3 bits, of which only 2, 4 and 8"),
    ],
)  # fmt: skip
def test_a_gptq_part_that_is_missing_or_damaged_is_one_clear_error(
    tmp_path: Path, change: dict[str, Tensor | None], match: str
) -> None:
    tensors = {n: t for n, t in {**gptq(4)[0], **change}.items() if t is not None}
    with pytest.raises(WeightsError, match=match):
        merganser.merge(stored(tmp_path / "base", tensors), adapters(tmp_path, {"layer.q_proj": (32, 64)}), "ties")


@pytest.mark.parametrize(
    ("said", "match"),
    [
        ({"quant_method": "hqq"}, "quantised by 'hqq', and only bitsandbytes, gptq, awq"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "GPTQ in the order 'marlin' is not read"),
    ],
)
def test_other_formats_are_refused_by_name(tmp_path: Path, said: dict[str, object], match: str) -> None:
    with pytest.raises(WeightsError, match=match):
        merganser.merge(
            stored(tmp_path / "base", gptq(4)[0], said), adapters(tmp_path, {"layer.q_proj": (32, 64)}), "ties"
        )


def test_full_models_on_a_quantised_base_are_refused(tmp_path: Path) -> None:
    base = GOLDEN / "llama-int8"
    full = in_full(base, tmp_path / "plain")
    for experts in ([full], [full, *adapters(tmp_path)]):
        with pytest.raises(WeightsError, match="quantised"):
            merganser.merge(base, experts, "average", into=tmp_path / "out")
    with pytest.raises(WeightsError, match="quantised"):
        merganser.merge(full, [base], "average", into=tmp_path / "out")


def test_an_adapter_of_another_base_is_told_by_its_shapes(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"is \[64, 64\] in the base, and its factors give \[64, 65\]"):
        merganser.merge(GOLDEN / "llama-nf4", adapters(tmp_path, {Q: (64, 65)}), "average")
