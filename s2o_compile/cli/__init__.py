"""The command line ``s2o``: one module a command."""
