"""What a network is: an encoder from a batch to features, heads from features to logits, and how to call them.

inputs.py   what an encoder reads             heads.py    from features to logits
encoder.py  calling an encoder with weights   open.py     an encoder by its kind
hf.py       transformers' encoders            split.py    an expert's checkpoint into encoder and head
pixels.py   pictures into pixels              statistics.py  batch norm after a merge
device.py   where networks run
"""
