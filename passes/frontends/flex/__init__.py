"""Finds flex_attention: proven through the eager frontend, or else made sparse with its functions kept."""
