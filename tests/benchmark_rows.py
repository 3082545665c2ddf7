"""Made-up rows and records of benchmarks, for the tests of what reads them."""

from benchmarks import goals


def row(name, median, **more):
    quartiles = {"q1_ms": 0.98 * median, "q3_ms": 1.02 * median}
    first = {
        "case": goals._LOSS,
        "implementation": name,
        "operator": "upsample_cross_entropy",
        "device": "cuda",
    }
    first |= {
        "sizes": dict(zip("BChwHW", (8, 150, 32, 32, 512, 512))),
        "dtype": "bfloat16",
        "passes": "fwd+bwd",
    }
    return first | {"median_ms": median, "rounds": 9, **quartiles, **more}


def made(rows, **environment):
    where = {
        "date": "2026-01-02T03:04:05",
        "device": "X",
        "commit": "abc",
        "threads": 2,
        "versions": {"torch": "2"},
    }
    return {"schema": 1, "environment": where | environment, "operators": rows, "models": []}
