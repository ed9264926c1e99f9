"""The benchmark beside llama.cpp: files of the sizes and types asked for, a peer that is itself, and everything measured is written down."""
import json
import re
import shutil
import sys

import numpy as np
import pytest

from tests.bench.conftest import load_script
from tpllm.bench import bandwidth
from tpllm.bench.shapes import SHAPES
from tpllm.bench.timing import RunTimes, Workload
from tpllm.errors import ConfigError

SMALL = ["--shape", "tiny", "--contexts", "16", "40", "--prompts", "16", "24", "--batch-size", "3", "--decode-steps", "4", "--rounds", "1",
         "--max-repeats", "0"]
CELLS = ["decode-1-at-16", "decode-3-at-16", "decode-1-at-40", "prefill-16", "prefill-24"]
LINE = "CPU : SSE3 = 1 | AVX2 = 1 | F16C = 1 | FMA = 1 | AVX512 = {} | AVX512_VNNI = {} | REPACK = 1 |"
pytestmark = pytest.mark.oracle


@pytest.fixture(scope="module")
def script():
    return load_script("benchmarks.cpu.vs_llama_cpp", llama_cpp="llama-cpp-python", gguf="gguf")


@pytest.fixture(scope="module")
def files(script, tmp_path_factory):
    """A file of each type, by its name."""
    folder = tmp_path_factory.mktemp("gguf")
    paths = {name: folder / f"{name}.gguf" for name in ("F16", "Q8_0", "Q4_0")}
    script.gguf_file.write_f16(paths["F16"], SHAPES["tiny"])
    for name in ("Q8_0", "Q4_0"):
        script.gguf_file.quantize(paths["F16"], paths[name], name)
    return paths


@pytest.fixture(scope="module")
def model(script, files):
    model = script.llama_cpp_model.PeerModel(files["F16"])
    yield model
    model.close()


@pytest.fixture
def small_buffer(monkeypatch):
    """Bandwidth is measured quickly; and decoding so small a model, which takes less than the clock's noise, is said to take a second."""
    monkeypatch.setattr(bandwidth, "BUFFER_BYTES", 2**22)
    real_run = Workload.time_run
    monkeypatch.setattr(Workload, "time_run", lambda self, llm: (lambda run: RunTimes(run.short, run.short + 1.0, run.ttft))(real_run(self, llm)))


@pytest.mark.parametrize("name", ["F16", "Q8_0", "Q4_0"])
def test_llama_cpp_opens_a_file_of_the_sizes_and_types_asked_for(script, files, name):
    import gguf
    import llama_cpp

    config, model = SHAPES["tiny"], script.llama_cpp_model.PeerModel(files[name])
    sizes = [getattr(llama_cpp, f"llama_model_n_{what}")(model.handle) for what in ("layer", "embd", "head", "head_kv", "params")]
    model.close()
    table, layer = 512 * 128, 128 * (128 + 64 + 64 + 128) + 3 * 128 * 256 + 2 * 128
    assert (sizes, model.vocab_size) == ([2, 128, 4, 2, 2 * table + 2 * layer + 128], 512)
    assert sizes[-1] == script.gguf_file.num_weights(config)
    tensors = gguf.GGUFReader(files[name]).tensors
    assert {tensor.tensor_type.name for tensor in tensors if len(tensor.shape) == 2} == {name}
    norms = ["output_norm.weight", *(f"blk.{layer}.{half}_norm.weight" for layer in (0, 1) for half in ("attn", "ffn"))]
    assert {tensor.name: tensor.tensor_type.name for tensor in tensors if len(tensor.shape) == 1} == dict.fromkeys(norms, "F32")
    script.gguf_file.check_types(files[name], config, name)
    assert files[name].stat().st_size == pytest.approx(script.gguf_file.file_bytes(config, name), rel=0.02)


def test_a_file_of_another_type_or_shape_is_refused(script, files):
    with pytest.raises(ConfigError, match=re.escape("token_embd.weight is ((512, 128), 'Q8_0'), not ((512, 128), 'Q4_0')")):
        script.gguf_file.check_types(files["Q8_0"], SHAPES["tiny"], "Q4_0")
    with pytest.raises(ConfigError, match=r"token_embd.weight is .*not \(\(32000, 768\), 'F16'\)"):
        script.gguf_file.check_types(files["F16"], SHAPES["llama-160m"], "F16")


def test_weights_have_the_spread_of_ours(files):
    import gguf

    by_name = {tensor.name: tensor.data for tensor in gguf.GGUFReader(files["F16"]).tensors}
    assert np.std(by_name["token_embd.weight"].astype(np.float32)) == pytest.approx(128**-0.5, rel=0.02)
    assert np.std(by_name["blk.1.ffn_down.weight"].astype(np.float32)) == pytest.approx(256**-0.5, rel=0.02)
    assert set(by_name["output_norm.weight"].tolist()) == {1.0}


def test_a_shape_that_is_no_plain_llama_is_refused(script, tmp_path):
    with pytest.raises(ConfigError, match=r"the shape has rope.kind, .*take a plain Llama"):
        script.gguf_file.write_f16(tmp_path / "F16.gguf", SHAPES["llama-3.1-8b"])


@pytest.mark.parametrize("is_fused", [True, False])
def test_the_peers_sequences_give_together_what_each_gives_alone(script, model, is_fused):
    prompts_BT = np.random.default_rng(3).integers(0, 512, (8, 20), np.int32)
    tokens = {}
    for num_seqs in (8, 1):
        context = script.llama_cpp_model.PeerContext(model, num_seqs=num_seqs, context_len=27, num_threads=2, has_flash_attention=is_fused)
        runs = [context.run(rows_BT, 7) for rows_BT in np.split(prompts_BT, 8 // num_seqs)]
        tokens[num_seqs] = [row for run in runs for row in run.tokens]
        context.close()
    assert {len(row) for row in tokens[8]} == {8}
    assert len(set(map(tuple, tokens[8]))) == 8  # all differ, so rows that were mixed up would be seen
    # Sums run in another order with other numbers of rows: a row may leave the other one where its two best tokens are nearly as good.
    assert sum(together == alone for together, alone in zip(tokens[8], tokens[1], strict=True)) >= 6


def test_the_peers_run_is_one_prefill_and_one_call_a_step_from_an_empty_cache(script, model, monkeypatch):
    calls, decode = [], script.llama_cpp.llama_decode

    def noted(handle, batch):
        calls.append(([batch.pos[index] for index in range(batch.n_tokens)], [batch.logits[index] for index in range(batch.n_tokens)]))
        return decode(handle, batch)
    monkeypatch.setattr(script.llama_cpp, "llama_decode", noted)
    context = script.llama_cpp_model.PeerContext(model, num_seqs=2, context_len=6, num_threads=1, has_flash_attention=True)
    first, second = (context.run(np.array([[5, 6, 7], [8, 9, 10]], np.int32), 2) for _ in range(2))
    context.close()
    assert calls == 2 * [([0, 1, 2, 0, 1, 2], [0, 0, 1, 0, 0, 1]), ([3, 3], [1, 1]), ([4, 4], [1, 1])]
    assert first.tokens == second.tokens


def test_more_than_a_context_holds_and_files_that_are_none_are_refused(script, model, tmp_path):
    context = script.llama_cpp_model.PeerContext(model, num_seqs=1, context_len=16, num_threads=1, has_flash_attention=True)
    with pytest.raises(ValueError, match="1 rows of 17 tokens are more than a context of 1 x 16 holds"):
        context.run(np.ones((1, 14), np.int32), 3)
    context.close()
    with pytest.raises(ValueError, match=r"llama\.cpp cannot open"):
        script.llama_cpp_model.PeerModel(tmp_path / "nothing.gguf")
    with pytest.raises(ConfigError, match=r"could not write .* as Q4_0 \(error"):
        script.gguf_file.quantize(tmp_path / "nothing.gguf", tmp_path / "other.gguf", "Q4_0")


@pytest.mark.parametrize(("line", "flags", "missing"), [
    (LINE.format(1, 1), {"avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni"}, []),
    (LINE.format(0, 0), {"avx2", "avx512f", "avx512_vnni"}, ["AVX512", "AVX512_VNNI"]),
    (LINE.format(1, 0), {"avx2", "avx512f", "avx512_vnni"}, ["AVX512_VNNI"]),
    (LINE.format(0, 0), {"avx2", "avx_vnni"}, ["AVX_VNNI"]),
    ("CPU : SSE3 = 1 | REPACK = 1 | ", {"avx2", "fma"}, ["FMA", "AVX2"]),
    ("CPU : NEON = 1 | ", set(), []),
])
def test_instruction_sets_that_the_peer_leaves_unused_are_found(script, line, flags, missing):
    assert script.llama_cpp_model.missing_features(line, flags) == missing


def test_a_peer_built_for_a_lesser_cpu_is_refused_unless_allowed(script, monkeypatch):
    monkeypatch.setattr(script.llama_cpp_model, "system_line", lambda: LINE.format(0, 0))
    monkeypatch.setattr(script.llama_cpp_model, "cpu_flags", lambda: {"avx2", "avx512f", "avx512_vnni"})
    with pytest.raises(ConfigError, match=r"this CPU has AVX512, AVX512_VNNI, which this build .*--allow-slow-peer"):
        script.main([*SMALL, "--output", "result.json"])
    script.check_build(is_slow_allowed=True)


def test_this_cpus_flags_are_words(script):
    assert all(re.fullmatch(r"\w+", flag) for flag in script.llama_cpp_model.cpu_flags())


def test_the_file_holds_the_setup_the_machine_and_every_pair(script, tmp_path, small_buffer, capsys):
    path = tmp_path / "result.json"
    references = ["--peer-at-least", "bf16:prefill-16=0.5", "--peer-at-least", "bf16:prefill-24=1e9"]
    assert script.main([*SMALL, "--kinds", "bf16", "--no-memory", "--allow-slow-peer", *references, "--output", str(path)]) == 0
    report = json.loads(path.read_text())
    assert {"llama_cpp_python", "llama_cpp_system", "cpu_model", "load_average", "date"} <= set(report["machine"])
    assert "AVX" in report["machine"]["llama_cpp_system"] or "NEON" in report["machine"]["llama_cpp_system"]
    assert (report["setup"]["decode_steps"], report["setup"]["contexts"], report["setup"]["peer_kv_cache"]) == (4, [16, 40], "f16")
    entry = report["kinds"]["bf16"]
    assert (list(entry["cells"]), entry["peer_type"], entry["memory"]) == (CELLS, "F16", None)
    for name, cell in entry["cells"].items():
        assert len(cell["pairs"]) == cell["num_counted"] == 1
        assert {"prefill_s", "peer_prefill_s", "tokens_per_s", "peer_tokens_per_s", "tokens_ratio"} <= set(cell["medians"])
        assert {"load_average_before", "load_average_after", "counts", *cell["medians"]} <= set(cell["pairs"][0])
        assert len(cell["pairs"][0]["bandwidth_samples_bytes_per_s"]) == 2 * bandwidth.NUM_PASSES
        assert {len(speeds) for speeds in cell["peer_attention_trials"].values()} == {script.llama_cpp_model.NUM_TRIALS}
        assert cell["peer_attention"] in ("fused", "products")
        assert ("share_of_median_bandwidth" in cell) == name.startswith("decode")
    assert entry["cells"]["decode-3-at-16"]["medians"]["tokens_per_s"] == 3 * 4 / 1.0
    assert entry["cells"]["decode-1-at-40"]["num_steps"] == 12
    assert entry["cells"]["prefill-16"]["peer_reference"]["is_reached"]
    assert not entry["cells"]["prefill-24"]["peer_reference"]["is_reached"]
    printed = capsys.readouterr().out
    assert all(text in printed for text in (*CELLS, "llama.cpp", "ratio", "prefill-24 does not count", "result.json"))


def test_quantized_kinds_stand_beside_quantized_files(script, tmp_path, small_buffer):
    path = tmp_path / "result.json"
    script.main([*SMALL, "--kinds", "int8", "int4", "--cells", "decode-1-at-16", "--no-memory", "--allow-slow-peer", "--output", str(path)])
    kinds = json.loads(path.read_text())["kinds"]
    assert {kind: (entry["peer_type"], list(entry["cells"])) for kind, entry in kinds.items()} == {
        "int8": ("Q8_0", ["decode-1-at-16"]), "int4": ("Q4_0", ["decode-1-at-16"])}
    reads = [entry["cells"]["decode-1-at-16"]["medians"]["decode_bytes_per_s"] for entry in kinds.values()]
    assert reads[0] > 1.3 * reads[1]  # at the same tokens/s: the packed bytes are counted


def test_peak_memory_is_that_of_processes_of_their_own(script, files):
    memory = script.measure_memory(files["F16"], {"shape": "tiny", "quantization": None}, prompt_len=16, num_steps=2)
    if memory is None:
        pytest.skip("this system has no /proc")
    for side in ("ours", "ours_compiling", "peer"):
        assert 10**7 < memory[side]["import_bytes"] < memory[side]["peak_bytes"]
    assert memory["peer"]["peak_bytes"] < memory["ours"]["import_bytes"] < memory["ours"]["peak_bytes"]  # the peer's process has no JAX
    assert memory["ratio"] == memory["ours"]["peak_bytes"] / (1.1 * memory["peer"]["peak_bytes"] + memory["ours"]["import_bytes"])


def test_a_decode_too_short_to_measure_is_no_result(script, tmp_path, small_buffer, monkeypatch):
    monkeypatch.setattr(Workload, "time_run", lambda self, llm: RunTimes(2.0, 1.9, 1.0))
    with pytest.raises(ConfigError, match="4 decode steps are too short to measure; raise --decode-steps"):
        script.main([*SMALL, "--kinds", "bf16", "--cells", "decode-1-at-16", "--allow-slow-peer", "--output", str(tmp_path / "result.json")])


@pytest.mark.parametrize(("words", "message"), [
    (["--cells", "decode-9-at-16"], r"--cells decode-9-at-16: there are decode-1-at-16, .*prefill-24"),
    (["--contexts", "16", "600"], r"decode-1-at-600 needs 605 tokens of context, tiny has 512; lower --contexts"),
    (["--prompts", "510"], r"memory needs 515 tokens of context"),
    (["--peer-at-least", "int4:prefill-99=3"], r"--peer-at-least int4:prefill-99 is not measured"),
    (["--shape", "huge"], "unknown shape 'huge'"),
])
def test_what_cannot_be_measured_is_refused_first(script, tmp_path, words, message):
    with pytest.raises(ConfigError, match=message):
        script.main([*SMALL, *words, "--output", str(tmp_path / "result.json")])


def test_a_reference_that_is_no_speed_of_a_cell_is_refused(script, capsys):
    with pytest.raises(SystemExit):
        script.main([*SMALL, "--peer-at-least", "int4=42"])
    assert "'int4=42' is not KIND:CELL=TOK_S" in capsys.readouterr().err


def test_a_temporary_folder_without_room_is_refused(script, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 0, 10**9))
    with pytest.raises(ConfigError, match=r"the files need 3.4 GB, .* has 1.0 free; name another folder with TMPDIR"):
        sys.modules["benchmarks.cpu.peers.kinds"].check_disk(SHAPES["tinyllama-1.1b"], ["bf16", "int8"], str(tmp_path))


def test_a_result_that_could_not_be_written_is_refused_first(script, tmp_path):
    with pytest.raises(ConfigError, match="cannot write"):
        script.main([*SMALL, "--output", str(tmp_path / "nowhere" / "result.json")])
