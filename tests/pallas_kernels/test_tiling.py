"""Which tiles a kernel takes, and what the tuner measures and stores."""
import dataclasses
import json
import logging
import time
import types

import pytest

from pallas_kernels import tiling
from pallas_kernels.tiling import Device, choose_tiles, tune

H200 = Device("gpu", "NVIDIA H200", (9, 0))
UNKNOWN = Device("metal", "Some Chip")


@dataclasses.dataclass(frozen=True)
class Tiles:
    rows: int


LARGE, MIDDLE, SMALL = Tiles(128), Tiles(64), Tiles(32)
CANDIDATES = (LARGE, MIDDLE, SMALL)
KEY = (4096, "bfloat16")


def kib_a_row(tiles):
    return tiles.rows * 2 * tiling.KIB  # 256, 128 and 64 KiB


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TPLLM_TILES", str(tmp_path / "tiles"))
    return tmp_path / "tiles"


def store(folder, kind_file, entries):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / kind_file).write_text(json.dumps({"product": entries}))


def sleeps(milliseconds):
    def build(tiles):
        wait = milliseconds[tiles]
        if wait is None:
            raise NotImplementedError("no such shape")
        return lambda: time.sleep(wait / 1000)
    return build


def test_the_first_candidate_that_fits_is_taken():
    assert choose_tiles("product", H200, KEY, CANDIDATES, kib_a_row) == MIDDLE


def test_where_the_limit_is_not_known_the_first_is_taken():
    assert choose_tiles("product", UNKNOWN, KEY, CANDIDATES, kib_a_row) == LARGE


def test_shapes_that_fit_in_no_way_are_refused_with_both_figures_and_the_fix():
    needed = r"product: shapes \(4096, 'bfloat16'\) need at least 262144 bytes.*NVIDIA H200 has 232448; .*implementation='reference'"
    with pytest.raises(ValueError, match=needed):
        choose_tiles("product", H200, KEY, (LARGE, Tiles(256)), kib_a_row)


def test_a_stored_result_goes_before_the_order_of_the_candidates(folder):
    store(folder, "nvidia_h200.json", {"4096,bfloat16": {"tiles": {"rows": 32}}})
    assert choose_tiles("product", H200, KEY, CANDIDATES, kib_a_row) == SMALL
    assert choose_tiles("product", H200, (8192, "bfloat16"), CANDIDATES, kib_a_row) == MIDDLE
    assert choose_tiles("other", H200, KEY, CANDIDATES, kib_a_row) == MIDDLE
    assert choose_tiles("product", UNKNOWN, KEY, CANDIDATES, kib_a_row) == LARGE


@pytest.mark.parametrize("fields", [{"rows": 128}, {"rows": 48}, {"columns": 32}])
def test_a_stored_result_that_does_not_fit_or_is_no_candidate_is_passed_over(folder, fields):
    store(folder, "nvidia_h200.json", {"4096,bfloat16": {"tiles": fields}})
    assert choose_tiles("product", H200, KEY, CANDIDATES, kib_a_row) == MIDDLE


def test_the_users_result_goes_before_the_one_that_comes_with_the_package(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tiling.importlib.resources, "files", lambda package: tmp_path / package)
    store(tmp_path / "pallas_kernels" / "tiles", "nvidia_h200.json", {"4096,bfloat16": {"tiles": {"rows": 32}}})
    assert choose_tiles("product", H200, KEY, CANDIDATES, kib_a_row) == SMALL
    store(folder, "nvidia_h200.json", {"4096,bfloat16": {"tiles": {"rows": 64}}})
    assert choose_tiles("product", H200, KEY, CANDIDATES, kib_a_row) == MIDDLE


@pytest.mark.parametrize("text", ["{", "[]", '{"product": {"4096,bfloat16": 3}}'])
def test_a_broken_file_is_named_in_the_log_and_left_out(folder, text, caplog):
    store(folder, "nvidia_h200.json", {})
    (folder / "nvidia_h200.json").write_text(text)
    with caplog.at_level(logging.WARNING):
        assert choose_tiles("product", H200, KEY, CANDIDATES, kib_a_row) == MIDDLE
    assert str(folder / "nvidia_h200.json") in caplog.text


def test_the_tuner_stores_the_fastest_of_those_that_fit_and_compile(folder, caplog):
    with caplog.at_level(logging.INFO):
        fastest = tune("product", H200, KEY, (*CANDIDATES, Tiles(16)), kib_a_row, sleeps({LARGE: 0, MIDDLE: 20, SMALL: 3, Tiles(16): None}))
    assert fastest == SMALL  # LARGE is never built: it does not fit
    assert choose_tiles("product", H200, KEY, CANDIDATES, kib_a_row) == SMALL
    assert "Tiles(rows=16) cannot be compiled: no such shape" in caplog.text
    stored = json.loads((folder / "nvidia_h200.json").read_text())["product"]["4096,bfloat16"]
    assert 3000 <= stored["microseconds"] < 20000
    assert [path.name for path in folder.iterdir()] == ["nvidia_h200.json"]


def test_results_of_other_shapes_and_ops_stay(folder):
    store(folder, "nvidia_h200.json", {"1": {"tiles": {"rows": 32}}})
    tune("product", H200, KEY, (SMALL,), kib_a_row, sleeps({SMALL: 1}))
    tune("other", H200, KEY, (SMALL,), kib_a_row, sleeps({SMALL: 1}))
    stored = json.loads((folder / "nvidia_h200.json").read_text())
    assert {op: set(keys) for op, keys in stored.items()} == {"product": {"1", "4096,bfloat16"}, "other": {"4096,bfloat16"}}


def test_tiles_of_which_none_compiles_are_an_error_with_the_last_reason():
    with pytest.raises(ValueError, match="no candidate tiles can be compiled for NVIDIA H200; the last error: no such shape"):
        tune("product", H200, KEY, CANDIDATES, kib_a_row, sleeps(dict.fromkeys(CANDIDATES)))


def test_a_folder_that_cannot_be_written_is_said_and_the_result_still_given(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TPLLM_TILES", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert tune("product", H200, KEY, (SMALL,), kib_a_row, sleeps({SMALL: 1})) == SMALL
    assert "cannot be stored" in caplog.text


def test_results_lie_in_the_cache_folder_unless_one_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv("TPLLM_TILES")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tiling.user_folder() == tmp_path / "tpllm" / "tiles"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tiling.user_folder() == tmp_path / ".cache" / "tpllm" / "tiles"


@pytest.mark.parametrize(("kind", "limit"), [
    ("NVIDIA H100 80GB HBM3", 227 * 1024), ("TPU v5 lite", 128 * 1024**2), ("TPU v5", 64 * 1024**2), ("NVIDIA A100", None), ("", None),
])
def test_memory_on_the_chip_is_known_by_the_beginning_of_the_kind(kind, limit):
    assert Device("gpu", kind).on_chip_bytes == limit


@pytest.mark.parametrize(("capability", "parts"), [("9.0", (9, 0)), ("12.1", (12, 1)), ("gfx942", None), (None, None)])
def test_a_device_has_the_compute_capability_of_nvidia_or_none(capability, parts):
    device = types.SimpleNamespace(platform="gpu", device_kind="Chip", compute_capability=capability)
    assert tiling.device_of(device) == Device("gpu", "Chip", parts)
