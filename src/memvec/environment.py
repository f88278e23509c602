"""The part of a record that says where and with what a number was made."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from typing import Any

import torch

from memvec import __version__


def environment() -> dict[str, Any]:
    """Versions, processor and threads of this process."""
    import transformers

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "memvec": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
