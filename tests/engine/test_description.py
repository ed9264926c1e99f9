"""How an LLM shows itself: as a line and as a notebook's table."""
import dataclasses
import html.parser
import re

import jax
import pytest

from sharding_rules import TENSOR, make_mesh
from tests.engine.conftest import CONFIG, make_llm
from tpllm import LLM
from tpllm.cli.inspect import inspect_model
from tpllm.engine.description import Description
from tpllm.model.params import init_params
from tpllm.model.partition import fit_to_mesh


class Cells(html.parser.HTMLParser):
    """The table's cells as a reader sees them, and every tag with its attributes."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.cells, self._open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag in ("th", "td"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] in ("th", "td"):
            self.cells[-1] += data

    @property
    def rows(self):
        return dict(zip(self.cells[::2], self.cells[1::2], strict=True))


def description(**changes):
    fields = {"model": "m", "family": "Llama", "num_parameters": 1234567, "dtype": "bfloat16", "kv_cache_dtype": "float32", "mesh": "tp=4",
              "devices": "4 gpu devices", "weight_bytes": 7_300_000_000, "cache_bytes": 21_000, "max_model_len": 4096, "max_num_seqs": 32,
              "kernels": "pallas", "quantization": "int4, int8", "load_s": 12.34}
    return Description(**{**fields, **changes})


def test_the_table_holds_every_fact():
    assert Cells(description().to_html(is_open=True)).rows == {
        "model": "m", "family": "Llama", "parameters": "1,234,567 in bfloat16", "quantization": "int4, int8", "mesh": "tp=4 (4 gpu devices)",
        "kernels": "pallas", "load time": "12.3 s", "weights": "7.3 GB a device",
        "KV cache": "21.0 kB a device, in float32", "max_model_len": "4,096 tokens a row", "max_num_seqs": "32 rows at once", "state": "open"}


def test_the_line_holds_what_the_table_holds():
    line = description().to_text(is_open=True)
    for fact in ("'m'", "1,234,567", "bfloat16", "tp=4", "4 gpu devices", "7.3 GB", "21.0 kB", "max_model_len=4096", "max_num_seqs=32",
                 "kernels pallas", "quantization int4, int8", "loaded in 12.3 s", "open"):
        assert fact in line
    assert "\n" not in line


def test_a_closed_one_says_so_and_claims_no_memory():
    rows = Cells(description().to_html(is_open=False)).rows
    assert "weights" not in rows
    assert "KV cache" not in rows
    assert rows["state"].startswith("closed")
    assert description().to_text(is_open=False).endswith("closed>")


def test_values_are_escaped():
    name = "<script>alert('1')</script> & \"folder\""
    table = Cells(description(model=name).to_html(is_open=True))
    assert table.rows["model"] == name
    assert "script" not in {tag for tag, _ in table.tags}


def test_the_table_fetches_nothing_and_leaves_colours_to_the_page():
    text = description().to_html(is_open=True)
    table = Cells(text)
    assert {tag for tag, _ in table.tags} <= {"table", "caption", "b", "tbody", "tr", "th", "td"}
    assert {name for _, attributes in table.tags for name in attributes} <= {"style", "scope"}
    assert not re.search("color|background|url|http", text)


@pytest.mark.parametrize("mesh", ["tp=1", "tp=4", "tp=8", "dp=2,tp=4"])
def test_sizes_are_those_of_the_arrays_and_of_tpllm_inspect(mesh):
    report = inspect_model("demo", mesh=mesh)
    with LLM("demo", mesh=mesh, max_num_seqs=2, max_model_len=256) as llm:
        shown = llm._description
        device = llm.config.partition.mesh.devices.flat[-1]

        def on_device(tree):
            return sum(shard.data.nbytes for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards if shard.device == device)
        assert shown.weight_bytes == on_device(llm.params) == report["weight_bytes_per_device"]
        tokens_on_device = 256 * 2 // llm.config.partition.size("batch")
        bytes_a_token = report["kv_bytes_per_token_per_device"][shown.kv_cache_dtype]
        assert shown.cache_bytes == on_device(llm._engine.runner.executor.cache) == bytes_a_token * tokens_on_device
        assert shown.num_parameters == report["num_parameters"]
        assert (shown.model, shown.family, shown.mesh) == ("demo", report["family"], mesh)


def test_parameters_that_were_given_have_no_name():
    rows = Cells(make_llm()._repr_html_()).rows
    assert rows["model"] == "given as parameters"
    assert "family" not in rows


def test_kernels_schemes_and_the_time_it_took_are_those_of_the_model():
    with LLM("demo", mesh="tp=1", quantization={"*.mlp.*": "int4", "*.attn.q": "int8", "*": "none"}, max_num_seqs=1, max_model_len=64) as llm:
        rows = Cells(llm._repr_html_()).rows
        assert rows["quantization"] == "int4, int8"
        assert rows["kernels"] == llm.fingerprint()["kernels"]
        assert re.fullmatch(r"\d+\.\d s", rows["load time"])
        metrics = llm.metrics()
        assert (metrics.kernels, metrics.quantization, f"{metrics.load_s:.1f} s") == (rows["kernels"], rows["quantization"], rows["load time"])
        assert "tpllm_load_s" in metrics.to_prometheus()


def test_parameters_that_were_given_were_not_loaded_and_floats_have_no_scheme():
    rows = Cells(make_llm()._repr_html_()).rows
    assert "kernels" in rows
    assert not {"quantization", "load time"} & set(rows)


def test_repeated_heads_and_padding_are_no_parameters_but_take_bytes():
    config = dataclasses.replace(CONFIG, num_kv_heads=2, vocab_size=97)
    alone, spread = (fit_to_mesh(config, make_mesh({"tp": tp}), TENSOR) for tp in (1, 8))
    first, second = (LLM.from_params(fitted, init_params(fitted, 0), max_num_seqs=2)._description for fitted in (alone, spread))
    assert first.num_parameters == second.num_parameters
    assert second.weight_bytes * 8 > first.weight_bytes


def test_an_llm_that_was_never_made_still_has_a_repr():
    assert "LLM" in repr(LLM.__new__(LLM))
    assert LLM.__new__(LLM)._repr_html_() is None
