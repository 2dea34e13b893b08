"""Ingredients from data: tensors that some steps need beside the weights, under the weights' names."""
