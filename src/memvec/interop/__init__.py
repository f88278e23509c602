"""Where vectors go: exports for other software. One file each; this is their catalogue."""

from memvec.interop.export import export
from memvec.interop.npy import Npy
from memvec.interop.peft import Peft
from memvec.interop.sglang import Sglang
from memvec.interop.target import Target
from memvec.interop.transformers import Transformers
from memvec.interop.vllm import Vllm

TARGETS: dict[str, Target] = {t.name: t for t in (Transformers(), Vllm(), Sglang(), Peft(), Npy())}

__all__ = ["TARGETS", "Target", "export"]
