"""``bench``: a model in plain PyTorch, under torch.compile and through S2O, timed and judged."""
