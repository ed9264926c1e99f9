"""docs/guide/names.md against the tables that it is written from."""
from tools.names_page import PAGE, page


def test_the_page_of_names_is_what_the_tables_say():
    assert PAGE.read_text() == page(), "write it anew: python tools/names_page.py"
