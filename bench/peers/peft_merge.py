"""One merge of LoRA adapters with PEFT, run by its own environment: load, add_weighted_adapter, merge_and_unload, save.

    PEERS/peft/bin/python bench/peers/peft_merge.py '{"combination_type": "cat", "weight": 0.3}' OUT BASE ADAPTER...

`weight` is every adapter's; the other knobs are add_weighted_adapter's own.
"""

import json
import sys

import torch
import transformers
from peft import PeftModel


def main(told, out, base, *adapters):
    torch.manual_seed(0)
    knobs = json.loads(told)
    weight = knobs.pop("weight")
    names = [f"e{k}" for k, _ in enumerate(adapters, 1)]
    model = transformers.BertModel.from_pretrained(base)
    model = PeftModel.from_pretrained(model, adapters[0], adapter_name=names[0])
    for name, adapter in zip(names[1:], adapters[1:], strict=True):
        model.load_adapter(adapter, adapter_name=name)
    model.base_model.add_weighted_adapter(names, [weight] * len(names), "merged", **knobs)
    model.base_model.merge_and_unload(adapter_names=["merged"]).save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
