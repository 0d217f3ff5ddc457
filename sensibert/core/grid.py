"""A grid divides a weight [N, K] into blocks. Scores, masks and plans refer to them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from torch import Tensor

from .arguments import checked, show
from .errors import SensibertError


@dataclass(frozen=True)
class Grid:
    """Blocks of block_rows x block_cols elements over a weight [N, K]; 0 means the whole axis.

    The last block of an axis may be shorter. SensibertError for other sizes."""

    block_rows: int
    block_cols: int

    def __post_init__(self) -> None:
        for name in ("block_rows", "block_cols"):
            size = getattr(self, name)
            if isinstance(size, bool) or not isinstance(size, int) or size < 0:
                raise SensibertError(f"Grid: {name} is {show(size)}, want a whole number >= 0 (0 = whole axis)")

    @classmethod
    def element(cls) -> Grid:
        """Single weights."""
        return cls(1, 1)

    @classmethod
    def row(cls) -> Grid:
        """Output channels: an FFN neuron in the up projection."""
        return cls(1, 0)

    @classmethod
    def column(cls) -> Grid:
        """Input channels: an FFN neuron in the down projection."""
        return cls(0, 1)

    @classmethod
    def rows(cls, span: int) -> Grid:
        """Bands of `span` output channels: an attention head in the query, key and value projections."""
        return cls(span, 0)

    @classmethod
    def columns(cls, span: int) -> Grid:
        """Bands of `span` input channels: an attention head in the output projection."""
        return cls(0, span)

    @classmethod
    def block(cls, rows: int, cols: int) -> Grid:
        """Blocks of rows x cols elements."""
        return cls(rows, cols)

    @classmethod
    def tensor(cls) -> Grid:
        """The whole weight as one block."""
        return cls(0, 0)

    @classmethod
    def parse(cls, text: str) -> Grid:
        """Inverse of str(): `element`, `row`, `column`, `rows:64`, `columns:64`, `64x64`, `tensor`; else
        SensibertError."""
        named = {"element": cls(1, 1), "row": cls(1, 0), "column": cls(0, 1), "tensor": cls(0, 0)}
        if not isinstance(text, str):
            raise SensibertError(f"Grid: text is {show(text)}, want text such as element or 64x64")
        if text in named:
            return named[text]
        band = re.fullmatch(r"(rows|columns):(\d+)", text)
        if band:
            return cls.rows(int(band[2])) if band[1] == "rows" else cls.columns(int(band[2]))
        block = re.fullmatch(r"(\d+)x(\d+)", text)
        if block:
            return cls(int(block[1]), int(block[2]))
        raise SensibertError(f"Grid: text is {text!r}, want element, row, column, rows:D, columns:D, BNxBK or tensor")

    def __str__(self) -> str:
        special = {(1, 1): "element", (1, 0): "row", (0, 1): "column", (0, 0): "tensor"}
        pair = (self.block_rows, self.block_cols)
        if pair in special:
            return special[pair]
        if not self.block_cols:
            return f"rows:{self.block_rows}"
        if not self.block_rows:
            return f"columns:{self.block_cols}"
        return f"{self.block_rows}x{self.block_cols}"

    def block_size(self, num_rows: int, num_cols: int) -> tuple[int, int]:
        """Elements of a full block (rows, columns) in a weight [N, K], at least (1, 1)."""
        return self.block_rows or max(num_rows, 1), self.block_cols or max(num_cols, 1)

    def shape(self, num_rows: int, num_cols: int) -> tuple[int, int]:
        """Number of blocks along each axis of a weight [N, K]."""
        rows, cols = self.block_size(num_rows, num_cols)
        return math.ceil(num_rows / rows), math.ceil(num_cols / cols)

    @checked
    def expand(self, keep: Tensor, num_rows: int, num_cols: int) -> Tensor:
        """keep [block rows, block columns] -> [N, K], every element with the value of its block.

        SensibertError if keep is not of `shape(N, K)`."""
        if tuple(keep.shape) != self.shape(num_rows, num_cols):
            raise SensibertError(f"Grid {self}: keep is {tuple(keep.shape)}, want {self.shape(num_rows, num_cols)}")
        rows, cols = self.block_size(num_rows, num_cols)
        wide = keep.repeat_interleave(rows, 0)[:num_rows]
        return wide.repeat_interleave(cols, 1)[:, :num_cols]
