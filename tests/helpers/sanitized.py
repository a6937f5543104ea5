"""Calls whose metadata is right or wrong, at small sizes: under compute-sanitizer no kernel may touch foreign memory.

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1                      # every tensor is an allocation of its own
    python -m tests.helpers.sanitized                            # once without: compiles the kernels
    compute-sanitizer --tool memcheck --error-exitcode 9 python -m tests.helpers.sanitized
    compute-sanitizer --tool racecheck --error-exitcode 9 python -m tests.helpers.sanitized one

It runs on a GPU alone: lengths of a CPU are checked by the host.
"""

import sys
from functools import partial

import torch

import s2o_compile

DEVICE, DTYPE = "cuda", torch.bfloat16
TOKENS, PAGE_LEN, PAGES = 400, 16, 30
STARTS = {
    "right": [0, 3, 203, 203, 400],
    "unsorted": [0, 300, 100, 400, 20],
    "outside": [-(2**31), -5, 150, 401, 2**31 - 1],
    "short": [0, 0, 0, 150, 150],
    "over and over": [0, 400, 0, 400, 0],
}
"""Cumulative lengths of four sequences."""
LENGTHS = {
    "right": [40, 300, 0, 197],
    "outside": [-(2**31), -1, 2**31 - 1, 10**6],
    "the whole room": [480, 480, 480, 480],
}
"""Keys of four sequences in pages."""
TABLES = {
    "right": range(PAGES),
    "outside": [-(2**31), -1, PAGES, 2**31 - 1, *range(PAGES - 4)],
    "the last page alone": [PAGES - 1] * PAGES,
}
"""Pages of each sequence."""


def random(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator).to(DEVICE, DTYPE)


def integers(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def options(**changed: object) -> dict[str, object]:
    made = {"min_seq_len": 100, "segment_len": 128, "implementation": "triton", **changed}
    return {"return_lse": True, "config": s2o_compile.S2OConfig(**made)}


def calls():
    """Names and calls without arguments."""
    tensors = random(TOKENS, 4, 64), random(TOKENS, 2, 64), random(TOKENS, 2, 64)
    query, cache = tensors[0], random(2, PAGES, PAGE_LEN, 2, 64)
    varlen = partial(s2o_compile.attention_varlen, *tensors, **options())
    paged = partial(s2o_compile.attention_paged, query, cache, **options())
    right, table = STARTS["right"], integers([[*TABLES["right"]]] * 4)
    yield "lengths of the host", partial(varlen, right, right)
    for name, starts in STARTS.items():
        cu = integers(starts)
        yield f"{name} lengths", partial(varlen, cu, cu)
        yield f"{name} lengths, bounds", partial(varlen, cu, cu, 200, 200)
    cu, others = integers(STARTS["unsorted"]), integers(STARTS["outside"])
    yield "lengths that differ", partial(varlen, cu, others)
    yield "a budget", partial(varlen, others, cu, **options(error=0.02))
    yield "a window", partial(varlen, cu, cu, window=50)
    yield "all visible", partial(varlen, cu, cu, causal=False)
    for name, lengths in LENGTHS.items():
        yield f"{name} keys in pages", partial(paged, table, integers(right), integers(lengths))
    whole = LENGTHS["the whole room"]
    for name, pages in TABLES.items():
        some = integers([[*pages]] * 4)
        yield f"{name} pages", partial(paged, some, integers(right), integers(whole))
        yield f"{name} pages, lengths of the host", partial(paged, some, right, whole)
    chunks, wrong = s2o_compile.PrefillCache(), integers([[*TABLES["outside"]]])
    chunk = partial(s2o_compile.attention_paged, query[:200], cache, wrong, [0, 200], chunks=chunks, **options())
    for stop in (200, 400):
        yield f"a chunk up to {stop}", partial(chunk, [stop])
    none = (x[:0] for x in tensors)
    yield "no token", partial(s2o_compile.attention_varlen, *none, *[integers([0, 0])] * 2, **options())
    yield from layouts()
    yield from one_sequence()


def layouts():
    """Caches of every layout, with room for not one token more; heads of 128, scored by fewer numbers."""
    query, (key, value) = random(TOKENS, 4, 128), (random(TOKENS, 2, 128) for _ in range(2))
    outside = integers(STARTS["outside"])
    yield "heads of 128", partial(s2o_compile.attention_varlen, query, key, value, outside, outside, **options())
    caches = {
        "keys before values": (random(2, PAGES, PAGE_LEN, 2, 128), PAGES),
        "heads first": (random(PAGES, 2, PAGE_LEN, 256), PAGES),
        "a pair": ((random(PAGES, PAGE_LEN, 2, 128), random(PAGES, PAGE_LEN, 2, 128)), PAGES),
        "pages of a token": ((key[:, None], value[:, None]), TOKENS),
    }
    for name, (cache, pages) in caches.items():
        table = torch.randperm(pages, generator=torch.Generator().manual_seed(0)).int().to(DEVICE)[None]
        room = pages * (PAGE_LEN if pages == PAGES else 1)
        paged = partial(s2o_compile.attention_paged, query[:200], cache, table, **options())
        yield name, partial(paged, [0, 200], [room])
        yield f"{name}, lengths of the device", partial(paged, integers([0, 200]), integers([room]))
        chunks = s2o_compile.PrefillCache()
        for stop in (200, room - 7, room):
            yield f"{name}, a chunk up to {stop}", partial(paged, [0, 200], [stop], chunks=chunks)


def one_sequence():
    """Calls without lengths of sequences: masks and terms of every kind."""
    tensors = random(2, 4, TOKENS, 128), random(2, 2, TOKENS, 128), random(2, 2, TOKENS, 64)
    attend = partial(s2o_compile.attention, *tensors, causal=True, **options())
    padding = torch.arange(TOKENS, device=DEVICE) < integers([[TOKENS - 3], [300]])
    read = torch.ones(TOKENS, TOKENS, dtype=torch.bool, device=DEVICE).tril() & padding[:, None, None]
    yield "a sequence", attend
    yield "a sequence under a budget", partial(attend, **options(error=0.02))
    yield "a sequence under a window", partial(attend, window=50)
    yield "a sequence with softcap and sinks", partial(attend, softcap=5.0, sinks=random(4))
    yield "a sequence with padding", partial(attend, key_mask=padding)
    masked = {"attn_mask": read, "config": options()["config"]}
    yield "a sequence under a mask that is read", partial(s2o_compile.attention, *tensors, **masked)


def main() -> None:
    """Run them all, or with an argument only one; results of finite numbers are finite."""
    for name, call in calls():
        if sys.argv[1:] and name != "right lengths":
            continue
        output = call()
        output = output[0] if isinstance(output, tuple) else output
        if not output.isfinite().all():
            sys.exit(f"{name}: expected finite numbers, got {int((~output.isfinite()).sum())} others")
        print(name, flush=True)


if __name__ == "__main__":
    main()
