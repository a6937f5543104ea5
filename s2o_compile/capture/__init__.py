"""Captures a model: compiled copies, masks built inside the graph, the audit of what really ran."""
