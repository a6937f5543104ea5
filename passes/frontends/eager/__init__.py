"""Finds hand-written attention, anchored at its softmax: the scores before it, the probabilities and product behind."""
