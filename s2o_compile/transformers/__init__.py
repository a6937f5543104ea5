"""``model.set_attn_implementation("s2o")``: S2O in transformers models that are not compiled.

    import s2o_compile.transformers                                      # makes the name "s2o" known to transformers
    model.set_attn_implementation("s2o")
    s2o_compile.transformers.configure(model, S2OConfig(tau=0.25))       # if the defaults are not what you want

The masks that models ask for are described instead of made (`LazyMask`), and proven where attention is long. What is
traced (``torch.compile``, ``torch.export``) gets transformers' own masks and plain torch, which the backend ``"s2o"``
rewrites with its proofs. So do short calls, gradients, dropout and everything else that the operator does not have.
"""

from s2o_compile.transformers.interface import NAME, configure, s2o_attention_forward, s2o_mask

__all__ = ["NAME", "configure", "s2o_attention_forward", "s2o_mask"]
