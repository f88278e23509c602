"""Where vectors go: exports for other software. One file each; this is their catalogue."""

from memvec.export.export import export
from memvec.export.npy import Npy
from memvec.export.peft import Peft
from memvec.export.sglang import Sglang
from memvec.export.target import Target
from memvec.export.transformers import Transformers
from memvec.export.vllm import Vllm

TARGETS: dict[str, Target] = {t.name: t for t in (Transformers(), Vllm(), Sglang(), Peft(), Npy())}

__all__ = ["TARGETS", "Target", "export"]
