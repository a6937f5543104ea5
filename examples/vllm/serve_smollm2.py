"""Serves SmolLM2 by vLLM, as it is and through S2O, asks both the same over HTTP, and compares the answers.

make vllm       # makes the environment, saves the model, and runs this

Three servers run one after the other: vLLM's own attention, S2O at tau 0, which is exact, and S2O by its defaults.
They get a long prompt, which is read in two chunks, the same again (the prefix cache), its beginning with another end,
and eight prompts at once. At tau 0 every answer must be equal token for token. float32 makes that a fair test: rounding
decides no token there.

`vllm serve` runs the module that is started here. The command itself does not start from the wheel for CPUs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PORT = 8017
START_SECONDS = 300
ANSWER_TOKENS = 32
SHORTEST = 2048
"""Keys from which prefills are sparse here: half of the default for a CPU, so that short prompts show it, too."""

LIMITS = ["--max-model-len", "8192", "--max-num-batched-tokens", "4096", "--enforce-eager"]
CPU = {"VLLM_CPU_KVCACHE_SPACE": "3", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
S2O = {"S2O_MIN_SEQ_LEN": str(SHORTEST)}
LONG = "a prompt of 8100 tokens"
SERVERS = {
    "stock": ([], {}),
    "S2O at tau 0": (["--attention-backend", "S2O"], {"S2O_TAU": "0", **S2O}),
    "S2O at tau 0.5": (["--attention-backend", "S2O"], S2O),
}


def post(path: str, body: dict[str, object]) -> dict:
    """The JSON answer of the server."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}/{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.load(answer)


@contextlib.contextmanager
def serving(python: str, model: str, args: list[str], environment: dict[str, str], log: Path) -> Iterator[None]:
    """A server that answers inside the block; what it says goes to a file."""
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(PORT), *args]
    with log.open("w") as out:
        environment = {**os.environ, **CPU, **environment}
        server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
        try:
            wait_for(server, log)
            yield
        finally:
            server.terminate()
            server.wait(60)


def wait_for(server: subprocess.Popen, log: Path) -> None:
    """Wait until the server answers; end with the end of its log if it does not."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and server.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5)
            return
        time.sleep(1)
    lines = "\n".join(log.read_text().splitlines()[-30:])
    sys.exit(f"{lines}\nserve_smollm2: expected a server that answers, got the log above. The whole of it: {log}")


def document() -> str:
    """Python's language reference."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def prompts(tokens: list[int]) -> dict[str, list[list[int]]]:
    """Token ids to ask for together, by what they show."""
    long = tokens[:8100]
    lengths = (2200, 90, 2500, 400, 700, 300, 2100, 30)
    return {
        LONG: [long],
        "the same again": [long],
        "its first 3000 tokens, then 1500 others": [long[:3000] + tokens[20000:21500]],
        "eight prompts at once": [tokens[at * 3000 :][:length] for at, length in enumerate(lengths)],
    }


def ask(model: str, prompt: list[int]) -> list[int]:
    """The ids of the greedy answer."""
    body = {"model": model, "prompt": prompt, "max_tokens": ANSWER_TOKENS, "temperature": 0, "return_token_ids": True}
    return post("v1/completions", body)["choices"][0]["token_ids"]


def run(args: argparse.Namespace, name: str) -> tuple[dict[str, list[list[int]]], str]:
    """The answers of one server by prompt, and its log."""
    model, dtype, (flags, environment) = args.model, args.dtype, SERVERS[name]
    log = args.logs / f"{name.replace(' ', '-')}-{dtype}.log"
    answers = {}
    flags = [*LIMITS, "--dtype", dtype, "--tensor-parallel-size", str(args.ranks), *flags]
    with serving(args.python, model, flags, environment, log):
        tokens = post("tokenize", {"model": model, "prompt": document()[:200_000]})["tokens"]
        for what, asked in prompts(tokens).items():
            if name == "S2O at tau 0.5" and what != LONG:
                continue
            start = time.perf_counter()
            with ThreadPoolExecutor(len(asked)) as pool:
                answers[what] = list(pool.map(lambda prompt: ask(model, prompt), asked))
            print(f"{name}, {dtype}: {what}: {time.perf_counter() - start:.1f} s", flush=True)
    return answers, log.read_text()


def main() -> None:
    """Run the servers, compare, and say what their logs say of S2O."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder that save_smollm2.py wrote")
    parser.add_argument("--python", default=sys.executable, help="of an environment with vLLM")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--ranks", type=int, default=1, help="processes that share the heads; SmolLM2's by 3")
    parser.add_argument("--logs", type=Path, default=Path("build/vllm-logs"))
    args = parser.parse_args()
    args.logs.mkdir(parents=True, exist_ok=True)
    found, logs = {}, {}
    for name in SERVERS:
        found[name], logs[name] = run(args, name)
        for line in logs[name].splitlines():
            if "S2O: " in line:
                print("   ", re.sub(r"^.*?(?=S2O: )", "", line))
    failed = False
    for name in ("S2O at tau 0", "S2O at tau 0.5"):
        for what, stock in found["stock"].items():
            if what not in found[name]:
                continue
            equal = sum(a == b for a, b in zip(stock, found[name][what], strict=True))
            print(f"{name}: {what}: {equal} of {len(stock)} answers equal to vLLM's, token for token")
            failed |= name == "S2O at tau 0" and equal < len(stock)
    failed |= any("sparse calls" not in logs[name] for name in SERVERS if name != "stock") or "S2O: " in logs["stock"]
    sys.exit("serve_smollm2: expected equal answers at tau 0, and sparse calls in S2O's logs alone." if failed else 0)


if __name__ == "__main__":
    main()
