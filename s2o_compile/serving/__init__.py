"""S2O in servers: shared by the plugins of vLLM, vllm-omni and SGLang. Nothing here imports a server by itself."""
