"""The benchmarks run and count what they say; their figures are nobody's to assert."""

import json

from medrlvr_jax import bench


def test_a_case_is_one_line_of_json(capsys):
    sizes = ["--questions", "8", "--samples", "2", "--prompt", "8", "--new", "4", "--runs", "1"]
    assert bench.main(["sample", "embedded", *sizes, "model.remat=none"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 8 * 2 * 4 and found["settings"] == ["model.remat=none"]
    assert found["tokens_per_s"] > 0 and found["matmul_gflops"] > 0
    assert bench.main(["learn", "embedded", *sizes]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["packed_tokens"], found["padded_tokens"]) == (8 * (8 + 2 * 4), 8 * 2 * (8 + 4))
    assert bench.main(["eval", "embedded", *sizes]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["seconds"] > 0 and len(found["generate_s"]) == 1
