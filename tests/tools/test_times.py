"""What the checks cost, read from what they wrote."""
from tools import times

XML = """<testsuites><testsuite><testcase classname="tests.a.test_x" name="test_slow[1]" time="3.5"/>
<testcase classname="tests.a.test_x" name="test_quick" time="0.5"/>
<testcase classname="tests.b.test_y" name="test_other" time="2"/></testsuite></testsuites>"""


def test_parts_have_their_share_and_the_slowest_tests_and_modules_come_first(tmp_path):
    (tmp_path / "parts.tsv").write_text("lint\t10\ntest\t30\n")
    (tmp_path / "test.xml").write_text(XML)
    parts, tests = times.read_parts(tmp_path), times.read_tests(tmp_path)
    assert parts == {"lint": 10, "test": 30}
    lines = times.report(parts, tests, 2).splitlines()
    assert [line.split() for line in lines[1:4]] == [["lint", "10", "25.0%"], ["test", "30", "75.0%"], ["all", "40", "100.0%"]]
    assert [line.split() for line in lines if "::" in line or ".test_" in line] == [
        ["4.0", "test", "tests.a.test_x"], ["2.0", "test", "tests.b.test_y"],
        ["3.5", "test", "tests.a.test_x::test_slow[1]"], ["2.0", "test", "tests.b.test_y::test_other"]]


def test_without_measurements_it_says_what_to_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(times, "FOLDER", tmp_path / "build" / "times")
    monkeypatch.setattr("sys.argv", ["times.py"])
    assert times.main() == 1
    assert "run `make test` first" in capsys.readouterr().err
