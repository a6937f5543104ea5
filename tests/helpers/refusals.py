"""What the command line prints where it refuses something."""


def complaint(result):
    """The one line of a refusal."""
    status, printed, _ = result
    assert status == 2, printed
    (line,) = [line for line in printed.splitlines() if line.startswith("s2o: ")]
    assert printed.rstrip().endswith(line)
    assert "Traceback" not in printed
    assert len(line) < 1000
    return line
