"""Help that knows no attention: numbers and JSON from outside, errors, state of a context, private names of torch.

May import: nothing of this project.
"""
