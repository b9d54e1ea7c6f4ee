"""Keys as codes of 4 or 8 bits a dimension, as FAISS' scalar quantizer stores them."""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

WIDE = 1.6
"""The range of 8-bit codes, as a multiple of the model's widest span."""
BLOCK = 1024
"""Keys that are coded at a time: they stay in the processor's cache."""


class Codec:
    """Divides each dimension into 2^bits intervals of equal width over the model's span.

    The intervals of 8-bit codes cover a wider span, the same for all dimensions (FAISS is twice as fast then). A key of
    unit length is scaled before it is coded, so that key · code is 1: this restores the length that rounding takes.
    Codes depend on nothing but the key and the model.
    """

    def __init__(self, span: NDArray[np.float32], bits: int) -> None:
        self.bits, self.dim = bits, span.shape[1]
        if bits == 8:
            most = np.float32(WIDE * np.abs(span).max())
            self._low, width = np.full(self.dim, -most), np.full(self.dim, 2 * most)
        else:
            self._low, width = span[0], span[1] - span[0]
        self.code_size = (self.dim * bits + 7) // 8
        """Bytes of a code."""
        self._intervals = 2**bits
        self._step = np.maximum(width / self._intervals, np.float32(1e-6)).astype(np.float32)

    def index(self, lists: int) -> Any:
        """An empty FAISS index with this many lists."""
        kind, bounds = faiss.ScalarQuantizer, (self._low, self._step * (self._intervals - 1))
        quantizer_type = kind.QT_4bit if self.bits == 4 else kind.QT_8bit_uniform
        coarse, metric = faiss.IndexFlatIP(self.dim), faiss.METRIC_INNER_PRODUCT
        index: Any = faiss.IndexIVFScalarQuantizer(coarse, self.dim, lists, quantizer_type, metric, False)
        trained = bounds if self.bits == 4 else tuple(bound[:1] for bound in bounds)
        faiss.copy_array_to_vector(np.concatenate(trained).astype(np.float32), index.sq.trained)
        index.is_trained = True
        return index

    def codes(self, keys: NDArray[np.floating]) -> NDArray[np.uint8]:
        """The bytes (n, code size) that FAISS makes of `rounded` keys; keys (n, d) of unit length."""
        found = np.empty((len(keys), self.dim + (self.dim % 2 if self.bits == 4 else 0)), np.uint8)
        found[:, self.dim :] = 0
        for at in range(0, len(keys), BLOCK):
            found[at : at + BLOCK, : self.dim] = self._scaled(keys[at : at + BLOCK])
        return found if self.bits == 8 else found[:, ::2] | found[:, 1::2] << np.uint8(4)

    def rounded(self, keys: NDArray[np.floating]) -> NDArray[np.float32]:
        """Keys (n, d) of unit length as their codes are decoded."""
        return self._middles(self._scaled(keys))

    def _scaled(self, keys: NDArray[np.floating]) -> NDArray[np.float32]:
        """The intervals (n, d) of the keys, scaled so that key · code is 1."""
        keys = keys.astype(np.float32, copy=False)
        along = np.einsum("nd,nd->n", keys, self._middles(self._interval(keys)))
        return self._interval(keys / np.maximum(along, 0.5)[:, None])

    def _interval(self, keys: NDArray[np.float32]) -> NDArray[np.float32]:
        interval = keys - self._low
        interval /= self._step
        np.floor(interval, out=interval)
        return np.clip(interval, 0, self._intervals - 1, out=interval)

    def _middles(self, interval: NDArray[np.float32]) -> NDArray[np.float32]:
        """The middles of intervals (n, d); overwrites its argument."""
        interval += np.float32(0.5)
        interval *= self._step
        interval += self._low
        return interval
