"""What each Arrow type becomes in JSON."""
import datetime
import decimal
import json
import math

import pyarrow as pa
import pytest

from tpllm.errors import JobError
from tpllm.jobs.sources.arrow_json import json_rows, json_values

MOMENT = datetime.datetime(2024, 2, 29, 23, 59, 58, 123456)
DAY = datetime.date(2024, 2, 29)
BERLIN = datetime.timezone(datetime.timedelta(hours=1))
UUIDS = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([bytes(range(16))], pa.binary(16)))

CASES = [
    (pa.array([True, None]), [True, None]),
    (pa.array([2**63 - 1, -1]), [2**63 - 1, -1]),
    (pa.array([2**64 - 1], pa.uint64()), [2**64 - 1]),
    (pa.array([1.5, math.nan, math.inf, -math.inf, None]), [1.5, None, None, None, None]),
    (pa.array([0.5], pa.float16()), [0.5]),
    (pa.array(["é", None], pa.large_string()), ["é", None]),
    (pa.array(["a", "b", None, "a"]).dictionary_encode(), ["a", "b", None, "a"]),
    (pa.array([MOMENT], pa.timestamp("us")), ["2024-02-29T23:59:58.123456"]),
    (pa.array([1, -1], pa.timestamp("ns")), ["1970-01-01T00:00:00.000000001", "1969-12-31T23:59:59.999999999"]),
    (pa.array([MOMENT.replace(tzinfo=BERLIN)], pa.timestamp("ms", "Europe/Berlin")), ["2024-02-29T22:59:58.123Z"]),
    (pa.array([10**13], pa.timestamp("s")), ["318857-05-20T17:46:40"]),
    (pa.array([DAY]), ["2024-02-29"]),
    (pa.array([DAY], pa.date64()), ["2024-02-29"]),
    (pa.array([MOMENT.time()]), ["23:59:58.123456"]),
    (pa.array([MOMENT.time().replace(microsecond=0)], pa.time32("s")), ["23:59:58"]),
    (pa.array([datetime.timedelta(seconds=-90, microseconds=5)]), ["PT-89.999995S"]),
    (pa.array([decimal.Decimal("-12.50"), decimal.Decimal("1e-7")], pa.decimal128(12, 7)), ["-12.5000000", "0.0000001"]),
    (pa.array([b"a\xff", None]), ["Yf8=", None]),
    (pa.array([b"abcd"], pa.binary(4)), ["YWJjZA=="]),
    (UUIDS, ["00010203-0405-0607-0809-0a0b0c0d0e0f"]),
    (pa.nulls(2), [None, None]),
    (pa.array([[1, None], [], None]), [[1, None], [], None]),
    (pa.array([[math.nan, 1.0]], pa.list_(pa.float32(), 2)), [[None, 1.0]]),
    (pa.array([[b"x"], None], pa.list_view(pa.binary())), [["eA=="], None]),
    (pa.array([[{"when": MOMENT, "by": None}], None], pa.list_(pa.struct([("when", pa.timestamp("s", "UTC")), ("by", pa.string())]))),
     [[{"when": "2024-02-29T23:59:58Z", "by": None}], None]),
    (pa.array([[("k", DAY)]], pa.map_(pa.string(), pa.date32())), [{"k": "2024-02-29"}]),
    (pa.array([[(5, 1.5)]], pa.map_(pa.int32(), pa.float64())), [{"5": 1.5}]),
    (pa.array([[(b"x", 1.5)]], pa.map_(pa.binary(), pa.float64())), [[["eA==", 1.5]]]),
    (pa.array([{"a": {"b": decimal.Decimal("1.0")}}]), [{"a": {"b": "1.0"}}]),
]


@pytest.mark.parametrize(("column", "wanted"), CASES, ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "")
def test_every_type_has_its_form(column, wanted):
    values = json_values("x", column)
    assert values == wanted
    assert json.loads(json.dumps(values, allow_nan=False)) == wanted


@pytest.mark.parametrize(("column", "wanted"), CASES, ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "")
def test_a_piece_of_a_column_has_the_forms_of_its_values(column, wanted):
    doubled = pa.concat_arrays([column, column])
    assert json_values("x", doubled.slice(1)) == (wanted + wanted)[1:]


def test_a_type_that_has_no_form_is_refused_with_the_column():
    with pytest.raises(JobError, match=r"column 'x' is list_view<.*timestamp.*>, which has no form in JSON: .*leave it out of the input"):
        json_values("x", pa.nulls(0, pa.list_view(pa.timestamp("s"))))


def test_in_what_a_request_is_made_of_null_fields_are_absent_and_text_is_json():
    sampling = pa.array([{"temperature": 0.0, "top_k": None}, {"temperature": None, "top_k": 3}, None])
    texts = pa.array(['{"temperature": 0}', "{torn", None])
    messages = pa.array([[{"role": "user", "content": "a", "name": None}]], pa.list_(pa.struct(
        [("role", pa.string()), ("content", pa.string()), ("name", pa.string())])))
    assert json_values("sampling", sampling) == [{"temperature": 0.0}, {"top_k": 3}, None]
    assert json_values("other", sampling)[0] == {"temperature": 0.0, "top_k": None}
    assert json_values("sampling", texts) == [{"temperature": 0}, "{torn", None]
    assert json_values("other", texts) == ['{"temperature": 0}', "{torn", None]
    assert json_values("messages", messages) == [[{"role": "user", "content": "a"}]]
    assert json_values("messages", pa.array(['[{"role": "user"}]'])) == [[{"role": "user"}]]


@pytest.mark.parametrize("text", ['{"x": NaN}', '{"x": 1e999}', "[" * 100_000])
def test_text_that_is_no_json_stays_text(text):
    assert json_values("sampling", pa.array([text])) == [text]


def test_rows_have_their_columns_in_order():
    batch = pa.record_batch({"b": [1, 2], "a": ["x", None]})
    assert [list(fields.items()) for fields in json_rows(batch)] == [[("b", 1), ("a", "x")], [("b", 2), ("a", None)]]
