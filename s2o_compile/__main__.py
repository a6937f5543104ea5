"""``python -m s2o_compile``: the command line ``s2o``."""

from s2o_compile.cli.main import main

main()
