"""How fast adapters are merged: whole processes side by side with PEFT, and KnOTS against a dense decomposition.

    python bench/lora_speed.py --to DATA                        every part; results in docs/results/lora_speed.json
    python bench/lora_speed.py --to DATA --parts knots big      some

small   four adapters of rank 16 on 126 modules (a Llama of 18 layers, hidden 768, mlp 2048), merged into one of rank 16:
        PEFT's `add_weighted_adapter` (svd, ties_svd, cat, linear) in its own process, and ours by the command line, in
        turn; ratios are taken round by round. The results are compared module by module.
knots   eight experts of rank 16 on 768 x 768: the published decomposition (float64, of all deltas side by side) and ours
big     eight adapters of the shape of a 7B model (32 layers, hidden 4096, keys 1024, mlp 14336), without a base; beside it
        PEFT's `add_weighted_adapter` on the same adapters: `svd`, which would take most of a day, until --limit seconds
        are over (what it has used by then is a lower bound), and `cat` to its end

Adapters are random, so unrelated: the case in which a rank loses most. One thread unless --threads says otherwise.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"layers": 18, "hidden": 768, "keys": 768, "mlp": 2048}
BIG = {"layers": 32, "hidden": 4096, "keys": 1024, "mlp": 14336}
TIES = "ties(density=0.5, weights=[0.25, 0.25, 0.25, 0.25], scope='tensor', equal='first', weights_vote=False)"
CASES = {  # PEFT's combination, our sentence, our rank
    "svd": ("average", "16"),
    "ties_svd": (TIES, "16"),
    "cat": ("average", "exact"),
    "linear": ("average", "16"),  # what is meant by it: PEFT's own is another sum, see docs/lora.md
}
PEERS = {"average": "peft svd", "average, exact": "peft cat"}  # of the 7B shapes
OURS = [sys.executable, "-m", "merganser.cli", "merge", "none"]


def modules(layers: int, hidden: int, keys: int, mlp: int) -> dict[str, tuple[int, int]]:
    """Return the shapes (out, in) of the linear modules of a Llama."""
    attention = {
        "q_proj": (hidden, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, hidden),
    }
    one = {f"self_attn.{name}": shape for name, shape in attention.items()}
    one |= {"mlp.gate_proj": (mlp, hidden), "mlp.up_proj": (mlp, hidden), "mlp.down_proj": (hidden, mlp)}
    return {f"model.layers.{k}.{name}": shape for k in range(layers) for name, shape in one.items()}


def write(folder: Path, shapes: dict[str, tuple[int, int]], seed: int, half: bool, rank: int = 16) -> Path:
    """Write a random adapter as PEFT does."""
    import torch
    from safetensors.torch import save_file

    if (folder / "adapter_config.json").is_file():
        return folder
    rng = torch.Generator().manual_seed(seed)
    kind = torch.bfloat16 if half else torch.float32
    tensors = {}
    for name, (out, inner) in shapes.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = (torch.randn(rank, inner, generator=rng) / inner**0.5).to(
            kind
        )
        tensors[f"base_model.model.{name}.lora_B.weight"] = (torch.randn(out, rank, generator=rng) * 0.01).to(kind)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({name.rpartition(".")[2] for name in shapes})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets, "task_type": None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def run(command: list[str], threads: int, limit: float | None = None) -> dict[str, float]:
    """Run a process to its end, or for ``limit`` seconds; return CPU and wall seconds, the resident peak in MiB, "ended"."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
    }
    environment["PYTHONPATH"] = str(ROOT)
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, cwd=ROOT)
    watch = threading.Timer(limit or threading.TIMEOUT_MAX, process.kill)
    watch.daemon = True
    watch.start()
    peak: list[float] = [0.0]
    threading.Thread(target=_follow, args=(process.pid, peak), daemon=True).start()
    said = process.stderr.read().decode() if process.stderr else ""
    _, status, used = os.wait4(process.pid, 0)
    watch.cancel()
    stopped = limit is not None and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    if status and not stopped:
        raise SystemExit(f"{' '.join(command[:6])} ... failed:\n{said[-2000:]}")
    found = {"cpu": used.ru_utime + used.ru_stime, "wall": time.perf_counter() - started, "peak": peak[-1]}
    return found if limit is None else {**found, "ended": not stopped}


def _follow(pid: int, peak: list[float]) -> None:
    """Keep reading a process's own peak: `wait4` tells no less than what this process itself had when it started it."""
    try:
        while True:
            told = Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")[2].split()
            peak[0] = int(told[0]) / 1024
            time.sleep(0.01)
    except (OSError, IndexError):  # it has ended
        return


def by_peft(how: str, shapes: dict[str, int], adapters: list[str], to: str) -> None:
    """Do the peer's part; called in a process of its own. The base's weights are never touched, so they take no memory."""
    import torch
    from peft import PeftModel
    from torch import nn

    class Block(nn.Module):
        pass

    net = Block()
    with torch.device("cpu"):
        for name, (out, inner) in modules(**shapes).items():
            *path, last = name.split(".")
            place: nn.Module = net
            for part in path:
                if not hasattr(place, part):
                    place.add_module(part, Block())
                place = getattr(place, part)
            place.add_module(last, nn.utils.skip_init(nn.Linear, inner, out, bias=False))
    model = PeftModel.from_pretrained(net, adapters[0], adapter_name="e0")
    for k, path in enumerate(adapters[1:], 1):
        model.load_adapter(path, adapter_name=f"e{k}")
    more: dict[str, Any] = {"svd_rank": 16} if "svd" in how else {}
    more |= {"density": 0.5} if "ties" in how else {}
    names = [f"e{k}" for k in range(len(adapters))]
    model.add_weighted_adapter(names, [1 / len(names)] * len(names), "merged", combination_type=how, **more)
    model.save_pretrained(to, selected_adapters=["merged"])


def product(adapter: dict[str, Any], name: str) -> Any:
    return adapter[name.replace("lora_A", "lora_B")].double() @ adapter[name].double()


def apart(ours: Path, theirs: Path, adapters: list[str], rank: int | None) -> dict[str, Any]:
    """Return how far the products of the modules are from each other's and, for a plain sum, from the best there is.

    Relative to the norm, median and largest. The best of a rank is worked out in float64 from the adapters.
    """
    import torch
    from safetensors.torch import load_file

    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (ours, theirs))
    given = [load_file(Path(adapter) / "adapter_model.safetensors") for adapter in adapters]
    found: dict[str, list[float]] = {"from each other": []}
    for name in (name for name in a if ".lora_A." in name):
        one, two = product(a, name), product(b, name)
        found["from each other"].append(float((one - two).norm() / two.norm()))
        if rank is not None:
            left = torch.cat([g[name.replace("lora_A", "lora_B")].double() / len(given) for g in given], dim=1)
            q, r = torch.linalg.qr(left)
            p, t = torch.linalg.qr(torch.cat([g[name].double() for g in given]).mT)
            u, s, vt = torch.linalg.svd(r @ t.mT)
            best = (q @ u[:, :rank] * s[:rank]) @ (vt[:rank] @ p.mT)
            for who, value in (("ours from the best", one), ("peft from the best", two)):
                found.setdefault(who, []).append(float((value - best).norm() / best.norm()))
    return {what: {"median": statistics.median(some), "largest": max(some)} for what, some in found.items()}


def small(data: Path, rounds: int, threads: int) -> dict[str, Any]:
    adapters = [str(write(data / f"small-{k}", modules(**SMALL), k, half=False)) for k in range(4)]
    found: dict[str, Any] = {}
    for how, (sentence, rank) in CASES.items():
        theirs, ours = data / f"peft-{how}", data / f"ours-{how}"
        commands = {
            "peft": [sys.executable, __file__, "--peft", how, "--to", str(theirs), *adapters],
            "ours": [*OURS, *adapters, "--how", sentence, "--as-adapter", "--rank", rank, "--to", str(ours)],
        }
        runs: dict[str, list[dict[str, float]]] = {"peft": [], "ours": []}
        for k in range(rounds):
            for who in ("peft", "ours") if k % 2 == 0 else ("ours", "peft"):
                runs[who].append(run(commands[who], threads))
        found[how] = {
            who: {key: round(statistics.median(one[key] for one in some), 2) for key in some[0]}
            for who, some in runs.items()
        }
        pairs = list(zip(runs["ours"], runs["peft"], strict=True))
        found[how]["ratio"] = {
            key: round(statistics.median(a[key] / b[key] for a, b in pairs), 3) for key in ("cpu", "wall", "peak")
        }
        best = {"svd": 16, "cat": 64}.get(how)
        found[how]["apart"] = apart(ours, theirs / "merged", adapters, best)
        found[how]["rounds"] = rounds
        print(how, json.dumps(found[how]), flush=True)
    return found


def knots(rounds: int, threads: int) -> dict[str, Any]:
    """Compare KnOTS from factors with the published decomposition, in this process."""
    import torch

    sys.path.insert(0, str(ROOT))
    from merganser.steps.align.knots import knots as dense
    from merganser.steps.align.knots import knots_factors

    torch.set_num_threads(threads)
    rng = torch.Generator().manual_seed(0)
    factors = [(torch.randn(768, 16, generator=rng), torch.randn(16, 768, generator=rng)) for _ in range(8)]

    def published() -> Any:
        whole = torch.cat([b @ a for b, a in factors], dim=1).double()
        u, s, vh = torch.linalg.svd(whole, full_matrices=False)
        keep = s > 1e-5
        return (s[keep, None] * vh[keep]).float(), u[:, keep].float()

    told = {"published": published, "ours, dense": lambda: dense(torch.stack([b @ a for b, a in factors]))}
    told["ours, from factors"] = lambda: knots_factors(factors, (768, 768))
    seconds: dict[str, list[float]] = {name: [] for name in told}
    for _ in range(rounds):
        for name, call in told.items():
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    theirs, ours = published()[0], told["ours, from factors"]()[0]
    # the published code keeps what rounding leaves above 1e-5 too: compared are the directions there are, but for signs
    theirs = theirs[: ours.shape[1]].reshape(-1, 8, 768).transpose(0, 1)
    medians = {name: statistics.median(some) for name, some in seconds.items()}
    pairs = zip(seconds["published"], seconds["ours, from factors"], strict=True)
    return {
        "seconds": {name: round(value, 4) for name, value in medians.items()},
        "faster": round(statistics.median(a / b for a, b in pairs), 1),
        "apart": float((ours.abs() - theirs.abs()).norm() / theirs.norm()),
        "rounds": rounds,
    }


def big(data: Path, threads: int, limit: float) -> dict[str, Any]:
    adapters = [str(write(data / f"big-{k}", modules(**BIG), k, half=True)) for k in range(8)]
    found: dict[str, Any] = {
        "bytes_of_adapters": sum((Path(a) / "adapter_model.safetensors").stat().st_size for a in adapters)
    }
    for name, rank in (("average", "16"), ("average, exact", "exact"), ("knots | ties", "16"), ("core | tsv", "16")):
        sentence = name.partition(",")[0]
        found[name] = run(
            [*OURS, *adapters, "--how", sentence, "--as-adapter", "--rank", rank, "--to", str(data / "big")], threads
        )
        print(name, json.dumps(found[name]), flush=True)
    for how in ("svd", "cat"):
        command = [
            sys.executable,
            __file__,
            "--peft",
            how,
            "--shapes",
            "big",
            "--to",
            str(data / "big-peft"),
            *adapters,
        ]
        found[f"peft {how}"] = run(command, threads, limit)
        print("peft", how, json.dumps(found[f"peft {how}"]), flush=True)
    return found


def rows_of(parts: dict[str, Any]) -> list[list[str]]:
    """Return the table of the record: CPU seconds and the peak of resident memory, of theirs and of ours."""
    lines = []
    for how, one in parts.get("small", {}).get("result", {}).items():
        theirs, ours, ratio = one["peft"], one["ours"], one["ratio"]
        sentence, rank = CASES[how]
        what = f"PEFT `{how}`, `{sentence.partition('(')[0]}` at rank {rank}"
        seconds = [f"{theirs['cpu']:.1f}", f"{ours['cpu']:.1f}", f"{ratio['cpu']:.2f}"]
        lines.append([what, *seconds, f"{theirs['peak']:.0f}", f"{ours['peak']:.0f}"])
    if knots := parts.get("knots", {}).get("result"):
        theirs, ours = knots["seconds"]["published"], knots["seconds"]["ours, from factors"]
        lines.append(
            ["KnOTS of 768 x 768, 8 experts", f"{theirs:.2f}", f"{ours:.3f}", f"{1 / knots['faster']:.4f}", "–", "–"]
        )
    big = parts.get("big", {}).get("result", {})
    for sentence in ("average", "average, exact", "core | tsv", "knots | ties"):
        if sentence in big:
            lines.append(_big_row(sentence, big[sentence], big.get(PEERS.get(sentence, ""))))
    return lines


def _big_row(sentence: str, ours: dict[str, float], theirs: dict[str, float] | None) -> list[str]:
    """Return one row of the 7B shapes; of a process that was stopped before its end all numbers are lower bounds."""
    name, own = f"7B-shaped, 8 experts, `{sentence}`", (f"{ours['cpu']:.1f}", f"{ours['peak']:.0f}")
    if theirs is None:
        return [name, "–", own[0], "–", "–", own[1]]
    over, under = ("", "") if theirs["ended"] else ("over ", "under ")
    cpu, peak = f"{over}{theirs['cpu']:.1f}", f"{over}{theirs['peak']:.0f}"
    return [name, cpu, own[0], f"{under}{ours['cpu'] / theirs['cpu']:.3f}", peak, own[1]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--peft", help=argparse.SUPPRESS)
    parser.add_argument("--shapes", default="small", help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, default=600, help="seconds until PEFT is stopped on the 7B shapes")
    parser.add_argument("--to", required=True, help="a folder for adapters and results; the 7B ones have 0.7 GB")
    parser.add_argument("--parts", nargs="+", default=["small", "knots", "big"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "lora_speed.json")
    told = parser.parse_args()
    if told.peft:
        return by_peft(told.peft, {"small": SMALL, "big": BIG}[told.shapes], told.adapters, told.to)
    data = Path(told.to).resolve()
    kept = json.loads(told.out.read_text()) if told.out.is_file() else {}
    found = kept.get("parts", {})
    for part in told.parts:
        calls = {
            "small": lambda: small(data, told.rounds, told.threads),
            "knots": lambda: knots(told.rounds, told.threads),
            "big": lambda: big(data, told.threads, told.limit),
        }
        result = calls[part]()
        found[part] = {"date": str(date.today()), "threads": told.threads, "result": result}
        found[part]["command"] = f"python bench/lora_speed.py --to DATA --parts {part} --rounds {told.rounds}"
        table = {"head": ["what", "theirs, CPU s", "ours, CPU s", "ratio", "their peak MiB", "our peak MiB"]}
        told.out.write_text(json.dumps({**table, "rows": rows_of(found), "parts": found}, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
