"""``python -m s2o_compile.cli``."""

from s2o_compile.cli.main import main

main()
