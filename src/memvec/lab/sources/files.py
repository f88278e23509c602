"""Your own texts: txt, md, jsonl, parquet, csv, a folder of them, or standard input."""

from __future__ import annotations

from typing import Literal

from memvec.lab.sources.written import WrittenTexts


class Files(WrittenTexts):
    """Your own texts: txt, md, jsonl, parquet, csv, a folder of them, or standard input."""

    kind: Literal["files"] = "files"
