"""S2O as an attention backend of vLLM: `plugin.register` is the entry point, docs/serving.md says how to use it."""
