"""Pages: who holds them, what is known of them, and in which order they go."""
from tpllm.engine.pages import PagePool


def test_pages_are_taken_until_none_is_left_and_come_back_when_let_go():
    pool = PagePool(3)
    pages = [pool.take() for _ in range(3)]
    assert sorted(pages) == [0, 1, 2]
    assert pool.take() is None
    assert (pool.num_held, pool.num_available) == (3, 0)
    pool.release(pages[1:])
    assert pool.num_available == 2
    assert {pool.take(), pool.take()} == set(pages[1:])


def test_a_page_is_shared_until_all_but_one_have_let_go():
    pool = PagePool(2)
    page = pool.take()
    pool.hold(page)
    assert pool.is_shared(page)
    pool.release([page])
    assert not pool.is_shared(page)
    assert pool.num_available == 1
    pool.release([page])
    assert pool.num_available == 2


def test_what_is_known_of_a_page_lasts_until_it_is_taken_for_something_else():
    pool = PagePool(2)
    page = pool.take()
    pool.learn(page, "a")
    pool.release([page])
    assert pool.find("a") == page
    assert pool.take() != page  # a page of which nothing is known goes first
    assert pool.find("a") == page
    assert pool.take() == page
    assert pool.find("a") is None


def test_the_page_longest_idle_goes_first_and_of_one_row_its_last():
    pool = PagePool(4)
    rows = [[pool.take(), pool.take()] for _ in range(2)]
    for row, keys in zip(rows, (("a0", "a1"), ("b0", "b1")), strict=True):
        for page, key in zip(row, keys, strict=True):
            pool.learn(page, key)
    for row in rows:
        pool.release(row)
    assert [pool.take() for _ in range(3)] == [rows[0][1], rows[0][0], rows[1][1]]
    assert [pool.find(key) for key in ("a0", "a1", "b0", "b1")] == [None, None, rows[1][0], None]


def test_an_idle_page_that_is_held_again_is_not_taken():
    pool = PagePool(1)
    page = pool.take()
    pool.learn(page, "a")
    pool.release([page])
    pool.hold(pool.find("a"))
    assert pool.take() is None
    assert pool.num_references[page] == 1


def test_one_content_is_known_by_one_page_and_one_page_by_one_content():
    pool = PagePool(2)
    first, second = pool.take(), pool.take()
    pool.learn(first, "a")
    pool.learn(second, "a")
    pool.learn(first, "b")
    assert pool.find("a") == first
    assert pool.find("b") is None
    assert pool.num_known == 1


def test_forgetting_everything_frees_what_is_idle_and_leaves_what_is_held():
    pool = PagePool(3)
    held, idle = pool.take(), pool.take()
    pool.learn(held, "h")
    pool.learn(idle, "i")
    pool.release([idle])
    pool.forget_all()
    assert pool.find("h") is None
    assert pool.find("i") is None
    assert pool.num_available == 2
    assert pool.num_references[held] == 1
    pool.release([held])
    assert pool.num_available == 3


def test_what_is_forgotten_of_a_held_page_is_not_found():
    pool = PagePool(2)
    page = pool.take()
    pool.learn(page, "a")
    pool.forget([page])
    assert pool.find("a") is None
    pool.release([page])
    assert pool.num_available == 2
