"""The benchmarks run and count correctly. Their times are not asserted."""

import json
from functools import partial

import bench_parts as bench
import bench_slab


def test_a_case_is_one_line_of_json(capsys, monkeypatch):
    # the speeds of the machine take longer to measure than the three cases
    monkeypatch.setattr(bench, "machine", partial(bench.machine, 64, "float32", 2**16))
    sizes = ["--questions", "8", "--samples", "2", "--prompt", "8", "--new", "4", "--runs", "1"]
    assert bench.main(["sample", "embedded", *sizes, "model.remat=none"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 8 * 2 * 4 and found["settings"] == ["model.remat=none"]
    assert found["tokens_per_s"] > 0 and found["matmul_gflops"] > 0
    lengths = ["--new", "100", "--lengths", "lognormal", "learn.row_sizes=[0.5]"]
    assert bench.main(["learn", "embedded", *sizes, *lengths]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["packed_tokens"], found["padded_tokens"]) == (8 * (8 + 2 * 100), 8 * 2 * (8 + 100))
    assert 8 * 2 < found["tokens"] < 8 * 2 * 100
    assert bench.main(["eval", "embedded", *sizes]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["seconds"] > 0 and len(found["generate_s"]) == 1


def test_logit_slabs_change_only_rounding(capsys):
    lines = bench_slab.main(vocab=50, width=8, tokens=40, runs=1)
    assert [line["slab"] for line in lines] == ["dense", "40", "20", "10", "5", "2", "1"]
    assert (
        max(line["difference"] for line in lines) < 1e-5
        and lines[-1]["temporaries_mib"] <= lines[0]["temporaries_mib"]
    )
