"""An interpolated Kneser-Ney 5-gram on the demo model's training text: the bar that the demo model has to pass.

    python tools/ngram_baseline.py                     # held-out nats a token, on the windows of train_demo.py --evaluate

With c a count for the longest n-grams and the number of different tokens seen before for shorter ones (Kneser & Ney 1995):

    p(w | h) = max(c(h w) - D, 0) / c(h) + D t(h) / c(h) p(w | h without its oldest token)

t(h) is the number of different tokens after h, c(h) the sum of c over them. The recursion ends in the uniform distribution. Each order has one
discount D = n1 / (n1 + 2 n2), of the numbers n1 and n2 of n-grams with a count of one and two (Ney, Essen & Kneser 1994).

An n-gram is one 64-bit integer, oldest token in the highest bits; tables are sorted arrays, looked up by bisection.
"""
import argparse
import dataclasses
import math

import numpy as np

KEY_BITS = 64
UNKNOWN_DISCOUNT = 0.5  # where a toy corpus has no n-gram of count one, or none of count two
ABSENT = -1


@dataclasses.dataclass(frozen=True)
class Order:
    """What is known of the n-grams of one length.

    Attributes:
        keys, counts: every n-gram, ascending, and its count.
        contexts, totals, num_types: every n-gram's context, ascending, with c(h) and t(h).
        discount: D.
    """

    keys: np.ndarray
    counts: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    num_types: np.ndarray
    discount: float


@dataclasses.dataclass(frozen=True)
class KneserNey:
    """A trained model.

    Attributes:
        orders: of the 1-grams, 2-grams, and so on.
        vocab_size: V.
        bits: of one token in a key.
    """

    orders: tuple[Order, ...]
    vocab_size: int
    bits: int

    def probabilities(self, history_TN: np.ndarray, tokens_T: np.ndarray) -> np.ndarray:
        """The probability of each token after its history.

        Args:
            history_TN: the N >= len(orders) - 1 tokens before each one, newest last; -1 where there is none. Only the orders whose whole
                context is there are used.
            tokens_T: token ids.

        Returns:
            [T] float64.
        """
        p_T = np.full(len(tokens_T), 1 / self.vocab_size)
        context_T, is_whole_T = np.zeros(len(tokens_T), np.uint64), np.ones(len(tokens_T), bool)
        for length, order in enumerate(self.orders):
            if length:
                newest_T = history_TN[:, -length]
                is_whole_T = is_whole_T & (newest_T != ABSENT)
                context_T = context_T | np.maximum(newest_T, 0).astype(np.uint64) << np.uint64(self.bits * (length - 1))
            at_T, is_known_T = _find(order.contexts, context_T)
            total_T = order.totals[at_T]
            key_at_T, is_seen_T = _find(order.keys, context_T << np.uint64(self.bits) | tokens_T.astype(np.uint64))
            count_T = np.where(is_seen_T, np.maximum(order.counts[key_at_T] - order.discount, 0), 0)
            mixed_T = (count_T + order.discount * order.num_types[at_T] * p_T) / total_T
            p_T = np.where(is_whole_T & is_known_T, mixed_T, p_T)
        return p_T


def fit(stream_T: np.ndarray, *, vocab_size: int, order: int) -> KneserNey:
    """Count the n-grams of one long text.

    Args:
        stream_T: token ids below ``vocab_size``, more than ``order`` of them.
        vocab_size: V; ``order`` times the bits of one id must fit 64.
        order: the longest n-grams, at least 1.
    """
    bits = max(1, (vocab_size - 1).bit_length())
    if order < 1 or order * bits > KEY_BITS:
        raise ValueError(f"order is {order}; with {vocab_size} tokens it must be from 1 to {KEY_BITS // bits}")
    keys = np.zeros(len(stream_T) - order + 1, np.uint64)
    for offset in range(order):
        keys = keys << np.uint64(bits) | stream_T[offset:offset + len(keys)].astype(np.uint64)
    keys, counts = np.unique(keys, return_counts=True)
    orders = [_order(keys, counts, bits)]
    for length in range(order - 1, 0, -1):
        without_oldest = keys & np.uint64((1 << bits * length) - 1)
        keys, counts = np.unique(without_oldest, return_counts=True)
        orders.insert(0, _order(keys, counts, bits))
    return KneserNey(tuple(orders), vocab_size, bits)


def window_histories(tokens_T: np.ndarray, length: int) -> np.ndarray:
    """[T, length]: the tokens before each one within its window, newest last, -1 before the window's start."""
    padded = np.concatenate([np.full(length, ABSENT, np.int64), tokens_T])
    return np.lib.stride_tricks.sliding_window_view(padded, length)[:len(tokens_T)] if length else np.zeros((len(tokens_T), 0), np.int64)


def evaluate(order: int, num_windows: int, seed: int) -> float:
    """Train on the training split, and print and return the mean nats a token of the held-out windows."""
    # Imported here: it loads JAX, and the model above needs only numpy.
    from demo_training.corpus import EOS, documents, held_out_windows, token_stream
    from demo_training.models import CONTEXT, DEMO, VOCAB_SIZE
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(DEMO.folder / "tokenizer.json"))
    texts = documents(is_held_out=False)
    stream = np.concatenate([token_stream(tokenizer, texts[start:start + 2000]) for start in range(0, len(texts), 2000)])
    model = fit(stream, vocab_size=VOCAB_SIZE, order=order)
    total, count = 0.0, 0
    for tokens_T in held_out_windows(tokenizer, CONTEXT, num_windows, seed):
        p_T = model.probabilities(window_histories(tokens_T, order - 1), tokens_T)[1:]  # the first token only conditions
        is_text_T = tokens_T[1:] > EOS
        total -= float(np.log(p_T[is_text_T]).sum())
        count += int(is_text_T.sum())
    discounts = ", ".join(f"{one.discount:.3f}" for one in model.orders)
    print(f"{order}-gram of {len(stream)} tokens, discounts {discounts}")
    print(f"held-out: {count} measured: {total / count:.4f} nats a token, perplexity {math.exp(total / count):.2f}")
    return total / count


def _order(keys: np.ndarray, counts: np.ndarray, bits: int) -> Order:
    contexts, starts = np.unique(keys >> np.uint64(bits), return_index=True)
    num_once, num_twice = (int((counts == times).sum()) for times in (1, 2))
    discount = num_once / (num_once + 2 * num_twice) if num_once and num_twice else UNKNOWN_DISCOUNT
    return Order(keys=keys, counts=counts, contexts=contexts, totals=np.add.reduceat(counts, starts),
                 num_types=np.diff(starts, append=len(keys)), discount=discount)


def _find(table: np.ndarray, keys_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(place of each key in a sorted table, whether it is there); where it is not, the place is some valid one."""
    at_T = np.minimum(np.searchsorted(table, keys_T), len(table) - 1)
    return at_T, table[at_T] == keys_T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--order", type=int, default=5, help="length of the longest n-grams")
    parser.add_argument("--windows", type=int, default=200, help="how many held-out windows of 1024 tokens to measure")
    arguments = parser.parse_args()
    evaluate(arguments.order, arguments.windows, seed=0)


if __name__ == "__main__":
    main()
