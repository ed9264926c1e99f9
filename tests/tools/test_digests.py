"""The tool that says whether two trees give the same bits: what it compares, what it draws, and that one bit more or less shows."""
import dataclasses
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from tools.digesting import hashing, tree, weights
from tools.digesting.drawn_requests import FIELDS, draw
from tools.digests import chosen_cases, main
from tpllm import CompletionOutput, RequestOutput, SamplingParams, load_model
from tpllm.engine.outputs import Logprob

OLD = {"requests/tp1/0-29/tokens": "a", "weights/llama/int8/tp=1/xla": "b"}


@pytest.mark.parametrize(("new", "parts", "code", "lines"), [
    (OLD, [], 0, ["2 digests are equal, 0 are not"]),
    ({**OLD, "weights/llama/int8/tp=1/xla": "c"}, [], 1, ["differs: weights/llama/int8/tp=1/xla", "1 digests are equal, 1 are not"]),
    ({**OLD, "weights/llama/int8/tp=1/xla": "c"}, ["requests"], 0, ["1 digests are equal, 0 are not"]),
    ({"requests/tp1/0-29/tokens": "a", "isa/avx2/int8/tokens": "b"}, [], 1,
     ["only in the first: weights/llama/int8/tp=1/xla", "only in the second: isa/avx2/int8/tokens", "1 digests are equal, 2 are not"]),
    (OLD, ["isa"], 1, ["nothing to compare", "0 digests are equal, 1 are not"])])
def test_a_comparison_names_what_differs(tmp_path, capsys, new, parts, code, lines):
    for name, digests in (("old", OLD), ("new", new)):
        (tmp_path / name).write_text(json.dumps({"about": {}, "digests": digests}))
    assert main(["--compare", str(tmp_path / "old"), str(tmp_path / "new"), *parts]) == code
    assert capsys.readouterr().out.splitlines() == lines


@pytest.mark.parametrize("words", [["requests"], ["--out", "x", "request"], ["--out", "x", "jobs"]])
def test_a_command_that_says_too_little_is_refused(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert {"requests": "give --out", "request": "there is no part 'request'", "jobs": "needs --check-old DIR"}[words[-1]] in capsys.readouterr().err


def test_the_drawn_requests_give_every_sampling_parameter():
    _, params, priorities = draw(300)
    default = SamplingParams()
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    assert set(FIELDS) == names, "a sampling parameter needs its line in tools/digesting/drawn_requests.py"
    assert {name for one in params for name in names if getattr(one, name) != getattr(default, name)} == names
    assert len(set(priorities)) > 1
    assert draw(300)[1] == params


def test_one_bit_of_a_log_probability_or_one_token_shows():
    def made(logprob=-1.0, token=5, prompt_logprob=-2.0):
        completion = CompletionOutput(0, "a", [token], -1.0, [{5: Logprob(logprob, 1, "a")}], "length")
        return [RequestOutput("0", None, [1, 2], [completion], None, [None, {2: Logprob(prompt_logprob, 3, "b")}])]
    above = math.nextafter(-1.0, 0)
    assert hashing.of_logprobs(made()) == hashing.of_logprobs(made())
    assert len({hashing.of_logprobs(made(**changed)) for changed in ({}, {"logprob": above}, {"prompt_logprob": math.nextafter(-2.0, 0)})}) == 3
    assert hashing.of_tokens(made()) == hashing.of_tokens(made(logprob=above)) != hashing.of_tokens(made(token=6))


def test_one_bit_of_a_parameter_shows():
    @dataclasses.dataclass
    class Params:
        layers: tuple
        bias: object = None
    one = jnp.ones((2, 3))
    other = one.at[1, 2].set(jnp.nextafter(jnp.float32(1), jnp.float32(2)))
    assert [name for name, _ in tree.named_parameters(Params((Params((one,)),)))] == ["layers.0.layers.0"]
    assert hashing.of_parameters(Params((one,))) == hashing.of_parameters(Params((one,))) != hashing.of_parameters(Params((other,)))


def test_a_case_of_weights_has_a_digest_for_each_mesh_and_layout(tmp_path):
    (case,) = chosen_cases(["weights"], ["weights/gguf/Q8_0"], None)
    found = case.run(tmp_path)
    assert set(found) == {f"{mesh}/{layout}" for mesh in weights.MESHES for layout in ("xla", "kernels")[:1 + bool(tree.instruction_sets())]}
    assert found["tp=1/xla"] == found["tp=2/xla"] != found["tp=4/xla"], "only four devices store the two KV heads twice"


@pytest.mark.usefixtures("native_library")
def test_kernels_are_read_by_their_products_with_the_values_that_xla_dequantizes(tmp_path):
    weights.write_gguf(tmp_path / "model.gguf", "Q6_K")
    plain, packed = (dict(tree.named_parameters(load_model(str(tmp_path / "model.gguf"), mesh, dtype="float32", packed=is_packed)[1]))
                     for mesh, is_packed in (("tp=1", False), ("tp=2", True)))
    assert tree.is_kernel_weight(packed["layers.0.attn.q"])
    assert plain.keys() == packed.keys()
    for name, leaf in plain.items():
        np.testing.assert_array_equal(tree.dense_values(leaf), tree.dense_values(packed[name]), err_msg=name)
