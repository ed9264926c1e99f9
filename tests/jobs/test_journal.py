"""The journal keeps every whole line and nothing else."""
import inspect
import threading
import zlib

import pytest

from tpllm.jobs.outputs.durable import Disk
from tpllm.jobs.outputs.journal import FinishedRow, Journal, decode, encode, opened_journal
from tpllm.jobs.runner import run_job

ROWS = [FinishedRow(4, False, b'{"a": "\xc3\xa9"}'), FinishedRow(3, True, b'{"error": 1}'), FinishedRow(5, False, b"{}")]


def write(folder, rows=ROWS, part=1):
    with opened_journal(folder, Disk(), sync_interval_s=0) as journal:
        for row in rows:
            journal.append(part, row)
    return folder / f"journal-{part:05d}.jsonl"


def read(folder, part=1):
    with opened_journal(folder, Disk(), sync_interval_s=0) as journal:
        return list(journal.read(part))


def test_rows_come_back_in_input_order(tmp_path):
    write(tmp_path)
    assert read(tmp_path) == sorted(ROWS, key=lambda row: row.index)


def test_a_line_is_checksum_row_kind_and_payload():
    assert encode(ROWS[1]) == b"%08x 3 error {\"error\": 1}\n" % zlib.crc32(b'3 error {"error": 1}')


def test_a_tail_torn_at_any_byte_is_cut_off_and_the_journal_goes_on(tmp_path):
    path = write(tmp_path)
    whole = path.read_bytes()
    last = len(encode(ROWS[2]))
    for kept in range(len(whole) - last, len(whole)):
        path.write_bytes(whole[:kept])
        with opened_journal(tmp_path, Disk(), sync_interval_s=0) as journal:
            assert journal.rows(1) == {3, 4}
            journal.append(1, ROWS[2])
        assert path.read_bytes() == whole


def test_any_flipped_bit_of_the_last_record_is_noticed(tmp_path):
    path = write(tmp_path)
    whole = path.read_bytes()
    start = len(whole) - len(encode(ROWS[2]))
    for position in range(8 * start, 8 * len(whole)):
        damaged = bytearray(whole)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        assert [row.index for row in read(tmp_path)] == [3, 4], position


def test_a_damaged_line_in_the_middle_costs_only_its_row(tmp_path):
    path = write(tmp_path)
    damaged = bytearray(path.read_bytes())
    damaged[len(encode(ROWS[0])) + 12] ^= 1
    path.write_bytes(damaged)
    assert [row.index for row in read(tmp_path)] == [4, 5]


def test_a_tail_of_zeros_is_cut_off(tmp_path):
    path = write(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(5000))
    assert len(read(tmp_path)) == 3
    assert path.read_bytes() == whole


@pytest.mark.parametrize("line", [b"", b"\n", b"00000000", b"00000000 \n", b"zzzzzzzz 1 row {}\n", encode(ROWS[0])[:-1]])
def test_what_is_no_record_is_not_read_as_one(line):
    assert decode(line) is None


def test_a_discarded_part_leaves_no_file(tmp_path):
    with opened_journal(tmp_path, Disk(), sync_interval_s=0) as journal:
        journal.append(0, ROWS[0])
        journal.discard(0)
        assert list(tmp_path.iterdir()) == []
        assert journal.rows(0) == set()


def test_rows_are_synced_in_the_background_when_no_further_row_comes(tmp_path):
    names_synced, content_synced = threading.Event(), threading.Event()

    class WatchedDisk(Disk):
        def sync(self, fd):
            super().sync(fd)
            content_synced.set()

        def sync_folder(self, folder):
            super().sync_folder(folder)
            names_synced.set()
    journal = Journal(tmp_path, WatchedDisk(), sync_interval_s=0.5)
    journal.append(0, ROWS[0])
    assert content_synced.wait(30)
    assert names_synced.wait(30)
    journal.close()
    journal.close()


def test_the_longest_wait_before_a_sync_is_under_a_second():
    assert inspect.signature(run_job).parameters["sync_interval_s"].default < 1
    assert inspect.signature(Journal).parameters["sync_interval_s"].default < 1
