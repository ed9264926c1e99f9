"""Pages of the KV cache: who holds them, and which may be taken. Host integers only.

A page is *held* by as many rows as it has references. One that nobody holds is *free*, or, where the prefix cache knows its content, *idle*:
it can be held again for that content until it is taken for something else, the one longest idle first.
"""
import collections
from collections.abc import Hashable, Iterable


class PagePool:
    """The pages of one data group; every operation is O(1) a page.

    Args:
        num_pages: pages 0 to ``num_pages - 1``.
    """

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self.num_references = [0] * num_pages
        self._free = collections.deque(range(num_pages))
        self._idle: collections.OrderedDict[int, None] = collections.OrderedDict()
        self._key_of: dict[int, Hashable] = {}
        self._page_of: dict[Hashable, int] = {}

    @property
    def num_available(self) -> int:
        """Pages that :meth:`take` can give."""
        return len(self._free) + len(self._idle)

    @property
    def num_held(self) -> int:
        """Pages that rows hold."""
        return self.num_pages - self.num_available

    @property
    def num_known(self) -> int:
        """Pages whose content the prefix cache knows."""
        return len(self._key_of)

    def take(self) -> int | None:
        """A page for new content, held once; None where every page is held."""
        if self._free:
            page = self._free.popleft()
        elif self._idle:
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
        else:
            return None
        self.num_references[page] = 1
        return page

    def hold(self, page: int) -> None:
        """Hold a page once more, for the content it has."""
        self._idle.pop(page, None)
        self.num_references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Let go of pages of a row, given in order; its last ones become idle first, so that they are the first to be taken."""
        for page in reversed(list(pages)):
            self.num_references[page] -= 1
            if self.num_references[page] == 0:
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def is_shared(self, page: int) -> bool:
        """Whether several rows hold it, so that none may write to it."""
        return self.num_references[page] > 1

    def learn(self, page: int, key: Hashable) -> None:
        """Know a held page's content by its key, unless another page or key stands for it already."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key], self._key_of[page] = page, key

    def find(self, key: Hashable) -> int | None:
        """The page that has this content."""
        return self._page_of.get(key)

    def forget(self, pages: Iterable[int]) -> None:
        """Know the content of some held pages no more."""
        for page in pages:
            if page in self._key_of:
                self._forget(page)

    def forget_all(self) -> None:
        """Know no content any more; what rows hold they keep."""
        self._free.extend(self._idle)
        self._idle.clear()
        self._key_of.clear()
        self._page_of.clear()

    def _forget(self, page: int) -> None:
        del self._page_of[self._key_of.pop(page)]
